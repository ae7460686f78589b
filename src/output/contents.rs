//! The contents of files on a terminal: somebody else wrote them, and a terminal obeys what is in them.

use std::io::{self, Write};

use crate::text::is_hidden;

/// Makes what is written through it visible: line breaks and tabs stay, other control characters and what is no
/// UTF-8 become escapes, as in names. What comes at the end of one write and goes on in the next is waited for.
pub(super) struct Visible<W: Write> {
    out: W,
    /// The beginning of a character: at most three bytes.
    begun: Vec<u8>,
}

impl<W: Write> Visible<W> {
    pub(super) fn new(out: W) -> Self {
        Visible { out, begun: Vec::new() }
    }

    /// What no more bytes follow.
    ///
    /// # Errors
    /// What writing says.
    pub(super) fn end(mut self) -> io::Result<()> {
        let escaped = escape(&self.begun);
        self.out.write_all(escaped.as_bytes())
    }
}

impl<W: Write> Write for Visible<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut all = std::mem::take(&mut self.begun);
        all.extend_from_slice(bytes);
        let mut shown = String::with_capacity(all.len());
        let mut at = 0;
        for chunk in all.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\n' | '\t' => shown.push(c),
                    c if is_hidden(c) => shown.extend(c.escape_default()),
                    c => shown.push(c),
                }
            }
            at += chunk.valid().len() + chunk.invalid().len();
            let may_go_on =
                std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
            match at == all.len() && may_go_on {
                true => self.begun = chunk.invalid().to_vec(),
                false => shown.push_str(&escape(chunk.invalid())),
            }
        }
        self.out.write_all(shown.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn escape(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("\\x{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(parts: &[&[u8]]) -> String {
        let mut out = Vec::new();
        let mut visible = Visible::new(&mut out);
        for part in parts {
            visible.write_all(part).unwrap();
        }
        visible.end().unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_a_terminal_obeys_is_shown() {
        assert_eq!(shown(&[b"a\tb\nc"]), "a\tb\nc");
        assert_eq!(shown(&[b"\x1b]0;t\x07\r"]), "\\u{1b}]0;t\\u{7}\\r");
        assert_eq!(shown(&["\u{9b}31m\u{202e}".as_bytes()]), "\\u{9b}31m\\u{202e}");
        assert_eq!(shown(&[b"\xff\x9b"]), "\\xff\\x9b");
    }

    #[test]
    fn a_character_in_two_parts_is_one() {
        let bytes = "ä€\u{1f600}\u{9b}.".as_bytes();
        for cut in 0..=bytes.len() {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(shown(&[a, b]), "ä€\u{1f600}\\u{9b}.", "{cut}");
        }
        assert_eq!(shown(&[b"\xe2", b"\x82", b"x\xe2\x82"]), "\\xe2\\x82x\\xe2\\x82");
    }
}
