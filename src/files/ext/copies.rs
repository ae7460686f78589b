//! The copies of the superblock: which is used where the first one is damaged.

use super::super::bytes::{le16, le32};
use super::super::findings::Findings;
use super::super::source::Source;
use super::superblock::{AT, LEN, MAGIC, MAX_LOG_BLOCK, Super, incompat};
use crate::error::{Error, Kind, Result};

/// Groups that have one, whatever the features: those that are looked at.
const GROUPS: [u64; 4] = [1, 3, 5, 7];
const REMEDY: &str = "run e2fsck on a restored copy of this point";

/// The superblock, or a copy where it is damaged, which is a finding.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature; `Corrupt` if there is none that is right, or, without
/// checksums, if it and a copy contradict each other; what reading the point says.
pub(super) fn superblock(source: &Source, findings: &Findings) -> Result<Super> {
    let first = match Super::at(source, AT) {
        Ok(sup) if sup.has_checksums() => return Ok(sup),
        Err(e) if !e.kind().is_lasting() || e.kind() == Kind::Unsupported => return Err(e),
        other => other,
    };
    let copy = copy(source);
    match (first, copy) {
        (Ok(first), Some((at, copy))) if first.uuid == copy.uuid && !first.is_like(&copy) => {
            Err(contradiction(source, at))
        }
        (Ok(first), _) => Ok(first),
        (Err(e), None) => Err(e),
        (Err(e), Some((at, mut copy))) => {
            let why = format!("the superblock is damaged ({})", e.message());
            findings.copy_used(source, &why, at, REMEDY);
            // Whether the journal has something is not noted in copies: it is looked at.
            copy.incompat |= incompat::RECOVER;
            Ok(copy)
        }
    }
}

fn contradiction(source: &Source, at: u64) -> Error {
    let what = format!(
        "the superblock and its copy at {at:#x} contradict each other, and have no checksums that \
        tell which is right"
    );
    source.error(Kind::Corrupt, what, AT).remedy(REMEDY)
}

/// The first copy that is right, and where it is.
pub(super) fn copy(source: &Source) -> Option<(u64, Super)> {
    let found = places(source).into_iter().find_map(|(group, log, at)| {
        source.check(at, LEN as u64).ok()?;
        let raw = source.meta(at, LEN).ok()?;
        // A copy says which group it is in; only one of another block size could be here as well.
        let is_its = le16(&raw, 0x38) == MAGIC
            && u64::from(le16(&raw, 0x5a)) == group & 0xffff
            && log.is_none_or(|log| le32(&raw, 0x18) == log);
        is_its.then(|| Some((at, Super::at(source, at).ok()?)))?
    });
    found.filter(|(_, sup)| sup.blocks.saturating_mul(sup.block_size) / 2 <= source.size())
}

/// Where copies may be: group, the block size's logarithm, offset. As the first superblock has it, and as mke2fs
/// makes them.
fn places(source: &Source) -> Vec<(u64, Option<u32>, u64)> {
    let mut places = Vec::new();
    if let Ok(raw) = source.meta(AT, LEN)
        && le16(&raw, 0x38) == MAGIC
    {
        let block = 1024u64 << le32(&raw, 0x18).min(MAX_LOG_BLOCK);
        let (first, per) = (u64::from(le32(&raw, 0x14)), u64::from(le32(&raw, 0x20)));
        let backups = [u64::from(le32(&raw, 0x24c)), u64::from(le32(&raw, 0x250))];
        for group in GROUPS.into_iter().chain(backups).filter(|g| *g > 0) {
            let at = group.saturating_mul(per).saturating_add(first).saturating_mul(block);
            places.push((group, None, at));
        }
    }
    for group in GROUPS {
        for log in 0..=MAX_LOG_BLOCK {
            let block = 1024u64 << log;
            let first = if log == 0 { 1 } else { 0 };
            places.push((group, Some(log), (group * 8 * block + first) * block));
        }
    }
    places
}
