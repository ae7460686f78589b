//! `rebase`: every image of a line names the one before it as its backing file, and the link
//! `image` leads to the last, so that QEMU opens the point directly.
//!
//! The pointers are relative, so the folder can be moved or copied. qmprestore's own are absolute:
//! a copy of such a folder reads the original. Over relative ones its `merge` fails, as it copies
//! the images elsewhere one by one; for those who go on with it there are absolute ones. (What it
//! makes of a folder that it rebased itself is wrong without a word: it sorts by the files' times,
//! which its rebase turns round. Here they stay.)
//!
//! Only headers change, one after the other, each saved before. A crash leaves some images linked
//! and others not, which restores as well as before; the next run goes on.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::{ChainSection, Member, files, open_folder};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::job::Work;
use crate::journal::linking;
use crate::layer::Format;
use crate::restore::temp::folder_of;
use crate::text::path_text;

/// What a rebase is going to do.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct RebasePlan {
    /// The files, the FULL first.
    pub members: Vec<Member>,
    /// The link that leads to the last one.
    pub link: PathBuf,
    /// Whether the pointers are absolute.
    pub absolute: bool,
}

impl RebasePlan {
    /// Plans the rebase of a line, with relative pointers or absolute ones.
    ///
    /// # Errors
    /// `Unsupported` if an image is raw, or the images are not in one folder; `Exists` if there is
    /// something called `image` that is no link.
    pub(crate) fn new(line: &ChainSection, absolute: bool) -> Result<Self> {
        let members = line.members()?;
        let Some(full) = members.first() else {
            return Err(Error::new(Kind::NotFound, "there is no image"));
        };
        linking::refuse(folder_of(&full.path))?;
        for m in &members[1..] {
            only_qcow2(m)?;
            same_folder(full, m)?;
        }
        let link = folder_of(&full.path).join(files::LINK);
        if folder::look(&link).is_ok_and(|m| !m.is_symlink()) {
            return Err(Error::new(Kind::Exists, "exists and is not a link").at_path(&link));
        }
        Ok(RebasePlan { members, link, absolute })
    }

    /// The steps, one a line.
    pub(crate) fn lines(&self) -> Vec<String> {
        let name = |m: &Member| path_text(m.path.file_name().unwrap_or_default());
        let base = |m: &Member| self.pointer(&m.path).map_or_else(|_| name(m), |p| path_text(&p));
        let pairs = self.members.windows(2);
        let mut lines: Vec<String> =
            pairs.map(|p| format!("link {} to {}", name(&p[1]), base(&p[0]))).collect();
        if let Some(last) = self.members.last() {
            lines.push(format!("point {} to {}", path_text(&self.link), name(last)));
        }
        lines
    }

    /// Does it.
    ///
    /// # Errors
    /// What was met; the point restores as before.
    pub(crate) fn execute(&self, skip_check: bool, work: &Work) -> Result<()> {
        if !skip_check {
            self.members.iter().try_for_each(|m| files::check(m, work))?;
        }
        let (Some(full), Some(last)) = (self.members.first(), self.members.last()) else {
            return Ok(());
        };
        let dir = open_folder(folder_of(&full.path))?;
        self.members.iter().try_for_each(|m| files::check_same(&dir, m.name(), m.id))?;
        self.members[1..].iter().try_for_each(|m| files::check_alterable(&dir, m.name()))?;
        for pair in self.members.windows(2) {
            work.check()?;
            let base = (self.pointer(&pair[0].path)?, pair[0].format);
            files::set_pointer(&pair[1].path, Some(base), work)?;
        }
        files::set_link(&dir, OsStr::new(files::LINK), last.name())
    }

    /// How an image calls the one that it depends on.
    fn pointer(&self, base: &Path) -> Result<OsString> {
        if !self.absolute {
            return Ok(files::pointer_to(base));
        }
        let path = std::path::absolute(base);
        Ok(path.map_err(|e| Error::io(e, "cannot find the folder").at_path(base))?.into())
    }
}

/// Fails for an image that can have no backing file.
///
/// # Errors
/// `Unsupported`.
pub(crate) fn only_qcow2(m: &Member) -> Result<()> {
    if m.format == Format::Qcow2 {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "a raw image has no backing file")
        .at_path(&m.path)
        .remedy("use 'fleecefs restore' or 'fleecefs merge', which do not change the backup"))
}

/// Fails unless both are in one folder.
///
/// # Errors
/// `Unsupported`.
pub(crate) fn same_folder(a: &Member, b: &Member) -> Result<()> {
    if folder_of(&a.path) == folder_of(&b.path) {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "the images are not in one folder").at_path(&b.path))
}
