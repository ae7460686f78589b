//! Commands that run in the guest round the freeze point, for what a frozen file system alone does not make
//! consistent: a database locks its tables or begins a backup of its own before, and ends that after.
//!
//! The second is the undo of the first: it stands in the journal before the first is begun, and is run by whoever
//! ends the run: the run itself, its watchdog, or a recovery. Where they cannot know whether another of
//! them has run it, it is run twice.

use std::time::Instant;

use super::after::{self, told};
use super::context::{FreezeContext, announce, withdraw};
use super::watchdog::{Message, Watchdog};
use crate::backup::state::journal::{AfterCommand, Record};
use crate::error::{Kind, Result};
use crate::failpoint::step;
use crate::manifest::{Achieved, Consistency};
use crate::qmp::agent::Agent;
use crate::qmp::guest_command::{self, Ran};

/// Where the commands of a run stand.
#[derive(Debug, Default)]
pub(super) struct Commands {
    /// What is to be run after it.
    after: Option<AfterCommand>,
    /// Why the point is not consistent for the application, if it is not: `None` until then.
    failed: Option<String>,
    /// Whether there are any.
    any: bool,
    /// The agent says that it has not run the one before.
    refused: bool,
}

/// Runs the command before the freeze point. Where it fails that is told, and the backup goes on.
///
/// # Errors
/// The journal or the watchdog cannot be written; `Interrupted`. Nothing is run in the guest then, or the
/// watchdog undoes it.
pub(super) fn before(
    context: &mut FreezeContext<'_>,
    watchdog: Option<&mut Watchdog>,
) -> Result<Commands> {
    let wanted = context.options.freeze_point.commands.clone();
    let mut commands =
        Commands { any: wanted.before.is_some() || wanted.after.is_some(), ..Commands::default() };
    let Some(address) = context.options.agent.as_ref().filter(|_| commands.any) else {
        return Ok(commands);
    };
    let agent = Agent::connect(address, context.options.freeze_point.agent_timeout);
    let mut agent = match agent {
        Ok(agent) => agent,
        Err(e) => {
            // Nothing was run.
            commands.failed(context, e.report());
            return Ok(commands);
        }
    };
    if let Some(after) = after::wanted(&wanted) {
        let record = Record::GuestCommand(after.clone());
        announce(context, watchdog, record, Message::Command)?;
        commands.after = Some(after);
    }
    let Some(command) = &wanted.before else { return Ok(commands) };
    let deadline = Instant::now() + wanted.timeout;
    let may_wait = || context.client.check_interrupt().is_ok();
    let ran = guest_command::run(&mut agent, command, deadline, may_wait);
    step("ran the guest's command");
    context.client.check_interrupt()?;
    commands.refused = matches!(ran, Ok(Ran::Refused(_)));
    match told(ran) {
        Ok(()) => context.watch.say("ran the command of --guest-before in the guest"),
        Err(why) => commands.failed(context, why),
    }
    Ok(commands)
}

impl Commands {
    fn failed(&mut self, context: &FreezeContext<'_>, why: String) {
        let why = format!("--guest-before: {why}");
        context.watch.warn(&why);
        self.failed = Some(why);
    }

    /// Runs the command after the freeze point, once the guest is thawed; whether that is done: the watchdog has to go
    /// on trying otherwise.
    ///
    /// # Errors
    /// The journal or the watchdog cannot be written.
    pub(super) fn after(
        &mut self,
        context: &mut FreezeContext<'_>,
        watchdog: Option<&mut Watchdog>,
    ) -> Result<bool> {
        let (Some(after), Some(address)) = (self.after.take(), &context.options.agent) else {
            return Ok(true);
        };
        let may_wait = || context.client.check_interrupt().is_ok();
        let done = match after::run(address, &after, || false, may_wait) {
            // This agent runs no commands at all; that was told.
            Err(e) if e.kind() == Kind::Busy && self.refused => None,
            Err(e) => {
                let why = format!("--guest-after: {}; the watchdog keeps trying", e.report());
                context.watch.warn(&why);
                self.failed.get_or_insert(why);
                return Ok(false);
            }
            Ok(done) => done,
        };
        withdraw(context, watchdog, Record::GuestCommandDone, Message::CommandDone)?;
        match done.map_or(Ok(()), |done| done.verdict) {
            Ok(()) if self.refused => {}
            Ok(()) => context.watch.say("ran the command of --guest-after in the guest"),
            Err(why) => {
                let why = format!("--guest-after: {why}");
                context.watch.warn(&why);
                self.failed.get_or_insert(why);
            }
        }
        Ok(true)
    }

    /// The guest is still frozen: what has to be run then is left to the watchdog.
    pub(super) fn unfinished(&mut self) {
        let why = || "the guest did not thaw in time; the watchdog keeps trying".into();
        self.failed.get_or_insert_with(why);
    }

    /// What a point of frozen file systems is with this: whether it is consistent for the application, and else why not.
    pub(super) fn judge(self, consistency: &mut Consistency) {
        if !self.any || consistency.achieved != Achieved::FileSystem {
            return;
        }
        match self.failed {
            Some(why) => consistency.reason = why,
            None => consistency.achieved = Achieved::Application,
        }
    }
}
