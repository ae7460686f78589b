//! A qemu-storage-daemon of our own, from start to end.
//!
//! It opens images by their names, as QEMU does, and so needs the rights of its caller to read. What it
//! may change is spelled out (see `super::confine::enter_daemon`). It is ended by SIGTERM, at which it
//! closes its images in order and stores their bitmaps; it gets the same signal when we die.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::confine::{KEEP, Place, WRITE, enter_daemon};
use super::program;
use super::run::{said, shown};
use crate::error::{Error, Kind, Result};
use crate::folder;

/// What the program is called.
const NAME: &str = "qemu-storage-daemon";
/// How long it may take to close its images: it writes what is in its caches.
const CLOSING: Duration = Duration::from_secs(120);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// What it may change.
#[derive(Debug, Default)]
pub struct Rights {
    places: Vec<(File, u64)>,
}

impl Rights {
    /// It may write to the image `path`.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn image(&mut self, path: &Path) -> io::Result<()> {
        self.places.push((folder::pin(path)?, WRITE));
        Ok(())
    }

    /// It may write to files that are in the folder `path`.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn files_in(&mut self, path: &Path) -> io::Result<()> {
        self.image(path)
    }

    /// It may make files and sockets in the folder `path`, and remove them.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn own(&mut self, path: &Path) -> io::Result<()> {
        self.places.push((folder::pin(path)?, KEEP));
        Ok(())
    }
}

/// One that runs. Ended on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    words: Option<JoinHandle<String>>,
}

impl Daemon {
    /// Starts it in the folder `dir`, and waits until there is a socket at `ready`. It holds `lock`, a locked file, for as long as
    /// it lives.
    ///
    /// # Errors
    /// `NotFound` if it is not installed, `Peer` with its own words if it ends, `Timeout`.
    pub fn start(
        args: &[OsString],
        (dir, rights): (&Path, Rights),
        lock: &File,
        (ready, wait): (&Path, Duration),
    ) -> Result<Self> {
        let program = program(NAME)?;
        log::info!("{NAME} {}", shown(args));
        let mut command = Command::new(&program);
        command.args(args).env_clear().env("LC_ALL", "C").current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let places: Vec<Place> = rights
            .places
            .iter()
            .map(|(f, rights)| Place { fd: f.as_raw_fd(), rights: *rights })
            .collect();
        let (parent, keep) = (std::process::id(), [lock.as_raw_fd()]);
        // SAFETY: `confine::enter_daemon` makes plain system calls only, as must be between fork and exec.
        unsafe { command.pre_exec(move || enter_daemon(&places, &keep, parent)) };
        let child = command.spawn().map_err(|e| {
            Error::new(Kind::Busy, format!("cannot run {NAME} now")).with_source(e).at_path(program)
        });
        drop(rights);
        let mut child = child?;
        let stderr = child.stderr.take();
        let words = std::thread::spawn(move || stderr.map(said).unwrap_or_default());
        let mut daemon = Daemon { child: Some(child), words: Some(words) };
        let deadline = Instant::now() + wait;
        while !folder::exists(ready) {
            if daemon.has_ended() {
                let (_, said) = daemon.close();
                return Err(Error::new(
                    Kind::Peer,
                    format!("{NAME} cannot open the images: {said}"),
                ));
            }
            if Instant::now() >= deadline {
                return Err(Error::new(Kind::Timeout, format!("{NAME} does not come up")));
            }
            std::thread::sleep(LOOK);
        }
        Ok(daemon)
    }

    /// Whether it is gone.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|c| !matches!(c.try_wait(), Ok(None)))
    }

    /// Lets it close its images and end.
    ///
    /// # Errors
    /// `Peer` if it did not end in order: then bitmaps may be lost.
    pub fn end(mut self) -> Result<()> {
        let (status, said) = self.close();
        match status {
            Some(status) if status.success() && said.is_empty() => Ok(()),
            Some(status) if status.success() => {
                Err(Error::new(Kind::Peer, format!("{NAME}: {said}")))
            }
            _ => Err(Error::new(Kind::Peer, format!("{NAME} did not end in order: {said}"))),
        }
    }

    fn close(&mut self) -> (Option<ExitStatus>, String) {
        let Some(mut child) = self.child.take() else { return (None, String::new()) };
        let deadline = Instant::now() + CLOSING;
        // Not reaped yet, so that its number is its own.
        if matches!(child.try_wait(), Ok(None)) {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        }
        let status = loop {
            match child.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
                Ok(Some(status)) => break Some(status),
                _ => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break None;
                }
            }
        };
        let said = self.words.take().and_then(|w| w.join().ok()).unwrap_or_default();
        (status, said)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() {
            let _ = self.close();
        }
    }
}
