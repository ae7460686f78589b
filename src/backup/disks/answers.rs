//! What QEMU's answers say of nodes and drives, before any of it is judged.

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::media;
use super::open_files::HostView;
use crate::backup::graph;
use crate::error::{Error, Kind, Result};
use crate::manifest::BackingFile;
use crate::qmp::Client;
use crate::qmp::client::check_length;
use crate::qmp::types::{Drive, Export, Graph, Image, Job, Node};

/// How many nodes are followed from a disk to its file: filters and formats, some few. A graph has
/// no loops; the bound is for an answer that has.
const DEEPEST: usize = 64;

/// What the answers say, before any of it is judged.
#[derive(Debug, Default)]
pub struct Answers {
    /// `query-block`.
    pub drives: Vec<Drive>,
    /// `query-named-block-nodes`.
    pub nodes: Vec<Node>,
    /// The same, as QEMU wrote it.
    pub raw_nodes: Value,
    /// The first node of each name.
    by_name: HashMap<String, usize>,
    /// See [`Answers::encrypted`].
    encrypted: OnceLock<HashSet<String>>,
    /// See [`Answers::record`].
    view: OnceLock<Option<HostView>>,
    /// `x-debug-query-block-graph`.
    pub graph: Graph,
    /// `query-jobs`.
    pub jobs: Vec<Job>,
    /// `query-block-exports`, where the graph has users without a name.
    pub exports: Vec<Export>,
    /// Whether this is QEMU with a guest.
    pub guest: bool,
    /// QEMU's process, if it is one of this host; see [`crate::qmp::peer::process`].
    pub process: String,
    /// Whether that is a daemon of ours, over images that nobody else can exchange.
    pub ours: bool,
    /// The types of the devices whose medium can be removed, by their names.
    types: HashMap<String, String>,
    /// The serial numbers of disks, by their devices' names, if they were asked for.
    serials: HashMap<String, String>,
}

impl Answers {
    /// Asks.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn ask(client: &mut Client) -> Result<Self> {
        let drives = client.ask("query-block", json!({}))?;
        let graph = match client.has(graph::GRAPH) {
            true => Some(client.ask_again(graph::GRAPH)?),
            false => None,
        };
        let nodes = client.ask("query-named-block-nodes", json!({}))?;
        let jobs = client.ask("query-jobs", json!({}))?;
        let drives: Vec<Drive> = client.result(drives)?;
        // Read before the other large answer is in memory.
        let graph = graph.map(|g| client.result(g)).transpose()?;
        let raw_nodes = client.answer(nodes)??;
        let jobs = client.result(jobs)?;
        let graph = graph.map_or_else(|| graph::ask(client), Ok)?;
        let types = media::types(client, &drives)?;
        let exports = match graph.all("block-backend").any(|b| b.name.is_empty()) {
            true => client.poll("query-block-exports")?,
            false => Vec::new(),
        };
        Ok(Answers {
            types,
            jobs,
            exports,
            process: client.process().unwrap_or_default(),
            ..Self::of(drives, raw_nodes, graph, client.has_guest())?
        })
    }

    /// Asks for the disks' serial numbers: only who looks for the disks' points needs them.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn ask_serials(&mut self, client: &mut Client) -> Result<()> {
        self.serials = media::serials(client, &self.drives)?;
        Ok(())
    }

    /// The serial number of a disk; empty where it has none, or nobody asked.
    pub fn serial(&self, qdev: &str) -> String {
        self.serials.get(qdev).cloned().unwrap_or_default()
    }

    /// From `top` down to the node that holds the disk.
    pub fn path_down(&self, root: graph::Root, top: &str) -> graph::Path {
        let driver = |n: &str| self.node(n).map(|n| n.drv.as_str());
        graph::Path::down(&self.graph, root, top, driver)
    }

    /// The graph, with the jobs that work in it.
    pub fn state(&self) -> graph::GraphState<'_> {
        graph::GraphState { graph: &self.graph, jobs: &self.jobs }
    }

    /// From the answers themselves.
    ///
    /// # Errors
    /// `Corrupt` if the answer about nodes has an unknown shape.
    pub fn of(drives: Vec<Drive>, raw_nodes: Value, graph: Graph, guest: bool) -> Result<Self> {
        let nodes: Vec<Node> = parse(&raw_nodes, "query-named-block-nodes")?;
        let mut by_name = HashMap::new();
        for (at, n) in nodes.iter().enumerate() {
            by_name.entry(n.node_name.clone()).or_insert(at);
        }
        let encrypted = OnceLock::new();
        Ok(Answers {
            drives,
            nodes,
            raw_nodes,
            by_name,
            encrypted,
            graph,
            guest,
            ..Self::default()
        })
    }

    /// The type of a device whose medium can be removed.
    pub fn device_type(&self, qdev: &str) -> Option<&String> {
        self.types.get(qdev)
    }

    /// Whether anything of the disk is encrypted: itself, its file, or what is below it.
    pub fn is_encrypted(&self, disk: &Node) -> bool {
        has_luks(disk) || self.encrypted().contains(&disk.node_name)
    }

    /// The nodes that are encrypted, or have such a node below them; found once for all disks.
    fn encrypted(&self) -> &HashSet<String> {
        self.encrypted.get_or_init(|| {
            let luks = self.nodes.iter().filter(|n| has_luks(n)).map(|n| n.node_name.as_str());
            self.graph.above(luks).into_iter().map(str::to_string).collect()
        })
    }

    /// The named node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(*self.by_name.get(name)?)
    }

    /// The node that a guest's device is attached to: above `inserted` where a job hides its filter.
    pub fn top_of(&self, root: &graph::Root, inserted: &str) -> Option<&str> {
        let inserted = self.graph.id(inserted)?;
        let leads =
            |top: &&str| self.graph.below(self.graph.id(top).into_iter()).contains(&inserted);
        root.tops(&self.graph).into_iter().find(leads)
    }

    /// The name of the file, device or remote image at the bottom of a node.
    pub fn file_of(&self, node: &Node) -> String {
        let plain = |n: &Node| !n.file.starts_with("json:") && !n.file.starts_with("blkdebug:");
        let mut at = node;
        for _ in 0..DEEPEST {
            if plain(at) {
                return at.file.clone();
            }
            let name = &at.node_name;
            let child = self.graph.child(name, "file").or_else(|| self.graph.child(name, "image"));
            let Some(child) = child.and_then(|c| self.node(c)) else { break };
            at = child;
        }
        described_file(&at.file).unwrap_or_default()
    }

    /// What tells whether the file is written to that QEMU calls `name`, if it is certain which one that is.
    pub fn record(&self, name: &str) -> Option<BackingFile> {
        let view = self.view.get_or_init(|| {
            let process = Some(self.process.clone()).filter(|p| !p.is_empty());
            let view = HostView::of(process, self.ours);
            let files = self.nodes.iter().filter(|n| n.drv == "file" || n.drv == "host_device");
            let names: Vec<String> = files.map(|n| self.file_of(n)).collect();
            let names = names.iter().map(String::as_str).collect();
            view.is_certain(&names).then_some(view)
        });
        view.as_ref()?.record(name)
    }

    /// The driver of the node that holds a disk's bytes.
    pub fn storage_of(&self, node: &Node) -> &str {
        let mut at = self.node(&node.node_name);
        for _ in 0..DEEPEST {
            let Some(n) = at else { break };
            match self
                .graph
                .child(&n.node_name, "file")
                .or_else(|| self.graph.child(&n.node_name, "image"))
            {
                Some(child) => at = self.node(child),
                None => return &n.drv,
            }
        }
        ""
    }

    /// `qemu-img info` of a node, as QEMU wrote it.
    pub fn raw_image(&self, node: &str) -> Value {
        let at = self.by_name.get(node).and_then(|at| self.raw_nodes.get(*at)?.get("image"));
        at.cloned().unwrap_or_default()
    }
}

pub(super) fn parse<T: DeserializeOwned>(v: &Value, what: &str) -> Result<T> {
    check_length(v, what)?;
    T::deserialize(v).map_err(|e| {
        Error::new(Kind::Corrupt, format!("the answer to {what} has an unknown shape"))
            .with_source(e)
    })
}

fn has_luks(n: &Node) -> bool {
    n.encrypted || encrypted_image(&n.image) || n.drv == "luks"
}

fn encrypted_image(image: &Image) -> bool {
    let mut at = Some(image);
    while let Some(i) = at {
        let luks = i.format_specific.get("type").and_then(Value::as_str) == Some("luks");
        if i.encrypted || luks {
            return true;
        }
        at = i.backing_image.as_deref();
    }
    false
}

/// The file that a `json:` description is about. QEMU has no shorter name for what is not found by
/// its name alone, above all for an RBD image: that is `rbd:POOL/IMAGE` here, or
/// `rbd:POOL/NAMESPACE/IMAGE`, wherever its cluster's configuration lies.
pub(super) fn described_file(name: &str) -> Option<String> {
    let all: Value = serde_json::from_str(name.strip_prefix("json:")?).ok()?;
    let mut at = &all;
    while let Some(child) = at.get("file").or_else(|| at.get("image")).filter(|c| c.is_object()) {
        at = child;
    }
    let text = |k: &str| at.get(k).and_then(Value::as_str).filter(|t| !t.is_empty());
    match text("driver")? {
        "rbd" => {
            let parts = [text("pool"), text("namespace"), Some(text("image")?)];
            Some(format!("rbd:{}", parts.into_iter().flatten().collect::<Vec<_>>().join("/")))
        }
        "file" | "host_device" | "host_cdrom" => text("filename").map(str::to_string),
        // What is on another host, or a socket, is no file of this one.
        _ => None,
    }
}
