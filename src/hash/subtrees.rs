//! Subtrees of a file that are hashed before the file is complete.
//!
//! A file of up to a TiB is taken in units of a MiB, a larger one in larger units: the values of
//! all units take 32 MiB at most. Whoever hashes ahead says at the end which values still hold; all
//! else is hashed then, see [`super::rest_with`].

pub(crate) use blake3::hazmat::ChainingValue;
use blake3::hazmat::HasherExt;

use crate::error::Result;
use crate::storage::ReadAt;

/// Bytes hashed as one subtree, where nothing else is said: a power of two.
pub(super) const BLOCK: u64 = 1 << 20;
/// Bytes read at once: a power of two, small enough to be in the processor's own cache still when they
/// are hashed.
pub(super) const PIECE: u64 = 128 << 10;
/// The most units of a file.
const MOST_UNITS: u64 = 1 << 20;
/// The largest subtree that a file is taken in: beyond it a file has more units.
const LARGEST_UNIT: u64 = 1 << 30;

/// How many bytes to hash ahead as one subtree, for a file that will have `longest` bytes at most.
pub(crate) fn unit(longest: u64) -> u64 {
    let unit = longest.div_ceil(MOST_UNITS).checked_next_power_of_two().unwrap_or(LARGEST_UNIT);
    unit.clamp(BLOCK, LARGEST_UNIT)
}

/// Hashes unit number `index` of a file that has all of it.
///
/// # Errors
/// What the operating system said; the file is shorter.
pub(crate) fn hash_unit(storage: &dyn ReadAt, unit: u64, index: u64) -> Result<ChainingValue> {
    let (mut at, end) = (index * unit, (index + 1) * unit);
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(at);
    let mut buf = vec![0; PIECE as usize];
    while at < end {
        storage.read_exact_at(&mut buf, at)?;
        hasher.update(&buf);
        at += PIECE;
    }
    Ok(hasher.finalize_non_root())
}

/// The values of some units.
#[derive(Debug, Clone)]
pub(crate) struct KnownSubtrees {
    unit: u64,
    values: Vec<Option<ChainingValue>>,
}

impl Default for KnownSubtrees {
    /// No subtree is known.
    fn default() -> Self {
        KnownSubtrees { unit: BLOCK, values: Vec::new() }
    }
}

impl KnownSubtrees {
    /// The values of the first units of a file, of `unit` bytes each as [`unit()`] says; `None` where
    /// one is to be hashed.
    pub(crate) fn new(unit: u64, values: Vec<Option<ChainingValue>>) -> Self {
        KnownSubtrees { unit, values }
    }

    /// How many units are known.
    pub(crate) fn count(&self) -> u64 {
        self.values.iter().flatten().count() as u64
    }

    pub(super) fn unit(&self) -> u64 {
        self.unit
    }

    pub(super) fn value(&self, index: u64) -> Option<&ChainingValue> {
        self.values.get(usize::try_from(index).ok()?)?.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::{hash, hash_with};
    use crate::storage::{FaultyStorage, MemStorage};

    #[test]
    fn units_are_few_and_powers_of_two() {
        for (longest, wanted) in [
            (0, BLOCK),
            (1 << 40, BLOCK),
            ((1 << 40) + 1, 2 * BLOCK),
            (16 << 40, 16 * BLOCK),
            (u64::MAX, LARGEST_UNIT),
        ] {
            assert_eq!(unit(longest), wanted, "{longest}");
        }
    }

    /// Known units are not read, whichever they are and however large, and the hash is the same.
    #[test]
    fn a_file_of_which_units_are_known_has_the_same_hash() {
        for len in [0, 7, BLOCK, BLOCK + 1, 4 * BLOCK, 7 * BLOCK + 5, 9 * BLOCK] {
            let bytes: Vec<u8> = (0..len).map(|i| (i ^ (i >> 9)) as u8).collect();
            let expected = blake3::hash(&bytes);
            let storage = MemStorage::new("m", bytes.clone());
            assert_eq!(hash(&storage, 2, &()).unwrap(), expected);
            for (unit, mask) in [(BLOCK, 0u64), (BLOCK, 0x1ff), (BLOCK, 0x5a), (2 * BLOCK, 0b1011)]
            {
                let whole = len / unit;
                let value = |i: u64| ((mask >> i) & 1 != 0).then(|| hash_unit(&storage, unit, i));
                let values = (0..whole).map(|i| value(i).map(Result::unwrap)).collect();
                let known = KnownSubtrees::new(unit, values);
                assert_eq!(known.count(), u64::from((mask & ((1 << whole) - 1)).count_ones()));
                let first = if mask & 1 != 0 && len > unit { 0..unit.min(len) } else { 0..0 };
                let storage = FaultyStorage::new(MemStorage::new("m", bytes.clone()), first);
                let hash = hash_with(&storage, &known, 2, &(), &|| Ok(())).unwrap();
                assert_eq!(hash, expected, "{len} {unit} {mask:b}");
            }
        }
    }

    #[test]
    fn a_unit_that_the_file_has_not_all_of_is_an_error() {
        let storage = MemStorage::new("m", vec![1; BLOCK as usize + 5]);
        assert!(hash_unit(&storage, BLOCK, 0).is_ok());
        assert!(hash_unit(&storage, BLOCK, 1).is_err());
    }
}
