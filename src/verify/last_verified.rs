//! When points were last verified, and how they stood: what `list` and `show` say of points whose data they do not read.
//! The same of test VMs that were booted from them (`boot --check`), in a folder of its own.
//!
//! It is kept in the state folder, since a plain `verify` writes nothing into a backup directory; so each user has
//! what he verified himself. One file there is about one backup directory, which is known by its file `uuid` and when
//! that was made (a copy of the directory is another one), or by its path where there is none.
//!
//! A record holds as long as size, mtime and ctime of the point's files, and of all that it depends on, are what they
//! were: nobody but root can set a ctime. (Device and inode numbers are not compared: with btrfs, FAT and many USB
//! disks they are others after each mount.) On FUSE all of this is what its server says, so nothing is kept of it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{CheckedPoint, Outcome};
use crate::backup::state::lock::{state_folder, state_folder_if_there};
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, EntryKind, Folder, Lock};
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::storage::{Identity, SourceFile};
use crate::text::{json, to_text};
use crate::units::as_time;

/// The folder in the state folder: of what was verified, and of what was booted.
const FOLDER: &str = "verified";
const BOOTED: &str = "booted";
/// Its lock.
const LOCK: &str = "lock";
/// The version of the files in it; others are as if they were not there.
const VERSION: u32 = 1;
/// Points that are kept of one backup directory, the newest records: twenty years of a disk's nights, or some 1 MiB.
const MAX_POINTS: usize = 8192;
/// What a file with so many takes, and more, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// Backup directories that are remembered; beyond these, those whose last `verify` is longest ago are forgotten.
const MAX_DIRECTORIES: usize = 128;
/// How far above an image its backup directory's `uuid` may be: disk, month, and one more.
const MAX_ABOVE: usize = 4;
/// As the ids of targets have it.
const MAX_UUID: u64 = 256;
/// The clock that stamps files goes on at least so often, in nanoseconds (a tick of the kernel is 10 ms at most).
const TICK: i128 = 20_000_000;
/// The same where times of files have whole seconds, or two as FAT has.
const COARSE_TICK: i128 = 2_000_000_000;
/// How far in the future a time may be to be waited for, in seconds.
const SOON: i128 = 2;
/// How often, and after how long, a lock is tried again that another `verify` has.
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(50);

/// How a point stood when it was last verified, with all that it depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct LastVerified {
    /// When, in seconds since the epoch: the longest ago of the files that it is made of.
    #[serde(serialize_with = "as_time")]
    pub time: i64,
    /// The worst of these.
    pub outcome: Outcome,
    /// Whether one of these files is another now.
    pub changed: bool,
}

/// When a test VM was last booted from a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct LastBoot {
    /// When, in seconds since the epoch.
    #[serde(serialize_with = "as_time")]
    pub time: i64,
    /// Whether it came up.
    pub passed: bool,
}

/// A file of the state folder.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// For whoever looks into it.
    directory: String,
    /// By [`name_of`].
    points: BTreeMap<String, Record>,
    /// Of `verify --rolling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rolling: Option<RollingRuns>,
}

/// When a directory's points were verified a little each night.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RollingRuns {
    /// The first run, in seconds since the epoch.
    pub first: i64,
    /// The last one. (Records of points do not tell: others verify as well.)
    pub last: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// By [`states_of`].
    state: String,
    /// In seconds since the epoch.
    verified: i64,
    outcome: Outcome,
}

/// A backup directory, as far as it matters here.
#[derive(Debug, Clone)]
struct Directory {
    path: PathBuf,
    /// Whether times of its files are what a server says.
    is_fuse: bool,
    /// The file that is about it.
    file: String,
}

/// Records of the points of a catalog.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// By the folder that images are in.
    directories: HashMap<PathBuf, Directory>,
    /// By the file's name.
    points: HashMap<String, BTreeMap<String, Record>>,
    /// The same of rolling runs.
    rolling: HashMap<String, RollingRuns>,
    /// Whether a record says all of its point by itself: a VM that is booted from a point says nothing of those below.
    is_of_boots: bool,
}

impl Memory {
    /// Reads what the state folder `state` has about `catalog`. What cannot be read is as if it was never there.
    pub(crate) fn read(state: &Path, catalog: &Catalog) -> Memory {
        Self::read_from(state, FOLDER, catalog)
    }

    /// The same of test VMs: `Sound` where one came up.
    pub(crate) fn booted(state: &Path, catalog: &Catalog) -> Memory {
        Self::read_from(state, BOOTED, catalog)
    }

    fn read_from(state: &Path, name: &str, catalog: &Catalog) -> Memory {
        let mut memory = Memory { is_of_boots: name == BOOTED, ..Memory::default() };
        let folder = match folder_if_there(state, name) {
            Ok(Some(folder)) => folder,
            Ok(None) => return memory,
            Err(e) => {
                log::debug!("when points were verified is not known: {}", e.report());
                return memory;
            }
        };
        for source in catalog.disks.iter().flat_map(|d| &d.points).map(|p| &p.source) {
            let directory = memory.directory(source);
            if directory.is_fuse {
                continue;
            }
            let file = directory.file.clone();
            if !memory.points.contains_key(&file) {
                let (points, rolling) = read(&folder, &file);
                memory.rolling.extend(rolling.map(|runs| (file.clone(), runs)));
                memory.points.insert(file, points);
            }
        }
        memory
    }

    /// When each point of a disk was last verified; `None` where one of its files never was.
    pub(crate) fn of(&self, disk: &Disk) -> Vec<Option<LastVerified>> {
        let mut found: Vec<Option<LastVerified>> = Vec::with_capacity(disk.points.len());
        for (point, own) in disk.points.iter().zip(self.own_of(disk)) {
            // A parent comes before its children.
            let parent = point.parent.filter(|_| !self.is_of_boots);
            let below = parent.map(|p| found.get(p).copied().flatten());
            found.push(match (own, below) {
                (own, None) => own,
                (Some(own), Some(Some(below))) => Some(LastVerified {
                    time: own.time.min(below.time),
                    outcome: own.outcome.max(below.outcome),
                    changed: own.changed || below.changed,
                }),
                (_, Some(_)) => None,
            });
        }
        found
    }

    /// Of records of test VMs: when one was last booted from each point of a disk; `None` where none was, or where the
    /// files have changed since.
    pub(crate) fn boots_of(&self, disk: &Disk) -> Vec<Option<LastBoot>> {
        let boot = |l: LastVerified| LastBoot { time: l.time, passed: l.outcome == Outcome::Sound };
        let known = self.of(disk).into_iter();
        known.map(|last| last.filter(|l| !l.changed).map(boot)).collect()
    }

    /// The rolling runs of all directories: the first that there was at all, and the last of that which waits longest.
    pub(super) fn rolling(&self) -> Option<RollingRuns> {
        let first = self.rolling.values().map(|r| r.first).min()?;
        let last = self.rolling.values().map(|r| r.last).min()?;
        Some(RollingRuns { first, last })
    }

    /// What is kept of each point, without what it depends on: also when its file was read that has changed since.
    pub(super) fn own_of(&self, disk: &Disk) -> Vec<Option<LastVerified>> {
        let own = |(point, state): (&Point, Option<String>)| {
            let state = state?;
            let directory = self.directories.get(point.source.parent()?)?;
            let name = name_of(directory, point.layers.last()?);
            let record = self.points.get(&directory.file)?.get(&name)?;
            let changed = record.state != state;
            Some(LastVerified { time: record.verified, outcome: record.outcome, changed })
        };
        disk.points.iter().zip(states_of(disk)).map(own).collect()
    }

    fn directory(&mut self, source: &Path) -> &Directory {
        let folder = source.parent().unwrap_or(source);
        if !self.directories.contains_key(folder) {
            self.directories.insert(folder.to_path_buf(), directory_of(folder));
        }
        &self.directories[folder]
    }
}

/// Waits until whatever is written to a file of `catalog` from now on gets another time than it has: as long as a
/// tick of the clock takes for a backup that has just been made. Gives the time from when on that holds.
pub(crate) fn wait_for_clock(catalog: &Catalog) -> SystemTime {
    let files =
        catalog.disks.iter().flat_map(|d| &d.points).flat_map(|p| &p.layers).flat_map(files_of);
    let last = files.map(|f| settled_at(&f.identity())).max().unwrap_or(0);
    let left = last.saturating_sub(nanos(SystemTime::now()));
    // A file with a time in the future is another clock's.
    if (1..=COARSE_TICK).contains(&left) {
        std::thread::sleep(Duration::from_nanos(u64::try_from(left).unwrap_or(0)));
    }
    SystemTime::now()
}

/// Keeps in the state folder `state` how points of `catalog` stand, whose data was read from `since` on, a time of
/// [`wait_for_clock`].
///
/// # Errors
/// The state folder cannot be written to, or others may write to it.
pub(crate) fn remember(
    state: &Path,
    catalog: &Catalog,
    checked: &[CheckedPoint],
    since: SystemTime,
) -> Result<()> {
    remember_in(state, FOLDER, catalog, checked, since)
}

/// The same of a test VM that was booted from points of `catalog`, each the disk's path and its place there.
///
/// # Errors
/// As [`remember`].
pub(crate) fn remember_boot(
    state: &Path,
    catalog: &Catalog,
    points: &[(&Path, usize)],
    passed: bool,
    since: SystemTime,
) -> Result<()> {
    let outcome = if passed { Outcome::Sound } else { Outcome::Unsound };
    let one = |(disk, point): &(&Path, usize)| CheckedPoint {
        disk: disk.to_path_buf(),
        point: *point,
        outcome,
    };
    let checked: Vec<CheckedPoint> = points.iter().map(one).collect();
    remember_in(state, BOOTED, catalog, &checked, since)
}

fn remember_in(
    state: &Path,
    name: &str,
    catalog: &Catalog,
    checked: &[CheckedPoint],
    since: SystemTime,
) -> Result<()> {
    let disks: HashMap<&Path, (&Disk, Vec<Option<String>>)> =
        catalog.disks.iter().map(|d| (d.path.as_path(), (d, states_of(d)))).collect();
    let mut memory = Memory::default();
    let mut new: BTreeMap<String, (PathBuf, BTreeMap<String, Record>)> = BTreeMap::new();
    let verified = i64::try_from(nanos(since) / 1_000_000_000).unwrap_or(0);
    for c in checked {
        let Some((disk, states)) = disks.get(c.disk.as_path()) else { continue };
        let (Some(point), Some(Some(state))) = (disk.points.get(c.point), states.get(c.point))
        else {
            continue;
        };
        let mut files = point.layers.iter().flat_map(files_of);
        let Some(last) = point.layers.last() else { continue };
        let directory = memory.directory(&point.source);
        if directory.is_fuse || !files.all(|f| is_to_be_kept(f, since)) {
            continue;
        }
        let record = Record { state: state.clone(), verified, outcome: c.outcome };
        let of = new.entry(directory.file.clone());
        let (_, points) = of.or_insert_with(|| (directory.path.clone(), BTreeMap::new()));
        points.insert(name_of(directory, last), record);
    }
    if new.is_empty() {
        return Ok(());
    }
    keep(state, name, |folder| {
        new.into_iter()
            .try_for_each(|(file, (path, points))| write(folder, &file, &path, points, None))
    })
}

/// Keeps in the state folder `state` that a rolling run of `catalog` has begun at `now` (seconds since the epoch), and
/// is over.
///
/// # Errors
/// As [`remember`].
pub(crate) fn remember_rolling(state: &Path, catalog: &Catalog, now: i64) -> Result<()> {
    let mut memory = Memory::default();
    for point in catalog.disks.iter().flat_map(|d| &d.points) {
        memory.directory(&point.source);
    }
    let kept: BTreeMap<String, PathBuf> = (memory.directories.into_values())
        .filter(|d| !d.is_fuse)
        .map(|d| (d.file, d.path))
        .collect();
    if kept.is_empty() {
        return Ok(());
    }
    keep(state, FOLDER, |folder| {
        kept.iter()
            .try_for_each(|(file, path)| write(folder, file, path, BTreeMap::new(), Some(now)))
    })
}

/// Lets `act` write into the folder `name`, locked.
fn keep(state: &Path, name: &str, act: impl FnOnce(&Folder) -> std::io::Result<()>) -> Result<()> {
    let top = state_folder(state)?;
    let failed = |e| Error::io(e, "cannot keep when points were verified").at_path(top.join(name));
    let folder = top.make_folder(name).map_err(failed)?;
    let _lock = lock(&folder)?;
    act(&folder).and_then(|()| forget(&folder)).map_err(failed)
}

/// Whether what is found of a point at `now` (seconds since the epoch) can be kept: not where one of its files has a
/// time that is to come, of a clock that was wrong. (A file that was written just now is waited for.)
pub(super) fn can_be_kept(point: &Point, now: i64) -> bool {
    let soon = i128::from(now).saturating_add(SOON).saturating_mul(1_000_000_000);
    point.layers.iter().flat_map(files_of).all(|f| settled_at(&f.identity()) <= soon)
}

/// Whether the file is what was read, and whatever is written to it from `since` on changes its times.
fn is_to_be_kept(file: &SourceFile, since: SystemTime) -> bool {
    settled_at(&file.identity()) <= nanos(since) && !file.is_changed_on_disk()
}

/// When the clock that stamped a file has surely gone on, in nanoseconds since the epoch.
fn settled_at(identity: &Identity) -> i128 {
    let is_whole = |t: i128| t % 1_000_000_000 == 0;
    let coarse = is_whole(identity.mtime) && is_whole(identity.ctime);
    identity.ctime.saturating_add(if coarse { COARSE_TICK } else { TICK })
}

fn nanos(time: SystemTime) -> i128 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i128::try_from(d.as_nanos()).unwrap_or(i128::MAX))
}

/// The backup directory that images in `folder` belong to: the nearest one above with an id.
fn directory_of(folder: &Path) -> Directory {
    let is_fuse = folder::is_on_fuse(folder).unwrap_or(true);
    for above in folder.ancestors().take(MAX_ABOVE) {
        let path = above.join("uuid");
        let Ok(meta) = folder::look(&path) else { continue };
        if let Ok(text) = folder::read_small(&path, MAX_UUID) {
            let made = Identity::of(&meta).ctime.to_string();
            let file = file_name(&[b"uuid", &text, made.as_bytes()]);
            return Directory { path: above.into(), is_fuse, file };
        }
    }
    use std::os::unix::ffi::OsStrExt;
    let file = file_name(&[b"path", folder.as_os_str().as_bytes()]);
    Directory { path: folder.to_path_buf(), is_fuse, file }
}

fn file_name(parts: &[&[u8]]) -> String {
    format!("{}.json", &hash(parts)[..16])
}

/// What a point is called in the records: by the file that ends it, from its backup directory on, and the part of it.
fn name_of(directory: &Directory, layer: &LayerSpec) -> String {
    use std::os::unix::ffi::OsStrExt;
    let path = layer.file.path();
    let path = path.strip_prefix(&directory.path).unwrap_or(path);
    hash(&[path.as_os_str().as_bytes(), part_of(layer).as_bytes()])
}

fn part_of(layer: &LayerSpec) -> String {
    let format = match layer.format {
        Format::Qcow2 => "qcow2",
        Format::Raw => "raw",
        Format::Vma => "vma",
        Format::SparseStream => "stream",
    };
    match layer.part {
        LayerPart::Whole => format.to_string(),
        LayerPart::Snapshot(at) => format!("{format} snapshot {at}"),
        LayerPart::Device(number) => format!("{format} device {number}"),
    }
}

fn files_of(layer: &LayerSpec) -> impl Iterator<Item = &SourceFile> {
    [Some(&layer.file), layer.data_file.as_ref()].into_iter().flatten().map(|f| &**f)
}

/// For each point a hash of what its files look like, and those of all that it depends on; `None` for those that
/// cannot be served.
fn states_of(disk: &Disk) -> Vec<Option<String>> {
    let mut states: Vec<Option<String>> = Vec::with_capacity(disk.points.len());
    for point in &disk.points {
        let below = match point.parent {
            Some(p) => states.get(p).cloned().flatten(),
            None => Some(String::new()),
        };
        let state = below.filter(|_| point.is_served()).map(|below| {
            let mut text = below;
            for layer in &point.layers {
                text += &format!("\n{}", part_of(layer));
                for i in files_of(layer).map(SourceFile::identity) {
                    text += &format!(" {} {} {}", i.size, i.mtime, i.ctime);
                }
            }
            hash(&[text.as_bytes()])
        });
        states.push(state);
    }
    states
}

/// A hash of several texts, in hexadecimal.
fn hash(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex()[..32].to_string()
}

fn folder_if_there(state: &Path, name: &str) -> Result<Option<Folder>> {
    let Some(top) = state_folder_if_there(state)? else { return Ok(None) };
    let failed = |e| Error::io(e, "cannot open the folder").at_path(top.join(name));
    folder::absent_is_none(top.folder(name)).map_err(failed)
}

fn read(folder: &Folder, file: &str) -> (BTreeMap<String, Record>, Option<RollingRuns>) {
    let bytes = folder.read_if_there(file, MAX_FILE);
    let stored = bytes.ok().flatten().and_then(|b| serde_json::from_slice::<Stored>(&b).ok());
    stored.filter(|s| s.version == VERSION).map(|s| (s.points, s.rolling)).unwrap_or_default()
}

/// Writes what was there before and what is `new`, with a rolling run at `ran`; of too many points the oldest go.
fn write(
    folder: &Folder,
    file: &str,
    directory: &Path,
    new: BTreeMap<String, Record>,
    ran: Option<i64>,
) -> std::io::Result<()> {
    let (mut points, mut rolling) = read(folder, file);
    if let Some(now) = ran {
        // A first one that is to come was another clock's.
        let first = rolling.map_or(now, |r| r.first.min(now));
        rolling = Some(RollingRuns { first, last: now });
    }
    points.extend(new);
    if points.len() > MAX_POINTS {
        let mut newest: Vec<_> = points.into_iter().collect();
        newest.sort_by_key(|(_, record)| std::cmp::Reverse(record.verified));
        newest.truncate(MAX_POINTS);
        points = newest.into_iter().collect();
    }
    let directory = to_text(directory.as_os_str());
    let stored = Stored { version: VERSION, directory, points, rolling };
    folder.write_whole(file, json(&stored)?.as_bytes())
}

/// Removes the files of directories that nobody has verified for longest, where there are too many.
fn forget(folder: &Folder) -> std::io::Result<()> {
    folder::sweep(folder, &[])?;
    let is_ours = |e: &folder::Entry| {
        e.kind == EntryKind::File && e.name.to_str().is_some_and(|n| n.ends_with(".json"))
    };
    let mut files: Vec<_> = folder.entries()?.into_iter().filter(is_ours).map(|e| e.name).collect();
    if files.len() <= MAX_DIRECTORIES {
        return Ok(());
    }
    files.sort_by_cached_key(|name| folder.modified(name).ok().flatten());
    let most = files.len() - MAX_DIRECTORIES;
    files.iter().take(most).try_for_each(|name| folder.remove_if_there(name).map(drop))
}

fn lock(folder: &Folder) -> Result<Lock> {
    let failed = |e| Error::io(e, "cannot take the lock").at_path(folder.join(LOCK));
    for _ in 0..TRIES {
        if let Some(lock) = folder.lock(LOCK).map_err(failed)? {
            return Ok(lock);
        }
        std::thread::sleep(AGAIN);
    }
    Err(Error::new(Kind::Busy, "another 'verify' or 'boot' writes here").at_path(folder.join(LOCK)))
}
