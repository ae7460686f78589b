//! What is known of a backup directory and its disks.

use std::collections::BTreeMap;
use std::path::Path;

use super::judge;
use super::report::{DirectoryHealth, DiskHealth, FailedRuns, Newest, Status, Trouble, worst};
use crate::backup::state::journal::Pending;
use crate::chain::gone::{Gone, GoneWhat, gone};
use crate::chain::{Catalog, Disk, manifest_of, run_gaps};
use crate::error::{Error, Result};
use crate::folder::{self, Folder};
use crate::history::{Entry, History};
use crate::manifest::{Achieved, vm_name, vm_uuid};
use crate::verify::last_verified::{LastBoot, LastVerified, Memory};

/// What is known beside the directories.
pub(crate) struct Known<'a> {
    /// The state folder, if there is one.
    pub state: Option<&'a Path>,
    /// What runs did.
    pub history: &'a History,
    /// What killed runs left, or why that cannot be told.
    pub interrupted: &'a Result<Vec<Pending>>,
    /// Seconds since the epoch.
    pub now: i64,
    /// How old the newest point may be, in seconds.
    pub max_age: Option<u64>,
}

/// How it stands with the directory at `root`, of which `catalog` is what is there, or why nothing can be read.
pub(crate) fn survey(root: &Path, catalog: &Result<Catalog>, known: &Known<'_>) -> DirectoryHealth {
    let (mut disks, mut trouble) = (Vec::new(), Vec::new());
    match catalog {
        Ok(catalog) => {
            disks = of_disks(catalog, known);
            of_catalog(catalog, &mut trouble);
        }
        Err(e) => trouble.push(judge::error("unreadable", e.report())),
    }
    match known.interrupted {
        Ok(all) => trouble.extend(all.iter().filter_map(|p| judge::of_interrupted(p, root))),
        Err(e) => trouble.push(judge::error("unreadable", e.report())),
    }
    let last_runs = last_runs(known.history, root);
    trouble.extend(last_runs.iter().filter_map(|run| judge::of_run(run, root, known.now)));
    let space = catalog.is_ok().then(|| Folder::open(root).and_then(|f| f.space()).ok()).flatten();
    let bytes = |blocks: u64, size: u64| blocks.saturating_mul(size);
    DirectoryHealth {
        directory: root.to_path_buf(),
        status: worst(disks.iter().map(|d| d.status).chain(trouble.iter().map(|t| t.status))),
        free_bytes: space.as_ref().map(|s| bytes(s.f_bavail, s.f_frsize)),
        size_bytes: space.as_ref().map(|s| bytes(s.f_blocks, s.f_frsize)),
        disks,
        trouble,
        failed_runs: failed_runs(known.history, root),
        last_runs,
    }
}

/// What is not well with no one disk.
fn of_catalog(catalog: &Catalog, trouble: &mut Vec<Trouble>) {
    if catalog.disks.is_empty() {
        let what = "no backup in this directory (is its file system mounted?)";
        trouble.push(judge::error("empty", what));
    }
    let gaps = run_gaps(catalog);
    let all: Vec<_> = catalog.findings.iter().chain(&gaps).collect();
    judge::of_findings(&all, &catalog.root, trouble);
}

fn of_disks(catalog: &Catalog, known: &Known<'_>) -> Vec<DiskHealth> {
    let (verified, booted) = match known.state {
        Some(state) => (Memory::read(state, catalog), Memory::booted(state, catalog)),
        None => Default::default(),
    };
    let one = |(disk, gone): (&Disk, Option<Gone>)| {
        let checks = (verified.of(disk), last_boot(&booted.boots_of(disk)));
        of_disk((disk, gone), &catalog.root, checks, known)
    };
    catalog.disks.iter().zip(gone(catalog, known.now)).map(one).collect()
}

fn last_boot(all: &[Option<LastBoot>]) -> Option<LastBoot> {
    all.iter().flatten().max_by_key(|b| b.time).copied()
}

fn of_disk(
    (disk, gone): (&Disk, Option<Gone>),
    root: &Path,
    (verified, booted): (Vec<Option<LastVerified>>, Option<LastBoot>),
    known: &Known<'_>,
) -> DiskHealth {
    let newest = disk.points.iter().rposition(|p| p.is_served());
    let manifest = newest.and_then(|at| manifest_of(disk, at));
    let vm = manifest.as_ref().and_then(|m| vm_name(&m.vm).or(vm_uuid(&m.vm)));
    let described = newest.and_then(|at| disk.points.get(at)).map(|p| Newest {
        point: p.name.clone(),
        time: p.time,
        age_seconds: known.now.saturating_sub(p.time),
        level: p.level,
        consistency: Achieved::word(p.consistency),
    });
    let mut trouble = Vec::new();
    // That a VM has no new points is trouble, whatever the reason.
    let gets_none = gone.is_some_and(|g| g.what == GoneWhat::Disk);
    let max_age = known.max_age.filter(|_| !gets_none);
    judge::of_newest(described.as_ref(), max_age, &mut trouble);
    judge::of_points(disk, root, &mut trouble);
    judge::of_checks(&verified, booted, known.now, &mut trouble);
    let unchanged = verified.iter().flatten().filter(|l| !l.changed);
    DiskHealth {
        disk: disk.path.clone(),
        vm: vm.map(str::to_string),
        status: worst(trouble.iter().map(|t| t.status)),
        gone,
        newest: described,
        points: disk.points.len(),
        chain_points: newest.map_or(0, |at| chain_points(disk, at)),
        stored_bytes: disk.points.iter().fold(0, |sum, p| sum.saturating_add(p.own_bytes)),
        verified: unchanged.max_by_key(|l| l.time).copied(),
        booted,
        trouble,
    }
}

/// Points that a point is made of, itself among them.
fn chain_points(disk: &Disk, point: usize) -> usize {
    let parent = |at: &usize| disk.points.get(*at).and_then(|p| p.parent);
    std::iter::successors(Some(point), parent).take(disk.points.len()).count()
}

/// Runs on `root` or on directories below it.
fn runs_below<'a>(history: &'a History, root: &'a Path) -> impl Iterator<Item = &'a Entry> {
    let is_below = move |e: &&Entry| {
        e.directory.as_deref().is_some_and(|dir| Path::new(dir).starts_with(root))
    };
    history.entries.iter().filter(is_below)
}

/// The last run of each command on each directory, of each VM where several share one.
fn last_runs(history: &History, root: &Path) -> Vec<Entry> {
    let mut last: BTreeMap<_, LastOf<'_>> = BTreeMap::new();
    for run in runs_below(history, root) {
        last.entry((&run.directory, &run.command)).or_default().add(run);
    }
    let is_real = |run: &&Entry| !run.has_failed() || is_known(history, run.directory.as_deref());
    last.into_values().flat_map(LastOf::runs).filter(is_real).cloned().collect()
}

/// The last runs of a command on a directory.
#[derive(Default)]
struct LastOf<'a> {
    /// The last that went well, of each VM.
    good: Vec<&'a Entry>,
    /// Those that failed, and after which none went well.
    bad: Vec<&'a Entry>,
}

impl<'a> LastOf<'a> {
    /// Adds a later run. One that went well clears what failed before it: of the same VM, and in a directory that is not
    /// shared all of it, since what failed with a socket that was mistyped, or has moved, never goes well with that.
    fn add(&mut self, run: &'a Entry) {
        self.bad.retain(|b| !is_same_vm(b, run));
        if run.has_failed() {
            return self.bad.push(run);
        }
        self.good.retain(|g| !is_same_vm(g, run));
        self.good.push(run);
        self.bad.retain(|b| b.shared);
    }

    fn runs(self) -> impl Iterator<Item = &'a Entry> {
        let LastOf { mut good, bad } = self;
        good.retain(|g| !bad.iter().any(|b| is_same_vm(b, g)));
        good.into_iter().chain(bad)
    }
}

/// Whether two runs were of one VM, as far as is known: its socket may move, and another VM's take its place.
fn is_same_vm(a: &Entry, b: &Entry) -> bool {
    let same = |a: &Option<String>, b: &Option<String>| a.is_some() && a == b;
    let is_unknown = |run: &Entry| run.qmp.is_none() && run.vm.is_none();
    match (&a.uuid, &b.uuid) {
        (Some(a), Some(b)) => a == b,
        _ => same(&a.qmp, &b.qmp) || same(&a.vm, &b.vm) || (is_unknown(a) && is_unknown(b)),
    }
}

/// Whether a directory is there, or was once: what failed with a mistyped one would be told for ever.
fn is_known(history: &History, directory: Option<&str>) -> bool {
    let worked = |e: &&Entry| !e.has_failed() && e.directory.as_deref() == directory;
    directory.is_some_and(|dir| folder::exists(Path::new(dir)))
        || history.entries.iter().any(|e| worked(&e))
}

fn failed_runs(history: &History, root: &Path) -> Vec<FailedRuns> {
    let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for run in runs_below(history, root).filter(|e| e.has_failed()) {
        *counts.entry((run.command.as_str(), run.result.as_str())).or_default() += 1;
    }
    let one = |((command, result), count): ((&str, &str), u64)| FailedRuns {
        command: command.to_string(),
        result: result.to_string(),
        count,
    };
    counts.into_iter().map(one).collect()
}

impl DirectoryHealth {
    /// Of a file of the configuration: what is wrong with it.
    pub(crate) fn wrong(file: &Path, problems: impl Iterator<Item = String>) -> Self {
        let trouble = problems.map(|p| judge::error("configuration", p)).collect();
        DirectoryHealth { trouble, ..DirectoryHealth::of_errors(file) }
    }

    /// Of a directory that cannot even be named: a path that leads nowhere.
    pub(crate) fn unreadable(path: &Path, e: &Error) -> Self {
        let trouble = vec![judge::error("unreadable", e.report())];
        DirectoryHealth { trouble, ..DirectoryHealth::of_errors(path) }
    }

    fn of_errors(path: &Path) -> Self {
        DirectoryHealth {
            directory: path.to_path_buf(),
            status: Status::Error,
            free_bytes: None,
            size_bytes: None,
            disks: Vec::new(),
            trouble: Vec::new(),
            last_runs: Vec::new(),
            failed_runs: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    /// A backup at a socket, of a VM where it got so far.
    fn backup(qmp: &str, uuid: Option<&str>, failed: bool) -> Entry {
        let mut run = Entry::begun("backup", 0);
        run.directory = Some("/".into());
        run.qmp = Some(qmp.into());
        run.uuid = uuid.map(str::to_string);
        let e = Error::new(Kind::Peer, "no");
        run.end(std::time::Duration::ZERO, Some(&e).filter(|_| failed));
        run
    }

    /// Sockets of those that failed.
    fn failed(entries: Vec<Entry>) -> Vec<String> {
        let history = History { entries, unreadable: 0 };
        let last = last_runs(&history, Path::new("/"));
        last.into_iter().filter(Entry::has_failed).filter_map(|run| run.qmp).collect()
    }

    #[test]
    fn a_later_success_clears_what_failed_with_a_mistyped_socket() {
        let (good, typo) = (backup("a", Some("1"), false), backup("x", None, true));
        assert_eq!(failed(vec![typo.clone()]), ["x"]);
        assert_eq!(failed(vec![good.clone(), typo.clone()]), ["x"]);
        assert!(failed(vec![good.clone(), typo.clone(), good.clone()]).is_empty());
        assert!(failed(vec![typo, good]).is_empty());
        // Its socket has moved, and it has no UUID before it was asked.
        let (old, new) = (backup("a", Some("1"), false), backup("b", Some("1"), false));
        assert!(failed(vec![old, backup("a", None, true), new]).is_empty());
    }

    #[test]
    fn in_a_shared_directory_a_success_clears_only_its_own_vm() {
        let good = |vm: &str| Entry { shared: true, ..backup(vm, Some(vm), false) };
        let bad = |vm: &str| Entry { shared: true, ..backup(vm, None, true) };
        assert_eq!(failed(vec![good("a"), good("b"), bad("b"), good("a")]), ["b"]);
        assert!(failed(vec![good("a"), good("b"), bad("b"), good("a"), good("b")]).is_empty());
        // One that never went well is known by what it was asked for.
        assert_eq!(failed(vec![good("a"), bad("c"), good("a")]), ["c"]);
    }
}
