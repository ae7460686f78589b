//! Adding and removing dirty bitmaps. Nothing here, or anywhere, clears one.

use serde_json::{Value, json};

use crate::backup::names;
use crate::error::{Error, Kind, Result};
use crate::manifest::BitmapInfo;
use crate::qmp::Client;
use crate::qmp::types::{Bitmap, Node};

/// A bitmap of ours is on one node; filters above it may report it as well.
const MOST_NODES: usize = 16;

/// How many bitmaps are listed, and how long a node's name may be (QEMU's end at 31 bytes).
const MOST_BITMAPS: usize = 65_536;
const LONGEST_NAME: usize = 255;

/// Adds a recording bitmap to its node.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn add(client: &mut Client, b: &BitmapInfo) -> Result<()> {
    client.execute("block-dirty-bitmap-add", options(b)).map(drop)
}

/// What QEMU needs to know to add a recording bitmap.
pub(crate) fn options(b: &BitmapInfo) -> Value {
    json!({"node": b.node, "name": b.name, "granularity": b.granularity,
        "persistent": b.persistent})
}

/// Bytes per bit of a bitmap that nobody reads: few bits.
const COARSE: u64 = 64 << 20;

/// Adds a bitmap that records nothing and ends with QEMU: as long as any is there, QEMU refuses to load a
/// snapshot into the disk.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn hold(client: &mut Client, node: &str, name: &str) -> Result<()> {
    let options = json!({"node": node, "name": name, "granularity": COARSE,
        "persistent": false, "disabled": true});
    client.execute("block-dirty-bitmap-add", options).map(drop)
}

/// Removes a bitmap.
///
/// # Errors
/// QEMU refuses: it is busy, or not there.
pub(crate) fn remove(client: &mut Client, node: &str, name: &str) -> Result<()> {
    client.execute("block-dirty-bitmap-remove", json!({"node": node, "name": name})).map(drop)
}

/// Removes a bitmap wherever it is; gives how many were removed. One on a disk that has become
/// read-only, below a snapshot of another program, cannot be removed: it stays, and if the disk is
/// written to again one day the next backup of it removes it.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn remove_everywhere(client: &mut Client, name: &str) -> Result<usize> {
    let nodes: Vec<Node> = client.query("query-named-block-nodes", json!({"flat": true}))?;
    let mut removed = 0;
    let with = nodes.iter().filter(|n| shows_own(n) && n.bitmap(name).is_some());
    for n in with.take(MOST_NODES) {
        if n.ro {
            log::warn!("{} is read-only: the bitmap {name} stays on it", n.node_name);
            continue;
        }
        remove(client, &n.node_name, name)?;
        removed += 1;
    }
    Ok(removed)
}

/// Whether the bitmaps that a node reports are its own: a filter may report its child's.
fn shows_own(n: &Node) -> bool {
    names::parse_object(&n.node_name).is_none()
}

/// The bitmaps of a node as they are now; none if it is not there.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn of(client: &mut Client, node: &str) -> Result<Vec<Bitmap>> {
    let nodes: Vec<Node> = client.query("query-named-block-nodes", json!({"flat": true}))?;
    let node = nodes.into_iter().find(|n| n.node_name == node);
    Ok(node.map(|n| n.dirty_bitmaps).unwrap_or_default())
}

fn named<'a>(bitmaps: &'a [Bitmap], name: &str) -> Option<&'a Bitmap> {
    bitmaps.iter().find(|b| b.name.as_deref() == Some(name))
}

/// Fails unless the bitmap is there and records: another program may have disabled or removed it since
/// planning, and what was written then has no bit.
///
/// # Errors
/// `Busy`.
pub(crate) fn check_records(now: &[Bitmap], name: &str) -> Result<()> {
    let found = named(now, name);
    if found.is_some_and(|b| b.recording && !b.inconsistent) {
        return Ok(());
    }
    let what = format!("another program has disabled or removed bitmap {name}");
    Err(Error::new(Kind::Busy, what)
        .remedy("take a FULL: what was written meanwhile is not recorded"))
}

/// Dirty bytes of a bitmap; 0 if it is not there.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn count(client: &mut Client, node: &str, name: &str) -> Result<u64> {
    Ok(named(&of(client, node)?, name).map_or(0, |b| b.count))
}

/// A bitmap and where it is.
#[derive(Debug, Clone)]
pub(crate) struct NodeBitmap {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub bitmap: Bitmap,
}

/// All named bitmaps of all nodes.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn list(client: &mut Client) -> Result<Vec<NodeBitmap>> {
    let nodes: Vec<Node> = client.query("query-named-block-nodes", json!({"flat": true}))?;
    let mut found = Vec::new();
    for n in nodes.into_iter().filter(|n| shows_own(n) && n.node_name.len() <= LONGEST_NAME) {
        for bitmap in n.dirty_bitmaps.into_iter().filter(|b| b.name.is_some()) {
            if found.len() == MOST_BITMAPS {
                log::warn!("there are more than {MOST_BITMAPS} bitmaps");
                return Ok(found);
            }
            found.push(NodeBitmap { node: n.node_name.clone(), bitmap });
        }
    }
    Ok(found)
}
