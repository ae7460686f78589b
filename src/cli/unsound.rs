//! Points of which `verify` has found an error: whoever is about to use one is told so.

use super::health;
use super::state::StateArgs;
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Kind};
use crate::text::path_text;
use crate::verify::Outcome;
use crate::verify::last_verified::Memory;

/// That `verify` has found an error in a point, and which one of its disk is sound; `None` where nothing is known.
/// `otherwise` is what else can be done.
pub(super) fn found(memory: &Memory, disk: &Disk, point: usize, otherwise: &str) -> Option<Error> {
    let known = memory.of(disk);
    let is = |i: usize, outcome: Outcome| {
        known.get(i).copied().flatten().is_some_and(|l| l.outcome == outcome && !l.changed)
    };
    if !is(point, Outcome::Unsound) {
        return None;
    }
    let points = &disk.points;
    let sound = (0..points.len()).filter(|i| is(*i, Outcome::Sound));
    let which = match sound.max_by_key(|i| points[*i].time) {
        Some(i) => {
            let name = disk.path.join(&points[i].name);
            format!("the newest sound point is {}", path_text(&name))
        }
        None => "no point is known to be sound".into(),
    };
    let e = Error::new(Kind::Corrupt, "'verify' has found an error in this point");
    Some(e.at_path(&points[point].source).remedy(format!("{which}; {otherwise}")))
}

/// Warns of those of `points` in which `verify` has found an error: what is read of them may be wrong, and looks right.
pub(super) fn warn<'a>(
    state: &StateArgs,
    catalog: &Catalog,
    points: impl Iterator<Item = (&'a Disk, usize)>,
) {
    let memory = health::memory(state, catalog);
    let otherwise = "what is read of this one may be wrong";
    for error in points.filter_map(|(disk, point)| found(&memory, disk, point, otherwise)) {
        log::warn!("{}", error.report());
    }
}
