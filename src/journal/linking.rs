//! A `link-disk` that is at work, or was interrupted: `.fleecefs/link-disk.journal` in the folders of both
//! disks, from before the first file gets its second name until the last old one is gone.
//!
//! A manifest whose image is yet to come is listed here, and is no lost point.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::Folder;
use crate::manifest::FOLDER;

/// The journal's name, in the folder for manifests.
pub(crate) const NAME: &str = "link-disk.journal";

/// What is being done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Linking {
    /// The disk's old name, as `list` showed it.
    pub old: String,
    /// Its new name.
    pub new: String,
    /// The names that the old images get.
    pub arriving: Vec<String>,
    /// What the user said of disks of different VMs.
    #[serde(default)]
    pub other_vm: bool,
    /// What he said of other sizes and devices.
    #[serde(default)]
    pub force: bool,
    /// All of them have arrived: an image that is not there now is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub arrived: bool,
}

/// What to do about one that cannot be finished. No command with the names that the journal says: its
/// owner may write there what he likes.
pub(crate) const REMEDY: &str = "run the same 'fleecefs link-disk' again, or remove the journal: \
                                 points may then be listed twice, none is lost";

/// Bytes of a disk's name in a journal.
const MAX_NAME: usize = 4096;
/// Bytes of a journal, and names in it: more images than a disk has. Each journal in a directory, and its owner
/// may put there as many as he likes, is read by whoever lists it.
const MAX_BYTES: u64 = 1 << 20;
const MAX_NAMES: usize = 25_000;

impl Linking {
    /// Whether both are of one call. (What has arrived already is not the same at all times.)
    pub(crate) fn is_of(&self, other: &Linking) -> bool {
        let said = |l: &Linking| (l.old.clone(), l.new.clone(), l.other_vm, l.force);
        said(self) == said(other)
    }

    /// What both disks may be called where one of them is called `path`: the old name, and the new one.
    /// Where a backup directory is read from a folder further up or down than it was then, or is a copy of
    /// that, the folders above both have other names.
    pub(crate) fn pairs(&self, path: &Path) -> Vec<(PathBuf, PathBuf)> {
        let Some((old, new)) = self.ends() else { return Vec::new() };
        let above = [&new, &old].into_iter().filter_map(|end| without_end(path, end));
        above.map(|above| (above.join(&old), above.join(&new))).collect()
    }

    /// Where the folder of the disk with the old name may be, if that with the new one is in `dir`: the
    /// folder above both, and it. Nothing is looked at.
    pub(crate) fn old_folders(&self, dir: &Path) -> Vec<(PathBuf, PathBuf)> {
        self.ends().map(|(old, new)| others(dir, &new, &old)).unwrap_or_default()
    }

    /// The folder of the disk with the new name, which has this journal too, if that with the old one is in
    /// `dir`.
    pub(crate) fn new_folder(&self, dir: &Path) -> Option<Folder> {
        let (old, new) = self.ends()?;
        let found = others(dir, &old, &new).into_iter();
        let mut open = found.filter_map(|(_, path)| Folder::open(&path).ok());
        open.find(|f| matches!(read_in(f), Ok(Some(l)) if l.is_of(self)))
    }

    /// Both names without what they begin with in common; `None` where they cannot be names of two disks.
    fn ends(&self) -> Option<(PathBuf, PathBuf)> {
        let (old, new) = (parts(&self.old)?, parts(&self.new)?);
        let most = old.len().min(new.len()).checked_sub(1)?;
        let common = old.iter().zip(&new).take(most).take_while(|(o, n)| o == n).count();
        let end = |all: &[Component<'_>]| all.iter().skip(common).collect::<PathBuf>();
        (old != new).then(|| (end(&old), end(&new)))
    }
}

/// The parts of a name; `None` if it leads up, or is none.
fn parts(name: &str) -> Option<Vec<Component<'_>>> {
    let parts: Vec<_> = Path::new(name).components().collect();
    let plain = parts.iter().all(|p| matches!(p, Component::Normal(_)));
    (plain && !parts.is_empty()).then_some(parts)
}

/// What of `path` comes before `end`.
fn without_end(path: &Path, end: &Path) -> Option<PathBuf> {
    let above = path.components().count().checked_sub(end.components().count())?;
    path.ends_with(end).then(|| path.components().take(above).collect())
}

/// Where the folder of the disk `to` may be, if that of the disk `from` is `dir`, and the folder above
/// both. A disk is called after its folder, or, where several are in one, that and the end of its images'
/// names.
fn others(dir: &Path, from: &Path, to: &Path) -> Vec<(PathBuf, PathBuf)> {
    let of = |name: &Path| [Some(name.to_path_buf()), name.parent().map(Path::to_path_buf)];
    let above = of(from).into_iter().flatten().filter_map(|end| without_end(dir, &end));
    let with = |above: PathBuf| {
        let ends = of(to).into_iter().flatten();
        ends.map(|end| (above.clone(), above.join(end))).collect::<Vec<_>>()
    };
    above.flat_map(with).collect()
}

/// Where the journal of `dir` is.
pub(crate) fn journal_path(dir: &Path) -> PathBuf {
    dir.join(FOLDER).join(NAME)
}

/// Reads the journal of `dir`; `None` if there is none.
///
/// # Errors
/// It cannot be read, or is damaged: a half-written one never gets its name.
pub(crate) fn read_in(dir: &Folder) -> Result<Option<Linking>> {
    let failed = |e| Error::io(e, "cannot read the journal").at_path(journal_path(dir.path()));
    match folder::absent_is_none(dir.folder(FOLDER)).map_err(failed)? {
        Some(side) => read_side(&side),
        None => Ok(None),
    }
}

/// As [`read_in`], in the folder for manifests.
pub(crate) fn read_side(side: &Folder) -> Result<Option<Linking>> {
    let path = || side.join(NAME);
    let failed = |e| Error::io(e, "cannot read the journal").at_path(path());
    let Some(bytes) = side.read_if_there(NAME, MAX_BYTES).map_err(failed)? else {
        return Ok(None);
    };
    let damaged = || {
        Error::new(Kind::Corrupt, "the journal of a link-disk is damaged")
            .at_path(path())
            .remedy("remove the journal, and run the same 'fleecefs link-disk' again")
    };
    if !fits(&bytes) {
        return Err(damaged());
    }
    let linking: Linking = serde_json::from_slice(&bytes).map_err(|e| damaged().with_source(e))?;
    match linking.old.len().max(linking.new.len()) > MAX_NAME {
        true => Err(damaged()),
        false => Ok(Some(linking)),
    }
}

/// Whether a journal has no more values than any of ours.
fn fits(journal: &[u8]) -> bool {
    journal.iter().filter(|b| **b == b',').count() <= MAX_NAMES
}

/// The images beside `side` that are on their way in.
pub(crate) fn arriving(side: &Folder) -> Vec<String> {
    let linking = read_side(side).ok().flatten().filter(|l| !l.arrived);
    linking.map(|l| l.arriving).unwrap_or_default()
}

/// Writes the journal of `dir`, so that it survives a power cut.
///
/// # Errors
/// What the operating system said; `Unsupported` if it would not be read again.
pub(crate) fn write_in(dir: &Folder, linking: &Linking) -> Result<()> {
    let path = journal_path(dir.path());
    let text = serde_json::to_vec_pretty(linking)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    if text.len() as u64 > MAX_BYTES || !fits(&text) {
        let what = "the disk has more points than fit into a journal";
        return Err(Error::new(Kind::Unsupported, what).at_path(&path).remedy("prune it first"));
    }
    dir.make_folder(FOLDER)
        .and_then(|side| side.write_whole(NAME, &text))
        .map_err(|e| Error::io(e, "cannot write the journal").at_path(&path))
}

/// Fails while a link of the images in `dir` is unfinished: what alters a chain would alter one of the two.
///
/// # Errors
/// `Incomplete`; the journal cannot be read.
pub(crate) fn refuse(dir: &Path) -> Result<()> {
    let open = folder::absent_is_none(Folder::open(dir));
    let Some(folder) = open.map_err(|e| Error::io(e, "cannot open the folder").at_path(dir))?
    else {
        return Ok(());
    };
    match read_in(&folder)? {
        None => Ok(()),
        Some(_) => Err(Error::new(Kind::Incomplete, "a link-disk was interrupted here")
            .at_path(journal_path(dir))
            .remedy(REMEDY)),
    }
}

/// Removes the journal of `dir`, if there is one.
///
/// # Errors
/// What the operating system said.
pub(crate) fn clear_in(dir: &Folder) -> Result<()> {
    let clear = || match folder::absent_is_none(dir.folder(FOLDER))? {
        Some(side) if side.remove_if_there(NAME)? => side.sync(),
        _ => Ok(()),
    };
    clear().map_err(|e| Error::io(e, "cannot remove the journal").at_path(journal_path(dir.path())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linking(old: &str, new: &str) -> Linking {
        Linking { old: old.into(), new: new.into(), ..Linking::default() }
    }

    #[test]
    fn the_pair_is_found_from_any_folder_above_both() {
        let pair = |old: &str, new: &str, path: &str| {
            let pairs = linking(old, new).pairs(Path::new(path)).into_iter();
            let text = |p: PathBuf| p.to_str().unwrap().to_string();
            pairs.map(|(o, n)| format!("{} {}", text(o), text(n))).collect::<Vec<_>>()
        };
        for path in ["new", "old"] {
            assert_eq!(pair("old", "new", path), ["old new"]);
            assert_eq!(pair("vm/old", "vm/new", path), ["old new"]);
            assert_eq!(pair("old", "new", &format!("a/b/{path}")), ["a/b/old a/b/new"]);
            assert_eq!(pair("vm/old", "vm/new", &format!("copy/{path}")), ["copy/old copy/new"]);
        }
        assert_eq!(pair("a/sda", "b/sda", "x/b/sda"), ["x/a/sda x/b/sda"]);
        assert_eq!(pair("a", "a/b", "x/a/b"), ["x/a x/a/b"]);
        for (old, new) in [("../old", "new"), ("/old", "new"), ("", "new"), ("new", "new")] {
            assert!(pair(old, new, "new").is_empty(), "{old} {new}");
        }
        assert!(pair("old", "new", "other").is_empty());
    }

    #[test]
    fn a_journal_of_more_names_than_any_of_ours_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().canonicalize().unwrap()).unwrap();
        let with = |count: usize, name: &str| Linking {
            arriving: vec![name.into(); count],
            ..linking("old", "new")
        };
        let most = with(MAX_NAMES - 10, "INC-1700000000-disk.qcow2");
        write_in(&folder, &most).unwrap();
        assert!(read_in(&folder).unwrap().is_some_and(|l| l == most));
        for (count, name) in [(MAX_NAMES + 1, "a"), (5_000, &*"x".repeat(250))] {
            let many = with(count, name);
            assert_eq!(write_in(&folder, &many).unwrap_err().kind(), Kind::Unsupported);
            let text = serde_json::to_vec(&many).unwrap();
            std::fs::write(journal_path(folder.path()), text).unwrap();
            assert!(read_in(&folder).is_err(), "{count}");
            assert!(arriving(&folder.folder(FOLDER).unwrap()).is_empty());
        }
    }

    #[test]
    fn the_other_folder_is_beside_it_or_the_same() {
        let paths = |l: Linking, dir: &str| {
            let all = l.old_folders(Path::new(dir)).into_iter();
            all.map(|(_, p)| p.to_str().unwrap().trim_end_matches('/').to_string())
                .collect::<Vec<_>>()
        };
        assert!(paths(linking("vm/old", "vm/new"), "/b/new").contains(&"/b/old".into()));
        assert!(paths(linking("old.raw", "new.raw"), "/b").contains(&"/b".into()));
        assert!(paths(linking("a/old", "b/new"), "/x/b/new").contains(&"/x/a/old".into()));
    }

    #[test]
    fn a_journal_is_of_one_link_and_of_names_that_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        for name in ["old", "new"] {
            std::fs::create_dir(top.join(name)).unwrap();
        }
        let new = Folder::open(&top.join("new")).unwrap();
        let ours = linking("old", "new");
        assert!(ours.new_folder(&top.join("old")).is_none());
        refuse(&top.join("new")).unwrap();
        for (there, is_ours) in [(linking("other", "new"), false), (ours.clone(), true)] {
            write_in(&new, &there).unwrap();
            assert_eq!(ours.new_folder(&top.join("old")).is_some(), is_ours);
            assert_eq!(refuse(&top.join("new")).unwrap_err().kind(), Kind::Incomplete);
        }
        write_in(&new, &linking(&"x".repeat(MAX_NAME + 1), "new")).unwrap();
        assert_eq!(read_in(&new).unwrap_err().kind(), Kind::Corrupt);
    }
}
