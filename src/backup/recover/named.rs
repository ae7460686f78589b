//! Images that have their names, and whose manifests are announcements still: what a run leaves that is killed between
//! the two, of a backup or of `replicate`.
//!
//! For whoever reads, such an image is no point yet. Whoever writes to the directory finishes it first, so that what
//! it builds on is not taken for unneeded. No image is removed here that has its name.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use crate::backup::{Watch, publish};
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::journal::unfinished;
use crate::manifest;
use crate::text::path_text;

/// Gives all of them from `root` downward their manifests. The locks are held, so nobody is at work on them.
pub(crate) fn conclude(root: &Path) {
    let announces = |side: &Folder| !announced_in(side).is_empty();
    for dir in unfinished::folders_where(root, announces) {
        let Ok(folder) = Folder::open(&dir) else { continue };
        let Ok(side) = folder.folder(manifest::FOLDER) else { continue };
        for image in announced_in(&side) {
            match conclude_one(&folder, &image) {
                Ok(true) => {
                    log::info!("{}: got its manifest", path_text(&folder.join(&image)));
                }
                Ok(false) => {}
                // It stays what it is, and no other is concerned.
                Err(e) => log::warn!("an unfinished image stays: {}", e.report()),
            }
        }
    }
}

/// The images that are announced in a folder for manifests. (A manifest's image has a name that is text.)
fn announced_in(side: &Folder) -> Vec<String> {
    let names = side.entries().unwrap_or_default().into_iter().map(|e| e.name);
    let image = |name: OsString| Some(manifest::announced_by(&name)?.to_str()?.to_string());
    let mut images: Vec<String> = names.filter_map(image).collect();
    images.sort();
    images
}

/// Whether the image was one of these, and certainly the one that was announced.
fn conclude_one(folder: &Folder, image: &str) -> Result<bool> {
    let has_name = folder.has(image) && !folder.has(publish::partial_name(image));
    if !has_name || manifest::read_text(folder, OsStr::new(image))?.is_some() {
        return Ok(false);
    }
    let Some(m) = publish::announced(folder, image)? else { return Ok(false) };
    let failed = |e| Error::io(e, "cannot read the image").at_path(folder.join(image));
    let file = folder.open_file(image).map_err(failed)?;
    let own = manifest::fingerprint_of(&file).map_err(failed)?;
    let is_it = m.file_size == file.metadata().map_err(failed)?.len()
        && m.fingerprint.as_ref().is_none_or(|known| *known == own);
    let has_parent = m.parent.as_ref().is_none_or(|parent| folder.has(parent));
    if !is_it || !has_parent {
        return Ok(false);
    }
    publish::sync(folder)?;
    publish::commit_announced(folder, &m).map(|()| true)
}

/// Whether an image that was announced as one that came whole ([`publish::came_whole`]) is a point now: if it is certainly
/// that one. Whatever else has its name is somebody's, and stays.
pub(super) fn conclude_whole(folder: &Folder, image: &str, watch: &dyn Watch) -> Result<bool> {
    // Nobody said that this is complete, or what it is.
    publish::discard_image(folder, image)?;
    if conclude_one(folder, image)? {
        return Ok(true);
    }
    let parent = publish::announced(folder, image)?.and_then(|m| m.parent);
    match parent.filter(|parent| folder.has(image) && !folder.has(parent)) {
        // Without it, an image would be taken for one that builds on another.
        Some(parent) => {
            let (path, parent) = (path_text(&folder.join(image)), path_text(&parent));
            watch.warn(&format!("{path}: it is no point until its parent {parent} is there"));
        }
        None => publish::discard(folder, image)?,
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::FileMode;
    use crate::layout::Level;
    use crate::manifest::tests::example;
    use crate::manifest::{Manifest, sealed_text};

    /// An image of these bytes under its name, and what its manifest says of it.
    fn image(folder: &Folder, name: &str, parent: Option<&str>) -> Manifest {
        let path = folder.join(name);
        std::fs::write(&path, name.repeat(10_000)).unwrap();
        let mut m = example(name, Level::Full, parent);
        m.file_size = std::fs::metadata(&path).unwrap().len();
        m.fingerprint = Some(manifest::fingerprint(&path).unwrap());
        m
    }

    #[test]
    fn an_image_gets_what_was_announced_for_it_if_it_is_that_image_and_nothing_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let folder = publish::make_folders(&root.join("vm/sda")).unwrap();
        // Not as we write it: it is taken over to the byte.
        let text = |m: &Manifest| serde_json::to_vec(m).unwrap();
        let announce = |m: &Manifest| {
            let name = OsStr::new(&m.image);
            publish::announce_text(&folder, name, &text(m), FileMode::default()).unwrap();
        };
        let copied = image(&folder, "FULL-1-d", None);
        announce(&copied);
        let backed_up = image(&folder, "FULL-2-d", None);
        publish::announce(&folder, &backed_up).unwrap();
        let exchanged = image(&folder, "FULL-3-d", None);
        announce(&exchanged);
        std::fs::write(folder.join("FULL-3-d"), "FULL-x-d".repeat(10_000)).unwrap();
        announce(&image(&folder, "INC-4-d", Some("FULL-0-d")));
        let unfinished = image(&folder, "FULL-5-d", None);
        announce(&unfinished);
        std::fs::write(folder.join("FULL-5-d.partial"), "x").unwrap();
        let known = image(&folder, "FULL-6-d", None);
        announce(&known);
        manifest::write_in(&folder, &known).unwrap();
        let damaged = folder.join(".fleecefs/FULL-7-d.partial.json");
        image(&folder, "FULL-7-d", None);
        std::fs::write(&damaged, "{").unwrap();
        conclude(&root);
        let side = folder.folder(manifest::FOLDER).unwrap();
        let read = |name: &str| side.read_if_there(name, 1 << 20).unwrap();
        assert_eq!(read("FULL-1-d.json"), Some(text(&copied)));
        assert_eq!(read("FULL-2-d.json"), Some(sealed_text(&backed_up).unwrap()));
        for name in ["FULL-1-d", "FULL-2-d"] {
            assert!(read(&format!("{name}.partial.json")).is_none(), "{name}");
        }
        for name in ["FULL-3-d", "INC-4-d", "FULL-5-d", "FULL-7-d"] {
            assert!(read(&format!("{name}.json")).is_none(), "{name}");
            assert!(read(&format!("{name}.partial.json")).is_some(), "{name}");
        }
        assert_eq!(read("FULL-6-d.json"), Some(sealed_text(&known).unwrap()));
        for n in [1, 2, 3, 5, 6, 7] {
            assert!(folder.has(format!("FULL-{n}-d")), "{n}");
        }
    }
}
