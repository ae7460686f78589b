//! A QEMU with a guest that nobody trusts: see `super::confine`. It opens no image; what it may read and write, it has
//! by sockets and descriptors. When this process ends, however that happens, it is killed by the kernel.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use super::confine::{AllowedPath, DEVICE, GuestLimits, enter_guest};
use super::run::{installed, said, shown};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::text::path_text;

/// What the program is called: guests of x86 alone.
const NAMES: [&str; 2] = ["qemu-system-x86_64", "qemu-kvm"];
/// Address space beside the guest's memory: QEMU's own, the code that TCG makes (1 GiB at most), stacks, libraries,
/// the memory of a graphics card.
const BESIDE: u64 = 8 << 30;
/// The largest file that it writes: a picture of its console, in bytes.
pub(crate) const LARGEST_FILE: u64 = 64 << 20;

/// What makes guests as fast as this machine.
pub(crate) const KVM: &str = "/dev/kvm";

/// What it may use.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Allowed {
    /// The guest's memory in bytes.
    pub memory: u64,
    /// Whether it may use /dev/kvm.
    pub accelerated: bool,
    /// The group that may use it, where only a group may.
    pub kvm: Option<u32>,
    /// Whether it may use this machine's network.
    pub network: bool,
}

/// One that runs. Killed on drop.
#[derive(Debug)]
pub(crate) struct GuestProcess {
    child: Child,
    words: Option<JoinHandle<String>>,
}

/// Where QEMU is.
///
/// # Errors
/// `NotFound` if it is not installed.
pub(crate) fn program() -> Result<PathBuf> {
    let all = NAMES.map(|name| installed(name, "qemu-system-x86"));
    let mut first = None;
    for found in all {
        match found {
            Ok(path) => return Ok(path),
            Err(e) => first = first.or(Some(e)),
        }
    }
    Err(first.unwrap_or_else(|| Error::new(Kind::NotFound, "no QEMU")))
}

impl GuestProcess {
    /// Starts it with the descriptors `fds`, by their numbers, and `env`. Must be called by a thread that outlives it:
    /// it ends with that.
    ///
    /// # Errors
    /// `NotFound` if it is not installed, `Busy` if it could not be started.
    pub(crate) fn start(args: &[OsString], fds: &[OwnedFd], allowed: Allowed) -> Result<Self> {
        let program = program()?;
        log::info!("{} {}", path_text(&program), shown(args));
        let mut command = Command::new(&program);
        command.args(args).env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
        command.current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let keep: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let limits = GuestLimits {
            memory: allowed.memory.saturating_add(BESIDE),
            file: LARGEST_FILE,
            kvm: allowed.kvm,
            network: allowed.network,
        };
        // Where it is not to be used, or is not there, QEMU says so.
        let kvm = allowed.accelerated.then(|| folder::pin(Path::new(KVM)).ok()).flatten();
        let places = kvm.as_ref().map(|f| AllowedPath { fd: f.as_raw_fd(), rights: DEVICE });
        let parent = std::process::id();
        // SAFETY: `confine::enter_guest` makes plain system calls only, as must be between fork and exec.
        unsafe { command.pre_exec(move || enter_guest(&keep, limits, places.as_slice(), parent)) };
        let mut child = command.spawn().map_err(|e| {
            Error::new(Kind::Busy, "cannot run QEMU now").with_source(e).at_path(&program)
        })?;
        let stderr = child.stderr.take();
        let words = std::thread::spawn(move || stderr.map(said).unwrap_or_default());
        Ok(GuestProcess { child, words: Some(words) })
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it, if it runs; what it said on its standard error.
    pub(crate) fn end(mut self) -> String {
        self.kill();
        self.words.take().and_then(|w| w.join().ok()).unwrap_or_default()
    }

    fn kill(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
