//! What `info` and `cleanup` show and remove.

use serde::Serialize;
use serde_json::json;

use super::disks::{Answers, GuestDisk, Insertion, Survey, base_name, device_tail, survey};
use super::graph::bitmap;
use super::graph::bitmap::NodeBitmap;
use super::names;
use crate::backup::target::target_id::TargetId;
use crate::error::Result;
use crate::qmp::Client;
use crate::qmp::types::Job;

/// A disk as `info blockdev` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct DiskInfo {
    /// Its name.
    pub disk: String,
    /// Its node.
    pub node: String,
    /// The guest device.
    pub qdev: String,
    /// Its file.
    #[serde(rename = "disk_file")]
    pub file: String,
    /// Its format.
    pub format: String,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Whether it would be backed up.
    pub included: bool,
    /// How, or why not.
    pub how: String,
    /// Its bitmaps and their dirty bytes.
    pub bitmaps: Vec<BitmapLine>,
}

/// A bitmap as `info` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct BitmapLine {
    /// The node it is on.
    pub node: String,
    /// What the disk of that node is called in the guest, or its file; empty if that is not known.
    pub disk: String,
    /// Its name.
    #[serde(rename = "bitmap")]
    pub name: String,
    /// Whose it is: the target's id for ours.
    pub owner: String,
    /// Dirty bytes; none of a watermark, whose marks stand for no change.
    pub dirty: Option<u64>,
    /// Of a watermark: the bytes that it watches, all of its disk; none where that is not known.
    pub watermark: Option<u64>,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether it records.
    pub recording: bool,
    /// Whether it survives QEMU's end.
    pub persistent: bool,
    /// Worthless: QEMU did not end cleanly.
    pub inconsistent: bool,
    /// In use by a job or an export.
    pub busy: bool,
}

impl From<&NodeBitmap> for BitmapLine {
    fn from(f: &NodeBitmap) -> Self {
        let name = f.bitmap.name.clone().unwrap_or_default();
        BitmapLine {
            node: f.node.clone(),
            disk: String::new(),
            owner: owner(&name),
            dirty: (!is_watermark(&name)).then_some(f.bitmap.count),
            watermark: None,
            name,
            granularity: f.bitmap.granularity,
            recording: f.bitmap.recording,
            persistent: f.bitmap.persistent,
            inconsistent: f.bitmap.inconsistent,
            busy: f.bitmap.busy,
        }
    }
}

impl BitmapLine {
    /// A bitmap of this disk.
    fn of(f: &NodeBitmap, d: &GuestDisk) -> Self {
        let line = BitmapLine::from(f);
        let watermark = line.dirty.is_none().then_some(d.size);
        BitmapLine { disk: spoken(d), watermark, ..line }
    }
}

fn is_watermark(name: &str) -> bool {
    names::parse_bitmap(name).is_some() && names::is_watermark(name)
}

fn owner(name: &str) -> String {
    match names::parse_bitmap(name) {
        Some(b) if is_watermark(name) => {
            format!("fleecefs target {}, to tell if the disk was smaller", b.target)
        }
        Some(b) if names::is_open(name) => {
            format!("fleecefs target {}, to tell if QEMU closed the disk", b.target)
        }
        Some(b) => format!("fleecefs target {}", b.target),
        None if names::parse_object(name).is_some() => {
            "fleecefs, for the time of a run".to_string()
        }
        None if name.starts_with("qmpbackup-") => "qmpbackup".to_string(),
        None => "another program".to_string(),
    }
}

/// All disks, the skipped ones with their reasons.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn disks(client: &mut Client) -> Result<Vec<DiskInfo>> {
    let Survey { disks, skipped, blocked, .. } = survey(&Answers::ask(client)?);
    let mut list: Vec<DiskInfo> = disks.iter().map(included).collect();
    list.extend(skipped.into_iter().chain(blocked).map(|s| DiskInfo {
        disk: s.disk,
        node: String::new(),
        qdev: String::new(),
        file: String::new(),
        format: String::new(),
        size: 0,
        included: false,
        how: s.reason,
        bitmaps: Vec::new(),
    }));
    Ok(list)
}

fn included(d: &GuestDisk) -> DiskInfo {
    let named = d.bitmaps.iter().filter(|b| b.name.is_some());
    let found = named.map(|b| NodeBitmap { node: d.node.clone(), bitmap: b.clone() });
    DiskInfo {
        disk: d.label().to_string(),
        node: d.node.clone(),
        qdev: d.identity.qdev.clone(),
        file: d.identity.file.clone(),
        format: d.identity.format.clone(),
        size: d.size,
        included: !d.encrypted && d.busy.is_none() && d.by_rule.is_none(),
        how: how(d),
        bitmaps: found.map(|f| BitmapLine::of(&f, d)).collect(),
    }
}

fn how(d: &GuestDisk) -> String {
    let way = match &d.insertion {
        Insertion::Device(_) => "filter put in by qom-set",
        Insertion::Reopen { .. } => "filter put in by blockdev-reopen",
    };
    if let Some(who) = &d.busy {
        return format!("currently not possible: {who}");
    }
    if let Some(rule) = d.by_rule {
        return format!("{rule}: only if --include names it");
    }
    if d.encrypted {
        return "encrypted: only with --allow-plaintext".to_string();
    }
    let incremental = match (d.pflash, d.persistent) {
        _ if d.throwaway => "temporary overlay (snapshot=on): incremental while QEMU runs",
        (true, _) => "firmware flash: always FULL",
        (_, true) => "incremental, also after QEMU restarts",
        (_, false) => "incremental while QEMU runs, FULL after each restart",
    };
    format!("{incremental}; {way}")
}

/// All named bitmaps.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn bitmaps(client: &mut Client) -> Result<Vec<BitmapLine>> {
    let seen = survey(&Answers::ask(client)?);
    let named = |f: &NodeBitmap| {
        let of = seen.disks.iter().find(|d| d.node == f.node);
        of.map_or_else(|| BitmapLine::from(f), |d| BitmapLine::of(f, d))
    };
    Ok(bitmap::list(client)?.iter().map(named).collect())
}

/// What a user calls a disk: nobody knows node names that QEMU made up.
fn spoken(d: &GuestDisk) -> String {
    let (device, tail) = (d.identity.device.as_str(), device_tail(&d.identity.qdev));
    let file = base_name(&d.identity.file).unwrap_or_default();
    [device, tail, &file].into_iter().find(|n| !n.is_empty()).unwrap_or_default().to_string()
}

/// All jobs, ours and others'.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn jobs(client: &mut Client) -> Result<Vec<Job>> {
    client.query("query-jobs", json!({}))
}

/// Which bitmaps `cleanup` removes.
#[derive(Debug, Clone, Default)]
pub(crate) struct CleanupChoice {
    /// Those of this backup directory.
    pub of: Option<TargetId>,
    /// Its id as the user gave it: qmpbackup's names have all of it.
    pub uuid: Option<String>,
    /// All of ours but for those of these.
    pub keep: Vec<TargetId>,
    /// All of ours.
    pub all: bool,
    /// qmpbackup's as well.
    pub foreign: bool,
}

impl CleanupChoice {
    /// Whether this bitmap is chosen. Inconsistent ones of ours always are: they are good for
    /// nothing and take room in the image.
    pub(crate) fn takes(&self, b: &BitmapLine) -> bool {
        if names::parse_bitmap(&b.name).is_some() {
            let owns = |t: &TargetId| t.owns(&b.name);
            let of_target = self.of.as_ref().is_some_and(owns);
            let of_others = !self.keep.is_empty() && !self.keep.iter().any(owns);
            return self.all || of_target || of_others || b.inconsistent && self.of.is_none();
        }
        if names::parse_object(&b.name).is_some() {
            return self.all;
        }
        let theirs = b.name.starts_with("qmpbackup-");
        let named = self.uuid.as_deref().is_none_or(|u| b.name.contains(u.trim()));
        theirs && self.foreign && named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, inconsistent: bool) -> BitmapLine {
        let bitmap = crate::qmp::types::Bitmap {
            name: Some(name.into()),
            inconsistent,
            ..Default::default()
        };
        BitmapLine::from(&NodeBitmap { node: "n".into(), bitmap })
    }

    #[test]
    fn cleanup_takes_what_it_is_told_and_what_is_worthless() {
        let ours = names::bitmap("0a1b2c3d", "0123456789ab", "ba9876543210", 0);
        let none = CleanupChoice::default();
        assert!(!none.takes(&line(&ours, false)) && none.takes(&line(&ours, true)));
        assert!(!none.takes(&line("qmpbackup-x", true)) && !none.takes(&line("theirs", true)));
        let of =
            |u: &str| CleanupChoice { of: Some(TargetId::named(u).unwrap()), ..Default::default() };
        for id in ["0a1b2c3d-1111-4111-8111-111111111111", "0a1b2c3d", "0A1B2C3D\n"] {
            assert!(of(id).takes(&line(&ours, false)), "{id}");
        }
        assert!(!of("ffffffff").takes(&line(&ours, true)) && TargetId::named(" ").is_err());
        // Fewer digits are words, and words count whole.
        assert!(!of("0a1b").takes(&line(&ours, false)));
        let words = TargetId::named("backup of the office").unwrap().id;
        let theirs = names::bitmap(&words, "0123456789ab", "ba9876543210", 0);
        assert!(of("backup of the office").takes(&line(&theirs, false)));
        let keep = CleanupChoice {
            keep: vec![TargetId::named("0a1b2c3d").unwrap()],
            ..Default::default()
        };
        assert!(!keep.takes(&line(&ours, false)) && keep.takes(&line(&theirs, false)));
        assert!(
            keep.takes(&line(&names::watermark(&theirs), false)) && !keep.takes(&line("x", false))
        );
        let all = CleanupChoice { all: true, ..Default::default() };
        assert!(all.takes(&line(&ours, false)) && !all.takes(&line("theirs", false)));
        let hold = names::object("0123456789ab", names::Role::Hold, 0);
        assert!(all.takes(&line(&hold, false)) && !none.takes(&line(&hold, false)));
        assert!(
            CleanupChoice { foreign: true, ..Default::default() }
                .takes(&line("qmpbackup-x", false))
        );
    }
}
