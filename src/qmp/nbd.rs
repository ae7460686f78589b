//! Just enough of an NBD client to ask a node for its block status and to write zeros to one.
//!
//! The protocol is the fixed newstyle handshake with structured replies and `base:allocation`,
//! as in the NBD project's proto.md. QMP itself has no command for block status.
//!
//! The server is not trusted: each question has an instant at which its whole answer must be there,
//! all of an answer is bounded, and extents have to come closer to the end of the disk.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::address::Address;
use super::budget::short;
use super::socket::Socket;
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
const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;
/// A reply is small: QEMU gives at most 1 MiB of extents at once, and 4 KiB of text.
const MAX_PAYLOAD: u32 = (1 << 20) + 4096;
/// The most that is read at once.
const MAX_READ: u32 = 32 << 20;
/// One request covers at most this much: lengths are 32 bits, and servers like alignment.
const CHUNK: u64 = 1 << 30;
/// How many small requests are sent before the first answer is read: they and their answers fit into
/// the socket's buffers.
const AHEAD: usize = 64;

/// A connection to one export.
pub struct Nbd {
    socket: Socket,
    size: u64,
    context: Option<u32>,
    handle: u64,
    /// How long the server may take for an answer.
    wait: Duration,
    /// When the answer that is read now must be there.
    deadline: Instant,
}

impl Nbd {
    /// Connects to `export`; with `status` its block status can be asked for. No answer may take
    /// longer than `wait`.
    ///
    /// # Errors
    /// `Peer` if the server has no such export or speaks something else; `Timeout`, `Io`.
    pub fn connect(address: &Address, export: &str, status: bool, wait: Duration) -> Result<Self> {
        let mut nbd = Self::open(address, wait)?;
        nbd.greet()?;
        if status {
            nbd.option(OPT_STRUCTURED, &[], |_, _| Ok(()))?;
            nbd.context = Some(nbd.choose_context(export)?);
        }
        nbd.size = nbd.go(export)?;
        Ok(nbd)
    }

    /// Whether an NBD server listens there.
    pub fn greets(address: &Address, wait: Duration) -> bool {
        Self::open(address, wait).and_then(|mut n| n.greet()).is_ok()
    }

    fn open(address: &Address, wait: Duration) -> Result<Self> {
        let socket = Socket::connect(address, wait)
            .map_err(|e| failed(e, "cannot connect to QEMU's NBD server"))?;
        let deadline = Instant::now() + wait;
        Ok(Nbd { socket, size: 0, context: None, handle: 0, wait, deadline })
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next answer is another one, and has time of its own.
    fn renew(&mut self) {
        self.deadline = Instant::now() + self.wait;
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = self.socket.send(bytes, None, self.deadline);
        sent.map_err(|e| failed(e, "asking QEMU's NBD server"))
    }

    fn greet(&mut self) -> Result<()> {
        let mut head = [0u8; 18];
        self.fill(&mut head)?;
        if head.get(..16) != Some(b"NBDMAGICIHAVEOPT".as_slice()) {
            return Err(protocol("no greeting"));
        }
        // Fixed newstyle, no zeroes.
        self.send(&3u32.to_be_bytes())
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
        self.renew();
        self.send(&request)?;
        loop {
            let magic = self.u64()?;
            let _option = self.u32()?;
            let kind = self.u32()?;
            let len = self.u32()?;
            if magic != OPTION_REPLY {
                return Err(protocol("a bad option reply"));
            }
            let payload = self.payload(len)?;
            if kind == REP_ACK {
                return Ok(());
            }
            if kind & REP_ERROR != 0 {
                let text = short(&String::from_utf8_lossy(&payload));
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

    fn request(&mut self, command: u16, offset: u64, len: u64) -> Result<()> {
        let mut r = Vec::new();
        self.add_request(&mut r, command, offset, len)?;
        self.send(&r)
    }

    /// Adds a request to `bytes` that are to be sent.
    fn add_request(
        &mut self,
        bytes: &mut Vec<u8>,
        command: u16,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.handle = self.handle.wrapping_add(1);
        let len = u32::try_from(len).map_err(|_| protocol("a request over 4 GiB"))?;
        bytes.extend_from_slice(&REQUEST.to_be_bytes());
        bytes.extend_from_slice(&0u16.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.handle.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len.to_be_bytes());
        Ok(())
    }

    /// Reads replies until the one that ends the request; payloads of block status go to `sink`.
    fn replies(&mut self, mut sink: impl FnMut(&[u8])) -> Result<()> {
        loop {
            // Magic, error or flags and kind, handle.
            let head = self.bytes(16)?;
            let (magic, word) = (be32(&head, 0), be32(&head, 4).unwrap_or_default());
            match magic {
                Some(SIMPLE_REPLY) if word == 0 => return Ok(()),
                Some(SIMPLE_REPLY) => return Err(server_error(word)),
                Some(STRUCTURED_REPLY) => {}
                _ => return Err(protocol("a bad reply")),
            }
            let (flags, kind) = (word >> 16, word & 0xffff);
            let len = self.u32()?;
            let payload = self.payload(len)?;
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

    /// Gives the ranges of the export that read as zeros by its own account to `sink`, ascending
    /// and coalesced. They may be as many as the disk has sectors.
    ///
    /// # Errors
    /// `Peer` or `Io`; `Timeout` if it takes longer than the answer's time for a part of 1 GiB; or
    /// what `sink` says.
    pub fn zero_ranges(&mut self, mut sink: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let context = self.context.ok_or_else(|| protocol("block status was not negotiated"))?;
        let mut zeros = Zeros { at: 0, size: self.size, open: None, whole: Vec::new() };
        while zeros.at < self.size {
            // A part may take several questions, but no more time for that.
            let end = zeros.at.saturating_add(CHUNK).min(self.size);
            self.renew();
            while zeros.at < end {
                let start = zeros.at;
                self.request(CMD_BLOCK_STATUS, start, end - start)?;
                let mut result = Ok(());
                self.replies(|payload| {
                    if be32(payload, 0) == Some(context) && result.is_ok() {
                        result = zeros.take(payload.get(4..).unwrap_or_default());
                    }
                })?;
                result?;
                let began = Instant::now();
                zeros.whole.drain(..).try_for_each(&mut sink)?;
                // That was not the server's time.
                self.deadline += began.elapsed();
                if zeros.at == start {
                    return Err(protocol("a block status without extents"));
                }
            }
        }
        zeros.open.take().map_or(Ok(()), sink)
    }

    /// Reads `len` bytes, at most 32 MiB, in a connection without block status: a server may use
    /// that to leave holes out, and not every QEMU's can be trusted.
    ///
    /// # Errors
    /// `Peer` or `Io`.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.renew();
        self.request(CMD_READ, offset, u64::from(len))?;
        let magic = self.u32()?;
        let error = self.u32()?;
        self.u64()?;
        match (magic, error) {
            (SIMPLE_REPLY, 0) => self.bytes(len.min(MAX_READ)),
            (SIMPLE_REPLY, e) => Err(server_error(e)),
            _ => Err(protocol("a bad reply")),
        }
    }

    /// Writes zeros to `ranges`, in no order.
    ///
    /// # Errors
    /// `Peer` or `Io`.
    pub fn write_zeroes(&mut self, ranges: &[Range<u64>]) -> Result<()> {
        let starts = |r: &Range<u64>| r.clone().step_by(CHUNK as usize);
        let pieces = |r: &Range<u64>| {
            let end = r.end;
            starts(r).map(move |at| (at, (end - at).min(CHUNK)))
        };
        let mut pieces = ranges.iter().flat_map(pieces).peekable();
        while pieces.peek().is_some() {
            let (mut requests, mut count) = (Vec::new(), 0);
            for (at, len) in pieces.by_ref().take(AHEAD) {
                self.add_request(&mut requests, CMD_WRITE_ZEROES, at, len)?;
                count += 1;
            }
            self.renew();
            self.send(&requests)?;
            // Which is answered first does not matter: all have to be.
            (0..count).try_for_each(|_| self.replies(|_| ()))?;
        }
        Ok(())
    }

    fn payload(&mut self, len: u32) -> Result<Vec<u8>> {
        if len > MAX_PAYLOAD {
            return Err(protocol("a reply that is too long"));
        }
        self.bytes(len)
    }

    fn bytes(&mut self, len: u32) -> Result<Vec<u8>> {
        let mut buf = vec![0; len as usize];
        self.fill(&mut buf)?;
        Ok(buf)
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<()> {
        let read = self.socket.read_exact(buf, self.deadline);
        read.map_err(|e| failed(e, "reading from QEMU's NBD server"))
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
        self.deadline = Instant::now() + Duration::from_millis(100);
        let _ = self.request(CMD_DISCONNECT, 0, 0);
    }
}

/// Block status as it comes in.
struct Zeros {
    /// Up to where it is known.
    at: u64,
    size: u64,
    /// Zeros up to `at`, to which what follows may belong.
    open: Option<Range<u64>>,
    /// Zeros whose end is known.
    whole: Vec<Range<u64>>,
}

impl Zeros {
    /// Takes the extents of one payload. An answer has as many as QEMU gives at once, or fewer.
    fn take(&mut self, mut extents: &[u8]) -> Result<()> {
        while let (Some(len), Some(flags)) = (be32(extents, 0), be32(extents, 4)) {
            let start = self.at;
            self.at = start.saturating_add(u64::from(len)).min(self.size);
            if flags & 2 == 0 {
                self.whole.extend(self.open.take());
            } else if self.at > start {
                let begin = self.open.take().map_or(start, |o| o.start);
                self.open = Some(begin..self.at);
            }
            extents = extents.get(8..).unwrap_or_default();
        }
        match self.whole.len() as u64 > u64::from(MAX_PAYLOAD / 8) {
            true => Err(protocol("more extents than fit into an answer")),
            false => Ok(()),
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

fn failed(e: Error, what: &str) -> Error {
    match e.kind() {
        Kind::Timeout => {
            Error::new(Kind::Timeout, "QEMU's NBD server does not answer").with_source(e)
        }
        Kind::Interrupted => e,
        _ => Error::new(Kind::Peer, what).with_source(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    fn extents(list: &[(u32, u32)]) -> Vec<u8> {
        let numbers = list.iter().flat_map(|(len, flags)| [*len, *flags]);
        numbers.flat_map(u32::to_be_bytes).collect()
    }

    #[test]
    fn status_extents_are_coalesced_and_clipped() {
        let mut zeros = Zeros { at: 0, size: 50, open: None, whole: Vec::new() };
        zeros.take(&extents(&[(10, 3), (5, 2), (5, 0), (7, 2)])).unwrap();
        zeros.take(&extents(&[(0, 2), (100, 2), (u32::MAX, 2)])).unwrap();
        assert_eq!((zeros.at, zeros.open), (50, Some(20..50)));
        assert_eq!(zeros.whole, vec![0..15]);
    }

    /// Serves one client by `serve` and gives what came of it.
    fn against(
        serve: impl FnOnce(UnixStream) + Send + 'static,
        wait: Duration,
    ) -> Result<(u64, Vec<Range<u64>>)> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        let result = Nbd::connect(&Address::Unix(path), "x", true, wait).and_then(|mut n| {
            let mut zeros = Vec::new();
            n.zero_ranges(|r| {
                zeros.push(r);
                Ok(())
            })?;
            Ok((n.size(), zeros))
        });
        server.join().unwrap();
        result
    }

    /// An option reply.
    fn reply(s: &mut UnixStream, kind: u32, payload: &[u8]) -> std::io::Result<()> {
        reply_as(s, OPTION_REPLY, kind, payload)
    }

    fn reply_as(s: &mut UnixStream, magic: u64, kind: u32, payload: &[u8]) -> std::io::Result<()> {
        let mut r = magic.to_be_bytes().to_vec();
        r.extend(0u32.to_be_bytes());
        r.extend(kind.to_be_bytes());
        r.extend((payload.len() as u32).to_be_bytes());
        r.extend(payload);
        s.write_all(&r)
    }

    /// Until the client knows the size; the first reply begins with `magic`.
    fn handshake(s: &mut UnixStream, magic: u64, size: u64) -> std::io::Result<()> {
        s.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        let mut buf = [0u8; 4096];
        s.read_exact(&mut buf[..4 + 16])?;
        reply_as(s, magic, REP_ACK, &[])?;
        s.read_exact(&mut buf[..16 + 4 + 1 + 4 + 4 + 15])?;
        reply(s, 4, &[&7u32.to_be_bytes()[..], b"base:allocation"].concat())?;
        reply(s, REP_ACK, &[])?;
        s.read_exact(&mut buf[..16 + 4 + 1 + 2])?;
        let info = [&[0, 0][..], &size.to_be_bytes(), &[0, 0]].concat();
        reply(s, 3, &info)?;
        reply(s, REP_ACK, &[])
    }

    /// The payload of a block status in a context.
    fn status_of(context: u32, list: &[(u32, u32)]) -> Vec<u8> {
        [&context.to_be_bytes()[..], &extents(list)].concat()
    }

    /// Answers block status with these extents again and again.
    fn status(s: UnixStream, size: u64, list: &[(u32, u32)], len: Option<u32>) {
        chunks(s, size, &[(5, status_of(7, list))], len);
    }

    /// Answers block status with these chunks (kind and payload), which may claim to be of length `len`, again and
    /// again.
    fn chunks(mut s: UnixStream, size: u64, list: &[(u16, Vec<u8>)], len: Option<u32>) {
        handshake(&mut s, OPTION_REPLY, size).unwrap();
        let mut buf = [0u8; 28];
        while s.read_exact(&mut buf).is_ok() && buf[7] == CMD_BLOCK_STATUS as u8 {
            for (i, (kind, payload)) in list.iter().enumerate() {
                let mut r = STRUCTURED_REPLY.to_be_bytes().to_vec();
                r.extend(u16::from(i + 1 == list.len()).to_be_bytes());
                r.extend(kind.to_be_bytes());
                r.extend(&buf[8..16]);
                r.extend(len.unwrap_or(payload.len() as u32).to_be_bytes());
                r.extend(payload);
                if s.write_all(&r).is_err() {
                    return;
                }
            }
        }
    }

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(100);

    #[test]
    fn an_honest_server_is_understood() {
        let all = 0..3 * CHUNK;
        let list = [(CHUNK as u32, 3)];
        let got = against(move |s| status(s, 3 * CHUNK, &list, None), LONG).unwrap();
        assert_eq!(got, (all.end, vec![all]));
    }

    /// Takes three requests before it answers one, and the last of them first.
    #[test]
    fn writes_do_not_wait_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let mut s = listener.accept().unwrap().0;
            s.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
            let mut buf = [0u8; 4 + 16 + 4 + 1 + 2 + 3 * 28];
            s.read_exact(&mut buf[..4 + 16 + 4 + 1 + 2]).unwrap();
            reply(&mut s, 3, &[&[0, 0][..], &u64::MAX.to_be_bytes(), &[0, 0]].concat()).unwrap();
            reply(&mut s, REP_ACK, &[]).unwrap();
            s.read_exact(&mut buf[..3 * 28]).unwrap();
            for r in buf[..3 * 28].chunks(28).rev() {
                let head = [&SIMPLE_REPLY.to_be_bytes()[..], &[0; 4], &r[8..16]].concat();
                s.write_all(&head).unwrap();
            }
            buf[..3 * 28].chunks(28).map(|r| be64(r, 16).unwrap()).collect::<Vec<_>>()
        });
        let mut n = Nbd::connect(&Address::Unix(path), "x", false, Duration::from_secs(5)).unwrap();
        n.write_zeroes(&[0..512, 4096..4096 + CHUNK + 1]).unwrap();
        assert_eq!(server.join().unwrap(), [0, 4096, 4096 + CHUNK]);
    }

    #[test]
    fn wrong_replies_of_a_server_end_in_errors() {
        let kind = |r: Result<(u64, Vec<Range<u64>>)>| r.unwrap_err().kind();
        // No extents, or empty ones.
        assert_eq!(kind(against(|s| status(s, 1 << 20, &[], None), LONG)), Kind::Peer);
        assert_eq!(kind(against(|s| status(s, 1 << 20, &[(0, 2)], None), LONG)), Kind::Peer);
        // A payload of gigabytes.
        let long = |s| status(s, 1 << 20, &[(512, 2)], Some(u32::MAX));
        assert_eq!(kind(against(long, LONG)), Kind::Peer);
        // Extents of a byte of a disk of 2^64.
        let tiny = |s| status(s, u64::MAX, &[(1, 2)], None);
        assert_eq!(kind(against(tiny, SHORT)), Kind::Timeout);
        // An error's text without end.
        let text = |mut s: UnixStream| {
            s.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
            let _ = reply(&mut s, REP_ERROR | 1, &vec![b'x'; 16 << 20]);
        };
        assert_eq!(kind(against(text, LONG)), Kind::Peer);
        // A reply that is none.
        let magic = |mut s: UnixStream| {
            let _ = handshake(&mut s, !OPTION_REPLY, 0);
        };
        assert_eq!(kind(against(magic, LONG)), Kind::Peer);
    }

    #[test]
    fn what_came_before_an_error_is_no_answer() {
        let error = [&5u32.to_be_bytes()[..], &[0, 0]].concat();
        let list = [(5, status_of(7, &[(1 << 20, 2)])), (0x8001, error)];
        let e = against(move |s| chunks(s, 1 << 20, &list, None), LONG).unwrap_err();
        assert_eq!(e.kind(), Kind::Peer);
    }

    /// Nobody asked for it, and its flags mean something else.
    #[test]
    fn the_status_of_another_context_says_nothing_of_zeros() {
        let list = [(5, status_of(8, &[(1 << 20, 2)])), (5, status_of(7, &[(1 << 20, 0)]))];
        let got = against(move |s| chunks(s, 1 << 20, &list, None), LONG).unwrap();
        assert_eq!(got, (1 << 20, Vec::new()));
    }

    #[test]
    fn a_server_that_never_comes_to_an_end_is_left() {
        let replies = |mut s: UnixStream| {
            s.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
            while reply(&mut s, 3, &[9; 100]).is_ok() {}
        };
        assert_eq!(against(replies, SHORT).unwrap_err().kind(), Kind::Timeout);
        // One byte at a time, each of them in time.
        let drip = |mut s: UnixStream| {
            while s.write_all(b"N").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        assert_eq!(against(drip, SHORT).unwrap_err().kind(), Kind::Timeout);
    }
}
