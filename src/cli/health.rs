//! How it stands with a point, for commands that do not read its data: whether it can be served, and what `verify`
//! found the last time.

use std::collections::HashMap;
use std::path::PathBuf;

use super::state::StateArgs;
use crate::chain::{Catalog, Disk, Point};
use crate::output::{Line, Look};
use crate::text::path_text;
use crate::units::{age, iso_time};
use crate::verify::Outcome;
use crate::verify::last_verified::{LastBoot, LastVerified, Memory};

/// How a point stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// It cannot be served.
    Unavailable,
    /// Nothing is known to be wrong; its data was never verified.
    NotVerified,
    /// What `verify` found.
    Verified(LastVerified),
}

/// What was verified when, as far as it is known to this user.
pub(super) fn memory(state: &StateArgs, catalog: &Catalog) -> Memory {
    match state.dir() {
        Ok(state) => Memory::read(&state, catalog),
        Err(e) => {
            log::debug!("when points were verified is not known: {}", e.report());
            Memory::default()
        }
    }
}

/// When a test VM was last booted from a point, and whether it came up. Nothing where the files have changed since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Booted(Option<LastBoot>);

/// Of all points of a catalog, by disk, what `boot --check` found.
pub(super) struct Boots(HashMap<PathBuf, Vec<Booted>>);

impl Boots {
    /// As far as it is known to this user.
    pub(super) fn of(state: &StateArgs, catalog: &Catalog) -> Self {
        let memory = state.dir().map(|state| Memory::booted(&state, catalog)).unwrap_or_default();
        let of = |d: &Disk| (d.path.clone(), memory.boots_of(d).into_iter().map(Booted).collect());
        Boots(catalog.disks.iter().map(of).collect())
    }

    /// Of one point.
    pub(super) fn get(&self, disk: &Disk, point: usize) -> Booted {
        self.0.get(&disk.path).and_then(|all| all.get(point)).copied().unwrap_or_default()
    }
}

impl Booted {
    /// That of several points together, if all were booted.
    pub(super) fn all(all: impl Iterator<Item = Booted>) -> Booted {
        let both = |a: Booted, b: Booted| match (a.0, b.0) {
            (Some(a), Some(b)) => {
                let (time, passed) = (a.time.min(b.time), a.passed && b.passed);
                Booted(Some(LastBoot { time, passed }))
            }
            _ => Booted(None),
        };
        all.reduce(both).unwrap_or_default()
    }

    /// For a column of a table, behind what stands there; `now` in seconds since the epoch.
    pub(super) fn behind(self, state: String, now: i64) -> String {
        match self.0 {
            None => state,
            Some(LastBoot { time, passed }) => {
                let word = if passed { "booted" } else { "NOT BOOTED" };
                format!("{state}, {word} {}", age(now.saturating_sub(time)))
            }
        }
    }

    /// Where there is room for it; empty if it is not known.
    pub(super) fn text(self) -> String {
        match self.0 {
            None => String::new(),
            Some(LastBoot { time, passed: true }) => {
                format!("a test VM came up ({})", iso_time(time))
            }
            Some(LastBoot { time, passed: false }) => {
                format!("a test VM did NOT come up ({})", iso_time(time))
            }
        }
    }

    /// For scripts.
    pub(super) fn json(self) -> Option<LastBoot> {
        self.0
    }
}

impl Health {
    /// How `point` stands, of which `verify` found `last`.
    pub(super) fn of(point: &Point, last: Option<LastVerified>) -> Health {
        match (point.is_served(), last) {
            (false, _) => Health::Unavailable,
            (true, None) => Health::NotVerified,
            (true, Some(last)) => Health::Verified(last),
        }
    }

    /// How several points stand together: as the worst of them.
    pub(super) fn worst(all: impl Iterator<Item = Health>) -> Option<Health> {
        all.reduce(|a, b| match (a, b) {
            (Health::Verified(a), Health::Verified(b)) => Health::Verified(LastVerified {
                time: a.time.min(b.time),
                outcome: a.outcome.max(b.outcome),
                changed: a.changed || b.changed,
            }),
            (Health::Unavailable, _) | (_, Health::Unavailable) => Health::Unavailable,
            (bad, _) | (_, bad) if bad.is_unsound() => bad,
            _ => Health::NotVerified,
        })
    }

    fn is_unsound(self) -> bool {
        matches!(self, Health::Verified(l) if l.outcome == Outcome::Unsound && !l.changed)
    }

    /// For a column of a table; `now` in seconds since the epoch.
    pub(super) fn word(self, now: i64) -> String {
        let Health::Verified(last) = self else {
            return if self == Health::NotVerified { "ok" } else { "unavailable" }.into();
        };
        let word = match (last.changed, last.outcome) {
            (true, _) => return "changed".into(),
            (false, Outcome::Sound) => "verified",
            (false, Outcome::Unproven) => "unproven",
            (false, Outcome::Unsound) => "UNSOUND",
        };
        format!("{word} {}", age(now.saturating_sub(last.time)))
    }

    /// Where there is room for it; of a point that cannot be served, why.
    pub(super) fn text(self, point: &Point) -> String {
        match self {
            Health::NotVerified => "ok (not verified)".into(),
            Health::Verified(last) => {
                let time = iso_time(last.time);
                match (last.changed, last.outcome) {
                    (true, _) => format!("changed since it was verified ({time})"),
                    (false, Outcome::Sound) => format!("verified ({time})"),
                    (false, Outcome::Unproven) => format!("unproven (verified {time})"),
                    (false, Outcome::Unsound) => format!("UNSOUND (verified {time})"),
                }
            }
            Health::Unavailable => unavailable(point),
        }
    }

    /// How it looks.
    pub(super) fn look(self) -> Look {
        if self == Health::Unavailable || self.is_unsound() { Look::Red } else { Look::Plain }
    }

    /// Whether its data was read, and its files are what they were then.
    pub(super) fn is_checked(self) -> bool {
        matches!(self, Health::Verified(last) if !last.changed)
    }

    /// For scripts.
    pub(super) fn verified(self) -> Option<LastVerified> {
        if let Health::Verified(last) = self { Some(last) } else { None }
    }

    /// What below a table explains a word in it.
    fn note(self) -> Option<&'static str> {
        match self {
            Health::Unavailable => None,
            Health::NotVerified => {
                Some("ok: not verified, only headers were read ('fleecefs verify' checks the data)")
            }
            Health::Verified(last) => match (last.changed, last.outcome) {
                (true, _) => Some(
                    "changed: since it was verified its image, or one that it depends on, was written to, or got \
                     another owner, mode or link ('fleecefs verify' checks it again)",
                ),
                (false, Outcome::Sound) => None,
                (false, Outcome::Unproven) => Some(
                    "unproven: no error was found, but there is no hash to compare with ('fleecefs verify --create' \
                     records one)",
                ),
                (false, Outcome::Unsound) => Some(
                    "UNSOUND: 'fleecefs verify' found an error, and shows it when it is run again",
                ),
            },
        }
    }
}

/// What explains the words of [`Health::word`] in a table, each once.
pub(super) fn notes(all: impl Iterator<Item = Health>) -> Vec<Line> {
    let mut notes: Vec<&str> = Vec::new();
    for note in all.filter_map(Health::note) {
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
    notes.into_iter().map(|note| Line::sentence(Look::Plain, note)).collect()
}

fn unavailable(point: &Point) -> String {
    let Some(finding) = &point.unavailable else { return "unavailable".into() };
    if finding.path == point.source {
        return format!("unavailable: {}", finding.message);
    }
    let file = finding.path.file_name().map(path_text).unwrap_or_default();
    format!("unavailable: needs {file}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(time: i64, outcome: Outcome, changed: bool) -> Health {
        Health::Verified(LastVerified { time, outcome, changed })
    }

    #[test]
    fn words_say_what_was_found_and_how_long_ago() {
        let now = 10 * 86_400;
        assert_eq!(Health::NotVerified.word(now), "ok");
        assert_eq!(Health::Unavailable.word(now), "unavailable");
        assert_eq!(verified(8 * 86_400, Outcome::Sound, false).word(now), "verified 2d ago");
        assert_eq!(verified(now - 90, Outcome::Unproven, false).word(now), "unproven 1m ago");
        assert_eq!(verified(now - 7200, Outcome::Unsound, false).word(now), "UNSOUND 2h ago");
        // What was found then says nothing about another file.
        for outcome in [Outcome::Sound, Outcome::Unsound] {
            assert_eq!(verified(0, outcome, true).word(now), "changed");
            assert_eq!(verified(0, outcome, true).look(), Look::Plain);
        }
    }

    #[test]
    fn a_run_was_booted_if_all_its_points_were() {
        let booted = |time, passed| Booted(Some(LastBoot { time, passed }));
        let (old, new, bad) = (booted(1, true), booted(5, true), booted(9, false));
        assert_eq!(Booted::all([new, old].into_iter()), old);
        assert_eq!(Booted::all([new, Booted(None)].into_iter()), Booted(None));
        assert_eq!(Booted::all([new, bad].into_iter()), booted(5, false));
        assert_eq!(old.behind("ok".into(), 1 + 2 * 86_400), "ok, booted 2d ago");
        assert_eq!(bad.behind("ok".into(), 9 + 7200), "ok, NOT BOOTED 2h ago");
        assert_eq!(Booted(None).behind("ok".into(), 0), "ok");
    }

    #[test]
    fn a_run_is_verified_if_all_its_points_are() {
        let worst = |all: &[Health]| Health::worst(all.iter().copied()).unwrap();
        let (old, new) = (verified(1, Outcome::Sound, false), verified(5, Outcome::Sound, false));
        let bad = verified(9, Outcome::Unsound, false);
        assert_eq!(worst(&[new, old]), old);
        assert_eq!(worst(&[old, Health::NotVerified, new]), Health::NotVerified);
        assert_eq!(worst(&[Health::NotVerified, bad]), bad);
        assert_eq!(worst(&[bad, Health::Unavailable]), Health::Unavailable);
        assert_eq!(worst(&[old, bad]), verified(1, Outcome::Unsound, false));
        assert!(Health::worst(std::iter::empty()).is_none());
    }

    #[test]
    fn each_word_is_explained_once() {
        let all = [Health::NotVerified, Health::NotVerified, verified(1, Outcome::Sound, false)];
        assert_eq!(notes(all.into_iter()).len(), 1);
        assert!(notes(all.into_iter()).iter().all(|l| l.text.starts_with("ok: ")));
    }
}
