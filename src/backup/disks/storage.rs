//! In which files, devices and remote images the bytes of nodes are: two nodes may have the same one,
//! under one name or under two.
//!
//! QEMU names them, and may lie. They are looked at and never opened.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::Value;

use super::answers::Answers;
use crate::folder::{self, system};
use crate::qmp::types::Node;

/// Drivers that store nothing.
const EMPTY: &[&str] = &["null-co", "null-aio"];

/// How many files are looked at: more than any machine has. The rest is known by name alone.
const LOOKS: usize = 2048;

/// How many parts are made and compared: more than any machine has by far.
const ROOM: u64 = 1 << 19;

/// What a file is, whatever its name.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Identity {
    File(u64, u64),
    Device(u64),
    /// A disk that says by itself which one it is: each path to it is a device of its own.
    Unit(String),
}

/// A part of a file that a disk has.
#[derive(Debug, Clone)]
pub(super) struct FilePart<'a> {
    /// The node that reads and writes it.
    pub leaf: &'a str,
    /// The number of the file; the same for each of its names.
    pub file: usize,
    /// Where in it.
    pub range: Range<u64>,
}

/// The files of all nodes.
pub(super) struct NodeFiles<'a> {
    answers: &'a Answers,
    numbers: HashMap<&'a str, usize>,
    written: HashSet<u64>,
    room: Cell<u64>,
}

impl<'a> NodeFiles<'a> {
    /// Looks at all of them.
    pub(super) fn of(answers: &'a Answers) -> Self {
        let mut numbers = HashMap::new();
        let (mut by_name, mut by_identity) = (HashMap::new(), HashMap::new());
        let leaves: Vec<&Node> = answers.nodes.iter().filter(|n| is_leaf(answers, n)).collect();
        let alone = leaves.len() < 2;
        for (at, n) in leaves.into_iter().enumerate() {
            let identity = if alone || at >= LOOKS { None } else { identity(n) };
            let fresh = numbers.len();
            let known = identity.as_ref().and_then(|i| by_identity.get(i)).copied();
            let known = known.unwrap_or(fresh);
            let number = match is_whole(&n.file) {
                true => *by_name.entry(n.file.as_str()).or_insert(known),
                false => known,
            };
            if let Some(i) = identity {
                by_identity.entry(i).or_insert(number);
            }
            numbers.insert(n.node_name.as_str(), number);
        }
        NodeFiles { answers, numbers, written: written(answers), room: Cell::new(ROOM) }
    }

    /// Whether there was more to compare than any machine has: then no two parts are apart.
    pub(super) fn is_full(&self) -> bool {
        self.room.get() == 0
    }

    fn take(&self, room: u64) {
        self.room.set(self.room.get().saturating_sub(room));
    }

    /// Whether two parts have bytes in common.
    pub(super) fn meet(&self, a: &FilePart<'_>, b: &FilePart<'_>) -> bool {
        self.take(1);
        let common = a.range.start < b.range.end && b.range.start < a.range.end;
        self.is_full() || (a.file == b.file && common)
    }

    /// All that the disk of `node` is read from, backing files too.
    pub(super) fn parts(&self, node: &str) -> Vec<FilePart<'a>> {
        let graph = &self.answers.graph;
        let Some(id) = graph.id(node) else { return Vec::new() };
        let mut parts = Vec::new();
        if let Some((leaf, file)) = self.number(id) {
            parts.push(FilePart { leaf, file, range: 0..u64::MAX });
        }
        for parent in graph.below([id].into_iter()) {
            let range = self.range(parent);
            let leaves = graph.links(parent).iter().filter_map(|l| self.number(l.child));
            parts.extend(leaves.map(|(leaf, file)| FilePart { leaf, file, range: range.clone() }));
        }
        self.take(parts.len() as u64);
        parts
    }

    /// What somebody writes to, job or guest or export, by the number of the file.
    pub(super) fn written_parts(&self) -> HashMap<usize, Vec<FilePart<'a>>> {
        let graph = &self.answers.graph;
        let mut parts: HashMap<usize, Vec<FilePart<'_>>> = HashMap::new();
        for id in &self.written {
            let Some((leaf, file)) = self.number(*id) else { continue };
            let parents = graph.parents(leaf).into_iter();
            let writers = parents.filter(|(p, _)| self.written.contains(&p.id));
            let mut ranges: Vec<_> = writers.map(|(p, _)| self.range(p.id)).collect();
            if ranges.is_empty() {
                ranges.push(0..u64::MAX);
            }
            let own = ranges.into_iter().map(|range| FilePart { leaf, file, range });
            parts.entry(file).or_default().extend(own);
        }
        parts
    }

    /// Whether somebody writes to a part by its own node.
    pub(super) fn is_written(&self, part: &FilePart<'_>) -> bool {
        self.answers.graph.id(part.leaf).is_some_and(|id| self.written.contains(&id))
    }

    fn number(&self, id: u64) -> Option<(&'a str, usize)> {
        let (name, number) = self.numbers.get_key_value(self.answers.graph.name(id)?)?;
        Some((name, *number))
    }

    /// What a node uses of the file right below it: all, unless it is a raw node with an offset.
    pub(super) fn range(&self, parent: u64) -> Range<u64> {
        let node = self.answers.graph.name(parent).and_then(|n| self.answers.node(n));
        match node.and_then(|n| Some((part_of(n)?, n))) {
            Some((begin, n)) => begin..begin.saturating_add(n.image.virtual_size),
            None => 0..u64::MAX,
        }
    }
}

/// Where in its file a node begins, if it is a part of that.
pub(super) fn part_of(node: &Node) -> Option<u64> {
    if node.drv == "raw" { raw_begin(&node.file) } else { None }
}

/// The offset of a raw node, if its description has one, or a size.
fn raw_begin(file: &str) -> Option<u64> {
    let all: Value = serde_json::from_str(file.strip_prefix("json:")?).ok()?;
    let number = |k: &str| {
        let v = all.get(k)?;
        v.as_u64().or_else(|| v.as_str()?.parse().ok())
    };
    let own = all.get("driver").and_then(Value::as_str) == Some("raw");
    let cut = all.get("offset").is_some() || all.get("size").is_some();
    if !(own && cut) {
        return None;
    }
    match all.get("offset") {
        Some(_) => number("offset"),
        None => Some(0),
    }
}

/// Whether a name is all that the file's is: QEMU puts one sign for all that is no UTF-8, so that several
/// files have one name.
fn is_whole(name: &str) -> bool {
    !name.contains(char::REPLACEMENT_CHARACTER)
}

/// Whether a node has its bytes from outside of QEMU.
fn is_leaf(answers: &Answers, n: &Node) -> bool {
    let graph = &answers.graph;
    let below = graph.id(&n.node_name).is_some_and(|id| !graph.links(id).is_empty());
    !below && !n.file.is_empty() && !EMPTY.contains(&n.drv.as_str())
}

/// The nodes that data is written to: those that a device, an export or a job may write to, and those
/// that these store it in. (That a format opens its file for writing says nothing: so it does where
/// nobody uses it.)
fn written(answers: &Answers) -> HashSet<u64> {
    let graph = &answers.graph;
    // Where QEMU does not tell who may write, all may.
    let all = !graph.tells_rights();
    let users = graph.all("block-backend").chain(graph.all("block-job"));
    let links = users.flat_map(|u| graph.links(u.id)).filter(|l| l.writes || all);
    let mut found: HashSet<u64> = links.map(|l| l.child).collect();
    let mut todo: Vec<u64> = found.iter().copied().collect();
    while let Some(at) = todo.pop() {
        let storage = graph.links(at).iter().filter(|l| l.role != "backing").map(|l| l.child);
        todo.extend(storage.filter(|c| found.insert(*c)));
    }
    found
}

fn identity(n: &Node) -> Option<Identity> {
    let path = Path::new(&n.file);
    if !path.is_absolute() {
        return None;
    }
    let meta = folder::resolve(path).and_then(|real| folder::look(&real)).ok()?;
    let kind = meta.file_type();
    let word = match (kind.is_block_device(), kind.is_char_device()) {
        (true, _) => "block",
        (_, true) => "char",
        _ => return Some(Identity::File(meta.dev(), meta.ino())),
    };
    let rdev = meta.rdev();
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let dir = Path::new("/sys/dev").join(word).join(number);
    let names = ["device/wwid", "wwid"].map(|f| system::text(&dir.join(f)));
    let unit = names.into_iter().flatten().find_map(|t| unit(&t));
    Some(unit.unwrap_or(Identity::Device(rdev)))
}

/// A name that is given once in the world.
fn unit(text: &str) -> Option<Identity> {
    let text = text.trim();
    let known = ["naa.", "eui.", "uuid."].iter().any(|p| text.starts_with(p));
    (known && text.len() <= 128).then(|| Identity::Unit(text.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_node_with_an_offset_or_a_size_is_a_part_of_its_file() {
        let begin = |t: &str| raw_begin(&format!("json:{t}"));
        assert_eq!(
            begin(r#"{"driver": "raw", "offset": 4096, "size": 512, "file": {}}"#),
            Some(4096)
        );
        assert_eq!(begin(r#"{"driver": "raw", "offset": "4096", "file": {}}"#), Some(4096));
        assert_eq!(begin(r#"{"driver": "raw", "size": 512}"#), Some(0));
        for whole in [
            r#"{"driver": "raw", "file": {"offset": 1}}"#,
            r#"{"driver": "qcow2", "offset": 1}"#,
            "{",
        ] {
            assert_eq!(begin(whole), None, "{whole}");
        }
        // What cannot be read is no reason to call parts apart.
        assert_eq!(begin(r#"{"driver": "raw", "offset": -1, "size": 512}"#), None);
        assert_eq!(raw_begin("/vm/disk"), None);
    }

    #[test]
    fn a_unit_is_known_by_what_is_given_once() {
        assert_eq!(unit("naa.600508b1\n"), Some(Identity::Unit("naa.600508b1".into())));
        assert_eq!(unit("t10.ATA     QEMU HARDDISK"), None);
    }
}
