//! Names and texts from outside, as a terminal, a log and a script get to see them: nothing that a
//! terminal obeys, nothing that cannot be seen, and no line that somebody else has begun.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::mount::Mount;
use crate::support::tools::{have, on_terminal};
use crate::support::tree::{Backups, tiny};
use fleecefs::text::{is_hidden, path_text};

/// ESC, BEL, CR, LF, DEL, C1, writing from right to left, a line separator, no width, a tag.
const TEXT: &str = "é\x1b]0;x\x07\x1b[31m\r\nINJECTED\x7f\u{9b}31m\u{202e}\u{2066}\u{2028}\u{200b}\u{feff}\
    \u{e0041}漢";

/// A name with all of that; not UTF-8 at its end if it may be so.
fn hostile(start: &str, utf8: bool) -> OsString {
    let mut name = OsString::from(format!("{start}{TEXT}"));
    if !utf8 {
        name.push(OsStr::from_bytes(b"\xff\xc2"));
    }
    name
}

/// Two disks whose names are hostile, and beside them two folders with all kinds of odd files.
fn directory() -> Backups {
    let all = Backups::new();
    for (start, utf8) in [("d", true), ("e", false)] {
        let write = |folder: &str, name: &str, bytes: &[u8]| {
            let folder = all.root().join(hostile(folder, utf8));
            std::fs::create_dir_all(folder.join(".fleecefs")).unwrap();
            std::fs::write(folder.join(hostile(name, utf8)), bytes).unwrap();
        };
        for name in ["FULL-1700000000-sd", "INC-1700000100-sd", "FULL-1700000300-sd"] {
            write(start, name, &tiny(None));
        }
        write("odd", "INC-1700000400-sd", &tiny(Some(TEXT)));
        write("odd", "FULL-1700000500-sd.partial", b"half");
        write("odd", ".fleecefs/INC-1700000100-x.json", format!("{{\"{TEXT}\": 1}}").as_bytes());
        write("odd", "broken.qcow2", &[b"QFI\xfb".as_slice(), &[0xff; 200]].concat());
        write("odd", "broken.vma", &[b"VMA\0".as_slice(), &[0xff; 200]].concat());
        let link = all.root().join(hostile("odd", utf8)).join(hostile("FULL-1700000000-l", utf8));
        std::os::unix::fs::symlink("/nowhere", link).unwrap();
    }
    all
}

fn fleecefs(args: &[&OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

/// Fails if `text` has anything but visible characters and its own line breaks.
fn assert_visible(what: &str, text: &[u8]) {
    let text = std::str::from_utf8(text).unwrap_or_else(|e| panic!("{what}: {e}"));
    let bad = text.chars().find(|c| *c != '\n' && is_hidden(*c));
    assert_eq!(bad, None, "{what}: {text:?}");
    assert!(!text.lines().any(|l| l.starts_with("INJECTED")), "{what}: {text:?}");
}

/// Runs the program and looks at what it printed.
fn look(args: &[&OsStr]) -> Output {
    let out = fleecefs(args);
    let what = format!("{args:?}");
    assert_visible(&what, &out.stdout);
    assert_visible(&what, &out.stderr);
    assert!(!out.stdout.is_empty() || !out.stderr.is_empty(), "{what} says nothing");
    assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"), "{what}: {out:?}");
    out
}

fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

/// Looks at each command: `B` is the directory, `D` a disk in it, `P` one of its points, `N` a name
/// that nothing has.
fn look_at_all(dir: &Path, utf8: bool, commands: &[&str]) {
    let disk = hostile(if utf8 { "d" } else { "e" }, utf8);
    let point = hostile("INC-1700000100-sd", utf8);
    let nothing = hostile("/nonexistent/", utf8);
    let own = |word: OsString| match word.to_str().unwrap() {
        "B" => dir.into(),
        "D" => disk.clone(),
        "P" => point.clone(),
        "N" => nothing.clone(),
        "B/D" => dir.join(&disk).into_os_string(),
        "D/P" => Path::new(&disk).join(&point).into_os_string(),
        "D/latest" => Path::new(&disk).join("latest").into_os_string(),
        _ => word,
    };
    for line in commands {
        let args: Vec<OsString> = words(line).into_iter().map(own).collect();
        look(&args.iter().map(OsString::as_os_str).collect::<Vec<_>>());
    }
}

#[test]
fn no_command_prints_what_a_terminal_obeys() {
    let all = directory();
    let commands = [
        "list B",
        "list --json B",
        "list --strict B",
        "list N",
        "list B N",
        "list --N N",
        "map B D/P",
        "map --output=json B D/P",
        "map B N",
        "verify B",
        "verify -v --quick B",
        "verify --json B",
        "prune --dry-run --keep-last 1 --force B",
        "prune --dry-run --keep-last 1 --force --consolidate B",
        "prune --dry-run --keep-last 1 --json B",
        "prune --keep-last 1 B",
        "restore --dry-run B D/latest N",
        "restore --dry-run --json B D/latest N",
        "restore B D/latest N",
        "restore B N N",
        "consolidate --dry-run B D --until P",
        "consolidate --dry-run B D --until N",
        "consolidate --dry-run B N --until P",
        "rebase --dry-run B/D",
        "rebase --dry-run --until N B/D",
        "commit --dry-run -v B/D",
        "snapshot-rebase --dry-run B/D",
        "merge --dry-run B/D N",
        "merge B/D N",
        "rebase --dry-run B",
        "mount B N",
        "mount N N",
        "umount N",
        "backup --qmp N --level full --target N",
        "backup --dry-run --qmp N --level full --target B --progress=json",
        "info blockdev --qmp N",
        "info status --qmp N",
        "recover --qmp N",
        "cancel --qmp N",
        "man N",
        "N",
    ];
    for utf8 in [true, false] {
        look_at_all(all.root(), utf8, &commands);
    }
}

/// The disk's points in `list --json`.
fn listed(dir: &Path) -> serde_json::Value {
    let out = look(&[OsStr::new("list"), OsStr::new("--json"), dir.as_os_str()]);
    assert!(out.stdout.is_ascii() || !out.stdout.contains(&0x7f));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn scripts_get_the_name_as_it_is() {
    let all = directory();
    let value = listed(all.root());
    let name = hostile("d", true).into_string().unwrap();
    let disks = value["disks"].as_array().unwrap();
    let disk = disks.iter().find(|d| d["disk"] == name).unwrap_or_else(|| panic!("{value}"));
    let point = hostile("INC-1700000100-sd", true).into_string().unwrap();
    assert!(disk["points"].as_array().unwrap().iter().any(|p| p["point"] == point), "{disk}");
}

#[test]
fn what_a_list_shows_is_understood_as_an_argument() {
    let all = directory();
    let dir = all.root().as_os_str();
    for (start, utf8) in [("d", true), ("e", false)] {
        let (disk, point) = (hostile(start, utf8), hostile("INC-1700000100-sd", utf8));
        // Points whose files are not UTF-8 have a name that is.
        let point = fleecefs::text::to_text(&point);
        let out = look(&["list".as_ref(), dir]);
        let table = String::from_utf8(out.stdout).unwrap();
        let (disk, point) = (path_text(&disk), path_text(&point));
        assert!(
            table.lines().any(|l| l.starts_with(&disk))
                && table.lines().any(|l| l.contains(&point)),
            "{table}"
        );
        let both = OsString::from(format!("{disk}/{point}"));
        let out = look(&["map".as_ref(), dir, &both]);
        assert_eq!(out.status.code(), Some(0), "{out:?}");
        let args = ["consolidate", "--dry-run", "B", &disk, "--until", &point];
        let args = args.map(|a| if a == "B" { dir } else { OsStr::new(a) });
        let out = look(&args);
        // It is found; names that are not UTF-8 cannot be consolidated.
        assert_eq!(out.status.code(), Some(if utf8 { 0 } else { 11 }), "{out:?}");
    }
}

#[test]
fn an_escape_in_a_name_is_told_from_one_that_is_written_out() {
    let all = Backups::new();
    for name in ["a\x1bb", r"a\u{1b}b"] {
        all.file(&format!("{name}/FULL-1700000000-sda.qcow2"), &tiny(None));
    }
    let out = look(&["list".as_ref(), all.root().as_os_str()]);
    let table = String::from_utf8(out.stdout).unwrap();
    let headings = table.lines().filter(|l| l.starts_with('a'));
    let disks: Vec<&str> = headings.map(|l| l.split(' ').next().unwrap()).collect();
    assert_eq!(disks.len(), 2, "{table}");
    assert_ne!(disks[0], disks[1]);
}

#[test]
fn columns_stand_below_each_other() {
    let all = Backups::new();
    for disk in ["漢字", "e\u{301}te", "plain", "x\x1by"] {
        all.file(&format!("{disk}/FULL-1700000000-sda"), &tiny(None));
    }
    let out = look(&["list".as_ref(), all.root().as_os_str()]);
    let table = String::from_utf8(out.stdout).unwrap();
    let at = |l: &str| l.find("2023-").map(|i| fleecefs::text::columns(&l[..i]));
    let places: Vec<usize> = table.lines().filter_map(at).collect();
    assert!(places.len() == 4 && places.iter().all(|p| *p == places[0]), "{table}");
}

/// A directory of which there is much to say.
fn with_long_findings() -> Backups {
    let all = Backups::new();
    all.file("sda/FULL-1700000000-sda", &tiny(None));
    all.file("sda/INC-1700000100-sda", &tiny(Some("an-image-that-nobody-has-seen")));
    all.file("sdb/broken.qcow2", &[b"QFI\xfb".as_slice(), &[0xff; 200]].concat());
    all.link("sdb/FULL-1700000000-sdb", Path::new("/nowhere/at/all"));
    all
}

/// The words of a text, however it is broken.
fn all_words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[test]
fn findings_are_broken_at_the_width_of_a_terminal_and_nowhere_else() {
    let all = with_long_findings();
    let command = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        // As short as can be, so that the path of no file is too long for a line.
        command.args(words).arg(".").current_dir(all.root()).env("NO_COLOR", "1");
        command
    };
    for words in [&["list"][..], &["-qq", "verify"], &["prune", "--keep-last", "1", "--dry-run"]] {
        let piped = command(words).output().unwrap();
        let piped = String::from_utf8([piped.stdout, piped.stderr].concat()).unwrap();
        assert!(piped.lines().any(|l| l.len() > 100), "{piped}");
        for columns in [80, 120, 200] {
            let (_, shown) = on_terminal(&mut command(words), columns);
            let longest = shown.lines().map(fleecefs::text::columns).max().unwrap();
            let paths = piped.split_whitespace().map(str::len).max().unwrap() + 4;
            assert!(longest <= usize::from(columns).min(100).max(paths), "{shown}");
            assert_eq!(all_words(&shown), all_words(&piped));
            // What goes on is seen to go on.
            let broken = shown.lines().count() - piped.lines().count();
            let further = shown.lines().filter(|l| l.starts_with("  ")).count();
            assert!(broken >= 2 && further >= broken, "{shown}");
        }
    }
}

#[test]
fn documents_are_whole_on_a_terminal() {
    let all = with_long_findings();
    for words in
        [&["list", "--json"][..], &["-qq", "verify", "--json"], &["list", "--json", "--runs"]]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        let piped = command.args(words).arg(all.root()).output().unwrap();
        // What is wrong is on the same terminal, below.
        let (_, shown) = on_terminal(&mut command, 40);
        assert!(shown.starts_with(std::str::from_utf8(&piped.stdout).unwrap()), "{shown}");
    }
}

#[test]
fn log_and_status_of_a_mount_are_visible() {
    if !have("log_and_status_of_a_mount_are_visible", &["/dev/fuse"]) {
        return;
    }
    let all = directory();
    let logs = tempfile::tempdir().unwrap();
    let log = logs.path().join("log");
    let options = ["-vv", "--log-file", log.to_str().unwrap()];
    let status = {
        let mount = Mount::with(all.root(), &options);
        let file = hostile("d", true);
        let point: PathBuf =
            mount.point(file.to_str().unwrap(), Path::new(&hostile("FULL-1700000000-sd", true)));
        assert!(point.exists(), "a name in the mount is the file's: {point:?}");
        std::fs::read(mount.path().join(".fleecefs/status.json")).unwrap()
    };
    assert_visible("status.json", &status);
    let value: serde_json::Value = serde_json::from_slice(&status).unwrap();
    let name = hostile("d", true).into_string().unwrap();
    assert!(value["disks"].as_array().unwrap().iter().any(|d| d["disk"] == name), "{value}");
    let log = std::fs::read(log).unwrap();
    assert!(!log.is_empty());
    assert_visible("the log", &log);
    // Each line is one of the program's.
    for line in String::from_utf8(log).unwrap().lines() {
        assert!(line.starts_with("20") && line.contains("Z "), "{line}");
    }
}
