//! The parts of QEMU's answers that we read. Unknown fields are ignored, missing ones default.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::budget::short;

/// How many names of the schema are looked at (QEMU 10 has some 6,000), and of how many bytes.
const NAMES: usize = 65_536;
const LONGEST_NAME: usize = 64;

/// QEMU's version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Version {
    /// Major, minor, micro.
    pub number: (u64, u64, u64),
    /// The packager's addition.
    pub package: String,
}

impl Version {
    /// Reads it off the greeting; `None` if that is no QMP greeting.
    pub fn from_greeting(greeting: &Value) -> Option<Self> {
        let v = greeting.get("QMP")?.get("version")?;
        let part = |k: &str| v.get("qemu")?.get(k)?.as_u64();
        let package = v.get("package").and_then(Value::as_str).unwrap_or_default();
        Some(Version {
            number: (part("major")?, part("minor")?, part("micro").unwrap_or(0)),
            package: short(package),
        })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (a, b, c) = self.number;
        write!(f, "{a}.{b}.{c}")?;
        if self.package.is_empty() { Ok(()) } else { write!(f, " ({})", self.package) }
    }
}

/// Names that occur in QEMU's schema: members of objects and values of enumerations.
#[derive(Debug, Clone, Default)]
pub struct Features {
    names: HashSet<String>,
}

impl Features {
    /// Collects the names of `query-qmp-schema`, as far as there are not more than anybody has.
    pub fn from_schema(schema: &Value) -> Self {
        let types = || schema.as_array().into_iter().flatten();
        let lists = |key: &'static str| types().filter_map(move |t| t.get(key)?.as_array());
        let members = lists("members").flatten().filter_map(|m| m.get("name")?.as_str());
        let values = lists("values").flatten().filter_map(Value::as_str);
        let names = members.chain(values).filter(|n| n.len() <= LONGEST_NAME).take(NAMES);
        Features { names: names.map(str::to_string).collect() }
    }

    /// Whether the name occurs. Only for names that are unmistakable.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

/// A dirty bitmap as a node reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Bitmap {
    /// Its name; internal ones have none.
    pub name: Option<String>,
    /// Whether it records writes.
    pub recording: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether a job or export holds it.
    pub busy: bool,
    /// Whether it was in use when QEMU died: worthless.
    pub inconsistent: bool,
    /// Bytes per bit.
    pub granularity: u64,
    /// Dirty bytes.
    pub count: u64,
}

/// `ImageInfo`, as far as we read it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Image {
    /// Name of the file; may be a `json:` description.
    pub filename: String,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file takes, if the file system says.
    pub actual_size: Option<u64>,
    /// Cluster size in bytes, where the format has one.
    pub cluster_size: Option<u64>,
    /// Whether the image is encrypted.
    pub encrypted: bool,
    /// The format's own details.
    pub format_specific: Value,
    /// The image below.
    pub backing_image: Option<Box<Image>>,
}

/// `BlockDeviceInfo`: a node.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Node {
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    /// Read-only.
    pub ro: bool,
    /// Encrypted.
    pub encrypted: bool,
    /// The file's name.
    pub file: String,
    /// What is in it.
    pub image: Image,
    /// Its bitmaps.
    pub dirty_bitmaps: Vec<Bitmap>,
    /// Cache mode.
    pub cache: Value,
    /// Write-zero detection.
    #[serde(rename = "detect_zeroes")]
    pub detect_zeroes: String,
}

impl Node {
    /// The named bitmap.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.dirty_bitmaps.iter().find(|b| b.name.as_deref() == Some(name))
    }
}

/// `BlockInfo`: a guest's drive.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Drive {
    /// The block backend's name; empty with `-blockdev`.
    pub device: String,
    /// The guest device's id or QOM path.
    pub qdev: Option<String>,
    /// Whether the medium can be removed: CDs, floppies.
    pub removable: bool,
    /// The medium.
    pub inserted: Option<Node>,
    /// I/O status, if the device reports it.
    pub io_status: Option<String>,
}

/// `JobInfo`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Job {
    /// Its id.
    pub id: String,
    /// What kind it is.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its state.
    pub status: String,
    /// How far it is, in the unit of `total_progress`.
    pub current_progress: u64,
    /// What there is to do.
    pub total_progress: u64,
    /// Why it failed.
    pub error: Option<String>,
}

impl Job {
    /// Whether it has come to its end.
    pub fn concluded(&self) -> bool {
        self.status == "concluded"
    }
}

/// `BlockExportInfo`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Export {
    /// Its id.
    pub id: String,
    /// What it exports.
    pub node_name: String,
    /// NBD, FUSE, …
    #[serde(rename = "type")]
    pub kind: String,
}

/// `FdsetInfo`: descriptors that were handed over.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct FdSet {
    /// Its number.
    pub fdset_id: u64,
    /// The descriptors.
    pub fds: Vec<PassedFd>,
}

impl FdSet {
    /// What was said about its descriptors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.fds.iter().filter_map(|f| f.opaque.as_deref())
    }
}

/// One descriptor of such a set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct PassedFd {
    /// What was said about it.
    pub opaque: Option<String>,
}

/// `x-debug-query-block-graph`: who is attached to whom. Unstable by name, unchanged since 4.0.
///
/// It is as QEMU says, which may be a graph with loops or with many nodes of one name: every walk
/// here ends, and takes no longer than the graph is large.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(from = "RawGraph")]
pub struct Graph {
    nodes: HashMap<u64, GraphNode>,
    /// The first block node of each name.
    by_name: HashMap<String, u64>,
    children: HashMap<u64, Vec<Link>>,
    parents: HashMap<u64, Vec<(u64, String)>>,
}

/// How a parent holds a child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The child's number.
    pub child: u64,
    /// The role: `file`, `backing`, `target`, `root`, `main node`.
    pub role: String,
    /// Whether the parent may change what the child holds.
    pub writes: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawGraph {
    /// Nodes, backends and jobs.
    nodes: Vec<GraphNode>,
    /// Parents to children.
    edges: Vec<GraphEdge>,
}

impl From<RawGraph> for Graph {
    fn from(raw: RawGraph) -> Self {
        let mut g = Graph::default();
        for e in raw.edges {
            g.parents.entry(e.child).or_default().push((e.parent, e.name.clone()));
            let writes =
                e.perm.iter().any(|p| ["write", "write-unchanged", "resize"].contains(&p.as_str()));
            let link = Link { child: e.child, role: e.name, writes };
            g.children.entry(e.parent).or_default().push(link);
        }
        for n in raw.nodes {
            if n.kind == "block-driver" {
                g.by_name.entry(n.name.clone()).or_insert(n.id);
            }
            g.nodes.entry(n.id).or_insert(n);
        }
        g
    }
}

/// One vertex.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct GraphNode {
    /// Its number in this answer.
    pub id: u64,
    /// `block-backend`, `block-job` or `block-driver`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// One edge.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GraphEdge {
    parent: u64,
    child: u64,
    /// The role: `file`, `backing`, `target`, `root`.
    name: String,
    /// What the parent may do.
    perm: Vec<String>,
}

impl Graph {
    /// The name of `node`'s child in the given role.
    pub fn child(&self, node: &str, role: &str) -> Option<&str> {
        let id = self.by_name.get(node)?;
        self.name(self.links(*id).iter().find(|l| l.role == role)?.child)
    }

    /// Whether QEMU told of nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether QEMU tells who may write: somebody may, wherever there is a guest.
    pub fn tells_rights(&self) -> bool {
        self.children.values().flatten().any(|l| l.writes)
    }

    /// Whether a vertex may change what `node` holds.
    pub fn writes(&self, parent: u64, node: &str) -> bool {
        let id = self.id(node);
        self.links(parent).iter().any(|l| l.writes && Some(l.child) == id)
    }

    /// What a vertex holds.
    pub fn links(&self, id: u64) -> &[Link] {
        self.children.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The number of the block node of this name.
    pub fn id(&self, node: &str) -> Option<u64> {
        self.by_name.get(node).copied()
    }

    /// All vertices of one kind: `block-backend`, `block-job`.
    pub fn all<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a GraphNode> {
        self.nodes.values().filter(move |n| n.kind == kind)
    }

    /// These vertices and all below them.
    pub fn below(&self, of: impl Iterator<Item = u64>) -> HashSet<u64> {
        let mut found: HashSet<u64> = of.collect();
        let mut todo: Vec<u64> = found.iter().copied().collect();
        while let Some(at) = todo.pop() {
            let fresh = self.links(at).iter().map(|l| l.child).filter(|c| found.insert(*c));
            todo.extend(fresh);
        }
        found
    }

    /// Names of these nodes and of all above them, in whatever role.
    pub fn above<'a>(&'a self, nodes: impl Iterator<Item = &'a str>) -> HashSet<&'a str> {
        let mut names: HashSet<&str> = nodes.collect();
        let mut todo: Vec<u64> =
            names.iter().filter_map(|n| self.by_name.get(*n)).copied().collect();
        let mut found: HashSet<u64> = todo.iter().copied().collect();
        while let Some(at) = todo.pop() {
            for (parent, _) in self.parents.get(&at).into_iter().flatten() {
                if found.insert(*parent) {
                    todo.push(*parent);
                    names.extend(self.name(*parent));
                }
            }
        }
        names
    }

    /// Names of the nodes that have `node` as a child, with the role; backends have no name here.
    pub fn parents<'a>(&'a self, node: &str) -> Vec<(&'a GraphNode, &'a str)> {
        let Some(id) = self.by_name.get(node) else { return Vec::new() };
        let edges = self.parents.get(id).into_iter().flatten();
        edges.filter_map(|(p, role)| Some((self.nodes.get(p)?, role.as_str()))).collect()
    }

    /// A vertex's name.
    pub fn name(&self, id: u64) -> Option<&str> {
        self.nodes.get(&id).map(|n| n.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_greeting_is_recognised_and_nothing_else() {
        let g = json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2},
            "package": ""}, "capabilities": []}});
        assert_eq!(Version::from_greeting(&g).unwrap().to_string(), "10.0.2");
        assert!(Version::from_greeting(&json!({"return": {}})).is_none());
    }

    #[test]
    fn the_graph_is_walked_both_ways() {
        let g: Graph = serde_json::from_value(json!({
            "nodes": [{"id": 1, "type": "block-backend", "name": ""},
                {"id": 2, "type": "block-driver", "name": "top"},
                {"id": 3, "type": "block-driver", "name": "disk"}],
            "edges": [{"parent": 1, "child": 2, "name": "root", "perm": []},
                {"parent": 2, "child": 3, "name": "file"}]}))
        .unwrap();
        assert_eq!(g.child("top", "file"), Some("disk"));
        assert_eq!(g.child("disk", "file"), None);
        assert_eq!(g.parents("top")[0].0.kind, "block-backend");
        assert_eq!(g.parents("disk")[0].0.name, "top");
    }

    #[test]
    fn a_graph_that_cannot_be_is_walked_to_its_end() {
        let g: Graph = serde_json::from_value(json!({
            "nodes": [{"id": 1, "type": "block-driver", "name": "a"},
                {"id": 1, "type": "block-driver", "name": "again"},
                {"id": 2, "type": "block-driver", "name": "a"},
                {"id": u64::MAX, "type": "block-driver", "name": "b"}],
            "edges": [{"parent": 1, "child": 1, "name": "file"},
                {"parent": 1, "child": u64::MAX, "name": "backing"},
                {"parent": u64::MAX, "child": 1, "name": "file"},
                {"parent": 77, "child": 78, "name": "file"}]}))
        .unwrap();
        assert_eq!(g.child("a", "file"), Some("a"));
        let above = |n: &'static str| g.above([n].into_iter());
        assert_eq!(above("a"), HashSet::from(["a", "b"]));
        assert_eq!(above("b"), HashSet::from(["a", "b"]));
        assert_eq!(above("none"), HashSet::from(["none"]));
        assert_eq!(g.child("again", "file"), Some("a"));
        assert_eq!(g.parents("a").len(), 2);
    }
}
