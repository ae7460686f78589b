//! Copies of the files given to `backup --config`: they go with the last point of their run. They may
//! hold secrets, or be a guest's NVRAM.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::folder::{EntryKind, Folder};
use crate::manifest;
use crate::manifest::FOLDER;
use crate::text::path_text;

/// Removes the copies in `dir` that no manifest names any more, also those that earlier versions
/// left. Where a manifest cannot be read nothing is removed: it might name them. The caller holds the
/// lock.
///
/// # Errors
/// What the operating system said.
pub(crate) fn sweep(dir: &Folder) -> Result<()> {
    let failed = |e| Error::io(e, "cannot look for copies of configuration files");
    let side = match dir.folder(FOLDER) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| failed(e).at_path(dir.join(FOLDER)))?,
    };
    let entries = side.entries().map_err(|e| failed(e).at_path(side.path()))?;
    let (copies, others): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .filter(|e| e.kind == EntryKind::File)
        .map(|e| e.name)
        .partition(|name| is_copy(dir, name));
    if copies.is_empty() {
        return Ok(());
    }
    let Some(named) = named(dir, &others) else { return Ok(()) };
    for name in copies.iter().filter(|n| !named.contains(*n)) {
        side.remove_if_there(name)
            .map_err(|e| Error::io(e, "cannot delete the file").at_path(side.join(name)))?;
    }
    side.sync().map_err(|e| Error::io(e, "cannot sync the folder").at_path(side.path()))
}

/// What manifests of points, and of images that are not points yet, name.
fn named(dir: &Folder, files: &[OsString]) -> Option<BTreeSet<OsString>> {
    let mut named = BTreeSet::new();
    for image in files.iter().filter_map(|n| manifest::image_of(n)) {
        match manifest::read_in(dir, image) {
            Ok(m) => named.extend(
                m.into_iter()
                    .flat_map(|m| m.config_files)
                    .filter_map(|c| Path::new(&c.stored).file_name().map(OsStr::to_os_string)),
            ),
            Err(e) => {
                let path = path_text(dir.path());
                log::warn!("{path}: copies of configuration files stay: {}", e.report());
                return None;
            }
        }
    }
    Some(named)
}

/// `config-RUN-N-NAME`, as `backup` calls them; but no manifest of an image with such a name.
fn is_copy(dir: &Folder, name: &OsStr) -> bool {
    has_their_form(name) && !manifest::image_of(name).is_some_and(|image| dir.has(image))
}

fn has_their_form(name: &OsStr) -> bool {
    let mut parts =
        name.as_bytes().strip_prefix(b"config-").unwrap_or_default().splitn(3, |b| *b == b'-');
    let (run, number) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    run.len() == 12
        && run.iter().all(u8::is_ascii_hexdigit)
        && !number.is_empty()
        && number.iter().all(u8::is_ascii_digit)
        && parts.next().is_some()
}
