//! Which level a disk gets, and why: what a point may build on, and which bitmaps record then.
//!
//! An INC or a DIFF is taken only where it is provably right: the point below it is in the target
//! and matches its manifest, and the bitmap that this manifest names is found recording. A deleted
//! last point has taken its bitmap's meaning along, so a FULL follows; except that the chain's FULL
//! keeps a recording bitmap of its own (for DIFFs), so that where all INCs are gone, an INC on the
//! FULL holds everything since then and is as right as a DIFF.

use serde_json::Value;

use super::folders::other_vm;
use super::planned::{DiskPlan, Inputs};
use super::watermark;
use crate::backup::disks::{GuestDisk, is_as_recorded};
use crate::backup::target::history::{History, no_base};
use crate::backup::{FullEvery, Options, RequestedLevel, names};
use crate::error::Result;
use crate::layout::Level;
use crate::manifest::{BackingFile, BitmapInfo, Compared, Manifest, OFFLINE};
use crate::text::path_text;

/// Why there is a FULL where the user wants one from time to time.
pub(crate) const DUE: &str = "a new FULL is due (--full-every)";

/// Chooses the level, and what the point builds on.
///
/// # Errors
/// `Incomplete`, with the reason, where the level that was asked for is impossible.
pub(crate) fn choose(
    options: &Options,
    inputs: &Inputs<'_>,
    history: &History,
    plan: &mut DiskPlan,
) -> Result<()> {
    let level = options.level;
    match level {
        RequestedLevel::Full => return Ok(()),
        RequestedLevel::Copy => {
            plan.level = Level::Copy;
            return Ok(());
        }
        _ if plan.disk.pflash => return Ok(()),
        RequestedLevel::Inc | RequestedLevel::Diff | RequestedLevel::Auto(_) => {}
    }
    let diff = level == RequestedLevel::Diff;
    let base = match no_bitmap(options, &plan.disk).filter(|_| !history.entries.is_empty()) {
        Some(why) => Err(why),
        None => usable_base(inputs, history, &plan.disk, diff)
            .and_then(|base| check_backing(base, &plan.disk)),
    };
    match base {
        Ok((base, since)) => {
            if let RequestedLevel::Auto(Some(every)) = level
                && is_due(every, &base, inputs.now)
            {
                plan.demoted = Some(DUE.into());
                return Ok(());
            }
            plan.chain = base.first().map_or_else(String::new, |m| m.run.clone());
            plan.level = if diff { Level::Diff } else { Level::Inc };
            plan.base = base;
            plan.since = Some(since);
            Ok(())
        }
        Err(reason) if matches!(level, RequestedLevel::Auto(_)) => {
            plan.demoted = Some(reason);
            Ok(())
        }
        Err(reason) => Err(no_base(&reason)),
    }
}

/// Why there is nothing to go by for a disk of a VM that does not run.
fn no_bitmap(options: &Options, disk: &GuestDisk) -> Option<String> {
    let no_bitmap = options.offline.is_some() && !disk.persistent;
    let what = match disk.identity.format.as_str() {
        "qcow2" => "a qcow2 image of version 2",
        _ => "a raw image",
    };
    no_bitmap
        .then(|| format!("{what} keeps no bitmap while its VM is off: what changed is not known"))
}

fn is_due(every: FullEvery, base: &[Manifest], now: i64) -> bool {
    match every {
        FullEvery::Points(n) => base.len() as u64 >= n,
        FullEvery::Age(age) => {
            let full = base.first().map_or(0, |m| m.time);
            now.saturating_sub(full) >= i64::try_from(age.as_secs()).unwrap_or(i64::MAX)
        }
    }
}

/// A point to build on and what is below it, root first, and the bitmap that says what changed since.
type Base = (Vec<Manifest>, BitmapInfo);

/// Fails unless what the disk depends on is known to be what it was: no bitmap says so.
fn check_backing(base: Base, disk: &GuestDisk) -> Result<Base, String> {
    let Some(point) = base.0.last() else { return Ok(base) };
    let (now, image) = (&disk.backing, &point.image);
    let Some(then) = &point.backing else {
        return match now.is_empty() && had_none(point) {
            true => Ok(base),
            false => Err(format!("{image} does not say what the disk's backing file was then")),
        };
    };
    if then.is_empty() && !now.is_empty() {
        return Err(format!("the disk has a backing file and had none at {image}"));
    }
    let kept = kept(then, disk);
    if now.len() != kept.len() {
        return Err(match now.is_empty() {
            true => format!("the disk has no longer the backing file that it had at {image}"),
            false => format!("the disk has other backing files than it had at {image}"),
        });
    }
    for (now, then) in now.iter().zip(kept) {
        let name = path_text(&now.file);
        // What is in QEMU's memory may be migrated to another process.
        let held = now.process == then.process && disk.is_open_since(&base.1.name);
        if !now.is_known() && !then.is_known() && !held {
            return Err(format!(
                "cannot tell whether backing file {name} has changed since {image}: it is not a local file whose \
                 writes can be checked, and QEMU has reopened the disk since"
            ));
        }
        match now.compare(then) {
            Compared::Same | Compared::Unknown => {}
            Compared::Uncertain => {
                return Err(format!(
                    "cannot tell whether backing file {name} is the same file as at {image}"
                ));
            }
            Compared::Changed => {
                return Err(format!("the backing file {name} is not as it was at {image}"));
            }
        }
    }
    Ok(base)
}

/// Those of a disk's backing files that it still has. The others were copied into it by the same process
/// (block-stream), which changes nothing that the guest sees, if they are as they were then.
fn kept<'a>(then: &'a [BackingFile], disk: &GuestDisk) -> Vec<&'a BackingFile> {
    let is_there = |b: &BackingFile| disk.backing.iter().any(|now| now.file == b.file);
    let is_copied = |b: &BackingFile| {
        !is_there(b) && !b.process.is_empty() && b.process == disk.process && is_as_recorded(b)
    };
    then.iter().filter(|b| !is_copied(b)).collect()
}

/// Whether the disk of a point without a record is known to have had no backing file: QEMU said so of its
/// device. (That of a VM that is shut off says what was so before.)
fn had_none(point: &Manifest) -> bool {
    let drives = point.vm.get("query-block").and_then(Value::as_array);
    let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).map(str::to_string);
    let is_it = |i: &&Value| text(i, "node-name").as_ref() == Some(&point.disk.node);
    let drive = drives.into_iter().flatten().filter_map(|d| d.get("inserted")).find(is_it);
    let has = |i: &Value| {
        text(i, "backing_file").is_some()
            || i.get("image").and_then(|i| i.get("backing-image")).is_some()
            || i.get("backing_file_depth").and_then(Value::as_u64) != Some(0)
    };
    point.consistency.reason != OFFLINE && drive.is_some_and(|i| !has(i))
}

/// The chain to build on and the bitmap that says what changed since.
fn usable_base(
    inputs: &Inputs<'_>,
    history: &History,
    disk: &GuestDisk,
    diff: bool,
) -> Result<Base, String> {
    let chain = if diff { history.full()? } else { history.chain()? };
    if let Some(reason) = &inputs.no_inc {
        return Err(reason.clone());
    }
    let Some(point) = chain.last() else { return Err("the chain is empty".into()) };
    let bad = inputs.unsound.iter().find(|(d, i, _)| *d == history.dir && *i == point.image);
    if let Some((_, _, why)) = bad {
        return Err(why.clone());
    }
    if other_vm(inputs, point) {
        return Err(format!("{} is of another VM", point.image));
    }
    let info = point.bitmap.as_ref();
    let Some(info) = info else { return Err(format!("{} names no bitmap", point.image)) };
    check_same_disk(point, disk)?;
    check_bitmap(info, disk).map_err(|why| {
        // The bitmap went when a later point was published.
        let lost = history.lost_after(point).filter(|_| !diff && disk.bitmap(&info.name).is_none());
        match lost {
            Some(lost) => {
                format!(
                    "{lost} is missing (it has a manifest): the bitmap records since then; \
                         {why}"
                )
            }
            None if disk.throwaway => {
                format!("with snapshot=on the disk is reset at each start of QEMU: {why}")
            }
            None => why,
        }
    })?;
    let info = info.clone();
    Ok((chain.into_iter().cloned().collect(), info))
}

fn check_same_disk(point: &Manifest, disk: &GuestDisk) -> Result<(), String> {
    if disk.size < point.virtual_size {
        return Err(format!(
            "the disk was {} bytes at {} and has {} now",
            point.virtual_size, point.image, disk.size
        ));
    }
    if point.disk.format != disk.identity.format {
        return Err(format!(
            "the disk was {} and is {} now",
            point.disk.format, disk.identity.format
        ));
    }
    let mark = point.bitmap.as_ref().and_then(|b| watermark::of(b, disk));
    if disk.size != point.virtual_size && !disk.regrows_zeros && mark.is_none() {
        return Err("the disk grew, and its content during the resize is not known".into());
    }
    Ok(())
}

fn check_bitmap(info: &BitmapInfo, disk: &GuestDisk) -> Result<(), String> {
    let Some(b) = disk.bitmap(&info.name) else {
        return Err(format!("bitmap {} is not on the disk", info.name));
    };
    if b.inconsistent {
        return Err(format!("bitmap {} is inconsistent: QEMU did not end cleanly", info.name));
    }
    if !b.recording {
        return Err(format!("bitmap {} does not record", info.name));
    }
    if b.busy {
        return Err(format!("bitmap {} is in use by a job or an export", info.name));
    }
    if b.granularity != info.granularity {
        return Err(format!("bitmap {} has another granularity than it had", info.name));
    }
    if info.persistent && !b.persistent {
        return Err(format!("bitmap {} is not the persistent one that it was", info.name));
    }
    Ok(())
}

/// Chooses which bitmaps record from now on, and which go.
pub(crate) fn choose_bitmaps(options: &Options, inputs: &Inputs<'_>, plan: &mut DiskPlan) {
    // One that ends with the daemon of a backup would be of no use.
    let lasts = options.offline.is_none() || plan.disk.persistent;
    let records = matches!(plan.level, Level::Full | Level::Inc) && !plan.disk.pflash && lasts;
    if records {
        plan.new_bitmap = Some(BitmapInfo {
            name: names::bitmap(&inputs.target.id, &plan.chain, inputs.run, plan.index),
            node: plan.disk.node.clone(),
            granularity: plan
                .since
                .as_ref()
                .map_or_else(|| granularity(&plan.disk), |b| b.granularity),
            persistent: plan.disk.persistent,
            // Until it is there.
            watermark: false,
        });
    }
    let full =
        match plan.level {
            Level::Full => plan.new_bitmap.clone(),
            _ => plan.base.first().and_then(|m| m.bitmap.clone()).filter(|b| {
                plan.disk.bitmap(&b.name).is_some_and(|b| !b.inconsistent && b.recording)
            }),
        };
    plan.diff_bitmap = full.filter(|_| !options.no_diff);
    plan.obsolete = obsolete(inputs, plan);
}

/// The cluster size: less is copied at no time. (More than QEMU's default, which ends at 64 KiB: of a
/// disk that shrinks QEMU forgets which parts beyond the new end were dirty, and in the cluster of
/// that end they come back when it grows. The bit of that cluster stays.)
fn granularity(disk: &GuestDisk) -> u64 {
    disk.cluster_size.clamp(4096, 2 << 20)
}

/// Bitmaps that nothing needs once the new point is there: all of this target that it does not
/// name. COPY and DIFF advance nothing: what the chain needs stays.
fn obsolete(inputs: &Inputs<'_>, plan: &DiskPlan) -> Vec<String> {
    if matches!(plan.level, Level::Copy | Level::Diff) {
        return Vec::new();
    }
    let kept = plan.new_bitmap.iter().chain(&plan.diff_bitmap);
    let keep: Vec<String> = kept.flat_map(|b| names::with_companions(&b.name)).collect();
    let named = plan.disk.bitmaps.iter().filter_map(|b| b.name.clone());
    named.filter(|n| inputs.target.owns(n) && !keep.contains(n)).collect()
}
