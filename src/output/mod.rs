//! The one way to the terminal: whatever the program prints as text goes through here, and is made
//! visible once more, so that no name can be forgotten. `clippy.toml` forbids the macros elsewhere. What is
//! logged goes through `logging`, what systemd is told through `systemd`.

mod contents;
pub(crate) mod logging;
pub(crate) mod system_log;
pub(crate) mod systemd;
pub(crate) mod wrap;

use std::io::{IsTerminal, Stdout, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::text::{self, visible, visible_lines};

/// Whether anything was written to standard output.
static WRITTEN: AtomicBool = AtomicBool::new(false);

/// The version of the JSON that is printed: `contrib/doc/json.md`.
pub(crate) const JSON_VERSION: u32 = 1;

/// How a line looks on a terminal that has colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// As it is.
    Plain,
    /// A heading.
    Bold,
    /// Something is wrong.
    Red,
    /// Something is odd.
    Yellow,
}

/// A line and how it looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub look: Look,
    pub text: String,
    /// Whether it is a sentence, which a terminal that is too narrow gets in several lines: a row of a table is none.
    is_sentence: bool,
}

impl Line {
    /// One line; a line break inside becomes visible.
    pub(crate) fn new(look: Look, text: impl std::fmt::Display) -> Self {
        Line { look, text: visible(&text.to_string()), is_sentence: false }
    }

    /// A sentence, such as a finding.
    pub(crate) fn sentence(look: Look, text: impl std::fmt::Display) -> Self {
        Line { is_sentence: true, ..Line::new(look, text) }
    }
}

/// Writes lines to standard output; on a terminal in colours unless NO_COLOR is set, and sentences not wider than it.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_lines(lines: &[Line]) -> Result<()> {
    let is_set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|t| t == "dumb");
    let colours = std::io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb;
    print_as_is(laid_out(lines, colours, wrap::width_of(std::io::stdout())).as_bytes())
}

fn laid_out(lines: &[Line], colours: bool, width: Option<usize>) -> String {
    let mut text = String::new();
    for line in lines {
        let code = match line.look {
            Look::Bold => "1",
            Look::Red => "31",
            Look::Yellow => "33",
            Look::Plain => "",
        };
        let parts = match width {
            Some(width) if line.is_sentence => wrap::wrapped(&line.text, width),
            _ => vec![line.text.clone()],
        };
        for part in parts {
            match colours && !code.is_empty() {
                true => text.push_str(&format!("\x1b[{code}m{part}\x1b[0m\n")),
                false => text.push_str(&format!("{part}\n")),
            }
        }
    }
    text
}

/// Whether anything was written to standard output until now.
pub(crate) fn has_written() -> bool {
    WRITTEN.load(Ordering::Relaxed)
}

/// Writes lines of text to standard output. A reader that went away (`| head`) is not an error.
///
/// # Errors
/// `Io` or `NoSpace` if writing failed for any other reason.
pub(crate) fn print(text: &str) -> Result<()> {
    print_as_is(visible_lines(text).as_bytes())
}

/// As [`print`], of sentences: none is wider than the terminal.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_sentences(text: &str) -> Result<()> {
    let width = wrap::width_of(std::io::stdout());
    print_as_is(wrap::wrapped_lines(&visible_lines(text), width).as_bytes())
}

/// Like [`print`], for what the program made from its own words alone.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_as_is(bytes: &[u8]) -> Result<()> {
    written(|out| out.write_all(bytes))
}

/// Lets `write` write to standard output. A reader that went away is not an error.
///
/// # Errors
/// As [`print`].
pub(crate) fn written(write: impl FnOnce(&mut Stdout) -> std::io::Result<()>) -> Result<()> {
    WRITTEN.store(true, Ordering::Relaxed);
    let mut out = std::io::stdout();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|e| Error::io(e, "cannot write to standard output")),
    }
}

/// As [`written`], of what others wrote, such as the contents of a file: as it is, but visible on a terminal.
///
/// # Errors
/// As [`print`].
pub(crate) fn written_by_others(
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    written(|out| match out.is_terminal() {
        true => {
            let mut visible = contents::Visible::new(out);
            write(&mut visible).and_then(|()| visible.end())
        }
        false => write(out),
    })
}

/// Adds a line to a text that is to be printed; a line break inside becomes visible.
pub(crate) fn push_line(text: &mut String, line: impl std::fmt::Display) {
    text.push_str(&visible(&line.to_string()));
    text.push('\n');
}

/// Writes sentences to standard error, none wider than a terminal. If nobody reads it there is nobody to tell.
pub(crate) fn tell(text: &str) {
    let _ = std::io::stderr().lock().write_all(for_stderr(text).as_bytes());
}

/// As [`tell`], of JSON: no line of it is broken.
pub(crate) fn tell_as_is(text: &str) {
    let _ = std::io::stderr().lock().write_all(visible_lines(text).as_bytes());
}

/// Sentences as [`tell`] writes them.
pub(crate) fn for_stderr(text: &str) -> String {
    wrap::wrapped_lines(&visible_lines(text), wrap::width_of(std::io::stderr()))
}

/// The last words of a program that failed.
pub(crate) fn tell_error(error: &Error) {
    tell(&format!("fleecefs: {}\n", error.report()));
}

/// An object, and the version of its form before all else.
#[derive(Serialize)]
struct Versioned<'a, T: Serialize + ?Sized> {
    format_version: u32,
    #[serde(flatten)]
    value: &'a T,
}

/// An object as a JSON document that can be printed, over several lines; ended by a line break.
///
/// # Errors
/// `Io` if it has no form in JSON.
pub(crate) fn json_document<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    let value = Versioned { format_version: JSON_VERSION, value };
    text::json_pretty(&value).map(|t| t + "\n").map_err(failed)
}

/// Like [`json_document`] on one line, for commands that print an object per disk.
///
/// # Errors
/// As [`json_document`].
pub(crate) fn json_object<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    json_line(&Versioned { format_version: JSON_VERSION, value })
}

/// A value as JSON on one line, with its line break.
///
/// # Errors
/// As [`json_document`].
pub(crate) fn json_line<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    text::json(value).map(|t| t + "\n").map_err(failed)
}

fn failed(e: serde_json::Error) -> Error {
    Error::new(Kind::Io, "cannot write JSON").with_source(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_codes_around_lines_and_never_in_them() {
        let lines = [Line::new(Look::Red, "a\x1b[0mb"), Line::new(Look::Plain, "c")];
        assert_eq!(laid_out(&lines, false, None), "a\\u{1b}[0mb\nc\n");
        assert_eq!(laid_out(&lines, true, None), "\x1b[31ma\\u{1b}[0mb\x1b[0m\nc\n");
    }

    #[test]
    fn sentences_are_broken_for_a_terminal_and_rows_are_not() {
        let lines = [Line::sentence(Look::Red, "a b c"), Line::new(Look::Plain, "d e f")];
        assert_eq!(laid_out(&lines, false, None), "a b c\nd e f\n");
        // Each line has its own colour: a pager shows them one by one.
        let broken = "\x1b[31ma b\x1b[0m\n\x1b[31m  c\x1b[0m\nd e f\n";
        assert_eq!(laid_out(&lines, true, Some(3)), broken);
    }

    #[test]
    fn a_document_begins_with_its_version() {
        let text = json_object(&serde_json::json!({"a": 1})).unwrap();
        assert_eq!(text, "{\"format_version\":1,\"a\":1}\n");
    }
}
