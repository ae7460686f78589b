//! The folders that are written to.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::manifest;
use crate::restore::options::target_error;

/// The folder for what is beside the images in `dir`; made if it is not there.
///
/// # Errors
/// What the operating system said; `Unsupported` if it is mounted from elsewhere: what is made there
/// could not be moved to the images.
pub fn side_folder(dir: &Folder) -> Result<Folder> {
    let path = dir.join(manifest::FOLDER);
    let failed = |e| target_error(e, "cannot make the folder", &path);
    let side = dir.make_folder(manifest::FOLDER).map_err(failed)?;
    match side.can_rename_to(dir).map_err(failed)? {
        true => Ok(side),
        false => {
            let what = "this folder is another mount: images made in it cannot be moved to the \
                        others";
            Err(Error::new(Kind::Unsupported, what)
                .at_path(&path)
                .remedy("unmount it, and copy what was in it to the folder below"))
        }
    }
}

/// Opens a folder of images.
///
/// # Errors
/// What the operating system said.
pub fn open_folder(dir: &Path) -> Result<Folder> {
    Folder::open(dir).map_err(|e| target_error(e, "cannot open the folder", dir))
}
