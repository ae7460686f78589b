//! A copy of a file system that the kernel is to mount: it needs an id of its own, for the kernel knows btrfs by its
//! id and takes two devices with one id for one file system.
//!
//! The feature `metadata_uuid` is for that: nodes keep the old id, which the superblock has beside the new one.

use super::super::source::Source;
use super::checksum::Checksum;
use super::chunk::Chunks;
use super::node::Key;
use super::superblock::{LEN, METADATA_UUID, PLACES, SUM_FIELD, Super};
use super::volume::Volume;
use super::walk::Walk;
use crate::error::{Error, Kind, Result};
use crate::files::bytes::{le16, le64, part};
use crate::files::findings::Findings;

/// Where the superblock has the id, the id of its nodes, and its incompatible features.
const ID: usize = 0x20;
const NODE_ID: usize = 0x23b;
const INCOMPAT: usize = 0xbc;

/// In the superblock's flags: others are based on this file system, and find it by its id.
const FLAGS: usize = 0x38;
const SEEDING: u64 = 1 << 32;

/// Why the kernel must not be given this device, if it must not: its file system is on others as well, is based on one
/// (a seed), or is the base of one; and the kernel would look for them among the host's.
///
/// # Errors
/// What reading the point says.
pub(in super::super) fn check_alone(source: &Source) -> Result<Option<Error>> {
    let sup = Super::read(source, &Findings::default())?;
    let refused = |what: String| {
        let remedy = "give all of its disks to a VM ('-snapshot'), or restore them";
        Ok(Some(source.error(Kind::Unsupported, what, PLACES[0]).remedy(remedy)))
    };
    if sup.devices != 1 {
        return refused(format!("this btrfs has {} devices", sup.devices));
    }
    let seeding = |at: u64| -> Result<bool> {
        Ok(source.check(at, LEN as u64).is_ok()
            && le64(&source.meta(at, LEN)?, FLAGS) & SEEDING > 0)
    };
    for at in PLACES {
        if seeding(at)? {
            return refused("this btrfs is the seed of others".into());
        }
    }
    match other_device(source, sup)? {
        true => refused("this btrfs is based on another device (a seed)".into()),
        false => Ok(None),
    }
}

/// Whether its list of devices has one that belongs to another file system.
fn other_device(source: &Source, sup: Super) -> Result<bool> {
    /// The object that all devices belong to, the kind of their items, and where these have the file system's id.
    const OBJECT: u64 = 1;
    const DEVICE: u8 = 216;
    const OWNER: usize = 82;
    // The list is in the tree of chunks, which is in the chunks that the superblock has.
    let chunks = Chunks::system(source, &sup)?;
    let (source, findings) = (source.clone(), Findings::default());
    let volume = Volume { source, sup, chunks, findings, sums: None };
    let key = Key { object: OBJECT, kind: DEVICE, offset: 0 };
    let mut walk = Walk::from(&volume, volume.sup.chunk_root, key)?;
    while let Some(item) = walk.next_of(OBJECT, DEVICE)? {
        if part(item.data(), OWNER, 16) != volume.sup.node_id {
            return Ok(true);
        }
    }
    Ok(false)
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
