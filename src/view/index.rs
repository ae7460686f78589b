//! Where names are in large folders: whoever asks for each name of a folder would otherwise read it as often as it has
//! names.
//!
//! An index has only hashes, and where in the folder to look; what is there says whether it is the name.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::node::Node;
use crate::error::Result;
use crate::files::{Blocks, Holding, NodeId, Tree};

/// A folder of fewer names is read as fast.
const FEW: usize = 128;
/// Names that an index has at most: 4 MiB. In a larger folder each name is looked for from the start.
const MOST: usize = 1 << 18;
/// Folders whose index is kept.
const FOLDERS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

/// The names of one folder.
struct Index {
    /// Hashes in order, and from where on the folder has to be read to find the name.
    names: Box<[(u64, u64)]>,
    _held: Holding,
}

/// The indexes of the folders that were used last.
pub(super) struct Indexes {
    list: Mutex<LruCache<u64, Arc<Index>>>,
    /// A guest cannot know it, and so cannot make names that have the same hash.
    hasher: RandomState,
}

impl Default for Indexes {
    fn default() -> Self {
        Indexes { list: Mutex::new(LruCache::new(FOLDERS)), hasher: RandomState::new() }
    }
}

impl Indexes {
    /// What a folder has under this name, as [`Tree::lookup`] says it, and whether it lists that by this name.
    ///
    /// # Errors
    /// As [`Tree::lookup`].
    pub(super) fn lookup(
        &self,
        tree: &dyn Tree,
        folder: &Node,
        name: &[u8],
        blocks: &Arc<Blocks>,
    ) -> Result<Option<(NodeId, bool)>> {
        let (id, key) = (folder.id(tree), folder.number());
        let known = self.lock().get(&key).cloned();
        let found = match known {
            Some(index) => index.find(tree, id, self.hasher.hash_one(name), name)?,
            None => self.read(tree, (id, key), name, blocks)?,
        };
        match found {
            Some(node) => Ok(Some((node, true))),
            // Some file systems find a name in another case as well.
            None => Ok(tree.lookup(id, name)?.map(|node| (node, false))),
        }
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        let mut list = self.lock();
        let old = std::mem::replace(&mut *list, LruCache::new(FOLDERS));
        drop(list);
        drop(old);
    }

    /// Reads a folder for one name, and keeps an index if it is large and can be read to its end.
    fn read(
        &self,
        tree: &dyn Tree,
        (id, key): (NodeId, u64),
        name: &[u8],
        blocks: &Arc<Blocks>,
    ) -> Result<Option<NodeId>> {
        let (mut names, mut from, mut found) = (Vec::new(), 0, None);
        let read = tree.read_folder(id, 0, &mut |entry| {
            if found.is_none() && entry.name == name {
                found = Some(entry.node);
            }
            if names.len() < MOST {
                names.push((self.hasher.hash_one(entry.name.as_slice()), from));
            } else if found.is_some() {
                return false;
            }
            from = entry.next;
            true
        });
        if found.is_none() {
            read?;
        } else if read.is_err() {
            return Ok(found);
        }
        if (FEW..MOST).contains(&names.len()) {
            self.keep(key, names, blocks);
        }
        Ok(found)
    }

    fn keep(&self, key: u64, mut names: Vec<(u64, u64)>, blocks: &Arc<Blocks>) {
        // Without memory for it, it is read again.
        let Ok(held) = blocks.hold((names.len() * size_of::<(u64, u64)>()) as u64) else {
            return self.clear();
        };
        // Of names that are there twice the first counts.
        names.sort_unstable();
        let index = Arc::new(Index { names: names.into_boxed_slice(), _held: held });
        let old = self.lock().push(key, index);
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, Arc<Index>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn find(
        &self,
        tree: &dyn Tree,
        folder: NodeId,
        hash: u64,
        name: &[u8],
    ) -> Result<Option<NodeId>> {
        let first = self.names.partition_point(|(h, _)| *h < hash);
        for (_, from) in self.names.iter().skip(first).take_while(|(h, _)| *h == hash) {
            let mut found = None;
            let read = tree.read_folder(folder, *from, &mut |entry| {
                found = Some(entry.node).filter(|_| entry.name == name);
                false
            });
            if found.is_some() {
                return Ok(found);
            }
            read?;
        }
        Ok(None)
    }
}
