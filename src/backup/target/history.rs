//! What a target's folder holds for one disk: committed points, images without a manifest, the
//! tip that an INC would build on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::backup::names;
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::job::each::each;
use crate::layout::Level;
use crate::manifest::{DiskIdentity, Manifest, fingerprint_of};
use crate::text::path_text;
use crate::{folder, manifest};

/// Why there is no INC where nothing was backed up yet.
pub(crate) const FIRST: &str = "there is no FULL in the target yet";

/// An image in the folder.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// File name.
    pub name: String,
    /// From the name.
    pub level: Level,
    /// From the name.
    pub time: i64,
    /// Its manifest, if it is committed.
    pub manifest: Option<Manifest>,
    /// Why its manifest cannot be read.
    pub broken: Option<String>,
}

impl Entry {
    fn committed(&self) -> Result<&Manifest, String> {
        match (&self.manifest, &self.broken) {
            (Some(m), _) => Ok(m),
            (None, Some(why)) => Err(format!("the manifest of {} is invalid: {why}", self.name)),
            (None, None) => Err(format!("{} was not made by fleecefs (no manifest)", self.name)),
        }
    }
}

/// What a name in a folder is.
enum Found {
    Entry(Box<Entry>),
    /// Ends in `.partial`.
    Partial(String),
}

/// A folder as far as one disk is concerned.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// The folder.
    pub dir: PathBuf,
    /// Images, oldest first by the time in their names.
    pub entries: Vec<Entry>,
    /// Names ending in `.partial`.
    pub partials: Vec<String>,
    /// What image names in it end with.
    pub tail: String,
}

impl History {
    /// Reads a folder; one that does not exist is empty. With `disk` only images whose names end
    /// in that disk's name count (`--no-subdir`).
    ///
    /// A manifest that cannot be read is a reason against its point, not against the folder.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn read(dir: &Path, disk: Option<&str>) -> Result<Self> {
        let mut history = History { dir: dir.to_path_buf(), ..Default::default() };
        let list = Folder::open(dir).and_then(|f| Ok((f.entries()?, f)));
        let list = match folder::absent_is_none(list) {
            // The image of a disk without a folder and a time has the name that a folder would have.
            Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => None,
            read => read.map_err(|e| Error::io(e, "cannot read the folder").at_path(dir))?,
        };
        let Some((list, folder)) = list else { return Ok(history) };
        let side = folder.folder(manifest::FOLDER).ok();
        let names: Vec<String> =
            list.into_iter().filter_map(|item| item.name.into_string().ok()).collect();
        for found in each(&names, |name| history.look(side.as_ref(), name, disk)) {
            match found {
                Some(Found::Entry(entry)) => history.entries.push(*entry),
                Some(Found::Partial(name)) => history.partials.push(name),
                None => {}
            }
        }
        history.entries.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
        Ok(history)
    }

    /// As [`History::read`] of a folder, but of its manifests no more are read than tell whose it is: the
    /// newest that can be read, and that of the newest FULL or INC. With `flat`, a history for each
    /// disk's name in it.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn glance(dir: &Path, flat: bool) -> Result<Vec<Self>> {
        let failed = |e| Error::io(e, "cannot read the folder").at_path(dir);
        let list = folder::absent_is_none(folder::entries(dir)).map_err(failed)?;
        let mut found: BTreeMap<String, History> = BTreeMap::new();
        for item in list.unwrap_or_default() {
            let Ok(name) = item.name.into_string() else { continue };
            let whole = name.strip_suffix(".partial").unwrap_or(&name);
            let parsed = names::parse_image(whole).map(|(l, t, d)| (l, t, d.to_string()));
            if flat && parsed.is_none() {
                continue;
            }
            let tail = parsed.as_ref().filter(|_| flat).map_or_else(String::new, |p| p.2.clone());
            let new = || History { dir: dir.to_path_buf(), tail: tail.clone(), ..Self::default() };
            let history = found.entry(tail.clone()).or_insert_with(new);
            match parsed {
                None => history.entries.extend(history.look_plain(None, &name, None)),
                Some(_) if whole.len() != name.len() => history.partials.push(name),
                Some((level, time, _)) => {
                    history.entries.push(Entry { name, level, time, manifest: None, broken: None });
                }
            }
        }
        found.values_mut().for_each(History::read_newest);
        Ok(found.into_values().collect())
    }

    /// The names of disks of which there may be something in the folder of all.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) fn tails(dir: &Path) -> Result<BTreeSet<String>> {
        let failed = |e| Error::io(e, "cannot read the folder").at_path(dir);
        let list = folder::absent_is_none(folder::entries(dir)).map_err(failed)?;
        let names = list.unwrap_or_default().into_iter().filter_map(|e| e.name.into_string().ok());
        let tail = |name: String| {
            let whole = name.strip_suffix(".partial").unwrap_or(&name);
            names::parse_image(whole).map_or(name.clone(), |(_, _, d)| d.to_string())
        };
        Ok(names.map(tail).collect())
    }

    /// Reads the manifests that tell whose the folder is.
    fn read_newest(&mut self) {
        self.entries.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
        let (mut newest, mut tip) = (false, false);
        for e in self.entries.iter_mut().rev() {
            let may_be_tip = !tip && matches!(e.level, Level::Full | Level::Inc);
            if newest && !may_be_tip {
                continue;
            }
            if e.manifest.is_none() {
                e.manifest = manifest::read(&self.dir, OsStr::new(&e.name)).ok().flatten();
                let state_time = e.manifest.as_ref().and_then(|m| m.state_time(Some(e.time)));
                e.time = state_time.unwrap_or(e.time);
            }
            tip |= may_be_tip;
            newest |= e.manifest.is_some();
            if newest && tip {
                return;
            }
        }
    }

    /// What a name in the folder is. `side` is the folder of manifests, held while many are read.
    fn look(&self, side: Option<&Folder>, name: &str, disk: Option<&str>) -> Option<Found> {
        let whole = name.strip_suffix(".partial").unwrap_or(name);
        let Some((level, time, of)) = names::parse_image(whole) else {
            return self.look_plain(side, name, disk).map(|e| Found::Entry(Box::new(e)));
        };
        if disk.is_some_and(|d| d != of) {
            return None;
        }
        let name = name.to_string();
        if whole.len() != name.len() {
            return Some(Found::Partial(name));
        }
        let (manifest, broken) = match self.manifest(side, &name) {
            Ok(m) => (m, None),
            Err(e) => (None, Some(e.report())),
        };
        let state_time = manifest.as_ref().and_then(|m| m.state_time(Some(time)));
        let time = state_time.unwrap_or(time);
        Some(Found::Entry(Box::new(Entry { name, level, time, manifest, broken })))
    }

    /// Images without a timestamp (`--no-timestamp`) count if a manifest says what they are. One
    /// whose manifest is damaged is taken for a FULL of the time of its file.
    fn look_plain(&self, side: Option<&Folder>, name: &str, disk: Option<&str>) -> Option<Entry> {
        if disk.is_some_and(|d| d != name) {
            return None;
        }
        let (manifest, name) = (self.manifest(side, name), name.to_string());
        match manifest {
            Ok(None) => None,
            Ok(Some(m)) => {
                let (level, time) = (m.level, m.state_time(Some(m.time)).unwrap_or(m.time));
                Some(Entry { name, level, time, manifest: Some(m), broken: None })
            }
            Err(e) => {
                let meta = folder::look(&self.dir.join(&name));
                let time = meta.map_or(0, |m| m.mtime());
                let broken = Some(e.report());
                Some(Entry { name, level: Level::Full, time, manifest: None, broken })
            }
        }
    }

    /// The manifest of an image. Where nobody holds the folder of manifests, it is opened: that may fail,
    /// and then says why.
    fn manifest(&self, side: Option<&Folder>, image: &str) -> Result<Option<Manifest>> {
        let image = OsStr::new(image);
        match side {
            Some(side) => Ok(manifest::read_beside(side, &self.dir, image)?.map(|(m, _)| m)),
            None => manifest::read(&self.dir, image),
        }
    }

    /// The latest time in any name, so that the next one can be later.
    pub(crate) fn last_time(&self) -> i64 {
        let partials = self.partials.iter().filter_map(|p| names::parse_image(p)).map(|p| p.1);
        self.entries.iter().map(|e| e.time).chain(partials).max().unwrap_or(0)
    }

    /// The latest committed manifest of any level that says which disk it is of. (Those that were made
    /// afterwards, of other programs' backups, say nothing.)
    pub(crate) fn last_manifest(&self) -> Option<&Manifest> {
        let says = |m: &&Manifest| m.disk != DiskIdentity::default();
        self.entries.iter().rev().filter_map(|e| e.manifest.as_ref()).find(says)
    }

    /// The FULL that a new DIFF would depend on: the latest, there and unchanged. INCs between may be
    /// damaged or gone.
    ///
    /// # Errors
    /// In words why there is none.
    pub(crate) fn full(&self) -> Result<Vec<&Manifest>, String> {
        let Some(last) = self.entries.iter().rev().find(|e| e.level == Level::Full) else {
            return Err(FIRST.into());
        };
        let full = last.committed()?;
        self.check_files(&[full])?;
        Ok(vec![full])
    }

    /// The points that a new INC would depend on, root first; every file there and unchanged.
    ///
    /// # Errors
    /// In words why there is none: the reason for a FULL.
    pub(crate) fn chain(&self) -> Result<Vec<&Manifest>, String> {
        let mut on_chain =
            self.entries.iter().filter(|e| matches!(e.level, Level::Full | Level::Inc));
        let Some(last) = on_chain.next_back() else {
            return Err(FIRST.into());
        };
        let mut at = last.committed()?;
        let mut chain = vec![at];
        let entries: HashMap<&str, &Entry> =
            self.entries.iter().map(|e| (e.name.as_str(), e)).collect();
        while let Some(parent) = &at.parent {
            let Some(below) = entries.get(parent.as_str()) else {
                return Err(format!("{parent}, the parent of {}, is missing", at.image));
            };
            let m = below.committed()?;
            chain.push(m);
            at = m;
            if chain.len() > self.entries.len() {
                return Err(format!("the manifests above {parent} form a loop"));
            }
        }
        if at.level != Level::Full {
            return Err(format!("the chain does not begin with a FULL but with {}", at.image));
        }
        chain.reverse();
        self.check_files(&chain)?;
        Ok(chain)
    }

    /// The newest point that came after `point` and has its manifest here, but not its file.
    pub(crate) fn lost_after(&self, point: &Manifest) -> Option<String> {
        let (_, time, disk) = names::parse_image(&point.image)?;
        let time = point.state_time(Some(time)).unwrap_or(time);
        let folder = Folder::open(&self.dir).ok()?;
        let list = folder.folder(manifest::FOLDER).and_then(|side| side.entries()).ok()?;
        let names = list.into_iter().filter_map(|e| e.name.into_string().ok());
        let images = names.filter_map(|n| n.strip_suffix(".json").map(str::to_string));
        let later = images.filter_map(|n| match names::parse_image(&n)? {
            (Level::Full | Level::Inc, t, d) if t > time && d == disk => Some((t, n)),
            _ => None,
        });
        later.filter(|(_, n)| !folder.has(n)).max().map(|(_, n)| n)
    }

    /// Whether all these are there as they were, by length and fingerprint. The first that is not is told.
    fn check_files(&self, points: &[&Manifest]) -> Result<(), String> {
        let folder =
            Folder::open(&self.dir).map_err(|e| format!("{}: {e}", path_text(&self.dir)))?;
        each(points, |m| check_file(&folder, m)).into_iter().collect()
    }
}

fn check_file(folder: &Folder, m: &Manifest) -> Result<(), String> {
    let said = |e: std::io::Error| format!("{}: {e}", m.image);
    let file = folder.open_file(&m.image).map_err(said)?;
    let len = file.metadata().map_err(said)?.len();
    if len != m.file_size {
        return Err(format!(
            "{} has {len} bytes, its manifest says {}: it was replaced",
            m.image, m.file_size
        ));
    }
    match (&m.fingerprint, fingerprint_of(&file)) {
        (Some(a), Ok(b)) if *a != b => Err(format!("{} was replaced or changed", m.image)),
        (_, Err(e)) => Err(said(e)),
        _ => Ok(()),
    }
}

/// Fails with `Incomplete` and the reason that [`History::chain`] gave.
pub(crate) fn no_base(reason: &str) -> Error {
    Error::new(Kind::Incomplete, reason.to_string())
        .remedy("take a FULL, or use --level auto, which takes one where it must")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::tests::example;

    fn put(dir: &Path, image: &str, level: Level, parent: Option<&str>) {
        std::fs::write(dir.join(image), image.repeat(1000)).unwrap();
        let mut m = example(image, level, parent);
        m.file_size = image.len() as u64 * 1000;
        m.fingerprint = Some(manifest::fingerprint(&dir.join(image)).unwrap());
        manifest::write(dir, &m).unwrap();
    }

    fn three() -> tempfile::TempDir {
        let d = tempfile::tempdir().unwrap();
        put(d.path(), "FULL-1-d", Level::Full, None);
        put(d.path(), "INC-2-d", Level::Inc, Some("FULL-1-d"));
        put(d.path(), "DIFF-3-d", Level::Diff, Some("FULL-1-d"));
        put(d.path(), "INC-4-d", Level::Inc, Some("INC-2-d"));
        d
    }

    fn chain(d: &Path) -> Result<Vec<String>, String> {
        let h = History::read(d, None).unwrap();
        h.chain().map(|c| c.iter().map(|m| m.image.clone()).collect())
    }

    #[test]
    fn the_chain_goes_from_the_full_to_the_last_inc() {
        let d = three();
        assert_eq!(chain(d.path()).unwrap(), ["FULL-1-d", "INC-2-d", "INC-4-d"]);
        assert_eq!(History::read(d.path(), None).unwrap().last_time(), 4);
        assert!(chain(&d.path().join("none")).is_err());
    }

    #[test]
    fn no_time_of_a_merged_state_is_given_again() {
        let d = tempfile::tempdir().unwrap();
        // By its own clock each of these is older than what was merged into it; in one of them the
        // manifest says nothing that has a time.
        for (full, state_of, last) in [
            ("FULL-1-d", "INC-7-d", 7),
            ("d", "INC-2000000000-d", 2_000_000_000),
            ("FULL-3-d", "?", 1_700_000_000),
        ] {
            put(d.path(), full, Level::Full, None);
            let m = manifest::read(d.path(), full.as_ref()).unwrap().unwrap();
            let m = Manifest { state_of: Some(state_of.into()), ..m };
            manifest::write(d.path(), &m).unwrap();
            assert_eq!(History::read(d.path(), None).unwrap().last_time(), last, "{full}");
            std::fs::remove_file(d.path().join(full)).unwrap();
        }
        // Nor is a merged state older than the name.
        put(d.path(), "FULL-5-d", Level::Full, None);
        let m = manifest::read(d.path(), "FULL-5-d".as_ref()).unwrap().unwrap();
        manifest::write(d.path(), &Manifest { state_of: Some("INC-0-x".into()), ..m }).unwrap();
        assert_eq!(History::read(d.path(), None).unwrap().last_time(), 5);
    }

    #[test]
    fn a_point_that_is_gone_replaced_or_foreign_is_no_base() {
        let d = three();
        std::fs::write(d.path().join("INC-2-d"), "x".repeat(7000)).unwrap();
        assert!(chain(d.path()).unwrap_err().contains("replaced"));
        std::fs::remove_file(d.path().join("INC-2-d")).unwrap();
        assert!(chain(d.path()).unwrap_err().contains("INC-2-d"));

        let d = three();
        std::fs::write(d.path().join("FULL-9-d"), "theirs").unwrap();
        assert!(chain(d.path()).unwrap_err().contains("not made by fleecefs"));
    }

    #[test]
    fn a_damaged_manifest_is_a_reason_and_no_error() {
        let d = three();
        std::fs::write(d.path().join(".fleecefs/INC-2-d.json"), "{").unwrap();
        assert!(chain(d.path()).unwrap_err().contains("manifest of INC-2-d"));
        // A DIFF needs the FULL alone.
        let h = History::read(d.path(), None).unwrap();
        assert_eq!(h.full().unwrap()[0].image, "FULL-1-d");
        std::fs::write(d.path().join(".fleecefs/FULL-1-d.json"), "{").unwrap();
        let h = History::read(d.path(), None).unwrap();
        assert!(h.full().unwrap_err().contains("manifest of FULL-1-d"));
    }

    #[test]
    fn a_deleted_tip_leaves_its_predecessor_as_the_tip() {
        // Then the bitmap that the predecessor names is gone, which is what stops an INC.
        let d = three();
        let lost = || {
            let h = History::read(d.path(), None).unwrap();
            h.lost_after(h.chain().unwrap().last().unwrap())
        };
        assert_eq!(lost(), None);
        std::fs::remove_file(d.path().join("INC-4-d")).unwrap();
        assert_eq!(chain(d.path()).unwrap().len(), 2);
        assert_eq!(lost().as_deref(), Some("INC-4-d"));
    }
}
