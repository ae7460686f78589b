//! The names below the mount point: an immutable tree, built from a catalog.
//!
//! ```text
//! <disk path>/<point>.raw                       one file per served point
//! <disk path>/latest.raw -> <point>.raw         the newest of them
//! <disk path>/by-time/<UTC time>.raw -> ../…    ties get -2, -3
//! .fleecefs/status.json                         what was found
//! ```
//!
//! Where files are shown, each point and link has a folder beside it, `.files` instead of `.raw`. What is in there
//! is not in the tree: see [`crate::view`].
//!
//! A refresh builds a new tree and never touches the old one. Names can clash (a disk's folder may
//! lie inside another's, a point may be called `latest`): see [`super::names`].
//!
//! Inode numbers are hashes of the relative path and, for points, of all layers' identities. So
//! they are the same after a remount, and another generation of a point is another inode: the
//! kernel can never serve cached pages of the one for the other.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::names;
use super::names::{Child, Folder};
pub use super::node::{Entry, EntryKind, Node, NodeKind, ROOT, find};
use super::number::Numbering;
use super::point::PointFile;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Finding, Result};
use crate::image::{Cache, Image};
use crate::layer::LayerSpec;
use crate::view;

/// Everything below the mount point at one moment.
pub struct Tree {
    nodes: HashMap<u64, Arc<Node>>,
    /// What it was built from.
    pub catalog: Arc<Catalog>,
    /// Points that the catalog offers and whose image could not be set up.
    pub findings: Vec<Finding>,
    /// Bytes that all points' own files take on disk.
    pub own_bytes: u64,
    /// When it was built.
    pub built: SystemTime,
}

/// What the kernel has to forget when one tree follows another.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names (with their folder's inode) that are gone or mean another inode now.
    pub entries: Vec<(u64, OsString)>,
    /// Inodes whose attributes or cached bytes are no longer right.
    pub inodes: Vec<u64>,
}

impl Tree {
    /// Builds the tree. Images of points whose layers are the very same as in `previous` are
    /// taken over; the others are set up anew. A point that cannot be set up becomes a finding.
    /// New points get no number for which `in_use` is true: the kernel knows it as something else. With
    /// `with_files` their files are shown, too.
    pub fn build(
        catalog: Catalog,
        previous: Option<&Tree>,
        cache: &Arc<Cache>,
        with_files: bool,
        in_use: impl Fn(u64) -> bool,
    ) -> Tree {
        let catalog = Arc::new(catalog);
        let mut files = Files::new(catalog.clone(), previous, cache, with_files);
        let folder = files.arrange();
        let Files { findings, .. } = files;
        let own_bytes = catalog.disks.iter().flat_map(|d| &d.points).map(|p| p.own_bytes);
        let own_bytes = own_bytes.fold(0, u64::saturating_add);
        let old = previous.into_iter().flat_map(Tree::images).collect();
        let taken = |ino| in_use(ino) || previous.is_some_and(|t| t.nodes.contains_key(&ino));
        let old_files = previous.into_iter().flat_map(Tree::shown).collect();
        let mut nodes = Numbering { nodes: HashMap::new(), old, old_files, taken: &taken };
        nodes.folder(ROOT, ROOT, Path::new(""), folder);
        Tree { nodes: nodes.nodes, catalog, findings, own_bytes, built: SystemTime::now() }
    }

    /// The node with this number.
    pub fn node(&self, ino: u64) -> Option<&Arc<Node>> {
        self.nodes.get(&ino)
    }

    /// How many inodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: the root is always there.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The served points, in no order.
    pub fn files(&self) -> impl Iterator<Item = &Arc<PointFile>> {
        self.nodes.values().filter_map(|n| match &n.kind {
            NodeKind::File(f) => Some(f),
            _ => None,
        })
    }

    /// Every served point with its path below the mount point.
    pub fn paths(&self) -> Vec<(PathBuf, &Arc<PointFile>)> {
        let mut found = Vec::new();
        let mut todo = vec![(PathBuf::new(), ROOT)];
        while let Some((path, ino)) = todo.pop() {
            match self.node(ino).map(|n| &n.kind) {
                Some(NodeKind::Dir(entries)) => {
                    todo.extend(entries.iter().map(|e| (path.join(&e.name), e.ino)));
                }
                Some(NodeKind::File(file)) => found.push((path, file)),
                _ => {}
            }
        }
        found
    }

    /// Images by address, with the inode that stands for them.
    fn images(&self) -> impl Iterator<Item = (*const Image, u64)> {
        self.nodes.values().filter_map(|n| match &n.kind {
            NodeKind::File(f) => Some((Arc::as_ptr(&f.image), n.ino)),
            _ => None,
        })
    }

    /// The points whose files are shown, by the addresses of their images.
    fn shown(&self) -> impl Iterator<Item = (*const Image, Arc<view::Point>)> {
        self.nodes.values().filter_map(|n| match &n.kind {
            NodeKind::Files(point, _) => Some((Arc::as_ptr(point.image()), point.clone())),
            _ => None,
        })
    }

    /// Marks the images of the old tree whose files were changed or replaced since, so that reads
    /// through handles that are still open fail. A file that was only removed goes on being read
    /// by those who hold it.
    fn retire(&self, new: &Tree) -> Vec<u64> {
        let mut changed = Vec::new();
        let mut files = HashMap::new();
        let mut points = HashMap::new();
        for node in self.nodes.values() {
            let NodeKind::File(file) = &node.kind else { continue };
            let kept = matches!(new.nodes.get(&node.ino).map(|n| &n.kind),
                Some(NodeKind::File(f)) if Arc::ptr_eq(&f.image, &file.image));
            if !kept && self.is_changed(file.index(), &mut points, &mut files) {
                file.image.mark_changed();
                changed.push(node.ino);
            }
        }
        changed
    }

    /// Whether one of the files below a point was changed or replaced. Remembers the answer for
    /// every point on the way, so that long chains are walked once.
    fn is_changed(
        &self,
        (disk, point): (usize, usize),
        points: &mut HashMap<(usize, usize), bool>,
        files: &mut HashMap<PathBuf, bool>,
    ) -> bool {
        let all = &self.catalog.disks[disk].points;
        let (mut path, mut at, mut changed) = (Vec::new(), Some(point), false);
        while let Some(i) = at {
            if let Some(known) = points.get(&(disk, i)) {
                changed = *known;
                break;
            }
            path.push(i);
            at = all[i].parent;
        }
        for i in path.into_iter().rev() {
            changed = changed || all[i].layers.iter().any(|l| layer_changed(l, files));
            points.insert((disk, i), changed);
        }
        changed
    }

    /// What the kernel has to forget, now that `new` takes the place of `self`. Also marks the
    /// images of changed files.
    pub fn replaced_by(&self, new: &Tree) -> Changes {
        let mut changes = Changes { entries: Vec::new(), inodes: self.retire(new) };
        for node in self.nodes.values() {
            let NodeKind::Dir(old) = &node.kind else { continue };
            let now = match new.nodes.get(&node.ino).map(|n| &n.kind) {
                Some(NodeKind::Dir(now)) => now.as_slice(),
                _ => &[],
            };
            if old.as_slice() != now {
                changes.inodes.push(node.ino);
            }
            for entry in old {
                if find(now, &entry.name).is_none_or(|e| e.ino != entry.ino) {
                    changes.entries.push((node.ino, entry.name.clone()));
                }
            }
        }
        changes
    }
}

/// Whether a layer's file has other contents now, or its name stands for another file.
fn layer_changed(layer: &LayerSpec, seen: &mut HashMap<PathBuf, bool>) -> bool {
    let mut changed = |file: &crate::storage::SourceFile| match seen.entry(file.path().into()) {
        Slot::Occupied(s) => *s.get(),
        Slot::Vacant(s) => *s.insert(file.is_changed_on_disk()),
    };
    changed(&layer.file) || layer.data_file.as_deref().is_some_and(changed)
}

/// Gives every served point its image and its name.
struct Files<'a> {
    catalog: Arc<Catalog>,
    old: HashMap<(&'a Path, &'a str), &'a Arc<PointFile>>,
    cache: &'a Arc<Cache>,
    findings: Vec<Finding>,
    with_files: bool,
}

impl<'a> Files<'a> {
    fn new(
        catalog: Arc<Catalog>,
        previous: Option<&'a Tree>,
        cache: &'a Arc<Cache>,
        with_files: bool,
    ) -> Self {
        let key = |f: &'a Arc<PointFile>| ((f.disk().path.as_path(), f.point().name.as_str()), f);
        let old = previous.into_iter().flat_map(Tree::files).map(key).collect();
        Files { catalog, old, cache, findings: Vec::new(), with_files }
    }

    fn arrange(&mut self) -> Folder {
        let catalog = self.catalog.clone();
        let mut root = Folder::default();
        for disk in catalog.disks.iter().filter(|d| d.points.iter().any(Point::is_served)) {
            root.at(&disk.path);
        }
        root.at(Path::new(".fleecefs")).children.insert("status.json".into(), Child::Status);
        let mut named = Vec::new();
        for (i, disk) in catalog.disks.iter().enumerate() {
            named.push(self.add_points(i, disk, &mut root));
        }
        for (disk, points) in catalog.disks.iter().zip(named) {
            if points.is_empty() {
                continue;
            }
            let folder = root.at(&disk.path);
            names::add_links(folder, &points, names::RAW);
            if self.with_files {
                let files = names::add_files(folder, &points);
                names::add_links(folder, &files, names::FILES);
            }
        }
        root
    }

    /// Adds a disk's points; says which name each got, in chain order, with its time.
    fn add_points(&mut self, index: usize, disk: &Disk, root: &mut Folder) -> Vec<(OsString, i64)> {
        let mut done: Vec<Option<Arc<PointFile>>> = vec![None; disk.points.len()];
        let mut named = Vec::new();
        for (i, point) in disk.points.iter().enumerate().filter(|(_, p)| p.is_served()) {
            let below = point.parent.and_then(|p| done.get(p).cloned().flatten());
            match self.point_file((index, i), below.as_deref()) {
                Ok(file) => {
                    let file = Arc::new(file);
                    let folder = root.at(&disk.path);
                    let name = folder.free_name(OsStr::new(&point.name), names::RAW);
                    folder.children.insert(name.clone(), Child::File(file.clone()));
                    named.push((name, point.time));
                    done[i] = Some(file);
                }
                Err(e) => {
                    log::error!("{}: {}", point.name, e.report());
                    self.findings.push(Finding::from_error(&e, &point.source));
                }
            }
        }
        named
    }

    fn point_file(&self, index: (usize, usize), below: Option<&PointFile>) -> Result<PointFile> {
        let disk = &self.catalog.disks[index.0];
        let key = (disk.path.as_path(), disk.points[index.1].name.as_str());
        let old = self.old.get(&key).map(|o| &***o);
        PointFile::new(&self.catalog, index, below, old, self.cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::layer::{Format, LayerPart};
    use crate::layout::Level;
    use crate::storage::SourceFile;

    /// A backup directory of real (raw) files, so that identities are real, too.
    struct TestTree {
        dir: tempfile::TempDir,
        files: HashMap<PathBuf, Arc<SourceFile>>,
    }

    impl TestTree {
        fn new() -> Self {
            TestTree { dir: tempfile::tempdir().unwrap(), files: HashMap::new() }
        }

        fn write(&self, name: &str, bytes: &[u8]) {
            let path = self.dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }

        /// Like the scan: the same `Arc` as long as the file is the same.
        fn layer(&mut self, name: &str) -> LayerSpec {
            let path = self.dir.path().join(name);
            let now = SourceFile::look(&path).unwrap();
            let file = match self.files.get(&path).filter(|f| f.identity() == now.identity()) {
                Some(f) => f.clone(),
                None => Arc::new(now),
            };
            self.files.insert(path, file.clone());
            LayerSpec { file, format: Format::Raw, part: LayerPart::Whole, data_file: None }
        }

        /// A disk at `path` whose points (name, time) depend on each other.
        fn disk(&mut self, path: &str, points: &[(&str, i64)]) -> Disk {
            let mut disk = Disk { path: path.into(), points: Vec::new(), findings: Vec::new() };
            for (i, (name, time)) in points.iter().enumerate() {
                let source = Path::new(path).join(name);
                let layers = vec![self.layer(source.to_str().unwrap())];
                disk.points.push(Point {
                    name: name.to_string(),
                    source: self.dir.path().join(&source),
                    level: if i == 0 { Level::Full } else { Level::Inc },
                    chain: points[0].0.to_string(),
                    parent: i.checked_sub(1),
                    time: *time,
                    size: 1 << 20,
                    own_bytes: 4096,
                    consistency: None,
                    layers,
                    format_is_open: false,
                    unavailable: None,
                });
            }
            disk
        }

        fn catalog(&self, disks: Vec<Disk>) -> Catalog {
            let root = self.dir.path().to_path_buf();
            Catalog { root, disks, findings: Vec::new() }
        }
    }

    fn build(catalog: Catalog, previous: Option<&Tree>) -> Tree {
        Tree::build(catalog, previous, &Cache::new(1 << 20), false, |_| false)
    }

    /// Everything in the tree as sorted lines: `path`, `path/` or `path -> target`.
    fn listing(tree: &Tree) -> Vec<String> {
        let mut lines = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((path, ino)) = todo.pop() {
            let node = tree.node(ino).unwrap();
            match &node.kind {
                NodeKind::Dir(entries) => {
                    assert!(entries.is_sorted_by(|a, b| a.name < b.name));
                    lines.push(format!("{path}/"));
                    for e in entries {
                        assert_eq!(tree.node(e.ino).unwrap().parent, ino);
                        todo.push((format!("{path}/{}", e.name.to_str().unwrap()), e.ino));
                    }
                }
                NodeKind::Link(to) => lines.push(format!("{path} -> {}", to.display())),
                NodeKind::File(_) | NodeKind::Status => lines.push(path),
                NodeKind::Files(..) => lines.push(format!("{path}/?")),
                NodeKind::Inside(_) => panic!("{path} is in the tree"),
            }
        }
        lines.sort();
        lines
    }

    fn ino_of(tree: &Tree, path: &str) -> u64 {
        Path::new(path).iter().fold(ROOT, |ino, name| {
            let NodeKind::Dir(entries) = &tree.node(ino).unwrap().kind else { panic!("{path}") };
            find(entries, name).unwrap_or_else(|| panic!("no {path}")).ino
        })
    }

    #[test]
    fn a_disk_has_its_points_and_links_to_them() {
        let mut dir = TestTree::new();
        for name in ["FULL-1-a", "INC-2-a", "INC-3-a"] {
            dir.write(&format!("vm/a/{name}"), b"x");
        }
        let t = 1_706_260_646;
        let disk = dir.disk("vm/a", &[("FULL-1-a", t - 7), ("INC-2-a", t), ("INC-3-a", t)]);
        let tree = build(dir.catalog(vec![disk]), None);
        let want = [
            "/",
            "/.fleecefs/",
            "/.fleecefs/status.json",
            "/vm/",
            "/vm/a/",
            "/vm/a/FULL-1-a.raw",
            "/vm/a/INC-2-a.raw",
            "/vm/a/INC-3-a.raw",
            "/vm/a/by-time/",
            "/vm/a/by-time/20240126T091719Z.raw -> ../FULL-1-a.raw",
            "/vm/a/by-time/20240126T091726Z-2.raw -> ../INC-3-a.raw",
            "/vm/a/by-time/20240126T091726Z.raw -> ../INC-2-a.raw",
            "/vm/a/latest.raw -> INC-3-a.raw",
        ];
        assert_eq!(listing(&tree), want);
    }

    #[test]
    fn clashing_names_never_hide_a_point() {
        let mut dir = TestTree::new();
        for name in ["FULL-1-a", "latest", "FULL-1-a.raw/x", "by-time/y", "latest.raw/z"] {
            if !name.starts_with("FULL-1-a.raw") {
                dir.write(name, b"x");
            }
        }
        // The root of the backup directory is a disk; others are in folders named like its files.
        let root = dir.disk("", &[("FULL-1-a", 1), ("latest", 2)]);
        dir.write("sub/x", b"x");
        let mut inner = dir.disk("sub", &[("x", 1)]);
        inner.path = "FULL-1-a.raw".into();
        let by_time = dir.disk("by-time", &[("y", 3)]);
        let latest = dir.disk("latest.raw", &[("z", 4)]);
        let tree = build(dir.catalog(vec![root, inner, by_time, latest]), None);
        let names = listing(&tree);
        for want in [
            "/FULL-1-a-2.raw",
            "/FULL-1-a.raw/x.raw",
            "/latest-2.raw",
            "/latest.raw/z.raw",
            "/by-time/y.raw",
            "/by-time/19700101T000001Z.raw -> ../FULL-1-a-2.raw",
        ] {
            assert!(names.iter().any(|n| n == want), "no {want} in {names:#?}");
        }
        assert_eq!(tree.files().count(), 5);
    }

    #[test]
    fn a_refresh_keeps_images_and_inodes_of_what_is_unchanged() {
        let mut dir = TestTree::new();
        dir.write("a/FULL-1-a", b"x");
        dir.write("b/FULL-1-b", b"x");
        let disks = vec![dir.disk("a", &[("FULL-1-a", 1)]), dir.disk("b", &[("FULL-1-b", 1)])];
        let first = build(dir.catalog(disks), None);
        dir.write("a/INC-2-a", b"y");
        let points = [("FULL-1-a", 1), ("INC-2-a", 2)];
        let disk = dir.disk("a", &points);
        let second = build(dir.catalog(vec![disk]), Some(&first));
        let full = "a/FULL-1-a.raw";
        assert_eq!(ino_of(&first, full), ino_of(&second, full));
        let changes = first.replaced_by(&second);
        let gone = |parent: &str, name: &str| (ino_of(&first, parent), OsString::from(name));
        assert!(changes.entries.contains(&gone("", "b")));
        assert!(changes.entries.contains(&gone("a", "latest.raw")));
        assert!(!changes.entries.contains(&gone("a", "FULL-1-a.raw")));
        assert!(changes.inodes.contains(&ino_of(&first, "a")));
        // Removed, not changed: whoever has it open goes on reading.
        let NodeKind::File(b) = &first.node(ino_of(&first, "b/FULL-1-b.raw")).unwrap().kind else {
            panic!("not a file")
        };
        assert!(b.image.read_at(&mut [0], 0).is_ok());
    }

    #[test]
    fn a_changed_layer_makes_new_inodes_above_it_and_ends_the_old_images() {
        let mut dir = TestTree::new();
        let points = [("FULL-1-a", 1), ("INC-2-a", 2)];
        dir.write("a/FULL-1-a", b"x");
        dir.write("a/INC-2-a", b"x");
        let disk = dir.disk("a", &points);
        let first = build(dir.catalog(vec![disk]), None);
        dir.write("a/INC-2-a", b"changed");
        let disk = dir.disk("a", &points);
        let second = build(dir.catalog(vec![disk]), Some(&first));
        let changes = first.replaced_by(&second);
        let (full, inc) = ("a/FULL-1-a.raw", "a/INC-2-a.raw");
        assert_eq!(ino_of(&first, full), ino_of(&second, full));
        assert_ne!(ino_of(&first, inc), ino_of(&second, inc));
        assert!(changes.inodes.contains(&ino_of(&first, inc)));
        let read = |tree: &Tree, path: &str| match &tree.node(ino_of(tree, path)).unwrap().kind {
            NodeKind::File(f) => f.image.read_at(&mut [0], 0).map_err(|e| e.kind()),
            _ => panic!("not a file"),
        };
        assert_eq!(read(&first, inc), Err(Kind::Changed));
        assert_eq!(read(&second, inc), Ok(()));
        // After a remount the numbers are the same as in the refreshed tree.
        let disk = dir.disk("a", &points);
        let again = build(dir.catalog(vec![disk]), None);
        assert_eq!(ino_of(&again, inc), ino_of(&second, inc));
    }
}
