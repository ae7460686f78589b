//! Text from outside, made fit to be shown: names of files and disks, answers of QEMU and the
//! guest agent, words of manifests and images.
//!
//! A terminal obeys control characters, a log takes a line break for the end of an entry, and a
//! reader is deceived by text that runs backwards or cannot be seen. Whatever is shown passes
//! through here: names through [`path_text`], sentences through [`visible`], JSON through
//! [`json()`] and its like. Names that are data (arguments, files in a mount) stay as they are.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// Whether a character is obeyed, or unseen, instead of being shown: controls (C0, DEL, C1), line
/// and paragraph separators, directions of writing, and what Unicode calls default-ignorable.
///
/// The selectors of text and emoji style (U+FE0E, U+FE0F) belong to ordinary emoji, and stay.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0d}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// A sentence for one line: what is hidden becomes an escape such as `\n` or `\u{1b}`.
///
/// Done twice it is the same as once, so that a last look over a whole message does no harm to
/// what was made visible before. Therefore it leaves backslashes alone: names that are put into a
/// message go through [`path_text`], which does not.
pub fn visible(text: &str) -> String {
    shown(text, false)
}

/// Like [`visible`], for a text of several lines: line breaks stay.
pub fn visible_lines(text: &str) -> Cow<'_, str> {
    match text.chars().any(|c| c != '\n' && is_hidden(c)) {
        true => Cow::Owned(shown(text, true)),
        false => Cow::Borrowed(text),
    }
}

/// Whether all is ordinary ASCII, as in nearly every name: it is shown as it is, a byte is a column,
/// and no character need be looked at.
fn is_plain(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| matches!(b, b' '..=b'~') && *b != b'\\')
}

fn shown(text: &str, breaks: bool) -> String {
    if is_plain(text.as_bytes()) {
        return text.to_string();
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' if breaks => shown.push(c),
            c if is_hidden(c) => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// A name or path for people. Different names stay different to the eye: hidden characters become
/// `\n`, `\u{1b}` and so on, bytes that are no UTF-8 `\xNN`, and a backslash that would look like
/// the beginning of such an escape is doubled.
pub fn path_text<N: AsRef<OsStr> + ?Sized>(name: &N) -> String {
    let bytes = name.as_ref().as_bytes();
    if is_plain(bytes) {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        let mut chars = chunk.valid().chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '\\' => {
                    let next = chars.peek().copied();
                    let invalid = next.is_none() && !chunk.invalid().is_empty();
                    shown.push_str(if invalid || next.is_some_and(escapes) { r"\\" } else { r"\" });
                }
                c if is_hidden(c) => shown.extend(c.escape_default()),
                c => shown.push(c),
            }
        }
        escape_bytes(&mut shown, chunk.invalid());
    }
    shown
}

/// Whether `text` is what [`path_text`] makes of `name`, and not the name itself: so that what was
/// copied from a list is understood.
pub fn shown_as<N: AsRef<OsStr> + ?Sized>(name: &N, text: &str) -> bool {
    text.contains('\\') && path_text(name) == text
}

/// Whether a backslash before this character could be read as the beginning of an escape.
fn escapes(next: char) -> bool {
    matches!(next, '\\' | 'x' | 'u' | 'n' | 'r' | 't') || is_hidden(next)
}

fn escape_bytes(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "\\x{byte:02x}");
    }
}

/// A name as data, for JSON and the names of points: as it is where it is UTF-8, other bytes as
/// `\xNN`. It is not fit to be shown; that is [`path_text`].
pub fn to_text(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        escape_bytes(&mut text, chunk.invalid());
    }
    text
}

/// Serializes a path as [`to_text`]: one that is not UTF-8 must not make a whole report fail.
///
/// # Errors
/// Those of the serializer.
pub fn as_text<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&to_text(path.as_os_str()))
}

/// Serializes a word in lower case, as levels are in JSON.
///
/// # Errors
/// Those of the serializer.
pub fn as_lower<S: serde::Serializer>(word: &str, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&word.to_ascii_lowercase())
}

/// As people count: `disk2` is before `disk10`. What is alike but for leading zeros is ordered by its bytes.
pub fn natural_order(a: &OsStr, b: &OsStr) -> std::cmp::Ordering {
    let (mut x, mut y) = (a.as_bytes(), b.as_bytes());
    loop {
        let (digits_x, rest_x) = digits(x);
        let (digits_y, rest_y) = digits(y);
        let (value_x, value_y) = (without_zeros(digits_x), without_zeros(digits_y));
        let order = match (digits_x, digits_y) {
            ([], _) | (_, []) => x.first().cmp(&y.first()),
            _ => value_x.len().cmp(&value_y.len()).then_with(|| value_x.cmp(value_y)),
        };
        if order.is_ne() || x.is_empty() {
            return order.then_with(|| a.cmp(b));
        }
        // Equal so far: the number, or one byte.
        (x, y) = match (digits_x, digits_y) {
            ([], _) | (_, []) => (&x[1..], &y[1..]),
            _ => (rest_x, rest_y),
        };
    }
}

fn digits(text: &[u8]) -> (&[u8], &[u8]) {
    text.split_at(text.iter().take_while(|b| b.is_ascii_digit()).count())
}

fn without_zeros(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().take_while(|b| **b == b'0').count()..]
}

/// Columns that a text takes on a terminal.
pub fn columns(text: &str) -> usize {
    match is_plain(text.as_bytes()) {
        true => text.len(),
        false => unicode_width::UnicodeWidthStr::width(text),
    }
}

/// JSON on one line, in which hidden characters are escaped. Parsed it is the same.
///
/// # Errors
/// The value has no form in JSON.
pub fn json<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    written(value, CompactFormatter)
}

/// Like [`json()`], with one member a line.
///
/// # Errors
/// The value has no form in JSON.
pub fn json_pretty<T: Serialize + ?Sized>(value: &T) -> serde_json::Result<String> {
    written(value, PrettyFormatter::new())
}

fn written<T: Serialize + ?Sized>(value: &T, how: impl Formatter) -> serde_json::Result<String> {
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, Visible(how)))?;
    // The serializer writes UTF-8 only.
    String::from_utf8(text).map_err(serde::ser::Error::custom)
}

/// Another formatter's layout, with hidden characters in strings escaped. JSON itself asks for that
/// below U+0020 only.
struct Visible<F>(F);

/// Passes a method on to the layout.
macro_rules! layout {
    ($($name:ident($($arg:ident: $kind:ty),*);)*) => {$(
        fn $name<W: io::Write + ?Sized>(&mut self, to: &mut W $(, $arg: $kind)*) -> io::Result<()> {
            self.0.$name(to $(, $arg)*)
        }
    )*};
}

impl<F: Formatter> Formatter for Visible<F> {
    layout! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        end_object_key();
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: io::Write + ?Sized>(
        &mut self,
        to: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| is_hidden(*c)) {
            to.write_all(&rest.as_bytes()[..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(to, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        to.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Some of each kind that must not be shown as it is.
    const HIDDEN: &str = "\0\t\n\r\x07\x1b\x7f\u{80}\u{85}\u{9b}\u{9f}\u{ad}\u{61c}\u{200b}\u{200c}\
        \u{200d}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2060}\u{2066}\u{2069}\u{feff}\
        \u{e0001}\u{e007f}\u{e0100}";

    #[test]
    fn each_hidden_character_is_escaped_everywhere() {
        for c in HIDDEN.chars() {
            let raw = format!("a{c}b");
            let json = json(&raw).unwrap();
            for text in [visible(&raw), path_text(&raw), json.clone()] {
                assert!(!text.chars().any(is_hidden) && text.contains('\\'), "{text}");
            }
            assert_eq!(visible_lines(&raw) == raw, c == '\n');
            assert_eq!(serde_json::from_str::<String>(&json).unwrap(), raw);
        }
    }

    #[test]
    fn ordinary_names_stay_as_they_are() {
        for name in
            ["é", "e\u{301}", "漢字", "❤\u{fe0f}", "👍🏽", "naïve — ok", "עברית", r"C:\d", "\\"]
        {
            assert_eq!((visible(name), path_text(name)), (name.into(), name.into()));
            assert_eq!(json(name).unwrap(), serde_json::to_string(name).unwrap());
        }
    }

    #[test]
    fn an_escape_written_out_is_told_from_the_character() {
        let name = |bytes: &[u8]| path_text(OsStr::from_bytes(bytes));
        assert_eq!(name(b"\x1b"), r"\u{1b}");
        assert_eq!(name(br"\u{1b}"), r"\\u{1b}");
        assert_eq!(name(b"\\\x1b"), r"\\\u{1b}");
        assert_eq!(name(b"\xff"), r"\xff");
        assert_eq!(name(br"\xff"), r"\\xff");
        assert_eq!(name(b"\\\xff"), r"\\\xff");
        assert_eq!(name("\u{9b}".as_bytes()), r"\u{9b}");
        assert_eq!(name(b"\x9b"), r"\x9b");
    }

    #[test]
    fn both_layouts_escape_keys_too() {
        let value = serde_json::json!({"k\u{202e}": ["v\u{9b}", 1, null, {}], "t\u{e0041}": []});
        let (line, pretty) = (json(&value).unwrap(), json_pretty(&value).unwrap());
        assert_eq!(line, r#"{"k\u202e":["v\u009b",1,null,{}],"t\udb40\udc41":[]}"#);
        assert!(pretty.lines().count() > 3 && !visible_lines(&pretty).contains("\\u{"));
        for text in [line, pretty] {
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
        }
    }

    #[test]
    fn numbers_in_names_are_ordered_as_numbers() {
        let mut names =
            ["d10", "d2", "d", "d02", "e1", "d2a", "D3", "d99999999999999999999999", "10", "9"];
        names.sort_by(|a, b| natural_order(a.as_ref(), b.as_ref()));
        let want =
            ["9", "10", "D3", "d", "d02", "d2", "d2a", "d10", "d99999999999999999999999", "e1"];
        assert_eq!(names, want);
    }

    #[test]
    fn a_table_counts_columns() {
        assert_eq!((columns("é"), columns("e\u{301}"), columns("漢字")), (1, 1, 4));
    }

    /// Short names of what is near each other: backslashes, letters of escapes, hidden characters.
    fn names() -> impl Strategy<Value = Vec<u8>> {
        let parts: &[&[u8]] = &[
            b"\\", b"x", b"u", b"n", b"ff", b"{1b}", b"q", b"\x1b", b"\n", b"\xff", b"\xc2",
            b"\x9b",
        ];
        proptest::collection::vec(proptest::sample::select(parts), 0..5).prop_map(|p| p.concat())
    }

    proptest! {
        #![proptest_config(crate::failpoint::properties(256))]
        #[test]
        fn different_names_are_shown_differently(a in names(), b in names()) {
            let shown = |bytes: &[u8]| path_text(OsStr::from_bytes(bytes));
            prop_assert_eq!(a == b, shown(&a) == shown(&b));
            // A last look over a message does no harm to what is visible.
            prop_assert_eq!(visible(&shown(&a)), shown(&a));
        }

        #[test]
        fn json_stays_the_same_when_parsed(text in any::<String>()) {
            let json = json(&text).unwrap();
            prop_assert!(!json.chars().any(is_hidden));
            prop_assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
        }
    }
}
