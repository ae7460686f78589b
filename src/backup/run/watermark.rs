//! The size watermark in QEMU: added with the new bitmap, and asked once the view is frozen. What it proves
//! stands in [`crate::backup::plan::watermark`].

use std::ops::Range;

use serde_json::{Value, json};

use super::session::{Active, Run};
use crate::backup::fleece::nbdserver;
use crate::backup::fleece::nbdserver::ExportUse;
use crate::backup::graph::bitmap;
use crate::backup::names;
use crate::backup::names::{Role, object, work_bitmap};
use crate::backup::plan::watermark::marks;
use crate::error::{Error, Kind, Result};
use crate::manifest::BitmapInfo;
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::nbd::Nbd;
use crate::qmp::types::Bitmap;
use crate::units::human_bytes;

/// Bytes read at once from a view: QEMU's unit of copying before a write, since not every QEMU can be
/// trusted with more.
const PIECE: u64 = 64 << 10;

impl Run<'_> {
    /// The new bitmap, with its watermark where QEMU's NBD server is to be had. Only then the manifest
    /// names the watermark.
    pub(in crate::backup) fn add_bitmap(&mut self, d: &mut Active) -> Result<()> {
        let Some(b) = d.plan.new_bitmap.clone() else { return Ok(()) };
        if !d.plan.wants_watermark() || self.server.is_none() {
            return bitmap::add(&mut self.client, &b);
        }
        if let Some(name) = d.plan.same_marks() {
            // What was cut off since they were counted is missing in the new one too, and copied once
            // more than need be.
            let from = json!({"node": b.node, "name": name});
            return self.add_with_marks(d, &b, &from);
        }
        let scratch = object(&self.run, Role::Scratch, d.index);
        let all = marks(d.plan.disk.size, b.granularity);
        if let Err(e) = self.scratch(d, b.granularity, &all) {
            if e.kind() == Kind::Interrupted {
                return Err(e);
            }
            remove_scratch(&mut self.client, &scratch)?;
            let what = "its size cannot be watched: the next INC has to read the whole disk";
            self.watch.warn_of(
                d.plan.disk.label(),
                &format!("{}: {what}: {}", d.plan.disk.label(), e.report()),
            );
            return bitmap::add(&mut self.client, &b);
        }
        let from = json!({"node": scratch, "name": work_bitmap(&self.run)});
        self.add_with_marks(d, &b, &from)?;
        remove_scratch(&mut self.client, &scratch)
    }

    /// Adds the new bitmap and its watermark, which takes the marks of the bitmap `from`, in one
    /// transaction.
    fn add_with_marks(&mut self, d: &mut Active, b: &BitmapInfo, from: &Value) -> Result<()> {
        let watermark = names::watermark(&b.name);
        self.client.execute(
            "transaction",
            json!({"actions": [
                {"type": "block-dirty-bitmap-add", "data": bitmap::options(b)},
                {"type": "block-dirty-bitmap-add", "data": {"node": b.node, "name": watermark,
                    "granularity": b.granularity, "persistent": b.persistent, "disabled": true}},
                {"type": "block-dirty-bitmap-merge", "data": {"node": b.node, "target": watermark,
                    "bitmaps": [from]}},
            ]}),
        )?;
        let has = |i: &mut Option<BitmapInfo>| {
            i.iter_mut().filter(|i| i.name == b.name).for_each(|i| i.watermark = true);
        };
        has(&mut d.plan.new_bitmap);
        has(&mut d.plan.diff_bitmap);
        has(&mut d.manifest.bitmap);
        has(&mut d.manifest.diff_bitmap);
        Ok(())
    }

    /// Adds to what the job copies where the disk may differ from the point below without a dirty bit.
    /// (The question comes after the freeze point, and after the dirty bits were taken: what is cut
    /// off later is copied for nothing, no more.)
    /// `now` are the bitmaps of the disk's node, as they are then.
    pub(in crate::backup) fn add_unmarked(&mut self, d: &Active, now: &[Bitmap]) -> Result<()> {
        let Some((range, smaller)) = d.plan.cut(d.plan.marks_left(now)) else { return Ok(()) };
        let parent = d.plan.parent().map_or("the last point", |m| &m.image);
        let label = d.plan.disk.label();
        if smaller {
            let len = human_bytes(range.end - range.start);
            let marked = self.mark(d, &[range])?;
            self.watch.warn_of(label, &format!(
                "{label}: was shrunk and grown again since {parent}: its last {len} are copied, \
                 {marked} bytes of them without a dirty bit"
            ));
            return Ok(());
        }
        if self.tail_differs(d)? {
            let marked = self.mark(d, Vec::from_iter(d.plan.tail()).as_slice())?;
            if marked > 0 {
                self.watch.warn_of(label, &format!(
                    "{label}: its last {marked} bytes differ from {parent} without a dirty bit: copied \
                     as well"
                ));
            }
        }
        Ok(())
    }

    /// Whether the frozen view has other bytes than the chain where the point below ended.
    fn tail_differs(&mut self, d: &Active) -> Result<bool> {
        let (Some(server), Some(chain), Some(tail)) = (&self.server, &d.chain, d.plan.tail())
        else {
            return Err(Error::new(Kind::Peer, "no NBD server to read the disk's end from"));
        };
        let export = object(&self.run, Role::ViewExport, d.index);
        let node = object(&self.run, Role::Snapshot, d.index);
        let (known, size) = (chain.tail(), d.plan.disk.size);
        self.migration.as_ref().map_or(Ok(None), |g| g.check(&mut self.client))?;
        server.with_export(&mut self.client, &export, &node, ExportUse::Read, |n| {
            nbdserver::check_size(n, size)?;
            differs(n, tail, known)
        })
    }

    /// Adds ranges to what the job copies; gives the bytes that were not in it yet.
    pub(in crate::backup) fn mark(&mut self, d: &Active, ranges: &[Range<u64>]) -> Result<u64> {
        if ranges.is_empty() {
            return Ok(0);
        }
        let (view, work) = (object(&self.run, self.source(), d.index), work_bitmap(&self.run));
        let before = bitmap::count(&mut self.client, &view, &work)?;
        let granularity = d.plan.since.as_ref().map_or(65536, |b| b.granularity);
        self.scratch(d, granularity, ranges)?;
        let scratch = object(&self.run, Role::Scratch, d.index);
        self.client.execute(
            "block-dirty-bitmap-merge",
            json!({"node": view, "target": work,
            "bitmaps": [{"node": scratch, "name": work}]}),
        )?;
        remove_scratch(&mut self.client, &scratch)?;
        Ok(bitmap::count(&mut self.client, &view, &work)?.saturating_sub(before))
    }

    /// A scratch node (see `zeros`) of the disk's size whose bitmap has `ranges`.
    fn scratch(&mut self, d: &Active, granularity: u64, ranges: &[Range<u64>]) -> Result<()> {
        let Some(server) = &self.server else {
            return Err(Error::new(Kind::Peer, "no NBD server to mark ranges with"));
        };
        let scratch = object(&self.run, Role::Scratch, d.index);
        let node = json!({"driver": "null-co", "node-name": scratch,
            "size": d.plan.disk.size, "read-zeroes": true});
        if self.client.call("blockdev-add", node.clone())?.is_err() {
            // One that could not be removed after its last use is still there.
            remove_scratch(&mut self.client, &scratch)?;
            self.client.execute("blockdev-add", node)?;
        }
        self.client.execute(
            "block-dirty-bitmap-add",
            json!({"node": scratch, "name": work_bitmap(&self.run),
            "granularity": granularity}),
        )?;
        let export = object(&self.run, Role::ScratchExport, d.index);
        server.with_export(&mut self.client, &export, &scratch, ExportUse::Write, |n| {
            n.write_zeroes(ranges)
        })
    }
}

/// Removes a scratch node. Where that cannot be done now, the end of the run does it.
fn remove_scratch(client: &mut Client, node: &str) -> Result<()> {
    if let Err(r) = client.call("blockdev-del", json!({"node-name": node}))? {
        log::warn!("node {node} stays for now: {}", short(&r.desc));
    }
    Ok(())
}

/// Whether an export holds other bytes in `range` than `known`, beyond which there are zeros.
fn differs(nbd: &mut Nbd, range: Range<u64>, known: &[u8]) -> Result<bool> {
    let mut at = range.start;
    let mut rest = known;
    while at < range.end {
        // No request crosses a border of what is copied before a write.
        let end = (at / PIECE).saturating_add(1).saturating_mul(PIECE).min(range.end);
        let bytes = nbd.read(at, u32::try_from(end - at).unwrap_or(0))?;
        let (here, more) = rest.split_at(rest.len().min(bytes.len()));
        let (same, beyond) = bytes.split_at(here.len());
        if same != here || beyond.iter().any(|b| *b != 0) {
            return Ok(true);
        }
        rest = more;
        at = end;
    }
    Ok(false)
}
