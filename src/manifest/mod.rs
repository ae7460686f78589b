//! Manifests: `.fleecefs/<image file name>.json` beside the images, one per published image.
//!
//! A manifest is what file names cannot say: which file a point depends on, which bitmap records
//! since then, what the guest's disk was. For `backup` it is the commit: an image without one is
//! checked before it is used. Reading tolerates unknown fields; an unknown format version is an
//! error, which a scan turns into a finding.

mod backing;
mod consistency;
mod store;
mod vm;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::backing::{BackingFile, Compared};
use self::consistency::achieved;
pub use self::consistency::{Achieved, Consistency, OFFLINE, RECORDED};
pub(crate) use self::store::{MAX_BYTES, read_beside, read_brief, read_text, sealed_text};
pub use self::store::{
    has_room, parse, read, read_in, read_sealed, remove, remove_in, write, write_in,
};
pub use self::vm::VmConfig;
use crate::error::{Error, Result};
use crate::folder;
use crate::folder::PlainName;
use crate::layout::{Level, name};

/// The folder, beside the images, that holds the manifests. qmprestore ignores folders.
pub const FOLDER: &str = ".fleecefs";
/// Ends the names of announcements.
pub(crate) const ANNOUNCED: &str = ".partial.json";

/// How the names of files that are not yet complete begin in that folder. Under the folder's lock
/// they are what a killed run left.
pub const TEMPORARY: &str = ".tmp-";

/// The version that this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes hashed at either end of an image to tell whether it was replaced. The front holds a
/// qcow2's header, L1 and the first tables, the back its latest clusters.
const SAMPLE: u64 = 128 << 10;

/// What is known about one published image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this structure, [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Id of the run that made it; the same for all disks of one run.
    pub run: String,
    /// File name of the image, without folders.
    #[serde(deserialize_with = "plain_name")]
    pub image: String,
    /// Which disk of which guest it is.
    #[serde(default)]
    pub disk: DiskIdentity,
    /// The file that the disk had at the point before, where it had moved since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_from: Option<String>,
    /// The disk of which it was a point, as `list` showed it, before `link-disk` made it one of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked_from: Option<String>,
    /// What kind of backup it is.
    pub level: Level,
    /// When the freeze point was, in seconds since the epoch.
    pub time: i64,
    /// What comes after the full second, in nanoseconds; 0 if nobody recorded it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub time_nanos: u32,
    /// File name of the image that it depends on, in the same folder; `None` for a root.
    #[serde(default, deserialize_with = "plain_name_if_any")]
    pub parent: Option<String>,
    /// After a `commit`: file name of the last image that was merged into this one, whose state it
    /// is now. Its own name still has the old time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_of: Option<String>,
    /// Format of the image file.
    pub format: ImageFormat,
    /// Whether the image holds the whole disk or only what changed since its parent.
    pub content: Contents,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// Length of the image file in bytes.
    pub file_size: u64,
    /// The bitmap that records since this point.
    #[serde(default)]
    pub bitmap: Option<BitmapInfo>,
    /// The bitmap that records since the chain's FULL, for DIFFs.
    #[serde(default)]
    pub diff_bitmap: Option<BitmapInfo>,
    /// Bytes copied out of the frozen view, as they are in the image (after compression).
    #[serde(default)]
    pub bytes_copied: u64,
    /// How consistent the freeze point is.
    #[serde(default = "Consistency::unknown")]
    pub consistency: Consistency,
    /// QEMU's version, as it reports it.
    #[serde(default)]
    pub qemu_version: String,
    /// How long the copy took, in milliseconds.
    #[serde(default)]
    pub duration_ms: u64,
    /// BLAKE3 of the image file, in hexadecimal; `None` with `--no-hash`.
    #[serde(default)]
    pub blake3: Option<String>,
    /// BLAKE3 over the image's length and both its ends: tells a replaced image cheaply.
    #[serde(default)]
    pub fingerprint: Option<String>,
    /// The guest's configuration as QEMU reports it.
    #[serde(default)]
    pub vm: VmConfig,
    /// What is below the disk's own file, nearest first; `None` where nobody looked: 0.1.0 did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Vec<BackingFile>>,
    /// Files that were given with `--config`.
    #[serde(default)]
    pub config_files: Vec<ConfigFile>,
    /// Disks that this run omitted, and why.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// Disks that this run should have backed up and could not, and why: with any, the run was
    /// partial.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Skipped>,
    /// The images of all disks of the run, this one among them: what tells that one is gone. Empty where nobody
    /// said: 0.1.0 did not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub run_images: Vec<RunImage>,
}

/// The part of a [`Manifest`] that orders and describes points: a mount keeps it for each image, and
/// a manifest may hold the whole configuration of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Brief {
    /// See [`Manifest::image`].
    #[serde(deserialize_with = "plain_name")]
    pub image: String,
    /// See [`Manifest::level`].
    pub level: Level,
    /// See [`Manifest::time`].
    pub time: i64,
    /// See [`Manifest::parent`].
    #[serde(default, deserialize_with = "plain_name_if_any")]
    pub parent: Option<String>,
    /// See [`Manifest::state_of`].
    #[serde(default)]
    pub state_of: Option<String>,
    /// See [`Manifest::format`].
    pub format: ImageFormat,
    /// See [`Manifest::content`].
    pub content: Contents,
    /// See [`Manifest::virtual_size`].
    pub virtual_size: u64,
    /// See [`Manifest::file_size`].
    pub file_size: u64,
    /// See [`Consistency::achieved`]; `None` if that is not known.
    #[serde(default, rename = "consistency", deserialize_with = "achieved")]
    pub achieved: Option<Achieved>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// A name that is a path to somewhere must not get in: whoever reads one acts in one folder.
pub(crate) fn plain_name<'a, D: serde::Deserializer<'a>>(
    from: D,
) -> std::result::Result<String, D::Error> {
    let name = String::deserialize(from)?;
    PlainName::new(&name).map_err(serde::de::Error::custom)?;
    Ok(name)
}

fn plain_name_if_any<'a, D: serde::Deserializer<'a>>(
    from: D,
) -> std::result::Result<Option<String>, D::Error> {
    let name = Option::<String>::deserialize(from)?;
    name.as_ref().map(PlainName::new).transpose().map_err(serde::de::Error::custom)?;
    Ok(name)
}

/// A disk as QEMU knows it. Any of these may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskIdentity {
    /// Id or QOM path of the guest device.
    pub qdev: String,
    /// Node name of the disk's format node; `#block…` names change at each start.
    pub node: String,
    /// Name of the block backend, if it has one.
    pub device: String,
    /// The disk's own file or device.
    pub file: String,
    /// The disk's own format.
    pub format: String,
    /// The serial number that the guest sees, if it has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub serial: String,
}

/// Formats that `backup` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// qcow2 version 3.
    Qcow2,
    /// The guest's bytes one to one.
    Raw,
}

/// How much of the disk an image holds. It decides what a raw INC means, which its bytes cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contents {
    /// The whole disk: nothing below it is read.
    Full,
    /// Only what changed; the rest is in the parent.
    DirtyOnly,
}

/// A dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Name of the node it is on.
    #[serde(default)]
    pub node: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether it survives a restart of QEMU.
    #[serde(default)]
    pub persistent: bool,
    /// Whether a size watermark is beside it: a second bitmap, of this name and `-floor`, that says
    /// how small the disk has been since.
    #[serde(default, rename = "floor")]
    pub watermark: bool,
}

/// A file kept beside the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// Path it was read from.
    pub path: String,
    /// Where it is kept, relative to the folder of the image.
    #[serde(default)]
    pub stored: String,
    /// BLAKE3 of its bytes, in hexadecimal.
    #[serde(default)]
    pub blake3: String,
}

/// An image of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunImage {
    /// Node, device or qdev name of its disk.
    pub disk: String,
    /// File name of the image, without folders.
    #[serde(deserialize_with = "plain_name")]
    pub image: String,
}

/// Why a disk was skipped: `--include` names others.
pub(crate) const NOT_INCLUDED: &str = "not in --include";
/// Why a disk was skipped: `--exclude` names it.
pub(crate) const EXCLUDED: &str = "in --exclude";

/// A disk that was skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Node, device or qdev name.
    pub disk: String,
    /// Why, in words.
    pub reason: String,
}

impl Manifest {
    /// The time of the state that it holds: that in its name, `named`, or of what a commit merged in.
    pub fn state_time(&self, named: Option<i64>) -> Option<i64> {
        state_time(self.state_of.as_deref(), self.time, named)
    }
}

impl Brief {
    /// The time of the state that it holds: that in its name, `named`, or of what a commit merged in.
    pub fn state_time(&self, named: Option<i64>) -> Option<i64> {
        state_time(self.state_of.as_deref(), self.time, named)
    }
}

/// The time of the state that an image holds: that in its name, `named`; after a commit that in the
/// name of the image merged last, or else `recorded`, its manifest's. A state that was merged in is
/// never older than the name.
fn state_time(state_of: Option<&str>, recorded: i64, named: Option<i64>) -> Option<i64> {
    let Some(state_of) = state_of else { return named };
    let time = match name::parse(OsStr::new(state_of)) {
        name::Name::Backup { stamp: Some(stamp), .. } => stamp,
        _ => recorded,
    };
    Some(named.map_or(time, |n| n.max(time)))
}

/// BLAKE3 over both ends of a file and its length: cheap, and different for a replaced image.
///
/// # Errors
/// The file cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let read = || fingerprint_of(&folder::open_file(path)?);
    read().map_err(|e| Error::io(e, "cannot read the image").at_path(path))
}

/// As [`fingerprint`], of an open file.
///
/// # Errors
/// What the operating system said.
pub fn fingerprint_of(file: &File) -> std::io::Result<String> {
    let len = file.metadata()?.len();
    let mut hash = blake3::Hasher::new();
    hash.update(&len.to_be_bytes());
    let mut sample = vec![0; usize::try_from(SAMPLE.min(len)).unwrap_or(0)];
    for start in [0, len.saturating_sub(SAMPLE)] {
        file.read_exact_at(&mut sample, start)?;
        hash.update(&sample);
    }
    Ok(hash.finalize().to_hex().as_str().get(..32).unwrap_or_default().to_string())
}

/// Where the manifest of `image` in folder `dir` is.
pub fn manifest_path(dir: &Path, image: &OsStr) -> PathBuf {
    dir.join(FOLDER).join(file_name(image))
}

/// The name of the manifest of `image`, in [`FOLDER`].
pub fn file_name(image: &OsStr) -> OsString {
    let mut name = image.to_os_string();
    name.push(".json");
    name
}

/// The name of the announcement of `image`, in [`FOLDER`]: its manifest, until the image has its name and the manifest
/// its own. An image with an announcement and without a manifest is no point yet.
pub(crate) fn announcement(image: &OsStr) -> OsString {
    let mut name = image.to_os_string();
    name.push(ANNOUNCED);
    name
}

/// The image that a file in [`FOLDER`] announces, if it is an announcement.
pub(crate) fn announced_by(file: &OsStr) -> Option<&OsStr> {
    let image = file.as_bytes().strip_suffix(ANNOUNCED.as_bytes())?;
    (!image.is_empty()).then(|| OsStr::from_bytes(image))
}

/// The VM's UUID out of what QEMU said about itself; `None` if it has none.
pub fn vm_uuid(vm: &serde_json::Value) -> Option<&str> {
    let uuid = vm.get("query-uuid")?.get("UUID")?.as_str()?;
    uuid.chars().any(|c| c != '0' && c != '-').then_some(uuid)
}

/// The VM's name out of what QEMU said about itself; `None` if it has none.
pub fn vm_name(vm: &serde_json::Value) -> Option<&str> {
    vm.get("query-name")?.get("name")?.as_str().filter(|name| !name.is_empty())
}

/// The image whose manifest is called `name`; the other way round than [`file_name`].
pub fn image_of(name: &OsStr) -> Option<&OsStr> {
    name.as_bytes().strip_suffix(b".json").map(OsStr::from_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::store::parse_as;
    use super::*;
    use crate::error::Kind;

    pub(crate) fn example(image: &str, level: Level, parent: Option<&str>) -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            run: "0123".into(),
            image: image.into(),
            disk: DiskIdentity { node: "drive0".into(), ..Default::default() },
            moved_from: None,
            linked_from: None,
            time_nanos: 0,
            level,
            time: 1_700_000_000,
            parent: parent.map(str::to_string),
            state_of: None,
            format: ImageFormat::Qcow2,
            content: if parent.is_some() { Contents::DirtyOnly } else { Contents::Full },
            virtual_size: 1 << 20,
            file_size: 0,
            bitmap: None,
            diff_bitmap: None,
            bytes_copied: 0,
            consistency: Consistency::default(),
            qemu_version: "10.0.2".into(),
            duration_ms: 5,
            blake3: None,
            fingerprint: None,
            vm: VmConfig::default(),
            backing: Some(Vec::new()),
            config_files: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
            run_images: Vec::new(),
        }
    }

    #[test]
    fn a_fingerprint_is_over_the_length_and_both_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let sample = SAMPLE as usize;
        for len in [0, 1, sample - 1, sample, sample + 7, 3 * sample] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let n = len.min(sample);
            let all = [&(len as u64).to_be_bytes(), &bytes[..n], &bytes[len - n..]].concat();
            let hash = blake3::hash(&all).to_hex();
            assert_eq!(fingerprint(&path).unwrap(), hash.as_str()[..32], "{len}");
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_is_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let m = example("INC-2-sda", Level::Inc, Some("FULL-1-sda"));
        let path = write(dir.path(), &m).unwrap();
        assert_eq!(path, dir.path().join(".fleecefs/INC-2-sda.json"));
        write(dir.path(), &m).unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(super::store::OURS));
        assert_eq!(read(dir.path(), OsStr::new("INC-2-sda")).unwrap(), Some(m));
        assert_eq!(std::fs::read_dir(dir.path().join(FOLDER)).unwrap().count(), 1);
        assert_eq!(read(dir.path(), OsStr::new("FULL-1-sda")).unwrap(), None);
        remove(dir.path(), OsStr::new("INC-2-sda")).unwrap();
        remove(dir.path(), OsStr::new("INC-2-sda")).unwrap();
        assert_eq!(read(dir.path(), OsStr::new("INC-2-sda")).unwrap(), None);
    }

    #[test]
    fn a_name_that_leaves_no_room_for_a_manifest_has_none() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &example("FULL-1-sda", Level::Full, None)).unwrap();
        assert_eq!(read(dir.path(), OsStr::new(&"x".repeat(252))).unwrap(), None);
    }

    /// What QEMU says about the guest may be as long as it likes.
    #[test]
    fn a_manifest_is_readable_however_much_there_is_to_say_of_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let mut m = example("FULL-1-sda", Level::Full, None);
        m.vm = VmConfig::from(serde_json::json!({"query-name": {"name": "x".repeat(5 << 20)}}));
        write(dir.path(), &m).unwrap();
        let there = read(dir.path(), OsStr::new("FULL-1-sda")).unwrap().unwrap();
        assert!(there.vm.is_null() && there.run == m.run);
    }

    #[test]
    fn a_renamed_manifest_says_nothing_of_another_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &example("FULL-1-sda", Level::Full, None)).unwrap();
        let side = folder::Folder::open(path.parent().unwrap()).unwrap();
        let read = |image: &str| {
            read_brief(&side.handle(path.file_name().unwrap()).unwrap(), OsStr::new(image), &path)
        };
        assert_eq!(read("FULL-1-sda").unwrap().level, Level::Full);
        assert_eq!(read("FULL-2-sda").unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn what_nobody_recorded_is_unknown_and_not_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let brief = |m: &Manifest| {
            let path = write(dir.path(), m).unwrap();
            let side = folder::Folder::open(path.parent().unwrap()).unwrap();
            let handle = side.handle(path.file_name().unwrap()).unwrap();
            read_brief(&handle, OsStr::new(&m.image), &path).unwrap().achieved
        };
        let mut m = example("FULL-1-sda", Level::Full, None);
        assert_eq!(brief(&m), Some(Achieved::Crash));
        m.consistency.achieved = Achieved::FileSystem;
        assert_eq!(brief(&m), Some(Achieved::FileSystem));
        m.consistency = Consistency { reason: OFFLINE.into(), ..Consistency::default() };
        assert_eq!(brief(&m), Some(Achieved::Offline));
        assert_eq!(serde_json::to_value(&m).unwrap()["consistency"]["achieved"], "crash");
        // Made for an image of another program: see `chain::describe`.
        m.consistency = Consistency { reason: RECORDED.into(), ..Consistency::default() };
        assert_eq!(brief(&m), None);
        let mut v = serde_json::to_value(&m).unwrap();
        v.as_object_mut().unwrap().remove("consistency");
        assert_eq!(parse_as::<Brief>(v.to_string().as_bytes()).unwrap().achieved, None);
        for (known, word) in [(None, "unknown"), (Some(Achieved::FileSystem), "file-system")] {
            assert_eq!(Achieved::word(known), word);
        }
    }

    #[test]
    fn unknown_fields_are_tolerated_and_unknown_versions_are_not() {
        let mut v = serde_json::to_value(example("a", Level::Full, None)).unwrap();
        v["new_field"] = 7.into();
        assert!(parse(v.to_string().as_bytes()).is_ok());
        v["format_version"] = 2.into();
        v["level"] = "sideways".into();
        assert_eq!(parse(v.to_string().as_bytes()).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(parse(b"{").unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(parse(b"[]").unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), &example("a", Level::Full, None)).unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            let found = read_sealed(dir.path(), OsStr::new("a"));
            assert!(!matches!(found, Ok(Some((_, true)))), "byte {at}");
        }
    }

    #[test]
    fn a_manifest_of_another_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &example("a", Level::Full, None)).unwrap();
        std::fs::rename(dir.path().join(".fleecefs/a.json"), dir.path().join(".fleecefs/b.json"))
            .unwrap();
        assert_eq!(read(dir.path(), OsStr::new("b")).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn a_name_with_folders_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["", "..", "a/b", "/etc/passwd"] {
            assert!(write(dir.path(), &example(bad, Level::Full, None)).is_err(), "{bad}");
            let text = |m: &Manifest| serde_json::to_vec(m).unwrap();
            let image = text(&example(bad, Level::Full, None));
            assert_eq!(parse(&image).unwrap_err().kind(), Kind::Corrupt, "{bad}");
            let parent = text(&example("a", Level::Inc, Some(bad)));
            assert_eq!(parse(&parent).unwrap_err().kind(), Kind::Corrupt, "{bad}");
            assert_eq!(parse_as::<Brief>(&parent).unwrap_err().kind(), Kind::Corrupt, "{bad}");
        }
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(FOLDER)).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join(".fleecefs/a.json")).unwrap();
        assert!(read(dir.path(), OsStr::new("a")).is_err());
    }
}
