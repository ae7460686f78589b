//! Going into the background.
//!
//! The process forks before it has a second thread. The parent waits on a pipe: a zero byte says
//! that all is ready, another byte is the exit code of a child that has already told why, and
//! the pipe's end without a byte is a child that died. Until it is ready the child keeps the
//! terminal, so that its errors are seen; then it releases it.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::rc::Rc;

use crate::error::{Error, Kind, Result};
use crate::folder::system;
use crate::output::logging::{self, Sink};
use crate::output::{self, systemd};

/// What is left to do when a mount answers. In two processes it is done in parts.
pub(super) enum Ready {
    /// In the foreground: systemd is told.
    Foreground,
    /// In the background: the terminal is released, and the process that waits is told.
    Background {
        /// Where logs go from then on, if not to the system log.
        log: Option<File>,
        /// The other end of the pipe that the first process reads.
        parent: File,
        /// Set when that has been told.
        told: Rc<Cell<bool>>,
    },
}

impl Ready {
    /// Releases the terminal, pipes and the current folder; whether there was anything to release.
    ///
    /// # Errors
    /// There is no `/dev/null`.
    pub(super) fn detach(&self) -> Result<bool> {
        match self {
            Ready::Foreground => Ok(false),
            Ready::Background { log, .. } => {
                let log = log.as_ref().map(File::try_clone).transpose();
                release(log.map_err(|e| Error::io(e, "cannot use the log file"))?)?;
                Ok(true)
            }
        }
    }

    /// The same, and tells whoever waits.
    ///
    /// # Errors
    /// As [`Ready::detach`]; nobody listens.
    pub(super) fn tell(self) -> Result<()> {
        self.detach()?;
        match self {
            Ready::Foreground => {
                systemd::ready();
                Ok(())
            }
            Ready::Background { mut parent, told, .. } => {
                told.set(true);
                parent
                    .write_all(&[0])
                    .map_err(|e| Error::io(e, "cannot tell that the mount is ready"))
            }
        }
    }
}

/// Runs `work` in a background process and returns when it tells its argument. Logs go to `log`
/// from then on, or to the system log. `work` gives the exit code; if that is not 0, it has told why.
/// Must be called while there is one thread only.
///
/// # Errors
/// No process can be made, or it died; where `work` fails first, the process tells why and this
/// one ends with the same exit code.
pub(super) fn background(log: Option<File>, work: impl FnOnce(Ready) -> Result<u8>) -> Result<()> {
    let (mut from_child, to_parent) = pipe()?;
    // SAFETY: there is one thread, so the child may do anything after the fork.
    match unsafe { libc::fork() } {
        -1 => Err(Error::io(std::io::Error::last_os_error(), "cannot go into the background")),
        0 => {
            drop(from_child);
            std::process::exit(child(to_parent, log, work))
        }
        pid => {
            drop(to_parent);
            let mut code = [0];
            match from_child.read(&mut code) {
                Ok(1) if code[0] == 0 => Ok(()),
                Ok(1) => std::process::exit(i32::from(code[0])),
                _ => Err(died(pid)),
            }
        }
    }
}

fn pipe() -> Result<(File, File)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Error::io(std::io::Error::last_os_error(), "cannot make a pipe"));
    }
    // SAFETY: two fresh descriptors.
    Ok(unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) })
}

fn died(pid: libc::pid_t) -> Error {
    let mut status = 0;
    // SAFETY: the pointer is valid for the call.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    let text = format!("the background process ended before it was ready (status {status:#x})");
    Error::new(Kind::Io, text)
}

/// The child's whole life; returns its exit code.
fn child(mut to_parent: File, log: Option<File>, work: impl FnOnce(Ready) -> Result<u8>) -> i32 {
    // SAFETY: cannot fail in a fresh child.
    unsafe { libc::setsid() };
    let told = Rc::new(Cell::new(false));
    let code = match to_parent.try_clone() {
        Ok(parent) => work(Ready::Background { log, parent, told: told.clone() }),
        Err(e) => Err(Error::io(e, "cannot copy a pipe")),
    };
    let code = code.unwrap_or_else(|e| {
        match told.get() {
            true => log::error!("{}", e.report()),
            false => output::tell_error(&e),
        }
        e.kind().exit_code()
    });
    if !told.get() {
        let _ = to_parent.write_all(&[code]);
    }
    i32::from(code)
}

fn release(log: Option<File>) -> Result<()> {
    let path = Path::new("/dev/null");
    let null = system::device(path).map_err(|e| Error::io(e, "cannot open").at_path(path))?;
    logging::redirect(log.map_or(Sink::System, Sink::File));
    for fd in 0..=2 {
        // SAFETY: both descriptors are valid or, for a closed standard stream, made valid.
        unsafe { libc::dup2(null.as_raw_fd(), fd) };
    }
    // Not to keep a file system busy; a root that cannot be entered does no harm.
    let _ = std::env::set_current_dir("/");
    Ok(())
}
