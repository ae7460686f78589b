//! `files cp --zip`: what Info-ZIP and Python unpack is what a copy into a folder has, but for what zip archives have
//! not, and that is told. And what `files cat` does on a terminal.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::support::file_systems::{Image, Points, TOOLS, fill, fill_unix, said, shell};
use crate::support::tools::{have, is_root, on_terminal};

/// Lists an archive, name by name with what Unix's mode it has, after each checksum was compared.
const LIST: &str = "import sys, zipfile\n\
    with zipfile.ZipFile(sys.argv[1]) as z:\n\
    \x20   assert z.testzip() is None\n\
    \x20   for i in z.infolist():\n\
    \x20       print('%s %o %d' % (i.filename, i.external_attr >> 16, i.file_size))\n";

/// What can be compared: contents, permissions, owners, and times to the second, of what 1980 to 2038 hold.
fn line(path: &Path) -> String {
    let meta = path.symlink_metadata().unwrap();
    let mut line = format!("{:o} {}:{}", meta.mode() & !0o7000, meta.uid(), meta.gid());
    if meta.is_symlink() {
        return format!("{:?}", path.read_link().unwrap());
    }
    if meta.is_file() {
        line += &format!(" {}", blake3::hash(&std::fs::read(path).unwrap()).to_hex());
    }
    if meta.mtime() > 315_532_800 {
        line += &format!(" {}", meta.mtime());
    }
    line
}

#[test]
fn what_unzip_unpacks_is_what_a_copy_has() {
    let test = "what_unzip_unpacks_is_what_a_copy_has";
    let more = ["mkfs.ext4", "unzip", "python3"];
    if !have(test, &[TOOLS.as_slice(), &more].concat()) || !is_root(test) {
        return;
    }
    let image = Image::new(64 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
    let mounted = image.mount("");
    fill(&image.mnt());
    fill_unix(&image.mnt());
    shell(
        &image.mnt(),
        "mkdir 'dir/ä folder' 'dir/back\\slash'; echo ü > 'dir/ä folder/ü'; echo x > 'dir/back\\slash/x'",
    );
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());

    let out = tempfile::tempdir().unwrap();
    let archive = out.path().join("a.zip");
    let zip = points.files(&["cp", "--zip"], "vda/latest", &[]);
    std::fs::write(&archive, &zip.stdout).unwrap();
    // Two names that it cannot have, and a pipe.
    let why = said(&zip);
    assert_eq!(zip.status.code(), Some(16), "{why}");
    for left_out in ["n\\xff", "back\\slash: not in a zip archive", "dir/pipe: not in a zip"] {
        assert!(why.contains(left_out), "{left_out}: {why}");
    }
    assert!(why.contains("3 files not copied completely"), "{why}");

    let list = Command::new("python3").args(["-c", LIST]).arg(&archive).output().unwrap();
    assert!(list.status.success(), "{}", said(&list));
    let list = String::from_utf8(list.stdout).unwrap();
    for entry in ["./dir/ 40755 0\n", "./dir/sub/hard 100644 6\n", "./dir/out 120777 19\n"] {
        assert!(list.contains(entry), "{entry}: {list}");
    }

    let mut unzip = Command::new("unzip");
    unzip.args(["-q", "-X", "-d"]).arg(out.path().join("unzipped")).arg(&archive);
    let unzipped = unzip.env("LC_ALL", "C.UTF-8").output().unwrap();
    assert!(unzipped.status.success(), "{}", said(&unzipped));

    let copied = points.copied("vda/latest");
    let mut compared = 0;
    let mut todo = vec![copied.path().to_path_buf()];
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let inside = path.strip_prefix(copied.path()).unwrap();
            let unzipped = out.path().join("unzipped").join(inside);
            let has_no_place = inside.to_str().is_none_or(|n| n.contains('\\'));
            if has_no_place || !(meta.is_file() || meta.is_dir() || meta.is_symlink()) {
                assert!(unzipped.symlink_metadata().is_err(), "{inside:?}");
                continue;
            }
            assert_eq!(line(&unzipped), line(&path), "{inside:?}");
            compared += 1;
            if meta.is_dir() {
                todo.push(path);
            }
        }
    }
    assert!(compared > 1000, "{compared} were compared");
}

#[test]
fn one_file_is_an_archive_of_one() {
    let test = "one_file_is_an_archive_of_one";
    if !have(test, &[TOOLS.as_slice(), &["mkfs.ext4", "unzip"]].concat()) || !is_root(test) {
        return;
    }
    let image = Image::new(16 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
    let mounted = image.mount("");
    shell(&image.mnt(), "mkdir d; seq 100000 > d/numbers");
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let zip = points.files(&["cp", "--zip"], "vda/latest/d/numbers", &[]);
    assert!(zip.status.success(), "{}", said(&zip));
    assert!(zip.stdout.len() < 300_000, "{} bytes", zip.stdout.len());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.zip"), &zip.stdout).unwrap();
    let mut unzip = Command::new("unzip");
    let printed = unzip.arg("-p").arg(dir.path().join("a.zip")).arg("numbers").output().unwrap();
    let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), numbers);
    // Not both.
    let both = points.files(&["cp", "--zip", "--tar"], "vda/latest/d/numbers", &[]);
    assert_eq!(both.status.code(), Some(2), "{}", said(&both));
}

#[test]
fn a_terminal_obeys_nothing_in_a_file() {
    let test = "a_terminal_obeys_nothing_in_a_file";
    if !have(test, &[TOOLS.as_slice(), &["mkfs.ext4"]].concat()) || !is_root(test) {
        return;
    }
    let image = Image::new(16 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
    let mounted = image.mount("");
    std::fs::write(image.mnt().join("f"), b"a\tb\n\x1b]0;title\x07\xc2\x9b31m\xff\n").unwrap();
    drop(mounted);
    let mut points = Points::new();
    points.add(&image.path());
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["files", "cat"]).arg(points.dir.path()).arg("vda/latest/f");
    let (code, shown) = on_terminal(&mut command, 80);
    let shown = shown.replace("        ", "\t");
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("b\n\\u{1b}]0;title\\u{7}\\u{9b}31m\\xff\n"), "{shown:?}");
    // A pipe gets the bytes.
    let piped = points.files(&["cat"], "vda/latest/f", &[]);
    assert_eq!(piped.stdout, b"a\tb\n\x1b]0;title\x07\xc2\x9b31m\xff\n");
}
