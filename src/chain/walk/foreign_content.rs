//! Files of other programs' layouts: what their names and contents say.

use std::ffi::OsStr;

use crate::error::{Finding, Result};
use crate::layer::sparsestream::Meta;
use crate::layer::{sparsestream, vma};
use crate::layout::name::Name;
use crate::layout::stream_name::StreamName;
use crate::layout::{Level, name};
use crate::storage::SourceFile;

/// What a file of these layouts holds.
#[derive(Debug)]
pub(in crate::chain) enum ForeignContent {
    /// A Proxmox archive.
    Archive(vma::Beginning),
    /// A stream of virtnbdbackup, and what is said of it if it ends too early.
    Stream(Meta, Option<Finding>),
    /// What is named like a copy or a full backup in virtnbdbackup's layout, but is no stream.
    NoStream,
}

/// What a file with this name is in one of these layouts; `None` for names that are in none.
pub(in crate::chain) fn layout(file: &OsStr) -> Option<&'static str> {
    if name::parse(file) != Name::Other {
        return None;
    }
    let text = file.to_string_lossy();
    match () {
        () if archive_stem(&text).is_some() => Some("a Proxmox archive"),
        () if StreamName::parse(&text).is_some() => Some("a virtnbdbackup stream"),
        () => None,
    }
}

/// Looks into a file whose name [`layout`] knows.
///
/// # Errors
/// The file is damaged or cannot be read.
pub(in crate::chain) fn read_content(file: &SourceFile) -> Result<ForeignContent> {
    let name = file.path().file_name().unwrap_or_default().to_string_lossy();
    if archive_stem(&name).is_some() {
        return vma::read_beginning(file).map(ForeignContent::Archive);
    }
    let level = StreamName::parse(&name).map(|n| n.level);
    if matches!(level, Some(Level::Copy | Level::Full)) && !sparsestream::has_magic(file)? {
        return Ok(ForeignContent::NoStream);
    }
    let (meta, cut) = sparsestream::probe(file)?;
    Ok(ForeignContent::Stream(meta, cut.map(|e| Finding::from_error(&e, file.path()))))
}

/// An archive's name without its endings, or `None` for other files.
pub(in crate::chain) fn archive_stem(name: &str) -> Option<&str> {
    const ENDINGS: [&str; 4] = [".vma", ".vma.zst", ".vma.gz", ".vma.lzo"];
    let stem = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending))?;
    (!stem.is_empty()).then_some(stem)
}
