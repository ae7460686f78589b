//! `fleecefs recover`, `cancel` and the hidden `watchdog`.

use std::path::Path;

use clap::Args;

use super::backup::ShowArgs;
use super::console::Console;
use super::recorded::Recorded;
use super::state::StateArgs;
use super::status::RunArgs;
use crate::backup::fleece::foreign;
use crate::backup::freeze::watchdog;
use crate::backup::recover::{RecoverCause, RecoverContext, Recovered};
use crate::backup::state::lock::Lock;
use crate::backup::state::{control, journal};
use crate::backup::target::reachable;
use crate::backup::{Watch as _, offline, recover};
use crate::error::{Error, Kind, Result};
use crate::history::Entry;
use crate::qmp::{Address, Client};
use crate::text::path_text;
use crate::units::counted;
use crate::{folder, output};

/// Clean up after a killed backup: in QEMU, in the guest and on disk
///
/// The next backup does this by itself; this does it now.
#[derive(Debug, Args)]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    of: RunArgs,

    /// The guest agent's socket, if it has changed since the killed backup
    #[arg(long, value_name = "SOCKET")]
    agent: Option<String>,

    /// Also remove what a killed qmpbackup left
    #[arg(long)]
    foreign: bool,

    /// Give up what cannot be done: removing unfinished images in targets that cannot be reached, and
    /// thawing a guest whose agent does not answer
    #[arg(long)]
    forget: bool,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    show: ShowArgs,
}

/// Stop a running backup
///
/// Disks that are not finished get no new point; nothing is lost.
#[derive(Debug, Args)]
pub(super) struct CancelArgs {
    #[command(flatten)]
    of: RunArgs,

    #[command(flatten)]
    state: StateArgs,
}

/// For fleecefs itself: continues and thaws a guest whose backup died
#[derive(Debug, Args)]
pub(super) struct GuardianArgs {}

impl RecoverArgs {
    /// Whether events are printed as JSON.
    pub(super) fn json(&self) -> bool {
        self.show.json()
    }

    /// The backup directory, if it is named.
    pub(super) fn target(&self) -> Option<&Path> {
        self.of.target()
    }

    /// Where its state is.
    pub(super) fn state(&mut self) -> &mut StateArgs {
        &mut self.state
    }
}

impl CancelArgs {
    /// The backup directory, if it is named.
    pub(super) fn target(&self) -> Option<&Path> {
        self.of.target()
    }

    /// Where its state is.
    pub(super) fn state(&mut self) -> &mut StateArgs {
        &mut self.state
    }
}

/// Runs `fleecefs recover`.
///
/// # Errors
/// QEMU cannot be reached or refuses.
pub(super) fn run(args: RecoverArgs) -> Result<()> {
    let (dir, state) = (args.target(), &args.state);
    let run = Recorded { command: "recover", dir, state, dry_run: false };
    run.run(|entry| act(&args, entry))
}

fn act(args: &RecoverArgs, entry: &mut Entry) -> Result<()> {
    let state = args.state.dir()?;
    let vm = args.of.vm(&state)?;
    entry.qmp = Some(vm.canonical()).filter(|_| !args.of.is_offline());
    entry.run =
        journal::pending(&state, &vm).ok().flatten().map(|p| p.run).filter(|r| !r.is_empty());
    let console = args.show.console()?;
    let lock = Lock::vm(&state, &vm)?;
    // Before all else, and whatever else cannot be read: the guest may be waiting.
    let first = one(args, (&state, &vm), &console);
    drop(lock);
    // Backups of the VM's disks while it was off have journals of their own.
    let off = match args.of.is_offline() {
        true => Vec::new(),
        false => offline::journals(&state, &vm).unwrap_or_else(|e| {
            log::warn!("backups of the shut-off VM are not checked: {}", e.report());
            Vec::new()
        }),
    };
    let mut done = match first {
        // Nobody answers, and nothing of a run that had that QEMU is left.
        Err(e) if is_gone(&e) && journal::pending(&state, &vm)?.is_none() => {
            match args.of.is_offline() || !off.is_empty() {
                true => Recovered::default(),
                false => return Err(e),
            }
        }
        other => other?,
    };
    for vm in &off {
        let _lock = Lock::vm(&state, vm)?;
        let more = one(args, (&state, vm), &console)?;
        done.done = done.done.saturating_add(more.done);
        done.left = done.left.saturating_add(more.left);
    }
    if done.done == 0 && done.left == 0 {
        if args.of.is_offline() {
            args.of.check_there(&vm)?;
        }
        let state = path_text(&state);
        console
            .say(&format!("nothing to recover (state folder {state}; --state-dir names another)"));
    }
    verdict(&done)
}

fn is_gone(e: &Error) -> bool {
    matches!(e.kind(), Kind::Peer | Kind::NotFound)
}

/// Recovers what runs on one QEMU left; its lock is held.
fn one(args: &RecoverArgs, (state, vm): (&Path, &Address), console: &Console) -> Result<Recovered> {
    let pending = journal::pending(state, vm)?;
    let done = recovered(args, (state, vm), console);
    // Not before: the target may hang, and the guest may wait.
    if let Some(pending) = pending
        && reachable::answers(&pending.target)
        && folder::is_folder(&pending.target)
    {
        super::writing::warn_of_others(&pending.target)?;
    }
    done
}

fn recovered(
    args: &RecoverArgs,
    (state, vm): (&Path, &Address),
    console: &Console,
) -> Result<Recovered> {
    let cause = if args.forget { RecoverCause::Forget } else { RecoverCause::Command };
    let agent = args.agent.as_deref().map(Address::parse).transpose()?;
    let place = RecoverContext { state, vm, cause, agent: agent.as_ref() };
    let mut client = match Client::connect(vm) {
        Err(e) if is_gone(&e) => return recover::recover_offline(place, console, e),
        other => other?,
    };
    let _qemu_lock = Lock::qemu(state, &client)?;
    let mut done = recover::recover(&mut client, place, console)?;
    if args.foreign {
        done.done = done.done.saturating_add(foreign::remove(&mut client, console)?);
    }
    Ok(done)
}

fn verdict(done: &Recovered) -> Result<()> {
    if done.left == 0 {
        return Ok(());
    }
    let what = format!(
        "in targets that cannot be reached: {}",
        counted(done.left as u64, "unfinished image")
    );
    Err(Error::new(Kind::NotFound, what)
        .remedy("mount the targets and run fleecefs recover again, or give up with --forget"))
}

/// Runs `fleecefs cancel`.
///
/// # Errors
/// `NotFound` if no backup runs.
pub(super) fn cancel(args: CancelArgs) -> Result<()> {
    let state = args.state.dir()?;
    let vm = args.of.vm(&state)?;
    match control::ask(&state, &vm, "cancel")? {
        Some(s) => output::print_sentences(&format!(
            "stopping backup {} (process {})\n",
            path_text(&s.run),
            s.pid
        )),
        None => Err(args.of.nothing_to_end(&args.state, &vm)?),
    }
}

/// Runs `fleecefs guardian`.
///
/// # Errors
/// As [`watchdog::serve`].
pub(super) fn guard(_args: GuardianArgs) -> Result<()> {
    watchdog::serve()
}
