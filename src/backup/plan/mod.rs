//! What a run will do, as a value: which disks, at which level and why, out of what is there.
//! Pure: nothing here talks to QEMU or writes.

mod disk_files;
pub(crate) mod folders;
pub(crate) mod level;
pub(crate) mod planned;
pub(crate) mod watermark;

use std::path::PathBuf;

use serde::Serialize;

use self::folders::Place;
pub(crate) use self::planned::{DiskPlan, Inputs, Plan, unknown_disk};
use super::disks::{GuestDisk, Survey};
use super::target::history::History;
use super::{Options, graph, names};
use crate::chain::nearest;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::layout::Level;
use crate::manifest::{EXCLUDED, NOT_INCLUDED, Skipped};

/// Makes the plan.
///
/// # Errors
/// The target cannot be read, or `--include` names a disk that is not there. A disk that cannot
/// have what was asked for is in [`Plan::refused`].
pub(crate) fn make(options: &Options, inputs: Inputs<'_>) -> Result<Plan> {
    let mut plan = Plan {
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
        let disk = b.disk.clone();
        if is_wanted(options, &inputs.seen, &disk) {
            plan.refused.push((disk, Error::new(Kind::Busy, b.reason.clone())));
        } else {
            // The manifests name it all the same: the VM has it.
            let reason = if options.include.is_empty() { EXCLUDED } else { NOT_INCLUDED };
            plan.skipped.push(Skipped { disk, reason: reason.into() });
        }
    }
    refuse_included(options, &inputs.seen, &mut plan);
    for (disk, place) in wanted.into_iter().zip(folders) {
        let label = disk.label().to_string();
        let index = plan.disks.len();
        match plan_disk(options, &inputs, (index, disk), place) {
            Ok(d) => plan.disks.push(d),
            Err(e) => plan.refused.push((label, e)),
        }
    }
    separate_images(&mut plan.disks);
    if plan.disks.is_empty() && plan.refused.is_empty() {
        return Err(Error::new(Kind::NotFound, "there is no disk to back up")
            .remedy("fleecefs info blockdev shows why each is skipped"));
    }
    Ok(plan)
}

/// `--include` names what is omitted because it cannot be backed up.
fn refuse_included(options: &Options, seen: &Survey, plan: &mut Plan) {
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
fn is_wanted(options: &Options, seen: &Survey, disk: &str) -> bool {
    let listed = |list: &[String]| list.iter().any(|n| seen.is_called(disk, n));
    !listed(&options.exclude) && (options.include.is_empty() || listed(&options.include))
}

/// Whether the VM has a disk of that name, to be backed up or not.
fn is_known(seen: &Survey, name: &str) -> bool {
    let mut others = seen.skipped.iter().chain(&seen.blocked);
    seen.disks.iter().any(|d| d.is_called(name)) || others.any(|s| seen.is_called(&s.disk, name))
}

fn check_names(options: &Options, seen: &Survey) -> Result<()> {
    for name in &options.include {
        if !is_known(seen, name) {
            let others = seen.skipped.iter().chain(&seen.blocked).map(|s| s.disk.as_str());
            let known = seen.disks.iter().map(GuestDisk::label).chain(others);
            let near = nearest(name, known.map(str::to_string));
            return Err(Error::new(Kind::NotFound, format!("there is no disk {name:?}"))
                .remedy(format!("{near}'fleecefs info blockdev' lists them")));
        }
    }
    Ok(())
}

/// `--name`.
fn give_names(options: &Options, disks: &mut [GuestDisk]) -> Result<()> {
    for (disk, name) in &options.names {
        let missing = || {
            let what = format!("--name: there is no disk {disk:?} to back up");
            Error::new(Kind::NotFound, what).remedy("'fleecefs info blockdev' lists them")
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
fn moved_from(disk: &GuestDisk, history: &History) -> Option<String> {
    let before = &history.last_manifest()?.disk.file;
    (!before.is_empty() && *before != disk.identity.file).then(|| before.clone())
}

/// Why the user does not want a disk.
pub(crate) fn left_out(options: &Options, d: &GuestDisk) -> Option<&'static str> {
    let named = |list: &[String]| list.iter().any(|n| d.is_called(n));
    if !options.include.is_empty() && !named(&options.include) {
        return Some(NOT_INCLUDED);
    }
    if named(&options.exclude) {
        return Some(EXCLUDED);
    }
    d.by_rule.filter(|_| options.include.is_empty())
}

fn choose(options: &Options, seen: &Survey, plan: &mut Plan) -> Vec<GuestDisk> {
    let mut wanted = Vec::new();
    for d in &seen.disks {
        if let Some(reason) = left_out(options, d) {
            plan.skipped.push(Skipped { disk: d.label().into(), reason: reason.into() });
        } else if let Some(who) = &d.busy {
            plan.refused.push((d.label().into(), graph::in_the_way(who)));
        } else if d.encrypted && !options.allow_plaintext {
            let e =
                Error::new(Kind::Encrypted, "the disk is encrypted and the backup would not be")
                    .remedy("--allow-plaintext writes it in plain text, --exclude skips it");
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
    (index, disk): (usize, GuestDisk),
    place: Place,
) -> Result<DiskPlan> {
    let Place { dir, history, copy_of } = place;
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
        moved_from: moved_from(&disk, &history),
        copy_of,
        dir,
        disk,
    };
    if history.tail.is_empty() {
        return Err(Error::new(Kind::Usage, "no name for this disk's images")
            .remedy("give it one with --name DISK=NAME"));
    }
    level::choose(options, inputs, &history, &mut plan)?;
    level::choose_bitmaps(options, inputs, &mut plan);
    let word = names::level_word(plan.level);
    let plain = options.layout.no_timestamp && matches!(plan.level, Level::Full | Level::Copy);
    // The next FULL has a time in its name: the first, and what depends on it, stays what it is.
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
pub(crate) struct Printed {
    /// The disk.
    pub disk: String,
    /// Its file.
    #[serde(rename = "disk_file")]
    pub file: String,
    /// The level.
    #[serde(serialize_with = "crate::text::as_lower")]
    pub level: String,
    /// Where the image would be.
    #[serde(rename = "file")]
    pub image: PathBuf,
    /// The point it would depend on.
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
