//! Just enough of an NBD client to ask a node for its block status and to write zeros to one.
//!
//! The protocol is the fixed newstyle handshake with structured replies and `base:allocation`,
//! as in the NBD project's proto.md. QMP itself has no command for block status.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::wire::{Address, shorten};
use crate::error::{Error, Kind, Result};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED: u32 = 8;
const OPT_META: u32 = 10;
const REP_ACK: u32 = 1;
const REP_ERROR: u32 = 1 << 31;
const CMD_DISCONNECT: u16 = 2;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;
/// A reply to anything we send is small; block status of 1 GiB in 64 KiB steps is 128 KiB.
const MAX_PAYLOAD: u32 = 32 << 20;
/// One request covers at most this much: lengths are 32 bits, and servers like alignment.
const CHUNK: u64 = 1 << 30;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(buf),
            Stream::Tcp(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection to one export.
pub struct Nbd {
    stream: Stream,
    size: u64,
    context: Option<u32>,
    handle: u64,
}

impl Nbd {
    /// Connects to `export`; with `status` its block status can be asked for.
    ///
    /// # Errors
    /// `Peer` if the server has no such export or speaks something else; `Timeout`, `Io`.
    pub fn connect(address: &Address, export: &str, status: bool, wait: Duration) -> Result<Self> {
        let stream = open(address, wait).map_err(|e| failed(e, "cannot connect to QEMU's NBD"))?;
        let mut nbd = Nbd { stream, size: 0, context: None, handle: 0 };
        nbd.greet().map_err(|e| failed(e, "QEMU's NBD server does not greet"))?;
        if status {
            nbd.option(OPT_STRUCTURED, &[], |_, _| Ok(()))?;
            nbd.context = Some(nbd.choose_context(export)?);
        }
        nbd.size = nbd.go(export)?;
        Ok(nbd)
    }

    /// Whether an NBD server listens there.
    pub fn greets(address: &Address, wait: Duration) -> bool {
        let Ok(stream) = open(address, wait) else { return false };
        Nbd { stream, size: 0, context: None, handle: 0 }.greet().is_ok()
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut head = [0u8; 18];
        self.stream.read_exact(&mut head)?;
        if head.get(..16) != Some(b"NBDMAGICIHAVEOPT".as_slice()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no NBD greeting"));
        }
        // Fixed newstyle, no zeroes.
        self.stream.write_all(&3u32.to_be_bytes())
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        mut on_info: impl FnMut(u32, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut request = OPTION_MAGIC.to_be_bytes().to_vec();
        request.extend_from_slice(&option.to_be_bytes());
        request.extend_from_slice(&len32(data)?.to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request).map_err(|e| failed(e, "asking the NBD server"))?;
        loop {
            let magic = self.u64()?;
            let _option = self.u32()?;
            let kind = self.u32()?;
            let len = self.u32()?;
            let payload = self.bytes(len)?;
            if magic != OPTION_REPLY {
                return Err(protocol("a bad option reply"));
            }
            if kind == REP_ACK {
                return Ok(());
            }
            if kind & REP_ERROR != 0 {
                let text = String::from_utf8_lossy(&payload).into_owned();
                return Err(protocol(&format!("the server refused option {option}: {text}")));
            }
            on_info(kind, &payload)?;
        }
    }

    fn choose_context(&mut self, export: &str) -> Result<u32> {
        let name = b"base:allocation";
        let mut data = len32(export.as_bytes())?.to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&1u32.to_be_bytes());
        data.extend_from_slice(&len32(name)?.to_be_bytes());
        data.extend_from_slice(name);
        let mut id = None;
        self.option(OPT_META, &data, |_, p| {
            id = be32(p, 0);
            Ok(())
        })?;
        id.ok_or_else(|| protocol("the server knows no base:allocation"))
    }

    fn go(&mut self, export: &str) -> Result<u64> {
        let mut data = len32(export.as_bytes())?.to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&0u16.to_be_bytes());
        let mut size = None;
        self.option(OPT_GO, &data, |_, p| {
            // NBD_INFO_EXPORT is type 0: size, then flags.
            if p.get(..2) == Some([0, 0].as_slice()) {
                size = be64(p, 2);
            }
            Ok(())
        })?;
        size.ok_or_else(|| protocol("the server did not tell the size"))
    }

    fn request(&mut self, command: u16, offset: u64, len: u64) -> Result<u64> {
        self.handle = self.handle.wrapping_add(1);
        let len = u32::try_from(len).map_err(|_| protocol("a request over 4 GiB"))?;
        let mut r = REQUEST.to_be_bytes().to_vec();
        r.extend_from_slice(&0u16.to_be_bytes());
        r.extend_from_slice(&command.to_be_bytes());
        r.extend_from_slice(&self.handle.to_be_bytes());
        r.extend_from_slice(&offset.to_be_bytes());
        r.extend_from_slice(&len.to_be_bytes());
        self.stream.write_all(&r).map_err(|e| failed(e, "asking the NBD server"))?;
        Ok(self.handle)
    }

    /// Reads replies until the one that ends the request; payloads of block status go to `sink`.
    fn replies(&mut self, mut sink: impl FnMut(&[u8])) -> Result<()> {
        loop {
            let magic = self.u32()?;
            if magic == SIMPLE_REPLY {
                let error = self.u32()?;
                self.u64()?;
                return if error == 0 { Ok(()) } else { Err(server_error(error)) };
            }
            if magic != STRUCTURED_REPLY {
                return Err(protocol("a bad reply"));
            }
            let (flags, kind) = (self.u16()?, self.u16()?);
            self.u64()?;
            let len = self.u32()?;
            let payload = self.bytes(len)?;
            if kind & 0x8000 != 0 {
                return Err(server_error(be32(&payload, 0).unwrap_or(5)));
            }
            if kind == 5 {
                sink(&payload);
            }
            if flags & 1 != 0 {
                return Ok(());
            }
        }
    }

    /// The ranges of the export that read as zeros by its own account, ascending and coalesced.
    ///
    /// # Errors
    /// `Peer` or `Io`.
    pub fn zero_ranges(&mut self) -> Result<Vec<Range<u64>>> {
        let context = self.context.ok_or_else(|| protocol("block status was not negotiated"))?;
        let mut zeros: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < self.size {
            let start = at;
            self.request(CMD_BLOCK_STATUS, at, CHUNK.min(self.size - at))?;
            let (size, mut next) = (self.size, at);
            self.replies(|payload| {
                if be32(payload, 0) == Some(context) {
                    next = collect(payload.get(4..).unwrap_or_default(), next, size, &mut zeros);
                }
            })?;
            at = next;
            if at == start {
                return Err(protocol("a block status without extents"));
            }
        }
        Ok(zeros)
    }

    /// Writes zeros to `range`.
    ///
    /// # Errors
    /// `Peer` or `Io`.
    pub fn write_zeroes(&mut self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(CHUNK);
            self.request(CMD_WRITE_ZEROES, at, len)?;
            self.replies(|_| ())?;
            at += len;
        }
        Ok(())
    }

    fn bytes(&mut self, len: u32) -> Result<Vec<u8>> {
        if len > MAX_PAYLOAD {
            return Err(protocol("a reply that is too long"));
        }
        let mut buf = vec![0; len as usize];
        self.stream.read_exact(&mut buf).map_err(|e| failed(e, "reading from the NBD server"))?;
        Ok(buf)
    }

    fn u16(&mut self) -> Result<u16> {
        let b = self.bytes(2)?;
        b.try_into().map(u16::from_be_bytes).map_err(|_| protocol("short"))
    }

    fn u32(&mut self) -> Result<u32> {
        be32(&self.bytes(4)?, 0).ok_or_else(|| protocol("short"))
    }

    fn u64(&mut self) -> Result<u64> {
        be64(&self.bytes(8)?, 0).ok_or_else(|| protocol("short"))
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // Politeness only: the server copes with a closed connection.
        let _ = self.request(CMD_DISCONNECT, 0, 0);
    }
}

/// Adds the zero extents of one block status payload; gives the offset after the last extent.
fn collect(mut extents: &[u8], mut at: u64, size: u64, zeros: &mut Vec<Range<u64>>) -> u64 {
    while let (Some(len), Some(flags)) = (be32(extents, 0), be32(extents, 4)) {
        let end = at.saturating_add(u64::from(len)).min(size);
        if flags & 2 != 0 && end > at {
            match zeros.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => zeros.push(at..end),
            }
        }
        at = end;
        extents = extents.get(8..).unwrap_or_default();
    }
    at
}

fn open(address: &Address, wait: Duration) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => {
            let (short, _dir) = shorten(path).map_err(io::Error::other)?;
            let s = UnixStream::connect(short)?;
            s.set_read_timeout(Some(wait))?;
            s.set_write_timeout(Some(wait))?;
            Ok(Stream::Unix(s))
        }
        Address::Tcp(a) => {
            let s = TcpStream::connect(a)?;
            s.set_read_timeout(Some(wait))?;
            s.set_write_timeout(Some(wait))?;
            s.set_nodelay(true)?;
            Ok(Stream::Tcp(s))
        }
    }
}

fn be32(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn be64(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(b.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn len32(data: &[u8]) -> Result<u32> {
    u32::try_from(data.len()).map_err(|_| protocol("a name that is too long"))
}

fn protocol(what: &str) -> Error {
    Error::new(Kind::Peer, format!("NBD: {what}"))
}

fn server_error(errno: u32) -> Error {
    let e = io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(libc::EIO));
    Error::new(Kind::Peer, "the frozen view cannot be read").with_source(e)
}

fn failed(e: io::Error, what: &str) -> Error {
    match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Error::new(Kind::Timeout, "QEMU's NBD server does not answer").with_source(e)
        }
        _ => Error::new(Kind::Peer, what).with_source(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_extents_are_coalesced_and_clipped() {
        let mut p = Vec::new();
        for (len, flags) in [(10u32, 3u32), (5, 2), (5, 0), (100, 2)] {
            p.extend_from_slice(&len.to_be_bytes());
            p.extend_from_slice(&flags.to_be_bytes());
        }
        let mut zeros = Vec::new();
        assert_eq!(collect(&p, 0, 50, &mut zeros), 50);
        assert_eq!(zeros, vec![0..15, 20..50]);
    }
}
