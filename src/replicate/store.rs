//! What the receiver does with files in its backup directory. All of it goes by descriptors of the folder gate: a
//! name of the other side is one plain name in a folder below the directory, and no file is replaced but those that say
//! what QEMU said last of a disk that is there. Nothing is told of what other files contain than images.
//!
//! An image becomes a point as one of a backup does ([`crate::backup::publish`]): its manifest is announced, the image
//! gets its name, and the announcement becomes its manifest. In between it is no point for anybody, and whoever writes
//! next finishes it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::message::{Held, Modified, Needed};
use super::name::{FolderPath, SmallKind, WireName, is_known, may_be_received};
use crate::backup::publish;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder::{self, Entry, EntryKind, FileMode, Folder, PlainName, Replace, Temp};
use crate::hash;
use crate::hash::Check;
use crate::layout::name::{self, Name};
use crate::manifest::{self, fingerprint_of};
use crate::storage::SourceFile;

/// The backup directory that is written to.
pub(crate) struct Store {
    root: Folder,
    share: FileMode,
}

impl Store {
    /// The directory at `root`, which is locked, and resolved; new files are shared as `share` says.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn open(root: &Path, share: FileMode) -> Result<Store> {
        let opened = Folder::open(root);
        let root =
            opened.map_err(|e| Error::io(e, "cannot open the backup directory").at_path(root))?;
        Ok(Store { root, share })
    }

    /// A folder, if it is there.
    fn folder(&self, path: &FolderPath) -> Result<Option<Folder>> {
        let failed = |e| Error::io(e, "cannot open the folder").at_path(self.path(path));
        folder::absent_is_none(self.root.beneath(&path.path())).map_err(failed)
    }

    /// A folder, made if it is not there.
    fn make(&self, path: &FolderPath) -> Result<Folder> {
        let failed = |e| Error::io(e, "cannot make the folder").at_path(self.path(path));
        let mut at = self.root.try_clone().map_err(failed)?;
        for name in path.names() {
            let is_new = !at.has(name.as_os_str());
            at = at.make_folder(name.as_os_str()).map_err(failed)?;
            if is_new {
                self.share.give_folder(&at).map_err(failed)?;
            }
        }
        Ok(at)
    }

    fn path(&self, folder: &FolderPath) -> PathBuf {
        match folder.names() {
            [] => self.root.path().to_path_buf(),
            _ => self.root.path().join(folder.path()),
        }
    }

    /// Fails if the folder has another id than this.
    ///
    /// # Errors
    /// `Exists`; what the operating system said.
    pub(crate) fn check_id(&self, folder: &FolderPath, id: &str) -> Result<()> {
        let Some(open) = self.folder(folder)? else { return Ok(()) };
        let path = open.join("uuid");
        let failed = |e| Error::io(e, "cannot read the target's id").at_path(&path);
        let largest = SmallKind::Id.largest();
        let Some(own) = open.read_if_there("uuid", largest).map_err(failed)? else { return Ok(()) };
        if String::from_utf8_lossy(&own).trim() == id.trim() {
            return Ok(());
        }
        Err(Error::new(Kind::Exists, "this is another backup directory: it has another id")
            .at_path(path)
            .remedy("replicate to an empty folder"))
    }

    /// What there is under these names; looked into if `look`.
    ///
    /// # Errors
    /// `Unsupported` for names that are none of ours; what the operating system said.
    pub(crate) fn held(
        &self,
        folder: &FolderPath,
        names: &[WireName],
        look: bool,
    ) -> Result<Vec<Option<Held>>> {
        if let Some(other) = names.iter().find(|n| !is_known(n.as_os_str())) {
            return Err(refused(other));
        }
        let Some(open) = self.folder(folder)? else { return Ok(vec![None; names.len()]) };
        names.iter().map(|name| held(&open, name.as_os_str(), look)).collect()
    }

    /// Begins a new image. Nothing of it is seen until it is committed.
    ///
    /// # Errors
    /// `Exists` if there is such a file; what the operating system said.
    pub(crate) fn begin(
        &self,
        folder: &FolderPath,
        name: &WireName,
        size: u64,
        modified: Modified,
    ) -> Result<Incoming> {
        if !may_be_received(name.as_os_str()) {
            return Err(refused(name));
        }
        let folder = self.make(folder)?;
        let path = folder.join(name.as_os_str());
        if folder.has(name.as_os_str()) {
            return Err(Error::new(Kind::Exists, "this file is there already").at_path(path));
        }
        check_no_partial(&folder, name.as_os_str())?;
        let failed = |e| Error::io(e, "cannot make the file").at_path(&path);
        // What a killed run left where files need names.
        folder::sweep(&folder, &[]).map_err(failed)?;
        let temp = folder.temp().map_err(failed)?;
        temp.file().set_len(size).map_err(failed)?;
        self.share.give(temp.file()).map_err(failed)?;
        let name = name.as_os_str().to_os_string();
        let hasher = blake3::Hasher::new();
        Ok(Incoming { temp, name, path, size, at: 0, hasher, modified, folder })
    }

    /// Gives an image that is there without a manifest the one that its bytes are proved to have; whether that was not
    /// there yet. `stop` is asked while all of it is read.
    ///
    /// # Errors
    /// `Exists` if it is another image; what `stop` says; as [`Store::commit`].
    pub(crate) fn adopt(
        &self,
        (folder, name): (&FolderPath, &WireName),
        blake3: &str,
        manifest: &[u8],
        needs: &[Needed],
        stop: &Check,
    ) -> Result<bool> {
        if !may_be_received(name.as_os_str()) {
            return Err(refused(name));
        }
        let missing = || Error::new(Kind::NotFound, "this file is not there");
        let open = self.folder(folder)?.ok_or_else(missing)?;
        let text = name.as_os_str().to_str().ok_or_else(|| refused(name))?;
        let file = SourceFile::open_in(&open, text)?;
        check_no_partial(&open, name.as_os_str())?;
        let own = hash::whole_with(&file, 1, &(), stop)?;
        if own != blake3 {
            return Err(
                Error::new(Kind::Exists, "another file has this name").at_path(open.join(text))
            );
        }
        let opened = file.file()?;
        check_manifest(manifest, name.as_os_str(), &opened, blake3, &open)?;
        self.check_needs(needs)?;
        let side = self.side(&open)?;
        let is_new = !has_manifest(&side, name.as_os_str(), manifest)?;
        if is_new {
            let written =
                side.write_shared(manifest::file_name(name.as_os_str()), manifest, self.share);
            written.map_err(|e| {
                let path = manifest::manifest_path(open.path(), name.as_os_str());
                Error::io(e, "cannot write the manifest").at_path(path)
            })?;
        }
        step("replicate: adopted");
        // What a run that was killed had announced, if it did.
        publish::withdraw(&open, name.as_os_str())?;
        Ok(is_new)
    }

    /// The complete image gets its name, then its manifest: until then it is no point.
    ///
    /// # Errors
    /// `Incomplete` or `Changed` if what it needs is not there; `Corrupt` if the manifest is not its own; `Exists`;
    /// what the operating system said.
    pub(crate) fn commit(
        &self,
        whole: Whole,
        manifest: Option<&[u8]>,
        needs: &[Needed],
    ) -> Result<()> {
        let Whole { incoming, blake3 } = whole;
        let Incoming { temp, folder, name, path, .. } = incoming;
        if let Some(manifest) = manifest {
            check_manifest(manifest, &name, temp.file(), &blake3, &folder)?;
        }
        self.check_needs(needs)?;
        step("replicate: received");
        let is_announced = self.announce(&folder, &name, manifest)?;
        step("replicate: announced");
        let failed = |e| Error::io(e, "cannot give the file its name").at_path(&path);
        let file = temp.file().try_clone().map_err(failed)?;
        if let Err(e) = temp.publish(&name, Replace::No) {
            withdraw_unnamed(&folder, &name, &file)?;
            return Err(failed(e));
        }
        step("replicate: named");
        if is_announced {
            publish::commit_text(&folder, &name)?;
        }
        step("replicate: committed");
        Ok(())
    }

    /// Announces the manifest of an image that has yet to get its name; whether that is needed.
    fn announce(&self, folder: &Folder, image: &OsStr, manifest: Option<&[u8]>) -> Result<bool> {
        check_no_partial(folder, image)?;
        // One that a killed run left would be taken for this image's.
        publish::withdraw(folder, image)?;
        let side = folder::absent_is_none(folder.folder(manifest::FOLDER));
        let side = side.map_err(|e| {
            Error::io(e, "cannot open the folder for manifests").at_path(folder.path())
        })?;
        // A manifest whose image is gone is there already.
        let text = manifest.unwrap_or_default();
        if side.map_or(Ok(false), |side| has_manifest(&side, image, text))? || manifest.is_none() {
            return Ok(false);
        }
        publish::announce_text(folder, image, text, self.share).map(|()| true)
    }

    fn side(&self, folder: &Folder) -> Result<Folder> {
        let path = folder.join(manifest::FOLDER);
        let failed = |e| Error::io(e, "cannot make the folder for manifests").at_path(&path);
        let side = folder.make_folder(manifest::FOLDER).map_err(failed)?;
        self.share.give_folder(&side).map_err(failed)?;
        Ok(side)
    }

    /// Fails unless all of these are there and have these contents, as far as fingerprints tell.
    fn check_needs(&self, needs: &[Needed]) -> Result<()> {
        for need in needs {
            let name = need.name.as_os_str();
            let there = match self.folder(&need.folder)? {
                Some(open) => held(&open, name, true)?.filter(|h| h.is_file),
                None => None,
            };
            let path = self.path(&need.folder).join(name);
            match there.and_then(|h| h.fingerprint) {
                Some(own) if own == need.fingerprint => {}
                Some(_) => {
                    let what = "the parent of the next image is another file here";
                    return Err(Error::new(Kind::Changed, what).at_path(path));
                }
                None => {
                    let what = "the parent of the next image is missing here";
                    return Err(Error::new(Kind::Incomplete, what).at_path(path));
                }
            }
        }
        Ok(())
    }

    /// Writes a small file, unless it is there already.
    ///
    /// # Errors
    /// `Exists` if another is there that is not replaced; `Unsupported` for a name that such a file cannot have; what
    /// the operating system said.
    pub(crate) fn small(
        &self,
        folder: &FolderPath,
        kind: SmallKind,
        name: &WireName,
        bytes: &[u8],
    ) -> Result<()> {
        let name = name.as_os_str();
        if !kind.has(name) || bytes.len() as u64 > kind.largest() {
            return Err(
                Error::new(Kind::Unsupported, "not a file that is replicated").at_path(name)
            );
        }
        let folder = self.make(folder)?;
        match kind {
            SmallKind::Link => return link(&folder, name, bytes),
            SmallKind::Id => self.check_id_text(bytes)?,
            SmallKind::DiskConfig | SmallKind::Kept => {}
        }
        let is_of = |image| kind == SmallKind::Kept && folder.has(image);
        if manifest::image_of(name).is_some_and(is_of) {
            let what = "it would be taken for the manifest of a file that is there";
            return Err(Error::new(Kind::Unsupported, what).at_path(folder.join(name)));
        }
        let folder = if kind == SmallKind::Kept { self.side(&folder)? } else { folder };
        let path = folder.join(name);
        let failed = |e| Error::io(e, "cannot write the file").at_path(&path);
        let own = folder.read_if_there(name, kind.largest()).map_err(failed)?;
        match own {
            Some(own) if own == bytes => Ok(()),
            Some(_) if kind != SmallKind::DiskConfig || !describes_disk(&folder, name)? => {
                Err(Error::new(Kind::Exists, "another file has this name").at_path(path))
            }
            _ => folder.write_shared(name, bytes, self.share).map_err(failed),
        }
    }

    fn check_id_text(&self, bytes: &[u8]) -> Result<()> {
        match std::str::from_utf8(bytes).is_ok_and(|t| !t.trim().is_empty()) {
            true => Ok(()),
            false => Err(Error::new(Kind::Corrupt, "the id of the backup directory is no text")),
        }
    }
}

/// Fails if a backup has left an image of this name that is no point yet: the announcement is of that one, and it may be
/// complete.
fn check_no_partial(folder: &Folder, image: &OsStr) -> Result<()> {
    match publish::has_partial(folder, image) {
        true => {
            let what = "a backup of this name was interrupted here";
            let error = Error::new(Kind::Exists, what).at_path(folder.join(image));
            Err(error.remedy("'fleecefs recover', or the next backup there, finishes it"))
        }
        false => Ok(()),
    }
}

/// Takes back what was announced for `file`, which could not be given its name, or whose name may not survive a power
/// cut: then it is announced, and whoever writes next finishes it.
fn withdraw_unnamed(folder: &Folder, name: &OsStr, file: &File) -> Result<()> {
    match folder.is_same(name, file) {
        Ok(false) => publish::withdraw(folder, name),
        Ok(true) | Err(_) => Ok(()),
    }
}

/// Whether `config` is called as the description of a disk that is there: it is beside the disk's images, or one folder
/// up. Whatever else has such an ending is somebody's own.
fn describes_disk(folder: &Folder, config: &OsStr) -> Result<bool> {
    let disk = config.as_bytes().strip_suffix(b".config").map(OsStr::from_bytes);
    let failed = |e| Error::io(e, "cannot read the folder").at_path(folder.path());
    let is_of_disk = |name: &OsStr| match name::parse(name) {
        Name::Backup { disk: own, .. } => Some(own.as_os_str()) == disk,
        Name::Other => Some(name) == disk,
        Name::Ignored => false,
    };
    let has_image = |entries: &[Entry]| {
        entries.iter().any(|e| e.kind == EntryKind::File && is_of_disk(&e.name))
    };
    let entries = folder.entries().map_err(failed)?;
    if has_image(&entries) {
        return Ok(true);
    }
    let is_open = |e: &&Entry| e.kind == EntryKind::Folder && !e.name.as_bytes().starts_with(b".");
    // A folder that cannot be read has no disk for us.
    let below = entries.iter().filter(is_open).filter_map(|e| folder.folder(&e.name).ok());
    Ok(below.filter_map(|f| f.entries().ok()).any(|entries| has_image(&entries)))
}

/// A link's text is one name, of an image: it leads nowhere else, whoever follows it. One that is there is led to another
/// image only where there is that.
fn link(folder: &Folder, name: &OsStr, text: &[u8]) -> Result<()> {
    let path = folder.join(name);
    let failed = |e| Error::io(e, "cannot make the link").at_path(&path);
    let text = OsStr::from_bytes(text);
    let text = PlainName::new(text).map_err(failed)?;
    let there = folder::absent_is_none(folder.look(name)).map_err(failed)?;
    let target = folder::absent_is_none(folder.look(&text)).map_err(failed)?;
    match there {
        _ if !may_be_received(text.as_os_str())
            || target.as_ref().is_some_and(|t| !t.is_file()) =>
        {
            Err(Error::new(Kind::Unsupported, "a link to what is no image").at_path(path))
        }
        Some(meta) if !meta.is_symlink() => {
            Err(Error::new(Kind::Exists, "a file has the name of a link").at_path(path))
        }
        Some(_) if folder.read_link(name).is_ok_and(|t| t == AsRef::<Path>::as_ref(&text)) => {
            Ok(())
        }
        // What increments build on is never another image than it was.
        Some(_) if name != "image" && leads_somewhere(folder, name) => {
            Err(Error::new(Kind::Exists, "this link leads to another image").at_path(path))
        }
        Some(_) if target.is_none() => {
            Err(Error::new(Kind::Incomplete, "the image of this link is missing here")
                .at_path(path))
        }
        _ => folder.set_link(text.as_ref(), name).map_err(failed),
    }
}

fn leads_somewhere(folder: &Folder, link: &OsStr) -> bool {
    folder.read_link(link).is_ok_and(|target| {
        target.file_name().is_some_and(|name| folder.look(name).is_ok_and(|meta| meta.is_file()))
    })
}

fn refused(name: &WireName) -> Error {
    let text = crate::text::path_text(name.as_os_str());
    Error::new(Kind::Unsupported, format!("'{text}' is not the name of an image, or too long"))
}

fn held(folder: &Folder, name: &OsStr, look: bool) -> Result<Option<Held>> {
    let path = folder.join(name);
    let failed = |e| Error::io(e, "cannot check the file").at_path(&path);
    let Some(meta) = folder::absent_is_none(folder.look(name)).map_err(failed)? else {
        return Ok(None);
    };
    let mut held = Held {
        is_file: meta.is_file(),
        size: meta.len(),
        manifest: false,
        blake3: None,
        fingerprint: None,
        modified: Modified::from_parts(meta.mtime(), meta.mtime_nsec()),
    };
    if !held.is_file {
        return Ok(Some(held));
    }
    // A manifest that cannot be read is there, and says nothing.
    match manifest::read_in(folder, name) {
        Ok(None) => {}
        Ok(Some(m)) => (held.manifest, held.blake3) = (true, m.blake3),
        Err(_) => held.manifest = true,
    }
    // Of a small file of ours it is nobody's matter what is in it.
    if look && name::is_image(name) {
        let file = folder.open_file(name).map_err(failed)?;
        held.fingerprint = Some(fingerprint_of(&file).map_err(failed)?);
    }
    Ok(Some(held))
}

/// Whether the image has this manifest.
///
/// # Errors
/// `Exists` if it has another: the bytes of an image are easily proved, and whoever has one may not say anew what it is.
fn has_manifest(side: &Folder, image: &OsStr, text: &[u8]) -> Result<bool> {
    let path = side.join(manifest::file_name(image));
    let own = side.read_if_there(manifest::file_name(image), manifest::MAX_BYTES);
    match own.map_err(|e| Error::io(e, "cannot read the manifest").at_path(&path))? {
        None => Ok(false),
        Some(own) if own == text => Ok(true),
        Some(_) => {
            let what = "this image has another manifest already";
            Err(Error::new(Kind::Exists, what).at_path(path))
        }
    }
}

/// Fails unless this is a manifest of that image, which is open as `file`, and whose parent is there.
fn check_manifest(
    text: &[u8],
    image: &OsStr,
    file: &File,
    blake3: &str,
    folder: &Folder,
) -> Result<()> {
    let path = manifest::manifest_path(folder.path(), image);
    if text.len() as u64 > manifest::MAX_BYTES {
        return Err(Error::new(Kind::Corrupt, "the manifest is too large").at_path(path));
    }
    let m = manifest::parse(text).map_err(|e| e.at_path(&path))?;
    let failed = |e| Error::io(e, "cannot read the image").at_path(folder.join(image));
    let own = fingerprint_of(file).map_err(failed)?;
    let wrong = match () {
        () if OsStr::new(&m.image) != image => Some("name"),
        () if m.file_size != file.metadata().map_err(failed)?.len() => Some("length"),
        () if m.blake3.is_some_and(|hash| hash != blake3) => Some("hash"),
        () if m.fingerprint.is_some_and(|print| print != own) => Some("fingerprint"),
        () => None,
    };
    if let Some(wrong) = wrong {
        let what = format!("the manifest is not this image's: it has another {wrong}");
        let error = Error::new(Kind::Corrupt, what).at_path(path);
        return Err(error.remedy("see what 'fleecefs verify' says of it at the source"));
    }
    match m.parent.filter(|parent| !folder.look(parent).is_ok_and(|meta| meta.is_file())) {
        Some(parent) => {
            let what = "the parent of the next image is missing here";
            Err(Error::new(Kind::Incomplete, what).at_path(folder.join(parent)))
        }
        None => Ok(()),
    }
}

/// An image that is being received.
pub(crate) struct Incoming {
    temp: Temp,
    folder: Folder,
    name: std::ffi::OsString,
    path: PathBuf,
    size: u64,
    at: u64,
    hasher: blake3::Hasher,
    modified: Modified,
}

/// An image that was received whole, and is on disk.
pub(crate) struct Whole {
    incoming: Incoming,
    blake3: String,
}

impl Incoming {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// `Corrupt` if they are more than were announced; what the operating system said.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.end(bytes.len() as u64)?;
        self.file()
            .write_all_at(bytes, self.at)
            .map_err(|e| Error::io(e, "writing failed").at_path(&self.path).at_offset(self.at))?;
        self.hasher.update(bytes);
        self.at = end;
        Ok(())
    }

    /// Passes a hole.
    ///
    /// # Errors
    /// As [`Incoming::data`].
    pub(crate) fn hole(&mut self, len: u64) -> Result<()> {
        let end = self.end(len)?;
        hash::zeros(&mut self.hasher, len);
        self.at = end;
        Ok(())
    }

    fn end(&self, len: u64) -> Result<u64> {
        self.at.checked_add(len).filter(|end| *end <= self.size).ok_or_else(|| {
            Error::new(Kind::Corrupt, "more bytes came than were announced").at_path(&self.path)
        })
    }

    fn file(&self) -> &File {
        self.temp.file()
    }

    /// Makes it survive a power cut, and compares it with what was sent; reads it back for that if `verify`, and asks
    /// `stop` meanwhile.
    ///
    /// # Errors
    /// `Corrupt` if it is not what was sent; what `stop` says; what the operating system said.
    pub(crate) fn complete(self, blake3: &str, verify: bool, stop: &Check) -> Result<Whole> {
        let damaged = |what: &str| Err(Error::new(Kind::Corrupt, what).at_path(&self.path));
        let failed = |e| Error::io(e, "the image could not be written to its disk");
        if self.at != self.size {
            return damaged("fewer bytes came than were announced");
        }
        let own = self.hasher.finalize().to_hex().to_string();
        if own != blake3 {
            return damaged("the image was damaged on its way");
        }
        let since = Duration::from_secs(self.modified.seconds)
            .saturating_add(Duration::from_nanos(u64::from(self.modified.nanos)));
        let time = SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH);
        folder::set_modified(self.file(), time, &self.path)
            .map_err(|e| Error::io(e, "cannot set the image's time").at_path(&self.path))?;
        self.file().sync_all().map_err(|e| failed(e).at_path(&self.path))?;
        if verify && self.read_back(stop)? != own {
            return damaged("the image read back differs from what was written");
        }
        Ok(Whole { incoming: self, blake3: own })
    }

    fn read_back(&self, stop: &Check) -> Result<String> {
        let file = self.file().try_clone();
        let file = file.map_err(|e| Error::io(e, "cannot read the file").at_path(&self.path))?;
        // What is on disk, not what is still in memory; where that is not possible, memory is asked.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        let file = SourceFile::of_open(file, self.path.clone())?;
        hash::whole_with(&file, 1, &(), stop)
    }
}

#[cfg(test)]
mod tests;
