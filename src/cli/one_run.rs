//! The points of one VM that a command is about: a run, or points by name.

use std::path::{Path, PathBuf};

use crate::chain::{Catalog, Disk, MissingImage, manifest_of, nearest};
use crate::error::{Error, Kind, Result};
use crate::machine::Machine;
use crate::manifest::Manifest;
use crate::restore::run;
use crate::restore::run::Guest;
use crate::text::path_text;
use crate::units::iso_time;

/// A point of the chosen ones.
pub(super) struct ChosenPoint<'a> {
    /// Its disk.
    pub disk: &'a Disk,
    /// Its place among the disk's points.
    pub point: usize,
    /// What is known of it.
    pub manifest: Option<Manifest>,
}

/// The points of one VM.
pub(super) struct OneRun<'a> {
    /// The disks, as the catalog orders them.
    pub points: Vec<ChosenPoint<'a>>,
    /// What the VM was.
    pub machine: Machine,
}

/// The run, or the points, that `names` say: without any, the newest run.
///
/// # Errors
/// `NotFound` if there is no such run or point, `Usage` if it is more than one VM's, or two points of one disk;
/// `Incomplete` if an image of the run is missing.
pub(super) fn find<'a>(catalog: &'a Catalog, names: &[PathBuf]) -> Result<OneRun<'a>> {
    let points = match names {
        [] => of_run(catalog, "latest")?,
        [name] => of_one_name(catalog, name)?,
        several => several.iter().map(|p| catalog.find(p)).collect::<Result<_>>()?,
    };
    of_points(points)
}

/// A run, or else a point, of this name.
fn of_one_name<'a>(catalog: &'a Catalog, name: &Path) -> Result<Vec<(&'a Disk, usize)>> {
    match name.to_str().map(|n| of_run(catalog, n)) {
        Some(Err(e)) if e.kind() == Kind::NotFound => match catalog.find(name) {
            Err(e) if e.kind() == Kind::NotFound => Err(no_such(catalog, name)),
            found => found.map(|point| vec![point]),
        },
        Some(found) => found,
        None => catalog.find(name).map(|point| vec![point]),
    }
}

fn no_such(catalog: &Catalog, name: &Path) -> Error {
    if let Some(nothing) = catalog.nothing_here() {
        return nothing;
    }
    let (shown, dir) = (path_text(&name), path_text(&catalog.root));
    let names = run::names(catalog).into_iter().chain(catalog.names_of_points(name));
    let near = nearest(&shown, names);
    Error::new(Kind::NotFound, format!("no run or point '{shown}' in {dir}")).remedy(format!(
        "{near}'fleecefs list --runs DIR' shows the runs, 'fleecefs list DIR' the points"
    ))
}

fn of_run<'a>(catalog: &'a Catalog, name: &str) -> Result<Vec<(&'a Disk, usize)>> {
    let run = run::find(catalog, name)?;
    warn_of_others(&run.without);
    let Some(i) = run.missing.first() else { return Ok(run.points) };
    let e = is_missing(catalog, i);
    Err(match run::whole_before(catalog, &run) {
        Some((id, time)) => {
            let older = format!("name an older run: {} of {}", path_text(&id), iso_time(time));
            e.remedy(format!("{older} has all disks; or name a point of each of the other disks"))
        }
        None => e.remedy("name a point of each of the other disks, as DISK/latest"),
    })
}

/// Says which disks of the VM have no point of the run.
pub(super) fn warn_of_others(disks: &[PathBuf]) {
    for path in disks {
        log::warn!("disk {} has no point of this run", path_text(path));
    }
}

/// Tells which images of a run are missing, and how many. One whose manifest alone is gone is the run's by its time.
pub(super) fn tell_missing(catalog: &Catalog, run: &run::Run<'_>) -> usize {
    let is = |i: &MissingImage| {
        let same = |d: &Disk, at: usize| {
            d.points[at].name == i.image && d.path.parent() == Some(i.folder.as_path())
        };
        run.points.iter().any(|(d, at)| same(d, *at))
    };
    let (found, missing): (Vec<_>, Vec<_>) = run.missing.iter().partition(|i| is(i));
    let what = |i: &MissingImage| (i.disk_text(), run::missing_text(catalog, i));
    for (disk, what) in found.into_iter().map(what) {
        log::warn!("disk {disk}: {what}: it is restored by the time in its name");
    }
    for (disk, what) in missing.iter().copied().map(what) {
        log::error!("disk {disk}: not restored: {what}");
    }
    missing.len()
}

/// That an image of a run is missing, or its manifest.
pub(super) fn is_missing(catalog: &Catalog, image: &MissingImage) -> Error {
    let what = format!("{}, of disk {}", run::missing_text(catalog, image), image.disk_text());
    Error::new(Kind::Incomplete, what)
}

/// The same of points that were found.
///
/// # Errors
/// `Usage` if they are of more than one VM, or two of one disk.
pub(super) fn of_points<'a>(points: Vec<(&'a Disk, usize)>) -> Result<OneRun<'a>> {
    let mut chosen: Vec<ChosenPoint<'a>> = Vec::new();
    for (disk, point) in points {
        if chosen.iter().any(|c| c.disk.path == disk.path) {
            let what = format!("two points of disk {}", path_text(&disk.path));
            return Err(Error::new(Kind::Usage, what).remedy("name one point of each disk"));
        }
        chosen.push(ChosenPoint { disk, point, manifest: manifest_of(disk, point) });
    }
    check_one_guest(&chosen)?;
    let vm =
        chosen.iter().filter_map(|c| c.manifest.as_ref()).map(|m| &m.vm).find(|v| !v.is_null());
    let machine = vm.map(|vm| Machine::read(vm)).unwrap_or_default();
    Ok(OneRun { points: chosen, machine })
}

/// Points that were named one by one may be of disks of which nobody says whose they are.
fn check_one_guest(chosen: &[ChosenPoint<'_>]) -> Result<()> {
    let mut guests: Vec<Guest> =
        chosen.iter().map(|c| Guest::of(c.disk, c.manifest.as_ref())).collect();
    guests.sort();
    guests.dedup();
    // Of whom nobody says whose they are, they may be anybody's.
    if guests.iter().any(|g| !matches!(g, Guest::Folder(_))) {
        guests.retain(|g| !matches!(g, Guest::Folder(_)));
    }
    match guests.as_slice() {
        [_, _, ..] => {
            let names: Vec<String> = guests.iter().map(|g| path_text(&g.name())).collect();
            let what = format!("disks of several VMs: {}", names.join(", "));
            Err(Error::new(Kind::Usage, what)
                .remedy("name a run by its id ('fleecefs list --runs'), or the points of one VM"))
        }
        _ => Ok(()),
    }
}
