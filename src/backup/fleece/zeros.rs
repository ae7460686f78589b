//! What a bitmap cannot know: a disk that was shrunk and grown again between two points reads
//! zeros in the regrown part, and no bit is dirty there, while the chain still has the old bytes.
//!
//! Where there is no watermark (see `watermark`), the frozen view is asked which ranges are zeros, and
//! the chain which ranges hold data; the ranges that are both are copied as well. That walks over all
//! extents of the disk and of all layers: it costs what the disk holds, not what has changed. QMP can
//! set no bit in a bitmap, but a write can: the ranges are written to a scratch node (`null-co`, which
//! keeps nothing) whose bitmap records, and that bitmap is merged into the one that the job copies by.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::image::{Cache, Image, Source};
use crate::job::each::each;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::manifest::Manifest;
use crate::storage::SourceFile;

/// Bytes of merged windows that are kept while a chain is walked once.
const CACHE_BYTES: u64 = 16 << 20;

/// A chain opened for comparison with the frozen view.
pub(crate) struct ChainData {
    image: Arc<Image>,
    /// Where it holds data, if that was looked for.
    ranges: Option<Vec<Range<u64>>>,
    /// The bytes where its last point ended, as far as they are compared.
    tail: Vec<u8>,
}

impl ChainData {
    /// Opens the points of `chain` (root first): headers and first-level tables of all layers must be
    /// sound. (What those lead to is for `verify` to look at.) Reads the bytes of `tail` that are
    /// before the end; with `walk` finds where all data is.
    ///
    /// # Errors
    /// A layer cannot be read, or is bad where it was looked at: nothing may be built on such a chain.
    pub(crate) fn open(
        dir: &Path,
        chain: &[Manifest],
        tail: Option<Range<u64>>,
        walk: bool,
    ) -> Result<Self> {
        let size = chain.last().map_or(0, |m| m.virtual_size);
        let folder = Folder::open(dir)
            .map_err(|e| Error::io(e, "cannot open the folder of the chain").at_path(dir))?;
        let layer = |m: &Manifest| {
            let file = Arc::new(SourceFile::open_in(&folder, &m.image)?);
            Ok(LayerSpec { file, format: Format::Qcow2, part: LayerPart::Whole, data_file: None })
        };
        let layers = each(chain, layer).into_iter().collect::<Result<Vec<_>>>()?;
        let image = Image::new(size, &layers, None, &Cache::new(CACHE_BYTES))?;
        image.open_layers()?;
        let ranges = walk.then(|| data_ranges(&image).map_err(|e| e.at_path(dir))).transpose()?;
        let tail = tail.map_or(0..0, |t| t.start..t.end.min(size));
        let mut bytes = vec![0; tail.end.saturating_sub(tail.start) as usize];
        image.read_at(&mut bytes, tail.start.min(size))?;
        // Beside what was read, of what was looked at on the way.
        match image.findings().first() {
            Some(finding) => Err(finding.to_error()),
            None => Ok(ChainData { image, ranges, tail: bytes }),
        }
    }

    /// The bytes that were read when it was opened.
    pub(crate) fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Of the ranges that are zeros in the frozen view, those where the chain has something else. The
    /// ranges come one after the other (by [`LostZeros::add`]), since they may be very many.
    ///
    /// # Errors
    /// Nobody has looked where the chain holds data.
    pub(crate) fn lost(&self) -> Result<LostZeros<'_>> {
        let unknown = || Error::new(Kind::Io, "the chain was not walked");
        let ranges = self.ranges.as_deref().ok_or_else(unknown)?;
        Ok(LostZeros { chain: self, ranges, next: 0, found: Vec::new() })
    }
}

/// How many lost ranges are kept apart: each is a write to a scratch node. Beyond that neighbours
/// become one, and what is between them is copied for nothing.
const APART: usize = 1 << 20;

/// Bytes of the chain that are read at once, and compared at once: no bit of a bitmap stands for less.
const PIECE: u64 = 64 << 10;
const SECTOR: u64 = 512;

/// Looks for what was lost, in ascending order.
pub(crate) struct LostZeros<'a> {
    chain: &'a ChainData,
    ranges: &'a [Range<u64>],
    /// The first of the chain's ranges that does not end before what comes.
    next: usize,
    found: Vec<Range<u64>>,
}

impl LostZeros<'_> {
    /// Takes the next range of zeros.
    ///
    /// # Errors
    /// The chain cannot be read.
    pub(crate) fn add(&mut self, zeros: Range<u64>) -> Result<()> {
        while let Some(data) = self.ranges.get(self.next) {
            let both = zeros.start.max(data.start)..zeros.end.min(data.end);
            if both.start < both.end {
                self.judge(&both)?;
            }
            if data.end > zeros.end {
                break;
            }
            self.next = self.next.saturating_add(1);
        }
        Ok(())
    }

    /// Zeros may be in the chain as data: that is no loss, and copying them again at each INC would
    /// never end. So each sector is looked at for itself.
    fn judge(&mut self, r: &Range<u64>) -> Result<()> {
        let mut buf = vec![0u8; PIECE as usize];
        let mut at = r.start;
        while at < r.end {
            let end = r.end.min((at - at % PIECE).saturating_add(PIECE));
            let part = buf.get_mut(..(end - at) as usize).unwrap_or_default();
            self.chain.image.read_at(part, at)?;
            // The first may begin within a sector.
            let first = (SECTOR - at % SECTOR).min(end - at) as usize;
            let (head, rest) = part.split_at(first);
            for sector in std::iter::once(head).chain(rest.chunks(SECTOR as usize)) {
                let next = at.saturating_add(sector.len() as u64);
                if sector.iter().any(|b| *b != 0) {
                    push(&mut self.found, at..next);
                }
                at = next;
            }
        }
        Ok(())
    }

    /// What was lost.
    pub(crate) fn ranges(self) -> Vec<Range<u64>> {
        self.found
    }
}

/// Appends a range, as one with the last where they touch.
fn push(found: &mut Vec<Range<u64>>, r: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == r.start => last.end = r.end,
        _ => found.push(r),
    }
    if found.len() > APART {
        *found = join_pairs(found);
    }
}

/// What has to be copied for ranges that were lost: the cut may be in the unit before each, whose end
/// became zero too, as data.
pub(crate) fn with_cuts(lost: Vec<Range<u64>>) -> Vec<Range<u64>> {
    lost.into_iter().map(|r| r.start.saturating_sub(1)..r.end).collect()
}

/// Makes one range of each two neighbours.
fn join_pairs(list: &[Range<u64>]) -> Vec<Range<u64>> {
    let join = |pair: &[Range<u64>]| Some(pair.first()?.start..pair.last()?.end);
    list.chunks(2).filter_map(join).collect()
}

fn data_ranges(image: &Image) -> Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut bad = None;
    image.for_each_extent(0..image.size(), |e| {
        match e.content {
            Source::Bad { .. } => bad = Some(e.start),
            c if c.is_hole() => {}
            _ => match ranges.last_mut() {
                Some(last) if last.end == e.start => last.end = e.end(),
                _ => ranges.push(e.start..e.end()),
            },
        }
        bad.is_none()
    })?;
    match bad {
        Some(at) => Err(Error::new(Kind::Unsound, "the chain cannot be read").at_offset(at)),
        None => Ok(ranges),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain of one FULL with data in its first MiB and from 2 to 3 MiB.
    fn chain(dir: &Path) -> Option<ChainData> {
        let path = dir.join("FULL-1-d");
        let name = path.to_str()?;
        let run = |program: &str, args: &[&str]| {
            let out = std::process::Command::new(program).args(args).output();
            out.is_ok_and(|o| o.status.success())
        };
        let made = run("qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"])
            && run("qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -P 2 2M 1M", name]);
        let file = Arc::new(SourceFile::look(path).ok()?);
        let layers =
            [LayerSpec { file, format: Format::Qcow2, part: LayerPart::Whole, data_file: None }];
        let image = Image::new(4 << 20, &layers, None, &Cache::new(CACHE_BYTES)).ok()?;
        let ranges = Some(data_ranges(&image).ok()?);
        made.then_some(ChainData { image, ranges, tail: Vec::new() })
    }

    #[test]
    fn zeros_over_data_are_lost() {
        const M: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let Some(chain) = chain(dir.path()) else {
            assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
            return eprintln!("skipped: zeros_over_data_are_lost: no qemu-img");
        };
        assert_eq!(chain.ranges, Some(vec![0..M, 2 * M..3 * M]));
        let lost = |zeros: &[(u64, u64)]| {
            let mut l = chain.lost().unwrap();
            zeros.iter().try_for_each(|z| l.add(z.0..z.1)).unwrap();
            with_cuts(l.ranges())
        };
        assert_eq!(lost(&[(0, 4 * M)]), vec![0..M, 2 * M - 1..3 * M]);
        assert_eq!(lost(&[(512, 1024), (M / 2, 2 * M)]), vec![511..1024, M / 2 - 1..M]);
        assert_eq!(lost(&[(M, 2 * M), (3 * M, u64::MAX)]), vec![]);
        assert_eq!(lost(&[(0, 1), (2, 3), (4 * M - 1, 4 * M)]), vec![0..1, 1..3]);
    }

    #[test]
    fn zeros_over_zeros_that_are_stored_as_data_are_not_lost() {
        const M: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("FULL-1-d");
        let Some(before) = chain(dir.path()) else {
            assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
            return eprintln!(
                "skipped: zeros_over_zeros_that_are_stored_as_data_are_not_lost: no qemu-img"
            );
        };
        drop(before);
        let args = ["-c", "write -P 0 2M 1M", "-c", "write -P 0 512k 512", path.to_str().unwrap()];
        assert!(
            std::process::Command::new("qemu-io").args(args).output().unwrap().status.success()
        );
        let file = Arc::new(SourceFile::look(path).unwrap());
        let layers =
            [LayerSpec { file, format: Format::Qcow2, part: LayerPart::Whole, data_file: None }];
        let image = Image::new(4 * M, &layers, None, &Cache::new(CACHE_BYTES)).unwrap();
        let ranges = Some(data_ranges(&image).unwrap());
        let chain = ChainData { image, ranges, tail: Vec::new() };
        let mut lost = chain.lost().unwrap();
        lost.add(0..4 * M).unwrap();
        // Also where they are between what was lost.
        assert_eq!(lost.ranges(), vec![0..M / 2, M / 2 + 512..M]);
    }

    #[test]
    fn too_many_ranges_become_fewer_that_cover_them() {
        assert_eq!(join_pairs(&[0..1, 4..5, 6..7]), vec![0..5, 6..7]);
        assert!(join_pairs(&[]).is_empty());
    }

    #[test]
    fn the_list_of_what_is_lost_is_bounded() {
        let mut found = Vec::new();
        (0..APART as u64 + 2).for_each(|i| push(&mut found, 2 * i..2 * i + 1));
        assert!(found.len() <= APART);
        let whole = found.first().unwrap().start..found.last().unwrap().end;
        assert_eq!(whole, 0..2 * (APART as u64 + 1) + 1);
    }

    #[test]
    fn a_chain_that_cannot_be_read_proves_nothing() {
        const M: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        if chain(dir.path()).is_none() {
            assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
            return println!("skipped: a_chain_that_cannot_be_read_proves_nothing: no qemu-img");
        }
        let full = crate::manifest::tests::example("FULL-1-d", crate::layout::Level::Full, None);
        let full = [Manifest { virtual_size: 4 * M, ..full }];
        let path = dir.path().canonicalize().unwrap();
        // Up to the end of the disk at most.
        let open = |walk| ChainData::open(&path, &full, Some(3 * M - 512..9 * M), walk);
        let tail = open(false).unwrap().tail().to_vec();
        assert_eq!((tail.len() as u64, tail[511], tail[512]), (M + 512, 2, 0));
        // The first cluster is not where it should be: nothing that is asked for, but beside it.
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path.join("FULL-1-d"));
        let file = file.unwrap();
        let be64 = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        let l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
        file.write_all_at(&((1u64 << 63) | 0x7fff_0000).to_be_bytes(), l2).unwrap();
        for walk in [false, true] {
            assert!(open(walk).is_err(), "{walk}");
        }
    }
}
