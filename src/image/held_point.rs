//! Keeping the files of open points open.
//!
//! Whoever has a point open goes on reading it when its files are removed: all of them are open then
//! ([`HeldPoint`]), those of the points below included. That takes descriptors, of which there are so many
//! ([`files::pin_limit`]): a chain of more files than that is read all the same, but is not held.
//!
//! State, under one lock that is never held while a file is opened or closed:
//! - each image counts its holders: open handles, and images above it that are held;
//! - `resting`: points that were closed a moment ago, of long chains or whose files are walked through. A thread of its own lets go of them
//!   a little later ([`Holds::run`]): whoever goes through many points opens one after the other, and
//!   all of a chain share the files below; so a step costs one file.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Image;
use super::holds::Pinned;
use crate::error::Result;
use crate::storage::files::{self, Closed};

/// How long the files of a closed point stay open, if they are more than [`MANY`] or [`HeldPoint::lingering`].
const REST: Duration = Duration::from_millis(200);
/// Opening as many takes a millisecond or two, which is not worth keeping anything open for.
const MANY: usize = 256;

/// An open point. As long as it lives, so do the files that the point is made of.
pub struct HeldPoint {
    image: Arc<Image>,
    /// Whether the files are held.
    pinned: bool,
    /// Whether they are held a moment longer.
    lingers: bool,
}

impl HeldPoint {
    /// Opens the files of all layers of `image`, without reading them: from now on it does not matter
    /// whether they are removed. Where these are more files than may be held, it is left at those
    /// of the point itself, and nothing is held.
    ///
    /// # Errors
    /// A file is gone, may not be opened, or has changed.
    pub fn new(image: &Arc<Image>) -> Result<Self> {
        Self::open(image, false)
    }

    /// The same for somebody who comes back soon, as whoever walks through the files of a point does: the files
    /// stay open a moment longer, unless others need the descriptors.
    ///
    /// # Errors
    /// As [`HeldPoint::new`].
    pub fn lingering(image: &Arc<Image>) -> Result<Self> {
        Self::open(image, true)
    }

    fn open(image: &Arc<Image>, lingers: bool) -> Result<Self> {
        let pinned = image.pin();
        let lingers = lingers || image.files > MANY;
        let held = HeldPoint { image: image.clone(), pinned, lingers };
        let opened = match pinned {
            true => {
                files::wait_for_room();
                image.open_held()
            }
            false => image.own.iter().try_for_each(|l| l.open_files()),
        };
        opened.inspect_err(|e| image.note_error(e))?;
        Ok(held)
    }
}

impl Drop for HeldPoint {
    fn drop(&mut self) {
        let holds = self.image.cache.holds();
        let mut state = holds.state();
        state.handles -= 1;
        if self.pinned && self.lingers {
            // Whoever lets go of them waits for the first of them.
            let is_first = state.resting.is_empty();
            state.resting.push_back((Instant::now() + REST, self.image.clone()));
            drop(state);
            if is_first {
                holds.changed.notify_one();
            }
            return;
        }
        let closed = if self.pinned { self.image.release() } else { Closed::default() };
        let nothing_open = state.is_empty();
        drop(state);
        // Here the storage may take its time.
        drop(closed);
        if nothing_open {
            files::close_unpinned();
        }
    }
}

impl Image {
    /// Counts a handle and pins all files, if they are not too many; whether they were pinned.
    fn pin(&self) -> bool {
        let mut state = self.cache.holds().state();
        state.handles += 1;
        let mut done = Vec::new();
        if self.files > files::pin_limit() {
            return false;
        }
        let pinned = loop {
            let mut fresh = self.with_below().take_while(|i| !i.is_held());
            let slots = self.with_below().take_while(|i| !i.is_held()).flat_map(Image::own_files);
            if files::pin(slots) {
                // Each holds the one below it, and the last of them one that was held before.
                let count = fresh.by_ref().count();
                for image in self.with_below().take(count + 1) {
                    image.holders.fetch_add(1, Ordering::Relaxed);
                }
                break true;
            }
            // Others that nobody needs any more make room. What they share with this is pinned anew.
            match state.let_go() {
                Some(old) => done.push(old),
                None => break false,
            }
        };
        drop(state);
        drop(done);
        pinned
    }

    /// Opens all files of a pinned image.
    fn open_held(&self) -> Result<()> {
        let unready = |i: &&Image| !i.files_open.load(Ordering::Acquire);
        let mut images: Vec<&Image> = self.with_below().take_while(unready).collect();
        while let Some(image) = images.pop() {
            image.own.iter().try_for_each(|l| l.open_files())?;
            image.files_open.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn is_held(&self) -> bool {
        self.holders.load(Ordering::Relaxed) > 0
    }

    /// This image and all below it, from the top.
    fn with_below(&self) -> impl Iterator<Item = &Image> + Clone {
        std::iter::successors(Some(self), |i| i.below.as_deref())
    }

    fn own_files(&self) -> impl Iterator<Item = &Arc<files::Slot>> + Clone {
        self.own.iter().flat_map(|l| l.slots())
    }
}

impl Pinned for Image {
    /// Undoes [`Image::pin`].
    fn release(&self) -> Closed {
        let mut closed = Closed::default();
        for image in self.with_below() {
            if image.holders.fetch_sub(1, Ordering::Relaxed) > 1 {
                break;
            }
            image.files_open.store(false, Ordering::Release);
            closed.append(files::unpin(image.own_files()));
        }
        closed
    }
}
