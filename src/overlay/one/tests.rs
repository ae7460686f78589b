use proptest::prelude::*;

use super::*;
use crate::failpoint::properties;
use crate::folder::Folder;

const SIZE: u64 = 40 * BLOCK + 1000;

/// A disk of bytes that tell their place.
fn point() -> Vec<u8> {
    (0..SIZE).map(|i| (i / 7 + i) as u8 | 1).collect()
}

fn below(point: &[u8]) -> impl Below {
    move |buf: &mut [u8], at: u64| {
        buf.copy_from_slice(&point[at as usize..at as usize + buf.len()]);
        Ok(())
    }
}

/// A file of a folder, made if it is not there.
fn file(dir: &Path, name: &str) -> ScratchFile {
    let folder = Arc::new(Folder::open(&dir.canonicalize().unwrap()).unwrap());
    match folder.has(name) {
        true => ScratchFile::open(&folder, name).unwrap(),
        false => ScratchFile::create(&folder, name).unwrap(),
    }
}

fn kept(dir: &Path) -> Files {
    Files { data: Arc::new(file(dir, "data")), base: 0, map: Some(file(dir, "map")) }
}

fn all(overlay: &Overlay, point: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    overlay.read_at(below(point), &mut bytes, 0).unwrap();
    bytes
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Read(u64, u64),
    Sync,
    Reopen,
    /// Others need the descriptors.
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || {
        // Short ones, long ones, and whole blocks.
        let any = (0..SIZE, 1..9000_u64);
        let whole = (0..40_u64, 1..20_u64).prop_map(|(at, len)| (at * BLOCK, len * BLOCK));
        prop_oneof![any, whole].prop_map(|(at, len)| (at, len.min(SIZE - at)))
    };
    let step = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        2 => range().prop_map(|(at, len)| Step::Read(at, len)),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
        1 => Just(Step::Close),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(properties(256))]

    #[test]
    fn writes_discards_and_reads_are_as_on_a_disk_also_when_it_is_kept(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let (point, mut model) = (point(), point());
        let budget = Arc::new(Budget::new(u64::MAX));
        let mut overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
        for step in steps {
            match step {
                Step::Write(at, len, byte) => {
                    let data = vec![byte; len as usize];
                    overlay.write(below(&point), &data, at).unwrap();
                    model[at as usize..(at + len) as usize].fill(byte);
                }
                Step::Zero(at, len) => {
                    overlay.zero(below(&point), at, len).unwrap();
                    model[at as usize..(at + len) as usize].fill(0);
                }
                Step::Read(at, len) => {
                    let mut buf = vec![0xee; len as usize];
                    overlay.read_at(below(&point), &mut buf, at).unwrap();
                    prop_assert_eq!(&buf[..], &model[at as usize..(at + len) as usize]);
                }
                Step::Sync => overlay.sync().unwrap(),
                Step::Close => {
                    overlay.file.close();
                    overlay.map_file.as_ref().unwrap().close();
                }
                Step::Reopen => {
                    overlay.sync().unwrap();
                    let used = budget.used();
                    drop(overlay);
                    prop_assert_eq!(budget.used(), 0);
                    overlay = Overlay::resumed(SIZE, kept(dir.path()), &budget).unwrap();
                    prop_assert_eq!(budget.used(), used);
                }
            }
            prop_assert!(budget.used() >= overlay.data_bytes());
        }
        prop_assert!(all(&overlay, &point) == model);
    }
}

#[test]
fn what_was_not_synced_is_as_before_and_its_space_is_had_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (point, budget) = (point(), Arc::new(Budget::new(u64::MAX)));
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    overlay.write(below(&point), &[1; 100], 50).unwrap();
    overlay.sync().unwrap();
    let mut want = all(&overlay, &point);
    overlay.write(below(&point), &[2; 30 * BLOCK as usize], 4 * BLOCK).unwrap();
    // In place: the newer bytes are there, synced or not.
    overlay.write(below(&point), &[3; 10], 60).unwrap();
    want[60..70].fill(3);
    drop(overlay);
    let overlay = Overlay::resumed(SIZE, kept(dir.path()), &budget).unwrap();
    assert!(all(&overlay, &point) == want);
    let blocks = dir.path().join("data").metadata().unwrap().blocks() * 512;
    assert!(blocks <= 4 * BLOCK, "{blocks}");
}

#[test]
fn the_limit_is_never_passed_and_what_is_there_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let (point, budget) = (point(), Arc::new(Budget::new(64 << 10)));
    let weigh = |o: &Overlay| o.map.weigh().1.disk;
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    let e = overlay.write(below(&point), &[1; 20 * BLOCK as usize], 0).unwrap_err();
    assert_eq!(e.kind(), Kind::NoSpace);
    assert!(all(&overlay, &point) == point && budget.used() == weigh(&overlay));
    // The map takes four nodes and a leaf.
    let budget = Arc::new(Budget::new(DirtyMap::WEIGHT.disk * 4 + 5 * BLOCK));
    let dir = tempfile::tempdir().unwrap();
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    let mut want = point.clone();
    for block in 0..4 {
        overlay.write(below(&point), &[7; BLOCK as usize], block * BLOCK).unwrap();
        want[(block * BLOCK) as usize..][..BLOCK as usize].fill(7);
    }
    assert_eq!(budget.used(), budget.limit());
    let full = overlay.write(below(&point), &[9; 1], 5 * BLOCK).unwrap_err();
    assert_eq!(full.kind(), Kind::NoSpace);
    // What has a place can be written again, and what is given back can be used.
    overlay.write(below(&point), &[8; 10], 10).unwrap();
    want[10..20].fill(8);
    overlay.zero(below(&point), 2 * BLOCK, BLOCK).unwrap();
    want[2 * BLOCK as usize..3 * BLOCK as usize].fill(0);
    overlay.write(below(&point), &[9; 1], 5 * BLOCK).unwrap();
    want[5 * BLOCK as usize] = 9;
    assert!(all(&overlay, &point) == want);
    assert_eq!(budget.used(), weigh(&overlay) + 4 * BLOCK);
}

#[test]
fn while_a_block_is_filled_up_nobody_else_writes_there() {
    let dir = tempfile::tempdir().unwrap();
    let (point, budget) = (point(), Arc::new(Budget::new(u64::MAX)));
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    let asked = AtomicU64::new(0);
    let watched = |buf: &mut [u8], at: u64| {
        assert!(overlay.stripes.is_locked(at / BLOCK));
        asked.fetch_add(1, Ordering::SeqCst);
        below(&point)(buf, at)
    };
    overlay.write(watched, &[1; 10], 5).unwrap();
    overlay.write(watched, &[1; 3 * BLOCK as usize], BLOCK + 5).unwrap();
    overlay.zero(watched, 20 * BLOCK + 5, BLOCK).unwrap();
    assert!(asked.into_inner() >= 5);
    assert!((0..40).all(|block| !overlay.stripes.is_locked(block)));
}

#[test]
fn the_map_on_disk_never_names_data_that_is_not_and_a_failure_lasts() {
    let dir = tempfile::tempdir().unwrap();
    let (point, budget) = (point(), Arc::new(Budget::new(u64::MAX)));
    // It takes all writes and fails each fdatasync, as a disk may.
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let data = Arc::new(ScratchFile::held(null, "/dev/null".into(), None));
    let files = Files { data, ..kept(dir.path()) };
    let overlay = Overlay::new(SIZE, files, &budget).unwrap();
    for _ in 0..2 {
        overlay.write(below(&point), &[1; BLOCK as usize], 0).unwrap();
        overlay.sync().unwrap_err();
        let bytes = std::fs::read(dir.path().join("map")).unwrap();
        // Behind the page that says what it is.
        assert!(bytes.len() > 4096 && bytes[4096..].iter().all(|b| *b == 0));
    }
}

#[test]
fn an_overlay_that_was_cut_is_an_error_and_never_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let (point, budget) = (point(), Arc::new(Budget::new(u64::MAX)));
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    overlay.write(below(&point), &[1; 3 * BLOCK as usize], 0).unwrap();
    std::fs::OpenOptions::new().write(true).open(overlay.path()).unwrap().set_len(BLOCK).unwrap();
    let mut buf = vec![0; 2 * BLOCK as usize];
    overlay.read_at(below(&point), &mut buf[..BLOCK as usize], 0).unwrap();
    assert_eq!(overlay.read_at(below(&point), &mut buf, 0).unwrap_err().kind(), Kind::Truncated);
}

#[test]
fn a_point_that_cannot_be_read_fails_what_needs_it_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let budget = Arc::new(Budget::new(u64::MAX));
    let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
    let bad = |_: &mut [u8], _: u64| Err(Error::new(Kind::Corrupt, "bad"));
    let used = budget.used();
    assert_eq!(overlay.write(bad, &[1; 10], 5).unwrap_err().kind(), Kind::Corrupt);
    assert!(overlay.is_empty() && budget.used() == used);
    overlay.write(bad, &[1; BLOCK as usize], BLOCK).unwrap();
    overlay.write(bad, &[2; 10], BLOCK + 5).unwrap();
    let mut buf = [0; 20];
    overlay.read_at(bad, &mut buf, BLOCK).unwrap();
    assert_eq!(buf, [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1]);
    assert!(overlay.read_at(bad, &mut buf, 0).is_err());
}

#[test]
fn what_cannot_be_made_zeros_as_a_whole_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (point, unlimited) = (point(), Arc::new(Budget::new(u64::MAX)));
    let setup = |name: &str, budget: &Arc<Budget>| {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let overlay = Overlay::new(SIZE, kept(&dir), budget).unwrap();
        overlay.write(below(&point), &[7; 2 * BLOCK as usize], 9 * BLOCK).unwrap();
        overlay
    };
    // Room for one of the two blocks that are filled up.
    let probe = setup("probe", &unlimited);
    let taken = unlimited.used();
    drop(probe);
    let budget = Arc::new(Budget::new(taken + BLOCK));
    let overlay = setup("small", &budget);
    let before = all(&overlay, &point);
    let (at, len) = (4 * BLOCK + 10, 20 * BLOCK);
    let full = overlay.zero(below(&point), at, len).unwrap_err();
    assert_eq!(full.kind(), Kind::NoSpace);
    assert!(all(&overlay, &point) == before && budget.used() == taken);
    // A point whose last block cannot be read.
    let bad = |buf: &mut [u8], from: u64| match from / BLOCK {
        24 => Err(Error::new(Kind::Corrupt, "bad")),
        _ => below(&point)(buf, from),
    };
    let overlay = setup("unread", &unlimited);
    assert_eq!(overlay.zero(bad, at, len).unwrap_err().kind(), Kind::Corrupt);
    assert!(all(&overlay, &point) == before && unlimited.used() == taken);
    // And with all that is needed it is done.
    overlay.zero(below(&point), at, len).unwrap();
    let mut want = before;
    want[at as usize..][..len as usize].fill(0);
    assert!(all(&overlay, &point) == want);
}

#[test]
fn a_map_that_was_cut_or_is_of_another_disk_is_refused() {
    let (point, budget) = (point(), Arc::new(Budget::new(u64::MAX)));
    let resumed = |size: u64, harm: &dyn Fn(&std::fs::File)| {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::new(SIZE, kept(dir.path()), &budget).unwrap();
        overlay.write(below(&point), &[1; 100], 50).unwrap();
        overlay.sync().unwrap();
        drop(overlay);
        let map = dir.path().join("map");
        harm(&std::fs::OpenOptions::new().write(true).open(&map).unwrap());
        let overlay = Overlay::resumed(size, kept(dir.path()), &budget);
        overlay.map(|o| o.data_bytes()).map_err(|e| (e.kind(), e.path() == Some(&*map)))
    };
    assert_eq!(resumed(SIZE, &|_| ()), Ok(BLOCK));
    let whole = |file: &std::fs::File| file.metadata().unwrap().len();
    for cut in [1, 4000, 5000] {
        let harm = |file: &std::fs::File| file.set_len(whole(file) - cut).unwrap();
        assert_eq!(resumed(SIZE, &harm), Err((Kind::Truncated, true)), "{cut}");
    }
    assert_eq!(resumed(SIZE, &|f| f.set_len(0).unwrap()), Err((Kind::Truncated, true)));
    // Cut, and made as long as it was: by a copy that was interrupted, say.
    let regrown = |file: &std::fs::File| {
        let len = whole(file);
        file.set_len(0).unwrap();
        file.set_len(len).unwrap();
    };
    assert_eq!(resumed(SIZE, &regrown), Err((Kind::Corrupt, true)));
    assert_eq!(resumed(SIZE - 4096, &|_| ()), Err((Kind::Corrupt, true)));
}

/// A point of holes, but for a block at 1 GiB.
fn sparse(dir: &Path) -> Arc<Image> {
    use crate::layer::{Format, LayerPart, LayerSpec};
    let path = dir.canonicalize().unwrap().join("point.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(8 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; BLOCK as usize], 1 << 30).unwrap();
    let file = Arc::new(crate::storage::SourceFile::look(&path).unwrap());
    let layer = LayerSpec { file, format: Format::Raw, part: LayerPart::Whole, data_file: None };
    Image::new(8 << 40, &[layer], None, &crate::image::Cache::new(1 << 20)).unwrap()
}

#[test]
fn maps_have_a_limit_of_their_own_however_much_room_is_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (size, step) = (8 << 40, 16 << 20);
    let budget = Arc::new(Budget::with_memory(u64::MAX, 4 << 20));
    let no_point = |buf: &mut [u8], _: u64| {
        buf.fill(7);
        Ok(())
    };
    let overlay = Overlay::new(size, kept(dir.path()), &budget).unwrap();
    let full = (0..5000).map(|n| overlay.zero(no_point, n * step, BLOCK)).position(|done| {
        done.is_err_and(|e| e.kind() == Kind::NoSpace && e.report().contains("of memory"))
    });
    // Some 1 KiB for each 16 MiB.
    let full = full.unwrap() as u64;
    assert!((3000..4096).contains(&full), "{full}");
    let (most, used) = budget.memory();
    assert!(used <= most && used + 4096 > most, "{used}");
    assert!(!budget.tells_first(), "it was not told");
    // So are writes, and another overlay; what has its place in the map can be written and read.
    let e = overlay.write(no_point, &[1; 10], full * step).unwrap_err();
    assert_eq!(e.kind(), Kind::NoSpace);
    let other = tempfile::tempdir().unwrap();
    assert!(Overlay::new(size, kept(other.path()), &budget).is_err());
    overlay.write(no_point, &[1; 10], 5 * step).unwrap();
    let mut buf = [9; 12];
    overlay.read_at(no_point, &mut buf, 5 * step).unwrap();
    assert_eq!(buf, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    overlay.read_at(no_point, &mut buf, full * step).unwrap();
    assert_eq!(buf, [7; 12], "what was refused has changed");
    // What is remembered of its map on disk has its end, too.
    assert!(overlay.map_file.as_ref().unwrap().remembered() <= 4096);
    overlay.sync().unwrap();
    drop(overlay);
    assert_eq!((budget.memory().1, budget.used()), (0, 0));
    // What was kept is there, also where it is more than there may be now.
    let small = Arc::new(Budget::with_memory(u64::MAX, 1 << 20));
    let overlay = Overlay::resumed(size, kept(dir.path()), &small).unwrap();
    overlay.read_at(no_point, &mut buf, 5 * step).unwrap();
    assert_eq!(buf[..10], [1; 10]);
    overlay.write(no_point, &[2; 10], 6 * step).unwrap();
    assert!(overlay.write(no_point, &[2; 10], full * step).is_err());
}

#[test]
fn zeros_over_holes_of_the_point_take_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = sparse(dir.path());
    let budget = Arc::new(Budget::new(u64::MAX));
    let overlay = Overlay::new(image.size(), kept(dir.path()), &budget).unwrap();
    let used = budget.used();
    for n in 0..60 {
        overlay.zero_over(&image, n * (16 << 20) + 10, BLOCK).unwrap();
    }
    assert!(overlay.is_empty() && budget.used() == used);
    // Where there is something it is gone: of the point's, and of what was written.
    let read = |at: u64| {
        let mut buf = [9; 3];
        overlay.read_at(|buf, at| image.read_at(buf, at), &mut buf, at).unwrap();
        buf
    };
    let data = 1 << 30;
    assert_eq!((read(data), read(data - 3)), ([7; 3], [0; 3]));
    overlay.zero_over(&image, data - BLOCK, BLOCK + 2).unwrap();
    assert_eq!((read(data), read(data - 3)), ([0, 0, 7], [0; 3]));
    overlay.zero_over(&image, 0, image.size()).unwrap();
    assert_eq!(read(data), [0; 3]);
    overlay.write(|buf, at| image.read_at(buf, at), &[5; 10], 20).unwrap();
    assert_eq!(read(19), [0, 5, 5]);
    overlay.zero_over(&image, 20, 5).unwrap();
    assert_eq!((read(20), read(24)), ([0; 3], [0, 5, 5]));
    assert!(overlay.zero_over(&image, image.size() - 1, 2).is_err());
}
