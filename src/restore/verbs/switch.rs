//! Putting a new FULL into the place of a chain's beginning.
//!
//! What is to be done is written down first (`.fleecefs/fold.json`), so that the next verb in the
//! folder can finish it. The steps, each on disk before the next:
//!
//! 1. The new FULL gets its interim name, a FULL of the last folded point's time. Now that state
//!    is there twice, and whatever lies on the last increment may as well lie on the new FULL.
//! 2. What lies on it names the new FULL in its manifest, and loses its backing pointer.
//! 3. The increments go, the newest first: what is left of the old chain is whole at any time.
//! 4. The old FULL's manifest goes, and the new FULL gets its name as well (a second link).
//! 5. What lies on it names it by that name, and gets its pointer back; the interim name goes.
//!
//! A crash leaves every point that is to stay, and no point that is wrong.

use std::ffi::OsString;
use std::fs::{File, FileTimes, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::fold::FoldPlan;
use super::{files, side_folder};
use crate::chain::manifest::{self, Contents, Manifest};
use crate::chain::{Level, name};
use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::restore::temp::{folder_of, sync_folder};
use crate::restore::work::Work;
use crate::restore::{Temp, target_error};

/// The file that says what is being done.
const JOURNAL: &str = "fold.json";

/// What is to be done, as it is written down.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Switch {
    full: PathBuf,
    interim: PathBuf,
    /// Oldest first.
    increments: Vec<PathBuf>,
    children: Vec<Child>,
    raw: bool,
    /// The new FULL's manifest, if its chain has manifests.
    manifest: Option<Manifest>,
}

/// An image that lies on the last increment.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
struct Child {
    path: PathBuf,
    /// Whether it has a backing pointer, which it gets back in the end.
    linked: bool,
}

impl Switch {
    /// From the plan; reads the manifests.
    ///
    /// # Errors
    /// A manifest cannot be read.
    pub fn new(plan: &FoldPlan, _work: &Work) -> Result<Self> {
        let increments: Vec<PathBuf> = plan.increments.iter().map(|m| m.path.clone()).collect();
        let last = increments.last().unwrap_or(&plan.full.path);
        let old = files::manifest_of(&plan.full.path)?;
        let child = |path: &PathBuf| {
            let linked = files::probe(path)?.backing_file.is_some();
            Ok(Child { path: path.clone(), linked })
        };
        let manifest = match files::manifest_of(last)? {
            // As the last point's, but a FULL; with a hash if the FULL had one.
            Some(m) => Some(Manifest {
                level: Level::Full,
                parent: None,
                content: Contents::Full,
                format: old.as_ref().map_or(m.format, |o| o.format),
                blake3: old.as_ref().map_or(m.blake3.clone(), |o| o.blake3.clone()),
                ..m
            }),
            None => None,
        };
        Ok(Switch {
            full: plan.full.path.clone(),
            interim: plan.interim.clone(),
            increments,
            children: plan.children.iter().map(child).collect::<Result<_>>()?,
            raw: plan.full.format == Format::Raw,
            manifest,
        })
    }

    fn format(&self) -> Format {
        if self.raw { Format::Raw } else { Format::Qcow2 }
    }

    /// The manifest for the FULL under the name `image`, with its length and hash.
    fn write_manifest(&self, image: &Path, hash: Option<&str>) -> Result<()> {
        let Some(m) = &self.manifest else { return Ok(()) };
        let meta =
            std::fs::metadata(image).map_err(|e| target_error(e, "cannot look at it", image))?;
        let manifest = Manifest {
            image: name::to_text(image.file_name().unwrap_or_default()),
            file_size: meta.len(),
            blake3: hash.map(str::to_string),
            ..m.clone()
        };
        files::write_manifest(image, &manifest)
    }

    fn hash(&self, image: &Path, work: &Work) -> Result<Option<String>> {
        let wanted = self.manifest.as_ref().is_some_and(|m| m.blake3.is_some());
        wanted.then(|| files::hash(image, work)).transpose()
    }

    /// Lets everything that lies on it name `base` in its manifest. A backing pointer would say
    /// something else in between, so it goes first, and comes back if this is the end.
    fn adopt(&self, base: &Path, is_end: bool, work: &Work) -> Result<()> {
        for child in &self.children {
            files::set_backing(&child.path, None, work)?;
            if let Some(mut m) = files::manifest_of(&child.path)? {
                m.parent = Some(name::to_text(base.file_name().unwrap_or_default()));
                files::write_manifest(&child.path, &m)?;
            }
            if is_end && child.linked {
                files::set_backing(&child.path, Some((base, self.format())), work)?;
            }
        }
        Ok(())
    }
}

/// Does it: with the new FULL as `new`, or, to finish what was begun, without.
///
/// # Errors
/// What was met; the next verb goes on where this one stopped.
pub fn switch(plan: &Switch, new: Option<Temp>, work: &Work) -> Result<()> {
    let journal = side_folder(&plan.full)?.join(JOURNAL);
    if let Some(temp) = new {
        copy_attributes(plan, &temp)?;
        if let (true, Some(m)) = (plan.increments.is_empty(), files::manifest_of(&plan.full)?) {
            // The FULL itself is replaced: till then its hash is not known, rather than wrong.
            files::write_manifest(&plan.full, &Manifest { blake3: None, ..m })?;
        }
        write_journal(&journal, plan)?;
        // A journal without the interim file is dropped by `recover`.
        temp.publish_as(&plan.interim)?;
    }
    if plan.increments.is_empty() {
        // Nothing was taken in: the interim name is the FULL's own.
        let hash = plan.hash(&plan.full, work)?;
        plan.write_manifest(&plan.full, hash.as_deref())?;
        return files::remove(&journal);
    }
    if !plan.interim.exists() {
        return Err(Error::new(Kind::Incomplete, "the new FULL is gone").at_path(&plan.interim));
    }
    let hash = plan.hash(&plan.interim, work)?;
    plan.write_manifest(&plan.interim, hash.as_deref())?;
    plan.adopt(&plan.interim, false, work)?;
    for image in plan.increments.iter().rev() {
        drop_manifest(image)?;
        files::remove(image)?;
    }
    drop_manifest(&plan.full)?;
    take_place(plan)?;
    plan.write_manifest(&plan.full, hash.as_deref())?;
    plan.adopt(&plan.full, true, work)?;
    drop_manifest(&plan.interim)?;
    files::remove(&plan.interim)?;
    files::remove(&journal)
}

/// Owner and mode are the old FULL's; the times are the last increment's: qmprestore orders by
/// them.
fn copy_attributes(plan: &Switch, temp: &Temp) -> Result<()> {
    let last = plan.increments.last().unwrap_or(&plan.full);
    let old = std::fs::metadata(&plan.full)
        .map_err(|e| target_error(e, "cannot look at the file", &plan.full))?;
    let keep = temp
        .file()
        .set_permissions(Permissions::from_mode(old.mode() & 0o777))
        .and_then(|()| std::os::unix::fs::fchown(temp.file(), Some(old.uid()), Some(old.gid())));
    if let Err(e) = keep {
        log::warn!("{}: cannot keep mode and owner: {e}", plan.full.display());
    }
    std::fs::metadata(last)
        .and_then(|m| Ok(FileTimes::new().set_accessed(m.accessed()?).set_modified(m.modified()?)))
        .and_then(|t| temp.file().set_times(t))
        .map_err(|e| target_error(e, "cannot copy the times", last))
}

/// Gives the new FULL the old one's name, in one step; until the interim name goes it has both.
fn take_place(plan: &Switch) -> Result<()> {
    let mut second = OsString::from(plan.full.file_name().unwrap_or_default());
    second.push(".new");
    let second = side_folder(&plan.full)?.join(second);
    let _ = std::fs::remove_file(&second);
    std::fs::hard_link(&plan.interim, &second)
        // Where there are no links (FAT, some shares) a copy does it, at the price of the space.
        .or_else(|_| {
            std::fs::copy(&plan.interim, &second).and_then(|_| File::open(&second)?.sync_all())
        })
        .and_then(|()| std::fs::rename(&second, &plan.full))
        .map_err(|e| target_error(e, "cannot replace the FULL", &plan.full))?;
    // A link to the same file is not moved by rename: POSIX says it stays.
    let _ = std::fs::remove_file(&second);
    sync_folder(&plan.full)
}

fn drop_manifest(image: &Path) -> Result<()> {
    manifest::remove(folder_of(image), image.file_name().unwrap_or_default())
}

fn write_journal(path: &Path, plan: &Switch) -> Result<()> {
    let text = serde_json::to_vec_pretty(plan)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(path))?;
    let temp = Temp::create(path, true)?;
    use std::io::Write;
    temp.file().write_all(&text).map_err(|e| target_error(e, "writing failed", path))?;
    temp.publish()
}

/// Finishes what a killed verb left in the folder of `image`.
///
/// # Errors
/// What was met.
pub fn recover(image: &Path, work: &Work) -> Result<()> {
    files::restore_headers(image)?;
    let folder = folder_of(image);
    let path = folder.join(manifest::FOLDER).join(JOURNAL);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(target_error(e, "cannot read the journal", &path)),
    };
    let plan: Switch = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Kind::Corrupt, "not a journal").with_source(e).at_path(&path))?;
    let inside = |p: &PathBuf| folder_of(p) == folder;
    let children = plan.children.iter().map(|c| &c.path);
    let all = plan.increments.iter().chain(children).chain([&plan.full, &plan.interim]);
    if !all.into_iter().all(inside) {
        return Err(Error::new(Kind::Corrupt, "the journal is of another folder")
            .at_path(&path)
            .remedy("remove it if the folder was moved before the work was finished"));
    }
    if plan.increments.is_empty() || !plan.interim.exists() {
        // It ended before anything was changed, or after all was.
        return files::remove(&path);
    }
    log::warn!("{}: finishing what a killed run had begun", folder.display());
    switch(&plan, None, work)
}
