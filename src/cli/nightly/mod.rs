//! `fleecefs backup --all` and `--vm`: what a night does for the VMs of the configuration.
//!
//! Each VM's steps are processes of this program (`child`), so that one that hangs or dies ends no other. `one_vm` knows
//! their order, `schedule` who runs beside whom, `hooks` the commands of the configuration; what came of a VM is a `row`,
//! and `summary` prints all of them; `told` keeps for the history what no step did. `standing` tells systemd how far it is;
//! `after` tells others what came of it, by `mail` too.

mod after;
mod args;
mod child;
mod hooks;
mod mail;
mod one_vm;
mod row;
mod schedule;
mod standing;
mod summary;
mod told;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

pub(super) use args::{ConfiguredArgs, apart};

use super::config_file::{Program, tell, wrong};
use super::work::undo_flag;
use crate::backup::state::lock::state_folder;
use crate::config::{Config, Vm};
use crate::error::{Error, Kind, Result};
use crate::folder::Lock;
use one_vm::Night;
use row::VmRow;

/// The lock of `--all`.
const LOCK: &str = "configured.lock";

/// What the command line says besides.
pub(super) struct Wanted {
    /// Nothing is changed.
    pub dry_run: bool,
    /// A VM that is skipped is an error.
    pub strict: bool,
    /// The state folder.
    pub state: PathBuf,
}

/// Runs `fleecefs backup --all` or `--vm`.
///
/// # Errors
/// `Usage` if the configuration is wrong for all VMs; `Busy` if another `--all` is at work; as [`summary::verdict`].
pub(super) fn run(args: &ConfiguredArgs, wanted: &Wanted, program: Program) -> Result<()> {
    let config = args.file.read(program)?;
    let mut rows = Vec::new();
    let result = all(args, wanted, &config, &mut rows);
    if !wanted.dry_run {
        after::tell(&config, &wanted.state, &rows, result.as_ref().err());
    }
    result
}

/// What came of each VM is in `rows`; none where nothing was begun.
fn all(
    args: &ConfiguredArgs,
    wanted: &Wanted,
    config: &Config,
    rows: &mut Vec<VmRow>,
) -> Result<()> {
    config.notes.iter().for_each(|note| log::warn!("{note}"));
    let common = config.common_problems();
    if !common.is_empty() {
        tell(&common);
        return Err(wrong(common.len()));
    }
    let vms = chosen(config, args)?;
    let _lock = match args.all && !wanted.dry_run {
        true => Some(lock(&wanted.state)?),
        false => None,
    };
    let flag = undo_flag()?;
    let night = Night { state: &wanted.state, stop: &flag, dry_run: wanted.dry_run };
    let standing = standing::Standing::new(vms.len());
    let asked = args.parallel.map(usize::from).or(config.parallel);
    // Who says how many knows the disks.
    let apart = vms.iter().map(|vm| vm.target().filter(|_| asked.is_none()).map(Path::to_path_buf));
    let jobs = schedule::file_systems(&apart.collect::<Vec<_>>()).into_iter().zip(vms);
    let workers = asked.unwrap_or(schedule::USUAL);
    let run = |vm: &Vm| {
        standing.begins(&vm.name);
        let row = night.back_up(vm, &config.problems_of(&vm.name));
        told::keep(&night, vm, &row);
        standing.ends(&vm.name, !row.failures.is_empty());
        row
    };
    *rows = schedule::side_by_side(jobs.collect(), workers, run);
    summary::show(rows, wanted.dry_run, args.json)?;
    summary::verdict(rows, (wanted.strict, flag.load(Ordering::Relaxed)))
}

/// The VMs that are asked for.
fn chosen<'a>(config: &'a Config, args: &ConfiguredArgs) -> Result<Vec<&'a Vm>> {
    if args.all {
        let vms: Vec<&Vm> = config.vms.iter().filter(|vm| vm.is_enabled()).collect();
        return match vms.is_empty() {
            false => Ok(vms),
            true => Err(Error::new(Kind::NotFound, "the configuration has no VM that is enabled")),
        };
    }
    let mut vms: Vec<&Vm> = Vec::new();
    for name in &args.vm {
        let vm = config.vm(name)?;
        if !vms.iter().any(|v| v.name == vm.name) {
            vms.push(vm);
        }
    }
    Ok(vms)
}

fn lock(state: &Path) -> Result<Lock> {
    let folder = state_folder(state)?;
    let failed = |e| Error::io(e, "cannot take the lock").at_path(folder.join(LOCK));
    folder.lock(LOCK).map_err(failed)?.ok_or_else(|| {
        Error::new(Kind::Busy, "another 'backup --all' is running").at_path(folder.join(LOCK))
    })
}
