//! One error type for the whole program: a small stable [`Kind`] plus context.
//!
//! The kind decides the errno a FUSE caller sees and the exit code a shell sees; both come from
//! one table, [`Kind::table`]. The context (file, offset, what was tried) is for the person who
//! reads the message. `Display` never repeats the source: print the chain with [`Error::report`].
//!
//! # How messages are written
//! These hold for errors, findings, warnings, notes, log lines and help:
//!
//! - In this order: what failed, on what, why, and what to do. `PATH: cannot open the image: Permission denied
//!   (run it as root or with --as-owner)`. The path comes from [`Error::at_path`], the cause from
//!   [`Error::with_source`], what to do from [`Error::remedy`]; the message itself has none of them twice.
//! - Short sentences in the present tense, in lower case, without a full stop. No riddles: a reader who runs
//!   QEMU for a living, and has never seen this program's code, knows what is meant.
//! - The field's words: image, backing file, parent, chain, bitmap, job, node, export, freeze, point, run; a disk
//!   is *skipped*, a command was *interrupted*, a point is *not available*, data is *damaged*, a file is *missing*.
//! - What failed begins with "cannot" where something was tried, else with the thing: "parent image X is missing".
//! - A remedy is an imperative, with the option or command to type: "name another folder with --fleece-dir".
//! - "would" and "may" only where it is not known. What is expected is no warning: the first backup to a target
//!   takes a FULL, and that is a note.
//! - Names go through [`path_text`]; counts through [`crate::units::counted`], so that nothing reads "1 points".

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::text::{path_text, visible};

/// Result of nearly everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller may act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The command line or an option is not valid.
    Usage,
    /// The named file, disk or point does not exist.
    NotFound,
    /// The thing that should be made exists already.
    Exists,
    /// The operating system refused access.
    Permission,
    /// Somebody else holds it: a lock, a socket, a mount.
    Busy,
    /// No space left on the device.
    NoSpace,
    /// Reading or writing failed for another reason of the operating system's.
    Io,
    /// The bytes contradict their format.
    Corrupt,
    /// The file ends before the bytes that its own metadata promises.
    Truncated,
    /// A feature that this program does not know or deliberately refuses.
    Unsupported,
    /// The data is encrypted; ciphertext is never served as if it were the disk.
    Encrypted,
    /// A layer that the point needs is missing or unusable.
    Incomplete,
    /// A file changed while it was open: its old contents can no longer be had.
    Changed,
    /// QEMU or the guest agent answered with an error.
    Peer,
    /// No answer within the time allowed.
    Timeout,
    /// Ended by a signal or by `cancel`.
    Interrupted,
    /// Part of the work succeeded: some disks have a new point and others have not.
    Partial,
    /// Something was omitted, and `--strict` makes that an error.
    Skipped,
    /// A check found the backup unsound.
    Unsound,
    /// A check could neither prove nor disprove soundness.
    Unproven,
}

impl Kind {
    /// Whether reading the same bytes again would fail in the same way.
    pub fn is_lasting(self) -> bool {
        matches!(self, Kind::Corrupt | Kind::Truncated | Kind::Unsupported | Kind::Encrypted)
    }

    /// The one table: errno for file system callers, exit code for shells.
    ///
    /// Exit code 1 is left to failures without a better word, 2 is what clap uses for usage.
    pub const fn table(self) -> (i32, u8) {
        match self {
            Kind::Usage => (libc::EINVAL, 2),
            Kind::NotFound => (libc::ENOENT, 3),
            Kind::Exists => (libc::EEXIST, 4),
            Kind::Permission => (libc::EACCES, 5),
            Kind::Busy => (libc::EBUSY, 6),
            Kind::NoSpace => (libc::ENOSPC, 7),
            Kind::Io => (libc::EIO, 1),
            Kind::Corrupt => (libc::EIO, 10),
            Kind::Truncated => (libc::EIO, 10),
            // EIO, not EOPNOTSUPP: cp and qemu-img take the latter for "try another way".
            Kind::Unsupported => (libc::EIO, 11),
            Kind::Encrypted => (libc::EIO, 11),
            Kind::Incomplete => (libc::EIO, 12),
            // ESTALE would be the better word, but the kernel retries a lookup on it.
            Kind::Changed => (libc::EIO, 13),
            Kind::Peer => (libc::EREMOTEIO, 14),
            Kind::Timeout => (libc::ETIMEDOUT, 15),
            Kind::Interrupted => (libc::EINTR, 130),
            Kind::Partial => (libc::EIO, 16),
            Kind::Skipped => (libc::EIO, 17),
            Kind::Unsound => (libc::EIO, 18),
            Kind::Unproven => (libc::EIO, 19),
        }
    }

    /// The process exit code.
    pub fn exit_code(self) -> u8 {
        self.table().1
    }

    /// What a process that ended with this code says. Where several kinds have one, the most general of them.
    pub fn of_exit_code(code: u8) -> Self {
        use Kind::{
            Busy, Changed, Corrupt, Exists, Incomplete, Interrupted, NoSpace, NotFound, Partial,
        };
        use Kind::{Peer, Permission, Skipped, Timeout, Unproven, Unsound, Unsupported, Usage};
        let all = [
            Usage,
            NotFound,
            Exists,
            Permission,
            Busy,
            NoSpace,
            Corrupt,
            Unsupported,
            Incomplete,
            Changed,
            Peer,
            Timeout,
            Interrupted,
            Partial,
            Skipped,
            Unsound,
            Unproven,
        ];
        all.into_iter().find(|k| k.exit_code() == code).unwrap_or(Kind::Io)
    }
}

/// Why a file was not touched, although the operating system would have let us: it is a symbolic
/// link, a pipe, too large. The source of an [`io::Error`] of the folder gate.
#[derive(Debug)]
pub struct Refused(pub &'static str);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl StdError for Refused {}

/// An error with its context.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    remedy: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// An error as JSON has it.
#[derive(Debug, serde::Serialize)]
pub struct ErrorObject<'a> {
    kind: Kind,
    exit_code: u8,
    /// What failed and why, without the file.
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'a str>,
}

impl Error {
    /// A new error. `message` says what was tried and what was found, without file and offset.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error {
            kind,
            message: message.into(),
            path: None,
            offset: None,
            remedy: None,
            source: None,
        }
    }

    /// An operating-system error; the kind follows the errno.
    pub fn io(source: io::Error, message: impl Into<String>) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOENT) | Some(libc::ENOTDIR) => Kind::NotFound,
            Some(libc::EEXIST) => Kind::Exists,
            Some(libc::EACCES) | Some(libc::EPERM) | Some(libc::EROFS) | Some(libc::EOVERFLOW) => {
                Kind::Permission
            }
            Some(libc::EBUSY) => Kind::Busy,
            Some(libc::ENOSPC) | Some(libc::EDQUOT) => Kind::NoSpace,
            Some(libc::ETIMEDOUT) => Kind::Timeout,
            _ if source.kind() == io::ErrorKind::UnexpectedEof => Kind::Truncated,
            _ if source.get_ref().is_some_and(|e| e.is::<Refused>()) => Kind::Unsupported,
            _ if source.kind() == io::ErrorKind::InvalidInput => Kind::Unsupported,
            _ if source.kind() == io::ErrorKind::InvalidFilename => Kind::Unsupported,
            _ => Kind::Io,
        };
        let remedy = match source.raw_os_error() {
            Some(libc::EFBIG) => Some(
                "too large for this file system (ext4: 16 TiB, FAT: 4 GiB) or ulimit -f: choose a \
                 folder on another one, such as XFS",
            ),
            // An id-mapped mount on which the caller is nobody: see mount_setattr(2).
            Some(libc::EOVERFLOW) => Some(
                "you have no user id on this id-mapped mount: work as the folder's owner with \
                 --as-owner",
            ),
            _ => None,
        };
        let error = Error::new(kind, message).with_source(source);
        match remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }

    /// Names the file. The innermost file wins: an outer caller does not overwrite it.
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the byte offset inside the file.
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.offset.get_or_insert(offset);
        self
    }

    /// Says what the user can do about it.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy.get_or_insert_with(|| remedy.into());
        self
    }

    /// Attaches the cause.
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The message alone.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The operating system's own error number, where it is the immediate cause.
    pub fn os_code(&self) -> Option<i32> {
        self.source.as_ref()?.downcast_ref::<io::Error>()?.raw_os_error()
    }

    /// The file, when one is to blame.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The byte offset in that file.
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// What the user can do.
    pub fn remedy_text(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    /// The error as an object for JSON.
    pub fn object(&self) -> ErrorObject<'_> {
        let mut message = visible(&self.message);
        let mut cause: Option<&(dyn StdError + 'static)> = self.source();
        while let Some(c) = cause {
            message.push_str(": ");
            message.push_str(&visible(&c.to_string()));
            cause = c.source();
        }
        ErrorObject {
            kind: self.kind,
            exit_code: self.kind.exit_code(),
            message,
            path: self.path.as_deref().map(|p| crate::text::to_text(p.as_os_str())),
            offset: self.offset,
            remedy: self.remedy.as_deref(),
        }
    }

    /// The whole story on one line: message, causes, remedy.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut cause: Option<&(dyn StdError + 'static)> = self.source();
        while let Some(c) = cause {
            text.push_str(": ");
            text.push_str(&visible(&c.to_string()));
            cause = c.source();
        }
        if let Some(r) = &self.remedy {
            text.push_str(" (");
            text.push_str(&visible(r));
            text.push(')');
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(p) = &self.path {
            f.write_str(&path_text(p))?;
            if let Some(o) = self.offset {
                write!(f, " at offset {o:#x}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&visible(&self.message))
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn StdError + 'static))
    }
}

/// Something worth telling about a backup directory: shown by `list`, in the mount's
/// `.fleecefs/status.json` and in the log. It never stops what is unaffected.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Finding {
    /// Whether points become unavailable because of it.
    pub severity: Severity,
    /// The same small kinds as errors have.
    pub kind: Kind,
    /// The file it is about.
    #[serde(serialize_with = "crate::text::as_text")]
    pub path: PathBuf,
    /// Byte offset in that file, where there is one to name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing; all points are served.
    Note,
    /// Odd, but the bytes are right.
    Warning,
    /// A point, or a range of one, cannot be served.
    Error,
}

impl Finding {
    /// An error as a finding about `path` (unless the error names a file itself).
    pub fn from_error(error: &Error, path: impl AsRef<Path>) -> Self {
        let mut message = error.message.clone();
        let mut cause = error.source();
        while let Some(c) = cause {
            message.push_str(": ");
            message.push_str(&c.to_string());
            cause = c.source();
        }
        Finding {
            severity: Severity::Error,
            kind: error.kind,
            path: error.path.clone().unwrap_or_else(|| path.as_ref().to_path_buf()),
            offset: error.offset,
            message,
            remedy: error.remedy.clone(),
        }
    }

    /// The error that it was made from, as often as it is needed; causes are in the message.
    pub fn to_error(&self) -> Error {
        Error {
            kind: self.kind,
            message: self.message.clone(),
            path: Some(self.path.clone()),
            offset: self.offset,
            remedy: self.remedy.clone(),
            source: None,
        }
    }

    /// A warning: the bytes are right, but somebody should know.
    pub fn warning(kind: Kind, path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Finding {
            severity: Severity::Warning,
            kind,
            path: path.as_ref().to_path_buf(),
            offset: None,
            message: message.into(),
            remedy: None,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&path_text(&self.path))?;
        if let Some(o) = self.offset {
            write!(f, " at offset {o:#x}")?;
        }
        write!(f, ": {}", visible(&self.message))?;
        if let Some(r) = &self.remedy {
            write!(f, " ({})", visible(r))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_code_leads_back_to_a_kind_that_has_it() {
        for code in [2u8, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 130] {
            assert_eq!(Kind::of_exit_code(code).exit_code(), code);
        }
        assert_eq!(Kind::of_exit_code(99), Kind::Io);
    }

    #[test]
    fn display_names_file_and_offset_and_never_the_source() {
        let e = Error::io(io::Error::from_raw_os_error(libc::ENOSPC), "writing the header")
            .at_path("/b/FULL-1-sda")
            .at_offset(512)
            .remedy("free some space");
        assert_eq!(e.to_string(), "/b/FULL-1-sda at offset 0x200: writing the header");
        assert_eq!(e.kind(), Kind::NoSpace);
        assert!(e.report().contains("No space left") && e.report().ends_with("(free some space)"));
    }

    #[test]
    fn a_read_only_file_system_is_not_permitted_to_be_written() {
        let e = Error::io(io::Error::from_raw_os_error(libc::EROFS), "cannot make the folder");
        assert_eq!((e.kind(), e.kind().exit_code()), (Kind::Permission, 5));
    }

    #[test]
    fn names_cannot_reach_the_terminal_as_control_characters() {
        let path = Path::new(OsStr::from_bytes(b"/b/INC-1-\x1b[2J\nerror: \xff"));
        let shown = "/b/INC-1-\\u{1b}[2J\\nerror: \\xff";
        let e = Error::new(Kind::Corrupt, "bad name a\rb")
            .at_path(path)
            .remedy("remove c\x07d")
            .with_source(io::Error::other("e\x08f"));
        let report = format!("{shown}: bad name a\\rb: e\\u{{8}}f (remove c\\u{{7}}d)");
        assert_eq!(e.report(), report);
        assert_eq!(Finding::from_error(&e, path).to_string(), report);
    }

    #[test]
    fn a_finding_gives_its_error_back() {
        let e = Error::io(io::Error::from_raw_os_error(libc::EMFILE), "cannot open it")
            .at_path("f")
            .at_offset(7)
            .remedy("raise the limit");
        assert_eq!(e.os_code(), Some(libc::EMFILE));
        let finding = Finding::from_error(&e, "g");
        assert_eq!(finding.to_error().report(), e.report());
        assert_eq!(Finding::from_error(&finding.to_error(), "g"), finding);
    }

    #[test]
    fn the_innermost_file_wins() {
        let e = Error::new(Kind::Corrupt, "bad magic").at_path("inner").at_path("outer");
        assert_eq!(e.path(), Some(Path::new("inner")));
    }
}
