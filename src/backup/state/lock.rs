//! One run per VM (and one per target, see [`crate::lock`]). Held by flock, so that a killed process
//! leaves none.
//!
//! A VM is known by its socket. Since QEMU may have several, its process is locked as well where it
//! can be told; and each run holds a mark under its id, so that a recovery which finds its objects in
//! QEMU knows that it lives.
//!
//! Locks, journals and sockets are in the state folder. What is in it decides what root removes, so it
//! belongs to root or the caller, and nobody else may write to it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::folder::{self, EntryKind, Folder};
use crate::qmp::socket::Socket;
use crate::qmp::{Address, Client};

/// What a user who has no state folder can do.
const NAME_ONE: &str = "journals and locks go there: name another with --state-dir";

/// The state folder, made if it is not there.
///
/// # Errors
/// `Permission` if somebody else may write to it, or what the operating system said.
pub(crate) fn state_folder(path: &Path) -> Result<Folder> {
    let failed = |e| Error::io(e, "cannot make the state folder").at_path(path);
    let real = real_path(path, "the state folder")?;
    let made = folder::make_folders(&real).map_err(failed).map_err(|e| match e.kind() {
        Kind::NotFound if !folder::is_folder(&real) && folder::exists(&real) => {
            Error::new(Kind::Exists, "this is a file").at_path(path).remedy("name a folder")
        }
        _ => e.remedy(NAME_ONE),
    })?;
    folder::check_private(&real)?;
    Ok(made)
}

/// As [`state_folder`], but `None` if it is not there.
///
/// # Errors
/// As [`state_folder`].
pub(crate) fn state_folder_if_there(path: &Path) -> Result<Option<Folder>> {
    let real = real_path(path, "the state folder")?;
    let failed = |e| Error::io(e, "cannot open the state folder").at_path(path);
    let Some(there) = folder::absent_is_none(Folder::open(&real)).map_err(failed)? else {
        return Ok(None);
    };
    folder::check_private(&real)?;
    Ok(Some(there))
}

/// Refuses a backup directory inside of the state folder: what is in there is the program's, and goes with it. Both are
/// without links.
///
/// # Errors
/// `Usage`.
pub(crate) fn refuse_inside(state: &Path, target: &Path) -> Result<()> {
    if !target.starts_with(state) {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, "the backup directory is inside of the state folder")
        .at_path(target)
        .remedy("name another one, or another state folder with --state-dir"))
}

/// The path of `what` without links, as far as it exists.
///
/// # Errors
/// What the operating system said; a refusal where somebody else's link leads astray.
pub(crate) fn real_path(path: &Path, what: &str) -> Result<PathBuf> {
    let failed = |e| Error::io(e, format!("cannot find {what}")).at_path(path);
    folder::resolve_to_make(path).map_err(failed)
}

/// A lock, held until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _lock: folder::Lock,
    /// Removed at the end.
    passing: Option<(Folder, OsString)>,
}

/// What is said of a lock that is held: who has it, and what the user can do.
type Taken = (&'static str, &'static str);
const BY_VM: Taken = ("a backup or recovery of this VM is running", BY_QMP);
const BY_SOCKET: Taken = ("a backup of this VM is running through another QMP socket", BY_QMP);
const BY_QMP: &str = "fleecefs info status shows it, fleecefs cancel ends it";
const BY_TARGET: Taken = (
    "a backup of a shut-off VM to this backup directory is running",
    "fleecefs info status --target DIR shows it, fleecefs cancel --target DIR ends it",
);

impl Lock {
    /// Takes the lock of the VM behind `address`.
    ///
    /// # Errors
    /// `Busy` if another run has it; as [`state_folder`].
    pub(crate) fn vm(state: &Path, address: &Address) -> Result<Self> {
        let folder = state_folder(state)?;
        let name = format!("{}.lock", vm_key(address));
        let lock = take_again(&folder, &name, BY_VM)?;
        sweep(&folder);
        Ok(Lock { _lock: lock, passing: None })
    }

    /// Takes the lock of the process that `client` talks to, if that can be told.
    ///
    /// # Errors
    /// `Busy` if a run that came by another socket of it is at work.
    pub(crate) fn qemu(state: &Path, client: &Client) -> Result<Option<Self>> {
        let Some(process) = client.process() else { return Ok(None) };
        let hash = blake3::hash(process.as_bytes()).to_hex();
        let name = format!("qemu-{}.lock", hash.as_str().get(..16).unwrap_or_default());
        Self::take_passing(state, name).map(Some)
    }

    /// Marks a run as alive, or makes sure that none of this id is.
    ///
    /// # Errors
    /// `Busy` if it lives.
    pub(crate) fn run(state: &Path, run: &str) -> Result<Self> {
        Self::take_passing(state, format!("run-{run}.lock"))
    }

    /// Takes the lock of a target's backups of shut-off VMs.
    ///
    /// # Errors
    /// `Busy` if one is at work.
    pub(crate) fn offline(state: &Path, name: &str) -> Result<Self> {
        let folder = state_folder(state)?;
        let lock = take(&folder, &format!("{name}.lock"), BY_TARGET)?;
        Ok(Lock { _lock: lock, passing: None })
    }

    /// A lock whose file goes with it.
    fn take_passing(state: &Path, name: String) -> Result<Self> {
        let folder = state_folder(state)?;
        let lock = take_again(&folder, &name, BY_SOCKET)?;
        Ok(Lock { _lock: lock, passing: Some((folder, name.into())) })
    }
}

/// What ends the name of a control socket; before it is that of the lock which is held while somebody listens.
pub(crate) const SOCKET: &str = ".sock";

/// How often a lock is tried again, and after how long.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_millis(30);

/// Removes the files of such locks, and the control sockets, that runs left which were killed. What cannot be
/// removed is tried again the next time.
fn sweep(folder: &Folder) {
    for entry in folder.entries().unwrap_or_default() {
        let Some(name) = entry.name.to_str() else { continue };
        // A run listens only while it has its VM's lock. (Locks may do nothing here, so nobody may answer, too.)
        if let Some(vm) = name.strip_suffix(SOCKET)
            && is_vm_key(vm)
            && entry.kind == EntryKind::Other
            && Socket::is_dead(&Address::Unix(folder.join(name)))
            && let Ok(Some(_lock)) = folder.lock(format!("{vm}.lock"))
        {
            let _ = folder.remove_if_there(name);
            continue;
        }
        let passing = ["run-", "qemu-"].iter().any(|p| name.starts_with(p));
        if !passing || !name.ends_with(".lock") || entry.kind != EntryKind::File {
            continue;
        }
        // Held while it is removed, so that nobody has it.
        if let Ok(Some(_lock)) = folder.lock(name) {
            let _ = folder.remove_if_there(name);
        }
    }
}

/// As [`take`], more than once: whoever sweeps has it for a short time.
fn take_again(folder: &Folder, name: &str, taken: Taken) -> Result<folder::Lock> {
    let mut lock = take(folder, name, taken);
    for _ in 0..TRIES {
        if !lock.as_ref().is_err_and(|e| e.kind() == Kind::Busy) {
            break;
        }
        std::thread::sleep(AGAIN);
        lock = take(folder, name, taken);
    }
    lock
}

fn take(folder: &Folder, name: &str, (held, remedy): Taken) -> Result<folder::Lock> {
    let lock = folder
        .lock(name)
        .map_err(|e| Error::io(e, "cannot take the lock").at_path(folder.join(name)))?;
    lock.ok_or_else(|| Error::new(Kind::Busy, held).at_path(folder.join(name)).remedy(remedy))
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some((folder, name)) = &self.passing {
            let _ = folder.remove_if_there(name);
        }
    }
}

/// The name under which a VM's journal, lock and control socket are kept.
pub(crate) fn vm_key(address: &Address) -> String {
    let hash = blake3::hash(address.canonical().as_bytes()).to_hex();
    format!("vm-{}", hash.as_str().get(..16).unwrap_or_default())
}

/// Whether this is a [`vm_key`]: other sockets (that of QEMU's NBD server) live as long as QEMU.
pub(super) fn is_vm_key(name: &str) -> bool {
    let hash = name.strip_prefix("vm-");
    hash.is_some_and(|h| h.len() == 16 && h.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Where state is kept unless `--state-dir` says otherwise: /var/lib/fleecefs, for others than
/// root their own state folder.
///
/// # Errors
/// `Usage` for a user who has no such folder: a folder for everybody's temporary files is none.
pub(crate) fn default_state_dir() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/fleecefs"));
    }
    let absolute = |v: OsString| Some(PathBuf::from(v)).filter(|p| p.is_absolute());
    let base = std::env::var_os("XDG_STATE_HOME").and_then(absolute);
    let home = || Some(std::env::var_os("HOME").and_then(absolute)?.join(".local/state"));
    let base = base.or_else(home).ok_or_else(|| {
        Error::new(
            Kind::Usage,
            "neither XDG_STATE_HOME nor HOME is set, so the state folder is \
                                 not known",
        )
        .remedy(NAME_ONE)
    })?;
    Ok(base.join("fleecefs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_backup_directory_is_inside_of_the_state_folder() {
        let state = Path::new("/var/lib/fleecefs");
        for bad in ["/var/lib/fleecefs", "/var/lib/fleecefs/live/vm1"] {
            assert_eq!(refuse_inside(state, Path::new(bad)).unwrap_err().kind(), Kind::Usage);
        }
        for good in ["/var/lib", "/var/lib/fleecefs2", "/backups/var/lib/fleecefs"] {
            refuse_inside(state, Path::new(good)).unwrap();
        }
    }

    #[test]
    fn a_lock_is_exclusive_and_goes_with_its_holder() {
        let d = tempfile::tempdir().unwrap();
        let a = Address::Unix("/run/a".into());
        let lock = Lock::vm(d.path(), &a).unwrap();
        assert_eq!(Lock::vm(d.path(), &a).unwrap_err().kind(), Kind::Busy);
        Lock::vm(d.path(), &Address::Unix("/run/b".into())).unwrap();
        drop(lock);
        Lock::vm(d.path(), &a).unwrap();
    }

    #[test]
    fn the_mark_of_a_run_goes_with_it() {
        let d = tempfile::tempdir().unwrap();
        let mark = Lock::run(d.path(), "0123456789ab").unwrap();
        assert_eq!(Lock::run(d.path(), "0123456789ab").unwrap_err().kind(), Kind::Busy);
        drop(mark);
        assert_eq!(std::fs::read_dir(d.path()).unwrap().count(), 0);
        Lock::run(d.path(), "0123456789ab").unwrap();
    }

    #[test]
    fn the_marks_of_killed_runs_go_and_those_of_others_stay() {
        let d = tempfile::tempdir().unwrap();
        let lives = Lock::run(d.path(), "0123456789ab").unwrap();
        for dead in ["run-ffffffffffff.lock", "qemu-0123456789abcdef.lock", "run-x.other"] {
            std::fs::write(d.path().join(dead), "").unwrap();
        }
        let b = Address::Unix("/run/b".into());
        let _b = Lock::vm(d.path(), &b).unwrap();
        let listens = d.path().join(format!("{}.sock", vm_key(&b)));
        let dead = d.path().join("vm-0123456789abcdef.sock");
        let qemus = d.path().join("vm-0123456789abcdef-nbd.sock");
        for socket in [&listens, &dead, &qemus] {
            std::os::unix::net::UnixListener::bind(socket).unwrap();
        }
        let _vm = Lock::vm(d.path(), &Address::Unix("/run/a".into())).unwrap();
        assert!(listens.exists() && qemus.exists() && !dead.exists());
        let left = std::fs::read_dir(d.path()).unwrap().map(|e| e.unwrap().file_name());
        let mut left: Vec<_> = left.filter(|n| !n.to_str().unwrap().starts_with("vm-")).collect();
        left.sort();
        assert_eq!(left, ["run-0123456789ab.lock", "run-x.other"]);
        assert_eq!(Lock::run(d.path(), "0123456789ab").unwrap_err().kind(), Kind::Busy);
        drop(lives);
    }

    #[test]
    fn a_state_folder_that_others_may_write_to_is_refused() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let d = tempfile::tempdir().unwrap();
        let (ours, link) = (d.path().join("ours/state"), d.path().join("link"));
        symlink("ours/state", &link).unwrap();
        state_folder(&ours).unwrap();
        assert_eq!(state_folder(&link).unwrap().path(), ours.canonicalize().unwrap());
        assert!(state_folder_if_there(&d.path().join("none")).unwrap().is_none());
        std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o777)).unwrap();
        for path in [&ours, &link] {
            assert_eq!(state_folder(path).unwrap_err().kind(), Kind::Permission);
            assert_eq!(state_folder_if_there(path).unwrap_err().kind(), Kind::Permission);
        }
        std::fs::write(d.path().join("file"), "").unwrap();
        let e = state_folder(&d.path().join("file")).unwrap_err();
        assert!(e.kind() == Kind::Exists && e.report().contains("name a folder"), "{e}");
    }
}
