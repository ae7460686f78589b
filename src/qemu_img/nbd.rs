//! Just enough of an NBD server, for a child process behind a socket pair.
//!
//! The protocol is the fixed newstyle handshake with one unnamed export, then simple replies, as in
//! the NBD project's proto.md. The client is not trusted: lengths are bounded, and nothing it
//! sends reaches beyond the export's size.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const INIT: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Fixed newstyle; no zeros behind the answer to `EXPORT_NAME`.
const HANDSHAKE: u16 = 0b11;
const NO_ZEROES: u32 = 0b10;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 1 << 31 | 1;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// Options are names and lists of numbers.
const MAX_OPTION: u32 = 64 << 10;

const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const HAS_FLAGS: u16 = 1 << 0;
const READ_ONLY: u16 = 1 << 1;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// The most that a client may read or write at once, as it is told: a client that does not keep to it holds this much
/// memory for each device, and no more.
const MAX_DATA: u32 = 2 << 20;
/// What it is told besides: the least that it should read or write, and multiples of what.
const BLOCK_SIZES: [u32; 2] = [512, 4096];

/// Errors as the protocol numbers them.
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// What is served.
pub(crate) trait Device {
    /// Its size in bytes. QEMU waits for ever for a last sector that is not whole: see [`whole_sectors`].
    fn size(&self) -> u64;
    /// Whether it may be written to.
    fn is_writable(&self) -> bool;
    /// How long the client may ask for nothing; `None`: as long as it likes.
    fn patience(&self) -> Option<Duration>;
    /// The bytes at `from`, which are inside.
    ///
    /// # Errors
    /// They cannot be read.
    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Writes `data` at `from`, inside.
    ///
    /// # Errors
    /// They cannot be written.
    fn write(&self, data: &[u8], from: u64) -> io::Result<()>;
    /// Makes zeros of the bytes in the range, which is inside.
    ///
    /// # Errors
    /// They cannot be written.
    fn zero(&self, range: std::ops::Range<u64>) -> io::Result<()>;
}

/// What the client asks for.
struct Request {
    kind: u16,
    cookie: [u8; 8],
    from: u64,
    len: u32,
}

/// A size in whole sectors.
pub(crate) fn whole_sectors(size: u64) -> u64 {
    size.min(i64::MAX as u64 - 4095).next_multiple_of(512)
}

/// Serves `device` until the client goes. The first error that the device reported.
pub(crate) fn serve(device: &dyn Device, socket: &UnixStream) -> Option<io::Error> {
    Server { device }.serve(socket)
}

struct Server<'a> {
    device: &'a dyn Device,
}

impl Server<'_> {
    fn serve(&self, socket: &UnixStream) -> Option<io::Error> {
        let mut failed = None;
        // A client that neither asks nor goes is stuck, and its checks of time do not see it.
        let _ = socket.set_read_timeout(self.device.patience());
        let mut socket = socket;
        // What is wrong with the connection, the client knows best.
        if let Ok(true) = self.shake_hands(&mut socket) {
            while let Ok(true) = self.answer(&mut socket, &mut failed) {}
        }
        let _ = socket.shutdown(std::net::Shutdown::Both);
        failed
    }

    fn flags(&self) -> u16 {
        match self.device.is_writable() {
            true => HAS_FLAGS | SEND_TRIM | SEND_WRITE_ZEROES,
            false => HAS_FLAGS | READ_ONLY,
        }
    }

    /// Whether the client wants to go on.
    fn shake_hands(&self, socket: &mut (impl Read + Write)) -> io::Result<bool> {
        let magic = OPTION_MAGIC.to_be_bytes();
        socket.write_all(&[&INIT[..], &magic, &HANDSHAKE.to_be_bytes()].concat())?;
        let flags = u32::from_be_bytes(take(socket)?);
        loop {
            if u64::from_be_bytes(take(socket)?) != OPTION_MAGIC {
                return Ok(false);
            }
            let option = u32::from_be_bytes(take(socket)?);
            let len = u32::from_be_bytes(take(socket)?);
            if len > MAX_OPTION {
                return Ok(false);
            }
            // Which name it asks for is all the same: there is one export.
            io::copy(&mut Read::by_ref(socket).take(len.into()), &mut io::sink())?;
            let about =
                [&self.device.size().to_be_bytes()[..], &self.flags().to_be_bytes()].concat();
            match option {
                OPT_EXPORT_NAME => {
                    let padding = if flags & NO_ZEROES == 0 { &[0; 124][..] } else { &[] };
                    socket.write_all(&[&about[..], padding].concat())?;
                    return Ok(true);
                }
                OPT_GO => {
                    let info = [&INFO_EXPORT.to_be_bytes()[..], &about].concat();
                    reply(socket, option, REP_INFO, &info)?;
                    reply(socket, option, REP_INFO, &block_sizes())?;
                    reply(socket, option, REP_ACK, &[])?;
                    return Ok(true);
                }
                OPT_ABORT => return Ok(false),
                _ => reply(socket, option, REP_UNSUPPORTED, &[])?,
            }
        }
    }

    /// Answers one request; false at the end.
    fn answer(
        &self,
        socket: &mut (impl Read + Write),
        failed: &mut Option<io::Error>,
    ) -> io::Result<bool> {
        let magic = u32::from_be_bytes(take(socket)?);
        let _flags: [u8; 2] = take(socket)?;
        let r = Request {
            kind: u16::from_be_bytes(take(socket)?),
            cookie: take(socket)?,
            from: u64::from_be_bytes(take(socket)?),
            len: u32::from_be_bytes(take(socket)?),
        };
        if magic != REQUEST || r.kind == CMD_DISCONNECT {
            return Ok(false);
        }
        let mut data = Vec::new();
        if r.kind == CMD_WRITE {
            if r.len > MAX_DATA {
                return Ok(false);
            }
            data.resize(r.len as usize, 0);
            socket.read_exact(&mut data)?;
        }
        let (error, data) = match self.act(&r, data) {
            Ok(data) => (0, data),
            Err(Refusal::Client(number)) => (number, Vec::new()),
            Err(Refusal::System(e)) => {
                let number = if is_no_space(&e) { ENOSPC } else { EIO };
                failed.get_or_insert(e);
                (number, Vec::new())
            }
        };
        let head = [&SIMPLE_REPLY.to_be_bytes()[..], &u32::to_be_bytes(error), &r.cookie].concat();
        socket.write_all(&head)?;
        socket.write_all(&data)?;
        Ok(true)
    }

    fn act(&self, r: &Request, data: Vec<u8>) -> Result<Vec<u8>, Refusal> {
        let end = r.from.checked_add(u64::from(r.len)).filter(|end| *end <= self.device.size());
        let end = end.ok_or(Refusal::Client(EINVAL))?;
        match r.kind {
            CMD_READ if r.len <= MAX_DATA => Ok(self.device.read(r.from, r.len as usize)?),
            CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES if !self.device.is_writable() => {
                Err(Refusal::Client(EPERM))
            }
            CMD_WRITE => {
                self.device.write(&data, r.from)?;
                Ok(Vec::new())
            }
            CMD_TRIM | CMD_WRITE_ZEROES => {
                self.device.zero(r.from..end)?;
                Ok(Vec::new())
            }
            _ => Err(Refusal::Client(EINVAL)),
        }
    }
}

/// Why a request fails.
enum Refusal {
    /// It is at fault.
    Client(u32),
    /// The file is.
    System(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Self {
        Refusal::System(e)
    }
}

/// Whether there was no space for a write.
pub(crate) fn is_no_space(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// The least, the best and the most bytes of a request, as an answer to `GO`.
fn block_sizes() -> Vec<u8> {
    let [least, best] = BLOCK_SIZES.map(u32::to_be_bytes);
    [&INFO_BLOCK_SIZE.to_be_bytes()[..], &least, &best, &MAX_DATA.to_be_bytes()].concat()
}

fn take<const N: usize>(socket: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn reply(socket: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let magic = OPTION_REPLY.to_be_bytes();
    let (option, kind, len) =
        (option.to_be_bytes(), kind.to_be_bytes(), (data.len() as u32).to_be_bytes());
    socket.write_all(&[&magic[..], &option, &kind, &len, data].concat())
}
