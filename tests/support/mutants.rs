//! Images of file systems read in the process of the test: with bytes changed at random, all of each, which comes to
//! an end; folders in single steps; and all of it by path.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fleecefs::error::{Error, Result};
use fleecefs::files::{At, Blocks, NodeKind, Source, Visitor, open_tree, volumes_of, walk};
use fleecefs::storage::MemStorage;

/// Bytes of one file that are read at most: sizes may be anything.
const MAX_READ: u64 = 32 << 20;
/// What one mutant may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A generator of numbers that are the same for the same seed (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Reads all of `count` mutants of an image. Each has some bytes changed in the stretches of metadata that `places`
/// names; `mend` may put checksums right again. Gives how many could be opened.
pub fn survive(
    image: &[u8],
    places: &[(u64, u64)],
    count: u64,
    mend: impl Fn(&mut [u8], u64),
) -> usize {
    let mut opened = 0;
    for seed in 1..=count {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut bytes = image.to_vec();
        for _ in 0..=random.below(12) {
            let (from, len) = places[random.below(places.len() as u64) as usize];
            let at = from + random.below(len);
            let value = match random.below(4) {
                0 => 0xff,
                1 => 0,
                2 => bytes[at as usize] ^ (1 << random.below(8)),
                _ => random.next() as u8,
            };
            bytes[at as usize] = value;
            mend(&mut bytes, at);
        }
        let begun = Instant::now();
        opened += usize::from(read_all(bytes));
        assert!(begun.elapsed() < LIMIT, "seed {seed} took {:?}", begun.elapsed());
    }
    opened
}

/// Asserts that each folder of an image gives the same entries when reading goes on after each single one, and that
/// each is found by its name. How many entries there are.
pub fn folders_go_on(image: &std::path::Path) -> usize {
    let disk = Arc::new(MemStorage::new("disk", std::fs::read(image).unwrap()));
    let disk = Source::new(disk, "disk", &Blocks::new(64 << 20));
    let (volumes, _) = volumes_of(&disk, Vec::new).unwrap();
    let tree = open_tree(&volumes[0]).unwrap();
    let (mut todo, mut seen) = (vec![tree.root()], 0);
    while let Some(folder) = todo.pop() {
        let mut all = Vec::new();
        let mut whole = |entry| {
            all.push(entry);
            true
        };
        tree.read_folder(folder, 0, &mut whole).unwrap();
        let (mut from, mut single) = (0, Vec::new());
        loop {
            let mut next = None;
            let mut first = |entry: fleecefs::files::Entry| {
                next = Some(entry);
                false
            };
            tree.read_folder(folder, from, &mut first).unwrap();
            let Some(entry) = next else { break };
            assert!(entry.next > from);
            assert_eq!(tree.lookup(folder, &entry.name).unwrap(), Some(entry.node));
            assert_eq!(tree.attributes(entry.node).unwrap().kind, entry.kind.unwrap());
            from = entry.next;
            single.push(entry);
        }
        assert_eq!(all, single);
        seen += all.len();
        let folders = all.iter().filter(|e| e.kind == Some(NodeKind::Folder));
        todo.extend(folders.map(|e| e.node));
    }
    seen
}

/// What is in an image.
#[derive(Debug, Default)]
pub struct Contents {
    /// Kind, size and hash of all that can be read, by path; the text of links.
    pub files: BTreeMap<Vec<u8>, String>,
    /// What could not be read, and why.
    pub failed: Vec<String>,
    /// Findings of its file systems.
    pub told: Vec<String>,
}

impl Contents {
    /// Everything in an image; `None` if it is refused.
    pub fn of(bytes: Vec<u8>) -> Option<Contents> {
        let blocks = Blocks::new(16 << 20);
        let disk = Source::new(Arc::new(MemStorage::new("disk", bytes)), "disk", &blocks);
        let (volumes, _) = volumes_of(&disk, Vec::new).ok()?;
        let tree = open_tree(volumes.first()?).ok()?;
        let mut all = Gathering { tree: &*tree, found: Contents::default() };
        walk(&*tree, tree.root(), &mut all).ok()?;
        let told = tree.findings().list().into_iter().map(|f| f.to_string()).collect();
        Some(Contents { told, ..all.found })
    }

    /// Whether something that was told has these words.
    pub fn has_told(&self, words: &str) -> bool {
        self.told.iter().any(|t| t.contains(words))
    }
}

struct Gathering<'a> {
    tree: &'a dyn fleecefs::files::Tree,
    found: Contents,
}

impl Gathering<'_> {
    fn line(&self, at: &At<'_>) -> Result<String> {
        let attributes = at.attributes;
        let contents = match attributes.kind {
            NodeKind::File => {
                let file = self.tree.open(at.node)?;
                let mut bytes = vec![0; file.size().min(MAX_READ) as usize];
                let mut done = 0;
                while done < bytes.len() {
                    match file.read_at(&mut bytes[done..], done as u64)? {
                        0 => break,
                        n => done += n,
                    }
                }
                blake3::hash(&bytes[..done]).to_string()
            }
            NodeKind::Link => format!("{:?}", self.tree.read_link(at.node)?),
            _ => String::new(),
        };
        let size = if attributes.kind == NodeKind::File { attributes.size } else { 0 };
        Ok(format!("{:?} {size} {contents}", attributes.kind))
    }
}

impl Visitor for Gathering<'_> {
    fn node(&mut self, at: &At<'_>) -> Result<()> {
        match self.line(at) {
            Ok(line) => drop(self.found.files.insert(at.path.to_vec(), line)),
            Err(e) => self.failed(at.path, e)?,
        }
        Ok(())
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        let path = path.escape_ascii();
        self.found.failed.push(format!("{path}: {}", error.message()));
        Ok(())
    }
}

/// Reads all that is in an image; whether it could be opened.
fn read_all(bytes: Vec<u8>) -> bool {
    let blocks = Blocks::new(16 << 20);
    let disk = Source::new(Arc::new(MemStorage::new("disk", bytes)), "disk", &blocks);
    let Ok((volumes, _)) = volumes_of(&disk, Vec::new) else { return false };
    let mut opened = false;
    for volume in volumes {
        let Ok(tree) = open_tree(&volume) else { continue };
        opened = true;
        tree.statistics();
        let _ = walk(&*tree, tree.root(), &mut Reader { tree: &*tree });
        assert!(blocks.used() <= 16 << 20);
    }
    opened
}

struct Reader<'a> {
    tree: &'a dyn fleecefs::files::Tree,
}

impl Visitor for Reader<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        let _ = self.tree.lookup(at.node, b"hello");
        let _ = self.tree.xattrs(at.node);
        Ok(true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        let _ = self.tree.xattrs(at.node);
        let _ = self.tree.read_link(at.node);
        let Ok(file) = self.tree.open(at.node) else { return Ok(()) };
        let (mut offset, mut buf, mut read) = (0, vec![0; 1 << 16], 0);
        while let Ok(Some(stretch)) = file.stretch(offset) {
            assert!(stretch.end > offset && stretch.end <= file.size());
            while !stretch.hole && offset < stretch.end && read < MAX_READ {
                match file.read_at(&mut buf, offset) {
                    Ok(n) if n > 0 => offset += n as u64,
                    _ => return Ok(()),
                }
                read += buf.len() as u64;
            }
            offset = offset.max(stretch.end);
        }
        Ok(())
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        Ok(())
    }
}
