//! Into an archive: a walk, whose findings one of the formats writes down.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::super::blocks::{Blocks, Holding};
use super::super::tree::{NodeId, NodeKind, Tree};
use super::super::walk::{At, Visitor, walk};
use super::container::{Container, Entry};
use super::report::{Options, Report};
use super::to_tar::ToTar;
use super::to_zip::ToZip;
use crate::error::{Error, Result};
use crate::text::path_text;

/// First entries that are counted against the cache at once, and what one takes, roughly.
const STEP: usize = 1024;
const ENTRY_BYTES: u64 = 256;

/// What kind of archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// With all that copies keep.
    Tar,
    /// Without hard links (each name has the contents), holes, attributes and pipes.
    Zip,
}

/// Writes `start` and all below it as an archive; `name` is what the archive calls it (empty: `.`).
///
/// # Errors
/// Writing failed, or a file's contents turned out unreadable after its header was written. What cannot be read, or
/// has no place in such an archive, is counted in the report.
pub fn archive(
    tree: &dyn Tree,
    start: NodeId,
    name: &[u8],
    out: &mut (dyn Write + '_),
    blocks: &Arc<Blocks>,
    options: &Options<'_>,
    format: Format,
) -> Result<Report> {
    let name = if name.is_empty() { b"." } else { name };
    let mut to: Box<dyn Container + '_> = match format {
        Format::Tar => Box::new(ToTar::new(out)),
        Format::Zip => Box::new(ToZip::new(out, blocks.clone())),
    };
    let (report, first, held) = (Report::default(), HashMap::new(), Vec::new());
    let mut writing = Writing { tree, options, report, name, to: &mut *to, first, blocks, held };
    walk(tree, start, &mut writing)?;
    let report = writing.report;
    to.finish()?;
    Ok(report)
}

struct Writing<'a> {
    tree: &'a dyn Tree,
    options: &'a Options<'a>,
    report: Report,
    name: &'a [u8],
    to: &'a mut dyn Container,
    /// The entries of files that have several names.
    first: HashMap<NodeId, Vec<u8>>,
    blocks: &'a Arc<Blocks>,
    held: Vec<Holding>,
}

impl Writing<'_> {
    fn path(&self, at: &At<'_>) -> Vec<u8> {
        match at.path.is_empty() {
            true => self.name.to_vec(),
            false => [self.name, at.path].join(&b'/'),
        }
    }

    fn entry<'b>(&self, at: &At<'b>, path: &'b [u8]) -> Result<Entry<'b>> {
        let mut xattrs = self.tree.xattrs(at.node)?;
        xattrs.retain(|x| self.options.wants(x));
        let mode = self.options.mode(at.attributes);
        Ok(Entry { path, attributes: at.attributes, mode, xattrs })
    }

    fn add(&mut self, at: &At<'_>) -> Result<()> {
        self.options.check()?;
        let kind = at.attributes.kind;
        if !self.options.wants_kind(kind) {
            self.report.devices_left_out += 1;
            return Ok(());
        }
        let path = self.path(at);
        if let Some(first) = self.first.get(&at.node) {
            let entry = Entry { xattrs: Vec::new(), ..self.entry(at, &path)? };
            if self.to.further_name(&entry, first)? {
                self.report.others += 1;
                return Ok(());
            }
        }
        self.report.count_mode(self.options.all && self.to.has_setuid(), at.attributes);
        match kind {
            NodeKind::File => {
                let file = self.tree.open(at.node)?;
                let entry = self.entry(at, &path)?;
                self.report.bytes += self.to.file(&entry, &*file, self.options)?;
                self.report.files += 1;
            }
            NodeKind::Link => {
                let text = self.tree.read_link(at.node)?;
                let entry = self.entry(at, &path)?;
                self.to.link(&entry, &text)?;
            }
            // No archive has sockets.
            NodeKind::Socket => return Ok(()),
            _ => {
                let entry = self.entry(at, &path)?;
                self.to.special(&entry)?;
            }
        }
        self.report.others += u64::from(kind != NodeKind::File);
        self.remember(at, path);
        Ok(())
    }

    fn remember(&mut self, at: &At<'_>, path: Vec<u8>) {
        if at.attributes.links < 2 || self.first.contains_key(&at.node) {
            return;
        }
        if self.first.len() >= self.held.len() * STEP {
            let Ok(held) = self.blocks.hold(STEP as u64 * ENTRY_BYTES) else { return };
            self.held.push(held);
        }
        self.first.insert(at.node, path);
    }

    /// Counts what is missing; whether it is there.
    fn counted(&mut self, path: &[u8], result: Result<()>) -> Result<bool> {
        match result {
            // What was read can be passed over; a pipe that is gone, and half an entry, cannot.
            Err(e) if e.kind().is_lasting() && e.os_code().is_none() => {
                self.report.fail(&path_text(OsStr::from_bytes(path)), &e);
                Ok(false)
            }
            other => other.map(|()| true),
        }
    }
}

impl Visitor for Writing<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.options.check()?;
        let path = self.path(at);
        self.report.folders += 1;
        let begun = match self.entry(at, &path) {
            Ok(entry) => self.to.folder(&entry),
            // What is in it can be had all the same.
            Err(e) => return self.counted(at.path, Err(e)).map(|_| true),
        };
        self.counted(at.path, begun)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        let added = self.add(at);
        self.counted(at.path, added).map(|_| ())
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        self.report.fail(&path_text(OsStr::from_bytes(path)), &error);
        Ok(())
    }
}
