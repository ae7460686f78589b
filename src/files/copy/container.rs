//! What the formats of archives have in common.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use super::super::tree::{Attributes, OpenFile, Xattr};
use super::report::Options;
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// What an archive has of anything.
pub(super) struct Entry<'a> {
    /// Its whole path in the archive.
    pub path: &'a [u8],
    /// What is known of it.
    pub attributes: &'a Attributes,
    /// The permissions that it gets.
    pub mode: u32,
    /// The attributes that it gets.
    pub xattrs: Vec<Xattr>,
}

/// An archive that is being written. Errors without a number of the operating system say that an entry has no place
/// in it, and nothing of that was written.
pub(super) trait Container {
    /// A folder, before what is in it.
    fn folder(&mut self, entry: &Entry<'_>) -> Result<()>;

    /// A plain file with its contents; the bytes that were written.
    fn file(
        &mut self,
        entry: &Entry<'_>,
        file: &dyn OpenFile,
        options: &Options<'_>,
    ) -> Result<u64>;

    /// A symbolic link.
    fn link(&mut self, entry: &Entry<'_>, text: &[u8]) -> Result<()>;

    /// A device node or a pipe.
    fn special(&mut self, entry: &Entry<'_>) -> Result<()>;

    /// A further name of what `first` is; `false` if there is no such thing in this format.
    fn further_name(&mut self, entry: &Entry<'_>, first: &[u8]) -> Result<bool>;

    /// Whether permissions have setuid and setgid in this format.
    fn has_setuid(&self) -> bool;

    /// The end of the archive. Without it, it is seen to be cut off.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// That writing failed.
pub(super) fn cannot(e: io::Error) -> Error {
    Error::io(e, "cannot write the archive")
}

/// What reading a file said after its header, which has promised its bytes.
pub(super) fn after_header(error: Error, path: &[u8]) -> Error {
    if error.kind() == Kind::Interrupted {
        return error;
    }
    let name = path_text(OsStr::from_bytes(path));
    let what = format!("the archive ends in the middle of {name}: {}", error.report());
    Error::new(Kind::Io, what)
        .remedy("copy into a folder, which goes on after a file that cannot be read")
}
