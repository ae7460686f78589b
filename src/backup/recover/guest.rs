//! What a run did to the guest is undone: it runs, is thawed, and its application goes on.

use std::time::{Duration, Instant};

use super::context::{RecoverCause, RecoverContext};
use crate::backup::Watch;
use crate::backup::freeze::after;
use crate::backup::freeze::watchdog::continue_if_paused;
use crate::backup::state::journal::{self, Pending, Record};
use crate::error::{Error, Kind, Result};
use crate::qmp::agent::Agent;
use crate::qmp::{Address, Client};

/// How long the agent may take for an answer.
const AGENT: Duration = Duration::from_secs(5);
/// Where its agent could not be reached.
const AGENT_REMEDY: &str = "check the guest and its agent, then run fleecefs recover: with --agent if its socket has \
                            changed, with --forget to give up";

/// Lets the guest run, thaws it, and runs what has to be run in it after that.
///
/// # Errors
/// QEMU refuses; the agent cannot be reached.
pub(super) fn release(
    client: &mut Client,
    pending: &Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    if pending.stopped && client.has_guest() && continue_if_paused(client)? {
        watch.say("the guest was still stopped: it runs again");
    }
    let agent = match (place.agent, &pending.agent) {
        (Some(given), _) => given.clone(),
        (None, Some(noted)) => Address::parse(noted)?,
        (None, None) => return Ok(()),
    };
    thaw_guest(&agent, pending, place, watch)?;
    finish_in_guest(&agent, pending, place, watch)
}

fn thaw_guest(
    agent: &Address,
    pending: &Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    if !pending.frozen {
        return Ok(());
    }
    match thaw(agent) {
        Ok(true) => watch.say("the guest was still frozen: thawed"),
        Ok(false) => {}
        Err(e) if place.cause == RecoverCause::Forget => {
            watch.warn(&format!("the guest may still be frozen: {}", e.report()));
        }
        Err(e) => {
            let what = "the guest may still be frozen: its agent did not thaw it";
            return Err(Error::new(e.kind(), what).with_source(e).remedy(AGENT_REMEDY));
        }
    }
    Ok(())
}

/// Runs what has to be run in the guest after a freeze point, unless the watchdog has done it meanwhile.
fn finish_in_guest(
    agent: &Address,
    pending: &Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    let Some(command) = &pending.after else { return Ok(()) };
    let is_done = || {
        let now = journal::pending(place.state, place.vm);
        now.is_ok_and(|p| p.is_some_and(|p| p.run == pending.run && p.after.is_none()))
    };
    // The watchdog may be at it, and has the agent for so long.
    let end = Instant::now() + Duration::from_secs(command.timeout) + AGENT;
    let done = loop {
        match after::run(agent, command, is_done, || true) {
            Err(e) if e.kind() == Kind::Timeout && Instant::now() < end && !is_done() => {}
            other => break other,
        }
    };
    match done {
        Ok(None) => {}
        Ok(Some(done)) => {
            let path = journal::path(place.state, place.vm);
            journal::note(&path, &pending.run, &Record::GuestCommandRun(pending.run.clone()))?;
            match &done.verdict {
                Ok(()) => watch.say("ran the command of --guest-after in the guest"),
                Err(why) => watch.warn(&format!("--guest-after: {why}")),
            }
        }
        Err(e) if place.cause == RecoverCause::Forget => {
            watch.warn(&format!("--guest-after was not run in the guest: {}", e.report()));
        }
        Err(e) => {
            let what = "the command of --guest-after may still have to be run in the guest";
            return Err(Error::new(e.kind(), what).with_source(e).remedy(AGENT_REMEDY));
        }
    }
    Ok(())
}

/// Thaws a guest; whether it was frozen.
fn thaw(agent: &Address) -> Result<bool> {
    let mut agent = Agent::connect(agent, AGENT)?;
    let frozen = agent.is_frozen(AGENT)?;
    if frozen {
        agent.thaw(AGENT)?;
    }
    Ok(frozen)
}
