//! The contents of files and of their streams.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::super::tree::{MAX_SIZE, NodeKind, OpenFile, Stretch};
use super::names::{on_disk, to_bytes};
use super::node::Node;
use super::record::kind;
use super::special::Special;
use super::stream::{Stream, TOO_LARGE};
use super::system::{self, System};
use super::volume::Volume;
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Bytes of a bitmap that are counted at once.
const COUNTED: usize = 1 << 20;

/// A plain file, or a stream of one.
pub(super) struct File {
    volume: Arc<Volume>,
    contents: Contents,
}

enum Contents {
    /// It has none at all.
    None,
    Stream(Stream),
    System(System),
}

impl File {
    /// Opens the contents, or the stream of this name.
    ///
    /// # Errors
    /// `Encrypted`, `Unsupported`, `Corrupt`, or what reading the point says.
    pub(super) fn new(
        volume: &Arc<Volume>,
        node: &Node,
        special: &Special,
        name: &[u8],
    ) -> Result<File> {
        let contents = match special {
            Special::System(method) => Contents::System(System::open(volume, node, *method)?),
            _ => match Stream::open(&volume.table, node, kind::DATA, name)? {
                Some(stream) => Contents::Stream(stream),
                None => Contents::None,
            },
        };
        Ok(File { volume: volume.clone(), contents })
    }
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        match &self.contents {
            Contents::None => 0,
            Contents::Stream(stream) => stream.size,
            Contents::System(system) => system.size,
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.volume.noted(match &self.contents {
            Contents::None => Ok(0),
            Contents::Stream(stream) => stream.read_at(buf, offset),
            Contents::System(system) => system.read_at(buf, offset),
        })
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        self.volume.noted(match &self.contents {
            Contents::None => Ok(None),
            Contents::Stream(stream) => stream.stretch(offset),
            Contents::System(system) => {
                let rest = Stretch { end: system.size, hole: false };
                Ok((offset < system.size).then_some(rest))
            }
        })
    }
}

/// Length in bytes, and bytes on disk, of a node of this kind or of a stream of it.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn sizes(
    volume: &Volume,
    node: &Node,
    special: &Special,
    kind: NodeKind,
    stream: &[u8],
) -> Result<(u64, u64)> {
    let of = |kind, name: &[u8]| {
        let found = node.first(&volume.table, kind, name, |a| (a.size(), a.allocated()))?;
        Ok::<_, Error>(found)
    };
    let index = on_disk("$I30");
    let sizes = match (kind, special) {
        (_, Special::Link(text)) => (text.len() as u64, 0),
        (NodeKind::Folder, _) => match of(kind::INDEX_ALLOCATION, &index)? {
            Some(sizes) => sizes,
            None => of(kind::INDEX_ROOT, &index)?.unwrap_or_default(),
        },
        (NodeKind::File, Special::System(_)) => {
            let (size, own) = of(kind::DATA, &[])?.unwrap_or_default();
            let (_, packed) = of(kind::DATA, &on_disk(system::STREAM))?.unwrap_or_default();
            (size, own.saturating_add(packed))
        }
        (NodeKind::File, _) => of(kind::DATA, stream)?.unwrap_or_default(),
        _ => (0, 0),
    };
    match sizes.0 > MAX_SIZE {
        true => Err(volume.bad(node, TOO_LARGE)),
        false => Ok(sizes),
    }
}

/// All of a stream, for an extended attribute; `None`, and a finding that names it, if it is longer than `max` or
/// cannot be read.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn value(
    volume: &Volume,
    node: &Node,
    name: &[u8],
    max: u64,
) -> Result<Option<Vec<u8>>> {
    let shown = path_text(OsStr::from_bytes(&to_bytes(name)));
    let size = node.first(&volume.table, kind::DATA, name, |a| a.size())?.unwrap_or(0);
    if size > max {
        let what = format!(
            "has the stream '{shown}' of {size} bytes, which is too long for an extended attribute"
        );
        let remedy =
            format!("read it as a file of its own: the file's path with ':{shown}' behind it");
        volume.odd(Kind::Unsupported, node, &what, Some(&remedy));
        return Ok(None);
    }
    match Stream::open(&volume.table, node, kind::DATA, name) {
        Ok(Some(stream)) => stream.read_all(max).map(Some),
        Ok(None) => Ok(None),
        Err(e) if matches!(e.kind(), Kind::Encrypted | Kind::Unsupported) => {
            let what = format!("has the stream '{shown}', which is not given: {}", e.message());
            volume.odd(e.kind(), node, &what, None);
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// How many of the first `bits` bits of a bitmap are set; `None` if it cannot be read.
pub(super) fn count(volume: &Volume, number: u64, kind: u32, bits: u64) -> Option<u64> {
    let stream = volume.noted(volume.stream(number, kind)).ok()?;
    let end = bits.div_ceil(8).min(stream.size);
    let (mut at, mut set, mut buf) = (0u64, 0u64, vec![0; COUNTED]);
    // More than there is would be the same bytes again.
    let mut left = volume.source().size();
    while at < end {
        // A hole of any length has none.
        let stretch = stream.stretch(at).ok()??;
        if stretch.hole {
            at = stretch.end;
            continue;
        }
        let n = (stretch.end.min(end) - at).min(COUNTED as u64) as usize;
        left = left.checked_sub(n as u64)?;
        let part = buf.get_mut(..n)?;
        stream.fill(part, at).ok()?;
        at += n as u64;
        // Those behind the last one are set, and stand for nothing.
        if let (Some(over), Some(last)) = ((at * 8).checked_sub(bits), part.last_mut()) {
            *last &= 0xff >> over.min(7);
        }
        set += part.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
    }
    Some(set)
}
