//! The command that has to be run in the guest after the freeze point.

use std::time::{Duration, Instant};

use crate::backup::GuestCommands;
use crate::backup::state::journal::AfterCommand;
use crate::error::{Error, Kind, Result};
use crate::qmp::Address;
use crate::qmp::agent::Agent;
use crate::qmp::budget::clip;
use crate::qmp::guest_command::{self, Ran};

/// How long the agent may take until it answers.
const AGENT: Duration = Duration::from_secs(5);
/// Of what a command wrote, so many characters are told.
const LONGEST_WORDS: usize = 200;

/// What has to be run in the guest once the command before the freeze point is begun.
pub(super) fn wanted(commands: &GuestCommands) -> Option<AfterCommand> {
    let timeout = commands.timeout.as_secs();
    commands.after.clone().map(|command| AfterCommand { command, timeout })
}

/// The command was run. While this lives no other client of the agent can run it: write down that it was, first.
pub(crate) struct Done {
    /// What is wrong with it, in words.
    pub verdict: std::result::Result<(), String>,
    _agent: Agent,
}

/// Runs the command that has to be run after it, unless, once the agent answers, another has: `None` then. It is waited
/// for as long as it may take, or as long as `may_wait`.
///
/// # Errors
/// The agent cannot be reached, or does not run commands now (a frozen one does not): it has to be tried again.
pub(crate) fn run(
    agent: &Address,
    after: &AfterCommand,
    is_done: impl Fn() -> bool,
    may_wait: impl Fn() -> bool,
) -> Result<Option<Done>> {
    let mut agent = Agent::connect(agent, AGENT)?;
    if is_done() {
        return Ok(None);
    }
    let deadline = Instant::now() + Duration::from_secs(after.timeout);
    match guest_command::run(&mut agent, &after.command, deadline, may_wait)? {
        ran @ Ran::Refused(_) => {
            Err(Error::new(Kind::Busy, ran.verdict().err().unwrap_or_default()))
        }
        ran => Ok(Some(Done { verdict: told(Ok(ran)), _agent: agent })),
    }
}

/// What is wrong with a command that was run, and the last that it said.
pub(super) fn told(ran: Result<Ran>) -> std::result::Result<(), String> {
    let ran = ran.map_err(|e| e.report())?;
    ran.verdict().map_err(|why| match &ran {
        Ran::Ended(done) => match done.stderr.trim().lines().next_back() {
            Some(last) => format!("{why}: {}", clip(last, LONGEST_WORDS)),
            None => why,
        },
        _ => why,
    })
}
