//! The qcow2 header and its extensions, versions 2 and 3.
//!
//! Field offsets, limits and feature bits follow `docs/interop/qcow2.rst` of QEMU. qcow2-rs's own
//! header parser is not used: it refuses every incompatible feature bit.

use std::path::Path;

use qcow2_rs::meta::Qcow2Header;

use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::storage::ReadAt;

/// Length of a version 2 header.
pub(super) const V2_HEADER_LEN: u32 = 72;
/// Length of a version 3 header without the compression type.
const V3_HEADER_LEN: u32 = 104;
/// Within these first bytes nearly every header ends, with its extensions and the backing file's name.
const USUAL_LEN: u64 = 4096;
/// QEMU refuses larger snapshot counts.
const MAX_SNAPSHOTS: u32 = 65536;
/// The spec's limit for a backing file name.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// QEMU's limit for the refcount table, in bytes.
const MAX_REFTABLE_BYTES: u64 = Qcow2Header::MAX_REFCOUNT_TABLE_SIZE as u64;

/// A disk is a whole number of these; QEMU ignores what a header says beyond.
const SECTOR: u64 = 512;

const INCOMPAT_DIRTY: u64 = 1 << 0;
const INCOMPAT_CORRUPT: u64 = 1 << 1;
const INCOMPAT_DATA_FILE: u64 = 1 << 2;
const INCOMPAT_COMPRESSION: u64 = 1 << 3;
const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
const INCOMPAT_KNOWN: u64 = 0x1f;

pub(super) const EXT_END: u32 = 0;
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_BITMAPS: u32 = 0x2385_2875;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// One zstd frame.
    Zstd,
}

/// A table in the file: where and how many entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableRef {
    /// Byte offset of the table.
    pub offset: u64,
    /// Number of 8-byte entries.
    pub entries: u32,
}

impl TableRef {
    /// Its length in bytes.
    pub fn byte_len(self) -> u64 {
        u64::from(self.entries) * 8
    }
}

/// A checked header.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is `1 << cluster_bits`, 9 to 21.
    pub cluster_bits: u32,
    /// Size in bytes of the virtual disk: whole sectors, as QEMU counts it.
    pub size: u64,
    /// The active L1 table.
    pub l1: TableRef,
    /// Refcount table: offset and number of clusters.
    pub reftable_offset: u64,
    /// See `reftable_offset`.
    pub reftable_clusters: u32,
    /// Refcounts are `1 << refcount_order` bits wide, 0 to 6.
    pub refcount_order: u32,
    /// Snapshot table: offset.
    pub snapshots_offset: u64,
    /// Snapshot table: number of snapshots.
    pub nb_snapshots: u32,
    /// Bit set as read.
    pub incompatible: u64,
    /// Bit set as read.
    pub autoclear: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The name of the backing file as it stands in the image.
    pub backing_file: Option<String>,
    /// Its format as it stands in the image.
    pub backing_format: Option<String>,
    /// The name of the external data file as it stands in the image.
    pub data_file: Option<String>,
    /// Where the bitmaps extension's data is: offset, number of bitmaps, directory size, directory
    /// offset (`None` without the extension).
    pub bitmaps: Option<BitmapsRef>,
}

/// The bitmaps header extension (0x23852875).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsRef {
    /// Number of bitmaps in the directory.
    pub count: u32,
    /// Length of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Offset of the bitmap directory.
    pub directory_offset: u64,
}

impl Header {
    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether the image has subclusters (extended L2 entries).
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Whether guest data is in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// Whether the image was not closed cleanly (refcounts may be stale; mappings are good).
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPAT_DIRTY != 0
    }

    /// Whether QEMU found the image's tables at odds with each other, and marked it so.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible & INCOMPAT_CORRUPT != 0
    }

    /// The mark of a corrupt image as an error.
    pub fn corrupt_mark(&self, path: &Path) -> Error {
        Error::new(
            Kind::Corrupt,
            "QEMU marked the image as corrupt: clusters in use twice are not read",
        )
        .at_path(path)
        .at_offset(72)
        .remedy("check a copy of it with 'qemu-img check'")
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_span(&self) -> u64 {
        let entry_bits = if self.extended_l2() { 4 } else { 3 };
        1 << (2 * self.cluster_bits - entry_bits)
    }

    /// Number of L1 entries that `size` bytes need.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Reads and checks the header of `storage`.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Unsupported` or `Encrypted` with the offset of the field that is
    /// to blame; `Io` if reading failed.
    pub fn read(storage: &dyn ReadAt) -> Result<Header> {
        let mut buf = read_start(storage, USUAL_LEN)?;
        let fields = Fields { buf: &buf, path: storage.name() };
        check_version(&fields)?;
        let cluster_bits = fields.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(fields.corrupt(20, format!("cluster_bits is {cluster_bits}, not 9 to 21")));
        }
        // A list of ten thousand images need not read ten thousand clusters.
        let cluster = 1 << cluster_bits;
        if cluster < USUAL_LEN || !fields.are_all_here(cluster) {
            buf = read_start(storage, cluster)?;
        }
        let fields = Fields { buf: &buf, path: storage.name() };
        let mut header = parse_fixed(&fields, cluster_bits)?;
        fields.check_features(&header)?;
        parse_names(&fields, &mut header)?;
        check_tables(&fields, &header, storage.len())?;
        Ok(header)
    }

    /// Oddities that do not stop reading.
    pub fn oddities(&self, path: &Path) -> Vec<Finding> {
        let mut found = Vec::new();
        if self.is_dirty() {
            let text = "the image was not closed cleanly (dirty flag): its refcounts may be \
                        stale, its data is not affected";
            found.push(Finding::warning(Kind::Corrupt, path, text));
        }
        if self.is_marked_corrupt() {
            let finding = Finding::from_error(&self.corrupt_mark(path), path);
            found.push(Finding { severity: Severity::Warning, ..finding });
        }
        found
    }
}

fn read_start(storage: &dyn ReadAt, want: u64) -> Result<Vec<u8>> {
    let len = want.min(storage.len());
    let mut buf = vec![0; len as usize];
    storage.read_exact_at(&mut buf, 0)?;
    Ok(buf)
}

/// Big-endian fields of the first cluster, with errors that name file and offset.
struct Fields<'a> {
    buf: &'a [u8],
    path: &'a Path,
}

impl Fields<'_> {
    fn bytes(&self, offset: u64, len: u64) -> Result<&[u8]> {
        let end = offset.checked_add(len).filter(|e| *e <= self.buf.len() as u64);
        match end {
            Some(end) => Ok(&self.buf[offset as usize..end as usize]),
            None => Err(Error::new(Kind::Truncated, "the qcow2 header is cut off")
                .at_path(self.path)
                .at_offset(offset)),
        }
    }

    fn u32(&self, offset: u64) -> Result<u32> {
        Ok(be32(self.bytes(offset, 4)?))
    }

    fn u64(&self, offset: u64) -> Result<u64> {
        Ok(be64(self.bytes(offset, 8)?))
    }

    /// Whether the backing file's name and all extensions are in the bytes that were read, of a first
    /// cluster of `cluster` bytes. Says no where anything is odd.
    fn are_all_here(&self, cluster: u64) -> bool {
        self.end_of_extensions(cluster).is_ok()
    }

    fn end_of_extensions(&self, cluster: u64) -> Result<u64> {
        let (name, len) = (self.u64(8)?, self.u32(16)?);
        let end = if name == 0 { cluster } else { name };
        if name != 0 {
            self.bytes(name, u64::from(len))?;
        }
        let is_v3 = self.u32(4)? == 3;
        let mut at = u64::from(if is_v3 { self.u32(100)? } else { V2_HEADER_LEN });
        while at + 8 <= end {
            let (kind, len) = (self.u32(at)?, u64::from(self.u32(at + 4)?));
            if kind == EXT_END {
                break;
            }
            self.bytes(at + 8, len)?;
            at += 8 + len.next_multiple_of(8);
        }
        Ok(at)
    }

    fn error(&self, kind: Kind, offset: u64, what: impl Into<String>) -> Error {
        Error::new(kind, what).at_path(self.path).at_offset(offset)
    }

    fn corrupt(&self, offset: u64, what: impl Into<String>) -> Error {
        self.error(Kind::Corrupt, offset, what)
            .remedy("restore this file from another copy of the backup")
    }

    fn text(&self, offset: u64, len: u64) -> Result<String> {
        // A name that is not UTF-8 cannot be one of ours; it stays recognisable in messages.
        Ok(String::from_utf8_lossy(self.bytes(offset, len)?).into_owned())
    }

    fn check_features(&self, h: &Header) -> Result<()> {
        let unknown = h.incompatible & !INCOMPAT_KNOWN;
        if unknown != 0 {
            let what = format!("unknown incompatible feature bits {unknown:#x}");
            let remedy = "the image was made by a newer QEMU; use a newer fleecefs";
            return Err(self.error(Kind::Unsupported, 72, what).remedy(remedy));
        }
        let bit = h.incompatible & INCOMPAT_COMPRESSION != 0;
        if bit != (h.compression != Compression::Zlib) {
            return Err(self.corrupt(104, "compression type and its feature bit disagree"));
        }
        if h.extended_l2() && h.cluster_bits < 14 {
            return Err(self.corrupt(72, "extended L2 entries need clusters of 16 KiB or more"));
        }
        Ok(())
    }
}

/// Whether everything but the magic looks like a header: version, cluster size, and two tables at
/// cluster borders.
pub(super) fn looks_like_one(start: &[u8; 104]) -> bool {
    let (version, bits) = (be32(&start[4..8]), be32(&start[20..24]));
    if !matches!(version, 2 | 3) || !(9..=21).contains(&bits) {
        return false;
    }
    let (l1, refcounts) = (be64(&start[40..48]), be64(&start[48..56]));
    let is_place = |offset: u64| offset != 0 && offset & ((1 << bits) - 1) == 0;
    let length = be32(&start[100..104]);
    let fits = version == 2 || (length.is_multiple_of(8) && length >= V3_HEADER_LEN);
    is_place(l1) && is_place(refcounts) && fits
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes(b.try_into().expect("four bytes"))
}

fn be64(b: &[u8]) -> u64 {
    u64::from_be_bytes(b.try_into().expect("eight bytes"))
}

/// Before anything else is looked at: what it means depends on it.
fn check_version(f: &Fields) -> Result<()> {
    let (what, remedy) = match f.u32(4)? {
        2 | 3 => return Ok(()),
        1 => (
            "a qcow image of version 1: not supported".to_string(),
            "convert it with 'qemu-img convert -O qcow2'",
        ),
        other => (
            format!("qcow2 version {other} is not known"),
            "the image was made by a newer QEMU; use a newer fleecefs, or restore it from another \
             copy if it is damaged",
        ),
    };
    Err(f.error(Kind::Unsupported, 4, what).remedy(remedy))
}

fn parse_fixed(f: &Fields, cluster_bits: u32) -> Result<Header> {
    let version = f.u32(4)?;
    match f.u32(32)? {
        0 => {}
        1 | 2 => return Err(encrypted(f)),
        other => return Err(f.error(Kind::Unsupported, 32, format!("encryption method {other}"))),
    }
    let v3 = version == 3;
    let header_length = if v3 { f.u32(100)? } else { V2_HEADER_LEN };
    if v3 && !(V3_HEADER_LEN..=1 << cluster_bits).contains(&header_length) {
        return Err(f.corrupt(100, format!("header length {header_length} is invalid")));
    }
    let compression = if v3 && header_length > V3_HEADER_LEN { f.bytes(104, 1)?[0] } else { 0 };
    let compression = match compression {
        0 => Compression::Zlib,
        1 => Compression::Zstd,
        n => return Err(f.error(Kind::Unsupported, 104, format!("unknown compression type {n}"))),
    };
    Ok(Header {
        version,
        cluster_bits,
        size: f.u64(24)? & !(SECTOR - 1),
        l1: TableRef { offset: f.u64(40)?, entries: f.u32(36)? },
        reftable_offset: f.u64(48)?,
        reftable_clusters: f.u32(56)?,
        refcount_order: if v3 { f.u32(96)? } else { 4 },
        nb_snapshots: f.u32(60)?,
        snapshots_offset: f.u64(64)?,
        incompatible: if v3 { f.u64(72)? } else { 0 },
        autoclear: if v3 { f.u64(88)? } else { 0 },
        compression,
        backing_file: None,
        backing_format: None,
        data_file: None,
        bitmaps: None,
    })
}

fn encrypted(f: &Fields) -> Error {
    f.error(Kind::Encrypted, 32, "the image is encrypted")
        .remedy("decrypt it with 'qemu-img convert' into a new image first")
}

fn parse_names(f: &Fields, h: &mut Header) -> Result<()> {
    let (offset, len) = (f.u64(8)?, f.u32(16)?);
    let mut end = h.cluster_size();
    if offset != 0 {
        let room = h.cluster_size().saturating_sub(offset);
        if len > MAX_BACKING_NAME || u64::from(len) > room {
            return Err(f.corrupt(8, "the backing file name is too long or outside the header"));
        }
        h.backing_file = (len > 0).then(|| f.text(offset, u64::from(len))).transpose()?;
        end = offset;
    }
    let start = if h.version == 3 { f.u32(100)? } else { V2_HEADER_LEN };
    parse_extensions(f, h, u64::from(start), end)
}

fn parse_extensions(f: &Fields, h: &mut Header, start: u64, end: u64) -> Result<()> {
    // An image may be shorter than its first cluster; what is not there has no extension.
    let end = end.min(f.buf.len() as u64);
    let mut at = start;
    while at + 8 <= end {
        let (kind, len) = (f.u32(at)?, u64::from(f.u32(at + 4)?));
        if kind == EXT_END {
            return Ok(());
        }
        let data = at + 8;
        if len > end - data {
            return Err(f.corrupt(at, format!("header extension {kind:#x} is too long")));
        }
        parse_extension(f, h, kind, data, len)?;
        at = data + len.next_multiple_of(8);
    }
    Ok(())
}

fn parse_extension(f: &Fields, h: &mut Header, kind: u32, data: u64, len: u64) -> Result<()> {
    match kind {
        EXT_BACKING_FORMAT => h.backing_format = Some(f.text(data, len)?),
        EXT_DATA_FILE => h.data_file = Some(f.text(data, len)?),
        EXT_CRYPTO => return Err(encrypted(f)),
        // Only meaningful while autoclear bit 0 stands: otherwise a program that does not know
        // bitmaps has written to the image since.
        EXT_BITMAPS if len >= 24 && h.autoclear & 1 != 0 => {
            h.bitmaps = Some(BitmapsRef {
                count: f.u32(data)?,
                directory_size: f.u64(data + 8)?,
                directory_offset: f.u64(data + 16)?,
            });
        }
        // Feature names and everything unknown: optional by the spec.
        _ => {}
    }
    Ok(())
}

fn check_tables(f: &Fields, h: &Header, file_len: u64) -> Result<()> {
    let mask = h.cluster_size() - 1;
    if h.refcount_order > 6 {
        return Err(f.corrupt(96, format!("refcount order {} is invalid", h.refcount_order)));
    }
    let reftable_bytes = u64::from(h.reftable_clusters) << h.cluster_bits;
    if reftable_bytes > MAX_REFTABLE_BYTES || h.reftable_offset & mask != 0 {
        return Err(f.corrupt(48, "the refcount table is too large or not aligned"));
    }
    if h.nb_snapshots > MAX_SNAPSHOTS || (h.nb_snapshots > 0 && h.snapshots_offset & mask != 0) {
        return Err(f.corrupt(60, "the snapshot table is too large or not aligned"));
    }
    check_l1(f, h, h.l1, h.size, file_len, 36)
}

/// Checks that an L1 table is large enough for `size`, aligned, and inside the file.
fn check_l1(f: &Fields, h: &Header, l1: TableRef, size: u64, len: u64, field: u64) -> Result<()> {
    if l1.byte_len() > u64::from(Qcow2Header::MAX_L1_SIZE) {
        return Err(f.corrupt(field, format!("an L1 table of {} entries is too large", l1.entries)));
    }
    if size > i64::MAX as u64 || h.l1_entries_for(size) > u64::from(l1.entries) {
        let what = format!("the L1 table has {} entries, too few for {size} bytes", l1.entries);
        return Err(f.corrupt(field, what));
    }
    if l1.offset & (h.cluster_size() - 1) != 0 {
        return Err(f.corrupt(40, format!("the L1 table's offset {:#x} is not aligned", l1.offset)));
    }
    let needed = h.l1_entries_for(size) * 8;
    if l1.offset.checked_add(needed).is_none_or(|end| end > len) {
        return Err(Error::new(Kind::Truncated, "the file ends inside its L1 table")
            .at_path(f.path)
            .at_offset(l1.offset)
            .remedy("restore this file from another copy of the backup"));
    }
    Ok(())
}

/// Checks a snapshot's L1 table as the active one is checked.
pub(super) fn check_snapshot_l1(
    storage: &dyn ReadAt,
    h: &Header,
    l1: TableRef,
    size: u64,
) -> Result<()> {
    let fields = Fields { buf: &[], path: storage.name() };
    check_l1(&fields, h, l1, size, storage.len(), l1.offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    /// 64 KiB clusters; `extension` bytes of unknown kind, then the backing file's format, then its
    /// name `distance` bytes behind.
    fn header(extension: usize, distance: usize) -> Vec<u8> {
        let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
        bytes.resize(104, 0);
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
        bytes[36..40].copy_from_slice(&1u32.to_be_bytes());
        bytes[40..48].copy_from_slice(&65536u64.to_be_bytes());
        bytes[48..56].copy_from_slice(&131_072u64.to_be_bytes());
        bytes[56..60].copy_from_slice(&1u32.to_be_bytes());
        bytes[96..100].copy_from_slice(&4u32.to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        let mut extend = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if extension > 0 {
            extend(0x1234_5678, &vec![7; extension]);
        }
        extend(EXT_BACKING_FORMAT, b"qcow2");
        extend(EXT_END, b"");
        let name = bytes.len() + distance;
        bytes.resize(name, 0);
        bytes.extend(b"FULL");
        bytes[8..16].copy_from_slice(&(name as u64).to_be_bytes());
        bytes[16..20].copy_from_slice(&4u32.to_be_bytes());
        bytes.resize(4 * 65536, 0);
        bytes
    }

    #[test]
    fn what_lies_behind_the_first_bytes_of_a_header_is_read_too() {
        for (extension, distance) in [
            (0, 0),
            // The name begins, or ends, or all of it is behind; so do the extensions.
            (0, 3954),
            (0, 3956),
            (0, 5000),
            (3900, 0),
            (3960, 0),
            (9000, 0),
            (60_000, 1000),
        ] {
            let image = MemStorage::new("m", header(extension, distance));
            let header = Header::read(&image).unwrap();
            let names = (header.backing_file.as_deref(), header.backing_format.as_deref());
            assert_eq!(names, (Some("FULL"), Some("qcow2")), "{extension} {distance}");
        }
    }

    #[test]
    fn an_extension_that_is_too_long_is_told_by_its_place() {
        let mut bytes = header(100, 0);
        bytes[108..112].copy_from_slice(&70_000u32.to_be_bytes());
        let error = Header::read(&MemStorage::new("m", bytes)).unwrap_err();
        assert_eq!((error.kind(), error.offset()), (Kind::Corrupt, Some(104)));
    }
}
