//! `fleecefs files find --all-points`: each version of each file over all points of a disk.
//!
//! A point in which nothing that was read of the point before may differ is not read: it has the same files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use serde::Serialize;

use super::super::paths::catalog;
use super::filter::Filter;
use super::point_path::{From, Named, named, node, opened};
use super::row::time;
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Kind, Result};
use crate::files::{At, Blocks, NodeId, NodeKind, Time, Visitor, walk};
use crate::image::{Cache, Image, Trace, Traced, open_point_sharing};
use crate::output;
use crate::text::{path_text, to_text};
use crate::units::{counted, human_bytes, iso_time};

/// Versions that are kept: some 400 MiB with their paths.
const MAX_VERSIONS: usize = 1 << 21;

/// What makes a version: path, inode, size and mtime.
type Version = (Vec<u8>, NodeId, u64, Time);

/// The points that have it.
struct VersionSpan {
    kind: NodeKind,
    /// The first and the last, by their place in the order of time.
    first: usize,
    last: usize,
    points: usize,
}

/// Runs it.
///
/// # Errors
/// As [`super::run`]; `Unsupported` if there are too many versions.
pub(super) fn run(from: &From, filter: &Filter, json: bool) -> Result<()> {
    let catalog = catalog(&from.dir)?;
    let named = named(&catalog, &from.what)?;
    let (cache, blocks) = (Cache::new(from.cache_size / 2), Blocks::new(from.cache_size / 2));
    let order = named.disk.served_by_time();
    let mut search = Search {
        catalog: &catalog,
        named,
        filter,
        cache,
        blocks,
        versions: BTreeMap::new(),
        failed: None,
    };
    search.points(&order)?;
    let (disk, failed) = (named.disk, search.failed.take());
    output::written(|out| {
        let mut out = BufWriter::new(out);
        for (version, span) in &search.versions {
            out.write_all(line(disk, &order, version, span, json)?.as_bytes())?;
        }
        out.flush()
    })?;
    failed.map_or(Ok(()), Err)
}

struct Search<'a> {
    catalog: &'a Catalog,
    named: Named<'a>,
    filter: &'a Filter,
    cache: Arc<Cache>,
    blocks: Arc<Blocks>,
    versions: BTreeMap<Version, VersionSpan>,
    /// What could not be read first.
    failed: Option<Error>,
}

impl Search<'_> {
    fn points(&mut self, order: &[usize]) -> Result<()> {
        let disk = self.named.disk;
        let mut images = vec![None; disk.points.len()];
        let mut before: Option<(Arc<Image>, Trace)> = None;
        for (at, point) in order.iter().enumerate() {
            let image = open_point_sharing(disk, *point, &self.cache, &mut images)?;
            let same = before
                .as_ref()
                .is_some_and(|(old, trace)| matches!(trace.may_differ(old, &image), Ok(false)));
            before = match before {
                Some((_, trace)) if same => {
                    self.go_on(at);
                    Some((image, trace))
                }
                _ => self.point(at, *point, image)?,
            };
        }
        Ok(())
    }

    /// The point at this place has what the one before has.
    fn go_on(&mut self, at: usize) {
        for span in self.versions.values_mut().filter(|h| h.last + 1 == at) {
            (span.last, span.points) = (at, span.points + 1);
        }
    }

    /// Reads a point; gives what it was read from, if all of it could be read.
    fn point(
        &mut self,
        at: usize,
        point: usize,
        image: Arc<Image>,
    ) -> Result<Option<(Arc<Image>, Trace)>> {
        let device = Traced::new(image.clone());
        let named = Named { point, ..self.named };
        let found = opened(self.catalog, &named, device.clone(), &self.cache, &self.blocks)
            .and_then(|opened| {
                let tree = opened.tree()?;
                let start = match node(&opened, &*tree, true) {
                    Err(e) if e.kind() == Kind::NotFound && e.path().is_none() => None,
                    other => Some(other?),
                };
                Ok((opened.alone, tree, start))
            });
        let (alone, tree, start) = match found {
            Ok(found) => found,
            // A partition that was not there yet.
            Err(e) if e.kind() == Kind::NotFound && e.path().is_none() => return Ok(None),
            Err(e) => return self.unread(e).map(|()| None),
        };
        let before = self.failed.is_some();
        let mut noting = Noting { search: self, at, whole: true };
        if let Some(start) = start {
            walk(&*tree, start, &mut noting)?;
        }
        let whole = noting.whole && !before;
        Ok((alone && whole).then(|| (image, device.take())))
    }

    fn unread(&mut self, error: Error) -> Result<()> {
        log::warn!("{}", error.report());
        self.failed.get_or_insert(error);
        Ok(())
    }
}

/// Notes what a walk through a point comes by.
struct Noting<'a, 'b> {
    search: &'a mut Search<'b>,
    at: usize,
    whole: bool,
}

impl Noting<'_, '_> {
    fn look(&mut self, at: &At<'_>) -> Result<()> {
        if at.path.is_empty() || !self.search.filter.is_wanted(at) {
            return Ok(());
        }
        let a = at.attributes;
        let version = (at.path.to_vec(), at.node, a.size, a.mtime);
        let here = self.at;
        let new = || VersionSpan { kind: a.kind, first: here, last: here, points: 0 };
        let span = self.search.versions.entry(version).or_insert_with(new);
        (span.last, span.points) = (here, span.points + 1);
        if self.search.versions.len() > MAX_VERSIONS {
            let what = format!("more than {}", counted(MAX_VERSIONS as u64, "version"));
            let error = Error::new(Kind::Unsupported, what);
            return Err(error.remedy("name a folder further down, or what files are like (--name)"));
        }
        Ok(())
    }
}

impl Visitor for Noting<'_, '_> {
    // Folders, too: they change with what is in them.
    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.look(at)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        log::warn!("{}: {}", path_text(OsStr::from_bytes(path)), error.report());
        self.whole = false;
        self.search.failed.get_or_insert(error);
        Ok(())
    }
}

/// A version for scripts.
#[derive(Serialize)]
struct Row {
    path: String,
    kind: NodeKind,
    inode: u64,
    size: u64,
    mtime_utc: String,
    point: String,
    time: String,
    until_point: String,
    until_time: String,
    points: usize,
}

fn line(
    disk: &Disk,
    order: &[usize],
    (path, node, size, mtime): &Version,
    span: &VersionSpan,
    json: bool,
) -> std::io::Result<String> {
    let point = |at: usize| order.get(at).and_then(|i| disk.points.get(*i));
    let name = |at: usize| point(at).map(|p| p.name.clone()).unwrap_or_default();
    let when = |at: usize| point(at).map(|p| iso_time(p.time)).unwrap_or_default();
    if json {
        let row = Row {
            path: to_text(OsStr::from_bytes(path)),
            kind: span.kind,
            inode: node.number,
            size: *size,
            mtime_utc: time(*mtime),
            point: name(span.first),
            time: when(span.first),
            until_point: name(span.last),
            until_time: when(span.last),
            points: span.points,
        };
        return output::json_object(&row).map_err(std::io::Error::other);
    }
    let mut line = String::new();
    output::push_line(
        &mut line,
        format!(
            "{}  {}  {}  {} .. {} ({})",
            path_text(OsStr::from_bytes(path)),
            human_bytes(*size),
            iso_time(mtime.seconds),
            when(span.first),
            when(span.last),
            counted(span.points as u64, "point")
        ),
    );
    Ok(line)
}
