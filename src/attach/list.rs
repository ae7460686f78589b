//! What is attached.

use std::path::Path;

use super::device;
use super::loops;
use super::mounts;
use super::place::Place;
use super::record::{Attachment, Begin, Step, Volume};
use crate::error::{Error, Result};
use crate::mount::table;
use crate::text::path_text;

/// How an attachment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// All is there.
    Attached,
    /// Somebody is attaching or detaching it.
    Changing,
    /// It was interrupted, or something of it is gone: `detach` cleans up.
    Stale,
    /// Its journal cannot be read.
    Unreadable,
}

/// One attachment.
#[derive(Debug)]
pub(crate) struct Listed {
    /// Its id.
    pub id: String,
    /// How it is.
    pub state: State,
    /// What, by whom, since when; `None` if its journal ends before that.
    pub begin: Option<Begin>,
    /// Its loop devices.
    pub devices: Vec<String>,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Why its journal cannot be read.
    pub error: Option<Error>,
}

/// All attachments of the state folder `state`, by id. One that cannot be read does not hide the others.
///
/// # Errors
/// The state folder cannot be read.
pub(crate) fn list(state: &Path) -> Result<Vec<Listed>> {
    Ok(Place::all(state)?.iter().filter_map(one).collect())
}

/// One of them; `None` if it is gone by now.
fn one(place: &Place) -> Option<Listed> {
    // Its lock first: what is read after it was free is whole, or was interrupted.
    let changing = place.is_locked();
    let (id, devices, volumes) = (place.id.clone(), Vec::new(), Vec::new());
    let found = match Attachment::read(place) {
        Ok(found) => found?,
        Err(e) => {
            let (state, error) = (State::Unreadable, Some(e));
            return Some(Listed { id, state, begin: None, devices, volumes, error });
        }
    };
    let state = match () {
        () if changing => State::Changing,
        () if found.ready && is_whole(&found) => State::Attached,
        () => State::Stale,
    };
    let device = |step: &Step| match step {
        Step::Loop { number, .. } if loops::is_attached(place, *number) => {
            Some(path_text(&device::path(place, &format!("loop{number}"))))
        }
        _ => None,
    };
    let devices = found.steps.iter().filter_map(device).collect();
    Some(Listed { id, state, begin: found.begin, devices, volumes: found.volumes, error: None })
}

/// Whether what it serves, its devices and its mounts are all there.
fn is_whole(found: &Attachment) -> bool {
    let served = table::find(&found.place.mount()).ok().flatten();
    let served = served.is_some_and(|m| m.is_fleecefs() && m.server().is_some());
    let is_loop = |s: &&Step| matches!(s, Step::Loop { number, .. } if loops::is_attached(&found.place, *number));
    let loops = found.steps.iter().filter(is_loop).count();
    let is_there = |v: &Volume| match (&v.mounted, &v.device) {
        (Some(at), Some(device)) => mounts::is_mounted(at, device),
        _ => true,
    };
    let points = found.begin.as_ref().map_or(0, |b| b.points.len());
    served && loops >= points && found.volumes.iter().all(is_there)
}
