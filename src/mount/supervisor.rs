//! Root's mount, in two processes.
//!
//! The serving process reads what others have written, so it gives up all of root's capabilities but
//! that of reading (with `--as-owner` it becomes that user) before it looks at anything. It can
//! neither mount nor unmount then. The process that forked it, the supervisor, does these two things when
//! asked, and nothing else; it is the one that was started, so signals and systemd find it.
//!
//! They talk over a pair of sockets, a byte for a word: [`word`].

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Pid;
use signal_hook::iterator::Signals;

use super::daemon::Ready;
use super::mounted;
use super::plan::Plan;
use super::prepared::Prepared;
use super::process::{self, SIGNALS, TICK};
use super::table::{self, Announced, Mount, Waiting};
use crate::error::{Error, Kind, Result};
use crate::folder::Folder;
use crate::fs::FileSystem;
use crate::fuse;
use crate::{output, privileges};

/// What the two processes say to each other.
mod message {
    /// Server: mount it.
    pub(super) const MOUNT: u8 = b'm';
    /// Keeper: it is mounted.
    pub(super) const MOUNTED: u8 = b'M';
    /// Server: it is served.
    pub(super) const SERVED: u8 = b's';
    /// Server: it is idle, unmount it.
    pub(super) const IDLE: u8 = b'i';
    /// Keeper: it was not idle after all.
    pub(super) const BUSY: u8 = b'b';
    /// Server: it is unmounted; what was written is still written down.
    pub(super) const UNMOUNTED: u8 = b'u';
    /// Server: a signal came.
    pub(super) const SIGNAL: u8 = b'g';
}

/// Mounts and serves in a second process; the exit code.
///
/// # Errors
/// Mounting failed, or the serving process was killed.
pub(super) fn run(plan: &Plan, ready: Ready) -> Result<u8> {
    let device = fuse::open_device()?;
    let failed = |e| Error::io(e, "cannot use the mount point").at_path(&plan.mountpoint);
    let mountpoint = Folder::open(&plan.mountpoint).map_err(failed)?;
    let no_process = |e| Error::io(e, "cannot start the serving process");
    let (ours, theirs) = UnixStream::pair().map_err(no_process)?;
    let supervisor = rustix::process::getpid();
    // SAFETY: there is one thread, so the child may do anything after the fork.
    match unsafe { libc::fork() } {
        -1 => Err(no_process(std::io::Error::last_os_error())),
        0 => {
            drop((ours, mountpoint));
            let server = Server { plan, device: Some(device), link: theirs, supervisor };
            std::process::exit(i32::from(server.run(ready)))
        }
        pid => {
            drop(theirs);
            let before = Some((device, mountpoint, ready));
            MountSupervisor {
                plan,
                pid,
                link: ours,
                before,
                signals: None,
                own: 0,
                told: 0,
                mounted: false,
                mount: None,
                announced: None,
                waiting: Waiting::default(),
                gone: false,
            }
            .run()
        }
    }
}

/// The process with the privileges.
struct MountSupervisor<'a> {
    plan: &'a Plan,
    /// The serving process.
    pid: libc::pid_t,
    link: UnixStream,
    /// What is needed until the mount is there.
    before: Option<(File, Folder, Ready)>,
    /// A byte for each signal.
    signals: Option<UnixStream>,
    /// Signals that came to this process.
    own: u32,
    /// Signals that came to the other one. Whoever signals both means one.
    told: u32,
    /// Whether it has been mounted.
    mounted: bool,
    mount: Option<Mount>,
    /// Says to `umount` that this process lives.
    announced: Option<Announced>,
    /// Each `umount` that waits for the end.
    waiting: Waiting,
    /// Whether it has been unmounted.
    gone: bool,
}

impl MountSupervisor<'_> {
    fn run(mut self) -> Result<u8> {
        match self.listen() {
            Ok(None) => self.ended(),
            Ok(Some(code)) => {
                self.kill();
                Ok(code)
            }
            Err(e) => {
                self.kill();
                self.clean_up();
                Err(e)
            }
        }
    }

    /// Acts on words and signals until the serving process has ended; an exit code to end at once.
    fn listen(&mut self) -> Result<Option<u8>> {
        loop {
            let before = self.own.max(self.told);
            self.wait();
            let mut words = [0; 64];
            match self.link.read(&mut words) {
                // A server that was killed may have left words of ours unread.
                Ok(0) => return Ok(None),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
                Ok(n) => words[..n].iter().try_for_each(|w| self.hear(*w))?,
                Err(_) => {}
            }
            self.own += count(self.signals.as_mut());
            let signals = self.own.max(self.told);
            if signals > 2 {
                log::warn!("a third signal: ending with files still open");
                return Ok(Some(Kind::Interrupted.exit_code()));
            }
            if signals > before {
                log::info!("a signal came: unmounting");
            }
            if signals > 0 && self.mount.is_some() && !self.gone {
                self.gone = self.unmount(signals > 1);
            }
        }
    }

    /// Until there is something to read, or to try again.
    fn wait(&mut self) {
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is omitted.
        let signals = self.signals.as_ref().map_or(-1, |s| s.as_raw_fd());
        let mut fds = [entry(self.link.as_raw_fd()), entry(signals)];
        let again = self.own.max(self.told) > 0 && !self.gone;
        let timeout = if again { TICK.as_millis() as libc::c_int } else { -1 };
        // SAFETY: two valid entries.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) };
    }

    fn hear(&mut self, word: u8) -> Result<()> {
        match word {
            message::MOUNT => self.attach(),
            message::SERVED => self.announce(),
            // The next mount may get its device number, and be announced by that.
            message::UNMOUNTED => {
                self.waiting = self.announced.take().map(Announced::end).unwrap_or_default();
                Ok(())
            }
            message::IDLE => {
                self.gone = self.unmount(false);
                if !self.gone {
                    self.say(message::BUSY);
                }
                Ok(())
            }
            message::SIGNAL => {
                self.told = self.told.saturating_add(1);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn attach(&mut self) -> Result<()> {
        let Some((device, mountpoint, _)) = &self.before else { return Ok(()) };
        // Until now a signal simply ended this process, and the other one with it.
        let (tell, told) = UnixStream::pair().map_err(|e| Error::io(e, "cannot make a socket"))?;
        let failed = |e| Error::io(e, "cannot set up signal handling");
        for signal in SIGNALS {
            let tell = tell.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, tell).map_err(failed)?;
        }
        told.set_nonblocking(true).map_err(failed)?;
        self.link.set_nonblocking(true).map_err(failed)?;
        self.signals = Some(told);
        fuse::attach(device, &mountpoint.proc_path(), &self.plan.mountpoint, &self.plan.fuse())?;
        self.mounted = true;
        self.say(message::MOUNTED);
        Ok(())
    }

    /// The last step of mounting. The device is closed here, so that the mount ends with its server.
    fn announce(&mut self) -> Result<()> {
        let Some((device, mountpoint, ready)) = self.before.take() else { return Ok(()) };
        drop((device, mountpoint));
        let (mount, announced) = mounted::answers(&self.plan.mountpoint)?;
        (self.mount, self.announced) = (Some(mount), announced);
        ready.tell()?;
        mounted::print_mounted(self.plan);
        Ok(())
    }

    fn say(&mut self, word: u8) {
        // If the other one has ended, that is seen at the next look.
        let _ = self.link.write_all(&[word]);
    }

    /// Tries once; true if there is nothing left to do.
    fn unmount(&self, lazy: bool) -> bool {
        let Some(mount) = &self.mount else { return false };
        match mount.end(lazy) {
            Ok(()) => true,
            Err(e) => {
                log::debug!("{}; a second signal detaches it", e.report());
                false
            }
        }
    }

    /// The serving process has ended: as it should, or it has told why, or it was killed.
    fn ended(mut self) -> Result<u8> {
        self.announced = None;
        let status = self.reap();
        if libc::WIFEXITED(status) {
            let code = u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(1);
            self.waiting.tell(code);
            if code != 0 {
                self.clean_up();
            }
            return Ok(code);
        }
        self.waiting.tell(Kind::Io.exit_code());
        self.clean_up();
        let text =
            format!("the process that served it was ended by signal {}", libc::WTERMSIG(status));
        Err(Error::new(Kind::Io, text).at_path(&self.plan.mountpoint))
    }

    /// Takes a mount away that nobody serves any more. If it is in use, it stays, dead.
    fn clean_up(&self) {
        if !self.mounted || self.gone {
            return;
        }
        let mount = match &self.mount {
            Some(mount) => Some(mount.clone()),
            None => table::find(&self.plan.mountpoint).ok().flatten(),
        };
        if let Some(mount) = mount.filter(Mount::is_fleecefs)
            && let Err(e) = mount.end(false)
        {
            log::warn!("{}", e.report());
        }
    }

    fn kill(&self) {
        // SAFETY: a child of this process that nobody has waited for.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        self.reap();
    }

    fn reap(&self) -> libc::c_int {
        let mut status = 0;
        // SAFETY: the pointer is valid for the call.
        while unsafe { libc::waitpid(self.pid, &mut status, 0) } == -1
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
        status
    }
}

/// How many signals have come.
fn count(signals: Option<&mut UnixStream>) -> u32 {
    let mut bytes = [0; 16];
    let read = signals.map(|s| s.read(&mut bytes));
    read.and_then(|r| r.ok()).and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
}

/// The process without them.
struct Server<'a> {
    plan: &'a Plan,
    device: Option<File>,
    link: UnixStream,
    supervisor: Pid,
}

impl Server<'_> {
    /// Serves; the exit code.
    fn run(mut self, ready: Ready) -> u8 {
        let mut detached = false;
        match self.serve(&ready, &mut detached) {
            Ok(()) => 0,
            Err(e) => {
                match detached {
                    true => log::error!("{}", e.report()),
                    false => output::tell_error(&e),
                }
                e.kind().exit_code()
            }
        }
    }

    fn serve(&mut self, ready: &Ready, detached: &mut bool) -> Result<()> {
        match &self.plan.as_owner {
            Some(owner) => owner.become_it(),
            None => privileges::keep_reading(),
        }?;
        // After the change, which would undo it.
        let lives = privileges::end_with(self.supervisor);
        if !lives.map_err(|e| Error::io(e, "cannot depend on the first process"))? {
            return Err(gone());
        }
        let prepared = Prepared::new(self.plan)?;
        let signals = process::signals()?;
        self.say(message::MOUNT)?;
        if self.hear()? != message::MOUNTED {
            return Err(gone());
        }
        let Some(device) = self.device.take() else { return Err(gone()) };
        let mount = fuse::serve(prepared.fs.clone(), device, &self.plan.fuse())?;
        self.control(signals, prepared.fs.clone())?;
        let fs = prepared.fs.clone();
        prepared.watch(&mount)?;
        *detached = ready.detach()?;
        self.say(message::SERVED)?;
        let plan = self.plan;
        mounted::finish(mount, &fs, plan, || {
            // Whoever has ended has no socket any more.
            let _ = self.say(message::UNMOUNTED);
        })
    }

    fn say(&mut self, word: u8) -> Result<()> {
        self.link.write_all(&[word]).map_err(|_| gone())
    }

    fn hear(&mut self) -> Result<u8> {
        let mut word = [0];
        self.link.read_exact(&mut word).map_err(|_| gone())?;
        Ok(word[0])
    }

    /// Starts the threads that pass signals on, and ask to be unmounted when idle.
    fn control(&self, mut signals: Signals, fs: Arc<FileSystem>) -> Result<()> {
        let link = || self.link.try_clone().map_err(|e| Error::io(e, "cannot copy a socket"));
        let mut tell = link()?;
        process::start("signals", 0, move || {
            for _ in signals.forever() {
                if tell.write_all(&[message::SIGNAL]).is_err() {
                    return;
                }
            }
        })?;
        let Some(timeout) = self.plan.idle_seconds() else { return Ok(()) };
        let mut ask = link()?;
        process::start("control", 0, move || {
            loop {
                std::thread::sleep(TICK.min(Duration::from_secs(timeout)));
                if fs.idle_seconds() < timeout {
                    continue;
                }
                let mut answer = [0];
                let asked = ask.write_all(&[message::IDLE]);
                if asked.and_then(|()| ask.read_exact(&mut answer)).is_err() {
                    return;
                }
                // Somebody works inside without reading: ask again after another idle time.
                fs.touch();
            }
        })
    }
}

fn gone() -> Error {
    Error::new(Kind::Interrupted, "the process that mounts has ended")
}
