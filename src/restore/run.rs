//! All disks of one run.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::chain::{
    Catalog, Disk, MissingImage, has_bare_image, manifest_of, missing_of_run, nearest,
};
use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};
use crate::journal::linking;
use crate::layout::Level;
use crate::layout::name::{Name, parse};
use crate::manifest;
use crate::manifest::{Manifest, vm_name, vm_uuid};
use crate::text::{path_text, to_text};
use crate::units::{iso_time, parse_when};

/// How many runs before one that is not whole are looked at for one that is: each look reads all manifests.
const MOST_OLDER: usize = 8;

/// What a run consists of.
#[derive(Debug, Default)]
pub(crate) struct Run<'a> {
    /// The points: disk and index.
    pub points: Vec<(&'a Disk, usize)>,
    /// Disks beside those that have no point of this run.
    pub without: Vec<PathBuf>,
    /// Images that the run made and that are gone, as the manifests of the others say.
    pub missing: Vec<MissingImage>,
}

/// A VM as far as manifests tell: its UUID, its name, or, where there are none, the folder of its disks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Guest {
    /// By its UUID; with its name.
    Uuid(String, String),
    /// By its name.
    Name(String),
    /// By its folder.
    Folder(PathBuf),
}

impl Guest {
    /// Whose point it is.
    pub(crate) fn of(disk: &Disk, manifest: Option<&Manifest>) -> Self {
        let vm = manifest.map(|m| &*m.vm);
        let name = vm.and_then(vm_name).map(str::to_string);
        match (vm.and_then(vm_uuid), name) {
            (Some(uuid), name) => Guest::Uuid(uuid.into(), name.unwrap_or_default()),
            (None, Some(name)) => Guest::Name(name),
            (None, None) => Guest::Folder(disk.path.parent().unwrap_or(Path::new("")).into()),
        }
    }

    /// What to call it; empty if there is nothing.
    pub(crate) fn name(&self) -> String {
        match self {
            Guest::Uuid(uuid, name) if name.is_empty() => uuid.clone(),
            Guest::Uuid(_, name) | Guest::Name(name) => name.clone(),
            Guest::Folder(folder) => to_text(folder.as_os_str()),
        }
    }
}

/// The VMs of disks, by their paths, as far as the points of a disk name one and no other: so it is that of its points
/// which name none, such as those of another program from before.
pub(crate) struct Guests(HashMap<PathBuf, Option<Guest>>);

impl Guests {
    /// From all points and their manifests.
    pub(crate) fn of<'a>(points: impl Iterator<Item = (&'a Disk, Option<&'a Manifest>)>) -> Self {
        let mut guests: HashMap<PathBuf, Option<Guest>> = HashMap::new();
        for (disk, manifest) in points {
            let guest = Guest::of(disk, manifest);
            if matches!(guest, Guest::Folder(_)) {
                continue;
            }
            let known = guests.entry(disk.path.clone()).or_insert_with(|| Some(guest.clone()));
            if known.as_ref() != Some(&guest) {
                *known = None;
            }
        }
        Guests(guests)
    }

    /// Whose point it is.
    pub(crate) fn guest(&self, disk: &Disk, manifest: Option<&Manifest>) -> Guest {
        match Guest::of(disk, manifest) {
            folder @ Guest::Folder(_) => {
                self.0.get(&disk.path).cloned().flatten().unwrap_or(folder)
            }
            named => named,
        }
    }
}

/// When a point was made, as far as is known. Where several are made in a second, names have the next ones,
/// and manifests say more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PointTime {
    /// The time that is shown.
    pub time: i64,
    /// What the manifest says, in seconds and nanoseconds.
    made: (i64, u32),
}

impl PointTime {
    /// Of a point and its manifest.
    pub(crate) fn of(time: i64, manifest: Option<&Manifest>) -> Self {
        PointTime { time, made: manifest.map_or((time, 0), |m| (m.time, m.time_nanos)) }
    }
}

/// A point of some run.
struct RunPoint<'a> {
    disk: &'a Disk,
    point: usize,
    time: i64,
    when: PointTime,
    id: Option<String>,
    guest: Guest,
}

/// Points that are there twice: while a link-disk is unfinished they have an old and a new name, and still
/// belong to one disk.
pub(crate) struct Duplicates {
    /// All points, by their disks' names and their times.
    all: HashSet<(String, i64)>,
    /// The old names of the disks that a journal speaks of, by their new ones, as both are called here.
    old: HashMap<PathBuf, String>,
}

impl Duplicates {
    /// Those of a backup directory.
    pub(crate) fn of(catalog: &Catalog) -> Self {
        let of_disk = |d: &Disk| {
            let name = to_text(d.path.as_os_str());
            d.points.iter().map(move |p| (name.clone(), p.time)).collect::<Vec<_>>()
        };
        let old = |d: &Disk| Some((d.path.clone(), old_name(d)?));
        Duplicates {
            all: catalog.disks.iter().flat_map(of_disk).collect(),
            old: catalog.disks.iter().filter_map(old).collect(),
        }
    }

    /// Whether a point of the disk is there by its old name too, as its manifest says.
    pub(crate) fn has(&self, disk: &Disk, time: i64, manifest: Option<&Manifest>) -> bool {
        let said = manifest.and_then(|m| m.linked_from.as_ref());
        // It may have been said in a folder further up or down, or in what this is a copy of.
        let here = said.and_then(|_| self.old.get(&disk.path));
        [said, here].into_iter().flatten().any(|old| self.all.contains(&(old.clone(), time)))
    }
}

/// The old name of the disk, if a link-disk to it is unfinished.
fn old_name(disk: &Disk) -> Option<String> {
    let folder = Folder::open(disk.points.first()?.source.parent()?).ok()?;
    let linking = linking::read_in(&folder).ok()??;
    let name = to_text(disk.path.as_os_str());
    let mut pairs = linking.pairs(Path::new(&name)).into_iter();
    pairs.find(|(_, new)| new == Path::new(&name)).map(|(old, _)| to_text(old.as_os_str()))
}

fn members(catalog: &Catalog) -> Vec<RunPoint<'_>> {
    let points = catalog.disks.iter().flat_map(|d| (0..d.points.len()).map(move |i| (d, i)));
    let points = points.filter(|(d, i)| d.points[*i].level != Level::Snapshot);
    let known = points.map(|(disk, point)| (disk, point, manifest_of(disk, point)));
    let duplicates = Duplicates::of(catalog);
    let is_one = |(disk, point, manifest): &(&Disk, usize, Option<Manifest>)| {
        !duplicates.has(disk, disk.points[*point].time, manifest.as_ref())
    };
    let known: Vec<_> = known.filter(is_one).collect();
    let guests = Guests::of(known.iter().map(|(disk, _, manifest)| (*disk, manifest.as_ref())));
    let all = known.into_iter().map(|(disk, point, manifest)| RunPoint {
        disk,
        point,
        time: disk.points[point].time,
        when: PointTime::of(disk.points[point].time, manifest.as_ref()),
        guest: guests.guest(disk, manifest.as_ref()),
        id: manifest.map(|m| m.run).filter(|id| !id.is_empty()),
    });
    all.collect()
}

/// What the newest run of each VM is called.
const LATEST: &str = "latest";

/// The run that the user names.
enum RunSelector<'a> {
    /// By its id, or by its time in seconds.
    Named(&'a str, Option<i64>),
    /// The newest run of each VM of which the time as `list` shows it begins so.
    Newest(String),
}

impl<'a> RunSelector<'a> {
    /// `latest`; a date, or a date and time, as `list` shows them or the beginning of that: the newest
    /// run of this day or minute; else an exact time, or an id.
    fn of(name: &'a str) -> Self {
        let is_date = name.len() >= "2026-11-22".len()
            && name.bytes().take(4).all(|b| b.is_ascii_digit())
            && name.as_bytes().get(4) == Some(&b'-');
        let shown = name.replacen(' ', "T", 1);
        let is_exact =
            shown.parse::<jiff::Timestamp>().is_ok() || shown.len() == "2026-11-22T04:00:00".len();
        match name.strip_prefix('@') {
            Some(seconds) => RunSelector::Named(name, seconds.parse().ok()),
            None if name == LATEST => RunSelector::Newest(String::new()),
            None if is_date && is_exact => RunSelector::Named(name, parse_when(&shown).ok()),
            None if is_date => RunSelector::Newest(shown),
            None => RunSelector::Named(name, name.parse().ok()),
        }
    }
}

/// The points that a selector names.
#[derive(Default)]
struct SelectedPoints<'a> {
    /// Those of these runs.
    ids: BTreeSet<&'a str>,
    /// And those that are of no run, by VM or of all, and time.
    times: BTreeSet<(Option<&'a Guest>, i64)>,
}

impl<'a> SelectedPoints<'a> {
    fn by(all: &'a [RunPoint<'_>], selector: &RunSelector<'_>) -> Result<Self> {
        match selector {
            RunSelector::Named(name, at) => Self::named(all, name, *at),
            RunSelector::Newest(begin) => Self::newest(all, begin),
        }
    }

    fn named(all: &'a [RunPoint<'_>], name: &str, at: Option<i64>) -> Result<Self> {
        let mut meant = SelectedPoints::default();
        if all.iter().any(|m| m.id.as_deref() == Some(name)) {
            meant.ids =
                all.iter().filter_map(|m| m.id.as_deref()).filter(|id| *id == name).collect();
            return Ok(meant);
        }
        let mut of_guest: BTreeMap<&Guest, BTreeSet<&str>> = BTreeMap::new();
        for m in all.iter().filter(|m| Some(m.time) == at) {
            of_guest.entry(&m.guest).or_default().extend(m.id.as_deref());
            meant.times.insert((None, m.time));
        }
        for ids in of_guest.into_values() {
            check_one(name, &ids)?;
            meant.ids.extend(ids);
        }
        Ok(meant)
    }

    fn newest(all: &'a [RunPoint<'_>], begin: &str) -> Result<Self> {
        // A run's time is that of its newest point.
        let mut runs: BTreeMap<(&Guest, Option<&str>, i64), PointTime> = BTreeMap::new();
        for m in all.iter().filter(|m| iso_time(m.time).starts_with(begin)) {
            let id = m.id.as_deref();
            let when = runs.entry((&m.guest, id, id.map_or(m.time, |_| 0))).or_insert(m.when);
            *when = m.when.max(*when);
        }
        let mut newest: BTreeMap<&Guest, (PointTime, BTreeSet<&str>)> = BTreeMap::new();
        for ((guest, id, _), when) in runs {
            let (known, ids) = newest.entry(guest).or_insert((when, BTreeSet::new()));
            if when > *known {
                (*known, *ids) = (when, BTreeSet::new());
            }
            if when == *known {
                ids.extend(id);
            }
        }
        let mut meant = SelectedPoints::default();
        for (guest, (when, ids)) in newest {
            check_one(if begin.is_empty() { LATEST } else { begin }, &ids)?;
            meant.times.insert((Some(guest), when.time));
            meant.ids.extend(ids);
        }
        Ok(meant)
    }

    fn has(&self, m: &RunPoint<'_>) -> bool {
        match &m.id {
            Some(id) => self.ids.contains(id.as_str()),
            None => [None, Some(&m.guest)].into_iter().any(|g| self.times.contains(&(g, m.time))),
        }
    }
}

/// Fails where a time fits more than one run of a VM.
fn check_one(name: &str, ids: &BTreeSet<&str>) -> Result<()> {
    if ids.len() < 2 {
        return Ok(());
    }
    let ids: Vec<String> = ids.iter().map(path_text).collect();
    let text = format!("'{}' fits several runs of one VM", path_text(name));
    Err(Error::new(Kind::Usage, text).remedy(format!("name one by its id: {}", ids.join(", "))))
}

/// Finds the points of run `name`: a run's id as manifests have it, a time in seconds, `latest`, or a
/// date or time, or the beginning of one, as `list` shows them.
///
/// A time means all points that have exactly this time (that in their file names, or after a commit
/// that of the last image merged in), and, where these have manifests, all others of the same run
/// id. (qmpbackup gives all disks of a run one time.)
///
/// # Errors
/// `NotFound` if there is none; `Usage` if a time fits several runs of one VM.
pub(crate) fn find<'a>(catalog: &'a Catalog, name: &str) -> Result<Run<'a>> {
    catalog.check_any()?;
    let all = members(catalog);
    let meant = SelectedPoints::by(&all, &RunSelector::of(name))?;
    let found: Vec<&RunPoint<'_>> = all.iter().filter(|m| meant.has(m)).collect();
    match found.is_empty() {
        true => Err(no_run(catalog, name, &all)),
        false => Ok(run_of(&all, &found, &meant.ids)),
    }
}

/// The newest run of each VM, as [`find`] finds it for `latest`, or why it cannot be told: what is wrong with one VM's
/// is no reason to leave out the others.
///
/// # Errors
/// `NotFound` if there is none at all.
pub(crate) fn newest_of_each(catalog: &Catalog) -> Result<Vec<(Guest, Result<Run<'_>>)>> {
    let mut vms: BTreeMap<Guest, Vec<RunPoint<'_>>> = BTreeMap::new();
    for m in members(catalog) {
        vms.entry(m.guest.clone()).or_default().push(m);
    }
    if vms.is_empty() {
        return Err(no_run(catalog, LATEST, &[]));
    }
    Ok(vms.into_iter().map(|(guest, all)| (guest, newest_of(&all))).collect())
}

fn newest_of<'a>(all: &[RunPoint<'a>]) -> Result<Run<'a>> {
    let meant = SelectedPoints::newest(all, "")?;
    let found: Vec<&RunPoint<'a>> = all.iter().filter(|m| meant.has(m)).collect();
    Ok(run_of(all, &found, &meant.ids))
}

fn no_run(catalog: &Catalog, name: &str, all: &[RunPoint<'_>]) -> Error {
    if let Some(nothing) = catalog.nothing_here() {
        return nothing;
    }
    let text = format!("no run '{}' in {}", path_text(name), path_text(&catalog.root));
    let near = nearest(name, names_of(all).into_iter());
    Error::new(Kind::NotFound, text).remedy(format!(
        "{near}'fleecefs list --runs DIR' shows them; a run is named by its time or id, or 'latest'"
    ))
}

/// The points that were `found` among all, and what belongs to them and is not there. `ids` are those of their runs.
fn run_of<'a>(all: &[RunPoint<'a>], found: &[&RunPoint<'a>], ids: &BTreeSet<&str>) -> Run<'a> {
    let mut run = Run::default();
    run.points.extend(found.iter().map(|m| (m.disk, m.point)));
    // Told once: a disk whose image is missing is not one that the run left out.
    let mut told: BTreeMap<&Guest, Vec<MissingImage>> = BTreeMap::new();
    for m in disks_without(all, found) {
        match lost(m.disk, ids) {
            Some(image) => {
                let missing = MissingImage::of(&m.disk.path, image);
                told.entry(&m.guest).or_default().push(missing);
            }
            None => run.without.push(m.disk.path.clone()),
        }
    }
    // Of several VMs there are several runs of one time, and images of one name.
    let mut runs: BTreeMap<(&Guest, &str), Vec<(&Path, Manifest)>> = BTreeMap::new();
    for m in found {
        let Some(id) = m.id.as_deref() else { continue };
        let Some(manifest) = manifest_of(m.disk, m.point) else { continue };
        runs.entry((&m.guest, id)).or_default().push((&m.disk.path, manifest));
    }
    for ((guest, _), manifests) in &runs {
        let told = told.get(guest).map_or(&[][..], Vec::as_slice);
        let of_run = manifests.iter().map(|(disk, m)| (*disk, m));
        run.missing.extend(missing_of_run(of_run, told));
    }
    run.missing.extend(told.into_values().flatten());
    run
}

/// The id and time of the newest run before `run` that has all disks of this VM; `None` if there is none, or if they are
/// several VMs.
pub(crate) fn whole_before(catalog: &Catalog, run: &Run<'_>) -> Option<(String, i64)> {
    let all = members(catalog);
    let of_run = |m: &&RunPoint<'_>| {
        run.points.iter().any(|(disk, point)| m.disk.path == disk.path && m.point == *point)
    };
    let own: Vec<&RunPoint<'_>> = all.iter().filter(of_run).collect();
    let guest = own.first().map(|m| &m.guest).filter(|g| own.iter().all(|m| m.guest == **g))?;
    let begun = own.iter().map(|m| m.when).min()?;
    let mut older: BTreeMap<&str, PointTime> = BTreeMap::new();
    for m in all.iter().filter(|m| m.guest == *guest && m.when < begun) {
        let Some(id) = m.id.as_deref() else { continue };
        let when = older.entry(id).or_insert(m.when);
        *when = m.when.max(*when);
    }
    let mut older: Vec<(PointTime, &str)> =
        older.into_iter().map(|(id, when)| (when, id)).collect();
    older.sort_unstable_by(|a, b| b.cmp(a));
    let is_whole = |id: &str| {
        find(catalog, id).is_ok_and(|run| run.missing.is_empty() && run.without.is_empty())
    };
    let (when, id) = older.into_iter().take(MOST_OLDER).find(|(_, id)| is_whole(id))?;
    Some((id.to_string(), when.time))
}

/// What is missing of a run: an image, or, where the image is there, the manifest that says of which run it is.
pub(crate) fn missing_text(catalog: &Catalog, image: &MissingImage) -> String {
    let what = if has_bare_image(catalog, image) { "the manifest of image" } else { "image" };
    format!("{what} {} of this run is missing", path_text(&image.image))
}

/// What the runs of a backup directory can be called: times and ids.
pub(crate) fn names(catalog: &Catalog) -> Vec<String> {
    names_of(&members(catalog))
}

fn names_of(all: &[RunPoint<'_>]) -> Vec<String> {
    let names = all.iter().flat_map(|m| [Some(iso_time(m.time)), m.id.clone()]);
    names.flatten().chain([LATEST.to_string()]).collect()
}

/// The name of an image of one of these runs of which only the manifest is left.
fn lost(disk: &Disk, runs: &BTreeSet<&str>) -> Option<String> {
    let folders: BTreeSet<&Path> = disk.points.iter().filter_map(|p| p.source.parent()).collect();
    // A folder may have images of several disks.
    let own: BTreeSet<_> =
        disk.points.iter().filter_map(|p| disk_in(p.source.file_name()?)).collect();
    for dir in folders {
        let Ok(folder) = Folder::open(dir) else { continue };
        let side = folder.folder(manifest::FOLDER);
        for entry in side.and_then(|s| s.entries()).unwrap_or_default() {
            let Some(image) = entry.name.to_str().and_then(|n| n.strip_suffix(".json")) else {
                continue;
            };
            let known = || manifest::read_in(&folder, OsStr::new(image)).ok().flatten();
            let is_own = disk_in(OsStr::new(image)).is_some_and(|d| own.contains(&d));
            if is_own
                && !folder.has(image)
                && known().is_some_and(|m| runs.contains(m.run.as_str()))
            {
                return Some(image.to_string());
            }
        }
    }
    None
}

/// The disk that is in an image's name.
fn disk_in(image: &OsStr) -> Option<OsString> {
    match parse(image) {
        Name::Backup { disk, .. } => Some(disk),
        _ => None,
    }
}

/// What the guest's disk was when a point was made, as its manifest tells.
#[derive(Debug)]
pub(crate) struct OriginalDisk {
    /// The name of its file, without folders.
    pub name: PlainName,
    /// Whether it was a qcow2 image.
    pub is_qcow2: bool,
}

/// The disk that `point` is a state of, as the VM's configuration names it; `None` if no manifest
/// says.
pub(crate) fn original(disk: &Disk, point: usize) -> Option<OriginalDisk> {
    let identity = manifest_of(disk, point)?.disk;
    let name = PlainName::new(Path::new(&identity.file).file_name()?).ok()?;
    // A device's name says nothing of a file, nor does one of another protocol (rbd:POOL/IMAGE).
    let is_device = identity.file.starts_with("/dev/") && !identity.file.starts_with("/dev/shm/");
    let has_protocol = !identity.file.starts_with('/') && identity.file.contains(':');
    let is_file = !is_device && !has_protocol;
    is_file.then(|| OriginalDisk { name, is_qcow2: identity.format == "qcow2" })
}

/// The newest points of disks of the same VMs that have none among `found`.
fn disks_without<'m, 'a>(
    all: &'m [RunPoint<'a>],
    found: &[&RunPoint<'a>],
) -> Vec<&'m RunPoint<'a>> {
    let guests: BTreeSet<&Guest> = found.iter().map(|m| &m.guest).collect();
    let mut newest: BTreeMap<&Path, &RunPoint<'a>> = BTreeMap::new();
    for m in all {
        let known = newest.entry(&m.disk.path).or_insert(m);
        if m.time >= known.time {
            *known = m;
        }
    }
    let has: HashSet<&Path> = found.iter().map(|m| m.disk.path.as_path()).collect();
    let is_without =
        |m: &&RunPoint<'_>| guests.contains(&m.guest) && !has.contains(m.disk.path.as_path());
    newest.into_values().filter(is_without).collect()
}

/// The name of a disk's file below the folder that a run is restored to.
pub(crate) fn file_name(disk: &Disk, point: usize, extension: &str) -> PathBuf {
    let mut path = disk.path.clone();
    if path.file_name().is_none() {
        path = PathBuf::from(disk.points[point].source.file_name().unwrap_or(OsStr::new("disk")));
    }
    let has_it = path.extension() == Some(OsStr::new(extension));
    if has_it {
        return path;
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}
