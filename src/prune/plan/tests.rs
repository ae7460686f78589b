use super::*;
use crate::chain::gone::{Gone, GoneWhat};
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
    DiskItems { disk: "vm/sda".into(), timeline: "vm/sda".into(), items, held: None, gone: None }
}

fn kept(disks: &[DiskItems], rules: Rules) -> Vec<String> {
    let plan = plan(disks, &rules, &TimeZone::UTC, PlanOptions::default());
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
    let plan = plan(&[year(false)], &rules, &tokyo, PlanOptions::default());
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
        PlanOptions { merge: Some(&|_, _, _| Ok(())), ..Default::default() },
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
    let options = PlanOptions { merge: Some(&refuses), ..Default::default() };
    let plan = plan(&[year(true)], &rules, &TimeZone::UTC, options);
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
    let forced = PlanOptions { force: true, ..Default::default() };
    let plan = plan(&[disk], &rules, &TimeZone::UTC, forced);
    assert_eq!(plan.deleted().count(), 364);
}

#[test]
fn what_a_broken_chain_may_depend_on_stays() {
    let mut disk = year(true);
    // December's chain has lost a point: nobody knows what the next one depends on.
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
    let plan = plan(&[disk], &rules, &TimeZone::UTC, PlanOptions::default());
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
fn reasons_do_not_grow_with_the_square_of_the_points() {
    let reasons = |count: usize| {
        let mut disk = year(false);
        let pattern = disk.items[0].clone();
        disk.items = (0..count)
            .map(|i| Item {
                name: i.to_string(),
                time: i as i64,
                level: if i % 2 == 0 { Level::Full } else { Level::Inc },
                served: i % 2 == 0,
                lies_on_unknown: i % 2 == 1,
                file: format!("d/{i}").into(),
                chain: i.to_string(),
                ..pattern.clone()
            })
            .collect();
        let rules = Rules { last: 1, ..Default::default() };
        let plan = plan(&[disk], &rules, &TimeZone::UTC, PlanOptions::default());
        // The last is lost, and may depend on anything.
        assert!(plan.disks[0].points.iter().all(|p| !p.keep.is_empty()));
        plan.disks[0].points.iter().map(|p| p.keep.len()).sum::<usize>()
    };
    let (few, many) = (reasons(40), reasons(400));
    assert!(few >= 40 && many <= 11 * few, "{few} {many}");
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
    let plan = plan(&[a, b], &rules, &TimeZone::UTC, PlanOptions::default());
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
        DiskItems { disk: "d".into(), timeline: "d".into(), items, held: None, gone: None }
    })
}

proptest! {
    #![proptest_config(crate::failpoint::properties(256))]
    #[test]
    fn what_is_kept_is_restorable(
        mut disks in prop::collection::vec(forest(), 1..3),
        last in 0usize..5, daily in 0usize..5, weekly in 0usize..3, force: bool,
        gone in prop::collection::vec(prop::option::of(0i64..200), 2), keep_gone in 0u64..200,
    ) {
        for (i, disk) in disks.iter_mut().enumerate() {
            disk.timeline = format!("vm/{i}").into();
            disk.gone = gone[i].map(|newest_backup| {
                Gone { what: GoneWhat::Disk, last_point: 0, newest_backup }
            });
        }
        let rules = Rules { last, daily, weekly, gone: KeepGone::For(keep_gone), ..Default::default() };
        let can_merge = |d: usize, i: usize, _: &_| match (d + i) % 2 {
            0 => Ok(()),
            _ => Err("odd".to_string()),
        };
        let options = PlanOptions { force, merge: Some(&can_merge) };
        let plan = plan(&disks, &rules, &TimeZone::UTC, options);
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

/// A disk of daily FULLs that is gone since a hundred days, and one beside it that has runs in common with it.
fn one_gone() -> [DiskItems; 2] {
    let here = year(false);
    let mut other = year(false);
    (other.disk, other.timeline) = ("vm/sdb".into(), "vm/sdb".into());
    other.items.truncate(265);
    let last_point = other.items[264].time;
    let newest_backup = here.items[364].time;
    other.gone = Some(Gone { what: GoneWhat::Disk, last_point, newest_backup });
    [here, other]
}

#[test]
fn what_is_gone_has_a_rule_of_its_own_and_keeps_nothing_of_the_others() {
    let disks = one_gone();
    let count = |gone: &str| {
        let rules = Rules { daily: 7, gone: gone.parse().unwrap(), ..Default::default() };
        let plan = plan(&disks, &rules, &TimeZone::UTC, PlanOptions::default());
        let kept = |d: usize| plan.disks[d].points.iter().filter(|p| !p.keep.is_empty()).count();
        assert!(plan.disks[0].gone.is_none() && plan.disks[1].gone.is_some());
        let newest = &plan.disks[1].points[264].keep;
        assert!(newest.contains(&Reason::Newest), "{newest:?}");
        (kept(0), kept(1))
    };
    // Nor is a run complete without it any more.
    assert_eq!(count("all"), (7, 265));
    assert_eq!(count("3"), (7, 3));
    assert_eq!(count("100d"), (7, 265));
    assert_eq!(count("99d"), (7, 1));
    // A run that is kept for a disk that is there is kept whole.
    let rules = Rules { monthly: 12, gone: "1".parse().unwrap(), ..Default::default() };
    let plan = plan(&disks, &rules, &TimeZone::UTC, PlanOptions::default());
    let january = |d: usize| plan.disks[d].points[30].keep.clone();
    assert_eq!(january(0), [Reason::Monthly("2023-01".into())]);
    assert_eq!(january(1), [Reason::SameRun]);
}

#[test]
fn of_a_vm_that_is_gone_the_same_runs_stay_of_all_disks() {
    let [mut first, mut second] = one_gone();
    second.items = first.items.clone();
    // Its last run failed for one of them.
    second.items.pop();
    for disk in [&mut first, &mut second] {
        let last_point = disk.items[disk.items.len() - 1].time;
        disk.gone = Some(Gone { what: GoneWhat::Vm, last_point, newest_backup: last_point + 1 });
    }
    let rules = Rules { daily: 7, gone: "1".parse().unwrap(), ..Default::default() };
    let plan = plan(&[first, second], &rules, &TimeZone::UTC, PlanOptions::default());
    let kept = |d: usize| {
        let kept = plan.disks[d].points.iter().filter(|p| !p.keep.is_empty());
        kept.map(|p| p.point.clone()).collect::<Vec<_>>()
    };
    assert_eq!(kept(0), ["2023-12-30", "2023-12-31"]);
    assert_eq!(kept(1), ["2023-12-30"]);
}

#[test]
fn a_rule_for_what_is_gone_alone_is_none() {
    assert!(Rules { gone: "1".parse().unwrap(), ..Default::default() }.is_empty());
    assert!(!Rules { last: 1, ..Default::default() }.is_empty());
}
