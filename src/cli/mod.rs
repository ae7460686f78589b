//! The command line: arguments in `args`, one file per subcommand, exit codes from
//! [`crate::error::Kind::table`].

mod args;
mod backup;
mod bar;
mod console;
mod consolidate;
mod daemon;
mod docs;
mod holders;
mod info;
mod keeper;
mod link_disk;
mod list;
mod logging;
mod map;
mod mount;
mod mountinfo;
mod options;
mod output;
mod paths;
mod privileges;
mod prune;
mod recover;
mod restore;
mod runs;
mod serve;
mod show;
mod status;
mod umount;
mod users;
mod values;
mod verbs;
mod verify;
mod work;
mod writing;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};

use clap::Parser;

use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::text::{is_hidden, path_text, visible};
use args::{Cli, Command};
use options::Helper;

/// Runs the program and says how it ended.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let parsed = match options::helper(&args) {
        Helper::No => parse(args),
        Helper::Run(args) => parse(args),
        Helper::Nothing => return ExitCode::SUCCESS,
    };
    let cli = match parsed {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    init_logging(&cli);
    serve::raise_file_limit();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            output::tell_error(&e);
            ExitCode::from(e.kind().exit_code())
        }
    }
}

/// The command line; where there is nothing to run, the exit code after what clap has to say.
fn parse(args: Vec<OsString>) -> std::result::Result<Cli, ExitCode> {
    Cli::try_parse_from(&args).map_err(|e| {
        // It quotes arguments as they are, and a shell may have found them in a folder: it is asked
        // once more, with arguments that can be shown.
        let shown = args.iter().map(|a| if is_plain(a) { a.clone() } else { path_text(a).into() });
        match Cli::try_parse_from(shown) {
            // There is nobody to tell if it fails.
            Err(e) => drop(e.print()),
            Ok(_) => output::tell(&format!("error: {}\n", e.kind())),
        }
        ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
    })
}

/// Whether an argument can be shown as it is.
fn is_plain(arg: &OsStr) -> bool {
    arg.to_str().is_some_and(|text| !text.chars().any(is_hidden))
}

fn run(mut cli: Cli) -> Result<()> {
    if cli.as_owner {
        become_owner(&mut cli.command)?;
    }
    match cli.command {
        Command::Backup(a) => backup::run(&a),
        Command::Info(a) => info::run(a),
        Command::Cleanup(a) => info::cleanup(a),
        Command::Recover(a) => recover::run(a),
        Command::Cancel(a) => recover::cancel(a),
        Command::Guardian(a) => recover::guard(a),
        Command::Mount(a) => mount::mount(a, cli.as_owner),
        Command::Umount(a) => umount::umount(a),
        Command::List(a) => list::run(a),
        Command::Show(a) => show::run(a),
        Command::Map(a) => map::run(a),
        Command::Restore(a) => restore::run(a),
        Command::Merge(a) => verbs::merge(a),
        Command::Rebase(a) => verbs::rebase(a),
        Command::Commit(a) => verbs::commit(a),
        Command::SnapshotRebase(a) => verbs::snapshot_rebase(a),
        Command::Verify(a) => verify::run(a),
        Command::Prune(a) => prune::run(a),
        Command::Consolidate(a) => consolidate::run(a),
        Command::LinkDisk(a) => link_disk::run(a),
        Command::Completions(a) => docs::completions(a),
        Command::Man(a) => docs::man(a),
    }
}

/// For `--as-owner`: from here on this process is the owner of the backup directory. There is one
/// thread yet. `mount` needs root first, and does it by itself.
fn become_owner(command: &mut Command) -> Result<()> {
    let Some(dir) = command.backups() else {
        return Err(usage("--as-owner goes with commands that name a backup directory"));
    };
    if matches!(command, Command::Mount(_)) {
        return Ok(());
    }
    let Some(owner) = privileges::Owner::of(dir)? else {
        if let Command::Backup(a) = command {
            a.look_at_owners()?;
        }
        return Ok(());
    };
    log::info!("working as {}, the owner of {}", owner.name(), crate::text::path_text(dir));
    if let Some(state) = command.state() {
        state.give_to(&owner)?;
    }
    owner.become_it()
}

/// How often `-q` was given.
static QUIET: AtomicU8 = AtomicU8::new(0);

/// Whether the user wants to see warnings and errors only (`-q`).
fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed) > 0
}

/// Whether the user wants to see errors only (`-qq`).
fn is_silent() -> bool {
    QUIET.load(Ordering::Relaxed) > 1
}

fn init_logging(cli: &Cli) {
    QUIET.store(cli.quiet, Ordering::Relaxed);
    let level = match (cli.quiet, cli.verbose) {
        (2.., _) => "error",
        (1, _) | (_, 0) => "warn",
        (_, 1) => "info",
        (_, 2) => "debug",
        _ => "trace",
    };
    // fuser calls it an error when a reader gave up before its answer, and a warning when somebody
    // else has unmounted; what ends a mount comes to us as an error in any case.
    let fuser = if cli.verbose >= 2 { "warn" } else { "off" };
    // They are the same every night.
    let standing = if cli.quiet > 0 { "error" } else { level };
    let filter = format!("{level},fuser={fuser},{}={standing}", folder::STANDING);
    let env = env_logger::Env::new().filter_or("FLEECEFS_LOG", filter);
    let mut builder = env_logger::Builder::from_env(env);
    // When something happened matters to those who look for a fault.
    let timed = cli.verbose >= 2;
    builder.format(move |out, r| {
        let (word, text) = (logging::word(r.level()), visible(&r.args().to_string()));
        if timed {
            write!(out, "{} ", out.timestamp_seconds())?;
        }
        writeln!(out, "{word}: {text}")
    });
    logging::start(builder.build());
}

/// The last line of what a dry run says.
const UNCHANGED: &str = "dry run: nothing was changed\n";

/// A usage error.
pub(crate) fn usage(message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, message)
}
