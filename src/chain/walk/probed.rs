//! What a file holds.

use std::sync::{Arc, OnceLock};

use super::foreign_content;
use super::foreign_content::ForeignContent;
use crate::error::{Finding, Result};
use crate::layer::ImageInfo;
use crate::storage::{Identity, ReadAt, SourceFile};

/// What a file holds.
#[derive(Debug)]
pub(in crate::chain) enum Content {
    /// An image by its magic bytes.
    Image(ImageInfo),
    /// No magic that we know: raw, if it is an image at all.
    Plain,
    /// Surely neither an image that we read nor the guest's bytes one to one; says what it is.
    Foreign(&'static str),
    /// It cannot be read, or its magic is followed by nonsense.
    Bad(Finding),
}

/// A plain file as this or an earlier scan saw it.
#[derive(Debug)]
pub(in crate::chain) struct Probed {
    /// The file; the same `Arc` as long as the file is unchanged.
    pub file: Arc<SourceFile>,
    /// Bytes allocated on disk.
    pub own_bytes: u64,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// The user that the file belongs to.
    pub owner: u32,
    /// Whether it begins with an image format's magic bytes, readable or not.
    pub magic: bool,
    /// What is in it.
    pub content: Content,
    /// What is in it as a file of another program's layout; looked for when asked.
    pub inside: OnceLock<Result<ForeignContent, Finding>>,
}

impl Probed {
    /// What the file holds as one of another program's layout; looked at once, by a descriptor that
    /// is not kept.
    pub(crate) fn inside(&self) -> Result<&ForeignContent, &Finding> {
        let look = || {
            let file = SourceFile::with_identity(self.file.path().into(), self.file.identity());
            foreign_content::read_content(&file).map_err(|e| Finding::from_error(&e, file.path()))
        };
        self.inside.get_or_init(look).as_ref()
    }

    /// Whether all of this is still true of a file that now looks like `now`.
    pub(crate) fn still_holds(&self, now: &Identity) -> bool {
        let before = self.file.identity();
        // What the operating system said may be different the next time: no memory, too many files.
        let passing = |f: &Finding| !f.kind.is_lasting();
        let passing = matches!(&self.content, Content::Bad(f) if passing(f))
            || matches!(self.inside.get(), Some(Err(f)) if passing(f));
        (before.dev, before.ino) == (now.dev, now.ino)
            && self.file.has_same_bytes(now)
            && !passing
            && self.file.check_unchanged().is_ok()
    }

    /// What the header says, if there is one that can be used; how the file is read, `format` decides.
    pub(crate) fn info(&self) -> Option<&ImageInfo> {
        match &self.content {
            Content::Image(info) => Some(info),
            _ => None,
        }
    }

    /// Size in bytes of the virtual disk; 0 if it cannot be known.
    pub(crate) fn virtual_size(&self) -> u64 {
        match &self.content {
            Content::Image(info) => info.virtual_size,
            Content::Plain => self.file.identity().size,
            Content::Foreign(_) | Content::Bad(_) => 0,
        }
    }
}
