//! Running qemu-img, for the steps that are its own: an independent check, and changing an image
//! that keeps its own properties (`commit`, `resize`, `snapshot`). Creating images and changing
//! backing pointers is done by [`crate::layer::qcow2`].
//!
//! The images are hostile, as far as qemu-img is concerned: whoever owns the backup directory, and
//! the QEMU that wrote them, decides every byte. So it runs with nothing to lose:
//!
//! - It opens no file. Each image is served to it by this process over a socket pair (the NBD
//!   protocol, `export`), out of a descriptor that the caller opened. A descriptor of the image
//!   itself would not do: QEMU opens files by name only, and `/proc/self/fd/N` asks the file's
//!   permissions again, which are those of root or of a stranger.
//! - Nothing is probed and no pointer in an image is followed: its graph is spelled out, each
//!   driver by name, with an explicit backing image or none. (An image that gets one loses its
//!   own pointer before, as QEMU would use both.) Images that keep their data in
//!   another file, and encrypted ones, are refused before it is started.
//! - It has no rights and little of anything else: see `confine`.
//! - It ends when the caller is told to stop, when this process ends, and when it takes much longer
//!   than a sound image does; its words are bounded.

mod confine;
pub(crate) mod daemon;
mod export;
pub(crate) mod guest;
pub(crate) mod nbd;
mod run;

use std::fs::File;
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::layer::qcow2::backing::set_backing;
use crate::layer::qcow2::header::Header;
use crate::storage::OpenFile;
use confine::Limits;
pub(crate) use confine::{tie, tie_by};
use export::Export;
pub use run::Stop;
use run::{Job, Outcome, failure, program};
pub(crate) use run::{installed_in, said, shown};

/// What `qemu-img check` found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckResult {
    /// No errors.
    Sound,
    /// Clusters that are counted and that nobody uses; qemu-img's message.
    Leaks(String),
    /// Errors; qemu-img's message.
    Damaged(String),
}

/// Room behind the end of a file for what a job adds to its metadata, in bytes.
const ROOM: u64 = 1 << 30;
/// Memory (address space) that qemu-img takes with small images, with some to spare.
const MEMORY: u64 = 2 << 30;
/// Memory for the refcounts that a check counts: it keeps 2 bytes per cluster, in blocks that grow
/// by copying. Beyond this no image is checked.
const MAX_COUNTS: u64 = 8 << 30;
/// Processor seconds of a check: for any image, and per GiB of the file. 1 GiB of the smallest
/// clusters takes about a second.
const CPU: u64 = 120;
const CPU_PER_GIB: u64 = 30;
/// At most. A sparse file costs its owner nothing.
const MAX_CPU: u64 = 6 * 3600;

/// What qemu-img thinks of the qcow2 image `file`, called `about` in errors; it is only read, and
/// what its header points to is not looked at.
///
/// # Errors
/// `NotFound` if qemu-img is not installed; `Corrupt`, `Truncated`, `Encrypted` or `Unsupported` if
/// the header is not one that it may be given; `Peer` if it could not check, or took too much time or
/// memory; `Interrupted`, `Busy`.
pub fn check(file: &File, about: &Path, stop: Stop) -> Result<CheckResult> {
    let image = OpenFile::with_start(file, about, MAX_CLUSTER)?;
    let header = own_data(&image, about)?;
    let graph = |fd: i32| qcow2(fd, None);
    let clusters = image.length() >> header.cluster_bits;
    let limits = Limits {
        memory: MEMORY + clusters.saturating_mul(4).min(MAX_COUNTS),
        cpu: Some((CPU + CPU_PER_GIB * (image.length() >> 30)).min(MAX_CPU)),
    };
    let exports = [Export::reading(&image)];
    let job = Job { verb: "check", about, limits, exports: &exports };
    let Outcome { code, said } =
        job.run(|fds| vec!["check".into(), "-q".into(), named(&graph(fds[0]))], stop)?;
    match code {
        0 => Ok(CheckResult::Sound),
        2 => Ok(CheckResult::Damaged(said)),
        3 => Ok(CheckResult::Leaks(said)),
        _ => Err(failure("check", about, &said)),
    }
}

/// Writes all that the qcow2 image `top` holds into `base`, which grows to `top`'s size where it is
/// smaller. Both change: `top` is to be thrown away. At most `rate` bytes per second, 0 for no
/// limit.
///
/// # Errors
/// As [`check`]; `NoSpace`.
pub fn commit(
    (top, base): (&File, &File),
    base_format: Format,
    rate: u64,
    about: &Path,
    stop: Stop,
) -> Result<()> {
    // QEMU would mix what the pointer names with the backing image that it is given.
    set_backing(top, about, None)?;
    let top = OpenFile::new(top, about)?;
    let size = own_data(&top, about)?.size;
    let base = OpenFile::new(base, about)?;
    let mut exports = [growing(&top), growing(&base)];
    match base_format {
        Format::Raw => {
            // A raw image is as long as its disk.
            let len = base.length().max(size);
            let resized = base.file().set_len(len);
            resized.map_err(|e| Error::io(e, "cannot set the size").at_path(about))?;
            exports[1] = Export::writing(&base, len);
        }
        _ => {
            let old = own_data(&base, about)?.size;
            // At worst all is copied anew beside what is there, with its metadata.
            let more = size.max(old).saturating_mul(2).saturating_add(ROOM);
            exports[1] = Export::writing(&base, base.length().saturating_add(more));
        }
    }
    let limits = Limits { memory: MEMORY, cpu: None };
    let job = Job { verb: "commit", about, limits, exports: &exports };
    let args = |fds: &[i32]| {
        let base = match base_format {
            Format::Raw => serde_json::json!({"driver": "raw", "file": socket(fds[1])}),
            _ => qcow2(fds[1], None),
        };
        // -d: the copy is thrown away, so it need not be emptied.
        let fixed = ["commit", "-q", "-d", "-r"].map(Into::into);
        let more = [rate.to_string().into(), named(&qcow2(fds[0], Some(base)))];
        fixed.into_iter().chain(more).collect()
    };
    job.run(args, stop)?.must_succeed("commit", about)
}

/// Gives the disk of the qcow2 image `file` `size` bytes; what is behind them is lost.
///
/// # Errors
/// As [`commit`].
pub fn resize(file: &File, size: u64, about: &Path, stop: Stop) -> Result<()> {
    let end = size.to_string();
    change(file, "resize", &["-q", "--shrink"], Some(&end), about, stop)
}

/// Takes an internal snapshot called `name` of the qcow2 image `file`.
///
/// # Errors
/// As [`commit`].
pub fn snapshot(file: &File, name: &str, about: &Path, stop: Stop) -> Result<()> {
    change(file, "snapshot", &["-q", "-c", name], None, about, stop)
}

fn change(
    file: &File,
    verb: &'static str,
    options: &[&str],
    last: Option<&str>,
    about: &Path,
    stop: Stop,
) -> Result<()> {
    let image = OpenFile::new(file, about)?;
    own_data(&image, about)?;
    let exports = [growing(&image)];
    let job = Job { verb, about, limits: Limits { memory: MEMORY, cpu: None }, exports: &exports };
    let args = |fds: &[i32]| {
        let before = std::iter::once(verb).chain(options.iter().copied()).map(Into::into);
        before.chain([named(&qcow2(fds[0], None))]).chain(last.map(Into::into)).collect()
    };
    job.run(args, stop)?.must_succeed(verb, about)
}

fn growing<'a>(image: &'a OpenFile<'a>) -> Export<'a> {
    Export::writing(image, image.length().saturating_add(ROOM))
}

/// The largest cluster, and so the largest header.
const MAX_CLUSTER: usize = 2 << 20;

/// Fails for images that qemu-img must not be given: it would look for their data elsewhere, or for
/// a key.
fn own_data(image: &OpenFile, about: &Path) -> Result<Header> {
    let header = Header::read(image)?;
    if header.has_data_file() {
        let what = "the image keeps its data in another file";
        return Err(Error::new(Kind::Unsupported, what).at_path(about));
    }
    Ok(header)
}

/// The image behind a socket.
fn socket(fd: i32) -> serde_json::Value {
    serde_json::json!({"driver": "nbd", "server": {"type": "fd", "str": fd.to_string()}})
}

fn qcow2(fd: i32, backing: Option<serde_json::Value>) -> serde_json::Value {
    serde_json::json!({"driver": "qcow2", "file": socket(fd), "backing": backing})
}

/// A graph as qemu-img takes it in place of a file name.
fn named(graph: &serde_json::Value) -> std::ffi::OsString {
    format!("json:{graph}").into()
}

#[cfg(test)]
mod tests;
