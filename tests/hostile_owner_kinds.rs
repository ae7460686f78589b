//! Files and folders of every kind that somebody may put into a backup directory, or that an
//! administrator has made of it: mounts in it, attributes, file systems of the owner's own, second names.
//! What cannot be done is refused before anything is begun, and what is beside it is worked on.

mod chains;
#[path = "mounted/guard.rs"]
mod guard;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use chains::qemu::{have, run};
use chains::{Backups, TOOLS, copy_to};
use guard::Guard;

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");
/// A user without an entry in the user database.
const OWNER: u32 = 4_000_000;

/// A backup directory of a FULL and three INCs.
struct Scene {
    points: Backups,
    top: tempfile::TempDir,
}

impl Scene {
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
        let scene =
            Scene { points: Backups::new(1, 3, "", false), top: tempfile::tempdir().unwrap() };
        scene.fill();
        Some(scene)
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
    let Some(scene) = Scene::new(test) else { return };
    for (path, attribute) in [
        (scene.image(1), "+i"),
        (scene.image(1), "+a"),
        (scene.image(0), "+i"),
        (scene.disk(), "+a"),
    ] {
        std::fs::create_dir_all(scene.disk().join(".fleecefs")).unwrap();
        if !try_run(test, "chattr", &[attribute, &text(&path)]) {
            return;
        }
        let held = Attribute(path.clone(), attribute);
        let newer = scene.disk().join("FULL-1710000000-sda.qcow2");
        if path == scene.disk() {
            // Only what is there can be tried: what is made would stay.
            for args in &scene.writers()[..3] {
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                let out = fleecefs(&args);
                assert_eq!(out.status.code(), Some(5), "{args:?}: {}", stderr(&out));
                assert!(stderr(&out).contains("append-only"), "{args:?}: {}", stderr(&out));
            }
            assert!(!newer.exists());
        } else {
            scene.all_refuse(5, "immutable or append-only");
        }
        // It can be read all the same.
        must(&[
            "restore",
            "--force",
            &text(&scene.root()),
            "sda/latest",
            &text(&scene.top.path().join("r")),
        ]);
        drop(held);
        scene.works();
        scene.fill();
    }
}

#[test]
fn what_is_mounted_over_an_image_is_refused_before_anything_goes() {
    let test = "what_is_mounted_over_an_image_is_refused_before_anything_goes";
    let Some(scene) = Scene::new(test) else { return };
    let other = scene.top.path().join("other");
    std::fs::copy(scene.image(1), &other).unwrap();
    let kept = std::fs::read(&other).unwrap();
    let at = scene.image(1);
    let Some(held) = try_mount(test, "--bind", &other, &at) else { return };
    scene.all_refuse(6, "unmount it first");
    // As a target, too: before the point is copied.
    let [target, third] = ["target", "third"].map(|n| scene.top.path().join(n));
    std::fs::write(&target, "").unwrap();
    std::fs::write(&third, "").unwrap();
    let held_target = Guard::mount("--bind", &third, &target);
    let out = fleecefs(&["restore", "--force", &text(&scene.root()), "sda/latest", &text(&target)]);
    assert_eq!(out.status.code(), Some(6), "{}", stderr(&out));
    assert!(std::fs::read(&other).unwrap() == kept);
    drop((held, held_target));
    scene.works();
    assert!(std::fs::read(&other).unwrap() == kept);
}

#[test]
fn a_folder_for_manifests_from_elsewhere_is_refused_before_anything_goes() {
    let test = "a_folder_for_manifests_from_elsewhere_is_refused_before_anything_goes";
    let Some(scene) = Scene::new(test) else { return };
    let (other, at) = (scene.top.path().join("other"), scene.disk().join(".fleecefs"));
    for bind in [true, false] {
        std::fs::create_dir_all(&other).unwrap();
        std::fs::create_dir_all(&at).unwrap();
        let options = if bind { "--bind" } else { "-t tmpfs" };
        let Some(held) = try_mount(test, options, &other, &at) else { return };
        // What moves an image out of it.
        for args in &scene.writers()[..3] {
            let before = scene.contents();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let out = fleecefs(&args);
            assert_eq!(out.status.code(), Some(11), "{args:?}: {}", stderr(&out));
            assert!(stderr(&out).contains("is another mount"), "{}", stderr(&out));
            assert!(scene.contents() == before, "{args:?}");
        }
        assert!(!at.join("removal.journal").exists() && !at.join("fold.json").exists());
        drop(held);
        scene.works();
        scene.fill();
    }
}

/// A folder of other backups mounted over a disk's folder is that disk; nothing leaves it.
#[test]
fn a_folder_that_is_mounted_in_the_directory_is_worked_on() {
    let test = "a_folder_that_is_mounted_in_the_directory_is_worked_on";
    let Some(scene) = Scene::new(test) else { return };
    let (other, at) = (scene.top.path().join("other"), scene.root().join("sda"));
    std::fs::rename(&at, &other).unwrap();
    std::fs::create_dir(&at).unwrap();
    let Some(held) = try_mount(test, "--bind", &other, &at) else { return };
    scene.works();
    drop(held);
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 0);
}

#[test]
fn a_file_system_that_cannot_be_written_is_read() {
    let test = "a_file_system_that_cannot_be_written_is_read";
    let Some(scene) = Scene::new(test) else { return };
    let root = text(&scene.root());
    let Some(_held) = try_mount(test, "--bind", &scene.root(), &scene.root()) else { return };
    run("mount", &["-o", "remount,bind,ro", &root]);
    must(&["list", &root]);
    assert_eq!(fleecefs(&["verify", &root]).status.code(), Some(19));
    let target = scene.top.path().join("restored");
    must(&["restore", &root, "sda/latest", &text(&target)]);
    assert!(std::fs::read(&target).unwrap() == *scene.points.truth.last().unwrap());
    for args in scene.writers().into_iter().take(3) {
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
    let Some(scene) = Scene::new(test) else { return };
    let root = text(&scene.root());
    let other = scene.root().join("sdb/FULL-1600000000-sdb.qcow2");
    std::fs::create_dir(other.parent().unwrap()).unwrap();
    std::fs::hard_link(scene.image(0), &other).unwrap();
    std::fs::copy(&other, other.with_file_name("FULL-1650000000-sdb.qcow2")).unwrap();
    let kept = std::fs::read(&other).unwrap();
    must(&["list", &root]);
    must(&["verify", "--create", &root]);
    must(&["prune", "--keep-last", "1", "--force", &root]);
    assert!(!other.exists());
    assert!(std::fs::read(scene.image(0)).unwrap() == kept);
    scene.points.check(&scene.root(), [0, 1, 2, 3], "after the prune");
}

/// Everybody may make names in a sticky folder, and remove only his own. What is a stranger's is not
/// used for temporary files.
#[test]
fn a_sticky_folder_is_worked_in_and_warned_of() {
    let test = "a_sticky_folder_is_worked_in_and_warned_of";
    let Some(scene) = Scene::new(test) else { return };
    std::fs::set_permissions(scene.disk(), PermissionsExt::from_mode(0o1777)).unwrap();
    let strange = scene.disk().join(".fleecefs-tmp-0123456789abcdef01234567");
    std::fs::write(&strange, "x").unwrap();
    chown(&strange, Some(OWNER), Some(OWNER)).unwrap();
    let out = must(&["rebase", &text(&scene.disk())]);
    assert!(stderr(&out).contains("users may write there"), "{}", stderr(&out));
    scene.works();
    assert_eq!(std::fs::read(&strange).unwrap(), b"x");
    for entry in std::fs::read_dir(scene.disk()).unwrap() {
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
    let Some(scene) = Scene::new(test) else { return };
    let at = scene.root().join("silent");
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
    let root = text(&scene.root());
    let out = must(&["list", &root]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(said.contains("silent: cannot read it"), "{said}");
    assert!(said.contains(&scene.points.name(3)), "{said}");
    assert!(matches!(fleecefs(&["verify", &root]).status.code(), Some(18 | 19)));
    scene.points.check(&scene.root(), [0, 1, 2, 3], "beside it");
    // Ends every request that waits, should there be one.
    drop(device);
}
