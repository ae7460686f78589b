//! Which disks QEMU has, and which of them a backup takes.

mod answers;
mod backing;
mod disk;
mod media;
mod open_files;
mod paths;
mod snapshot_mode;
mod storage;

use serde_json::Value;

pub use self::answers::Answers;
pub(crate) use self::open_files::{HostView, is_as_recorded};

/// Why an empty drive is skipped.
pub const NO_MEDIUM: &str = "no medium is inserted";

pub use self::disk::{GuestDisk, Insertion, Survey, base_name, device_tail};
pub use self::media::qom_path;

use self::disk::LONGEST_NAME;
use super::{graph, names};
use crate::manifest::{BackingFile, DiskIdentity, Skipped};
use crate::qmp::budget;
use crate::qmp::types::{Bitmap, Drive, Image, Job, Node};

/// How many disks are looked at: more than any machine has.
const DISKS: usize = 512;

/// The longest name of a file, in bytes: QEMU's end at 4096.
const LONGEST_FILE: usize = 16 << 10;

/// Memory that the descriptions of all disks may take: they are kept more than once. In bytes, as
/// [`budget::size`] counts it.
const DESCRIPTIONS: usize = 12 << 20;

/// How many bitmaps a disk may have: QEMU keeps 65,535 in an image, and is slow with hundreds.
const BITMAPS: usize = 4096;

/// A disk's size is below this: so are QEMU's, and no sum of two overflows.
const TOO_LARGE: u64 = 1 << 62;

/// Why a disk is not among those that can be backed up.
enum SkipReason {
    /// It is skipped by rule.
    Skip(&'static str),
    /// Something keeps it from being backed up.
    Blocked(&'static str),
    /// The same, with a name in it.
    Named(String),
}

/// Looks at all disks.
pub fn survey(answers: &Answers) -> Survey {
    let mut seen = Survey::default();
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
    paths::refuse_several(answers, &mut seen);
    if seen.count() == DISKS {
        let reason = format!("more than {DISKS} disks: the others are skipped");
        seen.blocked.push(Skipped { disk: "(others)".into(), reason });
    }
    seen
}

fn note(seen: &mut Survey, room: &mut usize, disk: String, found: Result<GuestDisk, SkipReason>) {
    let disk = budget::clip(&disk, 64);
    match found.and_then(|d| fits(d, room)) {
        Ok(d) => seen.disks.push(d),
        Err(SkipReason::Skip(r)) => seen.skipped.push(Skipped { disk, reason: r.into() }),
        Err(SkipReason::Blocked(r)) => seen.blocked.push(Skipped { disk, reason: r.into() }),
        Err(SkipReason::Named(reason)) => seen.blocked.push(Skipped { disk, reason }),
    }
}

/// Whether what QEMU says of a disk is of a size that can be.
fn fits(mut d: GuestDisk, room: &mut usize) -> Result<GuestDisk, SkipReason> {
    let i = &d.identity;
    let names = [&i.qdev, &i.node, &i.device, &i.format, &d.node, &d.top];
    if names.into_iter().chain(&d.path.nodes).any(|n| n.len() > LONGEST_NAME)
        || i.file.len() > LONGEST_FILE
    {
        return Err(SkipReason::Blocked("its name in QEMU is too long"));
    }
    if d.size >= TOO_LARGE {
        return Err(SkipReason::Blocked("QEMU reports an impossibly large size"));
    }
    let bitmap = |b: &Bitmap| b.name.as_ref().map_or(0, String::len).saturating_add(100);
    let bitmaps = d.bitmaps.iter().map(bitmap).fold(0, usize::saturating_add);
    let mut all = bitmaps.saturating_add(i.file.len());
    if let Insertion::Reopen { cache, detect_zeroes, .. } = &d.insertion {
        all = all.saturating_add(budget::size(cache)).saturating_add(detect_zeroes.len());
    }
    let Some(left) = room.checked_sub(all).filter(|_| d.bitmaps.len() <= BITMAPS) else {
        return Err(SkipReason::Blocked("QEMU's description of it is too long"));
    };
    *room = left;
    let below = |b: &BackingFile| {
        [b.format.len(), b.node.len(), 100].iter().fold(b.file.len(), |a, n| a.saturating_add(*n))
    };
    let below = d.backing.iter().map(below).fold(0, usize::saturating_add);
    match room.checked_sub(below) {
        Some(left) => *room = left,
        None => {
            let file = "(more than can be recorded)".to_string();
            d.backing = vec![BackingFile { file, node: d.node.clone(), ..Default::default() }];
        }
    }
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

fn from_drive(answers: &Answers, d: &Drive) -> Result<GuestDisk, SkipReason> {
    let Some(top) = &d.inserted else { return Err(SkipReason::Skip(NO_MEDIUM)) };
    let kind = d.qdev.as_ref().and_then(|q| answers.device_type(q));
    let media = d.removable && media::is_media_drive(kind);
    match (top.ro, media) {
        (true, true) => return Err(SkipReason::Skip("a CD or floppy that is read-only")),
        (true, false) => return Err(SkipReason::Skip("read-only")),
        (false, _) => {}
    }
    let Some(qdev) = d.qdev.clone().filter(|q| !q.is_empty()) else {
        return Err(SkipReason::Skip("no guest device is attached"));
    };
    let insertion = Insertion::Device(qdev.clone());
    let pflash = qdev.contains("system.flash") || d.device.starts_with("pflash");
    // The graph names a backend, or the device where that has no name.
    let names = [d.device.clone(), qdev.clone()].into_iter().filter(|n| !n.is_empty());
    let mut roots = names.map(graph::Root::Device);
    let at = |root| Some((answers.top_of(&root, &top.node_name)?, root));
    let Some((name, root)) = roots.find_map(at) else {
        return Err(SkipReason::Blocked("QEMU's block graph does not show what it is attached to"));
    };
    let top = answers.node(name).unwrap_or(top);
    let serial = answers.serial(&qdev);
    let mut disk = build(answers, (root, top), insertion, qdev, d.device.clone(), pflash)?;
    disk.identity.serial = serial;
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

fn from_export(answers: &Answers, top: &Node) -> Result<GuestDisk, SkipReason> {
    if top.ro {
        return Err(SkipReason::Skip("read-only"));
    }
    let child = answers.graph.child(&top.node_name, "file").and_then(|c| answers.node(c));
    let (true, Some(child)) = (top.drv == "raw", child) else {
        return Err(SkipReason::Blocked(
            "exported without a raw node above it: no filter can be inserted (export a node made \
             by blockdev-add driver=raw file=DISK discard=unmap)",
        ));
    };
    if child.image.virtual_size != top.image.virtual_size {
        return Err(SkipReason::Blocked(
            "the raw node above it has an offset or a size of its own",
        ));
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
fn in_use(answers: &Answers, path: &graph::Path) -> Result<Option<String>, SkipReason> {
    let state = answers.state();
    let loads = |j: &&Job| j.kind == graph::SNAPSHOT_LOAD && !j.concluded();
    if let Some(j) = answers.jobs.iter().find(loads) {
        return Ok(Some(format!("{} of another program loads a snapshot", state.job(&j.id))));
    }
    let nodes: Vec<&str> = path.nodes.iter().map(String::as_str).collect();
    if let Some(job) = state.working_on(&nodes).first() {
        return Ok(Some(format!("{} of another program works on it", state.job(job))));
    }
    for node in nodes {
        let driver = answers.node(node).map_or("", |n| n.drv.as_str());
        if driver == "copy-before-write" {
            if names::parse_object(node).is_some() {
                return Err(SkipReason::Blocked(
                    "a backup by fleecefs is running, or was killed: the next backup cleans up, \
                     or fleecefs recover now",
                ));
            }
            return Ok(Some(
                "another program's copy-before-write filter is above it: its backup is running or \
                 was killed (fleecefs recover --foreign removes what qmpbackup left)"
                    .to_string(),
            ));
        }
        if graph::is_of_job(driver) {
            return Ok(Some(format!(
                "{} ({driver}) of another program is above it",
                state.node(node)
            )));
        }
        if graph::is_refused(driver) {
            return Err(SkipReason::Named(format!(
                "{} above it uses driver {driver}: a backup would not read what the guest has",
                state.node(node)
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
) -> Result<GuestDisk, SkipReason> {
    let top_name = top.node_name.clone();
    let top = answers.node(&top_name).unwrap_or(top);
    let path = answers.path_down(root, &top_name);
    let busy = in_use(answers, &path)?;
    let disk = answers.node(path.disk()).unwrap_or(top);
    let format = disk.image.format_specific.get("data").cloned().unwrap_or_default();
    let flag = |k: &str| format.get(k).and_then(Value::as_bool).unwrap_or(false);
    let version3 = format.get("compat").and_then(Value::as_str) == Some("1.1");
    let real = self::snapshot_mode::below_snapshot(answers, disk);
    Ok(GuestDisk {
        named: None,
        identity: DiskIdentity {
            qdev,
            node: disk.node_name.clone(),
            device,
            file: answers.file_of(real.unwrap_or(disk)),
            format: disk.drv.clone(),
            serial: String::new(),
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
        encrypted: answers.is_encrypted(disk),
        regrows_zeros: disk.drv == "qcow2" || ["file", "rbd"].contains(&answers.storage_of(disk)),
        has_backing: disk.image.backing_image.is_some()
            || answers.graph.child(&disk.node_name, "backing").is_some(),
        // The bitmaps of an overlay that ends with QEMU do so as well.
        backing: if real.is_none() { backing::below(answers, disk) } else { Vec::new() },
        process: answers.process.clone(),
        pflash,
        throwaway: real.is_some(),
        by_rule: None,
        bitmaps: disk.dirty_bitmaps.clone(),
        allocated: allocated(&disk.image).min(disk.image.virtual_size),
        info: answers.raw_image(&disk.node_name),
    })
}

/// A size that clusters have: qcow2's end at 2 MiB, those of other formats at some GiB.
fn is_cluster(size: &u64) -> bool {
    size.is_power_of_two() && *size <= 1 << 32
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
mod tests;
