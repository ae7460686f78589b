use std::ops::Deref;

use super::*;

/// One that stays open whoever closes files to make room: the other tests of this process do.
struct Pinned(SourceFile);

impl Pinned {
    fn of(file: SourceFile) -> Self {
        assert!(files::pin(std::iter::once(&file.slot)));
        file.file().unwrap();
        Pinned(file)
    }

    fn look(path: &Path) -> Self {
        Self::of(SourceFile::look(path).unwrap())
    }
}

impl Deref for Pinned {
    type Target = SourceFile;

    fn deref(&self) -> &SourceFile {
        &self.0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        drop(files::unpin(std::iter::once(&self.0.slot)));
    }
}

fn temp(bytes: &[u8]) -> tempfile::NamedTempFile {
    let f = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(f.path(), bytes).unwrap();
    f
}

#[test]
fn a_file_changed_in_place_is_noticed() {
    let f = temp(b"hello");
    let s = SourceFile::look(f.path()).unwrap();
    let mut buf = [0; 5];
    s.read_exact_at(&mut buf, 0).unwrap();
    s.check_unchanged().unwrap();
    std::fs::write(f.path(), b"hello, world").unwrap();
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
}

#[test]
fn another_name_is_no_change_but_a_later_ctime_is_one_even_then() {
    let f = temp(b"hello");
    let s = SourceFile::look(f.path()).unwrap();
    s.file().unwrap();
    let other = f.path().with_extension("link");
    for _ in 0..2 {
        std::fs::hard_link(f.path(), &other).unwrap();
        s.check_unchanged().unwrap();
        assert!(!s.is_changed_on_disk());
        std::fs::remove_file(&other).unwrap();
        s.check_unchanged().unwrap();
    }
    // With one name more than at the scan, a write that hides its mtime still shows.
    std::fs::hard_link(f.path(), &other).unwrap();
    s.check_unchanged().unwrap();
    write_hidden(f.path());
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
    std::fs::remove_file(&other).unwrap();
}

/// A write that hides its mtime.
fn write_hidden(path: &Path) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let before = file.metadata().unwrap().ctime_nsec();
    while file.metadata().unwrap().ctime_nsec() == before {
        file.write_at(b"J", 0).unwrap();
        file.set_modified(time).unwrap();
    }
}

#[test]
fn a_file_that_got_another_name_stays_readable_and_a_later_write_is_noticed() {
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).unwrap();
    let link = |from: &Path, to: &Path| {
        std::fs::hard_link(from, to).unwrap();
        std::fs::remove_file(from).unwrap();
    };
    for give in [&rename as &dyn Fn(&Path, &Path), &link] {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, b"hello").unwrap();
        let s = Pinned::look(&old);
        s.read_exact_at(&mut [0; 5], 0).unwrap();
        let before = std::fs::metadata(&old).unwrap().ctime_nsec();
        // Clocks tick coarsely.
        let mut names = [&old, &new];
        while std::fs::metadata(names[0]).unwrap().ctime_nsec() == before || names[0] == &old {
            give(names[0], names[1]);
            names.reverse();
        }
        s.check_unchanged().unwrap();
        s.read_exact_at(&mut [0; 5], 0).unwrap();
        s.check_unchanged().unwrap();
        write_hidden(&new);
        assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
    }
}

#[test]
fn a_name_that_went_before_explains_no_later_ctime() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, b"hello").unwrap();
    let s = Pinned::look(&old);
    std::fs::hard_link(&old, &new).unwrap();
    s.check_unchanged().unwrap();
    std::fs::remove_file(&old).unwrap();
    s.check_unchanged().unwrap();
    write_hidden(&new);
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
    // Nor does any, while the name is there.
    let s = Pinned::look(&new);
    write_hidden(&new);
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
}

#[test]
fn a_file_replaced_before_it_was_opened_is_noticed() {
    let f = temp(b"hello");
    let s = SourceFile::look(f.path()).unwrap();
    let other = temp(b"world");
    std::fs::rename(other.path(), f.path()).unwrap();
    assert_eq!(s.file().unwrap_err().kind(), Kind::Changed);
}

#[test]
fn an_unlinked_file_stays_readable_for_those_who_hold_it() {
    let f = temp(b"hello");
    let s = Pinned::look(f.path());
    drop(f);
    s.check_unchanged().unwrap();
    s.read_exact_at(&mut [0; 5], 0).unwrap();
}

#[test]
fn what_was_closed_meanwhile_is_opened_again_if_it_is_the_same() {
    let f = temp(b"hello");
    let s = SourceFile::look(f.path()).unwrap();
    let mut buf = [0; 5];
    for _ in 0..2 {
        s.read_exact_at(&mut buf, 0).unwrap();
        s.check_unchanged().unwrap();
        s.slot.close();
        s.check_unchanged().unwrap();
        assert_eq!(&buf, b"hello");
    }
    let moved = f.path().with_extension("moved");
    std::fs::rename(f.path(), &moved).unwrap();
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::NotFound);
    assert_eq!(s.read_exact_at(&mut buf, 0).unwrap_err().kind(), Kind::NotFound);
    // Same length, same time, another inode.
    let time = std::fs::metadata(&moved).unwrap().modified().unwrap();
    std::fs::write(f.path(), b"world").unwrap();
    std::fs::File::options().write(true).open(f.path()).unwrap().set_modified(time).unwrap();
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
    assert_eq!(s.read_exact_at(&mut buf, 0).unwrap_err().kind(), Kind::Changed);
    std::fs::remove_file(&moved).unwrap();
}

/// Changes names until the change time has moved: clocks tick coarsely.
fn until_ctime_moves(file: &std::fs::File, mut change: impl FnMut()) {
    let before = file.metadata().unwrap().ctime_nsec();
    while file.metadata().unwrap().ctime_nsec() == before {
        change();
    }
}

#[test]
fn a_hidden_write_together_with_a_new_name_is_noticed() {
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).unwrap();
    let link = |from: &Path, to: &Path| std::fs::hard_link(from, to).unwrap();
    let moved = |from: &Path, to: &Path| {
        link(from, to);
        std::fs::remove_file(from).unwrap();
    };
    for give in [&rename as &dyn Fn(&Path, &Path), &link, &moved] {
        for (closed, held) in [(false, false), (true, false), (false, true), (true, true)] {
            let dir = tempfile::tempdir().unwrap();
            let (old, new) = (dir.path().join("old"), dir.path().join("new"));
            std::fs::write(&old, b"hello").unwrap();
            let s = Pinned::of(match held {
                true => SourceFile::open_in(&Folder::open(dir.path()).unwrap(), "old").unwrap(),
                false => SourceFile::look(&old).unwrap(),
            });
            s.read_exact_at(&mut [0; 5], 0).unwrap();
            // Its descriptor may be somebody else's meanwhile.
            if closed && old.exists() {
                s.slot.close();
            }
            write_hidden(&old);
            give(&old, &new);
            let kind = s.check_unchanged().unwrap_err().kind();
            assert!(kind == Kind::Changed || closed && kind == Kind::NotFound, "{kind:?}");
        }
    }
}

#[test]
fn where_nobody_tells_of_writes_a_rename_may_be_one() {
    let dir = tempfile::tempdir().unwrap();
    let names = [dir.path().join("old"), dir.path().join("new")];
    std::fs::write(&names[0], b"hello").unwrap();
    let s = SourceFile::look(&names[0]).unwrap();
    s.writes.set(None).unwrap();
    let s = Pinned::of(s);
    let file = s.file().unwrap();
    std::fs::hard_link(&names[0], dir.path().join("third")).unwrap();
    s.check_unchanged().unwrap();
    let mut turn = 0;
    until_ctime_moves(&file, || {
        std::fs::rename(&names[turn % 2], &names[(turn + 1) % 2]).unwrap();
        turn += 1;
    });
    if turn % 2 == 0 {
        std::fs::rename(&names[0], &names[1]).unwrap();
    }
    assert_eq!(s.check_unchanged().unwrap_err().kind(), Kind::Changed);
}

#[test]
fn in_a_held_folder_plain_files_are_opened_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path()).unwrap();
    std::fs::write(dir.path().join("a"), b"hello").unwrap();
    std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let s = Pinned::of(SourceFile::open_in(&folder, "a").unwrap());
    assert_eq!((s.path(), s.len()), (&*dir.path().join("a"), 5));
    let kind = |name| SourceFile::open_in(&folder, name).unwrap_err().kind();
    assert_eq!(
        [kind("link"), kind("folder"), kind("none")],
        [Kind::Unsupported, Kind::Unsupported, Kind::NotFound]
    );
    // Held already, whatever becomes of the name; and checked, as what was read is.
    std::fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
    s.read_exact_at(&mut [0; 5], 0).unwrap();
    s.slot.close();
    assert!(s.check_unchanged().is_err());
}

/// Two readers look at the file; the one that looked first compares last.
#[test]
fn what_was_seen_before_another_reader_saw_a_rename_is_no_change() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, b"hello").unwrap();
    let s = Pinned::look(&old);
    let file = s.file().unwrap();
    let early = Identity::of_open(&file).unwrap();
    until_ctime_moves(&file, || {
        std::fs::hard_link(&old, &new).unwrap();
        std::fs::remove_file(&new).unwrap();
    });
    std::fs::rename(&old, &new).unwrap();
    s.check_unchanged().unwrap();
    let again = || Identity::of_open(&file).map(Some);
    assert!(s.is_unchanged(&early, again).unwrap());
    s.check_unchanged().unwrap();
    // By name it is the same; one that is gone says nothing.
    let s = SourceFile::look(&new).unwrap();
    let early = s.identity();
    std::fs::hard_link(&new, &old).unwrap();
    assert!(!s.is_changed_on_disk() && s.has_same_bytes(&early));
    std::fs::remove_file(&new).unwrap();
    assert!(!s.is_changed_on_disk());
}
