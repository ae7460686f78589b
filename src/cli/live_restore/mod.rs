//! `fleecefs live-restore`: a VM runs again from its backup, and its disks are copied to new storage.
//!
//! - `args`: the options; `plan`: from a run to what is begun

mod args;
mod plan;

use std::path::Path;

use serde_json::json;

use self::plan::{Planned, bases_of, plan};
use super::console::Console;
use super::one_run::OneRun;
use super::paths::{backups, catalog, to_make};
use super::{one_run, unsound, work};
use crate::backup::Watch;
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::live::mark;
use crate::live::{self, Bases, Begun, Live, NewDisk, Stage, Storage, Surroundings};
use crate::lock::Locks;
use crate::mount::check_outside;
use crate::output;
use crate::text::{path_text, to_text};
use crate::verify::last_verified::Memory;
pub(super) use args::LiveRestoreArgs;

/// What nobody but the user can do after a failure.
const GOES_ON: &str = "these points are what this folder's VM was started from: name no run to go on, or another folder";

/// Runs `fleecefs live-restore`.
///
/// # Errors
/// As the exit codes say.
pub(super) fn run(args: &LiveRestoreArgs) -> Result<()> {
    let to = to_make(&args.to)?;
    if let Ok(root) = backups(&args.dir) {
        check_outside(&to, &root)?;
    }
    if args.print {
        return print(args, &to);
    }
    let console = args.show.console()?;
    let done = watched(args, &to, &console);
    console.finish();
    done.inspect_err(|e| console.log_error(e))
}

fn watched(args: &LiveRestoreArgs, to: &Path, console: &Console) -> Result<()> {
    // A folder that is not there is made once all is checked that can be checked without it.
    let early = match folder::exists(to) {
        true => None,
        false => Some(chosen(args, to, console)?),
    };
    let storage = Storage::open(to)?;
    let cancel = work::undo_flag()?;
    let s =
        Surroundings { storage: &storage, watch: console, cancel: &cancel, rate: args.rate_limit };
    let (live, _locks) = match storage.begun()? {
        Some((begun, Stage::Done)) if live::is_running(&storage)? => {
            live::unprotect(&s, &begun);
            console.say("all disks are copied already, and the VM is running: nothing to do");
            return tell_result(console, &storage, &begun);
        }
        Some((begun, Stage::Started | Stage::Done)) => go_on(args, &s, begun)?,
        Some((_, Stage::Prepared)) | None => {
            let chosen = early.map_or_else(|| chosen(args, storage.path(), console), Ok)?;
            begin(&s, chosen, console)?
        }
    };
    tell_start(console, &live);
    let begun = live.begun().clone();
    live::finish(&s, live)?;
    console.say("all disks are copied: nothing refers to the backup any more");
    tell_result(console, &storage, &begun)
}

/// What is to be started, while nobody changes the backup.
struct Chosen {
    planned: Planned,
    locks: Option<Locks>,
}

/// The VM of the run that is asked for, with its disks in the folder `to`, which need not be there yet.
fn chosen(args: &LiveRestoreArgs, to: &Path, console: &Console) -> Result<Chosen> {
    let locks = keep(&backups(&args.dir)?, console)?;
    let catalog = catalog(&args.dir)?;
    let run = one_run::find(&catalog, &args.points)?;
    if !args.force {
        check_sound(&args.state.dir()?, &catalog, &run)?;
    }
    warn_of_service(console);
    let planned = plan(args, &catalog, &run, to)?;
    mark::check_first(&planned.begun, to)?;
    Ok(Chosen { planned, locks })
}

/// Starts the VM of a run.
fn begin(s: &Surroundings<'_>, chosen: Chosen, console: &Console) -> Result<(Live, Option<Locks>)> {
    let Chosen { planned, locks } = chosen;
    planned.notes.iter().for_each(|note| console.say(note));
    let bases = planned.bases()?;
    Ok((live::start(s, planned.begun, bases)?, locks))
}

/// Goes on with what was begun.
fn go_on(
    args: &LiveRestoreArgs,
    s: &Surroundings<'_>,
    begun: Begun,
) -> Result<(Live, Option<Locks>)> {
    s.storage.check_own(&begun)?;
    for option in args.asked().iter().filter(|o| !begun.asked.contains(o)) {
        s.watch.warn(&format!("{option}: ignored: the VM goes on as it was started"));
    }
    let mut needing: Vec<&NewDisk> = Vec::new();
    for disk in &begun.disks {
        if s.storage.needs_backup(&begun, disk)? {
            needing.push(disk);
        }
    }
    // Without one that needs it the backup may be gone.
    let (bases, locks) = match needing.is_empty() {
        true => (Bases::new(), None),
        false => {
            let locks = keep(&backups(&args.dir)?, s.watch)?;
            let catalog = catalog(&args.dir)?;
            check_same(args, &catalog, &begun)?;
            (bases_of(&catalog, &begun, &needing)?, locks)
        }
    };
    Ok((live::resume(s, begun, bases)?, locks))
}

/// Fails for a point of which `verify` has found an error.
fn check_sound(state: &Path, catalog: &Catalog, run: &OneRun<'_>) -> Result<()> {
    let memory = Memory::read(state, catalog);
    let otherwise = "--force starts the VM all the same";
    let mut found =
        run.points.iter().filter_map(|c| unsound::found(&memory, c.disk, c.point, otherwise));
    found.next().map_or(Ok(()), Err)
}

/// A service's processes end with it, QEMU among them.
fn warn_of_service(watch: &dyn Watch) {
    let groups = folder::system::text(Path::new("/proc/self/cgroup")).unwrap_or_default();
    if groups.lines().any(|line| line.ends_with(".service")) {
        let what = "this is a systemd unit, and the VM ends with it";
        watch.warn(&format!("{what}: call it by 'systemd-run --scope'"));
    }
}

/// A run that is named has to be the one that was begun; the newest may be another by now.
fn check_same(args: &LiveRestoreArgs, catalog: &Catalog, begun: &Begun) -> Result<()> {
    let newest = args.points.is_empty() || args.points == [Path::new("latest")];
    if newest {
        return Ok(());
    }
    let run = one_run::find(catalog, &args.points)?;
    let is_one = |disk: &Path, name: &str| {
        let disk = to_text(disk.as_os_str());
        begun.disks.iter().any(|d| d.point.disk == disk && d.point.name == name)
    };
    let mut other = run.points.iter().map(|c| (c.disk, &c.disk.points[c.point]));
    match other.find(|(disk, point)| !is_one(&disk.path, &point.name)) {
        None => Ok(()),
        Some((disk, point)) => {
            let what = "the VM of this folder was started from another point";
            Err(Error::new(Kind::Usage, what).at_path(disk.path.join(&point.name)).remedy(GOES_ON))
        }
    }
}

/// Keeps away whoever changes backups in place. Where there can be no lock, that is told.
fn keep(root: &Path, watch: &dyn Watch) -> Result<Option<Locks>> {
    match Locks::take(root) {
        Ok(locks) => Ok(Some(locks)),
        Err(e) if e.kind() == Kind::Busy => Err(e),
        Err(e) => {
            let what = "nothing keeps 'prune' and others from changing the backup meanwhile";
            watch.warn(&format!("{what}: {}", e.report()));
            Ok(None)
        }
    }
}

fn tell_start(console: &Console, live: &Live) {
    let (backup, agent) = (live.backup_socket(), live.agent_socket());
    let seconds = live.started.map(|took| took.as_secs_f64());
    let text = match seconds {
        Some(seconds) => format!("the VM is running, after {seconds:.1} s"),
        None => "the VM is already running".into(),
    };
    console.say(&format!(
        "{text}; its sockets: --qmp {} --agent {}",
        path_text(&backup),
        path_text(&agent)
    ));
    console.event(&json!({
        "event": "running", "seconds": seconds,
        "qmp": to_text(backup.as_os_str()), "agent": to_text(agent.as_os_str()),
    }));
}

fn tell_result(console: &Console, storage: &Storage, begun: &Begun) -> Result<()> {
    let disks = begun.disks.iter().map(|d| {
        let file = to_text(storage.path().join(&d.file).as_os_str());
        json!({"disk": d.point.disk, "point": d.point.name, "file": file})
    });
    console.event(&json!({
        "event": "result", "format_version": output::JSON_VERSION,
        "disks": disks.collect::<Vec<_>>(),
    }));
    Ok(())
}

/// Prints what does the same.
fn print(args: &LiveRestoreArgs, to: &Path) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let run = one_run::find(&catalog, &args.points)?;
    let Planned { begun, graphs, .. } = plan(args, &catalog, &run, to)?;
    live::check_empty(to, &begun)?;
    let lines = live::shown(to, &begun, &graphs)?;
    output::written_by_others(|out| writeln!(out, "{}", lines.join("\n")))
}
