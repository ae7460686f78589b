//! A qemu-storage-daemon of our own, from start to end.
//!
//! It opens images by their names, as QEMU does. What it may read and change is spelled out (see
//! `super::confine::enter_daemon`): the images, and where programs and libraries are. Where it does not run
//! with that, because it or its libraries are elsewhere, it may read what its caller may. It is ended by SIGTERM, at which it
//! closes its images in order and stores their bitmaps; it gets the same signal when we die.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::confine::{AllowedPath, KEEP, LIST, READ, WRITE, enter_daemon};
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

/// How long it may take to say its version.
const STARTING: Duration = Duration::from_secs(20);
/// What programs, their libraries and QEMU read on any system: nothing in there is private to a user.
const SYSTEM: [&str; 22] = [
    "/usr",
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/gnutls",
    "/etc/crypto-policies",
    "/etc/localtime",
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    // Limits of block devices, nodes of memory. Of other processes nothing is told to it.
    "/sys/block",
    "/sys/class",
    "/sys/dev",
    "/sys/devices",
    "/sys/module",
    "/proc",
];

/// What it may change, and read.
#[derive(Debug, Default)]
pub(crate) struct Rights {
    places: Vec<(File, u64)>,
}

impl Rights {
    /// It may write to the image `path`.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn image(&mut self, path: &Path) -> io::Result<()> {
        self.places.push((folder::pin(path)?, WRITE));
        Ok(())
    }

    /// It may read the image `path`.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn read(&mut self, path: &Path) -> io::Result<()> {
        self.places.push((folder::pin(path)?, READ));
        Ok(())
    }

    /// It may read what the program and its libraries need, as far as that is there.
    fn system(program: &Path) -> Self {
        let real = folder::resolve(program).unwrap_or_default();
        let dirs = [program, &real].map(|p| p.parent().unwrap_or(program).to_path_buf());
        // Where it is not installed for all.
        let beside = dirs.iter().filter_map(|d| d.parent()).flat_map(|above| {
            ["lib", "lib64", "libexec", "share/qemu"].map(|name| above.join(name))
        });
        let all = SYSTEM
            .iter()
            .map(PathBuf::from)
            .chain(beside)
            .chain([program.to_path_buf(), real.clone()]);
        let pinned = all.filter_map(|path| {
            let file = folder::pin(&folder::resolve(&path).ok()?).ok()?;
            let list = if file.metadata().ok()?.is_dir() { LIST } else { 0 };
            Some((file, READ | list))
        });
        Rights { places: pinned.collect() }
    }

    fn places(&self) -> impl Iterator<Item = AllowedPath> {
        self.places.iter().map(|(f, rights)| AllowedPath { fd: f.as_raw_fd(), rights: *rights })
    }

    /// It may write to files that are in the folder `path`.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn files_in(&mut self, path: &Path) -> io::Result<()> {
        self.image(path)
    }

    /// It may make files and sockets in the folder `path`, and remove them.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn own(&mut self, path: &Path) -> io::Result<()> {
        self.places.push((folder::pin(path)?, KEEP | LIST));
        Ok(())
    }
}

/// Whether the program runs where it may read nothing but `system`. It is given no image, so that no image
/// decides.
fn runs_with(program: &Path, system: &Rights) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").env_clear().env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (places, parent): (Vec<AllowedPath>, _) = (system.places().collect(), std::process::id());
    // SAFETY: as in `Daemon::start`.
    unsafe { command.pre_exec(move || enter_daemon((&places, true), &[], parent)) };
    let Ok(mut child) = command.spawn() else { return false };
    let deadline = Instant::now() + STARTING;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            _ => break,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// One that runs. Ended on drop.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Option<Child>,
    words: Option<JoinHandle<String>>,
}

impl Daemon {
    /// Starts it in the folder `dir`, and waits until there is a socket at `ready`. It holds `lock`, a locked file, for as long as
    /// it lives.
    ///
    /// # Errors
    /// `NotFound` if it is not installed, `Peer` with its own words if it ends, `Timeout`.
    pub(crate) fn start(
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
        let system = Rights::system(&program);
        let limited = runs_with(&program, &system);
        if !limited {
            log::info!("{NAME} runs without confinement: it may read all that its user may");
        }
        let places: Vec<AllowedPath> = rights.places().chain(system.places()).collect();
        let (parent, keep) = (std::process::id(), [lock.as_raw_fd()]);
        // SAFETY: `confine::enter_daemon` makes plain system calls only, as must be between fork and exec.
        unsafe { command.pre_exec(move || enter_daemon((&places, limited), &keep, parent)) };
        let child = command.spawn().map_err(|e| {
            Error::new(Kind::Busy, format!("cannot run {NAME} now")).with_source(e).at_path(program)
        });
        drop((rights, system));
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
                return Err(Error::new(Kind::Timeout, format!("{NAME} does not start")));
            }
            std::thread::sleep(LOOK);
        }
        Ok(daemon)
    }

    /// Whether it is gone.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|c| !matches!(c.try_wait(), Ok(None)))
    }

    /// Lets it close its images and end.
    ///
    /// # Errors
    /// `Peer` if it did not end in order: then bitmaps may be lost.
    pub(crate) fn end(mut self) -> Result<()> {
        let (status, said) = self.close();
        match status {
            Some(status) if status.success() && said.is_empty() => Ok(()),
            Some(status) if status.success() => {
                Err(Error::new(Kind::Peer, format!("{NAME}: {said}")))
            }
            _ => Err(Error::new(Kind::Peer, format!("{NAME} did not exit cleanly: {said}"))),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn has_landlock() -> bool {
        let null = std::ptr::null::<u8>();
        // SAFETY: asks for the version (flag 1), for which there is no structure.
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, null, 0_usize, 1) > 0 }
    }

    /// Starts one that opens `image` for reading, and may read what `rights` says.
    fn opens(dir: &Path, image: &Path, mut rights: Rights) -> Result<()> {
        let own = dir.canonicalize().unwrap();
        rights.own(&own).unwrap();
        rights.image(Path::new("/dev/null")).unwrap();
        let node = format!("driver=file,node-name=x,read-only=on,filename={}", image.display());
        let server = "addr.type=unix,addr.path=ready.sock";
        let args = ["--blockdev", &node, "--nbd-server", server].map(OsString::from);
        let lock = File::create(own.join("lock")).unwrap();
        let ready = (own.join("ready.sock"), Duration::from_secs(60));
        let started = Daemon::start(&args, (&own, rights), &lock, (&ready.0, ready.1));
        let ended = started.and_then(Daemon::end);
        let _ = std::fs::remove_file(&ready.0);
        ended
    }

    #[test]
    fn it_reads_what_it_is_told_and_nothing_else() {
        let test = "it_reads_what_it_is_told_and_nothing_else";
        let found = program(NAME).is_ok();
        assert!(found || std::env::var_os("CI").is_none(), "{test} needs {NAME}");
        if !found || !has_landlock() {
            println!("skipped: {test}: needs {NAME}, and a kernel with Landlock");
            return;
        }
        let (own, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = elsewhere.path().canonicalize().unwrap().join("secret");
        std::fs::write(&secret, [7; 4096]).unwrap();
        let system = Rights::system(&program(NAME).unwrap());
        assert!(runs_with(&program(NAME).unwrap(), &system), "an installed one has its limits");
        let refused = opens(own.path(), &secret, Rights::default()).unwrap_err().report();
        assert!(refused.contains("Permission denied"), "{refused}");
        let mut rights = Rights::default();
        rights.read(&secret).unwrap();
        opens(own.path(), &secret, rights).unwrap();
        // What needs more than the system's folders is started all the same, without these limits.
        assert!(!runs_with(&secret, &system));
    }
}
