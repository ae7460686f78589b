//! What is known of one run.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::backup::names;
use crate::backup::publish::report::{DiskReport, Report};
use crate::error::Error;
use crate::manifest::{Achieved, Manifest, OFFLINE, vm_name, vm_uuid};
use crate::text::to_text;

/// The version of the lines; others are as if they were not there.
pub(super) const VERSION: u32 = 1;
/// What [`Entry::result`] is where all is well; else it is the kind of the error.
pub(crate) const OK: &str = "ok";
/// Characters of a message, or of a name, that are kept.
const MOST_TEXT: usize = 2000;

/// One run of a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// [`VERSION`].
    pub version: u32,
    /// When it began, in seconds since the epoch.
    #[serde(with = "iso")]
    pub time: i64,
    /// How long it took.
    pub seconds: f64,
    /// The command: `backup`, `prune` and so on.
    pub command: String,
    /// The VM's name, if it is known and has one.
    #[serde(default)]
    pub vm: Option<String>,
    /// The VM's UUID, if it is known and has one.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Where its QEMU listens, if the command talks to one.
    #[serde(default)]
    pub qmp: Option<String>,
    /// The backup directory.
    #[serde(default)]
    pub directory: Option<String>,
    /// Whether other VMs' backups may be in that directory.
    #[serde(default)]
    pub shared: bool,
    /// The id of a backup run.
    #[serde(default)]
    pub run: Option<String>,
    /// Its disks, as far as something was done with them.
    #[serde(default)]
    pub disks: Vec<DiskEntry>,
    /// Disks that had no room in the line.
    #[serde(default)]
    pub disks_left_out: usize,
    /// How long the guest was stopped, in milliseconds.
    #[serde(default)]
    pub stopped_ms: Option<u64>,
    /// How long its file systems were frozen, in milliseconds.
    #[serde(default)]
    pub frozen_ms: Option<u64>,
    /// [`OK`], or the kind of the error.
    pub result: String,
    /// The exit code.
    pub exit_code: u8,
    /// What went wrong.
    #[serde(default)]
    pub message: Option<String>,
}

/// What a run did with a disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DiskEntry {
    /// The disk: as the VM calls it in a backup, else as `list` shows it.
    pub disk: String,
    /// The point that was made, or read.
    pub point: Option<String>,
    /// Its level, as in `list`.
    pub level: Option<String>,
    /// Bytes of the frozen view that QEMU's job went through, holes among them.
    pub read: Option<u64>,
    /// Bytes that were copied into the image, as they are there.
    pub copied: Option<u64>,
    /// Bytes that were to be copied, as far as was known before: those that the bitmap names.
    pub dirty: Option<u64>,
    /// As in `list`.
    pub consistency: Option<String>,
    /// Why nothing came of it.
    pub error: Option<String>,
}

impl Entry {
    /// A run that has just begun, at `time` in seconds since the epoch.
    pub(crate) fn begun(command: &str, time: i64) -> Self {
        Entry {
            version: VERSION,
            time,
            seconds: 0.0,
            command: command.to_string(),
            vm: None,
            uuid: None,
            qmp: None,
            directory: None,
            shared: false,
            run: None,
            disks: Vec::new(),
            disks_left_out: 0,
            stopped_ms: None,
            frozen_ms: None,
            result: OK.to_string(),
            exit_code: 0,
            message: None,
        }
    }

    /// It is over.
    pub(crate) fn end(&mut self, took: Duration, error: Option<&Error>) {
        self.seconds = (took.as_secs_f64() * 1000.0).round() / 1000.0;
        let Some(e) = error else { return };
        self.result = kind_word(e);
        self.exit_code = e.kind().exit_code();
        self.message = Some(short(&e.report()));
    }

    /// Whether it ended with another exit code than 0.
    pub(crate) fn has_failed(&self) -> bool {
        self.exit_code != 0
    }

    /// What went wrong, with the reason of the first disk of which that was not said: of those it was told when it
    /// happened.
    pub(crate) fn why(&self) -> Option<String> {
        let message = self.message.as_ref()?;
        let reason = self.disks.iter().filter_map(|d| d.error.as_ref()).next();
        Some(match reason.filter(|reason| !message.contains(reason.as_str())) {
            Some(reason) => format!("{message}: {reason}"),
            None => message.clone(),
        })
    }

    /// What a backup did.
    pub(crate) fn add_backup(&mut self, report: &Report) {
        self.run = Some(report.run.clone());
        self.vm = vm_name(&report.vm).map(short);
        self.uuid = vm_uuid(&report.vm).map(short);
        let c = &report.consistency;
        self.stopped_ms = Some(c.stopped_ms);
        self.frozen_ms = Some(c.frozen_ms);
        self.disks = report.disks.iter().map(of_disk).collect();
        let refused = report.plan.refused.iter();
        self.disks.extend(refused.map(|(disk, e)| DiskEntry {
            disk: short(disk),
            error: Some(short(&e.report())),
            ..DiskEntry::default()
        }));
    }

    /// A point that a command read or made, by its disk.
    pub(crate) fn add_point(&mut self, disk: &std::path::Path, point: &str, error: Option<String>) {
        self.disks.push(DiskEntry {
            disk: short(&to_text(disk.as_os_str())),
            point: Some(short(point)),
            error: error.map(|e| short(&e)),
            ..DiskEntry::default()
        });
    }
}

fn of_disk(d: &DiskReport) -> DiskEntry {
    let made = d.result.as_ref().ok();
    let point = made.and(d.path.file_name()).map(|n| short(&to_text(n)));
    DiskEntry {
        disk: short(&d.disk),
        point,
        level: Some(names::level_word(d.level).to_ascii_lowercase()),
        read: Some(d.read),
        copied: made.map(|m| m.bytes_copied),
        dirty: Some(d.dirty),
        consistency: made.map(|m| Achieved::word(Some(achieved(m))).to_string()),
        error: d.result.as_ref().err().map(|e| short(&e.report())),
    }
}

/// As `list` will show it: a manifest has no word for a VM that is shut off.
fn achieved(m: &Manifest) -> Achieved {
    match m.consistency.achieved {
        Achieved::Crash if m.consistency.reason == OFFLINE => Achieved::Offline,
        achieved => achieved,
    }
}

/// The word for the kind of an error, as JSON has it.
fn kind_word(e: &Error) -> String {
    let word = serde_json::to_value(e.kind()).ok();
    word.and_then(|w| w.as_str().map(str::to_string)).unwrap_or_else(|| "io".into())
}

fn short(text: &str) -> String {
    match text.char_indices().nth(MOST_TEXT) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text.to_string(),
    }
}

/// Times as JSON has them everywhere.
mod iso {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(time: &i64, to: S) -> Result<S::Ok, S::Error> {
        crate::units::as_time(time, to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<i64, D::Error> {
        let text = String::deserialize(from)?;
        let time: jiff::Timestamp = text.parse().map_err(serde::de::Error::custom)?;
        Ok(time.as_second())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_failure_keeps_kind_code_and_message() {
        let mut entry = Entry::begun("prune", 86_400);
        entry.end(Duration::from_millis(1234), None);
        assert!(!entry.has_failed() && entry.result == OK && entry.message.is_none());
        assert_eq!(entry.seconds, 1.234);
        let e = Error::new(Kind::NoSpace, "cannot write").at_path("/b").remedy("make room");
        entry.end(Duration::ZERO, Some(&e));
        assert!(entry.has_failed());
        assert_eq!((entry.result.as_str(), entry.exit_code), ("no-space", 7));
        assert_eq!(entry.message.unwrap(), "/b: cannot write (make room)");
    }

    #[test]
    fn why_it_failed_has_the_reason_of_a_disk_once() {
        let mut entry = Entry::begun("backup", 0);
        assert_eq!(entry.why(), None);
        entry.end(Duration::ZERO, Some(&Error::new(Kind::Io, "backup of a failed")));
        assert_eq!(entry.why().unwrap(), "backup of a failed");
        entry.add_point("b".as_ref(), "p", None);
        entry.add_point("a".as_ref(), "p", Some("it is full".into()));
        assert_eq!(entry.why().unwrap(), "backup of a failed: it is full");
        entry.end(Duration::ZERO, Some(&Error::new(Kind::Io, "a: it is full")));
        assert_eq!(entry.why().unwrap(), "a: it is full");
    }

    #[test]
    fn texts_have_a_limit_and_are_cut_between_characters() {
        let e = Error::new(Kind::Peer, "é".repeat(100_000));
        let mut entry = Entry::begun("backup", 0);
        entry.end(Duration::ZERO, Some(&e));
        assert_eq!(entry.message.unwrap().chars().count(), MOST_TEXT + 3);
    }

    #[test]
    fn times_are_read_as_they_are_written() {
        let entry = Entry::begun("verify", 1_700_000_000);
        let text = crate::text::json(&entry).unwrap();
        assert!(text.contains("\"time\":\"2023-11-14T22:13:20Z\""), "{text}");
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
        // A time that no calendar has is no entry.
        let bad = text.replace("2023-11-14T22:13:20Z", "@99999999999999999");
        assert!(serde_json::from_str::<Entry>(&bad).is_err());
    }
}
