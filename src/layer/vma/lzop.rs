//! The container of `lzop`: independent blocks of LZO1X data with checksums.

use std::io::{self, Read};

use super::lzo1x;

/// The nine bytes that begin every lzop file.
pub(super) const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";
/// lzop writes blocks of 256 KiB; nothing larger than this is taken from a file.
const MAX_BLOCK: usize = 64 << 20;
/// lzop itself never writes an extra field; no more than this is read into memory.
const MAX_EXTRA: u32 = 64 << 10;

const ADLER32_PLAIN: u32 = 1;
const ADLER32_PACKED: u32 = 2;
const EXTRA_FIELD: u32 = 0x40;
const CRC32_PLAIN: u32 = 0x100;
const CRC32_PACKED: u32 = 0x200;
const MULTIPART: u32 = 0x400;
const FILTER: u32 = 0x800;
const HEADER_CRC32: u32 = 0x1000;

/// Decompresses an lzop file.
pub(super) struct LzopReader<R> {
    from: R,
    flags: u32,
    packed: Vec<u8>,
    block: Vec<u8>,
    given: usize,
    ended: bool,
}

impl<R: Read> LzopReader<R> {
    /// Reads the header of `from`.
    ///
    /// # Errors
    /// The header is damaged or cut, or asks for something that is not known.
    pub(super) fn new(mut from: R) -> io::Result<Self> {
        let flags = read_header(&mut from)?;
        let (packed, block) = (Vec::new(), Vec::new());
        Ok(LzopReader { from, flags, packed, block, given: 0, ended: false })
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    fn sum_if(&mut self, flag: u32) -> io::Result<Option<u32>> {
        if self.has(flag) { be32(&mut self.from).map(Some) } else { Ok(None) }
    }

    /// Reads the next block into `self.block`.
    fn next_block(&mut self) -> io::Result<()> {
        self.block.clear();
        self.given = 0;
        let plain = be32(&mut self.from)? as usize;
        if plain == 0 {
            self.ended = true;
            // Archives are one member; anything behind it is not what vzdump wrote.
            let more = self.from.read(&mut [0])? != 0;
            return if more { Err(bad("bytes follow the end of the lzop file")) } else { Ok(()) };
        }
        let packed = be32(&mut self.from)? as usize;
        if plain > MAX_BLOCK || packed > plain || packed == 0 {
            return Err(bad("an lzop block has an invalid size"));
        }
        let plain_sums = [self.sum_if(ADLER32_PLAIN)?, self.sum_if(CRC32_PLAIN)?];
        let mut packed_sums = [None, None];
        if packed < plain {
            packed_sums = [self.sum_if(ADLER32_PACKED)?, self.sum_if(CRC32_PACKED)?];
        }
        self.packed.resize(packed, 0);
        self.from.read_exact(&mut self.packed)?;
        check_sums(packed_sums, &self.packed)?;
        self.block.resize(plain, 0);
        if packed == plain {
            self.block.copy_from_slice(&self.packed);
        } else {
            lzo1x::decompress(&self.packed, &mut self.block).map_err(bad)?;
        }
        check_sums(plain_sums, &self.block)
    }
}

impl<R: Read> Read for LzopReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.given == self.block.len() && !self.ended && !buf.is_empty() {
            self.next_block()?;
        }
        let n = (self.block.len() - self.given).min(buf.len());
        buf[..n].copy_from_slice(&self.block[self.given..self.given + n]);
        self.given += n;
        Ok(n)
    }
}

/// Reads and checks the file's header; returns its flags.
fn read_header(from: &mut impl Read) -> io::Result<u32> {
    let mut magic = [0; 9];
    from.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(bad("this is not an lzop file"));
    }
    let mut header = Vec::new();
    let mut take = |n: u64, header: &mut Vec<u8>| -> io::Result<usize> {
        let at = header.len();
        let got = from.by_ref().take(n).read_to_end(header)?;
        if got as u64 == n { Ok(at) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    };
    let at = take(2, &mut header)?;
    let version = u16::from_be_bytes([header[at], header[at + 1]]);
    // Versions before 0.940 have a shorter header and are from 1997.
    if version < 0x0940 {
        return Err(bad("this lzop file is of a version that is not known"));
    }
    // Library version, version needed, method, level, flags.
    let at = take(10, &mut header)?;
    if !(1..=3).contains(&header[at + 4]) {
        return Err(bad("this lzop file uses a method that is not known"));
    }
    let flags = super::header::array(&header, at + 6);
    let flags = u32::from_be_bytes(flags);
    if flags & (MULTIPART | FILTER) != 0 {
        return Err(bad("this lzop file uses a feature that is not known"));
    }
    // Mode, two words of time, and the file's name.
    let at = take(13, &mut header)?;
    let name = header[at + 12];
    take(u64::from(name), &mut header)?;
    check_header(from, flags, &header)?;
    if flags & EXTRA_FIELD != 0 {
        let len = be32(from)?;
        if len > MAX_EXTRA {
            return Err(bad("an lzop file's extra field is too long"));
        }
        let mut extra = len.to_be_bytes().to_vec();
        from.by_ref().take(u64::from(len)).read_to_end(&mut extra)?;
        check_header(from, flags, &extra)?;
    }
    Ok(flags)
}

fn check_header(from: &mut impl Read, flags: u32, bytes: &[u8]) -> io::Result<()> {
    let sum = Some(be32(from)?);
    check_sums(if flags & HEADER_CRC32 != 0 { [None, sum] } else { [sum, None] }, bytes)
}

fn be32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

/// Compares an Adler-32 and a CRC-32 sum, as far as they are there.
fn check_sums([adler, crc]: [Option<u32>; 2], bytes: &[u8]) -> io::Result<()> {
    let right =
        adler.is_none_or(|sum| sum == adler32(bytes)) && crc.is_none_or(|sum| sum == crc32(bytes));
    if right { Ok(()) } else { Err(bad("a checksum of the lzop file is wrong")) }
}

fn adler32(bytes: &[u8]) -> u32 {
    let (mut a, mut b) = (1u32, 0u32);
    // 5552 is the most that cannot overflow before the remainder is taken.
    for chunk in bytes.chunks(5552) {
        for byte in chunk {
            a += u32::from(*byte);
            b += a;
        }
        a %= 65521;
        b %= 65521;
    }
    b << 16 | a
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extra_field_is_not_read_into_memory_whatever_its_length() {
        let mut file = MAGIC.to_vec();
        // Version, library version, version needed, method, level, flags; mode, times, no name.
        let mut header = vec![0x10, 0x30, 0x20, 0x80, 0x09, 0x40, 1, 5];
        header.extend((EXTRA_FIELD | HEADER_CRC32).to_be_bytes());
        header.extend([0; 13]);
        file.extend(&header);
        file.extend(crc32(&header).to_be_bytes());
        for (len, ends) in [(64u32 << 10, "eof"), ((64 << 10) + 1, "long"), (u32::MAX, "long")] {
            let from = file.iter().copied().chain(len.to_be_bytes()).collect::<Vec<u8>>();
            let error = LzopReader::new(&from[..]).err().unwrap();
            assert_eq!(error.to_string().contains("too long"), ends == "long", "{error}");
        }
    }
}
