//! Taking everything of a run out of QEMU, from whatever state it is in, in the order that QEMU
//! accepts: jobs, exports, frozen views, filters (the guest put back on its disk first), targets,
//! fleeces; and, once all else is done, what keeps the guest from being migrated. It goes by names
//! alone and needs no memory of how far the run had come. What QEMU refuses for one disk does not stand
//! in the way of the others.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;

use super::remove_filter::below;
use super::{close_image, remove_filter, reopen, reopen_options};
use crate::backup::disks::{Answers, Insertion};
use crate::backup::graph;
use crate::backup::graph::bitmap;
use crate::backup::names::{Role, object, parse_object};
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::timeout::answer_timeout;
use crate::qmp::types::{Export, FdSet, Job};

/// How many runs' leftovers are looked for at once: more than one is rare.
const MOST_RUNS: usize = 64;

/// How often the time for one answer all that is taken down may take. Each disk costs a dozen
/// commands, and few of them take long; but a QEMU that answers each at the last moment must not
/// hold us for ever.
const TIMES: u32 = 30;

/// What is taken down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope<'a> {
    /// The run.
    pub run: &'a str,
    /// Only this disk of it.
    pub index: Option<usize>,
}

impl Scope<'_> {
    fn role(&self, name: &str) -> Option<(Role, usize)> {
        let (run, role, index) = parse_object(name)?;
        // What keeps the guest from being migrated goes last, see `unblock`.
        let one = self.index.is_none_or(|i| i == index) && role != Role::Blocker;
        (run == self.run && one).then_some((role, index))
    }
}

/// What was found while taking it down.
#[derive(Debug, Default)]
pub(crate) struct Teardown {
    /// Disks whose job had finished without error, and whose image QEMU has now closed.
    pub finished: Vec<usize>,
    /// Disks of which something is still there.
    pub stuck: BTreeSet<usize>,
    /// The first refusal.
    pub refused: Option<Error>,
    /// What keeps the guest from being migrated is there, see [`unblock`].
    pub blocked: bool,
}

impl Teardown {
    /// Keeps a refusal that concerns one disk.
    ///
    /// # Errors
    /// QEMU does not answer at all: there is no point in going on.
    fn note<T>(&mut self, index: usize, result: Result<T>) -> Result<()> {
        let Err(e) = result else { return Ok(()) };
        if e.kind() == Kind::Timeout {
            return Err(e);
        }
        self.mark_stuck(index, e);
        Ok(())
    }

    fn mark_stuck(&mut self, index: usize, e: Error) {
        self.stuck.insert(index);
        match self.refused {
            // One error is returned: the others are told here.
            Some(_) => log::warn!("{}", e.report()),
            None => self.refused = Some(e),
        }
    }
}

/// The runs that have left something in QEMU.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn runs_in_qemu(client: &mut Client) -> Result<Vec<String>> {
    let answers = Answers::ask(client)?;
    let exports: Vec<Export> = client.query("query-block-exports", json!({}))?;
    let names = answers.nodes.iter().map(|n| n.node_name.as_str());
    let bitmaps = answers.nodes.iter().flat_map(|n| &n.dirty_bitmaps);
    let names = names.chain(bitmaps.filter_map(|b| b.name.as_deref()));
    let names = names.chain(answers.jobs.iter().map(|j| j.id.as_str()));
    let names = names.chain(exports.iter().map(|e| e.id.as_str()));
    let mut runs: Vec<String> =
        names.filter_map(|n| Some(parse_object(n)?.0.to_string())).collect();
    runs.sort();
    runs.dedup();
    runs.truncate(MOST_RUNS);
    Ok(runs)
}

/// Takes it all down.
///
/// # Errors
/// QEMU refuses or is gone; what could be removed is removed.
pub(crate) fn teardown(client: &mut Client, scope: Scope<'_>) -> Result<Teardown> {
    let mut teardown = teardown_all(client, scope)?;
    teardown.refused.take().map_or(Ok(teardown), Err)
}

/// Takes down what can be: a refusal is in the answer.
///
/// # Errors
/// QEMU is gone, or does not answer.
pub(crate) fn teardown_all(client: &mut Client, scope: Scope<'_>) -> Result<Teardown> {
    client.limit_total(Some(answer_timeout().saturating_mul(TIMES)));
    let teardown = teardown_runs(client, scope);
    client.limit_total(None);
    teardown
}

fn teardown_runs(client: &mut Client, scope: Scope<'_>) -> Result<Teardown> {
    let mut teardown = Teardown::default();
    let jobs = client.ask("query-jobs", json!({}))?;
    let exports = client.ask("query-block-exports", json!({}))?;
    let (jobs, exports) = (client.result(jobs)?, client.result(exports)?);
    let jobs = end_jobs(client, scope, jobs, &mut teardown)?;
    end_exports(client, scope, exports, &mut teardown)?;
    let answers = Answers::ask(client)?;
    teardown.blocked = answers.node(&object(scope.run, Role::Blocker, 0)).is_some();
    let jobs = forget_unseen(client, &answers, scope, jobs, &mut teardown)?;
    detach_filter(client, &answers, scope, &mut teardown)?;
    // The target first, then its job: a job that is still listed says that its image may not be
    // closed yet, one that is gone has left a closed image.
    let good = close_targets(client, &answers, scope, &jobs, &mut teardown)?;
    for j in &jobs {
        let Some((_, index)) = scope.role(&j.id) else { continue };
        if teardown.stuck.contains(&index) {
            continue;
        }
        let dismissed = client.execute("job-dismiss", json!({"id": j.id}));
        if dismissed.is_ok() && good.contains(&index) {
            teardown.finished.push(index);
        }
        teardown.note(index, dismissed)?;
    }
    delete(client, &answers, scope, Role::Scratch, &mut teardown)?;
    drop_descriptors(client, scope, &mut teardown)?;
    end_copying(client, &answers, scope, &teardown)?;
    if teardown.refused.is_some() {
        // Refused by QEMU, or is it gone?
        client.execute("query-version", json!({}))?;
    }
    Ok(teardown)
}

/// Dismisses jobs whose frozen view is still there: whoever ran them did not see them end, and
/// knows not what another program did meanwhile. What they wrote is no point. Gives the others.
fn forget_unseen(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    jobs: Vec<Job>,
    teardown: &mut Teardown,
) -> Result<Vec<Job>> {
    let mut seen = Vec::new();
    for j in jobs {
        let Some((role, index)) = scope.role(&j.id) else { continue };
        let view = object(scope.run, Role::Snapshot, index);
        if role == Role::Job && answers.node(&view).is_none() {
            seen.push(j);
            continue;
        }
        let dismissed = client.execute("job-dismiss", json!({"id": j.id}));
        teardown.note(index, dismissed)?;
    }
    Ok(seen)
}

/// Lets go of the guest: frozen view, filter and fleece leave QEMU. The target stays.
///
/// # Errors
/// As [`teardown`].
pub(crate) fn detach(client: &mut Client, scope: Scope<'_>) -> Result<()> {
    let mut teardown = Teardown::default();
    let answers = Answers::ask(client)?;
    detach_filter(client, &answers, scope, &mut teardown)?;
    teardown.refused.map_or(Ok(()), Err)
}

fn detach_filter(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    teardown: &mut Teardown,
) -> Result<()> {
    delete(client, answers, scope, Role::HiddenStatus, teardown)?;
    delete(client, answers, scope, Role::Snapshot, teardown)?;
    delete(client, answers, scope, Role::Lock, teardown)?;
    unplug(client, answers, scope, teardown)?;
    delete(client, answers, scope, Role::Filter, teardown)?;
    delete(client, answers, scope, Role::Fleece, teardown)?;
    drop_holds(client, answers, scope, teardown)?;
    delete(client, answers, scope, Role::Dummy, teardown)
}

/// Ends the copying of filters that cannot be taken out yet: else each would go on copying what the
/// guest overwrites to its fleece. Its fleece is replaced by a node that takes no write; the first
/// that fails breaks the frozen view, which nobody of ours reads any more, and from then on the filter
/// only passes requests through.
fn end_copying(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    teardown: &Teardown,
) -> Result<()> {
    for index in &teardown.stuck {
        let name = |role| object(scope.run, role, *index);
        let (fleece, dummy) = (name(Role::Fleece), name(Role::Dummy));
        // (A qcow2 image would want to write its tables.)
        let raw = answers.node(&fleece).filter(|n| n.drv == "raw");
        let Some(node) = raw.filter(|_| answers.node(&dummy).is_none()) else { continue };
        let errors = json!({"driver": "blkdebug", "node-name": dummy,
            "image": {"driver": "null-co", "size": node.image.virtual_size},
            "inject-error": [{"event": "none", "iotype": "write", "errno": libc::ENOSPC}]});
        let instead = json!({"driver": "raw", "node-name": fleece, "file": dummy,
            "discard": "unmap", "cache": {"no-flush": true}});
        let done = match client.call("blockdev-add", errors)? {
            Ok(_) => client.call("blockdev-reopen", json!({"options": [instead]}))?,
            refused => refused,
        };
        if let Err(r) = done {
            log::warn!("{fleece} still receives what the guest overwrites: {}", short(&r.desc));
            client.call("blockdev-del", json!({"node-name": dummy}))?.ok();
        }
    }
    Ok(())
}

/// Removes the bitmaps that a run has for its own time alone.
fn drop_holds(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    teardown: &mut Teardown,
) -> Result<()> {
    // A filter of ours may report the disk's.
    for n in answers.nodes.iter().filter(|n| parse_object(&n.node_name).is_none()) {
        for name in n.dirty_bitmaps.iter().filter_map(|b| b.name.as_deref()) {
            let Some((Role::Hold, index)) = scope.role(name) else { continue };
            if !teardown.stuck.contains(&index) {
                let gone = bitmap::remove(client, &n.node_name, name);
                teardown.note(index, gone)?;
            }
        }
    }
    Ok(())
}

/// Closes the targets; gives those whose job ended well and of which QEMU had nothing left that it
/// could not write.
fn close_targets(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    jobs: &[Job],
    teardown: &mut Teardown,
) -> Result<Vec<usize>> {
    let ended = jobs.iter().filter(|j| j.error.is_none());
    let mut good: Vec<usize> = ended.filter_map(|j| Some(scope.role(&j.id)?.1)).collect();
    for n in &answers.nodes {
        let Some((Role::Target, index)) = scope.role(&n.node_name) else { continue };
        if teardown.stuck.contains(&index) {
            continue;
        }
        if good.contains(&index) {
            match close_image(client, &n.node_name) {
                Err(e) if matches!(e.kind(), Kind::Io | Kind::NoSpace) => {
                    log::warn!("{}: {}", n.file, e.report());
                    good.retain(|i| *i != index);
                }
                other => {
                    teardown.note(index, other)?;
                    continue;
                }
            }
        }
        let gone = client.execute("blockdev-del", json!({"node-name": n.node_name}));
        teardown.note(index, gone)?;
    }
    Ok(good)
}

/// Lets the guest be migrated again, if it was `blocked`: nothing else of the run is left.
///
/// # Errors
/// QEMU refuses or is gone.
pub(crate) fn unblock(client: &mut Client, run: &str, blocked: bool) -> Result<()> {
    let blocker = object(run, Role::Blocker, 0);
    if blocked {
        client.execute("blockdev-del", json!({"node-name": blocker}))?;
    }
    for s in descriptors(client)?.iter().filter(|s| s.names().any(|n| n == blocker)) {
        client.execute("remove-fd", json!({"fdset-id": s.fdset_id}))?;
    }
    Ok(())
}

/// What was handed over.
fn descriptors(client: &mut Client) -> Result<Vec<FdSet>> {
    match client.takes_descriptors() {
        true => client.query("query-fdsets", json!({})),
        false => Ok(Vec::new()),
    }
}

/// Takes back the descriptors of images that QEMU has closed.
///
/// # Errors
/// QEMU refuses or is gone.
pub(crate) fn take_back(client: &mut Client, scope: Scope<'_>) -> Result<()> {
    let mut teardown = Teardown::default();
    drop_descriptors(client, scope, &mut teardown)?;
    teardown.refused.map_or(Ok(()), Err)
}

/// Takes back the descriptors that were handed over for these nodes.
fn drop_descriptors(client: &mut Client, scope: Scope<'_>, teardown: &mut Teardown) -> Result<()> {
    for s in descriptors(client)? {
        let Some((_, index)) = s.names().filter_map(|n| scope.role(n)).next() else { continue };
        if !teardown.stuck.contains(&index) {
            let removed = client.execute("remove-fd", json!({"fdset-id": s.fdset_id}));
            teardown.note(index, removed)?;
        }
    }
    Ok(())
}

/// Cancels the run's of these jobs and waits until they have concluded; gives those that have.
fn end_jobs(
    client: &mut Client,
    scope: Scope<'_>,
    jobs: Vec<Job>,
    teardown: &mut Teardown,
) -> Result<Vec<Job>> {
    let mine = |jobs: Vec<Job>| -> Vec<Job> {
        jobs.into_iter().filter(|j| scope.role(&j.id).is_some()).collect()
    };
    let jobs = mine(jobs);
    if jobs.iter().all(Job::concluded) {
        return Ok(jobs);
    }
    for j in jobs.iter().filter(|j| !j.concluded()) {
        // It may conclude in this very moment: a refusal is no news.
        let _ = client.call("job-cancel", json!({"id": j.id}))?;
    }
    let deadline = Instant::now() + answer_timeout();
    loop {
        let jobs = mine(client.poll("query-jobs")?);
        if jobs.iter().all(Job::concluded) {
            return Ok(jobs);
        }
        if Instant::now() > deadline {
            let (done, open): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(Job::concluded);
            for (_, index) in open.iter().filter_map(|j| scope.role(&j.id)) {
                teardown.mark_stuck(index, late("a cancelled backup job does not end"));
            }
            return Ok(done);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn late(what: &str) -> Error {
    Error::new(Kind::Timeout, what.to_string())
}

fn end_exports(
    client: &mut Client,
    scope: Scope<'_>,
    exports: Vec<Export>,
    teardown: &mut Teardown,
) -> Result<()> {
    let mine: Vec<_> = exports.into_iter().filter(|e| scope.role(&e.id).is_some()).collect();
    for e in &mine {
        client.call("block-export-del", json!({"id": e.id, "mode": "hard"}))?.ok();
    }
    let deadline = Instant::now() + answer_timeout();
    while !mine.is_empty() {
        let left: Vec<Export> = client.poll("query-block-exports")?;
        let left: Vec<usize> =
            left.iter().filter_map(|e| scope.role(&e.id)).map(|(_, i)| i).collect();
        if left.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            left.iter().for_each(|i| teardown.mark_stuck(*i, late("an NBD export does not end")));
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Puts guests, overlays and exports back onto what is below our filters.
fn unplug(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    teardown: &mut Teardown,
) -> Result<()> {
    let filter = |n: &str| scope.role(n).filter(|(r, _)| *r == Role::Filter).map(|(_, i)| i);
    for n in &answers.nodes {
        let Some(index) = filter(&n.node_name).filter(|i| !teardown.stuck.contains(i)) else {
            continue;
        };
        // Raw nodes of exports are reopened below, all at once. Above a filter below a guest's device
        // they are another program's.
        let parents = answers.graph.parents(&n.node_name);
        let device = parents.iter().any(|(p, _)| p.kind == "block-backend" && !p.name.is_empty());
        let own = |name: &str| {
            let raw = answers.node(name).is_some_and(|p| p.drv == "raw");
            raw && !device || parse_object(name).is_some()
        };
        let job = object(scope.run, Role::Relink, index);
        let freed = remove_filter::detach(client, answers, &n.node_name, &own, &job);
        teardown.note(index, freed)?;
    }
    if !answers.nodes.iter().any(|n| filter(&n.node_name).is_some()) {
        return Ok(());
    }
    let mut options = Vec::new();
    let graph = graph::ask(client)?;
    for n in &answers.nodes {
        let Some(index) = filter(&n.node_name).filter(|i| !teardown.stuck.contains(i)) else {
            continue;
        };
        for (parent, role) in graph.parents(&n.node_name) {
            let Some(p) = answers.node(&parent.name) else { continue };
            if role == "file" && p.drv == "raw" && parse_object(&p.node_name).is_none() {
                let i = Insertion::Reopen {
                    node: p.node_name.clone(),
                    cache: p.cache.clone(),
                    detect_zeroes: p.detect_zeroes.clone(),
                };
                match below(&graph, &n.node_name) {
                    Ok(b) => options.extend(reopen_options(&i, &b).map(|o| (index, o))),
                    Err(e) => teardown.mark_stuck(index, e),
                }
            }
        }
    }
    // All at once first: that is one command for many disks.
    if reopen(client, options.iter().map(|(_, o)| o.clone()).collect()).is_err() {
        for (index, o) in options {
            let back = reopen(client, vec![o]);
            teardown.note(index, back)?;
        }
    }
    Ok(())
}

fn delete(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    role: Role,
    teardown: &mut Teardown,
) -> Result<()> {
    for n in &answers.nodes {
        let Some((_, index)) = scope.role(&n.node_name).filter(|(r, _)| *r == role) else {
            continue;
        };
        if !teardown.stuck.contains(&index) {
            let gone = client.execute("blockdev-del", json!({"node-name": n.node_name}));
            teardown.note(index, gone)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
