//! From the points of a run to a VM and its disks.

use super::args::BootArgs;
use crate::boot::{self, Boots, Disk, PointToBoot, Vm, Wanted};
use crate::chain::Catalog;
use crate::cli::one_run::{ChosenPoint, OneRun};
use crate::error::Result;
use crate::image::{Cache, open_point};
use crate::layer::LayerSpec;
use crate::machine::flash_unit;
use crate::mount::{Writable, find_scratch};
use crate::overlay::Scratch;
use crate::overlay::kept::PointName;
use crate::text::path_text;

/// Memory for the maps of all points, and for what is decompressed of them.
const CACHE_SIZE: u64 = 64 << 20;

/// What is to be started.
pub(in crate::cli) struct Prepared {
    /// The VM.
    pub vm: Vm,
    /// Its disks, in the order of [`Vm::sources`].
    pub points: Vec<PointToBoot>,
    /// The layers of each.
    pub stacks: Vec<Vec<LayerSpec>>,
}

/// Opens the points, looks at how they are booted, and decides what the VM is.
///
/// # Errors
/// A point is not available; as [`Vm::plan`].
pub(in crate::cli) fn prepared(wanted: &Wanted, run: &OneRun<'_>) -> Result<Prepared> {
    let cache = Cache::new(CACHE_SIZE);
    let mut images = Vec::new();
    let mut disks = Vec::new();
    for chosen in &run.points {
        let image = open_point(chosen.disk, chosen.point, &cache)?;
        let boots = boot::look(&image).unwrap_or_else(|e| {
            log::warn!("{}: {}", path_text(&chosen.disk.path), e.report());
            Boots::default()
        });
        let identity = chosen.manifest.as_ref().map(|m| &m.disk);
        disks.push(Disk {
            device: identity.and_then(|d| run.machine.disk(&d.qdev)),
            flash: identity.and_then(|d| flash_unit(&d.qdev, &d.device)),
            size: image.size(),
            boots,
        });
        images.push(image);
    }
    let vm = Vm::plan(&run.machine, &disks, wanted)?;
    let mut points = Vec::new();
    let mut stacks = Vec::new();
    for source in vm.sources() {
        let (Some(chosen), Some(image)) = (run.points.get(source), images.get(source)) else {
            continue;
        };
        points.push(PointToBoot { image: image.clone(), name: name_of(chosen) });
        stacks.push(chosen.disk.stack(chosen.point));
    }
    Ok(Prepared { vm, points, stacks })
}

fn name_of(chosen: &ChosenPoint<'_>) -> PointName {
    PointName::new(&chosen.disk.path, &chosen.disk.points[chosen.point].name)
}

/// Where that goes which the guest writes.
///
/// # Errors
/// As [`find_scratch`].
pub(super) fn scratch(args: &BootArgs, catalog: &Catalog) -> Result<Scratch> {
    let wanted =
        Writable { scratch: args.how.scratch.clone(), limit: args.how.scratch_size, keep: false };
    find_scratch(&wanted, (&catalog.root, None), None)
}
