//! What a night does for one VM: recover if need be, backup, verify, boot, prune, in that order.

use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::child::{Ended, GRACE, Prints, Runner, StepError};
use super::hooks;
use super::row::VmRow;
use crate::backup::state::journal;
use crate::backup::state::lock::state_folder;
use crate::backup::target::reachable;
use crate::config::{How, Problem, Vm};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Lock};
use crate::qmp::Address;
use crate::qmp::socket::Socket;
use crate::text::path_text;

/// How long commands may take that run after all else.
pub(super) const HOOK_TIME: Duration = Duration::from_secs(600);

/// How long a process that changes nothing may take to end: it has nothing to undo.
const GRACE_OF_PLANS: Duration = Duration::from_secs(10);
/// How long it is looked whether a target is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nothing ends what has to run in any case but its own time.
static NEVER: AtomicBool = AtomicBool::new(false);

/// For what runs also where the night is to end: `time` is what it may take.
pub(super) fn in_any_case(vm: &str, time: Duration, grace: Duration) -> Runner<'_> {
    Runner { vm, stop: &NEVER, deadline: Instant::now().checked_add(time), grace }
}

/// A night.
pub(super) struct Night<'a> {
    /// The state folder.
    pub state: &'a Path,
    /// Set when it is to end.
    pub stop: &'a AtomicBool,
    /// Whether nothing is changed.
    pub dry_run: bool,
}

/// A VM, as it is found.
enum Found {
    Backup(How),
    Off(String),
    Wrong(StepError),
}

impl Night<'_> {
    /// Does all that is to be done for a VM; `problems` is what is wrong with its configuration.
    pub(super) fn back_up(&self, vm: &Vm, problems: &[&Problem]) -> VmRow {
        let began = Instant::now();
        let mut row = VmRow::new(vm);
        let timeout = vm.seconds("timeout").map(Duration::from_secs);
        let deadline = timeout.and_then(|t| began.checked_add(t));
        let grace = if self.dry_run { GRACE_OF_PLANS } else { GRACE };
        let runner = Runner { vm: &vm.name, stop: self.stop, deadline, grace };
        match self.begin(vm, problems) {
            Ok(Begun::Skipped(why)) => row.skipped = Some(why),
            Ok(Begun::Locked(_lock)) if self.dry_run => self.plan(vm, runner, &mut row),
            Ok(Begun::Locked(_lock)) => self.run(vm, runner, &mut row),
            Err(e) => row.fail(if problems.is_empty() { "backup" } else { "configuration" }, e),
        }
        row.seconds = began.elapsed().as_secs_f64();
        if !row.failures.is_empty() && !self.dry_run {
            last_hook(vm, "on_failure", &mut row);
        }
        row
    }

    /// Whether it may begin.
    fn begin(&self, vm: &Vm, problems: &[&Problem]) -> Result<Begun, StepError> {
        if !problems.is_empty() {
            let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
            return Err(StepError::from(&Error::new(Kind::Usage, all.join("; "))));
        }
        if self.stop.load(Ordering::Relaxed) {
            return Err(StepError::from(&Error::new(Kind::Interrupted, "not started")));
        }
        if let Some(why) = outside_hours(vm) {
            return Ok(Begun::Skipped(why));
        }
        if let Some(target) = vm.target() {
            // What asks a dead server is never done, and cannot be ended: no step begins.
            reachable::check_answers(target).map_err(|e| StepError::from(&e))?;
        }
        match self.dry_run {
            true => Ok(Begun::Locked(None)),
            false => self.lock(vm).map(Begun::Locked).map_err(|e| StepError::from(&e)),
        }
    }

    /// One run of a VM at a time, also where somebody names it while all are backed up.
    fn lock(&self, vm: &Vm) -> Result<Option<Lock>> {
        let folder = state_folder(self.state)?;
        let name = format!("configured-{}.lock", vm.name);
        let failed = |e| Error::io(e, "cannot take the lock").at_path(folder.join(&name));
        match folder.lock(&name).map_err(failed)? {
            Some(lock) => Ok(Some(lock)),
            None => Err(Error::new(Kind::Busy, "another run is working on this VM")),
        }
    }

    fn run(&self, vm: &Vm, runner: Runner<'_>, row: &mut VmRow) {
        let how = match self.find(vm, runner, row) {
            Found::Backup(how) => how,
            Found::Off(why) => {
                row.skipped = Some(why);
                return;
            }
            Found::Wrong(e) => return row.fail("backup", e),
        };
        match hooks::run(runner, vm.commands("before"), "before", row) {
            Err(e) => row.fail("before", StepError::from(&e)),
            Ok(()) => self.steps(vm, how, runner, row),
        }
        last_hook(vm, "after", row);
    }

    /// Whether the VM runs. If it does not, what a killed backup left is cleaned up at least.
    fn find(&self, vm: &Vm, runner: Runner<'_>, row: &mut VmRow) -> Found {
        let Some(Ok(address)) = vm.text("qmp").map(Address::parse) else {
            return Found::Backup(How::Offline);
        };
        if !Socket::is_dead(&address) {
            return Found::Backup(How::Running);
        }
        let off = off(&address);
        if vm.text("when_off") == Some("offline") {
            return Found::Backup(How::Offline);
        }
        // With another state folder, which only that owner may look into, the next backup does it.
        if !self.dry_run
            && !vm.is_on("as_owner")
            && journal::pending(self.state, &address).is_ok_and(|p| p.is_some())
        {
            let mut line = self.line(vm, "recover");
            line.extend(["--qmp".into(), vm.text("qmp").unwrap_or_default().into()]);
            line.extend(["--progress".into(), "json".into()]);
            row.took("recover", runner.fleecefs(Prints::Events, &line));
        }
        match off {
            Ok(why) => Found::Off(why),
            Err(e) => Found::Wrong(StepError::from(&e)),
        }
    }

    /// The begin of a command line.
    fn line(&self, vm: &Vm, command: &str) -> Vec<OsString> {
        let mut line: Vec<OsString> = Vec::new();
        if vm.is_on("as_owner") {
            line.push("--as-owner".into());
        }
        line.push(command.into());
        if ["prune", "verify", "boot"].contains(&command) {
            line.extend(vm.target().map(|t| t.as_os_str().to_os_string()));
        }
        line.extend(["--state-dir".into(), self.state.into()]);
        line
    }

    fn backup_line(&self, vm: &Vm, how: How) -> Vec<OsString> {
        let mut line = self.line(vm, "backup");
        // Nobody looks at how far it is.
        line.extend(["--progress=json".into(), "--progress-interval=3600".into()]);
        line.extend(vm.backup(how));
        line
    }

    fn steps(&self, vm: &Vm, how: How, runner: Runner<'_>, row: &mut VmRow) {
        let line = self.backup_line(vm, how);
        // Names and manifests of new points have later times than this.
        let since = jiff::Timestamp::now().as_second();
        let is_good = row.took("backup", runner.fleecefs(Prints::Events, &line)).is_some();
        if row.points.is_empty() {
            return;
        }
        let is_verified = self.verify(vm, since, runner, row);
        let is_up = is_verified && self.boot(vm, runner, row);
        // What is doubtful deletes nothing.
        if is_good && is_up && vm.has_rules() {
            self.prune(vm, runner, row);
        }
    }

    fn verify(&self, vm: &Vm, since: i64, runner: Runner<'_>, row: &mut VmRow) -> bool {
        let how = vm.text("verify").unwrap_or("quick");
        if how == "none" {
            return true;
        }
        let mut line = self.line(vm, "verify");
        line.extend(["--json".into(), format!("--since=@{since}").into()]);
        if how == "quick" {
            line.push("--quick".into());
        }
        line.extend(vm.options("verify"));
        row.took("verify", runner.fleecefs(Prints::Document, &line)).is_some()
    }

    fn boot(&self, vm: &Vm, runner: Runner<'_>, row: &mut VmRow) -> bool {
        let Some(run) = row.points.first().map(|p| p.run.clone()).filter(|_| vm.boots()) else {
            return true;
        };
        let mut line = self.line(vm, "boot");
        line.extend([run.into(), "--check".into(), "--json".into()]);
        line.extend(vm.options("boot"));
        row.took("boot --check", runner.fleecefs(Prints::Document, &line)).is_some()
    }

    fn prune(&self, vm: &Vm, runner: Runner<'_>, row: &mut VmRow) {
        let mut line = self.line(vm, "prune");
        line.push("--json".into());
        line.extend(vm.is_on("consolidate").then(|| OsString::from("--consolidate")));
        line.extend(self.dry_run.then(|| OsString::from("--dry-run")));
        line.extend(vm.options("prune"));
        if let Some(ended) = row.took("prune", runner.fleecefs(Prints::Document, &line)) {
            row.pruned = Some(pruned(&ended));
        }
    }

    /// What would be done.
    fn plan(&self, vm: &Vm, runner: Runner<'_>, row: &mut VmRow) {
        let how = match self.find(vm, runner, row) {
            Found::Backup(how) => how,
            Found::Off(why) => {
                row.skipped = Some(why);
                return;
            }
            Found::Wrong(e) => return row.fail("backup", e),
        };
        let mut line = self.backup_line(vm, how);
        line.push("--dry-run".into());
        let is_good = row.took("backup", runner.fleecefs(Prints::Document, &line)).is_some();
        if is_good && vm.has_rules() && vm.target().is_some_and(is_there) {
            self.prune(vm, runner, row);
        }
    }
}

/// Whether a VM's run has begun.
enum Begun {
    Skipped(String),
    Locked(Option<Lock>),
}

/// Runs what has to run whatever came of the rest, and also where the night is to end.
fn last_hook(vm: &Vm, key: &'static str, row: &mut VmRow) {
    let runner = in_any_case(&vm.name, HOOK_TIME, GRACE);
    if let Err(e) = hooks::run(runner, vm.commands(key), key, row) {
        row.fail(key, StepError::from(&e));
    }
}

/// Whether there is something at `target`, as far as it answers.
fn is_there(target: &Path) -> bool {
    let path = target.to_path_buf();
    folder::within(PATIENCE, move || Ok(folder::exists(&path))).unwrap_or(false)
}

/// Why nobody answers at `address`: the VM is shut off.
///
/// # Errors
/// `NotFound` where the folder of the socket is not there either: more likely its name is wrong.
fn off(address: &Address) -> Result<String> {
    let Address::Unix(path) = address else {
        return Ok(format!("it is shut off (nobody listens at {address})"));
    };
    if folder::exists(path) {
        return Ok(format!("it is shut off (nobody listens at {})", path_text(path)));
    }
    match path.parent() {
        Some(above) if folder::resolve(above).is_err() => {
            Err(Error::new(Kind::NotFound, "the folder of its QMP socket is not there")
                .at_path(path)
                .remedy("correct 'qmp'; a VM that is off for long gets 'enabled = false'"))
        }
        _ => Ok(format!("it is shut off (there is no socket {})", path_text(path))),
    }
}

fn outside_hours(vm: &Vm) -> Option<String> {
    let hours = vm.hours()?;
    let now = jiff::Zoned::now();
    let minute = u32::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).unwrap_or(0);
    let text = vm.text("hours").unwrap_or_default();
    (!hours.has(minute)).then(|| format!("outside of its hours ({text})"))
}

/// How many points a plan deletes or merges.
fn pruned(ended: &Ended) -> u64 {
    let list = |v: &serde_json::Value, key: &str| {
        v.get(key).and_then(|l| l.as_array()).cloned().unwrap_or_default()
    };
    let goes = |point: &serde_json::Value| {
        let keep = list(point, "keep");
        keep.is_empty() || keep.iter().any(|reason| reason.get("merged-into").is_some())
    };
    let disks = ended.out.iter().flat_map(|plan| list(plan, "disks"));
    disks.flat_map(|disk| list(&disk, "points")).filter(goes).count() as u64
}
