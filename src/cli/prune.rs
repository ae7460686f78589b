//! `fleecefs prune`: retention.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;

use super::bar::Bar;
use super::keep::KeepArgs;
use super::paths::{backups, catalog};
use super::recorded::Recorded;
use super::state::StateArgs;
use super::verbosity;
use super::writing::locked;
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::history::Entry;
use crate::prune::plan::{DiskPlan, Plan, PlanOptions, Rules, plan};
use crate::prune::reason::Reason;
use crate::prune::{CanMerge, items};
use crate::rewrite::consolidate;
use crate::rewrite::consolidate::ConsolidateOptions;
use crate::rewrite::remove::execute;
use crate::text::path_text;
use crate::units::{counted, human_bytes};
use crate::{folder, manifest, output};

/// Delete old points by retention rules
///
/// Each rule keeps, per disk, the newest point of each of the newest N days (weeks, ...) that have one.
/// Days and weeks are those of this machine's time zone; times are shown in UTC. A point is kept if any
/// rule keeps it. Also kept: what a kept point needs, the newest point, the last complete run, and the
/// other disks' points of a run that is kept. What is gone has a rule of its own, --keep-gone: a disk of which its
/// VM's newest backup knows nothing.
///
/// Nothing is deleted of a disk whose newest point is missing, damaged (by structure and manifests, as
/// 'verify --quick' checks them), or not verified (no manifest), unless --force is given. The exit code is
/// 16 if this kept points of some disks that no rule keeps, 19 if of all.
#[derive(Debug, Args)]
pub(super) struct PruneArgs {
    /// The backup directory
    pub dir: PathBuf,
    #[command(flatten)]
    keep: KeepArgs,
    /// Shorten chains whose oldest points are kept only because newer ones need them: they become
    /// one new FULL
    #[arg(long)]
    consolidate: bool,
    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Delete even if the newest point is damaged or not verified, and points that cannot be restored
    #[arg(long)]
    force: bool,
    /// Print the plan as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub state: StateArgs,
    #[command(flatten)]
    work: super::work::WorkArgs,
}

/// Runs `fleecefs prune`.
///
/// # Errors
/// `Usage` without a rule, `Busy` if a backup is running, or what deleting says.
pub(super) fn run(args: PruneArgs) -> Result<()> {
    let dir = Some(args.dir.as_path());
    let run = Recorded { command: "prune", dir, state: &args.state, dry_run: args.dry_run };
    run.run(|entry| act(&args, entry))
}

fn act(args: &PruneArgs, entry: &mut Entry) -> Result<()> {
    let rules = args.keep.rules();
    if rules.is_empty() {
        return Err(verbosity::usage(
            "no --keep-... rule was given (--keep-gone is one for what is gone alone); give at least one of 1 or more",
        ));
    }
    if args.dry_run {
        let catalog = catalog(&args.dir)?;
        catalog.check_any()?;
        let plan = make(&catalog, &rules, args)?;
        show(&plan, args.json, true)?;
        return verdict(&plan);
    }
    // Nothing is made, not even a lock, where there is nothing: it may be a mount point.
    check_not_empty(&args.dir)?;
    let (catalog, locks) = locked(&args.dir)?;
    catalog.check_any()?;
    let plan = make(&catalog, &rules, args)?;
    if args.json || !verbosity::is_quiet() {
        show(&plan, args.json, false)?;
    }
    // Whoever runs it by cron does not read the plan.
    let mut text = String::new();
    for why in held(&plan).iter().filter(|_| !verbosity::is_silent()) {
        let line = format!("warning: nothing deleted: {why} (override with --force)");
        output::push_line(&mut text, line);
    }
    output::tell(&text);
    execute(&catalog, &plan, &Bar::default())?;
    for disk in &plan.disks {
        let gone = disk.points.iter().filter(|p| p.keep.is_empty());
        gone.for_each(|p| entry.add_point(&disk.disk, &p.point, None));
    }
    // Each consolidation takes them again.
    drop(locks);
    for disk in &plan.disks {
        for until in &disk.consolidate {
            // The JSON document is the whole of the output.
            let how = ConsolidateOptions { check: true, compare: true };
            let quiet = args.json || verbosity::is_quiet();
            super::consolidate::one(&args.dir, &disk.disk, until, how, quiet, &args.work)?;
        }
    }
    verdict(&plan)
}

/// Prunes the directory `dir` by these rules without a word on standard output; gives how many points went,
/// and their bytes.
///
/// # Errors
/// See [`run`].
pub(super) fn quietly(dir: &Path, rules: &Rules) -> Result<(u64, u64)> {
    let (catalog, _locks) = locked(dir)?;
    let options = PlanOptions { force: false, merge: None };
    let plan = plan(&items(&catalog)?, rules, &jiff::tz::TimeZone::system(), options);
    execute(&catalog, &plan, &())?;
    if let Err(e) = verdict(&plan) {
        let why = held(&plan).into_iter().collect::<Vec<_>>().join("; ");
        log::warn!("{}: {}: {why}", path_text(dir), e.message());
    }
    Ok((plan.deleted().count() as u64, plan.freed()))
}

/// Fails for a directory without anything in it.
fn check_not_empty(dir: &Path) -> Result<()> {
    let root = backups(dir)?;
    let failed = |e| Error::io(e, "cannot read the backup directory").at_path(&root);
    let mut names = folder::entries(&root).map_err(failed)?.into_iter().map(|e| e.name);
    if names.any(|n| n != "lost+found" && n != manifest::FOLDER) {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "no backup in this directory")
        .at_path(&root)
        .remedy("is its file system mounted?"))
}

/// `Partial` where nothing may be deleted of some disks, `Unproven` where of none.
fn verdict(plan: &Plan) -> Result<()> {
    // A point that is kept for nothing else would have gone.
    let alone = |keep: &[Reason]| keep.iter().all(|r| matches!(r, Reason::Held(_)));
    let is_held =
        |disk: &&DiskPlan| disk.points.iter().any(|p| !p.keep.is_empty() && alone(&p.keep));
    let held = plan.disks.iter().filter(is_held).count();
    if held == 0 {
        return Ok(());
    }
    let kind = if held < plan.disks.len() { Kind::Partial } else { Kind::Unproven };
    let all = counted(plan.disks.len() as u64, "disk");
    let what = format!("no points deleted from {held} of {all}");
    Err(Error::new(kind, what).remedy("the reasons are above; override with --force"))
}

fn make(catalog: &Catalog, rules: &Rules, args: &PruneArgs) -> Result<Plan> {
    let index = args.consolidate.then(|| consolidate::Index::of(catalog));
    let can_merge = |disk: usize, point: usize, gone: &BTreeSet<usize>| {
        let Some(index) = &index else { return Ok(()) };
        let planned = consolidate::plan_at(index, &catalog.disks[disk], point, gone);
        planned.map(drop).map_err(|e| e.report())
    };
    let merge: Option<&CanMerge> = args.consolidate.then_some(&can_merge as &CanMerge);
    let options = PlanOptions { force: args.force, merge };
    Ok(plan(&items(catalog)?, rules, &jiff::tz::TimeZone::system(), options))
}

fn show(plan: &Plan, as_json: bool, dry_run: bool) -> Result<()> {
    match as_json {
        true => output::print(&output::json_document(plan)?),
        false => output::print_sentences(&text(plan, dry_run)),
    }
}

/// Why nothing of some disks may be deleted, each reason once.
fn held(plan: &Plan) -> BTreeSet<&str> {
    let reasons = plan.disks.iter().flat_map(|d| &d.points).flat_map(|p| &p.keep);
    reasons
        .filter_map(|r| if let Reason::Held(why) = r { Some(why.as_str()) } else { None })
        .collect()
}

fn text(plan: &Plan, dry_run: bool) -> String {
    let mut out = String::new();
    for disk in &plan.disks {
        if let Some(gone) = &disk.gone {
            output::push_line(&mut out, format!("gone   {}  {gone}", path_text(&disk.disk)));
        }
        for p in &disk.points {
            let path = path_text(&disk.disk.join(&p.point));
            if p.keep.is_empty() {
                output::push_line(&mut out, format!("delete {path}  {}", human_bytes(p.bytes)));
                continue;
            }
            if let [Reason::MergedInto(until)] = p.keep.as_slice() {
                output::push_line(&mut out, format!("merge  {path}  into {}", path_text(until)));
                continue;
            }
            let word = |r: &Reason| match r {
                Reason::Held(_) => "nothing deleted (see below)".to_string(),
                other => other.to_string(),
            };
            let reasons: Vec<String> = p.keep.iter().map(word).collect();
            output::push_line(&mut out, format!("keep   {path}  {}", reasons.join(", ")));
        }
        for until in &disk.consolidate {
            let path = path_text(&disk.disk);
            output::push_line(
                &mut out,
                format!("new    {path}  {} becomes a FULL", path_text(until)),
            );
        }
        for u in &disk.not_consolidated {
            let path = path_text(&disk.disk.join(&u.until));
            output::push_line(&mut out, format!("stays  {path}  cannot become a FULL: {}", u.why));
        }
    }
    for why in held(plan) {
        output::push_line(&mut out, format!("nothing deleted: {why} (override with --force)"));
    }
    let count = plan.deleted().count();
    output::push_line(
        &mut out,
        format!("{} to delete, {}", counted(count as u64, "point"), human_bytes(plan.freed())),
    );
    let merged = plan.merged().count();
    if merged > 0 {
        output::push_line(
            &mut out,
            format!("{} to merge and delete", counted(merged as u64, "point")),
        );
    }
    if let Some(line) = not_freed(plan) {
        output::push_line(&mut out, line);
    }
    if dry_run {
        out += verbosity::UNCHANGED;
    }
    out
}

/// What the rules do not keep and is not freed all the same, since an INC needs all points before it.
fn not_freed(plan: &Plan) -> Option<String> {
    let count = plan.only_needed().count() as u64;
    let bytes = plan.only_needed().fold(0u64, |sum, p| sum.saturating_add(p.bytes));
    let tried = plan.disks.iter().any(|d| {
        let merges = !d.consolidate.is_empty() || !d.not_consolidated.is_empty();
        merges || d.points.iter().any(|p| p.keep.iter().any(|r| matches!(r, Reason::MergedInto(_))))
    });
    let remedy = if tried { "" } else { " (--consolidate frees what can be)" };
    let points = counted(count, "point");
    (count > 0).then(|| {
        let size = human_bytes(bytes);
        format!("{points} not freed, {size}: kept only because newer points need them{remedy}")
    })
}
