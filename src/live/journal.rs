//! What is written down in the storage folder before it is done.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::folder::{Folder, PlainName};
use crate::journal::lines::{self, Lines};
use crate::journal::paths;

/// The journal's name, in a folder of its own.
const NAME: &str = "journal";
/// The version of the records.
const VERSION: u32 = 1;

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Record {
    /// Images will be made.
    Begin(Box<Begun>),
    /// The guest may run from now on: what is in the images is the only copy of what it writes.
    Started,
    /// No image needs the backup any more.
    Done,
}

/// What was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begun {
    /// [`VERSION`].
    pub format_version: u32,
    /// The digits in the name of the backing file that unfinished images have.
    pub id: String,
    /// The storage folder: a copy of it is no second VM.
    #[serde(with = "paths")]
    pub storage: PathBuf,
    /// The folder with QEMU's sockets and its log.
    #[serde(with = "paths")]
    pub sockets: PathBuf,
    /// Where the points are.
    pub backup: BackupDirectory,
    /// Whether the VM is another than the one that was backed up.
    pub new_identity: bool,
    /// What the user asked for that counts only at the start.
    pub asked: Vec<String>,
    /// QEMU's arguments, but for the nodes of the disks.
    pub arguments: Vec<String>,
    /// The disks.
    pub disks: Vec<NewDisk>,
    /// An empty store of UEFI's variables that was copied.
    pub vars: Option<CopiedVars>,
}

impl Begun {
    /// The names of all files in the storage folder.
    pub(super) fn files(&self) -> impl Iterator<Item = &str> {
        let vars = self.vars.iter().map(|v| v.file.as_str());
        self.disks.iter().map(|d| d.file.as_str()).chain(vars)
    }
}

/// A backup directory, and what tells that it is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BackupDirectory {
    /// Its path, without links.
    #[serde(with = "paths")]
    pub root: PathBuf,
    /// Its id, if it has one.
    pub uuid: Option<String>,
}

/// A copy of an empty store of UEFI's variables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopiedVars {
    /// Its name in the storage folder.
    pub file: String,
    /// What it is a copy of.
    #[serde(with = "paths")]
    pub template: PathBuf,
}

/// A disk that is copied to new storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NewDisk {
    /// The name of its node.
    pub node: String,
    /// Its file in the storage folder.
    pub file: String,
    /// The point that it began as.
    pub point: LivePoint,
    /// The bitmap by which the next backup can be an INC on that point.
    pub bitmap: Option<Recording>,
}

/// A point, and what tells that it is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LivePoint {
    /// Its disk, as `list` shows it.
    pub disk: String,
    /// Its name.
    pub name: String,
    /// The run that made it, if that is known.
    pub run: Option<String>,
    /// The image whose state it has, where that is another.
    pub state_of: Option<String>,
    /// Bytes of the disk.
    pub size: u64,
    /// All files that it is made of, the lowest first.
    pub files: Vec<LiveFile>,
}

/// A file of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LiveFile {
    /// Its path.
    pub path: String,
    /// Its length in bytes.
    pub length: u64,
    /// When it was last written to, in nanoseconds since the epoch.
    pub modified: i64,
    /// As a manifest has it: over its length and both its ends.
    pub fingerprint: String,
}

/// A bitmap that records what is written from the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recording {
    /// Its name, as backups of that target call it.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// The guest has never run.
    Prepared,
    /// The guest may have run.
    Started,
    /// No image needs the backup any more.
    Done,
}

/// The open journal, and what it says.
#[derive(Debug)]
pub(super) struct Journal {
    lines: Lines,
    pub(super) stage: Stage,
}

/// What the journal in `folder` says; `None` if there is none.
///
/// # Errors
/// It cannot be read, or is another user's; `Corrupt` if it names what is none of ours, `Unsupported` if a later version
/// wrote it.
pub(super) fn read(folder: &Folder) -> Result<Option<(Begun, Stage)>> {
    let Some(records) = lines::read::<Record>(folder, NAME.as_ref())? else { return Ok(None) };
    let at = |e: Error| e.at_path(folder.join(NAME));
    let mut found: Option<(Begun, Stage)> = None;
    for record in records {
        match (record, &mut found) {
            (Record::Begin(begun), _) => found = Some((*begun, Stage::Prepared)),
            (Record::Started, Some((_, stage))) => *stage = Stage::Started,
            (Record::Done, Some((_, stage))) => *stage = Stage::Done,
            (Record::Started | Record::Done, None) => {}
        }
    }
    let Some((begun, stage)) = found else {
        let e = Error::new(Kind::Corrupt, "the journal does not say what was begun");
        return Err(at(e.remedy("look at the images beside it before it is removed")));
    };
    check(&begun).map_err(at)?;
    Ok(Some((begun, stage)))
}

/// Only plain names reach the folder.
fn check(begun: &Begun) -> Result<()> {
    if begun.format_version > VERSION {
        return Err(Error::new(
            Kind::Unsupported,
            "a later version of fleecefs wrote this journal",
        ));
    }
    for name in begun.files() {
        if PlainName::new(name).is_err() {
            let what = "the journal names a file that no live restore makes";
            return Err(Error::new(Kind::Corrupt, what));
        }
    }
    Ok(())
}

impl Journal {
    /// A new one, in the place of one of a restore that never started.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn begin(folder: Folder, begun: &Begun) -> Result<Self> {
        let first = Record::Begin(Box::new(Begun { format_version: VERSION, ..begun.clone() }));
        Ok(Journal { lines: Lines::replace(folder, NAME, &[first])?, stage: Stage::Prepared })
    }

    /// The one that is there, written anew: its last line may be cut off.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn reopen(folder: Folder, begun: &Begun, stage: Stage) -> Result<Self> {
        let all = [Record::Begin(Box::new(begun.clone())), Record::Started, Record::Done];
        let count = match stage {
            Stage::Prepared => 1,
            Stage::Started => 2,
            Stage::Done => 3,
        };
        Ok(Journal { lines: Lines::replace(folder, NAME, &all[..count])?, stage })
    }

    /// The guest may run from now on.
    ///
    /// # Errors
    /// It cannot be written: the guest must not run then.
    pub(super) fn started(&mut self) -> Result<()> {
        self.lines.write(&Record::Started)?;
        self.stage = Stage::Started;
        Ok(())
    }

    /// Nothing needs the backup any more.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn done(&mut self) -> Result<()> {
        self.lines.write(&Record::Done)?;
        self.stage = Stage::Done;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(file: &str) -> Begun {
        let point = LivePoint {
            disk: "vda".into(),
            name: "FULL-1-vda".into(),
            run: None,
            state_of: None,
            size: 512,
            files: Vec::new(),
        };
        let disk = NewDisk { node: "disk0".into(), file: file.into(), point, bitmap: None };
        Begun {
            format_version: 0,
            id: "00".into(),
            storage: "/h".into(),
            sockets: "/s".into(),
            backup: BackupDirectory { root: "/b".into(), uuid: None },
            new_identity: false,
            asked: Vec::new(),
            arguments: vec!["-m".into()],
            disks: vec![disk],
            vars: None,
        }
    }

    #[test]
    fn it_says_how_far_it_came_also_after_a_line_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let folder = || Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        assert!(read(&folder()).unwrap().is_none());
        let mut j = Journal::begin(folder(), &begun("a.qcow2")).unwrap();
        let (known, stage) = read(&folder()).unwrap().unwrap();
        assert_eq!((known.format_version, stage), (VERSION, Stage::Prepared));
        j.started().unwrap();
        let path = dir.path().join(NAME);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"\"do"].concat()).unwrap();
        assert_eq!(read(&folder()).unwrap().unwrap().1, Stage::Started);
        let mut j = Journal::reopen(folder(), &known, Stage::Started).unwrap();
        j.done().unwrap();
        assert_eq!(read(&folder()).unwrap().unwrap(), (known, Stage::Done));
        // What was begun anew has not started.
        Journal::begin(folder(), &begun("a.qcow2")).unwrap();
        assert_eq!(read(&folder()).unwrap().unwrap().1, Stage::Prepared);
    }

    #[test]
    fn it_leads_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let folder = || Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        for bad in ["../a", "/a", "", "a/b", ".."] {
            Journal::begin(folder(), &begun(bad)).unwrap();
            assert_eq!(read(&folder()).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
        std::fs::write(dir.path().join(NAME), "\"started\"\n").unwrap();
        assert_eq!(read(&folder()).unwrap_err().kind(), Kind::Corrupt);
    }
}
