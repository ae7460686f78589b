//! Manifests of images in a folder that is held open, whatever happens to its path.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::store::{MAX_BYTES, check_image, parse, seal};
use super::{FOLDER, Manifest, SAMPLE, manifest_path};
use crate::error::{Error, Kind, Result, path_text};
use crate::folder::{Folder, absent_is_none};

fn file_name(image: &OsStr) -> OsString {
    let mut name = image.to_os_string();
    name.push(".json");
    name
}

/// [`super::read`] in a folder that is held.
///
/// # Errors
/// See [`super::read`].
pub fn read_in(dir: &Folder, image: &OsStr) -> Result<Option<Manifest>> {
    let path = manifest_path(dir.path(), image);
    let read = || match absent_is_none(dir.folder(FOLDER))? {
        Some(side) => side.read_if_there(file_name(image), MAX_BYTES),
        None => Ok(None),
    };
    let bytes = read().map_err(|e| Error::io(e, "cannot read the manifest").at_path(&path))?;
    let Some(bytes) = bytes else { return Ok(None) };
    let manifest = parse(&bytes).map_err(|e| e.at_path(&path))?;
    check_image(&manifest.image, image, &path)?;
    Ok(Some(manifest))
}

/// [`super::write`] in a folder that is held.
///
/// # Errors
/// See [`super::write`].
pub fn write_in(dir: &Folder, manifest: &Manifest) -> Result<()> {
    let image = OsStr::new(&manifest.image);
    let path = manifest_path(dir.path(), image);
    let text = serde_json::to_vec_pretty(manifest)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    if text.len() as u64 > MAX_BYTES / 2 && !manifest.vm.is_null() {
        let path = path_text(&path);
        log::warn!("{path}: the guest's configuration is too large and left out");
        return write_in(dir, &Manifest { vm: serde_json::Value::Null, ..manifest.clone() });
    }
    crate::folder::plain(image)
        .and_then(|_| dir.make_folder(FOLDER))
        .and_then(|side| side.write_whole(file_name(image), &seal(text)))
        .map_err(|e| Error::io(e, "cannot write the manifest").at_path(&path))
}

/// [`super::remove`] in a folder that is held.
///
/// # Errors
/// What the operating system said.
pub fn remove_in(dir: &Folder, image: &OsStr) -> Result<()> {
    let remove = || {
        let Some(side) = absent_is_none(dir.folder(FOLDER))? else { return Ok(()) };
        match side.remove_if_there(file_name(image))? {
            true => side.sync(),
            false => Ok(()),
        }
    };
    remove().map_err(|e: io::Error| {
        Error::io(e, "cannot remove the manifest").at_path(manifest_path(dir.path(), image))
    })
}

/// [`super::fingerprint`] of an open file.
///
/// # Errors
/// The file cannot be read.
pub fn fingerprint_of(file: &File) -> io::Result<String> {
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
}
