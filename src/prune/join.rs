//! Joining a renamed disk's points with those that it has under its new name.
//!
//! The old points go to the new name's folder and get names that end as its images' do, with the times
//! that they have; their manifests say the same. What results is a folder as any other disk's: one
//! with several chains.
//!
//! Whatever dies whenever, each point is whole in one of both places:
//!
//! 0. A journal in both folders says what is going on: whoever writes to one of them next goes on.
//! 1. Of each point, parents first: its manifest under the new name, then the image's second name (a
//!    hard link). The old ones are untouched.
//! 2. All of it is synced.
//! 3. The old names go, newest first, by the journal that prune has for that. Then the first goes.
//!
//! Broken off, it is done again from the beginning: what has its second name already is known by the file
//! that it is.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::Serialize;

use super::config;
use super::execute::{Known, remove_all};
use crate::chain::linking::{self, Linking};
use crate::chain::manifest::{self, FOLDER, Manifest, vm_name, vm_uuid};
use crate::chain::name::{Name, parse};
use crate::chain::removal::{self, Removal};
use crate::chain::{Catalog, Disk, Level, Point, is_foreign_name};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, FileId, Folder};
use crate::progress::Progress;
use crate::qmp::steps::step;
use crate::restore::check_removable;
use crate::restore::verbs::{self, files};
use crate::text::{path_text, to_text};

/// What will be done.
#[derive(Debug, Serialize)]
pub struct Joining {
    /// The disk's old name, as `list` shows it.
    #[serde(serialize_with = "crate::text::as_text")]
    pub old: PathBuf,
    /// Its new name.
    #[serde(serialize_with = "crate::text::as_text")]
    pub new: PathBuf,
    /// The old name's points, parents first.
    pub points: Vec<Moved>,
    /// What has the name of an image of `old`, and is no file: it stays where it is.
    #[serde(serialize_with = "texts")]
    pub left: Vec<PathBuf>,
    /// What the journal says.
    #[serde(skip)]
    linking: Linking,
    /// Their folder.
    #[serde(skip)]
    from: PathBuf,
    /// The folder that they go to.
    #[serde(skip)]
    to: PathBuf,
}

fn texts<S: serde::Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(paths.iter().map(|p| to_text(p.as_os_str())))
}

/// One image that gets another name.
#[derive(Debug, Serialize)]
pub struct Moved {
    /// Its name.
    pub from: String,
    /// The name that it gets.
    pub to: String,
    /// The time of its point, in seconds since the epoch.
    pub time: i64,
    /// The file; `None` if only the manifest is left.
    #[serde(skip)]
    id: Option<FileId>,
    /// Its new manifest, if it has one.
    #[serde(skip)]
    manifest: Option<Manifest>,
}

/// The images of one disk in one folder.
struct Images<'a> {
    disk: &'a Disk,
    folder: Folder,
    /// What their names end with.
    tail: String,
    /// The first point of each image.
    points: Vec<&'a Point>,
}

/// Plans to join the points of `old` with those of `new`.
///
/// # Errors
/// `Usage` if they are not for certain one disk's, or nobody could tell afterwards; `Exists` if a name
/// is taken; `Unsupported` for what another program keeps there.
pub fn plan(old: &Disk, new: &Disk, other_vm: bool, force: bool) -> Result<Joining> {
    let (from, to) = (Images::of(old)?, Images::of(new)?);
    if old.path == new.path {
        return Err(Error::new(Kind::Usage, "both names are the same disk's"));
    }
    if !other_vm {
        check_vm(&from, &to)?;
    }
    let mut points = Vec::new();
    for p in &from.points {
        points.push(from.moved(p, &to)?);
    }
    check_times(&from, &to, &points)?;
    check_device(&from, &to, force)?;
    from.check_images()?;
    points.extend(from.lost(&to)?);
    for p in &points {
        let there = to.folder.look(&p.to).ok().map(|m| FileId::of(&m));
        if there.is_some() && there != p.id {
            let what = format!("{} would be called {}, which is another file", p.from, p.to);
            return Err(Error::new(Kind::Exists, what).at_path(to.folder.path()));
        }
    }
    let arriving = points.iter().filter(|p| p.id.is_some()).map(|p| p.to.clone()).collect();
    let [o, n] = [old, new].map(|d| to_text(d.path.as_os_str()));
    Ok(Joining {
        old: old.path.clone(),
        new: new.path.clone(),
        points,
        left: no_files(&from.folder, Some(OsStr::new(&from.tail)))?,
        linking: Linking { old: o, new: n, arriving, other_vm, force, arrived: false },
        from: from.folder.path().to_path_buf(),
        to: to.folder.path().to_path_buf(),
    })
}

impl Joining {
    /// Nothing to do: the points of `old` are among those of `new`. What could not come along is told again.
    ///
    /// # Errors
    /// The folder of `old` cannot be read.
    pub fn done(root: &Path, old: &Path, new: &Disk) -> Result<Self> {
        let to = new.points.first().and_then(|p| p.source.parent()).unwrap_or(Path::new(""));
        Ok(Joining {
            old: old.to_path_buf(),
            new: new.path.clone(),
            points: Vec::new(),
            left: left_of(root, old)?,
            linking: Linking::default(),
            from: PathBuf::new(),
            to: to.to_path_buf(),
        })
    }

    /// Goes on with what this journal says: both keep its words, from wherever they are seen.
    pub fn going_on(self, journal: &Linking) -> Self {
        let Linking { old, new, .. } = journal.clone();
        Joining { linking: Linking { old, new, ..self.linking }, ..self }
    }
}

/// Whether points of the disk `new` were those of a disk `old`: then there is nothing left to do. It may have
/// been called from a folder further up or down.
pub fn is_joined(old: &Path, new: &Disk) -> bool {
    let is = |p: &Point| {
        let (dir, name) = (p.source.parent()?, p.source.file_name()?);
        let m = manifest::read(dir, name).ok().flatten()?;
        Some(is_same_end(Path::new(&m.linked_from?), Path::new(&to_text(old.as_os_str()))))
    };
    new.points.iter().any(|p| is(p) == Some(true))
}

fn is_same_end(a: &Path, b: &Path) -> bool {
    a.ends_with(b) || b.ends_with(a)
}

/// What has the name of an image of the disk `old`, which has no points any more, and is no file.
fn left_of(root: &Path, old: &Path) -> Result<Vec<PathBuf>> {
    let own = root.join(old);
    let (dir, tail) = match crate::folder::is_folder(&own) {
        true => (own.as_path(), None),
        false => (own.parent().unwrap_or(root), own.file_name()),
    };
    let open = crate::folder::absent_is_none(Folder::open(dir));
    let open = open.map_err(|e| Error::io(e, "cannot open the folder").at_path(dir))?;
    open.map_or(Ok(Vec::new()), |folder| no_files(&folder, tail))
}

/// What has the name of an image of the disk `tail`, or of any, in this folder, and is none: a folder, a pipe,
/// a link.
fn no_files(folder: &Folder, tail: Option<&OsStr>) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(e, "cannot list the folder").at_path(folder.path());
    let is_named = |name: &OsStr| match parse(name) {
        Name::Backup { stamp: Some(_), disk, .. } => tail.is_none_or(|tail| *disk == *tail),
        _ => false,
    };
    let entries = folder.entries().map_err(failed)?.into_iter();
    let left = entries.filter(|e| e.kind != EntryKind::File && is_named(&e.name));
    let mut left: Vec<PathBuf> = left.map(|e| folder.join(&e.name)).collect();
    left.sort();
    Ok(left)
}

impl<'a> Images<'a> {
    fn of(disk: &'a Disk) -> Result<Self> {
        let odd = |p: &Path, what: &str| {
            let what = format!("'{}': {what}", path_text(&disk.path));
            Error::new(Kind::Unsupported, what).at_path(p)
        };
        let Some(dir) = disk.points.first().and_then(|p| p.source.parent()) else {
            return Err(odd(&disk.path, "it has no points"));
        };
        let mut points: Vec<&Point> = Vec::new();
        let mut tail = None;
        for p in &disk.points {
            let name = p.source.file_name().unwrap_or_default();
            if p.source.parent() != Some(dir) {
                return Err(odd(&p.source, "its points are in several folders"));
            }
            let Some(end) = tail_of(name).filter(|_| p.level != Level::Image) else {
                return Err(odd(&p.source, "not a point in a layout of fleecefs or qmpbackup"));
            };
            if *tail.get_or_insert_with(|| end.clone()) != end {
                return Err(odd(&p.source, "its images' names differ in more than time and level"));
            }
            if points.last().is_none_or(|l| l.source != p.source) {
                points.push(p);
            }
        }
        // A snapshot in an image is a point of its own.
        points.retain(|p| p.level != Level::Snapshot);
        let tail = tail.unwrap_or_default();
        Ok(Images { disk, folder: verbs::open_folder(dir)?, tail, points })
    }

    /// The point under the name that it gets among those of `to`.
    fn moved(&self, p: &Point, to: &Images<'_>) -> Result<Moved> {
        let name = p.source.file_name().unwrap_or_default();
        let from = name.to_str().map(str::to_string).unwrap_or_default();
        let failed = |e| Error::io(e, "cannot look at the file").at_path(&p.source);
        let id = FileId::of(&self.folder.look(name).map_err(failed)?);
        // One that cannot be served comes along as it is.
        if file_of(p).is_some_and(|seen| seen != id) {
            return Err(files::exchanged(&p.source));
        }
        let known = manifest::read_in(&self.folder, name)?;
        let (renamed, stamped) = self.renamed(&from, p.level, p.time, to);
        if !stamped && known.is_none() {
            let what = "its name has no time, and there is no manifest that says it";
            return Err(Error::new(Kind::Incomplete, what)
                .at_path(&p.source)
                .remedy("'fleecefs verify --create DIR' makes one"));
        }
        let manifest = known.map(|m| self.manifest(m, &renamed, to));
        Ok(Moved { from, to: renamed, time: p.time, id: Some(id), manifest })
    }

    /// The new name of an image, and whether the old one has a time.
    fn renamed(&self, name: &str, level: Level, time: i64, to: &Images<'_>) -> (String, bool) {
        match parse(OsStr::new(name)) {
            Name::Backup { level, stamp: Some(stamp), .. } => {
                (format!("{}-{stamp}-{}", word(level), to.tail), true)
            }
            _ => (format!("{}-{time}-{}", word(level), to.tail), false),
        }
    }

    fn manifest(&self, m: Manifest, renamed: &str, to: &Images<'_>) -> Manifest {
        let parent = m.parent.as_ref().map(|parent| {
            let of = self.points.iter().find(|p| p.source.file_name() == Some(OsStr::new(parent)));
            let (level, time) = of.map_or((Level::Full, 0), |p| (p.level, p.time));
            self.renamed(parent, level, time, to).0
        });
        let linked_from = Some(to_text(self.disk.path.as_os_str()));
        Manifest { image: renamed.into(), parent, linked_from, ..m }
    }

    /// Manifests whose images are gone: the gap must stay known.
    fn lost(&self, to: &Images<'_>) -> Result<Vec<Moved>> {
        let side = match self.folder.folder(FOLDER) {
            Ok(side) => side,
            Err(_) => return Ok(Vec::new()),
        };
        let failed = |e| Error::io(e, "cannot list the manifests").at_path(side.path());
        let mut lost = Vec::new();
        for entry in side.entries().map_err(failed)? {
            let Some(image) = manifest::image_of(&entry.name) else { continue };
            let Name::Backup { level, stamp: Some(time), disk } = parse(image) else { continue };
            if disk != *self.tail || self.folder.has(image) {
                continue;
            }
            let (Some(from), Ok(Some(m))) =
                (image.to_str(), manifest::read_in(&self.folder, image))
            else {
                continue;
            };
            let renamed = self.renamed(from, level, time, to).0;
            let manifest = Some(self.manifest(m, &renamed, to));
            lost.push(Moved { from: from.into(), to: renamed, time, id: None, manifest });
        }
        Ok(lost)
    }

    /// Refuses what names other files: under their new names they would not be found.
    fn check_images(&self) -> Result<()> {
        for p in &self.points {
            let name = p.source.file_name().unwrap_or_default();
            let refuse = |what: &str, remedy: &str| {
                Err(Error::new(Kind::Unsupported, what).at_path(&p.source).remedy(remedy))
            };
            if p.layers.iter().any(|l| l.data_file.is_some()) {
                let how = "make one image of it with 'fleecefs restore'";
                return refuse("its data are in another file, which it names", how);
            }
            if files::stated_parent(&self.folder, name).1.is_some() {
                let how = "'fleecefs consolidate' or 'fleecefs commit' makes one image of its chain; or \
                           leave both disks as they are";
                return refuse("a header of its chain names the old name (it was rebased)", how);
            }
            check_removable(&self.folder, name)?;
        }
        Ok(())
    }

    /// The manifests of its points, the newest first.
    fn manifests(&self) -> impl Iterator<Item = Manifest> {
        let names = self.points.iter().rev().filter_map(|p| p.source.file_name());
        names.filter_map(|n| manifest::read_in(&self.folder, n).ok().flatten())
    }

    /// What the newest manifest says of the VM.
    fn vm(&self) -> Option<std::sync::Arc<serde_json::Value>> {
        self.manifests().find(|m| !m.vm.is_null()).map(|m| m.vm)
    }
}

/// What an image's name ends with; `None` for what no backup calls an image.
fn tail_of(name: &OsStr) -> Option<String> {
    let tail: OsString = match parse(name) {
        Name::Backup { stamp: Some(_), disk, .. } => disk,
        Name::Other if !is_foreign_name(name) => name.to_os_string(),
        _ => return None,
    };
    tail.into_string().ok()
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Full | Level::Image | Level::Snapshot => "FULL",
        Level::Inc => "INC",
        Level::Diff => "DIFF",
        Level::Copy => "COPY",
    }
}

/// The file of a point as the scan saw it.
fn file_of(p: &Point) -> Option<FileId> {
    let file = p.layers.iter().map(|l| &l.file).find(|f| f.path() == p.source)?;
    let id = file.identity();
    Some(FileId { dev: id.dev, ino: id.ino })
}

fn check_vm(from: &Images<'_>, to: &Images<'_>) -> Result<()> {
    let (Some(a), Some(b)) = (from.vm(), to.vm()) else { return Ok(()) };
    let (uuids, names) = ((vm_uuid(&a), vm_uuid(&b)), (vm_name(&a), vm_name(&b)));
    let differ = match (uuids, names) {
        ((Some(x), Some(y)), _) => x != y,
        ((None, None), (Some(x), Some(y))) => x != y,
        _ => false,
    };
    if !differ {
        return Ok(());
    }
    let who = |vm: &serde_json::Value| {
        vm_name(vm).or(vm_uuid(vm)).map_or("a VM without a name".to_string(), str::to_string)
    };
    let what = format!(
        "'{}' is of another VM ({}) than '{}' ({})",
        path_text(&from.disk.path),
        who(&a),
        path_text(&to.disk.path),
        who(&b)
    );
    Err(Error::new(Kind::Usage, what).remedy("--other-vm joins them all the same"))
}

/// Two disks that a run had both of are two, and so, unless the user knows better, are those of
/// different sizes or at different devices of the VM.
fn check_device(from: &Images<'_>, to: &Images<'_>, force: bool) -> Result<()> {
    let differ = |what: &str| {
        let (old, new) = (path_text(&from.disk.path), path_text(&to.disk.path));
        Error::new(Kind::Usage, format!("'{old}' and '{new}' {what}: two disks, not one renamed"))
    };
    // What an earlier try has brought over already is of the same runs.
    let own: Vec<Manifest> = to.manifests().filter(|m| m.linked_from.is_none()).collect();
    let runs: BTreeSet<&str> =
        own.iter().map(|m| m.run.as_str()).filter(|r| !r.is_empty()).collect();
    if from.manifests().any(|m| runs.contains(m.run.as_str())) {
        return Err(differ("were backed up in one run"));
    }
    let (Some(last), Some(next), false) = (from.manifests().next(), own.last(), force) else {
        return Ok(());
    };
    let remedy = "--force joins them all the same";
    if last.virtual_size != next.virtual_size {
        let [a, b] = [last.virtual_size, next.virtual_size].map(crate::units::human_bytes);
        return Err(differ(&format!("have different sizes ({a}, {b})")).remedy(remedy));
    }
    let (a, b) = (&last.disk.qdev, &next.disk.qdev);
    if !a.is_empty() && !b.is_empty() && a != b {
        return Err(differ(&format!("are different devices of the VM ({a}, {b})")).remedy(remedy));
    }
    Ok(())
}

/// One disk has one history: no chain of the new name has a time between those of the old name's
/// points, and the newest of all is the new name's.
fn check_times(from: &Images<'_>, to: &Images<'_>, points: &[Moved]) -> Result<()> {
    let times = || points.iter().map(|p| p.time);
    let (Some(first), Some(last)) = (times().min(), times().max()) else { return Ok(()) };
    let mut chains: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
    for p in &to.points {
        // What an earlier run has brought here, to be served or not.
        let there = p.source.file_name().and_then(|n| to.folder.look(n).ok());
        let id = there.map(|meta| FileId::of(&meta));
        if points.iter().any(|m| m.id.is_some() && m.id == id) {
            continue;
        }
        let range = chains.entry(&p.chain).or_insert((p.time, p.time));
        *range = (range.0.min(p.time), range.1.max(p.time));
    }
    let (old, new) = (path_text(&from.disk.path), path_text(&to.disk.path));
    if let Some((chain, _)) = chains.iter().find(|(_, (a, b))| *a <= last && first <= *b) {
        let what = format!(
            "points of '{new}' (chain {chain}) and of '{old}' are of the same time: two \
             disks, not one that was renamed"
        );
        return Err(Error::new(Kind::Usage, what).at_path(to.folder.path()));
    }
    if chains.values().all(|(_, b)| *b < first) {
        let what = format!("the newest point is one of '{old}': that is the disk's new name");
        return Err(Error::new(Kind::Usage, what).remedy("give both names the other way round"));
    }
    Ok(())
}

/// Carries it out. The caller holds the lock.
///
/// # Errors
/// What the operating system said; `Changed` if a file is not what it was when the plan was made.
/// What was done stays, and the next run goes on from there.
pub fn execute(joining: &Joining, catalog: &Catalog, progress: &dyn Progress) -> Result<()> {
    if joining.points.is_empty() {
        return clear_left(joining, catalog);
    }
    let (from, to) = (verbs::open_folder(&joining.from)?, verbs::open_folder(&joining.to)?);
    linking::write_in(&to, &joining.linking)?;
    step("a journal of the link");
    let arrived = linking::write_in(&from, &joining.linking)
        .and_then(|()| bring(joining, &from, &to, progress));
    if let Err(e) = arrived {
        // What has two names does no harm, and a journal that nobody can finish does.
        let _ = linking::clear_in(&to);
        let _ = linking::clear_in(&from);
        return Err(e);
    }
    let linking = Linking { arrived: true, ..joining.linking.clone() };
    linking::write_in(&to, &linking)?;
    step("all points have their new names");
    let names = joining.points.iter().rev().filter(|p| p.from != p.to || from.path() != to.path());
    let removal = Removal { remove: names.map(|p| p.from.clone()).collect(), ..Removal::default() };
    removal::write_in(&from, &removal)?;
    step("journal of what goes");
    let ids = joining.points.iter().filter_map(|p| Some((p.from.clone(), p.id?)));
    let known: Known = ids.collect();
    remove_all(&from, &removal.remove, None, &known, &Steps)?;
    removal::clear_in(&from)?;
    step("journal gone");
    config::sweep(&from)?;
    if from.path() != to.path() {
        linking::clear_in(&from)?;
        step("a journal of the link gone");
        tidy(&from, &catalog.root);
    }
    linking::clear_in(&to)?;
    step("journals of the link gone");
    Ok(())
}

/// Gives all points their new names, in addition to the old ones.
fn bring(joining: &Joining, from: &Folder, to: &Folder, progress: &dyn Progress) -> Result<()> {
    step("journals of the link");
    for p in &joining.points {
        p.copy_config(from, to)?;
        if let Some(m) = p.manifest.as_ref().filter(|m| !is_written(to, m)) {
            manifest::write_in(to, m)?;
            step("manifest under the new name");
        }
        if let Some(id) = p.id {
            p.link(id, from, to)?;
            step("image under the new name");
        }
        progress.advance(1);
    }
    to.sync().map_err(|e| Error::io(e, "cannot sync the folder").at_path(to.path()))
}

/// Clears up after a run whose points are all there.
fn clear_left(joining: &Joining, catalog: &Catalog) -> Result<()> {
    let clear = |folder: &Folder| match linking::read_in(folder)? {
        // It may be another disk's.
        Some(l) if is_same_end(Path::new(&l.old), &joining.old) => linking::clear_in(folder),
        _ => Ok(()),
    };
    if let Ok(from) = Folder::open(&catalog.root.join(&joining.old)) {
        clear(&from)?;
        tidy(&from, &catalog.root);
    }
    clear(&verbs::open_folder(&joining.to)?)
}

/// Counts each file that goes as a step.
struct Steps;

impl Progress for Steps {
    fn advance(&self, _bytes: u64) {
        step("old name gone");
    }
}

fn is_written(to: &Folder, m: &Manifest) -> bool {
    manifest::read_in(to, OsStr::new(&m.image)).is_ok_and(|there| there.as_ref() == Some(m))
}

impl Moved {
    /// Gives the image its second name.
    fn link(&self, id: FileId, from: &Folder, to: &Folder) -> Result<()> {
        match from.link(&self.from, to, &self.to) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.map_err(|e| cannot_link(e, &from.join(&self.from)))?,
        }
        // Its owner may have put another file there meanwhile.
        files::check_same(to, OsStr::new(&self.to), id)
    }

    /// The copies of configuration files that its manifest names.
    fn copy_config(&self, from: &Folder, to: &Folder) -> Result<()> {
        let kept = self.manifest.iter().flat_map(|m| &m.config_files);
        let names = kept.filter_map(|c| Path::new(&c.stored).file_name());
        if from.path() == to.path() {
            return Ok(());
        }
        for name in names.filter(|n| n.as_bytes().starts_with(b"config-")) {
            let Ok(side) = from.folder(FOLDER) else { return Ok(()) };
            if !side.has(name) {
                continue;
            }
            let there = verbs::side_folder(to)?;
            match side.link(name, &there, name) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                other => other.map_err(|e| cannot_link(e, &side.join(name)))?,
            }
            step("configuration file");
        }
        Ok(())
    }
}

fn cannot_link(e: std::io::Error, path: &Path) -> Error {
    let none = [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS].map(|e| e.raw_os_error());
    let apart = e.raw_os_error() == Some(Errno::XDEV.raw_os_error());
    if e.raw_os_error().is_some_and(|n| none.contains(&n)) {
        let what = "this file system gives a file no second name (hard link), by which points are moved \
                    without a moment in which they are nowhere";
        return Error::new(Kind::Unsupported, what).with_source(e).at_path(path).remedy(
            "copy the backup directory to a file system that has them (ext4, XFS, btrfs, NFS)",
        );
    }
    let error = Error::io(e, "cannot give the image a second name").at_path(path);
    match apart {
        true => error.remedy("both folders have to be on one file system"),
        false => error,
    }
}

/// Removes the old folder, if nothing is left in it.
fn tidy(from: &Folder, root: &Path) {
    if from.path() == root {
        return;
    }
    // What is left is told by `list`, if it is a backup.
    let _ = from.remove_folder(FOLDER);
    let Some(name) = from.path().file_name() else { return };
    let gone = from.path().parent().map(Folder::open).map(|above| above?.remove_folder(name));
    if let Some(Err(e)) = gone {
        log::info!("{}: stays: {e}", path_text(from.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_images_are_called() {
        let tail = |n: &str| tail_of(OsStr::new(n));
        assert_eq!(tail("INC-17-d.qcow2").as_deref(), Some("d.qcow2"));
        assert_eq!(tail("d.qcow2").as_deref(), Some("d.qcow2"));
        for other in ["vm.vma.zst", "INC-17-d.partial", "sda.full.data", "FULL-d"] {
            assert_eq!(tail(other), None, "{other}");
        }
    }
}
