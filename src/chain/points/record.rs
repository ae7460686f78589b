//! Manifests for images that have none, out of what names, headers and neighbours say.

use crate::chain::link::format::DECIDE;
use crate::chain::{Disk, Point};
use crate::error::{Error, Kind, Result};
use crate::layer::Format;
use crate::layout::Level;
use crate::manifest;
use crate::manifest::{
    Consistency, Contents, DiskIdentity, FORMAT_VERSION, ImageFormat, Manifest, VmConfig,
};

/// What the catalog knows about a point as a manifest; `None` if a manifest cannot say it (an
/// internal snapshot, a plain image, a point that depends on a file in another folder).
pub fn describe(disk: &Disk, i: usize) -> Option<Manifest> {
    let p = &disk.points[i];
    let is_backup = matches!(p.level, Level::Full | Level::Inc | Level::Diff | Level::Copy);
    if !is_backup || p.layers.len() != 1 {
        return None;
    }
    describe_format(disk, i)
}

/// As [`describe`], also of a plain image, and of one that depends on a file in another folder: then the
/// manifest says no more of it than its format and size, and its own pointer what is below.
pub fn describe_format(disk: &Disk, i: usize) -> Option<Manifest> {
    let p = &disk.points[i];
    let layer = p.layers.last().filter(|_| p.level != Level::Snapshot)?;
    let format = match layer.format {
        Format::Qcow2 => ImageFormat::Qcow2,
        Format::Raw => ImageFormat::Raw,
        // Other programs' archives have checksums of their own and are never written here.
        Format::Vma | Format::SparseStream => return None,
    };
    let parent = match p.parent.map(|j| &disk.points[j].source) {
        Some(below) if below.parent() != p.source.parent() => return None,
        Some(below) => Some(below.file_name()?.to_str()?.to_string()),
        None => None,
    };
    Some(Manifest {
        format_version: FORMAT_VERSION,
        // Points of one second belong to one run, as far as their names tell.
        run: format!("time-{}", p.time),
        image: p.source.file_name()?.to_str()?.to_string(),
        disk: DiskIdentity::default(),
        moved_from: None,
        linked_from: None,
        time_nanos: 0,
        level: p.level,
        time: p.time,
        content: match parent.is_some() || p.layers.len() > 1 {
            true => Contents::DirtyOnly,
            false => Contents::Full,
        },
        parent,
        state_of: None,
        format,
        virtual_size: p.size,
        file_size: layer.file.identity().size,
        bitmap: None,
        diff_bitmap: None,
        bytes_copied: 0,
        consistency: Consistency { reason: manifest::RECORDED.into(), ..Consistency::default() },
        qemu_version: String::new(),
        duration_ms: 0,
        blake3: None,
        fingerprint: None,
        vm: VmConfig::default(),
        backing: None,
        config_files: Vec::new(),
        skipped: Vec::new(),
        failed: Vec::new(),
        run_images: Vec::new(),
    })
}

/// Fails if of an image in the chain of point `of` nothing but its own bytes says that it is qcow2: a
/// manifest, or an image that is made of it, would turn that guess into a fact.
///
/// # Errors
/// `Unsupported`, with what decides.
pub fn check_formats(disk: &Disk, of: usize) -> Result<()> {
    let chain = &disk.points[of].chain;
    let open = |p: &&Point| p.chain == *chain && p.format_is_open;
    let Some(p) = disk.points.iter().find(open) else { return Ok(()) };
    let what = "only its content says qcow2: a guest can write a qcow2 header to a raw disk";
    Err(Error::new(Kind::Unsupported, what).at_path(&p.source).remedy(DECIDE))
}

/// Writes manifests, without hashes, for point `from` and all after it in its chain that have
/// none: from then on they say what depends on what, whatever names say.
///
/// # Errors
/// As [`check_formats`]; `Unsupported` if a manifest cannot say it, or writing failed.
pub fn record_from(disk: &Disk, from: usize) -> Result<()> {
    check_formats(disk, from)?;
    let first = &disk.points[from];
    for (i, p) in disk.points.iter().enumerate() {
        let later = i >= from || p.time >= first.time;
        if p.chain != first.chain || !later || p.level == Level::Snapshot {
            continue;
        }
        let (Some(dir), Some(name)) = (p.source.parent(), p.source.file_name()) else { continue };
        if manifest::read(dir, name)?.is_some() {
            continue;
        }
        let m = describe(disk, i).ok_or_else(|| {
            Error::new(Kind::Unsupported, "no manifest can be written for it").at_path(&p.source)
        })?;
        manifest::write(dir, &m)?;
    }
    Ok(())
}
