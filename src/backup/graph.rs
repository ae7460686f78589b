//! What lies between a guest and its disk, and who else works there, read from QEMU's block graph:
//! it shows what `query-block` hides. A path is a value: planning keeps it, and what is seen later is
//! compared with it.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::json;

use super::names::{Role, object, parse_object};
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
pub const BLOCK_JOBS: &[&str] = &["backup", "commit", "mirror", "stream"];

/// The kind of a job that gives the guest and its disks back what they were at a snapshot.
pub const SNAPSHOT_LOAD: &str = "snapshot-load";

/// How many nodes are followed from a guest to its disk: filters, some few. A graph has no loops;
/// the bound is for an answer that has.
const DEEPEST: usize = 64;

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
        Path { root, nodes }
    }

    /// The node that holds the disk.
    pub fn disk(&self) -> &str {
        self.nodes.last().map_or("", String::as_str)
    }
}

/// Whether a backup cannot go by a node of this driver above a disk.
pub fn is_refused(driver: &str) -> bool {
    REFUSED.contains(&driver)
}

/// Whether a node of this driver belongs to a job.
pub fn is_of_job(driver: &str) -> bool {
    JOB_FILTERS.contains(&driver)
}

/// The graph and the jobs at one time.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// Who holds whom.
    pub graph: &'a Graph,
    /// `query-jobs`.
    pub jobs: &'a [Job],
}

impl Scene<'_> {
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
    fn chain(&self, from: &str, to: &str) -> Vec<&str> {
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

/// How far a disk has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Its filter is not in place.
    Before,
    /// Its filter is in place.
    Plugged,
    /// Its frozen view is being copied.
    Copying,
}

/// What the graph round a disk has to be: what planning saw, and what we added.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Our run.
    pub run: &'a str,
    /// The disk's number in it.
    pub index: usize,
    /// What it is called in messages.
    pub label: &'a str,
    /// What planning saw.
    pub path: &'a Path,
    /// What the job reads.
    pub source: Role,
}

impl Expected<'_> {
    fn own(&self, role: Role) -> String {
        object(self.run, role, self.index)
    }

    /// The first thing that is not as it has to be.
    pub fn difference(&self, scene: Scene<'_>, stage: Stage) -> Option<String> {
        let filter = self.own(Role::Filter);
        let below = self.path.nodes.iter().map(String::as_str);
        let nodes: Vec<&str> = match stage {
            Stage::Before => below.collect(),
            _ => [filter.as_str()].into_iter().chain(below).collect(),
        };
        let beside = self.allowed(scene, &filter);
        self.path_differs(scene, &nodes, &beside)
            .or_else(|| self.view_differs(scene, stage))
            .or_else(|| self.job_works(scene, &nodes, &beside))
    }

    /// Backups of other programs that copy before a write below our filter, by their own nodes:
    /// both views stay what they are. (Ours gets a write first and reads what was there through the
    /// other's filter, which passes reads through.)
    fn allowed<'s>(&self, scene: Scene<'s>, filter: &str) -> Vec<(&'s str, &'s str)> {
        let jobs = scene.graph.all("block-job").filter(|j| parse_object(&j.name).is_none());
        let backups =
            jobs.filter(|j| scene.jobs.iter().any(|o| o.id == j.name && o.kind == "backup"));
        let own = |j: &'s GraphNode| {
            let main = scene.graph.links(j.id).iter().find(|l| l.role == "main node")?;
            Some((j.name.as_str(), scene.graph.name(main.child)?))
        };
        let chain = scene.chain(filter, self.path.disk());
        let below: Vec<&str> = chain.into_iter().skip(1).collect();
        backups.filter_map(own).filter(|(_, node)| below.contains(node)).collect()
    }

    fn path_differs(
        &self,
        scene: Scene<'_>,
        nodes: &[&str],
        beside: &[(&str, &str)],
    ) -> Option<String> {
        let top = nodes.first()?;
        // A device that is gone writes no more: what its filter holds stays as it is.
        let tops = self.path.root.tops(scene.graph);
        let attached = tops.iter().find(|t| *t != top).filter(|_| !tops.contains(top));
        if let Some(other) = attached {
            let above = scene.chain(other, self.path.disk());
            return Some(match above.contains(top) {
                true => self.between(scene, other),
                false if above.contains(&self.path.disk()) => self.between(scene, other),
                false => format!("{} is attached to {} now", self.label, scene.node(other)),
            });
        }
        let chain = scene.chain(top, self.path.disk());
        let passed: Vec<&str> =
            chain.into_iter().filter(|n| !beside.iter().any(|(_, node)| node == n)).collect();
        if passed == nodes {
            return None;
        }
        match passed.iter().find(|n| !nodes.contains(n)) {
            Some(other) => Some(self.between(scene, other)),
            None => Some(format!("the nodes below {} are no longer those of before", self.label)),
        }
    }

    fn between(&self, scene: Scene<'_>, node: &str) -> String {
        format!("{} stands between {} and its disk", scene.node(node), self.label)
    }

    /// Whether what the job reads is our filter's frozen view, and nothing else.
    fn view_differs(&self, scene: Scene<'_>, stage: Stage) -> Option<String> {
        if stage < Stage::Copying {
            return None;
        }
        let (filter, view) = (self.own(Role::Filter), self.own(Role::Snapshot));
        let mut wanted = vec![
            (view.clone(), "file", filter.clone()),
            (filter.clone(), "target", self.own(Role::Fleece)),
        ];
        if self.source == Role::Blind {
            wanted.push((self.own(Role::Blind), "image", view));
        }
        // A job that has ended holds nothing.
        if let Some(copier) = self.copier(scene) {
            wanted.push((copier.to_string(), "file", self.own(self.source)));
        }
        let wrong = |(parent, role, child): &(String, &str, String)| {
            let now = scene.graph.child(parent, role).unwrap_or("nothing");
            (now != child).then(|| format!("{parent} reads {} instead of {child}", scene.node(now)))
        };
        wanted.iter().find_map(wrong)
    }

    /// The node that QEMU put above the frozen view for our job.
    fn copier<'s>(&self, scene: Scene<'s>) -> Option<&'s str> {
        let job = self.own(Role::Job);
        let job = scene.graph.all("block-job").find(|j| j.name == job)?;
        let main = scene.graph.links(job.id).iter().find(|l| l.role == "main node")?;
        scene.graph.name(main.child)
    }

    fn job_works(
        &self,
        scene: Scene<'_>,
        nodes: &[&str],
        beside: &[(&str, &str)],
    ) -> Option<String> {
        let roles = [Role::Snapshot, Role::Blind, Role::Fleece, Role::Target, Role::Lock];
        let own: Vec<String> = roles.into_iter().map(|r| self.own(r)).collect();
        let all: Vec<&str> = nodes.iter().copied().chain(own.iter().map(String::as_str)).collect();
        let jobs = scene.working_on(&all);
        let job = jobs.iter().find(|j| !beside.iter().any(|(id, _)| id == *j))?;
        Some(format!("{} works on {}", scene.job(job), self.label))
    }
}

/// Asks for the graph; no step (see [`crate::qmp::steps`]), since it is asked for again and again.
///
/// # Errors
/// As [`Client::query`].
pub fn ask(client: &mut Client) -> Result<Graph> {
    if client.has("x-debug-query-block-graph") {
        return client.poll("x-debug-query-block-graph");
    }
    let drives: Vec<Drive> = client.query("query-block", json!({}))?;
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    let nodes: Vec<Named> = client.query("query-named-block-nodes", json!({"flat": true}))?;
    of_children(&nodes, &drives, &jobs)
}

/// A node of a QEMU that lists children.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Named {
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
fn of_children(nodes: &[Named], drives: &[Drive], jobs: &[Job]) -> Result<Graph> {
    let told = nodes.iter().any(|n| !n.children.is_empty());
    let nodes = if told { nodes } else { &[] };
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
    for d in drives.iter().filter(|_| told) {
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
pub fn in_the_way(what: impl Into<String>) -> Error {
    Error::new(Kind::Busy, what.into())
        .remedy("back up when it has ended; --wait DURATION waits before it begins")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const RUN: &str = "0123456789ab";

    /// Vertices are named; `d:`, `j:` and `b:` say what they are.
    fn graph(edges: &[(&str, &str, &str)]) -> Graph {
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

    fn job(id: &str, kind: &str) -> Job {
        Job { id: id.into(), kind: kind.into(), ..Default::default() }
    }

    fn own(role: Role) -> String {
        object(RUN, role, 0)
    }

    fn path() -> Path {
        Path { root: Root::Device("v0".into()), nodes: vec!["t".into(), "a".into()] }
    }

    fn differs(edges: &[(&str, &str, &str)], jobs: &[Job], stage: Stage) -> Option<String> {
        let (graph, path) = (graph(edges), path());
        let e = Expected { run: RUN, index: 0, label: "v0", path: &path, source: Role::Snapshot };
        e.difference(Scene { graph: &graph, jobs }, stage)
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
    fn before_and_after_the_filter_the_path_is_what_it_was() {
        let before = [("b:v0", "root", "t"), ("t", "file", "a")];
        assert_eq!(differs(&before, &[], Stage::Before), None);
        assert!(differs(&before, &[], Stage::Plugged).unwrap().contains("node t stands between"));
        let c = own(Role::Filter);
        let plugged = [("b:v0", "root", c.as_str()), (&c, "file", "t"), ("t", "file", "a")];
        assert_eq!(differs(&plugged, &[], Stage::Plugged), None);
        // Unplugged from the guest, it stays as it is.
        assert_eq!(differs(&plugged[1..], &[], Stage::Plugged), None);
        let elsewhere = [plugged[1], plugged[2], ("b:v0", "root", "x")];
        let said = differs(&elsewhere, &[], Stage::Plugged).unwrap();
        assert_eq!(said, "v0 is attached to node x now");
    }

    #[test]
    fn a_mirror_is_named_wherever_it_stands() {
        let jobs = [job("move", "mirror")];
        let edges = [
            ("b:v0", "root", "#block1"),
            ("#block1", "backing", "t"),
            ("t", "file", "a"),
            ("j:move", "main node", "#block1"),
            ("j:move", "source", "t"),
        ];
        let said = differs(&edges, &jobs, Stage::Before).unwrap();
        assert_eq!(said, "node #block1 of job move (mirror) stands between v0 and its disk");
        let aside = [("b:v0", "root", "t"), ("t", "file", "a"), ("j:move", "target", "a")];
        let said = differs(&aside, &jobs, Stage::Before).unwrap();
        assert_eq!(said, "job move (mirror) works on v0");
    }

    #[test]
    fn a_backup_below_our_filter_is_let_be_and_one_above_is_not() {
        let (c, s, f) = (own(Role::Filter), own(Role::Snapshot), own(Role::Fleece));
        let (c, s) = (c.as_str(), s.as_str());
        let jobs = [job("other", "backup")];
        let ours = [(s, "file", c), (c, "target", f.as_str()), ("t", "file", "a")];
        let below = [
            ("b:v0", "root", c),
            (c, "file", "o"),
            ("o", "file", "t"),
            ("j:other", "main node", "o"),
        ];
        let all = [ours.as_slice(), &below].concat();
        assert_eq!(differs(&all, &jobs, Stage::Copying), None);
        // A stream is no backup.
        assert!(differs(&all, &[job("other", "stream")], Stage::Copying).is_some());
        let above = [
            ("b:v0", "root", "o"),
            ("o", "file", c),
            (c, "file", "t"),
            ("j:other", "main node", "o"),
        ];
        let said = differs(&[ours.as_slice(), &above].concat(), &jobs, Stage::Copying).unwrap();
        assert_eq!(said, "node o of job other (backup) stands between v0 and its disk");
        // The view was moved along.
        let moved = [
            (s, "file", "o"),
            ("o", "file", c),
            (c, "target", f.as_str()),
            ("t", "file", "a"),
            (c, "file", "t"),
        ];
        assert!(differs(&moved, &[], Stage::Copying).unwrap().contains("instead of"));
    }

    #[test]
    fn a_job_on_another_disk_that_reads_a_shared_image_is_none_of_ours() {
        let edges = [
            ("b:v0", "root", "t"),
            ("t", "file", "a"),
            ("a", "backing", "base"),
            ("b", "backing", "base"),
            ("j:move", "main node", "m"),
            ("m", "file", "b"),
            ("j:move", "intermediate node", "base"),
        ];
        assert_eq!(differs(&edges, &[job("move", "stream")], Stage::Before), None);
        let inside = [edges.as_slice(), &[("j:move", "main node", "base")]].concat();
        assert!(differs(&inside, &[job("move", "commit")], Stage::Before).is_some());
    }

    #[test]
    fn children_that_nodes_tell_of_make_a_graph() {
        let node = |name: &str, drv: &str, child: &str, below: &str| json!({"node-name": name, "drv": drv, "children": [{"child": child, "node-name": below}]});
        let nodes = json!([node("m", "mirror_top", "backing", "a"), node("a", "qcow2", "file", "f"),
            {"node-name": "f", "drv": "file"}]);
        let nodes: Vec<Named> = serde_json::from_value(nodes).unwrap();
        let drives = json!([{"device": "", "qdev": "v0", "inserted": {"node-name": "a"}}]);
        let drives: Vec<Drive> = serde_json::from_value(drives).unwrap();
        let g = of_children(&nodes, &drives, &[job("move", "mirror")]).unwrap();
        assert_eq!(Root::Device("v0".into()).tops(&g), ["m"]);
        let jobs = [job("move", "mirror")];
        let scene = Scene { graph: &g, jobs: &jobs };
        assert_eq!(scene.working_on(&["a"]), ["move"]);
        let two = [("move", "mirror"), ("more", "stream"), ("make", "create")];
        let mut two: Vec<Job> = two.into_iter().map(|(id, kind)| job(id, kind)).collect();
        two.insert(0, job(&own(Role::Job), "backup"));
        let g = of_children(&nodes, &drives, &two).unwrap();
        let mut drawn: Vec<&str> = g.all("block-job").map(|j| j.name.as_str()).collect();
        drawn.sort_unstable();
        assert_eq!(drawn, [own(Role::Job).as_str(), "more", "move"]);
        assert_eq!(Scene { graph: &g, jobs: &two }.working_on(&["a"]), ["move"]);
        let g = of_children(&nodes[1..], &drives, &[job("make", "create")]).unwrap();
        assert_eq!(Root::Device("v0".into()).tops(&g), ["a"]);
        assert_eq!((g.child("a", "file"), g.all("block-job").count()), (Some("f"), 0));
        // One that does not tell.
        assert!(of_children(&nodes[2..], &drives, &[]).unwrap().is_empty());
    }

    #[test]
    fn a_graph_that_cannot_be_ends() {
        let edges =
            [("b:v0", "root", "t"), ("t", "file", "x"), ("x", "file", "t"), ("x", "backing", "a")];
        assert!(differs(&edges, &[], Stage::Before).is_some());
        assert!(differs(&[], &[], Stage::Copying).is_some());
    }
}
