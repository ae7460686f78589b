//! What lies below a disk's own file. Its bitmaps do not record what is written there: that nothing was is
//! told by the files themselves, where they are files.
//!
//! QEMU names them, and may lie. They are looked at and never opened.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::answers::Answers;
use super::storage;
use crate::backup::graph;
use crate::folder;
use crate::folder::system;
use crate::manifest::{BackingFile, Compared};
use crate::qmp::budget;
use crate::qmp::types::{Link, Node};

/// More backing files than anybody's disk has.
const DEEPEST: usize = 200;
/// The longest path, in bytes; and how much is kept of the name of what is no file.
const LONGEST_PATH: usize = 4096;
const LONGEST_NAME: usize = 1024;
/// The longest name of a format.
const LONGEST_FORMAT: usize = 64;

/// More descriptors than a QEMU has.
const MOST_OPEN: usize = 100_000;

/// A file that QEMU has open.
struct OpenFile {
    /// By its descriptor, below `/proc`.
    at: PathBuf,
    meta: Metadata,
}

/// How this host sees what QEMU reads.
pub struct View {
    /// The files that QEMU has open, by the paths that they had then; `None` if this user may not see them.
    open: Option<HashMap<PathBuf, Vec<OpenFile>>>,
    /// QEMU's working directory.
    cwd: Option<PathBuf>,
    /// Whether its names are those of this host, and lead to what it has open: it is ours.
    ours: bool,
}

impl View {
    /// Of QEMU's process, if it is one of this host; `ours` says that we started it, over files that nobody
    /// else can exchange.
    pub fn of(pid: Option<u32>, ours: bool) -> Self {
        let dir = pid.map(|pid| PathBuf::from(format!("/proc/{pid}")));
        // One that was daemonized has left the folder in which it opened its files.
        let cwd = dir.as_ref().and_then(|d| system::link(&d.join("cwd")).ok());
        View {
            open: dir.as_ref().and_then(|d| open_files(&d.join("fd"))),
            cwd: cwd.filter(|c| c.parent().is_some()),
            ours,
        }
    }

    /// The file that QEMU opened by `name`, and where it is to be seen; `None` where that is not certain.
    fn file(&self, name: &str) -> Option<(PathBuf, Metadata)> {
        let path = match Path::new(name) {
            _ if name.is_empty() || name.len() > LONGEST_PATH => return None,
            p if p.is_absolute() => p.to_path_buf(),
            p => self.cwd.as_ref()?.join(p),
        };
        let real = folder::resolve(&path);
        let named = real.as_ref().ok().and_then(|r| folder::look(r).ok());
        let Some(open) = &self.open else {
            return Some((real.ok()?, named?)).filter(|_| self.ours);
        };
        // A new version of a base image is mostly put in its place by a rename: QEMU reads the old one.
        let by_path = open.get(real.as_ref().unwrap_or(&path));
        let id = |m: &Metadata| (m.dev(), m.ino());
        let found = match by_path.and_then(|all| all.split_first()) {
            Some((first, more)) => {
                more.iter().all(|o| id(&o.meta) == id(&first.meta)).then_some(first)
            }
            // Opened by another name of it.
            None => {
                let wanted = named.as_ref().map(id)?;
                open.values().flatten().find(|o| id(&o.meta) == wanted)
            }
        };
        found.map(|o| (o.at.clone(), o.meta.clone()))
    }

    /// What tells whether a file is written to.
    fn record(&self, name: &str, format: &str) -> Option<BackingFile> {
        let (at, meta) = self.file(name)?;
        // A FUSE server says what it likes: that of QEMU says that each file was written to just now.
        if !meta.is_file() || folder::is_on_fuse(&at).unwrap_or(true) {
            return None;
        }
        let mtime_ns = meta.mtime().checked_mul(1_000_000_000)?.checked_add(meta.mtime_nsec())?;
        Some(BackingFile {
            file: name.to_string(),
            format: format.to_string(),
            size: meta.size(),
            mtime_ns,
            inode: meta.ino(),
            node: String::new(),
        })
    }
}

fn open_files(fds: &Path) -> Option<HashMap<PathBuf, Vec<OpenFile>>> {
    let mut by_path: HashMap<PathBuf, Vec<OpenFile>> = HashMap::new();
    for name in system::names(fds).into_iter().take(MOST_OPEN) {
        let at = fds.join(name);
        let (Ok(path), Ok(meta)) = (system::link(&at), system::behind(&at)) else { continue };
        if !meta.is_file() {
            continue;
        }
        // So the kernel marks what has no name any more.
        let path = path.as_os_str().as_bytes();
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        let path = PathBuf::from(OsStr::from_bytes(path));
        by_path.entry(path).or_default().push(OpenFile { at, meta });
    }
    (!by_path.is_empty()).then_some(by_path)
}

/// The first of `then` that is known to have been written to, or exchanged, since.
pub fn changed<'a>(view: &View, then: &'a [BackingFile]) -> Option<&'a BackingFile> {
    let is_changed = |b: &BackingFile| {
        let now = view.record(&b.file, &b.format);
        now.is_some_and(|now| now.compare(b) == Compared::Changed)
    };
    then.iter().filter(|b| b.is_known()).find(|b| is_changed(b))
}

/// What a disk lies on: its backing file, what that lies on, and the files in which these keep their data;
/// nearest first.
pub(super) fn below(answers: &Answers, disk: &Node) -> Vec<BackingFile> {
    let links = answers.graph.id(&disk.node_name).map_or(&[][..], |id| answers.graph.links(id));
    let begins: Vec<u64> = links.iter().filter(|l| l.role == "backing").map(|l| l.child).collect();
    if begins.is_empty() {
        // One that is told of and not shown.
        let hidden = disk.image.backing_image.is_some();
        return Vec::from_iter(hidden.then(|| unknown(disk, "")));
    }
    let view = View::of(answers.pid, answers.ours);
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut todo: Vec<(u64, String)> = begins.into_iter().map(|id| (id, String::new())).collect();
    while let Some((id, format)) = todo.pop() {
        if found.len() >= DEEPEST {
            return vec![unknown(disk, "")];
        }
        if !seen.insert(id) {
            continue;
        }
        let Some(node) = answers.graph.name(id).and_then(|n| answers.node(n)) else {
            found.push(unknown(disk, ""));
            continue;
        };
        let mut links: Vec<&Link> = answers.graph.links(id).iter().collect();
        links.sort_by_key(|l| (l.role == "backing", &l.role));
        let filter = graph::is_filter(&node.drv);
        let inherits = filter || links.is_empty() && !format.is_empty();
        let format = if inherits { format } else { budget::clip(&node.drv, LONGEST_FORMAT) };
        found.extend(match links.is_empty() {
            true => Some(leaf(&view, answers, node, &format)),
            false => (!is_told(node, filter, &links)).then(|| unknown(node, &format)),
        });
        todo.extend(links.into_iter().rev().map(|l| (l.child, format.clone())));
    }
    // A graph that leads nowhere.
    if found.is_empty() { vec![unknown(disk, "")] } else { found }
}

/// Whether all that a node makes of its children is in the record of those.
fn is_told(node: &Node, filter: bool, links: &[&Link]) -> bool {
    let hidden =
        !filter && node.image.backing_image.is_some() && links.iter().all(|l| l.role != "backing");
    !hidden && !graph::is_refused(&node.drv) && storage::part_of(node).is_none()
}

/// What has its bytes from outside of QEMU.
fn leaf(view: &View, answers: &Answers, node: &Node, format: &str) -> BackingFile {
    let name = answers.file_of(node);
    let known = view.record(&name, format).filter(|_| node.drv == "file");
    known.unwrap_or_else(|| unknown(node, format))
}

fn unknown(node: &Node, format: &str) -> BackingFile {
    BackingFile {
        file: budget::clip(&node.file, LONGEST_NAME),
        format: format.to_string(),
        inode: BackingFile::UNKNOWN,
        node: node.node_name.clone(),
        ..Default::default()
    }
}
