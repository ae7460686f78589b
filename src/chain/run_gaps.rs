//! Images that a backup run made and that are gone, manifest and all: the manifests of the run's other disks
//! name them. A name says nothing without its folder: VMs that are backed up in the same second have images of one
//! name, and a directory may have copies of another one in it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::timeline::vm_of;
use super::{Catalog, Disk, manifest_of};
use crate::error::{Error, Finding, Kind};
use crate::manifest::{Manifest, RunImage};
use crate::text::{path_text, to_text};

/// An image that a run made and that is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MissingImage {
    /// The folder of the VM's disks, relative to the backup directory.
    pub folder: PathBuf,
    /// Its disk, as the run or its folder names it.
    pub disk: String,
    /// File name of the image, without folders.
    pub image: String,
}

impl MissingImage {
    /// Of a disk of the backup directory.
    pub(crate) fn of(disk: &Path, image: String) -> Self {
        let name = to_text(disk.file_name().unwrap_or_default());
        MissingImage { folder: folder_of(disk).to_path_buf(), disk: name, image }
    }

    /// The disk with its folder, for people.
    pub(crate) fn disk_text(&self) -> String {
        match self.disk.starts_with('/') {
            // QEMU's name of a device, which is no path of ours.
            true => format!("{} of {}", path_text(&self.disk), path_text(&self.folder)),
            false => path_text(&self.folder.join(&self.disk)),
        }
    }
}

/// The folder of the disks of a disk's VM.
fn folder_of(disk: &Path) -> &Path {
    disk.parent().unwrap_or(Path::new(""))
}

/// Of all manifests of one run of one VM, with the paths of their disks: the images that are missing and not `told`
/// already. Where there are several copies of the run, in several folders, each is looked at by itself.
pub(crate) fn missing_of_run<'m>(
    run: impl Iterator<Item = (&'m Path, &'m Manifest)>,
    told: &[MissingImage],
) -> Vec<MissingImage> {
    let all: Vec<_> = run.collect();
    let mut sets: BTreeMap<&Path, Vec<&Manifest>> = BTreeMap::new();
    let several = has_copies(&all);
    let first = all.first().map_or(Path::new(""), |(disk, _)| folder_of(disk));
    for (disk, m) in &all {
        sets.entry(if several { folder_of(disk) } else { first }).or_default().push(m);
    }
    let is_told = |m: &MissingImage| {
        told.iter().any(|t| t.image == m.image && (!several || t.folder == m.folder))
    };
    let of_set = |(folder, set): (&Path, Vec<&Manifest>)| {
        let missing = missing_of_set(&set).into_iter();
        let with_folder = |i: RunImage| MissingImage {
            folder: folder.to_path_buf(),
            disk: i.disk,
            image: i.image,
        };
        missing.map(with_folder).collect::<Vec<_>>()
    };
    sets.into_iter().flat_map(of_set).filter(|m| !is_told(m)).collect()
}

/// Whether an image of the run is there in more than one folder.
fn has_copies(run: &[(&Path, &Manifest)]) -> bool {
    let mut seen: HashMap<&str, &Path> = HashMap::new();
    let names = run.iter().flat_map(|(disk, m)| names_of(m).map(|n| (n, folder_of(disk))));
    let mut names = names.collect::<Vec<_>>().into_iter();
    names.any(|(name, folder)| *seen.entry(name).or_insert(folder) != folder)
}

/// Of all manifests of one copy of a run: the images that it made, under the names that its disks had, and of which
/// none is among these manifests. (A disk may have another name by now: as many images as go by a name that the run
/// did not give are taken for those that are missing.)
fn missing_of_set(run: &[&Manifest]) -> Vec<RunImage> {
    let run = || run.iter().copied();
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

/// Whether the image is there without a manifest that can be read: nothing tells then of which run it is.
pub(crate) fn has_bare_image(catalog: &Catalog, missing: &MissingImage) -> bool {
    let is_bare = |d: &Disk| {
        let is_it = |at: usize| d.points[at].name == missing.image && manifest_of(d, at).is_none();
        folder_of(&d.path) == missing.folder && (0..d.points.len()).any(is_it)
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
    let told = told(catalog);
    let newest_run = |(vm, mut all): (String, Vec<(&Disk, Manifest)>)| {
        // The time in a name is later than that of each name before, whatever the clock did.
        let time = |(disk, m): &(&Disk, Manifest)| {
            (disk.points.last().map(|p| p.time), m.time, m.time_nanos)
        };
        let run = all.iter().max_by_key(|one| time(one)).map(|(_, m)| m.run.clone());
        all.retain(|(_, m)| Some(&m.run) == run.as_ref());
        gaps(catalog, &all, told.get(&vm).map_or(&[], Vec::as_slice))
    };
    vms.into_iter().flat_map(newest_run).collect()
}

/// What has a manifest left is a finding of its disk's: by the VM of that.
fn told(catalog: &Catalog) -> HashMap<String, Vec<MissingImage>> {
    let mut told: HashMap<String, Vec<MissingImage>> = HashMap::new();
    for disk in &catalog.disks {
        let Some(image) = disk.newest_missing().and_then(Path::file_name) else { continue };
        // Another program's points have no manifests.
        let known = (0..disk.points.len()).rev().find_map(|at| manifest_of(disk, at));
        let Some(m) = known else { continue };
        let missing = MissingImage::of(&disk.path, to_text(image));
        told.entry(vm_of(disk, &m)).or_default().push(missing);
    }
    told
}

/// One finding for each copy of the run that lacks something.
fn gaps(catalog: &Catalog, run: &[(&Disk, Manifest)], told: &[MissingImage]) -> Vec<Finding> {
    let all = run.iter().map(|(disk, m)| (disk.path.as_path(), m));
    let mut by_folder: BTreeMap<PathBuf, Vec<MissingImage>> = BTreeMap::new();
    for missing in missing_of_run(all, told) {
        by_folder.entry(missing.folder.clone()).or_default().push(missing);
    }
    by_folder.iter().filter_map(|(folder, missing)| gap(catalog, run, (folder, missing))).collect()
}

fn gap(
    catalog: &Catalog,
    run: &[(&Disk, Manifest)],
    (folder, missing): (&Path, &[MissingImage]),
) -> Option<Finding> {
    let (disk, m) = run.iter().find(|(disk, _)| folder_of(&disk.path) == folder)?;
    let is_bare: Vec<bool> = missing.iter().map(|i| has_bare_image(catalog, i)).collect();
    let name = |(i, bare): (&MissingImage, &bool)| {
        let what = if *bare { "the manifest of " } else { "" };
        format!("{what}{} of disk {}", path_text(&i.image), i.disk_text())
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

    fn missing(run: &[Manifest]) -> Vec<RunImage> {
        missing_of_set(&run.iter().collect::<Vec<_>>())
    }

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
        assert!(missing(&run(&["FULL-1-a", "FULL-1-b", "FULL-1-c"])).is_empty());
        let gone = missing(&run(&["FULL-1-a", "FULL-1-c"]));
        assert_eq!(gone, [RunImage { disk: "b".into(), image: "FULL-1-b".into() }]);
        assert_eq!(missing(&run(&["FULL-1-a"])).len(), 2);
        // A manifest of before that tells nothing.
        assert!(missing(&[example("FULL-1-a", Level::Full, None)]).is_empty());
        assert!(missing(&[]).is_empty());
    }

    #[test]
    fn what_has_another_name_or_was_merged_or_failed_is_not_missing() {
        assert!(missing(&run(&["FULL-1-a", "FULL-1-new", "FULL-1-c"])).is_empty());
        let mut merged = run(&["FULL-1-a", "FULL-0-b", "FULL-1-c"]);
        merged[1].state_of = Some("FULL-1-b".into());
        assert!(missing(&merged).is_empty());
        // Only what really is.
        merged.pop();
        let gone = missing(&merged);
        assert_eq!(gone, [RunImage { disk: "c".into(), image: "FULL-1-c".into() }]);
        let mut failed = run(&["FULL-1-a", "FULL-1-c"]);
        failed[0].failed.push(Skipped { disk: "b".into(), reason: "I/O error".into() });
        assert!(missing(&failed).is_empty());
    }

    #[test]
    fn each_copy_of_a_run_is_looked_at_by_itself() {
        let [whole, mut partial] =
            [&["FULL-1-a", "FULL-1-b", "FULL-1-c"][..], &["FULL-1-a"]].map(run);
        let disks = |folder: &str, run: &[Manifest]| -> Vec<PathBuf> {
            run.iter().map(|m| Path::new(folder).join(m.image.replace("FULL-1-", ""))).collect()
        };
        let (here, there) = (disks("vm", &whole), disks("old/vm", &partial));
        let all = || {
            let both = whole.iter().chain(&partial);
            here.iter().chain(&there).map(PathBuf::as_path).zip(both)
        };
        let gone = |image: &str| MissingImage {
            folder: "old/vm".into(),
            disk: image.replace("FULL-1-", ""),
            image: image.into(),
        };
        assert_eq!(missing_of_run(all(), &[]), [gone("FULL-1-b"), gone("FULL-1-c")]);
        // What is told of one is told of no other.
        let told = |folder: &str| MissingImage::of(&Path::new(folder).join("b"), "FULL-1-b".into());
        assert_eq!(missing_of_run(all(), &[told("vm")]).len(), 2);
        assert_eq!(missing_of_run(all(), &[told("old/vm")]), [gone("FULL-1-c")]);
        // A disk that was moved is of the same copy.
        partial[0].image = "FULL-1-b".into();
        let moved = [("x/a", &whole[0]), ("y/b", &partial[0])].map(|(d, m)| (Path::new(d), m));
        let of_one = missing_of_run(moved.into_iter(), &[]);
        assert_eq!(of_one.len(), 1, "{of_one:?}");
        assert!(
            missing_of_run(
                moved.into_iter(),
                &[MissingImage::of(Path::new("z/c"), "FULL-1-c".into())]
            )
            .is_empty()
        );
    }
}
