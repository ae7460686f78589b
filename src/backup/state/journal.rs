//! The journal of a run: what will have to be undone, written and synced before it is done.
//!
//! One file per VM in the state folder, a JSON record per line. The last line may be cut off by a
//! power cut: it is ignored, since what it announced has not been done then. A run that ends in
//! order removes its journal.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::lock::{state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{self, Access, FileId, Folder, PlainName};
use crate::qmp::Address;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Record {
    /// A run begins.
    Begin {
        /// Its id.
        run: String,
        /// The backup directory.
        target: PathBuf,
        /// The guest agent's socket, if one is used.
        agent: Option<String>,
        /// Which process QEMU was, see [`crate::qmp::peer::process`].
        #[serde(default)]
        qemu: Option<String>,
    },
    /// A disk will be touched.
    Disk(DiskRecord),
    /// QEMU's NBD server will be started by us.
    NbdStart,
    /// It has been stopped again.
    NbdStop,
    /// The guest will be stopped by us.
    Stop,
    /// It runs again.
    Continue,
    /// The guest's file systems will be frozen by us.
    Freeze,
    /// They are thawed.
    Thaw,
    /// The image of this disk is complete and QEMU has closed it.
    Closed(usize),
    /// It has become a point, or was given up.
    Settled(usize),
    /// The watchdog of this run has let the guest run again.
    Continued(String),
    /// The watchdog of this run has thawed the guest.
    Thawed(String),
    /// An earlier run's disk could not be concluded: its target is not there.
    #[serde(rename = "left")]
    DeferredDisk(DeferredDisk),
}

/// A disk of an earlier run whose target could not be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeferredDisk {
    /// What the run made.
    pub disk: DiskRecord,
    /// Whether its image was complete and closed.
    pub finished: bool,
}

/// What a run makes for one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its number in the run.
    pub index: usize,
    /// The folder in the target.
    pub dir: PathBuf,
    /// File name of the image; with `.partial` until it is published.
    pub image: String,
    /// The fleece image; empty if it has no name.
    pub fleece: PathBuf,
    /// The node that carries the bitmaps.
    pub node: String,
    /// The node that the guest is attached to.
    pub top: String,
    /// The bitmap that is added.
    pub bitmap: Option<String>,
    /// Which file the image is, once it is made. (Not in journals of version 0.1.0.)
    #[serde(default)]
    pub image_id: Option<FileId>,
    /// Which file the fleece image is, once it is made. (Not in journals of version 0.1.0.)
    #[serde(default)]
    pub fleece_id: Option<FileId>,
}

impl DiskRecord {
    /// Whether it can be a record of ours: only such names are ever removed.
    fn is_sound(&self) -> bool {
        let fleece = self.fleece.as_os_str().is_empty() || self.fleece.is_absolute();
        // Earlier versions began with names that were too long for any file to be made.
        let named = PlainName::new(&self.image)
            .map_or_else(|e| e.kind() == ErrorKind::InvalidFilename, |_| true);
        named && self.dir.is_absolute() && fleece
    }
}

/// The largest journal: a run has some records of some hundred bytes for each disk.
const LARGEST: u64 = 16 << 20;

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    folder: Folder,
    name: String,
    file: File,
}

impl Journal {
    /// Starts the journal of a run. An older one must have been dealt with; what it says of disks
    /// that are left over is kept.
    ///
    /// # Errors
    /// The state folder cannot be written.
    pub fn begin(state: &Path, vm: &Address, first: &Record) -> Result<Self> {
        let left = pending(state, vm)?.map(|p| p.left).unwrap_or_default();
        let mut records = vec![first.clone()];
        records.extend(left.into_iter().map(Record::DeferredDisk));
        Self::replace(state, vm, &records)
    }

    /// A journal of these records in the place of the one that is there; never half of it.
    fn replace(state: &Path, vm: &Address, records: &[Record]) -> Result<Self> {
        let folder = state_folder(state)?;
        let name = file_name(vm);
        let new = format!("{name}.new");
        let path = folder.join(&name);
        let failed = |e| Error::io(e, "cannot write the journal").at_path(&path);
        folder.remove_if_there(&new).map_err(failed)?;
        let file = folder.create_new(&new).and_then(appending).map_err(failed)?;
        let mut journal = Journal { folder, name, file };
        for r in records {
            journal.write(r)?;
        }
        let Journal { folder, name, .. } = &journal;
        folder.rename(&new, folder, name).and_then(|()| folder.sync()).map_err(failed)?;
        Ok(journal)
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: what it announces must not be done then.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        append(&mut self.file, record)
            .map_err(|e| Error::io(e, "cannot write the journal").at_path(self.path()))?;
        step("journal");
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// What it says is left to do; `None` if somebody removed it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn pending(&self) -> Result<Option<Pending>> {
        read_in(&self.folder, self.name.as_ref())
    }

    /// The run is over: removes the journal, but for the disks that are left over.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn end(self, state: &Path, vm: &Address) -> Result<()> {
        let left = self.pending()?.map(|p| p.left).unwrap_or_default();
        if left.is_empty() { remove(&self.folder, &self.name) } else { keep(state, vm, &left) }
    }
}

fn file_name(vm: &Address) -> String {
    format!("{}.journal", vm_key(vm))
}

/// Where the journal of a VM is.
pub fn path(state: &Path, vm: &Address) -> PathBuf {
    state.join(file_name(vm))
}

/// Whatever is written goes to the end: a watchdog may have written there.
fn appending(file: File) -> std::io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::APPEND)?;
    Ok(file)
}

fn append(file: &mut File, record: &Record) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    file.write_all(&line).and_then(|()| file.sync_data())
}

/// All is recovered but what is `left`: removes the journal, or keeps that alone in it.
///
/// # Errors
/// What the operating system said.
pub fn keep(state: &Path, vm: &Address, left: &[DeferredDisk]) -> Result<()> {
    if left.is_empty() {
        let there = state_folder_if_there(state)?;
        return there.map_or(Ok(()), |f| remove(&f, &file_name(vm)));
    }
    let records: Vec<Record> = left.iter().cloned().map(Record::DeferredDisk).collect();
    Journal::replace(state, vm, &records).map(drop)
}

/// Adds a record to a journal if it is still that of `run`: for the watchdog, whose parent is dead.
///
/// # Errors
/// What the operating system said.
pub fn note(path: &Path, run: &str, record: &Record) -> Result<()> {
    let failed = |e| Error::io(e, "cannot write the journal").at_path(path);
    let Some((folder, name)) = folder::absent_is_none(Folder::of(path)).map_err(failed)? else {
        return Ok(());
    };
    if read_in(&folder, &name)?.is_none_or(|p| p.run != run) {
        return Ok(());
    }
    let file = folder.open_with(&name, Access::Write).and_then(appending);
    let mut file = file.map_err(failed)?;
    // The parent may have died in the middle of a line.
    file.write_all(b"\n").and_then(|()| append(&mut file, record)).map_err(failed)
}

fn remove(folder: &Folder, name: &str) -> Result<()> {
    let gone = folder.remove_if_there(name).map(drop);
    gone.map_err(|e| Error::io(e, "cannot remove the journal").at_path(folder.join(name)))
}

/// What a journal says is left to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pending {
    /// The run.
    pub run: String,
    /// Its target.
    pub target: PathBuf,
    /// The agent it used.
    pub agent: Option<String>,
    /// Which process QEMU was.
    pub qemu: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskRecord>,
    /// Disks whose image was complete and closed.
    pub closed: Vec<usize>,
    /// Disks that need nothing more.
    pub settled: Vec<usize>,
    /// We started the NBD server.
    pub nbd: bool,
    /// We stopped the guest.
    pub stopped: bool,
    /// We froze the guest.
    pub frozen: bool,
    /// Disks of runs before it.
    pub left: Vec<DeferredDisk>,
}

/// Reads what an earlier run left; `None` if it ended in order.
///
/// # Errors
/// The journal cannot be read.
pub fn pending(state: &Path, vm: &Address) -> Result<Option<Pending>> {
    match state_folder_if_there(state)? {
        Some(folder) => read_in(&folder, file_name(vm).as_ref()),
        None => Ok(None),
    }
}

/// As [`pending`], of the journal at `path`.
///
/// # Errors
/// As [`pending`].
pub fn read(path: &Path) -> Result<Option<Pending>> {
    let failed = |e| Error::io(e, "cannot read the journal").at_path(path);
    match folder::absent_is_none(Folder::of(path)).map_err(failed)? {
        Some((folder, name)) => read_in(&folder, &name),
        None => Ok(None),
    }
}

fn read_in(folder: &Folder, name: &OsStr) -> Result<Option<Pending>> {
    let path = folder.join(name);
    let failed = |e| Error::io(e, "cannot read the journal").at_path(&path);
    let look = folder::absent_is_none(folder.look(name)).map_err(failed)?;
    let Some(meta) = look else { return Ok(None) };
    if ![0, rustix::process::geteuid().as_raw()].contains(&meta.uid()) {
        return Err(Error::new(Kind::Permission, "the journal belongs to another user")
            .at_path(&path)
            .remedy("check its content and remove it"));
    }
    let bytes = folder.read_if_there(name, LARGEST).map_err(failed)?;
    bytes.map(|b| parse(&b).map_err(|e| e.at_path(&path))).transpose()
}

fn parse(bytes: &[u8]) -> Result<Pending> {
    let mut p = Pending::default();
    let lines = bytes.split(|b| *b == b'\n');
    for record in lines.filter_map(|l| serde_json::from_slice::<Record>(l).ok()) {
        p.apply(record);
    }
    let mut disks = p.disks.iter().chain(p.left.iter().map(|l| &l.disk));
    match disks.all(DiskRecord::is_sound) {
        true => Ok(p),
        false => Err(Error::new(Kind::Corrupt, "the journal names something that no backup makes")
            .remedy("check its content and remove it")),
    }
}

impl Pending {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Begin { run, target, agent, qemu } => {
                *self = Pending { run, target, agent, qemu, ..Default::default() }
            }
            Record::Disk(d) => {
                // Again, with what has become known.
                self.disks.retain(|known| known.index != d.index);
                self.disks.push(d);
            }
            Record::NbdStart => self.nbd = true,
            Record::NbdStop => self.nbd = false,
            Record::Stop => self.stopped = true,
            Record::Continue => self.stopped = false,
            Record::Freeze => self.frozen = true,
            Record::Thaw => self.frozen = false,
            Record::Closed(i) => self.closed.push(i),
            Record::Settled(i) => self.settled.push(i),
            Record::Continued(run) => self.stopped &= run != self.run,
            Record::Thawed(run) => self.frozen &= run != self.run,
            Record::DeferredDisk(left) => self.left.push(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_announced_is_pending_until_it_is_taken_back() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        assert_eq!(pending(d.path(), &vm).unwrap(), None);
        let begin = Record::Begin { run: "r".into(), target: "/t".into(), agent: None, qemu: None };
        let mut j = Journal::begin(d.path(), &vm, &begin).unwrap();
        for r in [Record::Stop, Record::Freeze, Record::Continue, Record::Closed(1)] {
            j.write(&r).unwrap();
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(path(d.path(), &vm))
            .unwrap()
            .write_all(b"{\"closed\":")
            .unwrap();
        let p = pending(d.path(), &vm).unwrap().unwrap();
        assert!(!p.stopped && p.frozen && p.run == "r");
        assert_eq!(p.closed, [1]);
        // A record of the watchdog counts after a line that was cut off, but only that of the run's own.
        let file = path(d.path(), &vm);
        let before = std::fs::read(&file).unwrap();
        note(&file, "other", &Record::Thawed("other".into())).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), before, "it is another run's journal");
        note(&file, "r", &Record::Thawed("other".into())).unwrap();
        assert!(pending(d.path(), &vm).unwrap().unwrap().frozen);
        // Each begins a line of its own, whatever the one before ended in.
        std::fs::write(&file, &before).unwrap();
        note(&file, "r", &Record::Thawed("r".into())).unwrap();
        assert!(!pending(d.path(), &vm).unwrap().unwrap().frozen);
        j.end(d.path(), &vm).unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap(), None);
        note(&file, "r", &Record::Thawed("r".into())).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn what_is_left_of_earlier_runs_outlives_the_next() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        let disk = DiskRecord {
            index: 0,
            dir: "/gone/d".into(),
            image: "INC-1-d".into(),
            fleece: PathBuf::new(),
            node: "n".into(),
            top: "n".into(),
            bitmap: None,
            image_id: None,
            fleece_id: None,
        };
        let left = vec![DeferredDisk { disk, finished: true }];
        keep(d.path(), &vm, &left).unwrap();
        let text = std::fs::read_to_string(path(d.path(), &vm)).unwrap();
        assert!(text.starts_with("{\"left\":{\"disk\":"), "{text}");
        let begin = Record::Begin { run: "s".into(), target: "/t".into(), agent: None, qemu: None };
        let j = Journal::begin(d.path(), &vm, &begin).unwrap();
        let p = pending(d.path(), &vm).unwrap().unwrap();
        assert_eq!((p.run.as_str(), &p.left), ("s", &left));
        j.end(d.path(), &vm).unwrap();
        let p = pending(d.path(), &vm).unwrap().unwrap();
        assert_eq!((p.run.as_str(), p.left), ("", left));
        keep(d.path(), &vm, &[]).unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap(), None);
    }

    #[test]
    fn what_was_made_is_known_by_its_number_and_journals_of_old_have_none() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        let begin = Record::Begin { run: "s".into(), target: "/t".into(), agent: None, qemu: None };
        let mut j = Journal::begin(d.path(), &vm, &begin).unwrap();
        let old = r#"{"index":0,"dir":"/t/d","image":"INC-1-d","fleece":"/f","node":"n","top":"n","bitmap":null}"#;
        let mut disk: DiskRecord = serde_json::from_str(old).unwrap();
        assert_eq!((disk.image_id, disk.fleece_id), (None, None));
        j.write(&Record::Disk(disk.clone())).unwrap();
        disk.image_id = Some(FileId { dev: 1, ino: 2 });
        j.write(&Record::Disk(disk.clone())).unwrap();
        assert_eq!(j.pending().unwrap().unwrap().disks, [disk]);
    }

    #[test]
    fn a_journal_of_names_that_are_none_is_not_followed() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        state_folder(d.path()).unwrap();
        let write = |text: &str| std::fs::write(path(d.path(), &vm), text).unwrap();
        let disk = |dir: &str, image: &str, fleece: &str| {
            format!(
                r#"{{"disk":{{"index":0,"dir":"{dir}","image":"{image}","fleece":"{fleece}","node":"n","top":"n","bitmap":null}}}}"#
            )
        };
        write(&disk("/t/d", "INC-1-d", ""));
        assert_eq!(pending(d.path(), &vm).unwrap().unwrap().disks.len(), 1);
        for bad in
            [disk("/t", "../x", ""), disk("t", "x", ""), disk("/t", "x", "f"), disk("/t", "", "")]
        {
            write(&bad);
            assert_eq!(pending(d.path(), &vm).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
        std::fs::remove_file(path(d.path(), &vm)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path(d.path(), &vm)).unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn half_a_journal_of_a_killed_run_is_in_nobodys_way() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        let half = state_folder(d.path()).unwrap().join(format!("{}.new", file_name(&vm)));
        std::fs::write(&half, "{\"begin").unwrap();
        let begin = Record::Begin { run: "r".into(), target: "/t".into(), agent: None, qemu: None };
        let j = Journal::begin(d.path(), &vm, &begin).unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap().unwrap().run, "r");
        assert!(!half.exists());
        j.end(d.path(), &vm).unwrap();
    }

    #[test]
    fn a_journal_of_another_user_is_not_followed() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        let begin = Record::Begin { run: "r".into(), target: "/t".into(), agent: None, qemu: None };
        Journal::begin(d.path(), &vm, &begin).unwrap();
        if !rustix::process::geteuid().is_root() {
            println!("skipped: a_journal_of_another_user_is_not_followed (needs root)");
            return;
        }
        std::os::unix::fs::chown(path(d.path(), &vm), Some(65534), None).unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap_err().kind(), Kind::Permission);
    }
}
