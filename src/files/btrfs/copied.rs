//! A copy of a file system that the kernel is to mount: it needs an id of its own, for the kernel knows btrfs by its
//! id and takes two devices with one id for one file system.
//!
//! The feature `metadata_uuid` is for that: nodes keep the old id, which the superblock has beside the new one.

use super::super::source::Source;
use super::checksum::Checksum;
use super::superblock::{LEN, METADATA_UUID, PLACES, SUM_FIELD, Super};
use crate::error::{Error, Kind, Result};
use crate::files::bytes::{le16, le64, part};
use crate::files::findings::Findings;

/// Where the superblock has the id, the id of its nodes, and its incompatible features.
const ID: usize = 0x20;
const NODE_ID: usize = 0x23b;
const INCOMPAT: usize = 0xbc;

/// Why the kernel must not be given this device, if it must not: the others of its file system are not known, and it
/// would look for them among the host's.
///
/// # Errors
/// What reading the point says.
pub(in super::super) fn check_alone(source: &Source) -> Result<Option<Error>> {
    let sup = Super::read(source, &Findings::default())?;
    if sup.devices == 1 {
        return Ok(None);
    }
    let what = format!("this btrfs has {} devices", sup.devices);
    let remedy = "give all of its disks to a VM ('-snapshot'), or restore them";
    Ok(Some(source.error(Kind::Unsupported, what, PLACES[0]).remedy(remedy)))
}

/// The superblocks of a file system with the id `id`, and where each is to be written: all copies that are sound.
///
/// # Errors
/// `Corrupt` if there is none; what reading the point says.
pub fn with_id(source: &Source, id: [u8; 16]) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut found = Vec::new();
    for at in PLACES.into_iter().filter(|at| source.check(*at, LEN as u64).is_ok()) {
        if Super::at(source, at).is_ok() {
            found.extend(changed(source.meta(at, LEN)?, id).map(|raw| (at, raw)));
        }
    }
    match found.is_empty() {
        true => Err(source.error(Kind::Corrupt, "no superblock is sound", PLACES[0])),
        false => Ok(found),
    }
}

/// A superblock with another id.
fn changed(mut raw: Vec<u8>, id: [u8; 16]) -> Option<Vec<u8>> {
    let (incompat, old) = (le64(&raw, INCOMPAT), part(&raw, ID, 16).to_vec());
    if incompat & METADATA_UUID == 0 {
        raw.get_mut(NODE_ID..NODE_ID + 16)?.copy_from_slice(&old);
        let bits = (incompat | METADATA_UUID).to_le_bytes();
        raw.get_mut(INCOMPAT..INCOMPAT + 8)?.copy_from_slice(&bits);
    }
    raw.get_mut(ID..ID + 16)?.copy_from_slice(&id);
    let sum = Checksum::of(le16(&raw, 0xc4))?.sum(part(&raw, SUM_FIELD, LEN));
    raw.get_mut(..sum.len())?.copy_from_slice(&sum);
    Some(raw)
}
