//! The copies of the superblock, one at the beginning of each allocation group: used where the first is damaged.

use super::super::bytes::{be32, byte};
use super::super::findings::Findings;
use super::super::source::Source;
use super::superblock::{LEN, REPAIR, Super};
use crate::error::{Kind, Result};

/// How many groups mkfs.xfs makes.
const GROUPS: [u64; 5] = [4, 8, 16, 32, 2];
/// Block sizes: that of mkfs.xfs first.
const BLOCK_LOGS: [u8; 8] = [12, 10, 9, 11, 13, 14, 15, 16];
/// Groups are not larger.
const MAX_GROUP: u64 = 1 << 40;

/// The superblock, or a copy where it is damaged, which is a finding.
///
/// # Errors
/// `Unsupported` for an unknown incompatible feature; `Corrupt` if there is none that is right, or, in version 4,
/// if it and a copy contradict each other; what reading the point says.
pub(super) fn superblock(source: &Source, findings: &Findings) -> Result<Super> {
    let first = match Super::read(source) {
        Ok(sup) if sup.v5 => return Ok(sup),
        Err(e) if !e.kind().is_lasting() || is_told(source, e.kind()) => return Err(e),
        other => other,
    };
    let copy = copy(source);
    match (first, copy) {
        (Ok(first), Some((at, copy))) if first.uuid == copy.uuid && !first.is_like(&copy) => {
            let what = format!(
                "the superblock and its copy at {at:#x} contradict each other, and have no checksums \
                 that tell which is right"
            );
            Err(source.error(Kind::Corrupt, what, 0).remedy(REPAIR))
        }
        (Ok(first), _) => Ok(first),
        (Err(e), None) => Err(e),
        (Err(e), Some((at, copy))) => {
            let why = format!("the superblock is damaged ({})", e.message());
            findings.copy_used(source, &why, at, REPAIR);
            Ok(copy)
        }
    }
}

/// Whether the first superblock is right, and says itself that it cannot be read.
fn is_told(source: &Source, kind: Kind) -> bool {
    kind == Kind::Unsupported && Super::is_right(source, 0).unwrap_or(false)
}

/// The first copy that is right, and where it is.
pub(super) fn copy(source: &Source) -> Option<(u64, Super)> {
    places(source).into_iter().find_map(|at| {
        source.check(at, LEN as u64).ok().filter(|()| at > 0)?;
        let copy = Super::copy(source, at).ok()?;
        // It says itself how long a group is.
        (copy.ag_blocks << copy.block_log == at).then_some((at, copy))
    })
}

/// Where the second group may begin: as the first superblock says, or mkfs.xfs does it for a device of this size.
fn places(source: &Source) -> Vec<u64> {
    let mut places = Vec::new();
    if let Ok(raw) = source.meta(0, LEN) {
        let shift = u32::from(byte(&raw, 120)).min(16);
        places.push(u64::from(be32(&raw, 84)) << shift);
    }
    for log in BLOCK_LOGS {
        let blocks = source.size() >> log;
        places.extend(GROUPS.map(|groups| blocks.div_ceil(groups) << log));
    }
    places.push(MAX_GROUP);
    places
}
