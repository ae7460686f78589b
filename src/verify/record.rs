//! `verify --create`: manifests for points that have none, so that later changes are noticed.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::Outcome;
use super::files::FileReport;
use super::links::Record;
use crate::chain::manifest::fingerprint;
use crate::chain::manifest::{
    self, Consistency, Contents, DiskIdentity, FORMAT_VERSION, ImageFormat, Manifest,
};
use crate::chain::{Disk, Level};
use crate::error::Result;
use crate::layer::Format;

/// Writes manifests for those points of `disk` that have none, and adds the hash to manifests
/// without. Points that are unsound are left out, and those that lie on a point without a sound
/// record: what they are depends on it. Returns the points that got one.
///
/// # Errors
/// A manifest cannot be written.
pub(super) fn create(
    disk: &Disk,
    records: &[Record],
    reports: &HashMap<PathBuf, FileReport>,
    outcome: impl Fn(usize) -> Outcome,
) -> Result<HashSet<usize>> {
    let mut written = HashSet::new();
    for (i, p) in disk.points.iter().enumerate() {
        // A parent comes before its children.
        let founded = p.parent.is_none_or(|j| outcome(j) == Outcome::Sound || written.contains(&j));
        if outcome(i) != Outcome::Unproven || !founded {
            continue;
        }
        let Some(hash) = reports.get(&p.source).and_then(|r| r.hash.clone()) else { continue };
        let known = records[i].manifest.as_ref();
        let m = match known {
            // Made without a hash: it gets one now.
            Some(m) if m.blake3.is_none() && p.level != Level::Snapshot => Some(m.clone()),
            Some(_) => None,
            // One that cannot be read is a finding, and stays.
            None => describe(disk, i),
        };
        let Some(mut m) = m else { continue };
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

/// What the catalog knows about a point as a manifest; `None` if a manifest cannot say it (an
/// internal snapshot, a plain image, a point that lies on a file in another folder).
pub fn describe(disk: &Disk, i: usize) -> Option<Manifest> {
    let p = &disk.points[i];
    if !matches!(p.level, Level::Full | Level::Inc | Level::Diff | Level::Copy) {
        return None;
    }
    let [layer] = p.layers.as_slice() else { return None };
    let format = match layer.format {
        Format::Qcow2 => ImageFormat::Qcow2,
        Format::Raw => ImageFormat::Raw,
        // Other programs' archives have checksums of their own and are never written here.
        Format::Vma | Format::SparseStream => return None,
    };
    let parent = match p.parent.map(|j| &disk.points[j].source) {
        Some(below) if below.parent() != p.source.parent() => return None,
        Some(below) => Some(below.file_name()?.to_str()?.to_string()),
        None => None,
    };
    Some(Manifest {
        format_version: FORMAT_VERSION,
        // Points of one second belong to one run, as far as their names tell.
        run: format!("time-{}", p.time),
        image: p.source.file_name()?.to_str()?.to_string(),
        disk: DiskIdentity::default(),
        level: p.level,
        time: p.time,
        content: if parent.is_some() { Contents::DirtyOnly } else { Contents::Full },
        parent,
        format,
        virtual_size: p.size,
        file_size: layer.file.identity().size,
        bitmap: None,
        diff_bitmap: None,
        bytes_copied: 0,
        consistency: Consistency { reason: "recorded afterwards".into(), ..Consistency::default() },
        qemu_version: String::new(),
        duration_ms: 0,
        blake3: None,
        fingerprint: None,
        vm: serde_json::Value::Null,
        config_files: Vec::new(),
        skipped: Vec::new(),
        failed: Vec::new(),
    })
}
