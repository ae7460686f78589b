//! One qemu-img from start to end.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::confine::{self, Limits};
use super::export::Export;
use super::nbd;
use crate::error::{Error, Kind, Result};

/// How often a running qemu-img is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Of what it says, this much is kept.
const MAX_SAID: u64 = 64 << 10;

/// What is to be run.
pub(super) struct Job<'a> {
    /// For messages.
    pub verb: &'a str,
    /// The file to name in errors.
    pub about: &'a Path,
    /// What it may use.
    pub limits: Limits,
    /// The images, each of which it gets as a socket.
    pub exports: &'a [Export<'a>],
}

/// How it ended.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stderr.
    pub said: String,
}

impl Outcome {
    /// Fails unless the exit code is 0.
    ///
    /// # Errors
    /// `NoSpace` or `Peer` with its own words.
    pub(super) fn must_succeed(self, verb: &str, about: &Path) -> Result<()> {
        match self.code {
            0 => Ok(()),
            _ => Err(failure(verb, about, &self.said)),
        }
    }
}

impl Job<'_> {
    /// Runs it; `args` makes the arguments out of the numbers of the sockets.
    ///
    /// # Errors
    /// `NotFound` if there is no qemu-img, `Busy` if it could not be started, `Interrupted` if it
    /// was killed, `Peer` if it used up its processor time; what `stop` says; why an image could not
    /// be read or written.
    pub(super) fn run(
        &self,
        args: impl Fn(&[i32]) -> Vec<OsString>,
        stop: Stop,
    ) -> Result<Outcome> {
        let (ours, theirs) = self.sockets()?;
        let fds: Vec<i32> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let args = args(&fds);
        log::info!("qemu-img {}", shown(&args));
        let mut child = self.start(&args, fds)?;
        // So that the end of the child ends the connection.
        drop(theirs);
        let failed = Mutex::new(None);
        let stderr = child.stderr.take();
        let (status, said) = std::thread::scope(|scope| {
            for (export, socket) in self.exports.iter().zip(&ours) {
                let failed = &failed;
                scope.spawn(move || {
                    if let Some(e) = nbd::serve(export, socket) {
                        failed.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
                    }
                });
            }
            let reader = scope.spawn(move || stderr.map(said).unwrap_or_default());
            let status = wait(&mut child, stop);
            // Whatever it left behind holds the other ends.
            for socket in &ours {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            (status, reader.join().unwrap_or_default())
        });
        let status = status.map_err(|e| e.at_path(self.about))?;
        // Why an image could not be read or written is the better answer.
        if let (false, Some(e)) =
            (status.success(), failed.into_inner().unwrap_or_else(|e| e.into_inner()))
        {
            return Err(Error::io(e, format!("qemu-img {} failed", self.verb)).at_path(self.about));
        }
        Ok(Outcome { code: self.code(status)?, said })
    }

    /// A socket pair for each image: our ends and its.
    fn sockets(&self) -> Result<(Vec<UnixStream>, Vec<OwnedFd>)> {
        let pair = |_: &Export| UnixStream::pair().map(|(ours, theirs)| (ours, theirs.into()));
        let pairs: std::io::Result<Vec<_>> = self.exports.iter().map(pair).collect();
        let pairs =
            pairs.map_err(|e| Error::new(Kind::Busy, "cannot make a socket").with_source(e))?;
        Ok(pairs.into_iter().unzip())
    }

    fn start(&self, args: &[OsString], fds: Vec<i32>) -> Result<Child> {
        let program = program("qemu-img")?;
        let mut command = Command::new(&program);
        command.args(args).env_clear().env("LC_ALL", "C").current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let (limits, parent) = (self.limits, std::process::id());
        // SAFETY: `confine::enter` makes plain system calls only, as must be between fork and exec.
        unsafe { command.pre_exec(move || confine::enter(&fds, limits, parent)) };
        command.spawn().map_err(|e| {
            let denied = e.kind() == std::io::ErrorKind::PermissionDenied;
            let error = Error::new(Kind::Busy, "cannot run qemu-img now").with_source(e);
            match denied {
                true => error.at_path(program).remedy("let every user execute it"),
                false => error,
            }
        })
    }

    fn code(&self, status: ExitStatus) -> Result<i32> {
        match (status.code(), status.signal()) {
            (Some(code), _) => Ok(code),
            (None, Some(libc::SIGXCPU)) => {
                let what = format!("qemu-img {} took too long, and was ended", self.verb);
                Err(Error::new(Kind::Peer, what).at_path(self.about))
            }
            // Out of memory, or misled by the image. That it is killed by a Ctrl-C is no verdict.
            (None, Some(libc::SIGABRT | libc::SIGSEGV | libc::SIGBUS | libc::SIGFPE)) => {
                let what = format!("qemu-img {} crashed", self.verb);
                Err(Error::new(Kind::Peer, what).at_path(self.about))
            }
            _ => Err(Error::new(Kind::Interrupted, "qemu-img was killed").at_path(self.about)),
        }
    }
}

/// What it says, as far as it is kept.
pub(crate) fn said(mut stderr: impl Read) -> String {
    let mut text = Vec::new();
    let _ = stderr.by_ref().take(MAX_SAID).read_to_end(&mut text);
    // A full pipe would block it for ever.
    let _ = std::io::copy(&mut stderr, &mut std::io::sink());
    String::from_utf8_lossy(&text).trim().to_string()
}

fn wait(child: &mut Child, stop: Stop) -> Result<ExitStatus> {
    let handle = handle(child);
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(e) => break Error::io(e, "cannot wait for qemu-img"),
        }
        if let Err(e) = stop() {
            break e;
        }
        rest(handle.as_ref());
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(ended)
}

/// What tells of a child's end; `None` where the kernel has no such thing (before 5.3).
fn handle(child: &Child) -> Option<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Waits for [`LOOK`], or until the child of this handle has ended.
fn rest(handle: Option<&OwnedFd>) {
    let Some(handle) = handle else { return std::thread::sleep(LOOK) };
    let ms = libc::c_int::try_from(LOOK.as_millis()).unwrap_or(1);
    let mut p = libc::pollfd { fd: handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives on our stack. An error ends the wait early, which costs a look.
    unsafe { libc::poll(&mut p, 1, ms) };
}

/// Arguments as a shell would take them.
pub(crate) fn shown(args: &[OsString]) -> String {
    let quote = |a: &OsString| {
        let text = a.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
        match !text.is_empty() && text.chars().all(plain) {
            true => text.into_owned(),
            false => format!("'{}'", text.replace('\'', "'\\''")),
        }
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Asked every few milliseconds while qemu-img runs: an error ends it, and is passed on.
pub type Stop<'a> = &'a dyn Fn() -> Result<()>;

/// It ran, and failed with these words.
pub(super) fn failure(verb: &str, about: &Path, said: &str) -> Error {
    let kind = if said.contains("No space left") { Kind::NoSpace } else { Kind::Peer };
    Error::new(kind, format!("qemu-img {verb} failed: {said}")).at_path(about)
}

/// Where one of QEMU's tools is.
///
/// # Errors
/// As [`installed`].
pub(super) fn program(name: &str) -> Result<std::path::PathBuf> {
    installed(name, "qemu-utils")
}

/// Where a program is, which Debian has in `package`.
///
/// # Errors
/// `NotFound` if it is not installed.
pub(super) fn installed(name: &str, package: &str) -> Result<std::path::PathBuf> {
    installed_in(&std::env::var_os("PATH").unwrap_or_default(), name, package)
}

/// As [`installed`], in the folders of `path` instead of the caller's.
///
/// # Errors
/// As [`installed`].
// A program is found as a shell finds it, links and all.
#[allow(clippy::disallowed_methods)]
pub(crate) fn installed_in(path: &OsStr, name: &str, package: &str) -> Result<std::path::PathBuf> {
    let found = std::env::split_paths(path).map(|dir| dir.join(OsStr::new(name)));
    let mut found = found.filter(|p| p.is_absolute() && p.is_file());
    found.next().ok_or_else(|| {
        Error::new(Kind::NotFound, format!("cannot run {name}: it is not installed"))
            .remedy(format!("install it (Debian: {package})"))
    })
}
