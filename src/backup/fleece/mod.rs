//! The files and nodes of one disk's fleecing: fleece image, target image, filter, frozen view.

pub(crate) mod foreign;
pub(crate) mod migration;
pub(crate) mod nbdserver;
pub(crate) mod remove_filter;
pub(crate) mod space;
pub(crate) mod teardown;
pub(crate) mod zeros;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde_json::{Value, json};

use self::space::Space;
use super::disks::{Insertion, qom_path};
use super::names::{Role, object};
use super::plan::planned::DiskPlan;
use super::state::leftover::{CreatedFile, fleece_path};
use super::{Compression, CopyOptions, Watch, graph};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::{Access, FileId, Folder};
use crate::layer::qcow2::create::NewImage;
use crate::layer::qcow2::header;
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::text::path_text;

/// QEMU's unit of copying before a write, for a fleece without clusters of its own.
const FLEECE_CLUSTER: u64 = 65536;

/// The fleece image of one disk: a sparse raw file. Raw, since nothing of it outlives the run, and it
/// costs no metadata. Where the file system ends files before the disk ends (ext4: at 16 TiB) it is
/// qcow2, whose file has only what is written to it.
///
/// It goes where the user says, else to the file system of the disk's own file, else (that is none)
/// to that of the backup. QEMU gets descriptors of it and needs no name: so it has none where the file
/// system can do that, and nothing is left of it whoever dies. QEMU says where the disk's file is,
/// and may lie: in that folder nothing with a name is ever made.
#[derive(Debug)]
pub struct Fleece {
    /// The folder, for messages.
    dir: PathBuf,
    file: Option<File>,
    /// Its name, if it has one. It is that of a raw file also where it is qcow2: it is given before
    /// that is known, and nobody goes by it.
    path: Option<PathBuf>,
    qcow2: bool,
}

impl Fleece {
    /// Finds the place for that of disk `index`. Nothing is left behind yet.
    ///
    /// # Errors
    /// The folder that the user named cannot be used.
    pub fn place(
        client: &Client,
        copy: &CopyOptions,
        plan: &DiskPlan,
        (run, index): (&str, usize),
        watch: &dyn Watch,
    ) -> Result<Self> {
        let given = copy.fleece_dir.as_deref();
        let named = |dir: &Path| {
            let path = fleece_path(dir, run, index);
            Fleece { dir: dir.to_path_buf(), file: None, path: Some(path), qcow2: false }
        };
        if !client.takes_descriptors() {
            return Ok(named(given.unwrap_or(&plan.dir)));
        }
        if let Some(dir) = given {
            let failed = |e| Error::io(e, "cannot use --fleece-dir").at_path(dir);
            return Ok(Self::unnamed(dir).map_err(failed)?.unwrap_or_else(|| named(dir)));
        }
        if let Some(dir) = plan.disk.folder() {
            let why = match Self::unnamed(&dir) {
                Ok(Some(fleece)) => return Ok(fleece),
                Ok(None) => String::new(),
                Err(e) => format!(": {e}"),
            };
            watch.say(&format!(
                "{}: the fleece image is in the target (name another folder with --fleece-dir): \
                 {} allows no unnamed file{why}",
                plan.disk.label(),
                path_text(&dir)
            ));
        }
        let there = plan.dir.ancestors().find(|a| folder::is_folder(a)).unwrap_or(&plan.dir);
        Ok(Self::unnamed(there).ok().flatten().unwrap_or_else(|| named(&plan.dir)))
    }

    /// One without a name in `dir`; `None` if its file system has no such files.
    fn unnamed(dir: &Path) -> std::io::Result<Option<Self>> {
        let file = open_resolved(dir)?.create_unnamed()?;
        let dir = dir.to_path_buf();
        Ok(file.map(|f| Fleece { dir, file: Some(f), path: None, qcow2: false }))
    }

    /// What a journal or a note says of it, if it has a name.
    pub fn made(&self) -> Option<CreatedFile> {
        let id = self.file.as_ref().and_then(|f| f.metadata().ok()).map(|m| FileId::of(&m));
        Some(CreatedFile { path: self.path.clone()?, id })
    }

    /// Makes it, or gives the file that is there its size.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn create(&mut self, size: u64) -> Result<()> {
        let failed = |e| Error::io(e, "cannot create the fleece image").at_path(&self.dir);
        if let (None, Some(path)) = (&self.file, &self.path) {
            let dir = path.parent().unwrap_or(Path::new("/"));
            let folder = open_resolved(dir).map_err(failed)?;
            let file = folder.create_new(path.file_name().unwrap_or_default());
            self.file = Some(file.map_err(failed)?);
        }
        let Some(file) = &self.file else { return Ok(()) };
        match file.set_len(size) {
            Err(e) if is_too_large(&e) => self.format(size),
            sized => sized.map_err(failed),
        }
    }

    /// Makes it a qcow2 image.
    fn format(&mut self, size: u64) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let shape = NewImage {
            size,
            cluster_size: FLEECE_CLUSTER,
            extended_l2: false,
            // Nobody repairs it: it goes with the run.
            lazy_refcounts: true,
            compression: header::Compression::Zlib,
        };
        shape.fitting().write(file, &self.dir).map_err(|e| {
            Error::new(e.kind(), "cannot create the fleece image")
                .at_path(&self.dir)
                .with_source(e)
                .remedy("name a folder on another file system with --fleece-dir")
        })?;
        self.qcow2 = true;
        Ok(())
    }

    /// The block driver for it.
    pub fn driver(&self) -> &'static str {
        if self.qcow2 { "qcow2" } else { "raw" }
    }

    /// How QEMU is to open it.
    ///
    /// # Errors
    /// It was not made.
    pub fn handed<'a>(&'a self, client: &Client) -> Result<TargetFile<'a>> {
        let Some(file) = &self.file else {
            return Err(Error::new(Kind::Io, "the fleece image is not open").at_path(&self.dir));
        };
        let name = self.path.as_deref().unwrap_or(&self.dir);
        Ok(TargetFile { file, name, by_name: !client.takes_descriptors() })
    }

    /// The folder that it is in, for messages.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The space where it is.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn space(&self) -> Result<Space> {
        match &self.file {
            Some(f) => Space::of(f, &self.dir),
            None => Space::at(&self.dir),
        }
    }

    /// Blocks of 512 bytes that it takes.
    pub fn blocks(&self) -> u64 {
        self.file.as_ref().and_then(|f| f.metadata().ok()).map_or(0, |m| m.blocks())
    }

    /// Gives its space back to the file system, here and not in QEMU's main loop, where closing a
    /// large file takes time: while it is held open here, QEMU's closing it frees nothing.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn empty(&self) -> Result<()> {
        let emptied = self.file.as_ref().map_or(Ok(()), |f| f.set_len(0));
        emptied.map_err(|e| Error::io(e, "cannot empty the fleece image").at_path(&self.dir))
    }

    /// As [`Fleece::empty`] while QEMU works with it. A qcow2 image is left alone: QEMU would find its
    /// tables gone.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn empty_in_use(&self) -> Result<()> {
        if self.qcow2 { Ok(()) } else { self.empty() }
    }
}

/// Whether a file of that length is refused because of the length. (POSIX allows both.)
fn is_too_large(e: &std::io::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, InvalidInput};
    matches!(e.kind(), FileTooLarge | InvalidInput)
}

/// A folder that is named by its path, links and all.
fn open_resolved(dir: &Path) -> std::io::Result<Folder> {
    Folder::open(&folder::resolve(dir)?)
}

/// A file that we made and hold, on its way to QEMU.
#[derive(Debug, Clone, Copy)]
pub struct TargetFile<'a> {
    /// The file.
    pub file: &'a File,
    /// Its name.
    pub name: &'a Path,
    /// QEMU takes no descriptors (over TCP, or qemu-storage-daemon): it opens the name with rights of
    /// its own.
    pub by_name: bool,
}

/// The shape of a target, as the disk's own: version 3 always, since 2 loses zeroes in an INC.
pub fn new_image(plan: &DiskPlan, copy: &CopyOptions) -> NewImage {
    let d = &plan.disk;
    let shape = NewImage {
        size: d.size,
        cluster_size: cluster_size(d.cluster_size),
        extended_l2: d.extended_l2,
        lazy_refcounts: d.lazy_refcounts,
        compression: match copy.compress {
            Some(Compression::Zstd) => header::Compression::Zstd,
            _ => header::Compression::Zlib,
        },
    };
    shape.fitting()
}

/// What qcow2 allows: 512 bytes to 2 MiB, a power of two.
fn cluster_size(source: u64) -> u64 {
    let legal = source.is_power_of_two() && (512..=2 << 20).contains(&source);
    if legal { source } else { 65536 }
}

/// The least that a job copies at once: QEMU's unit or a cluster of the target.
pub fn least_chunk(plan: &DiskPlan) -> u64 {
    cluster_size(plan.disk.cluster_size).max(FLEECE_CLUSTER)
}

/// Adds the node of an image file that we made. QEMU gets descriptors of that very file, opened by the
/// one that we hold: what has its name by now does not matter.
///
/// QEMU never syncs it: it would do so in its main loop, and the guest would stand still as long as
/// a slow disk takes. A fleece needs no sync; a target is synced by us, see
/// [`super::publish::OpenImage`].
///
/// # Errors
/// QEMU refuses.
pub fn add_image(
    client: &mut Client,
    node: &str,
    driver: &str,
    image: TargetFile<'_>,
    file_options: Value,
    find_zeros: bool,
) -> Result<()> {
    let filename = match image.by_name {
        false => {
            let direct = file_options["cache"]["direct"] == true;
            format!("/dev/fdset/{}", pass_file(client, image, node, direct)?)
        }
        true => match image.name.to_str() {
            Some(name) => name.to_string(),
            None => {
                let what = "QEMU opens this image by its name, which it has to be told in UTF-8";
                return Err(Error::new(Kind::Usage, what).at_path(image.name));
            }
        },
    };
    let cache = json!({"no-flush": true});
    let mut file =
        json!({"driver": "file", "filename": filename, "discard": "unmap", "cache": cache});
    merge(&mut file, &file_options);
    let detect = if find_zeros { "unmap" } else { "off" };
    let all = json!({"driver": driver, "node-name": node, "discard": "unmap",
        "detect-zeroes": detect, "cache": cache, "file": file});
    client.call("blockdev-add", all)?.map_err(|r| Error::from(r).at_path(image.name))?;
    Ok(())
}

fn merge(into: &mut Value, more: &Value) {
    if let (Some(a), Some(b)) = (into.as_object_mut(), more.as_object()) {
        a.extend(b.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}

/// Hands over a file, read-write and read-only: QEMU takes whichever an open asks for.
/// The sets carry the node's name, so that the teardown finds them. With `direct` they go past the
/// page cache, which QEMU since 9.1 wants to see in a descriptor before it takes it.
pub(super) fn pass_file(
    client: &mut Client,
    image: TargetFile<'_>,
    node: &str,
    direct: bool,
) -> Result<u64> {
    let open = |access| {
        folder::reopen(image.file, access)
            .and_then(|f| if direct { past_cache(f) } else { Ok(f) })
            .map_err(|e| Error::io(e, "cannot open the image").at_path(image.name))
    };
    let (both, read) = (open(Access::ReadWrite)?, open(Access::Read)?);
    let first = add_fd(client, both.as_fd(), json!({"opaque": node}))?;
    add_fd(client, read.as_fd(), json!({"opaque": node, "fdset-id": first}))?;
    Ok(first)
}

fn past_cache(file: File) -> std::io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT)?;
    Ok(file)
}

fn add_fd(client: &mut Client, fd: BorrowedFd<'_>, arguments: Value) -> Result<u64> {
    let answer = client.call_with("add-fd", arguments, Some(fd))??;
    answer
        .get("fdset-id")
        .and_then(Value::as_u64)
        .ok_or_else(|| Error::new(Kind::Corrupt, "the answer to add-fd has an unknown shape"))
}

/// Options of the target's file node.
pub fn target_options(copy: &CopyOptions) -> Value {
    let mut o = json!({});
    if let Some(aio) = &copy.aio {
        o["aio"] = json!(aio);
    }
    if copy.direct {
        o["cache"] = json!({"direct": true, "no-flush": true});
    }
    o
}

/// Makes QEMU hand everything that it still holds of a finished image to the operating system, and
/// closes it. Tables are in QEMU's memory until then; deleting the node would write them and keep
/// silent about errors, while reopening it read-only writes them and tells.
///
/// # Errors
/// They could not be written: the image is worthless. It is still open then.
pub fn close_image(client: &mut Client, node: &str) -> Result<()> {
    let graph = graph::ask(client)?;
    let Some(file) = graph.child(node, "file") else {
        return Err(Error::new(Kind::Peer, format!("QEMU does not report what is below {node}")));
    };
    let read_only = json!({"driver": "qcow2", "node-name": node, "file": file, "read-only": true,
        "discard": "unmap", "cache": {"no-flush": true}});
    let answer = client.call("blockdev-reopen", json!({"options": [read_only]}))?;
    answer.map_err(|r| match &r.desc {
        d if d.contains("No space left") => {
            Error::new(Kind::NoSpace, "no space left for the image's tables")
        }
        d if d.contains("File too large") => too_large(),
        d => Error::new(Kind::Io, format!("QEMU cannot complete the image: {d}")),
    })?;
    client.execute("blockdev-del", json!({"node-name": node})).map(drop)
}

/// The target's file system ends files before this image ends.
pub fn too_large() -> Error {
    Error::new(Kind::Io, "the image got larger than a file can be in the target")
        .remedy("name a target on another file system (XFS has no such limit), or use --compress")
}

/// Adds the copy-before-write filter above what the guest is attached to. It does nothing until
/// it is inserted.
///
/// # Errors
/// QEMU refuses.
pub fn add_filter(
    client: &mut Client,
    run: &str,
    index: usize,
    top: &str,
    timeout: u32,
) -> Result<()> {
    let arguments = json!({
        "driver": "copy-before-write",
        "node-name": object(run, Role::Filter, index),
        "file": top,
        "target": object(run, Role::Fleece, index),
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": timeout,
        "discard": "unmap",
    });
    client.execute("blockdev-add", arguments).map(drop)
}

/// Adds the frozen view.
///
/// # Errors
/// QEMU refuses.
pub fn add_view(client: &mut Client, run: &str, index: usize) -> Result<()> {
    let arguments = json!({
        "driver": "snapshot-access",
        "node-name": object(run, Role::Snapshot, index),
        "file": object(run, Role::Filter, index),
        "discard": "unmap",
    });
    client.execute("blockdev-add", arguments).map(drop)
}

/// Adds a filter above the frozen view for QEMUs that mix up what is below it where a request
/// covers clusters that were copied and clusters that were not (seen with 7.2). It answers no
/// question for block status, so the job reads all that it is to copy and the target finds the
/// zeros; and it cuts requests into single clusters of the fleece.
///
/// # Errors
/// QEMU refuses.
pub fn add_hidden_status(client: &mut Client, run: &str, index: usize) -> Result<()> {
    let arguments = json!({
        "driver": "blkdebug",
        "node-name": object(run, Role::HiddenStatus, index),
        "image": object(run, Role::Snapshot, index),
        "max-transfer": FLEECE_CLUSTER,
        "inject-error": [{"event": "none", "iotype": "block-status", "errno": libc::EIO}],
    });
    client.execute("blockdev-add", arguments).map(drop)
}

/// The node that a guest's device is on; `None` if it is gone, or on none.
///
/// # Errors
/// As [`Client::call`].
fn attached(client: &mut Client, qdev: &str, expected: &str) -> Result<Option<String>> {
    let question = json!({"path": qom_path(qdev), "property": "drive"});
    let Ok(answer) = client.call("qom-get", question)? else { return Ok(None) };
    let name = answer.as_str().filter(|n| !n.is_empty());
    let Some(name) = name.filter(|n| *n != expected) else { return Ok(name.map(str::to_string)) };
    // A `-drive` tells its own name, which no node has.
    let graph = graph::ask(client)?;
    if graph.all("block-backend").any(|b| b.name == name) && graph.id(name).is_none() {
        let root = graph::Root::Device(name.to_string());
        return Ok(root.tops(&graph).first().map(|n| n.to_string()));
    }
    Ok(Some(name.to_string()))
}

/// Puts a guest's device from the node `from` on the node `to`. It is looked directly before where it
/// is: another program may have put it elsewhere, or another device in its place. Where it is on `to`
/// already nothing is done: QEMU would end with a failed assertion (seen with 7.2 and 10.0).
///
/// # Errors
/// `Busy` if it is on another node or gone; QEMU refuses: "Permission conflict" if a frozen view still
/// hangs on the filter.
pub fn set_device_node(client: &mut Client, qdev: &str, from: &str, to: &str) -> Result<()> {
    match attached(client, qdev, from)? {
        Some(now) if now == to => Ok(()),
        Some(now) if now == from => {
            let arguments = json!({"path": qom_path(qdev), "property": "drive", "value": to});
            client.execute("qom-set", arguments).map(drop)
        }
        now => {
            let now = now.map_or_else(|| "on no node".into(), |n| format!("on node {}", short(&n)));
            let what = format!(
                "another program has changed the device {} just now: it was on node {from} and is {now}",
                short(qdev)
            );
            Err(graph::in_the_way(what))
        }
    }
}

/// The `blockdev-reopen` options that put `below` under a raw node.
pub fn reopen_options(insertion: &Insertion, below: &str) -> Option<Value> {
    let Insertion::Reopen { node, cache, detect_zeroes } = insertion else { return None };
    let mut o = json!({"driver": "raw", "node-name": node, "file": below, "discard": "unmap"});
    for key in ["direct", "no-flush"] {
        if let Some(v) = cache.get(key) {
            o["cache"][key] = v.clone();
        }
    }
    if !detect_zeroes.is_empty() && detect_zeroes != "off" {
        o["detect-zeroes"] = json!(detect_zeroes);
    }
    Some(o)
}

/// Reopens raw nodes, all in one moment.
///
/// # Errors
/// QEMU refuses; then none is changed.
pub fn reopen(client: &mut Client, options: Vec<Value>) -> Result<()> {
    if options.is_empty() {
        return Ok(());
    }
    client.execute("blockdev-reopen", json!({"options": options})).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_sizes_that_qcow2_does_not_have_become_the_default() {
        assert_eq!(cluster_size(2 << 20), 2 << 20);
        assert_eq!(cluster_size(4 << 20), 65536);
        assert_eq!(cluster_size(1000), 65536);
    }

    #[test]
    fn a_reopened_node_keeps_its_cache_mode() {
        let i = Insertion::Reopen {
            node: "top".into(),
            cache: json!({"direct": true, "no-flush": false, "writeback": true}),
            detect_zeroes: "unmap".into(),
        };
        let o = reopen_options(&i, "cbw").unwrap();
        assert_eq!(o["cache"], json!({"direct": true, "no-flush": false}));
        assert_eq!((o["file"].as_str(), o["detect-zeroes"].as_str()), (Some("cbw"), Some("unmap")));
    }
}
