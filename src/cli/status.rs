//! `fleecefs info status`, and which run it, `recover` and `cancel` are about.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::paths;
use super::shared::{JsonArgs, QmpArgs, qmp_unless};
use super::state::StateArgs;
use super::watch;
use crate::backup::offline;
use crate::backup::state::control::Status;
use crate::backup::state::{control, journal};
use crate::backup::target::detect::has_backups;
use crate::backup::target::reachable;
use crate::error::{Error, Kind, Result};
use crate::qmp::Address;
use crate::text::{path_text, to_text};
use crate::units::iso_time;
use crate::{folder, output};

/// Which VM's run, or which target's of a VM that is shut off.
#[derive(Debug, Args)]
#[command(mut_args(qmp_unless("target", "; as the backup was given it")))]
pub(super) struct RunArgs {
    #[command(flatten)]
    qemu: QmpArgs,

    /// The backup directory of a backup --offline, which has no QMP socket
    #[arg(short, long, value_name = "DIR", conflicts_with = "qmp")]
    target: Option<PathBuf>,
}

impl RunArgs {
    /// Where the QEMU of the run listens, or that of the qemu-storage-daemon of --offline.
    ///
    /// # Errors
    /// `Usage` if that is no address; a path that cannot be followed.
    pub(super) fn vm(&self, state: &Path) -> Result<Address> {
        match &self.target {
            Some(target) => {
                reachable::check_answers(target)?;
                offline::address(state, &paths::to_make(target)?)
            }
            None => self.qemu.address(),
        }
    }

    /// The backup directory, if it is named.
    pub(super) fn target(&self) -> Option<&Path> {
        self.target.as_deref()
    }

    /// Whether one is named.
    fn is_given(&self) -> bool {
        self.target.is_some() || self.qemu.qmp.is_some()
    }

    /// Whether it is about a VM that is shut off.
    pub(super) fn is_offline(&self) -> bool {
        self.target.is_some()
    }

    /// What to say to whoever wants to end a backup that no longer runs; it may have left something.
    ///
    /// # Errors
    /// What it has left cannot be read.
    pub(super) fn nothing_to_end(&self, state: &StateArgs, vm: &Address) -> Result<Error> {
        Ok(match journal::pending(&state.dir()?, vm)? {
            Some(left) => {
                Error::new(Kind::NotFound, what_is_left(&left)).remedy(self.how_to_recover(state))
            }
            None => self.not_running(vm),
        })
    }

    /// How the rest of an interrupted backup is cleaned up.
    fn how_to_recover(&self, state: &StateArgs) -> String {
        let of = match (&self.target, &self.qemu.qmp) {
            (Some(target), _) => format!("--target {}", path_text(target)),
            (None, qmp) => format!("--qmp {}", path_text(&qmp.clone().unwrap_or_default())),
        };
        let owner = if state.is_owners() { "--as-owner " } else { "" };
        let state = state.given().map(|d| format!(" --state-dir {}", path_text(d)));
        let state = state.unwrap_or_default();
        format!("'fleecefs {owner}recover {of}{state}' or the next backup cleans up")
    }

    /// Fails if nobody can be there who runs: a VM's socket is gone, a backup directory is none. One that was just
    /// begun has its lock already.
    pub(super) fn check_there(&self, vm: &Address) -> Result<()> {
        let is_none = match &self.target {
            Some(target) => !has_backups_at(target),
            None => !is_there(vm),
        };
        if is_none { Err(self.not_running(vm)) } else { Ok(()) }
    }

    /// What to say where no backup runs: a VM is known by its socket, so a mistyped one is another.
    pub(super) fn not_running(&self, vm: &Address) -> Error {
        if let Some(target) = &self.target {
            let what = "no backup --offline to this backup directory is running";
            let remedy = match has_backups_at(target) {
                true => "if that backup used another --state-dir, give the same here",
                false => {
                    "there are no backups: check the path, and that its file system is mounted"
                }
            };
            return Error::new(Kind::NotFound, what).at_path(target).remedy(remedy);
        }
        let e = Error::new(Kind::NotFound, "no backup of this VM is running");
        match vm {
            Address::Unix(p) if !is_there(vm) => {
                e.at_path(p).remedy("no such socket: give the same --qmp as for the backup")
            }
            _ => e.remedy("if that backup used another --qmp or --state-dir, give the same here"),
        }
    }
}

/// What `info status` is about.
#[derive(Debug, Args)]
#[command(mut_args(qmp_unless("watch", "")))]
pub(super) struct StatusArgs {
    #[command(flatten)]
    of: RunArgs,

    /// Show all running backups of this user on this host (with --qmp or --target: that one) until Ctrl-C: bars on a
    /// terminal, lines elsewhere; every so many seconds, without a number every second
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", require_equals = true,
        conflicts_with = "json", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,

    #[command(flatten)]
    print: JsonArgs,

    #[command(flatten)]
    state: StateArgs,
}

impl StatusArgs {
    /// The backup directory, if it is named.
    pub(super) fn target(&self) -> Option<&Path> {
        self.of.target()
    }

    /// Whether it prints JSON.
    pub(super) fn json(&self) -> bool {
        self.print.json
    }

    /// Where the state is.
    pub(super) fn state(&mut self) -> &mut StateArgs {
        &mut self.state
    }
}

/// A run that did not end in order.
#[derive(Debug, Serialize)]
struct Unfinished {
    /// That it has to be recovered.
    state: &'static str,
    /// Its id; empty if only disks of runs before are left.
    run: String,
    /// Its backup directory.
    target: PathBuf,
}

/// Runs `fleecefs info status`.
///
/// # Errors
/// The run does not answer; `NotFound` if nobody can be there who runs.
pub(super) fn run(args: &StatusArgs) -> Result<()> {
    let state = args.state.dir()?;
    if let Some(seconds) = args.watch {
        let one = args.of.is_given().then(|| args.of.vm(&state)).transpose()?;
        return watch::run(&state, one.as_ref(), Duration::from_secs(seconds));
    }
    let vm = args.of.vm(&state)?;
    if let Some(s) = control::ask(&state, &vm, "status")? {
        return match args.print.json {
            true => output::print(&output::json_document(&running(&s))?),
            false => output::print_sentences(&text(&s)),
        };
    }
    if let Some(left) = journal::pending(&state, &vm)? {
        let what = what_is_left(&left);
        let left = Unfinished { state: "interrupted", run: left.run, target: left.target };
        return match args.print.json {
            true => output::print(&output::json_document(&left)?),
            false => {
                let how = args.of.how_to_recover(&args.state);
                output::print_sentences(&format!("{what}: {how}\n"))
            }
        };
    }
    // Whoever watches a socket that is not there has mistyped it, or the VM is off.
    args.of.check_there(&vm)?;
    match args.print.json {
        true => output::print(&output::json_document(&json!({"state": "none"}))?),
        false => output::print_sentences(&format!("{}\n", args.of.not_running(&vm).report())),
    }
}

/// A running backup as JSON: levels and times are as everywhere.
fn running(s: &Status) -> Value {
    let disks = s.disks.iter().map(|d| {
        json!({"disk": d.disk, "level": d.level.to_ascii_lowercase(), "state": d.state,
            "copied": d.copied, "done": d.done, "total": d.total})
    });
    json!({"state": "running", "run": s.run, "pid": s.pid, "started": iso_time(s.started),
        "target": to_text(s.target.as_os_str()), "phase": s.phase,
        "disks": disks.collect::<Vec<_>>()})
}

/// What a run has left that did not end in order.
fn what_is_left(left: &journal::Pending) -> String {
    match left.run.as_str() {
        "" => "an interrupted backup has left unfinished images".to_string(),
        run => format!(
            "no backup is running; backup {} to {} was interrupted",
            path_text(&run),
            path_text(&left.target)
        ),
    }
}

fn text(s: &Status) -> String {
    let mut text = String::new();
    output::push_line(&mut text, format!("run {} (process {}): {}", s.run, s.pid, s.phase));
    for d in &s.disks {
        output::push_line(&mut text, format!("  {}", watch::line(d)));
    }
    text
}

fn has_backups_at(target: &Path) -> bool {
    paths::backups(target).is_ok_and(|real| has_backups(&real))
}

fn is_there(vm: &Address) -> bool {
    !matches!(vm, Address::Unix(p) if folder::resolve(p).is_err())
}
