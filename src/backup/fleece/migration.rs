//! Keeping a backup and a migration apart.
//!
//! A migration hands the disks over to another QEMU while our frozen view still reads them here, and
//! saves the bitmaps into images that the other side writes already. So while a run is on, QEMU itself
//! is made to refuse one: by a tiny read-only node of a format that cannot migrate, whose image is in
//! memory. Where that cannot be had (`--only-migratable`, none of the formats built in, no way to pass
//! a descriptor), and for the `cpr` modes, which such a node does not stop, the run asks again and again,
//! and fails if a migration has begun.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use serde_json::{Value, json};

use super::{TargetFile, pass_file};
use crate::backup::Watch;
use crate::backup::names::{Role, object};
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget::short;

/// States of a guest whose disks are this QEMU's, and stay so while nobody does anything.
const SAFE: &[&str] = &[
    "running",
    "paused",
    "prelaunch",
    "suspended",
    "shutdown",
    "debug",
    "watchdog",
    "io-error",
    "internal-error",
    "guest-panicked",
];

/// The longest that a refused snapshot job is waited for.
const PASSING: Duration = Duration::from_secs(10);

/// States of a migration that is over, or never was.
const OVER: &[&str] = &["none", "completed", "cancelled", "failed"];

/// Fails unless the disks are this QEMU's and no migration runs.
///
/// # Errors
/// `Busy` with the reason; as [`Client::execute`].
pub(crate) fn check(client: &mut Client) -> Result<()> {
    let Some((state, progress)) = facts(client)? else { return Ok(()) };
    check_state(&state)?;
    progress.check()
}

/// Whose the disks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This QEMU's.
    Here,
    /// Being handed over: another QEMU may write to them already, or never get them.
    Leaving,
    /// Another QEMU's: the guest has left.
    Left,
}

/// Whose the disks are: unless they are this QEMU's, nothing may be written to them from here, not even
/// a bitmap removed.
///
/// # Errors
/// As [`Client::execute`].
pub(crate) fn owner(client: &mut Client) -> Result<Owner> {
    let facts = facts(client)?;
    Ok(facts.map_or(Owner::Here, |(state, progress)| owner_in(&state, &progress)))
}

fn owner_in(state: &str, progress: &Progress) -> Owner {
    match (state, progress.status.as_str()) {
        // It stands still here, until somebody lets it go on. (Seen with 7.2 and postcopy.)
        ("postmigrate", "failed" | "cancelled") => Owner::Leaving,
        ("postmigrate", _) => Owner::Left,
        ("finish-migrate" | "colo", _) => Owner::Leaving,
        _ if progress.is_handover() => Owner::Leaving,
        _ => Owner::Here,
    }
}

/// Whether the disks are, or are becoming, another QEMU's, see [`owner`].
///
/// # Errors
/// As [`owner`].
pub(crate) fn has_left(client: &mut Client) -> Result<bool> {
    Ok(owner(client)? != Owner::Here)
}

/// What to do with a QEMU that has something of ours in memory while another has the disks. (Ended in
/// order it writes the tables of its qcow2 images: seen where they are shared and not locked.)
pub(crate) const KILL: &str = "when the guest runs elsewhere, end this QEMU with SIGKILL, not \
                               with quit: it must not write its caches to the disks any more";

/// The error where something of ours cannot be undone yet.
pub(crate) fn leaving() -> Error {
    Error::new(
        Kind::Busy,
        "the guest is being migrated: nothing is cleaned up in this QEMU for \
                            now",
    )
    .remedy(format!(
        "if the migration fails, run fleecefs recover when the guest runs again; else {KILL}"
    ))
}

/// Fails if the guest has not arrived yet: nothing may be written to its disks from here.
///
/// # Errors
/// `Busy`; as [`Client::execute`].
pub(crate) fn check_arrived(client: &mut Client) -> Result<()> {
    match run_state(client)? {
        Some(state) if state == "inmigrate" => check_state(&state),
        _ => Ok(()),
    }
}

/// `None` where there is no guest.
fn run_state(client: &mut Client) -> Result<Option<String>> {
    if !client.has_guest() {
        return Ok(None);
    }
    let status: Value = client.poll("query-status")?;
    Ok(Some(state_in(&status)))
}

fn state_in(status: &Value) -> String {
    status.get("status").and_then(Value::as_str).unwrap_or("unknown").to_string()
}

/// The guest's state, and that of a migration at the same time; `None` where there is no guest.
fn facts(client: &mut Client) -> Result<Option<(String, Progress)>> {
    if !client.has_guest() {
        return Ok(None);
    }
    let status = client.ask_again("query-status")?;
    let migrate = match client.has("query-migrate") {
        true => Some(client.ask_again("query-migrate")?),
        false => None,
    };
    let state = state_in(&client.result(status)?);
    let progress = migrate.map(|m| client.result(m)).transpose()?;
    Ok(Some((state, Progress::of(&progress.unwrap_or_default()))))
}

/// As [`facts`], but waits while a job saves or loads a snapshot: QEMU refuses that as long as a run
/// has its bitmaps, but stops the guest first and lets it go on after. What did load one has a job that
/// is seen.
fn lasting_facts(client: &mut Client) -> Result<Option<(String, Progress)>> {
    let deadline = Instant::now() + PASSING;
    loop {
        let facts = facts(client)?;
        let passes = |(state, _): &(String, _)| ["save-vm", "restore-vm"].contains(&state.as_str());
        if !facts.as_ref().is_some_and(passes) || Instant::now() >= deadline {
            return Ok(facts);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn check_state(state: &str) -> Result<()> {
    let busy = |what: &str, remedy: &str| {
        Err(Error::new(Kind::Busy, what.to_string()).remedy(remedy.to_string()))
    };
    match state {
        s if SAFE.contains(&s) => Ok(()),
        "inmigrate" => busy(
            "this QEMU waits for an incoming migration: its disks are still in use by another QEMU",
            "back up there, or here when the migration is complete",
        ),
        "postmigrate" => busy(
            "the guest has migrated to another QEMU, which has the disks now",
            "back it up there",
        ),
        "finish-migrate" | "colo" => migrates(state),
        other => busy(
            &format!(
                "the guest is in state {:?}: another QEMU may take over its disks",
                short(other)
            ),
            "back it up when it runs or is paused",
        ),
    }
}

fn migrates(state: &str) -> Result<()> {
    let what = format!("the guest is being migrated ({}): no backup is possible", short(state));
    Err(Error::new(Kind::Busy, what)
        .remedy("back up when the migration has ended, where the guest runs then"))
}

/// What `query-migrate` says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Progress {
    status: String,
    /// Tells one migration that has ended from another: its duration in milliseconds.
    total_time: Option<u64>,
}

impl Progress {
    fn of(answer: &Value) -> Self {
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none");
        Progress {
            status: status.to_string(),
            total_time: answer.get("total-time").and_then(Value::as_u64),
        }
    }

    /// Whether the disks may be the other side's already.
    fn is_handover(&self) -> bool {
        let status = self.status.as_str();
        ["device", "pre-switchover", "colo"].contains(&status) || status.starts_with("postcopy")
    }

    fn check(&self) -> Result<()> {
        if OVER.contains(&self.status.as_str()) { Ok(()) } else { migrates(&self.status) }
    }
}

/// Watches that no migration begins while a run is on.
#[derive(Debug)]
pub(crate) struct MigrationGuard {
    before: Progress,
    /// Events that had come by then.
    events: u64,
    /// We asked for events.
    has_events: bool,
}

impl MigrationGuard {
    /// Makes QEMU refuse migrations from now on, as far as it can be made to. The node is removed with
    /// the last of the run's objects, see [`super::teardown`].
    ///
    /// # Errors
    /// `Busy` if a migration runs; as [`Client::execute`].
    pub(crate) fn begin(client: &mut Client, run: &str, watch: &dyn Watch) -> Result<Self> {
        let before = match facts(client)? {
            Some((state, progress)) => {
                check_state(&state).and_then(|()| progress.check())?;
                progress
            }
            None => Progress::of(&Value::Null),
        };
        let mut guard =
            MigrationGuard { before, events: client.migration_events(), has_events: false };
        if !client.has("migrate") {
            return Ok(guard);
        }
        let refused = block(client, run)?;
        // One may have begun just before: then the node was refused, or came too late.
        guard.check(client)?;
        if let Some(why) = refused {
            guard.has_events = ask_for_events(client)?;
            watch.warn(&format!(
                "QEMU cannot be kept from migrating the guest during the backup ({why}): a migration \
                 that begins makes the backup fail"
            ));
        }
        Ok(guard)
    }

    /// Fails if a migration runs, or has run since [`MigrationGuard::begin`]; gives the guest's state.
    ///
    /// # Errors
    /// `Busy`; as [`Client::execute`].
    pub(crate) fn check(&self, client: &mut Client) -> Result<Option<String>> {
        let Some((state, now)) = lasting_facts(client)? else { return Ok(None) };
        let safe = check_state(&state).and_then(|()| now.check());
        safe.map_err(|e| match owner_in(&state, &now) {
            Owner::Here => e,
            _ => Error::new(e.kind(), e.to_string()).remedy(KILL),
        })?;
        if now == self.before && self.events == client.migration_events() {
            return Ok(Some(state));
        }
        // One that failed may have stopped the guest and given its disks away for a time.
        let what =
            format!("the guest was migrated meanwhile (its migration is {})", short(&now.status));
        Err(Error::new(Kind::Busy, what).remedy("back it up again where it runs now"))
    }

    /// Makes QEMU as silent about migrations as it was before.
    pub(crate) fn end(self, client: &mut Client) {
        if self.has_events
            && let Err(e) = set_events(client, false)
        {
            log::info!("{}", e.report());
        }
    }
}

/// Has QEMU tell of migrations where it does not yet: two that failed look alike afterwards. Says
/// whether it did. (A killed run leaves it so: that costs some events, and does nothing to the guest.)
fn ask_for_events(client: &mut Client) -> Result<bool> {
    if !client.has("query-migrate-capabilities") {
        return Ok(false);
    }
    let list = client.execute("query-migrate-capabilities", json!({}))?;
    let off = |c: &Value| c["capability"] == "events" && c["state"] == false;
    match list.as_array().is_some_and(|l| l.iter().any(off)) {
        true => set_events(client, true),
        false => Ok(false),
    }
}

/// Says whether QEMU did it.
fn set_events(client: &mut Client, on: bool) -> Result<bool> {
    let events = json!({"capability": "events", "state": on});
    Ok(client.call("migrate-set-capabilities", json!({"capabilities": [events]}))?.is_ok())
}

/// Adds a node that keeps the guest from being migrated; why not, if none could be added.
fn block(client: &mut Client, run: &str) -> Result<Option<String>> {
    if !client.takes_descriptors() {
        return Ok(Some("it accepts no file descriptors on this connection".into()));
    }
    let node = object(run, Role::Blocker, 0);
    let mut why = None;
    for (driver, image) in images() {
        let set = match hand_over(client, &node, &image) {
            Ok(set) => set,
            Err(e) if matches!(e.kind(), Kind::Timeout | Kind::Interrupted) => return Err(e),
            Err(e) => {
                // It lives, or all ends here.
                client.execute("query-version", json!({}))?;
                return Ok(Some(e.report()));
            }
        };
        let added = client.call(
            "blockdev-add",
            json!({"driver": driver, "node-name": node, "read-only": true,
                "file": {"driver": "file", "filename": format!("/dev/fdset/{set}"),
                    "read-only": true, "locking": "off"}}),
        )?;
        match added {
            Ok(_) => return Ok(None),
            Err(r) => {
                client.call("remove-fd", json!({"fdset-id": set}))?.ok();
                why.get_or_insert(short(&r.desc));
            }
        }
    }
    Ok(why)
}

/// Gives QEMU the image as a set of descriptors.
fn hand_over(client: &mut Client, node: &str, image: &[u8]) -> Result<u64> {
    let file = in_memory(image)?;
    let handed = TargetFile { file: &file, name: Path::new("(memory)"), by_name: false };
    pass_file(client, handed, node, false)
}

fn in_memory(image: &[u8]) -> Result<File> {
    let made = memfd_create("fleecefs", MemfdFlags::CLOEXEC).map_err(std::io::Error::from);
    let made = made.map(File::from).and_then(|mut f| f.write_all(image).map(|()| f));
    made.map_err(|e| Error::io(e, "cannot make a file in memory"))
}

/// The smallest images of formats of which QEMU refuses migration. Not every build has each of them.
fn images() -> [(&'static str, Vec<u8>); 3] {
    [("vdi", vdi()), ("vpc", vpc()), ("qcow", qcow())]
}

/// Writes `bytes` at `at`; what does not fit is omitted.
fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = image.get_mut(at..at.saturating_add(bytes.len())) {
        to.copy_from_slice(bytes);
    }
}

/// VirtualBox's disk image 1.1, dynamic, of one empty block of 1 MiB. Little-endian.
fn vdi() -> Vec<u8> {
    let mut image = vec![0; 1024];
    put(&mut image, 0x40, &0xbeda_107f_u32.to_le_bytes());
    put(&mut image, 0x44, &0x0001_0001_u32.to_le_bytes());
    // Size of the header, and the kind: dynamic.
    put(&mut image, 0x48, &0x180_u32.to_le_bytes());
    put(&mut image, 0x4c, &1_u32.to_le_bytes());
    // Where the block map is, and the data.
    put(&mut image, 0x154, &512_u32.to_le_bytes());
    put(&mut image, 0x158, &1024_u32.to_le_bytes());
    put(&mut image, 0x168, &512_u32.to_le_bytes());
    put(&mut image, 0x170, &(1_u64 << 20).to_le_bytes());
    put(&mut image, 0x178, &(1_u32 << 20).to_le_bytes());
    put(&mut image, 0x180, &1_u32.to_le_bytes());
    // UUIDs of the image and its state; no parent. Then the map: the block is not allocated.
    put(&mut image, 0x188, &[0x66; 32]);
    put(&mut image, 512, &u32::MAX.to_le_bytes());
    image
}

/// Microsoft's VHD, fixed: 64 KiB of zeros and a footer. Big-endian.
fn vpc() -> Vec<u8> {
    const SIZE: u64 = 64 << 10;
    let mut footer = [0; 512];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 8, &2_u32.to_be_bytes());
    put(&mut footer, 12, &0x0001_0000_u32.to_be_bytes());
    put(&mut footer, 16, &u64::MAX.to_be_bytes());
    put(&mut footer, 28, b"qem2");
    put(&mut footer, 36, b"Wi2k");
    put(&mut footer, 40, &SIZE.to_be_bytes());
    put(&mut footer, 48, &SIZE.to_be_bytes());
    // 2 cylinders, 4 heads, 17 sectors: no more than there is.
    put(&mut footer, 56, &[0, 1, 4, 17]);
    put(&mut footer, 60, &2_u32.to_be_bytes());
    put(&mut footer, 68, &[0x66; 16]);
    let sum = footer.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
    put(&mut footer, 64, &(!sum).to_be_bytes());
    let mut image = vec![0; SIZE as usize];
    image.extend_from_slice(&footer);
    image
}

/// QEMU's first copy-on-write format, of one empty cluster. Big-endian.
fn qcow() -> Vec<u8> {
    let mut image = vec![0; 512];
    put(&mut image, 0, b"QFI\xfb");
    put(&mut image, 4, &1_u32.to_be_bytes());
    put(&mut image, 24, &(64_u64 << 10).to_be_bytes());
    // Bits of a cluster, and of a second-level table.
    put(&mut image, 32, &[12, 9]);
    put(&mut image, 40, &48_u64.to_be_bytes());
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_is_here_is_backed_up() {
        for state in ["running", "paused", "prelaunch", "io-error"] {
            assert!(check_state(state).is_ok(), "{state}");
        }
        for state in
            ["inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "new", ""]
        {
            assert_eq!(check_state(state).unwrap_err().kind(), Kind::Busy, "{state}");
        }
    }

    #[test]
    fn the_disks_are_handed_over_from_the_switch_on() {
        let owner = |state, status: &str| {
            owner_in(state, &Progress { status: status.into(), total_time: None })
        };
        assert_eq!(owner("running", "active"), Owner::Here);
        assert_eq!(owner("running", "completed"), Owner::Here);
        assert_eq!(owner("finish-migrate", "active"), Owner::Leaving);
        assert_eq!(owner("postmigrate", "completed"), Owner::Left);
        assert_eq!(owner("postmigrate", "failed"), Owner::Leaving);
        let at = |status: &str| owner("paused", status) == Owner::Leaving;
        for status in ["device", "postcopy-active", "postcopy-paused", "postcopy-recover"] {
            assert!(at(status), "{status}");
        }
        for status in ["none", "setup", "active", "completed", "failed", "cancelling"] {
            assert!(!at(status), "{status}");
        }
    }

    #[test]
    fn a_migration_is_over_or_it_is_not() {
        let at = |status: &str| Progress { status: status.into(), total_time: None }.check();
        assert!(at("none").is_ok() && at("failed").is_ok() && at("completed").is_ok());
        for status in
            ["setup", "active", "postcopy-paused", "pre-switchover", "device", "cancelling", "?"]
        {
            assert_eq!(at(status).unwrap_err().kind(), Kind::Busy, "{status}");
        }
    }

    /// QEMU's own tool takes each of them for what it is said to be.
    #[test]
    fn the_images_are_of_their_formats() {
        let dir = tempfile::tempdir().unwrap();
        for (format, bytes) in images() {
            let path = dir.path().join(format);
            std::fs::write(&path, bytes).unwrap();
            let out = std::process::Command::new("qemu-img")
                .args(["info", "-f", format, "--output=json"])
                .arg(&path)
                .output();
            let Ok(out) = out else {
                assert!(std::env::var_os("CI").is_none(), "qemu-img is missing");
                return eprintln!("skipped: the_images_are_of_their_formats: no qemu-img");
            };
            assert!(out.status.success(), "{format}: {}", String::from_utf8_lossy(&out.stderr));
            let info: Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!(info["format"], format);
            assert!(info["virtual-size"].as_u64().unwrap() > 0, "{format}");
        }
    }
}
