//! The promise: a mount that is open goes on reading right while the chain below it is made shorter.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::chains::{Backups, SIZE, TOOLS, names, succeed};
use crate::support::mount::Mount;
use crate::support::tools;

fn open(mount: &Mount, b: &Backups, i: usize) -> File {
    File::open(mount.point("sda", &b.files[i])).unwrap()
}

fn bytes(file: &File) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE as usize];
    file.read_exact_at(&mut bytes, 0).map(|()| bytes)
}

/// Every point that is left, by its name and time, through the mount that has been open all along.
fn check_now(mount: &Mount, b: &Backups, root: &Path, points: std::ops::Range<usize>) {
    let mut names = names(root);
    // A rebase leaves a link to the newest beside them.
    names.retain(|n| n.contains('-'));
    assert_eq!(names.len(), points.len(), "{names:?}");
    for (name, i) in names.iter().zip(points) {
        let path = mount.point("sda", Path::new(name));
        wait_for(&path);
        assert!(bytes(&File::open(path).unwrap()).unwrap() == b.truth[i], "{name}");
    }
}

/// A change shows when the kernel has told of it.
fn wait_for(path: &Path) {
    let end = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        assert!(Instant::now() < end, "{} does not show", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ready(test: &str) -> bool {
    tools::have(test, &[&TOOLS[..], &["/dev/fuse"]].concat())
}

#[test]
fn what_was_open_before_a_consolidation_reads_right_after_it() {
    if !ready("what_was_open_before_a_consolidation_reads_right_after_it") {
        return;
    }
    let b = Backups::new(1, 5, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let mount = Mount::new(b.dir.path());
    // One has been read, the others have not.
    let files: Vec<File> = (0..6).map(|i| open(&mount, &b, i)).collect();
    assert!(bytes(&files[1]).unwrap() == b.truth[1]);
    succeed(&["consolidate", "sda", "--until", &b.name(3)], b.dir.path());
    check_now(&mount, &b, b.dir.path(), 3..6);
    for (i, file) in files.iter().enumerate() {
        assert!(bytes(file).unwrap() == b.truth[i], "point {i}");
    }
}

#[test]
fn children_with_a_backing_pointer_are_never_a_mixture() {
    if !ready("children_with_a_backing_pointer_are_never_a_mixture") {
        return;
    }
    let b = Backups::new(1, 5, "", false);
    succeed(&["rebase"], &b.dir.path().join("sda"));
    succeed(&["verify", "--create"], b.dir.path());
    let mount = Mount::new(b.dir.path());
    let files: Vec<File> = (0..6).map(|i| open(&mount, &b, i)).collect();
    assert!(bytes(&files[4]).unwrap() == b.truth[4]);
    succeed(&["consolidate", "sda", "--until", &b.name(3)], b.dir.path());
    check_now(&mount, &b, b.dir.path(), 3..6);
    for (i, file) in files.iter().enumerate() {
        // Only the header of the first child was rewritten, in place: what depends on it is of another
        // generation. The rest was unlinked whole.
        let first_read = bytes(file);
        match first_read {
            Ok(bytes) => assert!(i < 4 && bytes == b.truth[i], "point {i}"),
            Err(e) => assert!(i >= 4 && e.raw_os_error() == Some(libc::EIO), "point {i}: {e}"),
        }
    }
}

#[test]
fn what_was_open_before_a_prune_reads_right_after_it() {
    if !ready("what_was_open_before_a_prune_reads_right_after_it") {
        return;
    }
    let b = Backups::new(2, 2, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    let mount = Mount::new(b.dir.path());
    let files: Vec<File> = (0..6).map(|i| open(&mount, &b, i)).collect();
    succeed(&["prune", "--keep-last", "1"], b.dir.path());
    check_now(&mount, &b, b.dir.path(), 3..6);
    for (i, file) in files.iter().enumerate() {
        assert!(bytes(file).unwrap() == b.truth[i], "point {i}");
    }
}
