//! The header of a VMA archive: devices and configuration blobs.
//!
//! Format: `vma_spec.txt` of pve-qemu. All integers are big-endian but the length of a blob, which
//! is little-endian. Everything is covered by an MD5 sum, which is checked first.

use std::io::Read;

use md5::{Digest, Md5};

use crate::error::{Error, Kind, Result};

/// Guest bytes per cluster.
pub(super) const CLUSTER: u64 = 64 << 10;
/// Guest bytes per block: what a bit of a cluster's mask stands for.
pub(super) const BLOCK: u64 = 4096;

/// "VMA\0".
pub(super) const MAGIC: [u8; 4] = *b"VMA\0";
/// Length of the part of the header that every archive has.
pub(super) const FIXED: usize = 12288;
/// 256 names and blobs of each kind, 64 KiB each, stay below this.
const MAX_HEADER: u32 = 64 << 20;
/// Cluster numbers have 32 bits, clusters 64 KiB.
const MAX_DEVICE: u64 = 1 << 48;

/// A device of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number, 1 to 255.
    pub id: u8,
    /// Its name, such as `drive-scsi0`: one path component.
    pub name: String,
    /// Its size in bytes, more than 0. Of a RAM state it is an upper bound.
    pub size: u64,
}

impl Device {
    /// Whether this is the machine's RAM and device state, which is no disk.
    pub fn is_state(&self) -> bool {
        self.name == "vmstate"
    }

    /// How many 64 KiB clusters it has.
    pub fn clusters(&self) -> u64 {
        self.size.div_ceil(CLUSTER)
    }
}

/// The parsed header.
#[derive(Debug, Clone)]
pub struct Header {
    /// The archive's identity; every extent repeats it.
    pub uuid: [u8; 16],
    /// When it was made, in seconds since the epoch.
    pub time: i64,
    /// Length of the header in bytes: the first extent follows.
    pub len: u64,
    /// The devices, ascending by number.
    pub devices: Vec<Device>,
}

impl Header {
    /// Reads and checks the header at the beginning of `from`.
    ///
    /// # Errors
    /// `Corrupt`, `Truncated`, `Unsupported` (version) or `Io`; without the file's name.
    pub fn read(from: &mut dyn Read) -> Result<Header> {
        let mut bytes = vec![0; FIXED];
        fill(from, &mut bytes)?;
        if bytes[..4] != MAGIC {
            return Err(corrupt(0, "this is not a VMA archive: the magic bytes are wrong"));
        }
        let version = be32(&bytes, 4);
        if version != 1 {
            let what = format!("VMA version {version} is not known, only version 1");
            return Err(Error::new(Kind::Unsupported, what).at_offset(4));
        }
        let len = be32(&bytes, 56);
        if len as usize <= FIXED || !len.is_multiple_of(512) || len > MAX_HEADER {
            return Err(corrupt(56, format!("a header cannot be {len} bytes long")));
        }
        // Grow by what is really there: the length is not to be trusted yet.
        let rest = u64::from(len) - FIXED as u64;
        let got = from.take(rest).read_to_end(&mut bytes).map_err(reading)?;
        if (got as u64) < rest {
            return Err(cut(bytes.len() as u64, "the archive ends inside its header"));
        }
        check_sum(&mut bytes, 32, 0)?;
        Header::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Header> {
        let blobs = Blobs::locate(bytes)?;
        blobs.check_configs()?;
        let mut devices: Vec<Device> = Vec::new();
        // Number 0 is never used.
        for id in 1..=u8::MAX {
            if let Some(device) = blobs.device(id)? {
                if devices.iter().any(|d| d.name == device.name) {
                    let at = info_at(id) as u64;
                    return Err(corrupt(at, format!("two devices are named '{}'", device.name)));
                }
                devices.push(device);
            }
        }
        Ok(Header {
            uuid: array(bytes, 8),
            time: i64::from_be_bytes(array(bytes, 24)),
            len: bytes.len() as u64,
            devices,
        })
    }
}

/// The blob buffer of a header and those who point into it.
struct Blobs<'a> {
    header: &'a [u8],
    buffer: &'a [u8],
}

impl<'a> Blobs<'a> {
    fn locate(header: &'a [u8]) -> Result<Self> {
        let (offset, size) = (be32(header, 48) as usize, be32(header, 52) as usize);
        let buffer = offset
            .checked_add(size)
            .filter(|_| offset >= FIXED)
            .and_then(|end| header.get(offset..end))
            .ok_or_else(|| corrupt(48, format!("{size} bytes of names at {offset} do not fit")))?;
        Ok(Blobs { header, buffer })
    }

    /// The blob that a pointer names.
    fn get(&self, pointer: u32) -> Option<&'a [u8]> {
        let at = pointer as usize;
        let len = self.buffer.get(at..at.checked_add(2)?)?;
        let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
        self.buffer.get(at + 2..at + 2 + len)
    }

    /// A name: its NUL is inside its length.
    fn name(&self, pointer: u32) -> Option<&'a [u8]> {
        if pointer == 0 {
            return None;
        }
        self.get(pointer)?.split_last().and_then(|(nul, name)| (*nul == 0).then_some(name))
    }

    fn check_configs(&self) -> Result<()> {
        for i in 0..256 {
            let (name_at, data_at) = (2044 + i * 4, 3068 + i * 4);
            let (name, data) = (be32(self.header, name_at), be32(self.header, data_at));
            if name == 0 && data == 0 {
                continue;
            }
            if self.name(name).is_none() || data == 0 || self.get(data).is_none() {
                return Err(corrupt(name_at as u64, "a configuration has an invalid pointer"));
            }
        }
        Ok(())
    }

    /// The device with number `id`; without a size there is none.
    fn device(&self, id: u8) -> Result<Option<Device>> {
        let at = info_at(id);
        let size = u64::from_be_bytes(array(self.header, at + 8));
        if size == 0 {
            return Ok(None);
        }
        if size > MAX_DEVICE {
            return Err(corrupt(at as u64 + 8, format!("a device cannot have {size} bytes")));
        }
        let name = self.name(be32(self.header, at)).and_then(one_component);
        let name =
            name.ok_or_else(|| corrupt(at as u64, "a device's name cannot be a file name"))?;
        Ok(Some(Device { id, name, size }))
    }
}

/// A name that can be shown as a folder, or `None`.
fn one_component(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let fits = !name.is_empty() && name.len() <= 200 && name != "." && name != "..";
    (fits && !name.contains(|c: char| c == '/' || c.is_control())).then(|| name.to_owned())
}

fn info_at(id: u8) -> usize {
    4096 + usize::from(id) * 32
}

/// Checks the MD5 sum at `at` of a block that begins at `offset` of the archive; the sum counts as
/// zeros, and is overwritten with them.
pub(super) fn check_sum(block: &mut [u8], at: usize, offset: u64) -> Result<()> {
    let stored: [u8; 16] = array(block, at);
    block[at..at + 16].fill(0);
    if Md5::digest(&*block)[..] == stored {
        return Ok(());
    }
    Err(corrupt(offset + at as u64, "a header's MD5 sum is wrong"))
}

fn fill(from: &mut dyn Read, buf: &mut [u8]) -> Result<()> {
    from.read_exact(buf).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => cut(0, "the archive ends inside its header"),
        _ => reading(e),
    })
}

pub(super) fn reading(e: std::io::Error) -> Error {
    Error::io(e, "cannot read the archive")
}

/// Something contradicts the format at `at`.
pub(super) fn corrupt(at: u64, what: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, what)
        .at_offset(at)
        .remedy("restore this archive from another copy of the backup")
}

/// The archive ends too early.
pub(super) fn cut(at: u64, what: impl Into<String>) -> Error {
    Error::new(Kind::Truncated, what)
        .at_offset(at)
        .remedy("restore this archive from another copy of the backup")
}

/// `N` bytes at `at`, which the caller knows to be there.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}
