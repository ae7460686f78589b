//! The owner of a backup directory may put there what he likes. Whoever reads it never follows a link
//! out of it, never waits for a pipe, never reads without end, and shows what is unaffected.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::mount::Mount;
use crate::support::process::{eventually, is_gone, server_pid};
use crate::support::tools::have;
use crate::support::tree::Backups;
use fleecefs::chain::Catalog;
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::{Finding, Kind};
use fleecefs::fs::watch::Watch;

/// Nothing here takes long; this only ends a run that would hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that a run may ask for, in KiB: what it needs, and far from what a huge file would take.
const ADDRESS_SPACE: u64 = 2 << 20;

/// Ways to make a file that is not to be read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trap {
    Pipe,
    Socket,
    Endless,
    Huge,
    Folder,
}

const TRAPS: [Trap; 5] = [Trap::Pipe, Trap::Socket, Trap::Endless, Trap::Huge, Trap::Folder];

fn set(trap: Trap, path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    match trap {
        Trap::Pipe => {
            let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
            // SAFETY: a valid C string.
            assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        }
        Trap::Socket => drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
        Trap::Endless => std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
        Trap::Huge => std::fs::File::create(path).unwrap().set_len(1 << 40).unwrap(),
        Trap::Folder => std::fs::create_dir(path).unwrap(),
    }
}

/// Two disks: traps are set at the first one.
fn two_disks() -> Backups {
    let b = Backups::new();
    for disk in ["sda", "sdb"] {
        b.image(&format!("{disk}/FULL-1700000000-{disk}"), None);
        b.image(&format!("{disk}/INC-1700000100-{disk}"), Some(&format!("FULL-1700000000-{disk}")));
    }
    // The manifest of a lost image makes every reader ask the journals.
    b.file("sda/.fleecefs/FULL-1600000000-sda.json", b"{}");
    b
}

/// Places whose contents some reader wants.
const SMALL: [&str; 11] = [
    "sda/.fleecefs/removal.journal",
    "sda/.fleecefs/fold.json",
    "sda/.fleecefs/INC-1700000100-sda.json",
    "sda/.fleecefs/FULL-1600000000-sdx.json",
    "sda/.fleecefs/INC-1700000100-sda.header",
    "sda/.fleecefs/lock",
    "sda/.fleecefs/status.json",
    "sda/sda.config",
    "sda/uuid",
    "uuid",
    ".fleecefs",
];
/// Places of whole images, which may be as large as they like.
const IMAGES: [&str; 7] = [
    "sda/INC-1700000300-sda",
    "sda/FULL-sda",
    "sda/disk.raw",
    "sda/archive.vma",
    "sda/archive.vma.zst",
    "sda/x.copy.data",
    "sda/x.inc.virtnbdbackup.1.data",
];

/// Runs the program with little memory, and no longer than it may take.
fn fleecefs(args: &[&str]) -> Output {
    let limited = format!("ulimit -v {ADDRESS_SPACE}; exec \"$@\"");
    let mut child = Command::new("sh")
        .args(["-c", &limited, "sh", env!("CARGO_BIN_EXE_fleecefs")])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("fleecefs {args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

/// `list` both ways and `map`: the other disk is there as ever.
fn look_on(b: &Backups, case: &str) {
    let root = b.root().to_str().unwrap();
    let out = fleecefs(&["list", root]);
    assert!(out.status.success(), "{case}: {}", text(&out));
    assert!(text(&out).contains("INC-1700000100-sdb"), "{case}: {}", text(&out));
    let out = fleecefs(&["list", "--json", root]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect(case);
    let disks = json["disks"].as_array().expect(case);
    let sdb = disks.iter().find(|d| d["disk"] == "sdb").expect(case);
    assert_eq!(sdb["points"].as_array().expect(case).len(), 2, "{case}");
    let out = fleecefs(&["map", root, "sdb/latest"]);
    assert!(out.status.success(), "{case}: {}", text(&out));
}

#[test]
fn nothing_that_is_read_can_hold_a_reader_up() {
    for trap in TRAPS {
        for place in SMALL.iter().chain(&IMAGES) {
            let case = format!("{trap:?} as {place}");
            let b = two_disks();
            set(trap, &b.path(place));
            look_on(&b, &case);
            // A whole image is verified to its end, however long that takes.
            if trap != Trap::Huge || SMALL.contains(place) {
                let out = fleecefs(&["verify", b.root().to_str().unwrap()]);
                assert!(matches!(out.status.code(), Some(0 | 18 | 19)), "{case}: {}", text(&out));
            }
        }
    }
}

#[test]
fn a_folder_for_manifests_that_is_none_stops_nobody_else() {
    for trap in TRAPS {
        let b = two_disks();
        std::fs::remove_dir_all(b.path("sda/.fleecefs")).unwrap();
        set(trap, &b.path("sda/.fleecefs"));
        look_on(&b, &format!("{trap:?}"));
        let told = b.findings().iter().any(|f| f.path.starts_with(b.path("sda/.fleecefs")));
        assert_eq!(told, trap != Trap::Folder, "{trap:?}: {:?}", b.findings());
    }
}

#[test]
fn what_is_behind_a_linked_folder_is_neither_read_nor_believed() {
    let b = two_disks();
    let other = Backups::new();
    other.image("FULL-1700000000-secret", None);
    other.file("removal.journal", br#"{"remove": ["INC-1700000100-sda"]}"#);
    std::fs::remove_dir_all(b.path("sda/.fleecefs")).unwrap();
    b.link("sda/.fleecefs", other.root());
    b.link("linked", other.root());
    let shown = b.shown();
    assert_eq!(shown.len(), 4, "{shown:?}");
    assert!(b.findings().iter().any(|f| f.path == b.path("sda/.fleecefs")));
    look_on(&b, "links");
}

#[test]
fn a_journal_that_leads_elsewhere_is_damaged_and_says_what_to_do() {
    for (name, journal) in [
        ("removal.journal", r#"{"remove": ["../sdb/FULL-1700000000-sdb"]}"#),
        ("removal.journal", r#"{"remove": ["/etc/passwd"]}"#),
        ("fold.json", r#"{"interim": "/etc/passwd", "increments": []}"#),
        ("fold.json", r#"{"interim": "a", "increments": ["../a"]}"#),
    ] {
        let b = two_disks();
        b.file(&format!("sda/.fleecefs/{name}"), journal.as_bytes());
        let is_it = |f: &&Finding| f.path == b.path(&format!("sda/.fleecefs/{name}"));
        let findings = b.findings();
        let found =
            findings.iter().find(is_it).unwrap_or_else(|| panic!("{journal}: {findings:?}"));
        assert_eq!(found.kind, Kind::Corrupt, "{journal}");
        assert!(found.remedy.is_some(), "{journal}");
        look_on(&b, journal);
    }
}

#[test]
fn a_backup_among_the_manifests_is_told_of() {
    let b = two_disks();
    b.image(".fleecefs/FULL-1700000000-.fleecefs", None);
    let path = b.path(".fleecefs/FULL-1700000000-.fleecefs");
    let found = b.findings().into_iter().find(|f| f.path == path).expect("a finding");
    assert!(found.remedy.is_some());
    // What is kept there for a while is no backup.
    let b = two_disks();
    for name in ["FULL-1-d.json", "FULL-1-d.partial", "FULL-1-d.partial.fleece"] {
        b.image(&format!(".fleecefs/{name}"), None);
    }
    assert!(
        !b.findings().iter().any(|f| f.message.contains("in the folder for manifests: ignored"))
    );
}

#[test]
fn a_very_deep_folder_is_read_with_few_descriptors() {
    let b = Backups::new();
    let deep: PathBuf = std::iter::repeat_n("d", 1000).collect();
    b.image(deep.join("FULL-1-x").to_str().unwrap(), None);
    let limited = "ulimit -n 24; exec \"$@\"";
    let program = env!("CARGO_BIN_EXE_fleecefs");
    let root = b.root().to_str().unwrap();
    let out =
        Command::new("sh").args(["-c", limited, "sh", program, "list", root]).output().unwrap();
    assert!(text(&out).contains("FULL-1-x"), "{}", text(&out));
}

#[test]
fn a_mount_goes_on_and_ends_whatever_appears_below_it() {
    if !have("a_mount_goes_on_and_ends_whatever_appears_below_it", &["/dev/fuse"]) {
        return;
    }
    let b = two_disks();
    let mount = Mount::new(b.root());
    let pid = server_pid(mount.path());
    let mut newest = "INC-1700000100-sdb".to_string();
    for (i, trap) in TRAPS.into_iter().enumerate() {
        for place in SMALL.iter().chain(&IMAGES) {
            if let Ok(meta) = b.path(place).symlink_metadata() {
                match meta.is_dir() {
                    true => std::fs::remove_dir_all(b.path(place)).unwrap(),
                    false => std::fs::remove_file(b.path(place)).unwrap(),
                }
            }
            set(trap, &b.path(place));
        }
        let new = format!("INC-170000020{i}-sdb");
        b.image(&format!("sdb/{new}"), Some(&newest));
        let shown = mount.path().join("sdb").join(format!("{new}.raw"));
        eventually("the new point", || shown.exists());
        newest = new;
    }
    drop(mount);
    eventually("the end of the mount", || is_gone(pid));
}

/// How many scans race; FLEECEFS_RACES sets another number.
fn races() -> usize {
    std::env::var("FLEECEFS_RACES").map_or(50, |n| n.parse().unwrap())
}

/// Exchanges two names for ever, until dropped.
struct Exchange<'a>(&'a AtomicBool);

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const SECRET: &[u8] = b"SECRET OF ROOT";

fn sees_the_secret(catalog: &Catalog) -> bool {
    let points = || catalog.disks.iter().flat_map(|d| &d.points);
    let files = points().flat_map(|p| &p.layers).map(|l| &l.file);
    let read = files.filter_map(|f| fleecefs::folder::read_small(f.path(), 1 << 20).ok());
    points().any(|p| p.name.contains("other-guest"))
        || read.into_iter().any(|bytes| bytes.starts_with(SECRET))
        || points().flat_map(|p| &p.layers).any(|l| {
            let mut start = [0; SECRET.len()];
            let read = fleecefs::storage::ReadAt::read_exact_at(&*l.file, &mut start, 0);
            read.is_ok() && start == SECRET
        })
}

#[test]
fn a_folder_that_is_exchanged_for_a_link_shows_nothing_from_outside() {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let b = two_disks();
    let outside = Backups::new();
    outside.file("other-guest.raw", &[SECRET, &[0; 4096][..]].concat());
    // The same names as inside: only their bytes tell.
    outside.file("FULL-1700000000-sda", &[SECRET, &[0; 4096][..]].concat());
    outside.file(".fleecefs/INC-1700000100-sda.json", b"{}");
    b.link("l", outside.root());
    let (folder, link, stop) = (b.path("sda"), b.path("l"), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let exchange = || {
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, &folder, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                std::thread::sleep(Duration::from_micros(20));
            }
        };
        let _end = Exchange(&stop);
        scope.spawn(exchange);
        let mut cache = None;
        for i in 0..races() {
            let (catalog, next) =
                scan(b.root(), &ScanOptions::default(), cache.as_ref()).expect("the top stays");
            assert!(!sees_the_secret(&catalog), "scan {i}");
            assert!(catalog.disks.iter().any(|d| d.path == Path::new("sdb")), "scan {i}");
            cache = Some(next);
            // Watches are set in the same way.
            drop(Watch::new(b.root(), Path::new("/"), None));
        }
    });
}
