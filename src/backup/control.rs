//! The control socket of a running backup: QMP is busy then, so status and cancel have their own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lock::{state_folder, state_folder_if_there, vm_key};
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::qmp::Address;
use crate::qmp::wire::shorten;

/// What a running backup tells about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The run's id.
    pub run: String,
    /// Its process.
    pub pid: u32,
    /// When it began, in seconds since the epoch.
    pub started: i64,
    /// The backup directory.
    pub target: PathBuf,
    /// What it is doing.
    pub phase: String,
    /// Its disks.
    pub disks: Vec<DiskStatus>,
}

/// How far one disk is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStatus {
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
pub type Shared = Arc<Mutex<Status>>;

/// The listening end; gone when it is dropped.
#[derive(Debug)]
pub struct Control {
    folder: Folder,
    name: String,
    end: Arc<AtomicBool>,
}

impl Control {
    /// Listens. The VM's lock must be held: whatever socket is there is a dead one.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(
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
    format!("{}.sock", vm_key(vm))
}

fn socket_path(state: &Path, vm: &Address) -> PathBuf {
    state.join(file_name(vm))
}

fn answer(stream: UnixStream, status: &Shared, cancel: &AtomicBool) {
    // A client that says nothing must not hold up the next.
    let wait = Some(Duration::from_secs(2));
    let ready = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(wait));
    if ready.and_then(|()| stream.set_write_timeout(wait)).is_err() {
        return;
    }
    let mut line = String::new();
    let limited = std::io::Read::take(&stream, 1024);
    if BufReader::new(limited).read_line(&mut line).is_err() {
        return;
    }
    if line.trim() == "cancel" {
        cancel.store(true, Ordering::SeqCst);
    }
    let now = status.lock().unwrap_or_else(|e| e.into_inner()).clone();
    if let Ok(text) = serde_json::to_string(&now) {
        let _ = writeln!(&stream, "{text}");
    }
}

/// Asks a running backup; `None` if none runs.
///
/// # Errors
/// It does not answer; or as [`state_folder`].
pub fn ask(state: &Path, vm: &Address, word: &str) -> Result<Option<Status>> {
    if state_folder_if_there(state)?.is_none() {
        return Ok(None);
    }
    let path = socket_path(state, vm);
    let (short, _dir) = match shorten(&path) {
        Ok(s) => s,
        Err(e) if e.kind() == Kind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let Ok(mut stream) = UnixStream::connect(short) else { return Ok(None) };
    let failed = |e| Error::io(e, "the running backup does not answer").at_path(&path);
    stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(failed)?;
    writeln!(stream, "{word}").map_err(failed)?;
    let mut text = String::new();
    BufReader::new(&stream).read_line(&mut text).map_err(failed)?;
    serde_json::from_str(&text).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "the running backup answers nonsense").with_source(e)
    })
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
        drop(c);
        assert_eq!(ask(d.path(), &vm, "status").unwrap(), None);
    }
}
