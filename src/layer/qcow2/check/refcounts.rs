//! Refcounts against what the tables refer to.
//!
//! A cluster in use whose refcount is 0 would be overwritten by the next writer; it is also what a
//! pointer looks like that a flipped bit moved. Clusters counted and not used are leaks: harmless.

use std::collections::BTreeSet;

use super::findings::{ClusterUse, FindingList, REMEDY};
use crate::error::{Error, Finding, Kind, Severity};
use crate::layer::qcow2::header::Header;
use crate::storage::ReadAt;

/// Compares the refcount blocks at `blocks` with the clusters in use.
pub(super) fn check(
    image: &dyn ReadAt,
    header: &Header,
    used: &ClusterUse,
    blocks: &[u64],
) -> Vec<Finding> {
    let mut check = Check { image, header, used, out: FindingList::default() };
    let clusters = image.len().div_ceil(header.cluster_size());
    let per_block = (header.cluster_size() * 8) >> header.refcount_order;
    let mut buf = vec![0; header.cluster_size() as usize];
    // Only blocks that count something in use: a sparse file may be exabytes long.
    let sets = [&used.meta, &used.l2, &used.data, &used.packed];
    let ranges = sets.iter().flat_map(|s| s.ranges());
    let numbers = ranges.flat_map(|r| r.start / per_block..r.end.div_ceil(per_block));
    let numbers: BTreeSet<u64> = numbers.filter(|i| *i < clusters.div_ceil(per_block)).collect();
    for i in numbers {
        let block = usize::try_from(i).ok().and_then(|i| blocks.get(i)).copied().unwrap_or(0);
        if let Err(e) = check.load(block, &mut buf) {
            check.out.push(Finding::from_error(&e, image.name()));
            continue;
        }
        check.block(&buf, i * per_block..((i + 1) * per_block).min(clusters));
    }
    check.out.finish()
}

struct Check<'a> {
    image: &'a dyn ReadAt,
    header: &'a Header,
    used: &'a ClusterUse,
    out: FindingList,
}

impl Check<'_> {
    /// Reads one block; a missing one counts nothing, and so does what the file's end cuts off.
    fn load(&self, block: u64, buf: &mut [u8]) -> Result<(), Error> {
        buf.fill(0);
        if block == 0 {
            return Ok(());
        }
        let n = self.image.len().saturating_sub(block).min(buf.len() as u64) as usize;
        self.image.read_exact_at(&mut buf[..n], block)
    }

    fn block(&mut self, buf: &[u8], clusters: std::ops::Range<u64>) {
        // Fewer than 64 refcounts fit into the smallest blocks (512 bytes of 64 bits: exactly 64).
        for first in clusters.clone().step_by(64) {
            let used = self.used.word(first);
            if used == 0 {
                continue;
            }
            let once =
                if self.header.nb_snapshots == 0 { self.used.exclusive_word(first) } else { 0 };
            for bit in (0..64).filter(|b| used >> b & 1 != 0) {
                let cluster = first + bit;
                if cluster >= clusters.end {
                    break;
                }
                let count = refcount(buf, cluster - clusters.start, self.header.refcount_order);
                self.compare(cluster, count, once >> bit & 1 != 0);
            }
        }
    }

    fn compare(&mut self, cluster: u64, count: u64, once: bool) {
        let (severity, what) = match count {
            0 => (
                Severity::Error,
                "a cluster in use is counted as free: a table or a refcount \
                                    block is damaged",
            ),
            n if once && n != 1 => {
                (Severity::Warning, "a cluster is counted more often than it is used")
            }
            _ => return,
        };
        let error = Error::new(Kind::Corrupt, what)
            .at_path(self.image.name())
            .at_offset(cluster << self.header.cluster_bits)
            .remedy(REMEDY);
        self.out.push(Finding { severity, ..Finding::from_error(&error, self.image.name()) });
    }
}

/// Refcount number `index` of a block; `order` is the width's logarithm. Less than a byte: the
/// lowest bits come first; more: big-endian.
fn refcount(buf: &[u8], index: u64, order: u32) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = buf.get((bit / 8) as usize).copied().unwrap_or(0);
        return u64::from(byte) >> (bit % 8) & ((1 << (1 << order)) - 1);
    }
    let width = 1 << (order - 3);
    let at = index as usize * width;
    buf.get(at..at + width).map_or(0, |b| b.iter().fold(0, |v, x| v << 8 | u64::from(*x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width() {
        let buf = [0b1010_0101, 0x12, 0x34, 0, 0, 0, 0, 7];
        assert_eq!((0..4).map(|i| refcount(&buf, i, 0)).collect::<Vec<_>>(), [1, 0, 1, 0]);
        assert_eq!(refcount(&buf, 1, 1), 1);
        assert_eq!(refcount(&buf, 1, 2), 0xa);
        assert_eq!(refcount(&buf, 1, 3), 0x12);
        assert_eq!(refcount(&buf, 1, 4), 0x3400);
        assert_eq!(refcount(&buf, 0, 6), 0xa512_3400_0000_0007);
        assert_eq!(refcount(&buf, 9, 6), 0);
    }
}
