//! What changed in the files of points: against what a script did, and against `diff -r` of the mounted trees; the
//! versions of a file over a hundred points.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::file_systems::{Image, Listing, Points, TOOLS, mount, shell};
use crate::support::tools::{have, is_root, run};
use serde_json::Value;

fn ready(test: &str) -> bool {
    have(test, &[TOOLS.as_slice(), &["mkfs.ext4", "diff", "mke2fs"]].concat()) && is_root(test)
}

/// The objects that a command prints, one a line.
fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect()
}

/// What `diff --files --json` says of two points of `vda`.
fn diff(points: &Points, names: [&str; 2], more: &[&str]) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["-q", "diff", "--files", "--json"]).arg(points.dir.path()).args(names).args(more);
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    objects(&String::from_utf8(out.stdout).unwrap())
}

/// The points of a disk, the oldest first.
fn names(points: &Points) -> Vec<String> {
    let entries = std::fs::read_dir(points.dir.path().join("vda")).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|n| n.ends_with(".qcow2"));
    names.sort_by_key(|n| n.split_once('-').unwrap().1.to_string());
    names
}

/// Each change as a short text: `added a`, `renamed a -> b content`.
fn told(all: &[Value]) -> BTreeSet<String> {
    let one = |v: &Value| {
        let text = |key: &str| v[key].as_str().unwrap_or_default().to_string();
        let from = v["from_path"].as_str().map(|p| format!("{p} -> ")).unwrap_or_default();
        format!("{} {from}{} {}", text("change"), text("path"), text("what")).trim().to_string()
    };
    all.iter().map(one).collect()
}

const BEFORE: &str = r#"
    mkdir -p keep sub/deep moved/inner swap
    i=0; while [ $i -lt 60 ]; do echo file $i > keep/f$i; i=$((i + 1)); done
    echo gone > gone; echo gone too > sub/deep/gone; echo name > sub/name; echo stays > moved/stays
    head -c 300000 /dev/urandom > moved/inner/data; echo same-size > same; echo kept-time > kept
    echo rights > rights; echo touched > touched; echo grows > grows; ln -s same link; echo x > linked
    echo a > swap/a; echo b > swap/b; echo out > moved/out; echo over > over; echo file > kind
    head -c 2000000 /dev/urandom > big
    touch -d '2025-01-01 00:00:00Z' kept same touched rights
"#;

const AFTER: &str = r#"
    rm gone sub/deep/gone; mkdir fresh; echo new > fresh/new; echo new > added
    mv sub/name sub/named; mv moved elsewhere; echo more >> elsewhere/stays; mv elsewhere/out out
    echo SAME-SIZE > same; echo KEPT-TIME > kept; touch -d '2025-01-01 00:00:00Z' kept
    chmod 600 rights; touch -d '2026-01-01 00:00:00Z' touched; echo more >> grows
    rm link; ln -s grows link; ln linked second; mv swap/a swap/c; mv swap/b swap/a; mv swap/c swap/b
    echo new > over.tmp; mv over.tmp over; rm kind; mkdir kind; echo in > kind/in
    printf x | dd of=big bs=1 seek=1000000 conv=notrunc status=none
"#;

#[test]
fn files_are_told_as_the_script_and_as_diff_have_them() {
    if !ready("files_are_told_as_the_script_and_as_diff_have_them") {
        return;
    }
    let image = Image::new(48 << 20, &["mkfs.ext4", "-q", "-F"]);
    let mounted = image.mount("");
    shell(&image.mnt(), BEFORE);
    drop(mounted);
    let before = tempfile::tempdir().unwrap();
    let (old, old_mnt) = (before.path().join("image"), before.path().join("mnt"));
    run("cp", &["--sparse=always", image.path().to_str().unwrap(), old.to_str().unwrap()]);
    std::fs::create_dir(&old_mnt).unwrap();
    let mut points = Points::new();
    points.add(&image.path());
    let mounted = image.mount("");
    shell(&image.mnt(), AFTER);
    drop(mounted);
    points.add(&image.path());
    let names = names(&points);
    let pair = [names[0].as_str(), names[1].as_str()];
    let all = diff(&points, pair, &["--content"]);
    let paths: Vec<_> = all.iter().map(|v| v["path"].as_str().unwrap().to_string()).collect();
    let want: BTreeSet<String> = [
        "removed gone",
        "removed sub/deep/gone",
        "added fresh",
        "added fresh/new",
        "added added",
        "renamed sub/name -> sub/named",
        "renamed moved -> elsewhere",
        "modified elsewhere/stays content",
        "renamed moved/out -> out",
        "modified same content",
        "modified kept content",
        "modified rights attributes",
        "modified touched attributes",
        "modified grows content",
        "modified link content",
        "modified linked attributes",
        "added second",
        "renamed swap/a -> swap/b",
        "renamed swap/b -> swap/a",
        "modified over content",
        "removed kind",
        "added kind",
        "added kind/in",
        "modified big content",
    ]
    .map(String::from)
    .into();
    assert_eq!(told(&all), want);
    let top: Vec<_> = paths.iter().filter(|p| !p.contains('/')).collect();
    assert!(top.is_sorted(), "{paths:?}");
    // Without contents, times and sizes decide: what has its old time back has new attributes only.
    let quick = told(&diff(&points, pair, &[]));
    let differ: Vec<_> = want.symmetric_difference(&quick).cloned().collect();
    assert_eq!(
        differ,
        [
            "modified kept attributes",
            "modified kept content",
            "modified touched attributes",
            "modified touched content"
        ]
    );
    // The other way round, and to itself.
    let back = diff(&points, [pair[1], pair[0]], &["--content"]);
    assert!(told(&back).contains("renamed elsewhere -> moved") && back.len() == all.len());
    assert!(diff(&points, [pair[1], "vda/latest"], &["--content"]).is_empty());
    let _a = mount(&old, &old_mnt, "ro").expect("it is mounted");
    let _b = image.mount("ro");
    as_diff_has_it(&all, &old_mnt, &image.mnt());
}

/// Compares with `diff -r`, and with lists of both trees.
fn as_diff_has_it(all: &[Value], old: &Path, new: &Path) {
    let of = |change: &str, key: &str| -> BTreeSet<PathBuf> {
        let all = all.iter().filter(|v| v["change"] == change);
        all.map(|v| PathBuf::from(v[key].as_str().unwrap())).collect()
    };
    let (renamed, from) = (of("renamed", "path"), of("renamed", "from_path"));
    let paths = |dir: &Path| Listing::of(dir, &[]).0.into_keys().collect::<BTreeSet<_>>();
    let (was, is) = (paths(old), paths(new));
    let below = |path: &PathBuf, tops: &BTreeSet<PathBuf>| tops.iter().any(|t| path.starts_with(t));
    let appeared: BTreeSet<_> =
        is.difference(&was).filter(|p| !below(p, &renamed)).cloned().collect();
    let added: BTreeSet<_> = of("added", "path").difference(&was).cloned().collect();
    assert_eq!(appeared, added);
    let gone: BTreeSet<_> = was.difference(&is).filter(|p| !below(p, &from)).cloned().collect();
    assert_eq!(gone, of("removed", "path").difference(&is).cloned().collect());
    let out =
        Command::new("diff").args(["-rq", "--no-dereference"]).args([old, new]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let second = |l: &str| l.split(" and ").nth(1)?.strip_suffix(" differ").map(PathBuf::from);
    let differ: BTreeSet<PathBuf> = text
        .lines()
        .filter_map(second)
        .map(|p| p.strip_prefix(new).unwrap().to_path_buf())
        .filter(|p| !renamed.contains(p))
        .collect();
    let modified = all.iter().filter(|v| v["change"] == "modified" && v["what"] == "content");
    let modified: BTreeSet<PathBuf> = modified
        .map(|v| PathBuf::from(v["path"].as_str().unwrap()))
        .filter(|p| !below(p, &renamed))
        .collect();
    assert_eq!(differ, modified);
}

/// What is done before point number `i` is made.
fn step(i: usize) -> &'static str {
    match i {
        5 => "mkdir -p dir; head -c 70000 /dev/urandom > dir/file",
        20 | 21 => "head -c 70000 /dev/urandom > dir/file",
        40 => "chmod 640 dir/file",
        50 => "touch -d '2031-05-06 07:08:09Z' dir/file",
        60 => "rm dir/file",
        70 => "echo again > dir/file",
        80 => "mv dir away",
        90 => "mv away dir",
        _ => "",
    }
}

#[test]
fn a_file_has_its_versions_over_a_hundred_points() {
    if !ready("a_file_has_its_versions_over_a_hundred_points") {
        return;
    }
    let image = Image::new(16 << 20, &["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal"]);
    let (mut points, mut hashes) = (Points::new(), BTreeMap::new());
    for i in 0..100 {
        // Between the points of the script only the other end of the disk changes: nothing that leads to the file.
        let mounted = image.mount("");
        shell(&image.mnt(), &format!("{}\n:", step(i)));
        let other = if i % 2 == 0 { "date +%N > other" } else { ":" };
        shell(&image.mnt(), other);
        if let Ok(bytes) = std::fs::read(image.mnt().join("dir/file")) {
            hashes.insert(i, blake3::hash(&bytes).to_hex().to_string());
        }
        drop(mounted);
        if i > 0 {
            let file = std::fs::OpenOptions::new().write(true).open(image.path()).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[i as u8], (16 << 20) - 1).unwrap();
        }
        points.add(&image.path());
    }
    let names = names(&points);
    let text = points.printed(&["versions", "--hash", "--json"], "vda/dir/file", &[]);
    let all = objects(&text);
    let at = |v: &Value, key: &str| names.iter().position(|n| v[key] == n.as_str()).unwrap();
    let found: Vec<_> = all
        .iter()
        .map(|v| (at(v, "point"), at(v, "until_point"), v["change"].as_str().unwrap()))
        .collect();
    let want = [
        (5, 19, "appears"),
        (20, 20, "content"),
        (21, 39, "content"),
        (40, 49, "attributes"),
        (50, 59, "attributes"),
        (60, 69, "vanishes"),
        (70, 79, "appears"),
        (80, 89, "vanishes"),
        (90, 99, "appears"),
    ];
    assert_eq!(found, want);
    for v in &all {
        let (first, last) = (at(v, "point"), at(v, "until_point"));
        assert_eq!(v["points"], last - first + 1, "{v}");
        for i in first..=last {
            assert_eq!(v["blake3"].as_str(), hashes.get(&i).map(String::as_str), "{i}: {v}");
        }
    }
    let every = objects(&points.printed(
        &["find", "--all-points", "--json"],
        "vda",
        &["--type", "file", "--name", "file"],
    ));
    let every: BTreeSet<_> = every
        .iter()
        .map(|v| {
            (
                v["path"].as_str().unwrap(),
                at(v, "point"),
                at(v, "until_point"),
                v["points"].as_u64().unwrap(),
            )
        })
        .collect();
    let want_all = [
        ("away/file", 80, 89, 10),
        ("dir/file", 5, 19, 15),
        ("dir/file", 20, 20, 1),
        ("dir/file", 21, 49, 29),
        ("dir/file", 50, 59, 10),
        ("dir/file", 70, 99, 20),
    ];
    assert_eq!(every, want_all.into());
    // Without hashes a new mtime is a new content.
    let plain = objects(&points.printed(&["versions", "--json"], "vda/dir/file", &[]));
    assert_eq!(plain.len(), want.len());
    assert_eq!(plain[4]["change"], "content");
    let table = points.printed(&["versions"], "vda:/dir/file", &[]);
    assert_eq!(table.lines().count(), want.len() + 1, "{table}");
    let out = points.files(&["versions"], "vda/dir/nothing", &[]);
    assert_eq!(out.status.code(), Some(3));
}
