//! Putting a new FULL into the place of a chain's beginning.
//!
//! What is to be done is written down first (`.fleecefs/fold.json`), so that whoever writes to the
//! folder next can finish it. All images have manifests by then, so that no state in between
//! depends on the order of names. The steps, each on disk before the next:
//!
//! 1. The new FULL gets its interim name, a FULL of the last folded point's time. Now that state
//!    is there twice, and whatever lies on the last increment may as well lie on the new FULL.
//! 2. What lies on it loses its backing pointer, and names the new FULL in its manifest.
//! 3. The increments go, the newest first: what is left of the old chain is whole at any time.
//! 4. The old FULL's manifest goes, and the new FULL gets its name as well (a second link).
//! 5. What lies on it names it by that name, and gets its pointer back; the interim name goes.
//!
//! A crash leaves every point that is to stay, and no point that is wrong. What lies on the
//! increments is looked up anew each time: a backup may have been added since.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::fold::FoldPlan;
use super::{files, side_folder};
use crate::chain::manifest::{self, Contents, Manifest, fingerprint};
use crate::chain::unfinished::FOLD;
use crate::chain::{Level, name};
use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::restore::temp::{folder_of, sync_folder};
use crate::restore::work::Work;
use crate::restore::{Temp, target_error};
use crate::text::path_text;

/// What is to be done, as it is written down. Images stand by their names: a folder that is moved
/// before the work is finished is finished where it is.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Switch {
    full: PathBuf,
    interim: PathBuf,
    /// Oldest first.
    increments: Vec<PathBuf>,
    /// Images whose headers named what goes as their backing file; in the end they name the FULL.
    #[serde(default)]
    linked: BTreeSet<PathBuf>,
    raw: bool,
    /// The new FULL's manifest under its last name; `None` if the chain has none.
    manifest: Option<Manifest>,
    /// The old FULL's, put back if nothing came of it.
    #[serde(default)]
    old: Option<Manifest>,
}

fn own_name(path: &Path) -> PathBuf {
    path.file_name().unwrap_or_default().into()
}

impl Switch {
    /// From the plan and the image that was made, which is complete.
    ///
    /// # Errors
    /// A manifest or the new image cannot be read.
    pub fn new(plan: &FoldPlan, made: &Path, work: &Work) -> Result<Self> {
        let last = plan.increments.last().unwrap_or(&plan.full);
        let old = files::manifest_of(&plan.full.path)?;
        let manifest = match files::manifest_of(&last.path)? {
            Some(m) => Some(new_manifest(plan, old.as_ref(), m, made, work)?),
            None => None,
        };
        Ok(Switch {
            full: own_name(&plan.full.path),
            interim: own_name(&plan.interim),
            increments: plan.increments.iter().map(|m| own_name(&m.path)).collect(),
            linked: BTreeSet::new(),
            raw: plan.full.format == Format::Raw,
            manifest,
            old,
        })
    }

    fn format(&self) -> Format {
        if self.raw { Format::Raw } else { Format::Qcow2 }
    }

    /// Whether `image` is the new FULL, as far as its length and ends tell.
    fn is_new(&self, image: &Path) -> bool {
        let Some(known) = self.manifest.as_ref().filter(|m| m.fingerprint.is_some()) else {
            // Only its interim name is nobody else's.
            return image.file_name() == Some(self.interim.as_os_str()) && image.exists();
        };
        let len = std::fs::metadata(image).map_or(0, |m| m.len());
        len == known.file_size && fingerprint(image).ok() == known.fingerprint
    }

    /// The manifest for the new FULL under the name `image`.
    fn write_manifest(&self, image: &Path) -> Result<()> {
        let Some(m) = &self.manifest else { return Ok(()) };
        let image_name = name::to_text(image.file_name().unwrap_or_default());
        files::write_manifest(image, &Manifest { image: image_name, ..m.clone() })
    }

    /// What is not part of this and lies on what goes, by its manifest or its backing pointer.
    ///
    /// # Errors
    /// `Incomplete` if something lies on what cannot be kept for it.
    fn children(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let own = |n: &Path| n == self.full || n == self.interim || self.goes(n);
        let last = self.increments.last().unwrap_or(&self.full);
        let mut children = Vec::new();
        for image in files::images(dir)?.into_iter().map(PathBuf::from).filter(|n| !own(n)) {
            let (parent, pointer) = files::stated_parent(&dir.join(&image));
            let linked = pointer.as_deref().is_some_and(|p| self.going(Path::new(p)))
                || self.linked.contains(&image);
            let parent = parent.or(pointer).map(PathBuf::from);
            let Some(parent) = parent.filter(|p| self.going(p) || linked) else { continue };
            if self.goes(&parent) && parent != *last {
                let text = format!("it lies on {}, which is being folded", path_text(&parent));
                return Err(Error::new(Kind::Incomplete, text)
                    .at_path(dir.join(&image))
                    .remedy("restore it to a file of its own, and remove it"));
            }
            children.push(image);
        }
        Ok(children)
    }

    fn goes(&self, image: &Path) -> bool {
        self.increments.iter().any(|i| i == image)
    }

    fn going(&self, image: &Path) -> bool {
        self.goes(image) || image == self.interim
    }

    /// Notes which of `children` have a pointer to what goes; whether that is news.
    fn note_linked(&mut self, dir: &Path, children: &[PathBuf]) -> bool {
        let known = self.linked.len();
        for child in children {
            let (_, pointer) = files::stated_parent(&dir.join(child));
            if pointer.is_some_and(|p| self.going(Path::new(&p))) {
                self.linked.insert(child.clone());
            }
        }
        self.linked.len() > known
    }

    /// Lets everything that lies on it name `base` in its manifest. A backing pointer would say
    /// something else in between, so it goes first, and comes back if this is the end.
    fn adopt(&self, dir: &Path, base: &Path, is_end: bool, work: &Work) -> Result<()> {
        let parent = name::to_text(base.as_os_str());
        for child in self.children(dir)? {
            let path = dir.join(&child);
            files::set_backing(&path, None, work)?;
            if let Some(m) = files::manifest_of(&path)? {
                files::write_manifest(&path, &Manifest { parent: Some(parent.clone()), ..m })?;
            }
        }
        if !is_end {
            return Ok(());
        }
        for child in self.linked.iter().map(|c| dir.join(c)).filter(|c| c.exists()) {
            files::set_backing(&child, Some((&dir.join(base), self.format())), work)?;
        }
        Ok(())
    }
}

/// As the last point's, but a FULL; with a hash if the FULL had one. If something lies on it, its
/// own bitmap is gone, and what a DIFF goes by is what has recorded since the old FULL: that holds
/// more than is needed.
fn new_manifest(
    plan: &FoldPlan,
    old: Option<&Manifest>,
    last: Manifest,
    made: &Path,
    work: &Work,
) -> Result<Manifest> {
    let meta = std::fs::metadata(made).map_err(|e| target_error(e, "cannot look at it", made))?;
    let had_hash = old.map_or(last.blake3.is_some(), |o| o.blake3.is_some());
    let state_of = match plan.increments.last() {
        Some(m) => Some(name::to_text(own_name(&m.path).as_os_str())),
        // A FULL alone stays what an earlier commit made of it.
        None => last.state_of.clone(),
    };
    let mut m = Manifest {
        image: name::to_text(own_name(&plan.full.path).as_os_str()),
        level: Level::Full,
        parent: None,
        state_of,
        content: Contents::Full,
        format: old.map_or(last.format, |o| o.format),
        file_size: meta.len(),
        blake3: had_hash.then(|| files::hash(made, work)).transpose()?,
        fingerprint: Some(fingerprint(made)?),
        ..last
    };
    if !plan.children.is_empty() && !plan.increments.is_empty() {
        m.bitmap = old.and_then(|o| o.bitmap.clone());
        m.diff_bitmap = old.and_then(|o| o.diff_bitmap.clone());
    }
    Ok(m)
}

/// Does it, in the folder `dir`, with `new`, the new FULL.
///
/// # Errors
/// What was met; whoever writes to the folder next goes on where this one stopped.
pub fn switch(plan: Switch, dir: &Path, new: Temp, work: &Work) -> Result<()> {
    copy_attributes(&plan, dir, &new)?;
    write_journal(&plan, dir)?;
    if !plan.increments.is_empty() {
        // A journal without the interim file is dropped by `recover`.
        new.publish_as_new(&dir.join(&plan.interim))?;
    } else {
        // The FULL itself is replaced: till that is done no manifest is better than a wrong one.
        drop_manifest(&dir.join(&plan.full))?;
        new.publish_as(&dir.join(&plan.full))?;
    }
    finish(plan, dir, work)
}

/// All steps after the new FULL has got its first name. Each may be done already.
fn finish(mut plan: Switch, dir: &Path, work: &Work) -> Result<()> {
    let (full, interim) = (dir.join(&plan.full), dir.join(&plan.interim));
    if !plan.increments.is_empty() {
        // It may have lost its interim name already.
        if interim.exists() {
            plan.write_manifest(&interim)?;
            let children = plan.children(dir)?;
            if plan.note_linked(dir, &children) {
                write_journal(&plan, dir)?;
            }
            plan.adopt(dir, &plan.interim, false, work)?;
            for image in plan.increments.iter().rev().map(|i| dir.join(i)) {
                files::remove(&image)?;
                drop_manifest(&image)?;
            }
            if !is_same_file(&full, &interim) {
                drop_manifest(&full)?;
                take_place(&plan, dir)?;
            }
        }
        plan.write_manifest(&full)?;
        plan.adopt(dir, &plan.full, true, work)?;
        files::remove(&interim)?;
        drop_manifest(&interim)?;
        let gone = plan.increments.iter().chain([&plan.interim]);
        let gone: Vec<&OsStr> = gone.map(|p| p.as_os_str()).collect();
        files::lead_links(dir, &gone, Some(plan.full.as_os_str()))?;
    } else {
        plan.write_manifest(&full)?;
    }
    files::remove(&dir.join(manifest::FOLDER).join(FOLD))
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    let id = |p: &Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    id(a).is_some() && id(a) == id(b)
}

/// Owner and mode are the old FULL's; the times are the last increment's: qmprestore orders by
/// them.
fn copy_attributes(plan: &Switch, dir: &Path, temp: &Temp) -> Result<()> {
    let full = dir.join(&plan.full);
    let last = dir.join(plan.increments.last().unwrap_or(&plan.full));
    let old =
        std::fs::metadata(&full).map_err(|e| target_error(e, "cannot look at the file", &full))?;
    let keep = temp
        .file()
        .set_permissions(Permissions::from_mode(old.mode() & 0o777))
        .and_then(|()| std::os::unix::fs::fchown(temp.file(), Some(old.uid()), Some(old.gid())));
    if let Err(e) = keep {
        log::warn!("{}: cannot keep mode and owner: {e}", path_text(&full));
    }
    std::fs::metadata(&last)
        .and_then(|m| Ok(FileTimes::new().set_accessed(m.accessed()?).set_modified(m.modified()?)))
        .and_then(|t| temp.file().set_times(t))
        .map_err(|e| target_error(e, "cannot copy the times", &last))
}

/// Gives the new FULL the old one's name, in one step; until the interim name goes it has both.
fn take_place(plan: &Switch, dir: &Path) -> Result<()> {
    let (full, interim) = (dir.join(&plan.full), dir.join(&plan.interim));
    let mut second = OsString::from(&plan.full);
    second.push(SECOND);
    let second = side_folder(dir)?.join(second);
    let _ = std::fs::remove_file(&second);
    std::fs::hard_link(&interim, &second)
        // Where there are no links (FAT, some shares) a copy does it, at the price of the space.
        .or_else(|_| std::fs::copy(&interim, &second).and_then(|_| File::open(&second)?.sync_all()))
        .and_then(|()| std::fs::rename(&second, &full))
        .map_err(|e| target_error(e, "cannot replace the FULL", &full))?;
    // A link to the same file is not moved by rename: POSIX says it stays.
    let _ = std::fs::remove_file(&second);
    sync_folder(&full)
}

/// Ends the new FULL's second name on its way.
const SECOND: &str = ".new";

fn drop_manifest(image: &Path) -> Result<()> {
    manifest::remove(folder_of(image), image.file_name().unwrap_or_default())
}

fn write_journal(plan: &Switch, dir: &Path) -> Result<()> {
    let path = side_folder(dir)?.join(FOLD);
    let text = serde_json::to_vec_pretty(plan)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    let temp = Temp::create(&path, true)?;
    use std::io::Write;
    temp.file().write_all(&text).map_err(|e| target_error(e, "writing failed", &path))?;
    temp.publish()
}

/// Finishes what a killed verb left in the folder `dir`. The caller holds the lock.
///
/// # Errors
/// What was met.
pub fn recover(dir: &Path, work: &Work) -> Result<()> {
    files::restore_headers(dir)?;
    if let Some(plan) = read_journal(dir)? {
        finish_or_drop(plan, dir, work)?;
    }
    sweep(dir)
}

fn read_journal(dir: &Path) -> Result<Option<Switch>> {
    let path = dir.join(manifest::FOLDER).join(FOLD);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(target_error(e, "cannot read the journal", &path)),
    };
    let mut plan: Switch = serde_json::from_slice(&text)
        .map_err(|e| Error::new(Kind::Corrupt, "not a journal").with_source(e).at_path(&path))?;
    // Names only, whatever is written there: nothing outside the folder is touched.
    plan.full = own_name(&plan.full);
    plan.interim = own_name(&plan.interim);
    plan.increments = plan.increments.iter().map(|p| own_name(p)).collect();
    plan.linked = plan.linked.iter().map(|p| own_name(p)).collect();
    Ok(Some(plan))
}

fn finish_or_drop(plan: Switch, dir: &Path, work: &Work) -> Result<()> {
    let (full, interim) = (dir.join(&plan.full), dir.join(&plan.interim));
    let folded = !plan.increments.is_empty();
    if folded && interim.exists() && !plan.is_new(&interim) {
        let what = "a fold was broken off, and this is not the FULL that it made";
        return Err(Error::new(Kind::Corrupt, what)
            .at_path(interim)
            .remedy("verify the disk, and remove .fleecefs/fold.json if this file is to stay"));
    }
    if folded && interim.exists() || plan.is_new(&full) {
        log::warn!("{}: finishing what a killed run had begun", path_text(&dir));
        return finish(plan, dir, work);
    }
    // It ended before anything was changed but, where the FULL alone is concerned, its manifest.
    if let (false, Some(old)) = (folded, &plan.old) {
        let same_ends = || fingerprint(&full).ok() == old.fingerprint;
        let unchanged = std::fs::metadata(&full).is_ok_and(|m| m.len() == old.file_size)
            && (old.fingerprint.is_none() || same_ends());
        if unchanged && files::manifest_of(&full)?.is_none() {
            files::write_manifest(&full, old)?;
        }
    }
    files::remove(&dir.join(manifest::FOLDER).join(FOLD))
}

/// Removes the unfinished files of a killed run. The lock is held, so nobody writes them.
fn sweep(dir: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(dir.join(manifest::FOLDER)) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let bytes = name.as_bytes();
        let unfinished = bytes.starts_with(b".") && bytes.ends_with(b".fleecefs-partial");
        let manifest = bytes.starts_with(manifest::TEMPORARY.as_bytes());
        let header = bytes.ends_with(files::UNFINISHED_HEADER.as_bytes());
        if unfinished || manifest || header || bytes.ends_with(SECOND.as_bytes()) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}
