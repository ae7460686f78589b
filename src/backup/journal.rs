//! The journal of a run: what will have to be undone, written and synced before it is done.
//!
//! One file per VM in the state folder, a JSON record per line. The last line may be torn by a
//! power cut: it is ignored, since what it announced has not been done then. A run that ends in
//! order removes its journal.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lock::{make_dir, vm_key};
use crate::error::{Error, Result};
use crate::qmp::Address;
use crate::qmp::steps::step;

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
    /// It is a point now, or was given up.
    Settled(usize),
    /// The guardian of this run has let the guest run again.
    Continued(String),
    /// The guardian of this run has thawed the guest.
    Thawed(String),
    /// An earlier run's disk could not be settled: its target is not there.
    Left(Left),
}

/// A disk of an earlier run whose target could not be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
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
    /// The fleece image.
    pub fleece: PathBuf,
    /// The node that carries the bitmaps.
    pub node: String,
    /// The node that the guest is attached to.
    pub top: String,
    /// The bitmap that is added.
    pub bitmap: Option<String>,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
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
        records.extend(left.into_iter().map(Record::Left));
        Self::replace(state, vm, &records)
    }

    /// A journal of these records in the place of the one that is there; never half of it.
    fn replace(state: &Path, vm: &Address, records: &[Record]) -> Result<Self> {
        make_dir(state)?;
        let path = path(state, vm);
        let new = path.with_extension("journal.new");
        let failed = |e| Error::io(e, "cannot write the journal").at_path(&path);
        remove_file(&new)?;
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(&new)
            .map_err(failed)?;
        let mut journal = Journal { path: path.clone(), file };
        for r in records {
            journal.write(r)?;
        }
        std::fs::rename(&new, &path).map_err(failed)?;
        File::open(state).and_then(|d| d.sync_all()).map_err(failed)?;
        Ok(journal)
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: what it announces must not be done then.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        append(&mut self.file, record)
            .map_err(|e| Error::io(e, "cannot write the journal").at_path(&self.path))?;
        step("journal");
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says is left to do; `None` if somebody removed it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn pending(&self) -> Result<Option<Pending>> {
        read(&self.path)
    }

    /// The run is over: removes the journal, but for the disks that are left over.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn end(self, state: &Path, vm: &Address) -> Result<()> {
        let left = self.pending()?.map(|p| p.left).unwrap_or_default();
        if left.is_empty() { remove_file(&self.path) } else { keep(state, vm, &left) }
    }
}

/// Where the journal of a VM is.
pub fn path(state: &Path, vm: &Address) -> PathBuf {
    state.join(format!("{}.journal", vm_key(vm)))
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
pub fn keep(state: &Path, vm: &Address, left: &[Left]) -> Result<()> {
    if left.is_empty() {
        return remove_file(&path(state, vm));
    }
    let records: Vec<Record> = left.iter().cloned().map(Record::Left).collect();
    Journal::replace(state, vm, &records).map(drop)
}

/// Adds a record to a journal if it is still that of `run`: for the guardian, whose parent is dead.
///
/// # Errors
/// What the operating system said.
pub fn note(path: &Path, run: &str, record: &Record) -> Result<()> {
    if read(path)?.is_none_or(|p| p.run != run) {
        return Ok(());
    }
    let failed = |e| Error::io(e, "cannot write the journal").at_path(path);
    let mut file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
        .map_err(failed)?;
    // The parent may have died in the middle of a line.
    file.write_all(b"\n").and_then(|()| append(&mut file, record)).map_err(failed)
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(Error::io(e, "cannot remove the journal").at_path(path))
        }
        _ => Ok(()),
    }
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
    pub left: Vec<Left>,
}

/// Reads what an earlier run left; `None` if it ended in order.
///
/// # Errors
/// The journal cannot be read.
pub fn pending(state: &Path, vm: &Address) -> Result<Option<Pending>> {
    read(&path(state, vm))
}

/// As [`pending`], of the journal at `path`.
///
/// # Errors
/// As [`pending`].
pub fn read(path: &Path) -> Result<Option<Pending>> {
    let bytes = match std::fs::read(path) {
        Ok(b) => b,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(e, "cannot read the journal").at_path(path)),
    };
    let mut p = Pending::default();
    let lines = bytes.split(|b| *b == b'\n');
    for record in lines.filter_map(|l| serde_json::from_slice::<Record>(l).ok()) {
        p.apply(record);
    }
    Ok(Some(p))
}

impl Pending {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Begin { run, target, agent, qemu } => {
                *self = Pending { run, target, agent, qemu, ..Default::default() }
            }
            Record::Disk(d) => self.disks.push(d),
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
            Record::Left(left) => self.left.push(left),
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
        // The guardian's word counts behind a torn line, but only that of the run's own.
        let file = path(d.path(), &vm);
        note(&file, "other", &Record::Thawed("other".into())).unwrap();
        note(&file, "r", &Record::Thawed("other".into())).unwrap();
        assert!(pending(d.path(), &vm).unwrap().unwrap().frozen);
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
        };
        let left = vec![Left { disk, finished: true }];
        keep(d.path(), &vm, &left).unwrap();
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
}
