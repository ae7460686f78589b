//! `fleecefs health`: whether all is well with backup directories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::config_file::{ConfigFileArgs, Program};
use super::paths;
use super::state::StateArgs;
use super::table::{Row, Table, level_name};
use super::verbosity;
use crate::backup::state::journal;
use crate::backup::target::reachable;
use crate::config::{Config, Problem, Vm};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, FileMode};
use crate::health::{DirectoryHealth, DiskHealth, Known, Status, metrics, nagios, survey, worst};
use crate::history;
use crate::output::{self, Line, Look};
use crate::qmp::timeout::answer_timeout;
use crate::text::{path_text, visible};
use crate::units::{age, human_bytes, parse_duration};
use crate::verify::Outcome;

/// Show whether all is well with backup directories: a line for each disk, and what is not well
///
/// AGE is how long ago the newest point was made that can be restored, CHAIN how many points it is made of, STORED what
/// all points of the disk take; VERIFIED and BOOTED are when 'fleecefs verify' last read a point of the disk, and
/// 'fleecefs boot --check' last started a test VM from one. Nothing of the points' data is read.
///
/// Not well are: a newest point that is missing, damaged or older than --max-age; what 'verify' or 'boot --check' found;
/// a last backup that failed (see 'fleecefs history'); what is wrong with the configuration, if no directory is named; a backup that was killed and not yet cleaned up; findings as
/// 'fleecefs list' has them. What runs did, and what was verified, is known of this user's own runs.
///
/// The exit code is 0 if all is well, 19 if there are warnings, 18 if there are errors; with --nagios it is 0, 1 or 2, and
/// 3 if nothing can be told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs health                                      all configured VMs
  fleecefs health /backups/vm1 /backups/vm2 --max-age 26h
  fleecefs health /backups --max-age 26h --nagios      for Nagios, Icinga
  fleecefs health /backups --metrics /var/lib/node/fleecefs.prom")]
pub(super) struct HealthArgs {
    /// The backup directories [default: those of the configured VMs, with their 'max_age']
    #[arg(value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    #[command(flatten)]
    file: ConfigFileArgs,
    /// How old the newest point of each disk may be (26h, 8d)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    max_age: Option<u64>,
    /// Answer as a check of Nagios, Icinga or Zabbix does, with its exit codes
    #[arg(long, conflicts_with = "json")]
    pub nagios: bool,
    /// Also write metrics for Prometheus to this file, which its node_exporter reads: it is replaced as a whole, and
    /// everybody may read it
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub state: StateArgs,
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Printed<'a> {
    status: Status,
    directories: &'a [DirectoryHealth],
}

/// Runs `fleecefs health`, and gives the exit code of `--nagios`.
///
/// # Errors
/// `Unsound` if there are errors, `Unproven` if there are warnings; the metrics cannot be written.
pub(super) fn run(args: &HealthArgs, program: Program) -> Result<ExitCode> {
    let now = jiff::Timestamp::now().as_second();
    let wanted = wanted(args, program)?;
    let mut all: Vec<DirectoryHealth> = wanted.problems.iter().map(of_problems).collect();
    all.extend(look(args, &wanted.directories, now));
    if let Some(file) = &args.metrics {
        write_metrics(file, &metrics::text(&all, now))?;
    }
    if args.nagios {
        let (text, code) = nagios::answer(&all, args.max_age);
        return output::print(&text).map(|()| ExitCode::from(code));
    }
    let status = worst(all.iter().map(|d| d.status));
    match args.json {
        true => {
            output::print(&output::json_document(&Printed { status, directories: &all })?)?;
        }
        false => {
            let mut shown = lines(&all, now, verbosity::is_verbose());
            let note = |n: &String| Line::sentence(Look::Plain, format!("note: {n}"));
            shown.extend(wanted.notes.iter().map(note));
            output::print_lines(&shown)?;
        }
    }
    match status {
        Status::Ok => Ok(ExitCode::SUCCESS),
        Status::Warning => Err(Error::new(Kind::Unproven, "not all is well: there are warnings")),
        Status::Error => Err(Error::new(Kind::Unsound, "not all is well: there are errors")),
    }
}

/// What is to be looked at.
#[derive(Default)]
struct Wanted {
    /// Backup directories, and how old their newest points may be, in seconds.
    directories: Vec<(PathBuf, Option<u64>)>,
    /// What is wrong with the configuration, by file: VMs that are lost there are not backed up.
    problems: BTreeMap<PathBuf, Vec<Problem>>,
    /// What somebody who looks at it may want to know, and is nothing bad.
    notes: Vec<String>,
}

/// The directories that are named, or those of the configured VMs.
fn wanted(args: &HealthArgs, program: Program) -> Result<Wanted> {
    if !args.dirs.is_empty() {
        let directories = args.dirs.iter().map(|dir| (dir.clone(), args.max_age)).collect();
        return Ok(Wanted { directories, ..Wanted::default() });
    }
    let config = args.file.load(program).map_err(without_any)?;
    let notes = notes(&config, args.max_age);
    let enabled = config.vms.iter().filter(|vm| vm.is_enabled());
    let of = |vm: &Vm| Some((vm.target()?.to_path_buf(), args.max_age.or(vm.max_age())));
    let mut found: Vec<_> = enabled.filter_map(of).collect();
    // Several VMs may share one: the shortest limit holds.
    found.sort_by_key(|(dir, age)| (dir.clone(), age.unwrap_or(u64::MAX)));
    found.dedup_by(|a, b| a.0 == b.0);
    let mut problems: BTreeMap<PathBuf, Vec<Problem>> = BTreeMap::new();
    for problem in config.problems {
        problems.entry(problem.place.path.clone()).or_default().push(problem);
    }
    if found.is_empty() && problems.is_empty() {
        let what = "no VM with a target in the configuration";
        return Err(Error::new(Kind::Usage, what).remedy("name backup directories"));
    }
    Ok(Wanted { directories: found, problems, notes })
}

/// What is told of a configuration that is right.
fn notes(config: &Config, max_age: Option<u64>) -> Vec<String> {
    let mut notes = config.notes.clone();
    let is_open = |vm: &&Vm| vm.is_enabled() && max_age.or(vm.max_age()).is_none();
    let open: Vec<&str> = config.vms.iter().filter(is_open).map(|vm| vm.name.as_str()).collect();
    if !open.is_empty() {
        let names = open.join(", ");
        notes.push(format!("without 'max_age' points never are too old: {names}"));
    }
    notes
}

/// A file of the configuration stands like a directory, so that whoever watches those sees it.
fn of_problems((file, problems): (&PathBuf, &Vec<Problem>)) -> DirectoryHealth {
    let text = |p: &Problem| match p.place.line {
        0 => visible(&p.message),
        line => format!("line {line}, column {}: {}", p.place.column, visible(&p.message)),
    };
    DirectoryHealth::wrong(file, problems.iter().map(text))
}

/// What is said where there is neither a directory nor a configuration.
fn without_any(e: Error) -> Error {
    if e.kind() != Kind::NotFound {
        return e;
    }
    let text = format!("{}, and no backup directory is named", e.message());
    let said = Error::new(Kind::NotFound, text).remedy(
        "name backup directories, or configure VMs: see nightly.md in contrib/doc or \
             /usr/share/doc/fleecefs",
    );
    match e.path() {
        Some(path) => said.at_path(path),
        None => said,
    }
}

/// Looks at all directories. One that cannot be read is trouble like any other.
fn look(args: &HealthArgs, wanted: &[(PathBuf, Option<u64>)], now: i64) -> Vec<DirectoryHealth> {
    let state = args.state.dir();
    if let Err(e) = &state {
        log::warn!("cannot read the history: {}", e.report());
    }
    let state = state.ok();
    let history = state.as_deref().map(history::read).unwrap_or_else(|| Ok(Default::default()));
    let history = history.unwrap_or_else(|e| {
        log::warn!("cannot read the history: {}", e.report());
        Default::default()
    });
    let interrupted = state.as_deref().map_or_else(|| Ok(Vec::new()), journal::interrupted);
    let (state, history, interrupted) = (state.as_deref(), &history, &interrupted);
    let silent = silent(wanted);
    let one = |(dir, max_age): &(PathBuf, Option<u64>)| match answering(dir, &silent) {
        Ok(root) => {
            let known = Known { state, history, interrupted, now, max_age: *max_age };
            survey(&root, &paths::catalog(dir), &known)
        }
        Err(e) => DirectoryHealth::unreadable(dir, &e),
    };
    wanted.iter().map(one).collect()
}

/// How long a server may take to answer: whoever watches waits for all of them.
const PATIENCE: Duration = Duration::from_secs(5);
/// Directories that are asked for side by side.
const AT_ONCE: usize = 64;

/// Those that do not answer. A server that hangs must not hold up whoever watches many.
fn silent(wanted: &[(PathBuf, Option<u64>)]) -> BTreeSet<&Path> {
    let is_silent = |dir: &Path| {
        let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
        let patience = PATIENCE.min(answer_timeout());
        let asked = reachable::check_answers_within(&absolute, patience);
        asked.inspect_err(|e| log::info!("{}", e.report())).is_err()
    };
    let mut silent = BTreeSet::new();
    for some in wanted.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let ask = |(dir, _): &'_ (PathBuf, _)| {
                let dir = dir.clone();
                let thread = std::thread::Builder::new();
                thread.spawn_scoped(scope, move || is_silent(&dir)).ok()
            };
            let asked: Vec<_> = some.iter().map(ask).collect();
            for ((dir, _), thread) in some.iter().zip(asked) {
                // Where no thread can be made it is asked here.
                let answer = thread.and_then(|t| t.join().ok());
                if answer.unwrap_or_else(|| is_silent(dir)) {
                    silent.insert(dir.as_path());
                }
            }
        });
    }
    silent
}

/// The directory without links, if it answers.
fn answering(dir: &Path, silent: &BTreeSet<&Path>) -> Result<PathBuf> {
    if silent.contains(dir) {
        let what = "its file system does not answer";
        return Err(Error::new(Kind::Timeout, what).at_path(dir));
    }
    paths::backups(dir)
}

/// Everybody may read it: node_exporter runs as a user of its own.
fn write_metrics(file: &Path, text: &str) -> Result<()> {
    let path = paths::to_make(file)?;
    let share = FileMode { mode: Some(0o644), group: None };
    let failed = |e| Error::io(e, "cannot write the metrics").at_path(&path);
    // A device or a pipe would be replaced like a file.
    let there = folder::absent_is_none(folder::look(&path)).map_err(failed)?;
    if there.is_some_and(|meta| !meta.is_file()) {
        let what = "cannot write the metrics: it is no plain file";
        return Err(Error::new(Kind::Usage, what).at_path(&path).remedy("name a file"));
    }
    folder::write_shared(&path, text.as_bytes(), share).map_err(failed)
}

/// Titles of the columns; those of [`LESS`] go first where there is no room.
const TITLES: &[&str] =
    &["DISK", "AGE", "LEVEL", "CONSISTENCY", "VERIFIED", "BOOTED", "CHAIN", "STORED", "STATE"];
const LESS: &[&str] = &["LEVEL", "CONSISTENCY", "CHAIN"];

fn lines(all: &[DirectoryHealth], now: i64, wide: bool) -> Vec<Line> {
    let mut rows = Vec::new();
    for dir in all {
        rows.push(Row::Heading(heading(dir)));
        for t in &dir.trouble {
            rows.push(Row::Below(format!("{}: {}", t.status.word(), t.text), look_of(t.status)));
        }
        for disk in &dir.disks {
            rows.push(Row::Cells(cells(disk, now), look_of(disk.status)));
            let gone = disk.gone.iter().map(|g| Row::Below(g.to_string(), Look::Plain));
            rows.extend(gone);
            let below = disk.trouble.iter();
            rows.extend(below.map(|t| Row::Below(t.text.clone(), look_of(t.status))));
        }
    }
    let right = &["CHAIN", "STORED"];
    Table { titles: TITLES, right, less: LESS, indent: 2, rows }.cut("DISK", wide).lines(wide)
}

fn look_of(status: Status) -> Look {
    match status {
        Status::Ok => Look::Plain,
        Status::Warning => Look::Yellow,
        Status::Error => Look::Red,
    }
}

fn heading(dir: &DirectoryHealth) -> String {
    let path = path_text(&dir.directory);
    match dir.free_bytes {
        Some(free) => format!("{path}: {}, {} free", dir.status.word(), human_bytes(free)),
        None => format!("{path}: {}", dir.status.word()),
    }
}

fn cells(disk: &DiskHealth, now: i64) -> Vec<String> {
    let none = || "-".to_string();
    let newest = disk.newest.as_ref();
    let ago = |time: i64| age(now.saturating_sub(time));
    let verified = disk.verified.map(|v| match v.outcome {
        Outcome::Sound => ago(v.time),
        Outcome::Unproven => format!("unproven {}", ago(v.time)),
        Outcome::Unsound => format!("UNSOUND {}", ago(v.time)),
    });
    let booted = disk.booted.map(|b| match b.passed {
        true => ago(b.time),
        false => format!("NOT {}", ago(b.time)),
    });
    vec![
        path_text(&disk.disk),
        newest.map_or_else(none, |n| age(n.age_seconds)),
        newest.map_or_else(none, |n| level_name(n.level).into()),
        newest.map_or_else(none, |n| n.consistency.into()),
        verified.unwrap_or_else(none),
        booted.unwrap_or_else(none),
        disk.chain_points.to_string(),
        human_bytes(disk.stored_bytes),
        match disk.is_gone() && disk.status == Status::Ok {
            true => "gone".into(),
            false => disk.status.word().into(),
        },
    ]
}
