//! What speaks against two names being one disk's.

use std::collections::{BTreeMap, BTreeSet};

use super::images::Images;
use super::planned::RenamedImage;
use crate::error::{Error, Kind, Result};
use crate::folder::FileId;
use crate::manifest::{Manifest, vm_name, vm_uuid};
use crate::text::path_text;

pub(crate) fn check_vm(from: &Images<'_>, to: &Images<'_>) -> Result<()> {
    let (Some(a), Some(b)) = (from.vm(), to.vm()) else { return Ok(()) };
    let (uuids, names) = ((vm_uuid(&a), vm_uuid(&b)), (vm_name(&a), vm_name(&b)));
    let differ = match (uuids, names) {
        ((Some(x), Some(y)), _) => x != y,
        ((None, None), (Some(x), Some(y))) => x != y,
        _ => false,
    };
    if !differ {
        return Ok(());
    }
    let who = |vm: &serde_json::Value| {
        vm_name(vm).or(vm_uuid(vm)).map_or("a VM without a name".to_string(), str::to_string)
    };
    let what = format!(
        "'{}' is of another VM ({}) than '{}' ({})",
        path_text(&from.disk.path),
        who(&a),
        path_text(&to.disk.path),
        who(&b)
    );
    Err(Error::new(Kind::Usage, what).remedy("--other-vm joins them anyway"))
}

/// Two disks that a run had both of are two, and so, unless the user knows better, are those of
/// different sizes or at different devices of the VM.
pub(crate) fn check_device(from: &Images<'_>, to: &Images<'_>, force: bool) -> Result<()> {
    let differ = |what: &str| {
        let (old, new) = (path_text(&from.disk.path), path_text(&to.disk.path));
        Error::new(Kind::Usage, format!("'{old}' and '{new}' {what}: two disks, not one renamed"))
    };
    // What an earlier try has brought over already is of the same runs.
    let own: Vec<Manifest> = to.manifests().filter(|m| m.linked_from.is_none()).collect();
    let runs: BTreeSet<&str> =
        own.iter().map(|m| m.run.as_str()).filter(|r| !r.is_empty()).collect();
    if from.manifests().any(|m| runs.contains(m.run.as_str())) {
        return Err(differ("were backed up in one run"));
    }
    let (Some(last), Some(next), false) = (from.manifests().next(), own.last(), force) else {
        return Ok(());
    };
    let remedy = "--force joins them anyway";
    if last.virtual_size != next.virtual_size {
        let [a, b] = [last.virtual_size, next.virtual_size].map(crate::units::human_bytes);
        return Err(differ(&format!("have different sizes ({a}, {b})")).remedy(remedy));
    }
    let (a, b) = (&last.disk.qdev, &next.disk.qdev);
    if !a.is_empty() && !b.is_empty() && a != b {
        return Err(differ(&format!("are different devices of the VM ({a}, {b})")).remedy(remedy));
    }
    Ok(())
}

/// One disk has one history: no chain of the new name has a time between those of the old name's
/// points, and the newest of all is the new name's.
pub(crate) fn check_times(
    from: &Images<'_>,
    to: &Images<'_>,
    points: &[RenamedImage],
) -> Result<()> {
    let times = || points.iter().map(|p| p.time);
    let (Some(first), Some(last)) = (times().min(), times().max()) else { return Ok(()) };
    let mut chains: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
    for p in &to.points {
        // What an earlier run has brought here, to be served or not.
        let there = p.source.file_name().and_then(|n| to.folder.look(n).ok());
        let id = there.map(|meta| FileId::of(&meta));
        if points.iter().any(|m| m.id.is_some() && m.id == id) {
            continue;
        }
        let range = chains.entry(&p.chain).or_insert((p.time, p.time));
        *range = (range.0.min(p.time), range.1.max(p.time));
    }
    let (old, new) = (path_text(&from.disk.path), path_text(&to.disk.path));
    if let Some((chain, _)) = chains.iter().find(|(_, (a, b))| *a <= last && first <= *b) {
        let what = format!(
            "points of '{new}' (chain {chain}) and of '{old}' are of the same time: two \
             disks, not one that was renamed"
        );
        return Err(Error::new(Kind::Usage, what).at_path(to.folder.path()));
    }
    if chains.values().all(|(_, b)| *b < first) {
        let what = format!("the newest point is one of '{old}': that is the disk's new name");
        return Err(Error::new(Kind::Usage, what).remedy("swap the two names"));
    }
    Ok(())
}
