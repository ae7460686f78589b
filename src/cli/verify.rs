//! `fleecefs verify`: whether backups are sound, unsound, or nobody can tell.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;

use super::bar::Bar;
use super::findings;
use super::paths::catalog_with_format;
use super::recorded::Recorded;
use super::state::StateArgs;
use super::values::FileFormat;
use crate::chain::scan::FormatOverride;
use crate::chain::{Catalog, POINT_HELP};
use crate::error::{Error, Kind, Result};
use crate::history::Entry;
use crate::manifest::ImageFormat;
use crate::output::{self, Line, Look, systemd};
use crate::text::path_text;
use crate::units::{counted, parse_duration, parse_when};
use crate::verify::last_verified::{Memory, remember, remember_rolling, wait_for_clock};
use crate::verify::rolling::due;
use crate::verify::{Options, Outcome, PointReport, Report, requested, verify};

/// Check whether backups are sound
///
/// Checks the structure of every file, how the files of a chain fit together, and every compressed
/// cluster, and compares each file with the hash in its manifest. A point without a hash is "unproven"
/// unless an error is found: damage of plain data would not be noticed. Nothing is repaired; each finding
/// tells what to do. Without --create nothing is written to the backup directory; 'list' and 'show' show the results,
/// which are kept in the state folder.
///
/// The exit code is 0 if all points are sound, 18 if one is unsound, 19 if none is unsound and one is
/// unproven.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// Check structure and chain only, not the data
    #[arg(long)]
    quick: bool,
    #[arg(long, help = POINT_HELP)]
    point: Option<PathBuf>,
    /// Only points since then: 2026-11-22, 2026-11-22T04:00 (UTC, or with +01:00), 7d, or @SECONDS; for the points
    /// that they depend on, only structure and chain are checked
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Only so many points that all are read once in this time (30d), a run each night: those whose data was verified the
    /// longest ago, or never; of the points that they depend on, only structure and chain are checked, and of all
    /// others what the directory says
    #[arg(long, value_name = "DURATION", value_parser = period, conflicts_with_all = ["quick", "point", "since"])]
    rolling: Option<u64>,
    /// Write manifests with hashes for points that have none, so that later changes are found; points that
    /// may be incomplete (such as after an interrupted backup) are skipped
    #[arg(long, conflicts_with = "quick")]
    create: bool,
    /// With --create: record this format for files without a manifest whose format is not certain: the name says raw
    /// and the content looks like qcow2, or there is no extension and the header names another file
    #[arg(long, value_enum, requires = "create")]
    format: Option<FileFormat>,
    /// Number of threads [default: one per processor]
    #[arg(
        long = "workers",
        alias = "jobs",
        short_alias = 'j',
        value_name = "N",
        default_value = "0",
        hide_default_value = true
    )]
    jobs: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub state: StateArgs,
}

/// Runs `fleecefs verify`.
///
/// # Errors
/// `Unsound` or `Unproven` as the report says; or the directory cannot be read.
pub(super) fn run(args: VerifyArgs) -> Result<()> {
    let dir = Some(args.dir.as_path());
    let run = Recorded { command: "verify", dir, state: &args.state, dry_run: false };
    run.run(|entry| act(&args, entry))
}

fn act(args: &VerifyArgs, entry: &mut Entry) -> Result<()> {
    if args.create {
        super::writing::finish_what_is_left(&args.dir)?;
    }
    systemd::status(&format!("verifying {}", path_text(&args.dir)));
    let format = args.format.map(|f| match f {
        FileFormat::Raw => ImageFormat::Raw,
        FileFormat::Qcow2 => ImageFormat::Qcow2,
    });
    let mut catalog = catalog_with_format(&args.dir, None)?;
    let mut options = Options {
        quick: args.quick,
        point: args.point.clone(),
        since: args.since,
        only: None,
        jobs: args.jobs,
        create: args.create,
        format_override: None,
    };
    if let Some(format) = format {
        options.format_override =
            Some(FormatOverride { format, files: requested(&catalog, &options)? });
        catalog = catalog_with_format(&args.dir, options.format_override.clone())?;
    }
    let now = jiff::Timestamp::now().as_second();
    if let Some(period) = args.rolling {
        let memory = Memory::read(&args.state.dir()?, &catalog);
        options.only = Some(due(&catalog, &memory, now, period)?);
    }
    let since = if options.quick { SystemTime::now() } else { wait_for_clock(&catalog) };
    let report = verify(&catalog, &options, &Bar::default())?;
    let kept = remember_it(args, &catalog, &report, (now, since));
    for p in report.points.iter().filter(|p| p.outcome != Outcome::Sound && !p.recorded) {
        let why = p.reason.clone().unwrap_or_else(|| "unproven".into());
        entry.add_point(&p.disk, &p.point, Some(why));
    }
    match args.json {
        true => output::print(&output::json_document(&report)?)?,
        false => output::print_lines(&lines(&report))?,
    }
    match report.outcome {
        // The next run would read the same points.
        Outcome::Sound if args.rolling.is_some() => kept,
        Outcome::Sound => Ok(()),
        Outcome::Unsound => {
            Err(Error::new(Kind::Unsound, "the backup is unsound").at_path(&args.dir))
        }
        Outcome::Unproven => {
            let what = "no error found, but not everything can be verified";
            Err(Error::new(Kind::Unproven, what)
                .at_path(&args.dir)
                .remedy("'fleecefs verify --create' records hashes for points that have none"))
        }
    }
}

/// Keeps how it stands for `list`, and for the next `--rolling`. Where that is not possible the result is no worse.
fn remember_it(
    args: &VerifyArgs,
    catalog: &Catalog,
    report: &Report,
    (begun, since): (i64, SystemTime),
) -> Result<()> {
    let kept = args.state.dir().and_then(|dir| {
        remember(&dir, catalog, &report.checked, since)?;
        match args.rolling {
            Some(_) => remember_rolling(&dir, catalog, begun),
            None => Ok(()),
        }
    });
    if let Err(e) = &kept {
        log::info!("'list' will not show that this was verified: {}", e.report());
    }
    kept
}

/// A time in which everything is to be read.
fn period(text: &str) -> std::result::Result<u64, String> {
    match parse_duration(text)? {
        0 => Err("in no time nothing can be read".into()),
        seconds => Ok(seconds),
    }
}

fn lines(report: &Report) -> Vec<Line> {
    let mut out = Vec::new();
    let known = report.points.iter().flat_map(|p| p.findings.iter().map(move |f| (p, f)));
    let mut seen = std::collections::HashSet::new();
    for f in known.map(|(_, f)| f).chain(&report.findings).filter(|f| seen.insert(*f)) {
        out.push(findings::line(f, None, 0));
    }
    // What has just been recorded is proved from now on.
    let is_new = |p: &&PointReport| p.recorded && p.outcome == Outcome::Unproven;
    for p in report.points.iter().filter(|p| p.outcome != Outcome::Sound && !is_new(p)) {
        out.push(line(p));
    }
    let count = |o| report.points.iter().filter(|p| p.outcome == o && !is_new(p)).count();
    let recorded = report.points.iter().filter(|p| p.recorded).count();
    let sum = format!(
        "{} sound, {} unsound, {} unproven{}{}",
        count(Outcome::Sound),
        count(Outcome::Unsound),
        count(Outcome::Unproven),
        if recorded > 0 { format!(", {recorded} recorded") } else { String::new() },
        if report.quick { " (structure and chain only)" } else { "" },
    );
    out.push(Line::sentence(Look::Plain, sum));
    if recorded > 0 {
        let points = counted(recorded as u64, "point");
        let what = format!("the hashes of {points} were recorded: later changes will be found");
        out.push(Line::sentence(Look::Plain, what));
    }
    out
}

fn line(p: &PointReport) -> Line {
    let (word, look) = match p.outcome {
        Outcome::Sound => ("sound", Look::Plain),
        Outcome::Unproven => ("unproven", Look::Yellow),
        Outcome::Unsound => ("UNSOUND", Look::Red),
    };
    let path = path_text(&p.disk.join(&p.point));
    let reason = p.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
    Line::sentence(look, format!("{word}: {path}{reason}"))
}
