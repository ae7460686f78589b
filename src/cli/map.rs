//! `fleecefs map`: the extents of a point, as `qemu-img map` shows them.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::chain::POINT_HELP;
use crate::chain::scan::{ScanOptions, scan};
use crate::error::Result;
use crate::extent::ExtentList;
use crate::image::{Cache, FoldedExtent, Image, Source, open_point};

/// Show where the bytes of a point are: which file, which offset, and what is a hole
///
/// The output follows 'qemu-img map'. In JSON, 'depth' counts layers from the newest (0), 'present'
/// is false where no layer has anything, and 'error' is true where the bytes cannot be read.
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The backup directory
    dir: PathBuf,
    #[arg(help = POINT_HELP)]
    point: PathBuf,
    /// Print a table for people, or JSON for scripts
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// First guest byte to show (K, M, G, T are understood)
    #[arg(long, value_parser = crate::units::parse_bytes, default_value = "0")]
    start_offset: u64,
    /// How many guest bytes to show; the rest of the disk if left out
    #[arg(long, value_parser = crate::units::parse_bytes)]
    max_length: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Human,
    Json,
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
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    error: bool,
}

/// Memory for folded windows; `map` goes over each once.
const CACHE_BYTES: u64 = 16 << 20;

/// Runs `fleecefs map`.
///
/// # Errors
/// The directory or point cannot be read; output failed.
pub fn run(args: MapArgs) -> Result<()> {
    let (catalog, _) = scan(&args.dir, &ScanOptions::default(), None)?;
    let (disk, point) = catalog.find(&args.point)?;
    let image = open_point(disk, point, &Cache::new(CACHE_BYTES))?;
    let start = args.start_offset.min(image.size());
    let end = args.max_length.map_or(image.size(), |n| start.saturating_add(n)).min(image.size());
    let mut extents = ExtentList::new(start);
    image.for_each_extent(start..end, |e| {
        extents.push(e.len, e.content);
        true
    })?;
    let rows: Vec<Row> = extents.as_slice().iter().map(|e| row(&image, e)).collect();
    super::print(&match args.output {
        Output::Json => json(&rows)?,
        Output::Human => table(&rows),
    })
}

fn row(image: &Image, e: &FoldedExtent) -> Row {
    let layer = e.content.layer();
    let offset = match e.content {
        Source::Data { host, .. } => Some(host),
        _ => None,
    };
    Row {
        start: e.start,
        length: e.len,
        depth: layer.map_or(0, |l| image.depth() - 1 - usize::from(l)),
        present: layer.is_some(),
        zero: e.content.is_hole(),
        data: !e.content.is_hole(),
        compressed: matches!(e.content, Source::Compressed { .. }),
        offset,
        file: layer.map(|l| match e.content {
            Source::Data { file, .. } => image.file_path(l, file).to_path_buf(),
            _ => image.layer_path(l).to_path_buf(),
        }),
        error: matches!(e.content, Source::Bad { .. }),
    }
}

fn json(rows: &[Row]) -> Result<String> {
    let lines: Vec<String> = rows
        .iter()
        .map(serde_json::to_string)
        .collect::<std::result::Result<_, _>>()
        .map_err(|e| super::usage(format!("cannot write JSON: {e}")))?;
    Ok(format!("[{}]\n", lines.join(",\n")))
}

fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<18}{:<18}{:<18}{}\n", "Offset", "Length", "Mapped to", "File");
    for r in rows.iter().filter(|r| r.data) {
        let place = match (r.offset, r.compressed) {
            (Some(o), _) => format!("{o:#x}"),
            (None, true) => "(compressed)".into(),
            (None, false) => "(unreadable)".into(),
        };
        let file = r.file.as_deref().map(|f| f.display().to_string()).unwrap_or_default();
        let (start, length) = (format!("{:#x}", r.start), format!("{:#x}", r.length));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{start:<18}{length:<18}{place:<18}{file}");
    }
    text
}
