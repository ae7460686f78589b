//! All layers of an image, bottom first. Those of a long chain are in chunks that its images share: a list
//! of its own for each image would take memory by the square of the chain's length.

use std::ops::Index;
use std::sync::{Arc, OnceLock};

use crate::image::lazy::LazyLayer;

/// Layers in a chunk.
const LEN: usize = 256;

/// So many layers in a row, by their place in the chain.
pub(super) type Chunk = Arc<[Arc<LazyLayer>]>;

/// The layers of one image.
#[derive(Clone, Default)]
pub(super) struct Stack {
    chunks: Vec<Chunk>,
    /// Those above the last chunk, fewer than one has.
    rest: Vec<Arc<LazyLayer>>,
}

impl Stack {
    /// Adds the own layers of the next image above. A chunk is kept by the lowest image that has all of it,
    /// in `chunks`, for all above.
    pub(super) fn add(&mut self, own: &[Arc<LazyLayer>], chunks: &OnceLock<Box<[Chunk]>>) {
        self.rest.extend(own.iter().cloned());
        if self.rest.len() < LEN {
            return;
        }
        let whole = || self.rest.chunks_exact(LEN).map(Arc::from).collect();
        let chunks: &[Chunk] = chunks.get_or_init(whole);
        self.chunks.extend(chunks.iter().cloned());
        self.rest.drain(..chunks.len() * LEN);
    }

    /// Takes no more memory than it needs.
    pub(super) fn shrink(&mut self) {
        self.chunks.shrink_to_fit();
        self.rest.shrink_to_fit();
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.chunks.len() * LEN + self.rest.len()
    }

    /// Number `index`, counted from the bottom.
    pub(super) fn get(&self, index: usize) -> Option<&Arc<LazyLayer>> {
        match self.chunks.get(index / LEN) {
            Some(chunk) => chunk.get(index % LEN),
            None => self.rest.get(index - self.chunks.len() * LEN),
        }
    }

    /// From number `first` on, upwards.
    pub(super) fn from(&self, first: usize) -> impl DoubleEndedIterator<Item = &Arc<LazyLayer>> {
        (first..self.len()).filter_map(|index| self.get(index))
    }
}

impl Index<usize> for Stack {
    type Output = Arc<LazyLayer>;

    fn index(&self, index: usize) -> &Arc<LazyLayer> {
        match self.chunks.get(index / LEN) {
            Some(chunk) => &chunk[index % LEN],
            None => &self.rest[index - self.chunks.len() * LEN],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Cache, Image};
    use crate::layer::{Format, LayerPart, LayerSpec};
    use crate::storage::SourceFile;

    /// A chain of images with so many layers each.
    fn chain(own: &[usize]) -> Vec<Arc<Image>> {
        let f = tempfile::NamedTempFile::new().unwrap();
        let file = Arc::new(SourceFile::look(f.path()).unwrap());
        let spec = LayerSpec { file, format: Format::Raw, part: LayerPart::Whole, data_file: None };
        let (cache, mut all) = (Cache::new(1 << 20), Vec::<Arc<Image>>::new());
        for layers in own {
            let specs = vec![spec.clone(); *layers];
            all.push(Image::new(512, &specs, all.last().cloned(), &cache).unwrap());
        }
        all
    }

    #[test]
    fn all_layers_are_there_in_order_however_they_are_spread() {
        let images = chain(&[1, 254, 1, 1, 3 * LEN, 255, 2, 700]);
        let want: Vec<u64> = images.iter().flat_map(|i| i.own.iter().map(|l| l.id)).collect();
        for image in images.iter().rev() {
            let stack = image.stack();
            assert_eq!(stack.len(), image.depth());
            let ids: Vec<u64> = stack.from(0).map(|l| l.id).collect();
            assert_eq!(ids, want[..image.depth()]);
            assert!((0..stack.len()).all(|i| stack[i].id == want[i]));
            assert!(stack.get(stack.len()).is_none());
            assert_eq!(stack.from(stack.len() - 1).count(), 1);
        }
    }

    #[test]
    fn a_long_chain_is_listed_once_and_not_by_each_image() {
        let images = chain(&[1; 3000]);
        // From above and from below, so that each finds what others have made, or nothing.
        let order = (0..1500).flat_map(|i| [2999 - i, i]);
        order.for_each(|i| assert_eq!(images[i].stack().len(), i + 1));
        let taken = |i: &Arc<Image>| i.stack().chunks.capacity() + i.stack().rest.capacity();
        let listed: usize = images.iter().map(taken).sum();
        assert!(listed < 3000 * (LEN + 3000 / LEN), "{listed}");
        let chunk = |i: usize| images[i].stack().chunks[0].clone();
        assert!((LEN - 1..3000).all(|i| Arc::ptr_eq(&chunk(i), &chunk(2999))));
    }
}
