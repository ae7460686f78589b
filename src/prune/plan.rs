//! What to keep and what to delete. Pure: points come in as values, a [`Plan`] comes out, which
//! `--dry-run` prints and a real run executes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;

pub use super::planned::{DiskItems, DiskPlan, Item, Plan, PointPlan, Unmerged};

use super::keep_gone::KeepGone;
use super::merge::{CanMerge, shortened};
use super::reason::Reason;
use crate::layout::Level;

/// What is kept, as restic and borg have it: of each of the newest N days (weeks, ...) that have a
/// point at all, the newest one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// The newest N.
    pub last: usize,
    /// Days, in local time.
    pub daily: usize,
    /// ISO weeks.
    pub weekly: usize,
    /// Months.
    pub monthly: usize,
    /// Years.
    pub yearly: usize,
    /// All that are at most so many seconds older than the newest.
    pub within: Option<u64>,
    /// What stays of disks and VMs that are gone; the others do not apply to them.
    pub gone: KeepGone,
}

impl Rules {
    /// Whether they would keep nothing of what is not gone.
    pub fn is_empty(&self) -> bool {
        *self == Rules { gone: self.gone, ..Rules::default() }
    }
}

/// Options of the plan, besides the rules.
#[derive(Clone, Copy, Default)]
pub struct PlanOptions<'a> {
    /// Delete also what would be held, and what cannot be restored.
    pub force: bool,
    /// Shorten chains whose oldest points are kept only because newer ones need them, where this
    /// says that it can be done.
    pub merge: Option<&'a CanMerge<'a>>,
}

/// Disk and point.
type Key = (usize, usize);
type Kept = HashMap<Key, BTreeSet<Reason>>;

/// Decides which points stay and which go.
pub fn plan(disks: &[DiskItems], rules: &Rules, zone: &TimeZone, options: PlanOptions<'_>) -> Plan {
    let mut kept = Kept::new();
    let mut timelines: BTreeMap<&PathBuf, Vec<Key>> = BTreeMap::new();
    for (d, disk) in disks.iter().enumerate() {
        let backups = (0..disk.items.len()).filter(|i| is_backup(&disk.items[*i]));
        timelines.entry(&disk.timeline).or_default().extend(backups.map(|i| (d, i)));
    }
    let item = |k: &Key| &disks[k.0].items[k.1];
    for keys in timelines.values_mut() {
        keys.sort_by_key(|k| (item(k).time, *k));
        keys.reverse();
        match keys.first().and_then(|k| disks[k.0].gone.as_ref()) {
            Some(gone) => {
                let stay = rules.gone.stay(gone, keys.len());
                keys.iter().take(stay).for_each(|k| keep(&mut kept, *k, Reason::Gone));
            }
            None => by_rules(disks, keys, rules, zone, &mut kept),
        }
        newest(disks, keys, &mut kept);
    }
    complete_runs(disks, &mut kept);
    same_runs(disks, &mut kept);
    set_apart(disks, options.force, &mut kept);
    inside(disks, &mut kept);
    perhaps_needed(disks, &mut kept);
    needed(disks, &mut kept);
    let plans = disks.iter().enumerate().map(|(d, disk)| disk_plan(d, disk, &mut kept, options));
    Plan { disks: plans.collect() }
}

/// Whether rules apply to it.
fn is_backup(item: &Item) -> bool {
    item.served && matches!(item.level, Level::Full | Level::Inc | Level::Diff | Level::Copy)
}

fn keep(kept: &mut Kept, key: Key, reason: Reason) {
    kept.entry(key).or_default().insert(reason);
}

/// `keys` are newest first.
fn by_rules(disks: &[DiskItems], keys: &[Key], rules: &Rules, zone: &TimeZone, kept: &mut Kept) {
    let time = |k: &Key| disks[k.0].items[k.1].time;
    for key in keys.iter().take(rules.last) {
        keep(kept, *key, Reason::Last);
    }
    if let (Some(within), Some(first)) = (rules.within, keys.first()) {
        let oldest = time(first).saturating_sub(i64::try_from(within).unwrap_or(i64::MAX));
        for key in keys.iter().filter(|k| time(k) >= oldest) {
            keep(kept, *key, Reason::Within);
        }
    }
    let local = |t: i64| Timestamp::from_second(t).map(|t| t.to_zoned(zone.clone()).date());
    type Bucket = (usize, fn(jiff::civil::Date) -> String, fn(String) -> Reason);
    let buckets: [Bucket; 4] = [
        (rules.daily, |d| d.to_string(), Reason::Daily),
        (rules.weekly, week, Reason::Weekly),
        (rules.monthly, |d| format!("{:04}-{:02}", d.year(), d.month()), Reason::Monthly),
        (rules.yearly, |d| format!("{:04}", d.year()), Reason::Yearly),
    ];
    for (count, name, reason) in buckets {
        let mut seen = BTreeSet::new();
        for key in keys {
            if seen.len() >= count {
                break;
            }
            // A time outside the calendar gets a bucket of its own.
            let bucket = local(time(key)).map_or_else(|_| time(key).to_string(), name);
            if seen.insert(bucket.clone()) {
                keep(kept, *key, reason(bucket));
            }
        }
    }
}

fn week(date: jiff::civil::Date) -> String {
    let week = date.iso_week_date();
    format!("{:04}-W{:02}", week.year(), week.week())
}

/// The newest point, and the newest that an INC may build on. A bitmap in the guest records since.
fn newest(disks: &[DiskItems], keys: &[Key], kept: &mut Kept) {
    let level = |k: &Key| disks[k.0].items[k.1].level;
    let base = keys.iter().find(|k| matches!(level(k), Level::Full | Level::Inc));
    for key in keys.first().into_iter().chain(base) {
        keep(kept, *key, Reason::Newest);
    }
}

/// What is the same for all disks of a VM: the folder that contains them.
pub fn vm(timeline: &Path) -> &Path {
    timeline.parent().unwrap_or(timeline)
}

/// Runs by the folder that contains the disks (one VM), each with its points.
fn runs(disks: &[DiskItems]) -> BTreeMap<(PathBuf, &str), Vec<Key>> {
    let mut runs: BTreeMap<(PathBuf, &str), Vec<Key>> = BTreeMap::new();
    for (d, disk) in disks.iter().enumerate() {
        let vm = vm(&disk.timeline);
        for (i, item) in disk.items.iter().enumerate().filter(|(_, i)| is_backup(i)) {
            runs.entry((vm.to_path_buf(), &item.run)).or_default().push((d, i));
        }
    }
    runs
}

/// Of each VM the newest of the runs that have most disks. Those that are gone do not count, where there are others: no
/// run is complete without them any more.
fn complete_runs(disks: &[DiskItems], kept: &mut Kept) {
    let runs = runs(disks);
    let here = disks.iter().filter(|d| d.gone.is_none());
    let here: BTreeSet<&Path> = here.map(|d| vm(&d.timeline)).collect();
    let counts = |k: &&Key, vm: &Path| disks[k.0].gone.is_none() || !here.contains(vm);
    let mut best: BTreeMap<&PathBuf, ((usize, i64), &Vec<Key>)> = BTreeMap::new();
    for ((vm, _), keys) in &runs {
        let counted = keys.iter().filter(|k| counts(k, vm));
        let timelines: BTreeSet<_> = counted.map(|k| &disks[k.0].timeline).collect();
        let newest = keys.iter().map(|k| disks[k.0].items[k.1].time).max().unwrap_or(i64::MIN);
        let rank = (timelines.len(), newest);
        if best.get(vm).is_none_or(|(r, _)| rank > *r) {
            best.insert(vm, (rank, keys));
        }
    }
    for (_, keys) in best.values() {
        keys.iter().for_each(|k| keep(kept, *k, Reason::LastCompleteRun));
    }
}

/// A run that is kept for one disk is kept for all; for one that is gone, for those that are gone as well: what is kept
/// of it for ever must not keep all that was made beside it.
fn same_runs(disks: &[DiskItems], kept: &mut Kept) {
    let is_gone = |k: &Key| disks[k.0].gone.is_some();
    for keys in runs(disks).values() {
        let stays: Vec<&Key> = keys.iter().filter(|k| kept.contains_key(*k)).collect();
        let (for_any, for_one_here) = (!stays.is_empty(), stays.iter().any(|k| !is_gone(k)));
        for key in keys.iter().filter(|k| for_one_here || (for_any && is_gone(k))) {
            if !kept.contains_key(key) {
                keep(kept, *key, Reason::SameRun);
            }
        }
    }
}

/// What no rule decides about.
fn set_apart(disks: &[DiskItems], force: bool, kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        for (i, item) in disk.items.iter().enumerate() {
            if item.level == Level::Image {
                keep(kept, (d, i), Reason::NotABackup);
            } else if !item.served && !force {
                keep(kept, (d, i), Reason::CannotBeServed);
            }
            if let Some(why) = disk.held.as_ref().filter(|_| !force) {
                keep(kept, (d, i), Reason::Held(why.clone()));
            }
        }
    }
}

/// An internal snapshot stays with its file, and a file with a snapshot that is kept.
fn inside(disks: &[DiskItems], kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        for mates in by_file(disk).values().filter(|m| m.len() > 1) {
            let Some(owner) = mates.iter().find(|j| kept.contains_key(&(d, **j))) else { continue };
            let needs = Reason::NeededBy(disk.items[*owner].name.clone());
            for &i in mates.iter().filter(|i| *i != owner) {
                if !kept.contains_key(&(d, i)) {
                    keep(kept, (d, i), needs.clone());
                }
            }
        }
    }
}

/// The points in each file.
fn by_file(disk: &DiskItems) -> HashMap<&PathBuf, Vec<usize>> {
    let mut files: HashMap<&PathBuf, Vec<usize>> = HashMap::new();
    for (i, item) in disk.items.iter().enumerate() {
        files.entry(&item.file).or_default().push(i);
    }
    files
}

/// Of a point that depends on something missing, every base in its folder that is older: what is
/// missing may depend on it. Of several such points the oldest is named, not each.
fn perhaps_needed(disks: &[DiskItems], kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        let mut unknown: HashMap<Option<&Path>, Vec<(i64, usize)>> = HashMap::new();
        for (i, item) in disk.items.iter().enumerate() {
            if item.lies_on_unknown && kept.contains_key(&(d, i)) {
                unknown.entry(item.file.parent()).or_default().push((item.time, i));
            }
        }
        unknown.values_mut().for_each(|list| list.sort_unstable());
        for (j, base) in disk.items.iter().enumerate() {
            if !matches!(base.level, Level::Full | Level::Inc) {
                continue;
            }
            let Some(list) = unknown.get(&base.file.parent()) else { continue };
            let from = list.partition_point(|(time, _)| *time < base.time);
            if let Some((_, i)) = list[from..].iter().find(|(_, i)| *i != j) {
                keep(kept, (d, j), Reason::MayBeNeededBy(disk.items[*i].name.clone()));
            }
        }
    }
}

/// Everything that something kept depends on.
fn needed(disks: &[DiskItems], kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        let files = by_file(disk);
        let mut seen = HashSet::new();
        // Children have larger indices, so one pass from the end sees them first.
        for i in (0..disk.items.len()).rev() {
            let Some(parent) = disk.items[i].parent.filter(|_| kept.contains_key(&(d, i))) else {
                continue;
            };
            let needs = Reason::NeededBy(disk.items[i].name.clone());
            keep(kept, (d, parent), needs.clone());
            let file = &disk.items[parent].file;
            // Of what else is in that file it is enough to name one.
            if seen.insert(file) {
                for &j in files.get(file).into_iter().flatten() {
                    keep(kept, (d, j), needs.clone());
                }
            }
        }
    }
}

fn disk_plan(d: usize, disk: &DiskItems, kept: &mut Kept, options: PlanOptions<'_>) -> DiskPlan {
    let point = |(i, item): (usize, &Item)| PointPlan {
        point: item.name.clone(),
        keep: kept.remove(&(d, i)).unwrap_or_default().into_iter().collect(),
        bytes: item.bytes,
    };
    let mut points: Vec<PointPlan> = disk.items.iter().enumerate().map(point).collect();
    let (consolidate, not_consolidated) = match options.merge {
        Some(can) => shortened(disk, &mut points, |i, gone| can(d, i, gone)),
        None => Default::default(),
    };
    DiskPlan { disk: disk.disk.clone(), gone: disk.gone, points, consolidate, not_consolidated }
}

#[cfg(test)]
mod tests;
