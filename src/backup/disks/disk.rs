//! A disk as a backup sees it, and all of them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::backup::{Layout, graph, names};
use crate::manifest::{BackingFile, DiskIdentity, Skipped};
use crate::qmp::types::Bitmap;

/// The longest name of a node or device, in bytes. QEMU's nodes have 31, QOM paths some hundred.
pub(super) const LONGEST_NAME: usize = 1024;

/// How the filter gets between the guest and its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Insertion {
    /// The `drive` property of this QOM object is set.
    Device(String),
    /// This raw node above the disk is reopened.
    Reopen {
        /// The raw node's name.
        node: String,
        /// Its cache mode, to be given again.
        cache: Value,
        /// Its write-zero detection, to be given again.
        detect_zeroes: String,
    },
}

/// One disk that can be backed up.
#[derive(Debug, Clone)]
pub struct GuestDisk {
    /// Who it is.
    pub identity: DiskIdentity,
    /// What the user calls it (`--name`): the name of its folder then.
    pub named: Option<String>,
    /// The node that carries its bitmaps.
    pub node: String,
    /// The node that the guest is attached to: the same, or a filter above it.
    pub top: String,
    /// How to get in between.
    pub insertion: Insertion,
    /// What is between the guest and `node`.
    pub path: graph::Path,
    /// Who works on it, if somebody does: it has to wait.
    pub busy: Option<String>,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Cluster size in bytes; 64 KiB where the format has none.
    pub cluster_size: u64,
    /// qcow2 with subclusters.
    pub extended_l2: bool,
    /// qcow2 with lazy refcounts.
    pub lazy_refcounts: bool,
    /// Whether bitmaps survive QEMU's end.
    pub persistent: bool,
    /// Whether reading it gives plain text of an encrypted image.
    pub encrypted: bool,
    /// Whether a part that was cut off and given back reads zeros and is known to: so in qcow2, files
    /// and RBD images. A volume may have its old bytes there again, while QEMU has forgotten which
    /// of them had changed.
    pub regrows_zeros: bool,
    /// Whether it depends on another image: what that has no data for is zeros which no frozen view of the
    /// disk is known to report.
    pub has_backing: bool,
    /// What those images are, nearest first.
    pub backing: Vec<BackingFile>,
    /// QEMU's process, if it is one of this host; see [`crate::qmp::peer::process`].
    pub process: String,
    /// Firmware flash: small, copied in full each time.
    pub pflash: bool,
    /// QEMU's overlay of a disk with `snapshot=on`: it goes when QEMU ends, and the identity's file is
    /// that of the disk below it.
    pub throwaway: bool,
    /// Why it is omitted where `--include` does not name it.
    pub by_rule: Option<&'static str>,
    /// All bitmaps on `node`.
    pub bitmaps: Vec<Bitmap>,
    /// Bytes that its files take, as an upper limit of what a full copy has to read.
    pub allocated: u64,
    /// `qemu-img info` of it, as QEMU reports it.
    pub info: Value,
}

impl GuestDisk {
    /// The name of its file, or what QEMU calls it where it has none.
    pub fn base_name(&self) -> String {
        let named = self.named.clone().or_else(|| base_name(&self.identity.file));
        named.unwrap_or_else(|| self.label().to_string())
    }

    /// The name of a new folder for it, and the last part of its images' names.
    pub fn folder_name(&self, layout: &Layout) -> String {
        names::folder(&self.base_name(), layout.no_timestamp)
    }

    /// That name, and the one that it has with and without `--no-timestamp` where they differ.
    pub fn folder_names(&self, layout: &Layout) -> Vec<String> {
        let mut names = vec![self.folder_name(layout)];
        names.push(names::folder(&self.base_name(), !layout.no_timestamp));
        names.dedup();
        names
    }

    /// A short name for messages.
    pub fn label(&self) -> &str {
        let i = &self.identity;
        let known = [&i.device, &i.node, &i.qdev].into_iter().map(String::as_str);
        // A file that no QEMU has named.
        let file = i.file.rsplit('/').next();
        known.chain(file).find(|s| !s.is_empty()).unwrap_or("disk")
    }

    /// Whether the user means this disk by `name`.
    pub fn is_called(&self, name: &str) -> bool {
        let i = &self.identity;
        let tail = device_tail(&i.qdev);
        let base = self.base_name();
        [i.device.as_str(), &i.node, &i.qdev, &i.file, tail, &base].contains(&name)
            || self.folder_names(&Layout::default()).iter().any(|n| n == name)
    }

    /// The named bitmap.
    pub fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|b| b.name.as_deref() == Some(name))
    }

    /// Whether QEMU has had it open since the bitmap `name` was added to it: so it has where that is in no
    /// image, or a bitmap beside it that is in none.
    pub fn is_open_since(&self, name: &str) -> bool {
        let lasts = |n: &str| self.bitmap(n).map(|b| b.persistent);
        lasts(name) == Some(false) || lasts(&names::open(name)) == Some(false)
    }

    /// The folder that holds its own file, if that is a file.
    pub fn folder(&self) -> Option<PathBuf> {
        let p = Path::new(&self.identity.file);
        (p.is_absolute() && !p.starts_with("/dev")).then(|| p.parent().map(Path::to_path_buf))?
    }
}

/// The last part of a file's or device's name.
pub fn base_name(file: &str) -> Option<String> {
    let tail = file.trim_end_matches('/').rsplit(['/', ':']).next()?;
    (!tail.is_empty() && tail != "." && tail != "..").then(|| tail.to_string())
}

/// All disks of the guest.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Disks that can be backed up.
    pub disks: Vec<GuestDisk>,
    /// Those that are skipped by rule: empty, read-only, removable.
    pub skipped: Vec<Skipped>,
    /// Those that should be backed up and cannot.
    pub blocked: Vec<Skipped>,
    /// Other names of the disks that are skipped or blocked: the other name, and the disk.
    pub aliases: Vec<(String, String)>,
}

impl Survey {
    /// How many there are, the others among them.
    pub fn count(&self) -> usize {
        [self.disks.len(), self.skipped.len(), self.blocked.len()].into_iter().sum()
    }

    /// Whether one that is no disk for a backup is meant by `name`.
    pub fn is_called(&self, disk: &str, name: &str) -> bool {
        disk == name || self.aliases.iter().any(|(a, d)| a == name && d == disk)
    }

    /// Notes what else one is called that is no disk for a backup.
    pub fn note_aliases<'a>(&mut self, disk: &str, names: impl IntoIterator<Item = &'a str>) {
        let sound = |n: &&str| !n.is_empty() && n.len() <= LONGEST_NAME && *n != disk;
        let names = names.into_iter().filter(sound);
        self.aliases.extend(names.map(|n| (n.to_string(), disk.to_string())));
    }
}

/// The last part of a device's path that tells which one it is.
pub fn device_tail(qdev: &str) -> &str {
    qdev.rsplit('/').find(|p| *p != "virtio-backend").unwrap_or_default()
}
