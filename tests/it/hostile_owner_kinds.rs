//! Files and folders of every kind that somebody may put into a backup directory, or that an
//! administrator has made of it: mounts in it, attributes, file systems of the owner's own, second names.
//! What cannot be done is refused before anything is begun, and what is beside it is worked on.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::chains::{Backups, TOOLS, copy_to};
use crate::support::guard::Guard;
use crate::support::tools::{have, run};

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");
/// A user without an entry in the user database.
const OWNER: u32 = 4_000_000;

/// A backup directory of a FULL and three INCs.
struct Setup {
    points: Backups,
    top: tempfile::TempDir,
}

impl Setup {
    /// `None`, and the test says why, where it cannot be made.
    fn new(test: &str) -> Option<Self> {
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } != 0 {
            println!("skipped: {test} needs root");
            return None;
        }
        if !have(test, &TOOLS) {
            return None;
        }
        let setup =
            Setup { points: Backups::new(1, 3, "", false), top: tempfile::tempdir().unwrap() };
        setup.fill();
        Some(setup)
    }

    /// The directory as it was in the beginning.
    fn fill(&self) {
        let _ = std::fs::remove_dir_all(self.root());
        std::fs::create_dir(self.root()).unwrap();
        copy_to(self.points.dir.path(), &self.root());
    }

    fn root(&self) -> PathBuf {
        self.top.path().join("b")
    }

    fn disk(&self) -> PathBuf {
        self.root().join("sda")
    }

    /// The file of a point.
    fn image(&self, i: usize) -> PathBuf {
        self.disk().join(self.points.name(i))
    }

    /// All commands that remove, replace or rename images, or change them.
    fn writers(&self) -> Vec<Vec<String>> {
        let (root, disk) = (text(&self.root()), text(&self.disk()));
        let all: [&[&str]; 4] = [
            &["consolidate", &root, "sda", "--until", &self.points.name(2)],
            &["commit", &disk],
            &["snapshot-rebase", &disk],
            &["prune", "--keep-last", "1", "--force", &root],
        ];
        all.iter().map(|a| a.iter().map(|s| s.to_string()).collect()).collect()
    }

    /// Each of them is refused with the code and the words, and has changed no image and left no
    /// journal: the next command works.
    fn all_refuse(&self, code: i32, words: &str) {
        for args in self.writers() {
            let newer = self.disk().join("FULL-1710000000-sda.qcow2");
            if args[0] == "prune" {
                std::fs::copy(self.image(0), &newer).unwrap();
            }
            let before = self.contents();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let out = fleecefs(&args);
            assert_eq!(out.status.code(), Some(code), "{args:?}: {}", stderr(&out));
            assert!(stderr(&out).contains(words), "{args:?}: {}", stderr(&out));
            assert!(self.contents() == before, "{args:?}: an image has changed");
            for journal in ["removal.journal", "fold.json"] {
                let path = self.disk().join(".fleecefs").join(journal);
                assert!(!path.exists(), "{args:?}: {journal}");
            }
            let _ = std::fs::remove_file(&newer);
        }
    }

    fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all: Vec<_> = std::fs::read_dir(self.disk())
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.is_file())
            .map(|p| (p.clone(), std::fs::read(p).unwrap()))
            .collect();
        all.sort();
        all
    }

    /// What is left to do is done, and right.
    fn works(&self) {
        let (root, until) = (self.root(), self.points.name(2));
        must(&["consolidate", &text(&root), "sda", "--until", &until]);
        must(&["commit", &text(&self.disk())]);
        self.points.check(&root, [], "in the end");
        must(&["verify", "--create", &text(&root)]);
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().into()
}

fn fleecefs(args: &[&str]) -> Output {
    Command::new(FLEECEFS).args(args).output().unwrap()
}

fn must(args: &[&str]) -> Output {
    let out = fleecefs(args);
    assert!(out.status.success(), "{args:?}: {}", stderr(&out));
    out
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Whether a command that needs something of the kernel went through.
fn try_run(test: &str, program: &str, args: &[&str]) -> bool {
    let out = Command::new(program).args(args).output().unwrap();
    if !out.status.success() {
        println!("skipped: {test}: {program} {args:?}: {}", stderr(&out));
    }
    out.status.success()
}

/// Takes an attribute away again, so that the folder can be removed.
struct Attribute(PathBuf, &'static str);

impl Drop for Attribute {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg(self.1.replace('+', "-")).arg(&self.0).output();
    }
}

/// A mount, where the kernel has what it needs.
fn try_mount(test: &str, options: &str, what: &Path, at: &Path) -> Option<Guard> {
    let said = match Guard::try_mount(options, what, at) {
        Ok(guard) => return Some(guard),
        Err(said) => said,
    };
    println!("skipped: {test}: mount {options}: {said}");
    None
}

#[test]
fn what_an_attribute_holds_fast_is_refused_before_anything_goes() {
    let test = "what_an_attribute_holds_fast_is_refused_before_anything_goes";
    if !have(test, &["chattr"]) {
        return;
    }
    let Some(setup) = Setup::new(test) else { return };
    for (path, attribute) in [
        (setup.image(1), "+i"),
        (setup.image(1), "+a"),
        (setup.image(0), "+i"),
        (setup.disk(), "+a"),
    ] {
        std::fs::create_dir_all(setup.disk().join(".fleecefs")).unwrap();
        if !try_run(test, "chattr", &[attribute, &text(&path)]) {
            return;
        }
        let held = Attribute(path.clone(), attribute);
        let newer = setup.disk().join("FULL-1710000000-sda.qcow2");
        if path == setup.disk() {
            // Only what is there can be tried: what is made would stay.
            for args in &setup.writers()[..3] {
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                let out = fleecefs(&args);
                assert_eq!(out.status.code(), Some(5), "{args:?}: {}", stderr(&out));
                assert!(stderr(&out).contains("append-only"), "{args:?}: {}", stderr(&out));
            }
            assert!(!newer.exists());
        } else {
            setup.all_refuse(5, "immutable or append-only");
        }
        // It can be read all the same.
        must(&[
            "restore",
            "--force",
            &text(&setup.root()),
            "sda/latest",
            &text(&setup.top.path().join("r")),
        ]);
        drop(held);
        setup.works();
        setup.fill();
    }
}

#[test]
fn what_is_mounted_over_an_image_is_refused_before_anything_goes() {
    let test = "what_is_mounted_over_an_image_is_refused_before_anything_goes";
    let Some(setup) = Setup::new(test) else { return };
    let other = setup.top.path().join("other");
    std::fs::copy(setup.image(1), &other).unwrap();
    let kept = std::fs::read(&other).unwrap();
    let at = setup.image(1);
    let Some(held) = try_mount(test, "--bind", &other, &at) else { return };
    setup.all_refuse(6, "unmount it first");
    // As a target, too: before the point is copied.
    let [target, third] = ["target", "third"].map(|n| setup.top.path().join(n));
    std::fs::write(&target, "").unwrap();
    std::fs::write(&third, "").unwrap();
    let held_target = Guard::mount("--bind", &third, &target);
    let out = fleecefs(&["restore", "--force", &text(&setup.root()), "sda/latest", &text(&target)]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    assert!(std::fs::read(&other).unwrap() == kept);
    drop((held, held_target));
    setup.works();
    assert!(std::fs::read(&other).unwrap() == kept);
}

#[test]
fn a_folder_for_manifests_from_elsewhere_is_refused_before_anything_goes() {
    let test = "a_folder_for_manifests_from_elsewhere_is_refused_before_anything_goes";
    let Some(setup) = Setup::new(test) else { return };
    let (other, at) = (setup.top.path().join("other"), setup.disk().join(".fleecefs"));
    for bind in [true, false] {
        std::fs::create_dir_all(&other).unwrap();
        std::fs::create_dir_all(&at).unwrap();
        let options = if bind { "--bind" } else { "-t tmpfs" };
        let Some(held) = try_mount(test, options, &other, &at) else { return };
        // What moves an image out of it.
        for args in &setup.writers()[..3] {
            let before = setup.contents();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let out = fleecefs(&args);
            assert_eq!(out.status.code(), Some(11), "{args:?}: {}", stderr(&out));
            assert!(stderr(&out).contains("is another mount"), "{}", stderr(&out));
            assert!(setup.contents() == before, "{args:?}");
        }
        assert!(!at.join("removal.journal").exists() && !at.join("fold.json").exists());
        drop(held);
        setup.works();
        setup.fill();
    }
}

/// A folder of other backups mounted over a disk's folder is that disk; nothing leaves it.
#[test]
fn a_folder_that_is_mounted_in_the_directory_is_worked_on() {
    let test = "a_folder_that_is_mounted_in_the_directory_is_worked_on";
    let Some(setup) = Setup::new(test) else { return };
    let (other, at) = (setup.top.path().join("other"), setup.root().join("sda"));
    std::fs::rename(&at, &other).unwrap();
    std::fs::create_dir(&at).unwrap();
    let Some(held) = try_mount(test, "--bind", &other, &at) else { return };
    setup.works();
    drop(held);
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 0);
}

#[test]
fn a_file_system_that_cannot_be_written_is_read() {
    let test = "a_file_system_that_cannot_be_written_is_read";
    let Some(setup) = Setup::new(test) else { return };
    let root = text(&setup.root());
    let Some(_held) = try_mount(test, "--bind", &setup.root(), &setup.root()) else { return };
    run("mount", &["-o", "remount,bind,ro", &root]);
    must(&["list", &root]);
    assert_eq!(fleecefs(&["verify", &root]).status.code(), Some(19));
    let target = setup.top.path().join("restored");
    must(&["restore", &root, "sda/latest", &text(&target)]);
    assert!(std::fs::read(&target).unwrap() == *setup.points.truth.last().unwrap());
    for args in setup.writers().into_iter().take(3) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = fleecefs(&args);
        assert_eq!(out.status.code(), Some(5), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains("mount it read-write"), "{args:?}: {}", stderr(&out));
    }
}

/// Another disk's image under a second name is that image, and loses nothing.
#[test]
fn a_second_name_of_another_disks_image_takes_nothing_from_it() {
    let test = "a_second_name_of_another_disks_image_takes_nothing_from_it";
    let Some(setup) = Setup::new(test) else { return };
    let root = text(&setup.root());
    let other = setup.root().join("sdb/FULL-1600000000-sdb.qcow2");
    std::fs::create_dir(other.parent().unwrap()).unwrap();
    std::fs::hard_link(setup.image(0), &other).unwrap();
    std::fs::copy(&other, other.with_file_name("FULL-1650000000-sdb.qcow2")).unwrap();
    let kept = std::fs::read(&other).unwrap();
    must(&["list", &root]);
    must(&["verify", "--create", &root]);
    must(&["prune", "--keep-last", "1", "--force", &root]);
    assert!(!other.exists());
    assert!(std::fs::read(setup.image(0)).unwrap() == kept);
    setup.points.check(&setup.root(), [0, 1, 2, 3], "after the prune");
}

/// Everybody may make names in a sticky folder, and remove only his own. What is a stranger's is not
/// used for temporary files.
#[test]
fn a_sticky_folder_is_worked_in_and_warned_of() {
    let test = "a_sticky_folder_is_worked_in_and_warned_of";
    let Some(setup) = Setup::new(test) else { return };
    std::fs::set_permissions(setup.disk(), PermissionsExt::from_mode(0o1777)).unwrap();
    let strange = setup.disk().join(".fleecefs-tmp-0123456789abcdef01234567");
    std::fs::write(&strange, "x").unwrap();
    chown(&strange, Some(OWNER), Some(OWNER)).unwrap();
    let out = must(&["rebase", &text(&setup.disk())]);
    assert!(stderr(&out).contains("users may write there"), "{}", stderr(&out));
    setup.works();
    assert_eq!(std::fs::read(&strange).unwrap(), b"x");
    for entry in std::fs::read_dir(setup.disk()).unwrap() {
        let path = entry.unwrap().path();
        assert!(path == strange || path.symlink_metadata().unwrap().uid() == 0, "{path:?}");
    }
}

/// A FUSE file system of the owner's own, whose server answers nothing: without `allow_other`, which
/// root alone can permit, the kernel asks it nothing on behalf of others.
#[test]
fn a_file_system_of_the_owners_that_never_answers_holds_nobody_up() {
    let test = "a_file_system_of_the_owners_that_never_answers_holds_nobody_up";
    if !have(test, &["/dev/fuse"]) {
        return;
    }
    let Some(setup) = Setup::new(test) else { return };
    let at = setup.root().join("silent");
    std::fs::create_dir(&at).unwrap();
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
    let options = format!("fd={fd},rootmode=40000,user_id={OWNER},group_id={OWNER}\0");
    let name = std::ffi::CString::new(text(&at)).unwrap();
    // SAFETY: strings that end in NUL.
    let mounted = unsafe {
        libc::mount(
            c"silent".as_ptr(),
            name.as_ptr(),
            c"fuse".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
    let _held = Guard::of(r#"umount -l "$1""#, &[&at]);
    let root = text(&setup.root());
    let out = must(&["list", &root]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("silent: cannot read it"), "{said}");
    assert!(said.contains(&setup.points.name(3)), "{said}");
    assert!(matches!(fleecefs(&["verify", &root]).status.code(), Some(18 | 19)));
    setup.points.check(&setup.root(), [0, 1, 2, 3], "beside it");
    // Ends every request that waits, should there be one.
    drop(device);
}
