//! How a user names a file in a point, and its file system opened.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::super::paths::catalog;
use crate::chain::{Catalog, Disk, beside};
use crate::error::{Error, Kind, Result};
use crate::files::{self, Blocks, Source, Tree, Volume, open_tree, volumes_of};
use crate::image::{Cache, open_point};
use crate::storage::ReadAt;
use crate::text::{path_text, to_text};
use crate::units::parse_bytes;

/// Where to read.
#[derive(Debug, Args)]
pub(in crate::cli) struct From {
    /// The backup directory
    pub dir: PathBuf,
    /// A point, named as for 'map' and 'restore', with partition and path, such as sda/latest:p1/etc/fstab
    #[arg(value_name = "POINT[:PARTITION][/PATH]")]
    pub what: PathBuf,
    /// Memory for maps, decompressed clusters and blocks of file systems
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64M")]
    pub cache_size: u64,
}

/// Point, partition and path of what a user named.
#[derive(Clone, Copy)]
pub(in crate::cli) struct Named<'a> {
    pub disk: &'a Disk,
    pub point: usize,
    pub part: Option<&'a [u8]>,
    pub path: &'a [u8],
    /// Whether the point was named by its disk alone: then it is the newest.
    pub by_disk: bool,
}

/// The point of a name, opened.
pub(in crate::cli) struct Opened {
    /// All partitions and volumes of the point.
    pub volumes: Vec<Volume>,
    /// The one that was named, or the only one that has files.
    pub chosen: Option<usize>,
    /// The path in it, from the root.
    pub path: Vec<u8>,
    /// Whether a partition was named.
    has_part: bool,
    /// The cache for readers.
    pub blocks: Arc<Blocks>,
    /// Whether no other disk was asked for a part of it.
    pub alone: bool,
    /// Where the path may be a mistyped point: a question that names those that are alike.
    near: String,
}

impl From {
    /// Opens what the user named.
    ///
    /// # Errors
    /// Nothing has that name; the point cannot be read.
    pub(in crate::cli) fn open(&self) -> Result<Opened> {
        let catalog = catalog(&self.dir)?;
        let named = named(&catalog, &self.what)?;
        // Windows of the point, and blocks of its file systems.
        let cache = Cache::new(self.cache_size / 2);
        let blocks = Blocks::new(self.cache_size / 2);
        let device = open_point(named.disk, named.point, &cache)?;
        opened(&catalog, &named, device, &cache, &blocks)
    }
}

/// The partitions and volumes of a point that is read by way of `device`.
///
/// # Errors
/// It cannot be read; it has no such partition.
pub(in crate::cli) fn opened(
    catalog: &Catalog,
    named: &Named<'_>,
    device: Arc<dyn ReadAt>,
    cache: &Arc<Cache>,
    blocks: &Arc<Blocks>,
) -> Result<Opened> {
    let source = |disk: &Disk, device| Source::new(device, &path_text(&disk.path), blocks);
    let own = source(named.disk, device);
    let mut alone = true;
    let others = || {
        let all = beside(catalog, named.disk, named.point);
        alone = all.is_empty() && catalog.disks.len() == 1;
        let open = |(d, p): (&Disk, usize)| Some(source(d, open_point(d, p, cache).ok()?));
        all.into_iter().filter_map(open).collect()
    };
    let (volumes, findings) = volumes_of(&own, others)?;
    findings.iter().for_each(|f| log::warn!("{f}"));
    let chosen = choose(&volumes, named.part)?;
    let (path, has_part, blocks) = (named.path.to_vec(), named.part.is_some(), blocks.clone());
    let near = near(catalog, named);
    Ok(Opened { volumes, chosen, path, has_part, blocks, alone, near })
}

impl Opened {
    /// The file system that was named.
    ///
    /// # Errors
    /// `Usage` if none was named and there are several; what opening it says.
    pub(in crate::cli) fn tree(&self) -> Result<Arc<dyn Tree>> {
        match self.chosen.and_then(|i| self.volumes.get(i)) {
            Some(volume) => open_tree(volume),
            None => Err(several(&self.volumes, &self.near)),
        }
    }

    /// Whether nothing but a point was named, which has several partitions or volumes.
    pub(in crate::cli) fn is_whole_disk(&self) -> bool {
        let root = self.chosen.is_none() && self.name().is_empty();
        root || (self.volumes.len() > 1 && self.path.is_empty() && !self.has_part)
    }

    /// The last part of the path; empty for the root.
    pub(in crate::cli) fn name(&self) -> &[u8] {
        let mut parts = self.path.rsplit(|b| *b == b'/');
        parts.find(|p| !p.is_empty() && *p != b".").unwrap_or_default()
    }
}

/// Takes a name apart. A colon or a slash may be in the names of disks, too: the longest name of a point counts.
///
/// # Errors
/// Nothing has that name.
pub(in crate::cli) fn named<'a>(catalog: &'a Catalog, what: &'a Path) -> Result<Named<'a>> {
    let bytes = what.as_os_str().as_bytes();
    let at = |mark: u8| bytes.iter().enumerate().filter(move |(_, b)| **b == mark).map(|(i, _)| i);
    let point = |end: usize| catalog.find(Path::new(OsStr::from_bytes(bytes.get(..end)?))).ok();
    for colon in at(b':') {
        if let Some((disk, point)) = point(colon) {
            let rest = bytes.get(colon + 1..).unwrap_or_default();
            let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
            let (part, path) = rest.split_at(end);
            return Ok(Named { disk, point, part: Some(part), path, by_disk: false });
        }
    }
    let mut ends: Vec<usize> = at(b'/').collect();
    ends.push(bytes.len());
    for end in ends.iter().rev() {
        if let Some((disk, point)) = point(*end) {
            let path = bytes.get(*end..).unwrap_or_default();
            let by_disk = bytes.get(..*end) == Some(disk.path.as_os_str().as_bytes());
            return Ok(Named { disk, point, part: None, path, by_disk });
        }
    }
    // Says what is there.
    let name = bytes.split(|b| *b == b':').next().unwrap_or_default();
    match catalog.find(Path::new(OsStr::from_bytes(name))) {
        Ok((disk, point)) => Ok(Named { disk, point, part: None, path: &[], by_disk: false }),
        Err(e) => Err(e),
    }
}

fn choose(volumes: &[Volume], part: Option<&[u8]>) -> Result<Option<usize>> {
    let Some(part) = part.filter(|p| !p.is_empty()) else {
        let mut with_files =
            volumes.iter().enumerate().filter(|(_, v)| v.content.has_files()).map(|(i, _)| i);
        let first = with_files.next();
        // One that has none says why.
        return Ok(match (first, with_files.next(), volumes.len()) {
            (Some(one), None, _) => Some(one),
            (None, _, 1) => Some(0),
            _ => None,
        });
    };
    let is = |v: &Volume| {
        v.name.as_bytes() == part || v.name.strip_prefix('p').map(str::as_bytes) == Some(part)
    };
    match volumes.iter().position(is) {
        Some(found) => Ok(Some(found)),
        None => {
            let what = format!("no partition or volume '{}'", path_text(OsStr::from_bytes(part)));
            Err(Error::new(Kind::NotFound, what).remedy(format!("there are: {}", list(volumes))))
        }
    }
}

/// `sda/lates` is the path `lates` in the newest point of sda, but hardly meant so.
fn near(catalog: &Catalog, named: &Named<'_>) -> String {
    let mut parts = named.path.split(|b| *b == b'/').filter(|p| !p.is_empty());
    match parts.next().filter(|_| named.by_disk) {
        Some(name) => catalog.did_you_mean(named.disk, &to_text(OsStr::from_bytes(name))),
        None => String::new(),
    }
}

fn several(volumes: &[Volume], near: &str) -> Error {
    let what = "the point has several partitions";
    let there = list(volumes);
    Error::new(Kind::Usage, what)
        .remedy(format!("{near}say which, as in sda/latest:p1/etc: there are {there}"))
}

fn list(volumes: &[Volume]) -> String {
    let one = |v: &Volume| format!("{} ({})", v.name, v.content.name());
    volumes.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The node that a path leads to.
///
/// # Errors
/// As [`files::resolve`].
pub(in crate::cli) fn node(
    opened: &Opened,
    tree: &dyn Tree,
    follow: bool,
) -> Result<files::NodeId> {
    files::resolve(tree, &opened.path, follow).map_err(|e| match e.kind() {
        Kind::NotFound if !opened.near.is_empty() => e.remedy(opened.near.trim_end()),
        Kind::NotFound => e.remedy(
            "'fleecefs files versions DIR DISK:PATH' shows in which points it is, 'fleecefs files ls' what is here",
        ),
        _ => e,
    })
}
