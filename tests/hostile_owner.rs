//! Whoever owns a backup directory, or the folder that is restored into, makes links, pipes, journals
//! and other folders there while fleecefs works. Nothing outside of that folder is changed by it, and
//! nothing waits for ever.

#[path = "chains/verbs.rs"]
mod chains;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chains::qemu::{Chain, have, run};
use chains::{TOOLS, name, s};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::Kind;
use fleecefs::prune;
use fleecefs::prune::plan::{Manner, Rules, plan};
use serde_json::json;

/// Exit codes.
const CORRUPT: i32 = 10;
const UNSUPPORTED: i32 = 11;

/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A backup directory with one disk of a FULL and two INCs, and a folder that is none of its owner's
/// business.
struct Scene {
    _dir: tempfile::TempDir,
    root: PathBuf,
    disk: PathBuf,
    side: PathBuf,
    images: Vec<PathBuf>,
    outside: PathBuf,
    victim: PathBuf,
}

const PRECIOUS: &[u8] = b"precious";

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (root, outside) = (base.join("backups"), base.join("outside"));
        let mut chain = Chain::new(&root, "sda");
        for i in 1..4 {
            chain.point("", 1 << 20, &[format!("write -P {i} 0 64k")]);
        }
        let chain = chain.finish();
        std::fs::create_dir(&outside).unwrap();
        let victim = outside.join("victim");
        std::fs::write(&victim, PRECIOUS).unwrap();
        std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o600)).unwrap();
        let side = chain.dir.join(".fleecefs");
        std::fs::create_dir(&side).unwrap();
        Scene { _dir: dir, root, disk: chain.dir, side, images: chain.files, outside, victim }
    }

    /// Everything in the disk's folder, images with their bytes.
    fn images_now(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let read = |p: &PathBuf| (p.clone(), std::fs::read(p).unwrap_or_default());
        self.images.iter().map(read).collect()
    }

    fn check_outside(&self, what: &str) {
        assert_eq!(std::fs::read(&self.victim).unwrap(), PRECIOUS, "{what}");
        let meta = std::fs::metadata(&self.victim).unwrap();
        // SAFETY: geteuid has no preconditions.
        let own = unsafe { libc::geteuid() };
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o600, own), "{what}");
        let names = std::fs::read_dir(&self.outside).unwrap().count();
        assert_eq!(names, 1, "{what}: files were made or removed outside");
    }

    /// Writes a journal of the owner's own making; runs what would finish it; it has to be refused,
    /// by name, and nothing may have changed.
    fn refuses(&self, journal: &str, text: &[u8], code: i32, what: &str) {
        let path = self.side.join(journal);
        std::fs::write(&path, text).unwrap();
        let before = self.images_now();
        let out = fleecefs(&["prune", "--keep-last", "9", s(&self.root)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{what}: {said}");
        assert!(said.contains(journal) && said.contains("remove"), "{what}: {said}");
        assert!(before == self.images_now(), "{what}");
        self.check_outside(what);
        std::fs::remove_file(path).unwrap();
    }
}

/// Runs fleecefs; it may not hang.
fn fleecefs(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let (id, end) = (child.id().to_string(), Instant::now() + PATIENCE);
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let done = done.clone();
        move || {
            while !done.load(Ordering::Relaxed) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            if !done.load(Ordering::Relaxed) {
                run("kill", &["-KILL", &id]);
            }
        }
    });
    let out = child.wait_with_output().unwrap();
    done.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    assert!(out.status.code().is_some(), "{args:?} hung: {}", out.status);
    out
}

fn fifo(path: &Path) {
    run("mkfifo", &[s(path)]);
}

fn is_root(test: &str) -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
    }
    root
}

/// How often a race is run.
fn races() -> usize {
    std::env::var("FLEECEFS_RACES").ok().and_then(|n| n.parse().ok()).unwrap_or(30)
}

/// Somebody's user number.
const NOBODY: u32 = 65534;

/// What is no name of an image in the journal's own folder.
fn bad_names(scene: &Scene) -> Vec<String> {
    let mut names: Vec<String> = [
        "",
        ".",
        "..",
        "../../outside/victim",
        "a/../b",
        "FULL-1-sda/../../../outside/victim",
        "a\0b",
        ".hidden",
        ".fleecefs",
        "uuid",
        "FULL-1700003600-sda.qcow2.partial",
    ]
    .map(String::from)
    .into();
    names.push(s(&scene.victim).into());
    names.push("x".repeat(256));
    names
}

fn manifest(image: &str) -> serde_json::Value {
    json!({
        "format_version": 1, "run": "0", "image": image, "disk": {}, "level": "full", "time": 1,
        "format": "qcow2", "content": "full", "virtual_size": 1, "file_size": 5,
    })
}

#[test]
fn journals_name_only_images_of_their_own_folder() {
    if !have("journals_name_only_images_of_their_own_folder", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    let own = name(&scene.images[2]).to_string();
    let new = "FULL-1700010800-sda.qcow2";
    for bad in bad_names(&scene) {
        let publish = |temporary: &str, image: &str| {
            let publish = json!({"temporary": temporary, "manifest": manifest(image)});
            json!({"publish": publish, "remove": []})
        };
        std::fs::write(scene.side.join("payload"), b"evil").unwrap();
        for removal in [
            json!({"remove": [own, bad]}),
            json!({"remove": [], "relink": [bad]}),
            publish("payload", &bad),
            publish(&format!("consolidate-{bad}"), &bad),
            publish(&bad, new),
            publish("payload", new),
        ] {
            let text = removal.to_string();
            scene.refuses("removal.journal", text.as_bytes(), CORRUPT, &text);
        }
        let good = json!({
            "full": name(&scene.images[0]), "interim": new, "increments": [own], "raw": false,
            "manifest": null,
        });
        for (field, value) in [
            ("full", json!(bad)),
            ("interim", json!(bad)),
            ("increments", json!([own, bad])),
            ("linked", json!([bad])),
        ] {
            let mut fold = good.clone();
            fold[field] = value;
            let text = fold.to_string();
            scene.refuses("fold.json", text.as_bytes(), CORRUPT, &text);
        }
    }
}

#[test]
fn a_journal_of_an_earlier_version_is_still_finished() {
    if !have("a_journal_of_an_earlier_version_is_still_finished", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    let going = [&scene.images[2], &scene.images[1]].map(|p| name(p));
    let text = json!({"publish": null, "remove": going, "relink": []}).to_string();
    std::fs::write(scene.side.join("removal.journal"), text).unwrap();
    let out = fleecefs(&["prune", "--keep-last", "9", s(&scene.root)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let there: Vec<bool> = scene.images.iter().map(|p| p.exists()).collect();
    assert_eq!(there, [true, false, false]);
    assert!(!scene.side.join("removal.journal").exists());
}

#[test]
fn a_saved_header_goes_into_no_file_elsewhere() {
    if !have("a_saved_header_goes_into_no_file_elsewhere", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    let evil = [&[b'0'; 64][..], b"evil"].concat();
    let image = scene.disk.join("x");
    symlink(&scene.victim, &image).unwrap();
    scene.refuses("x.header", &evil, UNSUPPORTED, "a link");
    std::fs::remove_file(&image).unwrap();
    std::fs::hard_link(&scene.victim, &image).unwrap();
    scene.refuses("x.header", &evil, UNSUPPORTED, "a hard link");
    std::fs::remove_file(&image).unwrap();
    fifo(&image);
    scene.refuses("x.header", &evil, UNSUPPORTED, "a pipe");
    std::fs::remove_file(&image).unwrap();
    // What is before the ending is the image: these would be the folder itself and the one above.
    for odd in ["..header", "...header", ".header", "uuid.header", ".x.header"] {
        scene.refuses(odd, &evil, CORRUPT, odd);
    }
    // A saved header that is none itself.
    let saved = scene.side.join("x.header");
    std::fs::write(&image, b"image").unwrap();
    let make: [(&str, &dyn Fn()); 3] = [
        ("a pipe", &|| fifo(&saved)),
        ("a link", &|| symlink("/dev/zero", &saved).unwrap()),
        ("a large file", &|| std::fs::File::create(&saved).unwrap().set_len(20 << 30).unwrap()),
    ];
    for (what, make) in make {
        make();
        let out = fleecefs(&["verify", "--create", s(&scene.root)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(UNSUPPORTED), "{what}: {said}");
        assert!(said.contains("x.header"), "{what}: {said}");
        assert_eq!(std::fs::read(&image).unwrap(), b"image", "{what}");
        std::fs::remove_file(&saved).unwrap();
    }
    scene.check_outside("headers");
}

/// Commands that write into a backup directory.
fn writers(scene: &Scene) -> Vec<Vec<String>> {
    let (root, disk) = (s(&scene.root), s(&scene.disk));
    let until = name(&scene.images[1]);
    let all: [&[&str]; 6] = [
        &["prune", "--keep-last", "1", "--force", root],
        &["verify", "--create", root],
        &["consolidate", root, "sda", "--until", until],
        &["rebase", disk],
        &["commit", disk],
        &["snapshot-rebase", disk],
    ];
    all.iter().map(|a| a.iter().map(|s| s.to_string()).collect()).collect()
}

#[test]
fn a_side_folder_that_is_none_is_refused() {
    if !have("a_side_folder_that_is_none_is_refused", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    std::fs::remove_dir(&scene.side).unwrap();
    let make: [(&str, &dyn Fn()); 3] = [
        ("a link", &|| symlink(&scene.outside, &scene.side).unwrap()),
        ("a pipe", &|| fifo(&scene.side)),
        ("a file", &|| std::fs::write(&scene.side, b"").unwrap()),
    ];
    let before = scene.images_now();
    for (what, make) in make {
        make();
        for args in writers(&scene) {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            // A prune removes nothing before it could write that down.
            let newer = scene.disk.join("FULL-1800000000-sda.qcow2");
            if args[0] == "prune" {
                std::fs::copy(&scene.images[0], &newer).unwrap();
            }
            let out = fleecefs(&args);
            let _ = std::fs::remove_file(&newer);
            assert!(!out.status.success(), "{what}: {args:?}");
            assert!(before == scene.images_now(), "{what}: {args:?}");
            scene.check_outside(&format!("{what}: {args:?}"));
        }
        std::fs::remove_file(&scene.side).unwrap();
    }
}

#[test]
fn links_under_temporary_names_are_not_followed() {
    if !have("links_under_temporary_names_are_not_followed", &TOOLS) {
        return;
    }
    for i in 0..6 {
        let scene = Scene::new();
        let image = name(&scene.images[1]);
        let new = image.replace("INC-", "FULL-");
        for odd in [
            "removal.journal-tmp".to_string(),
            ".fold.json.fleecefs-partial".into(),
            ".new-full.fleecefs-partial".into(),
            ".increment.fleecefs-partial".into(),
            format!("{image}.header.tmp"),
            format!("{}.new", name(&scene.images[0])),
            format!("consolidate-{new}"),
            format!(".consolidate-{new}.fleecefs-partial"),
        ] {
            symlink(&scene.victim, scene.side.join(odd)).unwrap();
        }
        symlink(&scene.victim, scene.disk.join(".image.tmp")).unwrap();
        let args = writers(&scene).swap_remove(i);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = fleecefs(&args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // verify has more to say of such a folder.
        assert!(out.status.success() || args[0] == "verify", "{args:?}: {said}");
        scene.check_outside(&format!("{args:?}"));
    }
}

#[test]
fn what_has_hard_links_is_not_changed_in_place() {
    if !have("what_has_hard_links_is_not_changed_in_place", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    let aside = tempfile::tempdir_in(scene.root.parent().unwrap()).unwrap();
    let copy = aside.path().join("copy");
    let (last, disk) = (&scene.images[2], s(&scene.disk));
    assert!(fleecefs(&["rebase", disk]).status.success());
    std::fs::hard_link(last, &copy).unwrap();
    let before = scene.images_now();
    let until = name(&scene.images[1]);
    let consolidate = ["consolidate", s(&scene.root), "sda", "--until", until];
    let commit = ["commit", disk, "--until", until];
    for args in [&["rebase", "--absolute", disk] as &[&str], &consolidate, &commit] {
        let out = fleecefs(args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(UNSUPPORTED), "{args:?}: {said}");
        assert!(said.contains("hard links") && said.contains("cp -a"), "{args:?}: {said}");
        assert!(before == scene.images_now(), "{args:?}");
    }
    std::fs::remove_file(&copy).unwrap();
    assert!(fleecefs(&consolidate).status.success());
    // Removing one of several names takes nothing from the others.
    let scene = Scene::new();
    let bytes = std::fs::read(&scene.images[0]).unwrap();
    std::fs::hard_link(&scene.images[0], &copy).unwrap();
    std::fs::copy(&scene.images[0], scene.disk.join("FULL-1800000000-sda.qcow2")).unwrap();
    assert!(fleecefs(&["prune", "--keep-last", "1", "--force", s(&scene.root)]).status.success());
    assert!(!scene.images[0].exists());
    assert_eq!(std::fs::read(&copy).unwrap(), bytes);
}

#[test]
fn what_was_exchanged_between_plan_and_deed_is_not_deleted() {
    if !have("what_was_exchanged_between_plan_and_deed_is_not_deleted", &TOOLS) {
        return;
    }
    type Exchange<'a> = &'a dyn Fn(&Scene);
    let exchange: [(&str, Exchange); 4] = [
        ("the folder for a link", &|scene| {
            std::fs::rename(&scene.disk, scene.root.join("moved")).unwrap();
            symlink(&scene.outside, &scene.disk).unwrap();
        }),
        ("the folder for another", &|scene| {
            let moved = scene.outside.join("moved");
            std::fs::rename(&scene.disk, &moved).unwrap();
            run("cp", &["-a", s(&moved), s(&scene.disk)]);
        }),
        ("an image for another", &|scene| {
            std::fs::rename(&scene.images[1], scene.disk.join("aside")).unwrap();
            std::fs::copy(&scene.images[2], &scene.images[1]).unwrap();
        }),
        ("an image for a link", &|scene| {
            std::fs::rename(&scene.images[1], scene.disk.join("aside")).unwrap();
            symlink(&scene.victim, &scene.images[1]).unwrap();
        }),
    ];
    for (what, exchange) in exchange {
        let scene = Scene::new();
        std::fs::copy(&scene.images[0], scene.disk.join("FULL-1800000000-sda.qcow2")).unwrap();
        let (catalog, _) = scan(&scene.root, &ScanOptions::default(), None).unwrap();
        let rules = Rules { last: 1, ..Rules::default() };
        let manner = Manner { force: true, merge: None };
        let items = prune::items(&catalog).unwrap();
        let plan = plan(&items, &rules, &jiff::tz::TimeZone::UTC, manner);
        assert_eq!(plan.deleted().count(), 3);
        exchange(&scene);
        let count = |dir: &Path| {
            let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
            names.filter(|n| n.to_string_lossy().contains("-17")).count()
        };
        let before = count(&scene.disk);
        let e = prune::execute(&catalog, &plan, &()).unwrap_err();
        let expected = [Kind::Changed, Kind::Unsupported, Kind::NotFound];
        assert!(expected.contains(&e.kind()), "{what}: {}", e.report());
        assert_eq!(count(&scene.disk), before, "{what}");
        assert_eq!(std::fs::read(&scene.victim).unwrap(), PRECIOUS, "{what}");
    }
}

/// Exchanges two names until it is told to stop.
fn exchange(a: &Path, b: &Path, stop: &AtomicBool) {
    use std::os::unix::ffi::OsStrExt;
    let text = |p: &Path| std::ffi::CString::new(p.as_os_str().as_bytes()).unwrap();
    let (a, b) = (text(a), text(b));
    while !stop.load(Ordering::Relaxed) {
        let (at, how) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
        // SAFETY: two paths that end in NUL and live until the call returns.
        unsafe { libc::renameat2(at, a.as_ptr(), at, b.as_ptr(), how) };
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Runs `act` while `disturb` is at work.
fn disturbed<T>(disturb: impl FnOnce(&AtomicBool) + Send, act: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| disturb(&stop));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|e| std::panic::resume_unwind(e))
    })
}

#[test]
fn a_prune_deletes_nothing_elsewhere_while_its_folder_is_exchanged() {
    let test = "a_prune_deletes_nothing_elsewhere_while_its_folder_is_exchanged";
    if !have(test, &TOOLS) {
        return;
    }
    let scene = Scene::new();
    let kept = tempfile::tempdir().unwrap();
    run("cp", &["-a", s(&scene.disk), s(kept.path())]);
    let kept = kept.path().join("sda");
    std::fs::copy(kept.join(name(&scene.images[0])), kept.join("FULL-1800000000-sda.qcow2"))
        .unwrap();
    let (elsewhere, link) = (scene.outside.join("sda"), scene.root.join("link"));
    std::fs::create_dir(&elsewhere).unwrap();
    let victims = || scene.images.iter().map(|p| elsewhere.join(name(p)));
    victims().for_each(|p| std::fs::write(p, PRECIOUS).unwrap());
    let mut done = 0;
    for i in 0..races() {
        for path in [&scene.disk, &link] {
            match std::fs::symlink_metadata(path) {
                Ok(m) if m.is_dir() => std::fs::remove_dir_all(path).unwrap(),
                Ok(_) => std::fs::remove_file(path).unwrap(),
                Err(_) => {}
            }
        }
        run("cp", &["-a", s(&kept), s(&scene.disk)]);
        symlink(&elsewhere, &link).unwrap();
        let out = disturbed(
            |stop| exchange(&scene.disk, &link, stop),
            || fleecefs(&["prune", "--keep-last", "1", "--force", s(&scene.root)]),
        );
        done += usize::from(out.status.success());
        for path in victims() {
            assert_eq!(std::fs::read(&path).unwrap(), PRECIOUS, "{i}: {}", path.display());
        }
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 3, "{i}");
    }
    println!("{done} of {} went through", races());
}

#[test]
fn a_consolidation_gives_no_other_file_away() {
    if !have("a_consolidation_gives_no_other_file_away", &TOOLS) {
        return;
    }
    let scene = Scene::new();
    for image in &scene.images[..2] {
        std::fs::set_permissions(image, std::fs::Permissions::from_mode(0o4777)).unwrap();
    }
    let kept = tempfile::tempdir().unwrap();
    run("cp", &["-a", s(&scene.disk), s(kept.path())]);
    let swap = |stop: &AtomicBool| {
        while !stop.load(Ordering::Relaxed) {
            for entry in std::fs::read_dir(&scene.side).into_iter().flatten().flatten() {
                let path = entry.path();
                let new = entry.file_name().to_string_lossy().starts_with("consolidate-")
                    && !path.is_symlink();
                if new && std::fs::rename(&path, scene.side.join("kept")).is_ok() {
                    let _ = symlink(&scene.victim, &path);
                }
            }
        }
    };
    let until = name(&scene.images[1]);
    for i in 0..races() {
        std::fs::remove_dir_all(&scene.disk).unwrap();
        run("cp", &["-a", s(&kept.path().join("sda")), s(&scene.disk)]);
        disturbed(swap, || fleecefs(&["consolidate", s(&scene.root), "sda", "--until", until]));
        scene.check_outside(&format!("run {i}"));
    }
    // Undisturbed, the new FULL has the mode of what it is made of, but gives nobody its owner's rights.
    std::fs::remove_dir_all(&scene.disk).unwrap();
    run("cp", &["-a", s(&kept.path().join("sda")), s(&scene.disk)]);
    let out = fleecefs(&["consolidate", s(&scene.root), "sda", "--until", until]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let full = scene.disk.join(until.replace("INC-", "FULL-"));
    assert_eq!(std::fs::metadata(full).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn what_root_restores_into_the_folder_of_another_is_roots() {
    let test = "what_root_restores_into_the_folder_of_another_is_roots";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let scene = Scene::new();
    for (mode, owner) in [(0o755, NOBODY), (0o1777, 0)] {
        let to = tempfile::tempdir().unwrap();
        std::fs::set_permissions(to.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(to.path(), Some(owner), None).unwrap();
        // What version 0.1.0 would have used, and what it may be called now.
        for made in [".disk.raw.fleecefs-partial", ".fleecefs-tmp-0123456789abcdef01234567"] {
            let path = to.path().join(made);
            std::fs::write(&path, b"").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
            std::os::unix::fs::chown(&path, Some(NOBODY), None).unwrap();
        }
        let target = to.path().join("disk.raw");
        let point = name(&scene.images[2]);
        let out = fleecefs(&["restore", s(&scene.root), point, s(&target)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let meta = std::fs::metadata(&target).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600));
        // Nobody's files are nobody's: only what is root's own is cleared away.
        assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 3);
        // A link of nobody's that leads to what is not his is not followed, with --force neither.
        let link = to.path().join("link");
        symlink(&scene.victim, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(NOBODY), None).unwrap();
        let out = fleecefs(&["restore", "--force", s(&scene.root), point, s(&link)]);
        assert!(!out.status.success());
        scene.check_outside("a link as the target");
    }
}

/// Whether files can be given to another user; in CI it is a failure if not.
fn can_give(test: &str) -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    assert!(root || std::env::var_os("CI").is_none(), "{test} needs root");
    if !root {
        println!("skipped: {test} needs root");
    }
    root && have(test, &TOOLS)
}

/// A user who is neither root nor the caller.
const STRANGER: u32 = 65534;

fn give(path: &Path, mode: u32) {
    std::os::unix::fs::chown(path, Some(STRANGER), Some(STRANGER)).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn assert_private(path: &Path) {
    let meta = std::fs::metadata(path).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600), "{path:?}");
}

#[test]
fn what_is_made_of_several_files_is_not_given_to_the_owner_of_one() {
    if !can_give("what_is_made_of_several_files_is_not_given_to_the_owner_of_one") {
        return;
    }
    let scene = || {
        let scene = Scene::new();
        for image in &scene.images {
            std::fs::set_permissions(image, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        scene
    };
    // Whichever of them is the stranger's.
    for i in 0..3 {
        let s1 = scene();
        give(&s1.images[i], 0o644);
        let out = fleecefs(&["consolidate", s(&s1.root), "sda", "--until", "latest"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_private(&s1.disk.join(name(&s1.images[2]).replace("INC-", "FULL-")));
    }
    let s2 = scene();
    give(&s2.images[0], 0o644);
    let out = fleecefs(&["commit", s(&s2.disk)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_private(&s2.images[0]);
}

#[test]
fn a_file_that_a_stranger_put_there_gives_its_owner_nothing() {
    if !can_give("a_file_that_a_stranger_put_there_gives_its_owner_nothing") {
        return;
    }
    let scene = Scene::new();
    let shared = scene.root.with_file_name("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
    let target = shared.join("disk.raw");
    std::fs::write(&target, "x").unwrap();
    give(&target, 0o644);
    let restore = || {
        let out = fleecefs(&["restore", "--force", s(&scene.root), "sda/latest", s(&target)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    };
    restore();
    assert_private(&target);
    // In a folder of root's own the file is root's gift to him: a disk of QEMU's user, say.
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o755)).unwrap();
    give(&target, 0o640);
    restore();
    let meta = std::fs::metadata(&target).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (STRANGER, 0o640));
}
