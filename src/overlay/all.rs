//! [`Overlays`]: those of a mount, by point.
//!
//! State: a [`Slot`] for each point that was opened, which all who have it open share; its overlay, once somebody
//! wants to write; the overlays that were kept in the scratch folder, all of them from the beginning on, since they
//! count against the limit. A slot is of one generation of its point: what was written over one is never shown over
//! another. Once its point is gone from the backup directory a slot is its openers' alone, and goes with the last of
//! them. The locks here are for opening; reads and writes go to the slot that they were opened with.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::Serialize;

use super::budget::{Budget, Cost};
use super::kept::{About, KeptFolder, PointName};
use super::one::{Files, Overlay};
use super::unnamed::Unnamed;
use crate::error::{Error, Finding, Kind, Result};
use crate::folder::{self, Folder};
use crate::image::Image;
use crate::text::path_text;

/// Findings that are told.
const MOST_FINDINGS: usize = 256;

/// What can be done where a point has other files than an overlay is of.
const REWRITTEN: &str = "if nothing but 'consolidate' below it was the reason, its bytes are the same: unmount it, \
                         and 'fleecefs scratch export' makes an image of what was written, over the point; \
                         'fleecefs scratch drop' removes it";

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
    /// Whether its point is no longer in the backup directory.
    gone: AtomicBool,
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

    /// Whether its point is no longer in the backup directory: then whoever lets go of it calls
    /// [`Overlays::forget_gone`].
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
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
    /// Or why it cannot be gone on with.
    overlay: std::result::Result<Arc<Overlay>, Arc<Error>>,
    /// Whether an earlier mount made it.
    resumed: bool,
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
    /// Files for those that are not kept.
    unnamed: Unnamed,
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
    /// `Busy` if another mount has the folder; `Exists` if it has overlays that are kept and `keep` is not wanted; it
    /// cannot be told which there are. (One that is damaged is told, and its point refused.)
    pub fn new(scratch: Scratch, backups: &Path, mountpoint: &Path) -> Result<Self> {
        let Scratch { folder, keep, limit, named } = scratch;
        let failed = |e| Error::io(e, "cannot use the scratch folder").at_path(folder.path());
        folder::sweep(&folder, &[]).map_err(failed)?;
        let budget = Arc::new(Budget::new(limit));
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
        let kept = kept_folder.as_ref().map_or(Ok(HashMap::new()), |f| resumed(f, &budget))?;
        let overlays = Overlays {
            folder,
            backups: backups.to_path_buf(),
            mountpoint: mountpoint.to_path_buf(),
            budget,
            kept_folder,
            kept: Mutex::new(kept),
            unnamed: Unnamed::new(!keep),
            slots: Mutex::default(),
            making: Mutex::default(),
            findings: Mutex::default(),
        };
        overlays.kept().values().filter_map(|k| k.overlay.as_ref().err()).for_each(|e| {
            overlays.note(e);
        });
        Ok(overlays)
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
            Some((_, Err(damaged))) => return Err(self.damaged(&damaged)),
            Some((about, _)) if about.size != image.size() || identity()? != about.identity => {
                return Err(self.refused(&of));
            }
            Some((_, Ok(overlay))) => OnceLock::from(overlay),
            None => OnceLock::new(),
        };
        let (image_of, gone) = (Arc::downgrade(image), AtomicBool::new(false));
        let fresh = Arc::new(Slot { of: of.clone(), image: image_of, overlay, gone });
        // Somebody else may have been faster.
        Ok(self.slots().entry(key(&of, image)).or_insert(fresh).clone())
    }

    /// The slot that there is.
    fn known(&self, of: &PointName, image: &Arc<Image>) -> Result<Option<Arc<Slot>>> {
        let (own, written) = {
            let slots = self.slots();
            let written = |s: &Arc<Slot>| s.overlay().is_some_and(|o| !o.is_empty());
            // A point that is gone is another than the one that has its name now.
            let mut others =
                slots.values().filter(|s| s.of == *of && !s.is_of(image) && !s.is_gone());
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
            Some(_) => REWRITTEN,
            None => "unmount it, which drops what was written",
        };
        let error = Error::new(Kind::Changed, text).at_path(self.folder.path()).remedy(remedy);
        self.note(&error);
        error
    }

    fn damaged(&self, why: &Error) -> Error {
        let mut error = Error::new(why.kind(), why.message());
        if let Some(path) = why.path() {
            error = error.at_path(path);
        }
        let error = why.remedy_text().into_iter().fold(error, |e, remedy| e.remedy(remedy));
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
            None => {
                let (data, base) = self.unnamed.place(&self.folder, size)?;
                Arc::new(Overlay::new(size, Files { data, base, map: None }, &self.budget)?)
            }
            Some(folder) => {
                let shown = self.mountpoint.join(shown);
                let at = (self.backups.as_path(), shown.as_path());
                let about = About::new(slot.of.clone(), size, identity()?, at);
                let overlay = Arc::new(folder.create(&about, &self.budget)?);
                let kept = KeptOverlay { about, overlay: Ok(overlay.clone()), resumed: false };
                self.kept().insert(slot.of.clone(), kept);
                overlay
            }
        };
        slot.overlay.get_or_init(|| overlay);
        Ok(())
    }

    /// The overlay over a point, if there is one, for what is told of the point.
    pub(crate) fn find(&self, of: &PointName, image: &Arc<Image>) -> Option<Arc<Overlay>> {
        let slot = self.slots().get(&key(of, image)).cloned()?;
        slot.overlay.get().cloned()
    }

    /// Lets go of what was written over points that are gone and that nobody has open; of what others have open once they
    /// let go of it ([`Overlays::forget_gone`]). What is kept stays.
    pub(crate) fn forget(&self, is_there: impl Fn(&PointName) -> bool) {
        for slot in self.slots().values().filter(|s| !is_there(&s.of)) {
            slot.gone.store(true, Ordering::SeqCst);
        }
        // Of a generation that is gone nothing needs to be known if nothing was written.
        self.forget_if(|slot| {
            slot.is_gone() || slot.overlay.get().is_none() && slot.image.strong_count() == 0
        });
    }

    /// Lets go of what was written over points that are gone and that nobody has open any more.
    pub(crate) fn forget_gone(&self) {
        self.forget_if(Slot::is_gone);
    }

    fn forget_if(&self, is_over: impl Fn(&Slot) -> bool) {
        let mut gone = Vec::new();
        self.slots().retain(|_, slot| {
            let goes = is_over(slot) && Arc::strong_count(slot) == 1;
            goes.then(|| gone.push(slot.clone()));
            !goes
        });
        // Their files are closed here, without the lock.
        drop(gone);
    }

    /// Writes down what is to be kept; what was made by this mount and nothing was written to is not.
    ///
    /// # Errors
    /// The first; the others are logged.
    pub(crate) fn finish(&self) -> Result<()> {
        let Some(folder) = &self.kept_folder else { return Ok(()) };
        let mut result = Ok(());
        for (of, kept) in self.kept().drain() {
            let Ok(overlay) = kept.overlay else { continue };
            let done = match overlay.is_empty() && !kept.resumed {
                true => {
                    overlay.give_up();
                    folder.drop(&of)
                }
                false => overlay.sync(),
            };
            match (done, &result) {
                (Err(e), Ok(())) => result = Err(e),
                (Err(e), Err(_)) => log::error!("{}", e.report()),
                (Ok(()), _) => {}
            }
        }
        result
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
            Some(_) => {
                let kept = self.kept();
                let whole = kept.iter().filter_map(|(of, k)| Some((of, k.overlay.as_ref().ok()?)));
                whole.map(|(of, overlay)| told(of, overlay, true)).collect()
            }
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

/// What earlier mounts have kept.
fn resumed(from: &KeptFolder, budget: &Arc<Budget>) -> Result<HashMap<PointName, KeptOverlay>> {
    let open = |about: About| {
        let overlay = from.open(&about, budget).map(Arc::new).map_err(|e| {
            // It takes its room all the same.
            budget.take_anyway(Cost::of_data(from.takes(&about.of)));
            Arc::new(e)
        });
        (about.of.clone(), KeptOverlay { about, overlay, resumed: true })
    };
    Ok(from.list()?.into_iter().map(open).collect())
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
