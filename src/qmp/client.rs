//! A QMP client: greeting, capabilities, commands with ids. Of events it is only noticed that one
//! came which may end a wait: what has happened is asked for, so a flood of them takes no memory.
//! Only of jobs of other programs a list is kept where that is asked for, see [`JobEvents`]: such a
//! job may have ended before anybody asks.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::address::Address;
use super::budget::{clip, short};
use super::events::{JobEvents, ends_a_wait};
use super::socket::{Socket, in_use};
use super::timeout::answer_timeout;
use super::types::{Features, Version};
use super::wire::{Limits, Wire};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step_of;

/// How long to wait for the greeting. QEMU sends it as soon as it accepts.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to connect where QEMU ends the connection before it greets: it does so now and then while it is
/// still parting from the client before.
const TRIES: u32 = 5;
/// How long to wait before each new try.
const BETWEEN_TRIES: Duration = Duration::from_millis(100);

/// How many commands are known at most (QEMU 10 has some 250), and of how many bytes.
const COMMANDS: usize = 4096;
const LONGEST_NAME: usize = 64;

/// How much of a refusal is looked at, in characters: more than a name of 4096 that it may repeat.
const LONGEST_REASON: usize = 8192;

/// The longest list that is read: of jobs, exports, nodes. Beyond any machine that QEMU can emulate.
const LONGEST_LIST: usize = 16_384;

/// QEMU's own words for why it did not do something.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The error class; nearly always `GenericError`.
    pub class: String,
    /// What it says.
    pub desc: String,
    command: String,
}

impl From<Refusal> for Error {
    fn from(r: Refusal) -> Error {
        if r.class == "CommandNotFound" {
            return missing(&r.command);
        }
        Error::new(Kind::Peer, format!("QEMU refused {}: {}", r.command, short(&r.desc)))
    }
}

fn missing(command: &str) -> Error {
    Error::new(Kind::Unsupported, format!("this QEMU has no {command}"))
        .remedy("QEMU 7.2 or newer is needed")
}

/// A connection in command mode.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    next_id: u64,
    /// An event has come since the last [`Client::pause`] that may end one.
    woken: bool,
    /// The beginning of the names of our own jobs, and what was heard of all others.
    jobs: Option<(String, JobEvents)>,
    /// How many events of migrations came.
    migrations: u64,
    version: Version,
    commands: HashSet<String>,
    features: Option<Features>,
    timeout: Duration,
    /// No command is waited for beyond this.
    until: Option<Instant>,
    timed_out: bool,
}

/// A question that was sent.
#[derive(Debug)]
#[must_use]
pub struct PendingCommand<'a> {
    command: &'a str,
    id: u64,
    /// It is a step, see `failpoint`.
    counted: bool,
}

impl Client {
    /// Connects and enters command mode.
    ///
    /// # Errors
    /// `Busy` if another client holds the socket, `Peer` or `Corrupt` if it is not QMP, and as
    /// [`Wire::connect`].
    pub fn connect(address: &Address) -> Result<Self> {
        Self::connect_within(address, GREETING_TIMEOUT.min(answer_timeout()), None)
    }

    /// As [`Client::connect`]; ends with `Interrupted` once the flag is set, see
    /// [`Client::interrupt_by`].
    ///
    /// # Errors
    /// As [`Client::connect`]; `Interrupted`.
    pub fn connect_until(address: &Address, flag: Arc<AtomicBool>) -> Result<Self> {
        Self::connect_within(address, GREETING_TIMEOUT.min(answer_timeout()), Some(flag))
    }

    /// As [`Client::connect`], with `patience` for the greeting, and perhaps a flag that ends it.
    ///
    /// # Errors
    /// As [`Client::connect_until`].
    pub fn connect_within(
        address: &Address,
        patience: Duration,
        flag: Option<Arc<AtomicBool>>,
    ) -> Result<Self> {
        let deadline = Instant::now() + patience;
        let mut tries = 1;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let connected = Wire::connect(address, left.max(BETWEEN_TRIES), Limits::QEMU);
            let mut wire = connected.map_err(|e| match e.kind() {
                Kind::NotFound => e.remedy(
                    "is QEMU running, and is this the path in its -qmp unix:PATH,server=on,wait=off?",
                ),
                _ => e,
            })?;
            wire.stop_by(flag.clone());
            match greeting(&mut wire, deadline)? {
                Greeting::Version(version) => return Self::greeted(wire, version),
                Greeting::Closed(e) if tries == TRIES || Instant::now() >= deadline => {
                    return Err(e);
                }
                Greeting::Closed(_) => std::thread::sleep(BETWEEN_TRIES),
            }
            wire.check_stop()?;
            tries += 1;
        }
    }

    /// The client of a QEMU that we have started ourselves, at the other end of `stream`.
    ///
    /// # Errors
    /// As [`Client::connect_within`].
    pub(crate) fn over(
        stream: UnixStream,
        patience: Duration,
        flag: Option<Arc<AtomicBool>>,
    ) -> Result<Self> {
        let socket = Socket::accepted(stream, "QEMU")?;
        let mut wire = Wire::over(socket, Limits::QEMU);
        wire.stop_by(flag);
        match greeting(&mut wire, Instant::now() + patience)? {
            Greeting::Version(version) => Self::greeted(wire, version),
            Greeting::Closed(e) => Err(e),
        }
    }

    fn greeted(wire: Wire, version: Version) -> Result<Self> {
        let mut client = Client {
            wire,
            next_id: 0,
            woken: false,
            jobs: None,
            migrations: 0,
            version,
            commands: HashSet::new(),
            features: None,
            timeout: answer_timeout(),
            until: None,
            timed_out: false,
        };
        client.execute("qmp_capabilities", json!({}))?;
        client.read_commands()?;
        Ok(client)
    }

    fn read_commands(&mut self) -> Result<()> {
        let list = self.execute("query-commands", json!({}))?;
        let names = list.as_array().into_iter().flatten().filter_map(|c| c.get("name")?.as_str());
        let names = names.filter(|n| n.len() <= LONGEST_NAME).take(COMMANDS);
        self.commands = names.map(str::to_string).collect();
        Ok(())
    }

    /// QEMU's version.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// Which process this is, see [`super::peer::process`].
    pub fn process(&self) -> Option<String> {
        super::peer::process(self.wire.as_raw_fd())
    }

    /// Whether QEMU once did not answer in time: it is not worth asking any more.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }

    /// Whether the command exists.
    pub fn has(&self, command: &str) -> bool {
        self.commands.contains(command)
    }

    /// Whether a guest runs here: qemu-storage-daemon has none.
    pub fn has_guest(&self) -> bool {
        self.has("query-status")
    }

    /// Whether descriptors can be handed over.
    pub fn takes_descriptors(&self) -> bool {
        self.has("add-fd") && self.wire.passes_descriptors()
    }

    /// Whether QEMU may be on another host.
    pub fn is_remote(&self) -> bool {
        !self.wire.passes_descriptors()
    }

    /// Fails with `Unsupported` if one of `commands` is missing.
    pub fn require(&self, commands: &[&str]) -> Result<()> {
        match commands.iter().find(|c| !self.has(c)) {
            Some(c) => Err(missing(c)),
            None => Ok(()),
        }
    }

    /// What the schema says this QEMU knows; asked for once.
    pub fn features(&mut self) -> Result<&Features> {
        if self.features.is_none() {
            let schema = self.execute("query-qmp-schema", json!({}))?;
            self.features = Some(Features::from_schema(&schema));
        }
        self.features
            .as_ref()
            .ok_or_else(|| Error::new(Kind::Peer, "QEMU did not describe its commands"))
    }

    /// From now on waits end with `Interrupted` once the flag is set; `None` ends that.
    pub fn interrupt_by(&mut self, flag: Option<Arc<AtomicBool>>) {
        self.wire.stop_by(flag);
    }

    /// All that is asked from now on has to be answered within `time`, however many commands it is:
    /// else many that are each just in time take for ever. `None` ends that.
    pub fn limit_total(&mut self, time: Option<Duration>) {
        self.until = time.and_then(|t| Instant::now().checked_add(t));
    }

    /// Runs a command; a refusal is an error.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Unsupported`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.call(command, arguments)??)
    }

    /// As [`Client::query`] for questions asked again and again: how often depends on time, so
    /// they are no steps (see `failpoint`).
    ///
    /// # Errors
    /// As [`Client::query`].
    pub fn poll<T: DeserializeOwned>(&mut self, command: &'static str) -> Result<T> {
        let asked = self.ask_again(command)?;
        self.result(asked)
    }

    /// As [`Client::execute`], read into `T`.
    ///
    /// # Errors
    /// As [`Client::execute`]; `Corrupt` if the answer has another shape.
    pub fn query<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        let value = self.execute(command, arguments)?;
        read(value, command)
    }

    /// Sends a question whose answer is read later, by [`Client::result`]: what is to be known of one
    /// time is asked for in one go. QEMU answers in order, and the answers have to be read in that
    /// order; one that is not read is passed over. For questions alone: what changes something is sent
    /// when the answer before has been seen.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn ask(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<PendingCommand<'static>> {
        let deadline = self.deadline();
        self.send(command, arguments, None, true, deadline)
    }

    /// As [`Client::ask`], and no step, see [`Client::poll`].
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn ask_again(&mut self, command: &'static str) -> Result<PendingCommand<'static>> {
        let deadline = self.deadline();
        self.send(command, json!({}), None, false, deadline)
    }

    /// What was answered; a refusal is a value.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn answer(&mut self, asked: PendingCommand<'_>) -> Result<Result<Value, Refusal>> {
        // Each has the time for an answer, and may bring what one answer may.
        let deadline = self.deadline();
        self.wire.rest();
        self.answer_by(asked, deadline)
    }

    fn answer_by(
        &mut self,
        asked: PendingCommand<'_>,
        deadline: Instant,
    ) -> Result<Result<Value, Refusal>> {
        let answer = self.next_answer(asked.command, asked.id, deadline)?;
        if asked.counted {
            step_of("answer", asked.command);
        }
        Ok(answer)
    }

    /// What was answered, read into `T`.
    ///
    /// # Errors
    /// As [`Client::query`].
    pub fn result<T: DeserializeOwned>(&mut self, asked: PendingCommand<'_>) -> Result<T> {
        let command = asked.command;
        read(self.answer(asked)??, command)
    }

    /// Runs a command; a refusal is a value.
    ///
    /// # Errors
    /// `Peer` if QEMU is gone, `Timeout` if it does not answer.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Result<Value, Refusal>> {
        self.call_with(command, arguments, None)
    }

    /// As [`Client::call`]; `pass` goes along (for `add-fd`).
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn call_with(
        &mut self,
        command: &str,
        arguments: Value,
        pass: Option<BorrowedFd<'_>>,
    ) -> Result<Result<Value, Refusal>> {
        let deadline = self.deadline();
        let asked = self.send(command, arguments, pass, true, deadline)?;
        self.answer_by(asked, deadline)
    }

    fn send<'a>(
        &mut self,
        command: &'a str,
        arguments: Value,
        pass: Option<BorrowedFd<'_>>,
        counted: bool,
        deadline: Instant,
    ) -> Result<PendingCommand<'a>> {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let mut request = json!({"execute": command, "id": id});
        if arguments.as_object().is_some_and(|o| !o.is_empty()) {
            request["arguments"] = arguments;
        }
        log::debug!("QMP > {request}");
        if counted {
            step_of("send", command);
        }
        let line = format!("{request}\n");
        let sent = self.wire.send(line.as_bytes(), pass, deadline);
        self.timed_out |= sent.as_ref().is_err_and(|e| e.kind() == Kind::Timeout);
        sent?;
        Ok(PendingCommand { command, id, counted })
    }

    fn next_answer(
        &mut self,
        command: &str,
        id: u64,
        deadline: Instant,
    ) -> Result<Result<Value, Refusal>> {
        loop {
            let Some(mut m) = self.wire.json(deadline)? else {
                self.timed_out = true;
                return Err(Error::new(
                    Kind::Timeout,
                    format!("QEMU did not answer {command} within {:?}", self.timeout),
                )
                .at_path(self.wire.peer()));
            };
            if self.is_event(&m) {
                continue;
            }
            log::trace!("QMP < {m}");
            if m.get("id").and_then(Value::as_u64) != Some(id) {
                // An answer to a command that timed out earlier.
                continue;
            }
            if let Some(e) = m.get("error") {
                return Ok(Err(refusal(command, e)));
            }
            return match m.get_mut("return") {
                Some(answer) => Ok(Ok(answer.take())),
                None => Err(Error::new(
                    Kind::Corrupt,
                    format!("the answer to {command} has an unknown shape"),
                )),
            };
        }
    }

    fn deadline(&self) -> Instant {
        let deadline = Instant::now() + self.timeout;
        self.until.map_or(deadline, |u| u.min(deadline))
    }

    fn is_event(&mut self, message: &Value) -> bool {
        let Some(name) = message.get("event") else { return false };
        log::debug!("QMP < {message}");
        let Some(name) = name.as_str() else { return true };
        let data = message.get("data");
        self.migrations = self.migrations.wrapping_add(u64::from(name == "MIGRATION"));
        self.woken |= ends_a_wait(name, data);
        if let Some((own, heard)) = &mut self.jobs {
            self.woken |= heard.note(own, name, data);
        }
        true
    }

    /// From now on what is heard of jobs is kept, but for those whose names begin with `own`. The
    /// beginning of a job also ends [`Client::pause`].
    pub fn listen_to_jobs(&mut self, own: &str) {
        self.jobs = Some((own.to_string(), JobEvents::default()));
    }

    /// What was heard of jobs since the last time. QEMU tells of what happened before it answers
    /// what was asked later.
    pub fn job_events(&mut self) -> JobEvents {
        self.jobs.as_mut().map(|(_, heard)| std::mem::take(heard)).unwrap_or_default()
    }

    /// How many events of migrations came so far. (QEMU sends them with the capability `events`.)
    pub fn migration_events(&self) -> u64 {
        self.migrations
    }

    /// Waits until `deadline`, or until a job or an export may have come to its end, or a job is paused.
    ///
    /// # Errors
    /// `Peer` if QEMU is gone, `Interrupted` if the flag given to [`Client::interrupt_by`] is set.
    pub fn pause(&mut self, deadline: Instant) -> Result<()> {
        self.wire.rest();
        self.check_interrupt()?;
        while !std::mem::take(&mut self.woken) {
            let Some(m) = self.wire.json(deadline)? else { break };
            self.is_event(&m);
        }
        Ok(())
    }

    /// `Interrupted` if a signal or `cancel` asked for the end.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check_interrupt(&self) -> Result<()> {
        self.wire.check_stop()
    }
}

/// What comes first on a connection.
enum Greeting {
    Version(Version),
    /// It was ended before anything came.
    Closed(Error),
}

/// Reads the greeting. What QEMU was still answering to a client that died may come before it.
fn greeting(wire: &mut Wire, deadline: Instant) -> Result<Greeting> {
    let mut silent = true;
    loop {
        let line = match wire.json(deadline) {
            Ok(Some(line)) => line,
            Ok(None) if wire.has_fragment() => return Err(not_qmp(wire.peer())),
            Ok(None) => return Err(in_use(Path::new(wire.peer()))),
            Err(e) if e.kind() == Kind::Corrupt => return Err(not_qmp(wire.peer())),
            Err(e) if e.kind() == Kind::Peer && silent && !wire.has_fragment() => {
                return Ok(Greeting::Closed(e));
            }
            Err(e) => return Err(e),
        };
        silent = false;
        if let Some(version) = Version::from_greeting(&line) {
            return Ok(Greeting::Version(version));
        }
        let answers = line.get("return").or(line.get("error")).and(line.get("id")).is_some();
        if !answers && line.get("event").is_none() {
            return Err(not_qmp(wire.peer()));
        }
    }
}

/// Reads an answer.
fn read<T: DeserializeOwned>(answer: Value, command: &str) -> Result<T> {
    check_length(&answer, command)?;
    serde_json::from_value(answer).map_err(|e| {
        Error::new(Kind::Corrupt, format!("the answer to {command} has an unknown shape"))
            .with_source(e)
    })
}

/// Refuses a list that no machine has: what is read from it would take memory and time.
///
/// # Errors
/// `Corrupt`.
pub(crate) fn check_length(answer: &Value, command: &str) -> Result<()> {
    let len = |v: &Value| v.as_array().map_or(0, Vec::len);
    let parts = answer.as_object().into_iter().flat_map(|o| o.values()).map(len);
    if parts.chain([len(answer)]).max() <= Some(LONGEST_LIST) {
        return Ok(());
    }
    let what = format!("the answer to {command} has more than {LONGEST_LIST} entries");
    Err(Error::new(Kind::Corrupt, what))
}

fn refusal(command: &str, e: &Value) -> Refusal {
    let text = |k: &str| e.get(k).and_then(Value::as_str).unwrap_or("(no reason)");
    // QEMU repeats what it was given, and says at the end what is wrong with it.
    let text = |k: &str| clip(text(k), LONGEST_REASON);
    Refusal { class: text("class"), desc: text("desc"), command: command.to_string() }
}

fn not_qmp(peer: &str) -> Error {
    Error::new(Kind::Peer, "this is not a QMP socket: no QMP greeting")
        .at_path(peer)
        .remedy("a human monitor needs mode=control; the guest agent's socket belongs to --agent")
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
