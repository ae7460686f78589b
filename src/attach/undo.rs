//! Undoing what was attached, newest first. Each step looks at what is there, so that it can be repeated after a crash
//! of its own, and touches nothing that is not ours.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::device;
use super::ioctl;
use super::loops;
use super::lvm;
use super::mapper;
use super::mounts::{self, From};
use super::place::Place;
use super::record::{Attachment, Step, Volume, mapper_prefix};
use super::udev;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder;
use crate::text::path_text;

/// What is to be detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// All that is attached.
    All,
    /// What has this id, is mounted at (or below) this folder, or has this device, partition or volume.
    Named(OsString),
}

/// Detaches `what`; gives the ids.
///
/// # Errors
/// `NotFound` if there is no such thing, `Busy` if it is in use: what is detached by then stays so.
pub(crate) fn detach(state: &Path, what: &What) -> Result<Vec<String>> {
    Place::sweep(state)?;
    let places = Place::all(state)?;
    let chosen = match what {
        What::All => places,
        What::Named(name) => vec![named(places, name)?],
    };
    let (mut done, mut failed) = (Vec::new(), None);
    for place in chosen {
        let one = || {
            let _lock = place.lock()?;
            Attachment::read(&place)?.map_or(Ok(()), |found| undo(&found))
        };
        match one() {
            Ok(()) => done.push(place.id.clone()),
            // The others may be free.
            Err(e) if failed.is_none() => failed = Some(e),
            Err(e) => log::error!("{}", e.report()),
        }
    }
    failed.map_or(Ok(done), Err)
}

fn named(places: Vec<Place>, name: &OsStr) -> Result<Place> {
    let is = |place: &Place| {
        place.id.as_str() == name
            || Attachment::read(place).is_ok_and(|a| a.is_some_and(|a| a.has(name)))
    };
    let mut found = places.into_iter().filter(is);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => {
            let what = format!("'{}' names several attachments", path_text(name));
            Err(Error::new(Kind::Usage, what)
                .remedy("name one by its id: 'fleecefs attach --list'"))
        }
        (None, _) => {
            let what = format!("nothing is attached as '{}'", path_text(name));
            Err(Error::new(Kind::NotFound, what).remedy("'fleecefs attach --list' shows what is"))
        }
    }
}

impl Attachment {
    /// Whether it is what the user calls `name`: a folder or a device, also by way of links.
    fn has(&self, name: &OsStr) -> bool {
        let named = std::path::absolute(name).unwrap_or_else(|_| PathBuf::from(name));
        let paths = [folder::resolve(&named).unwrap_or_default(), named];
        let is = |path: &Path| paths.iter().any(|p| p == path);
        let numbers = paths.iter().find_map(|p| device::at(p));
        let mount = self.begin.as_ref().and_then(|b| b.mount.as_deref());
        let step = |s: &Step| match s {
            Step::Mount { at, device } => is(at) || is(device),
            Step::Loop { number, .. } => {
                let own = |p: &PathBuf| loop_number(&self.place, p) == Some(*number);
                paths.iter().any(own) && loops::is_attached(&self.place, *number)
            }
            _ => false,
        };
        let volume = |v: &Volume| {
            let same = |d: &&Path| is(d) || (numbers.is_some() && device::at(d) == numbers);
            v.device.as_deref().filter(same).is_some_and(|d| is_ours(self, d).unwrap_or(false))
        };
        mount.is_some_and(is) || self.steps.iter().any(step) || self.volumes.iter().any(volume)
    }
}

/// Undoes all of it. Its lock is held.
///
/// # Errors
/// The first step that cannot be undone, with what was made before it: the journal stays.
pub(super) fn undo(attachment: &Attachment) -> Result<()> {
    let place = &attachment.place;
    for done in attachment.steps.iter().rev() {
        undo_step(attachment, done)?;
        step("undo");
    }
    // Broken off before the mount was written down, or while it was.
    mounts::undo(&place.mount(), From::Fleecefs)?;
    place.remove()?;
    step("undo");
    Ok(())
}

fn undo_step(attachment: &Attachment, done: &Step) -> Result<()> {
    let place = &attachment.place;
    match done {
        Step::UdevRule => udev::undo(place),
        Step::Serve => mounts::undo(&place.mount(), From::Fleecefs),
        Step::Loop { number, file } => loops::undo(place, *number, *file),
        Step::Crypt { name } => mapper::remove(name),
        Step::Group { name } => lvm::undo(place, name),
        Step::Btrfs { device } => {
            // It may never have heard of it.
            if is_ours(attachment, device)?
                && let Err(e) = ioctl::forget_btrfs(device)
            {
                log::debug!("{}: btrfs does not forget it: {e}", path_text(device));
            }
            Ok(())
        }
        Step::Mount { at, device } => match is_ours(attachment, device)? {
            true => mounts::undo(at, From::Device(device)),
            false => mounts::undo(at, From::Nobody),
        },
    }
}

/// The number of the loop device whose node, or that of a partition of it, is at `path`.
fn loop_number(place: &Place, path: &Path) -> Option<u32> {
    let rest = device::name_of(place, path)?.strip_prefix("loop")?;
    rest.split('p').next().and_then(|n| n.parse().ok())
}

/// Whether a device is still ours: what has its number may have been given to somebody else since, by a reboot or by
/// hand. Volumes by their names of the device mapper have names that nobody else's have.
fn is_ours(attachment: &Attachment, device: &Path) -> Result<bool> {
    let place = &attachment.place;
    let Some(name) = device::name_of(place, device) else { return Ok(true) };
    if name.starts_with("dm-") {
        let volume = device::setting(name, "dm/name");
        return Ok(volume.is_some_and(|v| v.starts_with(&mapper_prefix(place))));
    }
    let Some(number) = loop_number(place, device) else { return Ok(true) };
    for done in &attachment.steps {
        if let Step::Loop { number: own, file } = done
            && *own == number
            && loops::is_still_ours(place, *own, *file)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
