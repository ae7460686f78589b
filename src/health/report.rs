//! What `health` tells, as JSON has it.

use std::path::PathBuf;

use serde::Serialize;

use crate::chain::gone::{Gone, GoneWhat};
use crate::history::Entry;
use crate::layout::Level;
use crate::text::as_text;
use crate::units::as_time;
use crate::verify::last_verified::{LastBoot, LastVerified};

/// How something stands. The order is from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// All is well.
    Ok,
    /// Somebody should look.
    Warning,
    /// There is no good backup, or soon will be none.
    Error,
}

/// What is not well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Trouble {
    /// How bad it is.
    pub status: Status,
    /// A word for scripts, see `contrib/doc/json.md`.
    pub kind: &'static str,
    /// For people.
    pub text: String,
}

/// A backup directory.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DirectoryHealth {
    /// Its path without links.
    #[serde(serialize_with = "as_text")]
    pub directory: PathBuf,
    /// The worst of all that is in it.
    pub status: Status,
    /// Bytes that are free on its file system, for this user; `None` if nobody knows.
    pub free_bytes: Option<u64>,
    /// Bytes that its file system has.
    pub size_bytes: Option<u64>,
    /// Its disks.
    pub disks: Vec<DiskHealth>,
    /// What concerns no one disk.
    pub trouble: Vec<Trouble>,
    /// The last run of each command on it.
    pub last_runs: Vec<Entry>,
    /// Runs on it that failed, by command and kind of error, of all that the history has.
    pub failed_runs: Vec<FailedRuns>,
}

/// How many runs failed in one way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct FailedRuns {
    /// The command.
    pub command: String,
    /// The kind of the error.
    pub result: String,
    /// How many.
    pub count: u64,
}

/// A disk.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DiskHealth {
    /// Its path, as commands take it.
    #[serde(serialize_with = "as_text")]
    pub disk: PathBuf,
    /// The name, else the UUID, of the VM that its newest point is of.
    pub vm: Option<String>,
    /// The worst of its trouble.
    pub status: Status,
    /// Since when the disk, or its VM, is gone, if it is. A disk that is gone gets no new points: they are not too old.
    pub gone: Option<Gone>,
    /// The newest point that can be restored.
    pub newest: Option<Newest>,
    /// How many points it has.
    pub points: usize,
    /// Points that the newest one is made of, itself among them.
    pub chain_points: usize,
    /// Bytes that the files of its points take.
    pub stored_bytes: u64,
    /// When `verify` last read a point of it that is still what it was.
    pub verified: Option<LastVerified>,
    /// When a test VM was last booted from a point of it.
    pub booted: Option<LastBoot>,
    /// What is not well.
    pub trouble: Vec<Trouble>,
}

/// The newest point of a disk that can be restored.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Newest {
    /// Its name.
    pub point: String,
    /// When it was made, in seconds since the epoch.
    #[serde(serialize_with = "as_time")]
    pub time: i64,
    /// How long ago, in seconds.
    pub age_seconds: i64,
    /// Its level.
    pub level: Level,
    /// As in `list`.
    pub consistency: &'static str,
}

/// The worst of several.
pub(crate) fn worst(all: impl Iterator<Item = Status>) -> Status {
    all.max().unwrap_or(Status::Ok)
}

impl Status {
    /// As it is said to people.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Error => "ERROR",
        }
    }
}

impl DiskHealth {
    /// Whether its VM has it no more.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.is_some_and(|g| g.what == GoneWhat::Disk)
    }
}

impl DirectoryHealth {
    /// All trouble, with the disk where it is one's.
    pub(crate) fn all_trouble(&self) -> impl Iterator<Item = (Option<&DiskHealth>, &Trouble)> {
        let of_disks = self.disks.iter().flat_map(|d| d.trouble.iter().map(move |t| (Some(d), t)));
        self.trouble.iter().map(|t| (None, t)).chain(of_disks)
    }
}
