//! Which files of a folder belong to which disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::chain::walk::tree::{
    FileEntry, FileId, Folder, LINK, LINK_REMEDY, Link, LostImage, Tree,
};
use crate::error::{Error, Finding, Kind, Severity};
use crate::layout::Level;
use crate::layout::name::{Name, Promise, is_unread_image, parse, parse_partial, promise};
use crate::text::path_text;

/// Endings of files that people and programs keep beside an image.
const SIDECARS: [&str; 34] = [
    "md5",
    "md5sum",
    "sha1",
    "sha1sum",
    "sha224",
    "sha256",
    "sha256sum",
    "sha384",
    "sha512",
    "sha512sum",
    "b2",
    "b2sum",
    "b3",
    "b3sum",
    "blake3",
    "sum",
    "crc",
    "crc32",
    "sfv",
    "sig",
    "asc",
    "minisig",
    "par2",
    "torrent",
    "json",
    "xml",
    "yaml",
    "yml",
    "txt",
    "log",
    "info",
    "map",
    "conf",
    "cfg",
];

/// A file as a member of a disk.
pub(in crate::chain) struct DiskMember {
    /// The file.
    pub file: FileId,
    /// Its kind of backup.
    pub level: Level,
    /// The time in its name.
    pub stamp: Option<i64>,
    /// Links that stand for it.
    pub aliases: Vec<OsString>,
}

/// A disk before its files are linked.
pub(in crate::chain) struct Group {
    /// Where it appears, relative to the backup directory.
    pub path: PathBuf,
    /// Its files, by name.
    pub members: Vec<DiskMember>,
    /// Backups of it that are gone, while their manifests are there.
    pub lost: Vec<LostImage>,
    /// What is odd about it.
    pub findings: Vec<Finding>,
}

/// Sorts a folder's files into disks; also what was found that belongs to none. `claimed` files are
/// parts of others (external data files).
pub(in crate::chain) fn group(
    tree: &Tree,
    folder: &Folder,
    claimed: &HashSet<FileId>,
) -> (Vec<Group>, Vec<Finding>) {
    let mut links = HashMap::new();
    for (i, link) in folder.links.iter().enumerate() {
        links.entry(link.disk.as_os_str()).or_insert(i);
    }
    let (disks, images, unread) = (BTreeMap::new(), Vec::new(), Vec::new());
    let mut sorter = Grouper { tree, folder, links, disks, images, unread };
    let files: Vec<FileId> =
        folder.files.iter().copied().filter(|f| !claimed.contains(f)).collect();
    for file in &files {
        sorter.by_name(*file);
    }
    for file in &files {
        sorter.by_neighbours(*file);
    }
    sorter.links();
    for file in &files {
        sorter.unfinished(*file);
    }
    sorter.finish()
}

#[derive(Default)]
struct MemberList {
    list: Vec<DiskMember>,
    findings: Vec<Finding>,
    /// The time of the last increment without a manifest, once it has been looked for.
    last_unrecorded: Option<Option<i64>>,
}

struct Grouper<'a> {
    tree: &'a Tree,
    folder: &'a Folder,
    /// The first of the folder's links for each disk.
    links: HashMap<&'a OsStr, usize>,
    disks: BTreeMap<OsString, MemberList>,
    images: Vec<FileId>,
    /// What is said of images in formats that are not read.
    unread: Vec<Finding>,
}

impl Grouper<'_> {
    fn entry(&self, file: FileId) -> &FileEntry {
        &self.tree.files[file]
    }

    fn by_name(&mut self, file: FileId) {
        let Name::Backup { level, stamp, disk } = self.entry(file).name.clone() else { return };
        // A note called FULL-story.txt is no disk; a qcow2 image called FULL-disk is one.
        if (stamp.is_none() && !self.looks_like_image(file)) || self.is_sidecar(file) {
            return;
        }
        let belongs = DiskMember { file, level, stamp, aliases: Vec::new() };
        self.disks.entry(disk).or_default().list.push(belongs);
    }

    /// `FULL-1-sda.qcow2.sha256` beside `FULL-1-sda.qcow2`. Only endings of files that are kept
    /// beside others count: `FULL-1-sda.1` is a disk of its own.
    fn is_sidecar(&self, file: FileId) -> bool {
        let entry = self.entry(file);
        let name = base_name(entry);
        let Some(dot) = name.as_bytes().iter().rposition(|b| *b == b'.') else { return false };
        let (stem, ending) = (&name.as_bytes()[..dot], &name.as_bytes()[dot + 1..]);
        let ending = ending.to_ascii_lowercase();
        !entry.probed.magic
            && SIDECARS.iter().any(|s| s.as_bytes() == ending)
            && self.tree.lookup(&self.folder.path, Path::new(OsStr::from_bytes(stem))).is_some()
    }

    fn looks_like_image(&self, file: FileId) -> bool {
        let entry = self.entry(file);
        let promised = promise(base_name(entry));
        entry.probed.magic
            || entry.manifest.is_some()
            || matches!(promised, Promise::Qcow2 | Promise::Raw)
    }

    fn by_neighbours(&mut self, file: FileId) {
        let entry = self.entry(file);
        if entry.name != Name::Other {
            return;
        }
        let name = base_name(entry).to_os_string();
        // With both links a copy has overwritten the FULL: COPY- sorts first, and rightly no
        // increment depends on it.
        let linked = self.links.get(name.as_os_str()).map(|l| &self.folder.links[*l]);
        let has_increments = || {
            self.disks.get(&name).is_some_and(|m| {
                let has = |wanted: &[Level]| m.list.iter().any(|b| wanted.contains(&b.level));
                has(&[Level::Inc, Level::Diff]) && !has(&[Level::Full])
            })
        };
        // Anywhere else, a file that is called like the disk may be the disk itself, or anything: unless
        // its manifest says what it is, or the folder looks as such folders look.
        let recorded = entry.manifest.as_ref().map(|m| m.level);
        let recorded = recorded.filter(|l| matches!(l, Level::Full | Level::Copy));
        let in_own_folder = self.folder.path.file_name() == Some(&name)
            && (self.looks_like_image(file) || has_increments());
        let is_full = in_own_folder
            || recorded.is_some()
            || has_increments() && self.is_backup_folder(file, &name);
        if linked.is_some() || is_full {
            let level = recorded.or(linked.map(|l| l.level)).unwrap_or(Level::Full);
            let belongs = DiskMember { file, level, stamp: None, aliases: Vec::new() };
            self.disks.entry(name).or_default().list.push(belongs);
        } else if self.looks_like_image(file) {
            self.images.push(file);
        } else if is_unread_image(base_name(entry)) {
            self.unread.extend(entry.content_problem().map(skipped));
        }
    }

    /// Whether a folder in which `file` is called like the disk of increments is a backup directory in
    /// which disks have no folders of their own, as the disk's `.config` shows, or a copy of a disk's
    /// folder under another name, in which there is nothing else. (Else it may be the folder of the
    /// VM's own disks. Of a file that was written after its increments `overwritten` thinks the worst.)
    fn is_backup_folder(&self, file: FileId, disk: &OsStr) -> bool {
        let mut config = disk.to_os_string();
        config.push(".config");
        if self.tree.lookup(&self.folder.path, Path::new(&config)).is_some() {
            return true;
        }
        let of_disk = |f: &FileId| match &self.entry(*f).name {
            Name::Backup { disk: of, .. } => of == disk,
            Name::Other => *f == file || self.is_sidecar(*f),
            Name::Ignored => {
                parse_partial(base_name(self.entry(*f))).is_some_and(|(_, _, of)| of == disk)
            }
        };
        self.folder.files.iter().all(of_disk)
    }

    /// Gives `FULL-<disk>` links to the files that they stand for.
    fn links(&mut self) {
        for link in &self.folder.links {
            let tree = self.tree;
            let members = self.disks.entry(link.disk.clone()).or_default();
            let beside = members.list.iter().position(|b| {
                b.stamp.is_none() && base_name(&tree.files[b.file]) == link.disk.as_os_str()
            });
            let target = link.target.filter(|t| may_be_full(&tree.files[*t]));
            match (beside, target) {
                // After a move the link leads elsewhere or nowhere; the file beside it is meant.
                (Some(i), _) => members.list[i].aliases.push(link.name.clone()),
                (None, Some(file)) if !members.list.iter().any(|b| b.file == file) => {
                    let aliases = vec![link.name.clone()];
                    members.list.push(DiskMember { file, level: link.level, stamp: None, aliases });
                }
                (None, Some(_)) => {}
                (None, None) => members.findings.push(leads_nowhere(self.folder, link)),
            }
        }
    }

    /// Says that there is a backup that was never finished. Its time matters: qmpbackup forgets what
    /// a failed increment was to copy, so that later ones lack it.
    fn unfinished(&mut self, file: FileId) {
        let path = &self.entry(file).path;
        let Some((level, stamp, disk)) = parse_partial(base_name(self.entry(file))) else { return };
        let what = "unfinished backup (interrupted or still running): not a point";
        let mut finding = Finding::warning(Kind::Incomplete, path, what);
        let members = self.disks.entry(disk).or_default();
        let last = *members.last_unrecorded.get_or_insert_with(|| {
            let unrecorded = |b: &&DiskMember| self.tree.files[b.file].manifest.is_none();
            let incs = members.list.iter().filter(|b| b.level == Level::Inc).filter(unrecorded);
            incs.filter_map(|b| b.stamp).max()
        });
        if level == Level::Inc && last > stamp {
            finding.message =
                "unfinished backup: if qmpbackup made it, increments after it may lack its changes"
                    .into();
        } else {
            finding.severity = Severity::Note;
        }
        members.findings.push(finding);
    }

    /// The disks, and findings that belong to none.
    fn finish(mut self) -> (Vec<Group>, Vec<Finding>) {
        let folder = &self.folder.relative;
        let mut homeless = std::mem::take(&mut self.unread);
        self.disks.retain(|_, m| {
            if m.list.is_empty() {
                homeless.append(&mut m.findings);
            }
            !m.list.is_empty()
        });
        let alone = self.disks.len() == 1;
        let mut lost: HashMap<&OsStr, Vec<LostImage>> = HashMap::new();
        for l in &self.folder.lost {
            lost.entry(&l.disk).or_default().push(l.clone());
        }
        let mut groups = Vec::new();
        for (disk, members) in self.disks {
            // In the backup directory itself there is no folder to call the disk after.
            let own_folder = folder.file_name().is_some_and(|f| alone || f == disk);
            let path = if own_folder { folder.clone() } else { folder.join(&disk) };
            let lost = lost.remove(disk.as_os_str()).unwrap_or_default();
            groups.push(Group { path, members: members.list, lost, findings: members.findings });
        }
        for file in self.images {
            let path = folder.join(base_name(&self.tree.files[file]));
            let member = DiskMember { file, level: Level::Image, stamp: None, aliases: Vec::new() };
            let (members, lost) = (vec![member], Vec::new());
            groups.push(Group { path, members, lost, findings: Vec::new() });
        }
        (groups, homeless)
    }
}

/// An image that no disk is made of: not to speak of it would leave out a backup.
fn skipped(problem: Finding) -> Finding {
    let message = format!("{}: skipped", problem.message);
    Finding { severity: Severity::Warning, message, ..problem }
}

/// That a `FULL-<disk>` or `COPY-<disk>` link stands for no image.
fn leads_nowhere(folder: &Folder, link: &Link) -> Finding {
    let (text, disk) = (path_text(&link.text), path_text(&link.disk));
    let (what, remedy) = match (parse(&link.name), link.target) {
        // No link of `--no-timestamp`.
        (Name::Backup { stamp: Some(_), .. }, _) => {
            (format!("{LINK} where a backup should be: it leads to {text}"), LINK_REMEDY.into())
        }
        (_, Some(_)) => (
            format!("this link leads to {text}, which is no FULL or COPY"),
            "remove the link".into(),
        ),
        (_, None) => (
            format!(
                "the image of this link is missing: it leads to {text}, which is not in this \
                 backup directory, and {disk} is not beside it"
            ),
            format!(
                "put the image {disk} into this folder; if it is gone for good, remove the link"
            ),
        ),
    };
    let error = Error::new(Kind::Incomplete, what).at_path(folder.path.join(&link.name));
    Finding::from_error(&error.remedy(remedy), &folder.path)
}

/// File name of an entry.
pub(in crate::chain) fn base_name(entry: &FileEntry) -> &OsStr {
    entry.path.file_name().unwrap_or_default()
}

/// An increment is no FULL, whatever a link calls it.
fn may_be_full(entry: &FileEntry) -> bool {
    match entry.name {
        Name::Other => true,
        Name::Backup { level, .. } => matches!(level, Level::Full | Level::Copy),
        Name::Ignored => false,
    }
}
