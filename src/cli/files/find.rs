//! `fleecefs files find`.

use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;

use clap::Args;

use super::super::shared::JsonArgs;
use super::all_points;
use super::filter::Filter;
use super::point_path::{From, node};
use super::row::Row;
use crate::error::{Error, Kind, Result};
use crate::files::{At, Tree, Visitor, walk};
use crate::output;
use crate::text::path_text;

/// Find files below a folder by name, kind, size and time; without options, all files
///
/// Prints paths relative to that folder; --json prints one object per line.
///
/// With --all-points it finds whatever was in the folder in any point of the disk, sorted by path; the disk alone may
/// be named then (sda:p1/etc). Points in which nothing of the folder has changed are not read, so this is quick.
#[derive(Debug, Args)]
pub(super) struct FindArgs {
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    filter: Filter,
    /// Search all points of the disk; each version of a file (inode, size, mtime) is shown once, with its first and
    /// last point
    #[arg(long)]
    all_points: bool,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// Runs it.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &FindArgs) -> Result<()> {
    if args.all_points {
        return all_points::run(&args.from, &args.filter, args.print.json);
    }
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
    fn look(&mut self, at: &At<'_>) -> Result<()> {
        if at.path.is_empty() || !self.args.filter.is_wanted(at) {
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
    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.look(at)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        log::warn!("{}: {}", path_text(OsStr::from_bytes(path)), error.report());
        self.failed.get_or_insert(error);
        Ok(())
    }
}
