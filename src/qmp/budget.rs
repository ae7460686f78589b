//! JSON whose memory is counted before any of it is taken.
//!
//! A few bytes of text become many of memory: `[],` is 32 bytes of a value, `{"":0}` more than 600.
//! So a line is scanned first, with what each value will take at most, and one that goes beyond the
//! budget is refused.

use serde_json::Value;

use crate::error::{Error, Kind, Result};

/// What a value takes in a list that has grown to twice its length, and what a small member of a
/// structure read from it takes. In bytes, as all of these.
const VALUE: usize = 96;

/// An object that has members: one node of its tree (eleven keys and values).
const OBJECT: usize = 656;

/// The least that the allocator gives for a text.
const TEXT: usize = 48;

/// How deep values may be nested. QEMU's own answers stay below 64, but for chains of as many
/// backing files; serde_json stops at 128.
const DEPTH: usize = 120;

/// Reads a line of JSON that takes at most `memory` bytes.
///
/// # Errors
/// `Corrupt` if it is no JSON, is nested too deep, or would take more.
pub fn parse(line: &[u8], memory: usize) -> Result<Value> {
    let cost = cost(line)?;
    if cost > memory {
        let what = format!("an answer that would take over {} MiB of memory", memory >> 20);
        return Err(Error::new(Kind::Corrupt, what));
    }
    serde_json::from_slice(line)
        .map_err(|e| Error::new(Kind::Corrupt, "the answer is not JSON").with_source(e))
}

/// Memory that the values of a text take at most, in bytes.
///
/// # Errors
/// `Corrupt` if it is nested too deep.
fn cost(text: &[u8]) -> Result<usize> {
    let mut sum = VALUE;
    let mut depth = 0usize;
    let mut bytes = text.iter();
    while let Some(b) = bytes.next() {
        let more = match b {
            b'{' | b'[' => {
                depth = depth.saturating_add(1);
                if depth > DEPTH {
                    return Err(Error::new(Kind::Corrupt, "the answer is nested too deep"));
                }
                if *b == b'{' { OBJECT } else { VALUE }
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                0
            }
            b',' => VALUE,
            b'"' => TEXT.saturating_add(skip_string(&mut bytes)),
            _ => 0,
        };
        sum = sum.saturating_add(more);
    }
    Ok(sum)
}

/// Goes behind the end of a string; gives its length as it is written.
fn skip_string(bytes: &mut std::slice::Iter<'_, u8>) -> usize {
    let before = bytes.len();
    while let Some(b) = bytes.next() {
        match b {
            b'\\' => drop(bytes.next()),
            b'"' => break,
            _ => {}
        }
    }
    before.saturating_sub(bytes.len())
}

/// Memory that a value takes at most, in bytes.
pub fn size(value: &Value) -> usize {
    let sum = |all: &mut dyn Iterator<Item = usize>| all.fold(0usize, usize::saturating_add);
    match value {
        Value::Array(list) => VALUE.saturating_add(sum(&mut list.iter().map(size))),
        Value::Object(o) => {
            let member =
                |(k, v): (&String, &Value)| size(v).saturating_add(k.len()).saturating_add(TEXT);
            OBJECT.saturating_add(sum(&mut o.iter().map(member)))
        }
        Value::String(s) => VALUE.saturating_add(TEXT).saturating_add(s.len()),
        _ => VALUE,
    }
}

/// The beginning of a peer's text, for messages and records: no more than is of use to a reader.
pub fn short(text: &str) -> String {
    clip(text, 1000)
}

/// The first characters of a text, `most` of them.
pub fn clip(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_texts_that_take_much_memory_are_refused() {
        let list = |item: &str, n: usize| format!("[{}0]", item.repeat(n));
        for item in ["[],", "{},", "{\"\":0},", "\"\",", "0,", "[[]],", "\"\\\"\","] {
            let e = parse(list(item, 1 << 20).as_bytes(), 48 << 20).unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt, "{item}");
            parse(list(item, 1000).as_bytes(), 48 << 20).unwrap();
        }
        // Behind a text that has a quote in it, or ends in a backslash.
        for text in ["\"\\\"\"", "\"\\\\\"", "\"\\\\\\\"\""] {
            let list = format!("[{text},{}0]", "[],".repeat(1 << 20));
            let e = parse(list.as_bytes(), 48 << 20).unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt, "{text}");
        }
        let long = format!("\"{}\"", "[{,".repeat(1 << 20));
        parse(long.as_bytes(), 4 << 20).unwrap();
        parse(long.as_bytes(), 2 << 20).unwrap_err();
    }

    #[test]
    fn nesting_has_an_end() {
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        parse(nested(DEPTH).as_bytes(), 1 << 20).unwrap();
        for open in [nested(DEPTH + 1), "[".repeat(10_000_000), "{\"a\":".repeat(1_000_000)] {
            let e = parse(open.as_bytes(), usize::MAX).unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn garbage_is_an_error() {
        for text in ["", "\"", "\"\\", "{\"", "]]]", "\u{fffd}", "nul", "1e999", "{,}"] {
            assert_eq!(parse(text.as_bytes(), 1 << 20).unwrap_err().kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn what_is_kept_of_a_text_is_short() {
        assert_eq!(short("no"), "no");
        assert!(short(&"ä".repeat(1 << 20)).len() < 4000);
    }
}
