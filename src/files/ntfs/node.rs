//! [`Node`]: a file or folder: its record, and those that its attribute list names.

use std::collections::HashSet;

use super::super::bytes::{byte, le16, le32, le64, part};
use super::record::{Attribute, NUMBER, Record, kind};
use super::runs::Runs;
use super::table::Table;
use crate::error::{Kind, Result};

/// The longest attribute list: Windows ends them at 256 KiB.
const MAX_LIST: u64 = 1 << 20;
/// Bytes of an entry before its name.
const ENTRY: usize = 0x1a;

/// A file or folder.
pub(super) struct Node {
    pub record: Record,
    /// Its attributes where they are in several records.
    list: Option<Vec<Listed>>,
}

/// An entry of an attribute list.
struct Listed {
    kind: u32,
    name: Vec<u8>,
    lowest: u64,
    reference: u64,
    id: u16,
}

impl Node {
    /// The file or folder of a record.
    ///
    /// # Errors
    /// `NotFound` if it is only the continuation of another one; `Corrupt`, or what reading the point says.
    pub(super) fn of(table: &Table, record: Record) -> Result<Node> {
        let stored = record.attributes().find(|a| a.kind() == kind::LIST);
        let list = stored.map(|a| list(table, record.number, &a)).transpose()?;
        Ok(Node { record, list })
    }

    /// Something wrong with it.
    pub(super) fn bad(&self, table: &Table, what: &str) -> crate::error::Error {
        table.bad(self.record.number, what)
    }

    /// Calls `each` with all parts of an attribute, in their order (with all attributes, if there are several of
    /// this type and name), until it says false.
    ///
    /// # Errors
    /// `Corrupt` if one is not where the list says; what `each` says; what reading the point says.
    pub(super) fn each_part(
        &self,
        table: &Table,
        kind: u32,
        name: &[u8],
        each: &mut dyn FnMut(&Attribute<'_>) -> Result<bool>,
    ) -> Result<()> {
        let Some(parts) = self.parts(kind, name) else {
            for a in self.record.attributes().filter(|a| a.kind() == kind && a.name() == name) {
                if !each(&a)? {
                    break;
                }
            }
            return Ok(());
        };
        for part in parts {
            if !self.part(table, part, each)? {
                break;
            }
        }
        Ok(())
    }

    /// Where in the attribute list the parts of an attribute are, in their order; `None` if there is no list.
    pub(super) fn parts(&self, kind: u32, name: &[u8]) -> Option<Vec<usize>> {
        let all = self.list.as_ref()?.iter().enumerate();
        let mut parts: Vec<(u64, usize)> = all
            .filter(|(_, l)| l.kind == kind && l.name == name)
            .map(|(index, l)| (l.lowest, index))
            .collect();
        parts.sort();
        Some(parts.into_iter().map(|(_, index)| index).collect())
    }

    /// Calls `each` with the attribute that entry `index` of the list names; what that says.
    ///
    /// # Errors
    /// As [`Node::each_part`].
    pub(super) fn part(
        &self,
        table: &Table,
        index: usize,
        each: &mut dyn FnMut(&Attribute<'_>) -> Result<bool>,
    ) -> Result<bool> {
        let Some(listed) = self.list.as_ref().and_then(|list| list.get(index)) else {
            return Ok(false);
        };
        let record = self.part_of(table, listed)?;
        let mut all = record.attributes();
        let found = all.find(|a| {
            (a.kind(), a.id(), a.name()) == (listed.kind, listed.id, listed.name.as_slice())
        });
        each(&found.ok_or_else(|| self.bad(table, NOT_THERE))?)
    }

    /// What `read` makes of the first part of an attribute; `None` if there is no such attribute.
    ///
    /// # Errors
    /// As [`Node::each_part`].
    pub(super) fn first<T>(
        &self,
        table: &Table,
        kind: u32,
        name: &[u8],
        read: impl Fn(&Attribute<'_>) -> T,
    ) -> Result<Option<T>> {
        let mut found = None;
        self.each_part(table, kind, name, &mut |a| {
            found = Some(read(a));
            Ok(false)
        })?;
        Ok(found)
    }

    /// The names of all streams beside the contents, in UTF-16.
    pub(super) fn streams(&self) -> Vec<Vec<u8>> {
        let mut found: Vec<Vec<u8>> = match &self.list {
            Some(list) => {
                let firsts = list.iter().filter(|l| l.kind == kind::DATA && l.lowest == 0);
                firsts.map(|l| l.name.clone()).collect()
            }
            None => {
                let all = self.record.attributes().filter(|a| a.kind() == kind::DATA);
                all.map(|a| a.name().to_vec()).collect()
            }
        };
        // One that is listed twice is one.
        let mut seen = HashSet::new();
        found.retain(|name| !name.is_empty() && seen.insert(name.clone()));
        found
    }

    /// The record that an entry of the list names.
    fn part_of(&self, table: &Table, listed: &Listed) -> Result<Record> {
        if listed.reference & NUMBER == self.record.number {
            return Ok(self.record.clone());
        }
        let found = table.referred(listed.reference).map_err(|e| match e.kind() {
            Kind::NotFound => self.bad(table, NOT_THERE),
            _ => e,
        })?;
        match found.base() == self.record.reference() {
            true => Ok(found),
            false => {
                Err(self.bad(table, "has an attribute list that names another file's records"))
            }
        }
    }
}

const NOT_THERE: &str = "has an attribute list that names attributes that are not there";

fn list(table: &Table, number: u64, stored: &Attribute<'_>) -> Result<Vec<Listed>> {
    let bad = |what: &str| table.bad(number, what);
    let bytes = match stored.resident() {
        Some(value) => value.to_vec(),
        None => {
            let size = stored.size();
            if size > MAX_LIST {
                return Err(bad("has an attribute list that is too long"));
            }
            let mut runs = Runs::default();
            let added = runs.add(
                stored.mapping(),
                stored.span(),
                table.boot.clusters,
                table.source.blocks(),
            )?;
            added.map_err(bad)?;
            let mut bytes = vec![0; size as usize];
            runs.read(&table.source, table.boot.cluster, &mut bytes, 0)?;
            bytes
        }
    };
    parse(&bytes).ok_or_else(|| bad("has an invalid attribute list"))
}

fn parse(bytes: &[u8]) -> Option<Vec<Listed>> {
    let (mut at, mut found) = (0, Vec::new());
    while at + ENTRY <= bytes.len() {
        let len = usize::from(le16(bytes, at + 4));
        let entry = part(bytes, at, len);
        let (name_at, name_len) = (usize::from(byte(entry, 7)), 2 * usize::from(byte(entry, 6)));
        let name = part(entry, name_at, name_len);
        if len < ENTRY || entry.len() < len || name.len() < name_len {
            return None;
        }
        found.push(Listed {
            kind: le32(entry, 0),
            name: name.to_vec(),
            lowest: le64(entry, 8),
            reference: le64(entry, 0x10),
            id: le16(entry, 0x18),
        });
        at += len;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_to_their_end_and_no_further() {
        let mut entry = vec![0; 0x20];
        entry[0] = 0x80;
        entry[4] = 0x20;
        entry[6] = 1;
        entry[7] = 0x1a;
        entry[8] = 9;
        entry[0x10] = 77;
        entry[0x18] = 3;
        entry[0x1a] = b'n';
        let both = [entry.clone(), entry.clone()].concat();
        let found = parse(&both).unwrap();
        assert_eq!(found.len(), 2);
        let Listed { kind, name, lowest, reference, id } = &found[1];
        assert_eq!((*kind, name.as_slice(), *lowest), (kind::DATA, b"n\0".as_slice(), 9));
        assert_eq!((*reference, *id), (77, 3));
        for (at, value) in [(4, 0), (4, 0x1a), (5, 1), (6, 9)] {
            let mut wrong = entry.clone();
            wrong[at] = value;
            assert!(parse(&wrong).is_none(), "{at}");
        }
    }
}
