//! The journal (jbd2): which blocks have a newer version in it, so that reading sees the file system as it is after
//! recovery. Nothing is written; no block is read before somebody wants it.
//!
//! `log` reads what is in the journal's file, `scan` finds the transactions that are complete, `replayed` puts the
//! blocks in their place.

mod log;
mod replayed;
mod scan;

use std::sync::Arc;

use super::super::findings::Findings;
use super::super::source::Source;
use super::volume::Volume;
use crate::error::{Kind, Result};
use log::Log;
use replayed::Replayed;

/// The file system's blocks as they are after recovery, and what was found odd on the way.
///
/// # Errors
/// `Unsupported` or `Corrupt` if the journal cannot be replayed; what reading the point says.
pub(super) fn replayed(base: &Volume) -> Result<(Source, Findings)> {
    let log = Log::open(base)?;
    let findings = Findings::default();
    let scanned = scan::scan(&log, base)?;
    if scanned.is_broken {
        let what = "bad checksum of a journal transaction: it and all later ones are not replayed";
        let remedy = "try an older point";
        findings.warn(&base.source, Kind::Corrupt, what, Some(remedy));
    }
    if log.has_fast_commits(scanned.next)? {
        let what = "the last changes before this point are in fast commits, which are not replayed: \
            what the guest synced in its last seconds may be missing or old";
        let remedy = "start the guest from this point, whose kernel replays them";
        findings.warn(&base.source, Kind::Unsupported, what, Some(remedy));
    }
    let device = Replayed::new(base, &log, scanned)?;
    Ok((base.source.through(Arc::new(device)), findings))
}
