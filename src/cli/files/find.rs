//! `fleecefs files find`.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;

use clap::{Args, ValueEnum};

use super::super::shared::JsonArgs;
use super::place::{From, node};
use super::row::Row;
use crate::error::{Error, Kind, Result};
use crate::files::{At, NodeKind, Tree, Visitor, walk};
use crate::output;
use crate::text::path_text;
use crate::units::{parse_bytes, parse_when};

/// Find files below a folder: by name, kind, size and time; all of them without options
///
/// Prints paths from that folder on; with --json one object a line.
#[derive(Debug, Args)]
pub(super) struct FindArgs {
    #[command(flatten)]
    pub from: From,
    /// The last part of the path is this; '*' stands for anything, '?' for one byte
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,
    /// Only these
    #[arg(long = "type", value_enum, value_name = "KIND")]
    kind: Option<KindArg>,
    /// At least this large (K, M, G are understood)
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    larger: Option<u64>,
    /// Changed since then: 2026-11-22, 7d, @SECONDS
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
    #[command(flatten)]
    pub print: JsonArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArg {
    /// Plain files
    File,
    /// Folders
    Folder,
    /// Symbolic links
    Link,
    /// Pipes, sockets and devices
    Other,
}

impl KindArg {
    fn of(kind: NodeKind) -> KindArg {
        match kind {
            NodeKind::File => KindArg::File,
            NodeKind::Folder => KindArg::Folder,
            NodeKind::Link => KindArg::Link,
            NodeKind::CharDevice | NodeKind::BlockDevice => KindArg::Other,
            NodeKind::Pipe | NodeKind::Socket => KindArg::Other,
        }
    }
}

/// Runs it.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &FindArgs) -> Result<()> {
    let opened = args.from.open()?;
    let tree = opened.tree()?;
    let start = node(&opened, &*tree, true)?;
    let mut failed = None;
    output::written(|out| {
        let out = &mut BufWriter::new(out);
        let mut finding = Finding { args, tree: &*tree, out, error: None, failed: None };
        let walked = walk(&*tree, start, &mut finding);
        failed = walked.err().filter(|_| finding.error.is_none()).or(finding.failed);
        finding.error.map_or(Ok(()), Err).and_then(|()| finding.out.flush())
    })?;
    failed.map_or(Ok(()), Err)
}

struct Finding<'a, 'b> {
    args: &'a FindArgs,
    tree: &'a dyn Tree,
    out: &'a mut BufWriter<&'b mut std::io::Stdout>,
    error: Option<std::io::Error>,
    failed: Option<Error>,
}

impl Finding<'_, '_> {
    fn is_wanted(&self, at: &At<'_>) -> bool {
        let a = at.attributes;
        self.args.name.as_ref().is_none_or(|p| matches(p.as_bytes(), at.name))
            && self.args.kind.is_none_or(|k| k == KindArg::of(a.kind))
            && self.args.larger.is_none_or(|n| a.size >= n)
            && self.args.since.is_none_or(|t| a.mtime.seconds >= t)
    }

    fn look(&mut self, at: &At<'_>) -> Result<()> {
        if at.path.is_empty() || !self.is_wanted(at) {
            return Ok(());
        }
        let mut line = String::new();
        match self.args.print.json {
            true => {
                line = output::json_object(&Row::new(self.tree, at.path, at.node, at.attributes))?
            }
            false => output::push_line(&mut line, path_text(OsStr::from_bytes(at.path))),
        }
        match self.out.write_all(line.as_bytes()) {
            Ok(()) => Ok(()),
            Err(e) => {
                self.error = Some(e);
                Err(Error::new(Kind::Interrupted, "the output was closed"))
            }
        }
    }
}

impl Visitor for Finding<'_, '_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.look(at).map(|()| true)
    }

    fn leave(&mut self, _: &At<'_>) -> Result<()> {
        Ok(())
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.look(at)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        log::warn!("{}: {}", path_text(OsStr::from_bytes(path)), error.report());
        self.failed.get_or_insert(error);
        Ok(())
    }
}

/// Whether a name fits a pattern with `*` and `?`; in time that grows with the product of their lengths at most.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || name.get(n) == Some(c) => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name) in
            [("*.odt", "a.odt"), ("a?c*", "abc"), ("**", ""), ("a*b*c", "axbxbc")]
        {
            assert!(matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
        for (pattern, name) in [("*.odt", "a.od"), ("?", ""), ("a*b", "abc"), ("", "a")] {
            assert!(!matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }
}
