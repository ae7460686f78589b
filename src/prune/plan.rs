//! What to keep and what to delete. Pure: points come in as values, a [`Plan`] comes out, which
//! `--dry-run` prints and a real run executes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::reason::Reason;
use super::shorten::{CanMerge, Unmerged, shortened};
use crate::chain::Level;

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
}

impl Rules {
    /// Whether they would keep nothing.
    pub fn is_empty(&self) -> bool {
        *self == Rules::default()
    }
}

/// One point, as far as the plan needs it.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// Seconds since the epoch.
    pub time: i64,
    /// Its kind of backup.
    pub level: Level,
    /// Whether it can be restored.
    pub served: bool,
    /// The point it lies on, as an index into [`DiskItems::items`]; always a smaller one.
    pub parent: Option<usize>,
    /// Whether it lies on something of which nobody knows what it is, because a file is missing.
    pub lies_on_unknown: bool,
    /// The run that made it: the same for all disks.
    pub run: String,
    /// The file it is in; internal snapshots share one.
    pub file: PathBuf,
    /// The name of the FULL of its chain.
    pub chain: String,
    /// Bytes that deleting it frees.
    pub bytes: u64,
}

/// The points of one disk.
#[derive(Debug, Clone, Default)]
pub struct DiskItems {
    /// The disk's path.
    pub disk: PathBuf,
    /// What is the same for all folders of one disk (`--monthly` begins one for each month).
    pub timeline: PathBuf,
    /// In chain order.
    pub items: Vec<Item>,
    /// Why nothing of this timeline may be deleted.
    pub held: Option<String>,
}

/// What happens to one point.
#[derive(Debug, Clone, serde::Serialize)]
pub struct PointPlan {
    /// Its name.
    pub point: String,
    /// Why it is kept; empty if it is deleted.
    pub keep: Vec<Reason>,
    /// Bytes of its own file.
    pub bytes: u64,
}

/// What happens to one disk.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DiskPlan {
    /// The disk's path.
    pub disk: PathBuf,
    /// In chain order.
    pub points: Vec<PointPlan>,
    /// Chains that are shortened: everything of a chain up to this point becomes one new FULL.
    pub consolidate: Vec<String>,
    /// Chains that would be, and cannot.
    pub not_consolidated: Vec<Unmerged>,
}

/// What happens to a backup directory.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Plan {
    /// One for each disk.
    pub disks: Vec<DiskPlan>,
}

impl Plan {
    /// Bytes that deleting frees (consolidation not counted).
    pub fn freed(&self) -> u64 {
        self.deleted().map(|(_, p)| p.bytes).sum()
    }

    /// All points that become part of another.
    pub fn merged(&self) -> impl Iterator<Item = &PointPlan> {
        let is_merged = |r: &Reason| matches!(r, Reason::MergedInto(_));
        self.disks.iter().flat_map(|d| &d.points).filter(move |p| p.keep.iter().any(is_merged))
    }

    /// All points that are deleted.
    pub fn deleted(&self) -> impl Iterator<Item = (&DiskPlan, &PointPlan)> {
        let all = self.disks.iter().flat_map(|d| d.points.iter().map(move |p| (d, p)));
        all.filter(|(_, p)| p.keep.is_empty())
    }
}

/// Options of the plan beside the rules.
#[derive(Clone, Copy, Default)]
pub struct Manner<'a> {
    /// Delete also what would be held, and what cannot be restored.
    pub force: bool,
    /// Shorten chains whose oldest points are kept only because newer ones need them, where this
    /// says that it can be done.
    pub merge: Option<&'a CanMerge<'a>>,
}

/// Disk and point.
type Key = (usize, usize);
type Kept = HashMap<Key, BTreeSet<Reason>>;

/// Decides.
pub fn plan(disks: &[DiskItems], rules: &Rules, zone: &TimeZone, manner: Manner<'_>) -> Plan {
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
        by_rules(disks, keys, rules, zone, &mut kept);
        newest(disks, keys, &mut kept);
    }
    complete_runs(disks, &mut kept);
    same_runs(disks, &mut kept);
    set_apart(disks, manner.force, &mut kept);
    inside(disks, &mut kept);
    perhaps_needed(disks, &mut kept);
    needed(disks, &mut kept);
    let plans = disks.iter().enumerate().map(|(d, disk)| disk_plan(d, disk, &mut kept, manner));
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

/// Of each VM the newest of the runs that have most disks.
fn complete_runs(disks: &[DiskItems], kept: &mut Kept) {
    let runs = runs(disks);
    let mut best: BTreeMap<&PathBuf, ((usize, i64), &Vec<Key>)> = BTreeMap::new();
    for ((vm, _), keys) in &runs {
        let timelines: BTreeSet<_> = keys.iter().map(|k| &disks[k.0].timeline).collect();
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

/// A run that is kept for one disk is kept for all.
fn same_runs(disks: &[DiskItems], kept: &mut Kept) {
    for keys in runs(disks).values() {
        if keys.iter().any(|k| kept.contains_key(k)) {
            for key in keys.iter().filter(|k| !kept.contains_key(*k)).copied().collect::<Vec<_>>() {
                keep(kept, key, Reason::SameRun);
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

/// Of a point that lies on something missing, every base in its folder that is older: what is
/// missing may lie on it.
fn perhaps_needed(disks: &[DiskItems], kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        for (i, item) in disk.items.iter().enumerate() {
            if !item.lies_on_unknown || !kept.contains_key(&(d, i)) {
                continue;
            }
            for (j, base) in disk.items.iter().enumerate() {
                let carries = matches!(base.level, Level::Full | Level::Inc);
                let beside = base.file.parent() == item.file.parent();
                if carries && beside && base.time <= item.time && j != i {
                    keep(kept, (d, j), Reason::MayBeNeededBy(item.name.clone()));
                }
            }
        }
    }
}

/// Everything that something kept lies on.
fn needed(disks: &[DiskItems], kept: &mut Kept) {
    for (d, disk) in disks.iter().enumerate() {
        let files = by_file(disk);
        // Children have larger indices, so one pass from the end sees them first.
        for i in (0..disk.items.len()).rev() {
            let Some(parent) = disk.items[i].parent.filter(|_| kept.contains_key(&(d, i))) else {
                continue;
            };
            let needs = Reason::NeededBy(disk.items[i].name.clone());
            for &j in files.get(&disk.items[parent].file).into_iter().flatten() {
                keep(kept, (d, j), needs.clone());
            }
        }
    }
}

fn disk_plan(d: usize, disk: &DiskItems, kept: &mut Kept, manner: Manner<'_>) -> DiskPlan {
    let point = |(i, item): (usize, &Item)| PointPlan {
        point: item.name.clone(),
        keep: kept.remove(&(d, i)).unwrap_or_default().into_iter().collect(),
        bytes: item.bytes,
    };
    let mut points: Vec<PointPlan> = disk.items.iter().enumerate().map(point).collect();
    let (consolidate, not_consolidated) = match manner.merge {
        Some(can) => shortened(disk, &mut points, |i, gone| can(d, i, gone)),
        None => Default::default(),
    };
    DiskPlan { disk: disk.disk.clone(), points, consolidate, not_consolidated }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Daily backups at 22:00 UTC from the first of January 2023 to the last of December: a FULL
    /// on the first of each month, INCs else (`full_every_month`), or FULLs only.
    fn year(incremental: bool) -> DiskItems {
        let first = jiff::civil::date(2023, 1, 1);
        let mut items: Vec<Item> = Vec::new();
        let mut chain = String::new();
        for day in 0..365 {
            let date = first.saturating_add(jiff::Span::new().days(day));
            let time = date.at(22, 0, 0, 0).to_zoned(TimeZone::UTC).unwrap();
            let level = if incremental && date.day() != 1 { Level::Inc } else { Level::Full };
            if level == Level::Full {
                chain = date.to_string();
            }
            items.push(Item {
                name: date.to_string(),
                time: time.timestamp().as_second(),
                level,
                served: true,
                parent: (level == Level::Inc).then(|| items.len() - 1),
                lies_on_unknown: false,
                run: date.to_string(),
                file: date.to_string().into(),
                chain: chain.clone(),
                bytes: 1,
            });
        }
        DiskItems { disk: "vm/sda".into(), timeline: "vm/sda".into(), items, held: None }
    }

    fn kept(disks: &[DiskItems], rules: Rules) -> Vec<String> {
        let plan = plan(disks, &rules, &TimeZone::UTC, Manner::default());
        let kept = plan.disks[0].points.iter().filter(|p| !p.keep.is_empty());
        kept.map(|p| p.point.clone()).collect()
    }

    #[test]
    fn a_year_of_fulls_by_each_rule() {
        let year = [year(false)];
        let december = |days: std::ops::RangeInclusive<u32>| -> Vec<String> {
            days.map(|d| format!("2023-12-{d:02}")).collect()
        };
        let keep = |rules| kept(&year, rules);
        assert_eq!(keep(Rules { last: 3, ..Default::default() }), december(29..=31));
        assert_eq!(keep(Rules { daily: 7, ..Default::default() }), december(25..=31));
        // Weeks end on Sundays; the 31st of December 2023 is one.
        assert_eq!(
            keep(Rules { weekly: 5, ..Default::default() }),
            ["2023-12-03", "2023-12-10", "2023-12-17", "2023-12-24", "2023-12-31"]
        );
        assert_eq!(
            keep(Rules { monthly: 12, ..Default::default() }),
            [
                "2023-01-31",
                "2023-02-28",
                "2023-03-31",
                "2023-04-30",
                "2023-05-31",
                "2023-06-30",
                "2023-07-31",
                "2023-08-31",
                "2023-09-30",
                "2023-10-31",
                "2023-11-30",
                "2023-12-31"
            ]
        );
        assert_eq!(keep(Rules { yearly: 3, ..Default::default() }), ["2023-12-31"]);
        let within = Rules { within: Some(10 * 86_400), ..Default::default() };
        assert_eq!(keep(within), december(21..=31));
        let both = Rules { daily: 3, monthly: 2, ..Default::default() };
        assert_eq!(keep(both), ["2023-11-30", "2023-12-29", "2023-12-30", "2023-12-31"]);
        assert_eq!(keep(Rules { last: 1000, ..Default::default() }).len(), 365);
    }

    #[test]
    fn days_are_local() {
        // 22:00 UTC is the next day in Tokyo: the 31st is alone in 2024.
        let tokyo = TimeZone::fixed(jiff::tz::offset(9));
        let rules = Rules { yearly: 2, ..Default::default() };
        let plan = plan(&[year(false)], &rules, &tokyo, Manner::default());
        let kept: Vec<_> = plan.disks[0].points.iter().filter(|p| !p.keep.is_empty()).collect();
        assert_eq!(kept[0].keep, [Reason::Yearly("2023".into())]);
        assert_eq!(kept[1].keep[0], Reason::Yearly("2024".into()));
    }

    #[test]
    fn a_year_of_chains_keeps_what_is_needed() {
        let monthly = Rules { monthly: 2, ..Default::default() };
        let names = kept(&[year(true)], monthly);
        let all_of_two_months = names.iter().all(|n| n >= &"2023-11-01".to_string());
        assert!(all_of_two_months && names.len() == 61);
        let plan = plan(
            &[year(true)],
            &Rules { last: 5, ..Default::default() },
            &TimeZone::UTC,
            Manner { merge: Some(&|_, _, _| Ok(())), ..Default::default() },
        );
        assert_eq!(plan.disks[0].consolidate, ["2023-12-27"]);
        let merged: Vec<_> = (plan.disks[0].points.iter())
            .filter(|p| p.keep == [Reason::MergedInto("2023-12-27".into())])
            .map(|p| p.point.as_str())
            .collect();
        assert_eq!((merged.len(), merged[0], merged[25]), (26, "2023-12-01", "2023-12-26"));
        assert_eq!(plan.deleted().count(), 365 - 31);
    }

    #[test]
    fn a_chain_that_cannot_be_merged_stays_and_is_told_of() {
        let rules = Rules { last: 5, ..Default::default() };
        // The eleven months before go whole.
        let refuses = |disk: usize, point: usize, gone: &BTreeSet<usize>| {
            assert_eq!((disk, point, gone.len()), (0, 360, 334));
            Err("it is in use".to_string())
        };
        let manner = Manner { merge: Some(&refuses), ..Default::default() };
        let plan = plan(&[year(true)], &rules, &TimeZone::UTC, manner);
        let disk = &plan.disks[0];
        assert!(disk.consolidate.is_empty() && plan.deleted().count() == 334);
        let told: Vec<_> = disk.not_consolidated.iter().map(|u| (&*u.until, &*u.why)).collect();
        assert_eq!(told, [("2023-12-27", "it is in use")]);
        assert_eq!(disk.points[340].keep, [Reason::NeededBy("2023-12-08".into())]);
    }

    #[test]
    fn a_failed_newest_point_holds_everything_unless_forced() {
        let mut disk = year(false);
        disk.held = Some("the newest is unsound".into());
        let rules = Rules { last: 1, ..Default::default() };
        assert_eq!(kept(&[disk.clone()], rules).len(), 365);
        let forced = Manner { force: true, ..Default::default() };
        let plan = plan(&[disk], &rules, &TimeZone::UTC, forced);
        assert_eq!(plan.deleted().count(), 364);
    }

    #[test]
    fn what_a_broken_chain_may_lie_on_stays() {
        let mut disk = year(true);
        // December's chain has lost a point: nobody knows what the next one lies on.
        let at = disk.items.iter().position(|i| i.name == "2023-12-03").unwrap();
        disk.items.remove(at);
        for (i, item) in disk.items.iter_mut().enumerate().skip(at) {
            item.served = false;
            item.parent = (i > at).then(|| i - 1);
            item.chain = String::new();
        }
        disk.items[at].lies_on_unknown = true;
        // A FULL that is good came after.
        let mut full = disk.items[0].clone();
        (full.name, full.time) = ("new".into(), i64::MAX / 2);
        (full.file, full.chain, full.run) = ("new".into(), "new".into(), "new".into());
        disk.items.push(full);
        let rules = Rules { last: 1, ..Default::default() };
        let plan = plan(&[disk], &rules, &TimeZone::UTC, Manner::default());
        let keep = |name: &str| {
            let mut points = plan.disks[0].points.iter();
            points.find(|p| p.point == name).unwrap().keep.clone()
        };
        assert!(keep("2023-12-04").contains(&Reason::CannotBeServed));
        for older in ["2023-12-01", "2023-12-02"] {
            assert!(keep(older).contains(&Reason::MayBeNeededBy("2023-12-04".into())), "{older}");
        }
    }

    #[test]
    fn the_last_complete_run_and_whole_runs_stay() {
        let (mut a, mut b) = (year(false), year(false));
        b.disk = "vm/sdb".into();
        b.timeline = "vm/sdb".into();
        // The last ten runs have only one disk; the other one's day 100 is missing.
        b.items.truncate(355);
        a.items.remove(100);
        let rules = Rules { last: 1, ..Default::default() };
        let plan = plan(&[a, b], &rules, &TimeZone::UTC, Manner::default());
        let kept = |d: usize| -> Vec<&str> {
            let points = plan.disks[d].points.iter().filter(|p| !p.keep.is_empty());
            points.map(|p| p.point.as_str()).collect()
        };
        assert_eq!(kept(0), ["2023-12-21", "2023-12-31"]);
        assert_eq!(kept(1), ["2023-12-21"]);
    }

    fn forest() -> impl Strategy<Value = DiskItems> {
        let item =
            (0i64..4_000_000, 0usize..4, prop::bool::weighted(0.9), any::<prop::sample::Index>());
        prop::collection::vec(item, 1..60).prop_map(|raw| {
            let mut items: Vec<Item> = Vec::new();
            for (n, (time, level, served, parent)) in raw.into_iter().enumerate() {
                let level = [Level::Full, Level::Inc, Level::Diff, Level::Copy][level];
                let below = matches!(level, Level::Inc | Level::Diff) && n > 0;
                let parent = below.then(|| parent.index(n));
                let chain = parent.map_or(n.to_string(), |p| items[p].chain.clone());
                let served = served && parent.is_none_or(|p| items[p].served);
                let (name, file) = (n.to_string(), n.to_string().into());
                let run = (time / 1000).to_string();
                let lies_on_unknown = !served && parent.is_none() && below;
                items.push(Item {
                    name,
                    time,
                    level,
                    served,
                    parent,
                    lies_on_unknown,
                    run,
                    file,
                    chain,
                    bytes: 1,
                });
            }
            DiskItems { disk: "d".into(), timeline: "d".into(), items, held: None }
        })
    }

    proptest! {
        #[test]
        fn what_is_kept_is_restorable(
            mut disks in prop::collection::vec(forest(), 1..3),
            last in 0usize..5, daily in 0usize..5, weekly in 0usize..3, force: bool,
        ) {
            for (i, disk) in disks.iter_mut().enumerate() {
                disk.timeline = format!("vm/{i}").into();
            }
            let rules = Rules { last, daily, weekly, ..Default::default() };
            let can_merge = |d: usize, i: usize, _: &_| match (d + i) % 2 {
                0 => Ok(()),
                _ => Err("odd".to_string()),
            };
            let manner = Manner { force, merge: Some(&can_merge) };
            let plan = plan(&disks, &rules, &TimeZone::UTC, manner);
            for (disk, plan) in disks.iter().zip(&plan.disks) {
                for (i, item) in disk.items.iter().enumerate() {
                    let parent = item.parent.filter(|_| !plan.points[i].keep.is_empty());
                    if let Some(p) = parent {
                        prop_assert!(!plan.points[p].keep.is_empty(), "{i} without {p}");
                    }
                }
                let served = disk.items.iter().filter(|i| i.served);
                if let Some(newest) = served.map(|i| i.time).max() {
                    let stays = |i: usize| !plan.points[i].keep.is_empty();
                    let at_newest = |i: usize| disk.items[i].served && disk.items[i].time == newest;
                    prop_assert!((0..disk.items.len()).any(|i| at_newest(i) && stays(i)));
                }
            }
        }
    }
}
