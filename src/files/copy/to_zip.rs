//! Into a zip archive, as a stream: the sizes and checksums of each file follow its contents. Owners and times stand
//! in Info-ZIP's extra fields (0x7875, 0x5455), which `unzip` and 7-Zip read.

use std::io::Write;
use std::sync::Arc;

use jiff::tz::TimeZone;
use zip::result::ZipError;
use zip::write::{FullFileOptions, StreamWriter};
use zip::{CompressionMethod, DateTime, ZipWriter};

use super::super::blocks::{Blocks, Holding};
use super::super::tree::{OpenFile, Time};
use super::container::{Container, Entry, after_header, cannot};
use super::report::Options;
use super::sparse::each_data;
use crate::error::{Error, Kind, Result};

/// From this length on sizes take eight bytes: half a percent below what four can say, since contents that cannot be
/// compressed become longer.
const LARGE: u64 = u32::MAX as u64 / 200 * 199;
/// Bytes of holes that are written as zeros, of one file.
const MAX_HOLES: u64 = 64 << 30;
/// What an entry takes in memory until the archive ends, beside its name, and how much is asked for at a time.
const ENTRY_BYTES: u64 = 768;
const STEP: u64 = 1 << 20;
/// The longest path: an entry's header has room for 64 KiB in all.
const MAX_PATH: usize = 32 << 10;
/// Info-ZIP's field of owner and group.
const OWNERS: u16 = 0x7875;

type Stream<'a> = ZipWriter<StreamWriter<&'a mut (dyn Write + 'a)>>;

pub(super) struct ToZip<'a> {
    /// Absent once the archive is not to go on.
    zip: Option<Stream<'a>>,
    blocks: Arc<Blocks>,
    held: Vec<Holding>,
    /// Bytes that entries take.
    used: u64,
}

impl<'a> ToZip<'a> {
    pub(super) fn new(out: &'a mut (dyn Write + 'a), blocks: Arc<Blocks>) -> Self {
        let zip = Some(ZipWriter::new_stream(out));
        ToZip { zip, blocks, held: Vec::new(), used: 0 }
    }

    fn zip(&mut self) -> Result<&mut Stream<'a>> {
        self.zip.as_mut().ok_or_else(|| Error::new(Kind::Io, "the archive is not complete"))
    }

    /// That an entry begins; its options and its name.
    fn begin<'b>(
        &mut self,
        entry: &'b Entry<'_>,
    ) -> Result<(FullFileOptions<'static, 'static>, &'b str)> {
        let name = name(entry.path)?;
        self.hold(2 * name.len() as u64 + ENTRY_BYTES)?;
        let a = entry.attributes;
        let owners = owners(a.uid, a.gid);
        let mut options = FullFileOptions::default()
            .unix_permissions(entry.mode)
            .last_modified_time(dos_time(a.mtime));
        options.add_extra_field(OWNERS, owners, false).map_err(failed)?;
        // Four bytes, which some read with a sign.
        if let Ok(seconds) = i32::try_from(a.mtime.seconds)
            && let Ok(seconds) = u32::try_from(seconds)
        {
            options = options.with_extended_timestamp(Some(seconds), None, None).map_err(failed)?;
        }
        Ok((options, name))
    }

    /// Counts what an entry takes until the archive ends.
    fn hold(&mut self, bytes: u64) -> Result<()> {
        while self.used + bytes > self.held.len() as u64 * STEP {
            let held = self.blocks.hold(STEP).map_err(|_| {
                let what =
                    "the archive's table of contents needs more memory than --cache-size allows";
                Error::new(Kind::Unsupported, what)
                    .remedy("give a larger --cache-size, or use --tar")
            })?;
            self.held.push(held);
        }
        self.used += bytes;
        Ok(())
    }
}

impl Drop for ToZip<'_> {
    fn drop(&mut self) {
        // The library would end it in order, and what is cut off would look whole.
        std::mem::forget(self.zip.take());
    }
}

impl Container for ToZip<'_> {
    fn folder(&mut self, entry: &Entry<'_>) -> Result<()> {
        let (options, name) = self.begin(entry)?;
        self.zip()?.add_directory(name, options).map_err(failed)
    }

    fn file(
        &mut self,
        entry: &Entry<'_>,
        file: &dyn OpenFile,
        options: &Options<'_>,
    ) -> Result<u64> {
        check_holes(file, entry)?;
        let (head, name) = self.begin(entry)?;
        let head =
            head.compression_method(CompressionMethod::Deflated).large_file(file.size() >= LARGE);
        let zip = self.zip()?;
        zip.start_file(name, head).map_err(failed)?;
        let mut written = 0;
        let result = each_data(file, options, |bytes, at| {
            zeros(zip, at - written, options)?;
            written = at + bytes.len() as u64;
            zip.write_all(bytes).map_err(cannot)
        });
        let result = result.and_then(|()| zeros(zip, file.size() - written, options));
        result.map_err(|e| after_header(e, entry.path))?;
        Ok(file.size())
    }

    fn link(&mut self, entry: &Entry<'_>, text: &[u8]) -> Result<()> {
        let text =
            std::str::from_utf8(text).map_err(|_| no_place("the link's text is not UTF-8"))?;
        let (options, name) = self.begin(entry)?;
        self.zip()?.add_symlink(name, text, options).map_err(failed)
    }

    fn special(&mut self, _: &Entry<'_>) -> Result<()> {
        Err(no_place("zip archives have no device nodes and pipes"))
    }

    fn further_name(&mut self, _: &Entry<'_>, _: &[u8]) -> Result<bool> {
        Ok(false)
    }

    fn has_setuid(&self) -> bool {
        false
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        let zip = self.zip.take();
        let ended = zip.map(ZipWriter::finish).transpose().map_err(failed)?;
        ended.map(StreamWriter::into_inner).map_or(Ok(()), |out| out.flush()).map_err(cannot)
    }
}

/// The name as every program that unpacks takes it: Windows' take a backslash for a slash, and drives for folders.
fn name(path: &[u8]) -> Result<&str> {
    let name = std::str::from_utf8(path).map_err(|_| no_place("its name is not UTF-8"))?;
    if name.len() > MAX_PATH {
        return Err(no_place("its path is too long"));
    }
    if name.contains(['\\', ':']) {
        return Err(no_place(
            "its name has a backslash or a colon, which Windows takes for a path",
        ));
    }
    Ok(name)
}

fn no_place(why: &str) -> Error {
    Error::new(Kind::Unsupported, format!("not in a zip archive: {why}")).remedy("use --tar")
}

fn failed(e: ZipError) -> Error {
    match e {
        ZipError::Io(e) => cannot(e),
        other => no_place(&other.to_string()),
    }
}

fn owners(uid: u32, gid: u32) -> Vec<u8> {
    let mut field = vec![1, 4];
    field.extend_from_slice(&uid.to_le_bytes());
    field.push(4);
    field.extend_from_slice(&gid.to_le_bytes());
    field
}

/// The time as DOS has it: on the clock on the wall, from 1980 on.
fn dos_time(time: Time) -> DateTime {
    let clock = jiff::Timestamp::from_second(time.seconds).ok();
    let clock = clock.map(|t| t.to_zoned(TimeZone::system()));
    let small = |n: i8| n.unsigned_abs();
    let told = clock.and_then(|t| {
        let year = u16::try_from(t.year()).ok()?;
        let (month, day) = (small(t.month()), small(t.day()));
        let (hour, minute, second) = (small(t.hour()), small(t.minute()), small(t.second()));
        DateTime::from_date_and_time(year, month, day, hour, minute, second).ok()
    });
    told.unwrap_or_default()
}

/// Fails for a file whose holes would make an archive of zeros without end.
fn check_holes(file: &dyn OpenFile, entry: &Entry<'_>) -> Result<()> {
    match file.size().saturating_sub(entry.attributes.allocated) > MAX_HOLES {
        true => Err(no_place("the file has more than 64 GiB of holes, which would be zeros in it")),
        false => Ok(()),
    }
}

fn zeros(out: &mut dyn Write, mut len: u64, options: &Options<'_>) -> Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    while len > 0 {
        options.check()?;
        let n = len.min(ZEROS.len() as u64);
        let part = ZEROS.get(..n as usize).unwrap_or_default();
        out.write_all(part).map_err(cannot)?;
        len -= n;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
