//! `fleecefs diff`: ranges of the disk.

use std::io::{BufWriter, Write};

use super::super::paths::catalog;
use super::super::verbosity;
use super::args::DiffArgs;
use super::points::{Which, open_both, point_json, point_text};
use crate::error::{Error, Result};
use crate::image::{Cache, Change, Image};
use crate::units::{counted, human_bytes};
use crate::{output, text};

/// Shows them.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &DiffArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let (from, to) = (catalog.find(&args.from)?, catalog.find(&args.to)?);
    let (a, b) = open_both(from, to, &Cache::new(args.cache_size))?;
    let mut unread = None;
    let printed = output::written(|out| {
        let out = BufWriter::new(out.lock());
        let mut shown = Shown { args, out, ranges: 0, bytes: 0 };
        shown.all((from, &a), (to, &b)).map(|failed| unread = failed)
    });
    unread.map_or(printed, Err)
}

/// Writes ranges while they are found: there may be any number of them.
struct Shown<'a, W> {
    args: &'a DiffArgs,
    out: W,
    ranges: u64,
    bytes: u64,
}

impl<W: Write> Shown<'_, W> {
    /// The result is the output's; inside is what could not be read.
    fn all(
        &mut self,
        (from, a): (Which<'_>, &Image),
        (to, b): (Which<'_>, &Image),
    ) -> std::io::Result<Option<Error>> {
        self.begin(from, to)?;
        let (mut done, exact) = (Ok(()), self.args.exact);
        let each = |change: Change| {
            done = self.row(&change);
            done.is_ok()
        };
        let all = 0..a.size().max(b.size());
        let walked = match exact {
            true => a.for_each_difference(b, all, each),
            false => a.for_each_change(b, all, each),
        };
        done?;
        let failed = walked.err();
        self.end(a.size().max(b.size()), failed.as_ref())?;
        self.out.flush()?;
        Ok(failed)
    }

    fn begin(&mut self, from: Which<'_>, to: Which<'_>) -> std::io::Result<()> {
        if self.args.print.json {
            let (from, to) = (text::json(&point_json(from))?, text::json(&point_json(to))?);
            let (version, exact) = (output::JSON_VERSION, self.args.exact);
            return write!(
                self.out,
                "{{\"format_version\":{version},\"from\":{from},\"to\":{to},\"exact\":{exact},\"ranges\":["
            );
        }
        writeln!(self.out, "{} -> {}", point_text(from), point_text(to))?;
        if verbosity::is_verbose() {
            writeln!(self.out, "{}", line(["Offset", "Length", "From", "To"]))?;
        }
        Ok(())
    }

    fn row(&mut self, change: &Change) -> std::io::Result<()> {
        let first = self.ranges == 0;
        self.ranges += 1;
        self.bytes += change.length;
        if self.args.print.json {
            let between = if first { "\n" } else { ",\n" };
            return write!(self.out, "{between}{}", text::json(change)?);
        }
        if !verbosity::is_verbose() {
            return Ok(());
        }
        let (start, length) = (format!("{:#x}", change.start), format!("{:#x}", change.length));
        let word = |content| format!("{content:?}").to_lowercase();
        writeln!(self.out, "{}", line([&start, &length, &word(change.from), &word(change.to)]))
    }

    fn end(&mut self, size: u64, failed: Option<&Error>) -> std::io::Result<()> {
        if self.args.print.json {
            write!(self.out, "\n],\"bytes\":{},\"size\":{size}", self.bytes)?;
            if let Some(e) = failed {
                write!(self.out, ",\"error\":{}", text::json(&e.object())?)?;
            }
            return writeln!(self.out, "}}");
        }
        if failed.is_some() {
            return Ok(());
        }
        let verb = match (self.args.exact, self.ranges) {
            (true, 1) => "differs",
            (true, _) => "differ",
            (false, _) => "may differ",
        };
        let share = self.bytes as f64 * 100.0 / size.max(1) as f64;
        writeln!(
            self.out,
            "{} in {} {verb}: {share:.1} % of {}",
            human_bytes(self.bytes),
            counted(self.ranges, "range"),
            human_bytes(size)
        )
    }
}

/// One line of the table.
fn line([offset, length, from, to]: [&str; 4]) -> String {
    format!("{offset:<18}{length:<18}{from:<12}{to}")
}
