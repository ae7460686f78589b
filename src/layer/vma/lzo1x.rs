//! Decompressing one LZO1X block, after the description of its instructions in the Linux kernel's
//! documentation (`staging/lzo.rst`).
//!
//! A block is a sequence of instructions. Each copies a match from what was written before, and
//! then up to three literals, whose number (the state) changes the meaning of the next instruction;
//! state 4 stands for a longer run of literals.

/// Input and output of one block.
struct Block<'a> {
    input: &'a [u8],
    at: usize,
    out: &'a mut [u8],
    done: usize,
}

/// Decompresses `input` into exactly `out`.
///
/// # Errors
/// A text that says why the block is not what it should be.
pub(super) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    match decompress_some(input, out)? == out.len() {
        true => Ok(()),
        false => Err("a block is shorter than announced"),
    }
}

/// Decompresses `input` into the beginning of `out`; how many bytes that makes.
///
/// # Errors
/// A text that says why the block is not what it should be.
pub(crate) fn decompress_some(input: &[u8], out: &mut [u8]) -> Result<usize, &'static str> {
    let mut block = Block { input, at: 0, out, done: 0 };
    let mut state = 0;
    // The first byte may be a run of literals in a shorter form.
    if let Some(first @ 18..) = input.first().copied() {
        block.at = 1;
        block.literals(usize::from(first) - 17)?;
        state = usize::from(first - 17).min(4);
    }
    while let Some(next) = block.instruction(state)? {
        state = next;
    }
    if block.at != block.input.len() {
        return Err("bytes follow the end of a block");
    }
    Ok(block.done)
}

impl Block<'_> {
    fn byte(&mut self) -> Result<usize, &'static str> {
        let b = self.input.get(self.at).ok_or("a block ends inside an instruction")?;
        self.at += 1;
        Ok(usize::from(*b))
    }

    /// A length whose `bits` low bits in the instruction may be too few.
    fn length(&mut self, instruction: usize, bits: u32) -> Result<usize, &'static str> {
        let mask = (1 << bits) - 1;
        if instruction & mask != 0 {
            return Ok(instruction & mask);
        }
        let mut length: usize = mask;
        loop {
            match self.byte()? {
                0 => length += 255,
                last => return Ok(length + last),
            }
            if length > self.out.len() {
                return Err("a length goes beyond the block");
            }
        }
    }

    fn literals(&mut self, count: usize) -> Result<(), &'static str> {
        let from = self.input.get(self.at..self.at + count).ok_or("literals are missing")?;
        let to = self.out.get_mut(self.done..self.done + count).ok_or("a block is too long")?;
        to.copy_from_slice(from);
        self.at += count;
        self.done += count;
        Ok(())
    }

    fn copy(&mut self, distance: usize, length: usize) -> Result<(), &'static str> {
        let from = self.done.checked_sub(distance).ok_or("a match begins before the block")?;
        if self.out.len() - self.done < length {
            return Err("a block is too long");
        }
        if distance >= length {
            self.out.copy_within(from..from + length, self.done);
        } else {
            // Overlapping: what is being written is repeated.
            for i in 0..length {
                self.out[self.done + i] = self.out[from + i];
            }
        }
        self.done += length;
        Ok(())
    }

    /// A match, then as many literals as the two low bits of `low` say, which are the next state.
    fn matched(
        &mut self,
        distance: usize,
        length: usize,
        low: usize,
    ) -> Result<Option<usize>, &'static str> {
        self.copy(distance, length)?;
        self.literals(low & 3)?;
        Ok(Some(low & 3))
    }

    fn word(&mut self) -> Result<usize, &'static str> {
        Ok(self.byte()? | self.byte()? << 8)
    }

    /// Carries out one instruction: the next state, or `None` at the end.
    fn instruction(&mut self, state: usize) -> Result<Option<usize>, &'static str> {
        let op = self.byte()?;
        match op {
            0..=15 => self.short(op, state),
            16..=31 => {
                let length = self.length(op, 3)? + 2;
                let word = self.word()?;
                let distance = 16384 + ((op & 8) << 11) + (word >> 2);
                if distance == 16384 {
                    return if op == 17 { Ok(None) } else { Err("a damaged end of a block") };
                }
                self.matched(distance, length, word)
            }
            32..=63 => {
                let length = self.length(op, 5)? + 2;
                let word = self.word()?;
                self.matched((word >> 2) + 1, length, word)
            }
            _ => {
                // 01L and 1LL: three to eight bytes.
                let length = (op >> 5) + 1;
                let distance = (self.byte()? << 3) + (op >> 2 & 7) + 1;
                self.matched(distance, length, op)
            }
        }
    }

    /// Instructions below 16: literals, or a short match, depending on what came before.
    fn short(&mut self, op: usize, state: usize) -> Result<Option<usize>, &'static str> {
        if state == 0 {
            let count = self.length(op, 4)? + 3;
            self.literals(count)?;
            return Ok(Some(4));
        }
        let distance = (self.byte()? << 2) + (op >> 2) + 1;
        if state == 4 {
            self.matched(distance + 2048, 3, op)
        } else {
            self.matched(distance, 2, op)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(input: &[u8], len: usize) -> Result<Vec<u8>, &'static str> {
        let mut out = vec![0; len];
        decompress(input, &mut out).map(|()| out)
    }

    #[test]
    fn instructions_do_what_the_description_says() {
        // 4 literals, then a match of 3 + 1 bytes at distance 4, one literal, end.
        let block = [21, b'a', b'b', b'c', b'd', 0b0110_1101, 0, b'x', 17, 0, 0];
        assert_eq!(run(&block, 9).unwrap(), b"abcdabcdx");
        // A literal run of 3 + 1, then a match that overlaps itself: distance 1, length 2 + 30.
        let block = [1, 1, 2, 3, 4, 32 | 30, 0, 0, 17, 0, 0];
        let mut want = vec![1, 2, 3, 4];
        want.extend([4; 32]);
        assert_eq!(run(&block, 36).unwrap(), want);
        // A long run of literals: 15 + 255 + 7 + 3.
        let mut block = vec![0, 0, 7];
        block.extend([9; 280]);
        block.extend([17, 0, 0]);
        assert_eq!(run(&block, 280).unwrap(), [9; 280]);
        // After one literal (state 1), a match of 2 bytes at distance 1.
        assert_eq!(run(&[18, 7, 0, 0, 17, 0, 0], 3).unwrap(), [7; 3]);
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let block = [21, b'a', b'b', b'c', b'd', 0b0110_1101, 0, b'x', 17, 0, 0];
        for cut in 0..block.len() {
            assert!(run(&block[..cut], 9).is_err());
        }
        assert!(run(&block, 8).is_err() && run(&block, 10).is_err());
        for at in 0..block.len() {
            for value in 0..=255 {
                let mut bad = block;
                bad[at] = value;
                let _ = run(&bad, 9);
            }
        }
    }
}
