//! The one way to the terminal: whatever the program prints as text goes through here, and is made
//! visible once more, so that no name can be forgotten. `clippy.toml` forbids the macros elsewhere. What is
//! logged goes through `logging`.

pub(crate) mod logging;

use std::io::{Stdout, Write};

use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::text::{self, visible, visible_lines};

/// Writes lines of text to standard output. A reader that went away (`| head`) is not an error.
///
/// # Errors
/// `Io` or `NoSpace` if writing failed for any other reason.
pub(crate) fn print(text: &str) -> Result<()> {
    print_as_is(visible_lines(text).as_bytes())
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
    let mut out = std::io::stdout();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|e| Error::io(e, "cannot write to standard output")),
    }
}

/// Adds a line to a text that is to be printed; a line break inside becomes visible.
pub(crate) fn push_line(text: &mut String, line: impl std::fmt::Display) {
    text.push_str(&visible(&line.to_string()));
    text.push('\n');
}

/// Writes lines of text to standard error. If nobody reads it there is nobody to tell.
pub(crate) fn tell(text: &str) {
    let _ = std::io::stderr().lock().write_all(visible_lines(text).as_bytes());
}

/// The last words of a program that failed.
pub(crate) fn tell_error(error: &Error) {
    tell(&format!("fleecefs: {}\n", error.report()));
}

/// A value as JSON that can be printed, over several lines; ended by a line break.
///
/// # Errors
/// `Io` if it has no form in JSON.
pub(crate) fn json_pretty<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    text::json_pretty(value).map(|t| t + "\n").map_err(failed)
}

/// A value as JSON on one line, with its line break.
///
/// # Errors
/// As [`json_pretty`].
pub(crate) fn json_line<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    text::json(value).map(|t| t + "\n").map_err(failed)
}

fn failed(e: serde_json::Error) -> Error {
    Error::new(Kind::Io, "cannot write JSON").with_source(e)
}
