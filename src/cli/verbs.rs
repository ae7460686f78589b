//! `fleecefs rebase`, `commit`, `snapshot-rebase` and `merge`: qmprestore's verbs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;

use super::bar::Bar;
use super::paths::catalog;
use super::restore::check_outside;
use super::shared::ForceArgs;
use super::values::FileFormat;
use super::work::{WorkArgs, cancel_flag};
use super::writing::locked;
use super::{paths, verbosity};
use crate::chain::Catalog;
use crate::error::{Kind, Result};
use crate::image::{Cache, open_point};
use crate::layer::Format;
use crate::lock::Locks;
use crate::restore::{Options, Plan, Qcow2Options, Target};
use crate::rewrite::rebase::RebasePlan;
use crate::rewrite::{ChainSection, FlattenPlan, Newest, files};
use crate::text::path_text;
use crate::units::{counted, human_bytes};
use crate::{output, rewrite};

/// Options that all verbs have.
#[derive(Debug, Args)]
pub(super) struct VerbArgs {
    /// The folder with the images of a disk
    #[arg(value_name = "FOLDER")]
    dir: PathBuf,
    /// The last image to merge or link, by its file name [default: the newest]
    #[arg(long, value_name = "FILE")]
    until: Option<OsString>,
    /// Only images whose names contain this, for folders with several disks
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    filter: OsString,
    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not check the images before they are changed, nor compare the result
    #[arg(long)]
    skip_check: bool,
    #[command(flatten)]
    work: WorkArgs,
}

/// Link the images of a chain by backing pointers, so that QEMU opens a point directly
///
/// Changes the backup: the headers of the images change, and a link 'image' leads to the last one. The
/// points stay the same for fleecefs, and QEMU can open them. The pointers are relative, so the folder can
/// be moved; with --absolute it cannot, but qmprestore's merge works on it (run this again after a commit
/// or consolidate, which write relative ones). qmprestore's commit and snapshotrebase need images without
/// pointers, and fail after any rebase.
///
/// If it is interrupted, some images are linked and others are not, which does not matter for restoring.
/// Each header is saved before it is changed, and the next command that writes there restores it.
#[derive(Debug, Args)]
pub(super) struct RebaseArgs {
    #[command(flatten)]
    pub verb: VerbArgs,
    /// Write absolute pointers, as qmprestore does: the folder must not be moved then
    #[arg(long)]
    absolute: bool,
}

/// Merge increments into their FULL, up to the newest or to --until
///
/// Changes the backup: the FULL then has the state of the last merged image; the increments up to it, and
/// their states, are deleted. Later increments build on the FULL. As with qmprestore the FULL keeps its
/// name, with the time of its old state; 'list', by-time/ and --run use the time of the new one. ('consolidate'
/// renames it.)
///
/// The new FULL is made beside the old one, compared, and then replaces it. This needs as much free space
/// as the FULL and the largest increment (less on XFS and btrfs, where files are cloned). If it is
/// interrupted, no point is lost that was to stay, and the next command that writes there (also a backup)
/// finishes it. It is refused if other points depend on one of the increments.
#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    #[command(flatten)]
    pub verb: VerbArgs,
}

/// Merge increments into their FULL and keep each state as an internal snapshot
///
/// Like 'commit', but no state is lost: the FULL gets an internal snapshot of itself (FULL-BACKUP) and of
/// each increment, named by its local time (and a number, if there are two). 'qemu-img snapshot -a' goes
/// back to one.
#[derive(Debug, Args)]
pub(super) struct SnapshotRebaseArgs {
    #[command(flatten)]
    pub verb: VerbArgs,
}

/// Merge a chain into one new image file; the backup stays as it is
///
/// Like 'restore' of the newest point, or of --until, to a file in the FULL's format.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    #[command(flatten)]
    pub verb: VerbArgs,
    /// The new file
    target: PathBuf,
    /// The format of the new file [default: that of the FULL]
    #[arg(long, value_enum)]
    format: Option<FileFormat>,
    #[command(flatten)]
    over: ForceArgs,
}

/// Memory for merged windows.
const CACHE_BYTES: u64 = 256 << 20;

impl VerbArgs {
    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads the folder; if the verb alters anything, under the lock, and after what a killed run
    /// left is finished.
    fn catalog(&self, alters: bool) -> Result<(Catalog, Option<Locks>)> {
        if !alters || self.dry_run {
            return Ok((catalog(&self.dir)?, None));
        }
        locked(&self.dir).map(|(catalog, locks)| (catalog, Some(locks)))
    }

    fn line<'a>(&self, catalog: &'a Catalog, newest: Newest) -> Result<ChainSection<'a>> {
        rewrite::select(catalog, &self.filter, self.until.as_deref(), newest)
    }

    /// Tells that the backup is going to change, or, with --dry-run, prints the steps; whether to
    /// go on.
    fn announce(&self, steps: &[String]) -> Result<bool> {
        if self.dry_run {
            let mut text = String::new();
            steps.iter().for_each(|s| output::push_line(&mut text, s));
            output::print_sentences(&(text + verbosity::UNCHANGED))?;
            return Ok(false);
        }
        log::warn!("{}: this changes the backup itself", path_text(&self.dir));
        steps.iter().for_each(|s| log::info!("{s}"));
        Ok(true)
    }
}

/// Runs `fleecefs rebase`.
///
/// # Errors
/// See [`RebasePlan`].
pub(super) fn rebase(args: RebaseArgs) -> Result<()> {
    let (cancel, bar) = (cancel_flag()?, Bar::default());
    let work = args.verb.work.work(&cancel, &bar);
    let (catalog, _locks) = args.verb.catalog(true)?;
    let plan = RebasePlan::new(&args.verb.line(&catalog, Newest::OfChain)?, args.absolute)?;
    if !args.verb.announce(&plan.lines())? {
        return Ok(());
    }
    plan.execute(args.verb.skip_check, &work)?;
    output::print_sentences(&format!(
        "{} now links to the image of this point\n",
        path_text(&plan.link)
    ))
}

/// Runs `fleecefs commit`.
///
/// # Errors
/// See [`FlattenPlan`].
pub(super) fn commit(args: CommitArgs) -> Result<()> {
    merge_into_full(&args.verb, false)
}

/// Runs `fleecefs snapshot-rebase`.
///
/// # Errors
/// See [`FlattenPlan`].
pub(super) fn snapshot_rebase(args: SnapshotRebaseArgs) -> Result<()> {
    merge_into_full(&args.verb, true)
}

fn merge_into_full(verb: &VerbArgs, with_snapshots: bool) -> Result<()> {
    let (cancel, bar) = (cancel_flag()?, Bar::default());
    let work = verb.work.work(&cancel, &bar);
    let (catalog, _locks) = verb.catalog(true)?;
    let line = match verb.line(&catalog, Newest::OfChain) {
        Err(e) if e.kind() == Kind::NotFound => {
            let done =
                verb.until.as_ref().and_then(|u| rewrite::merged_into(&catalog, &verb.filter, u));
            let Some(full) = done else { return Err(e) };
            return output::print_sentences(&format!(
                "{} already has that state\n",
                path_text(&full)
            ));
        }
        line => line?,
    };
    let plan = FlattenPlan::new(&catalog, &line, with_snapshots)?;
    if plan.increments.is_empty() && !with_snapshots {
        return output::print_sentences("nothing to merge\n");
    }
    if !verb.announce(&plan.lines())? {
        return Ok(());
    }
    plan.execute(&line, verb.skip_check, &work)?;
    let count = plan.increments.len();
    let merged = counted(count as u64, "increment");
    let full = path_text(&plan.full.path);
    let as_what = if with_snapshots { " as snapshots" } else { "" };
    output::print_sentences(&format!("merged {merged} into {full}{as_what}\n"))
}

/// Runs `fleecefs merge`.
///
/// # Errors
/// See [`crate::restore::restore`].
pub(super) fn merge(mut args: MergeArgs) -> Result<()> {
    args.target = paths::to_make(&args.target)?;
    let (cancel, bar) = (cancel_flag()?, Bar::default());
    let work = args.verb.work.work(&cancel, &bar);
    let (catalog, _) = args.verb.catalog(false)?;
    let line = args.verb.line(&catalog, Newest::OfAll)?;
    check_outside(&catalog, &args.target)?;
    let image = open_point(line.disk, line.last(), &Cache::new(CACHE_BYTES))?;
    let plan = Plan::new(&image, &work)?;
    let target = merge_target(&args, &line)?;
    let (name, note) = (line.disk.point_path(line.last()), format_note(&target));
    if args.verb.dry_run {
        let data = human_bytes(plan.totals.data);
        let (name, target) = (path_text(&name), path_text(&args.target));
        let what = format!("restore {name} to {target}: {data} of data\n{note}");
        return output::print_sentences(&(what + verbosity::UNCHANGED));
    }
    if !args.verb.skip_check {
        // A point that is no chain of single files has nothing to check this way.
        let members = line.members().unwrap_or_default();
        members.iter().try_for_each(|m| files::check(m, &work))?;
    }
    // As qmprestore does.
    super::restore::make_folder(&args.target)?;
    let options = Options { force: args.over.force, ..Options::default() };
    let summary = crate::restore::restore(&image, &plan, &target, &options, &work)?;
    let (name, target) = (path_text(&name), path_text(&args.target));
    output::print_sentences(&format!("{name} -> {target}: {}\n{note}", summary.method()))
}

/// What to say where the target's name promises another format than it gets.
fn format_note(target: &Target) -> String {
    let (format, other) = match target {
        Target::Qcow2(..) => ("qcow2", "raw"),
        _ => ("raw", "qcow2"),
    };
    match target.path().and_then(|p| p.extension()) {
        Some(e) if e == other => format!(
            "note: the file is {format}, like the FULL, although its name ends in .{other}; \
             --format {other} makes {other}\n"
        ),
        _ => String::new(),
    }
}

fn merge_target(args: &MergeArgs, line: &ChainSection) -> Result<Target> {
    let full = line.disk.stack(line.points[0]);
    let raw = match args.format {
        Some(f) => f == FileFormat::Raw,
        None => full.last().is_none_or(|l| l.format != Format::Qcow2),
    };
    if raw {
        return Ok(Target::Raw(args.target.clone()));
    }
    let mut options = Qcow2Options::default();
    // The FULL's cluster size, as a copy of it would have.
    if let Some(l) = full.last().filter(|l| l.format == Format::Qcow2) {
        options.cluster_size = files::probe(l.file.path())?.cluster_size;
    }
    Ok(Target::Qcow2(args.target.clone(), options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_promises_another_format_is_noted() {
        let qcow2 = |name: &str| Target::Qcow2(name.into(), Qcow2Options::default());
        assert!(format_note(&qcow2("/t/a.raw")).contains("the file is qcow2"));
        assert!(format_note(&Target::Raw("/t/a.qcow2".into())).contains("--format qcow2"));
        for fits in [qcow2("/t/a.qcow2"), qcow2("/t/a.img"), Target::Raw("/t/a".into())] {
            assert_eq!(format_note(&fits), "");
        }
    }
}
