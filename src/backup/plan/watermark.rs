//! The size watermark: what tells whether a disk was smaller since a point, and how small.
//!
//! QEMU drops the dirty bits beyond the end of a disk that shrinks, and growing gives none back. What
//! the regrown part holds is then not what the chain has, and no bit says so. So a second bitmap, the
//! watermark, is beside each recording one: disabled, so that no write of the guest reaches it, with
//! dirty marks from the beginning to the end of the disk (a mark at each step, and one at the end).
//! QEMU cuts it along with the recording one. Both are added in one transaction, and both are
//! persistent or neither is: no change of size escapes it, be it live (`block_resize`) or by `qemu-img
//! resize` while QEMU is down. After a crash QEMU calls both inconsistent, and refuses to resize such a
//! disk.
//!
//! # What has to be copied besides the dirty bits
//!
//! Let `P` be the size at the point, `G` the bytes of a bit, and `c` the smallest size since then. The
//! marks are counted once the view is frozen and the dirty bits are taken.
//!
//! - Below `c` nothing was ever cut off: each change there has its dirty bit.
//! - QEMU drops the bits, and marks, of all granules that begin at `c` or later; the granule in which
//!   `c` lies keeps its bit. So marks go from the end only, and the last mark left, at `m`, proves
//!   that `c > m`: what may differ without a bit begins at `m` at the earliest.
//! - It ends at `P`. Beyond `P` the chain has zeros. A disk that knows what it grew by (qcow2) gives
//!   zeros there, except for what the guest wrote, with its bit, and the rest of the cluster in which
//!   a former end lay: such a rest comes back as it was. Where that end is `P` itself, the cluster
//!   is looked at or copied. At any other end, the rest was written since the point, and the bit of
//!   its granule, which is no smaller than a cluster, was kept. Of a disk that knows nothing (raw),
//!   all that it grew by is copied ([`DiskPlan::grown`]).
//!
//! So where marks are missing, `m..P` is copied, whatever is there. That costs little more than
//! looking for differences would: beyond `c` is what was written since, which is dirty, and zeros,
//! which the job does not read; below `c` it is less than a step. It asks no storage what is zero: a
//! disk grown with `preallocation=full` does not say so, nor one with a backing file, where QEMU
//! also writes zeros to the rest of the cluster of the old end, without a bit.
//!
//! Where all marks are there, the disk may still have been cut inside the last granule, since the last
//! mark stays then. Its bytes in the view are compared with those of the chain (`run/watermark.rs`).
//!
//! A watermark that is gone, records, is inconsistent, or has marks that are not ours proves nothing,
//! and neither does a point that never had one: then all of the disk's block status is compared with
//! the chain (see `zeros`), and the new point gets a watermark.

use std::ops::Range;

use super::planned::DiskPlan;
use crate::backup::disks::GuestDisk;
use crate::backup::names;
use crate::manifest::BitmapInfo;
use crate::qmp::types::Bitmap;

/// How many marks there are at most, but for the last one: each is a write to a scratch node.
const MARKS: u64 = 256;

/// What a bit may stand for: less than this makes no marks of ours, and more would be compared at once.
const GRANULARITIES: std::ops::RangeInclusive<u64> = 512..=2 << 20;

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
pub(in crate::backup) fn marks(size: u64, granularity: u64) -> Vec<Range<u64>> {
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

/// How many marks there are below the last one.
fn below_last(size: u64, granularity: u64) -> u64 {
    last(size, granularity).div_ceil(step(size, granularity))
}

/// From where on a disk that had `size` bytes may hold anything, if `count` dirty bytes are left of
/// its marks; and whether it was smaller for certain. A cut inside the last bit's part leaves all
/// marks: that part is never proved.
pub(crate) fn unproved_from(size: u64, granularity: u64, count: u64) -> (u64, bool) {
    let left = count / granularity.max(1);
    if left > below_last(size, granularity) {
        return (last(size, granularity), false);
    }
    (left.saturating_sub(1).saturating_mul(step(size, granularity)), true)
}

/// The watermark that a manifest says to be beside its bitmap, if it is on the disk and proves
/// anything.
pub(crate) fn of<'a>(info: &BitmapInfo, disk: &'a GuestDisk) -> Option<&'a Bitmap> {
    let mark = disk.bitmap(&names::watermark(&info.name)).filter(|_| info.watermark)?;
    proves(mark, info, disk).then_some(mark)
}

fn proves(mark: &Bitmap, info: &BitmapInfo, disk: &GuestDisk) -> bool {
    let cluster = if disk.identity.format == "qcow2" { disk.cluster_size } else { 0 };
    !mark.recording
        && !mark.inconsistent
        && mark.persistent == info.persistent
        && mark.granularity == info.granularity
        && info.granularity >= cluster
        && GRANULARITIES.contains(&info.granularity)
}

impl DiskPlan {
    /// The watermark beside what an INC or DIFF is made by.
    pub(in crate::backup) fn watermark(&self) -> Option<&Bitmap> {
        let (since, point) = (self.since.as_ref()?, self.parent()?);
        let most = below_last(point.virtual_size, since.granularity).saturating_add(1);
        let known = |m: &&Bitmap| m.count <= most.saturating_mul(since.granularity);
        of(since, &self.disk).filter(known)
    }

    /// Whether nothing but the whole disk's block status can tell if it was smaller.
    pub fn needs_walk(&self) -> bool {
        self.since.is_some() && self.watermark().is_none()
    }

    /// What may differ from the point below without a dirty bit, with `count` dirty bytes left of the
    /// watermark, and whether the disk was smaller for certain.
    pub(in crate::backup) fn cut(&self, count: u64) -> Option<(Range<u64>, bool)> {
        let (since, point) = (self.since.as_ref()?, self.parent()?);
        let (from, smaller) = unproved_from(point.virtual_size, since.granularity, count);
        (from < point.virtual_size).then_some((from..point.virtual_size, smaller))
    }

    /// What may have to be copied since the disk may have been smaller, as far as can be known before;
    /// `None` without a watermark.
    pub fn unproved(&self) -> Option<Range<u64>> {
        Some(self.cut(self.watermark()?.count)?.0)
    }

    /// What is compared with the chain where the disk was not seen to be smaller: the last granule, and
    /// the cluster of the old end. `None` without a watermark.
    pub fn tail(&self) -> Option<Range<u64>> {
        self.watermark()?;
        let (since, point) = (self.since.as_ref()?, self.parent()?);
        let begin = last(point.virtual_size, since.granularity);
        let end = match self.disk.identity.format.as_str() {
            "qcow2" => begin.saturating_add(since.granularity).min(self.disk.size),
            // All that it grew by is copied.
            _ => point.virtual_size.min(self.disk.size),
        };
        Some(begin..end)
    }

    /// Whether the new bitmap should get a watermark.
    pub fn wants_watermark(&self) -> bool {
        let fits = |b: &BitmapInfo| GRANULARITIES.contains(&b.granularity);
        self.new_bitmap.as_ref().is_some_and(fits)
    }

    /// Dirty bytes left of the watermark among these bitmaps; none if it is none any more.
    pub(in crate::backup) fn marks_left(&self, now: &[Bitmap]) -> u64 {
        let (Some(since), Some(known)) = (&self.since, self.watermark()) else { return 0 };
        let mark = now.iter().find(|b| b.name == known.name);
        let good = mark.filter(|m| proves(m, since, &self.disk) && m.count <= known.count);
        good.map_or(0, |m| m.count)
    }

    /// The name of the watermark below if all its marks are there and the new one would have the same.
    pub(in crate::backup) fn same_marks(&self) -> Option<&str> {
        let (since, point, new) = (self.since.as_ref()?, self.parent()?, self.new_bitmap.as_ref()?);
        let mark = self.watermark()?;
        let same = point.virtual_size == self.disk.size && since.granularity == new.granularity;
        let all = !unproved_from(self.disk.size, since.granularity, mark.count).1;
        mark.name.as_deref().filter(|_| same && all)
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
    fn what_was_cut_off_is_never_proved() {
        const G: u64 = 4096;
        for size in [512, G, G + 512, 5 * G, 256 * G, 256 * G + 1, 257 * G, 1000 * G + 7, 70000 * G]
        {
            let all = marks(size, G);
            assert!(all.len() as u64 <= MARKS + 1, "{size}: {}", all.len());
            assert_eq!(
                unproved_from(size, G, left(&all, G, size)),
                ((size - 1) / G * G, false),
                "{size}"
            );
            for cut in (0..size).step_by((size as usize / 999).max(1)) {
                let (from, smaller) = unproved_from(size, G, left(&all, G, cut));
                assert!(from <= cut / G * G, "{size} cut to {cut}: {from}");
                assert!(cut - from <= 2 * step(size, G), "{size} cut to {cut}: {from}");
                assert_eq!(smaller, cut <= (size - 1) / G * G, "{size} cut to {cut}");
            }
        }
        assert_eq!(unproved_from(0, G, 0), (0, true));
        assert_eq!(unproved_from(G, 0, 0), (0, true));
    }
}
