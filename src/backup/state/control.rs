//! The control socket of a running backup: QMP is busy then, so status and cancel have their own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::lock::{SOCKET, is_vm_key, state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::folder::{EntryKind, Folder};
use crate::journal::paths;
use crate::qmp::Address;
use crate::qmp::socket::Socket;
use crate::qmp::wire::{Limits, Wire};

/// What a running backup tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The run's id.
    pub run: String,
    /// Its process.
    pub pid: u32,
    /// When it began, in seconds since the epoch.
    pub started: i64,
    /// The backup directory.
    #[serde(with = "paths")]
    pub target: PathBuf,
    /// What it is doing.
    pub phase: String,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
}

/// How far one disk is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DiskStatus {
    /// Its name.
    pub disk: String,
    /// The level.
    pub level: String,
    /// waiting, copying, publishing, done, failed.
    pub state: String,
    /// Bytes written to the image.
    #[serde(default)]
    pub copied: u64,
    /// Where the job is: bytes that are behind it, holes among them.
    pub done: u64,
    /// Bytes that it has to pass.
    pub total: u64,
}

/// What the run and the socket share.
pub(crate) type Shared = Arc<Mutex<Status>>;

/// The listening end; gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Control {
    folder: Folder,
    name: String,
    end: Arc<AtomicBool>,
}

impl Control {
    /// Listens. The VM's lock must be held: whatever socket is there is a dead one.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn open(
        state: &Path,
        vm: &Address,
        status: Shared,
        cancel: Arc<AtomicBool>,
    ) -> Result<Self> {
        let folder = state_folder(state)?;
        let name = file_name(vm);
        let failed = |e| Error::io(e, "cannot make the control socket").at_path(folder.join(&name));
        folder.remove_if_there(&name).map_err(failed)?;
        let listener = folder.listen(&name).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        std::thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((s, _)) => answer(s, &status, &cancel),
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        });
        Ok(Control { folder, name, end })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        let _ = self.folder.remove_if_there(&self.name);
    }
}

fn file_name(vm: &Address) -> String {
    format!("{}{SOCKET}", vm_key(vm))
}

fn socket_path(state: &Path, vm: &Address) -> PathBuf {
    state.join(file_name(vm))
}

/// How long one client may hold up the others, and how long a run may take to answer.
const WAIT: Duration = Duration::from_secs(2);
const ANSWER: Duration = Duration::from_secs(5);

/// A word of a client: `status` or `cancel`.
const WORD: Limits = Limits { line: 1024, memory: 1024, flood: 1024 };

fn answer(stream: UnixStream, status: &Shared, cancel: &AtomicBool) {
    let deadline = Instant::now() + WAIT;
    let Ok(socket) = Socket::accepted(stream, "a client") else { return };
    let mut wire = Wire::over(socket, WORD);
    let Ok(Some(line)) = wire.line(deadline) else { return };
    if line.trim_ascii() == b"cancel" {
        cancel.store(true, Ordering::SeqCst);
    }
    let now = status.lock().unwrap_or_else(|e| e.into_inner()).clone();
    if let Ok(text) = crate::text::json(&now) {
        let _ = wire.send(
            format!(
                "{text}
"
            )
            .as_bytes(),
            None,
            deadline,
        );
    }
}

/// Asks a running backup; `None` if none runs.
///
/// # Errors
/// It does not answer, or not with its status; or as [`state_folder`].
pub(crate) fn ask(state: &Path, vm: &Address, word: &str) -> Result<Option<Status>> {
    if state_folder_if_there(state)?.is_none() {
        return Ok(None);
    }
    ask_at(socket_path(state, vm), word)
}

/// Asks whoever listens at `socket`; `None` if nobody does.
fn ask_at(socket: PathBuf, word: &str) -> Result<Option<Status>> {
    let address = Address::Unix(socket);
    let Ok(mut wire) = Wire::connect(&address, ANSWER, Limits::CONTROL) else { return Ok(None) };
    let deadline = Instant::now() + ANSWER;
    let silent =
        |e: Error| Error::new(e.kind(), "the running backup does not answer").with_source(e);
    wire.send(format!("{word}\n").as_bytes(), None, deadline).map_err(silent)?;
    let Some(answer) = wire.json(deadline)? else {
        let e = Error::new(Kind::Timeout, "the running backup does not answer");
        return Err(e.at_path(wire.peer()));
    };
    serde_json::from_value(answer).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "invalid reply from the running backup").with_source(e)
    })
}

/// How many are asked at a time.
const AT_ONCE: usize = 32;

/// All backups that run, by the sockets in the state folder; those that do not answer in time are left out.
///
/// # Errors
/// The folder cannot be read; as [`state_folder`].
pub(crate) fn running(state: &Path) -> Result<Vec<Status>> {
    let Some(folder) = state_folder_if_there(state)? else { return Ok(Vec::new()) };
    let failed = |e| Error::io(e, "cannot list the running backups").at_path(folder.path());
    let is_one = |name: &str| name.strip_suffix(SOCKET).is_some_and(is_vm_key);
    let entries = folder.entries().map_err(failed)?.into_iter();
    let sockets: Vec<PathBuf> = entries
        .filter(|e| e.kind == EntryKind::Other && e.name.to_str().is_some_and(is_one))
        .map(|e| folder.join(e.name))
        .collect();
    let one = |path: &PathBuf| {
        let asked = ask_at(path.clone(), "status").inspect_err(|e| log::info!("{}", e.report()));
        asked.ok().flatten()
    };
    let mut found = Vec::new();
    for some in sockets.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|path| scope.spawn(move || one(path))).collect();
            // One that panics has no answer.
            found.extend(asked.into_iter().filter_map(|thread| thread.join().ok().flatten()));
        });
    }
    found.sort_by(|a, b| (a.started, &a.run).cmp(&(b.started, &b.run)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_cancel_reach_the_run() {
        let d = tempfile::tempdir().unwrap();
        let vm = Address::Unix("/run/a".into());
        assert_eq!(ask(d.path(), &vm, "status").unwrap(), None);
        let status = Shared::default();
        status.lock().unwrap().run = "r1".into();
        let cancel = Arc::new(AtomicBool::new(false));
        let c = Control::open(d.path(), &vm, status, cancel.clone()).unwrap();
        assert_eq!(ask(d.path(), &vm, "status").unwrap().unwrap().run, "r1");
        assert!(!cancel.load(Ordering::SeqCst));
        ask(d.path(), &vm, "cancel").unwrap();
        assert!(cancel.load(Ordering::SeqCst));
        // All that run; a dead socket and QEMU's own are none.
        let other = Shared::default();
        *other.lock().unwrap() = Status { run: "r0".into(), started: -1, ..Status::default() };
        let _other = Control::open(d.path(), &Address::Unix("/run/b".into()), other, cancel);
        for socket in ["vm-0123456789abcdef.sock", "vm-0123456789abcdef-nbd.sock"] {
            std::os::unix::net::UnixListener::bind(d.path().join(socket)).unwrap();
        }
        let all: Vec<String> = running(d.path()).unwrap().into_iter().map(|s| s.run).collect();
        assert_eq!(all, ["r0", "r1"]);
        assert_eq!(running(&d.path().join("none")).unwrap(), []);
        drop(c);
        assert_eq!(ask(d.path(), &vm, "status").unwrap(), None);
    }

    /// A client that never comes to the end of its word, and one that does not read.
    #[test]
    fn clients_hold_up_the_next_for_a_bounded_time() {
        use std::io::Write;
        let status = Shared::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        answer(ours, &status, &AtomicBool::new(false));
        sender.join().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        status.lock().unwrap().phase = "x".repeat(16 << 20);
        theirs.write_all(b"status\n").unwrap();
        answer(ours, &status, &AtomicBool::new(false));
    }
}
