//! What the target holds: which of its folders belongs to which disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::disk_files::{are_two, numbered_kind};
use super::planned::{DiskPlan, Inputs, Plan};
use crate::backup::disks::GuestDisk;
use crate::backup::target::history::History;
use crate::backup::target::target_id::months_of;
use crate::backup::target::targets::Folders;
use crate::backup::{Options, RequestedLevel, names};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::EntryKind;
use crate::layout::Level;
use crate::manifest::{DiskIdentity, Manifest};
use crate::manifest::{vm_name, vm_uuid};

/// What the target holds for a disk.
#[derive(Debug)]
pub(crate) struct Place {
    /// Its folder.
    pub dir: PathBuf,
    /// What is in it.
    pub history: History,
    /// The file of another disk of the target of which this new one is a copy.
    pub copy_of: Option<String>,
}

/// Which folder belongs to which disk, and what it holds. A disk keeps the folder whose manifests
/// name its file, else its bitmap or device; a new one gets a folder by its base name, made unique.
///
/// # Errors
/// A folder cannot be read; `Usage` if a disk's chain is there in the other layout.
pub(crate) fn assign(
    options: &Options,
    inputs: &Inputs<'_>,
    disks: &[GuestDisk],
) -> Result<Vec<Place>> {
    disks.iter().try_for_each(|d| check_layout(options, inputs, d))?;
    let mut list: Vec<Option<(PathBuf, History)>> = vec![None; disks.len()];
    let mut histories = HistoryCache::default();
    for rule in [chosen as Rule, same_file_and_device, same_file, same_disk, damaged] {
        fill(options, inputs, disks, &mut list, (rule, false), &mut histories)?;
    }
    fill_known(options, inputs, disks, &mut list)?;
    let copies = match list.iter().any(Option::is_none) {
        true => fill_from_others(options, inputs, disks, &mut list)?,
        false => Vec::new(),
    };
    fill(options, inputs, disks, &mut list, (unclaimed, true), &mut histories)?;
    check_names(disks, &list)?;
    let mut copies = copies.into_iter();
    let place = |found: Option<(PathBuf, History)>| {
        let none = || Error::new(Kind::Exists, "too many folders of one disk's name");
        let (dir, history) = found.ok_or_else(none)?;
        Ok(Place { dir, history, copy_of: copies.next().flatten() })
    };
    list.into_iter().map(place).collect()
}

/// Gives disks the folders that have other names than theirs; and the files of which those that are still
/// without one are copies.
fn fill_from_others(
    options: &Options,
    inputs: &Inputs<'_>,
    disks: &[GuestDisk],
    list: &mut [Option<(PathBuf, History)>],
) -> Result<Vec<Option<String>>> {
    let mut others = others(options, inputs, list)?;
    if inputs.newcomer && list.iter().all(Option::is_none) {
        refuse_other_vm(options, inputs, &others)?;
    }
    for (slot, disk) in
        list.iter_mut().zip(disks).filter(|(slot, d)| slot.is_none() && d.named.is_none())
    {
        // Where it had moved before, or has a name that the user gave it once.
        // Or it has a new place, and its name or none that is there.
        let own = disk.folder_name(&options.layout);
        let is_new = !folder::exists(&inputs.base.join(&own));
        let is = |h: &History| {
            same_file(inputs, disk, h)
                || carries_bitmap(inputs, disk, h)
                || same_serial(inputs, disk, h)
                || has_new_number(inputs, disk, h)
                || (is_new || h.tail == own) && is_renamed(inputs, disk, h, disks)
        };
        let Some(at) = others.iter().position(|(_, h)| is(h)) else { continue };
        let (dir, history) = others.swap_remove(at);
        let whole = read_whole(&dir, history.tail, options.layout.no_subdir)?;
        *slot = is(&whole).then_some((dir, whole));
    }
    let known = || list.iter().flatten().chain(&others).map(|(_, h)| h);
    let copy = |(slot, disk): (&Option<_>, &GuestDisk)| match slot {
        None if disk.named.is_none() => known().find_map(|h| copied_from(inputs, disk, h)),
        _ => None,
    };
    Ok(list.iter().zip(disks).map(copy).collect())
}

/// `--no-subdir` forgotten once, or given once, must not end a chain: a FULL in the other layout would
/// take over the disk's bitmaps, and its name. Where there are chains in both, either goes.
fn check_layout(options: &Options, inputs: &Inputs<'_>, disk: &GuestDisk) -> Result<()> {
    if options.level == RequestedLevel::Copy {
        return Ok(());
    }
    let (names, flat) = (disk.folder_names(&options.layout), options.layout.no_subdir);
    let read = |flat: bool, name: &str| match flat {
        true => History::read(inputs.base, Some(name)),
        // In the other layout the name may be that of an image, or of a link.
        false if !folder::is_folder(&inputs.base.join(name)) => Ok(History::default()),
        false => History::read(&inputs.base.join(name), None),
    };
    let is_chained = |h: &History| {
        let mut levels = h.entries.iter().map(|e| e.level);
        same_file(inputs, disk, h) && levels.any(|l| matches!(l, Level::Full | Level::Inc))
    };
    let chained = |flat: bool| -> Result<bool> {
        for name in &names {
            if is_chained(&read(flat, name)?) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    if !chained(!flat)? || chained(flat)? {
        return Ok(());
    }
    let (there, word) =
        if flat { ("a folder of its own", "without") } else { ("the target itself", "with") };
    let what = format!("{}: its chain is in {there}", disk.label());
    Err(Error::new(Kind::Usage, what)
        .at_path(inputs.base)
        .remedy(format!("continue the chain {word} --no-subdir, or name another target")))
}

/// Gives a folder to each disk that has none yet and for which `rule` finds one.
fn fill(
    options: &Options,
    inputs: &Inputs<'_>,
    disks: &[GuestDisk],
    list: &mut [Option<(PathBuf, History)>],
    rule: (Rule, bool),
    histories: &mut HistoryCache,
) -> Result<()> {
    for (i, disk) in disks.iter().enumerate() {
        if list.get(i).is_some_and(Option::is_some) {
            continue;
        }
        let found = candidate(options, inputs, disk, list, rule, histories)?;
        if let Some(slot) = list.get_mut(i) {
            *slot = found;
        }
    }
    Ok(())
}

/// Gives renamed disks the folders that they had at the last run, if those are still theirs: without
/// that, every folder of the target is looked at in each run.
fn fill_known(
    options: &Options,
    inputs: &Inputs<'_>,
    disks: &[GuestDisk],
    list: &mut [Option<(PathBuf, History)>],
) -> Result<()> {
    let flat = options.layout.no_subdir;
    for (i, disk) in disks.iter().enumerate().filter(|(_, d)| d.named.is_none()) {
        let is_open = list.get(i).is_some_and(Option::is_none);
        let Some(tail) = inputs.renamed.get(&disk.identity.file).filter(|_| is_open) else {
            continue;
        };
        if folder::plain(tail.as_ref()).is_err() {
            continue;
        }
        let dir = if flat { inputs.base.to_path_buf() } else { inputs.base.join(tail) };
        if list.iter().flatten().any(|(d, h)| *d == dir && (!flat || h.tail == *tail)) {
            continue;
        }
        let history = read_whole(&dir, tail.clone(), flat)?;
        if let Some(slot) = list.get_mut(i).filter(|_| same_file(inputs, disk, &history)) {
            *slot = Some((dir, history));
        }
    }
    Ok(())
}

/// What the folders (where all disks are in one: the names) of a plan's disks are called that are not
/// called as their files are.
pub(crate) fn renamed(options: &Options, plan: &Plan) -> Folders {
    let of = |d: &DiskPlan| {
        let tail = match options.layout.no_subdir {
            true => names::parse_image(&d.image)?.2.to_string(),
            false => d.dir.file_name()?.to_str()?.to_string(),
        };
        let is_own = d.disk.folder_names(&options.layout).contains(&tail);
        (!is_own).then(|| (d.disk.identity.file.clone(), tail))
    };
    plan.disks.iter().filter_map(of).collect()
}

/// All that there is in the folder `dir`, or, where all disks are in it, of the one called `tail`.
fn read_whole(dir: &Path, tail: String, flat: bool) -> Result<History> {
    let mut history = History::read(dir, flat.then_some(tail.as_str()))?;
    history.tail = tail;
    Ok(history)
}

/// The folders with points that no disk has got yet (where all disks are in one folder: the names), the
/// one with the newest point first. Of each no more is read than tells whose it is.
fn others(
    options: &Options,
    inputs: &Inputs<'_>,
    list: &[Option<(PathBuf, History)>],
) -> Result<Vec<(PathBuf, History)>> {
    let mut others = match options.layout.no_subdir {
        true => others_in(inputs.base, list)?,
        false => other_folders(inputs.base, list)?,
    };
    others.sort_by_key(|(_, h)| std::cmp::Reverse(h.last_time()));
    Ok(others)
}

/// The chains of other disks in the one folder of all.
fn others_in(base: &Path, list: &[Option<(PathBuf, History)>]) -> Result<Vec<(PathBuf, History)>> {
    let is_free = |h: &History| {
        !h.tail.is_empty() && !list.iter().flatten().any(|(_, taken)| taken.tail == h.tail)
    };
    let others = History::glance(base, true)?.into_iter();
    let others = others.filter(|h| is_free(h) && h.last_manifest().is_some());
    Ok(others.map(|h| (base.to_path_buf(), h)).collect())
}

/// All chains in a folder of a month.
fn others_of(options: &Options, base: &Path) -> Result<Vec<(PathBuf, History)>> {
    match options.layout.no_subdir {
        true => others_in(base, &[]),
        false => other_folders(base, &[]),
    }
}

fn other_folders(
    base: &Path,
    list: &[Option<(PathBuf, History)>],
) -> Result<Vec<(PathBuf, History)>> {
    let failed = |e| Error::io(e, "cannot read the folder").at_path(base);
    let entries = folder::absent_is_none(folder::entries(base)).map_err(failed)?;
    let mut others = Vec::new();
    for entry in entries.unwrap_or_default().into_iter().filter(|e| e.kind == EntryKind::Folder) {
        let Some(tail) = entry.name.to_str() else { continue };
        let dir = base.join(tail);
        if list.iter().flatten().any(|(taken, _)| *taken == dir) {
            continue;
        }
        for mut history in History::glance(&dir, false)? {
            history.tail = tail.to_string();
            if history.last_manifest().is_some() {
                others.push((dir.clone(), history));
            }
        }
    }
    Ok(others)
}

/// A VM that has nothing here does not mix its points with those of another: retention and the latest
/// run would be of both.
fn refuse_other_vm(
    options: &Options,
    inputs: &Inputs<'_>,
    others: &[(PathBuf, History)],
) -> Result<()> {
    let all = || others.iter().filter_map(|(dir, h)| Some((dir, h.last_manifest()?)));
    if all().any(|(_, m)| is_same_vm(inputs, m)) {
        return Ok(());
    }
    let Some((dir, m)) = all().find(|(_, m)| is_other_vm(inputs, m)) else { return Ok(()) };
    // It may have begun to share the target in an earlier month.
    for month in months_of(&options.target).into_iter().filter(|m| m != inputs.base) {
        let found = others_of(options, &month)?;
        if found.iter().filter_map(|(_, h)| h.last_manifest()).any(|m| is_same_vm(inputs, m)) {
            return Ok(());
        }
    }
    let who = vm_name(&m.vm).or(vm_uuid(&m.vm)).unwrap_or("another name");
    let what = format!("this backup directory has backups of another VM ({who})");
    Err(Error::new(Kind::Usage, what)
        .at_path(dir)
        .remedy("name another --target, or give --shared if both are to be here"))
}

/// Whether the point is of this VM for certain.
fn is_same_vm(inputs: &Inputs<'_>, m: &Manifest) -> bool {
    match (inputs.vm, vm_uuid(&m.vm)) {
        (Some(a), Some(b)) => a == b,
        (None, None) => inputs.vm_name.is_some() && inputs.vm_name == vm_name(&m.vm),
        _ => false,
    }
}

/// Whether it is of another VM for certain; names count where there are no UUIDs.
fn is_other_vm(inputs: &Inputs<'_>, m: &Manifest) -> bool {
    let unnamed = (inputs.vm, vm_uuid(&m.vm)) == (None, None);
    let names = (inputs.vm_name, vm_name(&m.vm));
    other_vm(inputs, m) || unnamed && matches!(names, (Some(a), Some(b)) if a != b)
}

/// The same device of the same VM has another file: the disk was restored to another place, or its
/// loop device has another number. The old file must not be a disk of the VM still.
fn is_renamed(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History, disks: &[GuestDisk]) -> bool {
    let Some(m) = h.last_manifest().filter(|m| is_same_vm(inputs, m)) else { return false };
    let qdev = &disk.identity.qdev;
    let is_there = disks.iter().any(|d| d.identity.file == m.disk.file);
    is_given(qdev) && *qdev == m.disk.qdev && disk.size == m.virtual_size && !is_there
}

/// Who was given a name by the user has that, and not one with a number.
fn check_names(disks: &[GuestDisk], list: &[Option<(PathBuf, History)>]) -> Result<()> {
    for (disk, found) in disks.iter().zip(list) {
        let (Some(name), Some((dir, h))) = (&disk.named, found) else { continue };
        if !has_tail(h, name) {
            let what = format!("the name {name:?} for {} is another disk's", disk.label());
            return Err(Error::new(Kind::Usage, what).at_path(dir).remedy("choose another --name"));
        }
    }
    Ok(())
}

/// Whether the folder is called as the user named a disk.
fn has_tail(h: &History, name: &str) -> bool {
    [false, true].iter().any(|plain| h.tail == names::folder(name, *plain))
}

/// The user says which disk's points these are.
fn chosen(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let is_free = h.last_manifest().is_some_and(|m| !is_other_vm(inputs, m));
    disk.named.as_ref().is_some_and(|name| is_free && has_tail(h, name))
}

type Rule = fn(&Inputs<'_>, &GuestDisk, &History) -> bool;

/// Before the others: images of two clusters may have one name, `rbd:POOL/IMAGE`.
fn same_file_and_device(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    same_file(inputs, disk, h)
        && h.last_manifest().is_some_and(|m| device(&m.disk) == device(&disk.identity))
}

fn device(d: &DiskIdentity) -> (&str, &str) {
    (&d.qdev, &d.device)
}

fn same_file(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let is_file = |m: &Manifest| !other_vm(inputs, m) && m.disk.file == disk.identity.file;
    h.last_manifest().is_some_and(is_file) && !is_of_another(inputs, disk, h)
}

/// Whether the points of the disk's file are those of another disk of the VM, which has got another file: where
/// two have exchanged theirs (loop devices with each other's numbers), the file's name says the opposite of what is.
/// Device and file together are believed: a copy of the disk beside it carries its bitmap, too.
fn is_of_another(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let Some(m) = h.last_manifest().filter(|m| is_same_vm(inputs, m)) else { return false };
    if device(&m.disk) == device(&disk.identity) {
        return false;
    }
    let is = |d: &GuestDisk| {
        same_serial(inputs, d, h) || carries_bitmap(inputs, d, h) || has_new_number(inputs, d, h)
    };
    let is_other = |d: &&GuestDisk| d.identity != disk.identity;
    !is(disk) && inputs.seen.disks.iter().filter(is_other).any(is)
}

/// Whether the guest knows the disk by the serial number of these points, and no other disk of the VM.
fn same_serial(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let serial = &disk.identity.serial;
    let Some(m) = h.last_manifest().filter(|m| is_same_vm(inputs, m)) else { return false };
    let alike = inputs.seen.disks.iter().filter(|d| d.identity.serial == *serial).count();
    !serial.is_empty() && m.disk.serial == *serial && alike == 1
}

/// The disk's storage is a device that the kernel numbers as it finds it, and has another number now: the same
/// device of the VM has a disk of the same size on storage of that kind.
fn has_new_number(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let Some(m) = h.last_manifest().filter(|m| is_same_vm(inputs, m)) else { return false };
    let kinds = (numbered_kind(&m.disk.file), numbered_kind(&disk.identity.file));
    let same_kind = matches!(kinds, (Some(a), Some(b)) if a == b);
    let same_device = is_given(&m.disk.qdev) && m.disk.qdev == disk.identity.qdev;
    same_kind && same_device && m.virtual_size == disk.size
}

/// Whether a device has its name from the user: QEMU makes up the others, by their place.
fn is_given(qdev: &str) -> bool {
    let made_up = ["/machine/unattached/", "/machine/peripheral-anon/"];
    !qdev.is_empty() && !made_up.iter().any(|m| qdev.starts_with(m))
}

/// The disk's file was moved: its bitmap came along, or it is at the same device of the same VM.
/// A bitmap alone proves nothing: a copy of the disk, of a cloned VM, carries it too.
fn same_disk(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let Some(m) = h.last_manifest().filter(|m| !other_vm(inputs, m)) else { return false };
    let same_vm = inputs.vm.is_some() && vm_uuid(&m.vm) == inputs.vm;
    carries_bitmap(inputs, disk, h)
        || same_vm && device(&m.disk) == device(&disk.identity) && !is_copy(inputs, disk, m)
}

/// The chain's bitmap is on the disk, and nothing says that the disk is a copy of another VM's.
fn carries_bitmap(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> bool {
    let Some(m) = h.last_manifest().filter(|m| !other_vm(inputs, m)) else { return false };
    let is_it = is_same_vm(inputs, m) || agree(&m.disk, &disk.identity);
    has_needed(disk, h) && is_it && !is_copy(inputs, disk, m)
}

/// Whether a bitmap that the folder's chain needs is on the disk.
fn has_needed(disk: &GuestDisk, h: &History) -> bool {
    needed(h).iter().any(|b| disk.bitmap(b).is_some())
}

/// Whether the disk of this point is still where it was, and `disk` is another file: it did not move then. That of
/// a running VM did where the point is of the same VM, and left its old file behind (a mirror job, a restored disk);
/// of images of a VM that is off nobody says whose they are.
fn is_copy(inputs: &Inputs<'_>, disk: &GuestDisk, m: &Manifest) -> bool {
    let has_device = device(&disk.identity) != ("", "");
    !(has_device && is_same_vm(inputs, m)) && are_two(&m.disk.file, &disk.identity.file)
}

/// The file of the folder's disk, if that is still there and `disk` is a copy of it.
fn copied_from(inputs: &Inputs<'_>, disk: &GuestDisk, h: &History) -> Option<String> {
    let m = h.last_manifest()?;
    (has_needed(disk, h) && is_copy(inputs, disk, m)).then(|| m.disk.file.clone())
}

/// Whether the point is of another VM for certain. Not every VM has a UUID.
pub(crate) fn other_vm(inputs: &Inputs<'_>, m: &Manifest) -> bool {
    matches!((inputs.vm, vm_uuid(&m.vm)), (Some(a), Some(b)) if a != b)
}

/// Whether nothing that both say contradicts. Node names that QEMU made up change at each start.
fn agree(a: &DiskIdentity, b: &DiskIdentity) -> bool {
    let said = |d: &DiskIdentity| [d.qdev.clone(), d.device.clone(), d.node.clone()];
    let unknown = |s: &str| s.is_empty() || s.starts_with('#');
    said(a).iter().zip(&said(b)).all(|(x, y)| unknown(x) || unknown(y) || x == y)
}

/// Nothing is known of its points but that there are some: a FULL can begin beside them.
fn damaged(_: &Inputs<'_>, _: &GuestDisk, h: &History) -> bool {
    h.last_manifest().is_none() && h.entries.iter().any(|e| e.broken.is_some())
}

fn unclaimed(_: &Inputs<'_>, _: &GuestDisk, h: &History) -> bool {
    h.last_manifest().is_none()
}

/// How many disks of one base name are kept apart.
const MAX_SAME_NAME: usize = 100;

fn candidate(
    options: &Options,
    inputs: &Inputs<'_>,
    disk: &GuestDisk,
    taken: &[Option<(PathBuf, History)>],
    (rule, new): (Rule, bool),
    histories: &mut HistoryCache,
) -> Result<Option<(PathBuf, History)>> {
    // A new one is called by the layout; a chain goes on also where its FULL had another.
    let names = disk.folder_names(&options.layout);
    let names = names.iter().take(if new { 1 } else { usize::MAX });
    // Where all are in one folder it is read for names that are there alone.
    let there = match options.layout.no_subdir {
        true => Some(History::tails(inputs.base)?),
        false => None,
    };
    let numbered = names.flat_map(|name| (1..=MAX_SAME_NAME).map(move |n| (name, n)));
    for (name, n) in numbered {
        let folder = if n == 1 { name.clone() } else { format!("{name}-{n}") };
        let (dir, only) = if options.layout.no_subdir {
            (inputs.base.to_path_buf(), Some(folder.as_str()))
        } else {
            (inputs.base.join(&folder), None)
        };
        let is_taken = taken.iter().flatten().any(|(d, h)| {
            *d == dir && (!options.layout.no_subdir || image_tail(h) == Some(folder.as_str()))
        });
        // A new folder gets a name that is another one also where case does not count.
        let like = |(_, h): &(PathBuf, History)| h.tail.to_lowercase() == folder.to_lowercase();
        if is_taken || new && taken.iter().flatten().any(like) {
            continue;
        }
        let mut history = match &there {
            Some(tails) if !tails.contains(&folder) => {
                History { dir: dir.clone(), ..History::default() }
            }
            _ => histories.take(&dir, only)?,
        };
        history.tail = folder;
        if rule(inputs, disk, &history) {
            return Ok(Some((dir, history)));
        }
        histories.put_back(history, options.layout.no_subdir);
    }
    Ok(None)
}

/// What was read for one rule and was not what it looked for: the next ones need not read it again.
#[derive(Default)]
struct HistoryCache(HashMap<(PathBuf, Option<String>), History>);

impl HistoryCache {
    /// As [`History::read`].
    fn take(&mut self, dir: &Path, only: Option<&str>) -> Result<History> {
        match self.0.remove(&(dir.to_path_buf(), only.map(str::to_string))) {
            Some(history) => Ok(history),
            None => History::read(dir, only),
        }
    }

    fn put_back(&mut self, history: History, flat: bool) {
        let only = flat.then(|| history.tail.clone());
        self.0.insert((history.dir.clone(), only), history);
    }
}

fn image_tail(h: &History) -> Option<&str> {
    (!h.tail.is_empty()).then_some(h.tail.as_str())
}

/// The files of unfinished backups in these folders. Ours are gone when a run begins.
pub(crate) fn unfinished<'a>(dirs: impl Iterator<Item = &'a Path>) -> Vec<PathBuf> {
    let dirs: std::collections::BTreeSet<&Path> = dirs.collect();
    let of_dir = |dir: &Path| {
        let entries = folder::entries(dir).unwrap_or_default().into_iter();
        let partial = |n: &std::ffi::OsStr| n.to_str().is_some_and(|n| n.ends_with(".partial"));
        let names = entries.map(|e| e.name).filter(|n| partial(n));
        names.map(|n| dir.join(n)).collect::<Vec<_>>()
    };
    let mut found: Vec<PathBuf> = dirs.into_iter().flat_map(of_dir).collect();
    found.sort();
    found
}

/// The bitmaps that the tip of the folder's chain needs.
pub(crate) fn needed(history: &History) -> Vec<&str> {
    let tip = history.entries.iter().rev().find(|e| matches!(e.level, Level::Full | Level::Inc));
    let tip = tip.and_then(|e| e.manifest.as_ref());
    let bitmaps = tip.map(|m| [m.bitmap.as_ref(), m.diff_bitmap.as_ref()]);
    bitmaps.into_iter().flatten().flatten().map(|b| b.name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_rule_has_read_the_next_does_not_read_again() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("FULL-1-d"), "x").unwrap();
        std::fs::write(dir.path().join("FULL-2-e"), "x").unwrap();
        for only in [None, Some("d")] {
            let mut histories = HistoryCache::default();
            let mut first = histories.take(dir.path(), only).unwrap();
            first.tail = "d".into();
            let found = first.entries.len();
            histories.put_back(first, only.is_some());
            // A disk of another name has its own.
            assert_eq!(histories.take(dir.path(), Some("e")).unwrap().entries.len(), 1);
            std::fs::write(dir.path().join("INC-3-d"), "x").unwrap();
            assert_eq!(histories.take(dir.path(), only).unwrap().entries.len(), found);
            assert_eq!(histories.take(dir.path(), only).unwrap().entries.len(), found + 1);
            std::fs::remove_file(dir.path().join("INC-3-d")).unwrap();
        }
    }
}
