//! [`Overlays`]: those of a mount, by point.
//!
//! State: a [`Slot`] for each point that was opened, which all who have it open share; its overlay, once somebody
//! wants to write; the overlays that were kept in the scratch folder, all of them from the beginning on, since they
//! count against the limit. A slot is of one generation of its point: what was written over one is never shown over
//! another. The locks here are for opening; reads and writes go to the slot that they were opened with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::Serialize;

use super::budget::Budget;
use super::kept::{About, DROP_IT, KeptFolder, PointName};
use super::one::{Files, Overlay};
use crate::error::{Error, Finding, Kind, Result};
use crate::folder::{self, Folder, Temp};
use crate::image::Image;
use crate::text::path_text;

/// Findings that are told.
const MOST_FINDINGS: usize = 256;

/// Where overlays go.
#[derive(Debug)]
pub struct Scratch {
    /// The folder.
    pub folder: Folder,
    /// Whether they outlive the mount.
    pub keep: bool,
    /// Bytes that all of them may take.
    pub limit: u64,
    /// Whether the user has named the folder: then it may have overlays that were kept.
    pub named: bool,
}

/// A point that is open, and its overlay once there is one.
#[derive(Debug)]
pub(crate) struct Slot {
    of: PointName,
    image: Weak<Image>,
    overlay: OnceLock<Arc<Overlay>>,
}

impl Scratch {
    /// Another handle of the same.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn try_clone(&self) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot use the scratch folder").at_path(self.folder.path());
        let folder = self.folder.try_clone().map_err(failed)?;
        Ok(Scratch { folder, keep: self.keep, limit: self.limit, named: self.named })
    }
}

impl Slot {
    /// The overlay, if anything may have been written.
    pub(crate) fn overlay(&self) -> Option<&Overlay> {
        self.overlay.get().map(|o| &**o)
    }

    fn is_of(&self, image: &Arc<Image>) -> bool {
        Weak::as_ptr(&self.image) == Arc::as_ptr(image)
    }
}

/// A point, and the address of its image, which is no other's while the slot is there.
type SlotKey = (PointName, usize);

fn key(of: &PointName, image: &Arc<Image>) -> SlotKey {
    (of.clone(), Arc::as_ptr(image) as usize)
}

/// An overlay as `status.json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Told {
    /// Of which point it is.
    #[serde(flatten)]
    of: PointName,
    /// Bytes that were written and are held.
    bytes: u64,
    /// Whether it outlives the mount.
    kept: bool,
}

struct KeptOverlay {
    about: About,
    overlay: Arc<Overlay>,
}

/// The overlays of a mount.
pub struct Overlays {
    folder: Folder,
    /// The backup directory and the mount point, for what is written down of an overlay.
    backups: PathBuf,
    mountpoint: PathBuf,
    budget: Arc<Budget>,
    kept_folder: Option<KeptFolder>,
    kept: Mutex<HashMap<PointName, KeptOverlay>>,
    /// By point, and by the image of its generation: each has one as long as anybody has it open.
    slots: Mutex<HashMap<SlotKey, Arc<Slot>>>,
    /// Held while an overlay is made.
    making: Mutex<()>,
    findings: Mutex<Vec<Finding>>,
}

impl Overlays {
    /// Those of a mount of `backups` at `mountpoint`. Reads what is kept in the folder; removes what a mount that was
    /// killed has left there, and was not to be kept.
    ///
    /// # Errors
    /// `Busy` if another mount has the folder; `Exists` if it has overlays that are kept and `keep` is not wanted; one
    /// of them cannot be read.
    pub fn new(scratch: Scratch, backups: &Path, mountpoint: &Path) -> Result<Self> {
        let Scratch { folder, keep, limit, named } = scratch;
        let failed = |e| Error::io(e, "cannot use the scratch folder").at_path(folder.path());
        folder::sweep(&folder, &[]).map_err(failed)?;
        let budget = Arc::new(Budget::new(limit));
        let mut kept = HashMap::new();
        let kept_folder = match keep {
            false => {
                // A folder for temporary files is everybody's: what is in there is no matter of ours.
                if named {
                    check_nothing_kept(&folder)?;
                }
                None
            }
            true => Some(KeptFolder::lock(folder.try_clone().map_err(failed)?)?),
        };
        for about in kept_folder.iter().map(KeptFolder::list).collect::<Result<Vec<_>>>()?.concat()
        {
            let Some(from) = &kept_folder else { break };
            let overlay = Arc::new(from.open(&about, &budget)?);
            kept.insert(about.of.clone(), KeptOverlay { about, overlay });
        }
        Ok(Overlays {
            folder,
            backups: backups.to_path_buf(),
            mountpoint: mountpoint.to_path_buf(),
            budget,
            kept_folder,
            kept: Mutex::new(kept),
            slots: Mutex::default(),
            making: Mutex::default(),
            findings: Mutex::default(),
        })
    }

    /// The slot of a point for somebody who opens it. `identity` tells the point's contents from others, which is
    /// asked only where something was kept.
    ///
    /// # Errors
    /// `Changed` if what was written is over other contents of this point: they are never mixed.
    pub(crate) fn slot(
        &self,
        of: PointName,
        image: &Arc<Image>,
        identity: impl FnOnce() -> Result<String>,
    ) -> Result<Arc<Slot>> {
        if let Some(slot) = self.known(&of, image)? {
            return Ok(slot);
        }
        let kept = self.kept().get(&of).map(|k| (k.about.clone(), k.overlay.clone()));
        let overlay = match kept {
            Some((about, _)) if about.size != image.size() || identity()? != about.identity => {
                return Err(self.refused(&of));
            }
            kept => kept.map_or_else(OnceLock::new, |(_, overlay)| OnceLock::from(overlay)),
        };
        let fresh = Arc::new(Slot { of: of.clone(), image: Arc::downgrade(image), overlay });
        // Somebody else may have been faster.
        Ok(self.slots().entry(key(&of, image)).or_insert(fresh).clone())
    }

    /// The slot that there is.
    fn known(&self, of: &PointName, image: &Arc<Image>) -> Result<Option<Arc<Slot>>> {
        let (own, written) = {
            let slots = self.slots();
            let written = |s: &Arc<Slot>| s.overlay().is_some_and(|o| !o.is_empty());
            let mut others = slots.values().filter(|s| s.of == *of && !s.is_of(image));
            (slots.get(&key(of, image)).cloned(), others.any(written))
        };
        // What was written over one generation is never mixed with another.
        if own.is_none() && written { Err(self.refused(of)) } else { Ok(own) }
    }

    fn refused(&self, of: &PointName) -> Error {
        let text = format!(
            "point {} of disk {} was written to, and its backup has other contents now: neither is shown",
            path_text(&of.point),
            path_text(&of.disk)
        );
        let remedy = match self.kept_folder {
            Some(_) => DROP_IT,
            None => "unmount it, which drops what was written",
        };
        let error = Error::new(Kind::Changed, text).at_path(self.folder.path()).remedy(remedy);
        self.note(&error);
        error
    }

    /// Remembers what went wrong, and logs it once.
    pub(crate) fn note(&self, error: &Error) {
        let finding = Finding::from_error(error, self.folder.path());
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if findings.len() < MOST_FINDINGS && !findings.contains(&finding) {
            log::error!("{finding}");
            findings.push(finding);
        }
    }

    /// Has the slot's point an overlay, so that it can be written to. `shown` is where the mount shows it.
    ///
    /// # Errors
    /// No overlay can be made; those of `identity`.
    pub(crate) fn prepare(
        &self,
        slot: &Slot,
        size: u64,
        shown: &Path,
        identity: impl FnOnce() -> Result<String>,
    ) -> Result<()> {
        if slot.overlay.get().is_some() {
            return Ok(());
        }
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.overlay.get().is_some() {
            return Ok(());
        }
        let overlay = match &self.kept_folder {
            None => Arc::new(Overlay::new(size, self.throw_away()?, &self.budget)?),
            Some(folder) => {
                let shown = self.mountpoint.join(shown);
                let at = (self.backups.as_path(), shown.as_path());
                let about = About::new(slot.of.clone(), size, identity()?, at);
                let overlay = Arc::new(folder.create(&about, &self.budget)?);
                let kept = KeptOverlay { about, overlay: overlay.clone() };
                self.kept().insert(slot.of.clone(), kept);
                overlay
            }
        };
        slot.overlay.get_or_init(|| overlay);
        Ok(())
    }

    /// A file that is gone with this process, or with the next mount.
    fn throw_away(&self) -> Result<Files> {
        let path = self.folder.path().to_path_buf();
        let make = || -> std::io::Result<Files> {
            if let Some(file) = self.folder.create_unnamed()? {
                return Ok(Files { data: (file, path.clone()), map: None, temp: None });
            }
            let temp = Temp::create_named(self.folder.try_clone()?)?;
            let file = temp.file().try_clone()?;
            Ok(Files { data: (file, path.clone()), map: None, temp: Some(temp) })
        };
        make().map_err(|e| Error::io(e, "cannot make an overlay").at_path(&path))
    }

    /// The overlay over a point, if there is one, for what is told of the point.
    pub(crate) fn find(&self, of: &PointName, image: &Arc<Image>) -> Option<Arc<Overlay>> {
        let slot = self.slots().get(&key(of, image)).cloned()?;
        slot.overlay.get().cloned()
    }

    /// Lets go of what was written over points that are gone and that nobody has open. What is kept stays.
    pub(crate) fn forget(&self, is_there: impl Fn(&PointName) -> bool) {
        let mut gone = Vec::new();
        let stays = |(of, _): &SlotKey, slot: &mut Arc<Slot>| {
            // Of a generation that is gone nothing needs to be known if nothing was written.
            let known = slot.overlay.get().is_some() || slot.image.strong_count() > 0;
            let stays = is_there(of) && known || Arc::strong_count(slot) > 1;
            if !stays {
                gone.push(slot.clone());
            }
            stays
        };
        self.slots().retain(stays);
        // Their files are closed here, without the lock.
        drop(gone);
    }

    /// Writes down what is to be kept; what nothing was written to is not. Errors are logged.
    pub(crate) fn finish(&self) {
        let Some(folder) = &self.kept_folder else { return };
        for (of, kept) in self.kept().drain() {
            let done = match kept.overlay.is_empty() {
                true => folder.drop(&of),
                false => kept.overlay.sync(),
            };
            if let Err(e) = done {
                log::error!("{}", e.report());
            }
        }
    }

    /// The folder that they are in.
    pub(crate) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The limit, and what is taken of it.
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// What was refused.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All overlays, by disk and point.
    pub(crate) fn told(&self) -> Vec<Told> {
        let told = |of: &PointName, overlay: &Overlay, kept| Told {
            of: of.clone(),
            bytes: overlay.data_bytes(),
            kept,
        };
        let mut all: Vec<Told> = match self.kept_folder {
            Some(_) => self.kept().iter().map(|(of, k)| told(of, &k.overlay, true)).collect(),
            None => {
                let slots: Vec<Arc<Slot>> = self.slots().values().cloned().collect();
                slots.iter().filter_map(|s| Some(told(&s.of, s.overlay()?, false))).collect()
            }
        };
        all.sort_by(|a, b| (&a.of.disk, &a.of.point).cmp(&(&b.of.disk, &b.of.point)));
        all
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<SlotKey, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<PointName, KeptOverlay>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without `--keep` nothing that is kept is shown, or dropped.
fn check_nothing_kept(folder: &Folder) -> Result<()> {
    match super::kept::is_used(folder)? {
        false => Ok(()),
        true => Err(Error::new(Kind::Exists, "this scratch folder has overlays that were kept")
            .at_path(folder.path())
            .remedy("go on with them by --keep, or remove them: 'fleecefs scratch drop --all'")),
    }
}
