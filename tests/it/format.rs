//! `contrib/doc/format.md` is enough to write a reader: the one beside it, which knows nothing else, says of a
//! directory that real backups made what `list` says, and finds what does not match its hash.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::backup::{Caller, images};
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{self, have, run};
use serde_json::Value;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "python3"];

/// What a line of the reader is: folder, image, level, time, parent, and what it says of it.
type Line = [String; 6];

/// In the place of b3sum, which few machines have: the reader calls this test, which hashes a file.
#[test]
fn b3sum_stand_in() {
    let (Some(from), Some(to)) = (std::env::var_os("HASH_OF"), std::env::var_os("HASH_TO")) else {
        return;
    };
    let mut bytes = Vec::new();
    std::fs::File::open(from).unwrap().read_to_end(&mut bytes).unwrap();
    let line = format!("{}  -\n", blake3::hash(&bytes).to_hex());
    std::fs::File::create(to).unwrap().write_all(line.as_bytes()).unwrap();
}

/// A folder with a `b3sum` that is this test.
fn stand_in(dir: &Path) -> PathBuf {
    let bin = dir.join("bin");
    std::fs::create_dir(&bin).unwrap();
    let script = format!(
        "set -e\ncat >\"$0.in.$$\"\nHASH_OF=\"$0.in.$$\" HASH_TO=\"$0.out.$$\" '{}' --exact \
         format::b3sum_stand_in >&2\ncat \"$0.out.$$\"\nrm \"$0.in.$$\" \"$0.out.$$\"",
        std::env::current_exe().unwrap().display()
    );
    tools::write_script(&bin.join("b3sum"), &script);
    bin
}

/// What the reader says of a directory, and whether it found all sound. Python's own packages are left out,
/// so that it is always the same hash program.
fn reader(target: &Path, bin: &Path) -> (BTreeSet<Line>, bool) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/doc/read_points.py");
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let mut c = Command::new("python3");
    let out = c.args(["-I", "-S"]).arg(script).arg(target).env("PATH", path).output().unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(!err.contains("Traceback") && !err.contains("not checked"), "{err}");
    let text = String::from_utf8(out.stdout).unwrap();
    let line = |l: &str| -> Line {
        let parts: Vec<String> = l.split('\t').map(str::to_string).collect();
        parts.try_into().unwrap_or_else(|l| panic!("{l:?}"))
    };
    (text.lines().map(line).collect(), out.status.success())
}

/// The same as `list` says it. It looks at no data, so all are sound.
fn listed(target: &Path) -> BTreeSet<Line> {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = c.args(["list", "--json"]).arg(target).output().unwrap();
    let found: Value = serde_json::from_slice(&out.stdout).unwrap();
    let mut all = BTreeSet::new();
    for disk in found["disks"].as_array().unwrap() {
        for p in disk["points"].as_array().unwrap() {
            let source = PathBuf::from(p["file"].as_str().unwrap());
            let folder = source.parent().unwrap().strip_prefix(target).unwrap();
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            let text = |v: &Value| v.as_str().unwrap_or("-").to_string();
            all.insert([
                folder.display().to_string(),
                text(&p["point"]),
                text(&p["level"]),
                fleecefs::units::parse_when(p["time"].as_str().unwrap()).unwrap().to_string(),
                text(&p["parent"]),
                "ok".to_string(),
            ]);
        }
    }
    all
}

fn said_of(lines: &BTreeSet<Line>, image: &Path) -> String {
    let name = image.file_name().unwrap().to_str().unwrap();
    lines.iter().find(|l| l[1] == name).unwrap_or_else(|| panic!("{name}: {lines:?}"))[5].clone()
}

fn program(args: &[&str]) {
    run(env!("CARGO_BIN_EXE_fleecefs"), args);
}

/// A FULL, an INC, a DIFF and a COPY of two disks.
fn daemon() -> (Daemon, Caller) {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("a", "qcow2"), ("b", "raw")] {
        let path = dir.path().join(format!("{name}.img"));
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "4M"]);
    }
    let d = Daemon::start(dir, &[("a", "driver=qcow2"), ("b", "driver=raw")]);
    let caller = Caller::of(&d);
    for (i, level) in ["full", "inc", "diff", "inc", "copy"].into_iter().enumerate() {
        for disk in ["a", "b"] {
            d.io(disk, &[&format!("write -P {} {i}00k 64k", i + 1)]);
        }
        caller.must(level);
    }
    (d, caller)
}

#[test]
fn a_reader_written_from_the_paper_says_what_list_says() {
    if !have("a_reader_written_from_the_paper_says_what_list_says", TOOLS) {
        return;
    }
    let (d, caller) = daemon();
    let bin = stand_in(d.dir.path());
    let target = caller.target.clone();
    let compare = |points: usize, what: &str| {
        let (lines, sound) = reader(&target, &bin);
        assert_eq!(lines, listed(&target), "{what}");
        assert!(sound && lines.len() == points, "{what}: {lines:?}");
    };
    compare(10, "as they were made");
    // Pointers change headers, and so the hashes.
    program(&["rebase", target.join("b.img").to_str().unwrap()]);
    compare(10, "after rebase");
    // The time of what a commit merged is not in the name.
    let other = Caller { target: d.path("commit"), ..caller.clone() };
    ["full", "inc", "inc"].into_iter().for_each(|level| drop(other.must(level)));
    let folder = other.target.join("a.img");
    let until = images(&folder)[1].file_name().unwrap().to_str().unwrap().to_string();
    program(&["commit", folder.to_str().unwrap(), "--until", &until]);
    let (lines, sound) = reader(&other.target, &bin);
    assert_eq!(lines, listed(&other.target), "after commit");
    assert!(sound && lines.len() == 5, "{lines:?}");
    // Flat, and without times in names.
    let flat = Caller { target: d.path("flat"), ..caller.clone() };
    flat.with(&["--no-subdir", "--no-timestamp"]).must("full");
    flat.with(&["--no-subdir", "--no-timestamp"]).must("inc");
    let (lines, sound) = reader(&flat.target, &bin);
    assert_eq!(lines, listed(&flat.target), "flat");
    assert!(sound && lines.len() == 4, "{lines:?}");
}

#[test]
fn the_reader_finds_what_does_not_match_its_hash() {
    if !have("the_reader_finds_what_does_not_match_its_hash", TOOLS) {
        return;
    }
    let (d, caller) = daemon();
    let bin = stand_in(d.dir.path());
    let all = images(&caller.target.join("a.img"));
    let flip = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let manifest = |image: &Path| {
        let name = format!("{}.json", image.file_name().unwrap().to_str().unwrap());
        image.parent().unwrap().join(".fleecefs").join(name)
    };
    // In the middle of a FULL, at the end of an image, in a manifest; one without; one that is shorter.
    let middle = std::fs::metadata(&all[1]).unwrap().len() / 2;
    flip(&all[1], usize::try_from(middle).unwrap());
    flip(&all[2], 3000);
    flip(&manifest(&all[3]), 300);
    std::fs::remove_file(manifest(&all[4])).unwrap();
    let (lines, sound) = reader(&caller.target, &bin);
    assert!(!sound);
    assert_eq!(said_of(&lines, &all[0]), "ok");
    assert!(said_of(&lines, &all[1]).starts_with("image "), "{lines:?}");
    assert_eq!(said_of(&lines, &all[2]), "image has other ends");
    assert!(said_of(&lines, &all[3]).contains("manifest"), "{lines:?}");
    assert_ne!(said_of(&lines, &all[3]), "ok");
    assert_eq!(said_of(&lines, &all[4]), "no manifest");
}
