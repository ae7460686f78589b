//! Manifests: `.fleecefs/<image file name>.json` beside the images, one per published image.
//!
//! A manifest is what file names cannot say: which file a point lies on, which bitmap records
//! since then, what the guest's disk was. For `backup` it is the commit: an image without one is
//! checked before it is used. Reading tolerates unknown fields; an unknown format version is an
//! error, which a scan turns into a finding.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Level, name};
use crate::error::{Error, Kind, Result};

/// The folder, beside the images, that holds the manifests. qmprestore ignores folders.
pub const FOLDER: &str = ".fleecefs";

/// How the names of files that are not yet complete begin in that folder. Under the folder's lock
/// they are what a killed run left.
pub const TEMPORARY: &str = ".tmp-";

/// The version that this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// A manifest is a few KiB; with large VM configurations perhaps a few hundred. More than this is
/// not one, and is not read into memory.
const MAX_BYTES: u64 = 4 << 20;

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
    pub image: String,
    /// Which disk of which guest it is.
    #[serde(default)]
    pub disk: DiskIdentity,
    /// What kind of backup it is.
    pub level: Level,
    /// When the frozen moment was, in seconds since the epoch.
    pub time: i64,
    /// File name of the image that it lies on, in the same folder; `None` for a root.
    #[serde(default)]
    pub parent: Option<String>,
    /// After a `commit`: file name of the last image that was folded into this one, whose state it
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
    /// How consistent the frozen moment is.
    #[serde(default)]
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
    pub vm: serde_json::Value,
    /// Files that were given with `--config`.
    #[serde(default)]
    pub config_files: Vec<ConfigFile>,
    /// Disks that this run left out, and why.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
    /// Disks that this run should have backed up and could not, and why: with any, the run was
    /// partial.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Skipped>,
}

/// The part of a [`Manifest`] that orders and describes points: a mount keeps it for each image, and
/// a manifest may hold the whole configuration of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Brief {
    /// See [`Manifest::image`].
    pub image: String,
    /// See [`Manifest::level`].
    pub level: Level,
    /// See [`Manifest::time`].
    pub time: i64,
    /// See [`Manifest::parent`].
    #[serde(default)]
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

/// The reason in a manifest that was made afterwards: what it says was achieved is a default.
pub const RECORDED: &str = "recorded afterwards";

/// What a manifest knows to have been achieved.
fn achieved<'a, D: serde::Deserializer<'a>>(
    from: D,
) -> std::result::Result<Option<Achieved>, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Known {
        achieved: Option<Achieved>,
        reason: String,
    }
    let known = Known::deserialize(from)?;
    Ok(known.achieved.filter(|_| known.reason != RECORDED))
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

/// How much of the disk an image holds. It settles what a raw INC means, which its bytes cannot.
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
}

/// What state of the guest the frozen moment is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Consistency {
    /// What was achieved.
    pub achieved: Achieved,
    /// Why not more, in words; empty if there is no more.
    pub reason: String,
    /// Whether all disks of the run share one frozen moment.
    pub one_moment: bool,
    /// How long the guest was stopped for it, in milliseconds.
    pub stopped_ms: u64,
    /// Mount points that were frozen.
    pub frozen: Vec<String>,
}

/// Degrees of consistency, least first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Achieved {
    /// As after a power cut.
    #[default]
    Crash,
    /// The guest's file systems were frozen.
    FileSystem,
    /// The guest was stopped for the whole backup.
    Paused,
}

impl Achieved {
    /// The word that stands in manifests; `unknown` where nobody knows.
    pub fn word(achieved: Option<Achieved>) -> &'static str {
        match achieved {
            None => "unknown",
            Some(Achieved::Crash) => "crash",
            Some(Achieved::FileSystem) => "file-system",
            Some(Achieved::Paused) => "paused",
        }
    }
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

/// A disk that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Node, device or qdev name.
    pub disk: String,
    /// Why, in words.
    pub reason: String,
}

/// The time of the state that a commit left in an image: that in the name of the image folded last.
pub fn folded_time(state_of: Option<&str>) -> Option<i64> {
    match name::parse(OsStr::new(state_of?)) {
        name::Name::Backup { stamp, .. } => stamp,
        _ => None,
    }
}

/// BLAKE3 over both ends of a file and its length: cheap, and different for a replaced image.
///
/// # Errors
/// The file cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let read = || -> std::io::Result<String> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut hash = blake3::Hasher::new();
        hash.update(&len.to_be_bytes());
        for start in [0, len.saturating_sub(SAMPLE)] {
            let n = usize::try_from(SAMPLE.min(len)).unwrap_or(0);
            let mut buf = vec![0; n];
            file.read_exact_at(&mut buf, start)?;
            hash.update(&buf);
        }
        Ok(hash.finalize().to_hex().as_str().get(..32).unwrap_or_default().to_string())
    };
    read().map_err(|e| Error::io(e, "cannot read the image").at_path(path))
}

/// Where the manifest of `image` in folder `dir` is.
pub fn manifest_path(dir: &Path, image: &OsStr) -> PathBuf {
    let mut name = image.to_os_string();
    name.push(".json");
    dir.join(FOLDER).join(name)
}

/// Reads the manifest of `image` in folder `dir`; `None` if there is none.
///
/// # Errors
/// `Corrupt` if it is no manifest or one of another image, `Unsupported` if it is of an unknown
/// version, or what the operating system said.
pub fn read(dir: &Path, image: &OsStr) -> Result<Option<Manifest>> {
    Ok(read_sealed(dir, image)?.map(|(m, _)| m))
}

/// As [`read`], but only what orders and describes points.
///
/// # Errors
/// See [`read`].
pub(super) fn read_brief(dir: &Path, image: &OsStr) -> Result<Option<Brief>> {
    let path = manifest_path(dir, image);
    let Some(bytes) = read_file(&path)? else { return Ok(None) };
    let brief: Brief = parse_as(&bytes).map_err(|e| e.at_path(&path))?;
    check_image(&brief.image, image, &path)?;
    Ok(Some(brief))
}

/// As [`read`], and whether the manifest carries its own checksum (a wrong one is an error).
///
/// # Errors
/// See [`read`].
pub fn read_sealed(dir: &Path, image: &OsStr) -> Result<Option<(Manifest, bool)>> {
    let path = manifest_path(dir, image);
    let Some(bytes) = read_file(&path)? else { return Ok(None) };
    let manifest = parse(&bytes).map_err(|e| e.at_path(&path))?;
    check_image(&manifest.image, image, &path)?;
    Ok(Some((manifest, seal_place(&bytes).is_some())))
}

fn check_image(named: &str, image: &OsStr, path: &Path) -> Result<()> {
    if OsStr::new(named) == image {
        return Ok(());
    }
    let what = format!("the manifest is of another image, {named:?}");
    Err(Error::new(Kind::Corrupt, what).at_path(path).remedy(REMEDY))
}

const REMEDY: &str = "restore the manifest from another copy of the backup, or remove it if the \
                      image was renamed on purpose";

/// Parses a manifest.
///
/// # Errors
/// See [`read`].
pub fn parse(bytes: &[u8]) -> Result<Manifest> {
    parse_as(bytes)
}

fn parse_as<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let corrupt = |e: serde_json::Error| {
        Error::new(Kind::Corrupt, "not a manifest").with_source(e).remedy(REMEDY)
    };
    // The version first: what a later version changed must not read as damage.
    let Version { format_version } = serde_json::from_slice(bytes).map_err(corrupt)?;
    if format_version != FORMAT_VERSION {
        let what = format!("manifest of version {format_version}, this program knows 1");
        return Err(Error::new(Kind::Unsupported, what).remedy("use a newer version of fleecefs"));
    }
    check_seal(bytes)?;
    serde_json::from_slice(bytes).map_err(corrupt)
}

/// What stands before the manifest's checksum: BLAKE3, in hexadecimal, over the whole text with
/// zeros in the checksum's place. It is the last field of the text and no part of [`Manifest`].
const SEAL: &[u8] = b"\"checksum\": \"";
/// Length of the checksum.
const SEAL_LEN: usize = 64;

/// Appends the checksum to a manifest's text.
fn seal(mut text: Vec<u8>) -> Vec<u8> {
    // The text is a JSON object that ends in a newline and a brace.
    text.truncate(text.len().saturating_sub(2));
    text.extend_from_slice(b",\n  ");
    text.extend_from_slice(SEAL);
    let place = text.len()..text.len() + SEAL_LEN;
    text.extend_from_slice(&[b'0'; SEAL_LEN]);
    text.extend_from_slice(b"\"\n}\n");
    let sum = blake3::hash(&text).to_hex();
    text[place].copy_from_slice(sum.as_bytes());
    text
}

fn seal_place(text: &[u8]) -> Option<std::ops::Range<usize>> {
    let start = text.windows(SEAL.len()).rposition(|w| w == SEAL)? + SEAL.len();
    (text.get(start..)?.len() > SEAL_LEN).then_some(start..start + SEAL_LEN)
}

/// A manifest without a checksum is accepted: people may write one by hand.
fn check_seal(text: &[u8]) -> Result<()> {
    let Some(place) = seal_place(text) else { return Ok(()) };
    let mut zeroed = text.to_vec();
    zeroed[place.clone()].fill(b'0');
    if blake3::hash(&zeroed).to_hex().as_bytes() == &text[place] {
        return Ok(());
    }
    Err(Error::new(Kind::Corrupt, "the manifest does not match its own checksum").remedy(REMEDY))
}

fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |e| Error::io(e, "cannot read the manifest").at_path(path);
    // O_NOFOLLOW: a link could lead out of the backup directory. O_NONBLOCK: a pipe would hang.
    let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(Error::new(Kind::Unsupported, "not a plain file").at_path(path));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::new(Kind::Corrupt, "too large for a manifest").at_path(path));
    }
    Ok(Some(bytes))
}

/// Writes the manifest of `manifest.image` in folder `dir`, so that after a power cut there is
/// either all of it or what was there before: temporary name, fsync, rename, fsync of the folder.
///
/// # Errors
/// `NoSpace`, `Permission` or `Io`; the temporary file is removed.
pub fn write(dir: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let image = OsStr::new(&manifest.image);
    if image.is_empty() || Path::new(image).file_name() != Some(image) {
        let what = format!("{:?} is not a file name", manifest.image);
        return Err(Error::new(Kind::Usage, what).at_path(dir));
    }
    let path = manifest_path(dir, image);
    let folder = dir.join(FOLDER);
    make_folder(dir, &folder)?;
    let text = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    if text.len() as u64 > MAX_BYTES / 2 && !manifest.vm.is_null() {
        log::warn!("{}: the guest's configuration is too large and left out", path.display());
        return write(dir, &Manifest { vm: serde_json::Value::Null, ..manifest.clone() });
    }
    let mut temporary = OsString::from(format!("{TEMPORARY}{}-", std::process::id()));
    temporary.push(image);
    let temporary = folder.join(temporary);
    write_synced(&temporary, &seal(text))
        .and_then(|()| std::fs::rename(&temporary, &path))
        .and_then(|()| File::open(&folder)?.sync_all())
        .map_err(|e| {
            let _ = std::fs::remove_file(&temporary);
            Error::io(e, "cannot write the manifest").at_path(&path)
        })?;
    Ok(path)
}

fn make_folder(dir: &Path, folder: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        // Its name must survive a power cut as surely as what is put into it.
        Ok(()) => File::open(dir).and_then(|d| d.sync_all()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e),
    }
    .map_err(|e| Error::io(e, "cannot make the folder for manifests").at_path(folder))
}

fn write_synced(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Removes the manifest of `image`, if there is one, and syncs the folder.
///
/// # Errors
/// What the operating system said.
pub fn remove(dir: &Path, image: &OsStr) -> Result<()> {
    let path = manifest_path(dir, image);
    match std::fs::remove_file(&path) {
        Ok(()) => File::open(dir.join(FOLDER)).and_then(|d| d.sync_all()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
    .map_err(|e| Error::io(e, "cannot remove the manifest").at_path(&path))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example(image: &str, level: Level, parent: Option<&str>) -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            run: "0123".into(),
            image: image.into(),
            disk: DiskIdentity { node: "drive0".into(), ..Default::default() },
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
            vm: serde_json::Value::Null,
            config_files: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_is_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let m = example("INC-2-sda", Level::Inc, Some("FULL-1-sda"));
        let path = write(dir.path(), &m).unwrap();
        assert_eq!(path, dir.path().join(".fleecefs/INC-2-sda.json"));
        write(dir.path(), &m).unwrap();
        assert_eq!(read(dir.path(), OsStr::new("INC-2-sda")).unwrap(), Some(m));
        assert_eq!(std::fs::read_dir(dir.path().join(FOLDER)).unwrap().count(), 1);
        assert_eq!(read(dir.path(), OsStr::new("FULL-1-sda")).unwrap(), None);
        remove(dir.path(), OsStr::new("INC-2-sda")).unwrap();
        remove(dir.path(), OsStr::new("INC-2-sda")).unwrap();
        assert_eq!(read(dir.path(), OsStr::new("INC-2-sda")).unwrap(), None);
    }

    #[test]
    fn what_nobody_recorded_is_unknown_and_not_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let brief = |m: &Manifest| {
            write(dir.path(), m).unwrap();
            read_brief(dir.path(), OsStr::new(&m.image)).unwrap().unwrap().achieved
        };
        let mut m = example("FULL-1-sda", Level::Full, None);
        assert_eq!(brief(&m), Some(Achieved::Crash));
        m.consistency.achieved = Achieved::FileSystem;
        assert_eq!(brief(&m), Some(Achieved::FileSystem));
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
