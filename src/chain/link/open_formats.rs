//! What the other files of a disk say about the format of one of them.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::Parent;
use super::format::{DECIDE, DECIDE_RAW};
use super::group::{DiskMember, Group, base_name};
use crate::chain::walk::info;
use crate::chain::walk::tree::{FileEntry, FileId, Reading, Tree};
use crate::error::{Error, Finding, Kind};
use crate::layer::qcow2::check::REMEDY as RESTORE;
use crate::layout::Level;
use crate::layout::name::{Name, Promise, promise};

/// What is to be known about the formats of a disk's files: said once, however many there are.
pub(in crate::chain) fn note(tree: &Tree, group: &Group) -> Option<Finding> {
    let open = open_formats(tree, group);
    let entries = group.members.iter().filter(|b| open.contains(&b.file));
    let note = |b: &DiskMember| {
        let entry = &tree.files[b.file];
        entry.decision.note.clone().unwrap_or_else(|| unnamed_image(entry))
    };
    let mut notes = entries.map(note);
    let mut first = notes.next()?;
    match notes.count() {
        0 => {}
        n => first.message.push_str(&format!(" (and {n} more of this disk)")),
    }
    Some(first)
}

/// Those of a disk's files of which their content alone says that they are qcow2 images.
pub(in crate::chain) fn open_formats(tree: &Tree, group: &Group) -> HashSet<FileId> {
    let mut known = HashMap::new();
    let unnamed = |f: FileId| is_unnamed_image(&tree.files[f]);
    let doubted =
        group.members.iter().any(|b| unnamed(b.file)) && !is_qcow2_disk(tree, group, &mut known);
    let is_open = |f: &FileId| tree.files[*f].decision.note.is_some() || doubted && unnamed(*f);
    group.members.iter().map(|b| b.file).filter(is_open).collect()
}

/// Whether it is read as an image, and neither its name nor anything else says that it is one.
fn is_unnamed_image(entry: &FileEntry) -> bool {
    entry.is_unproved() && promise(base_name(entry)) == Promise::Nothing
}

/// Whether a disk is qcow2 by the backups of it: there are increments only of such (but for one that says that
/// its parent is raw), and qmpbackup writes down what the disk was.
fn is_qcow2_disk(tree: &Tree, group: &Group, known: &mut HashMap<FileId, bool>) -> bool {
    let is_increment = |b: &DiskMember| {
        let file = &tree.files[b.file];
        let says_raw = || file.backing_format().as_deref() == Some("raw");
        matches!(b.level, Level::Inc | Level::Diff) && file.info().is_some() && !says_raw()
    };
    let has_increments = group.members.iter().any(is_increment);
    let says_so = |b: &DiskMember| config_says_qcow2(tree, &tree.files[b.file], known);
    has_increments || group.members.first().is_some_and(says_so)
}

fn unnamed_image(entry: &FileEntry) -> Finding {
    let what = "read as qcow2 by its content alone: if this is a raw disk whose guest wrote a \
                qcow2 header, it is not right";
    let finding = Finding::warning(Kind::Unsupported, &entry.path, what);
    Finding { remedy: Some(DECIDE.into()), ..finding }
}

/// Plain roots that are qcow2 files whose beginning is damaged, rather than raw: other backups of the
/// disk are qcow2, or the disk itself was. (Backups of a raw disk are all raw, but a guest can make them
/// begin like qcow2 images.) A manifest that can be read decides it, and so does the user.
pub(in crate::chain) fn not_raw_after_all(
    tree: &Tree,
    group: &Group,
    parents: &[Parent],
) -> Vec<(usize, Error)> {
    let entry = |b: &DiskMember| &tree.files[b.file];
    let mut configs = HashMap::new();
    // Backups with a manifest may be of another program, which has formats of its own.
    let is_qcow2 = |e: &FileEntry| e.probed.magic && e.manifest.is_none() && !e.is_raw();
    let others_are_qcow2 = group.members.iter().any(|b| is_qcow2(entry(b)));
    let mut suspicion = |b: &DiskMember| {
        let entry = entry(b);
        let decided = entry.manifest.is_some() || matches!(entry.decision.reading, Reading::Raw);
        if !entry.is_raw() || !matches!(b.level, Level::Full | Level::Copy) || decided {
            return None;
        }
        if entry.manifest_problem.is_some() {
            let what = "its manifest cannot be read, and only that says whether it is raw";
            return Some((what, RESTORE.to_string()));
        }
        if config_says_qcow2(tree, entry, &mut configs) {
            return Some(("it has no qcow2 header, but its disk was qcow2", RESTORE.to_string()));
        }
        // By their bytes alone: it may be these that are not what they seem to be.
        let what = "it has no qcow2 header, but other backups of this disk have";
        others_are_qcow2.then(|| (what, format!("{RESTORE}; or, {DECIDE_RAW}")))
    };
    let error = |(what, remedy)| Error::new(Kind::Corrupt, what).at_offset(0).remedy(remedy);
    (group.members.iter().zip(parents).enumerate())
        .filter(|(_, (_, parents))| matches!(parents, Parent::Root))
        .filter_map(|(i, (b, _))| Some((i, error(suspicion(b)?))))
        .collect()
}

/// Increments that would be raw by their names, and on a raw FULL, and begin like qcow2 images: what a
/// raw one of these holds cannot be known, and a guest can make it begin so.
pub(in crate::chain) fn qcow2_on_raw(
    tree: &Tree,
    group: &Group,
    parents: &[Parent],
) -> Vec<(usize, Error)> {
    let entry = |i: usize| &tree.files[group.members[i].file];
    let what = "its name and its parent say raw, its content is qcow2: a guest can write a qcow2 \
                header to a raw disk";
    let suspicious = |(i, parents): (usize, &Parent)| match parents {
        Parent::On(below) if entry(i).decision.note.is_some() && entry(*below).is_raw() => Some(i),
        _ => None,
    };
    let error = || Error::new(Kind::Unsupported, what).at_offset(0).remedy(DECIDE);
    parents.iter().enumerate().filter_map(suspicious).map(|i| (i, error())).collect()
}

/// Whether `<disk>.config`, the output of `qemu-img info` that qmpbackup keeps beside the images or
/// one folder up, says that the disk is qcow2. `known` has what the files said that were read already.
fn config_says_qcow2(tree: &Tree, entry: &FileEntry, known: &mut HashMap<FileId, bool>) -> bool {
    let mut name = match &entry.name {
        Name::Backup { disk, .. } => disk.clone(),
        _ => base_name(entry).to_os_string(),
    };
    name.push(".config");
    let folders = entry.path.ancestors().skip(1).take(2);
    let mut found = folders.filter_map(|f| tree.lookup(f, Path::new(&name)));
    let says_so = |file: FileId| {
        let info = info::read(&tree.files[file].probed.file);
        info.is_some_and(|i| i.format.as_deref() == Some("qcow2"))
    };
    found.any(|file| *known.entry(file).or_insert_with(|| says_so(file)))
}
