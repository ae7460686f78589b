//! `fleecefs link-disk`: the points of a renamed disk and those under its new name become one history.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::bar::Bar;
use super::output;
use super::paths::{backups, catalog};
use super::prune::find_disk;
use super::writing::finished_but_links;
use crate::chain::linking::{self, Linking};
use crate::chain::{Catalog, Disk, unfinished};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::prune::join::{self, Joining};
use crate::restore::verbs;
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
    let root = backups(&args.dir)?;
    let _locks = finished_but_links(&root)?;
    // Its own is gone on with, by what the user says now.
    finish(&root, Some((&args.old, &args.new)))?;
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

/// Goes on with what was broken off from `root` downward, but for that of the disks `own`. The caller
/// holds the locks. Where it cannot be gone on with, a warning says so: no point is lost or wrong, and
/// nobody's backup has to wait for it.
///
/// # Errors
/// A journal is damaged.
pub(super) fn finish(root: &Path, own: Option<(&Path, &Path)>) -> Result<()> {
    for dir in unfinished::folders(root) {
        // The other one of a pair may be gone with it.
        let open = folder::absent_is_none(Folder::open(&dir));
        let failed = |e| Error::io(e, "cannot open the folder").at_path(&dir);
        let Some(folder) = open.map_err(failed)? else { continue };
        let Some(linking) = linking::read_in(&folder)? else { continue };
        let is_own = |(old, new): (&Path, &Path)| {
            let same = |p: &Path, said: &str| p.components().eq(Path::new(said).components());
            same(old, &linking.old) && same(new, &linking.new)
        };
        if own.is_some_and(is_own) {
            continue;
        }
        log::warn!("{}: going on with a link-disk that was broken off", path_text(&dir));
        if let Err(e) = go_on(root, &folder, &linking) {
            log::warn!(
                "{}: a link-disk was broken off here and cannot be finished: {} ({})",
                path_text(&linking::journal_path(&dir)),
                e.report(),
                linking::REMEDY
            );
        }
    }
    Ok(())
}

/// Goes on with what the journal in `dir` says.
fn go_on(root: &Path, dir: &Folder, linking: &Linking) -> Result<()> {
    let catalog = catalog(root)?;
    let (old, new) = (Path::new(&linking.old), Path::new(&linking.new));
    // It may have been begun in a folder further down.
    let above = catalog.disks.iter().find_map(|d| {
        let is_here = d.points.iter().any(|p| p.source.parent() == Some(dir.path()));
        [old, new].into_iter().filter(|_| is_here).find_map(|n| before(&d.path, n))
    });
    let above = above.unwrap_or_default();
    let to = find_disk(&catalog, &above.join(new))?;
    let from = match find_disk(&catalog, &above.join(old)) {
        Err(e) if e.kind() == Kind::NotFound && join::is_joined(old, to) => {
            check_single(to, linking)?;
            let done = Joining::done(&above.join(old), to);
            return join::execute(&done, &catalog, &Bar::default());
        }
        from => from?,
    };
    // The owner of one folder has no say about another's.
    match (says(from, linking)?, says(to, linking)?) {
        (Some(_), Some(_)) => {
            let plan = join::plan(from, to, linking.other_vm, linking.force)?;
            join::execute(&plan, &catalog, &Bar::default())
        }
        // Nothing was done yet.
        (None, Some(folder)) => linking::clear_in(&folder),
        _ => Err(Error::new(Kind::Incomplete, "the other disk's folder has no such journal")),
    }
}

/// The folder of a disk, if it has this journal.
fn says(disk: &Disk, linking: &Linking) -> Result<Option<Folder>> {
    let Some(dir) = disk.points.first().and_then(|p| p.source.parent()) else { return Ok(None) };
    let folder = verbs::open_folder(dir)?;
    Ok(linking::read_in(&folder)?.filter(|l| l.is_of(linking)).map(|_| folder))
}

/// Fails if the images have other names yet, which are then outside of the directory that is read.
fn check_single(to: &Disk, linking: &Linking) -> Result<()> {
    let dir = verbs::open_folder(
        to.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new("")),
    )?;
    let is_single = |n: &String| dir.look(n).is_ok_and(|m| m.nlink() == 1);
    match linking.arriving.iter().all(is_single) {
        true => Ok(()),
        false => Err(Error::new(Kind::Incomplete, "the old names are not in this directory")),
    }
}

/// What of `path` comes before `end`.
fn before(path: &Path, end: &Path) -> Option<PathBuf> {
    let above = path.components().count().checked_sub(end.components().count())?;
    path.ends_with(end).then(|| path.components().take(above).collect())
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
    for path in &plan.left {
        output::push_line(&mut out, format!("left {}: not a plain file", path_text(path)));
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
