//! The journal of an attachment: what was attached, and each thing that was done to the machine, written down before
//! it is done.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::place::Place;
use crate::error::{Error, Kind, Result};
use crate::folder::FileId;
use crate::journal::lines::{self, Lines};
use crate::journal::paths;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Record {
    /// It begins.
    Begin(Begin),
    /// This is about to be done.
    Step(Step),
    /// This was made.
    Volume(Volume),
    /// All is attached.
    Ready,
}

/// What is attached, by whom, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begin {
    /// The backup directory.
    #[serde(with = "paths")]
    pub backups: PathBuf,
    /// The points, as `list` names them.
    pub points: Vec<String>,
    /// Who attaches them.
    pub uid: u32,
    /// By which process.
    pub pid: u32,
    /// When, in seconds since the epoch.
    pub started: i64,
    /// Where they are mounted.
    #[serde(with = "paths::maybe")]
    pub mount: Option<PathBuf>,
}

/// Something that is done to the machine, with all that is needed to undo it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Step {
    /// A rule that keeps udev from our devices.
    UdevRule,
    /// The backups are mounted in the private folder.
    Serve,
    /// A loop device is attached to a file in there.
    Loop {
        /// Of `/dev/loopN`.
        number: u32,
        /// The file.
        file: FileId,
    },
    /// An encrypted volume is opened.
    Crypt {
        /// Its name for the device mapper.
        name: String,
    },
    /// A volume group is activated under a name of ours.
    Group {
        /// That name.
        name: String,
    },
    /// btrfs gets to know a device.
    Btrfs {
        /// The device.
        #[serde(with = "paths")]
        device: PathBuf,
    },
    /// A folder is made, and a file system mounted there.
    Mount {
        /// The folder.
        #[serde(with = "paths")]
        at: PathBuf,
        /// The device.
        #[serde(with = "paths")]
        device: PathBuf,
    },
}

/// A partition or volume that is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    /// As `files ls` calls it: `p1`, `vg-root`, `disk`; before it the disk's name where several are attached.
    pub name: String,
    /// Its device, if there is one.
    #[serde(with = "paths::maybe")]
    pub device: Option<PathBuf>,
    /// What is in it.
    pub content: String,
    /// Where it is mounted.
    #[serde(with = "paths::maybe")]
    pub mounted: Option<PathBuf>,
    /// What could not be done with it.
    pub note: Option<String>,
    /// Whether that should have been done, and went wrong.
    #[serde(default)]
    pub failed: bool,
}

/// What a journal says.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    /// Its folders.
    pub place: Place,
    /// What was attached; nothing if it was interrupted before that was written.
    pub begin: Option<Begin>,
    /// What was done, in order.
    pub steps: Vec<Step>,
    /// What was made.
    pub volumes: Vec<Volume>,
    /// Whether all was attached.
    pub ready: bool,
}

/// An open journal.
pub(super) struct Journal(Lines);

impl Journal {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn begin(place: &Place, begin: &Begin) -> Result<Self> {
        let first = [Record::Begin(begin.clone())];
        Lines::replace(place.state()?, &place.journal_name(), &first).map(Journal)
    }

    /// Writes a record; it is on disk when this returns.
    ///
    /// # Errors
    /// It cannot be written: what it announces must not be done.
    pub(super) fn write(&mut self, record: Record) -> Result<()> {
        self.0.write(&record)
    }
}

impl Attachment {
    /// Reads the journal; `None` if there is none (any more).
    ///
    /// # Errors
    /// It cannot be read; `Corrupt` if it names what is never attached.
    pub(super) fn read(place: &Place) -> Result<Option<Self>> {
        let state = place.state()?;
        let name = place.journal_name();
        let Some(records) = lines::read::<Record>(&state, name.as_ref())? else { return Ok(None) };
        let mut found = Attachment {
            place: place.clone(),
            begin: None,
            steps: Vec::new(),
            volumes: Vec::new(),
            ready: false,
        };
        for record in records {
            match record {
                Record::Begin(begin) => found.begin = Some(begin),
                Record::Step(step) => found.steps.push(step),
                Record::Volume(volume) => found.volumes.push(volume),
                Record::Ready => found.ready = true,
            }
        }
        match found.steps.iter().all(|s| s.is_sound(place)) {
            true => Ok(Some(found)),
            false => Err(Error::new(
                Kind::Corrupt,
                "the journal names something that attach never makes",
            )
            .at_path(state.join(&name))
            .remedy("check its content and remove it")),
        }
    }
}

impl Step {
    /// Whether it can be a step of ours: only such things are ever undone.
    fn is_sound(&self, place: &Place) -> bool {
        let plain = |path: &Path| path.is_absolute() && path.file_name().is_some();
        match self {
            Step::UdevRule | Step::Serve | Step::Loop { .. } => true,
            Step::Crypt { name } | Step::Group { name } => {
                let rest = name.strip_prefix(&mapper_prefix(place));
                let is = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
                rest.is_some_and(|r| !r.is_empty() && r.bytes().all(is))
            }
            Step::Btrfs { device } => plain(device),
            Step::Mount { at, device } => plain(at) && plain(device),
        }
    }
}

/// What the names of all volumes of the device mapper begin with that an attachment makes.
pub(super) fn mapper_prefix(place: &Place) -> String {
    format!("fleecefs_{}_", place.id)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn what_is_read_is_what_was_written_and_nothing_that_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let (place, _lock) = Place::new(&dir.path().canonicalize().unwrap()).unwrap();
        assert!(Attachment::read(&place).unwrap().is_none());
        let begin = Begin {
            backups: OsStr::from_bytes(b"/b\xff\n\\xff").into(),
            points: vec!["sda/x".into()],
            uid: 0,
            pid: 7,
            started: 5,
            mount: None,
        };
        let mut journal = Journal::begin(&place, &begin).unwrap();
        let crypt = |name: String| Record::Step(Step::Crypt { name });
        let own = format!("{}p2", mapper_prefix(&place));
        journal.write(Record::Step(Step::Serve)).unwrap();
        journal.write(crypt(own.clone())).unwrap();
        let found = Attachment::read(&place).unwrap().unwrap();
        assert_eq!((found.begin, found.ready), (Some(begin), false));
        assert_eq!(found.steps, [Step::Serve, Step::Crypt { name: own.clone() }]);
        for bad in ["root".into(), mapper_prefix(&place), format!("{own}/../x")] {
            let mut journal = Journal::begin(&place, &found_begin()).unwrap();
            journal.write(crypt(bad)).unwrap();
            assert_eq!(Attachment::read(&place).unwrap_err().kind(), Kind::Corrupt);
        }
        let mut journal = Journal::begin(&place, &found_begin()).unwrap();
        let (at, device) = ("view".into(), "/dev/loop0".into());
        journal.write(Record::Step(Step::Mount { at, device })).unwrap();
        assert_eq!(Attachment::read(&place).unwrap_err().kind(), Kind::Corrupt);
    }

    fn found_begin() -> Begin {
        Begin { backups: "/b".into(), points: Vec::new(), uid: 0, pid: 7, started: 5, mount: None }
    }
}
