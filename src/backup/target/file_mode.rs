//! With whom a backup directory is shared: what `--mode` and `--group` said last is kept in its folder
//! `.fleecefs`, so that a run that is not told makes no point that those who pull it cannot read.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::folder::{FileMode, Folder};
use crate::text::path_text;
use crate::{folder, manifest};

/// The file's name.
const NAME: &str = "share";
/// Two numbers.
const LARGEST: u64 = 4096;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct StoredFileMode {
    /// As in [`FileMode`]; of `mode` no more counts than that may be given away.
    mode: u32,
    #[serde(default)]
    group: Option<u32>,
}

/// What is `given`, and where that says nothing what was given for `target` before.
///
/// # Errors
/// What was kept cannot be read.
pub(crate) fn with_kept(target: &Path, given: FileMode) -> Result<FileMode> {
    if given.group.is_some() {
        return Ok(given);
    }
    let kept = kept(target)?;
    Ok(match (given.mode, kept) {
        (Some(mode), kept) => FileMode { mode: Some(mode), group: kept.and_then(|k| k.group) },
        (None, Some(kept)) => FileMode { mode: Some(kept.mode), group: kept.group },
        (None, None) => given,
    })
}

/// Keeps it. The lock of `target` is held.
///
/// # Errors
/// What the operating system said.
pub(crate) fn keep(target: &Path, share: FileMode) -> Result<()> {
    let Some(mode) = share.mode else { return Ok(()) };
    let new = StoredFileMode { mode, group: share.group };
    if kept(target)?.as_ref() == Some(&new) {
        return Ok(());
    }
    let path = target.join(manifest::FOLDER).join(NAME);
    let failed = |e| Error::io(e, "cannot keep the --group and --mode").at_path(&path);
    let text = serde_json::to_vec(&new).map_err(|e| failed(e.into()))?;
    let side = Folder::open(&target.join(manifest::FOLDER)).map_err(failed)?;
    side.write_shared(NAME, &text, share).map_err(failed)
}

/// What another user put there decides nothing.
fn kept(target: &Path) -> Result<Option<StoredFileMode>> {
    let path = target.join(manifest::FOLDER).join(NAME);
    let failed = |e| Error::io(e, "cannot read what --mode and --group were").at_path(&path);
    let side = folder::absent_is_none(Folder::open(&target.join(manifest::FOLDER)));
    let Some(side) = side.map_err(failed)? else { return Ok(None) };
    let Some(meta) = folder::absent_is_none(side.look(NAME)).map_err(failed)? else {
        return Ok(None);
    };
    let own = |uid: u32| [0, rustix::process::geteuid().as_raw()].contains(&uid);
    if !meta.is_file() || !own(meta.uid()) || !side.metadata().is_ok_and(|m| own(m.uid())) {
        log::warn!("{}: belongs to another user: ignored", path_text(&path));
        return Ok(None);
    }
    let bytes = side.read_small(NAME, LARGEST).map_err(failed)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "not a valid record of --mode and --group")
            .with_source(e)
            .at_path(&path)
            .remedy("remove it, and give --mode and --group again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_kept_and_a_group_goes_on_with_another_mode() {
        let d = tempfile::tempdir().unwrap();
        let target = d.path().canonicalize().unwrap();
        let share = |mode, group| FileMode { mode, group };
        let none = FileMode::default();
        assert_eq!(with_kept(&target, none).unwrap(), none);
        std::fs::create_dir(target.join(manifest::FOLDER)).unwrap();
        keep(&target, none).unwrap();
        assert_eq!(with_kept(&target, none).unwrap(), none);
        let own = rustix::process::getegid().as_raw();
        keep(&target, share(Some(0o640), Some(own))).unwrap();
        assert_eq!(with_kept(&target, none).unwrap(), share(Some(0o640), Some(own)));
        let given = share(Some(0o660), None);
        assert_eq!(with_kept(&target, given).unwrap(), share(Some(0o660), Some(own)));
        let given = share(Some(0o600), Some(own + 1));
        assert_eq!(with_kept(&target, given).unwrap(), given);
        let file = target.join(manifest::FOLDER).join(NAME);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(with_kept(&target, none).unwrap_err().kind(), Kind::Corrupt);
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert_eq!(with_kept(&target, none).unwrap(), none);
    }
}
