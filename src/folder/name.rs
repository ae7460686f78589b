//! A single plain file name: all that a journal, a manifest, a header, a device name or an answer of
//! QEMU may contribute to a path.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Longest file name on the usual file systems, in bytes.
const NAME_MAX: usize = 255;

/// A name without folders, checked once and for all. It is a string in JSON, and text that is no
/// such name does not deserialize.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlainName(OsString);

impl PlainName {
    /// Takes it if it is one: see [`plain`].
    ///
    /// # Errors
    /// `InvalidInput`.
    pub fn new(name: impl AsRef<OsStr>) -> io::Result<Self> {
        plain(name.as_ref()).map(|n| PlainName(n.to_os_string()))
    }

    /// The name.
    pub fn as_os_str(&self) -> &OsStr {
        &self.0
    }
}

impl AsRef<OsStr> for PlainName {
    fn as_ref(&self) -> &OsStr {
        &self.0
    }
}

impl AsRef<Path> for PlainName {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl serde::Serialize for PlainName {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => to.serialize_str(text),
            None => Err(serde::ser::Error::custom("a file name that is not UTF-8")),
        }
    }
}

impl<'a> serde::Deserialize<'a> for PlainName {
    fn deserialize<D: serde::Deserializer<'a>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        PlainName::new(&text).map_err(serde::de::Error::custom)
    }
}

/// `name` if it is one plain file name: not empty, not `.` or `..`, no `/`, no NUL, at most 255 bytes.
///
/// # Errors
/// `InvalidInput`; `InvalidFilename` if it is too long alone.
pub fn plain(name: &OsStr) -> io::Result<&OsStr> {
    let bytes = name.as_bytes();
    let bad = bytes.is_empty()
        || bytes == b"."
        || bytes == b".."
        || bytes.iter().any(|b| matches!(b, b'/' | 0));
    let said = |kind, why: &str| {
        Err(io::Error::new(kind, format!("{:?} is {why}", crate::text::to_text(name))))
    };
    match () {
        () if bad => said(io::ErrorKind::InvalidInput, "not a plain file name"),
        () if bytes.len() > NAME_MAX => {
            said(io::ErrorKind::InvalidFilename, "too long for a file name")
        }
        () => Ok(name),
    }
}
