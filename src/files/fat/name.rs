//! Names: short ones of 8 and 3 bytes, and long ones in the entries before those.

use super::super::bytes::{byte, part};
use super::super::utf16;
use super::cp437::character;

/// The first byte of an entry that was deleted; a name that begins with this byte has 5 there.
pub(super) const DELETED: u8 = 0xe5;
const KANJI: u8 = 5;
/// Windows notes here that a name or an extension is in lower case.
const LOWER_NAME: u8 = 0x08;
const LOWER_EXTENSION: u8 = 0x10;
/// The number of the last part of a long name is marked, and comes first.
const LAST: u8 = 0x40;
/// A long name has at most 20 parts of 13 units.
const MAX_PARTS: u8 = 20;
const UNITS: usize = 13;

/// The short name of an entry, as it is shown where there is no long one.
pub(super) fn short(slot: &[u8]) -> String {
    let flags = byte(slot, 12);
    let mut raw = part(slot, 0, 11).to_vec();
    if let Some(first) = raw.first_mut().filter(|b| **b == KANJI) {
        *first = DELETED;
    }
    let name = text(part(&raw, 0, 8), flags & LOWER_NAME > 0);
    let extension = text(part(&raw, 8, 3), flags & LOWER_EXTENSION > 0);
    if extension.is_empty() { name } else { format!("{name}.{extension}") }
}

/// The volume's name.
pub(super) fn label(raw: &[u8]) -> String {
    text(raw, false)
}

fn text(raw: &[u8], lower: bool) -> String {
    let len = raw.iter().rposition(|b| *b != b' ').map_or(0, |last| last + 1);
    let lowered = |b: &u8| if lower { b.to_ascii_lowercase() } else { *b };
    raw.iter().take(len).map(|b| character(lowered(b))).collect()
}

/// What a name is compared by; `None` if there can be none with these bytes.
pub(super) fn folded(name: &[u8]) -> Option<Vec<u16>> {
    Some(upper(&utf16::from_bytes(name)?))
}

/// The same of a name that is known.
pub(super) fn upper(units: &[u16]) -> Vec<u16> {
    units.iter().map(|u| utf16::upper(*u)).collect()
}

/// The checksum of a short name that the parts of its long name carry.
fn checksum(slot: &[u8]) -> u8 {
    part(slot, 0, 11).iter().fold(0u8, |sum, b| sum.rotate_right(1).wrapping_add(*b))
}

/// A long name while its parts come by, the last one first.
#[derive(Debug, Default)]
pub(super) struct Long {
    /// The part that should come next; 0 when all are there.
    next: u8,
    sum: u8,
    units: Vec<u16>,
    begun: bool,
}

impl Long {
    /// One more part. One that does not fit to those before makes them orphans.
    pub(super) fn add(&mut self, slot: &[u8]) {
        let (order, sum) = (byte(slot, 0), byte(slot, 13));
        let number = order & !LAST;
        if order & LAST > 0 {
            let begun = (1..=MAX_PARTS).contains(&number);
            let units = vec![0; usize::from(number) * UNITS];
            *self = Long { next: number, sum, units, begun };
        }
        if !self.begun || number != self.next || sum != self.sum || number == 0 {
            return *self = Long::default();
        }
        self.next = number - 1;
        let found = [part(slot, 1, 10), part(slot, 14, 12), part(slot, 28, 4)].concat();
        let to = self.units.iter_mut().skip(usize::from(number - 1) * UNITS);
        to.zip(utf16::units(&found)).for_each(|(to, unit)| *to = unit);
    }

    /// The name, if it is whole and belongs to this entry; what comes next begins anew.
    pub(super) fn take(&mut self, slot: &[u8]) -> Option<Vec<u16>> {
        let long = std::mem::take(self);
        let whole = long.begun && long.next == 0 && long.sum == checksum(slot);
        whole.then(|| long.units.split(|u| *u == 0).next().unwrap_or_default().to_vec())
    }

    /// Forgets what came by.
    pub(super) fn clear(&mut self) {
        *self = Long::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(name: &[u8; 11], flags: u8) -> Vec<u8> {
        let mut slot = name.to_vec();
        slot.extend([0x20, flags]);
        slot.resize(32, 0);
        slot
    }

    #[test]
    fn short_names_read_as_windows_shows_them() {
        assert_eq!(short(&slot(b"README  TXT", 0)), "README.TXT");
        assert_eq!(short(&slot(b"README  TXT", 0x18)), "readme.txt");
        assert_eq!(short(&slot(b"README  TXT", 0x10)), "README.txt");
        assert_eq!(short(&slot(b"A B     \x81  ", 0x08)), "a b.ü");
        assert_eq!(short(&slot(b"\x05X         ", 0)), "σX");
        assert_eq!(short(&slot(b"           ", 0)), "");
    }

    fn part_of(order: u8, sum: u8, text: &str) -> Vec<u8> {
        let mut units: Vec<u16> = text.encode_utf16().chain([0]).collect();
        units.resize(13, 0xffff);
        let bytes: Vec<u8> = units.iter().flat_map(|u| u.to_le_bytes()).collect();
        [&[order], &bytes[..10], &[15, 0, sum], &bytes[10..22], &[0, 0], &bytes[22..]].concat()
    }

    #[test]
    fn long_names_are_put_together_and_orphans_ignored() {
        let end = slot(b"ALONGN~1TXT", 0);
        let sum = checksum(&end);
        let name = |parts: &[Vec<u8>]| {
            let mut long = Long::default();
            parts.iter().for_each(|p| long.add(p));
            long.take(&end).map(|units| String::from_utf16(&units).unwrap())
        };
        let [last, first] = [part_of(0x42, sum, "äöü"), part_of(1, sum, "a long name, ")];
        assert_eq!(name(&[last.clone(), first.clone()]).as_deref(), Some("a long name, äöü"));
        for parts in [
            vec![first.clone()],
            vec![last.clone()],
            vec![first.clone(), last.clone()],
            vec![last.clone(), first.clone(), first.clone()],
            vec![last.clone(), part_of(1, sum ^ 1, "x")],
            vec![part_of(0x41, sum ^ 1, "x")],
            vec![part_of(0x40, sum, "x")],
            vec![part_of(0x55, sum, "x")],
        ] {
            assert_eq!(name(&parts), None);
        }
        // Orphans before it do no harm.
        assert_eq!(name(&[first.clone(), last, first]).as_deref(), Some("a long name, äöü"));
    }
}
