//! Finishing what a killed run left: in QEMU, in the guest, and on disk.
//!
//! The journal says what was begun; names with the run's id say it too, so that a lost journal
//! costs nothing but the knowledge whether it was us who stopped the guest. The same code undoes
//! a run that fails while its process lives.
//!
//! A target that is not there (not mounted, an NFS server that is down) does not keep the VM from
//! being backed up elsewhere: what lies in it stays in the journal until it is there again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::guardian::continue_if_paused;
use super::journal::{self, DiskRecord, Left, Pending};
use super::lock::Lock;
use super::names::Role;
use super::teardown::{Scope, Torn, runs_in_qemu, teardown_all};
use super::{Watch, bitmap, names, nbdserver, publish};
use crate::chain::manifest::{self, Manifest, fingerprint};
use crate::error::{Error, Kind, Result};
use crate::lock::Locks;
use crate::qmp::agent::Agent;
use crate::qmp::{Address, Client};
use crate::text::path_text;

/// After so many runs whose objects do not go in time the others are left for the next recovery: a
/// QEMU that names runs without end must not keep one for ever.
const MOST_LATE: u32 = 3;

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is a point.
    Published,
    /// It was removed, or there was none.
    Removed,
}

/// Where a recovery works, and what it may do.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The state folder.
    pub state: &'a Path,
    /// The VM. Its lock is held.
    pub vm: &'a Address,
    /// On whose behalf.
    pub cause: Cause<'a>,
    /// The guest agent to thaw with, if the user says that it is not the one in the journal.
    pub agent: Option<&'a Address>,
}

/// On whose behalf something is undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause<'a> {
    /// The run ends itself, and holds its target's lock.
    OwnEnd,
    /// A backup to this target is to begin: what lies there has to be settled first; what lies in
    /// a target that is not there now is left for later.
    Backup(&'a Path),
    /// The user asked for it.
    Command,
    /// The user asked for it, and gives up what cannot be reached.
    Forget,
}

impl Cause<'_> {
    /// Whether a folder that is not there can wait: its file system may not be mounted.
    fn may_wait(&self, dir: &Path) -> bool {
        let real = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
        match self {
            Cause::OwnEnd => false,
            Cause::Backup(t) => !dir.starts_with(t) && !real(dir).starts_with(real(t)),
            Cause::Command | Cause::Forget => true,
        }
    }
}

/// What a recovery found.
#[derive(Debug, Default)]
pub struct Recovered {
    /// How many runs were undone, and disks of runs before settled.
    pub done: usize,
    /// How many disks of theirs, or of runs before, are left for later.
    pub left: usize,
}

/// Undoes all that earlier runs left at this VM.
///
/// # Errors
/// QEMU refuses, the guest may still be frozen, or something cannot be removed; what is left is
/// still in the journal. `Busy` if one of the runs lives.
pub fn recover(client: &mut Client, place: Place<'_>, watch: &dyn Watch) -> Result<Recovered> {
    let mut journal = journal::pending(place.state, place.vm)?.unwrap_or_default();
    forget_other_process(client, &mut journal, watch);
    let mut runs = runs_in_qemu(client)?;
    if !journal.run.is_empty() && !runs.contains(&journal.run) {
        runs.push(journal.run.clone());
    }
    let mut left = Vec::new();
    let (mut first, mut late) = (None, 0u32);
    for l in &journal.left {
        client.check_interrupt()?;
        if !settle(Some(client), l, place, watch)? {
            left.push(l.clone());
        }
    }
    let settled = journal.left.len().saturating_sub(left.len());
    for run in &runs {
        client.check_interrupt()?;
        // It may have come by another of QEMU's sockets.
        let _mark = Lock::run(place.state, run)?;
        let pending = match journal.run == *run {
            true => journal.clone(),
            false => Pending { run: run.clone(), ..Default::default() },
        };
        watch.say(&format!("an earlier run ({run}) did not end in order: undoing it"));
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
    journal::keep(place.state, place.vm, &left)?;
    Ok(Recovered { done: runs.len().saturating_add(settled), left: left.len() })
}

/// As [`recover`], when QEMU is gone and has taken everything but files with it.
///
/// # Errors
/// As [`recover`].
pub fn recover_offline(place: Place<'_>, watch: &dyn Watch) -> Result<Recovered> {
    let Some(journal) = journal::pending(place.state, place.vm)? else {
        return Ok(Recovered::default());
    };
    let mut left = Vec::new();
    for l in &journal.left {
        if !settle(None, l, place, watch)? {
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
fn forget_other_process(client: &Client, pending: &mut Pending, watch: &dyn Watch) {
    let (Some(then), Some(now)) = (&pending.qemu, client.process()) else { return };
    if *then != now && (pending.stopped || pending.frozen || pending.nbd) {
        watch.say("QEMU was started again since: the guest is left as it is");
        pending.stopped = false;
        pending.frozen = false;
        pending.nbd = false;
    }
}

/// Undoes one run: the guest first, then QEMU, then files and bitmaps. Gives the disks that are
/// left for later.
///
/// # Errors
/// As [`recover`]; all that could be undone is undone.
pub fn undo(
    client: &mut Client,
    pending: &Pending,
    place: Place<'_>,
    watch: &dyn Watch,
) -> Result<Vec<Left>> {
    let freed = release_guest(client, pending, place, watch);
    // Open until all is settled: what could not be written to an image is forgotten with the last
    // one that has it open.
    let partials = pending.disks.iter().map(|d| d.dir.join(publish::partial_name(&d.image)));
    let _open: Vec<_> = partials.filter_map(|p| publish::Held::open(&p).ok()).collect();
    let scope = Scope { run: &pending.run, index: None };
    let torn = teardown_all(client, scope)?;
    if pending.nbd {
        nbdserver::stop_left(client, place.state, place.vm)?;
    }
    let mut left = Vec::new();
    for d in known_disks(pending, &torn).into_iter().filter(|d| !torn.stuck.contains(&d.index)) {
        client.check_interrupt()?;
        let finished = pending.closed.contains(&d.index) || torn.finished.contains(&d.index);
        let l = Left { disk: d, finished };
        if !settle(Some(client), &l, place, watch)? {
            left.push(l);
        }
    }
    for (_, index, path) in torn.files.iter().filter(|f| f.0 == Role::Fleece) {
        if !torn.stuck.contains(index) {
            remove_fleece(path)?;
        }
    }
    freed?;
    torn.refused.map_or(Ok(left), Err)
}

/// Undoes what concerns files, when QEMU is gone and has taken everything else with it.
///
/// # Errors
/// As [`recover`].
pub fn undo_offline(pending: &Pending, place: Place<'_>, watch: &dyn Watch) -> Result<Vec<Left>> {
    let mut left = Vec::new();
    for d in pending.disks.iter().filter(|d| !pending.settled.contains(&d.index)) {
        let l = Left { disk: d.clone(), finished: pending.closed.contains(&d.index) };
        if !settle(None, &l, place, watch)? {
            left.push(l);
        }
    }
    Ok(left)
}

/// Settles one disk under its target's lock. False: its target cannot be reached now.
fn settle(
    mut client: Option<&mut Client>,
    l: &Left,
    place: Place<'_>,
    watch: &dyn Watch,
) -> Result<bool> {
    let d = &l.disk;
    let may_wait = place.cause.may_wait(&d.dir);
    let done = reach(&d.dir, place.cause, may_wait)
        .and_then(|_lock| settle_disk(client.as_deref_mut(), d, l.finished, watch));
    let Err(e) = done else { return Ok(true) };
    let of_qemu = matches!(e.kind(), Kind::Peer | Kind::Timeout | Kind::Interrupted);
    if of_qemu || !may_wait {
        return Err(e);
    }
    let name = d.dir.join(&d.image);
    if place.cause == Cause::Forget {
        watch.warn(&format!("{}: given up: {}", path_text(&name), e.report()));
        drop_traces(client, d)?;
        return Ok(true);
    }
    watch.warn(&format!("{}: left for later: {}", path_text(&name), e.report()));
    Ok(false)
}

/// The lock of the target that a disk's folder is in; who ends his own run has it.
fn reach(dir: &Path, cause: Cause<'_>, may_wait: bool) -> Result<Option<Locks>> {
    if cause == Cause::OwnEnd {
        return Ok(None);
    }
    let real = match dir.canonicalize() {
        Ok(real) => real,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !may_wait => return Ok(None),
        Err(e) => return Err(Error::io(e, "cannot reach the folder").at_path(dir)),
    };
    Locks::take(&real).map(Some)
}

fn release_guest(
    client: &mut Client,
    pending: &Pending,
    place: Place<'_>,
    watch: &dyn Watch,
) -> Result<()> {
    if pending.stopped && client.has_guest() && continue_if_paused(client)? {
        watch.say("the guest was still stopped: it runs again");
    }
    if !pending.frozen {
        return Ok(());
    }
    let thawed = match (place.agent, &pending.agent) {
        (Some(given), _) => thaw(given),
        (None, Some(noted)) => Address::parse(noted).and_then(|a| thaw(&a)),
        (None, None) => return Ok(()),
    };
    match thawed {
        Ok(true) => watch.say("the guest was still frozen: thawed"),
        Ok(false) => {}
        Err(e) if place.cause == Cause::Forget => {
            watch.warn(&format!("the guest may still be frozen: {}", e.report()));
        }
        Err(e) => {
            let what = "the guest may still be frozen: its agent did not thaw it";
            let remedy = "see to the guest and its agent, then run fleecefs recover: with --agent \
                          if its socket is another now, with --forget if nothing will answer";
            return Err(Error::new(e.kind(), what).with_source(e).remedy(remedy));
        }
    }
    Ok(())
}

/// Thaws a guest; whether it was frozen.
fn thaw(agent: &Address) -> Result<bool> {
    let wait = Duration::from_secs(5);
    let mut agent = Agent::connect(agent, wait)?;
    let frozen = agent.is_frozen(wait)?;
    if frozen {
        agent.thaw(wait)?;
    }
    Ok(frozen)
}

/// The disks of the journal, and those that only QEMU knew of.
fn known_disks(pending: &Pending, torn: &Torn) -> Vec<DiskRecord> {
    let open = pending.disks.iter().filter(|d| !pending.settled.contains(&d.index));
    let mut disks: Vec<DiskRecord> = open.cloned().collect();
    for (_, index, file) in torn.files.iter().filter(|f| f.0 == Role::Target) {
        let image = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let (Some(image), Some(dir)) = (image.strip_suffix(".partial"), file.parent()) else {
            continue;
        };
        if pending.disks.iter().any(|d| d.index == *index) {
            continue;
        }
        disks.push(DiskRecord {
            index: *index,
            dir: dir.to_path_buf(),
            image: image.to_string(),
            fleece: PathBuf::new(),
            node: String::new(),
            top: String::new(),
            bitmap: announced_bitmap(dir, image),
        });
    }
    disks
}

fn announced_bitmap(dir: &Path, image: &str) -> Option<String> {
    publish::announced(dir, image).ok()??.bitmap.map(|b| b.name)
}

/// Publishes or removes one disk's image; where it is removed, the bitmap that records since it
/// goes as well.
///
/// # Errors
/// As [`recover`].
pub fn settle_disk(
    client: Option<&mut Client>,
    d: &DiskRecord,
    finished: bool,
    watch: &dyn Watch,
) -> Result<Fate> {
    let fate = settle_image(&d.dir, &d.image, finished, watch)?;
    match fate {
        Fate::Removed => drop_traces(client, d)?,
        Fate::Published => remove_fleece(&d.fleece)?,
    }
    say(watch, d, fate.clone());
    Ok(fate)
}

/// What a disk has outside its target: its new bitmap and its fleece image.
fn drop_traces(client: Option<&mut Client>, d: &DiskRecord) -> Result<()> {
    if let (Some(client), Some(name)) = (client, &d.bitmap) {
        bitmap::remove_everywhere(client, name)?;
        bitmap::remove_everywhere(client, &names::floor(name))?;
    }
    remove_fleece(&d.fleece)
}

fn say(watch: &dyn Watch, d: &DiskRecord, fate: Fate) {
    let name = d.dir.join(&d.image);
    match fate {
        Fate::Published => watch.say(&format!("{} was complete: published", path_text(&name))),
        Fate::Removed => watch.say(&format!("{} was not complete: removed", path_text(&name))),
    }
}

fn remove_fleece(path: &Path) -> Result<()> {
    // A descriptor set's name, or none: there is no file to remove.
    if !path.is_absolute() || path.starts_with("/dev") {
        return Ok(());
    }
    publish::remove_if_there(path)
}

/// Decides by what is on disk, and by whether the job is known to have `finished`.
///
/// # Errors
/// The folder cannot be read or written.
pub fn settle_image(dir: &Path, image: &str, finished: bool, watch: &dyn Watch) -> Result<Fate> {
    let path = dir.join(image);
    if manifest::read(dir, image.as_ref())?.is_some() && path.exists() {
        publish::discard(dir, image)?;
        return Ok(Fate::Published);
    }
    let Some(m) = publish::announced(dir, image)? else {
        publish::discard(dir, image)?;
        return Ok(Fate::Removed);
    };
    // The announcement is completed after the image was closed, checked and synced.
    let checked = m.fingerprint.is_some();
    let partial = dir.join(publish::partial_name(image));
    let done = if partial.exists() && (finished || checked) {
        publish::publish(dir, m, true).map(drop)
    } else if path.exists() && checked {
        adopt(dir, m, &path)
    } else {
        publish::discard(dir, image)?;
        return Ok(Fate::Removed);
    };
    match done {
        Ok(()) => Ok(Fate::Published),
        // What could not be looked at now may be complete all the same.
        Err(e) if is_no_verdict(e.kind()) => Err(e),
        Err(e) => {
            watch.warn(&format!("{} is no good: {}", path_text(&image), e.report()));
            publish::discard(dir, image)?;
            Ok(Fate::Removed)
        }
    }
}

fn is_no_verdict(kind: Kind) -> bool {
    use Kind::{Busy, Changed, Interrupted, NoSpace, NotFound, Permission};
    matches!(kind, NoSpace | Permission | Busy | Interrupted | NotFound | Changed)
}

/// An image that was renamed, whose manifest was not yet written.
fn adopt(dir: &Path, m: Manifest, path: &Path) -> Result<()> {
    let same = m.fingerprint.as_deref() == Some(fingerprint(path)?.as_str());
    if !same {
        publish::remove_if_there(path)?;
        return Err(crate::error::Error::new(Kind::Unsound, "it changed after it was published")
            .at_path(path));
    }
    publish::sync_dir(dir)?;
    publish::commit(dir, &m)
}

/// Settles what runs of other VMs or lost journals left in a target's folder. The target's lock
/// is held, so nobody is at work there.
///
/// # Errors
/// As [`settle_image`].
pub fn sweep(dir: &Path, watch: &dyn Watch) -> Result<()> {
    let folder = dir.join(manifest::FOLDER);
    let Ok(list) = std::fs::read_dir(&folder) else { return Ok(()) };
    for e in list.flatten() {
        let Ok(name) = e.file_name().into_string() else { continue };
        if name.starts_with(manifest::TEMPORARY) {
            publish::remove_if_there(&e.path())?;
        }
        let Some(image) = name.strip_suffix(".partial.json") else { continue };
        let fate = match settle_image(dir, image, false, watch) {
            Ok(f) => f,
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unsupported) => {
                // Of one disk, and perhaps of a newer version: it must not stop the others.
                watch.warn(&format!(
                    "{} cannot be settled and stays: {}",
                    path_text(&image),
                    e.report()
                ));
                continue;
            }
            Err(e) => return Err(e),
        };
        let done = if fate == Fate::Published { "published" } else { "removed" };
        watch.say(&format!("{}: an unfinished image, {done}", path_text(&dir.join(image))));
    }
    Ok(())
}
