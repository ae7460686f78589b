//! What a disk depends on, as manifests record it.

use serde::{Deserialize, Serialize};

/// A file, device or remote image below a disk's own file, as it was. No bitmap of the disk says that it
/// has changed since.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackingFile {
    /// What QEMU calls it: a path, or an address.
    pub file: String,
    /// The format that QEMU reads it as.
    pub format: String,
    /// Its length in bytes.
    pub size: u64,
    /// When it was written to last, in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// When its contents, name, owner or mode changed last, in nanoseconds since the epoch. Nobody can set it: a
    /// copy that keeps the other time shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctime_ns: Option<i64>,
    /// Its inode number; [`BackingFile::UNKNOWN`] where nothing tells whether it is written to.
    pub inode: u64,
    /// QEMU's name for its node, if it is unknown: while a node lives, so does what it has open.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The process that had it open, if that could be told. What QEMU knows of a disk in its memory may be
    /// migrated to another.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub process: String,
}

/// What two records say of one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// It is the same file, and has not been written to. It may have been renamed.
    Same,
    /// It is another one, or was written to.
    Changed,
    /// It has the same name, and nothing but QEMU, which has it open, tells whether it is the same.
    Unknown,
    /// It is not known now and was then, or the other way round.
    Uncertain,
}

impl BackingFile {
    /// The inode number of what is no regular file that can be seen from here: a block device, a remote
    /// image, a file of a FUSE server (whose times are what that says), or one of which it cannot be told
    /// which file QEMU has open.
    pub const UNKNOWN: u64 = 0;

    /// Whether the record tells if it is written to.
    pub fn is_known(&self) -> bool {
        self.inode != Self::UNKNOWN
    }

    /// Whether this is the file `then`, of which as much is known, and has not been written to, as far as its
    /// times tell that anybody can set.
    pub fn is_unwritten(&self, then: &Self) -> bool {
        let key = |b: &Self| (b.size, b.mtime_ns, b.inode);
        self.is_known() && key(self) == key(then)
    }

    /// What became of it since it was as `then`.
    pub fn compare(&self, then: &Self) -> Compared {
        if self.format != then.format {
            return Compared::Changed;
        }
        let name = |b: &Self| (b.file.clone(), b.node.clone());
        let untouched = self.ctime_ns.zip(then.ctime_ns).is_none_or(|(a, b)| a == b);
        match (self.is_known(), then.is_known()) {
            (true, true) if self.is_unwritten(then) && untouched => Compared::Same,
            (false, false) if name(self) == name(then) => Compared::Unknown,
            (true, true) | (false, false) => Compared::Changed,
            _ => Compared::Uncertain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_never_the_same() {
        let known = || BackingFile {
            file: "/vm/base".into(),
            format: "qcow2".into(),
            size: 5,
            mtime_ns: 6,
            ctime_ns: Some(8),
            inode: 7,
            ..Default::default()
        };
        let unknown = || BackingFile { inode: BackingFile::UNKNOWN, node: "n".into(), ..known() };
        assert_eq!(known().compare(&known()), Compared::Same);
        let untold = BackingFile { ctime_ns: None, ..known() };
        assert_eq!(known().compare(&untold), Compared::Same);
        let renamed = BackingFile { file: "/vm/other".into(), ..known() };
        assert_eq!(renamed.compare(&known()), Compared::Same);
        for other in [
            BackingFile { size: 4, ..known() },
            BackingFile { mtime_ns: 4, ..known() },
            BackingFile { inode: 4, ..known() },
            BackingFile { ctime_ns: Some(4), ..known() },
            BackingFile { format: "raw".into(), ..known() },
        ] {
            assert_eq!(other.compare(&known()), Compared::Changed, "{other:?}");
        }
        assert_eq!(unknown().compare(&unknown()), Compared::Unknown);
        assert!(known().is_unwritten(&known()) && !unknown().is_unwritten(&unknown()));
        assert_eq!(unknown().compare(&known()), Compared::Uncertain);
        assert_eq!(known().compare(&unknown()), Compared::Uncertain);
        for other in [
            BackingFile { node: "m".into(), ..unknown() },
            BackingFile { file: "/vm/other".into(), ..unknown() },
            BackingFile { format: "raw".into(), ..unknown() },
        ] {
            assert_eq!(other.compare(&unknown()), Compared::Changed, "{other:?}");
        }
    }
}
