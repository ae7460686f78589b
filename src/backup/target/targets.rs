//! Which backup directories a VM was backed up to: where one of them is gone, its file system is not
//! mounted, and a backup would fill the one below.
//!
//! `vm-KEY.targets` in the state folder has a JSON list of path and id (the text of the file `uuid`),
//! oldest first. Several may share a path: disks that are changed every week. With each there are the files of
//! the disks that were backed up to it, by which a VM that is off is known, and the folders of disks that are not called as the disk's file is: to find one takes a look into every
//! folder of the target. (They are looked at all the same before anything is written to them.)

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::detect::has_backups;
use super::target_id::{TargetId, stored_id};
use crate::backup::state::lock::{state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, Folder};
use crate::journal::paths;
use crate::qmp::Address;
use crate::text::{path_text, to_text};
use crate::{folder, manifest};

/// A path and an id take a few hundred bytes.
const LARGEST: u64 = 1 << 20;
/// More than that are not remembered: the oldest go. Some name a new directory each day.
const MOST: usize = 1000;
/// More folders than that are not remembered either: a disk's file may have another name each day.
const MOST_FOLDERS: usize = 256;

/// What the folders of disks are called whose names do not tell: by the disk's file.
pub(crate) type Folders = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownTarget {
    #[serde(with = "paths")]
    path: PathBuf,
    id: String,
    /// By the disk's file.
    #[serde(default, skip_serializing_if = "Folders::is_empty")]
    folders: Folders,
    /// The files of the disks that were backed up to it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    disks: BTreeSet<String>,
}

impl KnownTarget {
    fn is(&self, path: &Path, id: &str) -> bool {
        self.path == path && self.id == id
    }
}

/// The backup directories of a VM, and those of others.
#[derive(Debug)]
pub(crate) struct Targets {
    state: PathBuf,
    name: String,
    known: Vec<KnownTarget>,
    /// What other VMs know, and this one by other sockets: a path that is gone is so for all.
    others: Vec<KnownTarget>,
}

impl Targets {
    /// Those of the VM behind `vm`, as the folder `state` has them, and those of all others there and in
    /// the folders `more`, as far as they can be read.
    ///
    /// # Errors
    /// A list cannot be read, or is none.
    pub(crate) fn read(state: &Path, vm: &Address, more: &[PathBuf]) -> Result<Self> {
        let name = format!("{}{SUFFIX}", vm_key(vm));
        let (mut known, mut others) = (Vec::new(), Vec::new());
        if let Some(folder) = state_folder_if_there(state)? {
            known = read_list(&folder, OsStr::new(&name))?;
            for entry in lists(&folder)?.into_iter().filter(|n| *n != *name) {
                others.extend(read_list(&folder, &entry)?);
            }
        }
        // Those belong to others.
        for folder in more.iter().filter_map(|f| Folder::open(f).ok()) {
            let lists = lists(&folder).unwrap_or_default();
            others.extend(lists.iter().flat_map(|n| read_list(&folder, n).unwrap_or_default()));
        }
        Ok(Targets { state: state.to_path_buf(), name, known, others })
    }

    /// Whether `target` can be used: one that was used before has to be there still, and what a new
    /// one is to be made in.
    ///
    /// # Errors
    /// `NotFound` if not.
    pub(crate) fn check(&self, target: &Path) -> Result<()> {
        let known = self.known.iter().chain(&self.others).filter(|k| k.path == target);
        let mut gone = None;
        for one in known {
            if !is_there(target, one)? {
                gone = Some(one);
            }
        }
        match gone {
            Some(known) => {
                let what = match known.id.as_str() {
                    "" => "the backup directory that was here is gone: it is empty".to_string(),
                    id => format!(
                        "the backup directory that was here is gone: there is no file 'uuid' with \
                         its id {id}"
                    ),
                };
                Err(Error::new(Kind::NotFound, what).at_path(target).remedy(
                    "is its file system mounted? To begin a new backup directory here: --init",
                ))
            }
            // Where only copies were made, nothing else says that it is one.
            None if self.is_remembered(target) => Ok(()),
            None => check_new(target),
        }
    }

    fn is_remembered(&self, path: &Path) -> bool {
        self.known.iter().chain(&self.others).any(|k| k.path == path)
    }

    /// Whether this very backup directory was used for this VM.
    pub(crate) fn knows(&self, target: &Path) -> bool {
        let id = stored_id(target).ok().flatten();
        id.is_some_and(|id| self.known.iter().any(|k| k.is(target, &id)))
    }

    /// Where this VM, or one that has a disk of which `is_own` says so by its file, was backed up to until now, if
    /// `target` is no backup directory yet: its path may be mistyped, or its file system not mounted.
    pub(crate) fn used_before(
        &self,
        target: &Path,
        is_own: impl Fn(&str) -> bool,
    ) -> Option<&Path> {
        if self.is_remembered(target) || has_backups(target) {
            return None;
        }
        // Copies are made to many places.
        let is_chain = |k: &&KnownTarget| !k.id.is_empty();
        let same_disk = |k: &&KnownTarget| k.disks.iter().any(|file| is_own(file));
        let known = self.known.iter().rev().find(is_chain);
        let known = known.or_else(|| self.others.iter().rev().filter(is_chain).find(same_disk));
        known.map(|k| k.path.as_path())
    }

    /// All that are known to the state folder and have an id, and what they have by now: `None` where the id
    /// is not there (any more, or its file system is not mounted).
    pub(crate) fn with_ids(&self) -> Vec<(PathBuf, String, Option<TargetId>)> {
        let mut all = BTreeMap::new();
        for k in self.known.iter().chain(&self.others).filter(|k| !k.id.is_empty()) {
            let is_it = |id: &String| *id == k.id;
            let now = stored_id(&k.path).ok().flatten().filter(is_it);
            let now = now.and_then(|_| TargetId::stored(&k.path).ok());
            all.insert((k.path.clone(), k.id.clone()), now);
        }
        all.into_iter().map(|((path, id), now)| (path, id, now)).collect()
    }

    /// The backup directories of this VM.
    pub(crate) fn paths(&self) -> BTreeSet<PathBuf> {
        self.known.iter().map(|k| k.path.clone()).collect()
    }

    /// What the folders of renamed disks were called in it.
    pub(crate) fn folders(&self, target: &Path) -> Folders {
        let id = stored_id(target).ok().flatten().unwrap_or_default();
        let known = self.known.iter().find(|k| k.is(target, &id));
        known.map(|k| k.folders.clone()).unwrap_or_default()
    }

    /// Remembers `target`, whose id has been written, these folders in it, and the files of its `disks`.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn remember(
        &mut self,
        target: &Path,
        folders: Folders,
        disks: BTreeSet<String>,
    ) -> Result<()> {
        // A mere copy leaves no id.
        let id = stored_id(target)?.unwrap_or_default();
        if let Some(known) = self.known.iter_mut().find(|k| k.is(target, &id)) {
            let same_folders =
                folders.iter().all(|(file, name)| known.folders.get(file) == Some(name));
            if same_folders && disks.is_subset(&known.disks) {
                return Ok(());
            }
            if known.folders.len() >= MOST_FOLDERS {
                known.folders.clear();
            }
            if known.disks.len() >= MOST_FOLDERS {
                known.disks.clear();
            }
            known.folders.extend(folders);
            known.disks.extend(disks);
            return self.write();
        }
        self.known.push(KnownTarget { path: target.to_path_buf(), id, folders, disks });
        let too_many = self.known.len().saturating_sub(MOST);
        self.known.drain(..too_many);
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let folder = state_folder(&self.state)?;
        let failed = |e| Error::io(e, "cannot write the file").at_path(folder.join(&self.name));
        let mut text = serde_json::to_vec(&self.known).map_err(|e| failed(e.into()))?;
        if text.len() as u64 > LARGEST {
            // They can be found again.
            for known in &mut self.known {
                known.folders.clear();
                known.disks.clear();
            }
            text = serde_json::to_vec(&self.known).map_err(|e| failed(e.into()))?;
        }
        folder.write_whole(OsStr::new(&self.name), &text).map_err(failed)
    }
}

/// The end of the names of such lists.
const SUFFIX: &str = ".targets";

/// The names of the lists in a folder.
fn lists(folder: &Folder) -> Result<Vec<OsString>> {
    let failed = |e| Error::io(e, "cannot read the folder").at_path(folder.path());
    let entries = folder.entries().map_err(failed)?.into_iter();
    let is_list = |n: &OsStr| n.to_str().is_some_and(|n| n.ends_with(SUFFIX));
    Ok(entries.map(|e| e.name).filter(|n| is_list(n)).collect())
}

fn read_list(folder: &Folder, name: &OsStr) -> Result<Vec<KnownTarget>> {
    let path = folder.join(name);
    let failed = |e| Error::io(e, "cannot read the list of a VM's targets").at_path(&path);
    let Some(bytes) = folder.read_if_there(name, LARGEST).map_err(failed)? else {
        return Ok(Vec::new());
    };
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(Kind::Corrupt, "not a list of backup directories")
            .with_source(e)
            .at_path(&path)
            .remedy(
                "remove it: it is made again, but once a target that is not mounted is not noticed",
            )
    })
}

/// Whether what is at `target` can be what was there: it has an id, or, where only copies were made,
/// anything.
fn is_there(target: &Path, known: &KnownTarget) -> Result<bool> {
    if stored_id(target)?.is_some() {
        return Ok(true);
    }
    let found = folder::absent_is_none(folder::entries(target));
    let found = found.map_err(|e| Error::io(e, "cannot read the folder").at_path(target))?;
    let mut names = found.unwrap_or_default().into_iter().map(|e| e.name);
    Ok(known.id.is_empty() && names.any(|n| n != "lost+found" && n != manifest::FOLDER))
}

/// What may be in a folder that is to be a backup directory: file systems, snapshots and storage devices
/// put something into each, mostly with such a first letter.
fn is_harmless(name: &str) -> bool {
    let marks = ['.', '@', '#', '$'];
    name.starts_with(marks) || ["lost+found", "System Volume Information"].contains(&name)
}

/// A folder of the user's other files is not made a backup directory without a word.
fn check_contents(target: &Path) -> Result<()> {
    // What is no folder, or cannot be read, is no target either: that is said when it is made one.
    let Ok(found) = folder::entries(target) else { return Ok(()) };
    let mut others = Vec::new();
    for entry in found {
        let name = to_text(&entry.name);
        if is_harmless(&name) {
            continue;
        }
        let below = target.join(&entry.name);
        match entry.kind {
            EntryKind::Folder if folder::entries(&below).is_ok_and(|e| e.is_empty()) => {}
            _ => others.push(name),
        }
    }
    others.sort_unstable();
    let Some(first) = others.first().filter(|_| !has_backups(target)) else { return Ok(()) };
    let more = match others.len() {
        1 => String::new(),
        n => format!(" and {} more", n.saturating_sub(1)),
    };
    let what = format!(
        "this folder is not a backup directory yet, and has other files: {}{more}",
        path_text(first)
    );
    Err(Error::new(Kind::Exists, what)
        .at_path(target)
        .remedy("name another or an empty folder. To begin a backup directory here: --init"))
}

/// Fails unless `target` is a backup directory, or a folder that can be made one without a word.
///
/// # Errors
/// `Exists` if other files are in it, `NotFound` if there is no folder for it.
pub(crate) fn check_new(target: &Path) -> Result<()> {
    check_contents(target).and_then(|()| check_parent(target))
}

/// A new backup directory is made, but not what it is to be in: that would rather be a file system
/// that is not mounted, or a typing error.
fn check_parent(target: &Path) -> Result<()> {
    let parent = target.parent().unwrap_or(target);
    if folder::exists(target) || folder::exists(parent) {
        return Ok(());
    }
    Err(Error::new(Kind::NotFound, "the folder for the backup directory does not exist")
        .at_path(parent)
        .remedy("check the path and that its file system is mounted; else make it first"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> Address {
        Address::Unix("/run/vm".into())
    }

    fn none() -> Folders {
        Folders::new()
    }

    fn no_disks() -> BTreeSet<String> {
        BTreeSet::new()
    }

    #[test]
    fn folders_are_remembered_within_bounds() {
        let d = tempfile::tempdir().unwrap();
        std::fs::write(d.path().join("uuid"), "01234567").unwrap();
        let read = || Targets::read(d.path(), &vm(), &[]).unwrap();
        let one = |n: usize, len: usize| Folders::from([(format!("/f{n}"), "x".repeat(len))]);
        let files = |n: usize| BTreeSet::from([format!("/f{n}")]);
        for n in 0..2 * MOST_FOLDERS {
            read().remember(d.path(), one(n, 3), files(n)).unwrap();
        }
        let known = read().folders(d.path());
        assert!(known.len() <= MOST_FOLDERS && known.contains_key("/f511"), "{}", known.len());
        let disks = read().known.remove(0).disks;
        assert!(disks.len() <= MOST_FOLDERS && disks.contains("/f511"), "{}", disks.len());
        read().remember(d.path(), none(), no_disks()).unwrap();
        assert_eq!(read().folders(d.path()), known);
        // Another disk in the same place.
        std::fs::write(d.path().join("uuid"), "11234567").unwrap();
        assert_eq!(read().folders(d.path()), none());
        read().remember(d.path(), one(1, LARGEST as usize), no_disks()).unwrap();
        assert!(read().folders(d.path()).is_empty() && read().knows(d.path()));
    }

    #[test]
    fn a_target_that_was_there_has_to_be_there() {
        let d = tempfile::tempdir().unwrap();
        let (state, disk) = (d.path().join("state"), d.path().join("disk"));
        let target = disk.join("target");
        let kind =
            |t: &Path| Targets::read(&state, &vm(), &[]).unwrap().check(t).map_err(|e| e.kind());
        assert_eq!(kind(&target), Err(Kind::NotFound), "no parent");
        std::fs::create_dir_all(&target).unwrap();
        assert_eq!((kind(&target), kind(&disk.join("new"))), (Ok(()), Ok(())));
        std::fs::write(target.join("uuid"), "01234567-89ab-4cde-8f01-23456789abcd").unwrap();
        Targets::read(&state, &vm(), &[]).unwrap().remember(&target, none(), no_disks()).unwrap();
        assert_eq!(kind(&target), Ok(()));
        // Another disk, of which we know nothing, has an id: it is a backup directory.
        std::fs::write(target.join("uuid"), "11234567-89ab-4cde-8f01-23456789abcd").unwrap();
        assert_eq!(kind(&target), Ok(()));
        std::fs::remove_file(target.join("uuid")).unwrap();
        assert_eq!(kind(&target), Err(Kind::NotFound));
        std::fs::remove_dir(&target).unwrap();
        assert_eq!(kind(&target), Err(Kind::NotFound));
        // It is gone for all.
        let other = Address::Unix("/run/other".into());
        let other = Targets::read(&state, &other, &[]).unwrap();
        assert!(other.check(&target).is_err() && !other.knows(&target));
        let more = [state.clone()];
        let other = Targets::read(&d.path().join("none"), &vm(), &more).unwrap();
        assert!(other.check(&target).is_err());
    }

    #[test]
    fn a_first_backup_elsewhere_is_known_by_the_vm_and_by_its_disks() {
        let d = tempfile::tempdir().unwrap();
        let (state, target) = (d.path().join("state"), d.path().join("tgt"));
        let (typo, other) = (d.path().join("tgtt"), Address::Unix("/run/other".into()));
        let before = |vm: &Address, target: &Path, disk: &str| {
            let targets = Targets::read(&state, vm, &[]).unwrap();
            targets.used_before(target, |file| file == disk).map(Path::to_path_buf)
        };
        let disks = || BTreeSet::from(["/vm/a".to_string()]);
        let remember = |target: &Path| {
            let mut targets = Targets::read(&state, &vm(), &[]).unwrap();
            targets.remember(target, none(), disks()).unwrap();
        };
        // Only copies were made there.
        std::fs::create_dir(&target).unwrap();
        remember(&target);
        assert_eq!(before(&vm(), &typo, "/vm/a"), None);
        std::fs::write(target.join("uuid"), "01234567-89ab-4cde-8f01-23456789abcd").unwrap();
        remember(&target);
        assert_eq!(before(&vm(), &target, ""), None);
        assert_eq!(before(&vm(), &typo, ""), Some(target.clone()));
        assert_eq!(before(&other, &typo, "/vm/a"), Some(target.clone()));
        assert_eq!(before(&other, &typo, "/vm/b"), None);
        // An empty folder is no backup directory either; one of somebody else is.
        std::fs::create_dir(&typo).unwrap();
        assert_eq!(before(&vm(), &typo, ""), Some(target));
        std::fs::write(typo.join("uuid"), "11234567-89ab-4cde-8f01-23456789abcd").unwrap();
        assert_eq!(before(&vm(), &typo, ""), None);
    }

    #[test]
    fn a_target_of_copies_is_not_empty() {
        let d = tempfile::tempdir().unwrap();
        let (state, target) = (d.path().join("state"), d.path().join("copies"));
        std::fs::create_dir_all(target.join("sda")).unwrap();
        let read = || Targets::read(&state, &vm(), &[]).unwrap();
        read().remember(&target, none(), no_disks()).unwrap();
        assert!(read().check(&target).is_ok());
        std::fs::remove_dir(target.join("sda")).unwrap();
        assert!(read().check(&target).is_err());
    }

    #[test]
    fn a_folder_of_other_files_is_no_new_target() {
        let d = tempfile::tempdir().unwrap();
        let (state, target) = (d.path().join("state"), d.path().join("T"));
        let kind =
            || Targets::read(&state, &vm(), &[]).unwrap().check(&target).map_err(|e| e.kind());
        let put = |name: &str| {
            let path = target.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        };
        let begin = || {
            let _ = std::fs::remove_dir_all(&target);
            std::fs::create_dir(&target).unwrap();
        };
        for harmless in
            ["", "lost+found/#1", ".snapshots/1/T", ".fleecefs/lock", "@eaDir/x", ".zfs/y", "new/"]
        {
            begin();
            match harmless.strip_suffix('/') {
                Some(folder) => std::fs::create_dir(target.join(folder)).unwrap(),
                None if harmless.is_empty() => {}
                None => put(harmless),
            }
            assert_eq!(kind(), Ok(()), "{harmless}");
        }
        for other in [
            "letter.odt",
            "Photos/1.jpg",
            "vm/disk.qcow2",
            ".hidden/x\u{7f}/../../y",
            // What has such a name by chance.
            "project/project/README",
            "tool/tool",
            "FULL-1-letter",
            "COPY-1700000000-sda",
            "notes/FULL-1-letter",
            "sda/FULL-1-sda/x",
            "cards/uuid",
            "uuid/x",
            "x/.fleecefs/x",
            "x.config",
        ] {
            begin();
            std::fs::create_dir(target.join(".hidden")).unwrap();
            std::fs::create_dir(target.join(".hidden/x\u{7f}")).unwrap();
            put(other);
            assert_eq!(kind(), Err(Kind::Exists), "{other}");
        }
        // What has backups is one: ours, of other VMs, qmpbackup's copies, which have no id.
        let id = "01234567-89ab-4cde-8f01-23456789abcd";
        let magic = [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 3];
        for (ours, content) in [
            ("uuid", &b"the office"[..]),
            ("2026-11/uuid", id.as_bytes()),
            ("vm2/uuid", id.as_bytes()),
            ("sda/COPY-1-sda", b"x"),
            ("node/FULL-1-sda", &magic),
            ("2026-11/sda/COPY-1-sda", b"x"),
            ("sda/FULL-1-sda.partial", b"x"),
            ("sda/.fleecefs/FULL-1-sda.partial.json", b"x"),
            (".fleecefs/FULL-1-sda.json", b"x"),
            (".fleecefs/lock", b""),
        ] {
            begin();
            put("README.txt");
            put(ours);
            std::fs::write(target.join(ours), content).unwrap();
            assert_eq!(kind(), Ok(()), "{ours}");
        }
        // A copy without a time: with a link, or with the disk's description.
        for linked in [true, false] {
            begin();
            put("README.txt");
            put("sda/sda");
            match linked {
                true => {
                    let link = target.join("sda/COPY-sda");
                    std::os::unix::fs::symlink(target.join("sda/sda"), link).unwrap();
                }
                false => put("sda.config"),
            }
            assert_eq!(kind(), Ok(()), "{linked}");
        }
        begin();
        put("README.txt");
        let said = Targets::read(&state, &vm(), &[]).unwrap().check(&target).unwrap_err().report();
        assert!(said.contains("README.txt") && said.contains("--init"), "{said}");
    }

    #[test]
    fn the_oldest_go() {
        let d = tempfile::tempdir().unwrap();
        let mut targets = Targets::read(d.path(), &vm(), &[]).unwrap();
        let known = |n: usize| KnownTarget {
            path: format!("/t{n}").into(),
            id: "i".into(),
            folders: none(),
            disks: no_disks(),
        };
        targets.known = (0..MOST).map(known).collect();
        std::fs::write(d.path().join("uuid"), "01234567").unwrap();
        targets.remember(d.path(), none(), no_disks()).unwrap();
        let read = Targets::read(d.path(), &vm(), &[]).unwrap();
        assert_eq!((read.known.len(), &read.known[0]), (MOST, &known(1)));
        std::fs::write(d.path().join(&read.name), "{}").unwrap();
        assert_eq!(Targets::read(d.path(), &vm(), &[]).unwrap_err().kind(), Kind::Corrupt);
    }
}
