//! Finishing what a killed run left: in QEMU, in the guest, and on disk.
//!
//! The journal says what was begun; names with the run's id say it too, so that a lost journal
//! costs nothing but the knowledge whether it was us who stopped the guest. The same code undoes
//! a run that fails while its process lives.
//!
//! A target that is not there (not mounted, an NFS server that is down) does not keep the VM from
//! being backed up elsewhere: what is in it stays in the journal until it is there again.

mod context;
mod guest;
pub(crate) mod named;
pub(crate) mod wait;

pub use context::{RecoverCause, RecoverContext};

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::fleece::migration::Owner;
use super::fleece::teardown::{Scope, runs_in_qemu, teardown_all, unblock};
use super::fleece::{migration, nbdserver};
use super::graph::bitmap;
use super::publish::Hashing;
use super::state::journal::{DeferredDisk, DiskRecord, Pending};
use super::state::leftover::CreatedFile;
use super::state::lock::Lock;
use super::state::{journal, leftover};
use super::target::reachable::{answers, check_answers, real_folder};
use super::{Watch, names, publish};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, FileId, Folder};
use crate::lock::Locks;
use crate::manifest::{Manifest, fingerprint_of};
use crate::qmp::{Address, Client, peer};
use crate::text::path_text;
use crate::{folder, manifest};

/// After so many runs whose objects do not go in time the others are left for the next recovery: a
/// QEMU that names runs without end must not keep one for ever.
const MOST_LATE: u32 = 3;

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageOutcome {
    /// It is a point.
    Published,
    /// It was removed, or there was none; a file of somebody else's that has its name stays.
    Removed,
}

/// What a recovery found.
#[derive(Debug, Default)]
pub struct Recovered {
    /// How many runs were undone, and disks of earlier runs concluded.
    pub done: usize,
    /// How many disks of theirs, or of runs before, are left for later.
    pub left: usize,
}

/// Undoes all that earlier runs left at this VM.
///
/// # Errors
/// QEMU refuses, the guest may still be frozen, or something cannot be removed; what is left is
/// still in the journal. `Busy` if one of the runs lives.
pub fn recover(
    client: &mut Client,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<Recovered> {
    migration::check_arrived(client)?;
    let mut journal = journal::pending(place.state, place.vm)?.unwrap_or_default();
    forget_other_process(client, &mut journal, place, watch)?;
    let mut runs = runs_in_qemu(client)?;
    if !journal.run.is_empty() && !runs.contains(&journal.run) {
        runs.push(journal.run.clone());
    }
    let mut left = Vec::new();
    let (mut first, mut late) = (None, 0u32);
    // Where the disks are another QEMU's, bitmaps are left to that one.
    let here = journal.left.is_empty() || !migration::has_left(client)?;
    for run in &runs {
        client.check_interrupt()?;
        // It may have come by another of QEMU's sockets.
        let _mark = Lock::run(place.state, run)?;
        watch.say(&format!("cleaning up after an interrupted backup ({run})"));
        let pending = match journal.run == *run {
            true => journal.clone(),
            false => {
                // What QEMU says about files is not believed.
                watch.say(
                    "its journal is not here: the next backup to the same target cleans up its \
                     files",
                );
                Pending { run: run.clone(), ..Default::default() }
            }
        };
        match undo(client, &pending, place, watch) {
            Ok(l) => left.extend(l),
            Err(e) => {
                late = late.saturating_add(u32::from(e.kind() == Kind::Timeout));
                first.get_or_insert(e);
                if late >= MOST_LATE {
                    break;
                }
            }
        }
    }
    if let Some(e) = first {
        return Err(e);
    }
    // Last: the guest does not wait for targets.
    let mut settled = 0usize;
    for l in &journal.left {
        client.check_interrupt()?;
        match conclude(here.then_some(&mut *client), l, place, watch)? {
            true => settled = settled.saturating_add(1),
            false => left.push(l.clone()),
        }
    }
    journal::keep(place.state, place.vm, &left)?;
    Ok(Recovered { done: runs.len().saturating_add(settled), left: left.len() })
}

/// How long a QEMU that does not listen any more may take to end.
const ENDING: Duration = Duration::from_secs(10);

/// Nobody answers at the VM's socket, `why`. Fails unless QEMU is gone: where it still runs, so do
/// its jobs, and the guest may be stopped or frozen by us.
///
/// # Errors
/// `why`, where QEMU runs, or where that cannot be told and the guest may be held.
pub fn check_gone(pending: &Pending, vm: &Address, why: Error) -> Result<()> {
    let (what, remedy) = match &pending.qemu {
        Some(process) if peer::runs_on(process, ENDING) => {
            let pid = peer::pid(process).unwrap_or_default();
            let what = format!("no answer at {vm}, but QEMU (process {pid}) still runs");
            let remedy = "make that socket a QMP monitor of this QEMU again and run fleecefs \
                          recover; or resume the guest by hand and run it with --forget";
            (what, remedy)
        }
        None if pending.in_guest().is_some() => {
            let what = format!("no answer at {vm}, and it is not known whether QEMU runs");
            let remedy =
                "run fleecefs recover when QEMU answers there; if it has ended, with --forget";
            (what, remedy)
        }
        _ => return Ok(()),
    };
    let held = pending.in_guest().map(|held| format!(": {held}")).unwrap_or_default();
    Err(Error::new(Kind::Peer, format!("{what}{held}")).with_source(why).remedy(remedy))
}

/// As [`recover`], when QEMU is gone and has taken everything but files with it. `why` says that
/// nobody answers.
///
/// # Errors
/// As [`recover`] and [`check_gone`].
pub fn recover_offline(
    place: RecoverContext<'_>,
    watch: &dyn Watch,
    why: Error,
) -> Result<Recovered> {
    let Some(journal) = journal::pending(place.state, place.vm)? else {
        return Err(why);
    };
    match check_gone(&journal, place.vm, why) {
        Err(e) if place.cause == RecoverCause::Forget => watch.warn(&e.to_string()),
        other => {
            other?;
            watch.say("QEMU has ended: only files are left to clean up");
        }
    }
    let mut left = Vec::new();
    for l in &journal.left {
        if !conclude(None, l, place, watch)? {
            left.push(l.clone());
        }
    }
    let settled = journal.left.len().saturating_sub(left.len());
    left.extend(undo_offline(&journal, place, watch)?);
    journal::keep(place.state, place.vm, &left)?;
    let runs = usize::from(!journal.run.is_empty());
    Ok(Recovered { done: runs.saturating_add(settled), left: left.len() })
}

/// What a run did to the guest of another QEMU process is over: who is stopped or frozen now was
/// stopped or frozen by somebody else.
///
/// # Errors
/// That process runs on, and has the guest: another listens at its socket.
fn forget_other_process(
    client: &Client,
    pending: &mut Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    let (Some(then), Some(now)) = (&pending.qemu, client.process()) else { return Ok(()) };
    let held = pending.in_guest().is_some();
    if *then == now || !(held || pending.nbd) {
        return Ok(());
    }
    if held && place.cause != RecoverCause::Forget && peer::runs_on(then, ENDING) {
        let another = Error::new(Kind::Busy, "another QEMU answers there");
        return check_gone(pending, place.vm, another);
    }
    watch.say("QEMU was started again since: the guest is left as it is");
    pending.stopped = false;
    pending.frozen = false;
    pending.after = None;
    pending.nbd = false;
    Ok(())
}

/// Undoes one run: the guest first, then QEMU, then files and bitmaps. Gives the disks that are
/// left for later.
///
/// # Errors
/// As [`recover`]; all that could be undone is undone.
pub fn undo(
    client: &mut Client,
    pending: &Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<Vec<DeferredDisk>> {
    match migration::owner(client)? {
        Owner::Here => {}
        Owner::Left => {
            let what =
                "the guest has migrated to another QEMU: what this one still has goes with it";
            watch.warn(&format!("{what} ({})", migration::KILL));
            return undo_offline(pending, place, watch);
        }
        Owner::Leaving => {
            // Files are ours in any case. The journal stays: the guest may come back.
            undo_offline(pending, place, watch)?;
            return Err(migration::leaving());
        }
    }
    let freed = guest::release(client, pending, place, watch);
    // Open until all is concluded: what could not be written to an image is forgotten with the last
    // one that has it open.
    let open = |d: &DiskRecord| {
        let folder = real_folder(&d.dir).ok()??;
        publish::OpenImage::open(&folder, &d.image, d.image_id).ok()
    };
    let _images: Vec<_> = pending.disks.iter().filter_map(open).collect();
    let fleeces = pending.disks.iter().map(|d| &d.fleece);
    let fleeces = fleeces.filter(|f| f.parent().is_some_and(answers));
    let _fleeces: Vec<_> = fleeces.filter_map(|f| leftover::hold(f)).collect();
    let scope = Scope { run: &pending.run, index: None };
    let teardown = teardown_all(client, scope)?;
    let blocked = teardown.blocked;
    if pending.nbd {
        nbdserver::stop_left(client, place.state, place.vm)?;
    }
    let mut left = Vec::new();
    let disks = pending.disks.iter().filter(|d| !pending.settled.contains(&d.index));
    for d in disks.filter(|d| !teardown.stuck.contains(&d.index)) {
        client.check_interrupt()?;
        let finished = pending.closed.contains(&d.index) || teardown.finished.contains(&d.index);
        let l = DeferredDisk { disk: d.clone(), finished };
        if !conclude(Some(client), &l, place, watch)? {
            left.push(l);
        }
    }
    freed?;
    teardown.refused.map_or(Ok(()), Err)?;
    // Last: until here what is on the disks is not what another QEMU should get.
    unblock(client, &pending.run, blocked)?;
    Ok(left)
}

/// Undoes what concerns files, when QEMU is gone and has taken everything else with it.
///
/// # Errors
/// As [`recover`].
pub fn undo_offline(
    pending: &Pending,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<Vec<DeferredDisk>> {
    let mut left = Vec::new();
    for d in pending.disks.iter().filter(|d| !pending.settled.contains(&d.index)) {
        let l = DeferredDisk { disk: d.clone(), finished: pending.closed.contains(&d.index) };
        if !conclude(None, &l, place, watch)? {
            left.push(l);
        }
    }
    Ok(left)
}

/// Settles one disk under its target's lock. False: its target cannot be reached now.
fn conclude(
    mut client: Option<&mut Client>,
    l: &DeferredDisk,
    place: RecoverContext<'_>,
    watch: &dyn Watch,
) -> Result<bool> {
    let d = &l.disk;
    let may_wait = place.cause.may_wait(&d.dir);
    let done = reach(&d.dir, place.cause, may_wait)
        .and_then(|_lock| conclude_disk(client.as_deref_mut(), d, l.finished, watch));
    let Err(e) = done else { return Ok(true) };
    let of_qemu = matches!(e.kind(), Kind::Peer | Kind::Timeout | Kind::Interrupted);
    if of_qemu || !may_wait {
        return Err(e);
    }
    let name = d.dir.join(&d.image);
    if place.cause == RecoverCause::Forget {
        watch.warn(&format!("{}: given up: {}", path_text(&name), e.report()));
        drop_traces(client, d)?;
        return Ok(true);
    }
    watch.warn(&format!("{}: postponed: {}", path_text(&name), e.report()));
    Ok(false)
}

/// The lock of the target that a disk's folder is in; who ends his own run has it.
fn reach(dir: &Path, cause: RecoverCause<'_>, may_wait: bool) -> Result<Option<Locks>> {
    check_answers(dir)?;
    if cause == RecoverCause::OwnEnd {
        return Ok(None);
    }
    let real = match folder::resolve(dir) {
        Ok(real) => real,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !may_wait => return Ok(None),
        Err(e) => return Err(Error::io(e, "cannot reach the folder").at_path(dir)),
    };
    Locks::take(&real).map(Some)
}

/// Publishes or removes one disk's image; where it is removed, the bitmap that records since it
/// goes as well.
///
/// # Errors
/// As [`recover`].
pub fn conclude_disk(
    client: Option<&mut Client>,
    d: &DiskRecord,
    finished: bool,
    watch: &dyn Watch,
) -> Result<ImageOutcome> {
    let outcome = match real_folder(&d.dir)? {
        Some(folder) => conclude_image(&folder, &d.image, (finished, d.image_id), watch)?,
        None => ImageOutcome::Removed,
    };
    match outcome {
        ImageOutcome::Removed => drop_traces(client, d)?,
        ImageOutcome::Published => remove_fleece(d)?,
    }
    say(watch, d, outcome.clone());
    Ok(outcome)
}

/// What a disk has outside its target: its new bitmap and its fleece image.
fn drop_traces(client: Option<&mut Client>, d: &DiskRecord) -> Result<()> {
    if let (Some(client), Some(name)) = (client, &d.bitmap) {
        for name in names::with_companions(name) {
            bitmap::remove_everywhere(client, &name)?;
        }
    }
    remove_fleece(d)
}

fn say(watch: &dyn Watch, d: &DiskRecord, outcome: ImageOutcome) {
    let name = d.dir.join(&d.image);
    match outcome {
        ImageOutcome::Published => {
            watch.say(&format!("{} was complete: published", path_text(&name)))
        }
        ImageOutcome::Removed => {
            watch.say(&format!("{} was not complete: removed", path_text(&name)))
        }
    }
}

fn remove_fleece(d: &DiskRecord) -> Result<()> {
    leftover::remove_recorded(&CreatedFile { path: d.fleece.clone(), id: d.fleece_id })
}

/// Decides by what is on disk, and by whether the job is known to have `finished`. `made` is which
/// file the image is, if that is known.
///
/// # Errors
/// The folder cannot be read or written.
pub fn conclude_image(
    folder: &Folder,
    image: &str,
    (finished, made): (bool, Option<FileId>),
    watch: &dyn Watch,
) -> Result<ImageOutcome> {
    finish_rename(folder, image)?;
    if manifest::read_in(folder, image.as_ref())?.is_some() && folder.has(image) {
        publish::discard(folder, image)?;
        return Ok(ImageOutcome::Published);
    }
    let Some(m) = publish::announced(folder, image)? else {
        publish::discard(folder, image)?;
        return Ok(ImageOutcome::Removed);
    };
    if publish::came_whole(folder, image)? {
        return Ok(match named::conclude_whole(folder, image, watch)? {
            true => ImageOutcome::Published,
            false => ImageOutcome::Removed,
        });
    }
    // The announcement is completed after the image was closed, checked and synced.
    let checked = m.fingerprint.is_some();
    let done = if folder.has(publish::partial_name(image)) && (finished || checked) {
        publish::OpenImage::open(folder, image, made).and_then(|held| {
            publish::publish(folder, m, Hashing::Whole, &held, &|| watch.check_stop()).map(drop)
        })
    } else if folder.has(image) && checked {
        adopt(folder, m)
    } else {
        publish::discard(folder, image)?;
        return Ok(ImageOutcome::Removed);
    };
    match done {
        Ok(()) => Ok(ImageOutcome::Published),
        // What could not be looked at now may be complete all the same.
        Err(e) if is_no_verdict(e.kind()) => Err(e),
        Err(e) => {
            watch.warn(&format!("{} is invalid: {}", path_text(&image), e.report()));
            publish::discard(folder, image)?;
            Ok(ImageOutcome::Removed)
        }
    }
}

/// Where renaming is done by a second name (see [`Folder::rename_new`]) both may be there.
fn finish_rename(folder: &Folder, image: &str) -> Result<()> {
    let partial = publish::partial_name(image);
    if !(folder.has(&partial) && folder.has(image)) {
        return Ok(());
    }
    match folder.rename_new(&partial, folder, image) {
        // Another file has the final name: that is for later.
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io(e, "cannot rename the image").at_path(folder.join(image)))
        }
        _ => Ok(()),
    }
}

fn is_no_verdict(kind: Kind) -> bool {
    use Kind::{Busy, Changed, Interrupted, NoSpace, NotFound, Permission};
    matches!(kind, NoSpace | Permission | Busy | Interrupted | NotFound | Changed)
}

/// An image that was renamed, whose manifest was not yet written.
fn adopt(folder: &Folder, m: Manifest) -> Result<()> {
    let path = folder.join(&m.image);
    let print = folder.open_file(&m.image).and_then(|f| fingerprint_of(&f));
    let print = print.map_err(|e| Error::io(e, "cannot read the image").at_path(&path))?;
    if m.fingerprint.as_deref() != Some(print.as_str()) {
        let gone = folder.remove_if_there(&m.image);
        gone.map_err(|e| Error::io(e, "cannot remove the image").at_path(&path))?;
        return Err(Error::new(Kind::Unsound, "it changed after it was published").at_path(path));
    }
    publish::sync(folder)?;
    publish::commit_announced(folder, &m)
}

/// [`sweep`] of a target, or its folder of the month, and of each disk's folder in it.
///
/// # Errors
/// As [`conclude_image`].
pub fn sweep_all(base: &Path, watch: &dyn Watch) -> Result<()> {
    let failed = |e| Error::io(e, "cannot read the target").at_path(base);
    let base = Folder::open(base).map_err(failed)?;
    sweep(&base, watch)?;
    for e in base.entries().map_err(failed)? {
        if e.kind == EntryKind::Folder
            && e.name != manifest::FOLDER
            && let Ok(folder) = base.folder(&e.name)
        {
            sweep(&folder, watch)?;
        }
    }
    Ok(())
}

/// Settles what runs of other VMs or lost journals left in a target's folder. The target's lock
/// is held, so nobody is at work there.
///
/// # Errors
/// As [`conclude_image`].
pub fn sweep(folder: &Folder, watch: &dyn Watch) -> Result<()> {
    let failed = |e| Error::io(e, "cannot read the folder").at_path(folder.path());
    let side = folder::absent_is_none(folder.folder(manifest::FOLDER)).map_err(failed)?;
    let Some(side) = side else { return Ok(()) };
    let Ok(list) = side.entries() else { return Ok(()) };
    folder::sweep(folder, &[]).and_then(|_| folder::sweep(&side, &[])).map_err(failed)?;
    for e in list {
        if e.name.as_bytes().starts_with(manifest::TEMPORARY.as_bytes()) {
            side.remove_if_there(&e.name).map_err(failed)?;
        }
        let Some(image) = manifest::announced_by(&e.name).and_then(OsStr::to_str) else {
            continue;
        };
        let outcome = match conclude_image(folder, image, (false, None), watch) {
            Ok(f) => f,
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unsupported) => {
                // Of one disk, and perhaps of a newer version: it must not stop the others.
                let why = e.report();
                watch.warn(&format!("{} cannot be cleaned up and stays: {why}", path_text(&image)));
                continue;
            }
            Err(e) => return Err(e),
        };
        let done = match outcome {
            ImageOutcome::Published => "published",
            ImageOutcome::Removed if folder.has(image) => {
                "not complete; what has its name was not made by it, and stays"
            }
            ImageOutcome::Removed => "removed",
        };
        watch.say(&format!("{}: unfinished image: {done}", path_text(&folder.join(image))));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
