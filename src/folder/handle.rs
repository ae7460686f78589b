//! A file that is looked at first, and opened only if what was seen is wanted.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;

use super::{Access, Folder, open, read_bounded};

/// What a name in a folder stood for when it was looked at. What is opened through it is that very
/// file, whatever has the name by then.
#[derive(Debug)]
pub struct Handle<'a> {
    folder: &'a Folder,
    name: &'a OsStr,
    probe: File,
    meta: Metadata,
}

impl Folder {
    /// Looks at `name`, which is not followed if it is a link.
    ///
    /// # Errors
    /// What the operating system said, `NotFound` among it.
    pub fn handle<'a>(&'a self, name: &'a OsStr) -> io::Result<Handle<'a>> {
        let probe = self.probe(name)?;
        let meta = probe.metadata()?;
        Ok(Handle { folder: self, name, probe, meta })
    }
}

impl Handle<'_> {
    /// What was seen.
    pub fn metadata(&self) -> &Metadata {
        &self.meta
    }

    /// Opens it for reading.
    ///
    /// # Errors
    /// As [`Folder::open_file`].
    pub fn open(&self) -> io::Result<File> {
        open::plain_file(self.folder.as_fd(), self.name, (&self.probe, &self.meta), Access::Read)
    }

    /// The whole contents, at most `max` bytes.
    ///
    /// # Errors
    /// As [`Folder::read_small`].
    pub fn read_small(&self, max: u64) -> io::Result<Vec<u8>> {
        read_bounded(self.open()?, max)
    }
}
