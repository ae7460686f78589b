//! Images made and changed by us as QEMU's tools see them, and what a hostile image makes of
//! qemu-img: nothing.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::tools::{self, have, run};
use crate::support::verbs::{MIB, TOOLS, chain, s};
use fleecefs::layer::Format;
use fleecefs::layer::qcow2::backing::set_backing;
use fleecefs::layer::qcow2::create::NewImage;
use fleecefs::layer::qcow2::header::Compression;
use fleecefs::qemu_img::{self, CheckResult};
use inotify::{Inotify, WatchMask};

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn go_on() -> fleecefs::error::Result<()> {
    Ok(())
}

fn info(image: &Path) -> serde_json::Value {
    // -U: as it is, without looking at what it names.
    let out = run("qemu-img", &["info", "-U", "--output=json", s(image)]);
    serde_json::from_slice(&out.stdout).unwrap()
}

fn shape(cluster_size: u64, extended_l2: bool, zstd: bool, size: u64) -> NewImage {
    let compression = if zstd { Compression::Zstd } else { Compression::Zlib };
    NewImage { size, cluster_size, extended_l2, lazy_refcounts: zstd, compression }
}

#[test]
fn empty_images_are_sound_and_can_be_written() {
    if !have("empty_images_are_sound_and_can_be_written", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    const GIB: u64 = 1 << 30;
    let small = [0, 512, 1000, 3 * MIB + 512, GIB];
    let shapes = [(512, false), (4096, false), (16384, true), (65536, false), (2 << 20, true)];
    for (cluster, extended) in shapes {
        // 20 TiB is more than QEMU allows with clusters of 512 bytes or 4 KiB.
        let large = (cluster >= 65536).then_some(20 << 40);
        for size in small.into_iter().chain(large) {
            for zstd in [false, true] {
                let path = dir.path().join(format!("{cluster}-{size}-{zstd}"));
                let image = shape(cluster, extended, zstd, size);
                image.write(&File::create_new(&path).unwrap(), &path).unwrap();
                check_new(&path, &image);
            }
        }
    }
}

fn check_new(path: &Path, image: &NewImage) {
    let size = image.size.next_multiple_of(512);
    let found = info(path);
    let data = &found["format-specific"]["data"];
    let zstd = image.compression == Compression::Zstd;
    assert_eq!(found["virtual-size"], size, "{path:?}");
    assert_eq!(found["cluster-size"], image.cluster_size, "{path:?}");
    assert_eq!(data["compat"], "1.1");
    assert_eq!(data["lazy-refcounts"], image.lazy_refcounts, "{path:?}");
    assert_eq!(data["extended-l2"], image.extended_l2, "{path:?}");
    assert_eq!(data["compression-type"], if zstd { "zstd" } else { "zlib" }, "{path:?}");
    run("qemu-img", &["check", "-q", "-f", "qcow2", s(path)]);
    let places = [0, (size / 2) & !511, size.saturating_sub(512)];
    for (i, at) in places.into_iter().enumerate().filter(|_| size > 0) {
        let write = format!("write -P {} {at} 512", i + 1);
        let read = format!("read -P {} {at} 512", i + 1);
        run("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &read, s(path)]);
    }
    run("qemu-img", &["check", "-q", "-f", "qcow2", s(path)]);
}

#[test]
fn impossible_images_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = File::create_new(&path).unwrap();
    for image in [
        shape(512, true, false, MIB),
        shape(0, false, false, MIB),
        shape(3 << 16, false, false, MIB),
        shape(4 << 20, false, false, MIB),
        shape(512, false, false, 20 << 40),
        shape(2 << 20, false, false, u64::MAX),
    ] {
        let e = image.write(&file, &path).unwrap_err();
        assert_eq!(e.kind(), fleecefs::error::Kind::Usage, "{image:?}");
    }
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn backing_files_are_named_as_qemu_reads_them() {
    if !have("backing_files_are_named_as_qemu_reads_them", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&base), "1M"]);
    for options in ["compat=0.10", "compat=1.1", "compat=1.1,cluster_size=512"] {
        let image = dir.path().join(options);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, s(&image), "1M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 64k 64k", s(&image)]);
        run("qemu-img", &["snapshot", "-c", "one", s(&image)]);
        let has_bitmap = options.starts_with("compat=1.1");
        if has_bitmap {
            run("qemu-img", &["bitmap", "--add", s(&image), "bitmap0"]);
        }
        for (name, format) in [("base", "qcow2"), ("./a:b", "raw"), ("base", "qcow2")] {
            set_backing(&open(&image), &image, Some((OsStr::new(name), format))).unwrap();
            let found = info(&image);
            assert_eq!(found["backing-filename"], name, "{options}");
            assert_eq!(found["backing-filename-format"], format, "{options}");
        }
        run("qemu-img", &["check", "-q", s(&image)]);
        run("qemu-io", &["-c", "read -P 7 64k 64k", "-c", "read -P 0 0 64k", s(&image)]);
        set_backing(&open(&image), &image, None).unwrap();
        let found = info(&image);
        assert!(found["backing-filename"].is_null() && found["backing-filename-format"].is_null());
        assert_eq!(found["snapshots"].as_array().unwrap().len(), 1);
        let bitmaps = found["format-specific"]["data"]["bitmaps"].as_array().map_or(0, Vec::len);
        assert_eq!(bitmaps, usize::from(has_bitmap));
        run("qemu-img", &["check", "-q", s(&image)]);
        run("qemu-io", &["-f", "qcow2", "-c", "read -P 7 64k 64k", s(&image)]);
    }
}

/// A file that nobody may open, and a watch that tells.
struct Secret {
    dir: tempfile::TempDir,
    watch: Inotify,
}

impl Secret {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Open to everybody: rights are not what keeps qemu-img from it.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", s(&dir.path().join("secret")), "1M"]);
        let watch = Inotify::init().unwrap();
        watch.watches().add(dir.path(), WatchMask::OPEN).unwrap();
        Secret { dir, watch }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("secret")
    }

    fn is_opened(&mut self) -> bool {
        let mut buffer = [0; 4096];
        self.watch.read_events(&mut buffer).is_ok_and(|events| events.count() > 0)
    }
}

#[test]
fn no_pointer_in_an_image_is_followed() {
    if !have("no_pointer_in_an_image_is_followed", &TOOLS) {
        return;
    }
    let mut secret = Secret::new();
    let dir = tempfile::tempdir().unwrap();
    let path = secret.path();
    let json = format!(r#"json:{{"driver":"qcow2","file.filename":"{}"}}"#, s(&path));
    let parts = r#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}"#;
    for pointer in [s(&path), &json, parts, "nbd://127.0.0.1:1/x"] {
        let image = dir.path().join("image");
        shape(65536, false, false, MIB).write(&File::create(&image).unwrap(), &image).unwrap();
        set_backing(&open(&image), &image, Some((OsStr::new(pointer), "qcow2"))).unwrap();
        let file = open(&image);
        assert_eq!(qemu_img::check(&file, &image, &go_on).unwrap(), CheckResult::Sound);
        qemu_img::snapshot(&file, "name", &image, &go_on).unwrap();
        qemu_img::resize(&file, 2 * MIB, &image, &go_on).unwrap();
        // As that which is committed, and as that which takes it in.
        let other = dir.path().join("other");
        std::fs::copy(&image, &other).unwrap();
        let both = (&open(&other), &file);
        qemu_img::commit(both, Format::Qcow2, 0, &image, &go_on).unwrap();
        assert!(!secret.is_opened(), "{pointer}");
    }
    // The watch does tell.
    File::open(&path).unwrap();
    assert!(secret.is_opened());
}

#[test]
fn damage_and_leaks_are_told() {
    if !have("damage_and_leaks_are_told", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", s(&image), "1M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", s(&image)]);
    let check = || qemu_img::check(&open(&image), &image, &go_on).unwrap();
    assert_eq!(check(), CheckResult::Sound);
    use std::os::unix::fs::FileExt;
    let word = |at: u64| {
        let mut word = [0; 8];
        open(&image).read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    // The first L1 entry of the header's L1 table.
    let (l1, mask) = (word(40), 0x00ff_ffff_ffff_fe00);
    let l2 = word(l1) & mask;
    let entry = word(l2);
    open(&image).write_all_at(&[0; 8], l2).unwrap();
    assert!(matches!(check(), CheckResult::Leaks(_)));
    open(&image).write_all_at(&(entry + 512).to_be_bytes(), l2).unwrap();
    assert!(matches!(check(), CheckResult::Damaged(said) if !said.is_empty()));
}

/// A program called qemu-img that is a shell script, in a folder that every user may enter.
fn false_qemu_img(script: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let path = dir.path().join("qemu-img");
    tools::write_script(&path, script);
    dir
}

/// `rebase` over three points, with another qemu-img.
fn rebase(dir: &Path, program: &tempfile::TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(["rebase", s(dir)]).env("PATH", program.path()).env("SECRET", "a secret word");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[test]
fn qemu_img_has_no_rights() {
    if !have("qemu_img_has_no_rights", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    let open = tempfile::tempdir().unwrap();
    std::fs::set_permissions(open.path(), Permissions::from_mode(0o777)).unwrap();
    let (made, own) = (open.path().join("made"), open.path().join("own"));
    std::fs::write(&own, "").unwrap();
    std::fs::set_permissions(&own, Permissions::from_mode(0o666)).unwrap();
    let script = format!(
        "exec >&2; grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|NoNewPrivs):' /proc/self/status\n\
         ulimit -c; ulimit -f; env; pwd; ls -l /proc/self/fd\n\
         (: > {0}) && echo MADE; (echo x > {1}) && echo WRITTEN; rm -f {1} && echo REMOVED\n\
         exit 2",
        s(&made),
        s(&own)
    );
    let out = rebase(&chain.dir, &false_qemu_img(&script)).output().unwrap();
    // Its lines and tabs are shown escaped.
    let said = String::from_utf8(out.stderr).unwrap().replace("\\n", "\n").replace("\\t", "\t");
    assert!(said.contains("NoNewPrivs:\t1"), "{said}");
    assert!(said.contains("CapPrm:\t0000000000000000"), "{said}");
    assert!(said.contains("CapEff:\t0000000000000000"), "{said}");
    assert!(!said.contains("secret word"), "{said}");
    let root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0;
    if root {
        assert!(said.contains("Uid:\t65534\t65534\t65534\t65534"), "{said}");
        assert!(said.contains("Gid:\t65534\t65534\t65534\t65534"), "{said}");
        assert!(said.lines().any(|l| l.trim_end() == "Groups:"), "{said}");
    }
    // No byte gets into any file; where there is Landlock, no name either.
    assert_eq!(std::fs::read(&own).unwrap_or_default(), b"");
    assert!(!said.contains("WRITTEN"), "{said}");
    if has_landlock() {
        assert!(!said.contains("MADE") && !said.contains("REMOVED"), "{said}");
        assert!(own.exists() && !made.exists());
    }
}

fn has_landlock() -> bool {
    let null = std::ptr::null::<u8>();
    // SAFETY: asks for the version (flag 1), for which there is no structure.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, null, 0_usize, 1) > 0 }
}

#[test]
fn what_qemu_img_says_is_bounded() {
    if !have("what_qemu_img_says_is_bounded", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    let flood = false_qemu_img("head -c 20000000 /dev/zero | tr '\\0' x >&2; exit 2");
    let out = rebase(&chain.dir, &flood).output().unwrap();
    assert!(!out.status.success() && out.stderr.len() < 80_000, "{}", out.stderr.len());
}

/// Waits until the process has a child, and gives its number.
fn child_of(parent: &mut Child) -> u32 {
    loop {
        assert!(parent.try_wait().unwrap().is_none(), "it ended before");
        let tasks = std::fs::read_dir(format!("/proc/{}/task", parent.id())).unwrap();
        for task in tasks.flatten() {
            let children =
                std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let child = children.split_whitespace().next().and_then(|c| c.parse().ok());
            // Until it has become another program, it is not yet tied to its parent.
            let is = |c: &u32| {
                std::fs::read(format!("/proc/{c}/comm")).is_ok_and(|name| name == b"sleep\n")
            };
            if let Some(child) = child.filter(is) {
                return child;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn qemu_img_ends_when_it_is_told_to_and_with_its_parent() {
    if !have("qemu_img_ends_when_it_is_told_to_and_with_its_parent", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = chain(dir.path(), "sda", &[8 * MIB]);
    let sleeper = false_qemu_img("exec sleep 100000");
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let mut job = rebase(&chain.dir, &sleeper).spawn().unwrap();
        let child = child_of(&mut job);
        // SAFETY: a signal to a process that was started above and not waited for.
        unsafe { libc::kill(job.id() as libc::pid_t, signal) };
        assert!(!job.wait().unwrap().success());
        let alive = || {
            std::fs::read_to_string(format!("/proc/{child}/stat"))
                .is_ok_and(|stat| stat.contains("(sleep)") && !stat.contains(") Z"))
        };
        while alive() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
