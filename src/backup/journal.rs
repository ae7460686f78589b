//! The journal of a run: what will have to be undone, written and synced before it is done.
//!
//! One file per VM in the state folder, a JSON record per line. The last line may be torn by a
//! power cut: it is ignored, since what it announced has not been done then. A run that ends in
//! order removes its journal.

use std::fs::{File, OpenOptions};
use std::io::Write;
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
    /// Starts the journal of a run. An older one must have been dealt with.
    ///
    /// # Errors
    /// The state folder cannot be written.
    pub fn begin(state: &Path, vm: &Address, first: &Record) -> Result<Self> {
        make_dir(state)?;
        let path = path(state, vm);
        let failed = |e| Error::io(e, "cannot write the journal").at_path(&path);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed)?;
        file.set_len(0).map_err(failed)?;
        let mut journal = Journal { path: path.clone(), file };
        journal.write(first)?;
        File::open(state).and_then(|d| d.sync_all()).map_err(failed)?;
        Ok(journal)
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: what it announces must not be done then.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let failed =
            |e: std::io::Error| Error::io(e, "cannot write the journal").at_path(&self.path);
        let mut line = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(failed)?;
        step("journal");
        Ok(())
    }

    /// The run is over and nothing is left: removes the journal.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn end(self) -> Result<()> {
        remove_file(&self.path)
    }
}

/// Where the journal of a VM is.
pub fn path(state: &Path, vm: &Address) -> PathBuf {
    state.join(format!("{}.journal", vm_key(vm)))
}

/// Removes the journal of a VM, if there is one.
///
/// # Errors
/// What the operating system said.
pub fn remove(state: &Path, vm: &Address) -> Result<()> {
    remove_file(&path(state, vm))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
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
}

/// Reads what an earlier run left; `None` if it ended in order.
///
/// # Errors
/// The journal cannot be read.
pub fn pending(state: &Path, vm: &Address) -> Result<Option<Pending>> {
    let path = path(state, vm);
    let bytes = match std::fs::read(&path) {
        Ok(b) => b,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(e, "cannot read the journal").at_path(&path)),
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
            Record::Begin { run, target, agent } => {
                *self = Pending { run, target, agent, ..Default::default() }
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
        let begin = Record::Begin { run: "r".into(), target: "/t".into(), agent: None };
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
        j.end().unwrap();
        assert_eq!(pending(d.path(), &vm).unwrap(), None);
    }
}
