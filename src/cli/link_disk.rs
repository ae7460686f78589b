//! `fleecefs link-disk`: the points of a renamed disk and those under its new name become one history.

use std::path::PathBuf;

use clap::Args;

use super::bar::Bar;
use super::paths::{backups, catalog};
use super::shared::DryRunArgs;
use super::verbosity;
use super::writing::finished_but_links;
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::output;
use crate::rewrite::join;
use crate::rewrite::join::JoinPlan;
use crate::text::path_text;
use crate::units::counted;

/// Join the points of a renamed disk with those under its new name
///
/// A disk that got another name (its file was renamed, or it was restored elsewhere) begins a new folder,
/// and its old points stay under the old name. This makes one disk of both: the old points get
/// names like the new ones, with the times that they have, and 'list', 'mount', 'prune' and 'backup' see
/// one history. The next INC goes on from the newest point. Nothing is copied. What has an image's name and
/// is no plain file stays where it is, and is told (exit code 16).
///
/// It is refused where both have points of the same time or of one run (they are two disks then), where
/// size or device differ or the VM does (unless you say so), where the newest point is one of OLD, and
/// for chains that 'rebase' has linked. A mount shows the points under their new names at once; whoever
/// has one of the old ones open reads on. Broken off at any time, no point is lost, and the next
/// command that writes there finishes it.
#[derive(Debug, Args)]
pub(super) struct LinkDiskArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The disk's old name, as 'fleecefs list' shows it
    old: PathBuf,
    /// Its new name, under which it has been backed up already
    new: PathBuf,
    /// Join them also if their points are of different VMs
    #[arg(long)]
    other_vm: bool,
    /// Join them also if their sizes differ, or they are different devices of the VM
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    only: DryRunArgs,
    /// Print what is done as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `fleecefs link-disk`.
///
/// # Errors
/// `NotFound` if there is no such disk, `Busy` if a backup is running, or why they are not joined.
pub(super) fn run(args: LinkDiskArgs) -> Result<()> {
    if args.only.dry_run {
        let plan = plan(&catalog(&args.dir)?, &args)?;
        return show(&plan, &args);
    }
    // Before a lock is made there.
    let root = backups(&args.dir)?;
    let _locks = finished_but_links(&root)?;
    // Its own is gone on with, by what the user says now.
    join::finish(&root, Some((&args.old, &args.new)), &Bar::default())?;
    let catalog = catalog(&args.dir)?;
    let plan = plan(&catalog, &args)?;
    join::execute(&plan, &catalog, &Bar::default())?;
    show(&plan, &args)?;
    let left = plan.left.len();
    if left == 0 {
        return Ok(());
    }
    let what = format!(
        "{} of '{}' not joined: not plain files",
        counted(left as u64, "image"),
        path_text(&plan.old)
    );
    Err(Error::new(Kind::Partial, what).remedy("see above; they are where they were"))
}

fn plan(catalog: &Catalog, args: &LinkDiskArgs) -> Result<JoinPlan> {
    let new = catalog.disk(&args.new)?;
    match catalog.disk(&args.old) {
        Err(e) if e.kind() == Kind::NotFound && join::is_joined(&args.old, new) => {
            JoinPlan::done(&catalog.root, &args.old, new)
        }
        old => join::plan(old?, new, args.other_vm, args.force),
    }
}

fn show(plan: &JoinPlan, args: &LinkDiskArgs) -> Result<()> {
    if args.json {
        return output::print(&output::json_pretty(plan)?);
    }
    let mut out = String::new();
    for p in &plan.points {
        let (from, to) = (path_text(&plan.old.join(&p.from)), path_text(&plan.new.join(&p.to)));
        output::push_line(&mut out, format!("{from} -> {to}"));
    }
    for path in &plan.left {
        output::push_line(&mut out, format!("left {}: not a plain file", path_text(path)));
    }
    let new = path_text(&plan.new);
    match plan.points.len() {
        0 => output::push_line(&mut out, format!("the points are those of {new} already")),
        n => output::push_line(&mut out, format!("{} to {new}", counted(n as u64, "point"))),
    }
    if args.only.dry_run {
        out += verbosity::UNCHANGED;
    }
    output::print(&out)
}
