//! Images that a backup run made and that are gone, manifest and all: the manifests of the run's other disks
//! name them.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;

use super::timeline::vm_of;
use super::{Catalog, Disk, manifest_of};
use crate::error::{Error, Finding, Kind};
use crate::manifest::{Manifest, RunImage};
use crate::text::path_text;

/// Of all manifests of one run: the images that it made, under the names that its disks had, and of which none is
/// among these manifests. (A disk may have another name by now: as many images as go by a name that the run did
/// not give are taken for those that are missing.)
pub(crate) fn missing_of_run<M: Borrow<Manifest>>(run: &[M]) -> Vec<RunImage> {
    let run = || run.iter().map(Borrow::borrow);
    let here: HashSet<&str> = run().flat_map(names_of).collect();
    let failed: HashSet<&str> = run().flat_map(|m| &m.failed).map(|f| f.disk.as_str()).collect();
    let made: BTreeMap<&str, &RunImage> = run()
        .flat_map(|m| &m.run_images)
        .filter(|i| !failed.contains(i.disk.as_str()))
        .map(|i| (i.image.as_str(), i))
        .collect();
    let renamed = run().filter(|m| !names_of(m).any(|n| made.contains_key(n))).count();
    let missing: Vec<RunImage> = made
        .iter()
        .filter(|(image, _)| !here.contains(**image))
        .map(|(_, i)| (*i).clone())
        .collect();
    if missing.len() > renamed { missing } else { Vec::new() }
}

/// The image's own name, and that of the image whose state was merged into it.
fn names_of(m: &Manifest) -> impl Iterator<Item = &str> {
    [Some(m.image.as_str()), m.state_of.as_deref()].into_iter().flatten()
}

/// Whether an image of this name is there without a manifest that can be read: nothing tells then of which run it is.
pub(crate) fn has_bare_image(catalog: &Catalog, image: &str) -> bool {
    let is_bare = |d: &Disk| {
        (0..d.points.len()).any(|at| d.points[at].name == image && manifest_of(d, at).is_none())
    };
    catalog.disks.iter().any(is_bare)
}

/// What is missing of each VM's newest run. (Of older runs it may have been pruned, or merged into something.)
pub(crate) fn run_gaps(catalog: &Catalog) -> Vec<Finding> {
    let mut vms: BTreeMap<String, Vec<(&Disk, Manifest)>> = BTreeMap::new();
    for disk in &catalog.disks {
        let newest = disk.points.len().checked_sub(1).and_then(|at| manifest_of(disk, at));
        let Some(m) = newest.filter(|m| !m.run.is_empty()) else { continue };
        vms.entry(vm_of(disk, &m)).or_default().push((disk, m));
    }
    // What has a manifest left is a finding of its disk's.
    let told: HashSet<&OsStr> =
        catalog.disks.iter().filter_map(|d| d.newest_missing()?.file_name()).collect();
    let newest_run = |mut all: Vec<(&Disk, Manifest)>| {
        // The time in a name is later than that of each name before, whatever the clock did.
        let time = |(disk, m): &(&Disk, Manifest)| {
            (disk.points.last().map(|p| p.time), m.time, m.time_nanos)
        };
        let run = all.iter().max_by_key(|one| time(one))?.1.run.clone();
        all.retain(|(_, m)| m.run == run);
        gap(catalog, &all, &told)
    };
    vms.into_values().filter_map(newest_run).collect()
}

fn gap(catalog: &Catalog, run: &[(&Disk, Manifest)], told: &HashSet<&OsStr>) -> Option<Finding> {
    let manifests: Vec<&Manifest> = run.iter().map(|(_, m)| m).collect();
    let mut missing = missing_of_run(&manifests);
    missing.retain(|i| !told.contains(OsStr::new(&i.image)));
    let (disk, m) = run.first().filter(|_| !missing.is_empty())?;
    let is_bare: Vec<bool> = missing.iter().map(|i| has_bare_image(catalog, &i.image)).collect();
    let name = |(i, bare): (&RunImage, &bool)| {
        let what = if *bare { "the manifest of " } else { "" };
        format!("{what}{} of disk {}", path_text(&i.image), path_text(&i.disk))
    };
    let names: Vec<String> = missing.iter().zip(&is_bare).map(name).collect();
    let what =
        format!("the newest backup (run {}) is incomplete: missing {}", m.run, names.join(", "));
    let e = Error::new(Kind::Incomplete, what).remedy(match is_bare.iter().all(|bare| *bare) {
        true => "restore the missing manifest from another copy, or back up again",
        false => "restore the missing image and its manifest from another copy, or back up again",
    });
    Some(Finding::from_error(&e, &disk.points.last()?.source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Level;
    use crate::manifest::Skipped;
    use crate::manifest::tests::example;

    fn run(images: &[&str]) -> Vec<Manifest> {
        let of = |image: &&str| {
            let mut m = example(image, Level::Full, None);
            m.run_images = ["a", "b", "c"]
                .map(|d| RunImage { disk: d.into(), image: format!("FULL-1-{d}") })
                .to_vec();
            m
        };
        images.iter().map(of).collect()
    }

    #[test]
    fn what_a_run_made_is_here_or_missing() {
        assert!(missing_of_run(&run(&["FULL-1-a", "FULL-1-b", "FULL-1-c"])).is_empty());
        let missing = missing_of_run(&run(&["FULL-1-a", "FULL-1-c"]));
        assert_eq!(missing, [RunImage { disk: "b".into(), image: "FULL-1-b".into() }]);
        assert_eq!(missing_of_run(&run(&["FULL-1-a"])).len(), 2);
        // A manifest of before that tells nothing.
        assert!(missing_of_run(&[example("FULL-1-a", Level::Full, None)]).is_empty());
        assert!(missing_of_run::<Manifest>(&[]).is_empty());
    }

    #[test]
    fn what_has_another_name_or_was_merged_or_failed_is_not_missing() {
        assert!(missing_of_run(&run(&["FULL-1-a", "FULL-1-new", "FULL-1-c"])).is_empty());
        let mut merged = run(&["FULL-1-a", "FULL-0-b", "FULL-1-c"]);
        merged[1].state_of = Some("FULL-1-b".into());
        assert!(missing_of_run(&merged).is_empty());
        // Only what really is.
        merged.pop();
        let missing = missing_of_run(&merged);
        assert_eq!(missing, [RunImage { disk: "c".into(), image: "FULL-1-c".into() }]);
        let mut failed = run(&["FULL-1-a", "FULL-1-c"]);
        failed[0].failed.push(Skipped { disk: "b".into(), reason: "I/O error".into() });
        assert!(missing_of_run(&failed).is_empty());
    }
}
