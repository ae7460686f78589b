//! Removing a filter from between a guest and its disk, without bypassing another program's node: what is
//! directly above the filter gets what is directly below it. Where that is not possible, nothing is changed
//! and the error names what is there.

use std::time::{Duration, Instant};

use serde_json::json;

use super::set_device_node;
use crate::backup::disks::Answers;
use crate::backup::graph;
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::timeout::answer_timeout;
use crate::qmp::types::{Export, Graph, GraphNode, Job};

/// What is directly above a filter.
enum Holder<'a> {
    /// A node or job of ours: the caller removes it.
    Own,
    /// A guest's device: its QOM path or id.
    Device(&'a str),
    /// An overlay that was added above the filter.
    Overlay(&'a str),
    /// Anything else, as messages name it.
    Other(String),
}

/// The node below a filter.
///
/// # Errors
/// QEMU does not say.
pub(crate) fn below(graph: &Graph, filter: &str) -> Result<String> {
    graph.child(filter, "file").map(str::to_string).ok_or_else(|| {
        Error::new(Kind::Peer, format!("QEMU does not report what is below {filter}"))
            .remedy("set the device's drive property back by hand (qom-set) and delete the filter")
    })
}

/// Detaches all that is above `filter` from it, except what is `own`. Overlays are relinked by a job
/// named `job`.
///
/// # Errors
/// `Busy` if another program's node or export is above it; what QEMU says.
pub(crate) fn detach(
    client: &mut Client,
    answers: &Answers,
    filter: &str,
    own: &dyn Fn(&str) -> bool,
    job: &str,
) -> Result<()> {
    let last = detach_once(client, answers, filter, own, job)?;
    let Some(e) = last else { return Ok(()) };
    // Somebody may have come in between, such as a new overlay: it is seen now.
    log::info!("{}: checking again", e.report());
    let answers = Answers::ask(client)?;
    detach_once(client, &answers, filter, own, job)?.map_or(Ok(()), Err)
}

/// As [`detach`]; returns why it could not be detached.
fn detach_once(
    client: &mut Client,
    answers: &Answers,
    filter: &str,
    own: &dyn Fn(&str) -> bool,
    job: &str,
) -> Result<Option<Error>> {
    // The answers are of some time ago.
    let graph = graph::ask(client)?;
    let parents = graph.parents(filter);
    let holders: Vec<_> = parents.iter().map(|(p, role)| holder(answers, p, role, own)).collect();
    for h in &holders {
        if let Holder::Other(who) = h {
            let what =
                format!("{} cannot be removed yet: {}", filter, name_export(client, filter, who)?);
            let remedy = "when that has ended, the next backup or fleecefs recover does it";
            return Ok(Some(Error::new(Kind::Busy, what).remedy(remedy)));
        }
    }
    for h in holders {
        let moved = match h {
            Holder::Device(qdev) => set_device_node(client, qdev, filter, &below(&graph, filter)?),
            Holder::Overlay(node) => relink(client, node, (filter, &below(&graph, filter)?), job),
            Holder::Own | Holder::Other(_) => Ok(()),
        };
        match moved {
            Err(e) if matches!(e.kind(), Kind::Busy | Kind::Peer) => return Ok(Some(e)),
            other => other?,
        }
    }
    Ok(None)
}

fn holder<'a>(
    answers: &'a Answers,
    parent: &'a GraphNode,
    role: &str,
    own: &dyn Fn(&str) -> bool,
) -> Holder<'a> {
    let state = answers.state();
    match parent.kind.as_str() {
        "block-backend" => match device(answers, &parent.name) {
            Some(qdev) => Holder::Device(qdev),
            None if parent.name.is_empty() => Holder::Other(String::new()),
            None => Holder::Other(format!("{} uses it", short(&parent.name))),
        },
        "block-job" if own(&parent.name) => Holder::Own,
        "block-job" => Holder::Other(format!("{} works on it", state.job(&parent.name))),
        _ if own(&parent.name) => Holder::Own,
        _ if role == "backing" && is_overlay(answers, &parent.name) => {
            Holder::Overlay(&parent.name)
        }
        _ => Holder::Other(format!("{} is above it", state.node(&parent.name))),
    }
}

/// The device that a backend belongs to.
fn device<'a>(answers: &'a Answers, backend: &str) -> Option<&'a str> {
    // By the name that QEMU gives the backend, else by its device's.
    let called =
        |d: &&crate::qmp::types::Drive| d.device == backend || d.qdev.as_deref() == Some(backend);
    let mut named = answers.drives.iter().filter(|_| !backend.is_empty()).filter(called);
    named.next()?.qdev.as_deref().filter(|q| !q.is_empty())
}

/// Whether a node is a layer of a chain, and not the filter of a mirror or a commit.
fn is_overlay(answers: &Answers, node: &str) -> bool {
    answers.node(node).is_some_and(|n| !graph::is_of_job(&n.drv))
}

/// An export has no name in the graph.
fn name_export(client: &mut Client, filter: &str, who: &str) -> Result<String> {
    if !who.is_empty() {
        return Ok(who.to_string());
    }
    let exports: Vec<Export> = client.query("query-block-exports", json!({}))?;
    Ok(match exports.iter().find(|e| e.node_name == filter) {
        Some(e) => {
            format!("export {} ({}) of another program uses it", short(&e.id), short(&e.kind))
        }
        None => "another program uses it".to_string(),
    })
}

/// Makes `below` the backing file of an overlay that has our filter there. A stream from above a
/// filter to the node below it copies nothing, and ends in just that; it also writes name and format
/// of the backing file into the overlay, where QEMU had written those of our filter.
fn relink(
    client: &mut Client,
    overlay: &str,
    (filter, below): (&str, &str),
    job: &str,
) -> Result<()> {
    let arguments = json!({"job-id": job, "device": overlay, "base-node": below});
    client.execute("block-stream", arguments)?;
    let deadline = Instant::now() + answer_timeout();
    while client.poll::<Vec<Job>>("query-jobs")?.iter().any(|j| j.id == job) {
        if Instant::now() > deadline {
            return Err(Error::new(Kind::Timeout, "the job that relinks an overlay does not end"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    if graph::ask(client)?.child(overlay, "backing") == Some(filter) {
        let what = format!("{filter} is still below {}", short(overlay));
        return Err(Error::new(Kind::Peer, what));
    }
    Ok(())
}
