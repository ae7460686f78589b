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
use crate::live::mark;
use crate::output;
use crate::rewrite::join;
use crate::rewrite::join::JoinPlan;
use crate::text::path_text;
use crate::units::counted;

/// Join the points of a renamed disk with those under its new name
///
/// A disk that got another name (its file was renamed, or it was restored elsewhere) starts a new folder,
/// and its old points stay under the old name. This makes one disk of both: the old points are renamed like
/// the new ones and keep their times, and 'list', 'mount', 'prune' and 'backup' see one history. The next
/// INC continues from the newest point. Nothing is copied. What has an image's name and is not a plain file
/// is not moved, and reported (exit code 16).
///
/// It is refused if both have points of the same time or run (then they are two disks), if size, device
/// (--force) or VM (--other-vm) differ, if the newest point is one of OLD, and for chains that 'rebase' has
/// linked. A mount shows the points under their new names at once; open files can still be read. If it is
/// interrupted, no point is lost, and the next command that writes there finishes it.
#[derive(Debug, Args)]
pub(super) struct LinkDiskArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The disk's old name, as 'fleecefs list' shows it
    old: PathBuf,
    /// Its new name, under which it has already been backed up
    new: PathBuf,
    /// Join them also if their points are of different VMs
    #[arg(long)]
    other_vm: bool,
    /// Join them also if their sizes differ, or they are different devices of the VM
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    only: DryRunArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
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
    let locks = finished_but_links(&root)?;
    mark::check_none(&locks)?;
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
    Err(Error::new(Kind::Partial, what).remedy("see above; they were not moved"))
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
        return output::print(&output::json_document(plan)?);
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
        0 => output::push_line(&mut out, format!("these are already points of {new}")),
        n => output::push_line(&mut out, format!("{} to {new}", counted(n as u64, "point"))),
    }
    if args.only.dry_run {
        out += verbosity::UNCHANGED;
    }
    output::print_sentences(&out)
}
