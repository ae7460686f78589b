//! What can be told of the file of a disk by its name, and by a look at it.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use crate::folder;
use crate::folder::FileId;
use crate::qmp::timeout::answer_timeout;

/// The kind of a device whose name is a number in the order of discovery (`loop`, `sd`); `None` for other files.
pub(super) fn numbered_kind(file: &str) -> Option<&'static str> {
    const KINDS: [&str; 10] = ["loop", "nbd", "rbd", "dm-", "zd", "drbd", "md", "sd", "vd", "nvme"];
    let name = file.strip_prefix("/dev/")?;
    let numbered = |kind: &&&str| {
        let rest = name.strip_prefix(**kind);
        let letters = ["sd", "vd"].contains(*kind);
        let counts = |c: char| if letters { c.is_ascii_lowercase() } else { c.is_ascii_digit() };
        // A partition or a namespace has a number behind it.
        rest.is_some_and(|r| r.starts_with(counts) && r.chars().all(|c| c.is_ascii_alphanumeric()))
    };
    KINDS.iter().find(numbered).copied()
}

/// Whether both are there, and are two files. Of devices that the kernel numbers as it finds them, and of files
/// that only the host of a QEMU has, nobody can tell.
pub(super) fn are_two(before: &str, now: &str) -> bool {
    before != now
        && numbered_kind(before).is_none()
        && matches!((look(before), look(now)), (Some(before), Some(now)) if before != now)
}

/// Which file or device it is, if it is there and its file system answers.
fn look(file: &str) -> Option<FileId> {
    let path = PathBuf::from(file);
    if !path.is_absolute() {
        return None;
    }
    let look = move || folder::look(&folder::resolve(&path)?);
    let meta = folder::within(answer_timeout(), look).ok()?;
    match meta.file_type() {
        // One device may have several nodes.
        kind if kind.is_block_device() => Some(FileId { dev: 0, ino: meta.rdev() }),
        kind if kind.is_file() => Some(FileId::of(&meta)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_one_file_are_one_and_copies_are_two() {
        let d = tempfile::tempdir().unwrap();
        let at = |name: &str| d.path().join(name).to_str().unwrap().to_string();
        std::fs::write(at("a"), "x").unwrap();
        std::fs::copy(at("a"), at("copy")).unwrap();
        std::fs::hard_link(at("a"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("a"), at("soft")).unwrap();
        assert!(are_two(&at("a"), &at("copy")) && are_two(&at("copy"), &at("soft")));
        for same in ["a", "hard", "soft"] {
            assert!(!are_two(&at("a"), &at(same)), "{same}");
        }
        // It moved, or is somewhere else; a folder is no disk.
        assert!(!are_two(&at("gone"), &at("copy")) && !are_two("a", &at("copy")));
        assert!(!are_two(d.path().to_str().unwrap(), &at("copy")));
        assert!(!are_two("rbd:pool/a", &at("copy")));
    }
}
