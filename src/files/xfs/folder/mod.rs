//! Folders: in the inode (`short`), or in blocks of entries (`entries`), with a hash index behind them (`index`)
//! and a list of their free space (`space`) where they are more than one.

mod entries;
mod index;
mod short;
mod space;

use std::ops::Range;

use super::super::runs::{self, wrong_folder};
use super::super::tree::NodeId;
use super::blocks::logical;
use super::inode::{Fork, Form, Inode};
use super::map::{mapped, run};
use super::volume::Volume;
use crate::error::{Error, Result};
use entries::{Each, HEADER, Listed, dots, list};
use index::INDEX_AT;

/// Damaged blocks of a folder that are passed over before the rest is given up.
const MAX_BAD: usize = 1024;

/// Gives the entries of a folder from `from` on: see [`super::super::Tree::read_folder`]. A block that is wrong
/// does not hide those behind it: it is told at the end.
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn read(volume: &Volume, inode: &Inode, from: u64, each: &mut Each<'_>) -> Result<()> {
    let fork = fork(volume, inode)?;
    if fork.form == Form::Local {
        return short::read(volume, inode, &fork, from, each);
    }
    let mut reading = Reading { volume, inode, fork, from, each, error: None, bad: 0 };
    reading.blocks()?;
    reading.error.map_or(Ok(()), Err)
}

/// Where the entries of a folder are: see [`super::super::Tree::folder_places`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn places(volume: &Volume, inode: &Inode) -> Result<Vec<Range<u64>>> {
    let fork = fork(volume, inode)?;
    // Blocks of version 5 say whose they are.
    if volume.sup.v5 || fork.form == Form::Local {
        return Ok(Vec::new());
    }
    let end = INDEX_AT >> volume.sup.block_log;
    runs::places(end, volume.sup.block_size(), |block| run(volume, inode, &fork, block))
}

/// Whether a folder names itself as `.` and `parent` as `..`: see [`super::super::Tree::is_parent`].
///
/// # Errors
/// `Corrupt`, or what reading the point says.
pub(super) fn is_parent(volume: &Volume, inode: &Inode, parent: u64) -> Result<bool> {
    let fork = fork(volume, inode)?;
    if fork.form == Form::Local {
        return Ok(short::parent(&fork) == parent);
    }
    let (bytes, _) = logical(volume, inode, &fork, 0, 1 << volume.sup.dir_log, HEADER)?;
    Ok(dots(volume, &bytes) == Some((inode.number, parent)))
}

fn fork<'a>(volume: &Volume, inode: &'a Inode) -> Result<Fork<'a>> {
    let fork = inode.data().filter(|f| f.form != Form::Device);
    fork.ok_or_else(|| volume.bad(inode, "is a directory with an invalid form"))
}

/// The node that a folder has under this name: by its index, and where that has none by all its entries.
///
/// # Errors
/// As [`read`].
pub(super) fn lookup(volume: &Volume, inode: &Inode, name: &[u8]) -> Result<Option<NodeId>> {
    let ignores_case = volume.sup.ignores_case;
    let fork = fork(volume, inode)?;
    if !ignores_case && fork.form != Form::Local {
        // What is wrong with the index is no reason not to look.
        if let Ok(Some(found)) = index::find(volume, inode, &fork, name) {
            return Ok(Some(found));
        }
    }
    let mut found = None;
    let is_it = |other: &[u8]| match ignores_case {
        true => name.eq_ignore_ascii_case(other),
        false => name == other,
    };
    let all = read(volume, inode, 0, &mut |entry| {
        if is_it(&entry.name) {
            found = Some(entry.node);
        }
        found.is_none()
    });
    match found {
        Some(node) => Ok(Some(node)),
        None => all.map(|()| None),
    }
}

struct Reading<'a, 'b> {
    volume: &'a Volume,
    inode: &'a Inode,
    fork: Fork<'a>,
    from: u64,
    each: &'a mut Each<'b>,
    /// The first error of a block, and how many had one.
    error: Option<Error>,
    bad: usize,
}

impl Reading<'_, '_> {
    fn blocks(&mut self) -> Result<()> {
        let (volume, inode, fork) = (self.volume, self.inode, self.fork);
        let (log, step) = (volume.sup.block_log, 1 << volume.sup.dir_log);
        let find = |block| run(volume, inode, &fork, block);
        let end = INDEX_AT >> log;
        let mut block = (self.from >> log) / step * step;
        if block == 0
            && let Some(what) = wrong_folder(end, volume.sup.blocks, find)?
        {
            return Err(volume.bad(inode, what));
        }
        while block < end && self.bad < MAX_BAD {
            let found = mapped(volume, inode, &fork, block)?;
            if found.run.at.is_none() {
                // A block that begins with a hole ends with one.
                let next = block.saturating_add(found.run.count).saturating_add(step - 1) / step;
                self.hole(block / step..next, found.preallocated)?;
                block = next * step;
                continue;
            }
            if !self.block(block)? {
                return Ok(());
            }
            block += step;
        }
        Ok(())
    }

    /// The entries of the folder's block that begins with block `block`. Whether more is wanted.
    fn block(&mut self, block: u64) -> Result<bool> {
        let (volume, inode, from) = (self.volume, self.inode, self.from);
        let read = logical(volume, inode, &self.fork, block, 1 << volume.sup.dir_log, HEADER);
        let listed = read.and_then(|(bytes, at)| {
            let offset = block << volume.sup.block_log;
            list(volume, inode, &bytes, Listed { offset, at, from }, self.each)
        });
        match listed {
            Ok(more) => Ok(more),
            Err(e) => self.skip(e).map(|()| true),
        }
    }

    /// Looks whether these blocks of the folder may be a hole: those before its end have to be given back.
    fn hole(&mut self, blocks: Range<u64>, preallocated: bool) -> Result<()> {
        let (volume, inode) = (self.volume, self.inode);
        let log = volume.sup.block_log + volume.sup.dir_log;
        let end = inode.size().div_ceil(1 << log).min(blocks.end);
        let right = match () {
            () if preallocated => Ok(false),
            () if blocks.start >= end => Ok(true),
            () => space::are_given_back(volume, inode, &self.fork, blocks.start..end),
        };
        match right {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.skip(volume.bad(inode, "is a directory that lacks some of its blocks"))
            }
            Err(e) => self.skip(e),
        }
    }

    /// Goes on after something that is wrong for good.
    fn skip(&mut self, error: Error) -> Result<()> {
        if !error.kind().is_lasting() {
            return Err(error);
        }
        self.bad += 1;
        self.error.get_or_insert(error);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::{ENTRIES, INDEX};
    use super::super::made::{FILE, Made, Parts, extent, inode};
    use super::*;

    const FOLDER: Parts<'static> = Parts { mode: 0o040_755, ..FILE };

    /// A block of entries of 2 KiB: names and inodes; the rest is free.
    fn entries(v5: bool, magic: &[u8; 4], list: &[(&[u8], u64)], end: usize) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        bytes[..4].copy_from_slice(magic);
        let mut at = if v5 { 64 } else { 16 };
        for (name, number) in list {
            let len = (11 + usize::from(v5) + name.len()).next_multiple_of(8);
            bytes[at..at + 8].copy_from_slice(&number.to_be_bytes());
            bytes[at + 8] = name.len() as u8;
            bytes[at + 9..at + 9 + name.len()].copy_from_slice(name);
            if v5 {
                bytes[at + 9 + name.len()] = 1;
            }
            bytes[at + len - 2..at + len].copy_from_slice(&(at as u16).to_be_bytes());
            at += len;
        }
        bytes[at..at + 2].fill(0xff);
        bytes[at + 2..at + 4].copy_from_slice(&((end - at) as u16).to_be_bytes());
        bytes
    }

    fn names(volume: &Volume, folder: &Inode, from: u64) -> (Vec<String>, Vec<u64>, Option<Error>) {
        let (mut names, mut nexts) = (Vec::new(), Vec::new());
        let read = read(volume, folder, from, &mut |entry| {
            names.push(String::from_utf8_lossy(&entry.name).into_owned());
            nexts.push(entry.next);
            true
        });
        (names, nexts, read.err())
    }

    #[test]
    fn small_folders_are_in_their_inode() {
        for (v5, wide) in [(true, false), (true, true), (false, false), (false, true)] {
            let volume = Made::new(v5).volume();
            let mut data = vec![3, u8::from(wide)];
            data.extend(vec![0; if wide { 8 } else { 4 }]);
            for name in ["a", "..", "name"] {
                data.extend([name.len() as u8, 0, 64]);
                data.extend(name.bytes());
                data.extend(&[1][..usize::from(v5)]);
                data.extend(if wide { &[0xff, 0, 0, 0, 0, 0, 0, 10][..] } else { &[0, 0, 0, 10] });
            }
            let size = data.len() as u64;
            let parts = Parts { forms: [1, 2], size, data: &data, ..FOLDER };
            let folder = inode(v5, parts);
            let (all, nexts, error) = names(&volume, &folder, 0);
            assert!(all == ["a", "name"] && error.is_none() && nexts[0] < nexts[1], "{all:?}");
            assert_eq!(names(&volume, &folder, nexts[0]).0, ["name"]);
            assert!(names(&volume, &folder, nexts[1]).0.is_empty());
            assert_eq!(lookup(&volume, &folder, b"name").unwrap().unwrap().number, 10);
            assert_eq!(lookup(&volume, &folder, b"nam").unwrap(), None);
            // One byte less than there should be.
            let (all, _, error) = names(&volume, &inode(v5, Parts { size: size - 1, ..parts }), 0);
            assert!(all == ["a"] && error.unwrap().message().contains("invalid directory entries"));
            let (all, _, error) = names(&volume, &inode(v5, Parts { size: 0, ..parts }), 0);
            assert!(all.is_empty() && error.is_none());
        }
    }

    #[test]
    fn a_folder_of_one_block_ends_with_its_index() {
        for v5 in [true, false] {
            let magic = if v5 { b"XDB3" } else { b"XD2B" };
            let list: [(&[u8], u64); 5] =
                [(b".", 9), (b"..", 8), (b"file", 10), (b"a/b", 11), (b"out", 1 << 40)];
            let mut made = Made::new(v5);
            let mut bytes = entries(v5, magic, &list, 2048 - 8 - 5 * 8);
            bytes[2040..2044].copy_from_slice(&5u32.to_be_bytes());
            made.block(50, ENTRIES, bytes.clone());
            // Its index would begin before its entries.
            bytes[2040..2044].copy_from_slice(&5000u32.to_be_bytes());
            made.block(60, ENTRIES, bytes);
            let volume = made.volume();
            let with = |place| {
                let list = extent(0, place, 2, true);
                inode(v5, Parts { data: &list, extents: [1, 0], size: 2048, ..FOLDER })
            };
            let (all, _, error) = names(&volume, &with(50), 0);
            assert!(all == ["file"] && error.is_none(), "{all:?} {error:?}");
            let odd = volume.findings.list();
            assert!(odd.len() == 2 && odd[0].message.contains("invalid entry skipped"), "{odd:?}");
            assert!(names(&volume, &with(60), 0).2.is_some());
        }
    }

    #[test]
    fn damage_in_a_block_does_not_hide_the_others() {
        for v5 in [true, false] {
            let magic = if v5 { b"XDD3" } else { b"XD2D" };
            let mut made = Made::new(v5);
            let good = |name: &'static [u8]| entries(v5, magic, &[(name, 10)], 2048);
            made.block(50, ENTRIES, good(b"first"));
            let mut bad = good(b"second");
            let head = if v5 { 64 } else { 16 };
            // The place that an entry has of itself.
            bad[head + 23] ^= 1;
            made.block(52, ENTRIES, bad);
            made.block(54, ENTRIES, good(b"third"));
            // Free, and of no length.
            let mut none = entries(v5, magic, &[], 2048);
            none[head + 3] = 0;
            none[head + 2] = 0;
            made.block(56, ENTRIES, none);
            let volume = made.volume();
            let list = [
                extent(0, 50, 2, true),
                extent(2, 52, 2, true),
                extent(6, 54, 2, true),
                extent(8, 56, 2, true),
            ];
            let folder = inode(v5, Parts { data: &list.concat(), extents: [4, 0], ..FOLDER });
            let (all, nexts, error) = names(&volume, &folder, 0);
            assert_eq!(all, ["first", "third"]);
            assert!(error.unwrap().message().contains("invalid directory entry"));
            assert!(nexts[0] > 16 && nexts[1] > 6 * 1024 && nexts[1] <= 8 * 1024);
            assert_eq!(names(&volume, &folder, nexts[0]).0, ["third"]);
            assert_eq!(lookup(&volume, &folder, b"third").unwrap().unwrap().number, 10);
            assert!(lookup(&volume, &folder, b"fourth").is_err());
            // The same block twice, and one of which a half is a hole.
            let twice = [extent(0, 50, 2, true), extent(4, 50, 2, true)].concat();
            let folder = inode(v5, Parts { data: &twice, extents: [2, 0], ..FOLDER });
            assert!(names(&volume, &folder, 0).2.unwrap().message().contains("twice"));
            let half = extent(0, 50, 1, true);
            let folder = inode(v5, Parts { data: &half, extents: [1, 0], ..FOLDER });
            assert!(names(&volume, &folder, 0).2.unwrap().message().contains("in a hole"));
        }
    }

    /// A leaf of an index: hashes and places.
    fn leaf(v5: bool, list: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        let (magic, count, mut at) = if v5 { (0x3df1u16, 56, 64) } else { (0xd2f1, 12, 16) };
        bytes[8..10].copy_from_slice(&magic.to_be_bytes());
        bytes[count..count + 2].copy_from_slice(&(list.len() as u16).to_be_bytes());
        for (hash, place) in list {
            bytes[at..at + 4].copy_from_slice(&hash.to_be_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&place.to_be_bytes());
            at += 8;
        }
        bytes
    }

    #[test]
    fn an_index_is_believed_only_if_the_name_is_there() {
        use super::super::hashed::name_hash;
        for v5 in [true, false] {
            let magic = if v5 { b"XDD3" } else { b"XD2D" };
            let mut made = Made::new(v5);
            made.block(
                50,
                ENTRIES,
                entries(v5, magic, &[(b"one", 10), (b"two", 11), (b"one", 12)], 2048),
            );
            let head = if v5 { 64u32 } else { 16 };
            let hash = |name: &[u8]| name_hash(name);
            // That of "one" says both that have the name and one that has not; that of "two" lies.
            let mut list = vec![(hash(b"one"), (head + 32) / 8), (hash(b"one"), head / 8)];
            list.extend([
                (hash(b"one"), (head + 16) / 8),
                (hash(b"one"), 0),
                (hash(b"two"), 1 << 30),
            ]);
            list.sort_by_key(|e| e.0);
            made.block(60, INDEX, leaf(v5, &list));
            let volume = made.volume();
            let at = INDEX_AT >> 10;
            let map = [extent(0, 50, 2, true), extent(at, 60, 2, true)].concat();
            let folder = inode(v5, Parts { data: &map, extents: [2, 0], size: 2048, ..FOLDER });
            let fork = folder.data().unwrap();
            let indexed = index::find(&volume, &folder, &fork, b"one").unwrap().unwrap();
            assert_eq!(indexed.number, 10, "the first of them");
            assert!(!matches!(index::find(&volume, &folder, &fork, b"two"), Ok(Some(_))));
            assert_eq!(lookup(&volume, &folder, b"two").unwrap().unwrap().number, 11);
            assert_eq!(lookup(&volume, &folder, b"three").unwrap(), None);
        }
    }

    /// Notes of free space: at the end of the only leaf of an index, or in a block of their own.
    fn noted(v5: bool, in_leaf: bool, notes: &[u16]) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        let mut at = if v5 { 64 } else { 16 };
        if in_leaf {
            bytes = leaf(v5, &[]);
            bytes[2044..].copy_from_slice(&(notes.len() as u32).to_be_bytes());
            at = 2044 - 2 * notes.len();
        }
        for note in notes {
            bytes[at..at + 2].copy_from_slice(&note.to_be_bytes());
            at += 2;
        }
        bytes
    }

    #[test]
    fn only_blocks_that_were_given_back_may_be_missing() {
        for v5 in [true, false] {
            let magic = if v5 { b"XDD3" } else { b"XD2D" };
            let mut made = Made::new(v5);
            made.block(50, ENTRIES, entries(v5, magic, &[(b"first", 10)], 2048));
            made.block(52, ENTRIES, entries(v5, magic, &[(b"third", 10)], 2048));
            for (i, notes) in [&[8, 0xffff, 8][..], &[8, 8, 8], &[8]].into_iter().enumerate() {
                made.block(60 + 2 * i, INDEX, noted(v5, true, notes));
                made.block(70 + 2 * i, ENTRIES, noted(v5, false, notes));
            }
            let mut node = leaf(v5, &[]);
            node[8..10].copy_from_slice(if v5 { &[0x3e, 0xbe] } else { &[0xfe, 0xbe] });
            made.block(66, INDEX, node);
            let volume = made.volume();
            let with = |index: u64, free: u64, first: bool, size: u64| {
                let at = INDEX_AT >> 10;
                let list = [
                    extent(0, 50, 2, first),
                    extent(4, 52, 2, true),
                    extent(at, index, 2, true),
                    extent(2 * at, free, 2, true),
                ];
                let parts = Parts { data: &list.concat(), extents: [4, 0], size, ..FOLDER };
                let (all, _, error) = names(&volume, &inode(v5, parts), 0);
                (all, error.map(|e| e.message().to_string()))
            };
            let told = |found: (Vec<String>, Option<String>)| {
                found.1.is_some_and(|why| why.contains("lacks some of its blocks"))
            };
            for (index, free) in [(60, 70), (66, 70)] {
                assert_eq!(
                    with(index, free, true, 6144),
                    (vec!["first".into(), "third".into()], None)
                );
                // One that was not written, and one behind the last.
                let found = with(index, free, false, 6144);
                assert!(found.0 == ["third"] && told(found));
                assert!(told(with(index, free, true, 8192)));
            }
            for (index, free) in [(62, 70), (64, 70), (66, 72), (66, 74)] {
                let found = with(index, free, true, 6144);
                assert!(found.0 == ["first", "third"] && told(found), "{index} {free}");
            }
        }
    }
}
