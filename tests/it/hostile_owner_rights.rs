//! Files of several users in one backup directory: what root makes there is root's, and gives its rights
//! to nobody who had a part in it.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use crate::support::owner::{Setup, fleecefs};
use crate::support::tools::{have, is_root};
use crate::support::verbs::{TOOLS, name, s};

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
fn what_root_restores_into_the_folder_of_another_is_roots() {
    let test = "what_root_restores_into_the_folder_of_another_is_roots";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let setup = Setup::new();
    for (mode, owner) in [(0o755, STRANGER), (0o1777, 0)] {
        let to = tempfile::tempdir().unwrap();
        std::fs::set_permissions(to.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(to.path(), Some(owner), None).unwrap();
        // What version 0.1.0 would have used, and what it may be called now.
        for made in [".disk.raw.fleecefs-partial", ".fleecefs-tmp-0123456789abcdef01234567"] {
            let path = to.path().join(made);
            std::fs::write(&path, b"").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
            std::os::unix::fs::chown(&path, Some(STRANGER), None).unwrap();
        }
        let target = to.path().join("disk.raw");
        let point = name(&setup.images[2]);
        let out = fleecefs(&["restore", s(&setup.root), point, s(&target)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let meta = std::fs::metadata(&target).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o600));
        // Nobody's files are nobody's: only what is root's own is cleared away.
        assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 3);
        // A link of nobody's that leads to what is not his is not followed, with --force neither.
        let link = to.path().join("link");
        symlink(&setup.victim, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
        let out = fleecefs(&["restore", "--force", s(&setup.root), point, s(&link)]);
        assert!(!out.status.success());
        setup.check_outside("a link as the target");
    }
}

#[test]
fn what_is_made_of_several_files_is_not_given_to_the_owner_of_one() {
    let test = "what_is_made_of_several_files_is_not_given_to_the_owner_of_one";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let setup = || {
        let setup = Setup::new();
        for image in &setup.images {
            std::fs::set_permissions(image, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        setup
    };
    // Whichever of them is the stranger's.
    for i in 0..3 {
        let s1 = setup();
        give(&s1.images[i], 0o644);
        let out = fleecefs(&["consolidate", s(&s1.root), "sda", "--until", "latest"]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_private(&s1.disk.join(name(&s1.images[2]).replace("INC-", "FULL-")));
    }
    let s2 = setup();
    give(&s2.images[0], 0o644);
    let out = fleecefs(&["commit", s(&s2.disk)]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_private(&s2.images[0]);
}

#[test]
fn a_file_that_a_stranger_put_there_gives_its_owner_nothing() {
    let test = "a_file_that_a_stranger_put_there_gives_its_owner_nothing";
    if !have(test, &TOOLS) || !is_root(test) {
        return;
    }
    let setup = Setup::new();
    let shared = setup.root.with_file_name("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o1777)).unwrap();
    let target = shared.join("disk.raw");
    std::fs::write(&target, "x").unwrap();
    give(&target, 0o644);
    let restore = || {
        let out = fleecefs(&["restore", "--force", s(&setup.root), "sda/latest", s(&target)]);
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
