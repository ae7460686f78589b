//! Reading and writing manifests: sealed with a checksum, and whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Brief, FOLDER, FORMAT_VERSION, Manifest, TEMPORARY, manifest_path};
use crate::error::{Error, Kind, Result};

/// A manifest is a few KiB; with large VM configurations perhaps a few hundred. More than this is
/// not one, and is not read into memory.
pub(super) const MAX_BYTES: u64 = 4 << 20;

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
pub(in crate::chain) fn read_brief(dir: &Path, image: &OsStr) -> Result<Option<Brief>> {
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

pub(super) fn check_image(named: &str, image: &OsStr, path: &Path) -> Result<()> {
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

pub(super) fn parse_as<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T> {
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
pub(super) fn seal(mut text: Vec<u8>) -> Vec<u8> {
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
