//! Making a finished image a point: check, sync, rename, manifest. The manifest is the commit.
//!
//! Until then the image is called `.partial`, and its manifest-to-be is beside the manifests as
//! that of the `.partial`: whoever finds both after a crash can finish the work.
//!
//! The folder may be somebody else's, who can exchange any name in it at any time. So it is opened
//! once, and the image is looked at, checked, hashed and synced by the descriptor that it was made
//! with; its name is compared with that before it is renamed and after.

mod hardware;
pub(crate) mod hasher;
pub(crate) mod report;
pub(crate) mod vm;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, SystemTime};

use self::hasher::AheadHasher;
use super::state::leftover;
use super::state::leftover::CreatedFile;
use crate::error::{Error, Kind, Result, Severity};
use crate::failpoint::step;
use crate::folder::{Access, EntryKind, FileId, FileMode, Folder};
use crate::hash::Check;
use crate::hash::subtrees::KnownSubtrees;
use crate::journal::unfinished::HEADER_SUFFIX;
use crate::layer::qcow2::check as structure;
use crate::layer::qcow2::create::NewImage;
use crate::layer::{Format, ImageInfo};
use crate::layout::Level;
use crate::manifest::{Manifest, fingerprint_of};
use crate::qemu_img::CheckResult;
use crate::storage::{OpenFile, SourceFile};
use crate::{folder, manifest, qemu_img};

/// Ends the names of images that are no points yet.
const PARTIAL: &str = ".partial";
/// Ends the names of notes of fleece images.
const FLEECE_NOTE: &str = ".fleece";
/// Ends the names of journals; `fold.json` alone has another.
const JOURNAL: &str = ".journal";

/// The name of an image that is not a point yet.
pub(crate) fn partial_name(image: &str) -> String {
    format!("{image}{PARTIAL}")
}

/// Whether a file of this name beside the manifests is taken for a journal, a saved header, an announcement or a note:
/// whoever writes to the directory next does what it says.
pub(crate) fn is_acted_on(name: &[u8]) -> bool {
    let ends = [HEADER_SUFFIX, JOURNAL, PARTIAL, manifest::ANNOUNCED, FLEECE_NOTE];
    ends.iter().any(|end| name.ends_with(end.as_bytes()))
}

/// Whether there is an image of this name that is not a point yet.
pub(crate) fn has_partial(folder: &Folder, image: &OsStr) -> bool {
    folder.has(partial_of(image))
}

fn partial_of(image: &OsStr) -> OsString {
    let mut name = image.to_os_string();
    name.push(PARTIAL);
    name
}

/// Writes down what the image will be once it is complete.
///
/// # Errors
/// As [`manifest::write`].
pub(crate) fn announce(folder: &Folder, manifest: &Manifest) -> Result<()> {
    let mut pending = manifest.clone();
    pending.image = partial_name(&manifest.image);
    manifest::write_in(folder, &pending)?;
    Ok(())
}

/// The folder for manifests, made if it is not there.
///
/// # Errors
/// What the operating system said; a refusal if it is a link.
pub(crate) fn side_folder(folder: &Folder) -> Result<Folder> {
    folder.make_folder(manifest::FOLDER).map_err(|e| {
        Error::io(e, "cannot make the folder for manifests").at_path(folder.join(manifest::FOLDER))
    })
}

/// Notes where the fleece image of an announced image will be, so that it can be removed even if
/// the journal is lost.
///
/// # Errors
/// What the operating system said.
pub(crate) fn note_fleece(folder: &Folder, image: &str, fleece: &CreatedFile) -> Result<()> {
    let name = fleece_note(image);
    let side = side_folder(folder)?;
    let failed = |e| Error::io(e, "cannot write the file").at_path(side.join(&name));
    side.write_whole(&name, &leftover::note(fleece)).map_err(failed)
}

fn fleece_note(image: &str) -> String {
    format!("{}{FLEECE_NOTE}", partial_name(image))
}

/// Removes a noted fleece image, and the note. What cannot be removed is no reason against a point.
fn drop_fleece(folder: &Folder, image: &str) {
    let Ok(side) = folder.folder(manifest::FOLDER) else { return };
    let name = fleece_note(image);
    let removed = side.read_if_there(&name, leftover::LONGEST_NOTE).and_then(|note| {
        let Some(note) = note else { return Ok(()) };
        leftover::remove_noted(&note, folder.path());
        side.remove_if_there(&name).map(drop)
    });
    if let Err(e) = removed {
        log::warn!("{}", Error::io(e, "cannot remove the note").at_path(side.join(&name)).report());
    }
}

/// What was announced for `image`, if anything.
///
/// # Errors
/// As [`manifest::read`].
pub(crate) fn announced(folder: &Folder, image: &str) -> Result<Option<Manifest>> {
    let pending = pending(folder, image)?;
    Ok(pending.map(|m| Manifest { image: image.to_string(), ..m }))
}

/// The announcement of `image` as it stands: of the `.partial`, or of the image itself if it came from elsewhere.
fn pending(folder: &Folder, image: &str) -> Result<Option<Manifest>> {
    let partial = partial_name(image);
    let Some(text) = manifest::read_text(folder, OsStr::new(&partial))? else { return Ok(None) };
    let path = manifest::manifest_path(folder.path(), OsStr::new(&partial));
    let m = manifest::parse(&text).map_err(|e| e.at_path(&path))?;
    match m.image == partial || m.image == image {
        true => Ok(Some(m)),
        false => Err(Error::new(Kind::Corrupt, "it announces another image").at_path(path)),
    }
}

/// Announces an image that comes from elsewhere, whole: `text` is what its manifest will be, to the byte.
///
/// # Errors
/// What the operating system said.
pub(crate) fn announce_text(
    folder: &Folder,
    image: &OsStr,
    text: &[u8],
    share: FileMode,
) -> Result<()> {
    let name = manifest::announcement(image);
    let side = side_folder(folder)?;
    let written = share.give_folder(&side).and_then(|()| side.write_shared(&name, text, share));
    written.map_err(|e| {
        Error::io(e, "cannot write the announcement of the manifest").at_path(side.join(&name))
    })
}

/// The last step for such an image, which has its name by now: the announcement becomes its manifest.
///
/// # Errors
/// What the operating system said; there is a manifest already.
pub(crate) fn commit_text(folder: &Folder, image: &OsStr) -> Result<()> {
    let side = side_folder(folder)?;
    let name = manifest::file_name(image);
    let renamed = side.rename_new(manifest::announcement(image), &side, &name);
    renamed
        .and_then(|()| side.sync())
        .map_err(|e| Error::io(e, "cannot rename the manifest").at_path(side.join(&name)))
}

/// Takes back what was announced for an image, if anything.
///
/// # Errors
/// What the operating system said.
pub(crate) fn withdraw(folder: &Folder, image: &OsStr) -> Result<()> {
    manifest::remove_in(folder, &partial_of(image))
}

/// Whether an image is announced, and came from elsewhere ([`announce_text`]): there is no `.partial` of it.
///
/// # Errors
/// As [`announced`].
pub(crate) fn came_whole(folder: &Folder, image: &str) -> Result<bool> {
    Ok(pending(folder, image)?.is_some_and(|p| p.image == image))
}

/// The last step for any image that has its name and was announced.
///
/// # Errors
/// As [`commit`] and [`commit_text`].
pub(crate) fn commit_announced(folder: &Folder, m: &Manifest) -> Result<()> {
    match came_whole(folder, &m.image)? {
        true => commit_text(folder, OsStr::new(&m.image)),
        false => commit(folder, m),
    }
}

/// Creates the empty image that the job will fill, for its owner and those with whom it is shared; so
/// is its folder.
///
/// # Errors
/// `Exists` if it is there, `NoSpace`, `Permission`, `Io`.
pub(crate) fn create_image(
    folder: &Folder,
    name: &str,
    image: &NewImage,
    share: FileMode,
) -> Result<OpenImage> {
    let name = partial_name(name);
    let path = folder.join(&name);
    let file = folder
        .create_new(&name)
        .map_err(|e| Error::io(e, "cannot create the file").at_path(&path))?;
    let given = share.give_folder(folder).and_then(|()| share.give(&file));
    given.map_err(|e| {
        Error::io(e, "cannot give it the --group and --mode")
            .at_path(&path)
            .remedy("only a member of a group, or root, gives files to it")
    })?;
    let held = OpenImage { file: Arc::new(file), path };
    image.write(&held.file, &held.path)?;
    Ok(held)
}

/// An image held open from before anything was written to it. What the operating system could not
/// write is told once, to those who had the file open then: whoever opens it later is told that
/// all is well, and reads the lost bytes out of the page cache.
#[derive(Debug, Clone)]
pub(crate) struct OpenImage {
    file: Arc<File>,
    path: PathBuf,
}

impl OpenImage {
    /// Opens the unfinished image that a killed run left; with `made` it must be that very file.
    /// Errors that nobody was told of yet are told here, as long as QEMU has it open without
    /// syncing it.
    ///
    /// # Errors
    /// What the operating system said; `Unsound` if it is another file.
    pub(crate) fn open(folder: &Folder, image: &str, made: Option<FileId>) -> Result<Self> {
        let name = partial_name(image);
        let path = folder.join(&name);
        let failed = |e| Error::io(e, "cannot open the image").at_path(&path);
        let file = folder.open_with(&name, Access::ReadWrite).map_err(failed)?;
        let id = FileId::of(&file.metadata().map_err(failed)?);
        if made.is_some_and(|m| !leftover::agree(m, id)) {
            return Err(replaced(&path));
        }
        Ok(OpenImage { file: Arc::new(file), path })
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Which file it is.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn id(&self) -> Result<FileId> {
        let meta = self.file.metadata();
        Ok(FileId::of(&meta.map_err(|e| self.failed(e, "cannot check the image"))?))
    }

    /// Its name at the beginning, for messages, and for a QEMU that takes no descriptors.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What hashes it while it grows; its disk has `size` bytes.
    pub(crate) fn hasher(&self, size: u64) -> AheadHasher {
        AheadHasher::new(self.file.clone(), self.path.clone(), size)
    }

    /// Its length now, which grows with what is copied; `None` if it cannot be told.
    pub(crate) fn length(&self) -> Option<u64> {
        self.file.metadata().ok().map(|m| m.len())
    }

    /// Makes it survive a power cut.
    ///
    /// # Errors
    /// Something that was ever written to it is lost: the image is worthless.
    pub(crate) fn sync(&self) -> Result<()> {
        let synced = self.file.sync_all();
        synced.map_err(|e| self.failed(e, "the image could not be written to its disk"))
    }

    /// [`manifest::fingerprint`] of it.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        fingerprint_of(&self.file).map_err(|e| self.failed(e, "cannot read the image"))
    }

    /// Fails unless `name` stands for this very file.
    ///
    /// # Errors
    /// `Unsound`, or what the operating system said.
    pub(crate) fn require_name(&self, folder: &Folder, name: &str) -> Result<()> {
        let path = folder.join(name);
        match folder.is_same(name, &self.file) {
            Ok(true) => Ok(()),
            Ok(false) => Err(replaced(&path)),
            Err(e) => Err(Error::io(e, "cannot check the image").at_path(&path)),
        }
    }

    /// To be read like any other image.
    fn source(&self) -> Result<SourceFile> {
        let file = folder::reopen(&self.file, Access::Read);
        let file = file.map_err(|e| self.failed(e, "cannot open the image"))?;
        SourceFile::of_open(file, self.path.clone())
    }

    fn failed(&self, e: std::io::Error, what: &str) -> Error {
        Error::io(e, what).at_path(&self.path)
    }
}

fn replaced(path: &Path) -> Error {
    Error::new(Kind::Unsound, "the image was replaced by another file")
        .at_path(path)
        .remedy("find out who writes to the backup directory")
}

/// How the BLAKE3 of an image comes about.
#[derive(Debug)]
pub(crate) enum Hashing {
    /// It is not hashed.
    Left,
    /// Of the complete file.
    Whole,
    /// It was begun while the file was written.
    Begun(AheadHasher),
}

/// Publishes a complete image that QEMU has closed. `manifest` is completed with what only the
/// finished file tells. `stop` is asked during long work; what it says ends that, and the image stays
/// as it is.
///
/// # Errors
/// The image is unsound, or something could not be written; then it is no point.
pub(crate) fn publish(
    folder: &Folder,
    mut manifest: Manifest,
    hashing: Hashing,
    held: &OpenImage,
    stop: &Check,
) -> Result<Manifest> {
    let partial = partial_name(&manifest.image);
    // First of all: what is read below comes out of the page cache, written or not.
    held.sync()?;
    held.require_name(folder, &partial)?;
    check(&held.path, &held.file, manifest.virtual_size, stop)?;
    step("checked");
    set_time(held, folder, &manifest)?;
    held.sync()?;
    step("synced");
    complete(&mut manifest, held, hashing, stop)?;
    // The announcement, now complete, is what a recovery after the rename writes as manifest.
    announce(folder, &manifest)?;
    step("announced");
    rename(folder, held, &manifest.image)?;
    step("renamed");
    sync(folder)?;
    commit(folder, &manifest)?;
    Ok(manifest)
}

/// Gives the image its final name, and makes sure that it was the image that got it.
fn rename(folder: &Folder, held: &OpenImage, image: &str) -> Result<()> {
    let partial = partial_name(image);
    held.require_name(folder, &partial)?;
    let failed = |e| Error::io(e, "cannot rename the image").at_path(folder.join(image));
    folder.rename_new(&partial, folder, image).map_err(failed)?;
    held.require_name(folder, image).inspect_err(|_| {
        // Whatever it is, it came here by our rename and is no point.
        let _ = folder.remove_if_there(image);
    })
}

/// The last step: the manifest, then the announcement goes.
///
/// # Errors
/// As [`manifest::write`].
pub(crate) fn commit(folder: &Folder, manifest: &Manifest) -> Result<()> {
    manifest::write_in(folder, manifest)?;
    step("committed");
    drop_fleece(folder, &manifest.image);
    manifest::remove_in(folder, OsStr::new(&partial_name(&manifest.image)))
}

/// Removes an image that will not be a point, and its announcement.
///
/// # Errors
/// What the operating system said.
pub(crate) fn discard(folder: &Folder, image: &str) -> Result<()> {
    drop_fleece(folder, image);
    discard_image(folder, image)?;
    manifest::remove_in(folder, OsStr::new(&partial_name(image)))
}

/// Removes an unfinished image alone: no recovery can make a point of it then.
///
/// # Errors
/// What the operating system said.
pub(crate) fn discard_image(folder: &Folder, image: &str) -> Result<()> {
    let name = partial_name(image);
    let gone = folder.remove_if_there(&name).map(drop);
    gone.map_err(|e| Error::io(e, "cannot remove the image").at_path(folder.join(&name)))
}

fn complete(m: &mut Manifest, held: &OpenImage, hashing: Hashing, stop: &Check) -> Result<()> {
    let source = held.source()?;
    m.file_size = source.identity().size;
    m.fingerprint = Some(held.fingerprint()?);
    let known = match hashing {
        Hashing::Left => None,
        Hashing::Whole => Some(KnownSubtrees::default()),
        Hashing::Begun(hasher) => Some(hasher.end(stop)?),
    };
    let hash = |known| crate::hash::rest_with(&source, &known, jobs(), stop);
    m.blake3 = known.map(hash).transpose()?;
    Ok(())
}

/// Tables of an image that holds next to nothing, in bytes.
const MAX_TABLES: u64 = 64 << 20;

fn jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// qemu-img's check, by which others judge an image that QEMU wrote: no error and no leak; and the
/// size.
///
/// That qemu-img could not look is no verdict: unless the image cannot be read by us either, it may
/// be as good as any.
fn check(path: &Path, file: &File, size: u64, stop: &Check) -> Result<()> {
    let longest = size.saturating_mul(2).saturating_add(MAX_TABLES);
    let len =
        file.metadata().map_err(|e| Error::io(e, "cannot check the image").at_path(path))?.len();
    if len > longest {
        let what = format!("the image has {len} bytes, far more than a disk of {size} can take");
        return Err(Error::new(Kind::Unsound, what).at_path(path));
    }
    let info = crate::layer::probe(&OpenFile::new(file, path)?)?;
    alone(&info, path)?;
    match qemu_img::check(file, path, &|| stop()) {
        Ok(CheckResult::Sound) => {}
        Ok(CheckResult::Leaks(said) | CheckResult::Damaged(said)) => {
            return Err(Error::new(Kind::Unsound, format!("qemu-img check: {said}")).at_path(path));
        }
        Err(e) if e.kind() == Kind::NotFound => check_alone(path, file, e)?,
        Err(e) if e.kind() == Kind::Peer => {
            let what = "the image could not be checked";
            return Err(Error::new(Kind::Busy, what).at_path(path).with_source(e));
        }
        Err(e) => return Err(e),
    }
    if info.virtual_size != size {
        let what = format!("the image has {} bytes, the disk {size}", info.virtual_size);
        return Err(Error::new(Kind::Unsound, what).at_path(path));
    }
    Ok(())
}

/// Fails if the image is not what was made for QEMU: it names no other file, whose bytes would be
/// taken for the disk's.
fn alone(info: &ImageInfo, path: &Path) -> Result<()> {
    let what = match info {
        _ if info.format != Format::Qcow2 => "the image is no longer qcow2",
        _ if info.backing_file.is_some() => {
            "the image names a backing file, which fleecefs never \
                                             sets"
        }
        _ if info.data_file.is_some() => "the image names a data file, which fleecefs never sets",
        _ => return Ok(()),
    };
    let error = Error::new(Kind::Unsound, what).at_path(path).at_offset(0);
    Err(error.remedy("check this QEMU: it wrote the image's header"))
}

/// Our own check of all tables and refcounts, where there is no qemu-img.
fn check_alone(path: &Path, file: &File, why: Error) -> Result<()> {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| log::warn!("images are not checked with qemu-img: {}", why.report()));
    let found = structure::check(&OpenFile::new(file, path)?, None);
    let all = found.findings.iter().chain(&found.refcounts);
    match all.into_iter().find(|f| f.severity == Severity::Error) {
        Some(f) => Err(Error::new(Kind::Unsound, f.message.clone()).at_path(path)),
        None => Ok(()),
    }
}

/// Gives the file an mtime after its predecessors': qmprestore sorts by it.
fn set_time(held: &OpenImage, dir: &Folder, m: &Manifest) -> Result<()> {
    let mut time = SystemTime::now();
    let own = partial_name(&m.image);
    let list = dir.entries().unwrap_or_default().into_iter();
    for e in list.filter(|e| e.kind == EntryKind::File && e.name != own.as_str()) {
        if let Ok(Some(t)) = dir.modified(&e.name) {
            time = time.max(t.checked_add(Duration::from_secs(1)).unwrap_or(t));
        }
    }
    folder::set_modified(&held.file, time, &held.path)
        .map_err(|e| held.failed(e, "cannot set the image's time"))
}

/// Makes what happened to names in a folder survive a power cut.
///
/// # Errors
/// What the operating system said.
pub(crate) fn sync(folder: &Folder) -> Result<()> {
    folder.sync().map_err(|e| Error::io(e, "cannot sync the folder").at_path(folder.path()))
}

/// Makes a folder, and those above it, that only their owner enters, and that survive a power cut.
///
/// # Errors
/// What the operating system said; a refusal if there is a link on the path.
pub(crate) fn make_folders(path: &Path) -> Result<Folder> {
    folder::make_folders(path).map_err(|e| {
        let what = Error::io(e, "cannot make the folder").at_path(path);
        match folder::look(path) {
            Ok(meta) if meta.is_file() => {
                Error::new(Kind::Exists, "this is a file").at_path(path).remedy("name a folder")
            }
            _ => what,
        }
    })
}

/// The kind of link and files that qmpbackup has beside an image without timestamp. Only its text
/// matters: nothing follows it.
///
/// # Errors
/// What the operating system said.
pub(crate) fn link_plain(folder: &Folder, image: &str, level: Level) -> Result<()> {
    let link = format!("{}-{image}", super::names::level_word(level));
    folder
        .remove_if_there(&link)
        .and_then(|_| folder.make_link(&folder.join(image), &link))
        .map_err(|e| {
            Error::io(e, "cannot make the link beside the image").at_path(folder.join(&link))
        })
        .map_err(|e| e.remedy("the point is complete without it; --no-symlink makes no link"))
}

#[cfg(test)]
mod tests;
