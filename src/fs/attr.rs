//! What `stat` and `getxattr` say about a node.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use super::point::PointFile;
use super::tree::{EntryKind, Node, NodeKind, Tree};
use crate::files;
use crate::layout::Level;
use crate::manifest::Achieved;

/// Who owns the files and who may read them.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// User id of everything.
    pub uid: u32,
    /// Group id of everything.
    pub gid: u32,
    /// Permission bits of points; folders get an `x` wherever this has an `r`. What is no point has no `w`.
    pub mode: u16,
}

impl Owner {
    fn dir_mode(self) -> u16 {
        self.read_mode() | ((self.mode & 0o444) >> 2)
    }

    fn read_mode(self) -> u16 {
        self.mode & 0o444
    }
}

/// The attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Allocated 512-byte blocks.
    pub blocks: u64,
    /// Its times.
    pub times: Times,
    /// File type.
    pub kind: EntryKind,
    /// Permission bits.
    pub perm: u16,
    /// Names that lead to it; of a folder 2 and one per folder in it.
    pub nlink: u32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// The numbers of a device of a guest's, as the kernel wants them.
    pub rdev: u32,
}

impl Attr {
    /// The same for a point that was written to: `bytes` of data at most beside the point's, and when.
    pub(super) fn written(mut self, bytes: u64, modified: Option<i64>) -> Self {
        // As for any point: never 0 where there may be data, less than the size where there may be holes.
        let most = (self.size.saturating_sub(1) / 512).max(1);
        self.blocks = self.blocks.saturating_add(bytes.div_ceil(512)).clamp(1, most);
        if let Some(at) = modified {
            (self.times.modification, self.times.change) = (time(at), time(at));
        }
        self
    }
}

/// When something happened to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// When it was last read.
    pub access: SystemTime,
    /// When its contents were last changed.
    pub modification: SystemTime,
    /// When anything about it was last changed.
    pub change: SystemTime,
}

impl Times {
    /// All the same.
    pub fn all(time: SystemTime) -> Self {
        Times { access: time, modification: time, change: time }
    }
}

/// The attributes of `node`, of which those inside points have others: see [`inside`]. `status_size` says how long `status.json` is.
pub fn attr(node: &Node, tree: &Tree, owner: Owner, status_size: impl FnOnce() -> u64) -> Attr {
    let (kind, perm, nlink, size, blocks) = match &node.kind {
        NodeKind::Dir(entries) => {
            let folders = entries.iter().filter(|e| e.kind == EntryKind::Dir).count();
            let nlink = u32::try_from(folders).unwrap_or(u32::MAX).saturating_add(2);
            (EntryKind::Dir, owner.dir_mode(), nlink, 0, 0)
        }
        NodeKind::File(file) => (EntryKind::File, owner.mode, 1, file.image.size(), blocks(file)),
        NodeKind::Files(..) | NodeKind::Inside(_) => (EntryKind::Dir, owner.dir_mode(), 2, 0, 0),
        NodeKind::Link(target) => (EntryKind::Link, 0o777, 1, target.as_os_str().len() as u64, 0),
        NodeKind::Status => {
            let size = status_size();
            (EntryKind::File, owner.read_mode(), 1, size, size.div_ceil(512))
        }
    };
    let time = match node.kind {
        NodeKind::Status => tree.built,
        _ => time(node.time),
    };
    let (uid, gid) = (owner.uid, owner.gid);
    Attr {
        ino: node.ino,
        size,
        blocks,
        times: Times::all(time),
        kind,
        perm,
        nlink,
        uid,
        gid,
        rdev: 0,
    }
}

/// The attributes of a node inside a point: as in the guest; with `squash` the mount's owner's, who may read
/// everything then.
pub(super) fn inside(ino: u64, a: &files::Attributes, owner: Owner, squash: bool) -> Attr {
    const READ: u32 = 0o400;
    const SEARCH: u32 = 0o100;
    let kind = EntryKind::of(a.kind);
    let (mut mode, mut uid, mut gid) = (a.mode & 0o7777, a.uid, a.gid);
    if squash {
        let search = kind == EntryKind::Dir || mode & 0o111 != 0;
        // Those of setuid and setgid programs meant other owners.
        mode = mode & 0o777 | READ | if search { SEARCH } else { 0 };
        (uid, gid) = (owner.uid, owner.gid);
    }
    Attr {
        ino,
        size: a.size,
        blocks: a.allocated.div_ceil(512),
        times: Times {
            access: precise(a.atime),
            modification: precise(a.mtime),
            change: precise(a.ctime),
        },
        kind,
        perm: u16::try_from(mode).unwrap_or(0),
        nlink: u32::try_from(a.links).unwrap_or(u32::MAX),
        uid,
        gid,
        rdev: a.device.map_or(0, rdev),
    }
}

/// As the kernel packs them: twelve bits of the one number, twenty of the other.
fn rdev(device: files::Device) -> u32 {
    let (major, minor) = (device.major & 0xfff, device.minor & 0xf_ffff);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn precise(at: files::Time) -> SystemTime {
    let whole = time(at.seconds);
    whole.checked_add(Duration::from_nanos(u64::from(at.nanos))).unwrap_or(whole)
}

/// Allocated blocks: exact once the whole disk was merged, before that what the files take. Tools
/// look for holes only where this is less than the size, and skip files where it is 0: so never 0
/// where there may be data, and below the size as long as there may be holes.
fn blocks(file: &PointFile) -> u64 {
    let size = file.image.size();
    match file.image.data_bytes() {
        Some(0) => 0,
        Some(data) if data >= size => size.div_ceil(512),
        Some(data) => data.div_ceil(512).min(size.saturating_sub(1) / 512).max(1),
        None if size == 0 => 0,
        None => file.estimate.div_ceil(512).min(size.saturating_sub(1) / 512).max(1),
    }
}

/// Seconds since the epoch as a time; what does not fit becomes the epoch.
pub fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let epoch = SystemTime::UNIX_EPOCH;
    let time = if seconds < 0 { epoch.checked_sub(distance) } else { epoch.checked_add(distance) };
    time.unwrap_or(epoch)
}

/// Seconds since the epoch as `2024-01-26T09:17:26Z`.
pub fn time_text(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds)
        .map_or_else(|_| format!("@{seconds}"), |time| time.to_string())
}

/// A level as a word: in xattrs and in `status.json`.
pub fn level_word(level: Level) -> &'static str {
    match level {
        Level::Full => "full",
        Level::Inc => "inc",
        Level::Diff => "diff",
        Level::Copy => "copy",
        Level::Image => "image",
        Level::Snapshot => "snapshot",
    }
}

/// All extended attributes of a node, by name.
pub fn xattrs(node: &Node) -> Vec<(&'static str, Vec<u8>)> {
    let NodeKind::File(file) = &node.kind else { return Vec::new() };
    let point = file.point();
    let source = point.source.strip_prefix(&file.catalog().root).unwrap_or(&point.source);
    let mut all = vec![
        ("user.fleecefs.level", level_word(point.level).into()),
        ("user.fleecefs.chain", point.chain.clone().into_bytes()),
        ("user.fleecefs.source", source.as_os_str().as_bytes().to_vec()),
        ("user.fleecefs.consistency", Achieved::word(point.consistency).into()),
        ("user.fleecefs.time", time_text(point.time).into_bytes()),
    ];
    if let Some(parent) = point.parent.and_then(|p| file.disk().points.get(p)) {
        all.push(("user.fleecefs.parent", parent.name.clone().into_bytes()));
    }
    all
}

/// The value of one extended attribute, or `None` if the node has none of that name.
pub fn xattr(node: &Node, name: &OsStr) -> Option<Vec<u8>> {
    // Asked for security.* at every turn: do not build the list for those.
    if !name.as_bytes().starts_with(b"user.fleecefs.") {
        return None;
    }
    xattrs(node).into_iter().find(|(n, _)| OsStr::new(n) == name).map(|(_, value)| value)
}

/// The names of all extended attributes, each ended by a zero byte, as `listxattr` wants them.
pub fn xattr_names(node: &Node) -> Vec<u8> {
    let mut names = Vec::new();
    for (name, _) in xattrs(node) {
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_can_be_entered_by_whoever_may_read_files() {
        let dir = |mode| Owner { uid: 0, gid: 0, mode }.dir_mode();
        assert_eq!(dir(0o400), 0o500);
        assert_eq!(dir(0o444), 0o555);
        assert_eq!(dir(0o440), 0o550);
    }

    #[test]
    fn times_before_the_epoch_and_impossible_ones_do_not_panic() {
        assert_eq!(time(0), SystemTime::UNIX_EPOCH);
        assert!(time(-1) < SystemTime::UNIX_EPOCH);
        let _ = (time(i64::MAX), time(i64::MIN));
    }
}
