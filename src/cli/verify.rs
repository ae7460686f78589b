//! `fleecefs verify`: whether backups are sound, unsound, or nobody can tell.

use std::path::PathBuf;

use clap::Args;

use super::bar::Bar;
use super::paths::catalog_with_format;
use super::values::FileFormat;
use crate::chain::POINT_HELP;
use crate::chain::scan::FormatOverride;
use crate::error::{Error, Kind, Result, Severity};
use crate::manifest::ImageFormat;
use crate::output;
use crate::text::path_text;
use crate::units::{counted, parse_when};
use crate::verify::{Options, Outcome, PointReport, Report, asked, verify};

/// Check whether backups are sound
///
/// Checks the structure of every file, how the files of a chain fit together, and every compressed
/// cluster, and compares each file with the hash in its manifest. A point without a hash is "unproven"
/// unless an error is found: damage of plain data would not be noticed. Nothing is repaired; each finding
/// tells what to do.
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
    /// Only points since then: 2026-11-22, 2026-11-22T04:00 (UTC, or with +01:00), 7d, or @SECONDS; of their
    /// parents, structure and chain are checked
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Write manifests with hashes for points that have none, so that later changes are found; points that
    /// may be incomplete (such as after an interrupted backup) are skipped
    #[arg(long, conflicts_with = "quick")]
    create: bool,
    /// With --create: the format of files whose name and content disagree, or that have no such name and name another
    /// file, and that have no manifest (raw or qcow2); it is recorded for all of them, or for that of --point
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
}

/// Runs `fleecefs verify`.
///
/// # Errors
/// `Unsound` or `Unproven` as the report says; or the directory cannot be read.
pub(super) fn run(args: VerifyArgs) -> Result<()> {
    if args.create {
        super::writing::finish_what_is_left(&args.dir)?;
    }
    let format = args.format.map(|f| match f {
        FileFormat::Raw => ImageFormat::Raw,
        FileFormat::Qcow2 => ImageFormat::Qcow2,
    });
    let mut catalog = catalog_with_format(&args.dir, None)?;
    let mut options = Options {
        quick: args.quick,
        point: args.point,
        since: args.since,
        jobs: args.jobs,
        create: args.create,
        format_override: None,
    };
    if let Some(format) = format {
        options.format_override =
            Some(FormatOverride { format, files: asked(&catalog, &options)? });
        catalog = catalog_with_format(&args.dir, options.format_override.clone())?;
    }
    let report = verify(&catalog, &options, &Bar::default())?;
    output::print(&if args.json { output::json_document(&report)? } else { text(&report) })?;
    match report.outcome {
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

fn text(report: &Report) -> String {
    let mut out = String::new();
    let known = report.points.iter().flat_map(|p| p.findings.iter().map(move |f| (p, f)));
    let mut seen = std::collections::HashSet::new();
    for f in known.map(|(_, f)| f).chain(&report.findings).filter(|f| seen.insert(*f)) {
        let word = match f.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        output::push_line(&mut out, format!("{word}: {f}"));
    }
    // What has just been recorded is proved from now on.
    let is_new = |p: &&PointReport| p.recorded && p.outcome == Outcome::Unproven;
    for p in report.points.iter().filter(|p| p.outcome != Outcome::Sound && !is_new(p)) {
        output::push_line(&mut out, line(p));
    }
    let count = |o| report.points.iter().filter(|p| p.outcome == o && !is_new(p)).count();
    output::push_line(
        &mut out,
        format!(
            "{} sound, {} unsound, {} unproven{}",
            count(Outcome::Sound),
            count(Outcome::Unsound),
            count(Outcome::Unproven),
            if report.quick { " (structure and chain only)" } else { "" },
        ),
    );
    let recorded = report.points.iter().filter(|p| p.recorded).count();
    if recorded > 0 {
        let points = counted(recorded as u64, "point");
        output::push_line(&mut out, format!("{points} recorded: later changes will be found"));
    }
    out
}

fn line(p: &PointReport) -> String {
    let word = match p.outcome {
        Outcome::Sound => "sound",
        Outcome::Unproven => "unproven",
        Outcome::Unsound => "UNSOUND",
    };
    let path = path_text(&p.disk.join(&p.point));
    match &p.reason {
        Some(r) => format!("{word}: {path}: {r}"),
        None => format!("{word}: {path}"),
    }
}
