//! What is attached.

use std::path::Path;

use super::loops;
use super::mounts;
use super::place::Place;
use super::record::{Attachment, Begin, Step, Volume};
use crate::error::Result;
use crate::mount::table;

/// How an attachment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// All is there.
    Attached,
    /// Somebody is attaching or detaching it.
    Changing,
    /// It was broken off, or something of it is gone: `detach` cleans up.
    Stale,
}

/// One attachment.
#[derive(Debug, Clone)]
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
}

/// All attachments of the state folder `state`, by id.
///
/// # Errors
/// The state folder cannot be read.
pub(crate) fn list(state: &Path) -> Result<Vec<Listed>> {
    let mut all = Vec::new();
    for place in Place::all(state)? {
        // Its lock first: what is read after it was free is whole, or was broken off.
        let changing = place.is_locked();
        let Some(found) = Attachment::read(&place)? else { continue };
        let state = match () {
            () if changing => State::Changing,
            () if found.ready && is_whole(&found) => State::Attached,
            () => State::Stale,
        };
        let device = |step: &Step| match step {
            Step::Loop { number, .. } if loops::is_attached(&place, *number) => {
                Some(format!("/dev/loop{number}"))
            }
            _ => None,
        };
        let devices = found.steps.iter().filter_map(device).collect();
        all.push(Listed {
            id: place.id.clone(),
            state,
            begin: found.begin,
            devices,
            volumes: found.volumes,
        });
    }
    Ok(all)
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
