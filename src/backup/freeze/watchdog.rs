//! The watchdog: a child process that continues and thaws the guest if its parent cannot.
//!
//! It is started before the guest is frozen or stopped, and knows from lines on its standard
//! input what is done to the guest at any time. When the parent dies (end of file) it acts; when
//! the deadline passes it kills the parent first, since a QMP or agent socket serves one client
//! and the parent holds it. It has a session of its own and ignores the signals of a terminal.
//!
//! It does not give up: a QEMU that hangs (in a flush to a dead NFS server) may wake after minutes
//! and only then be stopped. What it has done it adds to the journal, so that no later recovery
//! continues a guest that its owner has paused since.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::after;
use crate::backup::state::journal;
use crate::backup::state::journal::{AfterCommand, Record};
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::journal::paths;
use crate::qmp::agent::Agent;
use crate::qmp::socket::Socket;
use crate::qmp::{Address, Client};

/// How often it tries again.
#[derive(Debug, Clone, Copy)]
struct RetryPolicy {
    /// The pause after the first try.
    first: Duration,
    /// The longest pause.
    longest: Duration,
    /// After so many tries it lets go of its standard error, for whose end somebody may wait (ssh,
    /// cron).
    max_logged: u32,
}

const RETRY: RetryPolicy = RetryPolicy {
    first: Duration::from_millis(200),
    longest: Duration::from_secs(5),
    max_logged: 15,
};

/// The most bytes that the parent sends in all: the configuration and some messages.
const MAX_INPUT: u64 = 1 << 20;

/// What the watchdog gets at its start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct WatchdogConfig {
    /// QEMU's QMP socket.
    pub qmp: String,
    /// The agent's socket.
    pub agent: Option<String>,
    /// After how many milliseconds it acts even if the parent lives.
    pub deadline_ms: u64,
    /// The guest is to be stopped for as long as the backup takes: only the time counts in which
    /// it runs and is frozen.
    pub whole: bool,
    /// Which process QEMU is, if that can be told.
    #[serde(default)]
    pub qemu: Option<String>,
    /// The run.
    pub run: String,
    /// Its journal.
    #[serde(with = "paths")]
    pub journal: PathBuf,
    /// The parent.
    pub parent: u32,
    /// What is run in the guest once it is thawed, if it was announced.
    #[serde(default)]
    pub after: Option<AfterCommand>,
}

impl WatchdogConfig {
    /// Whether the guest is held, and not meant to be.
    fn counts_time(&self, guest: GuestState) -> bool {
        if self.whole { guest.frozen && !guest.stopped } else { guest.frozen || guest.stopped }
    }
}

/// The parent's side.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Watchdog {
    /// Starts one and waits until it is on guard.
    ///
    /// # Errors
    /// It cannot be started: the guest must not be touched then.
    pub(crate) fn start(config: &WatchdogConfig) -> Result<Self> {
        let failed = |e| Error::io(e, "cannot start the watchdog process");
        // This very program, also where an upgrade has replaced its file since it was started.
        let mut command = Command::new("/proc/self/exe");
        failpoint::keep_from(&mut command);
        let mut child = command
            .arg0("fleecefs")
            .arg("guardian")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let mut pipe = child.stdin.take();
        let text = serde_json::to_string(config).map_err(|e| failed(e.into()))?;
        if let Some(p) = &mut pipe {
            writeln!(p, "{text}").map_err(failed)?;
        }
        let mut ready = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut ready).map_err(failed)?;
        }
        if ready.trim() != "ready" {
            return Err(Error::new(Kind::Io, "the watchdog process did not start"));
        }
        Ok(Watchdog { child, pipe })
    }

    /// Says what is about to be done to the guest, or has been undone.
    ///
    /// # Errors
    /// The watchdog is gone: nothing may be done to the guest then.
    pub(crate) fn tell(&mut self, message: Message) -> Result<()> {
        let Some(p) = &mut self.pipe else {
            return Err(Error::new(Kind::Io, "the watchdog process was told to end"));
        };
        writeln!(p, "{}", message.text())
            .map_err(|e| Error::io(e, "the watchdog process has ended"))
    }

    /// Leaves it to do what is still to be done, as if we had died.
    pub(crate) fn leave(mut self) {
        drop(self.pipe.take());
    }

    /// Lets it go: the guest runs and is thawed.
    pub(crate) fn stop(mut self) {
        if let Some(mut p) = self.pipe.take() {
            let _ = writeln!(p, "done");
        }
        let _ = self.child.wait();
    }
}

/// What the parent tells the watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// The guest will be frozen.
    Freeze,
    /// It is thawed.
    Thaw,
    /// The guest will be stopped.
    Stop,
    /// It runs.
    Continue,
    /// A command will be run in the guest, after which another has to be run.
    Command,
    /// That one was run.
    CommandDone,
    /// Nothing is left to guard.
    Done,
}

impl Message {
    const ALL: [Message; 7] = [
        Message::Freeze,
        Message::Thaw,
        Message::Stop,
        Message::Continue,
        Message::Command,
        Message::CommandDone,
        Message::Done,
    ];

    fn text(self) -> &'static str {
        match self {
            Message::Freeze => "freeze",
            Message::Thaw => "thaw",
            Message::Stop => "stop",
            Message::Continue => "cont",
            Message::Command => "command",
            Message::CommandDone => "command-done",
            Message::Done => "done",
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct GuestState {
    frozen: bool,
    stopped: bool,
    /// A command was begun in it, after which another has to be run.
    command: bool,
}

/// The child process: `fleecefs guardian`, which users never call.
///
/// # Errors
/// The configuration is invalid, or the guest could not be continued and thawed.
pub(crate) fn serve() -> Result<()> {
    // SAFETY: no preconditions; both only concern this process.
    unsafe {
        libc::setsid();
        for s in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGPIPE] {
            libc::signal(s, libc::SIG_IGN);
        }
    }
    // It may outlive its parent by hours, and must not keep a file system busy.
    let _ = std::env::set_current_dir("/");
    // The parent sends about a dozen lines; longer input is not from it.
    let mut lines = BufReader::new(std::io::stdin().take(MAX_INPUT));
    let mut first = String::new();
    lines
        .read_line(&mut first)
        .map_err(|e| Error::io(e, "cannot read the watchdog's configuration"))?;
    let config: WatchdogConfig = serde_json::from_str(&first).map_err(|e| {
        Error::new(Kind::Usage, "this command is for fleecefs itself").with_source(e)
    })?;
    let parent = open_parent(&config)?;
    let (tell, receive) = channel();
    std::thread::spawn(move || {
        for line in lines.lines().map_while(std::result::Result::ok) {
            let message = Message::ALL.into_iter().find(|w| w.text() == line);
            if message.is_some_and(|w| tell.send(w).is_err()) {
                return;
            }
        }
    });
    let _ = writeln!(std::io::stdout(), "ready");
    let _ = std::io::stdout().flush();
    match watch(&config, &receive) {
        Verdict::Done => Ok(()),
        Verdict::ParentDied(guest) => release_guest(&config, guest),
        Verdict::Late(guest) => {
            log::error!(
                "the guest was stopped or frozen for {} ms: ending the backup",
                config.deadline_ms
            );
            kill_parent(&parent);
            release_guest(&config, guest)
        }
    }
}

enum Verdict {
    Done,
    ParentDied(GuestState),
    Late(GuestState),
}

fn watch(config: &WatchdogConfig, receive: &Receiver<Message>) -> Verdict {
    let mut guest = GuestState::default();
    // The clock runs while the guest is held against its will, and only then.
    let mut held: Option<Instant> = None;
    loop {
        let limit = Duration::from_millis(config.deadline_ms);
        let wait = match held {
            Some(since) => limit.saturating_sub(since.elapsed()),
            None => Duration::from_secs(3600),
        };
        match receive.recv_timeout(wait) {
            Ok(Message::Freeze) => guest.frozen = true,
            Ok(Message::Thaw) => guest.frozen = false,
            Ok(Message::Stop) => guest.stopped = true,
            Ok(Message::Continue) => guest.stopped = false,
            Ok(Message::Command) => guest.command = true,
            Ok(Message::CommandDone) => guest.command = false,
            Ok(Message::Done) => return Verdict::Done,
            Err(RecvTimeoutError::Disconnected) => return Verdict::ParentDied(guest),
            Err(RecvTimeoutError::Timeout) if held.is_some() => return Verdict::Late(guest),
            Err(RecvTimeoutError::Timeout) => {}
        }
        held = match config.counts_time(guest) {
            true => held.or(Some(Instant::now())),
            false => None,
        };
    }
}

fn open_parent(config: &WatchdogConfig) -> Result<OwnedFd> {
    // SAFETY: getppid has no preconditions.
    if u32::try_from(unsafe { libc::getppid() }) != Ok(config.parent) {
        return Err(Error::new(Kind::Usage, "this command is for fleecefs itself"));
    }
    // SAFETY: pidfd_open takes a pid and flags; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, config.parent, 0) };
    if fd < 0 {
        return Err(Error::io(std::io::Error::last_os_error(), "cannot watch the parent"));
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn kill_parent(parent: &OwnedFd) {
    // SAFETY: a pidfd we own: it can only ever name our parent.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            parent.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        );
    }
}

fn release_guest(config: &WatchdogConfig, guest: GuestState) -> Result<()> {
    let mut result = Ok(());
    if guest.stopped {
        let qmp = Address::parse(&config.qmp)?;
        let over = || !is_ours(config, |p| p.stopped);
        result = retry(RETRY, || continue_guest(&qmp), over, || is_gone(config, &qmp));
        if result.is_ok() {
            note(config, Record::Continued(config.run.clone()));
        }
    }
    if guest.frozen
        && let Some(agent) = &config.agent
    {
        let agent = Address::parse(agent)?;
        let over = || !is_ours(config, |p| p.frozen);
        let thawed = retry(RETRY, || thaw(&agent), over, || is_gone(config, &agent));
        if thawed.is_ok() {
            note(config, Record::Thawed(config.run.clone()));
        }
        result = result.and(thawed);
    }
    if guest.command
        && let (Some(agent), Some(after)) = (&config.agent, &config.after)
    {
        result = result.and(run_after(config, &Address::parse(agent)?, after));
    }
    result
}

/// Runs the command that has to be run after the freeze point. What it ended with is told, and no reason to run
/// it again.
fn run_after(config: &WatchdogConfig, agent: &Address, after: &AfterCommand) -> Result<()> {
    // It stands in the journal before the first is begun: with no journal all is done.
    let over = || match journal::read(&config.journal) {
        Ok(pending) => !pending.is_some_and(|p| p.run == config.run && p.after.is_some()),
        Err(_) => false,
    };
    let run = || {
        if let Some(done) = after::run(agent, after, over, || true)? {
            note(config, Record::GuestCommandRun(config.run.clone()));
            if let Err(why) = &done.verdict {
                log::error!("watchdog: --guest-after: {why}");
            }
        }
        Ok(())
    };
    retry(RETRY, run, over, || is_gone(config, agent))
}

/// The guest is helped whether or not that can be written down.
fn note(config: &WatchdogConfig, record: Record) {
    if let Err(e) = journal::note(&config.journal, &config.run, &record) {
        log::warn!("watchdog: {}", e.report());
    }
}

/// Whether it is still ours to do: neither a recovery nor a later run has dealt with it. A journal
/// that is lost says nothing.
fn is_ours(config: &WatchdogConfig, what: impl Fn(&journal::Pending) -> bool) -> bool {
    match journal::read(&config.journal) {
        Ok(Some(p)) => p.run == config.run && what(&p),
        _ => true,
    }
}

/// Whether nobody listens any more and there is no guest to help. A QEMU that runs may get its socket
/// back; with the journal gone nobody would say then that it is no longer ours to do.
fn is_gone(config: &WatchdogConfig, peer: &Address) -> bool {
    let runs = || config.qemu.as_deref().is_some_and(crate::qmp::peer::runs);
    let known = || matches!(journal::read(&config.journal), Ok(Some(p)) if p.run == config.run);
    Socket::is_dead(peer) && !(runs() && known())
}

/// Tries until it works, until it is `over`, or until the peer is `gone`.
fn retry(
    patience: RetryPolicy,
    mut act: impl FnMut() -> Result<()>,
    over: impl Fn() -> bool,
    gone: impl Fn() -> bool,
) -> Result<()> {
    let mut pause = patience.first;
    let mut tries = 0u32;
    loop {
        let Err(e) = act() else { return Ok(()) };
        if matches!(e.kind(), Kind::NotFound | Kind::Peer) && gone() {
            return Err(e);
        }
        tries = tries.saturating_add(1);
        log::warn!("watchdog: {}; trying again", e.report());
        if tries == patience.max_logged {
            close_stderr();
        }
        std::thread::sleep(pause);
        if over() {
            return Ok(());
        }
        pause = pause.saturating_mul(2).min(patience.longest);
    }
}

fn close_stderr() {
    log::warn!("watchdog: still retrying; further errors are not shown");
    let null = crate::folder::system::device(std::path::Path::new("/dev/null"));
    let Ok(null) = null else { return };
    for fd in [libc::STDOUT_FILENO, libc::STDERR_FILENO] {
        // SAFETY: both descriptors are valid; the second is replaced as a whole.
        unsafe { libc::dup2(null.as_raw_fd(), fd) };
    }
}

/// Lets a paused guest run.
///
/// # Errors
/// QEMU cannot be reached or refuses.
pub(crate) fn continue_guest(qmp: &Address) -> Result<()> {
    let mut client = Client::connect_within(qmp, Duration::from_secs(2), None)?;
    continue_if_paused(&mut client).map(drop)
}

/// Lets the guest run if it is paused; says whether it was.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn continue_if_paused(client: &mut Client) -> Result<bool> {
    let status = client.execute("query-status", json!({}))?;
    let Some(state) = status.get("status").and_then(Value::as_str) else {
        return Err(Error::new(Kind::Peer, "QEMU does not report whether the guest runs"));
    };
    let paused = state == "paused";
    if paused {
        client.execute("cont", json!({}))?;
    }
    Ok(paused)
}

/// Thaws a guest's file systems.
///
/// # Errors
/// The agent cannot be reached or refuses.
pub(crate) fn thaw(agent: &Address) -> Result<()> {
    let wait = Duration::from_secs(5);
    Agent::connect(agent, wait)?.thaw(wait).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::unix::net::UnixListener;

    fn config(whole: bool) -> WatchdogConfig {
        WatchdogConfig {
            qmp: "/q".into(),
            agent: None,
            deadline_ms: 0,
            whole,
            qemu: None,
            run: "r".into(),
            journal: "/nonexistent".into(),
            parent: 1,
            after: None,
        }
    }

    fn begun(run: &str) -> String {
        let r = Record::Begin { run: run.into(), target: "/t".into(), agent: None, qemu: None };
        serde_json::to_string(&r).unwrap()
    }

    #[test]
    fn a_long_stop_counts_only_where_it_was_not_asked_for() {
        let g = |frozen, stopped| GuestState { frozen, stopped, command: false };
        for (guest, freeze_point, whole) in [
            (g(false, false), false, false),
            (g(true, false), true, true),
            (g(true, true), true, false),
            (g(false, true), true, false),
        ] {
            assert_eq!(config(false).counts_time(guest), freeze_point, "{guest:?}");
            assert_eq!(config(true).counts_time(guest), whole, "{guest:?}");
        }
    }

    #[test]
    fn it_retries_until_it_works_or_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = Address::Unix(path);
        let nothing =
            RetryPolicy { first: Duration::ZERO, longest: Duration::ZERO, max_logged: u32::MAX };
        let tries = Cell::new(0usize);
        let act = |good_at: usize| {
            let tries = &tries;
            move || {
                tries.set(tries.get() + 1);
                let kind = if tries.get().is_multiple_of(2) { Kind::Peer } else { Kind::Busy };
                if tries.get() == good_at { Ok(()) } else { Err(Error::new(kind, "no")) }
            }
        };
        let dead = || is_gone(&config(false), &peer);
        retry(nothing, act(50), || false, dead).unwrap();
        assert_eq!(tries.replace(0), 50);
        retry(nothing, act(50), || tries.get() == 7, dead).unwrap();
        assert_eq!(tries.replace(0), 7);
        drop(listener);
        retry(nothing, act(50), || false, dead).unwrap_err();
        assert_eq!(tries.replace(0), 2);
        // QEMU runs, and the run is known.
        let journal = dir.path().join("j");
        std::fs::write(&journal, begun("r")).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let qemu = crate::qmp::peer::named(child.id());
        let mut known = WatchdogConfig { journal, qemu, ..config(false) };
        retry(nothing, act(50), || false, || is_gone(&known, &peer)).unwrap();
        assert_eq!(tries.replace(0), 50);
        known.run = "s".into();
        assert!(is_gone(&known, &peer));
        known.run = "r".into();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_gone(&known, &peer));
    }

    /// Peers that send without end, and nothing that was asked for: each try ends, so that what is
    /// between two of them is a pause.
    #[test]
    fn a_try_ends_whatever_the_peer_sends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let flood = std::thread::spawn(move || {
            for bytes in [vec![b'\n'; 65536], b"{\"return\":{}}\n".repeat(4096)] {
                for _ in 0..2 {
                    let (mut s, _) = listener.accept().unwrap();
                    while s.write_all(&bytes).is_ok() {}
                }
            }
        });
        let peer = Address::Unix(path);
        for _ in 0..2 {
            assert!(thaw(&peer).is_err());
            assert!(continue_guest(&peer).is_err());
        }
        flood.join().unwrap();
    }

    #[test]
    fn it_is_over_when_another_has_dealt_with_it() {
        let d = tempfile::tempdir().unwrap();
        let mut o = config(false);
        o.journal = d.path().join("j");
        assert!(is_ours(&o, |p| p.stopped));
        std::fs::write(&o.journal, format!("{}\n\"stop\"\n", begun("r"))).unwrap();
        assert!(is_ours(&o, |p| p.stopped));
        note(&o, Record::Continued("r".into()));
        assert!(!is_ours(&o, |p| p.stopped));
        std::fs::write(&o.journal, format!("{}\n\"stop\"\n", begun("s"))).unwrap();
        assert!(!is_ours(&o, |p| p.stopped));
    }
}
