//! Serving an open file to a child process over a socket pair: just enough of an NBD server.
//!
//! The protocol is the fixed newstyle handshake with one unnamed export, then simple replies, as in
//! the NBD project's proto.md. The client is not trusted: lengths are bounded, and nothing it
//! sends reaches beyond the export's size.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use crate::storage::{OpenFile, ReadAt};

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
/// The most that a client may read or write at once without being told otherwise.
const MAX_DATA: u32 = 32 << 20;
/// Zeros written at once where no hole can be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Errors as the protocol numbers them.
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// A file as a child process may see it.
pub(super) struct Export<'a> {
    image: &'a OpenFile<'a>,
    size: u64,
    writable: bool,
}

/// A client that asks for nothing for so long has met what it cannot handle; it thinks much less
/// between two requests.
const LONGEST_SILENCE: std::time::Duration = std::time::Duration::from_secs(600);

/// What the client asks for.
struct Request {
    kind: u16,
    cookie: [u8; 8],
    from: u64,
    len: u32,
}

fn whole_sectors(size: u64) -> u64 {
    size.min(i64::MAX as u64 - 4095).next_multiple_of(512)
}

impl<'a> Export<'a> {
    /// One that is only read.
    pub(super) fn reading(image: &'a OpenFile<'a>) -> Self {
        // Whole sectors: QEMU waits for ever for one that is not whole.
        Export { image, size: whole_sectors(image.length()), writable: false }
    }

    /// One of `size` bytes that may be written; the file grows as far as that is done.
    pub(super) fn writing(image: &'a OpenFile<'a>, size: u64) -> Self {
        Export { image, size: whole_sectors(size), writable: true }
    }

    /// Serves until the client goes. The first error that the file's operating system reported.
    pub(super) fn serve(&self, socket: &UnixStream) -> Option<io::Error> {
        let mut failed = None;
        // A client that neither asks nor goes is stuck, and its checks of time do not see it.
        let _ = socket.set_read_timeout(Some(LONGEST_SILENCE));
        let mut socket = socket;
        // What is wrong with the connection, the client knows best.
        if let Ok(true) = self.shake_hands(&mut socket) {
            while let Ok(true) = self.answer(&mut socket, &mut failed) {}
        }
        let _ = socket.shutdown(std::net::Shutdown::Both);
        failed
    }

    fn flags(&self) -> u16 {
        match self.writable {
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
            let about = [&self.size.to_be_bytes()[..], &self.flags().to_be_bytes()].concat();
            match option {
                OPT_EXPORT_NAME => {
                    let padding = if flags & NO_ZEROES == 0 { &[0; 124][..] } else { &[] };
                    socket.write_all(&[&about[..], padding].concat())?;
                    return Ok(true);
                }
                OPT_GO => {
                    let info = [&INFO_EXPORT.to_be_bytes()[..], &about].concat();
                    reply(socket, option, REP_INFO, &info)?;
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
        let end = r.from.checked_add(u64::from(r.len)).filter(|end| *end <= self.size);
        let end = end.ok_or(Refusal::Client(EINVAL))?;
        match r.kind {
            CMD_READ if r.len <= MAX_DATA => Ok(self.read(r.from, r.len as usize)?),
            CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES if !self.writable => {
                Err(Refusal::Client(EPERM))
            }
            CMD_WRITE => {
                self.image.file().write_all_at(&data, r.from)?;
                Ok(Vec::new())
            }
            CMD_TRIM | CMD_WRITE_ZEROES => {
                self.zero(r.from, end)?;
                Ok(Vec::new())
            }
            _ => Err(Refusal::Client(EINVAL)),
        }
    }

    /// Behind the end of a file that may grow, and in the rest of a last sector, there are zeros.
    fn read(&self, from: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; len];
        let mut done = 0;
        while done < len {
            match self.image.read_at(&mut buf[done..], from + done as u64) {
                Ok(0) if self.writable || from + done as u64 >= self.image.length() => break,
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(buf)
    }

    /// Makes a hole, or writes zeros where there can be none.
    fn zero(&self, from: u64, end: u64) -> io::Result<()> {
        let file = self.image.file();
        let len = file.metadata()?.len();
        if end > len {
            file.set_len(end)?;
        }
        let end = end.min(len);
        if from >= end || punch(file, from, end - from).is_ok() {
            return Ok(());
        }
        let mut at = from;
        while at < end {
            let n = (ZEROS.len() as u64).min(end - at);
            file.write_all_at(&ZEROS[..n as usize], at)?;
            at += n;
        }
        Ok(())
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

fn is_no_space(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

fn punch(file: &std::fs::File, from: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (from, len) = (from as libc::off_t, len as libc::off_t);
    // SAFETY: fallocate on a descriptor that is open for as long as the call takes.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, from, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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
