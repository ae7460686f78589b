//! `verify --create`: manifests for points that have none, so that later changes are noticed.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::Outcome;
use super::files::FileReport;
use super::links::{Record, Records};
use crate::chain::scan::FormatOverride;
use crate::chain::{Disk, describe, describe_format};
use crate::error::{Error, Kind, Result};
use crate::journal::unfinished;
use crate::layout::Level;
use crate::lock::Locks;
use crate::manifest;
use crate::manifest::fingerprint;
use crate::text::path_text;

/// Writes manifests; nobody else writes to the directory as long as it is there.
pub(super) struct Recorder {
    /// The files of which the user said what format they have: that is to be kept of any image.
    with_format: HashSet<PathBuf>,
    _locks: Locks,
}

impl Recorder {
    /// Locks the backup directory `root`.
    ///
    /// # Errors
    /// `Busy` if somebody else is writing to it.
    pub(super) fn begin(root: &Path, format_override: Option<&FormatOverride>) -> Result<Self> {
        let locks = Locks::take(root)?;
        if let Some(dir) = unfinished::folders(root).first() {
            let what = "another command changed this folder meanwhile, and was interrupted";
            return Err(Error::new(Kind::Busy, what).at_path(dir).remedy("verify again"));
        }
        let with_format = format_override.map(|t| t.files.clone()).unwrap_or_default();
        Ok(Recorder { with_format, _locks: locks })
    }

    /// Writes manifests for those points of `disk` that have none, adds the hash to manifests
    /// without, and the checksum to those that somebody wrote or changed by hand. Skips points that
    /// are unsound, those that depend on a point without a sound record (what they are depends on
    /// it), and those whose file or manifest has changed since it was looked at. Returns the points
    /// that are proved by that.
    ///
    /// # Errors
    /// A manifest cannot be written.
    pub(super) fn create(
        &self,
        disk: &Disk,
        records: &Records,
        reports: &HashMap<PathBuf, FileReport>,
        outcome: impl Fn(usize) -> Outcome,
    ) -> Result<HashSet<usize>> {
        let mut written = HashSet::new();
        for (i, p) in disk.points.iter().enumerate() {
            // A parent comes before its children.
            let founded =
                p.parent.is_none_or(|j| outcome(j) == Outcome::Sound || written.contains(&j));
            if outcome(i) != Outcome::Unproven || !founded {
                continue;
            }
            let Some(hash) = reports.get(&p.source).and_then(|r| r.hash.clone()) else { continue };
            let record = &records.list[i];
            let m = match record.manifest.as_ref() {
                // Without a hash or a checksum of its own: it gets them now. (Its hash, if any, is right: the
                // point would be unsound.)
                Some(m) if (m.blake3.is_none() || !record.sealed) && p.level != Level::Snapshot => {
                    Some(m.clone())
                }
                // What it depends on has its record now, and its own was right before.
                Some(m) if m.blake3.as_ref().is_some_and(|h| h.eq_ignore_ascii_case(&hash)) => {
                    written.insert(i);
                    None
                }
                Some(_) => None,
                // One that cannot be read is a finding, and stays.
                None if self.with_format.contains(&p.source) => describe_format(disk, i),
                // From then on it would be followed wherever it leads, whatever is written to it.
                None if p.format_is_open => None,
                None => describe(disk, i),
            };
            let Some(mut m) = m.filter(|_| is_as_it_was(disk, i, records)) else { continue };
            if !manifest::has_room(OsStr::new(&m.image)) {
                let path = path_text(&p.source);
                log::warn!("{path}: its name is too long for a manifest: not recorded");
                continue;
            }
            m.blake3 = Some(hash);
            m.fingerprint = Some(fingerprint(&p.source)?);
            if let Some(dir) = p.source.parent() {
                manifest::write(dir, &m)?;
                written.insert(i);
            }
        }
        // An internal snapshot is in its file, whose hash is recorded now.
        let sources: HashSet<PathBuf> =
            written.iter().map(|i| disk.points[*i].source.clone()).collect();
        let inside = |i: &usize| sources.contains(&disk.points[*i].source);
        written.extend((0..disk.points.len()).filter(inside));
        Ok(written)
    }
}

/// Whether file and manifest are still those that were looked at.
fn is_as_it_was(disk: &Disk, i: usize, records: &Records) -> bool {
    let p = &disk.points[i];
    let same_file = p.layers.iter().all(|l| !l.file.is_changed_on_disk());
    same_file
        && crate::folder::is_file(&p.source)
        && Record::read(p).manifest == records.list[i].manifest
}
