//! `fleecefs list`: what is in a backup directory.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::paths::catalog;
use super::runs;
use super::table::{level_name, write_rows};
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layout::Level;
use crate::manifest::Achieved;
use crate::output;
use crate::text::{path_text, shown_as, to_text, visible};
use crate::units::{human_bytes, iso_time, parse_when};

/// Show the disks, chains and points of a backup directory
///
/// Each row is a point: one state of one disk that can be mounted or restored. Points that cannot
/// be served are listed too, with the reason; findings follow the table.
///
/// CONSISTENCY is how much the guest knew of the backup: 'paused' (it stood still for all of it),
/// 'file-system' (its file systems were frozen), 'crash' (as after a power cut), or 'unknown' (no
/// manifest says).
///
/// Only headers are looked at: 'header ok' means that nothing speaks against the point, not that
/// its data was read. Use 'fleecefs verify' for that.
///
/// With --runs each row is a backup run: the time to give to 'restore --run', its disks, and those
/// that the run should have had and has not. All times are in UTC.
///
/// The exit code is 0 if the directory could be read, whatever was found in it; with --strict it is
/// 12 if there is no backup, if a point cannot be served, if the newest backup of a disk is gone, or if
/// something is not looked at: a folder that cannot be read, a link that leads out of the directory.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// Only this disk, by its path in the table or the last part of that
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    /// Only points since then: 2026-11-22, 2026-11-22T04:00, 7d, or @SECONDS. Times are UTC, as they are
    /// shown; +01:00 behind one says otherwise
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Only points up to then
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    until: Option<i64>,
    /// Show backup runs instead, the newest first: all points that were made together
    #[arg(long)]
    runs: bool,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Fail (exit code 12) if a point cannot be served, if a disk's newest backup is gone, if there is no
    /// backup, or if something is not looked at
    #[arg(long)]
    strict: bool,
}

/// What health says of a point of which only the headers were read.
const HEADER_OK: &str = "header ok, data not checked";

/// Runs `fleecefs list`.
///
/// # Errors
/// The directory cannot be read; with `--strict` also `Incomplete`.
pub(super) fn run(args: ListArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let shown = Shown { catalog: &catalog, args: &args };
    if let Some(name) = args.disk.as_ref().filter(|_| shown.disks().next().is_none()) {
        return Err(catalog.no_disk(Path::new(name)));
    }
    output::print(&match (args.runs, args.json) {
        (true, _) => runs::show(&catalog, &shown.points().collect::<Vec<_>>(), args.json)?,
        (false, true) => json(&shown)?,
        (false, false) => table(&shown),
    })?;
    let lost = points(&catalog).filter(|(_, p)| !p.is_served()).count();
    if args.strict && lost > 0 {
        let what = format!("{lost} of {} points cannot be served", points(&catalog).count());
        return Err(Error::new(Kind::Incomplete, what).at_path(&catalog.root));
    }
    if args.strict && catalog.disks.is_empty() {
        let what = "there is no backup in this directory";
        return Err(Error::new(Kind::Incomplete, what)
            .at_path(&catalog.root)
            .remedy("is its file system mounted?"));
    }
    match catalog.disks.iter().find_map(Disk::newest_missing) {
        Some(file) if args.strict => {
            Err(Error::new(Kind::Incomplete, "the newest backup is gone").at_path(file))
        }
        _ if args.strict => check_omissions(&catalog),
        _ => Ok(()),
    }
}

/// Fails if there is something that was not looked at. What a run at work leaves is no omission.
fn check_omissions(catalog: &Catalog) -> Result<()> {
    let is_one = |f: &&Finding| match f.severity {
        Severity::Error => true,
        Severity::Warning => f.kind != Kind::Incomplete,
        Severity::Note => false,
    };
    let Some(first) = catalog.findings.iter().find(is_one) else { return Ok(()) };
    let more = catalog.findings.iter().filter(is_one).count().saturating_sub(1);
    let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
    let what = format!("not everything was looked at: {}{more}", first.message);
    Err(Error::new(Kind::Incomplete, what).at_path(&first.path))
}

/// What of a catalog the user wants to see.
struct Shown<'a> {
    catalog: &'a Catalog,
    args: &'a ListArgs,
}

impl<'a> Shown<'a> {
    fn disks(&self) -> impl Iterator<Item = &'a Disk> {
        let wanted = self.args.disk.as_deref();
        let is = move |d: &&Disk| {
            let tail = Path::new(d.path.file_name().unwrap_or_default());
            wanted.is_none_or(|w| {
                [&d.path, tail].iter().any(|p| *p == Path::new(w) || shown_as(p, w))
            })
        };
        self.catalog.disks.iter().filter(is)
    }

    fn of(&self, disk: &'a Disk) -> impl Iterator<Item = (usize, &'a Point)> {
        let (since, until) = (self.args.since, self.args.until);
        let is_in = move |(_, p): &(usize, &Point)| {
            since.is_none_or(|t| p.time >= t) && until.is_none_or(|t| p.time <= t)
        };
        disk.points.iter().enumerate().filter(is_in)
    }

    fn points(&self) -> impl Iterator<Item = (&'a Disk, usize)> {
        self.disks().flat_map(|d| self.of(d).map(move |(i, _)| (d, i)))
    }
}

fn points(catalog: &Catalog) -> impl Iterator<Item = (&Disk, &Point)> {
    catalog.disks.iter().flat_map(|d| d.points.iter().map(move |p| (d, p)))
}

fn health(point: &Point) -> String {
    let Some(finding) = &point.unavailable else { return HEADER_OK.into() };
    if finding.path == point.source {
        return format!("unavailable: {}", finding.message);
    }
    let file = finding.path.file_name().map(path_text).unwrap_or_default();
    format!("unavailable: needs {file}")
}

fn table(shown: &Shown<'_>) -> String {
    let catalog = shown.catalog;
    let titles =
        ["DISK", "CHAIN", "POINT", "TIME", "LEVEL", "SIZE", "OWN", "CONSISTENCY", "HEALTH"];
    let mut rows = vec![titles.map(String::from)];
    rows.extend(shown.points().map(|(disk, i)| {
        let p = &disk.points[i];
        let size = if p.size == 0 && !p.is_served() { "-".into() } else { human_bytes(p.size) };
        [
            path_text(&disk.path),
            if p.chain.is_empty() { "-".into() } else { path_text(&p.chain) },
            path_text(&p.name),
            iso_time(p.time),
            level_name(p.level).into(),
            size,
            human_bytes(p.own_bytes),
            Achieved::word(p.consistency).into(),
            visible(&health(p)),
        ]
    }));
    let mut text = String::new();
    if rows.len() == 1 {
        let _ = writeln!(text, "no backups in {}", path_text(&catalog.root));
    } else {
        write_rows(&mut text, &rows, &[5, 6]);
    }
    write_findings(&mut text, catalog);
    text
}

fn write_findings(text: &mut String, catalog: &Catalog) {
    let findings = catalog.findings.iter().chain(catalog.disks.iter().flat_map(|d| &d.findings));
    for (i, finding) in findings.enumerate() {
        if i == 0 {
            let _ = writeln!(text, "\nfindings:");
        }
        let word = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let mut line = path_text(relative(catalog, &finding.path));
        if let Some(offset) = finding.offset {
            let _ = write!(line, " at offset {offset:#x}");
        }
        let _ = write!(line, ": {}", visible(&finding.message));
        if let Some(remedy) = &finding.remedy {
            let _ = write!(line, " ({})", visible(remedy));
        }
        output::push_line(text, format!("  {word}: {line}"));
    }
}

fn relative<'a>(catalog: &Catalog, path: &'a Path) -> &'a Path {
    path.strip_prefix(&catalog.root).ok().filter(|p| !p.as_os_str().is_empty()).unwrap_or(path)
}

/// The whole catalog for scripts. Paths that are not UTF-8 have `\xNN` in them.
#[derive(Serialize)]
struct CatalogJson<'a> {
    root: String,
    disks: Vec<DiskJson<'a>>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct DiskJson<'a> {
    path: String,
    points: Vec<PointJson<'a>>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct PointJson<'a> {
    name: &'a str,
    source: String,
    level: Level,
    chain: Option<&'a str>,
    parent: Option<&'a str>,
    /// Seconds since the epoch.
    time: i64,
    time_utc: String,
    size: u64,
    own_bytes: u64,
    /// `crash`, `file-system`, `paused`, `offline` or `unknown`.
    consistency: &'static str,
    served: bool,
    health: String,
    /// Whether its data was read; `list` never does.
    checked: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    unavailable: Option<&'a Finding>,
}

fn json(shown: &Shown<'_>) -> Result<String> {
    let catalog = shown.catalog;
    let value = CatalogJson {
        root: to_text(catalog.root.as_os_str()),
        disks: shown.disks().map(|d| disk_json(shown, d)).collect(),
        findings: &catalog.findings,
    };
    output::json_pretty(&value)
}

fn disk_json<'a>(shown: &Shown<'a>, disk: &'a Disk) -> DiskJson<'a> {
    let name_of = |i: usize| disk.points.get(i).map(|p| p.name.as_str());
    DiskJson {
        path: to_text(disk.path.as_os_str()),
        findings: &disk.findings,
        points: shown
            .of(disk)
            .map(|(_, p)| PointJson {
                parent: p.parent.and_then(name_of),
                name: &p.name,
                source: to_text(p.source.as_os_str()),
                level: p.level,
                chain: (!p.chain.is_empty()).then_some(p.chain.as_str()),
                time: p.time,
                time_utc: iso_time(p.time),
                size: p.size,
                own_bytes: p.own_bytes,
                consistency: Achieved::word(p.consistency),
                served: p.is_served(),
                health: health(p),
                checked: false,
                unavailable: p.unavailable.as_ref(),
            })
            .collect(),
    }
}
