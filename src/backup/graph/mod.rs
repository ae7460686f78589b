//! What is between a guest and its disk, and who else works there, read from QEMU's block graph:
//! it shows what `query-block` hides. A path is a value: planning keeps it, and what is seen later is
//! compared with it.

pub(crate) mod bitmap;
pub(crate) mod expected;
pub(crate) mod foreign_jobs;

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::json;

use super::names::parse_object;
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::types::{Drive, Graph, GraphNode, Job};

/// Filters that a user puts above a disk for good, and QEMU's and our own copy-before-write: they
/// pass requests through to their `file` child.
const FILTERS: &[&str] =
    &["throttle", "copy-on-read", "copy-before-write", "compress", "blklogwrites", "preallocate"];

/// Filters of jobs, which pass requests through to their `backing` child.
const JOB_FILTERS: &[&str] = &["mirror_top", "commit_top"];

/// Drivers above a disk that write elsewhere too, change what is read, or fail at will.
const REFUSED: &[&str] = &["quorum", "replication", "blkdebug", "blkverify", "blkreplay"];

/// Kinds of jobs that have nodes in the graph.
pub(crate) const BLOCK_JOBS: &[&str] = &["backup", "commit", "mirror", "stream"];

/// The kind of a job that gives the guest and its disks back what they were at a snapshot.
pub(crate) const SNAPSHOT_LOAD: &str = "snapshot-load";

/// How many nodes are followed from a guest to its disk: filters, some few. A graph has no loops;
/// the bound is for an answer that has.
const DEEPEST: usize = 64;

/// The question for the whole graph.
pub(crate) const GRAPH: &str = "x-debug-query-block-graph";

/// Where a path begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// A guest's device: the name of its block backend, or its own where that has none.
    Device(String),
    /// A node above the disk that is exported.
    Node(String),
}

impl Root {
    /// The nodes directly below it: none where the device is gone or holds no medium; more than one
    /// where two backends have one name.
    pub fn tops<'a>(&self, graph: &'a Graph) -> Vec<&'a str> {
        match self {
            Root::Node(node) => graph.child(node, "file").into_iter().collect(),
            Root::Device(name) => {
                let named = graph.all("block-backend").filter(|b| b.name == *name);
                let held = named.flat_map(|b| graph.links(b.id)).filter(|l| l.role == "root");
                held.filter_map(|l| graph.name(l.child)).collect()
            }
        }
    }
}

/// The nodes from the one that a guest is attached to down to its disk's, both included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Where it begins.
    pub root: Root,
    /// The names of its nodes; never none.
    pub nodes: Vec<String>,
    /// Nodes above the first of them that nobody used.
    pub unused: Vec<String>,
}

impl Path {
    /// From `top` through filters to the node that holds the disk; `driver` tells a node's.
    pub fn down<'a>(
        graph: &Graph,
        root: Root,
        top: &str,
        driver: impl Fn(&str) -> Option<&'a str>,
    ) -> Path {
        let mut nodes = vec![top.to_string()];
        while let Some(at) = nodes.last().filter(|_| nodes.len() < DEEPEST) {
            let role = match driver(at) {
                Some(d) if FILTERS.contains(&d) => "file",
                Some(d) if JOB_FILTERS.contains(&d) => "backing",
                _ => break,
            };
            let Some(child) = graph.child(at, role) else { break };
            nodes.push(child.to_string());
        }
        let unused = unused_above(graph, top).into_iter().map(str::to_string).collect();
        Path { root, nodes, unused }
    }

    /// The node that holds the disk.
    pub fn disk(&self) -> &str {
        self.nodes.last().map_or("", String::as_str)
    }
}

/// The nodes directly above `node` that nobody uses, but for a run's own.
pub(crate) fn unused_above<'a>(graph: &'a Graph, node: &str) -> Vec<&'a str> {
    let parents = graph.parents(node).into_iter().map(|(p, _)| p);
    let nodes = parents.filter(|p| graph.id(&p.name) == Some(p.id));
    let unused = nodes.filter(|p| graph.parents(&p.name).is_empty());
    unused.map(|p| p.name.as_str()).filter(|n| parse_object(n).is_none()).collect()
}

/// Whether a backup cannot go by a node of this driver above a disk.
pub(crate) fn is_refused(driver: &str) -> bool {
    REFUSED.contains(&driver)
}

/// Whether a node of this driver passes requests through to one child.
pub(crate) fn is_filter(driver: &str) -> bool {
    FILTERS.contains(&driver) || JOB_FILTERS.contains(&driver)
}

/// Whether a node of this driver belongs to a job.
pub(crate) fn is_of_job(driver: &str) -> bool {
    JOB_FILTERS.contains(&driver)
}

/// The graph and the jobs at one time.
#[derive(Debug, Clone, Copy)]
pub struct GraphState<'a> {
    /// Who holds whom.
    pub graph: &'a Graph,
    /// `query-jobs`.
    pub jobs: &'a [Job],
}

impl GraphState<'_> {
    fn kind(&self, job: &str) -> &str {
        self.jobs.iter().find(|j| j.id == job).map_or("", |j| j.kind.as_str())
    }

    /// A job in words.
    pub fn job(&self, id: &str) -> String {
        match self.kind(id) {
            "" => format!("job {}", short(id)),
            kind => format!("job {} ({})", short(id), short(kind)),
        }
    }

    /// The job that has `node` for its own filter.
    fn owner(&self, node: &str) -> Option<&GraphNode> {
        let id = self.graph.id(node)?;
        let holds = |j: &&GraphNode| {
            self.graph.links(j.id).iter().any(|l| l.child == id && l.role == "main node")
        };
        self.graph.all("block-job").find(holds)
    }

    /// A node in words, with the job that it belongs to.
    pub fn node(&self, name: &str) -> String {
        match self.owner(name) {
            Some(job) => format!("node {} of {}", short(name), self.job(&job.name)),
            None => format!("node {}", short(name)),
        }
    }

    /// The jobs of other programs that work on one of `nodes` or change what is below them, sorted.
    /// One that only reads a shared image below the disk is not among them.
    pub fn working_on<'a>(&'a self, nodes: &[&str]) -> Vec<&'a str> {
        let foreign = |j: &&GraphNode| parse_object(&j.name).is_none();
        if !self.graph.all("block-job").any(|j| foreign(&j)) {
            return Vec::new();
        }
        let on: HashSet<u64> = nodes.iter().filter_map(|n| self.graph.id(n)).collect();
        let below = self.graph.below(on.iter().copied());
        let touches = |j: &&GraphNode| {
            self.graph.links(j.id).iter().any(|l| {
                let inside = l.writes || l.role == "main node";
                on.contains(&l.child) || inside && below.contains(&l.child)
            })
        };
        let jobs = self.graph.all("block-job").filter(foreign).filter(touches);
        let mut names: Vec<&str> = jobs.map(|j| j.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The nodes from `from` down to `to`, or to where no child leads there.
    pub fn chain(&self, from: &str, to: &str) -> Vec<&str> {
        let above = self.graph.above([to].into_iter());
        let mut found = Vec::new();
        let mut at = self.graph.id(from);
        while let Some(id) = at.filter(|_| found.len() < DEEPEST) {
            let Some(name) = self.graph.name(id) else { break };
            found.push(name);
            if name == to {
                break;
            }
            let leads = |l: &u64| self.graph.name(*l).is_some_and(|n| above.contains(n));
            at = self.graph.links(id).iter().map(|l| l.child).find(leads);
        }
        found
    }
}

/// Asks for the graph; no step (see `failpoint`), since it is asked for again and again.
///
/// # Errors
/// As [`Client::query`].
pub(crate) fn ask(client: &mut Client) -> Result<Graph> {
    if client.has(GRAPH) {
        return client.poll(GRAPH);
    }
    let drives: Vec<Drive> = client.query("query-block", json!({}))?;
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    let nodes: Vec<NodeChildren> =
        client.query("query-named-block-nodes", json!({"flat": true}))?;
    of_children(&nodes, &drives, &jobs)
}

/// As [`ask`], with the jobs of the same time.
///
/// # Errors
/// As [`Client::query`].
pub(crate) fn ask_with_jobs(client: &mut Client) -> Result<(Graph, Vec<Job>)> {
    if !client.has(GRAPH) {
        return Ok((ask(client)?, client.poll("query-jobs")?));
    }
    let (graph, jobs) = (client.ask_again(GRAPH)?, client.ask_again("query-jobs")?);
    Ok((client.result(graph)?, client.result(jobs)?))
}

/// A node of a QEMU that lists children.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct NodeChildren {
    node_name: String,
    drv: String,
    children: Vec<NamedChild>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct NamedChild {
    child: String,
    node_name: String,
}

/// The graph where each node tells of its children. Devices and jobs are not in it: a device is on
/// what is inserted, or on the filter that a job hides above that; and a job of another program may
/// work on all nodes. Without children the graph is empty, and no disk is taken.
fn of_children(nodes: &[NodeChildren], drives: &[Drive], jobs: &[Job]) -> Result<Graph> {
    let has_children = nodes.iter().any(|n| !n.children.is_empty());
    let nodes = if has_children { nodes } else { &[] };
    let ids: HashMap<&str, usize> =
        nodes.iter().enumerate().map(|(id, n)| (n.node_name.as_str(), id)).collect();
    let mut vertices = Vec::new();
    let mut edges = Vec::new();
    let mut hidden: HashMap<&str, &str> = HashMap::new();
    for (id, n) in nodes.iter().enumerate() {
        vertices.push(json!({"id": id, "type": "block-driver", "name": n.node_name}));
        for c in &n.children {
            edges.push(
                json!({"parent": id, "child": ids.get(c.node_name.as_str()), "name": c.child}),
            );
            if is_of_job(&n.drv) {
                hidden.insert(&c.node_name, &n.node_name);
            }
        }
    }
    for d in drives.iter().filter(|_| has_children) {
        let Some(inserted) = &d.inserted else { continue };
        let mut top = inserted.node_name.as_str();
        for _ in 0..DEEPEST {
            top = hidden.get(top).copied().unwrap_or(top);
        }
        let name = Some(&d.device).filter(|n| !n.is_empty()).or(d.qdev.as_ref());
        let id = vertices.len();
        vertices.push(json!({"id": id, "type": "block-backend", "name": name.map_or("", |n| n)}));
        edges.push(json!({"parent": id, "child": ids.get(top), "name": "root"}));
    }
    // All are there, as the list has them. One of the others on all nodes is as good as each of them.
    let mut all_nodes = 0..nodes.len();
    for j in jobs.iter().filter(|j| BLOCK_JOBS.contains(&j.kind.as_str())) {
        let id = vertices.len();
        vertices.push(json!({"id": id, "type": "block-job", "name": j.id}));
        if parse_object(&j.id).is_none() {
            let works = std::mem::take(&mut all_nodes);
            edges.extend(works.map(|c| json!({"parent": id, "child": c, "name": "source"})));
        }
    }
    edges.retain(|e| !e["child"].is_null());
    serde_json::from_value(json!({"nodes": vertices, "edges": edges})).map_err(|e| {
        Error::new(Kind::Corrupt, "the block graph has an unknown shape").with_source(e)
    })
}

/// The error for what another program does to a disk.
pub(crate) fn in_the_way(what: impl Into<String>) -> Error {
    Error::new(Kind::Busy, what.into())
        .remedy("back up when it has ended; --wait DURATION waits before it begins")
}

#[cfg(test)]
pub(in crate::backup) mod tests {
    use super::super::names::{Role, object};
    use super::*;
    use serde_json::json;

    pub(in crate::backup) const RUN: &str = "0123456789ab";

    /// Vertices are named; `d:`, `j:` and `b:` say what they are.
    pub(in crate::backup) fn graph(edges: &[(&str, &str, &str)]) -> Graph {
        let mut names: Vec<&str> = edges.iter().flat_map(|e| [e.0, e.2]).collect();
        names.sort_unstable();
        names.dedup();
        let id = |n: &str| names.iter().position(|x| *x == n).unwrap();
        let vertex = |n: &&str| {
            let (kind, name) = match n.split_once(':') {
                Some(("j", name)) => ("block-job", name),
                Some(("b", name)) => ("block-backend", name),
                _ => ("block-driver", *n),
            };
            json!({"id": id(n), "type": kind, "name": name})
        };
        let edge = |(p, role, c): &(&str, &str, &str)| json!({"parent": id(p), "child": id(c), "name": role, "perm": []});
        serde_json::from_value(json!({
            "nodes": names.iter().map(vertex).collect::<Vec<_>>(),
            "edges": edges.iter().map(edge).collect::<Vec<_>>()}))
        .unwrap()
    }

    pub(in crate::backup) fn job(id: &str, kind: &str) -> Job {
        Job { id: id.into(), kind: kind.into(), ..Default::default() }
    }

    pub(in crate::backup) fn own(role: Role) -> String {
        object(RUN, role, 0)
    }

    #[test]
    fn a_path_leads_through_filters_and_what_a_job_hides() {
        let g = graph(&[
            ("b:v0", "root", "m"),
            ("m", "backing", "t"),
            ("t", "file", "a"),
            ("a", "file", "f"),
        ]);
        let root = Root::Device("v0".into());
        assert_eq!(root.tops(&g), ["m"]);
        let driver = |n: &str| match n {
            "m" => Some("mirror_top"),
            "t" => Some("throttle"),
            _ => Some("qcow2"),
        };
        let p = Path::down(&g, root, "m", driver);
        assert_eq!(p.nodes, ["m", "t", "a"]);
        let round = graph(&[("x", "file", "y"), ("y", "file", "x")]);
        let p = Path::down(&round, Root::Node("x".into()), "x", |_| Some("throttle"));
        assert_eq!(p.nodes.len(), DEEPEST);
    }

    #[test]
    fn children_that_nodes_tell_of_make_a_graph() {
        let node = |name: &str, drv: &str, child: &str, below: &str| json!({"node-name": name, "drv": drv, "children": [{"child": child, "node-name": below}]});
        let nodes = json!([node("m", "mirror_top", "backing", "a"), node("a", "qcow2", "file", "f"),
            {"node-name": "f", "drv": "file"}]);
        let nodes: Vec<NodeChildren> = serde_json::from_value(nodes).unwrap();
        let drives = json!([{"device": "", "qdev": "v0", "inserted": {"node-name": "a"}}]);
        let drives: Vec<Drive> = serde_json::from_value(drives).unwrap();
        let g = of_children(&nodes, &drives, &[job("move", "mirror")]).unwrap();
        assert_eq!(Root::Device("v0".into()).tops(&g), ["m"]);
        let jobs = [job("move", "mirror")];
        let state = GraphState { graph: &g, jobs: &jobs };
        assert_eq!(state.working_on(&["a"]), ["move"]);
        let two = [("move", "mirror"), ("more", "stream"), ("make", "create")];
        let mut two: Vec<Job> = two.into_iter().map(|(id, kind)| job(id, kind)).collect();
        two.insert(0, job(&own(Role::Job), "backup"));
        let g = of_children(&nodes, &drives, &two).unwrap();
        let mut drawn: Vec<&str> = g.all("block-job").map(|j| j.name.as_str()).collect();
        drawn.sort_unstable();
        assert_eq!(drawn, [own(Role::Job).as_str(), "more", "move"]);
        assert_eq!(GraphState { graph: &g, jobs: &two }.working_on(&["a"]), ["move"]);
        let g = of_children(&nodes[1..], &drives, &[job("make", "create")]).unwrap();
        assert_eq!(Root::Device("v0".into()).tops(&g), ["a"]);
        assert_eq!((g.child("a", "file"), g.all("block-job").count()), (Some("f"), 0));
        // One that does not tell.
        assert!(of_children(&nodes[2..], &drives, &[]).unwrap().is_empty());
    }
}
