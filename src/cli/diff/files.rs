//! `fleecefs diff --files`.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;

use serde::Serialize;

use super::super::files::point_path::{Named, named, node, opened};
use super::super::files::row::time;
use super::super::paths::catalog;
use super::super::verbosity;
use super::args::DiffArgs;
use super::points::{open_both, point_text};
use crate::error::{Error, Kind, Result};
use crate::files::compare::{Different, Event, Observer, Side, Trees, compare};
use crate::files::{Beside, Blocks, Cached, NodeKind, Source};
use crate::image::{Cache, ChangedMap};
use crate::output;
use crate::text::{path_text, to_text};
use crate::units::human_bytes;

/// Shows them.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &DiffArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let (from, to) = (named(&catalog, &args.from)?, named(&catalog, &args.to)?);
    let (first_point, last_point) = ((from.disk, from.point), (to.disk, to.point));
    let (cache, blocks) = (Cache::new(args.cache_size / 2), Blocks::new(args.cache_size / 2));
    let (a, b) = open_both(first_point, last_point, &cache)?;
    let changed = ChangedMap::between(&a, &b)?;
    let source = |image, n: &Named<'_>| Source::new(image, &path_text(&n.disk.path), &blocks);
    let first = Cached::new(source(a, &from));
    let is_same = Box::new(move |range| !changed.has(range));
    let second = Beside::new(first.clone(), source(b, &to), is_same);
    let from_opened = opened(&catalog, &from, first, &cache, &blocks)?;
    let to_opened = opened(&catalog, &to, second, &cache, &blocks)?;
    let (x, y) = (from_opened.tree()?, to_opened.tree()?);
    let trees = Trees {
        from: (&*x, node(&from_opened, &*x, true)?),
        to: (&*y, node(&to_opened, &*y, true)?),
        content: args.content,
    };
    let mut failed = None;
    output::written(|out| {
        let out = &mut BufWriter::new(out);
        if !args.print.json && !verbosity::is_quiet() {
            writeln!(out, "{} -> {}", point_text(first_point), point_text(last_point))?;
        }
        let mut reporter = Reporter { args, out, counts: [0; 4], error: None, failed: None };
        let compared = compare(&trees, &mut reporter);
        reporter.end(compared, &mut failed)
    })?;
    failed.map_or(Ok(()), Err)
}

struct Reporter<'a, 'b> {
    args: &'a DiffArgs,
    out: &'a mut BufWriter<&'b mut std::io::Stdout>,
    /// Added, removed, modified, renamed.
    counts: [u64; 4],
    /// Why nothing more can be written.
    error: Option<std::io::Error>,
    /// What could not be read first.
    failed: Option<Error>,
}

impl Reporter<'_, '_> {
    fn end(self, compared: Result<bool>, failed: &mut Option<Error>) -> std::io::Result<()> {
        if let Some(e) = self.error {
            return Err(e);
        }
        match compared {
            Err(e) => *failed = Some(e),
            Ok(is_all) => {
                if !is_all {
                    log::warn!("too many files were renamed: some are shown as removed and added");
                }
                *failed = self.failed;
                let [added, removed, modified, renamed] = self.counts;
                if !self.args.print.json {
                    writeln!(
                        self.out,
                        "{added} added, {removed} removed, {modified} modified, {renamed} renamed"
                    )?;
                }
            }
        }
        self.out.flush()
    }

    fn write(&mut self, line: String) -> Result<()> {
        match self.out.write_all(line.as_bytes()) {
            Ok(()) => Ok(()),
            Err(e) => {
                self.error = Some(e);
                Err(Error::new(Kind::Interrupted, "the output was closed"))
            }
        }
    }
}

impl Observer for Reporter<'_, '_> {
    fn event(&mut self, event: Event<'_>) -> Result<()> {
        let row = Row::new(&event);
        let counted = ["added", "removed", "modified", "renamed"].iter().zip(&mut self.counts);
        counted.filter(|(word, _)| **word == row.change).for_each(|(_, n)| *n += 1);
        let line = match self.args.print.json {
            true => output::json_object(&row)?,
            false => {
                let mut line = String::new();
                output::push_line(&mut line, text(&event));
                line
            }
        };
        self.write(line)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        log::warn!("{}: {}", shown(path), error.report());
        self.failed.get_or_insert(error);
        Ok(())
    }
}

/// A change for scripts.
#[derive(Serialize)]
struct Row {
    change: &'static str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<Different>,
    kind: NodeKind,
    inode: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from_mtime_utc: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime_utc: Option<String>,
}

impl Row {
    fn new(event: &Event<'_>) -> Row {
        let (change, path, from_path, from, to, what) = match *event {
            Event::Added(path, side) => ("added", path, None, None, Some(side), None),
            Event::Removed(path, side) => ("removed", path, None, Some(side), None, None),
            Event::Modified(path, a, b, what) => {
                ("modified", path, None, Some(a), Some(b), Some(what))
            }
            Event::Renamed(old, path, a, b, what) => {
                ("renamed", path, Some(old), Some(a), Some(b), what)
            }
        };
        let text = |path: &[u8]| to_text(OsStr::from_bytes(path));
        let size = |side: Option<Side>| side.map(|s| s.attributes.size);
        let mtime = |side: Option<Side>| side.map(|s| time(s.attributes.mtime));
        let last = to.or(from);
        Row {
            change,
            path: text(path),
            from_path: from_path.map(text),
            what,
            kind: last.map_or(NodeKind::File, |s| s.attributes.kind),
            inode: last.map_or(0, |s| s.node.number),
            from_size: size(from),
            from_mtime_utc: mtime(from),
            size: size(to),
            mtime_utc: mtime(to),
        }
    }
}

fn shown(path: &[u8]) -> String {
    match path.is_empty() {
        true => ".".into(),
        false => path_text(OsStr::from_bytes(path)),
    }
}

/// A change for people; folders end with a slash.
fn text(event: &Event<'_>) -> String {
    let named = |path: &[u8], side: Side| match side.attributes.kind {
        NodeKind::Folder => format!("{}/", shown(path)),
        _ => shown(path),
    };
    let size = |side: Side| match side.attributes.kind {
        NodeKind::File => format!("  {}", human_bytes(side.attributes.size)),
        _ => String::new(),
    };
    let sizes = |a: Side, b: Side| match a.attributes.size == b.attributes.size {
        true => size(b),
        false => format!("{} -> {}", size(a), human_bytes(b.attributes.size)),
    };
    let note = |what: Option<Different>| match what {
        Some(Different::Content) => "  (content)",
        Some(Different::Attributes) => "  (attributes)",
        None => "",
    };
    match *event {
        Event::Added(path, side) => format!("added     {}{}", named(path, side), size(side)),
        Event::Removed(path, side) => format!("removed   {}{}", named(path, side), size(side)),
        Event::Modified(path, a, b, what) => {
            format!("modified  {}{}{}", named(path, b), sizes(a, b), note(Some(what)))
        }
        Event::Renamed(old, path, a, b, what) => {
            let (old, new) = (named(old, a), named(path, b));
            format!("renamed   {old} -> {new}{}{}", sizes(a, b), note(what))
        }
    }
}
