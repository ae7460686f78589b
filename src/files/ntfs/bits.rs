//! Bits and prefix codes as XPRESS and LZX have them: words of 16 bits with the lowest byte first, read from their
//! highest bit on; codes are canonical, given by their lengths.

use super::super::bytes::{byte, le16};

/// The longest code.
pub(super) const MAX_LEN: usize = 16;

/// A stream of bits. 16 of them at least are read ahead: XPRESS has bytes between the words that depend on it.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The next bits, from the highest on, and how many they are.
    next: u32,
    have: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Bits<'a> {
        let mut bits = Bits { bytes, at: 0, next: 0, have: 0 };
        bits.fill();
        bits.fill();
        bits
    }

    fn fill(&mut self) {
        self.next |= u32::from(le16(self.bytes, self.at)) << (16 - self.have);
        self.at += 2;
        self.have += 16;
    }

    /// The next `count` bits, at most 16.
    pub(super) fn take(&mut self, count: u32) -> u32 {
        let found = self.peek() >> (16 - count);
        self.skip(count);
        found
    }

    fn peek(&self) -> u32 {
        self.next >> 16
    }

    fn skip(&mut self, count: u32) {
        self.next <<= count;
        self.have -= count;
        if self.have < 16 {
            self.fill();
        }
    }

    /// The next symbol; `None` if the bits are no code.
    pub(super) fn symbol(&mut self, code: &Code) -> Option<usize> {
        let (symbol, len) = code.find(self.peek())?;
        self.skip(len);
        Some(symbol)
    }

    /// The byte behind the words that were read ahead.
    pub(super) fn byte(&mut self) -> usize {
        self.at += 1;
        usize::from(byte(self.bytes, self.at - 1))
    }

    /// Whether more was taken than there is.
    pub(super) fn is_over(&self) -> bool {
        self.at.saturating_sub(self.have as usize / 8) > self.bytes.len()
    }

    /// Goes to the next boundary of a word, at least one bit further; what is behind it.
    pub(super) fn rest(&self) -> &'a [u8] {
        let bits = self.at * 8 - self.have as usize;
        self.bytes.get((bits / 16 + 1) * 2..).unwrap_or_default()
    }
}

/// A canonical prefix code.
pub(super) struct Code {
    /// For each length: the first code that is longer, as 16 bits; and the first of this length, and which symbol
    /// that is.
    lens: [(u32, u32, usize); MAX_LEN + 1],
    symbols: Vec<u16>,
}

impl Code {
    /// From the length of each symbol's code, 0 for those that do not occur; `None` if no code has them.
    pub(super) fn new(lengths: &[u8]) -> Option<Code> {
        let (mut lens, mut symbols) = ([(0, 0, 0); MAX_LEN + 1], Vec::new());
        let mut next = 0u32;
        for (len, slot) in lens.iter_mut().enumerate().skip(1) {
            let (first, start) = (next, symbols.len());
            let all = lengths.iter().enumerate().filter(|(_, l)| usize::from(**l) == len);
            symbols.extend(all.map(|(symbol, _)| symbol as u16));
            next += ((symbols.len() - start) as u32) << (MAX_LEN - len);
            *slot = (next, first, start);
        }
        (next <= 1 << MAX_LEN).then_some(Code { lens, symbols })
    }

    /// The symbol that 16 bits begin with, and how many of them it takes.
    fn find(&self, bits: u32) -> Option<(usize, u32)> {
        let len = (1..=MAX_LEN).find(|len| self.lens.get(*len).is_some_and(|l| bits < l.0))?;
        let (_, first, start) = self.lens.get(len)?;
        let index = (bits - first) >> (MAX_LEN - len);
        let symbol = self.symbols.get(start + index as usize)?;
        Some((usize::from(*symbol), len as u32))
    }
}

/// Copies `len` bytes from `back` bytes before the end; `None` if that is before the beginning, or `max` would be
/// passed.
pub(super) fn copy(made: &mut Vec<u8>, back: usize, len: usize, max: usize) -> Option<()> {
    let from = made.len().checked_sub(back).filter(|_| back > 0 && len <= max - made.len())?;
    for i in from..from + len {
        made.push(byte(made, i));
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_canonical() {
        // a: 10, b: 0, c: 110, d: 111.
        let code = Code::new(&[2, 1, 3, 3]).unwrap();
        // 10 0 110 111 0..., in words with the lowest byte first.
        let mut bits = Bits::new(&[0x00, 0x9b, 0x00, 0x80]);
        bits.next = 0b1001_1011_1000_0000 << 16;
        let found: Vec<_> = (0..4).map(|_| bits.symbol(&code).unwrap()).collect();
        assert_eq!(found, [0, 1, 2, 3]);
        assert!(Code::new(&[1, 1, 1]).is_none());
        // One that is not complete has bits that mean nothing.
        let code = Code::new(&[0, 2]).unwrap();
        assert_eq!((code.find(0x3fff), code.find(0x4000)), (Some((1, 2)), None));
        assert!(Code::new(&[0; 9]).unwrap().find(0).is_none());
    }

    #[test]
    fn bits_and_bytes_are_read_in_their_order() {
        let mut bits = Bits::new(&[0x34, 0x12, 0x78, 0x56, 0xaa, 0xbb, 0xcc]);
        assert_eq!((bits.take(4), bits.take(8), bits.take(0)), (1, 0x23, 0));
        assert_eq!((bits.byte(), bits.take(8)), (0xaa, 0x45));
        assert!(!bits.is_over());
        let mut bits = Bits::new(&[1, 2, 3, 4, 5, 6]);
        assert_eq!(bits.rest(), [3, 4, 5, 6]);
        bits.take(16);
        assert_eq!(bits.rest(), [5, 6]);
        bits.take(16);
        bits.take(16);
        assert!(!bits.is_over());
        bits.take(16);
        assert!(bits.is_over() && bits.rest().is_empty());
    }

    #[test]
    fn copies_stay_inside() {
        let mut made = b"ab".to_vec();
        copy(&mut made, 2, 5, 7).unwrap();
        assert_eq!(made, b"abababa");
        assert!(copy(&mut made, 8, 1, 9).is_none() && copy(&mut made, 0, 1, 9).is_none());
        assert!(copy(&mut made, 1, 3, 9).is_none());
    }
}
