//! The log: whether it has something that is nowhere else yet. It is not replayed.
//!
//! - `record`: records, and where the last one ends
//! - `items`: what is in them
//!
//! A guest that unmounted wrote a record that says so. One that was frozen (`--quiesce`), or had nothing to do for
//! some time, wrote all metadata to its place, and after that a few records with nothing but the superblock's counters.

mod items;
mod record;

use super::volume::Volume;
use crate::error::{Kind, Result};
use record::{Log, Record};

/// Records between tail and head that are looked at: after a freeze there are two.
const MAX_RECORDS: usize = 8;

/// What a log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing.
    Clean,
    /// Metadata that is old on disk.
    Dirty,
    /// It is on another device.
    Elsewhere,
}

/// Adds a finding if something may be in the log that is nowhere else.
pub(super) fn tell(volume: &Volume) {
    let found = state(volume).unwrap_or_else(|e| {
        ::log::debug!("the log of {}: {e}", volume.source.label());
        State::Dirty
    });
    let what = match found {
        State::Clean => return,
        State::Dirty => {
            "its log is not replayed, and has changes that are nowhere else: what the guest wrote last may be missing, \
             old or torn"
        }
        State::Elsewhere => {
            "its log is on another device: if that has changes, what the guest wrote last may be missing, old or torn"
        }
    };
    volume.findings.warn(&volume.source, Kind::Incomplete, what, Some(REMEDY));
}

const REMEDY: &str = "start the guest from this point, or mount the backups and put a writable overlay over the point: \
    a kernel that mounts it replays the log (README, \"Single files\"); backups with --quiesce have nothing in it";

fn state(volume: &Volume) -> Result<State> {
    if volume.sup.log_start == 0 {
        return Ok(State::Elsewhere);
    }
    let log = Log::new(volume)?;
    let Some(head) = log.head()? else { return Ok(State::Clean) };
    let Some(last) = log.last(head)? else { return Ok(State::Dirty) };
    let is_clean = items::is_unmount(&log, &last)? || is_idle(&log, &last, head)?;
    Ok(if is_clean { State::Clean } else { State::Dirty })
}

/// Whether all records from the tail to the head have nothing but the superblock.
fn is_idle(log: &Log<'_>, last: &Record, head: u64) -> Result<bool> {
    let mut at = last.tail;
    for _ in 0..MAX_RECORDS {
        let Some(record) = log.record(at)? else { return Ok(false) };
        if !items::is_superblock_only(log, &record)? {
            return Ok(false);
        }
        at = log.wrapped(record.end);
        if at == log.wrapped(head) {
            return Ok(true);
        }
    }
    Ok(false)
}
