//! `fleecefs mount`.

pub(super) mod args;
pub(super) mod helper;
mod options;

use args::MountArgs;

use super::{paths, verbosity};
use crate::error::Result;
use crate::fuse::Access;
use crate::mount;
use crate::mount::{Files, Options, Plan, Writable};

/// Runs `fleecefs mount`; with `as_owner`, the directory's owner serves it.
///
/// # Errors
/// As the exit codes say.
pub(super) fn run(mut args: MountArgs, as_owner: bool) -> Result<()> {
    for list in std::mem::take(&mut args.options) {
        options::apply(&mut args, &list)?;
    }
    let (access, files, writable) = (access(&args)?, files(&args)?, writable(&args)?);
    let plan = Plan::new(&Options {
        backups: args.backups,
        mountpoint: args.mountpoint,
        access,
        uid: args.uid,
        gid: args.gid,
        mode: args.mode,
        cache_size: args.cache_size,
        files,
        writable,
        threads: args.threads.map(usize::from),
        idle_timeout: args.idle_timeout,
        poll_interval: args.poll_interval,
        as_owner,
    })?;
    let log = args.log_file.as_deref().map(paths::log_file).transpose()?;
    mount::run(&plan, args.foreground, log)
}

fn files(args: &MountArgs) -> Result<Option<Files>> {
    match (args.files, args.squash) {
        (false, true) => {
            Err(verbosity::usage("--squash needs --files (with -o: squash needs files)"))
        }
        (true, squash) => Ok(Some(Files { squash })),
        (false, false) => Ok(None),
    }
}

fn writable(args: &MountArgs) -> Result<Option<Writable>> {
    let Some(scratch) = args.writable.clone() else {
        return match (args.keep, args.scratch_size, args.mode.unwrap_or(0) & 0o222) {
            (false, None, 0) => Ok(None),
            (true, ..) => Err(verbosity::usage(
                "--keep needs --writable=FOLDER, in which what is written is kept (with -o: keep needs writable=FOLDER)",
            )),
            (_, Some(_), _) => Err(verbosity::usage(
                "--scratch-size needs --writable (with -o: scratch-size needs writable)",
            )),
            _ => Err(verbosity::usage(
                "a --mode with write permission needs --writable (with -o: mode needs writable)",
            )),
        };
    };
    Ok(Some(Writable { scratch, limit: args.scratch_size, keep: args.keep }))
}

fn access(args: &MountArgs) -> Result<Access> {
    match (args.allow_other, args.allow_root) {
        (true, true) => Err(verbosity::usage("allow_other and allow_root exclude each other")),
        (true, false) => Ok(Access::Everybody),
        (false, true) => Ok(Access::Root),
        (false, false) => Ok(Access::Owner),
    }
}
