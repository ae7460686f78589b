//! What one file of a backup directory holds, remembered from scan to scan.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::foreign_content;
use super::probed::{Content, Probed};
use super::side_folder::SideFolder;
use super::tree::{FileEntry, FileId};
use crate::error::{Error, Finding, Kind, Result};
use crate::folder::Handle;
use crate::layer::raw;
use crate::layout::name;
use crate::layout::name::Promise;
use crate::manifest::Brief;
use crate::storage::{Identity, ReadAt, SourceFile};
use crate::{layer, manifest};

/// A manifest, if there is one, or why it cannot be read.
pub(in crate::chain) type ManifestResult = std::result::Result<Option<Arc<Brief>>, Finding>;

/// What a scan found out about files, so that the next scan of the same directory looks only at
/// what changed, and yields the same [`SourceFile`]s for what did not.
#[derive(Debug, Default)]
pub struct ProbeCache {
    /// By path, as a string of bytes: that is cheaper to hash than its components.
    files: HashMap<OsString, CachedProbe>,
    manifests: HashMap<OsString, (Identity, ManifestResult)>,
}

#[derive(Debug)]
struct CachedProbe {
    probed: Arc<Probed>,
    /// What it depended on. Where only names say so, the loss of that file must not make it depend on the one
    /// before.
    base: Option<PathBuf>,
}

impl ProbeCache {
    /// Number of files that are remembered.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The file at `path`, taken over from `previous` where it is unchanged. `read_content` is false
    /// for files that may only be used through another one.
    pub(in crate::chain) fn probe(
        &mut self,
        path: &Path,
        handle: &Handle,
        read_content: bool,
        previous: Option<&ProbeCache>,
    ) -> Arc<Probed> {
        let now = Identity::of(handle.metadata());
        let known = previous.and_then(|p| p.files.get(path.as_os_str()));
        let probed = match known.filter(|k| k.probed.still_holds(&now)) {
            Some(known) => known.probed.clone(),
            None => Arc::new(look(path, handle, now, read_content)),
        };
        let known = CachedProbe { probed: probed.clone(), base: None };
        self.files.insert(path.as_os_str().to_os_string(), known);
        probed
    }

    /// The manifest of the image at `path`, if `side`, beside it, has one.
    pub(in crate::chain) fn manifest(
        &mut self,
        path: &Path,
        side: &SideFolder,
        previous: Option<&Self>,
    ) -> ManifestResult {
        if matches!(side, SideFolder::None) {
            return Ok(None);
        }
        let image = path.file_name().unwrap_or_default();
        let file = manifest::file_name(image);
        let Some((at, handle)) = side.handle(&file)? else { return Ok(None) };
        let now = Identity::of(handle.metadata());
        let known = previous.and_then(|p| p.manifests.get(at.as_os_str()));
        let known = known.filter(|(id, read)| *id == now && read.is_ok());
        let entry = match known {
            Some(e) => e.clone(),
            None => {
                let read = manifest::read_brief(&handle, image, &at);
                (now, read.map(|m| Some(Arc::new(m))).map_err(|e| Finding::from_error(&e, &at)))
            }
        };
        self.manifests.insert(at.into_os_string(), entry.clone());
        entry.1
    }

    /// What those of `files` depended on that have not changed since.
    pub(in crate::chain) fn bases_of(&self, files: &[FileEntry]) -> HashMap<FileId, PathBuf> {
        let base = |file: &FileEntry| {
            let known = self.files.get(file.path.as_os_str())?;
            known.base.clone().filter(|_| Arc::ptr_eq(&known.probed, &file.probed))
        };
        files.iter().enumerate().filter_map(|(i, f)| Some((i, base(f)?))).collect()
    }

    /// Remembers what files depend on.
    pub(in crate::chain) fn remember_bases(&mut self, bases: Vec<(Arc<Probed>, PathBuf)>) {
        for (probed, base) in bases {
            if let Some(known) = self.files.get_mut(probed.file.path().as_os_str()) {
                known.base = Some(base);
            }
        }
    }
}

fn look(path: &Path, handle: &Handle, identity: Identity, read_content: bool) -> Probed {
    let mut file = SourceFile::with_identity(path.to_path_buf(), identity);
    let mut magic = false;
    let content = if read_content {
        look_at_content(&file, handle, &mut magic)
            .unwrap_or_else(|e| Content::Bad(Finding::from_error(&e, path)))
    } else {
        Content::Plain
    };
    // A directory may hold more files than may be open at once.
    file.close();
    let meta = handle.metadata();
    Probed {
        file: Arc::new(file),
        own_bytes: meta.blocks().saturating_mul(512),
        mtime: meta.mtime(),
        owner: meta.uid(),
        magic,
        content,
        inside: OnceLock::new(),
    }
}

fn look_at_content(file: &SourceFile, handle: &Handle, magic: &mut bool) -> Result<Content> {
    let name = file.path().file_name().unwrap_or_default();
    if let Some(what) = foreign_content::layout(name) {
        return Ok(Content::Foreign(what));
    }
    file.open_through(handle)?;
    let storage = Start::read(file)?;
    *magic = layer::sniff(&storage)?.is_some();
    if *magic {
        return layer::probe(&storage).map(Content::Image);
    }
    let foreign = foreign(&storage.bytes[..storage.len.min(raw::START)]);
    let what = match name::promise(name) {
        _ if file.is_empty() => Some("the file is empty"),
        Promise::Qcow2 if foreign.is_none() => {
            Some("the file is named qcow2 but has no qcow2 header")
        }
        Promise::Qcow2 => None,
        _ if layer::is_damaged_qcow2(&storage)? => Some("the file's qcow2 magic bytes are damaged"),
        _ => None,
    };
    if let Some(what) = what {
        return Err(Error::new(Kind::Corrupt, what).at_path(file.path()).at_offset(0).remedy(
            match name::promise(name) {
                Promise::Qcow2 if !file.is_empty() => {
                    "restore this file from another copy of the backup; if it is a raw disk, let \
                     its name end in .raw"
                }
                _ => "restore this file from another copy of the backup",
            },
        ));
    }
    Ok(match foreign {
        Some(what) => Content::Foreign(what),
        None if name::promise(name) == Promise::Foreign => {
            Content::Foreign("a format that is not read, by its name")
        }
        None => Content::Plain,
    })
}

/// How much of a file is read at once: the header of an image, with its extensions and a name in it.
const START: usize = 4096;

/// A file whose first bytes are in memory: what it is takes several looks at them.
struct Start<'a> {
    file: &'a SourceFile,
    bytes: [u8; START],
    len: usize,
}

impl<'a> Start<'a> {
    fn read(file: &'a SourceFile) -> Result<Self> {
        let len = usize::try_from(file.len()).unwrap_or(START).min(START);
        let mut start = Start { file, bytes: [0; START], len };
        file.read_exact_at(&mut start.bytes[..len], 0)?;
        Ok(start)
    }

    fn known(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(offset).ok()?;
        self.bytes[..self.len].get(at..at.checked_add(len)?)
    }
}

impl ReadAt for Start<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        match self.known(offset, buf.len()) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(buf.len())
            }
            None => self.file.read_at(buf, offset),
        }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.known(offset, buf.len()) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => self.file.read_exact_at(buf, offset),
        }
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn name(&self) -> &Path {
        self.file.name()
    }

    fn seek_data(&self, offset: u64) -> std::io::Result<Option<u64>> {
        self.file.seek_data(offset)
    }

    fn seek_hole(&self, offset: u64) -> std::io::Result<u64> {
        self.file.seek_hole(offset)
    }
}

/// Formats that would be wrong data if they were taken for raw images.
fn foreign(start: &[u8]) -> Option<&'static str> {
    const MAGICS: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"BZh", "compressed with bzip2"),
        (b"\x04\x22\x4d\x18", "compressed with lz4"),
    ];
    let packed = MAGICS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| *what);
    packed.or_else(|| raw::other_format(start))
}
