//! How the files of a chain fit together: names, manifests and what they say of each other.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::backup::names::parse_bitmap;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Finding, Kind, Severity};
use crate::folder::{EntryKind, Folder};
use crate::journal::removal;
use crate::layer::qcow2::check::REMEDY;
use crate::layout::name::Name;
use crate::layout::{Level, name};
use crate::manifest::{BitmapInfo, DiskIdentity, Manifest, fingerprint};
use crate::text::path_text;
use crate::{folder, manifest};

/// What `.fleecefs/` has about a point.
pub(super) struct Record {
    pub manifest: Option<Manifest>,
    /// Whether the manifest carries a checksum, which then is right.
    pub sealed: bool,
    problem: Option<Finding>,
}

impl Record {
    /// Reads it.
    pub(super) fn read(point: &Point) -> Record {
        let none = Record { manifest: None, sealed: false, problem: None };
        let (Some(dir), Some(name)) = (point.source.parent(), point.source.file_name()) else {
            return none;
        };
        match manifest::read_sealed(dir, name) {
            Ok(Some((m, sealed))) => Record { manifest: Some(m), sealed, problem: None },
            Ok(None) => none,
            Err(e) => {
                let path = manifest::manifest_path(dir, name);
                Record { problem: Some(Finding::from_error(&e, path)), ..none }
            }
        }
    }

    /// The hash that the file must have.
    pub(super) fn hash(&self) -> Option<&str> {
        self.manifest.as_ref()?.blake3.as_deref()
    }
}

/// What `.fleecefs/` has about all points of a disk.
pub(super) struct Records {
    /// One for each point.
    pub list: Vec<Record>,
    /// Chains of which a point has a manifest, readable or not.
    chains: HashSet<String>,
    /// For each point, the lowest of those that it depends on.
    roots: Vec<Option<usize>>,
    /// For each point, the lowest of those that it depends on that names the same bitmap.
    same_bitmap: Vec<Option<usize>>,
}

impl Records {
    /// Reads all of them.
    pub(super) fn read(disk: &Disk) -> Records {
        let list: Vec<Record> = disk.points.iter().map(Record::read).collect();
        let recorded = |(_, r): &(&Point, &Record)| r.manifest.is_some() || r.problem.is_some();
        let chains = disk.points.iter().zip(&list).filter(recorded);
        let chains = chains.map(|(p, _)| p.chain.clone()).collect();
        let bitmap = |r: &'_ Record| Some(r.manifest.as_ref()?.bitmap.as_ref()?.name.clone());
        let bitmaps: Vec<Option<String>> = list.iter().map(bitmap).collect();
        let parents: Vec<Option<usize>> = disk.points.iter().map(|p| p.parent).collect();
        let (roots, same_bitmap) = (roots(&parents), lowest_alike(&parents, &bitmaps));
        Records { list, chains, roots, same_bitmap }
    }
}

/// The lowest of what each point depends on, if it depends on any; a parent comes before its children.
fn roots(parents: &[Option<usize>]) -> Vec<Option<usize>> {
    let mut roots: Vec<Option<usize>> = Vec::with_capacity(parents.len());
    for parent in parents {
        let root = parent.map(|p| roots.get(p).copied().flatten().unwrap_or(p));
        roots.push(root);
    }
    roots
}

/// The lowest of what each point depends on that has the same name. One walk over the tree of points:
/// looking down from each would take the square of a chain's length.
fn lowest_alike(parents: &[Option<usize>], names: &[Option<String>]) -> Vec<Option<usize>> {
    let mut children = vec![Vec::new(); parents.len()];
    let mut todo = Vec::new();
    for (i, parent) in parents.iter().enumerate() {
        match parent {
            Some(p) => children[*p].push(i),
            None => todo.push((i, false)),
        }
    }
    let mut alike = vec![None; parents.len()];
    // The lowest point of each name on the way from the root.
    let mut lowest: HashMap<&str, usize> = HashMap::new();
    while let Some((i, left)) = todo.pop() {
        if let Some(name) = names[i].as_deref() {
            match lowest.get(name).copied() {
                Some(own) if left && own == i => drop(lowest.remove(name)),
                Some(_) if left => {}
                known => alike[i] = known,
            }
            if !left {
                lowest.entry(name).or_insert(i);
            }
        }
        if !left {
            todo.push((i, true));
            todo.extend(children[i].iter().map(|c| (*c, false)));
        }
    }
    alike
}

/// Compares point `i` with its manifest and with the points below it.
pub(super) fn check(disk: &Disk, i: usize, records: &Records) -> Vec<Finding> {
    let point = &disk.points[i];
    let mut found: Vec<Finding> = records.list[i].problem.iter().cloned().collect();
    match &records.list[i].manifest {
        Some(m) if point.level != Level::Snapshot => {
            let mut check = Check { disk, i, point, m, records, found: &mut found };
            check.file();
            check.parent();
            check.bitmaps();
        }
        Some(_) => {}
        None => found.extend(unrecorded(disk, i, records)),
    }
    found
}

struct Check<'a> {
    disk: &'a Disk,
    i: usize,
    point: &'a Point,
    m: &'a Manifest,
    records: &'a Records,
    found: &'a mut Vec<Finding>,
}

impl Check<'_> {
    fn error(&mut self, kind: Kind, what: String, remedy: &str) {
        let error = Error::new(kind, what).at_path(&self.point.source).remedy(remedy);
        self.found.push(Finding::from_error(&error, &self.point.source));
    }

    fn file(&mut self) {
        let (m, p) = (self.m, self.point);
        match folder::look(&p.source) {
            Ok(meta) if meta.len() != m.file_size => {
                let kind = if meta.len() < m.file_size { Kind::Truncated } else { Kind::Changed };
                let what =
                    format!("it has {} bytes, its manifest says {}", meta.len(), m.file_size);
                self.error(kind, what, REMEDY);
            }
            Ok(_) => self.fingerprint(),
            _ => {}
        }
        if p.is_served() && p.size != m.virtual_size {
            let what =
                format!("its disk has {} bytes, its manifest says {}", p.size, m.virtual_size);
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
        if p.level != Level::Image && p.level != m.level {
            let what = "its name and its manifest have different levels".to_string();
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
    }

    /// Both ends of the file: tells a replaced or rewritten image without reading all of it.
    fn fingerprint(&mut self) {
        let Some(known) = &self.m.fingerprint else { return };
        match fingerprint(&self.point.source) {
            Ok(found) if found != *known => {
                let what = "the file is damaged: its first or last bytes differ from its manifest";
                self.error(Kind::Changed, what.to_string(), REMEDY);
            }
            Ok(_) => {}
            Err(e) => self.found.push(Finding::from_error(&e, &self.point.source)),
        }
    }

    fn parent(&mut self) {
        let (m, p) = (self.m, self.point);
        let below = p.parent.map(|i| (&self.disk.points[i], &self.records.list[i]));
        if let Some(name) = &m.parent {
            let dir = p.source.parent().unwrap_or(Path::new(""));
            if !folder::exists(&dir.join(name)) {
                let name = path_text(name);
                let what = format!("parent image {name} is missing");
                let remedy = format!("restore {name} from another copy of the backup");
                return self.error(Kind::Incomplete, what, &remedy);
            }
            let same = |b: &Point| b.source.file_name() == Some(OsStr::new(name));
            if let Some((b, _)) = below
                && !same(b)
            {
                let what = format!(
                    "its manifest names {} as parent, not {}",
                    path_text(name),
                    path_text(&b.name)
                );
                return self.error(Kind::Corrupt, what, MIXED_UP);
            }
        }
        let Some((b, Some(bm))) = below.map(|(b, r)| (b, r.manifest.as_ref())) else { return };
        self.order(b, bm);
        let moved = m.moved_from.as_ref() == Some(&bm.disk.file);
        if !moved && is_other_disk(&m.disk, &bm.disk) {
            let what = format!("it is of another disk than its parent {}", b.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
    }

    /// Names of later points have later times, whatever the clock said: a manifest has the moment as
    /// the clock had it, so a clock that was set back is no damage.
    fn order(&mut self, below: &Point, bm: &Manifest) {
        let earlier = match (stamp(self.point), stamp(below)) {
            (Some(own), Some(below)) => own < below,
            _ => false,
        };
        if earlier {
            let what = format!("it is older than its parent {}", below.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        } else if bm.time > self.m.time {
            let what = format!(
                "its manifest's time is before that of its parent {}: the clock was set back \
                 between them, if both are of one disk",
                below.name
            );
            let found = Finding::warning(Kind::Corrupt, &self.point.source, what);
            self.found.push(Finding { severity: Severity::Note, ..found });
        }
    }

    /// Generations never repeat a bitmap, and all of a chain are of one backup directory. (The
    /// chain in a bitmap's name says less: consolidation gives a chain a new FULL.)
    fn bitmaps(&mut self) {
        let Some(own) = self.m.bitmap.as_ref() else { return };
        let repeated = self.records.same_bitmap[self.i].map(|j| &self.disk.points[j].name);
        if let Some(name) = repeated {
            let name = path_text(&name);
            let what = format!("it and {name} name the same bitmap, '{}'", own.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
        let of_root = self.records.roots[self.i];
        let of_root = of_root.and_then(|i| self.records.list[i].manifest.as_ref());
        let of_root = of_root.and_then(|m| m.bitmap.as_ref());
        let target = |b: &BitmapInfo| parse_bitmap(&b.name).map(|n| n.target.to_string());
        if let (Some(a), Some(b)) = (target(own), of_root.and_then(target))
            && a != b
        {
            let what = format!("its bitmap '{}' belongs to another backup directory", own.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
    }
}

const MIXED_UP: &str = "the files of this chain are mixed up: restore them and .fleecefs/ from \
                        another copy of the backup";

/// The time in the name of a point's file.
fn stamp(point: &Point) -> Option<i64> {
    match name::parse(point.source.file_name()?) {
        Name::Backup { stamp, .. } => stamp,
        _ => None,
    }
}

/// Whether two identities certainly are of different disks: something that both know is equal
/// nowhere. (A disk may be moved to another file, or get another device, but hardly both at once
/// under another node name.)
fn is_other_disk(a: &DiskIdentity, b: &DiskIdentity) -> bool {
    let pairs = [(&a.qdev, &b.qdev), (&a.node, &b.node), (&a.file, &b.file)];
    // Generated node names say nothing.
    let known = |s: &String| !s.is_empty() && !s.starts_with('#');
    let mut known = pairs.iter().filter(|(x, y)| known(x) && known(y)).peekable();
    known.peek().is_some() && known.all(|(x, y)| x != y)
}

/// What can be said of a point without a manifest.
fn unrecorded(disk: &Disk, i: usize, records: &Records) -> Option<Finding> {
    let p = &disk.points[i];
    if !matches!(p.level, Level::Full | Level::Inc | Level::Diff) {
        return None;
    }
    if records.chains.contains(&p.chain) && records.list[i].problem.is_none() {
        let what = "it has no manifest, but others of its chain have: it may be foreign, or from \
                    an interrupted backup";
        let mut found = Finding::warning(Kind::Incomplete, &p.source, what);
        found.remedy = Some(
            "the next backup of this disk adopts or removes it; if it is one of the chain, 'fleecefs \
             verify --create' records it"
                .into(),
        );
        return Some(found);
    }
    let below = p.parent.map(|j| &disk.points[j])?;
    let (own, below) = (cluster_size(p)?, (cluster_size(below)?, below.size));
    (own != below.0 && p.size != below.1).then(|| {
        let what = "its cluster size and disk size both differ from those of the point below: it \
                    may be of another disk";
        Finding { severity: Severity::Note, ..Finding::warning(Kind::Corrupt, &p.source, what) }
    })
}

fn cluster_size(point: &Point) -> Option<u32> {
    let spec = point.layers.last()?;
    crate::layer::probe(&*spec.file).ok().map(|i| i.cluster_size)
}

const ORPHAN: &str = "there is a manifest and no image";

/// Whether a finding is one of [`missing_images`].
pub(super) fn is_orphan(f: &Finding) -> bool {
    f.message == ORPHAN
}

/// Images whose manifests are there and which are not: each was a point once. Looks into every
/// folder, also where no image is left at all.
pub(super) fn missing_images(catalog: &Catalog) -> Vec<Finding> {
    let mut found = Vec::new();
    // What cannot be read is a finding of the scan's.
    let Ok(top) = Folder::open(&catalog.root) else { return found };
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let Ok(dir) = top.beneath(&relative) else { continue };
        let side = dir.folder(manifest::FOLDER).ok();
        // A mount of ours inside the backup directory shows no files.
        if side.as_ref().is_some_and(|s| s.look("status.json").is_ok_and(|m| m.is_file())) {
            continue;
        }
        let entries = dir.entries().unwrap_or_default().into_iter();
        let folders = entries.filter(|e| e.kind == EntryKind::Folder && e.name != manifest::FOLDER);
        todo.extend(folders.map(|e| relative.join(e.name)));
        found.extend(side.iter().flat_map(|side| orphans(&dir, side)));
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn orphans(folder: &Folder, side: &Folder) -> Vec<Finding> {
    let Ok(entries) = side.entries() else { return Vec::new() };
    let dir = folder.path();
    let leaving: HashSet<String> = removal::pending(dir).into_iter().collect();
    let mut found = Vec::new();
    for entry in entries {
        let Some(image) = entry.name.as_bytes().strip_suffix(b".json").map(OsStr::from_bytes)
        else {
            continue;
        };
        let leaves = image.to_str().is_some_and(|i| leaving.contains(i));
        if leaves || folder.has(image) {
            continue;
        }
        // Other files may end so, too; a damaged manifest still has a point's name.
        let was_point = match manifest::read(dir, image) {
            Ok(m) => m.is_some(),
            Err(_) => matches!(name::parse(image), Name::Backup { .. }),
        };
        if was_point {
            let remedy = format!(
                "restore it from another copy of the backup, or remove {}",
                path_text(&side.join(&entry.name))
            );
            let error = Error::new(Kind::Incomplete, ORPHAN).at_path(dir.join(image));
            found.push(Finding::from_error(&error.remedy(remedy), dir));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What [`lowest_alike`] and [`roots`] say, by looking down from each point.
    fn looking_down(
        parents: &[Option<usize>],
        names: &[Option<String>],
        i: usize,
    ) -> [Option<usize>; 2] {
        let below: Vec<usize> = std::iter::successors(parents[i], |j| parents[*j]).collect();
        let alike = below.iter().rev().find(|j| names[i].is_some() && names[**j] == names[i]);
        [below.last().copied(), alike.copied()]
    }

    proptest::proptest! {
        #[test]
        fn roots_and_repeated_bitmaps_are_found_as_by_looking_down_from_each(
            tree in proptest::collection::vec((0.0..1.2f64, 0u8..5), 0..40),
        ) {
            let parent = |(i, (place, _)): (usize, &(f64, u8))| {
                Some((place * i as f64) as usize).filter(|p| *p < i)
            };
            let parents: Vec<Option<usize>> = tree.iter().enumerate().map(parent).collect();
            let name = |(_, n): &(f64, u8)| (*n > 0).then(|| n.to_string());
            let names: Vec<Option<String>> = tree.iter().map(name).collect();
            let (roots, alike) = (roots(&parents), lowest_alike(&parents, &names));
            for i in 0..tree.len() {
                let found = [roots[i], alike[i]];
                proptest::prop_assert_eq!(found, looking_down(&parents, &names, i));
            }
        }
    }

    #[test]
    fn a_disk_may_move_but_not_in_every_respect() {
        let id = |qdev: &str, node: &str, file: &str| DiskIdentity {
            qdev: qdev.into(),
            node: node.into(),
            file: file.into(),
            ..Default::default()
        };
        let a = id("/machine/virtio0", "drive0", "/a.qcow2");
        assert!(!is_other_disk(&a, &id("/machine/virtio0", "drive0", "/moved.qcow2")));
        assert!(!is_other_disk(&a, &id("", "#block123", "")));
        assert!(!is_other_disk(&a, &DiskIdentity::default()));
        assert!(is_other_disk(&a, &id("/machine/virtio1", "drive1", "/b.qcow2")));
    }
}
