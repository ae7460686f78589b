//! Taking everything of a run out of QEMU, from whatever state it is in, in the order that QEMU
//! accepts: jobs, exports, frozen views, filters (the guest put back on its disk first), targets,
//! fleeces. It goes by names alone and needs no memory of how far the run had come.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::fleece::{close_image, empty, plug, reopen, reopen_options};
use super::names::{Role, parse_object};
use super::seen::{Answers, Insertion};
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::types::{Export, FdSet, Job};

/// How long a cancelled job or a closed export may take to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is taken down.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// The run.
    pub run: &'a str,
    /// Only this disk of it.
    pub index: Option<usize>,
}

impl Scope<'_> {
    fn role(&self, name: &str) -> Option<(Role, usize)> {
        let (run, role, index) = parse_object(name)?;
        let mine = run == self.run && self.index.is_none_or(|i| i == index);
        mine.then_some((role, index))
    }
}

/// What was found while taking it down.
#[derive(Debug, Clone, Default)]
pub struct Torn {
    /// Disks whose job had finished without error, and whose image QEMU has now closed.
    pub finished: Vec<usize>,
    /// Files of target and fleece nodes, by disk.
    pub files: Vec<(Role, usize, PathBuf)>,
    /// Whether there was anything.
    pub any: bool,
}

/// The runs that have left something in QEMU.
///
/// # Errors
/// As [`Client::execute`].
pub fn runs_in_qemu(client: &mut Client) -> Result<Vec<String>> {
    let answers = Answers::ask(client)?;
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    let exports: Vec<Export> = client.query("query-block-exports", json!({}))?;
    let names = answers.nodes.iter().map(|n| n.node_name.as_str());
    let names = names.chain(jobs.iter().map(|j| j.id.as_str()));
    let names = names.chain(exports.iter().map(|e| e.id.as_str()));
    let mut runs: Vec<String> =
        names.filter_map(|n| Some(parse_object(n)?.0.to_string())).collect();
    runs.sort();
    runs.dedup();
    Ok(runs)
}

/// Takes it all down.
///
/// # Errors
/// QEMU refuses or is gone; what could be removed before that is removed.
pub fn teardown(client: &mut Client, scope: Scope<'_>) -> Result<Torn> {
    let mut torn = Torn::default();
    let jobs = end_jobs(client, scope)?;
    end_exports(client, scope)?;
    let answers = Answers::ask(client)?;
    note_files(&answers, scope, &mut torn);
    torn.any |= !jobs.is_empty();
    take_off(client, &answers, scope)?;
    // The target first, then its job: a job that is still listed says that its image may not be
    // closed yet, one that is gone has left a closed image.
    torn.finished = close_finished(client, &answers, scope, &jobs)?;
    let closed = |i: usize| torn.finished.contains(&i);
    for n in &answers.nodes {
        if scope.role(&n.node_name).is_some_and(|(r, i)| r == Role::Target && !closed(i)) {
            client.execute("blockdev-del", json!({"node-name": n.node_name}))?;
        }
    }
    for j in &jobs {
        client.execute("job-dismiss", json!({"id": j.id}))?;
        // Closed before, without a node to close now.
        if let (None, Some((_, index))) = (&j.error, scope.role(&j.id))
            && !answers
                .nodes
                .iter()
                .any(|n| scope.role(&n.node_name) == Some((Role::Target, index)))
        {
            torn.finished.push(index);
        }
    }
    delete(client, &answers, scope, Role::Scratch)?;
    drop_descriptors(client, scope)?;
    Ok(torn)
}

/// Lets go of the guest: frozen view, filter and fleece leave QEMU. The target stays.
///
/// # Errors
/// As [`teardown`].
pub fn detach(client: &mut Client, scope: Scope<'_>) -> Result<()> {
    let answers = Answers::ask(client)?;
    take_off(client, &answers, scope)
}

fn take_off(client: &mut Client, answers: &Answers, scope: Scope<'_>) -> Result<()> {
    delete(client, answers, scope, Role::Blind)?;
    delete(client, answers, scope, Role::Snapshot)?;
    unplug(client, answers, scope)?;
    delete(client, answers, scope, Role::Filter)?;
    for n in &answers.nodes {
        let fleece = scope.role(&n.node_name).is_some_and(|(r, _)| r == Role::Fleece);
        let path = Path::new(&n.file);
        if fleece && path.is_absolute() && !path.starts_with("/dev") {
            // What is not emptied is closed all the same, only slower.
            let _ = empty(path).inspect_err(|e| log::warn!("{}", e.report()));
        }
    }
    delete(client, answers, scope, Role::Fleece)
}

/// Closes the targets of jobs that ended well; gives those of which QEMU had nothing left that it
/// could not write.
fn close_finished(
    client: &mut Client,
    answers: &Answers,
    scope: Scope<'_>,
    jobs: &[Job],
) -> Result<Vec<usize>> {
    let mut closed = Vec::new();
    for n in &answers.nodes {
        let Some((Role::Target, index)) = scope.role(&n.node_name) else { continue };
        let good = |j: &&Job| j.error.is_none() && scope.role(&j.id) == Some((Role::Job, index));
        if jobs.iter().find(good).is_none() {
            continue;
        }
        match close_image(client, &n.node_name) {
            Ok(()) => closed.push(index),
            Err(e) if matches!(e.kind(), Kind::Io | Kind::NoSpace) => {
                log::warn!("{}: {}", n.file, e.report());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(closed)
}

/// Takes back the descriptors that were handed over for these nodes.
fn drop_descriptors(client: &mut Client, scope: Scope<'_>) -> Result<()> {
    if !client.takes_descriptors() {
        return Ok(());
    }
    let sets: Vec<FdSet> = client.query("query-fdsets", json!({}))?;
    for s in sets {
        let names = s.fds.iter().filter_map(|f| f.opaque.as_deref());
        if names.filter_map(|n| scope.role(n)).next().is_some() {
            client.execute("remove-fd", json!({"fdset-id": s.fdset_id}))?;
        }
    }
    Ok(())
}

fn note_files(answers: &Answers, scope: Scope<'_>, torn: &mut Torn) {
    for n in &answers.nodes {
        if let Some((role, index)) = scope.role(&n.node_name) {
            torn.any = true;
            if matches!(role, Role::Target | Role::Fleece) {
                torn.files.push((role, index, PathBuf::from(&n.file)));
            }
        }
    }
}

/// Cancels jobs and waits until they have concluded; gives all of them.
fn end_jobs(client: &mut Client, scope: Scope<'_>) -> Result<Vec<Job>> {
    let mine = |jobs: Vec<Job>| -> Vec<Job> {
        jobs.into_iter().filter(|j| scope.role(&j.id).is_some()).collect()
    };
    for j in mine(client.query("query-jobs", json!({}))?).iter().filter(|j| !j.concluded()) {
        // It may conclude in this very moment: a refusal is no news.
        let _ = client.call("job-cancel", json!({"id": j.id}))?;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = mine(client.poll("query-jobs")?);
        if jobs.iter().all(Job::concluded) {
            return Ok(jobs);
        }
        patience(deadline, "a cancelled backup job does not end")?;
    }
}

fn end_exports(client: &mut Client, scope: Scope<'_>) -> Result<()> {
    let exports: Vec<Export> = client.query("query-block-exports", json!({}))?;
    let mine: Vec<_> = exports.into_iter().filter(|e| scope.role(&e.id).is_some()).collect();
    for e in &mine {
        client.call("block-export-del", json!({"id": e.id, "mode": "hard"}))?.ok();
    }
    let deadline = Instant::now() + PATIENCE;
    while !mine.is_empty() {
        let left: Vec<Export> = client.poll("query-block-exports")?;
        if !left.iter().any(|e| scope.role(&e.id).is_some()) {
            break;
        }
        patience(deadline, "an NBD export does not end")?;
    }
    Ok(())
}

fn patience(deadline: Instant, what: &str) -> Result<()> {
    if Instant::now() > deadline {
        return Err(Error::new(Kind::Timeout, what.to_string()));
    }
    std::thread::sleep(Duration::from_millis(10));
    Ok(())
}

/// Puts guests and exports back onto what is below our filters.
fn unplug(client: &mut Client, answers: &Answers, scope: Scope<'_>) -> Result<()> {
    let is_filter = |n: &str| scope.role(n).is_some_and(|(r, _)| r == Role::Filter);
    for d in &answers.drives {
        let (Some(qdev), Some(node)) = (&d.qdev, &d.inserted) else { continue };
        if is_filter(&node.node_name) {
            let below = below(answers, &node.node_name)?;
            plug(client, qdev, &below)?;
        }
    }
    let mut options = Vec::new();
    for n in answers.nodes.iter().filter(|n| is_filter(&n.node_name)) {
        for (parent, role) in answers.graph.parents(&n.node_name) {
            let Some(p) = answers.node(&parent.name) else { continue };
            if role == "file" && p.drv == "raw" && parse_object(&p.node_name).is_none() {
                let i = Insertion::Reopen {
                    node: p.node_name.clone(),
                    cache: p.cache.clone(),
                    detect_zeroes: p.detect_zeroes.clone(),
                };
                options.extend(reopen_options(&i, &below(answers, &n.node_name)?));
            }
        }
    }
    reopen(client, options)
}

fn below(answers: &Answers, filter: &str) -> Result<String> {
    answers.graph.child(filter, "file").map(str::to_string).ok_or_else(|| {
        Error::new(Kind::Peer, format!("QEMU does not say what is below {filter}"))
            .remedy("set the device's drive property back by hand (qom-set) and delete the filter")
    })
}

fn delete(client: &mut Client, answers: &Answers, scope: Scope<'_>, role: Role) -> Result<()> {
    for n in &answers.nodes {
        if scope.role(&n.node_name).is_some_and(|(r, _)| r == role) {
            client.execute("blockdev-del", json!({"node-name": n.node_name}))?;
        }
    }
    Ok(())
}
