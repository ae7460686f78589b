//! What is below a disk's own file. Its bitmaps do not record what is written there: that nothing was is
//! told by the files themselves, where they are files.
//!
//! QEMU names them, and may lie. They are looked at and never opened.

use std::collections::HashSet;

use super::answers::Answers;
use super::storage;
use crate::backup::graph;
use crate::manifest::BackingFile;
use crate::qmp::budget;
use crate::qmp::types::{Link, Node};

/// More backing files than anybody's disk has.
const DEEPEST: usize = 200;
/// How much is kept of the name of what is no file.
const LONGEST_NAME: usize = 1024;
/// The longest name of a format.
const LONGEST_FORMAT: usize = 64;

/// What a disk depends on: its backing file, what that depends on, and the files in which these keep their data;
/// nearest first.
pub(super) fn below(answers: &Answers, disk: &Node) -> Vec<BackingFile> {
    let begins = backing_links(answers, disk);
    if begins.is_empty() {
        // One that is told of and not shown.
        let hidden = disk.image.backing_image.is_some();
        return Vec::from_iter(hidden.then(|| unknown(answers, disk, "")));
    }
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut todo: Vec<(u64, String)> = begins.into_iter().map(|id| (id, String::new())).collect();
    while let Some((id, format)) = todo.pop() {
        if found.len() >= DEEPEST {
            return vec![unknown(answers, disk, "")];
        }
        if !seen.insert(id) {
            continue;
        }
        let Some(node) = answers.graph.name(id).and_then(|n| answers.node(n)) else {
            found.push(unknown(answers, disk, ""));
            continue;
        };
        let mut links: Vec<&Link> = answers.graph.links(id).iter().collect();
        links.sort_by_key(|l| (l.role == "backing", &l.role));
        let filter = graph::is_filter(&node.drv);
        let inherits = filter || links.is_empty() && !format.is_empty();
        let format = if inherits { format } else { budget::clip(&node.drv, LONGEST_FORMAT) };
        found.extend(match links.is_empty() {
            true => Some(leaf(answers, node, &format)),
            false => (!is_told(node, filter, &links)).then(|| unknown(answers, node, &format)),
        });
        todo.extend(links.into_iter().rev().map(|l| (l.child, format.clone())));
    }
    // A graph that leads nowhere.
    if found.is_empty() { vec![unknown(answers, disk, "")] } else { found }
}

/// The backing files of a disk: of its own node, and of those that it has its bytes from (a raw node may lie
/// on a qcow2 one).
fn backing_links(answers: &Answers, disk: &Node) -> Vec<u64> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    let mut todo = Vec::from_iter(answers.graph.id(&disk.node_name));
    while let Some(id) = todo.pop().filter(|_| seen.len() < DEEPEST) {
        if seen.insert(id) {
            let (backing, own): (Vec<&Link>, Vec<&Link>) =
                answers.graph.links(id).iter().partition(|l| l.role == "backing");
            found.extend(backing.into_iter().map(|l| l.child));
            todo.extend(own.into_iter().map(|l| l.child));
        }
    }
    found
}

/// Whether all that a node makes of its children is in the record of those.
fn is_told(node: &Node, filter: bool, links: &[&Link]) -> bool {
    let hidden =
        !filter && node.image.backing_image.is_some() && links.iter().all(|l| l.role != "backing");
    !hidden && !graph::is_refused(&node.drv) && storage::part_of(node).is_none()
}

/// What has its bytes from outside of QEMU.
fn leaf(answers: &Answers, node: &Node, format: &str) -> BackingFile {
    let known = answers.record(&answers.file_of(node)).filter(|_| node.drv == "file");
    match known {
        Some(known) => BackingFile {
            format: format.to_string(),
            process: budget::clip(&answers.process, LONGEST_NAME),
            ..known
        },
        None => unknown(answers, node, format),
    }
}

fn unknown(answers: &Answers, node: &Node, format: &str) -> BackingFile {
    BackingFile {
        file: budget::clip(&node.file, LONGEST_NAME),
        format: format.to_string(),
        inode: BackingFile::UNKNOWN,
        node: node.node_name.clone(),
        process: budget::clip(&answers.process, LONGEST_NAME),
        ..Default::default()
    }
}
