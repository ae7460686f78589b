//! The oldest part of a chain becomes one new FULL.
//!
//! The new image is made in `.fleecefs/` under a temporary name, compared with the point, synced;
//! then the journal is written, and from there on every step can be repeated (see
//! `execute::replace`). Before the journal a crash leaves the old chain and a temporary
//! file, which the next run removes; after it both chains, until the old one goes, newest first.
//! A mount that is open keeps the old files, which are unlinked and never modified.
//!
//! While both chains are there, two files have one time in their names, and only manifests tell
//! what depends on which. So the point and all that come after it get manifests first, if they have
//! none. Backing pointers in later images go before the new FULL gets its name, and come back to it
//! when the old files are gone.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::Users;
use super::remove::{KnownFiles, replace};
use crate::chain::points::nearest::nearest;
use crate::chain::{Catalog, Disk, check_formats, describe as describe_point, record_from};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, FileId, Folder, Replace};
use crate::image::{Cache, open_point};
use crate::job::Work;
use crate::journal::removal::{Publish, Removal, TEMPORARY};
use crate::journal::{linking, removal};
use crate::layer::{Format, Mapping};
use crate::layout::{Level, name};
use crate::manifest::{Contents, ImageFormat, Manifest, fingerprint_of};
use crate::restore::{Compression, Qcow2Options, Summary, Temp, check_removable, give_common};
use crate::storage::{ReadAt, SourceFile};
use crate::text::{path_text, shown_as};
use crate::{folder, manifest, restore, rewrite, verify};

/// Memory for merged windows.
const CACHE_BYTES: u64 = 256 << 20;

/// What is going to happen.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Consolidation {
    /// The folder.
    pub dir: PathBuf,
    /// The point that becomes a FULL, as an index into the disk's points.
    #[serde(skip)]
    point: usize,
    /// Its name.
    pub until: String,
    /// The new FULL.
    pub image: String,
    /// What it replaces, in the order in which it goes.
    pub remove: Vec<String>,
    /// What depends on it from then on.
    pub children: Vec<String>,
}

/// Works out what `consolidate DISK --until POINT` does; `None` if it has been done already.
///
/// # Errors
/// `Usage` if the point is no INC of a chain that can be shortened; `NotFound`; `Incomplete` if
/// the point cannot be served.
pub(crate) fn plan(catalog: &Catalog, disk: &Disk, until: &str) -> Result<Option<Consolidation>> {
    let find = |name: &str| {
        let points = &disk.points;
        let exact = points.iter().position(|p| p.name == name);
        exact.or_else(|| points.iter().position(|p| shown_as(&p.name, name)))
    };
    // A disk may itself be called *.raw.
    let full = name::as_full(until);
    let is_exact = find(until).is_some() || full.is_some_and(|f| find(&f).is_some());
    let until = if is_exact { until } else { until.strip_suffix(".raw").unwrap_or(until) };
    // Not the latest that can be served: to merge up to another than was meant cannot be undone.
    let newest = || disk.points.iter().rposition(|p| p.level != Level::Snapshot);
    if let (true, Some(lost)) = (until == "latest", disk.newest_missing()) {
        return Err(Error::new(Kind::Incomplete, "the newest backup is missing")
            .at_path(lost)
            .remedy("name the last point to merge"));
    }
    let Some(point) = find(until).or_else(|| (until == "latest").then(newest).flatten()) else {
        let full = name::as_full(until);
        if full.and_then(|f| find(&f)).is_some() {
            return Ok(None);
        }
        let what = format!("no point '{}' of disk {}", path_text(until), path_text(&disk.path));
        let names = disk.points.iter().map(|p| p.name.as_str()).chain(["latest"]);
        let near = nearest(until, names.map(str::to_string));
        return Err(Error::new(Kind::NotFound, what).remedy(format!(
            "{near}'fleecefs list DIR' shows the points; 'latest' is the newest"
        )));
    };
    plan_at(&Index::of(catalog), disk, point, &BTreeSet::new()).map(Some)
}

/// What many plans look up: who uses which file, and what is in which chain.
pub(crate) struct Index<'a> {
    users: Users<'a>,
    /// By folder of a disk and name of a chain; in chain order.
    chains: HashMap<&'a Path, HashMap<&'a str, Vec<usize>>>,
}

impl<'a> Index<'a> {
    /// That of all disks.
    pub(crate) fn of(catalog: &'a Catalog) -> Self {
        let mut chains: HashMap<&Path, HashMap<&str, Vec<usize>>> = HashMap::new();
        for disk in &catalog.disks {
            let of_disk = chains.entry(&disk.path).or_default();
            for (i, p) in disk.points.iter().enumerate() {
                of_disk.entry(&p.chain).or_default().push(i);
            }
        }
        Index { users: Users::of(catalog), chains }
    }

    /// The points of the chain that `point` is in.
    fn chain(&self, disk: &Disk, point: usize) -> &[usize] {
        let of_disk = self.chains.get(disk.path.as_path());
        let chain = of_disk.and_then(|c| c.get(disk.points[point].chain.as_str()));
        chain.map_or(&[], Vec::as_slice)
    }
}

/// The same for the point with this index, once the points with the indices `gone` are no more.
/// `index` is of the catalog that has the disk.
///
/// # Errors
/// As [`plan`].
pub(crate) fn plan_at(
    index: &Index,
    disk: &Disk,
    point: usize,
    gone: &BTreeSet<usize>,
) -> Result<Consolidation> {
    let p = &disk.points[point];
    if let Some(f) = &p.unavailable {
        let what = format!("point {} is not available: {}", path_text(&p.name), f.message);
        return Err(Error::new(f.kind, what).at_path(&f.path));
    }
    check_point(disk, point)?;
    let dir = p.source.parent().unwrap_or(Path::new("")).to_path_buf();
    linking::refuse(&dir)?;
    let name = own_name(&p.source)?;
    let Some(image) = name::as_full(&name) else {
        return Err(usage("the file's name does not begin with INC-"));
    };
    if folder::exists(&dir.join(&image)) {
        return Err(
            Error::new(Kind::Exists, "there is already such a FULL").at_path(dir.join(image))
        );
    }
    let (remove, children) = neighbours(disk, point, index.chain(disk, point), gone)?;
    let going: Vec<PathBuf> = remove.iter().map(|n| dir.join(n)).collect();
    let going: Vec<&Path> = going.iter().map(PathBuf::as_path).collect();
    index.users.refuse(&going)?;
    Ok(Consolidation { dir, point, until: p.name.clone(), image, remove, children })
}

fn usage(what: &str) -> Error {
    Error::new(Kind::Usage, what.to_string())
}

fn own_name(path: &Path) -> Result<String> {
    path.file_name()
        .and_then(OsStr::to_str)
        .map(str::to_string)
        .ok_or_else(|| Error::new(Kind::Unsupported, "the file's name is not UTF-8").at_path(path))
}

fn check_point(disk: &Disk, point: usize) -> Result<()> {
    let p = &disk.points[point];
    if p.level == Level::Full {
        return Err(usage("this point is already a FULL: nothing to merge"));
    }
    if p.level != Level::Inc {
        return Err(usage("a chain can be consolidated up to an INC only"));
    }
    if p.layers.len() != 1 || p.layers[0].format != Format::Qcow2 {
        return Err(Error::new(Kind::Unsupported, "the point is not one qcow2 file")
            .at_path(&p.source)
            .remedy("restore it to a new image instead"));
    }
    check_formats(disk, point)
}

/// All of the chain that is older than the point, with the point's own file, newest first; and
/// what depends on the new FULL: whatever depended on one of these. `chain` has the chain's points.
fn neighbours(
    disk: &Disk,
    point: usize,
    chain: &[usize],
    gone: &BTreeSet<usize>,
) -> Result<(Vec<String>, Vec<String>)> {
    let until = &disk.points[point];
    let line = line(disk, point);
    let (mut remove, mut children) = (Vec::new(), Vec::new());
    let above = above(disk, point, chain);
    for i in chain.iter().rev().copied().filter(|i| !gone.contains(i)) {
        let p = &disk.points[i];
        if p.source.parent() != until.source.parent()
            || p.layers.iter().any(|l| l.data_file.is_some())
        {
            let what = "the chain is not one folder of plain images";
            return Err(Error::new(Kind::Unsupported, what).at_path(&p.source));
        }
        // An internal snapshot is in its FULL's file and goes with it.
        if p.level == Level::Snapshot {
            continue;
        }
        let lies_on = above.contains(&i);
        let name = own_name(&p.source)?;
        if lies_on || (p.level == Level::Diff && p.time > until.time) {
            // A DIFF holds all that changed since the old FULL, so it is as right on the new one.
            if p.parent.is_some_and(|j| line.contains(&j)) {
                children.push(name);
            }
        } else if line.contains(&i) || p.time <= until.time {
            remove.push(name);
        } else {
            let what = format!("{} is on another branch of the chain", p.name);
            return Err(Error::new(Kind::Unsupported, what).at_path(&p.source));
        }
    }
    children.reverse();
    Ok((remove, children))
}

/// Those of the chain's points that depend on the point, directly or not.
fn above(disk: &Disk, point: usize, chain: &[usize]) -> HashSet<usize> {
    let mut above = HashSet::new();
    // A parent comes before its children.
    for &i in chain {
        if disk.points[i].parent.is_some_and(|j| j == point || above.contains(&j)) {
            above.insert(i);
        }
    }
    above
}

/// The point and all that it depends on.
fn line(disk: &Disk, point: usize) -> BTreeSet<usize> {
    std::iter::once(point).chain(line_of_parents(disk, point)).collect()
}

fn line_of_parents(disk: &Disk, point: usize) -> impl Iterator<Item = usize> + '_ {
    std::iter::successors(disk.points[point].parent, |i| disk.points[*i].parent)
}

/// How a chain is consolidated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConsolidateOptions {
    /// Compare each file that is merged with its manifest's hash first.
    pub check: bool,
    /// Read the new image back and compare it with the point.
    pub compare: bool,
}

/// Carries it out. The caller holds the lock and has called [`super::remove::recover`].
///
/// # Errors
/// Reading, writing or comparing failed: everything is as it was. After the new FULL has its name,
/// an error leaves a journal, which the next run finishes.
pub(crate) fn consolidate(
    disk: &Disk,
    plan: &Consolidation,
    how: ConsolidateOptions,
    work: &Work,
) -> Result<Summary> {
    if how.check {
        check_sources(disk, plan.point, work)?;
    }
    let dir = rewrite::open_folder(&plan.dir)?;
    let side = rewrite::side_folder(&dir)?;
    remove_leftovers(&side)?;
    let mut known = known(disk, plan, &dir)?;
    record_from(disk, plan.point)?;
    let temp = Temp::create_in(&side)?;
    let summary = build(disk, plan.point, &temp, how.compare, work)?;
    let manifest = describe(disk, plan, &dir, &temp, work)?;
    like_the_point(disk, plan.point, &dir, &temp)?;
    let failed = |e| Error::io(e, "cannot check it").at_path(temp.path());
    let made = FileId::of(&temp.file().metadata().map_err(failed)?);
    known.insert(plan.image.clone(), made);
    let temporary = format!("{TEMPORARY}{}", plan.image);
    temp.publish_in(&side, OsStr::new(&temporary), Replace::Yes)?;
    let publish = Some(Publish { temporary: temporary.clone(), manifest });
    let removal = Removal { publish, remove: plan.remove.clone(), relink: Vec::new() };
    removal::write_in(&dir, &removal).inspect_err(|_| {
        let _ = side.remove_if_same(&temporary, made);
    })?;
    replace(&dir, removal, &known, work)?;
    Ok(summary)
}

/// Which files go, as the folder was read; fails if one of those that stay, and get another backing
/// pointer, cannot be altered.
fn known(disk: &Disk, plan: &Consolidation, dir: &Folder) -> Result<KnownFiles> {
    let mut known = KnownFiles::new();
    for p in &disk.points {
        let (Ok(name), Some(layer)) = (own_name(&p.source), p.layers.first()) else { continue };
        let identity = layer.file.identity();
        let id = FileId { dev: identity.dev, ino: identity.ino };
        if layer.file.path() == p.source && plan.remove.contains(&name) {
            rewrite::files::check_same(dir, OsStr::new(&name), id)?;
            check_removable(dir, OsStr::new(&name))?;
            known.insert(name, id);
        }
    }
    for child in plan.children.iter().map(OsStr::new) {
        if rewrite::files::stated_parent(dir, child).1.is_some() {
            rewrite::files::check_alterable(dir, child)?;
        }
    }
    Ok(known)
}

/// BLAKE3 of a file in hexadecimal.
fn hash(file: &SourceFile, work: &Work) -> Result<String> {
    crate::hash::whole_with(file, work.workers, work.progress, &|| work.check())
}

/// Whether what is merged is what was backed up. The new FULL gets a hash of its own: damage that is
/// not seen now would never be seen again, and what could have replaced it is gone.
fn check_sources(disk: &Disk, point: usize, work: &Work) -> Result<()> {
    for i in line(disk, point) {
        let path = &disk.points[i].source;
        let known = rewrite::files::manifest_of(path)?.and_then(|m| m.blake3);
        let Some(wanted) = known else { continue };
        if hash(&SourceFile::look(path)?, work)? != wanted {
            let what = "its content does not match the hash in its manifest";
            return Err(Error::new(Kind::Unsound, what).at_path(path).remedy(
                "restore this file from another copy, or begin a new chain with a FULL; \
                 consolidate --skip-check merges it anyway",
            ));
        }
    }
    Ok(())
}

/// Temporary files that no journal speaks of. The lock is held, so nobody writes them.
fn remove_leftovers(side: &Folder) -> Result<()> {
    let entries = side.entries().map_err(|e| {
        Error::io(e, "cannot check for leftovers of an earlier command").at_path(side.path())
    })?;
    for entry in entries.iter().filter(|e| e.kind != EntryKind::Folder) {
        let ours = entry.name.to_str().is_some_and(|n| {
            let begins = n.trim_start_matches('.').starts_with(TEMPORARY);
            begins && !n.ends_with(".json") || n.starts_with(folder::TEMPORARY)
        });
        if ours {
            rewrite::files::remove_in(side, &entry.name)?;
        }
    }
    Ok(())
}

/// Writes the point as one image with the same cluster size.
fn build(disk: &Disk, point: usize, to: &Temp, compare: bool, work: &Work) -> Result<Summary> {
    let image = open_point(disk, point, &Cache::new(CACHE_BYTES))?;
    let plan = restore::Plan::new(&image, work)?;
    let info = crate::layer::probe(&*disk.points[point].layers[0].file)?;
    let qcow2 = Qcow2Options {
        cluster_size: info.cluster_size,
        compression: compression(disk, point)?,
        ..Qcow2Options::default()
    };
    let options = restore::Options { verify: compare, ..restore::Options::default() };
    restore::restore_to_temp(&image, &plan, to, &qcow2, &options, work)
}

/// What the root of the chain has: most of the data is there.
fn compression(disk: &Disk, point: usize) -> Result<Compression> {
    let mut root = point;
    while let Some(i) = disk.points[root].parent {
        root = i;
    }
    let Some(spec) = disk.points[root].layers.last().filter(|s| s.format == Format::Qcow2) else {
        return Ok(Compression::None);
    };
    let layer = crate::layer::open(spec)?;
    let mut at = layer.next_mapped(0);
    while at < layer.size() {
        let end = at.saturating_add(64 << 20).min(layer.size());
        let map = layer.map(at..end);
        let packed = |m: &Mapping| matches!(m, Mapping::Compressed { .. });
        if map.extents.as_slice().iter().any(|e| packed(&e.content)) {
            let header = crate::layer::qcow2::header::Header::read(&*spec.file)?;
            return Ok(match header.compression {
                crate::layer::qcow2::header::Compression::Zlib => Compression::Zlib,
                crate::layer::qcow2::header::Compression::Zstd => Compression::Zstd,
            });
        }
        // The first data decides: a backup compresses all or nothing.
        if map.extents.as_slice().iter().any(|e| matches!(e.content, Mapping::Data { .. })) {
            return Ok(Compression::None);
        }
        at = layer.next_mapped(end).max(end);
    }
    Ok(Compression::None)
}

/// The new FULL's manifest: the point's, with the bitmaps that record since then.
fn describe(
    disk: &Disk,
    plan: &Consolidation,
    dir: &Folder,
    made: &Temp,
    work: &Work,
) -> Result<Manifest> {
    let (file, path) = (made.source()?, made.path());
    let own = own_name(&disk.points[plan.point].source)?;
    let point = manifest::read_in(dir, OsStr::new(&own))?;
    let mut m = point.or_else(|| describe_point(disk, plan.point)).ok_or_else(|| {
        Error::new(Kind::Unsupported, "no manifest can be written for it").at_path(path)
    })?;
    let found = verify::check_structure(&file, None);
    let wrong = found.findings.iter().chain(&found.refcounts);
    if let Some(f) = wrong.into_iter().next() {
        let what = format!("the new image is wrong: {}", f.message);
        return Err(Error::new(Kind::Corrupt, what).at_path(path));
    }
    let hash = hash(&file, work)?;
    m.image = plan.image.clone();
    m.level = Level::Full;
    m.parent = None;
    m.format = ImageFormat::Qcow2;
    m.content = Contents::Full;
    m.file_size = file.len();
    m.blake3 = Some(hash);
    let fingerprint = fingerprint_of(made.file());
    m.fingerprint =
        Some(fingerprint.map_err(|e| Error::io(e, "cannot read the image").at_path(path))?);
    if !plan.children.is_empty() {
        // Later points have bitmaps of their own. What a FULL's bitmap is needed for then is the
        // next DIFF: the old FULL's holds more than that, so it is as right.
        let root = root_manifest(disk, plan, dir);
        m.bitmap = root.as_ref().and_then(|r| r.bitmap.clone());
        m.diff_bitmap = root.and_then(|r| r.diff_bitmap);
    }
    Ok(m)
}

/// The manifest of the chain's FULL.
fn root_manifest(disk: &Disk, plan: &Consolidation, dir: &Folder) -> Option<Manifest> {
    let root = line_of_parents(disk, plan.point).last()?;
    manifest::read_in(dir, disk.points[root].source.file_name()?).ok().flatten()
}

/// What the files are that a point is made of.
fn parts(disk: &Disk, point: usize) -> std::io::Result<Vec<std::fs::Metadata>> {
    let layers = line(disk, point).into_iter().flat_map(|i| &disk.points[i].layers);
    let files = layers.flat_map(|l| std::iter::once(&l.file).chain(&l.data_file));
    files.map(|f| folder::look(f.path())).collect()
}

/// Mode (without setuid and its like), owner and times of the point's file: qmprestore orders by
/// mtime.
fn like_the_point(disk: &Disk, point: usize, dir: &Folder, made: &Temp) -> Result<()> {
    let failed = |e| Error::io(e, "cannot set the new image's times").at_path(made.path());
    let name = own_name(&disk.points[point].source)?;
    let old = dir.look(&name).map_err(failed)?;
    // Only root may give files away; the backup stays readable to whoever made it either way.
    let _ = give_common(made.file(), &parts(disk, point).map_err(failed)?);
    let time = old.modified().map_err(failed)?;
    folder::set_modified(made.file(), time, made.path()).map_err(failed)?;
    made.file().sync_all().map_err(failed)
}
