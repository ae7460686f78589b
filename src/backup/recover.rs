//! Finishing what a killed run left: in QEMU, in the guest, and on disk.
//!
//! The journal says what was begun; names with the run's id say it too, so that a lost journal
//! costs nothing but the knowledge whether it was us who stopped the guest. The same code undoes
//! a run that fails while its process lives.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::guardian::continue_if_paused;
use super::journal::{self, DiskRecord, Pending};
use super::names::{self, Role};
use super::teardown::{Scope, Torn, runs_in_qemu, teardown};
use super::{Watch, bitmap, publish};
use crate::chain::manifest::{self, Manifest, fingerprint};
use crate::error::{Kind, Result};
use crate::qmp::agent::Agent;
use crate::qmp::types::Job;
use crate::qmp::{Address, Client};

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is a point.
    Published,
    /// It was removed, or there was none.
    Removed,
}

/// Undoes all that earlier runs left at this VM. Gives how many there were.
///
/// # Errors
/// QEMU refuses, or something cannot be removed; what is left is still in the journal.
pub fn recover(
    client: &mut Client,
    state: &Path,
    vm: &Address,
    watch: &dyn Watch,
) -> Result<usize> {
    let journal = journal::pending(state, vm)?;
    let mut runs = runs_in_qemu(client)?;
    if let Some(p) = &journal
        && !p.run.is_empty()
        && !runs.contains(&p.run)
    {
        runs.push(p.run.clone());
    }
    for run in &runs {
        let pending = match &journal {
            Some(p) if p.run == *run => p.clone(),
            _ => Pending { run: run.clone(), ..Default::default() },
        };
        watch.say(&format!("an earlier run ({run}) did not end in order: undoing it"));
        undo(client, &pending, watch)?;
    }
    journal::remove(state, vm)?;
    Ok(runs.len())
}

/// Undoes one run: the guest first, then QEMU, then files and bitmaps.
///
/// # Errors
/// As [`recover`].
pub fn undo(client: &mut Client, pending: &Pending, watch: &dyn Watch) -> Result<()> {
    release_guest(client, pending, watch)?;
    // Open until all is settled: what could not be written to an image is forgotten with the last
    // one that has it open.
    let partials = pending.disks.iter().map(|d| d.dir.join(publish::partial_name(&d.image)));
    let _open: Vec<_> = partials.filter_map(|p| publish::Held::open(&p).ok()).collect();
    let scope = Scope { run: &pending.run, index: None };
    let torn = teardown(client, scope)?;
    if pending.nbd {
        // Stopped already, if the run died between the two.
        let _ = client.call("nbd-server-stop", json!({}))?;
    }
    for d in known_disks(pending, &torn) {
        let finished = pending.closed.contains(&d.index) || torn.finished.contains(&d.index);
        settle_disk(client, &d, finished, watch)?;
    }
    for (_, _, path) in torn.files.iter().filter(|f| f.0 == Role::Fleece) {
        remove_fleece(path)?;
    }
    Ok(())
}

/// Undoes what concerns files, when QEMU is gone and has taken everything else with it.
///
/// # Errors
/// As [`recover`].
pub fn undo_offline(pending: &Pending, watch: &dyn Watch) -> Result<()> {
    for d in &pending.disks {
        if pending.settled.contains(&d.index) {
            continue;
        }
        say(watch, d, settle_image(&d.dir, &d.image, pending.closed.contains(&d.index), watch)?);
        remove_fleece(&d.fleece)?;
    }
    Ok(())
}

fn release_guest(client: &mut Client, pending: &Pending, watch: &dyn Watch) -> Result<()> {
    if pending.stopped && client.has_guest() && continue_if_paused(client)? {
        watch.say("the guest was still stopped: it runs again");
    }
    let (true, Some(agent)) = (pending.frozen, &pending.agent) else { return Ok(()) };
    let wait = Duration::from_secs(5);
    let thawed = Agent::connect(&Address::parse(agent)?, wait).and_then(|mut a| {
        let frozen = a.is_frozen(wait)?;
        if frozen { a.thaw(wait).map(|_| true) } else { Ok(false) }
    });
    match thawed {
        Ok(true) => watch.say("the guest was still frozen: thawed"),
        Ok(false) => {}
        Err(e) => watch.warn(&format!("cannot see whether the guest is frozen: {}", e.report())),
    }
    Ok(())
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
    client: &mut Client,
    d: &DiskRecord,
    finished: bool,
    watch: &dyn Watch,
) -> Result<Fate> {
    let fate = settle_image(&d.dir, &d.image, finished, watch)?;
    if fate == Fate::Removed
        && let Some(name) = &d.bitmap
    {
        bitmap::remove_everywhere(client, name)?;
    }
    remove_fleece(&d.fleece)?;
    say(watch, d, fate.clone());
    Ok(fate)
}

fn say(watch: &dyn Watch, d: &DiskRecord, fate: Fate) {
    let name = d.dir.join(&d.image);
    match fate {
        Fate::Published => watch.say(&format!("{} was complete: published", name.display())),
        Fate::Removed => watch.say(&format!("{} was not complete: removed", name.display())),
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
        Err(e) if matches!(e.kind(), Kind::NoSpace | Kind::Permission | Kind::Busy) => Err(e),
        Err(e) => {
            watch.warn(&format!("{image} is no good: {}", e.report()));
            publish::discard(dir, image)?;
            Ok(Fate::Removed)
        }
    }
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
        if name.starts_with(".tmp-") {
            publish::remove_if_there(&e.path())?;
        }
        let Some(image) = name.strip_suffix(".partial.json") else { continue };
        let fate = match settle_image(dir, image, false, watch) {
            Ok(f) => f,
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unsupported) => {
                // Of one disk, and perhaps of a newer version: it must not stop the others.
                watch.warn(&format!("{image} cannot be settled and stays: {}", e.report()));
                continue;
            }
            Err(e) => return Err(e),
        };
        let done = if fate == Fate::Published { "published" } else { "removed" };
        watch.say(&format!("{}: an unfinished image, {done}", dir.join(image).display()));
    }
    Ok(())
}

/// What qmpbackup leaves behind when it is killed: recognised by its names.
///
/// # Errors
/// QEMU refuses.
pub fn remove_foreign(client: &mut Client, watch: &dyn Watch) -> Result<usize> {
    let mut count = 0;
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    for j in jobs.iter().filter(|j| is_foreign(&j.id)) {
        client.call("job-cancel", json!({"id": j.id}))?.ok();
        count += 1;
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while client.poll::<Vec<Job>>("query-jobs")?.iter().any(|j| is_foreign(&j.id) && !j.concluded())
        && std::time::Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    for j in client.query::<Vec<Job>>("query-jobs", json!({}))? {
        if is_foreign(&j.id) {
            client.call("job-dismiss", json!({"id": j.id}))?.ok();
        }
    }
    count += remove_foreign_nodes(client, watch)?;
    Ok(count)
}

fn is_foreign(id: &str) -> bool {
    id.starts_with("qmpbackup")
}

/// Its nodes end in `-snap`, `-cbw`, `-fleece` or `-target` and hang on each other as ours do.
fn remove_foreign_nodes(client: &mut Client, watch: &dyn Watch) -> Result<usize> {
    let mut removed = 0;
    // A node that others hang on is refused; each round frees the next layer.
    for driver in ["snapshot-access", "copy-before-write", "qcow2", "raw", "file"] {
        let answers = super::seen::Answers::ask(client)?;
        for n in answers.nodes.iter().filter(|n| n.drv == driver) {
            if names::parse_object(&n.node_name).is_some() || !foreign_node(&answers, n) {
                continue;
            }
            if driver == "copy-before-write"
                && let Some(below) = answers.graph.child(&n.node_name, "file")
            {
                let attached = answers
                    .drives
                    .iter()
                    .filter(|d| d.inserted.as_ref().is_some_and(|i| i.node_name == n.node_name));
                for qdev in attached.filter_map(|d| d.qdev.as_deref()) {
                    super::fleece::plug(client, qdev, below)?;
                }
            }
            let answer: std::result::Result<Value, _> =
                client.call("blockdev-del", json!({"node-name": n.node_name}))?;
            if answer.is_ok() {
                watch.say(&format!("removed node {} of qmpbackup", n.node_name));
                removed += 1;
            }
        }
    }
    Ok(removed)
}

fn foreign_node(answers: &super::seen::Answers, n: &crate::qmp::types::Node) -> bool {
    let by_name = n.node_name.starts_with("qmpbackup");
    let file = n.file.as_str();
    let by_file = file.contains(".fleece.") || file.ends_with(".partial");
    let filter = matches!(n.drv.as_str(), "copy-before-write" | "snapshot-access");
    let used = answers
        .drives
        .iter()
        .any(|d| d.inserted.as_ref().is_some_and(|i| i.node_name == n.node_name) && !filter);
    !used && (by_name || filter || by_file)
}
