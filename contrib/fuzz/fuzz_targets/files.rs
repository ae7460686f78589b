//! A whole disk from hostile bytes: partition table, volumes, and every file system in them. Everything is walked
//! through and read; nothing panics, hangs or takes more memory than the cache is allowed.
#![no_main]

use std::sync::Arc;

use fleecefs::error::{Error, Kind, Result};
use fleecefs::files::{At, Blocks, NodeKind, Source, Tree, Visitor, open_tree, volumes_of, walk};
use fleecefs::storage::MemStorage;

/// Memory for all readers.
const CACHE: u64 = 8 << 20;
/// Things that are looked at, and bytes read of a file from each end.
const NODES: usize = 2000;
const BYTES: u64 = 64 << 10;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let blocks = Blocks::new(CACHE);
    let disk = Source::new(Arc::new(MemStorage::new("disk", bytes.to_vec())), "disk", &blocks);
    let Ok((volumes, _)) = volumes_of(&disk, Vec::new) else { return };
    for volume in volumes.iter().take(8) {
        let Ok(tree) = open_tree(volume) else { continue };
        let mut look = Look { tree: &*tree, left: NODES };
        let _ = walk(&*tree, tree.root(), &mut look);
        let _ = tree.statistics();
        let _ = tree.findings().list();
        assert!(blocks.used() <= CACHE);
    }
});

struct Look<'a> {
    tree: &'a dyn Tree,
    left: usize,
}

impl Look<'_> {
    fn count(&mut self) -> Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| Error::new(Kind::Interrupted, "enough"))?;
        Ok(())
    }

    fn file(&self, at: &At<'_>) -> Result<()> {
        let file = self.tree.open(at.node)?;
        let mut buf = vec![0; BYTES as usize];
        for offset in [0, file.size().saturating_sub(BYTES)] {
            let n = file.read_at(&mut buf, offset)?;
            assert!(n as u64 <= file.size() - offset);
        }
        let mut offset = 0;
        for _ in 0..256 {
            let Some(stretch) = file.stretch(offset)? else { break };
            assert!(stretch.end > offset && stretch.end <= file.size());
            offset = stretch.end;
        }
        Ok(())
    }
}

impl Visitor for Look<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.count()?;
        let _ = self.tree.xattrs(at.node);
        let _ = self.tree.lookup(at.node, b"etc");
        Ok(true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.count()?;
        assert!(!at.name.contains(&b'/') && !at.name.contains(&0) && at.name != b"..");
        let _ = self.tree.xattrs(at.node);
        let _ = match at.attributes.kind {
            NodeKind::File => self.file(at),
            NodeKind::Link => self.tree.read_link(at.node).map(drop),
            _ => Ok(()),
        };
        Ok(())
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        self.count()
    }
}
