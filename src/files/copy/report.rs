//! What is asked of a copy, and what became of it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::tree::{Attributes, NodeKind, Xattr};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;

/// Names that are told of; of more only the number.
const MAX_TOLD: usize = 100;
/// The bits that make a program run as its owner.
const SETUID: u32 = 0o6000;

/// How to copy.
pub struct Options<'a> {
    /// With setuid and setgid, device nodes, and all extended attributes.
    pub all: bool,
    /// Set by a signal: stop as soon as possible.
    pub cancel: &'a AtomicBool,
    /// Receives progress.
    pub progress: &'a dyn Progress,
}

impl Options<'_> {
    /// Fails if it was told to stop.
    ///
    /// # Errors
    /// `Interrupted`.
    pub(super) fn check(&self) -> Result<()> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(Error::new(Kind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }

    /// The permissions that a copy gets.
    pub(super) fn mode(&self, attributes: &Attributes) -> u32 {
        match self.all {
            true => attributes.mode,
            false => attributes.mode & !SETUID,
        }
    }

    /// Whether a copy gets this attribute: what users set, and access lists. The others mean something to a
    /// kernel.
    pub(super) fn wants(&self, xattr: &Xattr) -> bool {
        let own = [b"user.".as_slice(), b"system.posix_acl_"];
        self.all || own.iter().any(|prefix| xattr.name.starts_with(prefix))
    }

    /// Whether a copy is made of this.
    pub(super) fn wants_kind(&self, kind: NodeKind) -> bool {
        self.all || !matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice)
    }
}

/// What became of a copy.
#[derive(Debug, Default, serde::Serialize)]
pub struct Report {
    /// Plain files.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Links, pipes, sockets, devices, and further names of files.
    pub others: u64,
    /// Bytes that were written.
    pub bytes: u64,
    /// How many are missing, or lack something of theirs.
    pub failed: u64,
    /// Device nodes that were omitted, as is usual.
    pub devices_left_out: u64,
    /// Files whose setuid or setgid bit was omitted, as is usual.
    pub setuid_left_out: u64,
}

impl Report {
    /// That something is missing; the first ones are told one by one.
    pub(super) fn fail(&mut self, path: &str, error: &Error) {
        self.failed += 1;
        match self.failed as usize {
            n if n <= MAX_TOLD => log::warn!("{path}: {}", error.report()),
            n if n == MAX_TOLD + 1 => log::warn!("further failures are counted, not shown"),
            _ => {}
        }
    }

    /// Counts what is omitted of a node's permissions, which is nothing if `all` are kept.
    pub(super) fn count_mode(&mut self, all: bool, attributes: &Attributes) {
        let drops = attributes.kind == NodeKind::File && attributes.mode & SETUID != 0;
        self.setuid_left_out += u64::from(drops && !all);
    }
}
