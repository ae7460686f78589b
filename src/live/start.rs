//! QEMU's process, which outlives this one.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::nodes::Handed;
use super::storage::Storage;
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::folder::{self, Folder, Lock};
use crate::qemu_img::{guest, shown};
use crate::qmp::socket::Socket;
use crate::qmp::{Address, Client};
use crate::text::{path_text, visible};

/// QEMU's sockets: for this command, for backups, for the guest agent, and the serial port.
pub(super) const OWN_SOCKET: &str = "qmp.sock";
pub(super) const BACKUP_SOCKET: &str = "backup.sock";
pub(super) const AGENT_SOCKET: &str = "agent.sock";
const SERIAL_SOCKET: &str = "serial.sock";
/// What QEMU says.
const LOG: &str = "qemu.log";
/// How long QEMU may take until it greets: it reads its firmware, and takes the guest's memory.
const STARTING: Duration = Duration::from_secs(60);
/// How long one that was found running may take.
const ANSWERING: Duration = Duration::from_secs(10);
/// How long sockets may answer after their QEMU gave up its lock.
const CLOSING: Duration = Duration::from_secs(2);
/// How often it is tried.
const LOOK: Duration = Duration::from_millis(20);
/// Of its log so much is repeated, in bytes.
const LONGEST_WORDS: usize = 2000;
const LARGEST_LOG: u64 = 64 << 20;

/// System calls that QEMU never needs, as long as it starts no helpers: the user may say otherwise.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The folder of QEMU's sockets, made if it is not there.
///
/// # Errors
/// It cannot be made.
fn sockets(path: &Path) -> Result<Folder> {
    let made = folder::make_folders(path);
    let made =
        made.map_err(|e| Error::io(e, "cannot make the folder for sockets").at_path(path))?;
    folder::check_private(path)?;
    Ok(made)
}

/// The arguments for the sockets that the machine has, whose listeners are handed over.
struct Listeners {
    arguments: Vec<OsString>,
    fds: Vec<OwnedFd>,
}

impl Listeners {
    /// Makes them anew in the place of those of a QEMU that is gone.
    fn new(folder: &Folder) -> Result<Self> {
        let mut all = Listeners { arguments: Vec::new(), fds: Vec::new() };
        for (id, name) in [
            ("live-qmp", OWN_SOCKET),
            ("live-backup", BACKUP_SOCKET),
            ("live-agent", AGENT_SOCKET),
            ("live-serial", SERIAL_SOCKET),
        ] {
            let failed = |e| Error::io(e, "cannot make the socket").at_path(folder.join(name));
            folder.remove_if_there(name).map_err(failed)?;
            let listener = folder.listen(name).map_err(failed)?;
            let fd = listener.as_raw_fd();
            let text = format!("socket,id={id},fd={fd},server=on,wait=off");
            all.arguments.extend(["-chardev".into(), text.into()]);
            all.fds.push(listener.into());
        }
        let rest = [
            "-mon",
            "chardev=live-qmp,mode=control",
            "-mon",
            "chardev=live-backup,mode=control",
            "-serial",
            "chardev:live-serial",
            "-device",
            "virtio-serial-pci,id=live-ports",
            "-device",
            "virtserialport,bus=live-ports.0,chardev=live-agent,name=org.qemu.guest_agent.0",
        ];
        all.arguments.extend(rest.map(OsString::from));
        Ok(all)
    }
}

/// Starts it, with the guest stopped. `lock` goes with it, and what is handed over.
///
/// # Errors
/// `NotFound` if QEMU is not installed; `Peer` with its own words if it does not start.
pub(super) fn start(
    machine: &[OsString],
    handed: Handed,
    path: &Path,
    (lock, cancel): (Lock, &Arc<AtomicBool>),
) -> Result<Client> {
    let program = guest::program()?;
    let folder = sockets(path)?;
    check_unused(path)?;
    let listeners = Listeners::new(&folder)?;
    let failed = |e| Error::io(e, "cannot make QEMU's log").at_path(folder.join(LOG));
    folder.remove_if_there(LOG).map_err(failed)?;
    let log = folder.append(LOG).map_err(failed)?;
    let mut args: Vec<OsString> = ["-display", "none"].map(OsString::from).to_vec();
    if !machine.iter().any(|word| word == "-sandbox") {
        args.extend(["-sandbox", SANDBOX].map(OsString::from));
    }
    args.extend(handed.arguments);
    args.extend(machine.iter().cloned());
    args.extend(listeners.arguments);
    args.push("-S".into());
    log::info!("{} {}", path_text(&program), shown(&args));
    let fds = listeners.fds.iter().chain(&handed.fds);
    let mut keep: Vec<RawFd> = fds.map(AsRawFd::as_raw_fd).collect();
    keep.push(lock.file().as_raw_fd());
    let mut child = spawn(&program, &args, log, keep)?;
    failpoint::step("QEMU started");
    // Its own are left: a QEMU that ends gives up the lock, and refuses connections.
    drop((listeners.fds, handed.fds, lock));
    let deadline = Instant::now() + STARTING;
    let connected = connect(path, deadline, cancel, || match child.try_wait() {
        Ok(Some(status)) => Err(not_started(&folder, &status.to_string())),
        _ => Ok(()),
    });
    if connected.is_err() {
        // Its guest has not run.
        let _ended = child.kill();
        let _ended = child.wait();
    }
    connected
}

/// A QEMU that has ended closes its sockets after it gave up the lock; another one's stay.
fn check_unused(path: &Path) -> Result<()> {
    let deadline = Instant::now() + CLOSING;
    let address = Address::Unix(path.join(OWN_SOCKET));
    while !Socket::is_dead(&address) {
        if Instant::now() >= deadline {
            let e = Error::new(Kind::Busy, "another VM of 'live-restore' has its sockets there");
            return Err(e.at_path(path).remedy(
                "its storage folder was moved: end that VM, or use another folder or --state-dir",
            ));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn spawn(program: &Path, args: &[OsString], log: File, keep: Vec<RawFd>) -> Result<Child> {
    let failed = |e| Error::new(Kind::Busy, "cannot run QEMU now").with_source(e).at_path(program);
    let mut command = Command::new(program);
    command.args(args).env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin");
    command.current_dir("/").stdin(Stdio::null());
    command.stdout(log.try_clone().map_err(failed)?).stderr(log);
    let enter = move || {
        // SAFETY: plain system calls only, as must be between fork and exec.
        unsafe {
            // Neither a terminal's signals nor its end are for it.
            if libc::setsid() < 0 {
                return Err(std::io::Error::last_os_error());
            }
            for fd in &keep {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: `enter` makes plain system calls only, and allocates nothing.
    unsafe { command.pre_exec(enter) };
    command.spawn().map_err(failed)
}

/// Connects to one that was found running.
///
/// # Errors
/// `Busy` if it does not answer; `Interrupted`.
pub(super) fn attach(path: &Path, storage: &Storage, cancel: &Arc<AtomicBool>) -> Result<Client> {
    let deadline = Instant::now() + ANSWERING;
    let connected = connect(path, deadline, cancel, || match storage.vm_lock()? {
        Some(_) => Err(Error::new(Kind::Peer, "the VM has ended just now")),
        None => Ok(()),
    });
    connected.map_err(|e| match e.kind() {
        Kind::Interrupted | Kind::Peer => e,
        _ => e.remedy("the VM runs: end whatever else uses its first QMP socket, and try again"),
    })
}

/// Tries until the deadline, as long as `lives` has no error.
fn connect(
    path: &Path,
    deadline: Instant,
    cancel: &Arc<AtomicBool>,
    mut lives: impl FnMut() -> Result<()>,
) -> Result<Client> {
    let address = Address::Unix(path.join(OWN_SOCKET));
    loop {
        // The connection is taken before QEMU is ready to greet, and interrupted if it ends before.
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = left.max(LOOK);
        let failed = match Client::connect_within(&address, patience, Some(cancel.clone())) {
            Ok(client) => return Ok(client),
            Err(e) if e.kind() == Kind::Interrupted => return Err(e),
            Err(e) => e,
        };
        lives()?;
        if Instant::now() >= deadline {
            return Err(failed);
        }
        std::thread::sleep(LOOK);
    }
}

fn not_started(folder: &Folder, status: &str) -> Error {
    let said = folder.read_small(LOG, LARGEST_LOG).unwrap_or_default();
    let said = String::from_utf8_lossy(&said[said.len().saturating_sub(LONGEST_WORDS)..]);
    let said = visible(said.trim());
    Error::new(Kind::Peer, format!("QEMU does not start ({status}): {said}"))
        .remedy("look at --accel, --firmware, and the options behind --")
}

/// Where QEMU's sockets are.
pub(super) fn socket(path: &Path, name: &str) -> PathBuf {
    path.join(name)
}
