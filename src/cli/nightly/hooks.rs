//! Commands of the configuration: before and after a VM's backup, and where something failed. No shell comes between,
//! unless a command names one.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::child::{Ended, Runner, shortened};
use super::row::VmRow;
use crate::config::check_program;
use crate::error::{Error, Kind, Result};
use crate::text;

/// Runs the commands of a key, in their order, until one fails.
///
/// # Errors
/// One cannot be started, or failed: with its exit code and its last words.
pub(super) fn run(
    runner: Runner<'_>,
    commands: &[Vec<String>],
    key: &'static str,
    row: &VmRow,
) -> Result<()> {
    for words in commands {
        let Some((program, args)) = words.split_first() else { continue };
        let mut command = Command::new(check_program(program)?);
        command.arg0(program).args(args).envs(facts(key, row));
        let input = text::json(&row.json()).map(String::into_bytes).unwrap_or_default();
        let ended = runner.command(command, input)?;
        if let Some(e) = ended.error() {
            let said = ended.said.as_deref().map(|s| format!(": {s}")).unwrap_or_default();
            let kind = if e.kind == Kind::Timeout { Kind::Timeout } else { Kind::Io };
            return Err(Error::new(kind, format!("{program}{}{said}", why(key, &ended))));
        }
    }
    Ok(())
}

/// How a command ended that failed.
fn why(key: &str, ended: &Ended) -> String {
    match (ended.timed_out, ended.signal) {
        (true, _) if key == "before" => ": its time was over ('timeout')".into(),
        (true, _) => ": its time was over (ten minutes)".into(),
        (false, Some(signal)) => format!(" was ended by signal {signal}"),
        (false, None) => format!(" ended with exit code {}", ended.code),
    }
}

/// What a command may want to know. There are no secrets among it.
fn facts(key: &str, row: &VmRow) -> Vec<(&'static str, OsString)> {
    let failure = row.failures.first();
    let error = failure.map(|f| f.error.message.clone()).unwrap_or_default();
    // An environment has no NUL, and no place for a text as long as a file.
    let target = row.target.as_deref().map(shortened).unwrap_or_default();
    let step = failure.map(|f| f.step).unwrap_or_default();
    vec![
        ("FLEECEFS_HOOK", key.into()),
        ("FLEECEFS_VM", shortened(&row.vm).replace('\0', " ").into()),
        ("FLEECEFS_TARGET", target.replace('\0', " ").into()),
        ("FLEECEFS_RESULT", row.result().into()),
        ("FLEECEFS_EXIT_CODE", row.exit_code().to_string().into()),
        ("FLEECEFS_STEP", step.into()),
        ("FLEECEFS_ERROR", error.replace('\0', " ").into()),
    ]
}
