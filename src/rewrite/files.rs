//! Steps on single files: checking, copying, hashing, changing a backing pointer.

use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::folders::{open_folder, side_folder};
use super::member::Member;
use crate::error::{Error, Kind, Result};
use crate::folder::{Access, EntryKind, FileId, Folder, Replace, absent_is_none};
use crate::job::Work;
use crate::journal::unfinished::HEADER_SUFFIX;
use crate::layer::{Format, ImageInfo};
use crate::layout::name;
use crate::manifest::{Manifest, fingerprint_of};
use crate::qemu_img::CheckResult;
use crate::restore::clone::Cloner;
use crate::restore::options::target_error;
use crate::restore::temp::folder_of;
use crate::restore::{Reflink, check_removable};
use crate::storage::{ReadAt, SourceFile};
use crate::text::path_text;
use crate::{folder, manifest, qemu_img};

/// Ends the name of a saved header that is not yet complete.
pub(crate) const UNFINISHED_HEADER: &str = ".header.tmp";
/// Bytes copied at once.
const BUFFER: usize = 1 << 20;

/// Checks a file before it is altered: its structure by QEMU, its bytes by the manifest's hash.
///
/// # Errors
/// `Unsound` with what was found.
pub(crate) fn check(m: &Member, work: &Work) -> Result<()> {
    let unsound = |text: String| {
        Err(Error::new(Kind::Unsound, text)
            .at_path(&m.path)
            .remedy("restore this file from another copy; --skip-check changes it anyway"))
    };
    if m.format == Format::Qcow2 {
        let source = SourceFile::look(&m.path)?;
        match qemu_img::check(&*source.file()?, &m.path, &|| work.check()) {
            Ok(CheckResult::Sound) => {}
            Ok(CheckResult::Leaks(_)) => log::warn!("{}: has leaked clusters", path_text(&m.path)),
            Ok(CheckResult::Damaged(said)) => {
                return unsound(format!("qemu-img check says: {said}"));
            }
            // Too damaged even to be looked at.
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Truncated | Kind::Peer) => {
                return unsound(e.report());
            }
            Err(e) => return Err(e),
        }
    }
    let Some(manifest) = manifest_of(&m.path)? else { return Ok(()) };
    let Some(wanted) = manifest.blake3 else { return Ok(()) };
    if hash(&m.path, work)? != wanted {
        return unsound("its content does not match the hash in its manifest".into());
    }
    Ok(())
}

/// The manifest of an image, if there is one.
///
/// # Errors
/// See [`manifest::read`].
pub(crate) fn manifest_of(image: &Path) -> Result<Option<manifest::Manifest>> {
    let name = image.file_name().unwrap_or_default();
    manifest::read(folder_of(image), name)
}

/// BLAKE3 of a file.
///
/// # Errors
/// Reading failed, `Interrupted`.
pub(crate) fn hash(path: &Path, work: &Work) -> Result<String> {
    let file = folder::open_file(path);
    let file = file.map_err(|e| Error::io(e, "cannot open the file").at_path(path))?;
    hash_of(&file, path, work)
}

/// BLAKE3 of an open file, called `path`.
///
/// # Errors
/// Reading failed, it changed meanwhile, `Interrupted`.
pub(crate) fn hash_of(file: &File, path: &Path, work: &Work) -> Result<String> {
    let file = file.try_clone().map_err(|e| Error::io(e, "cannot use the file").at_path(path))?;
    let source = SourceFile::of_open(file, path.to_path_buf())?;
    crate::hash::whole_with(&source, work.workers, &(), &|| work.check())
}

/// Copies `from` into the empty file `to` (called `path`): cloned where that works, holes stay
/// holes.
///
/// # Errors
/// Reading or writing failed, `Interrupted`.
pub(crate) fn copy(from: &Path, to: &File, path: &Path, work: &Work) -> Result<()> {
    copy_from(&SourceFile::look(from)?, to, path, work)
}

/// As [`copy`], of a file that has been looked at.
///
/// # Errors
/// See [`copy`].
pub(crate) fn copy_from(source: &SourceFile, to: &File, path: &Path, work: &Work) -> Result<()> {
    let failed = |e| target_error(e, "writing failed", path);
    to.set_len(source.len()).map_err(failed)?;
    let cloner = Cloner::new(to, Reflink::Auto);
    // A length of 0 means up to the end, which need not be at a block's border.
    if cloner.is_on() && cloner.clone(&*source.file()?, 0, to, 0, 0)? {
        return Ok(());
    }
    let seek = |e| Error::io(e, "cannot find the holes of the file").at_path(source.path());
    let mut buf = vec![0; BUFFER];
    let mut at = 0;
    while let Some(data) = source.seek_data(at).map_err(seek)? {
        let hole = source.seek_hole(data).map_err(seek)?;
        at = data;
        while at < hole {
            let n = (BUFFER as u64).min(hole - at) as usize;
            source.read_exact_at(&mut buf[..n], at)?;
            to.write_all_at(&buf[..n], at).map_err(failed)?;
            work.did(n as u64)?;
            at += n as u64;
        }
    }
    source.check_unchanged()
}

/// Fails if `name` is not the file `id` any more: somebody has exchanged it, or the folder.
///
/// # Errors
/// `Changed`; what the operating system said.
pub(crate) fn check_same(dir: &Folder, name: &OsStr, id: FileId) -> Result<()> {
    let path = dir.join(name);
    let meta = dir.look(name).map_err(|e| target_error(e, "cannot check the file", &path))?;
    if FileId::of(&meta) == id {
        return Ok(());
    }
    Err(exchanged(&path))
}

/// Whether an image is the one that a manifest speaks of, as far as its length and ends tell.
///
/// # Errors
/// It cannot be read.
pub(crate) fn is_as_recorded(dir: &Folder, image: &OsStr, m: &Manifest) -> std::io::Result<bool> {
    let file = dir.open_file(image)?;
    let same_length = file.metadata()?.len() == m.file_size;
    Ok(same_length && (m.fingerprint.is_none() || Some(fingerprint_of(&file)?) == m.fingerprint))
}

/// As [`check_same`], for whoever finishes the work of another and does not know which file the name stood for:
/// fails if an image is another than its manifest says. Without one nothing can be told.
///
/// # Errors
/// `Changed`; what the operating system said.
pub(crate) fn check_recorded(dir: &Folder, name: &OsStr, m: Option<&Manifest>) -> Result<()> {
    let Some(m) = m else { return Ok(()) };
    let path = dir.join(name);
    match absent_is_none(is_as_recorded(dir, name, m)) {
        Ok(None | Some(true)) => Ok(()),
        Ok(Some(false)) => {
            let what = "another file than its manifest records has this name since a command was interrupted";
            Err(Error::new(Kind::Changed, what)
                .at_path(path)
                .remedy("if it is to stay, move it to another folder, and try again"))
        }
        Err(e) => Err(target_error(e, "cannot check the file", &path)),
    }
}

/// Another file has the name of one that was to be altered or removed.
pub(crate) fn exchanged(path: &Path) -> Error {
    Error::new(Kind::Changed, "another file has taken its name since the folder was read")
        .at_path(path)
        .remedy("find out what changes this folder, and try again")
}

/// Fails if an image cannot be changed in place: another name of it may be anywhere, in a copy of the
/// backup made with hard links for example.
///
/// # Errors
/// `Unsupported`; what the operating system said.
pub(crate) fn check_alterable(dir: &Folder, name: &OsStr) -> Result<()> {
    dir.open_with(name, Access::ReadWrite).map(drop).map_err(|e| not_alterable(e, dir.join(name)))
}

fn not_alterable(e: std::io::Error, image: PathBuf) -> Error {
    let e = target_error(e, "its header cannot be changed", &image);
    match e.kind() {
        Kind::Unsupported => e.remedy(
            "if it has hard links, make a copy of its own under this name: cp -a --reflink=auto, \
             then mv",
        ),
        _ => e,
    }
}

/// What is in an image's header.
///
/// # Errors
/// See [`crate::layer::probe`].
pub(crate) fn probe(path: &Path) -> Result<ImageInfo> {
    crate::layer::probe(&SourceFile::look(path)?)
}

/// Removes a file if it is there, for good; whether it was.
///
/// # Errors
/// What the operating system said.
pub(crate) fn remove_in(dir: &Folder, name: &OsStr) -> Result<bool> {
    let remove = || {
        let was = dir.remove_if_there(name)?;
        if was {
            dir.sync()?;
        }
        Ok(was)
    };
    remove().map_err(|e| match check_removable(dir, name) {
        Err(why) => why,
        Ok(()) => target_error(e, "cannot remove the file", &dir.join(name)),
    })
}

/// How an image in the same folder is called in a backing pointer: relative, so that the folder
/// can be moved. QEMU takes what is before a colon for a protocol.
pub(crate) fn pointer_to(base: &Path) -> OsString {
    let name = base.file_name().unwrap_or_default();
    let mut pointer = OsString::new();
    if name.as_bytes().contains(&b':') {
        pointer.push("./");
    }
    pointer.push(name);
    pointer
}

/// The name of a format for QEMU.
pub(crate) fn format_name(format: Format) -> Option<&'static str> {
    match format {
        Format::Qcow2 => Some("qcow2"),
        Format::Raw => Some("raw"),
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

/// Lets `image` name `base` as its backing file, or none. Its first cluster, all that changes, is
/// saved before and removed after; its time stays; its manifest gets the new hash.
///
/// # Errors
/// What was met; the image is then as before, or [`restore_headers`] makes it so.
pub(crate) fn set_backing(image: &Path, base: Option<(&Path, Format)>, work: &Work) -> Result<()> {
    let base = base.map(|(path, format)| (pointer_to(path), format));
    set_pointer(image, base, work)
}

/// As [`set_backing`], with the pointer as it is to be written.
///
/// # Errors
/// See [`set_backing`].
pub(crate) fn set_pointer(
    image: &Path,
    base: Option<(OsString, Format)>,
    work: &Work,
) -> Result<()> {
    let format = match &base {
        Some((pointer, format)) => Some(format_name(*format).ok_or_else(|| {
            Error::new(Kind::Unsupported, "QEMU has no such format").at_path(pointer)
        })?),
        None => None,
    };
    let pointer = base.map(|(pointer, _)| pointer).unwrap_or_default();
    let dir = open_folder(folder_of(image))?;
    let name = image.file_name().unwrap_or_default();
    check_may_be_qcow2(&dir, name)?;
    let info = {
        let file = dir.open_file(name);
        let file = file.map_err(|e| target_error(e, "cannot open the image", image))?;
        crate::layer::probe(&SourceFile::of_open(file, image.to_path_buf())?)?
    };
    let named = info.backing_file.as_deref().unwrap_or_default();
    if OsStr::new(named) == pointer
        && (named.is_empty() || info.backing_format.as_deref() == format)
    {
        return Ok(());
    }
    // All that changes the image goes through this descriptor.
    let file = dir
        .open_with(name, Access::ReadWrite)
        .map_err(|e| not_alterable(e, image.to_path_buf()))?;
    let manifest = manifest::read_in(&dir, name)?;
    let times = file
        .metadata()
        .and_then(|m| Ok((m.accessed()?, m.modified()?)))
        .map_err(|e| target_error(e, "cannot check the file", image))?;
    let hash_before = manifest.as_ref().and_then(|m| m.blake3.clone());
    let side = side_folder(&dir)?;
    let cluster = u64::from(info.cluster_size);
    let saved = save_header(&side, name, &file, cluster, hash_before.as_deref())?;
    if let Some(m) = manifest.as_ref().filter(|m| m.blake3.is_some() || m.fingerprint.is_some()) {
        // From here to the end the hash is not known, rather than wrong.
        let (blake3, fingerprint) = (None, None);
        manifest::write_in(&dir, &manifest::Manifest { blake3, fingerprint, ..m.clone() })?;
    }
    let name = image.file_name().unwrap_or_default();
    let file = dir
        .open_with(name, Access::ReadWrite)
        .map_err(|e| target_error(e, "cannot open the file", image))?;
    let backing = format.map(|format| (pointer.as_os_str(), format));
    crate::layer::qcow2::backing::set_backing(&file, image, backing)?;
    let times = FileTimes::new().set_accessed(times.0).set_modified(times.1);
    folder::set_times(&file, times, image)
        .and_then(|()| file.sync_all())
        .map_err(|e| target_error(e, "cannot write to disk", image))?;
    if let Some(mut m) = manifest {
        if m.blake3.is_some() {
            m.blake3 = Some(hash_of(&file, image, work)?);
        }
        let failed = |e| target_error(e, "cannot check it", image);
        m.file_size = file.metadata().map_err(failed)?.len();
        m.fingerprint = Some(manifest::fingerprint_of(&file).map_err(failed)?);
        manifest::write_in(&dir, &m)?;
    }
    remove_in(&side, &saved).map(drop)
}

/// Such a file begins with the hash that the image has with this cluster, in hexadecimal.
const HASH_LEN: usize = 64;
/// Stands for a hash that is not known.
const NO_HASH: [u8; HASH_LEN] = [b'-'; HASH_LEN];

/// Saves the first cluster of an image, the open `file`, beside the manifests; under which name.
fn save_header(
    side: &Folder,
    image: &OsStr,
    file: &File,
    cluster: u64,
    hash: Option<&str>,
) -> Result<OsString> {
    let mut name = image.to_os_string();
    name.push(HEADER_SUFFIX);
    let save = || {
        let meta = file.metadata()?;
        let mut buf = vec![0; usize::try_from(cluster.min(meta.len())).unwrap_or(0)];
        file.read_exact_at(&mut buf, 0)?;
        let temp = side.temp()?;
        temp.file().write_all_at(hash.map_or(&NO_HASH[..], str::as_bytes), 0)?;
        temp.file().write_all_at(&buf, HASH_LEN as u64)?;
        // Its own time stands for the image's, which changing the header will move.
        folder::set_modified(temp.file(), meta.modified()?, &side.join(&name))?;
        temp.publish(&name, Replace::Yes)
    };
    save().map_err(|e| target_error(e, "cannot save the header", &side.join(&name)))?;
    Ok(name)
}

/// Puts back the first clusters that a killed run had saved for images in `dir`. They are
/// whole, and what they replace differs at most in the backing pointer.
///
/// # Errors
/// Reading or writing failed; `Corrupt` if a saved header is none, or of no image of ours.
pub(crate) fn restore_headers(dir: &Folder) -> Result<()> {
    let failed = |e| target_error(e, "cannot read the folder", dir.path());
    let side = folder::absent_is_none(dir.folder(manifest::FOLDER)).map_err(failed)?;
    let Some(side) = side else { return Ok(()) };
    let mut saved: Vec<OsString> =
        side.entries().map_err(failed)?.into_iter().map(|e| e.name).collect();
    saved.sort();
    for saved in saved {
        let Some(image) = saved.as_bytes().strip_suffix(HEADER_SUFFIX.as_bytes()) else { continue };
        let image = OsStr::from_bytes(image);
        let remedy = "verify the disk, and remove this file";
        if !name::is_image(image) {
            let what = "a saved header of a file that is not an image that fleecefs made";
            let e = Error::new(Kind::Corrupt, what).at_path(side.join(&saved));
            return Err(e.remedy(remedy));
        }
        put_back(dir, image, &side, &saved).map_err(|e| e.remedy(remedy))?;
        remove_in(&side, &saved)?;
    }
    Ok(())
}

/// The largest saved header, in bytes: a hash and a cluster.
const MAX_HEADER: u64 = HASH_LEN as u64 + (2 << 20);

/// Puts back a saved first cluster, the time the image had, and the hash that is right again.
fn put_back(dir: &Folder, image: &OsStr, side: &Folder, saved: &OsStr) -> Result<()> {
    let path = dir.join(image);
    let read = || -> std::io::Result<_> {
        let file = side.open_file(saved)?;
        Ok((folder::read_bounded(file.try_clone()?, MAX_HEADER)?, file.metadata()?.modified()?))
    };
    let (bytes, modified) =
        read().map_err(|e| target_error(e, "cannot read the saved header", &side.join(saved)))?;
    let Some((hash, cluster)) = bytes.split_at_checked(HASH_LEN) else { return Ok(()) };
    let Some(file) = folder::absent_is_none(dir.open_with(image, Access::ReadWrite))
        .map_err(|e| not_put_back(e, image, side.join(saved)))?
    else {
        return Ok(());
    };
    if !is_header_of(&file, cluster).map_err(|e| target_error(e, "cannot read the image", &path))? {
        return Err(exchanged(&path).remedy(
            "this is not the image whose header a killed run had saved: if it is to stay, remove the saved \
             header in .fleecefs, else put the image back",
        ));
    }
    file.write_all_at(cluster, 0)
        .and_then(|()| folder::set_modified(&file, modified, &path))
        .and_then(|()| file.sync_all())
        .map_err(|e| target_error(e, "cannot put back the header", &path))?;
    log::warn!("{}: put back the header that a killed run had saved", path_text(&path));
    let Some(m) = manifest::read_in(dir, image)? else { return Ok(()) };
    let known = std::str::from_utf8(hash).ok().filter(|_| hash != NO_HASH);
    let blake3 = known.map(str::to_string);
    let fingerprint = manifest::fingerprint_of(&file);
    let fingerprint = fingerprint.map_err(|e| target_error(e, "cannot read the image", &path))?;
    manifest::write_in(dir, &manifest::Manifest { blake3, fingerprint: Some(fingerprint), ..m })
}

/// Whether a saved first cluster is this image's: all that a new backing pointer leaves as it is in a qcow2
/// header is the same. (Half of the new one may have been written.)
fn is_header_of(file: &File, cluster: &[u8]) -> std::io::Result<bool> {
    let mut now = [0; 60];
    let fixed = |bytes: &[u8]| Some((bytes.get(..8)?.to_vec(), bytes.get(20..60)?.to_vec()));
    match file.read_exact_at(&mut now, 0) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| fixed(&now) == fixed(cluster)),
    }
}

/// The image is not one that a saved header can be put back into.
fn not_put_back(e: std::io::Error, image: &OsStr, saved: PathBuf) -> Error {
    let image = name::to_text(image);
    target_error(e, &format!("the saved header cannot be put back into {image}"), &saved).remedy(
        "make that a plain file with a single name (cp -a --reflink=auto, then mv), or verify the \
         disk and remove the saved header",
    )
}

/// Fails for what may be a guest's raw disk, whatever it begins with: its bytes are not to be changed.
fn check_may_be_qcow2(dir: &Folder, image: &OsStr) -> Result<()> {
    let is_raw = match manifest::read_in(dir, image)? {
        Some(m) => m.format == manifest::ImageFormat::Raw,
        None => name::promise(image) == name::Promise::Raw,
    };
    if !is_raw {
        return Ok(());
    }
    let what = "this may be a raw disk whose guest wrote a qcow2 header";
    Err(Error::new(Kind::Unsupported, what)
        .at_path(dir.join(image))
        .remedy("if it is an image: 'fleecefs verify --create --format qcow2 DIR --point POINT'"))
}

/// What an image depends on by its own words: its manifest's parent, and the file name in its
/// backing pointer. What is damaged says nothing.
pub(crate) fn stated_parent(dir: &Folder, image: &OsStr) -> (Option<OsString>, Option<OsString>) {
    let known = manifest::read_in(dir, image).ok().flatten();
    let is_raw = known.as_ref().is_some_and(|m| m.format == manifest::ImageFormat::Raw);
    let parent = known.and_then(|m| m.parent).map(OsString::from);
    if is_raw {
        // A guest may have written any header to its disk.
        return (parent, None);
    }
    let open = || SourceFile::of_open(dir.open_file(image).ok()?, dir.join(image)).ok();
    let pointer = open().and_then(|f| crate::layer::probe(&f).ok()).and_then(|i| i.backing_file);
    (parent, pointer.as_deref().and_then(crate::chain::backing_name))
}

/// The names of the plain files of a folder that may be images.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn images(dir: &Folder) -> Result<Vec<OsString>> {
    let entries = dir.entries();
    let entries = entries.map_err(|e| target_error(e, "cannot read the folder", dir.path()))?;
    let mut found: Vec<OsString> = entries
        .into_iter()
        .filter(|e| e.kind == EntryKind::File && name::parse(&e.name) != name::Name::Ignored)
        .map(|e| e.name)
        .collect();
    found.sort();
    Ok(found)
}

/// The link that leads to the newest point, as `rebase` sets it.
pub(crate) const LINK: &str = "image";

/// Sets a link of that name, or of the kind `FULL-<disk>`, that leads to one of the images `gone`
/// to `new`, the image that took its place. Without `new`, and for links of the second kind, which
/// say what the disk's FULL is, the link goes. Links are text: none is followed.
///
/// # Errors
/// What the operating system said.
pub(crate) fn lead_links(dir: &Folder, gone: &[&OsStr], new: Option<&OsStr>) -> Result<()> {
    let entries = dir.entries();
    let entries = entries.map_err(|e| target_error(e, "cannot read the folder", dir.path()))?;
    for link in entries.into_iter().filter(|e| e.kind == EntryKind::Link).map(|e| e.name) {
        if link != LINK && name::parse_link(&link).is_none() {
            continue;
        }
        let Ok(text) = dir.read_link(&link) else { continue };
        let Some(name) = text.file_name() else { continue };
        // One that leads to another folder, where such an image is, is not about this one.
        if !gone.contains(&name) || dir.has(name) || folder::exists(&dir.path().join(&text)) {
            continue;
        }
        match new.filter(|_| link == LINK) {
            Some(new) => set_link(dir, &link, new)?,
            None => drop(remove_in(dir, &link)?),
        }
    }
    Ok(())
}

/// Makes `link` lead to `target`, in one step.
///
/// # Errors
/// What the operating system said.
pub(crate) fn set_link(dir: &Folder, link: &OsStr, target: &OsStr) -> Result<()> {
    dir.set_link(Path::new(target), link)
        .map_err(|e| target_error(e, "cannot set the link", &dir.join(link)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU takes what is before a colon for a protocol.
    #[test]
    fn a_pointer_is_a_name_that_qemu_takes_for_one() {
        for (image, pointer) in [("/b/FULL-1-sda", "FULL-1-sda"), ("/b/FULL-1-a:b", "./FULL-1-a:b")]
        {
            assert_eq!(pointer_to(Path::new(image)), pointer);
        }
    }
}
