//! The command line: arguments in `args`, one file per subcommand, exit codes from
//! [`crate::error::Kind::table`].

mod args;
mod attach;
mod backup;
mod bar;
mod boot;
mod complete;
mod config;
mod config_file;
mod console;
mod consolidate;
mod diff;
mod docs;
mod files;
mod findings;
mod freeze;
mod habits;
mod health;
mod history;
mod info;
mod keep;
mod link_disk;
mod list;
mod live_restore;
mod map;
mod mount;
#[cfg(test)]
mod named_commands;
mod nightly;
mod one_run;
mod paths;
mod prune;
mod recorded;
mod recover;
mod replicate;
mod restore;
mod runs;
mod scratch;
mod shared;
mod show;
mod state;
mod stats;
mod status;
mod survey;
mod table;
mod umount;
mod unsound;
mod values;
mod verbosity;
mod verbs;
mod verify;
mod watch;
mod work;
mod writing;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::health::nagios;
use crate::output::logging::{self, Results};
use crate::text::{is_hidden, path_text, visible};
use crate::{folder, output, privileges};
use args::{Cli, Command, Json};
use mount::helper::{self, Helper};

/// Runs the program and says how it ended.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let parsed = match helper::helper(&args) {
        Helper::No => parse(args),
        Helper::Run(args) => parse(args),
        Helper::Nothing => return ExitCode::SUCCESS,
    };
    let cli = match parsed {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    init_logging(&cli);
    crate::mount::raise_file_limit();
    let json = cli.command.json();
    let is_check = cli.command.is_nagios();
    match run(cli) {
        Ok(code) => code,
        Err(e) if is_check => {
            // There is nobody else to tell.
            drop(output::print(&nagios::unknown(&e.report())));
            ExitCode::from(nagios::UNKNOWN)
        }
        Err(e) => {
            print_error(&e, json);
            output::tell_error(&e);
            ExitCode::from(e.kind().exit_code())
        }
    }
}

/// An error for scripts. Where a document was printed already, it says what is wrong.
fn print_error(e: &Error, json: Json) {
    let line = match json {
        Json::No => return,
        Json::Document if output::has_written() => return,
        Json::Document | Json::Objects => output::json_object(&json!({"error": e.object()})),
        Json::Events => output::json_line(&json!({"event": "error",
            "format_version": output::JSON_VERSION, "error": e.object()})),
    };
    // Standard error has it, too.
    drop(line.and_then(|line| output::print(&line)));
}

/// The command line; where there is nothing to run, the exit code after what clap has to say.
fn parse(args: Vec<OsString>) -> std::result::Result<Cli, ExitCode> {
    if let Some(hint) = habits::hint(&args) {
        output::tell(&format!("fleecefs: {hint}\n"));
        return Err(ExitCode::from(Kind::Usage.exit_code()));
    }
    let args = habits::translated(args);
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

fn run(mut cli: Cli) -> Result<ExitCode> {
    if cli.as_owner {
        become_owner(&mut cli.command)?;
    }
    let done = match cli.command {
        // It may have exit codes of its own.
        Command::Health(a) => return survey::run(&a, Cli::command),
        Command::Backup(a) => backup::run(&a, Cli::command),
        Command::Info(a) => info::run(a),
        Command::Cleanup(a) => info::cleanup(a),
        Command::Recover(a) => recover::run(a),
        Command::Cancel(a) => recover::cancel(a),
        Command::Guardian(a) => recover::guard(a),
        Command::Mount(a) => mount::run(a, cli.as_owner),
        Command::Umount(a) => umount::umount(a),
        Command::Attach(a) => attach::attach(&a),
        Command::Detach(a) => attach::detach(&a),
        Command::Scratch(a) => scratch::run(&a),
        Command::List(a) => list::run(a),
        Command::Show(a) => show::run(a),
        Command::Config(a) => config::run(&a, Cli::command),
        Command::Boot(a) => boot::run(&a),
        Command::LiveRestore(a) => live_restore::run(&a),
        Command::Map(a) => map::run(a),
        Command::Diff(a) => diff::run(&a),
        Command::Files(a) => files::run(&a),
        Command::Restore(a) => restore::run(a),
        Command::Merge(a) => verbs::merge(a),
        Command::Rebase(a) => verbs::rebase(a),
        Command::Commit(a) => verbs::commit(a),
        Command::SnapshotRebase(a) => verbs::snapshot_rebase(a),
        Command::Verify(a) => verify::run(a),
        Command::Prune(a) => prune::run(a),
        Command::Stats(a) => stats::run(&a),
        Command::History(a) => history::run(&a),
        Command::Consolidate(a) => consolidate::run(a),
        Command::LinkDisk(a) => link_disk::run(a),
        Command::Replicate(a) => replicate::run(&a),
        Command::Completions(a) => docs::completions(a, &mut Cli::command()),
        Command::Complete(a) => complete::run(&a, Cli::command()),
        Command::Man(a) => docs::man(a, Cli::command()),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// For `--as-owner`: from here on this process is the owner of the backup directory. There is one
/// thread yet. `mount` needs root first, and does it by itself.
fn become_owner(command: &mut Command) -> Result<()> {
    if matches!(command, Command::Attach(_) | Command::Detach(_)) {
        return Err(verbosity::usage(
            "attach and detach work as root: devices and mounts are root's",
        ));
    }
    if matches!(command, Command::LiveRestore(_)) {
        return Err(verbosity::usage(
            "live-restore starts a VM with the rights of whoever calls it: call it as the user who is to have the VM",
        ));
    }
    let Some(dir) = command.backups() else {
        return Err(verbosity::usage("--as-owner goes with commands that name a backup directory"));
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
    log::info!("working as {}, the owner of {}", owner.name(), path_text(dir));
    if let Some(state) = command.state() {
        state.give_to(&owner)?;
    }
    if let Some((state, read)) = command.verified() {
        state.give_if_possible(&owner, read);
    }
    owner.become_it()
}

fn init_logging(cli: &Cli) {
    verbosity::set_quiet(cli.quiet);
    verbosity::set_verbose(cli.verbose);
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
        let time = if timed { format!("{} ", out.timestamp_seconds()) } else { String::new() };
        writeln!(out, "{}", output::for_stderr(&format!("{time}{word}: {text}")))
    });
    let results = match (cli.quiet, cli.verbose) {
        (1.., _) => Results::Nowhere,
        (0, 0) => Results::InLogs,
        (0, _) => Results::Everywhere,
    };
    logging::start(builder.build(), results);
}
