//! A QMP client: greeting, capabilities, commands with ids, events in a queue.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::events::Event;
use super::steps::step;
use super::types::{Features, Version};
use super::wire::{Address, Wire, in_use};
use crate::error::{Error, Kind, Result};

/// How long a command may take by default. blockdev-del flushes, stop drains: on a slow disk
/// that takes seconds, on a hung one for ever.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How long to wait for the greeting. QEMU sends it as soon as it accepts.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a wait looks whether it was interrupted.
const SLICE: Duration = Duration::from_millis(100);

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
        Error::new(Kind::Peer, format!("QEMU refused {}: {}", r.command, r.desc))
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
    events: VecDeque<Event>,
    version: Version,
    commands: HashSet<String>,
    features: Option<Features>,
    timeout: Duration,
    interrupt: Option<Arc<AtomicBool>>,
    uncounted: bool,
    timed_out: bool,
}

impl Client {
    /// Connects and enters command mode.
    ///
    /// # Errors
    /// `Busy` if another client holds the socket, `Peer` or `Corrupt` if it is not QMP, and as
    /// [`Wire::connect`].
    pub fn connect(address: &Address) -> Result<Self> {
        Self::connect_within(address, GREETING_TIMEOUT)
    }

    /// As [`Client::connect`], with `patience` for the greeting.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_within(address: &Address, patience: Duration) -> Result<Self> {
        let mut wire = Wire::connect(address, patience).map_err(|e| match e.kind() {
            Kind::NotFound => e.remedy(
                "is QEMU running, and is this the path in its -qmp unix:PATH,server=on,wait=off?",
            ),
            _ => e,
        })?;
        let greeting = match wire.json(Instant::now() + patience) {
            Ok(Some(g)) => g,
            Ok(None) if wire.has_fragment() => return Err(not_qmp(wire.peer())),
            Ok(None) => return Err(in_use(Path::new(wire.peer()))),
            Err(e) if e.kind() == Kind::Corrupt => return Err(not_qmp(wire.peer())),
            Err(e) => return Err(e),
        };
        let Some(version) = Version::from_greeting(&greeting) else {
            return Err(not_qmp(wire.peer()));
        };
        let mut client = Client {
            wire,
            next_id: 0,
            events: VecDeque::new(),
            version,
            commands: HashSet::new(),
            features: None,
            timeout: COMMAND_TIMEOUT,
            interrupt: None,
            uncounted: false,
            timed_out: false,
        };
        client.execute("qmp_capabilities", json!({}))?;
        client.read_commands()?;
        Ok(client)
    }

    fn read_commands(&mut self) -> Result<()> {
        let list = self.execute("query-commands", json!({}))?;
        let names = list.as_array().into_iter().flatten().filter_map(|c| c.get("name")?.as_str());
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
        self.interrupt = flag;
    }

    /// The time a command may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Runs a command; a refusal is an error.
    ///
    /// # Errors
    /// `Peer`, `Timeout`, `Unsupported`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.call(command, arguments)??)
    }

    /// As [`Client::query`] for questions asked again and again: how often depends on time, so
    /// they are no steps (see [`super::steps`]).
    ///
    /// # Errors
    /// As [`Client::query`].
    pub fn poll<T: DeserializeOwned>(&mut self, command: &str) -> Result<T> {
        self.uncounted = true;
        let answer = self.query(command, json!({}));
        self.uncounted = false;
        answer
    }

    /// As [`Client::execute`], read into `T`.
    ///
    /// # Errors
    /// As [`Client::execute`]; `Corrupt` if the answer has another shape.
    pub fn query<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        let value = self.execute(command, arguments)?;
        serde_json::from_value(value).map_err(|e| {
            Error::new(Kind::Corrupt, format!("the answer to {command} has an unknown shape"))
                .with_source(e)
        })
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
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let mut request = json!({"execute": command, "id": id});
        if arguments.as_object().is_some_and(|o| !o.is_empty()) {
            request["arguments"] = arguments;
        }
        log::debug!("QMP > {request}");
        let counted = !self.uncounted;
        if counted {
            step(&format!("send {command}"));
        }
        let deadline = Instant::now() + self.timeout;
        let line = format!("{request}\n");
        let sent = self.wire.send(line.as_bytes(), pass, deadline);
        self.timed_out |= sent.as_ref().is_err_and(|e| e.kind() == Kind::Timeout);
        sent?;
        let answer = self.answer(command, id, deadline)?;
        if counted {
            step(&format!("answer {command}"));
        }
        Ok(answer)
    }

    fn answer(
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
            if m.get("event").is_some() {
                self.keep(m);
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
            return Ok(Ok(m.get_mut("return").map(Value::take).unwrap_or_default()));
        }
    }

    fn keep(&mut self, message: Value) {
        log::debug!("QMP < {message}");
        if let Ok(e) = serde_json::from_value::<Event>(message) {
            // Nobody needs more than this; a flood (BLOCK_IO_ERROR) must not eat memory.
            if self.events.len() >= 10_000 {
                self.events.pop_front();
            }
            self.events.push_back(e);
        }
    }

    /// Takes the events that have arrived so far.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// Waits for the next event until `deadline`; `None` if there was none.
    ///
    /// # Errors
    /// `Peer` if QEMU is gone, `Interrupted` if the flag given to [`Client::interrupt_by`] is set.
    pub fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>> {
        loop {
            if let Some(e) = self.events.pop_front() {
                return Ok(Some(e));
            }
            self.check_interrupt()?;
            let now = Instant::now();
            if now >= deadline {
                return Ok(None);
            }
            let slice = deadline.min(now + SLICE);
            if let Some(m) = self.wire.json(slice)?
                && m.get("event").is_some()
            {
                self.keep(m);
            }
        }
    }

    /// `Interrupted` if a signal or `cancel` asked for the end.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check_interrupt(&self) -> Result<()> {
        match &self.interrupt {
            Some(f) if f.load(Ordering::SeqCst) => {
                Err(Error::new(Kind::Interrupted, "ended by a signal or by cancel"))
            }
            _ => Ok(()),
        }
    }
}

fn refusal(command: &str, e: &Value) -> Refusal {
    let text = |k: &str| e.get(k).and_then(Value::as_str).unwrap_or("(no reason)").to_string();
    Refusal { class: text("class"), desc: text("desc"), command: command.to_string() }
}

fn not_qmp(peer: &str) -> Error {
    Error::new(Kind::Peer, "this is not a QMP socket: no QMP greeting")
        .at_path(peer)
        .remedy("a human monitor needs mode=control; the guest agent's socket belongs to --agent")
}
