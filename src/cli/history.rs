//! `fleecefs history`: what each run did.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::paths;
use super::shared::JsonArgs;
use super::state::StateArgs;
use super::table::{Row, Table};
use super::verbosity;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::history::{self, Entry};
use crate::output::{self, Line, Look};
use crate::text::{path_text, to_text};
use crate::units::{counted, human_bytes, iso_time, parse_when};

/// Show what each run did
///
/// Each backup, prune, consolidate, verify, boot --check, restore and recover of this user leaves a line in the state
/// folder, whatever became of it; dry runs do not, nor does a run that was killed. The newest is the last. Some 10,000
/// runs are kept (8 MiB).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs history                           the newest 50 runs
  fleecefs history /backups/vm1 --failed     what failed there
  fleecefs history --since 7d -n 0 --json    all of a week, for scripts")]
pub(super) struct HistoryArgs {
    /// Only runs on this backup directory, and on those below it
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Only runs since then: 2026-11-22, 2026-11-22T04:00 (UTC, or with +01:00), 7d, or @SECONDS
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Only runs that ended with another exit code than 0
    #[arg(long)]
    failed: bool,
    /// Only the newest N runs; 0: all
    #[arg(short = 'n', long = "last", value_name = "N", default_value_t = 50)]
    last: usize,
    #[command(flatten)]
    pub print: JsonArgs,
    #[command(flatten)]
    pub state: StateArgs,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Printed<'a> {
    runs: &'a [&'a Entry],
    /// Lines that are damaged, or of another version.
    unreadable: usize,
}

/// Runs `fleecefs history`.
///
/// # Errors
/// The state folder cannot be read; `NotFound` for a directory that is not there and was not.
pub(super) fn run(args: &HistoryArgs) -> Result<()> {
    let state = args.state.dir()?;
    let all = history::read(&state)?;
    let dir = args.dir.as_deref().map(paths::to_make).transpose()?;
    if let Some(dir) = &dir {
        check_known(dir, &all.entries)?;
    }
    let is_wanted = |e: &&Entry| {
        (!args.failed || e.has_failed())
            && args.since.is_none_or(|since| e.time >= since)
            && dir.as_deref().is_none_or(|dir| is_below(e, dir))
    };
    let mut runs: Vec<&Entry> = all.entries.iter().filter(is_wanted).collect();
    if args.last > 0 {
        runs.drain(..runs.len().saturating_sub(args.last));
    }
    if args.print.json {
        let printed = Printed { runs: &runs, unreadable: all.unreadable };
        return output::print(&output::json_document(&printed)?);
    }
    if all.unreadable > 0 {
        let lines = counted(all.unreadable as u64, "line");
        log::info!("not readable in {}: {lines}", path_text(&state.join("history")));
    }
    output::print_lines(&lines(&runs, verbosity::is_verbose()))
}

/// Fails for a directory of which nothing is known and that is not there: its name may be mistyped.
fn check_known(dir: &Path, entries: &[Entry]) -> Result<()> {
    if folder::exists(dir) || entries.iter().any(|e| is_below(e, dir)) {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "no such directory, and no run on it in the history")
        .at_path(dir)
        .remedy("check the path; 'fleecefs history' shows those of all directories"))
}

/// Whether a run was on `dir` or on a directory below it.
fn is_below(entry: &Entry, dir: &Path) -> bool {
    let known = entry.directory.as_deref();
    known.is_some_and(|known| Path::new(known).starts_with(to_text(dir.as_os_str())))
}

/// Titles of the columns; those of [`LESS`] go first where there is no room.
const TITLES: &[&str] = &["TIME", "COMMAND", "VM", "DIRECTORY", "TOOK", "RESULT"];
const LESS: &[&str] = &["TOOK", "VM"];

fn lines(runs: &[&Entry], wide: bool) -> Vec<Line> {
    if runs.is_empty() {
        return vec![Line::new(Look::Plain, "no such run in the history")];
    }
    let mut rows = Vec::new();
    for run in runs {
        let look = if run.has_failed() { Look::Red } else { Look::Plain };
        rows.push(Row::Cells(cells(run), look));
        rows.extend(run.why().map(|text| Row::Below(text, look)));
    }
    let table = Table { titles: TITLES, right: &["TOOK"], less: LESS, indent: 0, rows };
    table.cut("DIRECTORY", wide).lines(wide)
}

fn cells(run: &Entry) -> Vec<String> {
    let vm = [&run.vm, &run.uuid].into_iter().flatten().next();
    let directory = run.directory.as_ref().or(run.qmp.as_ref());
    vec![
        iso_time(run.time),
        path_text(&run.command),
        vm.map_or_else(|| "-".into(), path_text),
        directory.map_or_else(|| "-".into(), path_text),
        format!("{:.1} s", run.seconds),
        result(run),
    ]
}

/// What came of it, in a few words.
fn result(run: &Entry) -> String {
    if run.has_failed() {
        return format!("{} ({})", path_text(&run.result), run.exit_code);
    }
    let copied: Vec<u64> = run.disks.iter().filter_map(|d| d.copied).collect();
    match copied.is_empty() {
        true => path_text(&run.result),
        false => {
            let bytes = copied.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
            format!("ok, {} of {}", human_bytes(bytes), counted(copied.len() as u64, "disk"))
        }
    }
}
