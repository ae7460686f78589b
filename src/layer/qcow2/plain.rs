//! Where an image has the clusters that hold a guest's bytes as they are.

use super::header::Header;
use super::table::Tables;
use crate::error::{Error, Kind, Result};
use crate::layer::Mapping;
use crate::storage::ReadAt;

/// One whole cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// One past its last guest byte.
    pub guest_end: u64,
    /// Offset in the file.
    pub host: u64,
    /// Bytes.
    pub len: u64,
}

/// Calls `f` for each cluster of the active state that is plain data as a whole, in the guest's
/// order, and `check` before each table.
///
/// # Errors
/// Something cannot be read or is damaged, is compressed or is in another file; the first error of `f`
/// and of `check`.
pub(crate) fn clusters(
    image: &dyn ReadAt,
    check: &dyn Fn() -> Result<()>,
    mut f: impl FnMut(Cluster) -> Result<()>,
) -> Result<()> {
    let header = Header::read(image)?;
    if header.has_data_file() || header.is_marked_corrupt() {
        return Err(odd(image));
    }
    let (l1, size, span) = (header.l1, header.size, header.l2_span());
    let tables = Tables {
        header: &header,
        l1,
        size,
        image,
        data: image,
        data_ix: 0,
        look_for_holes: false,
        twice: None,
    };
    let mut at = tables.next_mapped(0);
    while at < size {
        check()?;
        let end = (at / span + 1).saturating_mul(span).min(size);
        for e in tables.map(at..end).extents.as_slice() {
            match e.content {
                Mapping::Data { host, .. } => {
                    whole(e.start, host, e.len, header.cluster_size()).try_for_each(&mut f)?;
                }
                Mapping::Below | Mapping::Zero => {}
                Mapping::Compressed { .. } | Mapping::Bad => return Err(odd(image)),
            }
        }
        at = tables.next_mapped(end);
    }
    Ok(())
}

/// The whole clusters in a stretch: of one with subclusters it may have a part, of the disk's last
/// one too.
fn whole(guest: u64, host: u64, len: u64, cluster: u64) -> impl Iterator<Item = Cluster> {
    let skip = host.next_multiple_of(cluster) - host;
    let count = len.saturating_sub(skip) / cluster;
    (0..count).map(move |i| {
        let at = skip + i * cluster;
        Cluster { guest_end: guest + at + cluster, host: host + at, len: cluster }
    })
}

fn odd(image: &dyn ReadAt) -> Error {
    Error::new(Kind::Unsupported, "the image has more than plain clusters").at_path(image.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    const C: u64 = 65536;

    /// An image of four clusters and a half, whose L2 entries are `entries`; the file has 12 clusters.
    fn image(entries: &[u64]) -> MemStorage {
        let mut bytes = vec![0; 12 * C as usize];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(4 * C + C / 2).to_be_bytes());
        bytes[39] = 1;
        bytes[40..48].copy_from_slice(&(3 * C).to_be_bytes());
        bytes[48..56].copy_from_slice(&C.to_be_bytes());
        bytes[59] = 1;
        bytes[99] = 4;
        bytes[103] = 104;
        let l1 = 3 * C as usize;
        bytes[l1..l1 + 8].copy_from_slice(&((1 << 63) | (4 * C)).to_be_bytes());
        for (i, e) in entries.iter().enumerate() {
            let at = 4 * C as usize + i * 8;
            bytes[at..at + 8].copy_from_slice(&e.to_be_bytes());
        }
        MemStorage::new("m", bytes)
    }

    fn found(entries: &[u64]) -> Result<Vec<(u64, u64)>> {
        let mut list = Vec::new();
        clusters(&image(entries), &|| Ok(()), |c| {
            assert_eq!(c.len, C);
            list.push((c.guest_end / C, c.host / C));
            Ok(())
        })?;
        Ok(list)
    }

    #[test]
    fn whole_plain_clusters_are_found() {
        let copied = 1 << 63;
        let list = [copied | (5 * C), 1, copied | (6 * C), copied | (7 * C), copied | (8 * C)];
        // The second reads as zeros, and of the last the disk has the half.
        assert_eq!(found(&list).unwrap(), [(1, 5), (3, 6), (4, 7)]);
        assert_eq!(found(&[]).unwrap(), []);
        // It has a place, and reads as zeros all the same.
        assert_eq!(found(&[copied | (5 * C) | 1]).unwrap(), []);
    }

    #[test]
    fn compressed_and_damaged_clusters_are_errors() {
        for entry in [(1 << 62) | (5 * C), (1 << 63) | (20 * C), (1 << 63) | (C / 2)] {
            assert!(found(&[(1 << 63) | (6 * C), entry]).is_err(), "{entry:x}");
        }
    }

    #[test]
    fn a_stretch_that_begins_inside_a_cluster_has_the_whole_ones() {
        let got: Vec<_> = whole(100 + C / 2, 5 * C + C / 2, 3 * C, C).collect();
        let cluster = |i: u64| Cluster { guest_end: 100 + (i + 1) * C, host: (5 + i) * C, len: C };
        assert_eq!(got, [cluster(1), cluster(2)]);
        assert_eq!(whole(0, C / 2, C, C).count(), 0);
    }
}
