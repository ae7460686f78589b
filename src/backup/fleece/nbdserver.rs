//! QEMU's NBD server, of which there is one per process: started by us and stopped again, or one
//! that runs already and whose address the user names.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::backup::names::{Role, object};
use crate::backup::state::lock::vm_key;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::Folder;
use crate::qmp::nbd::Nbd;
use crate::qmp::timeout::answer_timeout;
use crate::qmp::types::Export;
use crate::qmp::{Address, Client};

/// Longer than a name of an NBD export may be.
const TOO_LONG: usize = 4097;

/// Fails with `Busy` where exporting a node would endanger the guest.
///
/// # Errors
/// `Busy`.
pub(crate) fn check_safe(client: &Client, vm: &Value) -> Result<()> {
    // Seen with 7.2: QEMU dies of an assertion when a client of a node in an iothread leaves.
    let threads = vm.get("query-iothreads").and_then(Value::as_array);
    if client.version().number < (9, 1, 0) && threads.is_some_and(|t| !t.is_empty()) {
        return Err(Error::new(
            Kind::Busy,
            "QEMU before 9.1 with iothreads cannot safely be asked what is zero, so that a disk \
             that was shrunk and grown again would go unnoticed",
        ));
    }
    Ok(())
}

/// Whether [`Server::start`] would work: nothing is started. QEMU tells of its server only when
/// something is exported; this export, of `node`, it refuses in any case.
///
/// # Errors
/// `Busy`, as [`Server::start`].
pub(crate) fn check_free(client: &mut Client, path: &Path, node: &str) -> Result<()> {
    if folder::exists(path)
        && Nbd::greets(&Address::Unix(path.to_path_buf()), Duration::from_secs(2))
    {
        // A killed run of ours left it.
        return Ok(());
    }
    if client.has_guest() {
        let status = client.execute("query-status", json!({}))?;
        // During a migration it would take the disk over before it looks at the name.
        if !["running", "paused", "prelaunch"].iter().any(|s| status["status"] == *s) {
            return Ok(());
        }
    }
    let name = "x".repeat(TOO_LONG);
    let export = json!({"type": "nbd", "id": "fleecefs-asks", "node-name": node, "name": name});
    match client.call("block-export-add", export)? {
        Err(r) if r.desc.contains("too long") => Err(server_is_anothers()),
        _ => Ok(()),
    }
}

fn server_is_anothers() -> Error {
    Error::new(
        Kind::Busy,
        "QEMU's NBD server belongs to another program, so that a disk that was shrunk and grown \
         again would go unnoticed",
    )
    .remedy("name its address with --nbd")
}

/// What a node is exported for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExportUse {
    /// Its bytes.
    Read,
    /// Its block status.
    Status,
    /// Writes to it.
    Write,
}

/// A server to export from.
#[derive(Debug)]
pub(crate) struct Server {
    address: Address,
    ours: bool,
}

/// Where the socket of a server of ours is.
pub(crate) fn socket_path(state: &Path, vm: &Address) -> PathBuf {
    state.join(format!("{}-nbd.sock", vm_key(vm)))
}

impl Server {
    /// One that runs already.
    pub(crate) fn existing(address: Address) -> Self {
        Server { address, ours: false }
    }

    /// Starts one. QEMU gets a listening socket from us where it takes descriptors: it may not be
    /// allowed to make one where we look.
    ///
    /// # Errors
    /// `Busy` if another program has started one, else what QEMU says.
    pub(crate) fn start(client: &mut Client, path: &Path) -> Result<Self> {
        stop_at(client, path)?;
        let answer = if client.has("getfd") && client.takes_descriptors() {
            let listener = Folder::of(path)
                .and_then(|(folder, name)| folder.listen(name))
                .map_err(|e| Error::io(e, "cannot make a socket for NBD").at_path(path))?;
            let name = "fleecefs-nbd";
            client.call_with("getfd", json!({"fdname": name}), Some(listener.as_fd()))??;
            let addr = json!({"type": "fd", "data": {"str": name}});
            client.call("nbd-server-start", json!({"addr": addr}))?
        } else {
            let addr = json!({"type": "unix", "data": {"path": path}});
            client.call("nbd-server-start", json!({"addr": addr}))?
        };
        match answer {
            Ok(_) => Ok(Server { address: Address::Unix(path.to_path_buf()), ours: true }),
            Err(r) if r.desc.contains("already running") => Err(server_is_anothers()),
            Err(r) => Err(r.into()),
        }
    }

    /// Stops it if it is ours; says whether it was.
    ///
    /// # Errors
    /// QEMU refuses.
    pub(crate) fn stop(self, client: &mut Client) -> Result<bool> {
        if self.ours {
            client.execute("nbd-server-stop", json!({}))?;
            if let Address::Unix(p) = &self.address {
                remove_socket(p)?;
            }
        }
        Ok(self.ours)
    }

    /// Exports `node` for as long as `work` takes.
    ///
    /// # Errors
    /// QEMU refuses, or `work` fails.
    pub(crate) fn with_export<T>(
        &self,
        client: &mut Client,
        id: &str,
        node: &str,
        what_for: ExportUse,
        work: impl FnOnce(&mut Nbd) -> Result<T>,
    ) -> Result<T> {
        export(client, id, node, what_for == ExportUse::Write)?;
        // Block status of 1 GiB reads metadata only.
        let status = what_for == ExportUse::Status;
        let result = Nbd::connect(&self.address, node, status, answer_timeout())
            .and_then(|mut n| work(&mut n));
        unexport(client, id)?;
        result
    }
}

/// Whether the server exports what QEMU said that the disk is.
///
/// # Errors
/// `Peer`.
pub(crate) fn check_size(nbd: &Nbd, size: u64) -> Result<()> {
    match nbd.size() == size {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Peer,
            format!("the disk has {size} bytes, but its export {}", nbd.size()),
        )),
    }
}

/// Stops the server that a killed run of ours left, if it is that one that QEMU runs.
///
/// # Errors
/// QEMU is gone, or the socket cannot be removed.
pub(crate) fn stop_left(client: &mut Client, state: &Path, vm: &Address) -> Result<()> {
    stop_at(client, &socket_path(state, vm))
}

fn stop_at(client: &mut Client, path: &Path) -> Result<()> {
    let left = Address::Unix(path.to_path_buf());
    if folder::exists(path) && Nbd::greets(&left, Duration::from_secs(2)) {
        // Nobody else listens there; another program's server would listen elsewhere.
        client.call("nbd-server-stop", json!({}))?.ok();
    }
    remove_socket(path)
}

fn remove_socket(path: &Path) -> Result<()> {
    let gone = folder::remove_if_there(path).map(drop);
    gone.map_err(|e| Error::io(e, "cannot remove the socket").at_path(path))
}

fn export(client: &mut Client, id: &str, node: &str, writable: bool) -> Result<()> {
    client
        .execute(
            "block-export-add",
            json!({"type": "nbd", "id": id, "node-name": node,
            "writable": writable}),
        )
        .map(drop)
}

fn unexport(client: &mut Client, id: &str) -> Result<()> {
    client.execute("block-export-del", json!({"id": id, "mode": "hard"}))?;
    let deadline = Instant::now() + answer_timeout();
    loop {
        let left: Vec<Export> = client.poll("query-block-exports")?;
        if !left.iter().any(|e| e.id == id) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::new(Kind::Timeout, "an NBD export does not end"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// For `failpoint::hold`: exports the views, says so in `ready`, waits for `go`.
///
/// # Errors
/// QEMU refuses, or a signal ends the wait.
pub(crate) fn hold(
    client: &mut Client,
    server: &Server,
    run: &str,
    views: &[(usize, String)],
    dir: &Path,
) -> Result<()> {
    let mut list = Vec::new();
    for (index, name) in views {
        let node = object(run, Role::Snapshot, *index);
        export(client, &object(run, Role::ViewExport, *index), &node, false)?;
        list.push(json!({"disk": name, "export": node, "address": server.address.to_string()}));
    }
    let ready = dir.join("ready");
    folder::write_whole(&ready, json!(list).to_string().as_bytes())
        .map_err(|e| Error::io(e, "cannot write the file").at_path(&ready))?;
    while !folder::exists(&dir.join("go")) {
        client.check_interrupt()?;
        client.pause(Instant::now() + Duration::from_millis(50))?;
    }
    for (index, _) in views {
        unexport(client, &object(run, Role::ViewExport, *index))?;
    }
    Ok(())
}
