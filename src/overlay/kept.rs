//! Overlays that are kept: what is in a scratch folder, and what may be done with it while no mount has it.
//!
//! Each has three files: `NAME.json` says of which point it is, `NAME.map` which blocks it has, `NAME.data` has them.
//! The first is written last and removed first: without it the others are leftovers. NAME follows from disk and point,
//! so that a point has one.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::budget::Budget;
use super::file::ScratchFile;
use super::one::{Files, Overlay};
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::folder::{EntryKind, Folder, Lock};
use crate::text::to_text;

/// The version of the files that this program writes, and the only one that it reads.
const FORMAT_VERSION: u32 = 2;
/// Names begin with this; whatever else is in the folder is not touched.
const BEGIN: &str = "overlay-";
const DATA: &str = ".data";
const MAP: &str = ".map";
const ABOUT: &str = ".json";
/// The lock of the mount, or of whoever works on the folder.
const LOCK: &str = "overlays.lock";
/// What can be done about an overlay that does not fit.
pub(super) const DROP_IT: &str =
    "'fleecefs scratch list SCRATCH' shows it, 'fleecefs scratch drop' removes it";
/// Two names and some numbers.
const MOST_ABOUT: u64 = 64 << 10;
/// More overlays than anybody keeps: each takes memory.
const MOST: usize = 65_536;

/// Of which point an overlay is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct PointName {
    /// The disk, below the backup directory.
    pub disk: String,
    /// The point, as `list` shows it.
    pub point: String,
}

impl PointName {
    /// Of a disk at this path below the backup directory.
    pub(crate) fn new(disk: &Path, point: &str) -> Self {
        PointName { disk: to_text(disk.as_os_str()), point: point.to_string() }
    }

    /// The beginning of its files' names.
    fn file(&self) -> String {
        let mut hash = blake3::Hasher::new();
        hash.update(self.disk.as_bytes()).update(&[0]).update(self.point.as_bytes());
        let hash = hash.finalize().to_hex();
        format!("{BEGIN}{}", hash.as_str().get(..32).unwrap_or_default())
    }
}

/// What is written down of a kept overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct About {
    /// [`FORMAT_VERSION`].
    format_version: u32,
    /// Of which point it is.
    #[serde(flatten)]
    pub of: PointName,
    /// Bytes of its disk.
    pub size: u64,
    /// What tells the point's contents from others.
    pub identity: String,
    /// The backup directory.
    pub backups: String,
    /// Where the mount showed the point when this was made, if that can be written down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shown: Option<String>,
    /// When it was made, in seconds since the epoch.
    pub made: i64,
}

impl About {
    /// Of a point of `size` bytes in `backups`, which is shown at `shown`.
    pub(crate) fn new(
        of: PointName,
        size: u64,
        identity: String,
        (backups, shown): (&Path, &Path),
    ) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let made = now.ok().and_then(|t| i64::try_from(t.as_secs()).ok()).unwrap_or(0);
        let (backups, shown) = (to_text(backups.as_os_str()), shown.to_str().map(str::to_string));
        About { format_version: FORMAT_VERSION, of, size, identity, backups, shown, made }
    }
}

/// A scratch folder that this process alone works on.
#[derive(Debug)]
pub(crate) struct KeptFolder {
    folder: Arc<Folder>,
    _lock: Lock,
}

impl KeptFolder {
    /// Locks the folder, and removes what was left of overlays that were being made or dropped.
    ///
    /// # Errors
    /// `Busy` if another mount has it; what the operating system said.
    pub(crate) fn lock(folder: Folder) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot lock the scratch folder").at_path(folder.path());
        let Some(lock) = folder.lock(LOCK).map_err(failed)? else {
            return Err(Error::new(Kind::Busy, "another mount has this scratch folder")
                .at_path(folder.path())
                .remedy("unmount it first, or name another folder"));
        };
        let kept = KeptFolder { folder: Arc::new(folder), _lock: lock };
        kept.sweep()?;
        Ok(kept)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    fn sweep(&self) -> Result<()> {
        let known = names(&self.folder, ABOUT)?;
        for end in [DATA, MAP] {
            for name in names(&self.folder, end)?.into_iter().filter(|n| !known.contains(n)) {
                self.remove(&format!("{name}{end}"))?;
            }
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        let failed = |e| Error::io(e, "cannot remove").at_path(self.folder.join(name));
        self.folder.remove_if_there(name).map(drop).map_err(failed)
    }

    /// What is kept here, by disk and point.
    ///
    /// # Errors
    /// One of them cannot be read; `Unsupported` if another version wrote it.
    pub(crate) fn list(&self) -> Result<Vec<About>> {
        list(&self.folder)
    }

    /// Bytes that an overlay takes on disk.
    pub(crate) fn takes(&self, of: &PointName) -> u64 {
        takes(&self.folder, of)
    }

    /// Opens an overlay.
    ///
    /// # Errors
    /// `Corrupt` or `Truncated` if it is damaged; what the operating system said.
    pub(crate) fn open(&self, about: &About, budget: &Arc<Budget>) -> Result<Overlay> {
        let open = |end: &str| {
            let name = format!("{}{end}", about.of.file());
            ScratchFile::open(&self.folder, &name)
                .map_err(|e| Error::io(e, "cannot open").at_path(self.folder.join(&name)))
        };
        let files = Files { data: Arc::new(open(DATA)?), base: 0, map: Some(open(MAP)?) };
        Overlay::resumed(about.size, files, budget)
    }

    /// Makes an empty one; nothing of it is there if that fails.
    ///
    /// # Errors
    /// `Exists` if the point has one already; `NoSpace`; what the operating system said.
    pub(crate) fn create(&self, about: &About, budget: &Arc<Budget>) -> Result<Overlay> {
        let name = about.of.file();
        let json = format!("{name}{ABOUT}");
        if self.folder.has(&json) {
            let text = "there is an overlay already, of other contents of this point";
            let path = self.folder.join(&json);
            return Err(Error::new(Kind::Exists, text).at_path(path).remedy(DROP_IT));
        }
        // What an attempt before this one has left.
        self.remove_all(&name)?;
        self.make_all(about, &name, budget).inspect_err(|_| {
            // Not named by then, or of nothing: it goes now, or with the next mount.
            if let Err(e) = self.remove_all(&name) {
                log::warn!("{}", e.report());
            }
        })
    }

    fn make_all(&self, about: &About, name: &str, budget: &Arc<Budget>) -> Result<Overlay> {
        let (data, map) = (Arc::new(self.make(name, DATA)?), Some(self.make(name, MAP)?));
        failpoint::step("overlay made");
        let overlay = Overlay::new(about.size, Files { data, base: 0, map }, budget)?;
        let json = format!("{name}{ABOUT}");
        let failed = |e| Error::io(e, "cannot make an overlay").at_path(self.folder.join(&json));
        let text = serde_json::to_vec_pretty(about).map_err(|e| failed(e.into()))?;
        let written = self.folder.write_whole(&json, &text).map_err(failed);
        written.inspect_err(|_| overlay.give_up())?;
        failpoint::step("overlay named");
        Ok(overlay)
    }

    fn make(&self, name: &str, end: &str) -> Result<ScratchFile> {
        let name = format!("{name}{end}");
        let failed = |e| Error::io(e, "cannot make an overlay").at_path(self.folder.join(&name));
        ScratchFile::create(&self.folder, &name).map_err(failed)
    }

    /// Removes an overlay, for good.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn drop(&self, of: &PointName) -> Result<()> {
        self.remove_all(&of.file())
    }

    fn remove_all(&self, name: &str) -> Result<()> {
        // Without the first the others are leftovers.
        for end in [ABOUT, MAP, DATA] {
            self.remove(&format!("{name}{end}"))?;
            failpoint::step("overlay dropped");
        }
        Ok(())
    }
}

/// Names of files that begin as an overlay's and end so, without the end.
fn names(folder: &Folder, end: &str) -> Result<Vec<String>> {
    let failed = |e| Error::io(e, "cannot read the scratch folder").at_path(folder.path());
    let files = folder.entries().map_err(failed)?.into_iter().filter(|e| e.kind == EntryKind::File);
    let stem = |name: &OsStr| {
        let name = std::str::from_utf8(name.as_bytes()).ok()?;
        Some(name.strip_suffix(end).filter(|n| n.starts_with(BEGIN))?.to_string())
    };
    Ok(files.filter_map(|e| stem(&e.name)).collect())
}

fn list(folder: &Folder) -> Result<Vec<About>> {
    let names = names(folder, ABOUT)?;
    if names.len() > MOST {
        return Err(Error::new(Kind::Unsupported, "too many overlays").at_path(folder.path()));
    }
    let mut all = names.iter().map(|n| about(folder, n)).collect::<Result<Vec<_>>>()?;
    all.sort_by(|a, b| (&a.of.disk, &a.of.point).cmp(&(&b.of.disk, &b.of.point)));
    Ok(all)
}

fn about(folder: &Folder, name: &str) -> Result<About> {
    let file = format!("{name}{ABOUT}");
    let path = folder.join(&file);
    let bytes = folder.read_small(&file, MOST_ABOUT);
    let bytes = bytes.map_err(|e| Error::io(e, "cannot read").at_path(&path))?;
    let about: About = serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(Kind::Corrupt, "this says of no overlay what it is")
            .with_source(e)
            .at_path(&path)
            .remedy("remove it; what else has its name goes with the next mount")
    })?;
    let fits = about.of.file() == name && i64::try_from(about.size).is_ok();
    match about.format_version == FORMAT_VERSION && fits {
        true => Ok(about),
        false => {
            Err(Error::new(Kind::Unsupported, "an overlay of another kind or version")
                .at_path(&path)
                .remedy("use the version of fleecefs that made it, or remove this file: the overlay goes with it"))
        }
    }
}

/// An overlay and what it takes on disk, in bytes.
#[derive(Debug, Serialize)]
pub(crate) struct Listed {
    /// What it is.
    #[serde(flatten)]
    pub about: About,
    /// Bytes.
    pub takes: u64,
}

/// What is kept in a folder, also while a mount has it.
///
/// # Errors
/// As [`KeptFolder::list`].
pub(crate) fn listed(folder: &Folder) -> Result<Vec<Listed>> {
    let all = list(folder)?.into_iter();
    Ok(all.map(|about| Listed { takes: takes(folder, &about.of), about }).collect())
}

/// Bytes that the files of an overlay take on disk.
fn takes(folder: &Folder, of: &PointName) -> u64 {
    let name = of.file();
    let files = [DATA, MAP].map(|end| folder.look(format!("{name}{end}")));
    files.iter().flatten().map(|m| m.blocks().saturating_mul(512)).sum()
}

/// Whether a folder has overlays that were kept.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn is_used(folder: &Folder) -> Result<bool> {
    Ok(!names(folder, ABOUT)?.is_empty())
}
