//! Making a finished image a point: check, sync, rename, manifest. The manifest is the commit.
//!
//! Until then the image is called `.partial`, and its manifest-to-be lies beside the manifests as
//! that of the `.partial`: whoever finds both after a crash can finish the work.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, SystemTime};

use crate::chain::Level;
use crate::chain::manifest::{self, Manifest, fingerprint};
use crate::error::{Error, Kind, Result, Severity};
use crate::layer::qcow2::check as structure;
use crate::layer::qcow2::create::NewImage;
use crate::qemu_img::{self, Verdict};
use crate::qmp::steps::step;
use crate::storage::OpenFile;

/// The name of an image that is not a point yet.
pub fn partial_name(image: &str) -> String {
    format!("{image}.partial")
}

/// Writes down what the image will be once it is complete.
///
/// # Errors
/// As [`manifest::write`].
pub fn announce(dir: &Path, manifest: &Manifest) -> Result<()> {
    let mut pending = manifest.clone();
    pending.image = partial_name(&manifest.image);
    manifest::write(dir, &pending)?;
    Ok(())
}

/// Notes where the fleece image of an announced image will be, so that it can be removed even if
/// the journal is lost.
///
/// # Errors
/// What the operating system said.
pub fn note_fleece(dir: &Path, image: &str, fleece: &Path) -> Result<()> {
    write_whole(&fleece_note(dir, image), fleece.as_os_str().as_bytes())
}

fn fleece_note(dir: &Path, image: &str) -> PathBuf {
    dir.join(manifest::FOLDER).join(format!("{}.fleece", partial_name(image)))
}

/// Removes a noted fleece image, and the note.
fn drop_fleece(dir: &Path, image: &str) -> Result<()> {
    let note = fleece_note(dir, image);
    let Ok(text) = std::fs::read(&note) else { return Ok(()) };
    let path = Path::new(OsStr::from_bytes(&text));
    // The note lies where others may write: nothing but a fleece is ever removed for it.
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let ours = name.starts_with(super::names::PREFIX) && name.ends_with(".fleece.raw");
    if path.is_absolute() && ours {
        remove_if_there(path)?;
    }
    remove_if_there(&note)
}

/// What was announced for `image`, if anything.
///
/// # Errors
/// As [`manifest::read`].
pub fn announced(dir: &Path, image: &str) -> Result<Option<Manifest>> {
    let pending = manifest::read(dir, OsStr::new(&partial_name(image)))?;
    Ok(pending.map(|mut m| {
        m.image = image.to_string();
        m
    }))
}

/// Creates the empty image that the job will fill, private to its owner.
///
/// # Errors
/// `Exists` if it is there, `NoSpace`, `Permission`, `Io`.
pub fn create_image(path: &Path, image: &NewImage) -> Result<Held> {
    let held = Held { file: Arc::new(create_private(path)?), path: path.to_path_buf() };
    image.write(&held.file, path)?;
    Ok(held)
}

/// An image held open from before anything was written to it. What the operating system could not
/// write is told once, to those who had the file open then: whoever opens it later is told that
/// all is well, and reads the lost bytes out of the page cache.
#[derive(Debug, Clone)]
pub struct Held {
    file: Arc<File>,
    path: PathBuf,
}

impl Held {
    /// Opens an image that a killed run left. Errors that nobody was told of yet are told here, as
    /// long as QEMU has it open without syncing it.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(path)
            .map_err(|e| Error::io(e, "cannot open the image").at_path(path))?;
        Ok(Held { file: Arc::new(file), path: path.to_path_buf() })
    }

    /// Its length now, which grows with what is copied; `None` if it cannot be told.
    pub fn length(&self) -> Option<u64> {
        self.file.metadata().ok().map(|m| m.len())
    }

    /// Makes it survive a power cut.
    ///
    /// # Errors
    /// Something that was ever written to it is lost: the image is worthless.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| {
            Error::io(e, "the image could not be written to its disk").at_path(&self.path)
        })
    }
}

/// Creates an empty file with mode 0600.
///
/// # Errors
/// `Exists` and the rest of what the operating system says.
pub fn create_private(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| Error::io(e, "cannot create the file").at_path(path))
}

/// Publishes a complete image that QEMU has closed. `manifest` is completed with what only the
/// finished file tells.
///
/// # Errors
/// The image is unsound, or something could not be written; then it is no point.
pub fn publish(dir: &Path, manifest: Manifest, hash: bool) -> Result<Manifest> {
    let held = Held::open(&dir.join(partial_name(&manifest.image)))?;
    publish_held(dir, manifest, hash, &held)
}

/// As [`publish`], of an image that was held open all the time.
///
/// # Errors
/// As [`publish`].
pub fn publish_held(
    dir: &Path,
    mut manifest: Manifest,
    hash: bool,
    held: &Held,
) -> Result<Manifest> {
    let partial = dir.join(partial_name(&manifest.image));
    let image = dir.join(&manifest.image);
    // First of all: what is read below comes out of the page cache, written or not.
    held.sync()?;
    check(&partial, &held.file, manifest.virtual_size)?;
    step("checked");
    set_time(&held.file, dir, &manifest)?;
    held.sync()?;
    step("synced");
    complete(&mut manifest, &partial, hash)?;
    // The announcement, now complete, is what a recovery after the rename writes as manifest.
    announce(dir, &manifest)?;
    step("announced");
    rename_new(&partial, &image)?;
    step("renamed");
    sync_dir(dir)?;
    commit(dir, &manifest)?;
    Ok(manifest)
}

/// The last step: the manifest, then the announcement goes.
///
/// # Errors
/// As [`manifest::write`].
pub fn commit(dir: &Path, manifest: &Manifest) -> Result<()> {
    manifest::write(dir, manifest)?;
    step("committed");
    drop_fleece(dir, &manifest.image)?;
    manifest::remove(dir, OsStr::new(&partial_name(&manifest.image)))
}

/// Removes an image that will not be a point, and its announcement.
///
/// # Errors
/// What the operating system said.
pub fn discard(dir: &Path, image: &str) -> Result<()> {
    drop_fleece(dir, image)?;
    remove_if_there(&dir.join(partial_name(image)))?;
    manifest::remove(dir, OsStr::new(&partial_name(image)))
}

/// Removes an unfinished image alone: no recovery can make a point of it then.
///
/// # Errors
/// What the operating system said.
pub fn discard_image(dir: &Path, image: &str) -> Result<()> {
    remove_if_there(&dir.join(partial_name(image)))
}

/// Removes a file; that it is not there is fine.
///
/// # Errors
/// What the operating system said.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(e, "cannot remove the file").at_path(path))
        }
        _ => Ok(()),
    }
}

fn complete(m: &mut Manifest, file: &Path, hash: bool) -> Result<()> {
    let meta = std::fs::metadata(file)
        .map_err(|e| Error::io(e, "cannot look at the image").at_path(file))?;
    m.file_size = meta.len();
    m.fingerprint = Some(fingerprint(file)?);
    m.blake3 = if hash { Some(crate::hash::file(file)?) } else { None };
    Ok(())
}

/// qemu-img's check, by which others judge an image that QEMU wrote: no error and no leak; and the
/// size.
///
/// That qemu-img could not look is no verdict: unless the image cannot be read by us either, it may
/// be as good as any.
fn check(path: &Path, file: &File, size: u64) -> Result<()> {
    let info = crate::layer::probe(&OpenFile::new(file, path)?)?;
    // Nothing stops it here but its own limits: what it looks at is all metadata.
    match qemu_img::check(file, path, &|| Ok(())) {
        Ok(Verdict::Sound) => {}
        Ok(Verdict::Leaks(said) | Verdict::Damaged(said)) => {
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

/// Our own check of all tables and refcounts, where there is no qemu-img.
fn check_alone(path: &Path, file: &File, why: Error) -> Result<()> {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| log::warn!("images are checked by fleecefs alone: {}", why.report()));
    let found = structure::check(&OpenFile::new(file, path)?, None);
    let all = found.findings.iter().chain(&found.refcounts);
    match all.into_iter().find(|f| f.severity == Severity::Error) {
        Some(f) => Err(Error::new(Kind::Unsound, f.message.clone()).at_path(path)),
        None => Ok(()),
    }
}

/// Gives the file an mtime after its predecessors': qmprestore sorts by it.
fn set_time(file: &File, dir: &Path, m: &Manifest) -> Result<()> {
    let mut time = SystemTime::now();
    let list = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for e in list {
        let name = e.file_name();
        if name.as_bytes() == partial_name(&m.image).as_bytes() {
            continue;
        }
        let Ok(meta) = e.metadata() else { continue };
        if let Ok(t) = meta.modified()
            && meta.is_file()
        {
            time = time.max(t + Duration::from_secs(1));
        }
    }
    file.set_modified(time)
        .map_err(|e| Error::io(e, "cannot set the image's time").at_path(dir.join(&m.image)))
}

/// Renames without ever replacing another file.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let c = |p: &Path| {
        std::ffi::CString::new(p.as_os_str().as_bytes())
            .map_err(|_| Error::new(Kind::Usage, "a NUL byte in a file name").at_path(p))
    };
    let (a, b) = (c(from)?, c(to)?);
    // SAFETY: two valid C strings.
    let r = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            a.as_ptr(),
            libc::AT_FDCWD,
            b.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    if r == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    if matches!(e.raw_os_error(), Some(libc::EINVAL) | Some(libc::ENOSYS)) && !to.exists() {
        // File systems without RENAME_NOREPLACE; the target's lock keeps others out.
        return std::fs::rename(from, to)
            .map_err(|e| Error::io(e, "cannot rename the image").at_path(to));
    }
    Err(Error::io(e, "cannot rename the image").at_path(to))
}

/// Makes what happened to names in a folder survive a power cut.
///
/// # Errors
/// What the operating system said.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| Error::io(e, "cannot sync the folder").at_path(dir))
}

/// Writes a small file whole or not at all.
///
/// # Errors
/// What the operating system said.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = OsString::from(manifest::TEMPORARY);
    name.push(path.file_name().unwrap_or_default());
    let temporary: PathBuf = path.with_file_name(name);
    remove_if_there(&temporary)?;
    let mut file = create_private(&temporary)?;
    std::io::Write::write_all(&mut file, bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|e| Error::io(e, "cannot write the file").at_path(path))?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Makes a folder, and those above it, that only their owner enters, and that survive a power cut.
///
/// # Errors
/// What the operating system said.
pub fn make_dir(path: &Path) -> Result<()> {
    let missing: Vec<&Path> =
        path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    super::lock::make_dir(path)?;
    for made in missing.iter().rev() {
        // The parent of a relative path's first part is the empty path.
        let parent = made.parent().filter(|p| !p.as_os_str().is_empty());
        match sync_dir(parent.unwrap_or(Path::new("."))) {
            // A folder may let others make folders in it and not look into it.
            Err(e) if e.kind() != Kind::Permission => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// The kind of link and files that qmpbackup has beside an image without timestamp.
///
/// # Errors
/// What the operating system said.
pub fn link_plain(dir: &Path, image: &str, level: Level) -> Result<()> {
    let link = dir.join(format!("{}-{image}", super::names::level_word(level)));
    remove_if_there(&link)?;
    std::os::unix::fs::symlink(dir.join(image), &link)
        .map_err(|e| Error::io(e, "cannot make the link").at_path(&link))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::Quiet;
    use crate::backup::recover::sweep;
    use crate::chain::manifest::tests::example;

    #[test]
    fn a_damaged_announcement_stops_no_other() {
        let d = tempfile::tempdir().unwrap();
        for image in ["FULL-1-d", "FULL-2-d"] {
            announce(d.path(), &example(image, Level::Full, None)).unwrap();
            std::fs::write(d.path().join(partial_name(image)), "x").unwrap();
        }
        std::fs::write(d.path().join(".fleecefs/FULL-1-d.partial.json"), "{").unwrap();
        sweep(d.path(), &Quiet).unwrap();
        assert!(d.path().join("FULL-1-d.partial").exists());
        assert!(!d.path().join("FULL-2-d.partial").exists());
    }

    #[test]
    fn folders_are_made_whole_and_private() {
        let d = tempfile::tempdir().unwrap();
        let path = d.path().join("a/b/c");
        make_dir(&path).unwrap();
        make_dir(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o700);
    }
}
