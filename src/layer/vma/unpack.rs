//! Archives that vzdump compressed: `.vma.zst`, `.vma.gz`, `.vma.lzo`.
//!
//! They are one stream without an index, so a block in the middle can only be had by unpacking all
//! before it. The archive is therefore unpacked once, when a point in it is first opened, into an
//! unlinked scratch file in `$TMPDIR` or `/var/tmp`, which disappears with the last layer that
//! uses it. All checksums of the container are checked on the way. Nothing is written beside the
//! backup, and some room on the scratch file system is left to others.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header;
use super::lzop::{self, LzopReader};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::storage::{ReadAt, Section};
use crate::text::path_text;
use crate::units::human_bytes;

/// How much is read from the archive, or written to the scratch file, at a time.
const STEP: usize = 1 << 20;
/// How often the room on the scratch file system is looked at.
const ROOM_EVERY: u64 = 64 << 20;
/// What is left free there: a tenth, or this where a tenth is more.
const KEEP_FREE: u64 = 4 << 30;

/// How an archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Plain,
    Zstd,
    Gzip,
    Lzop,
}

impl Packing {
    fn of(storage: &dyn ReadAt) -> Result<Packing> {
        let mut start = [0; 9];
        let n = usize::try_from(storage.len()).unwrap_or(usize::MAX).min(start.len());
        storage.read_exact_at(&mut start[..n], 0)?;
        Ok(match start {
            lzop::MAGIC => Packing::Lzop,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
            [0x1f, 0x8b, ..] => Packing::Gzip,
            // Whatever else it is, the header's own check will say so.
            _ => Packing::Plain,
        })
    }

    fn command(self) -> &'static str {
        match self {
            Packing::Plain => "cp",
            Packing::Zstd => "zstd -d",
            Packing::Gzip => "gunzip -k",
            Packing::Lzop => "lzop -d",
        }
    }

    fn reader<'a>(self, storage: &'a dyn ReadAt) -> io::Result<Box<dyn Read + 'a>> {
        let packed = BufReader::with_capacity(STEP, Section::new(storage, 0, storage.len()));
        Ok(match self {
            Packing::Plain => Box::new(packed),
            Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
            Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
            Packing::Lzop => Box::new(LzopReader::new(packed)?),
        })
    }
}

/// The archive's plain bytes from the beginning.
///
/// # Errors
/// The container's header is damaged.
pub(super) fn reader<'a>(storage: &'a dyn ReadAt) -> Result<Box<dyn Read + 'a>> {
    let packing = Packing::of(storage)?;
    packing.reader(storage).map_err(|e| unpacking(e, storage))
}

/// Whether its bytes are not the archive's own.
///
/// # Errors
/// Reading failed.
pub(super) fn is_packed(storage: &dyn ReadAt) -> Result<bool> {
    Ok(Packing::of(storage)? != Packing::Plain)
}

/// The archive's plain bytes for reading anywhere: itself, or an unpacked copy.
///
/// # Errors
/// The container is damaged or cut; `NoSpace` where the copy does not fit.
pub(super) fn plain(storage: Arc<dyn ReadAt>) -> Result<Arc<dyn ReadAt>> {
    let packing = Packing::of(&*storage)?;
    if packing == Packing::Plain {
        return Ok(storage);
    }
    let folder = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    log::info!(
        "unpacking {} to a scratch file in {}",
        path_text(&storage.name()),
        path_text(&folder)
    );
    let (file, len) = unpack(&*storage, packing, &folder)?;
    storage.check_unchanged()?;
    Ok(Arc::new(Scratch { file, len, packed: storage }))
}

fn unpack(storage: &dyn ReadAt, packing: Packing, folder: &Path) -> Result<(File, u64)> {
    let no_room = |e: Error| {
        let by_hand = format!("unpack the archive with '{}'", packing.command());
        e.remedy(format!("{by_hand}, or set TMPDIR to a folder with enough space"))
    };
    let file = scratch(folder)
        .map_err(|e| no_room(Error::io(e, "cannot make a scratch file").at_path(folder)))?;
    let mut from = packing.reader(storage).map_err(|e| unpacking(e, storage))?;
    let mut buf = vec![0; STEP];
    let (mut at, mut checked) = (0, 0);
    loop {
        let n = match from.read(&mut buf) {
            Ok(0) => return Ok((file, at)),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(unpacking(e, storage)),
        };
        if at == 0 && !buf.starts_with(&header::MAGIC[..n.min(4)]) {
            return Err(
                Error::new(Kind::Corrupt, "there is no VMA archive inside").at_path(storage.name())
            );
        }
        if at >= checked {
            check_room(&file).map_err(|e| no_room(e.at_path(folder)))?;
            checked = at + ROOM_EVERY;
        }
        file.write_all_at(&buf[..n], at)
            .map_err(|e| no_room(Error::io(e, "cannot write the scratch file").at_path(folder)))?;
        at += n as u64;
    }
}

/// A file without a name in `folder`, which goes when it is closed.
fn scratch(folder: &Path) -> io::Result<File> {
    Folder::open(&folder::resolve(folder)?)?.temp()?.file().try_clone()
}

/// Fails before the scratch file takes the last of its file system.
fn check_room(file: &File) -> Result<()> {
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the descriptor is open and the pointer is to a statvfs that is ours to fill.
    if unsafe { libc::fstatvfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(Error::io(io::Error::last_os_error(), "cannot ask for free space"));
    }
    // SAFETY: fstatvfs succeeded, so it filled all of it.
    let stat = unsafe { stat.assume_init() };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let keep = stat.f_blocks.saturating_mul(stat.f_frsize) / 10;
    let keep = keep.min(KEEP_FREE);
    if free > keep.saturating_add(ROOM_EVERY) {
        return Ok(());
    }
    let what = format!("not enough space for a scratch file: {} left", human_bytes(free));
    Err(Error::new(Kind::NoSpace, what))
}

fn unpacking(e: io::Error, storage: &dyn ReadAt) -> Error {
    let kind = match e.kind() {
        io::ErrorKind::UnexpectedEof => Kind::Truncated,
        _ if e.raw_os_error().is_some() => Kind::Io,
        _ => Kind::Corrupt,
    };
    Error::new(kind, "cannot unpack the archive")
        .with_source(e)
        .at_path(storage.name())
        .remedy("restore this archive from another copy of the backup")
}

/// The unpacked copy of an archive; it goes by the archive's name.
struct Scratch {
    file: File,
    len: u64,
    packed: Arc<dyn ReadAt>,
}

impl ReadAt for Scratch {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn name(&self) -> &Path {
        self.packed.name()
    }

    fn check_unchanged(&self) -> Result<()> {
        self.packed.check_unchanged()
    }
}
