//! `fleecefs files versions`: what became of one path, point by point.
//!
//! Of each point only what was read to find the path is looked at again, and only in the map: where none of it may
//! differ from the point before, reading it would come to the same result. The same holds for contents.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::super::paths::catalog;
use super::super::shared::JsonArgs;
use super::super::table::{Row, Table};
use super::super::verbosity;
use super::point_path::{Named, Opened, named, node, opened};
use super::row::time;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::files::{Attributes, Blocks, NodeId, NodeKind, Time, Tree};
use crate::image::{Cache, Image, Trace, Traced, open_point_sharing};
use crate::output::{self, Look};
use crate::text::{path_text, to_text};
use crate::units::{human_bytes, iso_time, parse_bytes};

/// Show the versions of a file: in which points it appears, changes and vanishes
///
/// Prints a line per version, the oldest first, with its first and last point, its size, and when it was modified.
/// CHANGE says what differs from the version before: 'content' (size or mtime), 'attributes' (owner, permissions,
/// ctime), 'replaced' (another file has the name now), 'appears' or 'vanishes'.
///
/// With --hash the contents of each version are read and hashed (BLAKE3); if only the mtime is new, this is an
/// 'attributes' change then. Contents are not read again if neither their blocks nor size, mtime or ctime have changed.
///
/// A symbolic link at the end of the path is not followed. Points that are not available are skipped.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs files versions /backups/vm1 sda:p1/etc/fstab
  fleecefs files versions --hash --json /backups/vm1 sda:vg-root/srv/data.db
  fleecefs files cp /backups/vm1 INC-1706260646-sda.qcow2:p1/etc/fstab .")]
pub(super) struct VersionsArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// A disk, with a partition and a path in it, such as sda:p1/etc/fstab
    #[arg(value_name = "DISK[:PARTITION]/PATH")]
    what: PathBuf,
    /// Read the contents of each version, and show their hash
    #[arg(long)]
    hash: bool,
    /// Memory for maps, decompressed clusters and blocks of file systems
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64M")]
    cache_size: u64,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// Bytes that are hashed at once.
const CHUNK: usize = 1 << 20;

/// Runs it.
///
/// # Errors
/// As [`super::run`]; `NotFound` if no point has the path; the first point that could not be read.
pub(super) fn run(args: &VersionsArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let named = named(&catalog, &args.what)?;
    let (cache, blocks) = (Cache::new(args.cache_size / 2), Blocks::new(args.cache_size / 2));
    let search = Search { catalog: &catalog, named, hash: args.hash, cache, blocks };
    let versions = search.versions()?;
    if !versions.iter().any(|v| v.first_error().is_some() || v.found().is_some()) {
        let what = format!(
            "no point of {} has '{}'",
            path_text(&named.disk.path),
            path_text(OsStr::from_bytes(&[named.part.unwrap_or_default(), named.path].concat()))
        );
        return Err(Error::new(Kind::NotFound, what)
            .remedy("'fleecefs files ls DIR DISK/latest' shows what there is"));
    }
    match args.print.json {
        true => {
            let line = |v| output::json_object(&JsonRow::new(&named, v));
            output::print(&versions.iter().map(line).collect::<Result<String>>()?)?;
        }
        false => output::print_lines(&table(&named, &versions).lines(verbosity::is_verbose()))?,
    }
    versions.into_iter().find_map(|v| v.into_error()).map_or(Ok(()), Err)
}

/// What a path was in a point.
enum State {
    Missing,
    Found(Box<Found>),
    Failed(Error),
}

/// A file.
#[derive(Clone, PartialEq)]
struct Found {
    node: NodeId,
    attributes: Attributes,
    target: Option<Vec<u8>>,
    hash: Option<blake3::Hash>,
}

impl Found {
    /// Whether nothing says that it was written to since `before`.
    fn is_as_before(&self, before: &Found) -> bool {
        let stamps = |f: &Found| {
            let a = &f.attributes;
            (f.node, a.kind, a.size, a.mtime, a.ctime, a.crtime, f.target.clone())
        };
        stamps(self) == stamps(before)
    }

    /// What is different from `before`; `None` if it is the same version.
    fn change(&self, before: &Found) -> Option<&'static str> {
        let (a, b) = (&before.attributes, &self.attributes);
        if (before.node, a.kind, a.crtime) != (self.node, b.kind, b.crtime) {
            return Some("replaced");
        }
        let is_content = match (before.hash, self.hash) {
            (Some(x), Some(y)) => x != y,
            _ => (a.size, a.mtime) != (b.size, b.mtime),
        };
        // When it was read is no change.
        let without = |a: &Attributes| Attributes { atime: Time::default(), allocated: 0, ..*a };
        match () {
            () if is_content || before.target != self.target => Some("content"),
            () if without(a) != without(b) => Some("attributes"),
            () => None,
        }
    }
}

/// Points in a row in which a path was the same.
struct Version {
    first: usize,
    last: usize,
    points: usize,
    change: &'static str,
    state: State,
}

impl Version {
    fn found(&self) -> Option<&Found> {
        if let State::Found(found) = &self.state { Some(found) } else { None }
    }

    fn first_error(&self) -> Option<&Error> {
        if let State::Failed(e) = &self.state { Some(e) } else { None }
    }

    fn into_error(self) -> Option<Error> {
        if let State::Failed(e) = self.state { Some(e) } else { None }
    }

    /// What a point that comes next has for a change; `None` if it is one more of these.
    fn next(&self, state: &State) -> Option<&'static str> {
        match (&self.state, state) {
            (State::Missing, State::Missing) => None,
            (State::Missing, State::Found(_)) => Some("appears"),
            (_, State::Missing) => Some("vanishes"),
            (State::Found(before), State::Found(now)) => now.change(before),
            (State::Failed(a), State::Failed(b)) if a.message() == b.message() => None,
            (_, State::Failed(_)) => Some("unreadable"),
            (State::Failed(_), State::Found(_)) => Some("readable"),
        }
    }
}

/// What was read of a point to find the path.
struct PointLook {
    image: Arc<Image>,
    /// `None` if other disks were read, too.
    path_trace: Option<Trace>,
    content_trace: Trace,
    found: Option<Found>,
}

impl PointLook {
    /// Whether looking into `image` would come to the same result.
    fn is_same(&self, image: &Image) -> bool {
        let same = |trace: &Trace| matches!(trace.may_differ(&self.image, image), Ok(false));
        self.path_trace.as_ref().is_some_and(same) && same(&self.content_trace)
    }
}

struct Search<'a> {
    catalog: &'a Catalog,
    named: Named<'a>,
    hash: bool,
    cache: Arc<Cache>,
    blocks: Arc<Blocks>,
}

impl Search<'_> {
    fn versions(&self) -> Result<Vec<Version>> {
        let disk = self.named.disk;
        let mut images = vec![None; disk.points.len()];
        let (mut versions, mut seen): (Vec<Version>, Option<PointLook>) = (Vec::new(), None);
        for point in disk.served_by_time() {
            let image = open_point_sharing(disk, point, &self.cache, &mut images)?;
            if let (Some(before), Some(version)) = (&mut seen, versions.last_mut())
                && before.is_same(&image)
            {
                before.image = image;
                (version.last, version.points) = (point, version.points + 1);
                continue;
            }
            let (state, now) = self.look(point, image, seen.as_ref());
            seen = now;
            match versions.last_mut().map(|v| (v.next(&state), v)) {
                Some((None, version)) => {
                    (version.last, version.points) = (point, version.points + 1);
                }
                Some((Some(change), _)) => versions.push(version(point, change, state)),
                None => {
                    let change = match &state {
                        State::Missing => "missing",
                        State::Found(_) => "appears",
                        State::Failed(_) => "unreadable",
                    };
                    versions.push(version(point, change, state));
                }
            }
        }
        // That it is not there yet is no version.
        if versions.first().is_some_and(|v| matches!(v.state, State::Missing)) {
            versions.remove(0);
        }
        Ok(versions)
    }

    /// What the path is in a point, and what that was read from, if that went well.
    fn look(
        &self,
        point: usize,
        image: Arc<Image>,
        before: Option<&PointLook>,
    ) -> (State, Option<PointLook>) {
        let device = Traced::new(image.clone());
        let named = Named { point, ..self.named };
        let opened = opened(self.catalog, &named, device.clone(), &self.cache, &self.blocks);
        let result = opened.and_then(|opened| {
            let found = self.find(&opened, before, &device, &image)?;
            Ok((opened.alone, found))
        });
        match result {
            Ok((alone, Some((found, path_trace, content_trace)))) => {
                let (path_trace, kept) = (alone.then_some(path_trace), Some(found.clone()));
                let seen = PointLook { image, path_trace, content_trace, found: kept };
                (State::Found(Box::new(found)), Some(seen))
            }
            Ok((alone, None)) => {
                let (path_trace, content_trace) = (alone.then(|| device.take()), Trace::default());
                (State::Missing, Some(PointLook { image, path_trace, content_trace, found: None }))
            }
            // A partition that was not there yet.
            Err(e) if e.kind() == Kind::NotFound && e.path().is_none() => (State::Missing, None),
            Err(e) => (State::Failed(e), None),
        }
    }

    /// The file, what was read on the way to it, and what its contents were read from.
    fn find(
        &self,
        opened: &Opened,
        before: Option<&PointLook>,
        device: &Traced,
        image: &Image,
    ) -> Result<Option<(Found, Trace, Trace)>> {
        let tree = opened.tree()?;
        let at = match node(opened, &*tree, false) {
            // What is missing is a name, and no file of the backup.
            Err(e) if e.kind() == Kind::NotFound && e.path().is_none() => return Ok(None),
            other => other?,
        };
        let attributes = tree.attributes(at)?;
        let is_link = attributes.kind == NodeKind::Link;
        let target = if is_link { Some(tree.read_link(at)?) } else { None };
        let mut found = Found { node: at, attributes, target, hash: None };
        let path_trace = device.take();
        if !self.hash || attributes.kind != NodeKind::File {
            return Ok(Some((found, path_trace, Trace::default())));
        }
        // Where whoever writes a file can set all its times, or its contents are beside its times, it is read again.
        let has_ctime =
            ["ext", "xfs", "btrfs"].iter().any(|k| tree.statistics().kind.starts_with(k));
        if let Some(seen) = before.filter(|s| has_ctime && !s.content_trace.is_empty())
            && let Some(old) = seen.found.as_ref().filter(|old| found.is_as_before(old))
            && old.hash.is_some()
            && matches!(seen.content_trace.may_differ(&seen.image, image), Ok(false))
        {
            found.hash = old.hash;
            return Ok(Some((found, path_trace, seen.content_trace.clone())));
        }
        found.hash = Some(hash(&*tree, at)?);
        Ok(Some((found, path_trace, device.take())))
    }
}

fn version(point: usize, change: &'static str, state: State) -> Version {
    Version { first: point, last: point, points: 1, change, state }
}

fn hash(tree: &dyn Tree, file: NodeId) -> Result<blake3::Hash> {
    let file = tree.open(file)?;
    let (mut hasher, mut at, mut buf) = (blake3::Hasher::new(), 0, vec![0; CHUNK]);
    while at < file.size() {
        let n = file.read_at(&mut buf, at)?;
        if n == 0 {
            return Err(Error::new(Kind::Truncated, "the file ends too early"));
        }
        hasher.update(buf.get(..n).unwrap_or_default());
        at += n as u64;
    }
    Ok(hasher.finalize())
}

/// A version for scripts.
#[derive(Serialize)]
struct JsonRow {
    path: String,
    change: &'static str,
    point: Option<String>,
    time: Option<String>,
    until_point: Option<String>,
    until_time: Option<String>,
    points: usize,
    kind: Option<NodeKind>,
    size: Option<u64>,
    inode: Option<u64>,
    mode: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime_utc: Option<String>,
    ctime_utc: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blake3: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl JsonRow {
    fn new(named: &Named<'_>, version: &Version) -> JsonRow {
        let (first, last) = ends(named.disk, version);
        let found = version.found();
        let attributes = found.map(|f| f.attributes);
        JsonRow {
            path: to_text(OsStr::from_bytes(named.path)),
            change: version.change,
            point: first.map(|p| p.name.clone()),
            time: first.map(|p| iso_time(p.time)),
            until_point: last.map(|p| p.name.clone()),
            until_time: last.map(|p| iso_time(p.time)),
            points: version.points,
            kind: attributes.map(|a| a.kind),
            size: attributes.map(|a| a.size),
            inode: found.map(|f| f.node.number),
            mode: attributes.map(|a| format!("{:04o}", a.mode)),
            uid: attributes.map(|a| a.uid),
            gid: attributes.map(|a| a.gid),
            mtime_utc: attributes.map(|a| time(a.mtime)),
            ctime_utc: attributes.map(|a| time(a.ctime)),
            target: found.and_then(|f| f.target.as_ref()).map(|t| to_text(OsStr::from_bytes(t))),
            blake3: found.and_then(|f| f.hash).map(|h| h.to_hex().to_string()),
            reason: version.first_error().map(Error::report),
        }
    }
}

/// The first and the last point of a version.
fn ends<'a>(disk: &'a Disk, version: &Version) -> (Option<&'a Point>, Option<&'a Point>) {
    (disk.points.get(version.first), disk.points.get(version.last))
}

/// The versions for people.
fn table(named: &Named<'_>, versions: &[Version]) -> Table {
    let row = |version: &Version| {
        let (first, last) = ends(named.disk, version);
        let found = version.found();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let cells = [
            or_dash(first.map(|p| path_text(&p.name))),
            or_dash(first.map(|p| iso_time(p.time))),
            or_dash(last.map(|p| iso_time(p.time))),
            version.points.to_string(),
            version.change.to_string(),
            or_dash(found.map(|f| human_bytes(f.attributes.size))),
            or_dash(found.map(|f| iso_time(f.attributes.mtime.seconds))),
            // Enough to see what is the same; JSON has all of it.
            or_dash(found.and_then(|f| f.hash).map(|h| h.to_hex().chars().take(16).collect())),
        ];
        let look = if version.first_error().is_some() { Look::Red } else { Look::Plain };
        let why = version.first_error().map(|e| Row::Below(e.report(), Look::Red));
        [Some(Row::Cells(cells.into(), look)), why].into_iter().flatten().collect::<Vec<_>>()
    };
    let has_hash = versions.iter().any(|v| v.found().is_some_and(|f| f.hash.is_some()));
    let titles: &'static [&'static str] =
        &["POINT", "TIME", "UNTIL", "POINTS", "CHANGE", "SIZE", "MODIFIED", "HASH"];
    let titles = if has_hash { titles } else { titles.split_last().map_or(titles, |t| t.1) };
    Table {
        titles,
        right: &["POINTS", "SIZE"],
        less: &["UNTIL", "TIME", "POINTS", "MODIFIED"],
        indent: 0,
        rows: versions.iter().flat_map(row).collect(),
    }
}
