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
/// Looks at the structure of every file, at how the files of a chain fit together, at every
/// compressed cluster, and compares each file with the hash in its manifest. Without a manifest
/// with a hash, nobody can tell whether plain data is what was written: such points are "could not
/// tell", unless something is found wrong. Nothing is repaired; each finding says what to do.
///
/// The exit code is 0 if all points are sound, 18 if one is unsound, 19 if none is unsound and of
/// one it could not be told.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// Structure and chain only: reads no data, and says nothing about it
    #[arg(long)]
    quick: bool,
    #[arg(long, help = POINT_HELP)]
    point: Option<PathBuf>,
    /// Only points since then: a date, a time (UTC, as they are shown), or an age such as 7d, 12h, 3w. Of
    /// what they lie on, structure and chain are checked
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    /// Write manifests with hashes for points that have none, so that later changes are found.
    /// Points that may lack something (after an unfinished backup, for one) are left out
    #[arg(long, conflicts_with = "quick")]
    create: bool,
    /// With --create: the format of files whose names say raw and whose contents say qcow2 (or which
    /// have no such name, and name other files), and of which no manifest says what they are; each
    /// of them, or that of --point, gets a manifest that says so from now on
    #[arg(long, value_enum, requires = "create")]
    format: Option<FileFormat>,
    /// Threads; as many as processors if left out
    #[arg(short, long, default_value = "0", hide_default_value = true)]
    jobs: usize,
    /// Print the whole report as JSON
    #[arg(long)]
    json: bool,
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
    output::print(&if args.json { output::json_pretty(&report)? } else { text(&report) })?;
    match report.outcome {
        Outcome::Sound => Ok(()),
        Outcome::Unsound => {
            Err(Error::new(Kind::Unsound, "the backup is unsound").at_path(&args.dir))
        }
        Outcome::Unproven => {
            let what = "nothing is known to be wrong, but not everything could be proved";
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
    for p in report.points.iter().filter(|p| p.outcome != Outcome::Sound) {
        output::push_line(&mut out, line(p));
    }
    let count = |o| report.points.iter().filter(|p| p.outcome == o).count();
    output::push_line(
        &mut out,
        format!(
            "{} sound, {} unsound, {} could not tell{}",
            count(Outcome::Sound),
            count(Outcome::Unsound),
            count(Outcome::Unproven),
            if report.quick { " (structure and chain only)" } else { "" },
        ),
    );
    let recorded = report.points.iter().filter(|p| p.recorded).count();
    if recorded > 0 {
        let written = counted(recorded as u64, "manifest");
        output::push_line(&mut out, format!("{written} written: from now on changes are found"));
    }
    out
}

fn line(p: &PointReport) -> String {
    let word = match p.outcome {
        Outcome::Sound => "sound",
        Outcome::Unproven => "could not tell",
        Outcome::Unsound => "UNSOUND",
    };
    let path = path_text(&p.disk.join(&p.point));
    match &p.reason {
        Some(r) => format!("{word}: {path}: {r}"),
        None => format!("{word}: {path}"),
    }
}
