//! [`Xattrs`]: the extended attributes of one file while a reader collects them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::blocks::Holding;
use super::findings::Findings;
use super::source::Source;
use super::tree::Xattr;
use crate::error::{Kind, Result};
use crate::text::path_text;

/// What one takes in memory beside its name and value.
const ENTRY_BYTES: usize = 128;

/// A list that is counted against the cache, of names that can be some.
pub(super) struct Xattrs<'a> {
    source: &'a Source,
    findings: &'a Findings,
    /// Whose they are, for messages: `inode 12`.
    whose: String,
    list: Vec<Xattr>,
    held: Vec<Holding>,
}

impl<'a> Xattrs<'a> {
    /// None yet.
    pub(super) fn new(source: &'a Source, findings: &'a Findings, whose: String) -> Self {
        Xattrs { source, findings, whose, list: Vec::new(), held: Vec::new() }
    }

    /// Counts memory that reading them takes until all are there.
    ///
    /// # Errors
    /// `Unsupported` if that is more than there is.
    pub(super) fn hold(&mut self, bytes: usize) -> Result<()> {
        self.held.push(self.source.blocks().hold(bytes as u64)?);
        Ok(())
    }

    /// Adds one. A name that no attribute can have is left out, and told.
    ///
    /// # Errors
    /// As [`Xattrs::hold`].
    pub(super) fn add(&mut self, prefix: &str, name: &[u8], value: Vec<u8>) -> Result<()> {
        // Those of access lists are all prefix.
        let is_none = name.is_empty() && (prefix.is_empty() || prefix.ends_with('.'));
        if is_none || name.contains(&0) {
            let shown = path_text(OsStr::from_bytes(name));
            let what = format!(
                "{}: extended attribute with an invalid name skipped: '{shown}'",
                self.whose
            );
            self.findings.warn(self.source, Kind::Corrupt, &what, None);
            return Ok(());
        }
        self.hold(prefix.len() + name.len() + value.len() + ENTRY_BYTES)?;
        self.list.push(Xattr { name: [prefix.as_bytes(), name].concat(), value });
        Ok(())
    }

    /// All that were added.
    pub(super) fn into_list(self) -> Vec<Xattr> {
        self.list
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn they_are_bounded_by_the_cache_and_have_names() {
        let blocks = Blocks::new(100_000);
        let disk = Arc::new(MemStorage::new("disk", vec![0; 512]));
        let (source, findings) = (Source::new(disk, "disk", &blocks), Findings::default());
        let mut all = Xattrs::new(&source, &findings, "inode 7".into());
        all.add("user.", b"a", vec![1]).unwrap();
        all.add("system.posix_acl_access", b"", vec![2]).unwrap();
        assert!(findings.list().is_empty());
        for (prefix, name) in [("user.", &b"a\0b"[..]), ("user.", b""), ("", b""), ("", b"\0")] {
            all.add(prefix, name, vec![3]).unwrap();
        }
        // Of two that are alike one is kept.
        assert_eq!(findings.list().len(), 3);
        assert!(findings.list().iter().all(|f| f.message.contains("inode 7")));
        assert_eq!(all.add("user.", b"b", vec![0; 80_000]).unwrap_err().kind(), Kind::Unsupported);
        let names: Vec<_> = all.into_list().into_iter().map(|x| x.name).collect();
        assert_eq!(names, [&b"user.a"[..], b"system.posix_acl_access"]);
        assert_eq!(blocks.used(), 0);
    }
}
