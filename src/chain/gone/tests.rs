use std::path::Path;

use serde_json::json;

use super::*;
use crate::layout::Level;
use crate::manifest::tests::example;
use crate::manifest::{RunImage, Skipped, VmConfig};

const DAY: i64 = 86_400;

/// The newest point of a disk, made on a day in a run of the VM called `vm`; `change` alters its manifest.
fn last(
    (disk, vm): (&str, &str),
    (day, run): (i64, &str),
    change: impl Fn(&mut Manifest),
) -> (PathBuf, Last) {
    let mut m = example(&format!("FULL-{day}-{disk}.qcow2"), Level::Full, None);
    (m.run, m.time, m.disk.node) = (run.into(), day * DAY, disk.into());
    m.vm = VmConfig::from(json!({"query-name": {"name": vm}}));
    m.run_images = vec![RunImage { disk: disk.into(), image: m.image.clone() }];
    change(&mut m);
    let path = Path::new(vm).join(disk);
    let disk = Disk { path: path.clone(), points: Vec::new(), findings: Vec::new() };
    (path, Last::of(&disk, day * DAY, &m))
}

fn same(_: &mut Manifest) {}

/// What is gone of these, a day after the year 2001 began: `d vm/sdb` for a disk, `v vm/sdb` for a VM.
fn found(all: Vec<(PathBuf, Last)>) -> Vec<String> {
    let found = judged(&all.into_iter().collect(), 11_400 * DAY);
    let word = |w| if w == GoneWhat::Disk { "d" } else { "v" };
    found.iter().map(|(d, g)| format!("{} {}", word(g.what), d.display())).collect()
}

/// The VM's newest run has a point of `sda`, by `change`; that of `sdb` is older by a day.
fn of_sdb(change: impl Fn(&mut Manifest)) -> Vec<String> {
    found(vec![
        last(("sda", "vm"), (2, "new"), change),
        last(("sdb", "vm"), (1, "old"), same),
        last(("sdc", "vm"), (2, "new"), same),
    ])
}

#[test]
fn a_disk_is_gone_of_which_the_newest_run_knows_nothing() {
    assert_eq!(of_sdb(same), ["d vm/sdb"]);
    let both = vec![last(("sda", "vm"), (1, "a"), same), last(("sdb", "vm"), (1, "a"), same)];
    assert_eq!(found(both), Vec::<String>::new());
    let gone = judged(
        &[last(("sda", "vm"), (9, "b"), same), last(("sdb", "vm"), (2, "a"), same)].into(),
        9 * DAY,
    );
    let gone = gone[Path::new("vm/sdb")];
    assert_eq!((gone.seconds(), gone.last_point), (7 * 86_400, 2 * DAY));
}

#[test]
fn a_disk_that_was_left_out_or_failed_or_lost_its_image_is_not_gone() {
    let skipped = |disk: &str, reason: &str| {
        let (disk, reason) = (disk.to_string(), reason.to_string());
        move |m: &mut Manifest| {
            m.skipped.push(Skipped { disk: disk.clone(), reason: reason.clone() })
        }
    };
    for reason in [EXCLUDED, NOT_INCLUDED, "read-only"] {
        assert!(of_sdb(skipped("sdb", reason)).is_empty(), "{reason}");
    }
    assert!(
        of_sdb(|m| m.failed.push(Skipped { disk: "sdb".into(), reason: "x".into() })).is_empty()
    );
    let made = |disk: &str, image: &str| {
        let (disk, image) = (disk.to_string(), image.to_string());
        move |m: &mut Manifest| {
            m.run_images.push(RunImage { disk: disk.clone(), image: image.clone() })
        }
    };
    assert!(of_sdb(made("sdb", "FULL-2-sdb.qcow2")).is_empty());
    // One that is there says nothing of another disk that had its name.
    assert_eq!(of_sdb(made("sdb", "FULL-2-sdc.qcow2")), ["d vm/sdb"]);
    // Under a name that nobody knows it may be this one; an empty drive is none.
    assert!(of_sdb(skipped("#block7", EXCLUDED)).is_empty());
    assert_eq!(of_sdb(skipped("ide1-cd0", "no medium")), ["d vm/sdb"]);
}

#[test]
fn where_it_cannot_be_told_nothing_is_gone() {
    assert!(of_sdb(|m| m.consistency.reason = OFFLINE.into()).is_empty());
    // What was interrupted may have had it.
    assert!(of_sdb(|m| m.run_images.clear()).is_empty());
    let nameless = |m: &mut Manifest| m.vm = VmConfig::default();
    let all =
        vec![last(("sda", "vm"), (2, "new"), nameless), last(("sdb", "vm"), (1, "old"), nameless)];
    assert!(found(all).is_empty());
    // A run without an id is no run.
    let all = vec![last(("sda", "vm"), (2, ""), same), last(("sdb", "vm"), (1, "old"), same)];
    assert!(found(all).is_empty());
}

#[test]
fn a_vm_is_gone_that_others_have_left_behind() {
    let two = |days: i64| {
        vec![last(("sda", "old"), (100, "a"), same), last(("sda", "new"), (100 + days, "b"), same)]
    };
    assert!(found(two(30)).is_empty());
    assert_eq!(found(two(31)), ["v old/sda"]);
    // Other VMs' runs say nothing of a disk, nor does a point of the future of a VM.
    assert!(found(two(1)).is_empty());
    assert!(found(two(20_000)).is_empty());
}
