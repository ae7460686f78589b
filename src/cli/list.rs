//! `fleecefs list`: what is in a backup directory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::findings;
use super::health::{self, Boots, Health};
use super::paths::catalog;
use super::runs;
use super::state::StateArgs;
use super::table::{Row, Table, level_name};
use super::verbosity;
use crate::chain::{Catalog, Disk, Point, run_gaps};
use crate::error::{Error, Finding, Kind, Result, Severity};
use crate::layout::Level;
use crate::manifest::Achieved;
use crate::output;
use crate::output::{Line, Look};
use crate::text::{path_text, shown_as, to_text};
use crate::units::{as_time, counted, human_bytes, iso_time, parse_when};
use crate::verify::last_verified::{LastBoot, LastVerified, Memory};

/// Show the disks, chains and points of a backup directory
///
/// Each row is a point: one state of one disk that can be mounted or restored. Points that are not
/// available are listed too, with the reason; findings follow.
///
/// SIZE is the disk's size, OWN what the point's file takes. STATE is what 'fleecefs verify' found when you last ran
/// it: 'verified 2d ago', 'unproven', or 'UNSOUND'. It is 'changed' if the files were written to since, and 'ok' if
/// the data was never verified: 'list' itself reads headers only. Behind it stands when 'fleecefs boot --check' last
/// started a test VM from the point ('booted 2d ago', 'NOT BOOTED').
///
/// CONSISTENCY is how the guest was prepared: 'paused' (stopped for the whole backup), 'file-system' (its
/// file systems were frozen), 'application' (and commands in the guest prepared its applications), 'crash' (like after a power cut), 'offline' (the VM was shut off), or 'unknown'
/// (there is no manifest). Columns for which 80 characters are too few are omitted; -v shows all.
///
/// With --runs each row is a backup run: the time to give to 'restore --run', its disks, and those
/// that are missing. All times are in UTC.
///
/// The exit code is 0 if the directory could be read, whatever was found in it; with --strict it is
/// 12 if there is no backup, if a point is not available, if the newest backup of a disk is missing, or if
/// something was skipped: a folder that cannot be read, a link that leads out of the directory.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// Only this disk, by its path in the table or the last part of that
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,
    /// Only points since then: 2026-11-22, 2026-11-22T04:00 (UTC, or with +01:00), 7d, or @SECONDS
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Only points up to then
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    until: Option<i64>,
    /// Show backup runs (all points that were made together), the newest first
    #[arg(long)]
    runs: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Exit with code 12 if a point is not available, if a disk's newest backup is missing, if there is no
    /// backup, or if something was skipped
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    pub state: StateArgs,
}

/// Runs `fleecefs list`.
///
/// # Errors
/// The directory cannot be read; with `--strict` also `Incomplete`.
pub(super) fn run(args: ListArgs) -> Result<()> {
    let mut catalog = catalog(&args.dir)?;
    let gaps = run_gaps(&catalog);
    catalog.findings.extend(gaps);
    let health = health_of(&catalog, &health::memory(&args.state, &catalog));
    let boots = Boots::of(&args.state, &catalog);
    let shown = Shown { catalog: &catalog, args: &args, health, boots };
    if let Some(name) = args.disk.as_ref().filter(|_| shown.disks().next().is_none()) {
        return Err(catalog.no_disk(Path::new(name)));
    }
    match (args.runs, args.json) {
        (true, _) => {
            let points: Vec<_> = shown.points().map(|(d, i)| (d, i, shown.health(d, i))).collect();
            let all = args.disk.is_none();
            runs::show(&catalog, (&points, &shown.boots), all, args.json)?;
        }
        (false, true) => output::print(&json(&shown)?)?,
        (false, false) => output::print_lines(&table(&shown, verbosity::is_verbose()))?,
    }
    let lost = points(&catalog).filter(|(_, p)| !p.is_served()).count();
    if args.strict && lost > 0 {
        let all = counted(points(&catalog).count() as u64, "point");
        let what = format!("not available: {lost} of {all}");
        return Err(Error::new(Kind::Incomplete, what).at_path(&catalog.root));
    }
    if args.strict && catalog.disks.is_empty() {
        let what = "no backup in this directory";
        return Err(Error::new(Kind::Incomplete, what)
            .at_path(&catalog.root)
            .remedy("is its file system mounted?"));
    }
    match catalog.disks.iter().find_map(Disk::newest_missing) {
        Some(file) if args.strict => {
            Err(Error::new(Kind::Incomplete, "the newest backup is missing").at_path(file))
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
    let what = format!("not everything could be read: {}{more}", first.message);
    Err(Error::new(Kind::Incomplete, what).at_path(&first.path))
}

/// What of a catalog the user wants to see.
struct Shown<'a> {
    catalog: &'a Catalog,
    args: &'a ListArgs,
    health: HashMap<PathBuf, Vec<Health>>,
    boots: Boots,
}

/// How each point of each disk stands.
fn health_of(catalog: &Catalog, memory: &Memory) -> HashMap<PathBuf, Vec<Health>> {
    let of = |d: &Disk| {
        let all = d.points.iter().zip(memory.of(d));
        (d.path.clone(), all.map(|(point, last)| Health::of(point, last)).collect())
    };
    catalog.disks.iter().map(of).collect()
}

impl<'a> Shown<'a> {
    fn health(&self, disk: &Disk, point: usize) -> Health {
        let known = self.health.get(&disk.path).and_then(|all| all.get(point));
        known.copied().unwrap_or_else(|| Health::of(&disk.points[point], None))
    }

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

/// Titles of the columns; those of [`LESS`] are shown where there is room for them, or with `-v`.
const TITLES: &[&str] = &["POINT", "TIME", "LEVEL", "SIZE", "OWN", "CONSISTENCY", "STATE"];

/// What goes first: names begin with the level, and the size stands in the heading.
const LESS: &[&str] = &["LEVEL", "SIZE", "CONSISTENCY", "OWN"];

fn table(shown: &Shown<'_>, wide: bool) -> Vec<Line> {
    let catalog = shown.catalog;
    let now = jiff::Timestamp::now().as_second();
    let mut rows = Vec::new();
    for disk in shown.disks().filter(|d| shown.of(d).next().is_some()) {
        rows.push(Row::Heading(heading(shown, disk)));
        for (i, p) in shown.of(disk) {
            let health = shown.health(disk, i);
            let state = match wide && p.is_served() {
                true => health.text(p),
                false => health.word(now),
            };
            let state = shown.boots.get(disk, i).behind(state, now);
            rows.push(Row::Cells(cells(p, state), health.look()));
            if !p.is_served() {
                rows.push(Row::Below(health.text(p), health.look()));
            }
        }
    }
    let mut lines = match rows.is_empty() {
        true => vec![Line::new(Look::Plain, format!("no backups in {}", path_text(&catalog.root)))],
        false => {
            let right = &["SIZE", "OWN"];
            Table { titles: TITLES, right, less: LESS, indent: 2, rows }.lines(wide)
        }
    };
    lines.extend(health::notes(shown.points().map(|(d, i)| shown.health(d, i))));
    add_findings(&mut lines, catalog);
    lines
}

/// The disk, how large it is now, and how many points it has.
fn heading(shown: &Shown<'_>, disk: &Disk) -> String {
    let points = counted(shown.of(disk).count() as u64, "point");
    let size = shown.of(disk).filter(|(_, p)| p.size > 0).last();
    let size = size.map(|(_, p)| format!("{}, ", human_bytes(p.size))).unwrap_or_default();
    format!("{}: {size}{points}", path_text(&disk.path))
}

fn cells(p: &Point, state: String) -> Vec<String> {
    let size = if p.size == 0 && !p.is_served() { "-".into() } else { human_bytes(p.size) };
    vec![
        path_text(&p.name),
        iso_time(p.time),
        level_name(p.level).into(),
        size,
        human_bytes(p.own_bytes),
        Achieved::word(p.consistency).into(),
        state,
    ]
}

fn add_findings(lines: &mut Vec<Line>, catalog: &Catalog) {
    let all = catalog.findings.iter().chain(catalog.disks.iter().flat_map(|d| &d.findings));
    for (i, finding) in all.enumerate() {
        if i == 0 {
            lines.extend([Line::new(Look::Plain, ""), Line::new(Look::Bold, "findings:")]);
        }
        lines.push(findings::line(finding, Some(&catalog.root), 2));
    }
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
    disk: String,
    points: Vec<PointJson<'a>>,
    findings: &'a [Finding],
}

#[derive(Serialize)]
struct PointJson<'a> {
    point: &'a str,
    file: String,
    level: Level,
    chain: Option<&'a str>,
    parent: Option<&'a str>,
    #[serde(serialize_with = "as_time")]
    time: i64,
    size: u64,
    own_bytes: u64,
    /// `crash`, `file-system`, `application`, `paused`, `offline` or `unknown`.
    consistency: &'static str,
    served: bool,
    health: String,
    /// Whether `verify` has read its data as it is now.
    checked: bool,
    /// What it found.
    verified: Option<LastVerified>,
    /// What `boot --check` found.
    booted: Option<LastBoot>,
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
    output::json_document(&value)
}

fn disk_json<'a>(shown: &Shown<'a>, disk: &'a Disk) -> DiskJson<'a> {
    let name_of = |i: usize| disk.points.get(i).map(|p| p.name.as_str());
    DiskJson {
        disk: to_text(disk.path.as_os_str()),
        findings: &disk.findings,
        points: shown
            .of(disk)
            .map(|(i, p)| PointJson {
                parent: p.parent.and_then(name_of),
                point: &p.name,
                file: to_text(p.source.as_os_str()),
                level: p.level,
                chain: (!p.chain.is_empty()).then_some(p.chain.as_str()),
                time: p.time,
                size: p.size,
                own_bytes: p.own_bytes,
                consistency: Achieved::word(p.consistency),
                served: p.is_served(),
                health: shown.health(disk, i).text(p),
                checked: shown.health(disk, i).is_checked(),
                verified: shown.health(disk, i).verified(),
                booted: shown.boots.get(disk, i).json(),
                unavailable: p.unavailable.as_ref(),
            })
            .collect(),
    }
}
