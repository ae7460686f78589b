//! What is trouble, and how bad it is. Pure: all that it looks at is given.

use std::path::Path;

use super::report::{Newest, Status, Trouble};
use crate::backup::state::journal::Pending;
use crate::chain::{Disk, NEWEST_LOST, Point};
use crate::error::{Finding, Kind, Severity};
use crate::history::Entry;
use crate::text::path_text;
use crate::units::{age, counted, iso_time};
use crate::verify::Outcome;
use crate::verify::last_verified::{LastBoot, LastVerified};

/// Findings that are shown of one disk, or of a directory; the rest are counted.
const MOST_FINDINGS: usize = 5;
/// Exit codes of a `verify` that came to its end.
const FOUND: [u8; 2] = [Kind::Unsound.table().1, Kind::Unproven.table().1];
/// How far the clock of whoever made a point may be ahead, in seconds.
const AHEAD: i64 = 300;

pub(super) fn error(kind: &'static str, text: impl Into<String>) -> Trouble {
    Trouble { status: Status::Error, kind, text: text.into() }
}

fn warning(kind: &'static str, text: impl Into<String>) -> Trouble {
    Trouble { status: Status::Warning, kind, text: text.into() }
}

/// What is not well with the newest point; `max_age` in seconds.
pub(super) fn of_newest(newest: Option<&Newest>, max_age: Option<u64>, found: &mut Vec<Trouble>) {
    let Some(newest) = newest else {
        return found.push(error("no-point", "no point can be restored"));
    };
    if newest.age_seconds < -AHEAD {
        let time = iso_time(newest.time);
        found.push(warning("future", format!("its newest point is of the future ({time})")));
    }
    let seconds = u64::try_from(newest.age_seconds).unwrap_or(0);
    if max_age.is_some_and(|most| seconds > most) {
        let ago = age(newest.age_seconds);
        found.push(error("old", format!("its newest point is too old: it was made {ago}")));
    }
}

/// What is not well with its points.
pub(super) fn of_points(disk: &Disk, root: &Path, found: &mut Vec<Trouble>) {
    if let Some(file) = disk.newest_missing() {
        let file = path_text(file.strip_prefix(root).unwrap_or(file));
        found.push(error("missing", format!("{file}: {NEWEST_LOST}")));
    }
    let lost: Vec<(&Point, &Finding)> =
        disk.points.iter().filter_map(|p| Some((p, p.unavailable.as_ref()?))).collect();
    if let Some((point, why)) = lost.last() {
        let all = counted(disk.points.len() as u64, "point");
        let (name, why) = (path_text(&point.name), &why.message);
        let text = format!("not available: {} of {all}, such as {name}: {why}", lost.len());
        found.push(error("unavailable", text));
    }
    let mut others: Vec<&Finding> =
        disk.findings.iter().filter(|f| f.message != NEWEST_LOST).collect();
    others.retain(|f| !lost.iter().any(|(_, why)| why == f));
    of_findings(&others, root, found);
}

/// Findings of a directory or a disk.
pub(super) fn of_findings(findings: &[&Finding], root: &Path, found: &mut Vec<Trouble>) {
    let mut all: Vec<&&Finding> = findings.iter().filter(|f| f.severity > Severity::Note).collect();
    all.sort_by_key(|f| std::cmp::Reverse(f.severity));
    for f in all.iter().take(MOST_FINDINGS) {
        let below = f.path.strip_prefix(root).ok().filter(|p| !p.as_os_str().is_empty());
        let shown = Finding { path: below.unwrap_or(&f.path).to_path_buf(), ..(**f).clone() };
        found.push(of_severity(f.severity, shown.to_string()));
    }
    if let Some(rest) = all.get(MOST_FINDINGS..)
        && let Some(worst) = rest.first()
    {
        let more = counted(rest.len() as u64, "more finding");
        found.push(of_severity(worst.severity, format!("{more} ('fleecefs list' shows all)")));
    }
}

fn of_severity(severity: Severity, text: String) -> Trouble {
    if severity == Severity::Error { error("finding", text) } else { warning("finding", text) }
}

/// What `verify` and `boot --check` found of its points.
pub(super) fn of_checks(
    verified: &[Option<LastVerified>],
    booted: Option<LastBoot>,
    now: i64,
    found: &mut Vec<Trouble>,
) {
    let is_unsound = |l: &&LastVerified| !l.changed && l.outcome == Outcome::Unsound;
    let unsound: Vec<_> = verified.iter().flatten().filter(is_unsound).collect();
    if let Some(last) = unsound.iter().max_by_key(|l| l.time) {
        let (points, ago) =
            (counted(unsound.len() as u64, "point"), age(now.saturating_sub(last.time)));
        found.push(error("unsound", format!("'fleecefs verify' found errors in {points} {ago}")));
    }
    if let Some(last) = booted.filter(|b| !b.passed) {
        let ago = age(now.saturating_sub(last.time));
        found.push(error("not-booted", format!("a test VM did not come up from it {ago}")));
    }
}

/// What is not well with the last run of a command: a backup that failed is an error, other work on the directory a
/// warning. What somebody restored or booted by hand says nothing of the backups.
pub(super) fn of_run(run: &Entry, root: &Path, now: i64) -> Option<Trouble> {
    if !run.has_failed() {
        return None;
    }
    let directory = run.directory.as_deref().map(Path::new).filter(|d| *d != root);
    let below = directory.map(|d| format!(" to {}", path_text(d.strip_prefix(root).unwrap_or(d))));
    let vm = run.vm.as_ref().map(|vm| format!(" of {}", path_text(vm)));
    let what = format!(
        "the last {}{}{} failed {}: {}",
        path_text(&run.command),
        vm.unwrap_or_default(),
        below.unwrap_or_default(),
        age(now.saturating_sub(run.time)),
        run.why().unwrap_or_else(|| run.result.clone()),
    );
    match run.command.as_str() {
        "backup" => Some(error("run-failed", what)),
        "prune" | "consolidate" => Some(warning("run-failed", what)),
        // What it found is known of each point, by `of_checks`.
        "verify" if !FOUND.contains(&run.exit_code) => Some(warning("run-failed", what)),
        _ => None,
    }
}

/// What killed runs to this directory left.
pub(super) fn of_interrupted(left: &Pending, root: &Path) -> Option<Trouble> {
    let deferred = left.left.iter().map(|l| l.disk.dir.as_path());
    let mut targets = std::iter::once(left.target.as_path()).chain(deferred);
    if !targets.any(|t| t.starts_with(root)) {
        return None;
    }
    let what = match left.run.as_str() {
        "" => "an interrupted backup has left unfinished images".to_string(),
        run => format!("backup {} was interrupted", path_text(run)),
    };
    Some(error("interrupted", format!("{what}: 'fleecefs recover' or the next backup cleans up")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::time::Duration;

    fn newest(age_seconds: i64) -> Newest {
        Newest {
            point: "INC-1".into(),
            time: 1_700_000_000,
            age_seconds,
            level: crate::layout::Level::Inc,
            consistency: "crash",
        }
    }

    fn kinds(found: &[Trouble]) -> Vec<(&'static str, Status)> {
        found.iter().map(|t| (t.kind, t.status)).collect()
    }

    #[test]
    fn a_point_is_old_beyond_the_limit_and_not_before() {
        let of = |age: i64, most| {
            let mut found = Vec::new();
            of_newest(Some(&newest(age)), most, &mut found);
            kinds(&found)
        };
        assert_eq!(of(3600, Some(3600)), []);
        assert_eq!(of(3601, Some(3600)), [("old", Status::Error)]);
        assert_eq!(of(i64::MAX, None), []);
        // A clock that was set back is no proof of a new backup.
        assert_eq!(of(-3600, Some(3600)), [("future", Status::Warning)]);
        assert_eq!(of(-60, Some(0)), []);
        let mut found = Vec::new();
        of_newest(None, None, &mut found);
        assert_eq!(kinds(&found), [("no-point", Status::Error)]);
    }

    #[test]
    fn the_worst_findings_come_first_and_the_rest_are_counted() {
        let one = |severity, n: usize| Finding {
            severity,
            ..Finding::warning(Kind::Io, format!("/b/{n}"), "odd")
        };
        let mut all: Vec<Finding> = (0..8).map(|n| one(Severity::Warning, n)).collect();
        all.push(one(Severity::Note, 8));
        all.push(one(Severity::Error, 9));
        let mut found = Vec::new();
        of_findings(&all.iter().collect::<Vec<_>>(), Path::new("/b"), &mut found);
        assert_eq!(found.len(), MOST_FINDINGS + 1);
        assert_eq!((found[0].status, found[0].text.as_str()), (Status::Error, "9: odd"));
        assert!(found[5].text.starts_with("4 more findings"), "{found:?}");
        assert!(found[5].status == Status::Warning);
    }

    #[test]
    fn what_verify_found_counts_until_the_files_change() {
        let last = |outcome, changed| Some(LastVerified { time: 5, outcome, changed });
        let of = |all: &[Option<LastVerified>], booted| {
            let mut found = Vec::new();
            of_checks(all, booted, 10, &mut found);
            kinds(&found)
        };
        assert_eq!(of(&[last(Outcome::Unproven, false), None], None), []);
        assert_eq!(of(&[last(Outcome::Unsound, true)], None), []);
        assert_eq!(of(&[None, last(Outcome::Unsound, false)], None), [("unsound", Status::Error)]);
        let boot = |passed| Some(LastBoot { time: 1, passed });
        assert_eq!(of(&[], boot(true)), []);
        assert_eq!(of(&[], boot(false)), [("not-booted", Status::Error)]);
    }

    #[test]
    fn failed_backups_are_errors_and_what_was_done_by_hand_is_nothing() {
        let run = |command: &str, failed: bool| {
            let mut entry = Entry::begun(command, 0);
            entry.directory = Some("/b/vm1".into());
            let e = Error::new(Kind::NoSpace, "it is full");
            entry.end(Duration::ZERO, Some(&e).filter(|_| failed));
            of_run(&entry, Path::new("/b"), 7200)
        };
        let backup = run("backup", true).unwrap();
        assert_eq!(backup.status, Status::Error);
        assert_eq!(backup.text, "the last backup to vm1 failed 2h ago: it is full");
        assert_eq!(run("prune", true).unwrap().status, Status::Warning);
        assert_eq!(run("verify", true).unwrap().status, Status::Warning);
        for command in ["restore", "boot --check", "recover"] {
            assert_eq!(run(command, true), None);
        }
        let mut found = Entry::begun("verify", 0);
        found.end(Duration::ZERO, Some(&Error::new(Kind::Unsound, "bad")));
        assert_eq!(of_run(&found, Path::new("/b"), 0), None, "each point has that");
        assert_eq!(run("backup", false), None);
    }

    #[test]
    fn only_what_was_left_in_this_directory_is_its_trouble() {
        let left = Pending { run: "r".into(), target: "/b/vm1".into(), ..Pending::default() };
        assert!(of_interrupted(&left, Path::new("/b")).is_some());
        assert!(of_interrupted(&left, Path::new("/b/vm1")).is_some());
        assert!(of_interrupted(&left, Path::new("/b/vm")).is_none());
        assert!(of_interrupted(&Pending::default(), Path::new("/b")).is_none());
    }
}
