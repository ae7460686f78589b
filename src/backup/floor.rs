//! The smallest size that a disk has had since a point, which its storage may not tell.
//!
//! QEMU drops the dirty bits beyond the end of a disk that shrinks. If the disk grows again, storage
//! without holes (a volume, a LUN) gives the bytes there that it gave before, or any others: nothing
//! shows that they may differ from those in the chain. So a second bitmap lies beside each recording
//! one of a raw disk: disabled, so that no write of the guest reaches it, and with dirty marks
//! from the beginning to the end of the disk. QEMU cuts it with the disk, and the marks that are
//! left say how small the disk has been. It is added in one transaction with the recording one: no
//! change of size escapes it.

use std::ops::Range;

use serde_json::json;

use super::bitmap;
use super::names::{self, Role, object, work_bitmap};
use super::plan::DiskPlan;
use super::seen::SeenDisk;
use super::work::{Active, Run};
use crate::chain::manifest::BitmapInfo;
use crate::error::{Error, Kind, Result};
use crate::qmp::types::Bitmap;
use crate::units::human_bytes;

/// How many marks there are at most, but for the last one: each is a write to a scratch node.
const MARKS: u64 = 256;

/// Bytes from one mark to the next: a multiple of the granularity.
fn step(size: u64, granularity: u64) -> u64 {
    let granularity = granularity.max(1);
    let granules = size.div_ceil(granularity);
    granules.div_ceil(MARKS).max(1).saturating_mul(granularity)
}

/// Where the last bit's part of the disk begins.
fn last(size: u64, granularity: u64) -> u64 {
    let granularity = granularity.max(1);
    (size.saturating_sub(1) / granularity).saturating_mul(granularity)
}

/// What is made dirty for a disk of `size` bytes: a bit at each step, and the last one.
fn marks(size: u64, granularity: u64) -> Vec<Range<u64>> {
    let (step, last) = (step(size, granularity), last(size, granularity));
    if size == 0 || step == granularity {
        return Vec::from_iter((size > 0).then_some(0..size));
    }
    let mut marks = Vec::new();
    let mut at = 0;
    while at < last {
        marks.push(at..at.saturating_add(granularity));
        at = at.saturating_add(step);
    }
    marks.push(last..size);
    marks
}

/// From where on a disk that had `size` bytes may hold anything, if `count` dirty bytes are left of
/// its marks; and whether it was smaller for certain. A cut inside the last bit's part leaves all
/// marks: that part is always in doubt.
pub fn in_doubt(size: u64, granularity: u64, count: u64) -> (u64, bool) {
    let (step, last) = (step(size, granularity), last(size, granularity));
    let left = count / granularity.max(1);
    // The marks below the last one.
    let below = last.div_ceil(step);
    if left > below {
        return (last, false);
    }
    (left.saturating_sub(1).saturating_mul(step), true)
}

/// The floor that a manifest says to lie beside its bitmap, if it is on the disk.
pub fn of<'a>(info: &BitmapInfo, disk: &'a SeenDisk) -> Option<&'a Bitmap> {
    let floor = disk.bitmap(&names::floor(&info.name)).filter(|_| info.floor)?;
    (!floor.recording && floor.granularity == info.granularity).then_some(floor)
}

impl DiskPlan {
    /// The floor beside what an INC or DIFF is made by.
    fn floor(&self) -> Option<&Bitmap> {
        of(self.since.as_ref()?, &self.disk)
    }

    /// What has to be copied since the disk may have been smaller since the point below, with
    /// `count` dirty bytes left of the floor.
    fn cut(&self, count: u64) -> Option<(Range<u64>, bool)> {
        let (since, point) = (self.since.as_ref()?, self.parent()?);
        let (from, smaller) = in_doubt(point.virtual_size, since.granularity, count);
        (from < point.virtual_size).then_some((from..point.virtual_size, smaller))
    }

    /// What will be copied since the disk may have been smaller, as far as can be known before; `None`
    /// without a floor.
    pub fn doubtful(&self) -> Option<Range<u64>> {
        Some(self.cut(self.floor()?.count)?.0)
    }

    /// Whether the new bitmap should get a floor: the clusters of qcow2 that come back are zeros,
    /// which `zeros` finds.
    pub fn wants_floor(&self) -> bool {
        self.new_bitmap.is_some() && self.disk.identity.format != "qcow2"
    }
}

impl Run<'_> {
    /// The new bitmap, with its floor where it wants one and QEMU's NBD server is to be had. Only
    /// then the manifest names the floor.
    pub(super) fn add_bitmap(&mut self, d: &mut Active) -> Result<()> {
        let Some(b) = d.plan.new_bitmap.clone() else { return Ok(()) };
        if !d.plan.wants_floor() || self.server.is_none() {
            return bitmap::add(&mut self.client, &b);
        }
        let scratch = object(&self.run, Role::Scratch, d.index);
        let all = marks(d.plan.disk.size, b.granularity);
        if let Err(e) = self.scratch(d, b.granularity, &all) {
            if e.kind() == Kind::Interrupted {
                return Err(e);
            }
            self.client.call("blockdev-del", json!({"node-name": scratch}))?.ok();
            let what = "if it is shrunk and grown again, that will not be noticed";
            self.watch.warn(&format!("{}: {what}: {}", d.plan.disk.label(), e.report()));
            return bitmap::add(&mut self.client, &b);
        }
        let floor = names::floor(&b.name);
        self.client.execute(
            "transaction",
            json!({"actions": [
                {"type": "block-dirty-bitmap-add", "data": bitmap::options(&b)},
                {"type": "block-dirty-bitmap-add", "data": {"node": b.node, "name": floor,
                    "granularity": b.granularity, "disabled": true}},
                {"type": "block-dirty-bitmap-merge", "data": {"node": b.node, "target": floor,
                    "bitmaps": [{"node": scratch, "name": work_bitmap(&self.run)}]}},
            ]}),
        )?;
        self.client.execute("blockdev-del", json!({"node-name": scratch}))?;
        let has = |i: &mut Option<BitmapInfo>| {
            i.iter_mut().filter(|i| i.name == b.name).for_each(|i| i.floor = true);
        };
        has(&mut d.plan.new_bitmap);
        has(&mut d.plan.diff_bitmap);
        has(&mut d.manifest.bitmap);
        has(&mut d.manifest.diff_bitmap);
        Ok(())
    }

    /// Adds to what the job copies where the disk may have been smaller since the point below. (The
    /// question comes after the moment: what is cut off later is copied for nothing, no more.)
    pub(super) fn add_cut(&mut self, d: &Active) -> Result<()> {
        let Some(floor) = d.plan.floor().and_then(|f| f.name.as_deref()) else { return Ok(()) };
        let count = bitmap::count(&mut self.client, &d.plan.disk.node, floor)?;
        let Some((range, smaller)) = d.plan.cut(count) else { return Ok(()) };
        if smaller {
            self.watch.warn(&format!(
                "{}: was shrunk and grown again since {}: its last {} are copied whole",
                d.plan.disk.label(),
                d.plan.parent().map_or("the last point", |m| &m.image),
                human_bytes(range.end - range.start)
            ));
        }
        self.mark(d, &[range]).map(drop)
    }

    /// Adds ranges to what the job copies; gives the bytes that were not in it yet.
    pub(super) fn mark(&mut self, d: &Active, ranges: &[Range<u64>]) -> Result<u64> {
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
        self.client.execute("blockdev-del", json!({"node-name": scratch}))?;
        Ok(bitmap::count(&mut self.client, &view, &work)?.saturating_sub(before))
    }

    /// A scratch node (see `zeros`) of the disk's size whose bitmap has `ranges`.
    fn scratch(&mut self, d: &Active, granularity: u64, ranges: &[Range<u64>]) -> Result<()> {
        let Some(server) = &self.server else {
            return Err(Error::new(Kind::Peer, "there is no NBD server to mark ranges by"));
        };
        let scratch = object(&self.run, Role::Scratch, d.index);
        self.client.execute(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": scratch,
            "size": d.plan.disk.size, "read-zeroes": true}),
        )?;
        self.client.execute(
            "block-dirty-bitmap-add",
            json!({"node": scratch, "name": work_bitmap(&self.run),
            "granularity": granularity}),
        )?;
        let export = object(&self.run, Role::ScratchExport, d.index);
        server.with_export(&mut self.client, &export, &scratch, true, |n| {
            ranges.iter().try_for_each(|r| n.write_zeroes(r.clone()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dirty bytes that QEMU leaves of `marks` when it cuts the disk.
    fn left(marks: &[Range<u64>], granularity: u64, cut: u64) -> u64 {
        let bits = |r: &Range<u64>| {
            let end = r.end.min(cut.next_multiple_of(granularity));
            end.saturating_sub(r.start).div_ceil(granularity)
        };
        marks.iter().map(bits).sum::<u64>() * granularity
    }

    #[test]
    fn what_was_cut_off_is_always_in_doubt() {
        const G: u64 = 4096;
        for size in [512, G, G + 512, 5 * G, 256 * G, 256 * G + 1, 257 * G, 1000 * G + 7, 70000 * G]
        {
            let all = marks(size, G);
            assert!(all.len() as u64 <= MARKS + 1, "{size}: {}", all.len());
            assert_eq!(
                in_doubt(size, G, left(&all, G, size)),
                ((size - 1) / G * G, false),
                "{size}"
            );
            for cut in (0..size).step_by((size as usize / 999).max(1)) {
                let (from, smaller) = in_doubt(size, G, left(&all, G, cut));
                assert!(from <= cut / G * G, "{size} cut to {cut}: {from}");
                assert!(cut - from <= 2 * step(size, G), "{size} cut to {cut}: {from}");
                assert_eq!(smaller, cut <= (size - 1) / G * G, "{size} cut to {cut}");
            }
        }
        assert_eq!(in_doubt(0, G, 0), (0, true));
        assert_eq!(in_doubt(G, 0, 0), (0, true));
    }
}
