//! Putting a new FULL into the place of a chain's beginning.
//!
//! What is to be done is written down first (`.fleecefs/fold.json`), so that whoever writes to the
//! folder next can finish it. All images have manifests by then, so that no state in between
//! depends on the order of names. The steps, each on disk before the next:
//!
//! 1. The new FULL gets its interim name, a FULL of the last merged point's time. Now that state
//!    is there twice, and whatever depends on the last increment may as well depend on the new FULL.
//! 2. What depends on it loses its backing pointer, and names the new FULL in its manifest.
//! 3. The increments go, the newest first: what is left of the old chain is whole at any time.
//! 4. The old FULL's manifest goes, and the new FULL gets its name as well (a second link).
//! 5. What depends on it names it by that name, and gets its pointer back; the interim name goes.
//!
//! A crash leaves every point that is to stay, and no point that is wrong. What depends on the
//! increments is looked up anew each time: a backup may have been added since.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::FileTimes;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::files;
use super::folders::side_folder;
use super::member::Member;
use super::plan::FlattenPlan;
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, FileId, Folder, PlainName, Replace};
use crate::job::Work;
use crate::journal::{FLATTEN, MAX_JOURNAL, check_count};
use crate::layer::Format;
use crate::layout::{Level, name};
use crate::manifest::{Contents, Manifest, fingerprint_of};
use crate::restore::Temp;
use crate::restore::options::target_error;
use crate::restore::temp::{OLD_SUFFIX, give, give_common};
use crate::storage::SourceFile;
use crate::text::path_text;
use crate::{folder, manifest};

/// What is to be done, as it is written down. Images stand by their names: a folder that is moved
/// before the work is finished is finished where it is.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct ReplacePlan {
    full: PlainName,
    interim: PlainName,
    /// Oldest first.
    increments: Vec<PlainName>,
    /// Images whose headers named what goes as their backing file; in the end they name the FULL.
    #[serde(default)]
    linked: BTreeSet<PlainName>,
    raw: bool,
    /// The new FULL's manifest under its last name; `None` if the chain has none.
    manifest: Option<Manifest>,
    /// The old FULL's, put back if nothing came of it.
    #[serde(default)]
    old: Option<Manifest>,
    /// Which files the names stood for; not known to whoever finishes it for another.
    #[serde(skip)]
    known: BTreeMap<PlainName, FileId>,
}

/// What to do about a journal that is none.
const REMEDY: &str = "verify the disk, and remove .fleecefs/fold.json";

fn own_name(path: &Path) -> Result<PlainName> {
    PlainName::new(path.file_name().unwrap_or_default())
        .map_err(|e| target_error(e, "an image has an odd name", path))
}

impl ReplacePlan {
    /// From the plan and the image that was made, which is complete.
    ///
    /// # Errors
    /// A manifest or the new image cannot be read.
    pub(super) fn new(plan: &FlattenPlan, dir: &Folder, made: &Temp, work: &Work) -> Result<Self> {
        let last = plan.increments.last().unwrap_or(&plan.full);
        let old = manifest::read_in(dir, plan.full.name())?;
        let manifest = match manifest::read_in(dir, last.name())? {
            Some(m) => Some(new_manifest(plan, old.as_ref(), m, made, work)?),
            None => None,
        };
        let id = |m: &Member| Ok((own_name(&m.path)?, m.id));
        let known = std::iter::once(&plan.full).chain(&plan.increments).map(id);
        Ok(ReplacePlan {
            full: own_name(&plan.full.path)?,
            interim: own_name(&plan.interim)?,
            increments: plan.increments.iter().map(|m| own_name(&m.path)).collect::<Result<_>>()?,
            linked: BTreeSet::new(),
            raw: plan.full.format == Format::Raw,
            manifest,
            old,
            known: known.collect::<Result<_>>()?,
        })
    }

    /// Fails if it names anything but images: the folder's owner may write there what he likes.
    fn check_names(&self, path: &Path) -> Result<()> {
        let own = [&self.full, &self.interim];
        let mut all = own.into_iter().chain(&self.increments).chain(&self.linked);
        let Some(bad) = all.find(|n| !name::is_image(n.as_os_str())) else { return Ok(()) };
        let bad = name::to_text(bad.as_os_str());
        let what = format!(
            "the journal of a commit names {bad:?}, which is not an image that fleecefs made here"
        );
        Err(Error::new(Kind::Corrupt, what).at_path(path).remedy(REMEDY))
    }

    /// Fails if `name` stands for another file than when the folder was read. Whoever finishes this for
    /// another knows only what the manifests say.
    fn check_same(&self, dir: &Folder, name: &PlainName) -> Result<()> {
        if let Some(id) = self.known.get(name) {
            return files::check_same(dir, name.as_os_str(), *id);
        }
        if self.is_new(dir, name) {
            return Ok(());
        }
        let recorded = match name == &self.full {
            true => self.old.clone(),
            false => manifest::read_in(dir, name.as_os_str())?,
        };
        files::check_recorded(dir, name.as_os_str(), recorded.as_ref())
    }

    /// Removes an image, if it is still the one that was merged.
    fn remove(&self, dir: &Folder, image: &PlainName) -> Result<()> {
        if dir.has(image) {
            self.check_same(dir, image)?;
        }
        files::remove_in(dir, image.as_os_str()).map(drop)
    }

    fn format(&self) -> Format {
        if self.raw { Format::Raw } else { Format::Qcow2 }
    }

    /// Whether `image` is the new FULL, as far as its length and ends tell.
    fn is_new(&self, dir: &Folder, image: &PlainName) -> bool {
        let Some(known) = self.manifest.as_ref().filter(|m| m.fingerprint.is_some()) else {
            // Only its interim name is nobody else's.
            return *image == self.interim && dir.has(image);
        };
        files::is_as_recorded(dir, image.as_os_str(), known).unwrap_or(false)
    }

    /// The manifest for the new FULL under the name `image`.
    fn write_manifest(&self, dir: &Folder, image: &PlainName) -> Result<()> {
        let Some(m) = &self.manifest else { return Ok(()) };
        let image = name::to_text(image.as_os_str());
        manifest::write_in(dir, &Manifest { image, ..m.clone() })
    }

    /// What is not part of this and depends on what goes, by its manifest or its backing pointer.
    ///
    /// # Errors
    /// `Incomplete` if something depends on what cannot be kept for it.
    fn children(&self, dir: &Folder) -> Result<Vec<PlainName>> {
        let last = self.increments.last().unwrap_or(&self.full);
        let mut children = Vec::new();
        for image in files::images(dir)? {
            if image == self.full.as_os_str() || self.going(&image) {
                continue;
            }
            let (parent, pointer) = files::stated_parent(dir, &image);
            let own = own_name(Path::new(&image))?;
            let linked =
                pointer.as_deref().is_some_and(|p| self.going(p)) || self.linked.contains(&own);
            let parent = parent.or(pointer);
            let Some(parent) = parent.filter(|p| self.going(p) || linked) else { continue };
            if self.is_removed(&parent) && parent != last.as_os_str() {
                let text = format!("it depends on {}, which is being merged", path_text(&parent));
                return Err(Error::new(Kind::Incomplete, text)
                    .at_path(dir.join(&image))
                    .remedy("restore it to a file of its own, and remove it"));
            }
            children.push(own);
        }
        Ok(children)
    }

    fn is_removed(&self, image: &OsStr) -> bool {
        self.increments.iter().any(|i| i.as_os_str() == image)
    }

    fn going(&self, image: &OsStr) -> bool {
        self.is_removed(image) || image == self.interim.as_os_str()
    }

    /// Notes which of `children` have a pointer to what goes; whether that is news.
    fn note_linked(&mut self, dir: &Folder, children: &[PlainName]) -> bool {
        let known = self.linked.len();
        for child in children {
            let (_, pointer) = files::stated_parent(dir, child.as_os_str());
            if pointer.is_some_and(|p| self.going(&p)) {
                self.linked.insert(child.clone());
            }
        }
        self.linked.len() > known
    }

    /// Lets everything that depends on it name `base` in its manifest. A backing pointer would say
    /// something else in between, so it goes first, and comes back if this is the end.
    fn adopt(&self, dir: &Folder, base: &PlainName, is_end: bool, work: &Work) -> Result<()> {
        let parent = name::to_text(base.as_os_str());
        for child in self.children(dir)? {
            files::set_backing(&dir.join(&child), None, work)?;
            if let Some(m) = manifest::read_in(dir, child.as_os_str())? {
                manifest::write_in(dir, &Manifest { parent: Some(parent.clone()), ..m })?;
            }
        }
        if !is_end {
            return Ok(());
        }
        for child in self.linked.iter().filter(|c| dir.has(c)).map(|c| dir.join(c)) {
            files::set_backing(&child, Some((&dir.join(base), self.format())), work)?;
        }
        Ok(())
    }
}

/// As the last point's, but a FULL; with a hash if the FULL had one. If something depends on it, its
/// own bitmap is gone, and what a DIFF goes by is what has recorded since the old FULL: that holds
/// more than is needed.
fn new_manifest(
    plan: &FlattenPlan,
    old: Option<&Manifest>,
    last: Manifest,
    made: &Temp,
    work: &Work,
) -> Result<Manifest> {
    let failed = |e| target_error(e, "cannot check it", made.path());
    let meta = made.file().metadata().map_err(failed)?;
    let had_hash = old.map_or(last.blake3.is_some(), |o| o.blake3.is_some());
    let state_of = match plan.increments.last() {
        Some(m) => Some(name::to_text(m.name())),
        // A FULL alone stays what an earlier commit made of it.
        None => last.state_of.clone(),
    };
    let mut m = Manifest {
        image: name::to_text(plan.full.name()),
        level: Level::Full,
        parent: None,
        state_of,
        content: Contents::Full,
        format: old.map_or(last.format, |o| o.format),
        file_size: meta.len(),
        blake3: had_hash.then(|| files::hash_of(made.file(), made.path(), work)).transpose()?,
        fingerprint: Some(fingerprint_of(made.file()).map_err(failed)?),
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
pub(super) fn switch(mut plan: ReplacePlan, dir: &Folder, new: Temp, work: &Work) -> Result<()> {
    plan.known.iter().try_for_each(|(name, id)| files::check_same(dir, name.as_os_str(), *id))?;
    copy_attributes(&plan, dir, &new)?;
    write_journal(&plan, dir)?;
    let made = new.file().metadata();
    let made = FileId::of(&made.map_err(|e| target_error(e, "cannot check it", new.path()))?);
    if !plan.increments.is_empty() {
        plan.known.insert(plan.interim.clone(), made);
        // A journal without the interim file is dropped by `recover`.
        new.publish_in(dir, plan.interim.as_os_str(), Replace::No)?;
    } else {
        plan.known.insert(plan.full.clone(), made);
        // The FULL itself is replaced: till that is done no manifest is better than a wrong one.
        drop_manifest(dir, &plan.full)?;
        new.publish_in(dir, plan.full.as_os_str(), Replace::Yes)?;
    }
    finish(plan, dir, work)
}

/// All steps after the new FULL has got its first name. Each may be done already.
fn finish(mut plan: ReplacePlan, dir: &Folder, work: &Work) -> Result<()> {
    let (full, interim) = (plan.full.clone(), plan.interim.clone());
    if plan.increments.is_empty() {
        plan.check_same(dir, &full)?;
        plan.write_manifest(dir, &full)?;
        return drop_journal(dir);
    }
    // It may have lost its interim name already.
    if dir.has(&interim) {
        plan.check_same(dir, &interim)?;
        plan.write_manifest(dir, &interim)?;
        let children = plan.children(dir)?;
        if plan.note_linked(dir, &children) {
            write_journal(&plan, dir)?;
        }
        plan.adopt(dir, &interim, false, work)?;
        for image in plan.increments.iter().rev() {
            plan.remove(dir, image)?;
            drop_manifest(dir, image)?;
        }
        if !is_same_file(dir, &full, &interim) {
            plan.check_same(dir, &full)?;
            drop_manifest(dir, &full)?;
            take_place(&plan, dir, work)?;
        }
    }
    plan.write_manifest(dir, &full)?;
    plan.adopt(dir, &full, true, work)?;
    plan.remove(dir, &interim)?;
    drop_manifest(dir, &interim)?;
    let gone = plan.increments.iter().chain([&interim]);
    let gone: Vec<&OsStr> = gone.map(PlainName::as_os_str).collect();
    files::lead_links(dir, &gone, Some(full.as_os_str()))?;
    drop_journal(dir)
}

fn is_same_file(dir: &Folder, a: &PlainName, b: &PlainName) -> bool {
    let id = |n: &PlainName| dir.look(n).ok().map(|m| FileId::of(&m));
    id(a).is_some() && id(a) == id(b)
}

/// Owner and mode are those of all that it is made of; the times are the last increment's: qmprestore orders by
/// them.
fn copy_attributes(plan: &ReplacePlan, dir: &Folder, temp: &Temp) -> Result<()> {
    let last = plan.increments.last().unwrap_or(&plan.full);
    let look = |name: &PlainName| {
        dir.look(name).map_err(|e| target_error(e, "cannot check the file", &dir.join(name)))
    };
    let parts: Result<Vec<_>> = plan.increments.iter().chain([&plan.full]).map(look).collect();
    if let Err(e) = give_common(temp.file(), &parts?) {
        let full = path_text(&dir.join(&plan.full));
        log::warn!("{full}: cannot keep mode and owner: {e}");
    }
    let meta = look(last)?;
    let times =
        || Ok(FileTimes::new().set_accessed(meta.accessed()?).set_modified(meta.modified()?));
    times()
        .and_then(|t| folder::set_times(temp.file(), t, temp.path()))
        .map_err(|e| target_error(e, "cannot copy the times", &dir.join(last)))
}

/// Gives the new FULL the old one's name, in one step; until the interim name goes it has both.
fn take_place(plan: &ReplacePlan, dir: &Folder, work: &Work) -> Result<()> {
    let (full, interim) = (&plan.full, &plan.interim);
    let mut second = full.as_os_str().to_os_string();
    second.push(SECOND);
    let side = side_folder(dir)?;
    let failed = |e| target_error(e, "cannot replace the FULL", &dir.join(full));
    side.remove_if_there(&second).map_err(failed)?;
    if dir.link(interim, &side, &second).is_err() {
        // Where there are no links (FAT, some shares) a copy does it, at the price of the space.
        return replace_by_copy(plan, dir, &side, work);
    }
    // As late as can be: somebody may have put another file there.
    plan.check_same(dir, full)?;
    side.rename(&second, dir, full).map_err(failed)?;
    // A link to the same file is not moved by rename: POSIX says it stays.
    side.remove_if_there(&second).map_err(failed)?;
    dir.sync().map_err(failed)
}

fn replace_by_copy(plan: &ReplacePlan, dir: &Folder, side: &Folder, work: &Work) -> Result<()> {
    let path = dir.join(&plan.interim);
    let failed = |e| target_error(e, "cannot copy the new FULL", &path);
    let file = dir.open_file(&plan.interim).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let temp = Temp::create_in(side)?;
    files::copy_from(&SourceFile::of_open(file, path.clone())?, temp.file(), &path, work)?;
    if let Err(e) = give(temp.file(), &meta) {
        log::warn!("{}: cannot keep mode and owner: {e}", path_text(&dir.join(&plan.full)));
    }
    meta.modified().and_then(|t| folder::set_modified(temp.file(), t, &path)).map_err(failed)?;
    plan.check_same(dir, &plan.full)?;
    temp.publish_in(dir, plan.full.as_os_str(), Replace::Yes)
}

/// Ends the new FULL's second name on its way.
const SECOND: &str = ".new";

fn drop_manifest(dir: &Folder, image: &PlainName) -> Result<()> {
    manifest::remove_in(dir, image.as_os_str())
}

fn journal_path(dir: &Folder) -> std::path::PathBuf {
    dir.join(manifest::FOLDER).join(FLATTEN)
}

fn write_journal(plan: &ReplacePlan, dir: &Folder) -> Result<()> {
    let path = journal_path(dir);
    let text = serde_json::to_vec_pretty(plan)
        .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e).at_path(&path))?;
    let written = side_folder(dir)?.write_whole(FLATTEN, &text);
    written.map_err(|e| target_error(e, "cannot write the journal", &path))
}

fn drop_journal(dir: &Folder) -> Result<()> {
    files::remove_in(&side_folder(dir)?, OsStr::new(FLATTEN)).map(drop)
}

/// Finishes what a killed verb left in the folder `dir`. The caller holds the lock.
///
/// # Errors
/// What was met.
pub fn recover(dir: &Folder, work: &Work) -> Result<()> {
    files::restore_headers(dir)?;
    if let Some(plan) = read_journal(dir)? {
        finish_or_drop(plan, dir, work)?;
    }
    sweep(dir)
}

fn read_journal(dir: &Folder) -> Result<Option<ReplacePlan>> {
    let path = journal_path(dir);
    let read = || match folder::absent_is_none(dir.folder(manifest::FOLDER))? {
        Some(side) => side.read_if_there(FLATTEN, MAX_JOURNAL),
        None => Ok(None),
    };
    let text =
        read().map_err(|e| target_error(e, "cannot read the journal", &path).remedy(REMEDY))?;
    let Some(text) = text else { return Ok(None) };
    check_count(&text, &path)?;
    let plan: ReplacePlan = serde_json::from_slice(&text).map_err(|e| {
        let e = Error::new(Kind::Corrupt, "not a journal").with_source(e).at_path(&path);
        e.remedy(REMEDY)
    })?;
    plan.check_names(&path)?;
    Ok(Some(plan))
}

fn finish_or_drop(plan: ReplacePlan, dir: &Folder, work: &Work) -> Result<()> {
    let (full, interim) = (&plan.full, &plan.interim);
    let folded = !plan.increments.is_empty();
    if folded && dir.has(interim) && !plan.is_new(dir, interim) {
        let what = "a commit was interrupted, and this is not the FULL that it made";
        return Err(Error::new(Kind::Corrupt, what)
            .at_path(dir.join(interim))
            .remedy("verify the disk, and remove .fleecefs/fold.json if this file is to stay"));
    }
    if folded && dir.has(interim) || plan.is_new(dir, full) {
        log::warn!("{}: finishing an interrupted commit", path_text(dir.path()));
        return finish(plan, dir, work);
    }
    // It ended before anything was changed but, where the FULL alone is concerned, its manifest.
    if let (false, Some(old)) = (folded, &plan.old) {
        let unchanged = files::is_as_recorded(dir, full.as_os_str(), old).unwrap_or(false);
        if unchanged && manifest::read_in(dir, full.as_os_str())?.is_none() {
            let image = name::to_text(full.as_os_str());
            manifest::write_in(dir, &Manifest { image, ..old.clone() })?;
        }
    }
    drop_journal(dir)
}

/// Removes the unfinished files of a killed run. The lock is held, so nobody writes them.
fn sweep(dir: &Folder) -> Result<()> {
    let Ok(side) = dir.folder(manifest::FOLDER) else { return Ok(()) };
    let Ok(entries) = side.entries() else { return Ok(()) };
    for entry in entries.iter().filter(|e| e.kind == EntryKind::File) {
        let bytes = entry.name.as_bytes();
        let unfinished = bytes.starts_with(b".") && bytes.ends_with(OLD_SUFFIX.as_bytes())
            || bytes.starts_with(folder::TEMPORARY.as_bytes());
        let manifest = bytes.starts_with(manifest::TEMPORARY.as_bytes());
        let header = bytes.ends_with(files::UNFINISHED_HEADER.as_bytes());
        if unfinished || manifest || header || bytes.ends_with(SECOND.as_bytes()) {
            files::remove_in(&side, &entry.name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
