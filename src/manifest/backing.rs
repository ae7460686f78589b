//! What a disk lies on, as manifests record it.

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
    /// Its inode number; [`BackingFile::UNKNOWN`] where nothing tells whether it is written to.
    pub inode: u64,
    /// QEMU's name for its node, if it is unknown: while a node lives, so does what it has open.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
}

/// What two records say of one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// It is the same file, and has not been written to. It may have been renamed.
    Same,
    /// It is another one, or was written to.
    Changed,
    /// It has the same name, and nothing tells whether it was written to.
    Unknown,
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

    /// What became of it since it was as `then`.
    pub fn compare(&self, then: &Self) -> Compared {
        let same = match self.is_known() && then.is_known() {
            true => {
                let key = |b: &Self| (b.size, b.mtime_ns, b.inode);
                self.format == then.format && key(self) == key(then)
            }
            false => {
                let other_node = self.node != then.node && !self.is_known() && !then.is_known();
                self.format == then.format && self.file == then.file && !other_node
            }
        };
        match same {
            false => Compared::Changed,
            true if self.is_known() && then.is_known() => Compared::Same,
            true => Compared::Unknown,
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
            inode: 7,
            ..Default::default()
        };
        let unknown = || BackingFile { inode: BackingFile::UNKNOWN, node: "n".into(), ..known() };
        assert_eq!(known().compare(&known()), Compared::Same);
        let renamed = BackingFile { file: "/vm/other".into(), ..known() };
        assert_eq!(renamed.compare(&known()), Compared::Same);
        for other in [
            BackingFile { size: 4, ..known() },
            BackingFile { mtime_ns: 4, ..known() },
            BackingFile { inode: 4, ..known() },
            BackingFile { format: "raw".into(), ..known() },
        ] {
            assert_eq!(other.compare(&known()), Compared::Changed, "{other:?}");
        }
        assert_eq!(unknown().compare(&unknown()), Compared::Unknown);
        assert_eq!(unknown().compare(&known()), Compared::Unknown);
        assert_eq!(known().compare(&unknown()), Compared::Unknown);
        for other in [
            BackingFile { node: "m".into(), ..unknown() },
            BackingFile { file: "/vm/other".into(), ..unknown() },
            BackingFile { format: "raw".into(), ..unknown() },
        ] {
            assert_eq!(other.compare(&unknown()), Compared::Changed, "{other:?}");
        }
    }
}
