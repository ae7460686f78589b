//! Disks that are written by more ways than one: a filter would be in the way of one of them alone, and
//! what is written by another would pass it by, so that a point would hold bytes of a later time.

use std::collections::{HashMap, HashSet};

use super::answers::Answers;
use super::disk::{GuestDisk, Survey, device_tail};
use super::storage::{FilePart, NodeFiles};
use crate::backup::{graph, names};
use crate::manifest::Skipped;
use crate::qmp::budget;
use crate::qmp::budget::short;
use crate::qmp::types::GraphNode;

/// How many names of one kind are in a message.
const NAMED: usize = 4;

/// Refuses disks with several paths, and notes who else writes to one.
pub(super) fn refuse_several(answers: &Answers, seen: &mut Survey) {
    let files = NodeFiles::of(answers);
    let written = files.written_parts();
    let disks = std::mem::take(&mut seen.disks);
    let groups = group(&files, &disks);
    let mut same: HashMap<usize, Vec<GuestDisk>> = HashMap::new();
    for (d, g) in disks.into_iter().zip(&groups) {
        same.entry(*g).or_default().push(d);
    }
    for g in groups {
        let Some(mut same) = same.remove(&g) else { continue };
        let [d] = same.as_mut_slice() else {
            refuse(seen, &same);
            continue;
        };
        if let Some(other) = elsewhere(answers, &files, &written, d) {
            note_names(seen, d.label().to_string(), d);
            let reason = format!("{}: {ONE_POINT}", same_file(answers, &other, d));
            let disk = budget::clip(d.label(), 64);
            seen.blocked.push(Skipped { disk, reason });
            continue;
        }
        if d.busy.is_none() {
            d.busy = past(answers, &files, d);
        }
        seen.disks.append(&mut same);
    }
}

const ONE_POINT: &str = "writes through one path bypass the filter in the other; remove all but \
                         one for the backup (device_del), or back it up from inside the guest";

/// A number for each disk: the same where they are one. What nobody writes to may be common.
fn group(files: &NodeFiles<'_>, disks: &[GuestDisk]) -> Vec<usize> {
    let mut groups: Vec<usize> = (0..disks.len()).collect();
    let mut nodes: HashMap<&str, usize> = HashMap::new();
    // By the file's number, and whether it is written to.
    let mut known: HashMap<(usize, bool), Vec<(FilePart<'_>, usize)>> = HashMap::new();
    for (at, d) in disks.iter().enumerate() {
        if let Some(first) = nodes.get(d.node.as_str()) {
            join(&mut groups, at, *first);
            continue;
        }
        nodes.insert(&d.node, at);
        for part in files.parts(&d.node) {
            let writes = files.is_written(&part);
            let both: &[bool] = if writes { &[true, false] } else { &[true] };
            let others = both.iter().filter_map(|w| known.get(&(part.file, *w))).flatten();
            for (_, disk) in others.filter(|(other, disk)| *disk != at && files.meet(&part, other))
            {
                join(&mut groups, at, *disk);
            }
            known.entry((part.file, writes)).or_default().push((part, at));
            if files.is_full() {
                return vec![0; disks.len()];
            }
        }
    }
    groups
}

fn join(groups: &mut [usize], a: usize, b: usize) {
    let (Some(from), Some(to)) = (groups.get(a).copied(), groups.get(b).copied()) else { return };
    groups.iter_mut().filter(|g| **g == from).for_each(|g| *g = to);
}

/// One disk that the guest has at several devices, by one node or by several.
fn refuse(seen: &mut Survey, same: &[GuestDisk]) {
    let tail = |d: &GuestDisk| match d.identity.qdev.as_str() {
        "" => d.top.clone(),
        qdev => device_tail(qdev).to_string(),
    };
    let devices: Vec<String> = same.iter().take(NAMED).map(tail).collect();
    let nodes: HashSet<&str> = same.iter().map(|d| d.node.as_str()).collect();
    let to = match same.first().filter(|_| nodes.len() > 1) {
        Some(d) => format!(" to {}", short(&d.identity.file)),
        None => String::new(),
    };
    let disk = budget::clip(same.first().map_or("", GuestDisk::label), 64);
    let reason = format!("it has {} paths{to} ({}): {ONE_POINT}", same.len(), devices.join(", "));
    for d in same {
        note_names(seen, disk.clone(), d);
    }
    seen.blocked.push(Skipped { disk, reason });
}

fn note_names(seen: &mut Survey, disk: String, d: &GuestDisk) {
    let i = &d.identity;
    let base = d.base_name();
    let names = [&i.device, &i.node, &i.qdev, &i.file, &base].map(String::as_str);
    seen.note_aliases(&disk, names.into_iter().chain([device_tail(&i.qdev)]));
}

/// A part that is written by a node which is not below this disk.
fn elsewhere<'a>(
    answers: &Answers,
    files: &NodeFiles<'a>,
    written: &HashMap<usize, Vec<FilePart<'a>>>,
    d: &GuestDisk,
) -> Option<FilePart<'a>> {
    let graph = &answers.graph;
    let inside = graph.below(graph.id(&d.node).into_iter());
    let foreign = |p: &FilePart<'_>| graph.id(p.leaf).is_none_or(|id| !inside.contains(&id));
    files.parts(&d.node).iter().find_map(|own| {
        let mut others = written.get(&own.file)?.iter();
        others.find(|p| foreign(p) && files.meet(own, p)).cloned()
    })
}

fn same_file(answers: &Answers, other: &FilePart<'_>, d: &GuestDisk) -> String {
    let above = answers.graph.above([other.leaf].into_iter());
    let devices = answers.drives.iter().filter_map(|d| d.qdev.as_deref().map(|q| (d, q)));
    let devices = devices.filter(|(d, q)| {
        above.contains(*q) || (!d.device.is_empty() && above.contains(d.device.as_str()))
    });
    let mut names: Vec<&str> = devices.map(|(_, q)| device_tail(q)).take(NAMED).collect();
    names.push(other.leaf);
    let names: Vec<String> = names.into_iter().map(short).collect();
    format!("{} has a second path ({})", short(&d.identity.file), names.join(", "))
}

/// Who writes to the nodes of a disk and not by way of its device: an export, or a node beside ours.
/// QEMU refuses our filter then.
fn past(answers: &Answers, files: &NodeFiles<'_>, d: &GuestDisk) -> Option<String> {
    let graph = &answers.graph;
    let ids: HashSet<u64> = d.path.nodes.iter().filter_map(|n| graph.id(n)).collect();
    let inside = graph.below(ids.iter().copied());
    let own = files.parts(&d.node);
    let root = |p: &GraphNode, node: &str| match &d.path.root {
        graph::Root::Device(name) => p.kind == "block-backend" && p.name == *name && node == d.top,
        graph::Root::Node(name) => p.kind == "block-driver" && p.name == *name,
    };
    let mut found: Vec<String> = Vec::new();
    for name in inside.iter().filter_map(|id| graph.name(*id)) {
        for (p, _) in graph.parents(name) {
            let ours =
                inside.contains(&p.id) || root(p, name) || names::parse_object(&p.name).is_some();
            if ours || p.kind == "block-job" || !graph.writes(p.id, name) {
                continue;
            }
            let range = files.range(p.id);
            let part = own.iter().find(|o| o.leaf == name);
            let apart = |o: &FilePart<'_>| !files.meet(o, &FilePart { range, ..o.clone() });
            if !part.is_some_and(apart) {
                found.push(writer(answers, p, name));
            }
        }
    }
    // The same one each time.
    found.sort_unstable();
    found.into_iter().next()
}

fn writer(answers: &Answers, p: &GraphNode, node: &str) -> String {
    let exports = answers.exports.iter().filter(|e| e.node_name == node).take(NAMED);
    let exports: Vec<String> =
        exports.map(|e| format!("export {} ({})", short(&e.id), short(&e.kind))).collect();
    let who = match (p.kind.as_str(), exports.is_empty()) {
        ("block-backend", false) if p.name.is_empty() => exports.join(" or "),
        ("block-backend", _) if p.name.is_empty() => "another program".to_string(),
        ("block-backend", _) => format!("device {}", short(device_tail(&p.name))),
        _ => answers.state().node(&p.name),
    };
    format!("{who} may write to node {}: such writes would bypass the backup's filter", short(node))
}
