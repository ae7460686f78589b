//! `fleecefs map`: the extents of a point, as `qemu-img map` shows them.

use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::paths::catalog;
use super::verbosity;
use crate::chain::POINT_HELP;
use crate::error::Result;
use crate::extent::Content;
use crate::image::{Cache, Image, MergedExtent, Source, open_point};
use crate::text::{path_text, to_text};
use crate::{output, text};

/// Show where the data of a point is: file, offset, and holes
///
/// The output is like that of 'qemu-img map'. In JSON, 'depth' counts images from the newest (0), 'present'
/// is false where no image has data, and 'error' is true where data cannot be read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs map /backups/vm1 sda/latest
  fleecefs map /backups/vm1 INC-1706260646-sda.qcow2 --json --max-length=1G")]
pub(super) struct MapArgs {
    /// The backup directory
    pub dir: PathBuf,
    #[arg(help = POINT_HELP)]
    point: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// As in 'qemu-img map'
    #[arg(long, value_enum, hide = true, conflicts_with = "json")]
    output: Option<Output>,
    /// First guest byte to show (K, M, G, T)
    #[arg(long, value_name = "BYTES", value_parser = crate::units::parse_bytes, default_value = "0")]
    start_offset: u64,
    /// How many guest bytes to show [default: the rest of the disk]
    #[arg(long, value_name = "BYTES", value_parser = crate::units::parse_bytes)]
    max_length: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Human,
    Json,
}

impl MapArgs {
    fn json(&self) -> bool {
        self.json || self.output == Some(Output::Json)
    }
}

/// One row of the JSON output.
#[derive(Debug, Serialize)]
struct Row {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    error: bool,
}

/// Memory for merged windows; `map` goes over each once.
const CACHE_BYTES: u64 = 16 << 20;

/// Runs `fleecefs map`.
///
/// # Errors
/// The directory or point cannot be read; output failed.
pub(super) fn run(args: MapArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let (disk, point) = catalog.find(&args.point)?;
    let image = open_point(disk, point, &Cache::new(CACHE_BYTES))?;
    let start = args.start_offset;
    if start > image.size() {
        let what = format!("--start-offset is beyond the end of the disk, {} bytes", image.size());
        return Err(verbosity::usage(what));
    }
    let end = args.max_length.map_or(image.size(), |n| start.saturating_add(n)).min(image.size());
    let mut unread = None;
    let printed = output::written(|out| {
        let out = BufWriter::new(out.lock());
        let mut rows = Rows { depth: image.depth(), image: &image, args: &args, out, any: false };
        rows.write(start..end).unwrap_or_else(|e| {
            unread = Some(e);
            Ok(())
        })
    });
    unread.map_or(printed, Err)
}

/// Writes rows while the image is being merged: a disk may have any number of them.
struct Rows<'a, W> {
    image: &'a Image,
    depth: usize,
    args: &'a MapArgs,
    out: W,
    /// Whether there was a row already.
    any: bool,
}

impl<W: Write> Rows<'_, W> {
    /// The outer result is the image's, the inner one the output's.
    fn write(&mut self, range: Range<u64>) -> Result<std::io::Result<()>> {
        let json = self.args.json();
        let mut done = match json {
            true => write!(self.out, "["),
            false => writeln!(self.out, "{}", line(["Offset", "Length", "Mapped to", "File"])),
        };
        // Extents are split at the borders of windows; only the last may go on.
        let mut last: Option<MergedExtent> = None;
        self.image.for_each_extent(range, |e| {
            if done.is_err() {
                return false;
            }
            match &mut last {
                Some(l) if l.content.continues(l.len, e.content) => l.len += e.len,
                Some(l) => done = self.row(&std::mem::replace(l, e)),
                None => last = Some(e),
            }
            done.is_ok()
        })?;
        if let Some(e) = last
            && done.is_ok()
        {
            done = self.row(&e);
        }
        if json && done.is_ok() {
            done = writeln!(self.out, "]");
        }
        Ok(done.and_then(|()| self.out.flush()))
    }

    fn row(&mut self, e: &MergedExtent) -> std::io::Result<()> {
        let row = row(self.image, self.depth, e);
        if self.args.json() {
            let between = if std::mem::replace(&mut self.any, true) { ",\n" } else { "" };
            return write!(self.out, "{between}{}", text::json(&row)?);
        }
        if !row.data {
            return Ok(());
        }
        let place = match (row.offset, row.compressed) {
            (Some(o), _) => format!("{o:#x}"),
            (None, true) => "(compressed)".into(),
            (None, false) => "(unreadable)".into(),
        };
        let (start, length) = (format!("{:#x}", row.start), format!("{:#x}", row.length));
        let file = file(self.image, e).map(path_text).unwrap_or_default();
        writeln!(self.out, "{}", line([&start, &length, &place, &file]))
    }
}

/// One line of the table.
fn line([offset, length, place, file]: [&str; 4]) -> String {
    format!("{offset:<18}{length:<18}{place:<18}{file}")
}

/// The file that an extent is in.
fn file<'a>(image: &'a Image, e: &MergedExtent) -> Option<&'a Path> {
    e.content.layer().map(|l| match e.content {
        Source::Data { file, .. } => image.file_path(l, file),
        _ => image.layer_path(l),
    })
}

fn row(image: &Image, depth: usize, e: &MergedExtent) -> Row {
    let layer = e.content.layer();
    let offset = match e.content {
        Source::Data { host, .. } => Some(host),
        _ => None,
    };
    Row {
        start: e.start,
        length: e.len,
        depth: layer.map_or(0, |l| depth - 1 - usize::from(l)),
        present: layer.is_some(),
        zero: e.content.is_hole(),
        data: !e.content.is_hole(),
        compressed: matches!(e.content, Source::Compressed { .. }),
        offset,
        file: file(image, e).map(|f| to_text(f.as_os_str())),
        error: matches!(e.content, Source::Bad { .. }),
    }
}
