//! The journal of a run: what will have to be undone, written and synced before it is done.
//!
//! One file per VM in the state folder, see [`crate::journal::lines`]. A run that ends in order removes its journal.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lock::{state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, FileId, Folder, PlainName};
use crate::journal::lines::{self, Lines};
use crate::journal::paths;
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
        #[serde(with = "paths")]
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
    /// A command will be run in the guest by us, and this one has to be run after it.
    GuestCommand(AfterCommand),
    /// That one has been run.
    GuestCommandDone,
    /// The image of this disk is complete and QEMU has closed it.
    Closed(usize),
    /// It has become a point, or was given up.
    Settled(usize),
    /// The watchdog of this run has let the guest run again.
    Continued(String),
    /// The watchdog of this run has thawed the guest.
    Thawed(String),
    /// The watchdog of this run has run the command in the guest that was to be run after it.
    GuestCommandRun(String),
    /// An earlier run's disk could not be concluded: its target is not there.
    #[serde(rename = "left")]
    DeferredDisk(DeferredDisk),
}

/// A command to run in the guest once it is thawed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AfterCommand {
    /// For the guest's shell.
    pub command: String,
    /// How long it may take, in seconds.
    pub timeout: u64,
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
    #[serde(with = "paths")]
    pub dir: PathBuf,
    /// File name of the image; with `.partial` until it is published.
    pub image: String,
    /// The fleece image; empty if it has no name.
    #[serde(with = "paths")]
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

/// An open journal.
#[derive(Debug)]
pub struct Journal(Lines);

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
        Lines::replace(state_folder(state)?, &file_name(vm), records).map(Journal)
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: what it announces must not be done then.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        self.0.write(record)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.0.path()
    }

    /// What it says is left to do; `None` if somebody removed it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn pending(&self) -> Result<Option<Pending>> {
        self.0.read()?.map(|records| parse(records).map_err(|e| e.at_path(self.path()))).transpose()
    }

    /// The run is over: removes the journal, but for the disks that are left over.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn end(self, state: &Path, vm: &Address) -> Result<()> {
        let left = self.pending()?.map(|p| p.left).unwrap_or_default();
        if left.is_empty() { self.0.remove() } else { keep(state, vm, &left) }
    }
}

/// Ends the name of a journal; before it is the VM's key.
const ENDING: &str = ".journal";

fn file_name(vm: &Address) -> String {
    format!("{}{ENDING}", vm_key(vm))
}

/// Where the journal of a VM is.
pub fn path(state: &Path, vm: &Address) -> PathBuf {
    state.join(file_name(vm))
}

/// All is recovered but what is `left`: removes the journal, or keeps that alone in it.
///
/// # Errors
/// What the operating system said.
pub fn keep(state: &Path, vm: &Address, left: &[DeferredDisk]) -> Result<()> {
    if left.is_empty() {
        let there = state_folder_if_there(state)?;
        return there.map_or(Ok(()), |f| lines::remove(&f, &file_name(vm)));
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
    lines::add(&folder, &name, record)
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
    /// What is still to be run in the guest.
    pub after: Option<AfterCommand>,
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

/// What killed runs left, of all VMs. A run that is at work has left nothing.
///
/// # Errors
/// The folder or a journal cannot be read.
pub(crate) fn interrupted(state: &Path) -> Result<Vec<Pending>> {
    let Some(folder) = state_folder_if_there(state)? else { return Ok(Vec::new()) };
    let failed = |e| Error::io(e, "cannot list the journals").at_path(folder.path());
    let mut found = Vec::new();
    for entry in folder.entries().map_err(failed)? {
        let vm = entry.name.to_str().and_then(|name| name.strip_suffix(ENDING));
        if vm.is_none_or(|vm| is_at_work(&folder, vm)) {
            continue;
        }
        found.extend(read_in(&folder, &entry.name)?);
    }
    Ok(found)
}

/// Whether a run of the VM holds its lock.
fn is_at_work(folder: &Folder, vm: &str) -> bool {
    let lock = format!("{vm}.lock");
    folder.has(&lock) && matches!(folder.lock(&lock), Ok(None))
}

fn read_in(folder: &Folder, name: &OsStr) -> Result<Option<Pending>> {
    let records = lines::read(folder, name)?;
    records.map(|r| parse(r).map_err(|e| e.at_path(folder.join(name)))).transpose()
}

fn parse(records: Vec<Record>) -> Result<Pending> {
    let mut p = Pending::default();
    records.into_iter().for_each(|r| p.apply(r));
    let mut disks = p.disks.iter().chain(p.left.iter().map(|l| &l.disk));
    match disks.all(DiskRecord::is_sound) {
        true => Ok(p),
        false => Err(Error::new(Kind::Corrupt, "the journal names something that no backup makes")
            .remedy("check its content and remove it")),
    }
}

impl Pending {
    /// What may still have to be undone in the guest, in words; `None` if nothing.
    pub fn in_guest(&self) -> Option<&'static str> {
        match (self.stopped, self.frozen, &self.after) {
            (true, ..) => Some("the guest may still be stopped"),
            (_, true, _) => Some("the guest may still be frozen"),
            (_, _, Some(_)) => {
                Some("the command of --guest-after may still have to be run in the guest")
            }
            (false, false, None) => None,
        }
    }

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
            Record::GuestCommand(after) => self.after = Some(after),
            Record::GuestCommandDone => self.after = None,
            Record::Closed(i) => self.closed.push(i),
            Record::Settled(i) => self.settled.push(i),
            Record::Continued(run) => self.stopped &= run != self.run,
            Record::Thawed(run) => self.frozen &= run != self.run,
            Record::GuestCommandRun(run) if run == self.run => self.after = None,
            Record::GuestCommandRun(_) => {}
            Record::DeferredDisk(left) => self.left.push(left),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
