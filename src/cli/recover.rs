//! `fleecefs recover`, `cancel` and the hidden `guardian`.

use clap::Args;

use super::backup::{ShowArgs, StateArgs};
use crate::backup::lock::Lock;
use crate::backup::{Watch, control, guardian, recover};
use crate::error::{Error, Kind, Result};
use crate::qmp::{Address, Client};

/// Finish what a killed backup left in QEMU, in the guest and on disk
///
/// The next backup does this by itself; this is for doing it now.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// QEMU's QMP socket: a path, or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    qmp: String,

    /// Also remove what a killed qmpbackup left
    #[arg(long)]
    foreign: bool,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    show: ShowArgs,
}

/// End a running backup
///
/// The disks that are not finished keep their last point; nothing is lost.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The QMP socket that the backup was given
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    qmp: String,

    #[command(flatten)]
    state: StateArgs,
}

/// For fleecefs itself: continues and thaws a guest whose backup died
#[derive(Debug, Args)]
pub struct GuardianArgs {}

/// Runs `fleecefs recover`.
///
/// # Errors
/// QEMU cannot be reached or refuses.
pub fn run(args: RecoverArgs) -> Result<()> {
    let vm = Address::parse(&args.qmp)?;
    let state = args.state.dir();
    let console = args.show.console()?;
    let _lock = Lock::vm(&state, &vm)?;
    let mut client = match Client::connect(&vm) {
        Err(e) if matches!(e.kind(), Kind::Peer | Kind::NotFound) => {
            return offline(&vm, &state, &console, e);
        }
        other => other?,
    };
    let runs = recover::recover(&mut client, &state, &vm, &console)?;
    let foreign = if args.foreign { recover::remove_foreign(&mut client, &console)? } else { 0 };
    if runs == 0 && foreign == 0 {
        console.say("nothing to recover");
    }
    Ok(())
}

/// QEMU is gone and took nodes and jobs with it: only files are left.
fn offline(vm: &Address, state: &std::path::Path, console: &dyn Watch, why: Error) -> Result<()> {
    use crate::backup::journal;
    let Some(pending) = journal::pending(state, vm)? else { return Err(why) };
    console.say("QEMU is gone: only files are left to settle");
    recover::undo_offline(&pending, console)?;
    journal::remove(state, vm)
}

/// Runs `fleecefs cancel`.
///
/// # Errors
/// `NotFound` if no backup runs.
pub fn cancel(args: CancelArgs) -> Result<()> {
    let vm = Address::parse(&args.qmp)?;
    match control::ask(&args.state.dir(), &vm, "cancel")? {
        Some(s) => super::print(&format!("backup {} (process {}) is ending\n", s.run, s.pid)),
        None => Err(Error::new(Kind::NotFound, "no backup of this VM is running")),
    }
}

/// Runs `fleecefs guardian`.
///
/// # Errors
/// As [`guardian::serve`].
pub fn guard(_args: GuardianArgs) -> Result<()> {
    guardian::serve()
}
