//! How a shut-off VM's image is opened.
//!
//! Its header may have been written by a QEMU that a guest had taken over, or, where it is raw, by the guest
//! itself. So the format is never taken from the content alone, and what is below an image is what the
//! user names. The daemon opens all by name: no other user may be able to exchange what has the name.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::backup::target::known_disks::KnownDisk;
use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::layout::name::{Promise, promise};
use crate::storage::SourceFile;
use crate::text::path_text;
use crate::{folder, layer};

/// More layers than anybody's disk has.
const DEEPEST: usize = 200;

/// An image and what is below it.
#[derive(Debug)]
pub(super) struct Image {
    /// Its path without links.
    pub real: PathBuf,
    /// From the top down.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    path: PathBuf,
    driver: &'static str,
    device: bool,
}

/// The name of the node that the guest would be attached to.
pub(super) fn top(real: &Path) -> String {
    let hash = blake3::hash(real.as_os_str().as_bytes()).to_hex();
    format!("offline-{}", hash.as_str().get(..12).unwrap_or_default())
}

impl Image {
    /// Looks at it, and at what is below it, which has to be among `allowed`.
    ///
    /// # Errors
    /// `Usage` if its format is not certain; `Unsupported` for what cannot be opened so; `Permission` for
    /// a pointer to what is not allowed, and where somebody else could exchange it.
    pub(super) fn of(disk: &KnownDisk, allowed: &[PathBuf]) -> Result<Self> {
        let (real, mut layers) = (disk.real.clone(), Vec::new());
        let failed = |e| Error::io(e, "cannot check the image").at_path(&real);
        let meta = folder::look(&real).map_err(failed)?;
        let device = meta.file_type().is_block_device();
        if !device && !meta.is_file() {
            return Err(Error::new(Kind::Unsupported, "not a file or block device").at_path(real));
        }
        let driver = match disk.format.as_deref() {
            Some(format) => known_driver(format, &real)?,
            None if device => return Err(ask(&real, "the format of a block device is not known")),
            None => by_name(&real)?,
        };
        let mut at = Layer { path: real.clone(), driver, device };
        while layers.len() < DEEPEST {
            check_place(at.path.parent().unwrap_or(Path::new("/")))?;
            let below = at.below(allowed)?;
            layers.push(at);
            match below {
                Some(below) => at = below,
                None => return Ok(Image { real, layers }),
            }
        }
        Err(Error::new(Kind::Unsupported, "more than 200 images below it").at_path(real))
    }

    /// Fails if a QEMU has it open, or writes to what is below it: a raw image is opened beside that
    /// QEMU, and refused when the backup would begin.
    ///
    /// # Errors
    /// `Busy`, and as `open(2)`.
    pub(super) fn check_free(&self) -> Result<()> {
        for (i, layer) in self.layers.iter().enumerate().filter(|(_, l)| !l.device) {
            let failed = |e| Error::io(e, "cannot read the image").at_path(&layer.path);
            let (written, kept) =
                folder::qemu_writes(&folder::open_file(&layer.path).map_err(failed)?);
            // Below, others read as well, who let nobody write.
            if written || kept && i == 0 {
                return Err(in_use(&path_text(&layer.path)));
            }
        }
        Ok(())
    }

    /// The files below it.
    pub(super) fn below_it(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().skip(1).map(|layer| layer.path.as_path())
    }

    /// See [`top`].
    pub(super) fn top(&self) -> String {
        top(&self.real)
    }

    /// Its nodes, those below first: the file, the format, and a raw node above it.
    pub(super) fn nodes(&self, read_only: bool) -> [Value; 2] {
        let (top, disk) = (self.top(), format!("{}-d", self.top()));
        let mut format = Value::Null;
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let read_only = read_only || i > 0;
            format = layer.node(format, read_only);
        }
        format["node-name"] = json!(disk);
        let raw = json!({"driver": "raw", "node-name": top, "file": disk, "discard": "unmap",
            "read-only": read_only});
        [format, raw]
    }
}

impl Layer {
    fn node(&self, below: Value, read_only: bool) -> Value {
        let driver = if self.device { "host_device" } else { "file" };
        let file = json!({"driver": driver, "filename": self.path.to_string_lossy(),
            "discard": "unmap", "read-only": read_only});
        let mut node = json!({"driver": self.driver, "file": file, "discard": "unmap",
            "read-only": read_only});
        if self.driver == "qcow2" {
            // None rather than what the header says.
            node["backing"] = below;
        }
        node
    }

    /// What its header names. A block device is not read here: with one, nothing may be below.
    fn below(&self, allowed: &[PathBuf]) -> Result<Option<Layer>> {
        let unfit =
            |what: &str| Error::new(Kind::Unsupported, what.to_string()).at_path(&self.path);
        if self.path.to_str().is_none() {
            return Err(unfit("its path is not UTF-8"));
        }
        if self.driver != "qcow2" || self.device {
            return Ok(None);
        }
        let failed = |e| Error::io(e, "cannot read the image").at_path(&self.path);
        let file = folder::open_file(&self.path).map_err(failed)?;
        let file = SourceFile::of_open(file, self.path.clone())?;
        let info = layer::probe(&file).map_err(|e| e.at_path(&self.path))?;
        if info.format != Format::Qcow2 {
            return Err(Error::new(Kind::Corrupt, "not a qcow2 image").at_path(&self.path));
        }
        if info.data_file.is_some() {
            return Err(unfit("it keeps its data in another file: back it up while its VM runs"));
        }
        let Some(pointer) = info.backing_file else { return Ok(None) };
        if pointer.contains(':') {
            return Err(unfit(
                "the name of its backing file is not a plain file name: back it up while its VM \
                 runs",
            ));
        }
        let path = self.path.parent().unwrap_or(Path::new("/")).join(pointer);
        let path = folder::resolve(&path)
            .map_err(|e| Error::io(e, "cannot find the backing file").at_path(&path))?;
        let meta = folder::look(&path).map_err(failed)?;
        if !meta.is_file() {
            return Err(unfit("its backing file is not a regular file"));
        }
        if !allowed.contains(&path) {
            let what =
                format!("backing file {} is named only by the image's header", path_text(&path));
            return Err(Error::new(Kind::Permission, what).at_path(&self.path).remedy(format!(
                "a guest may have written it; if it is right: --backing-file {}",
                path_text(&path)
            )));
        }
        let Some(format) = info.backing_format else {
            let what = "its header names no format for its backing file";
            return Err(Error::new(Kind::Unsupported, what)
                .at_path(&self.path)
                .remedy("'qemu-img rebase -u -F FORMAT -b FILE' writes it there"));
        };
        Ok(Some(Layer { driver: known_driver(&format, &path)?, path, device: false }))
    }
}

/// Somebody has the image `name`, or several of them, open.
pub(super) fn in_use(name: &str) -> Error {
    let what = format!("{name} is in use by another process: its VM runs, or a tool works on it");
    Error::new(Kind::Busy, what)
        .remedy("back up a running VM by its QMP socket: --qmp instead of --offline")
}

/// Fails where another user could put something else in the place of what was looked at: the daemon, which
/// opens it by name, may do more than he.
///
/// # Errors
/// As [`folder::check_unchangeable`].
pub(super) fn check_place(dir: &Path) -> Result<()> {
    let remedy = "work as its owner with --as-owner, or back it up while its VM runs";
    folder::check_unchangeable(dir, remedy)
}

fn known_driver(format: &str, path: &Path) -> Result<&'static str> {
    match format {
        "qcow2" => Ok("qcow2"),
        "raw" => Ok("raw"),
        _ => {
            let what = format!("format {format}: --offline takes only qcow2 and raw");
            Err(Error::new(Kind::Unsupported, what)
                .at_path(path)
                .remedy("back it up while its VM runs"))
        }
    }
}

/// The format of a file of which the target knows nothing. A raw disk's first bytes are its guest's, which
/// may write any header there.
fn by_name(path: &Path) -> Result<&'static str> {
    let failed = |e| Error::io(e, "cannot read the image").at_path(path);
    let file = folder::open_file(path).map_err(failed)?;
    let file = SourceFile::of_open(file, path.to_path_buf())?;
    let magic = layer::sniff(&file)? == Some(Format::Qcow2);
    match (promise(path.file_name().unwrap_or_default()), magic) {
        (Promise::Qcow2, true) => Ok("qcow2"),
        (Promise::Raw | Promise::Nothing, false) => Ok("raw"),
        (_, true) => {
            Err(ask(path, "it has a qcow2 header, which the guest of a raw disk can write"))
        }
        (Promise::Foreign, false) => Err(ask(path, "its name does not end in .qcow2 or .raw")),
        (Promise::Qcow2, false) => {
            Err(Error::new(Kind::Corrupt, "not a qcow2 image, as its name says").at_path(path))
        }
    }
}

fn ask(path: &Path, why: &str) -> Error {
    Error::new(Kind::Usage, format!("its format is not certain: {why}"))
        .at_path(path)
        .remedy("name the format: --offline raw:FILE or --offline qcow2:FILE")
}
