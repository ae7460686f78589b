//! The disks as QEMU's nodes, and the same for copying.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::journal::{Begun, NewDisk};
use super::storage::UNFINISHED;
use crate::boot::argument;
use crate::error::{Error, Kind, Result};
use crate::qemu_img;

/// The name of the point's node below the node `node`.
pub(crate) fn base_name(node: &str) -> String {
    format!("{node}-base")
}

/// A point as QEMU's nodes, and the files that these name.
pub(crate) struct Base {
    /// The nodes; the top one is called [`base_name`].
    pub graph: Value,
    /// Its files, open.
    pub files: Vec<(PathBuf, File)>,
}

/// The first of our sets of descriptors: low ones are the user's.
const FIRST_SET: u64 = 1000;

/// Descriptors that QEMU gets with its arguments. Nobody can exchange a file on the way.
#[derive(Default)]
pub(super) struct Handed {
    /// The arguments.
    pub arguments: Vec<OsString>,
    /// The descriptors, by their numbers.
    pub fds: Vec<OwnedFd>,
}

impl Handed {
    /// The nodes of a point, with descriptors in the place of names; QEMU calls them by the disk's `node`.
    ///
    /// # Errors
    /// `Incomplete` if the nodes name another file.
    pub(super) fn nodes(&mut self, base: Base, node: &str) -> Result<Value> {
        let mut graph = base.graph;
        let first = FIRST_SET + self.fds.len() as u64;
        let mut names = Vec::new();
        for (number, (path, file)) in (first..).zip(base.files) {
            let set = format!("fd={},set={number},opaque={}", file.as_raw_fd(), job_name(node));
            self.arguments.extend(["-add-fd".into(), set.into()]);
            self.fds.push(file.into());
            names.push((path, format!("/dev/fdset/{number}")));
        }
        let mut at = Some(&mut graph);
        while let Some(layer) = at {
            for child in ["file", "data-file"] {
                let Some(file) = layer.get_mut(child) else { continue };
                let path = file["filename"].as_str().map(Path::new);
                let known = names.iter().find(|(name, _)| Some(name.as_path()) == path);
                let Some((_, set)) = known else {
                    let e = Error::new(Kind::Incomplete, "a file of the point is not open");
                    return Err(e.at_path(path.unwrap_or(Path::new(""))));
                };
                file["filename"] = set.as_str().into();
            }
            at = layer.get_mut("backing").filter(|b| b.is_object());
        }
        Ok(graph)
    }
}

/// The name of the job that copies a disk.
pub(super) fn job_name(node: &str) -> String {
    format!("live-restore-{node}")
}

fn file_name(node: &str) -> String {
    format!("{node}-file")
}

/// The same node for `blockdev-reopen`, with nothing changed: what QEMU does then is to write out all that it has of it,
/// and to tell if that fails.
pub(super) fn unchanged(disk: &NewDisk, needs_backup: bool) -> Value {
    json!({
        "driver": "qcow2",
        "node-name": disk.node,
        "discard": "unmap",
        "file": file_name(&disk.node),
        "backing": needs_backup.then(|| base_name(&disk.node)),
    })
}

/// The node of a disk, over its point if it still needs that.
///
/// # Errors
/// `Unsupported` if its name is no text.
pub(super) fn image(disk: &NewDisk, path: &Path, needs_backup: bool) -> Result<Value> {
    Ok(json!({
        "driver": "qcow2",
        "node-name": disk.node,
        "discard": "unmap",
        "file": {"driver": "file", "node-name": file_name(&disk.node), "filename": text(path)?},
        // By its name: whatever the image itself says is not looked at then.
        "backing": needs_backup.then(|| base_name(&disk.node)),
    }))
}

/// The node of a copied store of UEFI's variables.
///
/// # Errors
/// As [`image`].
pub(super) fn vars(path: &Path) -> Result<Value> {
    let file = json!({"driver": "file", "filename": text(path)?});
    Ok(json!({"driver": "raw", "node-name": "vars", "file": file}))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let e = Error::new(Kind::Unsupported, "QEMU's options take names in UTF-8 only");
        e.at_path(path).remedy("name another folder")
    })
}

/// What a person types to do the same: the making of each image, QEMU, and, as comments, the commands over QMP. `bases`
/// are the points, in the order of its disks.
///
/// # Errors
/// As [`image`].
pub(crate) fn shown(storage: &Path, begun: &Begun, bases: &[Value]) -> Result<Vec<String>> {
    let (mut lines, mut jobs) = (Vec::new(), Vec::new());
    let mut words: Vec<OsString> = vec!["qemu-system-x86_64".into()];
    words.extend(begun.arguments.iter().map(OsString::from));
    if let Some(copied) = &begun.vars {
        let path = storage.join(&copied.file);
        let copy = ["cp".into(), copied.template.clone().into(), path.clone().into()];
        lines.push(qemu_img::shown(&copy));
        words.extend(["-blockdev".into(), argument(&vars(&path)?).into()]);
    }
    for (disk, base) in begun.disks.iter().zip(bases) {
        let path = storage.join(&disk.file);
        let (size, name) = (disk.point.size.to_string(), text(&path)?);
        let unfinished = format!("{UNFINISHED}by-hand");
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b"];
        let create = create.into_iter().chain([unfinished.as_str(), name, &size]);
        lines.push(qemu_img::shown(&create.map(OsString::from).collect::<Vec<_>>()));
        for node in [base, &image(disk, &path, true)?] {
            words.extend(["-blockdev".into(), argument(node).into()]);
        }
        if let Some(b) = &disk.bitmap {
            let add = json!({"node": disk.node, "name": b.name, "granularity": b.granularity, "persistent": true});
            jobs.push(json!({"execute": "block-dirty-bitmap-add", "arguments": add}));
        }
    }
    words.push("-S".into());
    lines.push(qemu_img::shown(&words));
    jobs.push(json!({"execute": "cont"}));
    for disk in &begun.disks {
        let options = json!({"options": [unchanged(disk, true)]});
        jobs.push(json!({"execute": "block-stream", "arguments": stream(disk, 0)}));
        jobs.push(json!({"execute": "blockdev-reopen", "arguments": options}));
        jobs.push(json!({"execute": "job-finalize", "arguments": {"id": job_name(&disk.node)}}));
    }
    lines
        .push("# then, over QMP; blockdev-reopen and job-finalize when the job is pending:".into());
    lines.extend(jobs.iter().map(|job| format!("# {}", argument(job))));
    Ok(lines)
}

/// What `block-stream` is told, for at most `rate` bytes per second.
pub(super) fn stream(disk: &NewDisk, rate: u64) -> Value {
    json!({
        "device": disk.node,
        "job-id": job_name(&disk.node),
        "speed": rate,
        // What cannot be read or written now can be later.
        "on-error": "stop",
        // What is copied has to be on disk before QEMU forgets where it came from.
        "auto-finalize": false,
        "auto-dismiss": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> Value {
        json!({"driver": "file", "filename": name})
    }

    #[test]
    fn descriptors_take_the_place_of_all_names() {
        let base = |files: &[&str]| Base {
            graph: json!({"driver": "qcow2", "file": file("/b/inc"), "data-file": file("/b/data"),
                "backing": {"driver": "raw", "file": file("/b/full")}}),
            files: files
                .iter()
                .map(|f| (PathBuf::from(f), tempfile::tempfile().unwrap()))
                .collect(),
        };
        let mut handed = Handed::default();
        for first in [1000, 1003] {
            let graph = handed.nodes(base(&["/b/full", "/b/data", "/b/inc"]), "disk0").unwrap();
            let set = |n: u64| Value::from(format!("/dev/fdset/{}", first + n));
            assert_eq!(graph["file"]["filename"], set(2));
            assert_eq!(graph["data-file"]["filename"], set(1));
            assert_eq!(graph["backing"]["file"]["filename"], set(0));
        }
        assert_eq!((handed.fds.len(), handed.arguments.len()), (6, 12));
        // A name that is left would be opened as it is.
        let e = handed.nodes(base(&["/b/full", "/b/inc"]), "disk0").unwrap_err();
        assert_eq!(e.kind(), Kind::Incomplete);
    }
}
