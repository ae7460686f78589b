//! The storage folder: the images, and beside them a folder for the journal and the locks.

use std::path::{Path, PathBuf};

use super::journal::{self, Begun, CopiedVars, Journal, NewDisk, Stage};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{self, Folder, Lock, Replace};
use crate::layer::qcow2::create::NewImage;
use crate::layer::qcow2::header::{Compression, Header};
use crate::storage::OpenFile;
use crate::text::path_text;

/// The folder for journal and locks.
const OWN: &str = ".fleecefs-live";
/// Held while a command is at work.
const COMMAND_LOCK: &str = "lock";
/// Held by QEMU as long as it lives.
const VM_LOCK: &str = "vm.lock";
/// How the backing file of an unfinished image begins: a protocol that no QEMU knows, so that none opens it.
pub(super) const UNFINISHED: &str = "fleecefs:live-restore-";
/// Bytes of a cluster: QEMU's default.
const CLUSTER: u64 = 64 << 10;
/// A store of UEFI's variables is at most this large, in bytes.
const LARGEST_VARS: u64 = 64 << 20;

/// The folder, and the right to work in it.
#[derive(Debug)]
pub(crate) struct Storage {
    folder: Folder,
    own: Folder,
    _lock: Lock,
}

impl Storage {
    /// Makes it where it is not there. `path` has no links.
    ///
    /// # Errors
    /// `Permission` if others may exchange what is in it: QEMU opens its images by their names; `Busy` if another command
    /// is at work in it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot use the storage folder").at_path(path);
        let remedy = "QEMU opens disks by their names there: it has to be in a folder of yours or root's that nobody \
                      else may write to";
        folder::check_unchangeable_to_make(path, remedy)?;
        let folder = folder::make_folders(path).map_err(failed)?;
        folder::check_unchangeable(path, remedy)?;
        let own = folder.make_folder(OWN).map_err(failed)?;
        let Some(lock) = own.lock(COMMAND_LOCK).map_err(failed)? else {
            let e = Error::new(Kind::Busy, "another live-restore is running for this folder");
            return Err(e.at_path(path).remedy("wait for it, or stop it"));
        };
        Ok(Storage { folder, own, _lock: lock })
    }

    /// The path of the folder.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// What was begun in it, and how far it has come.
    ///
    /// # Errors
    /// As [`journal::read`].
    pub(crate) fn begun(&self) -> Result<Option<(Begun, Stage)>> {
        journal::read(&self.own)
    }

    /// The lock that QEMU has as long as it lives: `None` if one lives.
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn vm_lock(&self) -> Result<Option<Lock>> {
        let failed = |e| Error::io(e, "cannot tell whether the VM runs").at_path(self.own.path());
        self.own.lock(VM_LOCK).map_err(failed)
    }

    /// Fails where what was begun was begun in another folder: this one is a copy, or was moved.
    ///
    /// # Errors
    /// `Changed`.
    pub(crate) fn check_own(&self, begun: &Begun) -> Result<()> {
        if begun.storage == self.path() {
            return Ok(());
        }
        let was = path_text(&begun.storage);
        let e = Error::new(Kind::Changed, format!("this folder is a copy of {was}, or was moved"));
        Err(e.at_path(self.path()).remedy("move it back, or run the command for that folder"))
    }

    /// Begins a journal.
    ///
    /// # Errors
    /// `Exists` if a file of one of the disks' names is there already; the folder cannot be written.
    pub(super) fn begin(&self, begun: &Begun) -> Result<Journal> {
        for name in begun.files() {
            if self.folder.has(name) {
                let e = Error::new(Kind::Exists, "there is a file of this name already");
                return Err(e.at_path(self.folder.join(name)).remedy("name another folder"));
            }
        }
        Journal::begin(self.own_folder()?, begun)
    }

    /// The journal of what is at work.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub(super) fn journal(&self, begun: &Begun) -> Result<Journal> {
        Journal::reopen(self.own_folder()?, begun, Stage::Started)
    }

    fn own_folder(&self) -> Result<Folder> {
        let failed = |e| Error::io(e, "cannot use the storage folder").at_path(self.own.path());
        self.own.try_clone().map_err(failed)
    }

    /// The path of a disk's image.
    pub(super) fn image(&self, disk: &NewDisk) -> PathBuf {
        self.folder.join(&disk.file)
    }

    /// The path of the copied store of variables.
    pub(super) fn vars(&self, begun: &Begun) -> Option<PathBuf> {
        begun.vars.as_ref().map(|vars| self.folder.join(&vars.file))
    }

    /// Makes the image of a disk, over what no QEMU opens by itself.
    ///
    /// # Errors
    /// `Exists`; `Usage` if the disk is larger than such an image can be; what the operating system said.
    pub(super) fn make(&self, begun: &Begun, disk: &NewDisk) -> Result<()> {
        let path = self.image(disk);
        let failed = |e| Error::io(e, "cannot make the disk").at_path(&path);
        let shape = NewImage {
            size: disk.point.size,
            cluster_size: CLUSTER,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
        };
        let temp = self.folder.temp().map_err(failed)?;
        shape.fitting().write_over(temp.file(), &path, &unfinished(begun))?;
        temp.publish(&disk.file, Replace::No).map_err(failed)?;
        step("image made");
        Ok(())
    }

    /// Copies an empty store of variables.
    ///
    /// # Errors
    /// It cannot be read, or the copy cannot be made.
    pub(super) fn copy_vars(&self, begun: &Begun) -> Result<()> {
        let Some(CopiedVars { file, template }) = &begun.vars else { return Ok(()) };
        let written = self.folder.write_whole(file, &template_bytes(template)?);
        written.map_err(|e| {
            Error::io(e, "cannot write the variables of UEFI").at_path(self.folder.join(file))
        })
    }

    /// Removes what was made and never used: images that still have the name of this very restore in them. (The store of
    /// variables, too, which is as it was copied.)
    ///
    /// # Errors
    /// What the operating system said.
    pub(super) fn clear(&self, begun: &Begun) -> Result<()> {
        for disk in &begun.disks {
            if self.backing(disk)?.is_some_and(|name| name == unfinished(begun)) {
                self.remove(&disk.file)?;
            }
        }
        let Some(CopiedVars { file, template }) = &begun.vars else { return Ok(()) };
        let failed =
            |e| Error::io(e, "cannot read the variables of UEFI").at_path(self.folder.join(file));
        let there = self.folder.read_if_there(file, LARGEST_VARS).map_err(failed)?;
        match there.is_some_and(|b| template_bytes(template).is_ok_and(|t| t == b)) {
            true => self.remove(file),
            false => Ok(()),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        let gone = self.folder.remove_if_there(name);
        gone.map(drop)
            .map_err(|e| Error::io(e, "cannot remove the file").at_path(self.folder.join(name)))
    }

    /// Whether the image of a disk still needs the backup, as it says itself.
    ///
    /// # Errors
    /// `NotFound` if it is gone; `Corrupt` if it is not the image of this restore.
    pub(crate) fn needs_backup(&self, begun: &Begun, disk: &NewDisk) -> Result<bool> {
        let path = self.image(disk);
        if !self.folder.has(&disk.file) {
            let e = Error::new(Kind::NotFound, "the image of a disk of the VM is gone");
            return Err(e.at_path(path).remedy("put it back: it has what the guest wrote"));
        }
        match self.backing(disk)? {
            None => Ok(false),
            Some(name) if name == unfinished(begun) => Ok(true),
            Some(_) => {
                let what = "this is not the image that the VM was started with";
                Err(Error::new(Kind::Corrupt, what).at_path(path))
            }
        }
    }

    /// What the image names as its backing file; `None` also if there is no image.
    fn backing(&self, disk: &NewDisk) -> Result<Option<String>> {
        let path = self.image(disk);
        let failed = |e| Error::io(e, "cannot read the image").at_path(&path);
        let opened = folder::absent_is_none(self.folder.open_file(&disk.file)).map_err(failed)?;
        let Some(file) = opened else { return Ok(None) };
        Ok(Header::read(&OpenFile::new(&file, &path)?)?.backing_file)
    }
}

/// Fails where commands for a person to type would overwrite what is in the folder `path`.
///
/// # Errors
/// `Exists`.
pub(crate) fn check_empty(path: &Path, begun: &Begun) -> Result<()> {
    let own = PathBuf::from(OWN);
    let names = begun.files().map(PathBuf::from).chain([own]).map(|name| path.join(name));
    match names.into_iter().find(|there| folder::exists(there)) {
        None => Ok(()),
        Some(there) => {
            let what = "the printed commands would overwrite what a VM has written";
            let e = Error::new(Kind::Exists, what).at_path(there);
            Err(e.remedy("name another folder, or go on there without --print"))
        }
    }
}

/// What unfinished images of a restore name as their backing file.
fn unfinished(begun: &Begun) -> String {
    format!("{UNFINISHED}{}", begun.id)
}

fn template_bytes(template: &Path) -> Result<Vec<u8>> {
    folder::read_small(template, LARGEST_VARS)
        .map_err(|e| Error::io(e, "cannot read the firmware's variables").at_path(template))
}
