//! Reading and writing manifests: sealed with a checksum, and whole or not at all.

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Brief, FOLDER, FORMAT_VERSION, Manifest, VmConfig, file_name, manifest_path};
use crate::error::{Error, Kind, Result};
use crate::folder::{FileMode, Folder, Handle, plain};
use crate::text::path_text;

/// A manifest is a few KiB; with large VM configurations perhaps a few hundred. More than this is
/// not one, and is not read into memory.
pub(crate) const MAX_BYTES: u64 = 4 << 20;

/// Reads the manifest of `image` in folder `dir`; `None` if there is none.
///
/// # Errors
/// `Corrupt` if it is no manifest or one of another image, `Unsupported` if it is of an unknown
/// version, or what the operating system said.
pub fn read(dir: &Path, image: &OsStr) -> Result<Option<Manifest>> {
    Ok(read_sealed(dir, image)?.map(|(m, _)| m))
}

/// The part that orders and describes points, of the manifest of `image`; `handle` is of the file
/// `path`.
///
/// # Errors
/// See [`read`].
pub(crate) fn read_brief(handle: &Handle, image: &OsStr, path: &Path) -> Result<Brief> {
    let bytes = handle.read_small(MAX_BYTES).map_err(|e| failed(e, path))?;
    let brief: Brief = parse_as(&bytes).map_err(|e| e.at_path(path))?;
    check_image(&brief.image, image, path)?;
    Ok(brief)
}

/// As [`read`], and whether the manifest carries its own checksum (a wrong one is an error).
///
/// # Errors
/// See [`read`].
pub fn read_sealed(dir: &Path, image: &OsStr) -> Result<Option<(Manifest, bool)>> {
    match Folder::open(dir) {
        Ok(folder) => read_sealed_in(&folder, image),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(failed(e, &manifest_path(dir, image))),
    }
}

fn check_image(named: &str, image: &OsStr, path: &Path) -> Result<()> {
    if OsStr::new(named) == image {
        return Ok(());
    }
    let what = format!("the manifest belongs to another image, {named:?}");
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

pub(crate) fn parse_as<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        format_version: u32,
    }
    let corrupt = |e: serde_json::Error| {
        Error::new(Kind::Corrupt, "not a manifest").with_source(e).remedy(REMEDY)
    };
    // The version first: what a later version changed must not read as damage.
    let format_version = match bytes.starts_with(OURS) {
        true => FORMAT_VERSION,
        false => serde_json::from_slice::<Version>(bytes).map_err(corrupt)?.format_version,
    };
    if format_version != FORMAT_VERSION {
        let what = format!("manifest has version {format_version}; this program reads version 1");
        return Err(Error::new(Kind::Unsupported, what).remedy("use a newer version of fleecefs"));
    }
    check_seal(bytes)?;
    serde_json::from_slice(bytes).map_err(corrupt)
}

/// What all manifests of ours begin with: the version is known without going through the whole.
pub(super) const OURS: &[u8] = b"{\n  \"format_version\": 1,\n";

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

fn failed(e: io::Error, path: &Path) -> Error {
    Error::io(e, "cannot read the manifest").at_path(path)
}

/// Where something else than a folder has the name of the folder for manifests, there are none; nor is
/// there one whose name would be too long.
fn is_absent(e: &io::Error) -> bool {
    use ErrorKind::{InvalidFilename, InvalidInput, NotADirectory, NotFound};
    matches!(e.kind(), NotFound | NotADirectory | InvalidInput | InvalidFilename)
}

/// As [`read`], in a folder that is held.
///
/// # Errors
/// See [`read`].
pub fn read_in(dir: &Folder, image: &OsStr) -> Result<Option<Manifest>> {
    Ok(read_sealed_in(dir, image)?.map(|(m, _)| m))
}

fn read_sealed_in(dir: &Folder, image: &OsStr) -> Result<Option<(Manifest, bool)>> {
    match dir.folder(FOLDER) {
        Ok(side) => read_beside(&side, dir.path(), image),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(failed(e, &manifest_path(dir.path(), image))),
    }
}

/// As [`read_sealed`], where the folder of manifests is held; `dir` is that of the images.
///
/// # Errors
/// See [`read`].
pub(crate) fn read_beside(
    side: &Folder,
    dir: &Path,
    image: &OsStr,
) -> Result<Option<(Manifest, bool)>> {
    let path = manifest_path(dir, image);
    let bytes = match side.read_small(file_name(image), MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(e) if is_absent(&e) => return Ok(None),
        Err(e) => return Err(failed(e, &path)),
    };
    let manifest = parse(&bytes).map_err(|e| e.at_path(&path))?;
    check_image(&manifest.image, image, &path)?;
    Ok(Some((manifest, seal_place(&bytes).is_some())))
}

/// The text of the manifest of `image` in a folder that is held, whatever that says; `None` if there is none.
///
/// # Errors
/// What the operating system said; it is too large.
pub(crate) fn read_text(dir: &Folder, image: &OsStr) -> Result<Option<Vec<u8>>> {
    let read = dir.folder(FOLDER).and_then(|side| side.read_small(file_name(image), MAX_BYTES));
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(failed(e, &manifest_path(dir.path(), image))),
    }
}

/// Seals a manifest: the text of its file.
///
/// # Errors
/// `Io` if it has no form in JSON.
pub(crate) fn sealed_text(manifest: &Manifest) -> Result<Vec<u8>> {
    let text = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e))?;
    Ok(seal(text))
}

/// Whether an image of this name can have a manifest: not if the manifest's name would be too long, or is that of
/// something else in the same folder (the journal of a commit, the mark of a live restore): who reads that would take
/// the manifest for it.
pub fn has_room(image: &OsStr) -> bool {
    let name = image.as_bytes();
    let is_taken = name == b"fold" || name.starts_with(b"live-restore-");
    !is_taken && plain(&file_name(image)).is_ok()
}

/// Writes the manifest of `manifest.image` in folder `dir`, so that after a power cut there is
/// either all of it or what was there before.
///
/// # Errors
/// `Usage` if the image's name is not a single name; `NoSpace`, `Permission` or `Io`.
pub fn write(dir: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let folder = Folder::open(dir)
        .map_err(|e| Error::io(e, "cannot open the folder of the image").at_path(dir))?;
    write_in(&folder, manifest)?;
    Ok(manifest_path(dir, OsStr::new(&manifest.image)))
}

/// As [`write()`], in a folder that is held.
///
/// # Errors
/// See [`write()`].
pub fn write_in(dir: &Folder, manifest: &Manifest) -> Result<()> {
    let image = OsStr::new(&manifest.image);
    plain(image).map_err(|e| {
        Error::new(Kind::Usage, "a manifest for no file name").with_source(e).at_path(dir.path())
    })?;
    let path = manifest_path(dir.path(), image);
    if !has_room(image) {
        let what = "an image of this name can have no manifest";
        return Err(Error::new(Kind::Usage, what).at_path(path).remedy("rename the image"));
    }
    let text = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    if text.len() as u64 > MAX_BYTES / 2 && !manifest.vm.is_null() {
        log::warn!("{}: the guest's configuration is too large and skipped", path_text(&path));
        return write_in(dir, &Manifest { vm: VmConfig::default(), ..manifest.clone() });
    }
    let side = dir.make_folder(FOLDER).map_err(|e| {
        Error::io(e, "cannot make the folder for manifests").at_path(dir.join(FOLDER))
    })?;
    // It is for those who may read its image; a group that cannot be given is no reason against it.
    let share = dir.look(image).map(|m| FileMode::like(&m)).unwrap_or_default();
    let shared = share.give_folder(&side).is_ok();
    let share = if shared { share } else { FileMode::default() };
    let (name, text) = (file_name(image), seal(text));
    let written = match side.write_shared(&name, &text, share) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            side.write_whole(&name, &text)
        }
        written => written,
    };
    written.map_err(|e| Error::io(e, "cannot write the manifest").at_path(&path))
}

/// Removes the manifest of `image`, if there is one, and syncs the folder.
///
/// # Errors
/// What the operating system said.
pub fn remove(dir: &Path, image: &OsStr) -> Result<()> {
    match Folder::open(dir) {
        Ok(folder) => remove_in(&folder, image),
        Err(e) if is_absent(&e) => Ok(()),
        Err(e) => Err(Error::io(e, "cannot remove the manifest").at_path(dir)),
    }
}

/// As [`remove`], in a folder that is held.
///
/// # Errors
/// What the operating system said.
pub fn remove_in(dir: &Folder, image: &OsStr) -> Result<()> {
    let remove = || {
        let side = dir.folder(FOLDER)?;
        match side.remove_if_there(file_name(image))? {
            true => side.sync(),
            false => Ok(()),
        }
    };
    match remove() {
        Err(e) if !is_absent(&e) => {
            let error = Error::io(e, "cannot remove the manifest");
            Err(error.at_path(manifest_path(dir.path(), image)))
        }
        _ => Ok(()),
    }
}
