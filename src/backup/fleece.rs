//! The files and nodes of one disk's fleecing: fleece image, target image, filter, frozen view.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::names::{Role, object};
use super::plan::DiskPlan;
use super::publish::create_private;
use super::seen::Insertion;
use super::{Compression, CopyOptions};
use crate::error::{Error, Kind, Result};
use crate::layer::qcow2::create::NewImage;
use crate::layer::qcow2::header;
use crate::qmp::Client;
use crate::qmp::types::Graph;

/// QEMU's unit of copying before a write, for a fleece without clusters of its own.
const FLEECE_CLUSTER: u64 = 65536;

/// Where the fleece image of disk `index` goes: where the user says, else beside the disk, else
/// (the disk is no file) beside the backup.
pub fn fleece_path(copy: &CopyOptions, plan: &DiskPlan, run: &str, index: usize) -> PathBuf {
    let dir = copy.fleece_dir.clone().or_else(|| plan.disk.folder());
    dir.unwrap_or_else(|| plan.dir.clone()).join(format!("fleecefs-{run}-{index}.fleece.raw"))
}

/// Makes the fleece image: a sparse raw file. Raw, since nothing of it outlives the run, and it
/// costs no metadata.
///
/// # Errors
/// What the operating system said.
pub fn create_fleece(path: &Path, size: u64) -> Result<()> {
    let file = create_private(path)?;
    file.set_len(size).map_err(|e| Error::io(e, "cannot size the fleece image").at_path(path))
}

/// The shape of a target, as the disk's own: version 3 always, since 2 loses zeroes in an INC.
pub fn new_image(plan: &DiskPlan, copy: &CopyOptions) -> NewImage {
    let d = &plan.disk;
    NewImage {
        size: d.size,
        cluster_size: cluster_size(d.cluster_size),
        extended_l2: d.extended_l2,
        lazy_refcounts: d.lazy_refcounts,
        compression: match copy.compress {
            Some(Compression::Zstd) => header::Compression::Zstd,
            _ => header::Compression::Zlib,
        },
    }
}

/// What qcow2 allows: 512 bytes to 2 MiB, a power of two.
fn cluster_size(source: u64) -> u64 {
    let legal = source.is_power_of_two() && (512..=2 << 20).contains(&source);
    if legal { source } else { 65536 }
}

/// Adds the node of an image file that we made. Where QEMU may not open it, our own descriptors
/// are handed over.
///
/// QEMU never syncs it: it would do so in its main loop, and the guest would stand still as long as
/// a slow disk takes. A fleece needs no sync; a target is synced by us, see
/// [`super::publish::Held`].
///
/// # Errors
/// QEMU refuses.
pub fn add_image(
    client: &mut Client,
    node: &str,
    driver: &str,
    path: &Path,
    file_options: Value,
    find_zeros: bool,
) -> Result<()> {
    let add = |client: &mut Client, name: &str| {
        let cache = json!({"no-flush": true});
        let mut file =
            json!({"driver": "file", "filename": name, "discard": "unmap", "cache": cache});
        merge(&mut file, &file_options);
        let detect = if find_zeros { "unmap" } else { "off" };
        let all = json!({"driver": driver, "node-name": node, "discard": "unmap",
            "detect-zeroes": detect, "cache": cache, "file": file});
        client.call("blockdev-add", all)
    };
    let Some(name) = path.to_str() else {
        return Err(Error::new(Kind::Usage, "a file name that is not UTF-8").at_path(path));
    };
    let refusal = match add(client, name)? {
        Ok(_) => return Ok(()),
        Err(r) => r,
    };
    let denied = ["Permission denied", "No such file", "Operation not permitted"];
    if !denied.iter().any(|d| refusal.desc.contains(d)) || !client.takes_descriptors() {
        return Err(Error::from(refusal).at_path(path));
    }
    log::info!("QEMU may not open {name} ({}); passing it descriptors", refusal.desc);
    let set = pass_file(client, path, node)?;
    add(client, &format!("/dev/fdset/{set}"))?.map_err(|r| Error::from(r).at_path(path))?;
    Ok(())
}

fn merge(into: &mut Value, more: &Value) {
    if let (Some(a), Some(b)) = (into.as_object_mut(), more.as_object()) {
        a.extend(b.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}

/// Hands over a file, read-write and read-only: QEMU takes whichever an open asks for.
/// The sets carry the node's name, so that the teardown finds them.
fn pass_file(client: &mut Client, path: &Path, node: &str) -> Result<u64> {
    let open = |write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .map_err(|e| Error::io(e, "cannot open the image").at_path(path))
    };
    let (both, read) = (open(true)?, open(false)?);
    let first = add_fd(client, both.as_fd(), json!({"opaque": node}))?;
    add_fd(client, read.as_fd(), json!({"opaque": node, "fdset-id": first}))?;
    Ok(first)
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
    let graph: Graph = client.query("x-debug-query-block-graph", json!({}))?;
    let Some(file) = graph.child(node, "file") else {
        return Err(Error::new(Kind::Peer, format!("QEMU does not say what is below {node}")));
    };
    let read_only = json!({"driver": "qcow2", "node-name": node, "file": file, "read-only": true,
        "discard": "unmap", "cache": {"no-flush": true}});
    let answer = client.call("blockdev-reopen", json!({"options": [read_only]}))?;
    answer.map_err(|r| match r.desc.contains("No space left") {
        true => Error::new(Kind::NoSpace, "no space left for the image's tables"),
        false => Error::new(Kind::Io, format!("QEMU cannot complete the image: {}", r.desc)),
    })?;
    client.execute("blockdev-del", json!({"node-name": node})).map(drop)
}

/// Gives the room of a fleece image that nobody needs any more back to its file system, here and
/// not in QEMU's main loop, where closing a large file takes time. One that is gone is fine.
///
/// # Errors
/// What the operating system said.
pub fn empty(path: &Path) -> Result<()> {
    match OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(f) => f.set_len(0),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
    .map_err(|e| Error::io(e, "cannot empty the fleece image").at_path(path))
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
pub fn add_blind(client: &mut Client, run: &str, index: usize) -> Result<()> {
    let arguments = json!({
        "driver": "blkdebug",
        "node-name": object(run, Role::Blind, index),
        "image": object(run, Role::Snapshot, index),
        "max-transfer": FLEECE_CLUSTER,
        "inject-error": [{"event": "none", "iotype": "block-status", "errno": libc::EIO}],
    });
    client.execute("blockdev-add", arguments).map(drop)
}

/// Puts `node` where the guest device looks.
///
/// # Errors
/// QEMU refuses: "Permission conflict" if a frozen view still hangs on the filter.
pub fn plug(client: &mut Client, qdev: &str, node: &str) -> Result<()> {
    // By id alone a device may be ambiguous: an NVMe controller's bus has its name.
    let path = match qdev.starts_with('/') {
        true => qdev.to_string(),
        false => format!("/machine/peripheral/{qdev}"),
    };
    let arguments = json!({"path": path, "property": "drive", "value": node});
    client.execute("qom-set", arguments).map(drop)
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
