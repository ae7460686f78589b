//! The frames of a stream, its metadata and its trailer.
//!
//! A frame's header is 40 ASCII bytes: kind, start and length in hexadecimal, CR LF. Lengths are
//! those of the guest's bytes; what compressed data takes in the file is in the trailer only.

use std::fmt::Formatter;
use std::io::BufReader;
use std::ops::Range;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::{Error, Kind, Result};
use crate::storage::{ReadAt, Section};

/// Length of a frame's header.
pub(super) const HEADER: u64 = 40;
/// CR LF, which ends a frame that carries something.
pub(super) const TERM: u64 = 2;
/// Metadata is a few hundred bytes.
const MAX_META: u64 = 1 << 20;
/// About ten bytes for each data frame: enough for one of 20 TB in pieces of 4 MiB, and bounded.
const MAX_TRAILER: u64 = 64 << 20;
/// No disk is larger than a file can be.
const MAX_DISK: u64 = i64::MAX as u64;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kinds {
    /// The metadata, first in the file.
    Meta,
    /// Bytes of the guest.
    Data,
    /// A range that reads as zeros.
    Zero,
    /// The end.
    Stop,
    /// The list of compressed sizes, last in the file.
    Comp,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// What it is.
    pub kind: Kinds,
    /// First guest byte.
    pub start: u64,
    /// Guest bytes; of `Meta` and `Comp`, bytes of text.
    pub len: u64,
}

impl Frame {
    /// Parses a header.
    pub(super) fn parse(bytes: &[u8; HEADER as usize]) -> Option<Frame> {
        let kind = match &bytes[..4] {
            b"meta" => Kinds::Meta,
            b"data" => Kinds::Data,
            b"zero" => Kinds::Zero,
            b"stop" => Kinds::Stop,
            b"comp" => Kinds::Comp,
            _ => return None,
        };
        let framed = bytes[4] == b' ' && bytes[21] == b' ' && bytes[38..] == *b"\r\n";
        let (start, len) = (hex(&bytes[5..21])?, hex(&bytes[22..38])?);
        framed.then_some(Frame { kind, start, len })
    }

    /// Reads the header at `at`.
    ///
    /// # Errors
    /// `Truncated`, `Corrupt` or `Io`; without the file's name.
    pub(super) fn read(storage: &dyn ReadAt, at: u64) -> Result<Frame> {
        if storage.len().saturating_sub(at) < HEADER {
            return Err(cut(at, "the stream ends without its last frame"));
        }
        let mut bytes = [0; HEADER as usize];
        storage.read_exact_at(&mut bytes, at)?;
        Frame::parse(&bytes).ok_or_else(|| corrupt(at, "there is no frame where one has to be"))
    }
}

fn hex(digits: &[u8]) -> Option<u64> {
    let digit = |d: &u8| char::from(*d).to_digit(16).map(u64::from);
    digits.iter().try_fold(0u64, |n, d| Some(n << 4 | digit(d)?))
}

/// What a stream says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Size in bytes of the virtual disk.
    pub virtual_size: u64,
    /// How many guest bytes are in data frames.
    pub data_size: u64,
    /// Local time of the backup, as written.
    pub date: String,
    /// The disk's name in the domain, such as `sda`.
    pub disk: String,
    /// The checkpoint that this backup made.
    pub checkpoint: String,
    /// The checkpoint since which this backup has the changes; empty for a full one.
    pub parent: String,
    /// Whether what is not mentioned has to be looked for below.
    pub incremental: bool,
    /// Whether data is compressed.
    pub compressed: bool,
}

/// The metadata's JSON; fields that nobody needs are not listed.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMeta {
    virtual_size: u64,
    data_size: u64,
    #[serde(default)]
    date: String,
    disk_name: String,
    #[serde(default)]
    checkpoint_name: String,
    #[serde(default)]
    parent_checkpoint: String,
    incremental: bool,
    // Absent in version 1, `false`, or the compression level.
    #[serde(default)]
    compressed: Option<serde_json::Value>,
    compression_method: Option<String>,
    #[serde(alias = "stream-version")]
    stream_version: u64,
}

/// Reads the metadata; returns it and where the next frame begins.
///
/// # Errors
/// `Truncated`, `Corrupt`, `Unsupported` or `Io`; without the file's name.
pub(super) fn read_meta(storage: &dyn ReadAt) -> Result<(Meta, u64)> {
    let frame = Frame::read(storage, 0)?;
    if frame.kind != Kinds::Meta || frame.start != 0 {
        return Err(corrupt(0, "the stream does not begin with its metadata"));
    }
    let text = read_text(storage, HEADER, frame.len, MAX_META)?;
    expect_term(storage, HEADER + frame.len)?;
    let raw: RawMeta = serde_json::from_slice(&text)
        .map_err(|e| corrupt(HEADER, "the stream's metadata is damaged").with_source(e))?;
    if !(1..=2).contains(&raw.stream_version) {
        let what = format!("stream version {} is not known", raw.stream_version);
        return Err(Error::new(Kind::Unsupported, what).at_offset(HEADER));
    }
    if raw.virtual_size > MAX_DISK || raw.data_size > raw.virtual_size {
        return Err(corrupt(HEADER, "the stream's sizes contradict each other"));
    }
    let compressed = raw.compressed.is_some_and(|c| c != serde_json::Value::Bool(false));
    if compressed && raw.compression_method.as_deref().is_some_and(|m| m != "lz4") {
        let what = "the stream is not compressed with lz4";
        return Err(Error::new(Kind::Unsupported, what).at_offset(HEADER));
    }
    let meta = Meta {
        virtual_size: raw.virtual_size,
        data_size: raw.data_size,
        date: raw.date,
        disk: raw.disk_name,
        checkpoint: raw.checkpoint_name,
        parent: raw.parent_checkpoint,
        incremental: raw.incremental,
        compressed,
    };
    Ok((meta, HEADER + frame.len + TERM))
}

/// Looks whether the stream ends with the frame it has to end with.
///
/// # Errors
/// `Truncated` if it does not.
pub(super) fn check_end(storage: &dyn ReadAt, meta: &Meta) -> Result<()> {
    let at = storage.len().saturating_sub(HEADER);
    let last = if meta.compressed { Kinds::Comp } else { Kinds::Stop };
    match Frame::read(storage, at) {
        Ok(frame) if frame.kind == last => Ok(()),
        Err(e) if e.kind() == Kind::Io => Err(e),
        _ => Err(cut(at, "the stream ends without its last frame")),
    }
}

/// The trailer of a compressed stream: the stored sizes of all data frames, each of which is one lz4
/// frame or several one after another. Four bytes for each lz4 frame, and eight for each stretch of
/// data frames that have equally many.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    sizes: Vec<u32>,
    /// How many sizes each of so many data frames has.
    runs: Vec<(u32, u32)>,
    /// Where the next data frame's sizes begin, and what is left of the first run that is not used
    /// up.
    at: usize,
    run: usize,
    left: u32,
}

impl Sizes {
    /// The places of the next data frame's sizes.
    pub(super) fn next(&mut self) -> Option<Range<usize>> {
        while self.left == 0 {
            self.left = self.runs.get(self.run)?.1;
            self.run += 1;
        }
        self.left -= 1;
        let start = self.at;
        self.at += self.runs[self.run - 1].0 as usize;
        Some(start..self.at)
    }

    /// The size at one of those places.
    pub(super) fn size(&self, place: usize) -> u32 {
        self.sizes[place]
    }

    /// Ends a data frame, whose sizes are those since `start`.
    fn end_frame(&mut self, start: usize) -> Option<()> {
        let count = u32::try_from(self.sizes.len() - start).ok().filter(|n| *n > 0)?;
        match self.runs.last_mut() {
            Some((per_frame, frames)) if *per_frame == count && *frames < u32::MAX => *frames += 1,
            _ => self.runs.push((count, 1)),
        }
        Some(())
    }
}

impl<'de> Deserialize<'de> for Sizes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        let mut sizes = Sizes::default();
        d.deserialize_seq(Frames(&mut sizes))?;
        Ok(sizes)
    }
}

/// The list of data frames. The list may be long, so nothing of it is kept but numbers.
struct Frames<'a>(&'a mut Sizes);

impl<'de> Visitor<'de> for Frames<'_> {
    type Value = ();

    fn expecting(&self, f: &mut Formatter) -> std::fmt::Result {
        f.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        while list.next_element_seed(OneFrame(self.0))?.is_some() {}
        Ok(())
    }
}

/// One data frame: a size, or `{"total": [sizes]}`.
struct OneFrame<'a>(&'a mut Sizes);

impl<'de> DeserializeSeed<'de> for OneFrame<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OneFrame<'_> {
    type Value = ();

    fn expecting(&self, f: &mut Formatter) -> std::fmt::Result {
        f.write_str("a size or sizes with their sum")
    }

    fn visit_u64<E: serde::de::Error>(self, size: u64) -> std::result::Result<(), E> {
        let start = self.0.sizes.len();
        self.0.sizes.push(u32::try_from(size).map_err(E::custom)?);
        self.0.end_frame(start).ok_or_else(|| E::custom("no size"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let start = self.0.sizes.len();
        let wrong = || serde::de::Error::custom("the sizes contradict themselves");
        let total: Option<String> = map.next_key()?;
        let sum = map.next_value_seed(Chunks(self.0))?;
        let agrees = total.and_then(|t| t.parse().ok()) == Some(sum);
        if !agrees || map.next_key::<IgnoredAny>()?.is_some() {
            return Err(wrong());
        }
        self.0.end_frame(start).ok_or_else(wrong)
    }
}

/// The lz4 frames of one data frame; yields the sum of their sizes.
struct Chunks<'a>(&'a mut Sizes);

impl<'de> DeserializeSeed<'de> for Chunks<'_> {
    type Value = u64;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<u64, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Chunks<'_> {
    type Value = u64;

    fn expecting(&self, f: &mut Formatter) -> std::fmt::Result {
        f.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<u64, A::Error> {
        let mut sum = 0u64;
        while let Some(size) = list.next_element::<u32>()? {
            sum = sum.saturating_add(size.into());
            self.0.sizes.push(size);
        }
        Ok(sum)
    }
}

/// Reads the trailer of a compressed stream; returns it and where its text begins.
///
/// # Errors
/// `Truncated`, `Corrupt` or `Io`; without the file's name.
pub(super) fn read_trailer(storage: &dyn ReadAt) -> Result<(Sizes, u64)> {
    let at = storage.len().saturating_sub(HEADER);
    let frame = Frame::read(storage, at)?;
    let text_at = at.checked_sub(TERM).and_then(|end| end.checked_sub(frame.len));
    let Some(text_at) = text_at.filter(|_| frame.kind == Kinds::Comp && frame.start == 0) else {
        return Err(corrupt(at, "the stream does not end with the sizes of its data"));
    };
    if frame.len > MAX_TRAILER {
        let what = format!("{} bytes of sizes are more than a stream has", frame.len);
        return Err(corrupt(text_at, what));
    }
    expect_term(storage, at - TERM)?;
    let text = BufReader::new(Section::new(storage, text_at, at - TERM));
    let sizes = serde_json::from_reader(text).map_err(|e| match e.is_io() {
        true => Error::io(e.into(), "cannot read the sizes of the data").at_offset(text_at),
        false => corrupt(text_at, "the sizes of the data are damaged").with_source(e),
    })?;
    Ok((sizes, text_at))
}

fn read_text(storage: &dyn ReadAt, at: u64, len: u64, limit: u64) -> Result<Vec<u8>> {
    if len > limit {
        return Err(corrupt(at, format!("{len} bytes of text are more than a stream has")));
    }
    if storage.len().saturating_sub(at) < len {
        return Err(cut(at, "the stream ends inside its metadata"));
    }
    let mut text = vec![0; len as usize];
    storage.read_exact_at(&mut text, at)?;
    Ok(text)
}

/// Checks for the CR LF at `at`.
///
/// # Errors
/// Something else is there.
pub(super) fn expect_term(storage: &dyn ReadAt, at: u64) -> Result<()> {
    let mut term = [0; TERM as usize];
    storage.read_exact_at(&mut term, at)?;
    if term == *b"\r\n" { Ok(()) } else { Err(corrupt(at, "a frame does not end where it should")) }
}

/// Something contradicts the format at `at`.
pub(super) fn corrupt(at: u64, what: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, what)
        .at_offset(at)
        .remedy("restore this file from another copy of the backup")
}

/// The stream ends too early.
pub(super) fn cut(at: u64, what: impl Into<String>) -> Error {
    Error::new(Kind::Truncated, what)
        .at_offset(at)
        .remedy("restore this file from another copy of the backup")
}
