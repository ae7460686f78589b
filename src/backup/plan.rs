//! What a run will do, as a value: which disks, at which level and why, out of what is there.
//! Pure: nothing here talks to QEMU or writes.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::folders::{self, Folders, TargetId};
use super::history::History;
use super::seen::{NO_MEDIUM, Seen, SeenDisk};
use super::{Options, graph, level, names};
use crate::chain::Level;
use crate::chain::manifest::{BitmapInfo, Manifest, Skipped};
use crate::error::{Error, Kind, Result};
use crate::folder;

/// What will be done.
#[derive(Debug)]
pub struct Plan {
    /// The run's id.
    pub run: String,
    /// The disks, in the order QEMU lists them.
    pub disks: Vec<DiskPlan>,
    /// Disks left out.
    pub skipped: Vec<Skipped>,
    /// Disks that should be backed up and cannot.
    pub refused: Vec<(String, Error)>,
    /// What `--exclude` names and is not there.
    pub unknown: Vec<String>,
}

/// What will be done with one disk.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Its number in the run.
    pub index: usize,
    /// The disk.
    pub disk: SeenDisk,
    /// Its folder in the target.
    pub dir: PathBuf,
    /// The level it gets.
    pub level: Level,
    /// Why it gets a FULL though an INC was possible to hope for.
    pub demoted: Option<String>,
    /// File name of the new image.
    pub image: String,
    /// The run that began its chain.
    pub chain: String,
    /// What it builds on: manifests, root first; empty for FULL and COPY.
    pub base: Vec<Manifest>,
    /// The bitmap that says what changed.
    pub since: Option<BitmapInfo>,
    /// The bitmap that will record from now on.
    pub new_bitmap: Option<BitmapInfo>,
    /// The FULL's own bitmap, if DIFFs are wanted.
    pub diff_bitmap: Option<BitmapInfo>,
    /// Bitmaps of this target that nothing needs once the point is published.
    pub obsolete: Vec<String>,
    /// The latest time in the folder's names.
    pub last_time: i64,
    /// The file that the disk had at the last point, where it has another one now.
    pub moved_from: Option<String>,
}

impl DiskPlan {
    /// The point it lies on.
    pub fn parent(&self) -> Option<&Manifest> {
        match self.level {
            Level::Diff => self.base.first(),
            _ => self.base.last(),
        }
    }

    /// Where the disk has grown since the point it lies on and what is there has to be read, though
    /// no bit is dirty for it: all of a raw disk, which gives what its storage has there. qcow2 gives
    /// zeros, but in the cluster that the old end lay in: what was cut off there comes back.
    pub fn grown(&self) -> Option<Range<u64>> {
        let old = self.since.as_ref().and(self.parent())?.virtual_size;
        let end = match self.disk.identity.format.as_str() {
            "qcow2" => old.checked_next_multiple_of(self.disk.cluster_size)?.min(self.disk.size),
            _ => self.disk.size,
        };
        (old < end).then_some(old..end)
    }

    /// Bytes that will be copied, as far as can be known before.
    pub fn estimate(&self) -> u64 {
        let grown = self.grown().map_or(0, |r| r.end - r.start);
        match &self.since {
            Some(b) => {
                let dirty = self.disk.bitmap(&b.name).map_or(0, |b| b.count);
                let cut = self.doubtful().map_or(0, |r| r.end - r.start);
                dirty.saturating_add(grown).saturating_add(cut).min(self.disk.size)
            }
            None => self.disk.allocated,
        }
    }
}

/// A point that cannot be built on: its folder, its file name, and why.
pub type Unsound = (PathBuf, String, String);

/// What planning needs to know beside the options.
pub struct Inputs<'a> {
    /// The disks.
    pub seen: Seen,
    /// The run's id.
    pub run: &'a str,
    /// Whose bitmaps are this target's.
    pub target: &'a TargetId,
    /// The folder for this run's disks: the target, or its folder of the month.
    pub base: &'a Path,
    /// Seconds since the epoch.
    pub now: i64,
    /// The VM's UUID, if it has one.
    pub vm: Option<&'a str>,
    /// The VM's name, if it has one.
    pub vm_name: Option<&'a str>,
    /// Whether this VM was never backed up to this target, and may not share it.
    pub newcomer: bool,
    /// What the folders of renamed disks were called at the last run.
    pub renamed: &'a Folders,
    /// Why INC and DIFF are impossible in this run, if they are.
    pub no_inc: Option<String>,
    /// Points that were tried and cannot be built on.
    pub unsound: &'a [Unsound],
}

/// Makes the plan.
///
/// # Errors
/// The target cannot be read, or `--include` names a disk that is not there. A disk that cannot
/// have what was asked for is in [`Plan::refused`].
pub fn make(options: &Options, inputs: Inputs<'_>) -> Result<Plan> {
    let mut plan = Plan {
        run: inputs.run.to_string(),
        disks: Vec::new(),
        skipped: inputs.seen.skipped.clone(),
        refused: Vec::new(),
        unknown: Vec::new(),
    };
    let unknown = options.exclude.iter().filter(|name| !is_known(&inputs.seen, name));
    plan.unknown = unknown.cloned().collect();
    check_names(options, &inputs.seen)?;
    let mut wanted = choose(options, &inputs.seen, &mut plan);
    give_names(options, &mut wanted)?;
    let folders = folders::assign(options, &inputs, &wanted)?;
    for b in &inputs.seen.blocked {
        if is_wanted(options, &inputs.seen, &b.disk) {
            plan.refused.push((b.disk.clone(), Error::new(Kind::Busy, b.reason.clone())));
        }
    }
    refuse_included(options, &inputs.seen, &mut plan);
    for (disk, (dir, history)) in wanted.into_iter().zip(folders) {
        let label = disk.label().to_string();
        let index = plan.disks.len();
        match plan_disk(options, &inputs, (index, disk), dir, &history) {
            Ok(d) => plan.disks.push(d),
            Err(e) => plan.refused.push((label, e)),
        }
    }
    separate_images(&mut plan.disks);
    if plan.disks.is_empty() && plan.refused.is_empty() {
        return Err(Error::new(Kind::NotFound, "there is no disk to back up")
            .remedy("fleecefs info blockdev says why each is left out"));
    }
    Ok(plan)
}

const NOT_INCLUDED: &str = "not in --include";
const EXCLUDED: &str = "in --exclude";

/// Whether a disk is skipped because the user wants it so, or as there is none in its drive.
pub fn is_unwanted(s: &Skipped) -> bool {
    [NOT_INCLUDED, EXCLUDED, NO_MEDIUM].contains(&s.reason.as_str())
}

/// `--include` names what is left out because it cannot be backed up.
fn refuse_included(options: &Options, seen: &Seen, plan: &mut Plan) {
    let named = |s: &Skipped| options.include.iter().any(|n| seen.is_called(&s.disk, n));
    let all = std::mem::take(&mut plan.skipped).into_iter();
    let (refused, skipped): (Vec<_>, Vec<_>) = all.partition(named);
    plan.skipped = skipped;
    for s in refused {
        let what = format!("--include names it, but it cannot be backed up: {}", s.reason);
        plan.refused.push((s.disk, Error::new(Kind::Unsupported, what)));
    }
}

/// Whether a disk that is known by its name alone is asked for.
fn is_wanted(options: &Options, seen: &Seen, disk: &str) -> bool {
    let listed = |list: &[String]| list.iter().any(|n| seen.is_called(disk, n));
    !listed(&options.exclude) && (options.include.is_empty() || listed(&options.include))
}

/// What is said of a name in [`Plan::unknown`].
pub fn unknown_disk(name: &str) -> String {
    format!("--exclude {name}: there is no such disk (fleecefs info blockdev lists them)")
}

/// Whether the VM has a disk of that name, to be backed up or not.
fn is_known(seen: &Seen, name: &str) -> bool {
    let mut others = seen.skipped.iter().chain(&seen.blocked);
    seen.disks.iter().any(|d| d.is_called(name)) || others.any(|s| seen.is_called(&s.disk, name))
}

fn check_names(options: &Options, seen: &Seen) -> Result<()> {
    for name in &options.include {
        if !is_known(seen, name) {
            return Err(Error::new(Kind::NotFound, format!("there is no disk {name:?}"))
                .remedy("fleecefs info blockdev lists them"));
        }
    }
    Ok(())
}

/// `--name`.
fn give_names(options: &Options, disks: &mut [SeenDisk]) -> Result<()> {
    for (disk, name) in &options.names {
        let missing = || {
            let what = format!("--name: there is no disk {disk:?} to back up");
            Error::new(Kind::NotFound, what).remedy("fleecefs info blockdev lists them")
        };
        let named = disks.iter_mut().find(|d| d.is_called(disk)).ok_or_else(missing)?;
        named.named = Some(name.clone());
    }
    let mut names: Vec<&str> = disks.iter().filter_map(|d| d.named.as_deref()).collect();
    names.sort_unstable();
    match names.windows(2).find(|w| w.first() == w.last()) {
        Some(two) => Err(Error::new(Kind::Usage, format!("--name: two disks are called {two:?}"))),
        None => Ok(()),
    }
}

/// The file that the disk had before, if it has another one now.
fn moved_from(disk: &SeenDisk, history: &History) -> Option<String> {
    let before = &history.last_manifest()?.disk.file;
    (!before.is_empty() && *before != disk.identity.file).then(|| before.clone())
}

/// Why the user does not want a disk.
pub fn left_out(options: &Options, d: &SeenDisk) -> Option<&'static str> {
    let named = |list: &[String]| list.iter().any(|n| d.is_called(n));
    if !options.include.is_empty() && !named(&options.include) {
        return Some(NOT_INCLUDED);
    }
    if named(&options.exclude) {
        return Some(EXCLUDED);
    }
    d.by_rule.filter(|_| options.include.is_empty())
}

fn choose(options: &Options, seen: &Seen, plan: &mut Plan) -> Vec<SeenDisk> {
    let mut wanted = Vec::new();
    for d in &seen.disks {
        if let Some(reason) = left_out(options, d) {
            plan.skipped.push(Skipped { disk: d.label().into(), reason: reason.into() });
        } else if let Some(who) = &d.busy {
            plan.refused.push((d.label().into(), graph::in_the_way(who)));
        } else if d.encrypted && !options.allow_plaintext {
            let e =
                Error::new(Kind::Encrypted, "the disk is encrypted and the backup would not be")
                    .remedy("--allow-plaintext writes it in plain text, --exclude leaves it out");
            plan.refused.push((d.label().into(), e));
        } else {
            wanted.push(d.clone());
        }
    }
    wanted
}

fn plan_disk(
    options: &Options,
    inputs: &Inputs<'_>,
    (index, disk): (usize, SeenDisk),
    dir: PathBuf,
    history: &History,
) -> Result<DiskPlan> {
    let last_time = history.last_time();
    let time = inputs.now.max(last_time.saturating_add(1));
    let mut plan = DiskPlan {
        index,
        level: Level::Full,
        demoted: None,
        image: String::new(),
        chain: inputs.run.to_string(),
        base: Vec::new(),
        since: None,
        new_bitmap: None,
        diff_bitmap: None,
        obsolete: Vec::new(),
        last_time,
        moved_from: moved_from(&disk, history),
        dir,
        disk,
    };
    if history.tail.is_empty() {
        return Err(Error::new(Kind::Usage, "this disk has no name for its images")
            .remedy("give it one with --name DISK=NAME"));
    }
    level::choose(options, inputs, history, &mut plan)?;
    level::choose_bitmaps(options, inputs, &mut plan);
    let word = names::level_word(plan.level);
    let plain = options.layout.no_timestamp && matches!(plan.level, Level::Full | Level::Copy);
    // The next FULL has a time in its name: the first, and what lies on it, stays what it is.
    let taken = plain && folder::exists(&plan.dir.join(&history.tail));
    plan.image = match plain && !taken {
        true => history.tail.clone(),
        false => format!("{word}-{time}-{}", history.tail),
    };
    Ok(plan)
}

/// Two images of one run in one folder (`--no-subdir`) have names of their own already; this is
/// the last guard.
fn separate_images(disks: &mut [DiskPlan]) {
    let mut used: Vec<(PathBuf, String)> = Vec::new();
    for d in disks {
        while used.contains(&(d.dir.clone(), d.image.clone())) {
            d.image.push_str("-2");
        }
        used.push((d.dir.clone(), d.image.clone()));
    }
}

/// A plan as `--dry-run --json` prints it.
#[derive(Debug, Serialize)]
pub struct Printed {
    /// The disk.
    pub disk: String,
    /// Its file.
    pub file: String,
    /// The level.
    pub level: String,
    /// Where the image would be.
    pub image: PathBuf,
    /// The point it would lie on.
    pub parent: Option<String>,
    /// Bytes to copy.
    pub estimate: u64,
    /// Why a FULL.
    pub why: Option<String>,
    /// The bitmap that says what changed.
    pub since: Option<String>,
    /// The bitmap that would be added.
    pub adds: Option<String>,
    /// Bitmaps that would be removed.
    pub removes: Vec<String>,
}

impl From<&DiskPlan> for Printed {
    fn from(d: &DiskPlan) -> Self {
        Printed {
            disk: d.disk.label().to_string(),
            file: d.disk.identity.file.clone(),
            level: names::level_word(d.level).to_string(),
            image: d.dir.join(&d.image),
            parent: d.parent().map(|m| m.image.clone()),
            estimate: d.estimate(),
            why: d.demoted.clone(),
            since: d.since.as_ref().map(|b| b.name.clone()),
            adds: d.new_bitmap.as_ref().map(|b| b.name.clone()),
            removes: d.obsolete.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
