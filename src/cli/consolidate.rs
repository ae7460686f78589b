//! `fleecefs consolidate`: the oldest part of a chain becomes one new FULL.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::bar::Bar;
use super::paths::catalog;
use super::recorded::Recorded;
use super::shared::{DryRunArgs, JsonArgs};
use super::state::StateArgs;
use super::verbosity;
use super::work::{WorkArgs, cancel_flag};
use super::writing::locked;
use crate::error::Result;
use crate::history::Entry;
use crate::output;
use crate::restore::Summary;
use crate::rewrite::consolidate::{ConsolidateOptions, Consolidation, consolidate, plan};
use crate::text::{path_text, to_text};
use crate::units::human_bytes;

/// Merge the oldest points of a chain into one new FULL
///
/// The FULL and all points up to --until become one FULL with that point's time in its name; the points
/// before it are deleted. Later points, and the bitmap in QEMU, continue from it. On XFS and btrfs data is
/// cloned instead of copied. The new image is read back and compared with the point before anything is
/// deleted.
///
/// If it is interrupted, either the old or the new chain is complete; the next command that writes there
/// finishes it or removes what it left.
#[derive(Debug, Args)]
pub(super) struct ConsolidateArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The disk, as 'fleecefs list' shows it
    disk: PathBuf,
    /// The last point to merge: its file name, or 'latest'
    #[arg(long, value_name = "POINT")]
    until: String,
    /// Check only the structure of the new image; do not read it back
    #[arg(long)]
    no_compare: bool,
    /// Do not compare the merged files with the hashes in their manifests first
    #[arg(long)]
    skip_check: bool,
    #[command(flatten)]
    only: DryRunArgs,
    #[command(flatten)]
    pub print: JsonArgs,
    #[command(flatten)]
    pub state: StateArgs,
    #[command(flatten)]
    work: WorkArgs,
}

const DONE: &str = "this point is already a FULL\n";

/// Runs `fleecefs consolidate`.
///
/// # Errors
/// `Usage` or `NotFound` for disk and point, `Busy` if a backup is running, or what reading and
/// writing say.
pub(super) fn run(args: ConsolidateArgs) -> Result<()> {
    let (dir, dry_run) = (Some(args.dir.as_path()), args.only.dry_run);
    let run = Recorded { command: "consolidate", dir, state: &args.state, dry_run };
    run.run(|entry| act(&args, entry))
}

fn act(args: &ConsolidateArgs, entry: &mut Entry) -> Result<()> {
    if args.only.dry_run {
        let catalog = catalog(&args.dir)?;
        let plan = plan(&catalog, catalog.disk(&args.disk)?, &args.until)?;
        if args.print.json {
            return as_json(&args.disk, plan.as_ref(), None);
        }
        let text = plan.as_ref().map_or(DONE.to_string(), text);
        return output::print_sentences(&(text + verbosity::UNCHANGED));
    }
    let how = ConsolidateOptions { check: !args.skip_check, compare: !args.no_compare };
    let done = one(&args.dir, &args.disk, &args.until, how, args.print.json, &args.work)?;
    if let Some((plan, _)) = &done {
        entry.add_point(&args.disk, &plan.image, None);
    }
    if !args.print.json {
        return Ok(());
    }
    let (plan, result) = done.unzip();
    as_json(&args.disk, plan.as_ref(), result.as_ref())
}

/// Prints what is to be done and what was; without a plan there was nothing to do.
fn as_json(disk: &Path, plan: Option<&Consolidation>, done: Option<&Summary>) -> Result<()> {
    let value = json!({
        "disk": to_text(disk.as_os_str()),
        "file": plan.map(|p| &p.image),
        "removes": plan.map(|p| p.remove.as_slice()).unwrap_or_default(),
        "relinks": plan.map(|p| p.children.as_slice()).unwrap_or_default(),
        "way": done.map(|s| s.method()),
        "result": done,
    });
    output::print(&output::json_document(&value)?)
}

/// Consolidates one chain, and gives what was planned and done, if anything; `quiet` prints nothing.
///
/// # Errors
/// See [`run`].
pub(super) fn one(
    dir: &Path,
    disk: &Path,
    until: &str,
    how: ConsolidateOptions,
    quiet: bool,
    work: &WorkArgs,
) -> Result<Option<(Consolidation, Summary)>> {
    let say = |text: &str| if quiet { Ok(()) } else { output::print_sentences(text) };
    let (catalog, _locks) = locked(dir)?;
    let disk = catalog.disk(disk)?;
    let Some(plan) = plan(&catalog, disk, until)? else { return say(DONE).map(|()| None) };
    say(&text(&plan))?;
    let (bar, cancel) = (Bar::default(), cancel_flag()?);
    let done = consolidate(disk, &plan, how, &work.work(&cancel, &bar))?;
    say(&format!(
        "{}: {} ({} copied, {} cloned)\n",
        path_text(&plan.image),
        done.method(),
        human_bytes(done.copied),
        human_bytes(done.cloned),
    ))?;
    Ok(Some((plan, done)))
}

fn text(plan: &Consolidation) -> String {
    let mut out = format!("new    {}\n", path_text(&plan.image));
    for name in &plan.remove {
        output::push_line(&mut out, format!("delete {}", path_text(name)));
    }
    for name in &plan.children {
        output::push_line(&mut out, format!("relink {}", path_text(name)));
    }
    out
}
