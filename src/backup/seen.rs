//! Which disks QEMU has, and which of them a backup takes.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::chain::manifest::{DiskIdentity, Skipped};
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget;
use crate::qmp::client::check_length;
use crate::qmp::types::{Bitmap, Drive, Graph, Image, Job, Node};

use super::{Layout, graph, names};

/// How many nodes are followed from a disk to its file: filters and formats, some few. A graph has
/// no loops; the bound is for an answer that has.
const DEEPEST: usize = 64;

/// How many disks are looked at: more than any machine has.
const DISKS: usize = 512;

/// The longest name of a node or device, and of a file, in bytes. QEMU's nodes have 31, QOM paths
/// some hundred, file names up to 4096.
const LONGEST_NAME: usize = 1024;
const LONGEST_FILE: usize = 16 << 10;

/// Memory that the descriptions of all disks may take: they are kept more than once. In bytes, as
/// [`budget::size`] counts it.
const DESCRIPTIONS: usize = 12 << 20;

/// How many bitmaps a disk may have: QEMU keeps 65,535 in an image, and is slow with hundreds.
const BITMAPS: usize = 4096;

/// A disk's size is below this: so are QEMU's, and no sum of two overflows.
const TOO_LARGE: u64 = 1 << 62;

/// How the filter gets between the guest and its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Insertion {
    /// The `drive` property of this QOM object is set.
    Device(String),
    /// This raw node above the disk is reopened.
    Reopen {
        /// The raw node's name.
        node: String,
        /// Its cache mode, to be given again.
        cache: Value,
        /// Its write-zero detection, to be given again.
        detect_zeroes: String,
    },
}

/// One disk that can be backed up.
#[derive(Debug, Clone)]
pub struct SeenDisk {
    /// Who it is.
    pub identity: DiskIdentity,
    /// The node that carries its bitmaps.
    pub node: String,
    /// The node that the guest is attached to: the same, or a filter above it.
    pub top: String,
    /// How to get in between.
    pub insertion: Insertion,
    /// What lies between the guest and `node`.
    pub path: graph::Path,
    /// Who works on it, if somebody does: it has to wait.
    pub busy: Option<String>,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Cluster size in bytes; 64 KiB where the format has none.
    pub cluster_size: u64,
    /// qcow2 with subclusters.
    pub extended_l2: bool,
    /// qcow2 with lazy refcounts.
    pub lazy_refcounts: bool,
    /// Whether bitmaps survive QEMU's end.
    pub persistent: bool,
    /// Whether reading it gives plain text of an encrypted image.
    pub encrypted: bool,
    /// Whether a part that was cut off and given back reads zeros and is known to: so in qcow2, files
    /// and RBD images. A volume may have its old bytes there again, while QEMU has forgotten which
    /// of them had changed.
    pub regrows_zeros: bool,
    /// Whether it lies on another image: what that has no data for is zeros which no frozen view of the
    /// disk is known to report.
    pub has_backing: bool,
    /// Firmware flash: small, copied in full each time.
    pub pflash: bool,
    /// QEMU's overlay of a disk with `snapshot=on`: it goes when QEMU ends, and the identity's file is
    /// that of the disk below it.
    pub throwaway: bool,
    /// Why it is left out where `--include` does not name it.
    pub by_rule: Option<&'static str>,
    /// All bitmaps on `node`.
    pub bitmaps: Vec<Bitmap>,
    /// Bytes that its files take, as an upper limit of what a full copy has to read.
    pub allocated: u64,
    /// `qemu-img info` of it, as QEMU reports it.
    pub info: Value,
}

impl SeenDisk {
    /// The name of its file, or what QEMU calls it where it has none.
    pub fn base_name(&self) -> String {
        base_name(&self.identity.file).unwrap_or_else(|| self.label().to_string())
    }

    /// The name of a new folder for it, and the last part of its images' names.
    pub fn folder_name(&self, layout: &Layout) -> String {
        names::folder(&self.base_name(), layout.no_timestamp)
    }

    /// That name, and the one that it has with and without `--no-timestamp` where they differ.
    pub fn folder_names(&self, layout: &Layout) -> Vec<String> {
        let mut names = vec![self.folder_name(layout)];
        names.push(names::folder(&self.base_name(), !layout.no_timestamp));
        names.dedup();
        names
    }

    /// A short name for messages.
    pub fn label(&self) -> &str {
        let i = &self.identity;
        [&i.device, &i.node, &i.qdev].into_iter().find(|s| !s.is_empty()).map_or("disk", |s| s)
    }

    /// Whether the user means this disk by `name`.
    pub fn is_called(&self, name: &str) -> bool {
        let i = &self.identity;
        let tail = device_tail(&i.qdev);
        let base = self.base_name();
        [i.device.as_str(), &i.node, &i.qdev, &i.file, tail, &base].contains(&name)
            || self.folder_names(&Layout::default()).iter().any(|n| n == name)
    }

    /// The named bitmap.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|b| b.name.as_deref() == Some(name))
    }

    /// The folder that holds its own file, if that is a file.
    pub fn folder(&self) -> Option<PathBuf> {
        let p = Path::new(&self.identity.file);
        (p.is_absolute() && !p.starts_with("/dev")).then(|| p.parent().map(Path::to_path_buf))?
    }
}

/// The file that a `json:` description is about. QEMU has no shorter name for what is not found by
/// its name alone, above all for an RBD image: that is `rbd:POOL/IMAGE` here, or
/// `rbd:POOL/NAMESPACE/IMAGE`, wherever its cluster's configuration lies.
fn described_file(name: &str) -> Option<String> {
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

/// The last part of a file's or device's name.
pub fn base_name(file: &str) -> Option<String> {
    let tail = file.trim_end_matches('/').rsplit(['/', ':']).next()?;
    (!tail.is_empty() && tail != "." && tail != "..").then(|| tail.to_string())
}

/// Everything there is.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Disks that can be backed up.
    pub disks: Vec<SeenDisk>,
    /// Those that are left out by rule: empty, read-only, removable.
    pub skipped: Vec<Skipped>,
    /// Those that should be backed up and cannot.
    pub blocked: Vec<Skipped>,
    /// What else those are called that are left out or cannot be backed up: the other name, the disk.
    pub aliases: Vec<(String, String)>,
}

impl Seen {
    fn count(&self) -> usize {
        [self.disks.len(), self.skipped.len(), self.blocked.len()].into_iter().sum()
    }

    /// Whether one that is no disk for a backup is meant by `name`.
    pub fn is_called(&self, disk: &str, name: &str) -> bool {
        disk == name || self.aliases.iter().any(|(a, d)| a == name && d == disk)
    }

    fn note_aliases<'a>(&mut self, disk: &str, names: impl IntoIterator<Item = &'a str>) {
        let sound = |n: &&str| !n.is_empty() && n.len() <= LONGEST_NAME && *n != disk;
        let names = names.into_iter().filter(sound);
        self.aliases.extend(names.map(|n| (n.to_string(), disk.to_string())));
    }
}

/// Why a disk is not among those that can be backed up.
enum Unfit {
    /// By rule.
    Skip(&'static str),
    /// Something stands in the way.
    Blocked(&'static str),
    /// The same, with a name in it.
    Named(String),
}

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
    /// `x-debug-query-block-graph`.
    pub graph: Graph,
    /// `query-jobs`.
    pub jobs: Vec<Job>,
    /// Whether this is QEMU with a guest.
    pub guest: bool,
    /// The types of the devices whose medium can be removed, by their names.
    types: HashMap<String, String>,
}

impl Answers {
    /// Asks.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub fn ask(client: &mut Client) -> Result<Self> {
        let drives: Vec<Drive> = client.query("query-block", json!({}))?;
        // Before the other large answer is in memory.
        let graph = graph::ask(client)?;
        let raw_nodes = client.execute("query-named-block-nodes", json!({}))?;
        let types = types(client, &drives)?;
        let jobs = client.query("query-jobs", json!({}))?;
        Ok(Answers { types, jobs, ..Self::of(drives, raw_nodes, graph, client.has_guest())? })
    }

    /// From `top` down to the node that holds the disk.
    fn path_down(&self, root: graph::Root, top: &str) -> graph::Path {
        let driver = |n: &str| self.node(n).map(|n| n.drv.as_str());
        graph::Path::down(&self.graph, root, top, driver)
    }

    /// The graph, with the jobs that work in it.
    pub fn scene(&self) -> graph::Scene<'_> {
        graph::Scene { graph: &self.graph, jobs: &self.jobs }
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
        let (jobs, types) = (Vec::new(), HashMap::new());
        Ok(Answers { drives, nodes, raw_nodes, by_name, encrypted, graph, jobs, guest, types })
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
    fn top_of(&self, root: &graph::Root, inserted: &str) -> Option<&str> {
        let inserted = self.graph.id(inserted)?;
        let leads =
            |top: &&str| self.graph.below(self.graph.id(top).into_iter()).contains(&inserted);
        root.tops(&self.graph).into_iter().find(leads)
    }

    /// The name of the file, device or remote image at the bottom of a node.
    fn file_of(&self, node: &Node) -> String {
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

    /// The driver of the node that holds a disk's bytes.
    fn storage_of(&self, node: &Node) -> &str {
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

    fn raw_image(&self, node: &str) -> Value {
        let at = self.by_name.get(node).and_then(|at| self.raw_nodes.get(*at)?.get("image"));
        at.cloned().unwrap_or_default()
    }
}

/// Asks for the types of the devices whose medium can be removed: their buses call SD cards, USB
/// sticks and some SCSI disks so as well.
fn types(client: &mut Client, drives: &[Drive]) -> Result<HashMap<String, String>> {
    let mut types = HashMap::new();
    let removable = drives.iter().filter(|d| d.removable && d.inserted.is_some()).take(DISKS);
    for qdev in removable.filter_map(|d| d.qdev.as_deref()).filter(|q| !q.is_empty()) {
        let arguments = json!({"path": qom_path(qdev), "property": "type"});
        if let Ok(Value::String(kind)) = client.call("qom-get", arguments)? {
            types.insert(qdev.to_string(), budget::clip(&kind, 64));
        }
    }
    Ok(types)
}

/// The path of a guest device. (By id alone it may be ambiguous: an NVMe controller's bus has its name.)
pub fn qom_path(qdev: &str) -> String {
    match qdev.starts_with('/') {
        true => qdev.to_string(),
        false => format!("/machine/peripheral/{qdev}"),
    }
}

fn parse<T: DeserializeOwned>(v: &Value, what: &str) -> Result<T> {
    check_length(v, what)?;
    T::deserialize(v).map_err(|e| {
        Error::new(Kind::Corrupt, format!("the answer to {what} has an unknown shape"))
            .with_source(e)
    })
}

/// Looks at all disks.
pub fn survey(answers: &Answers) -> Seen {
    let mut seen = Seen::default();
    let mut room = DESCRIPTIONS;
    if answers.guest {
        for d in answers.drives.iter().take(DISKS) {
            let found = from_drive(answers, d);
            if found.is_err() {
                let name = budget::clip(&drive_name(d), 64);
                seen.note_aliases(&name, drive_names(d));
            }
            note(&mut seen, &mut room, drive_name(d), found);
        }
    } else {
        for n in exported(answers).into_iter().take(DISKS) {
            note(&mut seen, &mut room, n.node_name.clone(), from_export(answers, n));
        }
    }
    refuse_several_paths(&mut seen);
    if seen.count() == DISKS {
        let reason = format!("more than {DISKS} disks: the others are not looked at");
        seen.blocked.push(Skipped { disk: "(others)".into(), reason });
    }
    seen
}

/// A disk that the guest has at two devices, as with multipath: a filter would be in the way of one
/// of them alone, and what is written by way of the other would pass it by.
fn refuse_several_paths(seen: &mut Seen) {
    let mut paths: HashMap<String, Vec<SeenDisk>> = HashMap::new();
    let mut order = Vec::new();
    for d in std::mem::take(&mut seen.disks) {
        order.push(d.node.clone());
        paths.entry(d.node.clone()).or_default().push(d);
    }
    for node in order {
        let Some(mut same) = paths.remove(&node) else { continue };
        if same.len() == 1 {
            seen.disks.append(&mut same);
            continue;
        }
        let tail = |d: &SeenDisk| match d.identity.qdev.as_str() {
            "" => d.top.clone(),
            qdev => device_tail(qdev).to_string(),
        };
        let devices: Vec<String> = same.iter().take(4).map(tail).collect();
        let disk = budget::clip(same.first().map_or("", SeenDisk::label), 64);
        let reason = format!(
            "it has {} paths ({}): writes by one of them pass the filter in the other, so that it \
             cannot be frozen at one point; take all but one away for the time of the backup \
             (device_del), or back it up from inside the guest",
            same.len(),
            devices.join(", ")
        );
        for d in &same {
            let i = &d.identity;
            let base = d.base_name();
            let names = [&i.device, &i.node, &i.qdev, &i.file, &base].map(String::as_str);
            seen.note_aliases(&disk, names.into_iter().chain([device_tail(&i.qdev)]));
        }
        seen.blocked.push(Skipped { disk, reason });
    }
}

fn note(seen: &mut Seen, room: &mut usize, disk: String, found: Result<SeenDisk, Unfit>) {
    let disk = budget::clip(&disk, 64);
    match found.and_then(|d| fits(d, room)) {
        Ok(d) => seen.disks.push(d),
        Err(Unfit::Skip(r)) => seen.skipped.push(Skipped { disk, reason: r.into() }),
        Err(Unfit::Blocked(r)) => seen.blocked.push(Skipped { disk, reason: r.into() }),
        Err(Unfit::Named(reason)) => seen.blocked.push(Skipped { disk, reason }),
    }
}

/// Whether what QEMU says of a disk is of a size that can be.
fn fits(mut d: SeenDisk, room: &mut usize) -> Result<SeenDisk, Unfit> {
    let i = &d.identity;
    let names = [&i.qdev, &i.node, &i.device, &i.format, &d.node, &d.top];
    if names.into_iter().chain(&d.path.nodes).any(|n| n.len() > LONGEST_NAME)
        || i.file.len() > LONGEST_FILE
    {
        return Err(Unfit::Blocked("QEMU gives it a name that is too long"));
    }
    if d.size >= TOO_LARGE {
        return Err(Unfit::Blocked("QEMU says that it is larger than any disk can be"));
    }
    let bitmap = |b: &Bitmap| b.name.as_ref().map_or(0, String::len).saturating_add(100);
    let bitmaps = d.bitmaps.iter().map(bitmap).fold(0, usize::saturating_add);
    let mut all = bitmaps.saturating_add(i.file.len());
    if let Insertion::Reopen { cache, detect_zeroes, .. } = &d.insertion {
        all = all.saturating_add(budget::size(cache)).saturating_add(detect_zeroes.len());
    }
    let Some(left) = room.checked_sub(all).filter(|_| d.bitmaps.len() <= BITMAPS) else {
        return Err(Unfit::Blocked("QEMU's description of it is too long"));
    };
    *room = left;
    // Nothing depends on it.
    match room.checked_sub(budget::size(&d.info)) {
        Some(left) => *room = left,
        None => d.info = Value::Null,
    }
    Ok(d)
}

fn drive_name(d: &Drive) -> String {
    let node = d.inserted.as_ref().map(|n| n.node_name.clone());
    if !d.device.is_empty() {
        return d.device.clone();
    }
    node.or_else(|| d.qdev.clone()).unwrap_or_default()
}

/// What a user may call a drive.
fn drive_names(d: &Drive) -> impl Iterator<Item = &str> {
    let qdev = d.qdev.as_deref().unwrap_or_default();
    let node = d.inserted.as_ref().map_or("", |n| &n.node_name);
    let file = d.inserted.as_ref().map_or("", |n| &n.file);
    [d.device.as_str(), qdev, device_tail(qdev), node, file].into_iter()
}

/// The last part of a device's path that tells which one it is.
fn device_tail(qdev: &str) -> &str {
    qdev.rsplit('/').find(|p| *p != "virtio-backend").unwrap_or_default()
}

/// Whether a device whose medium can be removed is a CD or floppy drive. One that says nothing of
/// itself is taken for one.
fn is_media_drive(kind: Option<&String>) -> bool {
    kind.is_none_or(|k| k.ends_with("-cd") || k == "floppy" || k == "swim-drive")
}

fn from_drive(answers: &Answers, d: &Drive) -> Result<SeenDisk, Unfit> {
    let Some(top) = &d.inserted else { return Err(Unfit::Skip("no medium is inserted")) };
    let kind = d.qdev.as_ref().and_then(|q| answers.types.get(q));
    let media = d.removable && is_media_drive(kind);
    match (top.ro, media) {
        (true, true) => return Err(Unfit::Skip("a CD or floppy that is read-only")),
        (true, false) => return Err(Unfit::Skip("read-only")),
        (false, _) => {}
    }
    let Some(qdev) = d.qdev.clone().filter(|q| !q.is_empty()) else {
        return Err(Unfit::Skip("no guest device is attached"));
    };
    let insertion = Insertion::Device(qdev.clone());
    let pflash = qdev.contains("system.flash") || d.device.starts_with("pflash");
    // The graph names a backend, or the device where that has no name.
    let names = [d.device.clone(), qdev.clone()].into_iter().filter(|n| !n.is_empty());
    let mut roots = names.map(graph::Root::Device);
    let at = |root| Some((answers.top_of(&root, &top.node_name)?, root));
    let Some((name, root)) = roots.find_map(at) else {
        return Err(Unfit::Blocked("QEMU's block graph does not show what it is attached to"));
    };
    let top = answers.node(name).unwrap_or(top);
    let mut disk = build(answers, (root, top), insertion, qdev, d.device.clone(), pflash)?;
    disk.by_rule = media.then_some("a CD or floppy");
    Ok(disk)
}

/// Nodes that have a backend above them: what qemu-storage-daemon exports.
fn exported(answers: &Answers) -> Vec<&Node> {
    let is_root = |n: &&Node| {
        let parents = answers.graph.parents(&n.node_name);
        parents.iter().any(|(p, role)| p.kind == "block-backend" && *role == "root")
            && names::parse_object(&n.node_name).is_none()
    };
    answers.nodes.iter().filter(is_root).collect()
}

fn from_export(answers: &Answers, top: &Node) -> Result<SeenDisk, Unfit> {
    if top.ro {
        return Err(Unfit::Skip("read-only"));
    }
    let child = answers.graph.child(&top.node_name, "file").and_then(|c| answers.node(c));
    let (true, Some(child)) = (top.drv == "raw", child) else {
        return Err(Unfit::Blocked(
            "exported without a raw node above it: nothing can be put in between \
                    (export a node made by blockdev-add driver=raw file=DISK discard=unmap)",
        ));
    };
    if child.image.virtual_size != top.image.virtual_size {
        return Err(Unfit::Blocked("the raw node above it has an offset or a size of its own"));
    }
    let insertion = Insertion::Reopen {
        node: top.node_name.clone(),
        cache: top.cache.clone(),
        detect_zeroes: top.detect_zeroes.clone(),
    };
    let root = graph::Root::Node(top.node_name.clone());
    build(answers, (root, child), insertion, String::new(), String::new(), false)
}

/// What stands between the guest and its disk and goes away by itself: jobs, and filters of other
/// programs' backups.
fn in_use(answers: &Answers, path: &graph::Path) -> Result<Option<String>, Unfit> {
    let scene = answers.scene();
    let nodes: Vec<&str> = path.nodes.iter().map(String::as_str).collect();
    if let Some(job) = scene.working_on(&nodes).first() {
        return Ok(Some(format!("{} of another program works on it", scene.job(job))));
    }
    for node in nodes {
        let driver = answers.node(node).map_or("", |n| n.drv.as_str());
        if driver == "copy-before-write" {
            if names::parse_object(node).is_some() {
                return Err(Unfit::Blocked(
                    "a backup by fleecefs runs, or was killed: then the next one tidies up \
                     (fleecefs recover does it now)",
                ));
            }
            return Ok(Some(
                "another program's copy-before-write filter is above it: a backup by another \
                 program runs or has died (fleecefs recover --foreign removes what qmpbackup \
                 left)"
                    .to_string(),
            ));
        }
        if graph::is_of_job(driver) {
            return Ok(Some(format!(
                "{} ({driver}) of another program is above it",
                scene.node(node)
            )));
        }
        if graph::is_refused(driver) {
            return Err(Unfit::Named(format!(
                "{} above it is of driver {driver}: what a backup would read there is not what \
                 the guest has",
                scene.node(node)
            )));
        }
    }
    Ok(None)
}

fn build(
    answers: &Answers,
    (root, top): (graph::Root, &Node),
    insertion: Insertion,
    qdev: String,
    device: String,
    pflash: bool,
) -> Result<SeenDisk, Unfit> {
    let top_name = top.node_name.clone();
    let top = answers.node(&top_name).unwrap_or(top);
    let path = answers.path_down(root, &top_name);
    let busy = in_use(answers, &path)?;
    let disk = answers.node(path.disk()).unwrap_or(top);
    let format = disk.image.format_specific.get("data").cloned().unwrap_or_default();
    let flag = |k: &str| format.get(k).and_then(Value::as_bool).unwrap_or(false);
    let version3 = format.get("compat").and_then(Value::as_str) == Some("1.1");
    let real = below_snapshot(answers, disk);
    Ok(SeenDisk {
        identity: DiskIdentity {
            qdev,
            node: disk.node_name.clone(),
            device,
            file: answers.file_of(real.unwrap_or(disk)),
            format: disk.drv.clone(),
        },
        node: disk.node_name.clone(),
        top: top_name,
        insertion,
        path,
        busy,
        size: disk.image.virtual_size,
        cluster_size: disk.image.cluster_size.filter(is_cluster).unwrap_or(65536),
        extended_l2: flag("extended-l2"),
        lazy_refcounts: flag("lazy-refcounts"),
        persistent: disk.drv == "qcow2" && version3 && !disk.ro && real.is_none(),
        encrypted: is_encrypted(answers, disk),
        regrows_zeros: disk.drv == "qcow2" || ["file", "rbd"].contains(&answers.storage_of(disk)),
        has_backing: disk.image.backing_image.is_some()
            || answers.graph.child(&disk.node_name, "backing").is_some(),
        pflash,
        throwaway: real.is_some(),
        by_rule: None,
        bitmaps: disk.dirty_bitmaps.clone(),
        allocated: allocated(&disk.image).min(disk.image.virtual_size),
        info: answers.raw_image(&disk.node_name),
    })
}

/// What is below the overlay that QEMU makes for `snapshot=on`, if `disk` is one. It has a temporary
/// file, `vl.XXXXXX`, and no name otherwise.
fn below_snapshot<'a>(answers: &'a Answers, disk: &Node) -> Option<&'a Node> {
    let file = base_name(&answers.file_of(disk))?;
    let random = file.strip_prefix("vl.")?;
    let temporary = random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric());
    let below = answers.graph.child(&disk.node_name, "backing")?;
    let path = answers.path_down(graph::Root::Node(disk.node_name.clone()), below);
    answers.node(path.disk()).filter(|_| temporary && disk.drv == "qcow2")
}

/// A size that clusters have: qcow2's end at 2 MiB, those of other formats at some GiB.
fn is_cluster(size: &u64) -> bool {
    size.is_power_of_two() && *size <= 1 << 32
}

/// Whether anything of the disk is encrypted: itself, its file, or what lies below it.
fn is_encrypted(answers: &Answers, disk: &Node) -> bool {
    has_luks(disk) || answers.encrypted().contains(&disk.node_name)
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

fn allocated(image: &Image) -> u64 {
    let mut total = 0u64;
    let mut at = Some(image);
    while let Some(i) = at {
        total = total.saturating_add(i.actual_size.unwrap_or(i.virtual_size));
        at = i.backing_image.as_deref();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(drives: Value, nodes: Value) -> Answers {
        let graph = attached(&drives, &nodes);
        let drives = serde_json::from_value(drives).unwrap();
        Answers::of(drives, nodes, graph, true).unwrap()
    }

    /// A graph of these nodes without children, each device on what is inserted.
    fn attached(drives: &Value, nodes: &Value) -> Graph {
        let name = |v: &Value| v["node-name"].as_str().unwrap_or_default().to_string();
        let mut names: Vec<String> = nodes.as_array().unwrap().iter().map(name).collect();
        let devices = drives.as_array().unwrap().iter().filter(|d| d["inserted"].is_object());
        names.extend(devices.clone().map(|d| name(&d["inserted"])));
        let mut vertices: Vec<Value> = names
            .iter()
            .enumerate()
            .map(|(id, n)| json!({"id": id, "type": "block-driver", "name": n}))
            .collect();
        let mut edges = Vec::new();
        for (n, d) in devices.enumerate() {
            let called = if d["device"] == "" { &d["qdev"] } else { &d["device"] };
            vertices.push(json!({"id": 100_000 + n, "type": "block-backend", "name": called}));
            let child = names.iter().position(|x| *x == name(&d["inserted"]));
            edges.push(json!({"parent": 100_000 + n, "child": child, "name": "root"}));
        }
        serde_json::from_value(json!({"nodes": vertices, "edges": edges})).unwrap()
    }

    fn qcow2(name: &str) -> Value {
        json!({"node-name": name, "drv": "qcow2", "ro": false, "file": format!("/vm/{name}.qcow2"),
            "image": {"virtual-size": 1048576, "cluster-size": 65536, "actual-size": 4096,
            "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "extended-l2": true}}}})
    }

    #[test]
    fn disks_are_taken_and_media_are_left_out_with_a_reason() {
        let mut cd = qcow2("cd");
        cd["ro"] = true.into();
        let a = answers(
            json!([
                {"device": "", "qdev": "/m/v0/virtio-backend", "inserted": qcow2("d0")},
                {"device": "cd0", "qdev": "c", "removable": true, "inserted": cd},
                {"device": "empty", "qdev": "e", "removable": true},
                {"device": "loose", "inserted": qcow2("d1")}]),
            json!([qcow2("d0"), qcow2("d1")]),
        );
        let seen = survey(&a);
        assert_eq!(seen.disks.len(), 1);
        let d = &seen.disks[0];
        assert!(d.persistent && d.extended_l2 && !d.encrypted);
        assert_eq!(d.base_name(), "d0.qcow2");
        assert!(d.is_called("v0") && d.is_called("d0") && !d.is_called("d1"));
        assert_eq!(seen.skipped.len(), 3);
        assert_eq!(d.folder().unwrap(), Path::new("/vm"));
    }

    #[test]
    fn a_disk_below_a_foreign_filter_is_in_the_way_and_not_left_out_by_rule() {
        let mut filter = qcow2("their-cbw");
        filter["drv"] = "copy-before-write".into();
        let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": filter.clone()}]);
        let seen = survey(&answers(drives, json!([filter, qcow2("d0")])));
        assert!(seen.skipped.is_empty() && seen.blocked.is_empty());
        assert!(seen.disks[0].busy.as_ref().unwrap().contains("--foreign"));
    }

    #[test]
    fn what_stands_above_a_disk_is_named() {
        let node = |name: &str, driver: &str| json!({"node-name": name, "drv": driver});
        let look = |driver: &str, role: &str, jobs: Vec<Job>| {
            let nodes = json!([node("top", driver), qcow2("d0")]);
            let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": node("top", driver)}]);
            let mut a = answers(drives, nodes);
            a.jobs = jobs;
            a.graph = serde_json::from_value(json!({
                "nodes": [{"id": 1, "type": "block-backend", "name": "/m/v0"},
                    {"id": 2, "type": "block-driver", "name": "top"},
                    {"id": 3, "type": "block-driver", "name": "d0"},
                    {"id": 4, "type": "block-job", "name": if a.jobs.is_empty() { "fleecefs-0123456789ab-j0" } else { "move" }}],
                "edges": [{"parent": 1, "child": 2, "name": "root"},
                    {"parent": 2, "child": 3, "name": role}, {"parent": 4, "child": 2, "name": "main node"}]}))
            .unwrap();
            survey(&a)
        };
        for driver in ["quorum", "replication", "blkdebug", "blkverify"] {
            let seen = look(driver, "image", Vec::new());
            assert!(seen.blocked[0].reason.contains(driver), "{:?}", seen.blocked);
        }
        for driver in ["throttle", "copy-on-read", "compress", "blklogwrites", "preallocate"] {
            let seen = look(driver, "file", Vec::new());
            assert!(seen.disks[0].busy.is_none() && seen.disks[0].node == "d0", "{driver}");
            assert_eq!((seen.disks[0].top.as_str(), seen.disks[0].path.nodes.len()), ("top", 2));
        }
        let job = Job { id: "move".into(), kind: "mirror".into(), ..Default::default() };
        let seen = look("mirror_top", "backing", vec![job]);
        let d = &seen.disks[0];
        assert_eq!((d.node.as_str(), d.identity.format.as_str()), ("d0", "qcow2"));
        assert!(d.busy.as_ref().unwrap().starts_with("job move (mirror)"), "{:?}", d.busy);
        // Its job is not listed.
        let seen = look("mirror_top", "backing", Vec::new());
        assert!(seen.disks[0].busy.as_ref().unwrap().contains("mirror_top"));
        // Nobody knows what it is attached to.
        let mut a = answers(
            json!([{"device": "", "qdev": "/m/v0", "inserted": qcow2("d0")}]),
            json!([qcow2("d0")]),
        );
        a.graph = Graph::default();
        assert!(survey(&a).blocked[0].reason.contains("graph"));
    }

    #[test]
    fn an_encrypted_backing_file_is_noticed_however_deep() {
        let seen = |a: &Answers| survey(a).disks[0].encrypted;
        let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": qcow2("top")}]);
        let mut base = qcow2("base");
        let nodes = |base: &Value| json!([qcow2("top"), qcow2("mid"), base]);
        let vertex = |id: u64, name: &str| json!({"id": id, "type": "block-driver", "name": name});
        let edge = |p: u64, c: u64, n: &str| json!({"parent": p, "child": c, "name": n});
        let graph = json!({
            "nodes": [vertex(1, "top"), vertex(2, "mid"), vertex(3, "base"),
                json!({"id": 4, "type": "block-backend", "name": "/m/v0"})],
            "edges": [edge(4, 1, "root"), edge(1, 2, "backing"), edge(2, 3, "backing"),
                edge(3, 1, "file")]});
        let make = |base: &Value| {
            let mut a = answers(drives.clone(), nodes(base));
            a.graph = serde_json::from_value(graph.clone()).unwrap();
            a
        };
        assert!(!seen(&make(&base)));
        base["drv"] = "luks".into();
        assert!(seen(&make(&base)));
        // Told in the image's description alone.
        let mut top = qcow2("top");
        top["image"]["backing-image"] = json!({"filename": "b", "encrypted": true});
        assert!(seen(&answers(drives.clone(), json!([top]))));
    }

    #[test]
    fn descriptions_that_cannot_be_are_refused_and_nothing_overflows() {
        let long = "n".repeat(1 << 20);
        let change = |change: &dyn Fn(&mut Value)| {
            let mut d = qcow2("d0");
            change(&mut d);
            let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": d}]);
            survey(&answers(drives, json!([d])))
        };
        let refused: [&dyn Fn(&mut Value); 5] = [
            &|d| d["image"]["virtual-size"] = u64::MAX.into(),
            &|d| d["node-name"] = long.as_str().into(),
            &|d| d["drv"] = long.as_str().into(),
            &|d| d["file"] = long.as_str().into(),
            &|d| d["dirty-bitmaps"] = json!(vec![json!({"name": "b"}); 16_000]),
        ];
        for (n, r) in refused.into_iter().enumerate() {
            let seen = change(r);
            assert!(seen.disks.is_empty() && seen.blocked.len() == 1, "{n}");
            assert!(seen.blocked[0].disk.len() < 5000);
        }
        let seen = change(&|d| d["image"]["x"] = json!(vec![json!({}); 20_000]));
        assert!(seen.disks[0].info.is_null());
        let mut below = json!({"filename": "f", "virtual-size": u64::MAX});
        for _ in 0..50 {
            below = json!({"actual-size": u64::MAX, "backing-image": below});
        }
        let seen = change(&|d| {
            d["image"]["backing-image"] = below.clone();
            d["image"]["cluster-size"] = 0.into();
        });
        assert_eq!((seen.disks[0].allocated, seen.disks[0].cluster_size), (1 << 20, 65536));
        for odd in [json!(-1), json!("1"), json!(1.5), json!({}), json!(1e30)] {
            let mut d = qcow2("d0");
            d["image"]["virtual-size"] = odd;
            let parsed = Answers::of(Vec::new(), json!([d]), Graph::default(), true);
            assert_eq!(parsed.unwrap_err().kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn very_many_disks_and_nodes_take_bounded_time_and_memory() {
        let filter = |n: usize| json!({"node-name": format!("n{n}"), "drv": "throttle"});
        let drive = json!({"device": "", "qdev": "/m/v0", "inserted": filter(0)});
        let nodes = Value::Array((0..16_000).map(filter).collect());
        let mut a = answers(Value::Array(vec![drive; 16_000]), nodes);
        let vertex = |n| json!({"id": n, "type": "block-driver", "name": format!("n{n}")});
        let edge = |n: usize| json!({"parent": n, "child": (n + 1) % 16_000, "name": "file"});
        let device = json!({"id": 16_000, "type": "block-backend", "name": "/m/v0"});
        let root = json!({"parent": 16_000, "child": 0, "name": "root"});
        a.graph = serde_json::from_value(json!({
            "nodes": (0..16_000).map(vertex).chain([device]).collect::<Vec<_>>(),
            "edges": (0..16_000).map(edge).chain([root]).collect::<Vec<_>>()}))
        .unwrap();
        let seen = survey(&a);
        assert!(seen.count() <= DISKS + 1);
        assert!(parse::<Vec<Node>>(&json!(vec![json!({}); 16_385]), "x").is_err());
    }

    /// QEMU's node names change at each start: by them two RBD disks would change places.
    #[test]
    fn an_rbd_disk_is_known_by_its_image() {
        let rbd = json!({"node-name": "#block1", "drv": "rbd", "image": {"virtual-size": 1048576},
            "file": r#"json:{"pool": "disks", "image": "vm-1", "conf": "/c", "driver": "rbd"}"#});
        let wrapped = json!({"node-name": "#block2", "drv": "raw", "image": {"virtual-size": 1048576},
            "file": r#"json:{"driver": "raw", "file": {"pool": "disks", "image": "vm-1", "driver": "rbd"}}"#});
        for (node, child) in [(rbd.clone(), None), (wrapped, Some(rbd))] {
            let drives = json!([{"device": "", "qdev": "/m/v0", "inserted": node}]);
            let nodes =
                json!([Some(node.clone()), child].into_iter().flatten().collect::<Vec<_>>());
            let seen = survey(&answers(drives, nodes));
            assert_eq!(seen.disks[0].identity.file, "rbd:disks/vm-1");
            assert_eq!(seen.disks[0].base_name(), "vm-1");
            // No folder of the host: its fleece lies beside the backup.
            assert_eq!(seen.disks[0].folder(), None);
        }
    }

    #[test]
    fn names_of_devices_and_remote_disks() {
        assert_eq!(base_name("/dev/vg/root").as_deref(), Some("root"));
        assert_eq!(base_name("rbd:pool/img").as_deref(), Some("img"));
        let of = |text: &str| described_file(&format!("json:{text}"));
        let rbd = r#"{"driver": "raw", "file": {"pool": "p", "image": "i", "conf": "/c", "driver": "rbd"}}"#;
        assert_eq!(of(rbd).as_deref(), Some("rbd:p/i"));
        let direct = r#"{"driver": "rbd", "pool": "p", "namespace": "n", "image": "i"}"#;
        assert_eq!(of(direct).as_deref(), Some("rbd:p/n/i"));
        let file = r#"{"driver": "raw", "file": {"driver": "file", "filename": "/vm/a", "x": 1}}"#;
        assert_eq!(of(file).as_deref(), Some("/vm/a"));
        let elsewhere = r#"{"driver": "ssh", "host": "h", "path": "/srv/a"}"#;
        assert!(of(elsewhere).is_none());
        assert!(of(r#"{"driver": "rbd", "pool": "p"}"#).is_none() && of("{").is_none());
        assert_eq!(base_name("nbd://h:10809/x").as_deref(), Some("x"));
        assert_eq!(base_name(""), None);
    }
}
