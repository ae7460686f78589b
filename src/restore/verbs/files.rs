//! Steps on single files: checking, copying, hashing, changing a backing pointer.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{Member, side_folder};
use crate::chain::unfinished::{self, HEADER_SUFFIX};
use crate::chain::{manifest, name};
use crate::error::{Error, Kind, Result};
use crate::layer::{Format, ImageInfo};
use crate::qemu_img::{self, Verdict};
use crate::restore::clone::Cloner;
use crate::restore::temp::sync_folder;
use crate::restore::work::Work;
use crate::restore::{Reflink, target_error};
use crate::storage::{ReadAt, SourceFile};
use crate::text::path_text;

/// Ends the name of a saved header that is not yet complete.
pub const UNFINISHED_HEADER: &str = ".header.tmp";
/// Bytes copied or hashed at once.
const BUFFER: usize = 1 << 20;

/// Checks a file before it is altered: its structure by QEMU, its bytes by the manifest's hash.
///
/// # Errors
/// `Unsound` with what was found.
pub fn check(m: &Member, work: &Work) -> Result<()> {
    let unsound = |text: String| {
        Err(Error::new(Kind::Unsound, text)
            .at_path(&m.path)
            .remedy("restore this file from another copy; --skip-check alters it all the same"))
    };
    if m.format == Format::Qcow2 {
        let source = SourceFile::look(&m.path)?;
        match qemu_img::check(source.file()?, &m.path, &|| work.check()) {
            Ok(Verdict::Sound) => {}
            Ok(Verdict::Leaks(_)) => log::warn!("{}: has leaked clusters", path_text(&m.path)),
            Ok(Verdict::Damaged(said)) => return unsound(format!("qemu-img check says: {said}")),
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
        return unsound("its bytes are not those of its manifest's hash".into());
    }
    Ok(())
}

/// The manifest of an image, if there is one.
///
/// # Errors
/// See [`manifest::read`].
pub fn manifest_of(image: &Path) -> Result<Option<manifest::Manifest>> {
    let name = image.file_name().unwrap_or_default();
    manifest::read(crate::restore::temp::folder_of(image), name)
}

/// Writes the manifest of an image.
///
/// # Errors
/// See [`manifest::write`].
pub fn write_manifest(image: &Path, m: &manifest::Manifest) -> Result<()> {
    manifest::write(crate::restore::temp::folder_of(image), m).map(drop)
}

/// BLAKE3 of a file.
///
/// # Errors
/// Reading failed, `Interrupted`.
pub fn hash(path: &Path, work: &Work) -> Result<String> {
    let failed = |e| Error::io(e, "reading failed").at_path(path);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; BUFFER];
    loop {
        work.check()?;
        match file.read(&mut buf).map_err(failed)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            n => hasher.update(&buf[..n]),
        };
    }
}

/// Copies `from` into the empty file `to` (called `path`): cloned where that works, holes stay
/// holes.
///
/// # Errors
/// Reading or writing failed, `Interrupted`.
pub fn copy(from: &Path, to: &File, path: &Path, work: &Work) -> Result<()> {
    let source = SourceFile::look(from)?;
    let failed = |e| target_error(e, "writing failed", path);
    to.set_len(source.len()).map_err(failed)?;
    let cloner = Cloner::new(to, Reflink::Auto);
    // A length of 0 means up to the end, which need not be at a block's border.
    if cloner.is_on() && cloner.clone(source.file()?, 0, to, 0, 0)? {
        return Ok(());
    }
    let seek = |e| Error::io(e, "cannot find the holes of the file").at_path(from);
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

/// What is in an image's header.
///
/// # Errors
/// See [`crate::layer::probe`].
pub fn probe(path: &Path) -> Result<ImageInfo> {
    crate::layer::probe(&SourceFile::look(path)?)
}

/// Writes a file's data to the disk.
///
/// # Errors
/// What the operating system said.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(|e| target_error(e, "cannot write to disk", path))
}

/// Removes a file if it is there, for good.
///
/// # Errors
/// What the operating system said.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => sync_folder(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(target_error(e, "cannot remove the file", path)),
    }
}

/// How an image in the same folder is called in a backing pointer: relative, so that the folder
/// can be moved. QEMU takes what is before a colon for a protocol.
pub fn pointer_to(base: &Path) -> OsString {
    let name = base.file_name().unwrap_or_default();
    let mut pointer = OsString::new();
    if name.as_bytes().contains(&b':') {
        pointer.push("./");
    }
    pointer.push(name);
    pointer
}

/// The name of a format for QEMU.
pub fn format_name(format: Format) -> Option<&'static str> {
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
pub fn set_backing(image: &Path, base: Option<(&Path, Format)>, work: &Work) -> Result<()> {
    let base = base.map(|(path, format)| (pointer_to(path), format));
    set_pointer(image, base, work)
}

/// As [`set_backing`], with the pointer as it is to be written.
///
/// # Errors
/// See [`set_backing`].
pub fn set_pointer(image: &Path, base: Option<(OsString, Format)>, work: &Work) -> Result<()> {
    let format = match &base {
        Some((pointer, format)) => Some(format_name(*format).ok_or_else(|| {
            Error::new(Kind::Unsupported, "QEMU has no such format").at_path(pointer)
        })?),
        None => None,
    };
    let pointer = base.map(|(pointer, _)| pointer).unwrap_or_default();
    let info = probe(image)?;
    let named = info.backing_file.as_deref().unwrap_or_default();
    if OsStr::new(named) == pointer
        && (named.is_empty() || info.backing_format.as_deref() == format)
    {
        return Ok(());
    }
    let manifest = manifest_of(image)?;
    let times = std::fs::metadata(image)
        .and_then(|m| Ok((m.accessed()?, m.modified()?)))
        .map_err(|e| target_error(e, "cannot look at the file", image))?;
    let hash_before = manifest.as_ref().and_then(|m| m.blake3.clone());
    let saved = save_header(image, u64::from(info.cluster_size), hash_before.as_deref())?;
    if let Some(m) = manifest.as_ref().filter(|m| m.blake3.is_some() || m.fingerprint.is_some()) {
        // From here to the end the hash is not known, rather than wrong.
        let (blake3, fingerprint) = (None, None);
        write_manifest(image, &manifest::Manifest { blake3, fingerprint, ..m.clone() })?;
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(image)
        .map_err(|e| target_error(e, "cannot open the file", image))?;
    let backing = format.map(|format| (pointer.as_os_str(), format));
    crate::layer::qcow2::backing::set_backing(&file, image, backing)?;
    file.set_times(FileTimes::new().set_accessed(times.0).set_modified(times.1))
        .and_then(|()| file.sync_all())
        .map_err(|e| target_error(e, "cannot write to disk", image))?;
    if let Some(mut m) = manifest {
        if m.blake3.is_some() {
            m.blake3 = Some(hash(image, work)?);
        }
        let meta = file.metadata().map_err(|e| target_error(e, "cannot look at it", image))?;
        m.file_size = meta.len();
        m.fingerprint = Some(manifest::fingerprint(image)?);
        write_manifest(image, &m)?;
    }
    remove(&saved)
}

/// Such a file begins with the hash that the image has with this cluster, in hexadecimal.
const HASH_LEN: usize = 64;
/// Stands for a hash that is not known.
const NO_HASH: [u8; HASH_LEN] = [b'-'; HASH_LEN];

fn header_path(image: &Path) -> Result<PathBuf> {
    let mut name = image.file_name().unwrap_or_default().to_os_string();
    name.push(HEADER_SUFFIX);
    Ok(side_folder(crate::restore::temp::folder_of(image))?.join(name))
}

/// Saves the first cluster of an image beside the manifests.
fn save_header(image: &Path, cluster: u64, hash: Option<&str>) -> Result<PathBuf> {
    let source = SourceFile::look(image)?;
    let mut buf = vec![0; cluster.min(source.len()) as usize];
    source.read_exact_at(&mut buf, 0)?;
    let path = header_path(image)?;
    let mut temporary = image.file_name().unwrap_or_default().to_os_string();
    temporary.push(UNFINISHED_HEADER);
    let temporary = path.with_file_name(temporary);
    let write = || {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all_at(hash.map_or(&NO_HASH[..], str::as_bytes), 0)?;
        file.write_all_at(&buf, HASH_LEN as u64)?;
        // Its own time stands for the image's, which changing the header will move.
        file.set_modified(std::fs::metadata(image)?.modified()?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(&temporary);
        target_error(e, "cannot save the header", &path)
    })?;
    sync_folder(&path)?;
    Ok(path)
}

/// Puts back the first clusters that a killed run had saved for images in `folder`. They are
/// whole, and what they replace differs at most in the backing pointer.
///
/// # Errors
/// Reading or writing failed.
pub fn restore_headers(folder: &Path) -> Result<()> {
    for saved in unfinished::journals(folder) {
        let name = saved.file_name().unwrap_or_default().as_bytes();
        let Some(stem) = name.strip_suffix(HEADER_SUFFIX.as_bytes()) else { continue };
        let image = folder.join(OsStr::from_bytes(stem));
        put_back(&image, &saved)?;
        log::warn!("{}: put back the header that a killed run had saved", path_text(&image));
        remove(&saved)?;
    }
    Ok(())
}

/// Puts back a saved first cluster, the time the image had, and the hash that is right again.
fn put_back(image: &Path, saved: &Path) -> Result<()> {
    let read = || Ok((std::fs::read(saved)?, std::fs::metadata(saved)?.modified()?));
    let (bytes, modified) = read()
        .map_err(|e: std::io::Error| target_error(e, "cannot read the saved header", saved))?;
    let Some((hash, cluster)) = bytes.split_at_checked(HASH_LEN) else { return Ok(()) };
    let put = || {
        let file = File::options().write(true).open(image)?;
        file.write_all_at(cluster, 0)?;
        file.set_modified(modified)?;
        file.sync_all()
    };
    match put() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| target_error(e, "cannot put back the header", image))?,
    }
    let Some(m) = manifest_of(image)? else { return Ok(()) };
    let known = std::str::from_utf8(hash).ok().filter(|_| hash != NO_HASH);
    let blake3 = known.map(str::to_string);
    let fingerprint = Some(manifest::fingerprint(image)?);
    write_manifest(image, &manifest::Manifest { blake3, fingerprint, ..m })
}

/// What an image lies on by its own words: its manifest's parent, and the file name in its
/// backing pointer. What is damaged says nothing.
pub fn stated_parent(image: &Path) -> (Option<OsString>, Option<OsString>) {
    let parent = manifest_of(image).ok().flatten().and_then(|m| m.parent).map(OsString::from);
    let pointer = probe(image).ok().and_then(|i| i.backing_file).filter(|p| !p.is_empty());
    let pointer = pointer.and_then(|p| Path::new(&p).file_name().map(OsStr::to_os_string));
    (parent, pointer)
}

/// The names of the plain files of a folder that may be images.
///
/// # Errors
/// The folder cannot be read.
pub fn images(folder: &Path) -> Result<Vec<OsString>> {
    let failed = |e| target_error(e, "cannot read the folder", folder);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let plain = entry.file_type().map_err(failed)?.is_file();
        if plain && name::parse(&name) != name::Name::Ignored {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// The link that leads to the newest point, as `rebase` sets it.
pub const LINK: &str = "image";

/// Sets a link of that name, or of the kind `FULL-<disk>`, that leads to one of the images `gone`
/// to `new`, the image that took its place. Without `new`, and for links of the second kind, which
/// say what the disk's FULL is, the link goes.
///
/// # Errors
/// What the operating system said.
pub fn lead_links(folder: &Path, gone: &[&OsStr], new: Option<&OsStr>) -> Result<()> {
    let failed = |e| target_error(e, "cannot read the folder", folder);
    let gone: HashSet<&OsStr> = gone.iter().copied().collect();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (link, path) = (entry.file_name(), entry.path());
        if link != LINK && name::parse_link(&link).is_none() {
            continue;
        }
        let Ok(target) = std::fs::read_link(&path) else { continue };
        let Some(name) = target.file_name() else { continue };
        if !gone.contains(name) || folder.join(name).exists() || path.exists() {
            continue;
        }
        match new.filter(|_| link == LINK) {
            Some(new) => set_link(&path, new)?,
            None => remove(&path)?,
        }
    }
    Ok(())
}

/// Makes `link` lead to `target`, in one step.
///
/// # Errors
/// What the operating system said.
pub fn set_link(link: &Path, target: &OsStr) -> Result<()> {
    let mut temporary = OsString::from(".");
    temporary.push(link.file_name().unwrap_or_default());
    temporary.push(".tmp");
    let temporary = link.with_file_name(temporary);
    let _ = std::fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary)
        .and_then(|()| std::fs::rename(&temporary, link))
        .map_err(|e| target_error(e, "cannot set the link", link))?;
    sync_folder(link)
}
