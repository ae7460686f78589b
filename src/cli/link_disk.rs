//! `fleecefs link-disk`: the points of a renamed disk and those under its new name become one history.

use std::path::PathBuf;

use clap::Args;

use super::bar::Bar;
use super::output;
use super::paths::{backups, catalog};
use super::prune::find_disk;
use super::writing::locked;
use crate::chain::Catalog;
use crate::error::{Kind, Result};
use crate::prune::join::{self, Joining};
use crate::text::path_text;
use crate::units::counted;

/// Join the points of a renamed disk with those under its new name
///
/// A disk that got another name (its file was renamed, or it was restored elsewhere) begins a new folder,
/// and its old points stay under the old name. This makes one disk of both: the old points get
/// names like the new ones, with the times that they have, and 'list', 'mount', 'prune' and 'backup' see
/// one history. The next INC goes on from the newest point. Nothing is copied.
///
/// It is refused where both have points of the same time or of one run (they are two disks then), where
/// size or device differ or the VM does (unless you say so), where the newest point is one of OLD, and
/// for chains that 'rebase' has linked. A mount shows the points under their new names at once; whoever
/// has one of the old ones open reads on. Broken off at any time, no point is lost, and the same command
/// goes on.
#[derive(Debug, Args)]
pub struct LinkDiskArgs {
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
    /// Print what would be done and stop
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Print what is done as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `fleecefs link-disk`.
///
/// # Errors
/// `NotFound` if there is no such disk, `Busy` if a backup is running, or why they are not joined.
pub fn run(args: LinkDiskArgs) -> Result<()> {
    if args.dry_run {
        let plan = plan(&catalog(&args.dir)?, &args)?;
        return show(&plan, &args);
    }
    // Before a lock is made there.
    backups(&args.dir)?;
    let (catalog, _locks) = locked(&args.dir)?;
    let plan = plan(&catalog, &args)?;
    join::execute(&plan, &catalog, &Bar::default())?;
    show(&plan, &args)
}

fn plan(catalog: &Catalog, args: &LinkDiskArgs) -> Result<Joining> {
    let new = find_disk(catalog, &args.new)?;
    match find_disk(catalog, &args.old) {
        Err(e) if e.kind() == Kind::NotFound && join::is_joined(&args.old, new) => {
            Ok(Joining::done(&args.old, new))
        }
        old => join::plan(old?, new, args.other_vm, args.force),
    }
}

fn show(plan: &Joining, args: &LinkDiskArgs) -> Result<()> {
    if args.json {
        return output::print(&output::json_pretty(plan)?);
    }
    let mut out = String::new();
    for p in &plan.points {
        let (from, to) = (path_text(&plan.old.join(&p.from)), path_text(&plan.new.join(&p.to)));
        output::push_line(&mut out, format!("{from} -> {to}"));
    }
    let new = path_text(&plan.new);
    match plan.points.len() {
        0 => output::push_line(&mut out, format!("the points are those of {new} already")),
        n => output::push_line(&mut out, format!("{} to {new}", counted(n as u64, "point"))),
    }
    if args.dry_run {
        out += super::UNCHANGED;
    }
    output::print(&out)
}
