//! What lies below a disk's own file. Its bitmaps do not record what is written there: that nothing was is
//! told by the files themselves.
//!
//! QEMU names them, and may lie. They are looked at and never opened.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::answers::Answers;
use crate::chain::manifest::BackingFile;
use crate::folder::{self, system};
use crate::qmp::types::Node;

/// More backing files than anybody's disk has.
const DEEPEST: usize = 200;
/// The longest path, in bytes.
const LONGEST_PATH: usize = 4096;

/// More descriptors than a QEMU has.
const MOST_OPEN: usize = 100_000;

/// The files that QEMU's process has open.
struct Open {
    /// By the paths that they had when they were opened.
    by_path: HashMap<PathBuf, Vec<Metadata>>,
}

impl Open {
    /// `None` if this user may not see them.
    fn of(pid: u32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}/fd"));
        let mut by_path: HashMap<PathBuf, Vec<Metadata>> = HashMap::new();
        for name in system::names(&folder).into_iter().take(MOST_OPEN) {
            let fd = folder.join(name);
            let (Ok(path), Ok(meta)) = (system::link(&fd), system::behind(&fd)) else { continue };
            if !meta.is_file() {
                continue;
            }
            // So the kernel marks what has no name any more.
            let path = path.as_os_str().as_bytes();
            let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
            by_path.entry(PathBuf::from(OsStr::from_bytes(path))).or_default().push(meta);
        }
        (!by_path.is_empty()).then_some(Open { by_path })
    }

    /// The file that was opened by this path, whatever has the name now; `named` is what has.
    fn file(&self, path: &Path, named: &Metadata) -> Option<Metadata> {
        let id = |m: &Metadata| (m.dev(), m.ino());
        if let Some((first, more)) = self.by_path.get(path).and_then(|all| all.split_first()) {
            return more.iter().all(|m| id(m) == id(first)).then(|| first.clone());
        }
        // Opened by another name of it.
        self.by_path.values().flatten().find(|m| id(m) == id(named)).cloned()
    }
}

/// The backing files of a disk, nearest first; `None` if it has none, or where not all of them are files
/// of this host.
pub fn files(answers: &Answers, disk: &Node) -> Option<Vec<BackingFile>> {
    answers.graph.child(&disk.node_name, "backing")?;
    let open = answers.pid.and_then(Open::of);
    let (mut found, mut at) = (Vec::new(), disk);
    while let Some(below) = answers.graph.child(&at.node_name, "backing") {
        at = answers.node(below).filter(|_| found.len() < DEEPEST)?;
        found.push(file(open.as_ref(), answers.file_of(at), &at.drv)?);
    }
    // One that is told of and not shown.
    (!found.is_empty() && at.image.backing_image.is_none()).then_some(found)
}

fn file(open: Option<&Open>, file: String, format: &str) -> Option<BackingFile> {
    let path = Path::new(&file);
    if !path.is_absolute() || file.len() > LONGEST_PATH {
        return None;
    }
    let real = folder::resolve(path).ok()?;
    let named = folder::look(&real).ok()?;
    // A new version of a base image is mostly put in its place by a rename: QEMU reads the old one.
    let opened = open.map(|o| o.file(&real, &named));
    let is_known = !matches!(opened, Some(None));
    let meta = opened.flatten().unwrap_or(named);
    // That a device was written to is told nowhere.
    let mtime_ns = meta.mtime().checked_mul(1_000_000_000)?.checked_add(meta.mtime_nsec())?;
    meta.is_file().then_some(BackingFile {
        format: format.to_string(),
        size: meta.size(),
        mtime_ns,
        inode: if is_known { meta.ino() } else { BackingFile::UNKNOWN },
        file,
    })
}
