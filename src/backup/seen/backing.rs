//! What lies below a disk's own file. Its bitmaps do not record what is written there: that nothing was is
//! told by the files themselves.
//!
//! QEMU names them, and may lie. They are looked at and never opened.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::answers::Answers;
use crate::chain::manifest::BackingFile;
use crate::folder;
use crate::qmp::types::Node;

/// More backing files than anybody's disk has.
const DEEPEST: usize = 200;
/// The longest path, in bytes.
const LONGEST_PATH: usize = 4096;

/// The backing files of a disk, nearest first; `None` if it has none, or where not all of them are files
/// of this host.
pub fn files(answers: &Answers, disk: &Node) -> Option<Vec<BackingFile>> {
    let (mut found, mut at) = (Vec::new(), disk);
    while let Some(below) = answers.graph.child(&at.node_name, "backing") {
        at = answers.node(below).filter(|_| found.len() < DEEPEST)?;
        found.push(file(answers.file_of(at), &at.drv)?);
    }
    // One that is told of and not shown.
    (!found.is_empty() && at.image.backing_image.is_none()).then_some(found)
}

fn file(file: String, format: &str) -> Option<BackingFile> {
    let path = Path::new(&file);
    if !path.is_absolute() || file.len() > LONGEST_PATH {
        return None;
    }
    let meta = folder::resolve(path).and_then(|real| folder::look(&real)).ok()?;
    // That a device was written to is told nowhere.
    let mtime_ns = meta.mtime().checked_mul(1_000_000_000)?.checked_add(meta.mtime_nsec())?;
    meta.is_file().then_some(BackingFile {
        format: format.to_string(),
        size: meta.size(),
        mtime_ns,
        inode: meta.ino(),
        file,
    })
}
