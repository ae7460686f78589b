//! Volumes of the device mapper that are ours: known by their names, which begin with the attachment's own.

use std::path::{Path, PathBuf};

use super::device;
use super::place::Place;
use super::tools::{DMSETUP, args};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, EntryKind, Folder, system};

/// Volumes on volumes: thin pools, caches and snapshots take some layers.
const LAYERS: usize = 32;

/// The kernel's name (`dm-3`) of the volume `name`.
pub(super) fn find(name: &str) -> Option<String> {
    device::all("dm-").into_iter().find(|d| device::setting(d, "dm/name").as_deref() == Some(name))
}

/// The node of the volume that the kernel calls `device` and the device mapper `name`.
///
/// # Errors
/// It has none, and none can be made.
pub(super) fn node(place: &Place, device: &str, name: &str) -> Result<PathBuf> {
    let path = Path::new("/dev/mapper").join(name);
    let numbers = device::setting(device, "dev").and_then(|t| {
        let (major, minor) = t.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    });
    match numbers {
        Some(numbers) if device::is_node(&path, numbers) => Ok(path),
        _ => device::node(place, device),
    }
}

/// Removes the volumes whose names begin with `prefix`, those first that no other is on.
///
/// # Errors
/// `Busy` if one is in use; what dmsetup says.
pub(super) fn remove(prefix: &str) -> Result<()> {
    for _ in 0..LAYERS {
        let named = |d: String| Some((device::setting(&d, "dm/name")?, d));
        let all: Vec<(String, String)> = device::all("dm-")
            .into_iter()
            .filter_map(named)
            .filter(|(name, _)| name.starts_with(prefix))
            .collect();
        let is_free = |device: &str| {
            system::names(&Path::new("/sys/class/block").join(device).join("holders")).is_empty()
        };
        let free: Vec<&String> =
            all.iter().filter(|(_, d)| is_free(d)).map(|(name, _)| name).collect();
        if all.is_empty() {
            return Ok(());
        }
        if free.is_empty() {
            break;
        }
        for name in free {
            DMSETUP.run(&args(["remove", "--retry", name])).map_err(busy)?;
        }
    }
    Err(Error::new(Kind::Busy, format!("something is on the volumes {prefix}*"))
        .remedy("'lsblk' shows what; end that, and detach again"))
}

fn busy(e: Error) -> Error {
    match e.report().contains("busy") {
        true => Error::new(Kind::Busy, "a volume is still in use")
            .with_source(e)
            .remedy("unmount or close it, and detach again"),
        false => e,
    }
}

/// Removes the folder of links that LVM makes for the group `name`, where it could not do that by itself.
///
/// # Errors
/// What the operating system said.
pub(super) fn remove_links(name: &str) -> Result<()> {
    let failed = |e| Error::io(e, "cannot remove the links of a volume group").at_path("/dev");
    let dev = Folder::open(Path::new("/dev")).map_err(failed)?;
    let Some(links) = folder::absent_is_none(dev.folder(name)).map_err(failed)? else {
        return Ok(());
    };
    for entry in links.entries().map_err(failed)? {
        if entry.kind == EntryKind::Link {
            links.remove_if_there(&entry.name).map_err(failed)?;
        }
    }
    dev.remove_folder(name).map_err(failed)
}
