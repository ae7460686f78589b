//! `fleecefs recover`, `cancel` and the hidden `guardian`.

use clap::Args;

use super::backup::{ShowArgs, StateArgs};
use super::info;
use super::output;
use crate::backup::lock::Lock;
use crate::backup::recover::{Cause, Place, Recovered};
use crate::backup::{Watch as _, control, foreign, guardian, journal, recover};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::qmp::{Address, Client};
use crate::text::path_text;
use crate::units::counted;

/// Finish what a killed backup left in QEMU, in the guest and on disk
///
/// The next backup does this by itself; this is for doing it now.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// QEMU's QMP socket: a path, or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET", visible_alias = "socket")]
    qmp: String,

    /// The guest agent's socket, if it is another than the killed backup was given
    #[arg(long, value_name = "SOCKET")]
    agent: Option<String>,

    /// Also remove what a killed qmpbackup left
    #[arg(long)]
    foreign: bool,

    /// Give up what cannot be done: unfinished images in targets that cannot be reached, and
    /// thawing a guest whose agent does not answer
    #[arg(long)]
    forget: bool,

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
    let state = args.state.dir()?;
    let console = args.show.console()?;
    let _lock = Lock::vm(&state, &vm)?;
    if let Some(pending) = journal::pending(&state, &vm)?
        && folder::is_folder(&pending.target)
    {
        super::writing::warn_of_others(&pending.target)?;
    }
    let cause = if args.forget { Cause::Forget } else { Cause::Command };
    let agent = args.agent.as_deref().map(Address::parse).transpose()?;
    let place = Place { state: &state, vm: &vm, cause, agent: agent.as_ref() };
    let mut client = match Client::connect(&vm) {
        Err(e) if matches!(e.kind(), Kind::Peer | Kind::NotFound) => {
            return verdict(&recover::recover_offline(place, &console, e)?);
        }
        other => other?,
    };
    let _qemu_lock = Lock::qemu(&state, &client)?;
    let done = recover::recover(&mut client, place, &console)?;
    let foreign = if args.foreign { foreign::remove(&mut client, &console)? } else { 0 };
    if done.done == 0 && done.left == 0 && foreign == 0 {
        console.say("nothing to recover");
    }
    verdict(&done)
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
pub fn cancel(args: CancelArgs) -> Result<()> {
    let vm = Address::parse(&args.qmp)?;
    match control::ask(&args.state.dir()?, &vm, "cancel")? {
        Some(s) => {
            output::print(&format!("backup {} (process {}) is ending\n", path_text(&s.run), s.pid))
        }
        None => Err(info::not_running(&vm)),
    }
}

/// Runs `fleecefs guardian`.
///
/// # Errors
/// As [`guardian::serve`].
pub fn guard(_args: GuardianArgs) -> Result<()> {
    guardian::serve()
}
