//! From the first start, or from whatever is there of one, to the end.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::copy::Copying;
use super::journal::{Begun, Journal, Stage};
use super::mark;
use super::nodes::{self, Base, Handed};
use super::start::{self, AGENT_SOCKET, BACKUP_SOCKET, socket};
use super::storage::Storage;
use super::surroundings::{Status, Surroundings};
use crate::boot::argument;
use crate::error::{Error, Kind, Result};
use crate::folder::Lock;
use crate::qmp::Client;

/// The points of disks, by the names of the disks' nodes.
pub(crate) type Bases = HashMap<String, Base>;

/// How long a QEMU may take to end.
const ENDING: Duration = Duration::from_secs(10);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// QEMU's word for a guest that has not run yet.
const PRELAUNCH: &str = "prelaunch";

/// A VM that runs, or is about to: see [`finish`].
pub(crate) struct Live {
    client: Client,
    journal: Journal,
    begun: Begun,
    /// From the call until the guest ran, if it was started now.
    pub started: Option<Duration>,
}

impl Live {
    /// What was begun.
    pub(crate) fn begun(&self) -> &Begun {
        &self.begun
    }

    /// The socket for backups.
    pub(crate) fn backup_socket(&self) -> PathBuf {
        socket(&self.begun.sockets, BACKUP_SOCKET)
    }

    /// The guest agent's socket.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        socket(&self.begun.sockets, AGENT_SOCKET)
    }
}

/// Starts the VM of `begun`, over the points `bases`.
///
/// # Errors
/// `Exists` if one of its files is there; `Busy`; what QEMU says; `Interrupted`. The guest has not run then, and the next
/// call begins anew; but for errors of the very last step.
pub(crate) fn start(s: &Surroundings<'_>, begun: Begun, bases: Bases) -> Result<Live> {
    let begin = Instant::now();
    if let Some((old, Stage::Prepared)) = s.storage.begun()? {
        discard(s, &old)?;
    }
    let lock = s.storage.vm_lock()?.ok_or_else(still_running)?;
    let mut journal = s.storage.begin(&begun)?;
    for disk in &begun.disks {
        s.storage.make(&begun, disk)?;
    }
    s.storage.copy_vars(&begun)?;
    let launched = launch(s, &begun, bases, lock);
    let mut client = launched.or_else(|e| s.storage.clear(&begun).and(Err(e)))?;
    let ready = add_bitmaps(s, &mut client, &begun).and_then(|()| {
        protect(s, &begun);
        journal.started()
    });
    if let Err(e) = ready {
        unprotect(s, &begun);
        // Its guest has never run. One that does not hear is ended by the next call.
        let _deaf = client.call("quit", json!({}));
        return Err(e);
    }
    client.execute("cont", json!({}))?;
    Ok(Live { client, journal, begun, started: Some(begin.elapsed()) })
}

/// Finds the VM of `begun` running, or starts it again.
///
/// # Errors
/// As [`start`]; `NotFound` if an image is gone. Nothing is lost then.
pub(crate) fn resume(s: &Surroundings<'_>, begun: Begun, bases: Bases) -> Result<Live> {
    let begin = Instant::now();
    let journal = s.storage.journal(&begun)?;
    let lock = s.storage.vm_lock()?;
    let is_new = lock.is_some();
    if !bases.is_empty() {
        protect(s, &begun);
    }
    let mut client = match lock {
        None => start::attach(&begun.sockets, s.storage, s.cancel)?,
        Some(lock) => launch(s, &begun, bases, lock)?,
    };
    let status: Status = client.query("query-status", json!({}))?;
    if status.status == PRELAUNCH {
        client.execute("cont", json!({}))?;
    }
    Ok(Live { client, journal, begun, started: is_new.then(|| begin.elapsed()) })
}

/// Whether the VM of the storage folder runs.
///
/// # Errors
/// What the operating system said.
pub(crate) fn is_running(storage: &Storage) -> Result<bool> {
    Ok(storage.vm_lock()?.is_none())
}

/// Copies until no disk needs the backup.
///
/// # Errors
/// `Interrupted`; `Peer` if QEMU ends. The VM, or what it wrote, is as it was, and [`resume`] goes on.
pub(crate) fn finish(s: &Surroundings<'_>, live: Live) -> Result<()> {
    let Live { client, mut journal, begun, .. } = live;
    let copied = Copying::new(s, client, &begun).run();
    copied.map_err(|e| match e.kind() {
        Kind::Interrupted => Error::new(Kind::Interrupted, "interrupted: the VM runs on")
            .remedy("the same command goes on; until then the VM needs the backup"),
        Kind::Peer if has_ended(s) => {
            Error::new(Kind::Peer, "QEMU has ended: the guest was shut off, or it was killed")
                .remedy("the same command starts the VM again, with all that its guest had flushed")
        }
        _ => e,
    })?;
    journal.done()?;
    unprotect(s, &begun);
    Ok(())
}

/// Marks the backup as needed. Where that cannot be, the VM is worth more.
fn protect(s: &Surroundings<'_>, begun: &Begun) {
    if let Err(e) = mark::write(begun, s.storage.path()) {
        let what = "if this command ends early, nothing keeps 'prune' and others from the backup";
        s.watch.warn(&format!("{what}: {}", e.report()));
    }
}

/// Takes the mark away.
pub(crate) fn unprotect(s: &Surroundings<'_>, begun: &Begun) {
    // The mark of a folder that this one is a copy of is not ours.
    if begun.storage == s.storage.path()
        && let Err(e) = mark::remove(begun)
    {
        s.watch.warn(&e.report());
    }
}

/// Ends what was made for a guest that never ran.
fn discard(s: &Surroundings<'_>, old: &Begun) -> Result<()> {
    if s.storage.vm_lock()?.is_none() {
        let mut client = start::attach(&old.sockets, s.storage, s.cancel)?;
        let status: Status = client.query("query-status", json!({}))?;
        if status.status != PRELAUNCH {
            let e = Error::new(Kind::Busy, "somebody else has started the guest in this folder");
            return Err(e.at_path(s.storage.path()).remedy("name another folder"));
        }
        client.execute("quit", json!({}))?;
        if !has_ended(s) {
            return Err(still_running());
        }
    }
    unprotect(s, old);
    s.storage.clear(old)
}

/// Waits for the end of a QEMU that has closed its socket, or is about to; whether it came.
fn has_ended(s: &Surroundings<'_>) -> bool {
    let deadline = Instant::now() + ENDING;
    loop {
        match s.storage.vm_lock() {
            Ok(Some(_)) => return true,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            _ => return false,
        }
    }
}

fn still_running() -> Error {
    Error::new(Kind::Busy, "a QEMU of this storage folder still runs").remedy("end it")
}

/// Starts QEMU over the images, and over the points of those that need them.
fn launch(s: &Surroundings<'_>, begun: &Begun, mut bases: Bases, lock: Lock) -> Result<Client> {
    let mut arguments: Vec<OsString> = begun.arguments.iter().map(OsString::from).collect();
    let mut handed = Handed::default();
    let mut add = |node: &Value| arguments.extend(["-blockdev".into(), argument(node).into()]);
    for disk in &begun.disks {
        let needs = s.storage.needs_backup(begun, disk)?;
        if needs {
            let base = bases.remove(&disk.node).ok_or_else(|| {
                Error::new(Kind::Incomplete, "the point of a disk is not known").at_path(&disk.file)
            })?;
            add(&handed.nodes(base, &disk.node)?);
        }
        add(&nodes::image(disk, &s.storage.image(disk), needs)?);
    }
    if let Some(path) = s.storage.vars(begun) {
        add(&nodes::vars(&path)?);
    }
    start::start(&arguments, handed, &begun.sockets, (lock, s.cancel))
}

/// So that all which the guest ever writes is recorded. Where QEMU refuses one the next backup is a FULL.
fn add_bitmaps(s: &Surroundings<'_>, client: &mut Client, begun: &Begun) -> Result<()> {
    for disk in &begun.disks {
        let Some(b) = &disk.bitmap else { continue };
        let options = json!({"node": disk.node, "name": b.name, "granularity": b.granularity,
            "persistent": true});
        if let Err(refused) = client.call("block-dirty-bitmap-add", options)? {
            let why = Error::from(refused).report();
            s.watch.warn(&format!("{}: the first backup will be a FULL: {why}", disk.point.disk));
        }
    }
    Ok(())
}
