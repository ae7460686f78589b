//! What is wrong with a configuration, and where.

use std::path::{Path, PathBuf};

use crate::text::{path_text, visible};

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The file.
    pub path: PathBuf,
    /// Its line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The column, in characters from 1.
    pub column: usize,
}

impl Place {
    /// The file as a whole.
    pub(super) fn file(path: &Path) -> Self {
        Place { path: path.to_path_buf(), line: 0, column: 0 }
    }

    /// The byte `at` of a file's text.
    pub(super) fn of(path: &Path, text: &str, at: usize) -> Self {
        let before = text.get(..at).unwrap_or(text);
        let line = before.rsplit('\n').next().unwrap_or_default();
        let lines = before.bytes().filter(|b| *b == b'\n').count();
        let (line, column) = (lines + 1, line.chars().count() + 1);
        Place { path: path.to_path_buf(), line, column }
    }
}

impl std::fmt::Display for Place {
    /// `FILE:LINE:COLUMN`, as compilers have it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&path_text(&self.path))?;
        if self.line > 0 { write!(f, ":{}:{}", self.line, self.column) } else { Ok(()) }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Where.
    pub place: Place,
    /// What, and what to do.
    pub message: String,
    /// The VM that it is about, if the others can be backed up all the same.
    pub vm: Option<String>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, visible(&self.message))
    }
}
