//! A journal that grows: a JSON record per line, each on disk before what it announces is done.
//!
//! The last line may be cut off by a power cut: it is ignored, since what it announced has not been done then.
//! Such journals are in the state folder: what they say decides what root undoes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::OFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{self, Access, Folder};

/// The largest journal: a run has some records of some hundred bytes for each disk.
const LARGEST: u64 = 16 << 20;

/// An open journal.
#[derive(Debug)]
pub(crate) struct Lines {
    folder: Folder,
    name: String,
    file: File,
}

impl Lines {
    /// A journal of these records in the place of the one that is there; never half of it.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(crate) fn replace<R: Serialize>(folder: Folder, name: &str, records: &[R]) -> Result<Self> {
        let new = format!("{name}.new");
        let path = folder.join(name);
        let failed = |e| Error::io(e, "cannot write the journal").at_path(&path);
        folder.remove_if_there(&new).map_err(failed)?;
        let file = folder.create_new(&new).and_then(appending).map_err(failed)?;
        let mut lines = Lines { folder, name: name.to_string(), file };
        for r in records {
            lines.write(r)?;
        }
        let Lines { folder, name, .. } = &lines;
        folder.rename(&new, folder, name).and_then(|()| folder.sync()).map_err(failed)?;
        Ok(lines)
    }

    /// Appends a record; it is on disk when this returns.
    ///
    /// # Errors
    /// `NoSpace`, `Io`: what it announces must not be done then.
    pub(crate) fn write<R: Serialize>(&mut self, record: &R) -> Result<()> {
        append(&mut self.file, record)
            .map_err(|e| Error::io(e, "cannot write the journal").at_path(self.path()))?;
        step("journal");
        Ok(())
    }

    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// What it says by now; `None` if somebody removed it.
    ///
    /// # Errors
    /// As [`read`].
    pub(crate) fn read<R: DeserializeOwned>(&self) -> Result<Option<Vec<R>>> {
        read(&self.folder, self.name.as_ref())
    }

    /// Removes it.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn remove(&self) -> Result<()> {
        remove(&self.folder, &self.name)
    }
}

/// The records of a journal, in their order; `None` if there is no journal. Lines that are no records are omitted.
///
/// # Errors
/// `Permission` if somebody else has written it; what reading it says.
pub(crate) fn read<R: DeserializeOwned>(folder: &Folder, name: &OsStr) -> Result<Option<Vec<R>>> {
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
    let records = |b: Vec<u8>| {
        let lines = b.split(|b| *b == b'\n');
        lines.filter_map(|l| serde_json::from_slice(l).ok()).collect()
    };
    Ok(bytes.map(records))
}

/// Adds a record to a journal whose writer may have died in the middle of a line.
///
/// # Errors
/// What the operating system said.
pub(crate) fn add<R: Serialize>(folder: &Folder, name: &OsStr, record: &R) -> Result<()> {
    let failed = |e| Error::io(e, "cannot write the journal").at_path(folder.join(name));
    let file = folder.open_with(name, Access::Write).and_then(appending);
    let mut file = file.map_err(failed)?;
    file.write_all(b"\n").and_then(|()| append(&mut file, record)).map_err(failed)
}

/// Removes a journal, if there is one.
///
/// # Errors
/// What the operating system said.
pub(crate) fn remove(folder: &Folder, name: &str) -> Result<()> {
    let gone = folder.remove_if_there(name).map(drop);
    gone.map_err(|e| Error::io(e, "cannot remove the journal").at_path(folder.join(name)))
}

/// Whatever is written goes to the end: somebody else may have written there.
fn appending(file: File) -> io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::APPEND)?;
    Ok(file)
}

fn append<R: Serialize>(file: &mut File, record: &R) -> io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    file.write_all(&line).and_then(|()| file.sync_data())
}
