//! Folders have one name and contents of their own. Where a guest's disk says otherwise, `find` and `rsync` over a mount
//! would have no end in sight: there would be a path for each way through its folders.
//!
//! The first name by which somebody gets to a folder is its name, the first folder whose entries are read has them; all
//! others are refused. What is known of it is kept for as long as the point is there, also while its file systems are
//! closed.
//!
//! State: for each point its folders by their numbers, hashed with a key that a guest cannot know, and where they have
//! their entries. All of it counts as tables of file systems ([`Blocks::hold`]). Where these take a quarter of the cache,
//! points that were looked at longest ago are forgotten; then the file system itself has to say that a folder is where
//! it was found ([`Tree::is_parent`]), and where it cannot, the folder is refused.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::node::Node;
use crate::error::{Error, Kind, Result};
use crate::files::{Blocks, Holding, Places, Tree, named_twice, shared_contents};

/// Bytes that are counted for a folder, and for a stretch of a folder: what maps take for them when they grow.
const EACH: u64 = 64;
/// How many are counted at once.
const STEP: u64 = 64;

/// What is known of a folder.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// Hash of the folder that it is in; 0 as long as nobody has got to it by a name.
    parent: u32,
    /// Hash of its name there; 0 as long as it was found by another than it is listed by.
    name: u32,
    /// Whether its contents are its own, once they were read.
    own: Option<bool>,
}

/// What is known of the folders of one point.
#[derive(Default)]
struct Folders {
    known: HashMap<u64, Known>,
    /// By volume.
    places: HashMap<Arc<str>, Places>,
    /// Folders and stretches that there is memory for, and that are counted.
    room: u64,
    used: u64,
    held: Vec<Holding>,
}

/// What is known of the folders of all points.
pub(super) struct Claims {
    points: Mutex<LruCache<u64, Folders>>,
    hasher: RandomState,
}

impl Default for Claims {
    fn default() -> Self {
        Claims { points: Mutex::new(LruCache::unbounded()), hasher: RandomState::new() }
    }
}

impl Claims {
    /// Notes that `folder` was found in `parent` as `name`.
    ///
    /// # Errors
    /// `Corrupt` if it is somewhere else, or has another name there; `Unsupported` if there is no memory to tell.
    pub(super) fn name(
        &self,
        tree: &dyn Tree,
        (parent, name): (&Node, &[u8]),
        folder: &Node,
        blocks: &Arc<Blocks>,
    ) -> Result<()> {
        if folder.is_root() {
            return Err(named_twice());
        }
        let short = |hash: u64| (hash as u32).max(1);
        let parent_hash = short(self.hasher.hash_one(parent.number()));
        let listed = match folder.is_alias() {
            true => 0,
            false => short(self.hasher.hash_one((parent.number(), name))),
        };
        let mut points = self.lock();
        let number = folder.point().number();
        let key = self.hasher.hash_one(folder.number());
        let known = points.get_or_insert_mut(number, Folders::default).known.get(&key).copied();
        let is_new = known.is_none();
        let mut known = known.unwrap_or_default();
        let other_parent = known.parent != 0 && known.parent != parent_hash;
        let other_name = known.name != 0 && listed != 0 && known.name != listed;
        if other_parent || other_name {
            return Err(named_twice());
        }
        if is_new && !make_room(&mut points, number, 1, blocks) {
            drop(points);
            return said_by(tree, (parent, name), folder);
        }
        known.parent = parent_hash;
        known.name = known.name.max(listed);
        if let Some(folders) = points.get_mut(&number) {
            folders.known.insert(key, known);
        }
        Ok(())
    }

    /// Notes that the entries of `folder` are read.
    ///
    /// # Errors
    /// `Corrupt` if they are those of another; `Unsupported` if there is no memory to tell.
    pub(super) fn contents(
        &self,
        tree: &dyn Tree,
        folder: &Node,
        blocks: &Arc<Blocks>,
    ) -> Result<()> {
        let number = folder.point().number();
        let key = self.hasher.hash_one(folder.number());
        if let Some(own) = self.own(number, key) {
            return if own { Ok(()) } else { Err(shared_contents()) };
        }
        // What is wrong with its places is told when it is read.
        let places = tree.folder_places(folder.id(tree)).unwrap_or_default();
        let mut points = self.lock();
        let folders = points.get_or_insert_mut(number, Folders::default);
        let is_new = u64::from(!folders.known.contains_key(&key));
        let most = is_new + places.len() as u64;
        if !make_room(&mut points, number, most, blocks) {
            drop(points);
            // Where folders say what they are in, those in this one are in no other.
            let id = folder.id(tree);
            let said = places.is_empty() || tree.is_parent(id, id)?.is_some();
            return if said { Ok(()) } else { Err(no_memory()) };
        }
        let Some(folders) = points.get_mut(&number) else { return Err(no_memory()) };
        // Another thread may have been here meanwhile.
        let known = folders.known.entry(key).or_default();
        let own = *known.own.get_or_insert_with(|| {
            places.is_empty()
                || folders.places.entry(folder.volume_name().clone()).or_default().take(places)
        });
        if own { Ok(()) } else { Err(shared_contents()) }
    }

    /// Whether the contents of a folder are its own, if that is known.
    fn own(&self, point: u64, key: u64) -> Option<bool> {
        self.lock().get(&point)?.known.get(&key)?.own
    }

    /// Forgets points.
    pub(super) fn retain(&self, keep: impl Fn(u64) -> bool) {
        let mut points = self.lock();
        let gone: Vec<u64> = points.iter().map(|(n, _)| *n).filter(|n| !keep(*n)).collect();
        let gone: Vec<_> = gone.iter().map(|n| points.pop(n)).collect();
        drop(points);
        drop(gone);
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<u64, Folders>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts `more` folders and stretches of a point; where there is no memory for them, other points are forgotten first.
/// Whether there is.
fn make_room(
    points: &mut LruCache<u64, Folders>,
    point: u64,
    more: u64,
    blocks: &Arc<Blocks>,
) -> bool {
    loop {
        let Some(folders) = points.get_mut(&point) else { return false };
        let needed = (folders.used + more).saturating_sub(folders.room);
        if needed == 0 {
            folders.used += more;
            return true;
        }
        let step = needed.next_multiple_of(STEP);
        // Those who open files and folders need some as well.
        let held = if blocks.is_tight() { None } else { blocks.hold(step * EACH).ok() };
        match held {
            Some(held) => {
                folders.held.push(held);
                folders.room += step;
            }
            None if points.len() > 1 => drop(points.pop_lru()),
            None => return false,
        }
    }
}

/// Whether a folder is where it was found, by what its file system says: in that folder alone, and by the first of the
/// names that this has for it.
fn said_by(tree: &dyn Tree, (parent, name): (&Node, &[u8]), folder: &Node) -> Result<()> {
    let id = folder.id(tree);
    match tree.is_parent(id, parent.id(tree))? {
        Some(true) if folder.is_alias() => return Ok(()),
        Some(true) => {}
        Some(false) => return Err(named_twice()),
        None => return Err(no_memory()),
    }
    let mut first = None;
    tree.read_folder(parent.id(tree), 0, &mut |entry| {
        first = Some(entry).filter(|e| e.node == id).map(|e| e.name);
        first.is_none()
    })?;
    if first.as_deref() == Some(name) { Ok(()) } else { Err(named_twice()) }
}

fn no_memory() -> Error {
    Error::new(Kind::Unsupported, "more directories than --cache-size has memory to tell apart")
        .remedy("give a larger --cache-size, or use 'fleecefs files'")
}
