//! virtnbdbackup's folders: `<disk>.full.data`, `<disk>.inc.<checkpoint>.data`,
//! `<disk>.diff.<seconds>.data`, `<disk>.copy.data`, and things beside them that are no backups.
//!
//! A stream says itself which checkpoint it made and which it builds on; that links it. Names
//! must agree with it. Files are ordered by the checkpoint's number, never by their times.

use std::collections::BTreeMap;
use std::path::Path;

use crate::chain::walk::foreign_content::ForeignContent;
use crate::chain::walk::info;
use crate::chain::walk::info::DiskInfo;
use crate::chain::walk::tree::{FileEntry, FileId, Tree};
use crate::chain::{Disk, Point};
use crate::error::{Error, Finding, Kind, Result};
use crate::layer::sparsestream::Meta;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::layout::Level;
use crate::layout::stream_name::StreamName;

/// What was found in one folder.
#[derive(Default)]
pub(in crate::chain) struct FoundDisks {
    /// Disks; their paths are not yet unique.
    pub disks: Vec<Disk>,
    /// What belongs to no disk.
    pub findings: Vec<Finding>,
    /// The files that are of these layouts and nobody else's business.
    pub taken: Vec<FileId>,
}

/// What is beside streams: unfinished ones, checksums, configurations, lists of checkpoints.
fn is_companion(name: &str) -> bool {
    const ENDINGS: [&str; 5] =
        [".data.partial", ".data.chksum", ".qcow.json", ".cpt", ".cpt.partial"];
    let config = name.starts_with("vmconfig.") && name.ends_with(".xml");
    config || ENDINGS.iter().any(|e| name.ends_with(e))
}

/// A file of a disk.
struct StreamFile<'a> {
    entry: &'a FileEntry,
    /// The file's name, and what it says.
    file: String,
    name: StreamName,
    /// The stream's metadata, or `None` for a raw disk, which is copied as it is.
    meta: Result<Option<&'a Meta>, Finding>,
}

impl StreamFile<'_> {
    fn meta(&self) -> Option<&Meta> {
        self.meta.as_ref().ok().copied().flatten()
    }

    /// A full backup made in place of an incremental one keeps the latter's name.
    fn level(&self) -> Level {
        match self.meta() {
            Some(meta) if self.name.level.builds_on() && !meta.incremental => Level::Full,
            _ => self.name.level,
        }
    }

    /// The checkpoint that this backup made. A diff makes none, and neither does a backup of a
    /// machine that is off, which repeats the one it builds on.
    fn made(&self) -> Option<&str> {
        let Some(meta) = self.meta() else {
            return (self.name.level == Level::Inc).then_some(&self.name.ident);
        };
        let makes = matches!(self.level(), Level::Full | Level::Inc);
        (makes && !meta.checkpoint.is_empty() && meta.checkpoint != meta.parent)
            .then_some(&meta.checkpoint)
    }

    /// The checkpoint that this backup builds on.
    fn parent(&self) -> Option<String> {
        let meta = self.meta()?;
        if !meta.parent.is_empty() {
            return Some(meta.parent.clone());
        }
        let (prefix, _) = self.name.ident.rsplit_once('.')?;
        Some(format!("{prefix}.{}", number(&self.name.ident)?.checked_sub(1)?))
    }

    /// Where it belongs among the files of its disk.
    fn order(&self) -> (u8, u64, u8, String) {
        let ident = self.name.ident.clone();
        let made = self.made().and_then(number);
        match self.name.level {
            Level::Full => (0, 0, 0, ident),
            Level::Copy => (2, 0, 0, ident),
            // Behind the backup it builds on, and before the next.
            _ => match made {
                Some(n) => (1, n, 0, ident),
                None => {
                    (1, self.parent().as_deref().and_then(number).unwrap_or(u64::MAX), 1, ident)
                }
            },
        }
    }

    /// Whether the stream is what its name says.
    fn check(&self) -> Result<()> {
        let Some(meta) = self.meta() else { return Ok(()) };
        let wrong = |what: String| {
            let error = Error::new(Kind::Corrupt, what).at_path(&self.entry.path);
            Err(error.remedy("rename the file to the name it was written with"))
        };
        if meta.disk != self.name.disk {
            return wrong(format!("the stream is of disk {}", meta.disk));
        }
        if meta.incremental && !self.name.level.builds_on() {
            return wrong("the stream is incremental".into());
        }
        match self.made() {
            Some(made) if self.name.level == Level::Inc && made != self.name.ident => {
                wrong(format!("the stream is of checkpoint {made}"))
            }
            _ => Ok(()),
        }
    }
}

/// The number at the end of a checkpoint's name.
fn number(checkpoint: &str) -> Option<u64> {
    checkpoint.rsplit_once('.')?.1.parse().ok()
}

/// Finds the disks of one folder. `streams` are its files with a stream's name, `beside` all
/// files with their names.
pub(in crate::chain) fn find(
    tree: &Tree,
    folder: &Path,
    streams: &[&FileEntry],
    beside: &[(FileId, String)],
    found: &mut FoundDisks,
) {
    let mut disks: BTreeMap<String, Vec<StreamFile>> = BTreeMap::new();
    for entry in streams {
        let file = entry.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(name) = StreamName::parse(&file) else { continue };
        let meta = meta_of(tree, entry, &name, beside);
        disks.entry(name.disk.clone()).or_default().push(StreamFile { entry, file, name, meta });
    }
    found.taken.extend(beside.iter().filter(|(_, name)| is_companion(name)).map(|(file, _)| *file));
    found.disks.extend(disks.into_iter().map(|(name, members)| make_disk(folder, &name, members)));
}

/// The stream's metadata; `None` for a raw disk (`-t raw`, or a disk that is raw itself). A file of
/// the size that the disk had by the description beside it is one, whatever it begins with: a guest
/// can write a stream to its disk. Else that a copy is raw is believed only if nothing beside it
/// shows that it was a stream once.
fn meta_of<'a>(
    tree: &Tree,
    entry: &'a FileEntry,
    name: &StreamName,
    beside: &[(FileId, String)],
) -> Result<Option<&'a Meta>, Finding> {
    let len = entry.probed.file.identity().size;
    let described: Vec<Option<DiskInfo>> = (beside.iter())
        .filter(|(_, file)| name.is_description(file))
        .map(|(file, _)| info::read(&tree.files[*file].probed.file))
        .collect();
    let is_size = |d: &Option<DiskInfo>| d.as_ref().and_then(|d| d.virtual_size) == Some(len);
    if len > 0 && described.iter().any(is_size) {
        return Ok(None);
    }
    match entry.probed.inside() {
        Ok(ForeignContent::Stream(meta, _)) => return Ok(Some(meta)),
        Ok(ForeignContent::NoStream | ForeignContent::Archive(_)) => {}
        Err(finding) => return Err(finding.clone()),
    }
    let sum = format!("{}.copy.data.chksum", name.disk);
    let was_stream = !described.is_empty() || beside.iter().any(|(_, n)| *n == sum);
    let may_be_raw = name.level == Level::Copy && !was_stream;
    if !may_be_raw || len == 0 || !len.is_multiple_of(512) {
        let error =
            Error::new(Kind::Corrupt, "neither a virtnbdbackup stream nor a whole raw disk")
                .remedy("restore this file from another copy of the backup");
        return Err(Finding::from_error(&error, &entry.path));
    }
    Ok(None)
}

fn make_disk(folder: &Path, name: &str, mut members: Vec<StreamFile>) -> Disk {
    members.sort_by_cached_key(StreamFile::order);
    let (points, findings) = (Vec::with_capacity(members.len()), Vec::new());
    let mut disk = Disk { path: folder.join(name), points, findings };
    // The point that made each checkpoint. Those it builds on come before it.
    let mut makers: BTreeMap<String, usize> = BTreeMap::new();
    for (i, member) in members.iter().enumerate() {
        let mut point = new_point(member);
        if let (Ok(ForeignContent::Stream(_, Some(cut))), Ok(Some(_))) =
            (member.entry.probed.inside(), &member.meta)
        {
            disk.findings.push(cut.clone());
        }
        if let Err(finding) = conclude(member, &makers, &disk.points, &mut point) {
            // A cause is told once, not once per point above it.
            if finding.path == point.source {
                disk.findings.push(finding.clone());
            }
            point.unavailable = Some(finding);
            point.layers.clear();
        }
        if let Some(made) = member.made() {
            makers.entry(made.to_owned()).or_insert(i);
        }
        disk.points.push(point);
    }
    disk
}

/// Links a point to the one it depends on, or says why it cannot be served.
fn conclude(
    member: &StreamFile,
    makers: &BTreeMap<String, usize>,
    points: &[Point],
    point: &mut Point,
) -> Result<(), Finding> {
    member.meta.as_ref().map_err(Finding::clone)?;
    let own = |e: Error| Finding::from_error(&e, &member.entry.path);
    member.check().map_err(own)?;
    link(member, makers, points, point).map_err(own)?;
    let Some(below) = point.parent.map(|i| &points[i]) else { return Ok(()) };
    match &below.unavailable {
        None => Ok(()),
        Some(cause) if cause.kind == Kind::Incomplete => Err(cause.clone()),
        Some(cause) => Err(Finding {
            kind: Kind::Incomplete,
            message: format!(
                "{} needs {}, which is not usable: {}",
                point.name, below.name, cause.message
            ),
            ..cause.clone()
        }),
    }
}

fn new_point(member: &StreamFile) -> Point {
    let probed = &member.entry.probed;
    let (format, size) = match &member.meta {
        Ok(None) => (Format::Raw, probed.file.identity().size),
        _ => (Format::SparseStream, member.meta().map_or(0, |m| m.virtual_size)),
    };
    Point {
        name: member.file.clone(),
        source: member.entry.path.clone(),
        level: member.level(),
        chain: member.file.clone(),
        parent: None,
        time: member.meta().and_then(|m| local_time(&m.date)).unwrap_or(probed.mtime),
        size,
        own_bytes: probed.own_bytes,
        consistency: None,
        layers: vec![LayerSpec {
            file: probed.file.clone(),
            format,
            part: LayerPart::Whole,
            data_file: None,
        }],
        format_is_open: false,
        unavailable: None,
    }
}

/// Seconds since the epoch of a local time without a zone.
fn local_time(date: &str) -> Option<i64> {
    let civil: jiff::civil::DateTime = date.parse().ok()?;
    let zoned = civil.to_zoned(jiff::tz::TimeZone::system()).ok()?;
    Some(zoned.timestamp().as_second())
}

/// Links an incremental backup to the one it builds on.
fn link(
    member: &StreamFile,
    makers: &BTreeMap<String, usize>,
    points: &[Point],
    point: &mut Point,
) -> Result<()> {
    if let Some(made) = member.made()
        && let Some(first) = makers.get(made)
    {
        let what = format!("{} made checkpoint {made}, too", points[*first].name);
        return Err(Error::new(Kind::Corrupt, what));
    }
    if !point.level.builds_on() {
        return Ok(());
    }
    let parent = member.parent().unwrap_or_default();
    let Some(&index) = makers.get(&parent) else {
        let what = format!("the backup that made checkpoint '{parent}' is missing or damaged");
        return Err(Error::new(Kind::Incomplete, what)
            .remedy("restore that backup's file from another copy of the backup"));
    };
    point.parent = Some(index);
    point.chain = points[index].chain.clone();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Catalog;
    use crate::chain::scan::{ScanOptions, scan};

    fn stream(disk: &str, made: &str, parent: &str) -> Vec<u8> {
        let meta = serde_json::json!({
            "virtualSize": 4096, "dataSize": 0, "date": "2026-11-22T01:30:45.480751",
            "diskName": disk, "diskFormat": "qcow2", "checkpointName": made, "compressed": false,
            "parentCheckpoint": parent, "incremental": !parent.is_empty(), "streamVersion": 2,
        })
        .to_string();
        let stop = format!("stop {:016x} {:016x}\r\n", 0, 0);
        format!("meta {:016x} {:016x}\r\n{meta}\r\n{stop}", 0, meta.len()).into_bytes()
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(files: &[(&str, Vec<u8>)]) -> Folder {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("vm1")).unwrap();
            for (name, bytes) in files {
                std::fs::write(dir.path().join("vm1").join(name), bytes).unwrap();
            }
            Folder(dir)
        }

        fn look(&self) -> Catalog {
            scan(self.0.path(), &ScanOptions::default(), None).unwrap().0
        }

        /// Names of the points of the only disk, with their parents, `!` before those not served.
        fn points(&self) -> Vec<String> {
            let found = self.look();
            assert_eq!(found.disks.len(), 1);
            let points = &found.disks[0].points;
            let show = |p: &Point| {
                let sign = if p.is_served() { "" } else { "!" };
                let on = p.parent.map_or("-", |i| &points[i].name);
                format!("{sign}{} on {on}", p.name)
            };
            points.iter().map(show).collect()
        }
    }

    fn cp(n: u32) -> String {
        format!("virtnbdbackup.{n}")
    }

    #[test]
    fn names_are_read() {
        let parse = |n: &str| StreamName::parse(n).map(|s| (s.disk, s.level, s.ident));
        let is = |d: &str, l, i: &str| Some((d.to_owned(), l, i.to_owned()));
        assert_eq!(parse("sda.full.data"), is("sda", Level::Full, ""));
        assert_eq!(parse("vdb.copy.data"), is("vdb", Level::Copy, ""));
        assert_eq!(
            parse("a.b.inc.virtnbdbackup.12.data"),
            is("a.b", Level::Inc, "virtnbdbackup.12")
        );
        assert_eq!(parse("sda.diff.1700000000.data"), is("sda", Level::Diff, "1700000000"));
        for no in ["sda.data", ".full.data", "sda.inc..data", "sda.full.data.partial", "FULL-1-sda"]
        {
            assert_eq!(parse(no), None, "{no}");
        }
    }

    #[test]
    fn points_are_linked_by_checkpoint_and_ordered_by_number() {
        let mut files = vec![
            ("sda.copy.data", stream("sda", "", "")),
            ("sda.diff.1700000000.data", stream("sda", &cp(3), &cp(2))),
            ("sda.inc.virtnbdbackup.10.data", stream("sda", &cp(10), &cp(9))),
            ("sda.full.data", stream("sda", &cp(0), "")),
            ("vm.cpt", b"[]".to_vec()),
            ("sda.inc.virtnbdbackup.11.data.partial", b"x".to_vec()),
        ];
        let names: Vec<String> = (1..10).map(|n| format!("sda.inc.{}.data", cp(n))).collect();
        for (n, name) in (1..10).zip(&names) {
            files.push((name, stream("sda", &cp(n), &cp(n - 1))));
        }
        let folder = Folder::new(&files);
        let points = folder.points();
        assert_eq!(points[0], "sda.full.data on -");
        assert_eq!(points[2], "sda.inc.virtnbdbackup.2.data on sda.inc.virtnbdbackup.1.data");
        assert_eq!(points[3], "sda.diff.1700000000.data on sda.inc.virtnbdbackup.2.data");
        assert_eq!(points[4], "sda.inc.virtnbdbackup.3.data on sda.inc.virtnbdbackup.2.data");
        assert_eq!(points[11], "sda.inc.virtnbdbackup.10.data on sda.inc.virtnbdbackup.9.data");
        assert_eq!(points[12], "sda.copy.data on -");
        let found = folder.look();
        assert!(found.findings.is_empty());
        assert_eq!(found.disks[0].path, Path::new("vm1/sda"));
        assert!(found.disks[0].points[11].chain == "sda.full.data");
    }

    #[test]
    fn a_gap_makes_what_follows_unavailable() {
        let folder = Folder::new(&[
            ("sda.full.data", stream("sda", &cp(0), "")),
            ("sda.inc.virtnbdbackup.1.data", stream("sda", &cp(1), &cp(0))),
            ("sda.inc.virtnbdbackup.3.data", stream("sda", &cp(3), &cp(2))),
            ("sda.inc.virtnbdbackup.4.data", stream("sda", &cp(4), &cp(3))),
        ]);
        let signs: Vec<bool> = folder.points().iter().map(|p| p.starts_with('!')).collect();
        assert_eq!(signs, [false, false, true, true]);
        let catalog = folder.look();
        let disk = &catalog.disks[0];
        let why = disk.points[2].unavailable.as_ref().unwrap();
        assert!(why.kind == Kind::Incomplete && why.message.contains("virtnbdbackup.2"));
        assert_eq!(disk.findings.len(), 1, "the cause is told once");
        assert_eq!(disk.points[3].unavailable.as_ref().unwrap().path, disk.points[2].source);
    }

    #[test]
    fn a_stream_under_a_wrong_name_is_refused() {
        let swapped = Folder::new(&[
            ("sda.full.data", stream("sda", &cp(0), "")),
            ("sda.inc.virtnbdbackup.1.data", stream("sda", &cp(2), &cp(1))),
            ("sda.inc.virtnbdbackup.2.data", stream("sda", &cp(1), &cp(0))),
        ]);
        assert_eq!(swapped.points().iter().filter(|p| p.starts_with('!')).count(), 2);
        let others = Folder::new(&[("sda.full.data", stream("sdb", &cp(0), ""))]);
        assert_eq!(others.points(), ["!sda.full.data on -"]);
        let inc = Folder::new(&[("sda.full.data", stream("sda", &cp(1), &cp(0)))]);
        assert_eq!(inc.points(), ["!sda.full.data on -"]);
    }

    #[test]
    fn a_copy_without_frames_is_a_raw_disk_unless_it_was_a_stream() {
        let raw = ("sdb.copy.data", vec![7; 1024]);
        let disk = Folder::new(std::slice::from_ref(&raw)).look().disks.remove(0);
        assert_eq!((disk.points[0].size, disk.points[0].layers[0].format), (1024, Format::Raw));
        let damaged = Folder::new(&[raw, ("sdb.copy.data.chksum", b"1".to_vec())]);
        assert_eq!(damaged.points(), ["!sdb.copy.data on -"]);
        assert_eq!(
            Folder::new(&[("sdb.copy.data", vec![7; 700])]).points(),
            ["!sdb.copy.data on -"]
        );
        // A full backup is never raw, whatever it holds.
        assert_eq!(
            Folder::new(&[("sdb.full.data", vec![7; 1024])]).points(),
            ["!sdb.full.data on -"]
        );
    }
}
