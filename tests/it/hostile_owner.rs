//! Whoever owns a backup directory, or the folder that is restored into, makes links, pipes, journals
//! and other folders there while fleecefs works. Nothing outside of that folder is changed by it, and
//! nothing waits for ever.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::owner::{PRECIOUS, Setup, fleecefs};
use crate::support::tools::{have, run};
use crate::support::verbs::{TOOLS, name, s};
use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::error::Kind;
use fleecefs::prune;
use fleecefs::prune::plan::{PlanOptions, Rules, plan};
use serde_json::json;

/// Exit codes.
const CORRUPT: i32 = 10;
const UNSUPPORTED: i32 = 11;

fn fifo(path: &Path) {
    run("mkfifo", &[s(path)]);
}

/// How often a race is run.
fn races() -> usize {
    std::env::var("FLEECEFS_RACES").ok().and_then(|n| n.parse().ok()).unwrap_or(30)
}

/// What is no name of an image in the journal's own folder.
fn bad_names(setup: &Setup) -> Vec<String> {
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
    names.push(s(&setup.victim).into());
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
    let setup = Setup::new();
    let own = name(&setup.images[2]).to_string();
    let new = "FULL-1700010800-sda.qcow2";
    for bad in bad_names(&setup) {
        let publish = |temporary: &str, image: &str| {
            let publish = json!({"temporary": temporary, "manifest": manifest(image)});
            json!({"publish": publish, "remove": []})
        };
        std::fs::write(setup.side.join("payload"), b"evil").unwrap();
        for removal in [
            json!({"remove": [own, bad]}),
            json!({"remove": [], "relink": [bad]}),
            publish("payload", &bad),
            publish(&format!("consolidate-{bad}"), &bad),
            publish(&bad, new),
            publish("payload", new),
        ] {
            let text = removal.to_string();
            setup.refuses("removal.journal", text.as_bytes(), CORRUPT, &text);
        }
        let good = json!({
            "full": name(&setup.images[0]), "interim": new, "increments": [own], "raw": false,
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
            setup.refuses("fold.json", text.as_bytes(), CORRUPT, &text);
        }
    }
}

#[test]
fn a_journal_of_an_earlier_version_is_still_finished() {
    if !have("a_journal_of_an_earlier_version_is_still_finished", &TOOLS) {
        return;
    }
    let setup = Setup::new();
    let going = [&setup.images[2], &setup.images[1]].map(|p| name(p));
    let text = json!({"publish": null, "remove": going, "relink": []}).to_string();
    std::fs::write(setup.side.join("removal.journal"), text).unwrap();
    let out = fleecefs(&["prune", "--keep-last", "9", s(&setup.root)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let there: Vec<bool> = setup.images.iter().map(|p| p.exists()).collect();
    assert_eq!(there, [true, false, false]);
    assert!(!setup.side.join("removal.journal").exists());
}

#[test]
fn a_saved_header_goes_into_no_file_elsewhere() {
    if !have("a_saved_header_goes_into_no_file_elsewhere", &TOOLS) {
        return;
    }
    let setup = Setup::new();
    let evil = [&[b'0'; 64][..], b"evil"].concat();
    let image = setup.disk.join("x");
    symlink(&setup.victim, &image).unwrap();
    setup.refuses("x.header", &evil, UNSUPPORTED, "a link");
    std::fs::remove_file(&image).unwrap();
    std::fs::hard_link(&setup.victim, &image).unwrap();
    setup.refuses("x.header", &evil, UNSUPPORTED, "a hard link");
    std::fs::remove_file(&image).unwrap();
    fifo(&image);
    setup.refuses("x.header", &evil, UNSUPPORTED, "a pipe");
    std::fs::remove_file(&image).unwrap();
    // What is before the ending is the image: these would be the folder itself and the one above.
    for odd in ["..header", "...header", ".header", "uuid.header", ".x.header"] {
        setup.refuses(odd, &evil, CORRUPT, odd);
    }
    // A saved header that is none itself.
    let saved = setup.side.join("x.header");
    std::fs::write(&image, b"image").unwrap();
    let make: [(&str, &dyn Fn()); 3] = [
        ("a pipe", &|| fifo(&saved)),
        ("a link", &|| symlink("/dev/zero", &saved).unwrap()),
        ("a large file", &|| std::fs::File::create(&saved).unwrap().set_len(20 << 30).unwrap()),
    ];
    for (what, make) in make {
        make();
        let out = fleecefs(&["verify", "--create", s(&setup.root)]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(UNSUPPORTED), "{what}: {said}");
        assert!(said.contains("x.header"), "{what}: {said}");
        assert_eq!(std::fs::read(&image).unwrap(), b"image", "{what}");
        std::fs::remove_file(&saved).unwrap();
    }
    setup.check_outside("headers");
}

/// Commands that write into a backup directory.
fn writers(setup: &Setup) -> Vec<Vec<String>> {
    let (root, disk) = (s(&setup.root), s(&setup.disk));
    let until = name(&setup.images[1]);
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
    let setup = Setup::new();
    std::fs::remove_dir(&setup.side).unwrap();
    let make: [(&str, &dyn Fn()); 3] = [
        ("a link", &|| symlink(&setup.outside, &setup.side).unwrap()),
        ("a pipe", &|| fifo(&setup.side)),
        ("a file", &|| std::fs::write(&setup.side, b"").unwrap()),
    ];
    let before = setup.images_now();
    for (what, make) in make {
        make();
        for args in writers(&setup) {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            // A prune removes nothing before it could write that down.
            let newer = setup.disk.join("FULL-1800000000-sda.qcow2");
            if args[0] == "prune" {
                std::fs::copy(&setup.images[0], &newer).unwrap();
            }
            let out = fleecefs(&args);
            let _ = std::fs::remove_file(&newer);
            assert!(!out.status.success(), "{what}: {args:?}");
            assert!(before == setup.images_now(), "{what}: {args:?}");
            setup.check_outside(&format!("{what}: {args:?}"));
        }
        std::fs::remove_file(&setup.side).unwrap();
    }
}

#[test]
fn links_under_temporary_names_are_not_followed() {
    if !have("links_under_temporary_names_are_not_followed", &TOOLS) {
        return;
    }
    for i in 0..6 {
        let setup = Setup::new();
        let image = name(&setup.images[1]);
        let new = image.replace("INC-", "FULL-");
        for odd in [
            "removal.journal-tmp".to_string(),
            ".fold.json.fleecefs-partial".into(),
            ".new-full.fleecefs-partial".into(),
            ".increment.fleecefs-partial".into(),
            format!("{image}.header.tmp"),
            format!("{}.new", name(&setup.images[0])),
            format!("consolidate-{new}"),
            format!(".consolidate-{new}.fleecefs-partial"),
        ] {
            symlink(&setup.victim, setup.side.join(odd)).unwrap();
        }
        symlink(&setup.victim, setup.disk.join(".image.tmp")).unwrap();
        let args = writers(&setup).swap_remove(i);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let out = fleecefs(&args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        // verify has more to say of such a folder.
        assert!(out.status.success() || args[0] == "verify", "{args:?}: {said}");
        setup.check_outside(&format!("{args:?}"));
    }
}

#[test]
fn what_has_hard_links_is_not_changed_in_place() {
    if !have("what_has_hard_links_is_not_changed_in_place", &TOOLS) {
        return;
    }
    let setup = Setup::new();
    let aside = tempfile::tempdir_in(setup.root.parent().unwrap()).unwrap();
    let copy = aside.path().join("copy");
    let (last, disk) = (&setup.images[2], s(&setup.disk));
    assert!(fleecefs(&["rebase", disk]).status.success());
    std::fs::hard_link(last, &copy).unwrap();
    let before = setup.images_now();
    let until = name(&setup.images[1]);
    let consolidate = ["consolidate", s(&setup.root), "sda", "--until", until];
    let commit = ["commit", disk, "--until", until];
    for args in [&["rebase", "--absolute", disk] as &[&str], &consolidate, &commit] {
        let out = fleecefs(args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(UNSUPPORTED), "{args:?}: {said}");
        assert!(said.contains("hard links") && said.contains("cp -a"), "{args:?}: {said}");
        assert!(before == setup.images_now(), "{args:?}");
    }
    std::fs::remove_file(&copy).unwrap();
    assert!(fleecefs(&consolidate).status.success());
    // Removing one of several names takes nothing from the others.
    let setup = Setup::new();
    let bytes = std::fs::read(&setup.images[0]).unwrap();
    std::fs::hard_link(&setup.images[0], &copy).unwrap();
    std::fs::copy(&setup.images[0], setup.disk.join("FULL-1800000000-sda.qcow2")).unwrap();
    assert!(fleecefs(&["prune", "--keep-last", "1", "--force", s(&setup.root)]).status.success());
    assert!(!setup.images[0].exists());
    assert_eq!(std::fs::read(&copy).unwrap(), bytes);
}

#[test]
fn what_was_exchanged_between_plan_and_deed_is_not_deleted() {
    if !have("what_was_exchanged_between_plan_and_deed_is_not_deleted", &TOOLS) {
        return;
    }
    type Exchange<'a> = &'a dyn Fn(&Setup);
    let exchange: [(&str, Exchange); 5] = [
        ("the folder for a link", &|setup| {
            std::fs::rename(&setup.disk, setup.root.join("moved")).unwrap();
            symlink(&setup.outside, &setup.disk).unwrap();
        }),
        ("the folder for another", &|setup| {
            let moved = setup.outside.join("moved");
            std::fs::rename(&setup.disk, &moved).unwrap();
            run("cp", &["-a", s(&moved), s(&setup.disk)]);
        }),
        ("an image for another", &|setup| {
            std::fs::rename(&setup.images[1], setup.disk.join("aside")).unwrap();
            std::fs::copy(&setup.images[2], &setup.images[1]).unwrap();
        }),
        ("an image for a link", &|setup| {
            std::fs::rename(&setup.images[1], setup.disk.join("aside")).unwrap();
            symlink(&setup.victim, &setup.images[1]).unwrap();
        }),
        ("an image for more of it", &|setup| {
            let mut file = std::fs::OpenOptions::new().append(true).open(&setup.images[1]).unwrap();
            std::io::Write::write_all(&mut file, b"more").unwrap();
        }),
    ];
    for (what, exchange) in exchange {
        let setup = Setup::new();
        std::fs::copy(&setup.images[0], setup.disk.join("FULL-1800000000-sda.qcow2")).unwrap();
        let (catalog, _) = scan(&setup.root, &ScanOptions::default(), None).unwrap();
        let rules = Rules { last: 1, ..Rules::default() };
        let manner = PlanOptions { force: true, merge: None };
        let items = prune::items(&catalog).unwrap();
        let plan = plan(&items, &rules, &jiff::tz::TimeZone::UTC, manner);
        assert_eq!(plan.deleted().count(), 3);
        exchange(&setup);
        let count = |dir: &Path| {
            let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
            names.filter(|n| n.to_string_lossy().contains("-17")).count()
        };
        let before = count(&setup.disk);
        let e = fleecefs::rewrite::remove::execute(&catalog, &plan, &()).unwrap_err();
        let expected = [Kind::Changed, Kind::Unsupported, Kind::NotFound];
        assert!(expected.contains(&e.kind()), "{what}: {}", e.report());
        assert_eq!(count(&setup.disk), before, "{what}");
        assert_eq!(std::fs::read(&setup.victim).unwrap(), PRECIOUS, "{what}");
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
    let setup = Setup::new();
    let kept = tempfile::tempdir().unwrap();
    run("cp", &["-a", s(&setup.disk), s(kept.path())]);
    let kept = kept.path().join("sda");
    std::fs::copy(kept.join(name(&setup.images[0])), kept.join("FULL-1800000000-sda.qcow2"))
        .unwrap();
    let (elsewhere, link) = (setup.outside.join("sda"), setup.root.join("link"));
    std::fs::create_dir(&elsewhere).unwrap();
    let victims = || setup.images.iter().map(|p| elsewhere.join(name(p)));
    victims().for_each(|p| std::fs::write(p, PRECIOUS).unwrap());
    let mut done = 0;
    for i in 0..races() {
        for path in [&setup.disk, &link] {
            match std::fs::symlink_metadata(path) {
                Ok(m) if m.is_dir() => std::fs::remove_dir_all(path).unwrap(),
                Ok(_) => std::fs::remove_file(path).unwrap(),
                Err(_) => {}
            }
        }
        run("cp", &["-a", s(&kept), s(&setup.disk)]);
        symlink(&elsewhere, &link).unwrap();
        let out = disturbed(
            |stop| exchange(&setup.disk, &link, stop),
            || fleecefs(&["prune", "--keep-last", "1", "--force", s(&setup.root)]),
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
    let setup = Setup::new();
    for image in &setup.images[..2] {
        std::fs::set_permissions(image, std::fs::Permissions::from_mode(0o4777)).unwrap();
    }
    let kept = tempfile::tempdir().unwrap();
    run("cp", &["-a", s(&setup.disk), s(kept.path())]);
    let swap = |stop: &AtomicBool| {
        while !stop.load(Ordering::Relaxed) {
            for entry in std::fs::read_dir(&setup.side).into_iter().flatten().flatten() {
                let path = entry.path();
                let new = entry.file_name().to_string_lossy().starts_with("consolidate-")
                    && !path.is_symlink();
                if new && std::fs::rename(&path, setup.side.join("kept")).is_ok() {
                    let _ = symlink(&setup.victim, &path);
                }
            }
        }
    };
    let until = name(&setup.images[1]);
    for i in 0..races() {
        std::fs::remove_dir_all(&setup.disk).unwrap();
        run("cp", &["-a", s(&kept.path().join("sda")), s(&setup.disk)]);
        disturbed(swap, || fleecefs(&["consolidate", s(&setup.root), "sda", "--until", until]));
        setup.check_outside(&format!("run {i}"));
    }
    // Undisturbed, the new FULL has the mode of what it is made of, but gives nobody its owner's rights.
    std::fs::remove_dir_all(&setup.disk).unwrap();
    run("cp", &["-a", s(&kept.path().join("sda")), s(&setup.disk)]);
    let out = fleecefs(&["consolidate", s(&setup.root), "sda", "--until", until]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let full = setup.disk.join(until.replace("INC-", "FULL-"));
    assert_eq!(std::fs::metadata(full).unwrap().mode() & 0o7777, 0o777);
}
