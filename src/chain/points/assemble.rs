//! From walked files to a catalog: links every disk's files, decides which points can be served,
//! and lists the layers of those.
//!
//! Whether a file can be used depends on the file below it, so files are decided on bottom up, without recursion:
//! a chain may be thousands of files deep, and hostile ones may form a loop.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::{foreign, points};
use crate::chain::link::dependencies::{BackingPaths, Dependencies, manifest_oddity, merged_state};
use crate::chain::link::follow::DataFiles;
use crate::chain::link::group::{Group, group};
use crate::chain::link::open_formats::note;
use crate::chain::walk::tree::Tree;
use crate::chain::{Catalog, Disk};
use crate::error::{Finding, Severity};
use crate::text::natural_order;

/// Makes the catalog of a walked directory; also what its files depend on.
pub(in crate::chain) fn assemble(mut tree: Tree) -> (Catalog, BackingPaths) {
    let mut findings = std::mem::take(&mut tree.findings);
    let data_files = DataFiles::new(&tree);
    let mut claimed = data_files.claimed(&tree);
    let (mut groups, mut foreign) = (Vec::new(), Vec::new());
    for folder in &tree.folders {
        let found = foreign::find(&tree, folder, &claimed);
        claimed.extend(found.taken);
        findings.extend(found.findings);
        foreign.extend(found.disks);
        let (disks, homeless) = group(&tree, folder, &claimed);
        groups.extend(disks);
        findings.extend(homeless);
    }
    groups.sort_by(|a, b| a.path.cmp(&b.path));
    let mut deps = Dependencies::new(&tree, data_files);
    for group in &mut groups {
        deps.link(group);
    }
    for file in 0..tree.files.len() {
        deps.decide(file);
    }
    let mut taken = HashSet::new();
    let mut disks: Vec<Disk> = groups.into_iter().map(|g| disk(&deps, g, &mut taken)).collect();
    for disk in foreign {
        let path = unique(&disk.path, &mut taken);
        disks.push(Disk { path, ..disk });
    }
    disks.sort_by(|a, b| natural_order(a.path.as_os_str(), b.path.as_os_str()));
    let bases = deps.bases();
    (Catalog { root: tree.root.clone(), disks, findings }, bases)
}

fn disk(deps: &Dependencies, mut group: Group, taken: &mut HashSet<PathBuf>) -> Disk {
    let path = unique(&group.path, taken);
    let mut findings = std::mem::take(&mut group.findings);
    let points = points(deps, &group);
    for member in &group.members {
        let entry = &deps.tree.files[member.file];
        // Where it matters, the point itself says so.
        let warning = |f| Finding { severity: Severity::Warning, ..f };
        findings.extend(entry.manifest_problem.clone().map(warning));
        findings.extend(manifest_oddity(entry));
        findings.extend(merged_state(entry));
        findings.extend(entry.info().into_iter().flat_map(|i| i.findings.clone()));
    }
    findings.extend(note(deps.tree, &group));
    // The causes once each, not once per point above them.
    let causes = points.iter().filter_map(|(_, b)| b.as_ref().map(|b| (*b.cause).clone()));
    let mut seen = HashSet::new();
    findings.extend(causes);
    findings.retain(|f| seen.insert(f.clone()));
    Disk { path, points: points.into_iter().map(|(p, _)| p).collect(), findings }
}

/// A path that no other disk has, nor the mount's own folder.
fn unique(path: &Path, taken: &mut HashSet<PathBuf>) -> PathBuf {
    let free = |p: &Path| !p.starts_with(crate::manifest::FOLDER) && !p.as_os_str().is_empty();
    let mut candidate = path.to_path_buf();
    let mut number = 2;
    while !free(&candidate) || !taken.insert(candidate.clone()) {
        let mut name = OsString::from(path.as_os_str());
        name.push(format!("-{number}"));
        candidate = match free(path) {
            true => name.into(),
            // `.fleecefs` is the mount's own.
            false => Path::new("disk").join(name),
        };
        number += 1;
    }
    candidate
}
