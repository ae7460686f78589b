//! Extended attributes: in the inode, or in leaves of a hash tree, with large values in blocks of their own.

use std::collections::HashSet;

use super::super::bytes::{be16, be32, byte, part};
use super::super::tree::Xattr;
use super::super::xattrs::Xattrs;
use super::acl;
use super::blocks::{invalid, logical};
use super::hashed::{Block, Leaf, leaf_of};
use super::header::OUTSIDE;
use super::inode::{Fork, Form, Inode};
use super::volume::Volume;
use crate::error::Result;

/// Flags of an attribute.
mod flags {
    /// Its value is beside its name.
    pub(super) const LOCAL: u8 = 0x1;
    pub(super) const TRUSTED: u8 = 0x2;
    pub(super) const SECURE: u8 = 0x4;
    /// A pointer to a parent: the file system's own.
    pub(super) const PARENT: u8 = 0x8;
    /// It was being written when the guest stopped: it is not there yet, or not any more.
    pub(super) const INCOMPLETE: u8 = 0x80;
}

/// The largest value.
const MAX_VALUE: usize = 65536;
/// In an inode: length and count before the first, lengths and flags before each name.
const SHORT_HEAD: usize = 4;
const SHORT_ENTRY: usize = 3;
/// Hash, place and flags of an attribute in a leaf.
const LEAF_ENTRY: usize = 8;
/// What is before a name there: of a value that is beside it, and of one that is in blocks.
const LOCAL_HEAD: usize = 3;
const REMOTE_HEAD: usize = 9;
/// What a block of a value begins with in version 5.
const VALUE_HEAD: usize = 56;

/// All attributes of an inode but those that the file system keeps for itself.
///
/// # Errors
/// `Unsupported` if they take more memory than there is; `Corrupt`, or what reading the point says.
pub(super) fn all(volume: &Volume, inode: &Inode) -> Result<Vec<Xattr>> {
    let Some(fork) = inode.attributes_fork() else { return Ok(Vec::new()) };
    let whose = format!("inode {}", inode.number);
    let found = Xattrs::new(&volume.source, &volume.findings, whose);
    let mut reading = Reading { volume, inode, fork, found };
    match fork.form {
        Form::Local => reading.short()?,
        // One that lost its last attribute.
        Form::Extents if fork.extents == 0 => {}
        Form::Extents | Form::Tree => reading.leaves()?,
        Form::Device => return Err(volume.bad(inode, "has attributes in an invalid form")),
    }
    Ok(reading.found.into_list())
}

struct Reading<'a> {
    volume: &'a Volume,
    inode: &'a Inode,
    fork: Fork<'a>,
    found: Xattrs<'a>,
}

impl Reading<'_> {
    fn short(&mut self) -> Result<()> {
        let bytes = part(self.fork.bytes, 0, usize::from(be16(self.fork.bytes, 0)));
        let mut at = SHORT_HEAD;
        for _ in 0..byte(bytes, 2) {
            let (name_len, value_len) = (byte(bytes, at), byte(bytes, at + 1));
            let name_at = at + SHORT_ENTRY;
            let value_at = name_at + usize::from(name_len);
            let end = value_at + usize::from(value_len);
            if end > bytes.len() {
                return Err(self.volume.bad(self.inode, "has attributes that do not fit into it"));
            }
            let name = part(bytes, name_at, usize::from(name_len));
            let value = part(bytes, value_at, usize::from(value_len));
            self.add(byte(bytes, at + 2), name, || Ok(value.to_vec()))?;
            at = end;
        }
        Ok(())
    }

    /// All leaves, one after the other: each says which is next.
    fn leaves(&mut self) -> Result<()> {
        let (volume, inode, fork) = (self.volume, self.inode, self.fork);
        let mut leaf = leaf_of(volume, inode, &fork, (0, 1), 0, Leaf::Attributes)?;
        let mut seen = HashSet::from([leaf.at]);
        loop {
            self.found.hold(leaf.bytes.len())?;
            self.leaf(&leaf)?;
            if leaf.next == 0 {
                return Ok(());
            }
            let next = u64::from(leaf.next);
            leaf = Block::read(volume, inode, &fork, next, 1, Leaf::Attributes)?;
            if !leaf.is_leaf || !seen.insert(leaf.at) {
                return Err(invalid(volume, inode, "inconsistent list of attributes", leaf.at));
            }
        }
    }

    fn leaf(&mut self, leaf: &Block) -> Result<()> {
        let (volume, inode, fork) = (self.volume, self.inode, self.fork);
        let bytes = leaf.bytes.as_slice();
        let bad = || invalid(volume, inode, "invalid attribute", leaf.at);
        // A leaf of version 5 has more before its entries than a node has.
        let first = if volume.sup.v5 { 80 } else { 32 };
        for i in 0..leaf.count {
            let entry = part(bytes, first + i * LEAF_ENTRY, LEAF_ENTRY);
            let (at, flags) = (usize::from(be16(entry, 4)), byte(entry, 6));
            let is_local = flags & flags::LOCAL != 0;
            let (head, name_len) = match is_local {
                true => (LOCAL_HEAD, byte(bytes, at + 2)),
                false => (REMOTE_HEAD, byte(bytes, at + 8)),
            };
            let name = part(bytes, at + head, usize::from(name_len));
            if entry.len() < LEAF_ENTRY || name.is_empty() || name.len() < usize::from(name_len) {
                return Err(bad());
            }
            let behind = at + head + name.len();
            self.add(flags, name, || match is_local {
                true => {
                    let len = usize::from(be16(bytes, at));
                    let value = part(bytes, behind, len);
                    if value.len() == len { Ok(value.to_vec()) } else { Err(bad()) }
                }
                false => {
                    let (block, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
                    if len > MAX_VALUE {
                        Err(bad())
                    } else {
                        value(volume, inode, &fork, block, len)
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Adds an attribute, unless it is one that nobody should see.
    fn add(
        &mut self,
        flags: u8,
        name: &[u8],
        value: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<()> {
        if flags & (flags::PARENT | flags::INCOMPLETE) != 0 {
            return Ok(());
        }
        let trusted = flags & flags::TRUSTED != 0;
        if let Some(shown) = acl::name(name).filter(|_| trusted) {
            let stored = value()?;
            let value = acl::shown(&stored);
            let value = value.ok_or_else(|| self.volume.bad(self.inode, "has an invalid ACL"))?;
            return self.found.add("", shown, value);
        }
        let prefix = match () {
            () if trusted => "trusted.",
            () if flags & flags::SECURE != 0 => "security.",
            () => "user.",
        };
        self.found.add(prefix, name, value()?)
    }
}

/// A value that is in blocks of its own, from block `block` of the fork on: in version 5 each has a header.
fn value(
    volume: &Volume,
    inode: &Inode,
    fork: &Fork<'_>,
    block: u32,
    len: usize,
) -> Result<Vec<u8>> {
    let (mut value, mut block) = (Vec::new(), u64::from(block));
    let head = if volume.sup.v5 { VALUE_HEAD } else { 0 };
    while value.len() < len {
        let (bytes, at) = logical(volume, inode, fork, block, 1, OUTSIDE)?;
        let n = (len - value.len()).min(bytes.len() - head);
        let is_its = be32(&bytes, 4) as usize == value.len() && be32(&bytes, 8) as usize == n;
        if head > 0 && (part(&bytes, 0, 4) != b"XARM" || !is_its) {
            return Err(invalid(volume, inode, "invalid block of an attribute", at));
        }
        value.extend_from_slice(part(&bytes, head, n));
        block += 1;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::header::INDEX;
    use super::super::made::{FILE, Made, Parts, extent, inode};
    use super::*;

    fn shown(volume: &Volume, inode: &Inode) -> Result<Vec<(String, Vec<u8>)>> {
        let text = |x: Xattr| (String::from_utf8_lossy(&x.name).into_owned(), x.value);
        Ok(all(volume, inode)?.into_iter().map(text).collect())
    }

    #[test]
    fn those_in_the_inode_have_prefixes_by_their_flags() {
        let mut list = vec![0, 0, 6, 0];
        for (name, flags) in [("u", 0), ("t", 2), ("s", 4), ("p", 8), ("i", 0x80), ("last", 0)] {
            list.extend([name.len() as u8, 2, flags]);
            list.extend(name.bytes());
            list.extend([flags, 7]);
        }
        list[1] = list.len() as u8;
        for v5 in [true, false] {
            let volume = Made::new(v5).volume();
            let with = |list: &[u8]| {
                let parts = Parts { forms: [2, 1], attributes: list, ..FILE };
                shown(&volume, &inode(v5, parts))
            };
            let names: Vec<_> = with(&list).unwrap().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["user.u", "trusted.t", "security.s", "user.last"]);
            assert_eq!(with(&list).unwrap()[1].1, [2, 7]);
            // Longer than it says, and more than there are.
            let mut short = list.clone();
            short[1] -= 1;
            assert!(with(&short).is_err());
            let mut many = list.clone();
            many[2] = 7;
            assert!(with(&many).is_err());
            assert_eq!(shown(&volume, &inode(v5, FILE)).unwrap(), []);
        }
    }

    /// A leaf with entries: flags, and what is at the place of each; the next leaf.
    fn leaf(v5: bool, next: u32, entries: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        let (magic, count, mut at) = if v5 { (0x3beeu16, 56, 80) } else { (0xfbee, 12, 32) };
        bytes[..4].copy_from_slice(&next.to_be_bytes());
        bytes[8..10].copy_from_slice(&magic.to_be_bytes());
        bytes[count..count + 2].copy_from_slice(&(entries.len() as u16).to_be_bytes());
        let mut end = 1024;
        for (flags, stored) in entries {
            end -= stored.len().next_multiple_of(4);
            bytes[end..end + stored.len()].copy_from_slice(stored);
            bytes[at + 4..at + 6].copy_from_slice(&(end as u16).to_be_bytes());
            bytes[at + 6] = *flags;
            at += 8;
        }
        bytes
    }

    fn outside(v5: bool, offset: u32, value: &[u8]) -> Vec<u8> {
        let head = if v5 { VALUE_HEAD } else { 0 };
        let mut bytes = vec![0; 1024];
        if v5 {
            bytes[..4].copy_from_slice(b"XARM");
            bytes[4..8].copy_from_slice(&offset.to_be_bytes());
            bytes[8..12].copy_from_slice(&(value.len() as u32).to_be_bytes());
        }
        bytes[head..head + value.len()].copy_from_slice(value);
        bytes
    }

    #[test]
    fn leaves_follow_each_other_and_values_may_be_outside() {
        for v5 in [true, false] {
            let mut made = Made::new(v5);
            let per = if v5 { 968 } else { 1024 };
            let long: Vec<u8> = (0..per + 30).map(|i| i as u8).collect();
            let remote =
                [&[0, 0, 0, 5][..], &(long.len() as u32).to_be_bytes(), &[4], b"long"].concat();
            let empty: &[u8] = &[0, 0, 1, b'e'];
            made.block(
                50,
                INDEX,
                leaf(
                    v5,
                    1,
                    &[
                        (1, &[0, 2, 1, b'n', 8, 9]),
                        (0x82, &[0, 0, 0, 9, 0, 0, 0, 1, 1, b'i']),
                        (1, empty),
                    ],
                ),
            );
            made.block(51, INDEX, leaf(v5, 0, &[(2, &remote)]));
            made.block(55, OUTSIDE, outside(v5, 0, &long[..per]));
            made.block(56, OUTSIDE, outside(v5, per as u32, &long[per..]));
            // Round in a circle; a value that has no end; one that is not there; a name behind the end.
            made.block(60, INDEX, leaf(v5, 10, &[]));
            made.block(61, INDEX, leaf(v5, 0, &[(0, &[0, 0, 0, 5, 0, 1, 0, 1, 1, b'x'])]));
            made.block(62, INDEX, leaf(v5, 0, &[(0, &[0, 0, 0, 90, 0, 0, 0, 1, 1, b'x'])]));
            made.block(63, INDEX, leaf(v5, 0, &[(1, &[0, 0, 9, b'x'])]));
            made.block(64, INDEX, leaf(v5, 0, &[(1, &[9, 0, 1, b'x'])]));
            let volume = made.volume();
            let with = |place| {
                let map = extent(0, place, 20, true);
                let parts = Parts { extents: [0, 1], attributes: &map, ..FILE };
                shown(&volume, &inode(v5, parts))
            };
            let found = with(50).unwrap();
            assert_eq!(found[0], ("user.n".into(), vec![8, 9]));
            assert_eq!(found[1], ("user.e".into(), vec![]));
            assert!(found.len() == 3 && found[2] == ("trusted.long".into(), long));
            for place in 60..=64 {
                assert!(with(place).is_err(), "{place}");
            }
        }
    }

    #[test]
    fn more_than_the_memory_is_refused() {
        let mut made = Made::new(false);
        let remote = [&[0, 0, 0, 5, 0, 1, 0, 0, 1][..], b"x"].concat();
        made.block(50, INDEX, leaf(false, 0, &vec![(0, &remote[..]); 40]));
        let volume = made.volume();
        let map = extent(0, 50, 77, true);
        let parts = Parts { extents: [0, 1], attributes: &map, ..FILE };
        let error = shown(&volume, &inode(false, parts)).unwrap_err();
        assert!(error.kind() == crate::error::Kind::Unsupported, "{error}");
        assert!(volume.source.blocks().used() <= 1 << 20);
    }
}
