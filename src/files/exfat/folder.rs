//! The entry sets of a folder, and what the root folder has beside them.

use super::super::blocks::Holding;
use super::super::bytes::{byte, le32, le64, part};
use super::super::clusters::{Chain, Clusters, SLOT, Slots};
use super::super::source::BLOCK;
use super::super::tree::{Entry, NodeId, is_name};
use super::super::utf16;
use super::set::{Set, kind};
use super::upcase::Upper;
use crate::error::{Kind, Result};

/// A folder has at most 256 MiB.
pub(super) const MAX_FOLDER: u64 = 256 << 20;
/// The bit of a node's number that says that its folder has no chain.
pub(super) const NO_CHAIN: u64 = 1;
/// Bytes of the root folder in which its own entries are looked for.
const MAX_LOOKED: u64 = 2 << 20;
/// In use.
const USED: u8 = 0x80;
/// An entry that belongs to one before it.
const SECONDARY: u8 = 0x40;
/// An entry that may be passed over by whoever does not know it.
const BENIGN: u8 = 0x20;

/// What the root folder says of the file system.
#[derive(Default)]
pub(super) struct Root {
    pub label: String,
    /// Free clusters.
    pub free: Option<u32>,
    pub upper: Upper,
    _held: Option<Holding>,
}

/// Looks for it. What is missing is a finding.
///
/// # Errors
/// What reading the point says.
pub(super) fn root(clusters: &Clusters, first: u32) -> Result<Root> {
    let most = u32::try_from(clusters.needed(MAX_FOLDER)).unwrap_or(u32::MAX);
    let chain = Chain::of_folder(clusters, first, most)?;
    let (mut slots, mut offset) = (Slots::chain(clusters, chain, u64::MAX), 0);
    let (mut found, mut upper, mut bitmap) = (Root::default(), None, None);
    while let Some((_, slot)) = slots.get(offset)? {
        match byte(slot, 0) {
            0 => break,
            kind::LABEL => {
                let len = usize::from(byte(slot, 1)).min(11);
                let units: Vec<u16> = utf16::units(part(slot, 2, 2 * len)).collect();
                found.label = String::from_utf16_lossy(&units);
            }
            kind::UPCASE => upper = Some(slot.to_vec()),
            // The second bitmap belongs to the second table.
            kind::BITMAP => bitmap = bitmap.or(Some((le32(slot, 20), le64(slot, 24)))),
            _ => {}
        }
        offset += SLOT;
        // They are among the first entries as a rule; a label that was given later may be behind files.
        if offset > MAX_LOOKED {
            break;
        }
    }
    found.free = bitmap.and_then(|(first, len)| free(clusters, first, len).ok());
    let upper = upper.ok_or("there is none").and_then(|slot| table(clusters, &slot));
    match upper {
        Ok((upper, held)) => (found.upper, found._held) = (upper, Some(held)),
        Err(why) => {
            let what =
                format!("the up-case table cannot be used: {why}: names are compared without it");
            clusters.findings.warn(&clusters.source, Kind::Corrupt, &what, None);
        }
    }
    Ok(found)
}

/// The table that an entry leads to.
fn table(clusters: &Clusters, slot: &[u8]) -> Result<(Upper, Holding), &'static str> {
    let (sum, first, len) = (le32(slot, 4), le32(slot, 20), le64(slot, 24));
    if len > Upper::MAX_BYTES {
        return Err("it is too large");
    }
    let bytes = read(clusters, first, len).map_err(|_| "it cannot be read")?;
    let held =
        clusters.source.blocks().hold(Upper::MAX_BYTES).map_err(|_| "the cache is too small")?;
    Ok((Upper::new(&bytes, sum)?, held))
}

/// How many clusters the bitmap shows as free.
fn free(clusters: &Clusters, first: u32, len: u64) -> Result<u32> {
    /// Of a larger bitmap nothing is counted: it would take long to read.
    const MAX: u64 = 16 << 20;
    let needed = u64::from(clusters.count).div_ceil(8);
    if len < needed || len > MAX {
        return Err(clusters.bad(first, "invalid allocation bitmap"));
    }
    let bytes = read(clusters, first, needed)?;
    let used: u32 = bytes.iter().map(|b| b.count_ones()).sum();
    Ok(clusters.count.saturating_sub(used))
}

fn read(clusters: &Clusters, first: u32, len: u64) -> Result<Vec<u8>> {
    let chain = Chain::of_file(clusters, first, len)?;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        let at = bytes.len() as u64;
        let Some((place, there)) = chain.place(clusters, at)? else { break };
        let n = there.min(len - at).min(BLOCK);
        bytes.extend(clusters.source.meta(place, n as usize)?);
    }
    Ok(bytes)
}

/// Who gets the entries.
pub(super) type Each<'a> = dyn FnMut(Entry, &Set) -> bool + 'a;

/// Goes through a folder.
pub(super) struct Reading<'a, 'b> {
    pub clusters: &'a Clusters,
    pub slots: Slots<'a>,
    pub no_chain: bool,
    pub each: &'a mut Each<'b>,
}

impl Reading<'_, '_> {
    /// Gives the entries from byte `from` of the folder on.
    ///
    /// # Errors
    /// `Corrupt`, or what reading the point says.
    pub(super) fn read(mut self, from: u64) -> Result<()> {
        let mut offset = from - from % SLOT;
        while let Some((at, slot)) = self.slots.get(offset)? {
            let slot = slot.to_vec();
            offset = match byte(&slot, 0) {
                0 => break,
                kind::FILE => match self.set(&slot, at, offset)? {
                    Some(next) => next,
                    None => break,
                },
                other => {
                    let critical = other & (USED | SECONDARY | BENIGN) == USED;
                    if critical && !(kind::BITMAP..=kind::LABEL).contains(&other) {
                        self.odd(&format!("unknown directory entry of type {other:#x}"), at);
                    }
                    offset + SLOT
                }
            }
        }
        Ok(())
    }

    /// Gives the set that begins with this entry; where the next one begins, or `None` if no more is wanted.
    fn set(&mut self, slot: &[u8], at: u64, offset: u64) -> Result<Option<u64>> {
        let set = match self.whole(slot, offset)? {
            Some(bytes) => Set::new(&bytes).map(|set| (set, offset + bytes.len() as u64)),
            None => Err("an entry set is cut short"),
        };
        let (set, next) = match set {
            Ok(found) => found,
            Err(why) => {
                self.odd(why, at);
                // What looks like its parts is passed over as such.
                return Ok(Some(offset + SLOT));
            }
        };
        let name = utf16::to_bytes(set.name.iter().copied());
        if !is_name(&name) {
            self.odd("an entry set with an invalid name", at);
            return Ok(Some(next));
        }
        let number = at | if self.no_chain { NO_CHAIN } else { 0 };
        let entry = Entry { name, node: NodeId { tree: 0, number }, kind: Some(set.kind()), next };
        Ok((self.each)(entry, &set).then_some(next))
    }

    fn whole(&mut self, slot: &[u8], offset: u64) -> Result<Option<Vec<u8>>> {
        let Some(len) = Set::len(slot) else { return Ok(None) };
        let mut bytes = slot.to_vec();
        while bytes.len() < len {
            match self.slots.get(offset + bytes.len() as u64)? {
                Some((_, more)) => bytes.extend_from_slice(more),
                None => return Ok(None),
            }
        }
        Ok(Some(bytes))
    }

    fn odd(&self, what: &str, at: u64) {
        let what = format!("{what} skipped at {at:#x}");
        self.clusters.findings.warn(&self.clusters.source, Kind::Corrupt, &what, None);
    }
}
