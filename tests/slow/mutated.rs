//! Backup directories in which anything may be anything: bytes, names, manifests, journals, links,
//! pipes, folders. Every command ends, in time and in little memory, without a panic; and a disk
//! beside them that nobody touched is served as if it were alone.
//!
//! `FLEECEFS_MUTATED=20000` tries so many disks instead of a few hundred.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::foreign;
use crate::support::guard::Guard;
use crate::support::images::{self, Chain, Oracle, Rng};
use crate::support::tools::{self, run};

/// Disks tried unless the environment says otherwise.
const DISKS: u64 = 300;
/// Disks in one backup directory.
const BATCH: u64 = 150;
/// A command over one backup directory takes seconds; this is a hang.
const LIMIT: Duration = Duration::from_secs(300);
/// Peak memory of a command, in KiB.
const MEMORY: i64 = 256 << 10;
const SIZE: u64 = 1 << 20;

/// Folders as backup programs make them, to be mutated.
struct Templates {
    dir: tempfile::TempDir,
    names: Vec<&'static str>,
    /// The bytes of the newest point of `qcow2`.
    truth: Vec<u8>,
}

fn templates() -> Templates {
    let dir = images::tempdir();
    let mut chain = Chain::new(dir.path(), "qcow2");
    for point in 1..=3u64 {
        let ops = [
            format!("write -P {point} {} 20k", point * 65536),
            format!("write -z {} 4k", point * 4096),
            format!("write -c -P 9 {} 4k", 512 * 1024 + point * 4096),
        ];
        chain.point("cluster_size=4k", SIZE, &ops);
    }
    let files = chain.finish().files;
    let truth = Oracle::new(&files).bytes(2);
    for (name, options) in [("extended", "cluster_size=16k,extended_l2=on"), ("old", "compat=0.10")]
    {
        let mut chain = Chain::new(dir.path(), name).without_extension();
        chain.point(options, SIZE, &["write -P 1 0 100k".into()]);
        chain.point(options, SIZE, &["write -P 2 8k 8k".into()]);
        chain.finish();
    }
    let raw = dir.path().join("raw");
    std::fs::create_dir(&raw).unwrap();
    std::fs::write(raw.join("FULL-1700000000-raw"), vec![7; 65536]).unwrap();
    std::fs::write(raw.join("COPY-1700000100-raw"), vec![8; 65536]).unwrap();
    for name in ["qcow2", "raw"] {
        run(
            env!("CARGO_BIN_EXE_fleecefs"),
            &["-q", "verify", "--create", dir.path().join(name).to_str().unwrap()],
        );
    }
    let streams = dir.path().join("streams");
    std::fs::create_dir(&streams).unwrap();
    std::fs::write(
        streams.join("sda.full.data"),
        foreign::stream("sda", 0, 300_000, &[(70_000, vec![1; 10_000])]),
    )
    .unwrap();
    let inc = foreign::stream("sda", 1, 300_000, &[(0, vec![2; 512])]);
    std::fs::write(streams.join("sda.inc.virtnbdbackup.1.data"), inc).unwrap();
    let archives = dir.path().join("archives");
    std::fs::create_dir(&archives).unwrap();
    std::fs::write(archives.join("vzdump-qemu-1.vma"), foreign::archive(1, 2)).unwrap();
    Templates { dir, names: vec!["qcow2", "extended", "old", "raw", "streams", "archives"], truth }
}

/// What stands in the place of a number, name or value in JSON.
const VALUES: &[&str] = &[
    "null",
    "-1",
    "18446744073709551616",
    "1e999",
    "\"\"",
    "\"..\"",
    "\"../x\"",
    "\"/etc/passwd\"",
    "\"\\u0000\"",
    "\"\\u001b[2J\"",
    "[]",
    "{}",
    "[[[[[[[[[[]]]]]]]]]]",
    "true",
    "0",
];

/// What may stand in a journal.
fn journal(rng: &mut Rng) -> String {
    let names =
        ["FULL-1700003600-qcow2.qcow2", "..", "../good/x", "/etc/passwd", "", "a/b", ".fleecefs"];
    let mut name = || names[rng.below(names.len() as u64) as usize];
    let texts = [
        format!("{{\"remove\": [\"{}\", \"{}\"]}}", name(), name()),
        format!(
            "{{\"publish\": {{\"temporary\": \"{}\", \"manifest\": {{\"image\": \"{}\"}}}}, \"remove\": []}}",
            name(),
            name()
        ),
        format!(
            "{{\"full\": \"{}\", \"interim\": \"{}\", \"increments\": [\"{}\"], \"raw\": false, \"manifest\": null}}",
            name(),
            name(),
            name()
        ),
        "{".repeat(100_000),
        "[".repeat(5_000_000),
    ];
    texts[rng.below(texts.len() as u64) as usize].clone()
}

/// Every file below a folder.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        match std::fs::symlink_metadata(&path).unwrap() {
            m if m.is_dir() => files(&path, found),
            m if m.is_file() => found.push(path),
            _ => {}
        }
    }
}

fn mutate(dir: &Path, rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let mut all = Vec::new();
        files(dir, &mut all);
        if all.is_empty() {
            return;
        }
        let file = all[rng.below(all.len() as u64) as usize].clone();
        match rng.below(12) {
            0..4 => change_bytes(&file, rng),
            4 | 5 => change_json(&file, rng),
            6 => rename(&file, rng),
            7 => std::fs::remove_file(&file).unwrap(),
            8 => {
                let len = [0, 3, 4096, 1 << 34][rng.below(4) as usize];
                std::fs::File::options().write(true).open(&file).unwrap().set_len(len).unwrap();
            }
            9 => replace(&file, rng),
            _ => add(dir, rng),
        }
    }
}

fn change_bytes(file: &Path, rng: &mut Rng) {
    let f = std::fs::File::options().read(true).write(true).open(file).unwrap();
    let len = f.metadata().unwrap().len().min(1 << 22);
    if len == 0 {
        return;
    }
    for _ in 0..1 + rng.below(4) {
        let reach = if rng.below(2) == 0 { len.min(160) } else { len };
        let mut byte = [0];
        let at = rng.below(reach);
        f.read_exact_at(&mut byte, at).unwrap();
        byte[0] = match rng.below(3) {
            0 => byte[0] ^ (1 << rng.below(8)),
            1 => rng.next() as u8,
            _ => 0xff,
        };
        f.write_all_at(&byte, at).unwrap();
    }
}

/// Another value in a manifest, whose checksum goes so that it is looked at.
fn change_json(file: &Path, rng: &mut Rng) {
    // Some have been made gigabytes long.
    let short = std::fs::metadata(file).unwrap().len() < 1 << 20;
    let text = if short { std::fs::read_to_string(file).ok() } else { None };
    let Some(text) = text else { return change_bytes(file, rng) };
    let mut lines: Vec<String> =
        text.lines().filter(|l| !l.contains("\"checksum\"")).map(String::from).collect();
    let at = rng.below(lines.len().max(1) as u64) as usize;
    let Some(line) = lines.get_mut(at) else { return };
    if let Some((key, _)) = line.clone().split_once(": ") {
        *line = format!("{key}: {},", VALUES[rng.below(VALUES.len() as u64) as usize]);
    }
    let text = lines.join("\n").replace(",\n}", "\n}");
    std::fs::write(file, text).unwrap();
}

fn rename(file: &Path, rng: &mut Rng) {
    let long = "x".repeat(250);
    let names: [&[u8]; 10] = [
        b"INC-1700009999-qcow2.qcow2",
        b"FULL-0-a",
        b"DIFF-99999999999999999999-a",
        b"INC--1-a",
        b".json",
        b"a\x1b[2J\xff\nb.raw",
        long.as_bytes(),
        b"FULL-1700003600-other",
        b"uuid",
        b"x.vma.zst",
    ];
    let name = names[rng.below(names.len() as u64) as usize];
    let to = file.with_file_name(std::ffi::OsStr::from_bytes(name));
    if !to.is_dir() {
        std::fs::rename(file, to).unwrap();
    }
}

/// Something else in the place of a file.
fn replace(path: &Path, rng: &mut Rng) {
    std::fs::remove_file(path).unwrap();
    put_odd(path, rng);
}

fn put_odd(path: &Path, rng: &mut Rng) {
    use std::os::unix::fs::symlink;
    match rng.below(6) {
        0 => symlink("/dev/zero", path).unwrap(),
        1 => symlink("..", path).unwrap(),
        2 => symlink(path.file_name().unwrap(), path).unwrap(),
        3 => std::fs::create_dir(path).unwrap(),
        4 => drop(std::os::unix::net::UnixListener::bind(path)),
        _ => assert!(Command::new("mkfifo").arg(path).status().unwrap().success()),
    }
}

/// A journal, a lock or another of our own files.
fn add(dir: &Path, rng: &mut Rng) {
    let side = dir.join(".fleecefs");
    let _ = std::fs::create_dir(&side);
    if !side.is_dir() {
        return;
    }
    let names = [
        "removal.journal",
        "fold.json",
        "x.header",
        "lock",
        "../uuid",
        "FULL-1-a.json",
        "x.new",
        ".tmp-1",
    ];
    let path = side.join(names[rng.below(names.len() as u64) as usize]);
    if std::fs::symlink_metadata(&path).is_ok() {
        return;
    }
    match rng.below(4) {
        0 => put_odd(&path, rng),
        1 => std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap(),
        _ => std::fs::write(&path, journal(rng)).unwrap(),
    }
}

/// How a command ended.
struct Ended {
    out: Vec<u8>,
    err: String,
}

/// Runs a command to its end: no signal, no panic, bounded time and memory.
// It is waited for: by wait4, which tells how much memory it took.
#[allow(clippy::zombie_processes)]
fn fleecefs(args: &[&str], dir: &Path, seed: &str) -> Ended {
    let what = format!("{args:?} on {seed}");
    let files = tempfile::tempdir().unwrap();
    let open = |n: &str| std::fs::File::create(files.path().join(n)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(args)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(open("out"))
        .stderr(open("err"))
        .spawn()
        .unwrap();
    let start = Instant::now();
    let pid = child.id() as i32;
    // SAFETY: numbers, for which zeros are a value.
    let (mut status, mut usage) = (0, unsafe { std::mem::zeroed::<libc::rusage>() });
    // SAFETY: our own child, and two places to write to. It is not waited for elsewhere.
    while unsafe { libc::wait4(pid, &mut status, libc::WNOHANG, &mut usage) } == 0 {
        if start.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{what}: hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let err =
        String::from_utf8_lossy(&std::fs::read(files.path().join("err")).unwrap()).into_owned();
    let status = std::process::ExitStatus::from_raw(status);
    assert_eq!(status.signal(), None, "{what}: {err}");
    assert!(status.code() != Some(101) && !err.contains("panicked"), "{what}: {err}");
    assert!(usage.ru_maxrss < MEMORY, "{what}: {} KiB of memory", usage.ru_maxrss);
    Ended { out: std::fs::read(files.path().join("out")).unwrap(), err }
}

/// Mounts, reads both ends of every file, and the good disk whole.
fn look_through_mount(dir: &Path, truth: &[u8], seed: &str) {
    let mount = tempfile::tempdir().unwrap();
    let at = mount.path().to_str().unwrap();
    // For a test that is killed.
    let _guard = Guard::of(r#"umount -l "$1""#, &[mount.path()]);
    let status = Command::new(env!("CARGO_BIN_EXE_fleecefs"))
        .args(["-q", "mount", dir.to_str().unwrap(), at])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "mount of {seed}");
    let read = std::panic::catch_unwind(|| {
        let mut all = Vec::new();
        files(mount.path(), &mut all);
        let mut buf = vec![0; 65536];
        for path in &all {
            let Ok(file) = std::fs::File::open(path) else { continue };
            let len = file.metadata().map_or(0, |m| m.len());
            // EIO is an answer too.
            let _ = file.read_at(&mut buf, 0);
            let _ = file.read_at(&mut buf, len.saturating_sub(65536));
        }
        let good = std::fs::read(mount.path().join("good/latest.raw"));
        assert!(good.unwrap() == truth, "{seed}: the good disk has other bytes");
    });
    let end = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(["umount", at]).status().unwrap();
    if let Err(e) = read {
        std::panic::resume_unwind(e);
    }
    assert!(end.success(), "umount of {seed}");
}

#[test]
fn nothing_in_a_folder_stops_panics_or_fills_a_command() {
    let tools = ["qemu-img", "qemu-io", "cp", "mkfifo", "/dev/fuse"];
    if !tools::have("nothing_in_a_folder_stops_panics_or_fills_a_command", &tools) {
        return;
    }
    let wanted = std::env::var("FLEECEFS_MUTATED").ok().and_then(|v| v.parse().ok());
    let disks: u64 = wanted.unwrap_or(DISKS);
    let templates = templates();
    let copy = |name: &str, to: &Path| {
        let from = templates.dir.path().join(name);
        run("cp", &["-a", "--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
    };
    for batch in 0..disks.div_ceil(BATCH) {
        let root = images::tempdir();
        copy("qcow2", &root.path().join("good"));
        for i in 0..BATCH.min(disks - batch * BATCH) {
            let n = batch * BATCH + i;
            let mut rng = Rng(n);
            let name = templates.names[rng.below(templates.names.len() as u64) as usize];
            let dir = root.path().join(format!("d{n}"));
            copy(name, &dir);
            mutate(&dir, &mut rng);
        }
        let seed = format!("batch {batch}");
        let list = fleecefs(&["list", "--json"], root.path(), &seed);
        let json: serde_json::Value = serde_json::from_slice(&list.out)
            .unwrap_or_else(|e| panic!("{seed}: {e}: {}", list.err));
        let text = json.to_string();
        assert!(text.contains("good"), "{seed}: the good disk is not listed");
        fleecefs(&["verify", "--quick"], root.path(), &seed);
        fleecefs(&["verify"], root.path(), &seed);
        fleecefs(&["prune", "--keep-last", "1", "--dry-run"], root.path(), &seed);
        look_through_mount(root.path(), &templates.truth, &seed);
    }
}
