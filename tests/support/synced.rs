//! In which order a program syncs files and folders and changes names, by its system calls.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::refusing::{Asked, run_asking};

/// Device and inode.
type Id = (u64, u64);

/// What a program did, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// A file or folder is on disk.
    Synced(Id),
    /// A file got a name.
    Named { file: Id, folder: Id, path: PathBuf, new: bool },
    /// A name is gone.
    Gone { folder: Id, path: PathBuf },
}

/// What `command` does below `root`.
pub fn acts(command: &mut Command, root: &Path) -> (Output, Vec<Act>) {
    let mut acts = Vec::new();
    let out = before_each(command, root, |act| {
        acts.push(act);
        Then::GoOn
    });
    (out, acts)
}

/// What comes after a look at what is about to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    GoOn,
    /// It is killed, and does not do it.
    Kill,
}

/// Runs `command`; `see` gets what it is about to do below `root`, which waits for it.
pub fn before_each(
    command: &mut Command,
    root: &Path,
    mut see: impl FnMut(Act) -> Then + Send,
) -> Output {
    const CALLS: &[i64] = &[
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
    ];
    let root = root.canonicalize().unwrap();
    run_asking(command, CALLS, &[], |asked| {
        if act(asked, &root).map(&mut see) == Some(Then::Kill) {
            asked.kill();
        }
        None
    })
}

/// A device and inode, and how many names it has.
fn id(path: &Path, follow: bool) -> Option<(Id, u64)> {
    let meta = if follow { path.metadata() } else { path.symlink_metadata() };
    meta.ok().filter(|m| !m.is_symlink()).map(|m| ((m.dev(), m.ino()), m.nlink()))
}

fn act(asked: &Asked, root: &Path) -> Option<Act> {
    let [a, b, c, d, e, _] = asked.args;
    if [libc::SYS_fsync, libc::SYS_fdatasync].contains(&asked.call) {
        return Some(Act::Synced(id(&asked.path_of(a), true)?.0));
    }
    let folder = if asked.call == libc::SYS_unlinkat { a } else { c };
    let name = asked.text(if asked.call == libc::SYS_unlinkat { b } else { d });
    let path = asked.open_path(folder).join(name);
    let folder = id(&asked.path_of(folder), true)?.0;
    if !path.starts_with(root) {
        return None;
    }
    if asked.call == libc::SYS_unlinkat {
        // Only empty folders go, which is no matter.
        if c as i32 & libc::AT_REMOVEDIR != 0 {
            return None;
        }
        // What is not there does not go.
        return id(&path, false).map(|_| Act::Gone { folder, path });
    }
    let from = asked.text(b);
    // The descriptor itself, or a name in its folder.
    let from = if from.is_empty() { asked.path_of(a) } else { asked.path_of(a).join(from) };
    let link = asked.call == libc::SYS_linkat;
    let follow = link && e as i32 & (libc::AT_SYMLINK_FOLLOW | libc::AT_EMPTY_PATH) != 0;
    let (file, names) = id(&from, follow)?;
    Some(Act::Named { file, folder, path, new: !link || names == 0 })
}

/// Whether it does no harm if the name is there or not after a power cut: the guest's fleece image, and the second name
/// by which a new FULL takes the old one's place.
fn is_help(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with(".fleece.raw") || name.ends_with(".qcow2.new")
}

/// Asserts that a file that was written is on disk when it gets its name, and that names which came and went in a folder
/// are on disk before those of another one change, and at the end.
pub fn assert_in_order(acts: &[Act]) {
    assert_all_synced(acts);
    let mut open: Option<(Id, &Path)> = None;
    for act in acts {
        let Some((folder, path)) = act.change() else {
            open = open.filter(|(folder, _)| *act != Act::Synced(*folder));
            continue;
        };
        if let Some((before, what)) = open {
            assert!(before == folder, "{what:?} was not synced before {path:?}: {acts:#?}");
        }
        open = Some((folder, path));
    }
}

/// Asserts that files are on disk when they get their names, and all names at the end.
pub fn assert_all_synced(acts: &[Act]) {
    for (i, act) in acts.iter().enumerate() {
        if let Act::Named { file, path, new: true, .. } = act {
            assert!(acts[..i].contains(&Act::Synced(*file)), "{path:?} was not synced: {acts:#?}");
        }
        if let Some((folder, path)) = act.change() {
            let synced = acts[i..].contains(&Act::Synced(folder));
            assert!(synced, "the name {path:?} was not synced: {acts:#?}");
        }
    }
}

impl Act {
    /// The name that comes or goes.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Act::Synced(_) => None,
            Act::Named { path, .. } | Act::Gone { path, .. } => Some(path),
        }
    }

    /// The folder and the name that has come or gone; none if that is no matter.
    fn change(&self) -> Option<(Id, &Path)> {
        match self {
            Act::Synced(_) => None,
            Act::Named { folder, path, .. } | Act::Gone { folder, path } => {
                (!is_help(path)).then_some((*folder, path))
            }
        }
    }
}
