//! Disks and VMs that are gone: there are points of theirs, and newer backups in which they are not.
//!
//! A *disk* is gone if its VM's newest run knows nothing of it: there is no point of it in that run, and the run's
//! manifests name it neither among the disks that were left out nor among those that failed. What cannot be told for
//! sure is not gone: a VM without name and UUID, one whose newest backup was made while it was shut off (it has the
//! images that were named), one of which a disk was left out whose name is none of those that are known, points
//! without a manifest, or of 0.1.0, whose manifests do not say which images a run made.
//!
//! A *VM* is gone if others in the directory have had backups for [`VM_AWAY`], and it had none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;

use super::timeline::{said_of, timeline, vm_of};
use super::{Catalog, Disk, manifest_of};
use crate::manifest::{EXCLUDED, Manifest, NOT_INCLUDED, OFFLINE};
use crate::units::{as_time, iso_time};

/// How much newer the backups of others have to be before a VM counts as gone, in seconds: longer than from one backup
/// to the next of a VM that is seldom backed up, or on holiday.
const VM_AWAY: i64 = 30 * 86_400;

/// What is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GoneWhat {
    /// The disk: its VM has it no more.
    Disk,
    /// The whole VM.
    Vm,
}

/// Since when a disk, or its VM, is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Gone {
    /// Which of them.
    pub what: GoneWhat,
    /// When the disk's newest point was made, in seconds since the epoch.
    #[serde(serialize_with = "as_time")]
    pub last_point: i64,
    /// When the newest backup was made that has nothing of it.
    #[serde(serialize_with = "as_time")]
    pub newest_backup: i64,
}

impl Gone {
    /// For how long, in seconds: by the backups, whatever time it is now.
    pub fn seconds(&self) -> u64 {
        u64::try_from(self.newest_backup.saturating_sub(self.last_point)).unwrap_or(0)
    }
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.what {
            GoneWhat::Disk => "the VM's newest backup knows nothing of this disk",
            GoneWhat::Vm => "the VM has no new backups, and others have",
        };
        let (last, newest) = (iso_time(self.last_point), iso_time(self.newest_backup));
        write!(f, "{what} (last point {last}, newest backup {newest})")
    }
}

/// Which disks are gone, in the order of the catalog's; `now`, in seconds since the epoch, since a point of the future
/// says nothing of when others had their last backup.
pub(crate) fn gone(catalog: &Catalog, now: i64) -> Vec<Option<Gone>> {
    let mut newest: BTreeMap<PathBuf, (i64, Option<Last>)> = BTreeMap::new();
    for disk in &catalog.disks {
        let Some(at) = (0..disk.points.len()).max_by_key(|i| disk.points[*i].time) else {
            continue;
        };
        let time = disk.points[at].time;
        let key = timeline(&disk.path);
        if newest.get(&key).is_none_or(|(t, _)| *t < time) {
            newest.insert(key, (time, manifest_of(disk, at).map(|m| Last::of(disk, time, &m))));
        }
    }
    let known = newest.into_iter().filter_map(|(key, (_, last))| Some((key, last?)));
    let found = judged(&known.collect(), now);
    catalog.disks.iter().map(|d| found.get(&timeline(&d.path)).copied()).collect()
}

/// What the newest point of a disk tells.
struct Last {
    /// When it was made; the rest tells runs apart whose names have the same second.
    when: (i64, i64, u32),
    run: String,
    image: String,
    vm: String,
    /// Whether the VM itself told which it is.
    has_name: bool,
    is_offline: bool,
    /// Whether it names all images of its run, so that one that is missing is known: 0.1.0 did not.
    names_run: bool,
    /// What the disk may be called in another run's manifest.
    names: Vec<String>,
    /// What else the run had: by name, and the image if it made one.
    others: Vec<Other>,
}

/// Another disk of a run.
struct Other {
    name: String,
    image: Option<String>,
    /// Whether it is one that is backed up, or could be: no empty drive and the like.
    is_disk: bool,
}

impl Last {
    fn of(disk: &Disk, time: i64, m: &Manifest) -> Self {
        let id = [&m.disk.device, &m.disk.node, &m.disk.qdev].into_iter().cloned();
        let file = m.disk.file.rsplit('/').next().map(str::to_string);
        let by_user = |reason: &str| [NOT_INCLUDED, EXCLUDED].contains(&reason);
        let other = |name: &String, image: Option<&String>, is_disk| Other {
            name: name.clone(),
            image: image.cloned(),
            is_disk,
        };
        let skipped = m.skipped.iter().map(|s| other(&s.disk, None, by_user(&s.reason)));
        let failed = m.failed.iter().map(|s| other(&s.disk, None, true));
        let made = m.run_images.iter().map(|i| other(&i.disk, Some(&i.image), true));
        Last {
            when: (time, m.time, m.time_nanos),
            run: m.run.clone(),
            image: m.image.clone(),
            vm: vm_of(disk, m),
            has_name: said_of(m).is_some(),
            is_offline: m.consistency.reason == OFFLINE,
            names_run: !m.run_images.is_empty(),
            names: id.chain(file).filter(|n| !n.is_empty()).collect(),
            others: skipped.chain(failed).chain(made).collect(),
        }
    }
}

/// What is gone of these disks.
fn judged(all: &BTreeMap<PathBuf, Last>, now: i64) -> BTreeMap<PathBuf, Gone> {
    let mut vms: BTreeMap<&str, Vec<(&PathBuf, &Last)>> = BTreeMap::new();
    for (disk, last) in all {
        vms.entry(&last.vm).or_default().push((disk, last));
    }
    let of_all = all.values().map(|l| l.when.0).filter(|t| *t <= now).max().unwrap_or(i64::MIN);
    let mut found = BTreeMap::new();
    for disks in vms.values() {
        let Some((_, newest)) = disks.iter().max_by_key(|(_, l)| l.when) else { continue };
        let is_away = of_all.saturating_sub(newest.when.0) > VM_AWAY;
        let is_known = known_to(newest, disks);
        for (disk, last) in disks {
            let has_name = !last.names.is_empty();
            let (what, newest_backup) = match (last.run != newest.run && has_name, &is_known) {
                (true, Some(known)) if last.names.iter().all(|n| !known.contains(n.as_str())) => {
                    (GoneWhat::Disk, newest.when.0)
                }
                _ if is_away => (GoneWhat::Vm, of_all),
                _ => continue,
            };
            found.insert((*disk).clone(), Gone { what, last_point: last.when.0, newest_backup });
        }
    }
    found
}

/// The names of all disks that the newest run knows of and has no point of; `None` if not all can be told.
fn known_to<'a>(newest: &Last, disks: &[(&PathBuf, &'a Last)]) -> Option<BTreeSet<&'a str>> {
    let in_run: Vec<&'a Last> =
        disks.iter().map(|(_, l)| *l).filter(|l| l.run == newest.run).collect();
    let is_vague = |l: &&Last| l.is_offline || !l.has_name || !l.names_run;
    if newest.run.is_empty() || in_run.iter().any(is_vague) {
        return None;
    }
    let is_here = |image: &str| in_run.iter().any(|l| l.image == image);
    let others = in_run.iter().copied().flat_map(|l| &l.others);
    let others: Vec<&Other> = others.filter(|o| !o.image.as_deref().is_some_and(is_here)).collect();
    let names: BTreeSet<&str> =
        disks.iter().flat_map(|(_, l)| &l.names).map(String::as_str).collect();
    let is_strange = |o: &&Other| o.is_disk && !names.contains(o.name.as_str());
    // One of them may be the disk in question, under a name that it has got since.
    if others.iter().any(is_strange) {
        return None;
    }
    Some(others.into_iter().map(|o| o.name.as_str()).collect())
}

#[cfg(test)]
mod tests;
