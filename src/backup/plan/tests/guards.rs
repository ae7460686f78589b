//! What is carried over from the last point's watermark, and the guards of a plan that nothing else stands before.

use super::*;

const TIP: &str = "000000000002";
const SIZE: u64 = 1 << 20;

fn mark(count: u64) -> Bitmap {
    Bitmap { recording: false, count, ..recording(names::watermark(&bitmap(TIP))) }
}

/// The plan for a disk of `size` bytes whose point knows of a watermark of which `left` bytes are there.
fn with_mark(size: u64, left: u64) -> DiskPlan {
    let t = chain();
    let d = t.path().join("d");
    let mut m = manifest::read(&d, OsStr::new("INC-2-d")).unwrap().unwrap();
    assert_eq!(m.virtual_size, SIZE);
    m.bitmap.as_mut().unwrap().watermark = true;
    manifest::write(&d, &m).unwrap();
    let bitmaps = both().into_iter().chain([mark(left)]).collect();
    auto(t.path(), GuestDisk { size, ..disk("/vm/d", bitmaps) })
}

#[test]
fn marks_are_taken_over_only_if_all_are_there_and_the_same_are_wanted() {
    let name = names::watermark(&bitmap(TIP));
    assert_eq!(with_mark(SIZE, SIZE).same_marks(), Some(&*name));
    // Another end has its mark elsewhere.
    assert_eq!(with_mark(SIZE + 65536, SIZE).same_marks(), None);
    assert_eq!(with_mark(SIZE, SIZE - 65536).same_marks(), None);
    let mut finer = with_mark(SIZE, SIZE);
    finer.new_bitmap.as_mut().unwrap().granularity = 4096;
    assert_eq!(finer.same_marks(), None);
}

#[test]
fn marks_prove_at_the_freeze_point_what_they_can() {
    let plan = with_mark(SIZE, SIZE - 65536);
    let left = |m: Bitmap| plan.marks_left(&[recording("x".into()), m]);
    assert_eq!(left(mark(SIZE - 65536)), SIZE - 65536);
    assert_eq!(left(mark(65536)), 65536);
    // Marks do not come back: these are somebody else's.
    assert_eq!(left(mark(SIZE)), 0);
    assert_eq!(left(Bitmap { recording: true, ..mark(65536) }), 0);
    assert_eq!(left(Bitmap { inconsistent: true, ..mark(65536) }), 0);
    assert_eq!(plan.marks_left(&[]), 0);
}

#[test]
fn a_disk_on_which_another_program_works_is_refused_by_name() {
    let t = chain();
    let busy =
        GuestDisk { busy: Some("the job 'move' works on it".into()), ..disk("/vm/d", both()) };
    let p = plan(t.path(), RequestedLevel::Auto(None), vec![busy], 100);
    assert!(p.disks.is_empty());
    let (label, why) = &p.refused[0];
    assert_eq!((label.as_str(), why.kind()), (disk("/vm/d", both()).label(), Kind::Busy));
    assert!(why.report().contains("'move'"), "{}", why.report());
}

#[test]
fn a_point_of_another_vm_is_nothing_to_build_on() {
    let t = chain();
    let p = plan_with(t.path(), RequestedLevel::Auto(None), vec![disk("/vm/d", both())], |i| {
        i.vm = Some("22222222");
    });
    assert_eq!(p.disks[0].level, Level::Full);
    let same = plan_with(t.path(), RequestedLevel::Auto(None), vec![disk("/vm/d", both())], |i| {
        i.vm = Some("11111111");
    });
    assert_eq!(same.disks[0].level, Level::Inc);
}

#[test]
fn a_name_without_a_time_is_given_once() {
    let full = |t: &Path, disks: Vec<GuestDisk>| {
        let layout = Layout { no_timestamp: true, ..Layout::default() };
        let options = Options { layout, ..options(t, RequestedLevel::Full) };
        plan_as(&options, disks, |_| ()).disks
    };
    let t = tempfile::tempdir().unwrap();
    let first = full(t.path(), vec![disk("/vm/d", Vec::new())]);
    assert_eq!(first[0].image, "d");
    std::fs::create_dir_all(&first[0].dir).unwrap();
    std::fs::write(first[0].dir.join("d"), "its image").unwrap();
    let second = full(t.path(), vec![disk("/vm/d", Vec::new())]);
    assert_eq!((&second[0].dir, second[0].image.as_str()), (&first[0].dir, "FULL-100-d"));
}

#[test]
fn two_disks_never_write_one_image() {
    let mut disks = vec![with_mark(SIZE, SIZE), with_mark(SIZE, SIZE), with_mark(SIZE, SIZE)];
    for d in &mut disks {
        d.dir = "/backups/d".into();
        d.image = "FULL-1-d".into();
    }
    separate_images(&mut disks);
    let images: Vec<&str> = disks.iter().map(|d| d.image.as_str()).collect();
    assert_eq!(images, ["FULL-1-d", "FULL-1-d-2", "FULL-1-d-2-2"]);
}
