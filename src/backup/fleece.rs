//! The files and nodes of one disk's fleecing: fleece image, target image, filter, frozen view.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::names::{Role, object};
use super::plan::DiskPlan;
use super::publish::create_private;
use super::seen::Insertion;
use super::{Compression, CopyOptions};
use crate::error::{Error, Result};
use crate::qmp::Client;

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

/// `qemu-img create -o` for a target: compat 1.1 always, since 0.10 loses zeroes in an INC.
pub fn image_options(plan: &DiskPlan, copy: &CopyOptions) -> String {
    let d = &plan.disk;
    let mut o = format!("compat=1.1,cluster_size={}", cluster_size(d.cluster_size));
    if d.extended_l2 {
        o.push_str(",extended_l2=on");
    }
    if d.lazy_refcounts {
        o.push_str(",lazy_refcounts=on");
    }
    if copy.compress == Some(Compression::Zstd) {
        o.push_str(",compression_type=zstd");
    }
    o
}

/// What qcow2 allows: 512 bytes to 2 MiB, a power of two.
fn cluster_size(source: u64) -> u64 {
    let legal = source.is_power_of_two() && (512..=2 << 20).contains(&source);
    if legal { source } else { 65536 }
}

/// Adds the node of an image file that we made. Where QEMU may not open it, our own descriptors
/// are handed over.
///
/// # Errors
/// QEMU refuses.
pub fn add_image(
    client: &mut Client,
    node: &str,
    driver: &str,
    path: &Path,
    file_options: Value,
) -> Result<()> {
    let add = |client: &mut Client, name: &str| {
        let mut file = json!({"driver": "file", "filename": name, "discard": "unmap"});
        merge(&mut file, &file_options);
        let all = json!({"driver": driver, "node-name": node, "discard": "unmap", "file": file});
        client.call("blockdev-add", all)
    };
    let Some(name) = path.to_str() else {
        return Err(
            Error::new(crate::error::Kind::Usage, "a file name that is not UTF-8").at_path(path)
        );
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
        std::fs::OpenOptions::new()
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
    answer.get("fdset-id").and_then(Value::as_u64).ok_or_else(|| {
        Error::new(crate::error::Kind::Corrupt, "the answer to add-fd has an unknown shape")
    })
}

/// Options of the target's file node.
pub fn target_options(copy: &CopyOptions) -> Value {
    let mut o = json!({});
    if let Some(aio) = &copy.aio {
        o["aio"] = json!(aio);
    }
    if copy.direct {
        o["cache"] = json!({"direct": true});
    }
    o
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
