//! `fleecefs files ls`.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use serde_json::json;

use super::super::shared::JsonArgs;
use super::super::table::{Row as TableRow, Table};
use super::super::verbosity;
use super::point_path::{From, Opened, node};
use super::row::{Row, long};
use crate::error::{Error, Kind, Result};
use crate::files::{At, NodeId, NodeKind, Tree, Visitor, open_tree, walk};
use crate::output::{self, Look};
use crate::text::path_text;
use crate::units::human_bytes;

/// List a folder, or the partitions and volumes of a point
///
/// Partitions and volumes are listed if POINT has several and names none of them. --json prints one object per line.
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    pub from: From,
    /// Show kind, permissions, number of links, owner, group, size and time (UTC)
    #[arg(short, long)]
    long: bool,
    /// Also list everything below, with paths
    #[arg(short = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// Names that are sorted; a folder of more is listed as it is.
const SORTED: usize = 100_000;

/// Runs it.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &LsArgs) -> Result<()> {
    let opened = args.from.open()?;
    if opened.is_whole_disk() {
        return volumes(args, &opened);
    }
    let tree = opened.tree()?;
    let start = node(&opened, &*tree, true)?;
    let mut failed = None;
    output::written(|out| {
        let out = &mut BufWriter::new(out);
        let mut listing = Listing { args, tree: &*tree, start, out, error: None, failed: None };
        let walked = listing.all();
        failed = walked.err().or(listing.failed);
        listing.error.map_or(Ok(()), Err).and_then(|()| listing.out.flush())
    })?;
    failed.map_or(Ok(()), Err)
}

struct Listing<'a, 'b> {
    args: &'a LsArgs,
    tree: &'a dyn Tree,
    start: NodeId,
    out: &'a mut BufWriter<&'b mut std::io::Stdout>,
    /// Why nothing more can be written.
    error: Option<std::io::Error>,
    /// What could not be read.
    failed: Option<Error>,
}

impl Listing<'_, '_> {
    fn all(&mut self) -> Result<()> {
        let (tree, start) = (self.tree, self.start);
        let attributes = tree.attributes(start)?;
        if attributes.kind != NodeKind::Folder {
            let path = self.args.from.what.as_os_str().as_bytes();
            let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
            let at = At { path: name, name, node: start, attributes: &attributes };
            return self.line(&at);
        }
        match self.args.recursive {
            true => walk(tree, start, self),
            false => self.folder(),
        }
    }

    fn folder(&mut self) -> Result<()> {
        let (mut names, mut rest) = (Vec::new(), 0);
        let read = self.tree.read_folder(self.start, 0, &mut |entry| {
            rest = entry.next;
            names.push((entry.name, entry.node));
            names.len() < SORTED
        });
        names.sort();
        self.names(&names)?;
        while names.len() >= SORTED && self.error.is_none() {
            names.clear();
            self.tree.read_folder(self.start, rest, &mut |entry| {
                rest = entry.next;
                names.push((entry.name, entry.node));
                names.len() < SORTED
            })?;
            self.names(&names)?;
        }
        read
    }

    fn names(&mut self, names: &[(Vec<u8>, NodeId)]) -> Result<()> {
        let plain = !self.args.long && !self.args.print.json;
        for (name, node) in names {
            if plain {
                self.text(path_text(OsStr::from_bytes(name)));
                continue;
            }
            match self.tree.attributes(*node) {
                Ok(attributes) => {
                    self.line(&At { path: name, name, node: *node, attributes: &attributes })?;
                }
                Err(e) => self.failed(name, e)?,
            }
        }
        Ok(())
    }

    fn line(&mut self, at: &At<'_>) -> Result<()> {
        let text = match (self.args.print.json, self.args.long) {
            (true, _) => {
                let row = Row::new(self.tree, at.path, at.node, at.attributes);
                output::json_object(&row)?.trim_end().to_string()
            }
            (false, true) => long(self.tree, at.path, at.node, at.attributes)?,
            (false, false) => path_text(OsStr::from_bytes(at.path)),
        };
        self.text(text);
        Ok(())
    }

    fn text(&mut self, text: String) {
        if self.error.is_none() {
            let mut line = String::new();
            output::push_line(&mut line, text);
            self.error = self.out.write_all(line.as_bytes()).err();
        }
    }

    /// Nobody reads any more: not an error, but an end.
    fn go_on(&self) -> Result<()> {
        match self.error {
            Some(_) => Err(Error::new(Kind::Interrupted, "the output was closed")),
            None => Ok(()),
        }
    }
}

impl Visitor for Listing<'_, '_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        if !at.path.is_empty() {
            self.line(at)?;
        }
        self.go_on().map(|()| true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.line(at)?;
        self.go_on()
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        log::warn!("{}: {}", path_text(OsStr::from_bytes(path)), error.report());
        self.failed.get_or_insert(error);
        Ok(())
    }
}

/// Lists the partitions and volumes.
fn volumes(args: &LsArgs, opened: &Opened) -> Result<()> {
    let (mut rows, mut lines) = (Vec::new(), String::new());
    for volume in &opened.volumes {
        let tree = if volume.content.has_files() { open_tree(volume).ok() } else { None };
        let known = tree.map(|t| t.statistics());
        let kind = known.as_ref().map_or(volume.content.name(), |s| &s.kind).to_string();
        let label = known.as_ref().map(|s| s.label.clone()).unwrap_or_default();
        let (name, size) = (&volume.name, volume.source.size());
        if args.print.json {
            let line = json!({ "name": name, "size": size, "content": kind, "file_system": known });
            lines.push_str(&output::json_object(&line)?);
            continue;
        }
        let cells = [path_text(name), human_bytes(size), kind, path_text(&label)];
        rows.push(TableRow::Cells(cells.into(), Look::Plain));
    }
    if args.print.json {
        return output::print(&lines);
    }
    let titles = &["NAME", "SIZE", "CONTENT", "LABEL"];
    let table = Table { titles, right: &["SIZE"], less: &[], indent: 0, rows };
    output::print_lines(&table.lines(verbosity::is_verbose()))
}
