//! The freeze point: freeze, stop, insert the filters, continue, thaw.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::after;
use super::commands::{self, Commands};
use super::context::{FreezeContext, announce, withdraw};
use super::watchdog::{Message, Watchdog, WatchdogConfig, continue_if_paused};
use crate::backup::disks::Insertion;
use crate::backup::fleece::{
    add_view, foreign, migration, reopen, reopen_options, set_device_node,
};
use crate::backup::graph::expected::{Expected, Stage};
use crate::backup::names::{Role, parse_object};
use crate::backup::state::journal::Record;
use crate::backup::{StopMode, graph};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::manifest::{Achieved, Consistency, OFFLINE};
use crate::qmp::Client;
use crate::qmp::agent::Agent;
use crate::units::counted;

/// A filter to insert.
#[derive(Debug, Clone)]
pub(crate) struct FilterInsert {
    /// Index of the disk.
    pub index: usize,
    /// Where it is inserted.
    pub insertion: Insertion,
    /// The filter's node.
    pub filter: String,
    /// What the disk is called in messages.
    pub label: String,
    /// What planning saw between the guest and the disk.
    pub path: graph::Path,
}

impl FilterInsert {
    fn expected(&self) -> Expected<'_> {
        let run = parse_object(&self.filter).map_or("", |(run, ..)| run);
        let (index, label, path) = (self.index, self.label.as_str(), &self.path);
        Expected { run, index, label, path, source: Role::Snapshot }
    }
}

/// What the freeze point achieved.
#[derive(Debug)]
pub(crate) struct FreezeResult {
    /// What was achieved.
    pub consistency: Consistency,
    /// Disks whose filter could not be inserted.
    pub failed: Vec<(usize, Error)>,
    /// The guest is still stopped: for `--pause`.
    pub held: Option<HeldGuest>,
}

/// A guest that is stopped, and frozen if it was asked for, for the whole backup.
#[derive(Debug)]
pub(crate) struct HeldGuest {
    watchdog: Watchdog,
    /// Who has to thaw it: once it runs, since the agent is part of it.
    agent: Option<Agent>,
}

/// Makes the freeze point: freezes and stops the guest if it runs, inserts all filters, lets it go on.
///
/// # Errors
/// The guest could not be stopped or continued, or the watchdog or journal could not be written.
/// A failed freeze is no error: the reason is in the consistency.
pub(crate) fn take(
    context: &mut FreezeContext<'_>,
    inserts: &[FilterInsert],
    running: bool,
) -> Result<FreezeResult> {
    let wanted = running && context.options.freeze_point.stop != StopMode::Never;
    let freeze = running && context.options.freeze_point.quiesce;
    let mut consistency = Consistency { one_moment: true, ..Default::default() };
    let mut watchdog =
        if wanted || freeze { Some(Watchdog::start(&config(context))?) } else { None };
    let mut agent = None;
    let mut commands = Commands::default();
    if freeze {
        commands = commands::before(context, watchdog.as_mut())?;
    }
    let froze_at = Instant::now();
    if freeze {
        agent = freeze_guest(context, watchdog.as_mut(), &mut consistency)?;
    }
    let began = Instant::now();
    let stop = wanted && stop_guest(context, watchdog.as_mut())?;
    let running = running && stop == wanted;
    let whole = stop && context.options.freeze_point.stop == StopMode::WholeBackup;
    let stopped_at = Instant::now();
    let failed = insert_all(context.client, inserts, &mut consistency, stop || !running);
    if stop && !whole {
        continue_if_paused(context.client)?;
        consistency.stopped_ms = millis(stopped_at.elapsed());
        withdraw(context, watchdog.as_mut(), Record::Continue, Message::Continue)?;
    }
    judge(context, running, whole, &mut consistency);
    log::debug!("freeze point: {:?}", began.elapsed());
    let held = match watchdog {
        Some(watchdog) if whole => Some(HeldGuest { watchdog, agent }),
        Some(watchdog) => {
            let was_frozen = consistency.achieved == Achieved::FileSystem;
            release_guest(context, watchdog, agent, &mut consistency, &mut commands)?;
            commands.judge(&mut consistency);
            if was_frozen {
                consistency.frozen_ms = millis(froze_at.elapsed());
            }
            None
        }
        None => None,
    };
    Ok(FreezeResult { consistency, failed: failed?, held })
}

/// Ends `--pause`: the guest runs first, since a stopped one cannot thaw.
///
/// # Errors
/// QEMU refuses to continue; the watchdog goes on trying then.
pub(crate) fn release(context: &mut FreezeContext<'_>, held: HeldGuest) -> Result<()> {
    let HeldGuest { mut watchdog, agent } = held;
    // Not one that has been migrated meanwhile.
    continue_if_paused(context.client)?;
    withdraw(context, Some(&mut watchdog), Record::Continue, Message::Continue)?;
    // What was achieved is in the manifests already.
    let mut past = Consistency::default();
    release_guest(context, watchdog, agent, &mut past, &mut Commands::default())
}

/// Thaws what was frozen, runs what is to be run after that, and ends the watchdog, or leaves both to it.
fn release_guest(
    context: &mut FreezeContext<'_>,
    mut watchdog: Watchdog,
    agent: Option<Agent>,
    consistency: &mut Consistency,
    commands: &mut Commands,
) -> Result<()> {
    let thawed = match agent {
        Some(a) => thaw_guest(context, Some(&mut watchdog), a, consistency)?,
        None => true,
    };
    let done = match thawed {
        true => commands.after(context, Some(&mut watchdog))?,
        false => {
            commands.unfinished();
            false
        }
    };
    if done {
        watchdog.stop();
    } else {
        watchdog.leave();
    }
    Ok(())
}

/// Stops the guest, unless somebody else has in the meantime: such a stop is not ours to end.
/// Says whether it did.
fn stop_guest(
    context: &mut FreezeContext<'_>,
    mut watchdog: Option<&mut Watchdog>,
) -> Result<bool> {
    foreign::refuse_stop(context.client)?;
    announce(context, watchdog.as_deref_mut(), Record::Stop, Message::Stop)?;
    if is_running(context.client)? {
        context.client.execute("stop", json!({}))?;
        return Ok(true);
    }
    withdraw(context, watchdog, Record::Continue, Message::Continue)?;
    context.watch.warn(
        "the guest was paused by somebody else just before the freeze point: it \
                      stays paused",
    );
    Ok(false)
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

fn config(context: &FreezeContext<'_>) -> WatchdogConfig {
    let options = context.options;
    WatchdogConfig {
        qmp: options.qmp.canonical(),
        agent: options.agent.as_ref().map(|a| a.canonical()),
        deadline_ms: millis(options.freeze_point.deadline).max(1),
        whole: options.freeze_point.stop == StopMode::WholeBackup,
        qemu: context.client.process(),
        run: context.run.to_string(),
        journal: context.journal.path(),
        parent: std::process::id(),
        after: after::wanted(&options.freeze_point.commands),
    }
}

fn is_running(client: &mut Client) -> Result<bool> {
    if !client.has_guest() {
        return Ok(false);
    }
    let status = client.execute("query-status", json!({}))?;
    Ok(status.get("status").and_then(Value::as_str) == Some("running"))
}

fn insert_all(
    client: &mut Client,
    inserts: &[FilterInsert],
    consistency: &mut Consistency,
    stopped: bool,
) -> Result<Vec<(usize, Error)>> {
    let mut failed = Vec::new();
    let inserts = &check_graph(client, inserts, &mut failed)?;
    let devices = inserts.iter().filter_map(|i| match &i.insertion {
        Insertion::Device(q) => Some((i, q)),
        Insertion::Reopen { .. } => None,
    });
    let mut inserted = 0;
    for (i, qdev) in devices {
        let top = i.path.nodes.first().map_or("", String::as_str);
        match set_device_node(client, qdev, top, &i.filter) {
            Ok(()) => inserted += 1,
            Err(e) => refused(client, &mut failed, i, e)?,
        }
    }
    if inserted > 1 && !stopped {
        consistency.one_moment = false;
    }
    if inserted > 0 {
        note_bypassed(client, inserts, &mut failed)?;
    }
    reopen_all(client, inserts, consistency, &mut failed)?;
    // Of a disk that is being handed over QEMU would take possession again.
    migration::check(client)?;
    add_views(client, inserts, &mut failed)?;
    Ok(failed)
}

/// Keeps an error that concerns one disk.
fn refused(
    client: &mut Client,
    failed: &mut Vec<(usize, Error)>,
    of: &FilterInsert,
    error: Error,
) -> Result<()> {
    match error.kind() {
        Kind::Busy => {}
        Kind::Peer if is_alive(client) => {}
        _ => return Err(error),
    }
    failed.push((of.index, error));
    Ok(())
}

/// The frozen views, while the guest is stopped: from then on QEMU lets nobody take a filter out from
/// between the guest and its disk, or refuses the view of one that is not there. Before, somebody
/// could have put it back, and what the guest had written meanwhile would be missing in the fleece.
fn add_views(
    client: &mut Client,
    inserts: &[FilterInsert],
    failed: &mut Vec<(usize, Error)>,
) -> Result<()> {
    for i in inserts {
        let run = parse_object(&i.filter).map_or("", |(run, ..)| run);
        if !failed.iter().any(|(index, _)| *index == i.index)
            && let Err(e) = add_view(client, run, i.index)
        {
            refused(client, failed, i, e)?;
        }
    }
    Ok(())
}

/// Notes the disks whose device was attached past a node that another program put there at the same time:
/// that one's backup, if it is one, misses what is written from now on, and somebody has to know.
fn note_bypassed(
    client: &mut Client,
    inserts: &[FilterInsert],
    failed: &mut Vec<(usize, Error)>,
) -> Result<()> {
    let graph = graph::ask(client)?;
    let context = graph::GraphState { graph: &graph, jobs: &[] };
    for i in inserts.iter().filter(|i| matches!(i.insertion, Insertion::Device(_))) {
        if let Some(what) = i.expected().bypassed(context) {
            let what = format!("{what}, and the device is no longer on it if it was");
            failed.push((i.index, graph::in_the_way(what)));
        }
    }
    Ok(())
}

/// Leaves those out round which the graph is no longer what planning saw: a device must not be
/// attached past what somebody has put there since.
fn check_graph(
    client: &mut Client,
    inserts: &[FilterInsert],
    failed: &mut Vec<(usize, Error)>,
) -> Result<Vec<FilterInsert>> {
    let (graph, jobs) = graph::ask_with_jobs(client)?;
    let context = graph::GraphState { graph: &graph, jobs: &jobs };
    let mut right = Vec::new();
    for i in inserts {
        match i.expected().difference(context, Stage::Before) {
            Some(what) => failed.push((i.index, graph::in_the_way(what))),
            None => right.push(i.clone()),
        }
    }
    Ok(right)
}

/// All raw nodes in one command, so that they switch at one time; if that fails, each for itself.
fn reopen_all(
    client: &mut Client,
    inserts: &[FilterInsert],
    consistency: &mut Consistency,
    failed: &mut Vec<(usize, Error)>,
) -> Result<()> {
    let list: Vec<(usize, Value)> = inserts
        .iter()
        .filter_map(|i| Some((i.index, reopen_options(&i.insertion, &i.filter)?)))
        .collect();
    let Err(first) = reopen(client, list.iter().map(|(_, o)| o.clone()).collect()) else {
        return Ok(());
    };
    if !is_alive(client) {
        return Err(first);
    }
    if let [(index, _)] = list.as_slice() {
        failed.push((*index, first));
        return Ok(());
    }
    consistency.one_moment = false;
    for (index, o) in list {
        if let Err(e) = reopen(client, vec![o]) {
            failed.push((index, e));
        }
    }
    Ok(())
}

fn is_alive(client: &mut Client) -> bool {
    client.execute("query-version", json!({})).is_ok()
}

fn freeze_guest(
    context: &mut FreezeContext<'_>,
    watchdog: Option<&mut Watchdog>,
    consistency: &mut Consistency,
) -> Result<Option<Agent>> {
    let Some(address) = &context.options.agent else {
        consistency.reason = "no --agent socket was given".into();
        return Ok(None);
    };
    let wait = context.options.freeze_point.agent_timeout;
    let mountpoints = context.options.freeze_point.mountpoints.clone();
    let before = Agent::connect(address, wait).and_then(|mut a| {
        let frozen = a.is_frozen(wait)?;
        let all = if frozen { Vec::new() } else { listed(&mut a, &mountpoints, wait)? };
        Ok((frozen, all, a))
    });
    let (listed, mut agent) = match before {
        Ok((false, all, a)) => (all, a),
        Ok((true, ..)) => {
            consistency.reason =
                "the file systems were already frozen by somebody else, and stay frozen".into();
            context.watch.warn(&consistency.reason);
            return Ok(None);
        }
        Err(e) => {
            consistency.reason = format!("not frozen: {}", e.report());
            context.watch.warn(&consistency.reason);
            return Ok(None);
        }
    };
    announce(context, watchdog, Record::Freeze, Message::Freeze)?;
    // Half of what the watchdog allows: there must be time left to thaw.
    match agent.freeze(&mountpoints, context.options.freeze_point.deadline / 2) {
        Ok(0) => {
            step("frozen");
            consistency.reason = "not frozen: the agent found nothing to freeze".into();
            context.watch.warn(&consistency.reason);
        }
        Ok(n) => {
            step("frozen");
            consistency.frozen = listed;
            consistency.achieved = Achieved::FileSystem;
            context.watch.say(&format!("froze {}", counted(n, "file system")));
        }
        Err(e) => {
            consistency.reason = format!("freezing failed: {}", e.report());
            context.watch.warn(&consistency.reason);
        }
    }
    // Also after a failure: some may be frozen, or will be when the agent comes to it.
    Ok(Some(agent))
}

/// What will be frozen, by name: a frozen guest does not tell. Not every agent can; then it is only
/// known that it was all.
fn listed(agent: &mut Agent, wanted: &[String], wait: Duration) -> Result<Vec<String>> {
    if !wanted.is_empty() {
        return Ok(wanted.to_vec());
    }
    match agent.mountpoints(wait) {
        // Its answer may still come, and must not be taken for that to the freeze.
        Err(e) if e.kind() == Kind::Timeout => Err(e),
        other => Ok(other.unwrap_or_default()),
    }
}

/// False if the agent did not thaw: the watchdog has to go on trying.
fn thaw_guest(
    context: &mut FreezeContext<'_>,
    watchdog: Option<&mut Watchdog>,
    mut agent: Agent,
    consistency: &mut Consistency,
) -> Result<bool> {
    match agent.thaw(context.options.freeze_point.deadline / 4) {
        Ok(n) => {
            // Nothing thawed: the freeze had timed out inside the guest (Windows: 10 s).
            if n == 0 && consistency.achieved == Achieved::FileSystem {
                consistency.achieved = Achieved::Crash;
                consistency.reason =
                    "the guest thawed by itself before the freeze point was complete".into();
                context.watch.warn(&consistency.reason);
            }
            withdraw(context, watchdog, Record::Thaw, Message::Thaw)?;
            Ok(true)
        }
        Err(e) => {
            context
                .watch
                .warn(&format!("thawing failed: {}; the watchdog keeps trying", e.report()));
            Ok(false)
        }
    }
}

fn judge(context: &FreezeContext<'_>, running: bool, whole: bool, c: &mut Consistency) {
    if c.achieved == Achieved::Crash && context.client.has_guest() && (!running || whole) {
        c.achieved = Achieved::Paused;
    }
    if context.options.offline.is_some() {
        // Nobody wrote, whenever the filter of each disk was inserted.
        c.reason = OFFLINE.into();
        return;
    }
    if !c.one_moment {
        c.reason = "one freeze point per disk".into();
    }
    if c.achieved == Achieved::Crash && c.reason.is_empty() {
        c.reason = if context.client.has_guest() {
            "the guest's file systems were not frozen (--quiesce)".into()
        } else {
            "qemu-storage-daemon has no guest".into()
        };
    }
}
