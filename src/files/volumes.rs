//! From images of disks to named volumes, and from a volume to its tree.

use std::sync::Arc;

use super::btrfs;
use super::exfat;
use super::ext;
use super::fat;
use super::lvm;
use super::ntfs;
use super::partition::partitions;
use super::probe::{Content, probe};
use super::source::Source;
use super::tree::Tree;
use super::xfs;
use crate::error::{Error, Finding, Kind, Result};

/// Something that may hold a file system: a partition, a logical volume, or a whole disk.
#[derive(Clone)]
pub struct Volume {
    /// `p1`, `vg-root`; `disk` for a whole disk.
    pub name: String,
    /// Its bytes.
    pub source: Source,
    /// What is in it.
    pub content: Content,
}

/// All volumes of a disk, with those that LVM makes of it together with `others` (disks of the same run, asked for
/// only if they are needed), and what is wrong with what is missing.
///
/// # Errors
/// What reading a point says.
pub fn volumes_of(
    disk: &Source,
    others: impl FnOnce() -> Vec<Source>,
) -> Result<(Vec<Volume>, Vec<Finding>)> {
    let (mut found, mut findings) = parts(disk)?;
    let is_pv = |v: &&Volume| v.content == Content::LvmPv;
    let mut physical: Vec<Source> = found.iter().filter(is_pv).map(|v| v.source.clone()).collect();
    if physical.is_empty() {
        return Ok((found, findings));
    }
    for other in others() {
        let (volumes, _) = parts(&other)?;
        physical.extend(volumes.iter().filter(is_pv).map(|v| v.source.clone()));
    }
    let (logical, more) = lvm::volumes(&physical)?;
    findings.extend(more);
    for (name, source) in logical {
        let content = content(&source)?;
        found.push(Volume { name, source, content });
    }
    Ok((found, findings))
}

/// The partitions of a disk; the disk itself if it has no table.
fn parts(disk: &Source) -> Result<(Vec<Volume>, Vec<Finding>)> {
    let table = partitions(disk)?;
    let mut found = Vec::new();
    for p in &table.partitions {
        let source = disk.part(p.start, p.len, &format!("partition {}", p.number))?;
        let content = content(&source)?;
        found.push(Volume { name: format!("p{}", p.number), source, content });
    }
    if found.is_empty() {
        let content = content(disk)?;
        found.push(Volume { name: "disk".into(), source: disk.clone(), content });
    }
    Ok((found, table.findings))
}

/// What a volume holds: by its beginning, or where that is gone by what file systems keep of it elsewhere.
fn content(source: &Source) -> Result<Content> {
    let found = probe(source)?;
    if found != Content::Unknown {
        return Ok(found);
    }
    Ok(match source {
        s if btrfs::has_copy(s) => Content::Btrfs,
        s if xfs::has_copy(s) => Content::Xfs,
        s if ext::has_copy(s) => Content::Ext,
        s if ntfs::has_copy(s) => Content::Ntfs,
        s if exfat::has_copy(s) => Content::Exfat,
        s if fat::has_copy(s) => Content::Fat,
        _ => Content::Unknown,
    })
}

/// Opens the file system of a volume.
///
/// # Errors
/// `Unsupported` or `Encrypted` with what to do, if there is none that can be read; `Corrupt`, or what reading the
/// point says.
pub fn open_tree(volume: &Volume) -> Result<Arc<dyn Tree>> {
    let source = volume.source.clone();
    match &volume.content {
        Content::Ext => ext::open(source),
        Content::Xfs => xfs::open(source),
        Content::Ntfs => ntfs::open(source),
        Content::Fat => fat::open(source),
        Content::Exfat => exfat::open(source),
        Content::Btrfs => btrfs::open(source),
        other => Err(refusal(&source, other)),
    }
}

fn refusal(source: &Source, content: &Content) -> Error {
    let refuse = |kind, what: String| {
        Error::new(kind, format!("{}: {what}", source.label())).at_path(source.path())
    };
    match content {
        Content::Other { name, remedy, encrypted } => {
            let kind = if *encrypted { Kind::Encrypted } else { Kind::Unsupported };
            match remedy {
                Some(remedy) => {
                    refuse(kind, format!("'files' does not read {name}")).remedy(*remedy)
                }
                None => refuse(kind, format!("there are no files in {name}")),
            }
        }
        Content::LvmPv => refuse(
            Kind::Unsupported,
            "this is a physical volume of LVM: the files are in its logical volumes".into(),
        ),
        _ => refuse(Kind::Unsupported, "no known file system".into()),
    }
}
