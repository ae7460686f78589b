//! How the files of a chain fit together: names, manifests and what they say of each other.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::structure::REMEDY;
use crate::backup::names::parse_bitmap;
use crate::chain::manifest::fingerprint;
use crate::chain::manifest::{self, BitmapInfo, DiskIdentity, Manifest};
use crate::chain::name::{self, Name};
use crate::chain::{Catalog, Disk, Level, Point, removal};
use crate::error::{Error, Finding, Kind, Severity};
use crate::folder::{self, EntryKind, Folder};

/// What `.fleecefs/` has about a point.
pub(super) struct Record {
    pub manifest: Option<Manifest>,
    /// Whether the manifest carries a checksum, which then is right.
    pub sealed: bool,
    problem: Option<Finding>,
}

impl Record {
    /// Reads it.
    pub fn read(point: &Point) -> Record {
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
    pub fn hash(&self) -> Option<&str> {
        self.manifest.as_ref()?.blake3.as_deref()
    }
}

/// Compares point `i` with its manifest and with the points below it.
pub(super) fn check(disk: &Disk, i: usize, records: &[Record]) -> Vec<Finding> {
    let point = &disk.points[i];
    let mut found: Vec<Finding> = records[i].problem.iter().cloned().collect();
    match &records[i].manifest {
        Some(m) if point.level != Level::Snapshot => {
            let mut check = Check { disk, point, m, records, found: &mut found };
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
    point: &'a Point,
    m: &'a Manifest,
    records: &'a [Record],
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
            let what = "its name and its manifest disagree on its level".to_string();
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
    }

    /// Both ends of the file: tells a replaced or rewritten image without reading all of it.
    fn fingerprint(&mut self) {
        let Some(known) = &self.m.fingerprint else { return };
        match fingerprint(&self.point.source) {
            Ok(found) if found != *known => {
                let what = "the file is not what was written: its ends differ from what its \
                            manifest says";
                self.error(Kind::Changed, what.to_string(), REMEDY);
            }
            Ok(_) => {}
            Err(e) => self.found.push(Finding::from_error(&e, &self.point.source)),
        }
    }

    fn parent(&mut self) {
        let (m, p) = (self.m, self.point);
        let below = p.parent.map(|i| (&self.disk.points[i], &self.records[i]));
        if let Some(name) = &m.parent {
            let dir = p.source.parent().unwrap_or(Path::new(""));
            if !folder::exists(&dir.join(name)) {
                let what = format!("it lies on {name}, which is missing");
                let remedy = format!("restore {name} from another copy of the backup");
                return self.error(Kind::Incomplete, what, &remedy);
            }
            let same = |b: &Point| b.source.file_name() == Some(OsStr::new(name));
            if let Some((b, _)) = below
                && !same(b)
            {
                let what = format!("it lies on {name} by its manifest, not on {}", b.name);
                return self.error(Kind::Corrupt, what, MIXED_UP);
            }
        }
        let Some((b, Some(bm))) = below.map(|(b, r)| (b, r.manifest.as_ref())) else { return };
        self.order(b, bm);
        if is_other_disk(&m.disk, &bm.disk) {
            let what = format!("it is of another disk than {}, on which it lies", b.name);
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
            let what = format!("it is older than {}, on which it lies", below.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        } else if bm.time > self.m.time {
            let what = format!(
                "its manifest's time is before that of {}, on which it lies: the clock was set back \
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
        let mut at = self.point.parent;
        let mut root = None;
        let mut repeated = None;
        while let Some(i) = at {
            root = Some(i);
            let below = self.records[i].manifest.as_ref().and_then(|m| m.bitmap.as_ref());
            if below.is_some_and(|b| b.name == own.name) {
                repeated = Some(self.disk.points[i].name.clone());
            }
            at = self.disk.points[i].parent;
        }
        if let Some(name) = repeated {
            let what = format!("it and {name} name the same bitmap, '{}'", own.name);
            self.error(Kind::Corrupt, what, MIXED_UP);
        }
        let of_root = root.and_then(|i| self.records[i].manifest.as_ref());
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
fn unrecorded(disk: &Disk, i: usize, records: &[Record]) -> Option<Finding> {
    let p = &disk.points[i];
    if !matches!(p.level, Level::Full | Level::Inc | Level::Diff) {
        return None;
    }
    let recorded = |j: usize| records[j].manifest.is_some() || records[j].problem.is_some();
    let others = (0..disk.points.len()).any(|j| disk.points[j].chain == p.chain && recorded(j));
    if others && records[i].problem.is_none() {
        let what = "it has no manifest, though others of its chain have: it may be foreign, or a \
                    backup that was broken off";
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

const ORPHAN: &str = "its manifest is there, the image is not";

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
    let leaving = removal::pending(dir);
    let mut found = Vec::new();
    for entry in entries {
        let Some(image) = entry.name.as_bytes().strip_suffix(b".json").map(OsStr::from_bytes)
        else {
            continue;
        };
        let leaves = leaving.iter().any(|l| OsStr::new(l) == image);
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
                side.join(&entry.name).display()
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
