//! The guest agent: freezing and thawing the guest's file systems.
//!
//! The agent's socket serves one client, and whatever an earlier client asked may still be in
//! it: every session begins with `guest-sync-delimited`, whose answer is marked by a byte 0xff.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::address::Address;
use super::budget::{self, short};
use super::socket::Socket;
use super::wire::{Limits, Wire};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step_of;

/// Memory that the answer to a synchronisation may take, in bytes: it is a number. What is larger
/// is another's answer.
const SYNC_MEMORY: usize = 64 << 10;

/// How many bytes of mount points' names are kept: they go into the manifest of each disk.
const MOUNTPOINTS: usize = 16 << 10;

/// A session with the agent.
#[derive(Debug)]
pub(crate) struct Agent {
    wire: Wire,
    /// How often it was synchronised: each time with a number of its own.
    syncs: u32,
}

impl Agent {
    /// Connects and synchronises.
    ///
    /// # Errors
    /// `Timeout` if no agent answers (none runs, or another client holds the socket).
    pub(crate) fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let wire = Wire::connect(address, timeout, Limits::AGENT).map_err(|e| match e.kind() {
            Kind::NotFound => e.remedy(
                "is QEMU running, and is this the path of the -chardev socket of its \
                 org.qemu.guest_agent.0 port?",
            ),
            _ => e,
        })?;
        let mut agent = Agent { wire, syncs: 0 };
        agent.sync(deadline)?;
        Ok(agent)
    }

    /// The agent of a guest that we have started ourselves, at the other end of `stream`. Whether it is up, tells
    /// [`Agent::answers`].
    ///
    /// # Errors
    /// The socket cannot be set up.
    pub(crate) fn over(stream: UnixStream) -> Result<Self> {
        let socket = Socket::accepted(stream, "the guest agent")?;
        Ok(Agent { wire: Wire::over(socket, Limits::AGENT), syncs: 0 })
    }

    /// Whether it answers within `patience`.
    ///
    /// # Errors
    /// QEMU is gone, or a signal ends it.
    pub(crate) fn answers(&mut self, patience: Duration) -> Result<bool> {
        match self.sync(Instant::now() + patience) {
            Err(e) if e.kind() == Kind::Timeout => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Drops whatever is still to come of earlier commands: an answer that came too late must not
    /// be taken for the next command's.
    fn sync(&mut self, deadline: Instant) -> Result<()> {
        self.syncs = self.syncs.wrapping_add(1);
        let id = (u64::from(std::process::id()) << 20 | u64::from(self.syncs)) & 0x7fff_ffff;
        // The leading 0xff makes the agent drop half a command of an earlier client.
        let mut bytes = vec![0xff];
        let request = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        bytes.extend_from_slice(format!("{request}\n").as_bytes());
        self.wire.send(&bytes, None, deadline)?;
        loop {
            let Some(line) = self.wire.line(deadline)? else {
                return Err(silent(self.wire.peer()));
            };
            if line.is_empty() {
                continue;
            }
            let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at.saturating_add(1));
            let answer = line.get(start..).and_then(|l| budget::parse(l, SYNC_MEMORY).ok());
            if answer.and_then(|a| a.get("return")?.as_u64()) == Some(id) {
                return Ok(());
            }
        }
    }

    /// Runs one command.
    ///
    /// # Errors
    /// `Timeout`; `Peer` with the agent's own words.
    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value> {
        let answer = self.ask(command, arguments, timeout)?;
        answer.map_err(|why| Error::new(Kind::Peer, format!("the agent refused {command}: {why}")))
    }

    /// As [`Agent::execute`], where a refusal is no error: then the agent's words.
    ///
    /// # Errors
    /// As [`Agent::execute`], but for a refusal.
    pub(crate) fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<std::result::Result<Value, String>> {
        let deadline = Instant::now() + timeout;
        let request = json!({"execute": command, "arguments": arguments});
        step_of("agent", command);
        self.wire.send(format!("{request}\n").as_bytes(), None, deadline)?;
        let Some(mut answer) = self.wire.json(deadline)? else {
            return Err(silent(self.wire.peer()));
        };
        step_of("agent answered", command);
        if let Some(e) = answer.get("error") {
            let desc = e.get("desc").and_then(Value::as_str).unwrap_or("(no reason)");
            return Ok(Err(short(desc)));
        }
        answer.get_mut("return").map(Value::take).ok_or_else(|| strange(command)).map(Ok)
    }

    /// Whether the guest's file systems are frozen now.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub(crate) fn is_frozen(&mut self, timeout: Duration) -> Result<bool> {
        let command = "guest-fsfreeze-status";
        match self.execute(command, json!({}), timeout)?.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            _ => Err(strange(command)),
        }
    }

    /// Freezes all file systems, or those mounted at `mountpoints`. Gives how many.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub(crate) fn freeze(&mut self, mountpoints: &[String], timeout: Duration) -> Result<u64> {
        let v = if mountpoints.is_empty() {
            self.execute("guest-fsfreeze-freeze", json!({}), timeout)?
        } else {
            let arguments = json!({"mountpoints": mountpoints});
            self.execute("guest-fsfreeze-freeze-list", arguments, timeout)?
        };
        v.as_u64().ok_or_else(|| strange("the freeze"))
    }

    /// Thaws all file systems, also where the freeze before it was answered too late or not yet.
    /// Gives how many were frozen.
    ///
    /// # Errors
    /// As [`Agent::execute`]; `Peer` if the guest is frozen still.
    pub(crate) fn thaw(&mut self, timeout: Duration) -> Result<u64> {
        let deadline = Instant::now() + timeout;
        self.sync(deadline)?;
        let left = |d: Instant| d.saturating_duration_since(Instant::now());
        let thawed = self.execute("guest-fsfreeze-thaw", json!({}), left(deadline))?;
        if self.is_frozen(left(deadline).max(Duration::from_secs(1)))? {
            return Err(Error::new(Kind::Peer, "the guest is still frozen after a thaw"));
        }
        Ok(thawed.as_u64().unwrap_or(0))
    }

    /// The mount points that the guest has; none if they are too many to be kept.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub(crate) fn mountpoints(&mut self, timeout: Duration) -> Result<Vec<String>> {
        let v = self.execute("guest-get-fsinfo", json!({}), timeout)?;
        let list = v.as_array().into_iter().flatten();
        let names: Vec<&str> = list.filter_map(|f| f.get("mountpoint")?.as_str()).collect();
        if names.iter().map(|n| n.len().saturating_add(16)).fold(0, usize::saturating_add)
            > MOUNTPOINTS
        {
            return Ok(Vec::new());
        }
        Ok(names.into_iter().map(str::to_string).collect())
    }
}

fn silent(peer: &str) -> Error {
    Error::new(Kind::Timeout, "the guest agent does not answer")
        .at_path(peer)
        .remedy("is qemu-guest-agent running in the guest, and no other program on its socket?")
}

fn strange(command: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the agent's answer to {command} has an unknown shape"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    const WAIT: Duration = Duration::from_secs(20);

    /// An agent that answers a freeze only when the next command has come.
    fn slow_agent(listener: UnixListener) {
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).split(b'\n');
        let mut late = None;
        for line in lines.map_while(std::result::Result::ok) {
            let start = line.iter().position(|b| *b == b'{').unwrap_or(0);
            let request: Value = serde_json::from_slice(&line[start..]).unwrap();
            let answer = match request["execute"].as_str().unwrap() {
                "guest-sync-delimited" => request["arguments"]["id"].clone(),
                "guest-fsfreeze-freeze" => {
                    late = Some(json!({"return": 3}));
                    continue;
                }
                "guest-fsfreeze-thaw" => json!(2),
                _ => json!("thawed"),
            };
            if let Some(l) = late.take() {
                writeln!(stream, "{l}").unwrap();
            }
            let mark: &[u8] = if request["arguments"]["id"].is_u64() { &[0xff] } else { &[] };
            stream.write_all(mark).unwrap();
            writeln!(stream, "{}", json!({"return": answer})).unwrap();
        }
    }

    #[test]
    fn a_late_answer_to_the_freeze_is_not_the_thaws() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let served = std::thread::spawn(move || slow_agent(listener));
        let mut agent = Agent::connect(&Address::Unix(path), WAIT).unwrap();
        let e = agent.freeze(&[], Duration::from_millis(50)).unwrap_err();
        assert_eq!(e.kind(), Kind::Timeout);
        assert_eq!(agent.thaw(WAIT).unwrap(), 2);
        drop(agent);
        served.join().unwrap();
    }

    /// An agent that answers commands by what `answer` makes of their names.
    fn agent_of(answer: impl Fn(&str) -> Value + Send + 'static) -> (tempfile::TempDir, Agent) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let lines = BufReader::new(stream.try_clone().unwrap()).split(b'\n');
            for line in lines.map_while(std::result::Result::ok) {
                let start = line.iter().position(|b| *b == b'{').unwrap_or(0);
                let request: Value = serde_json::from_slice(&line[start..]).unwrap();
                let said = match request["execute"].as_str().unwrap() {
                    "guest-sync-delimited" => request["arguments"]["id"].clone(),
                    command => answer(command),
                };
                // Nobody may be there any more.
                writeln!(stream, "{}", json!({"return": said})).unwrap_or_default();
            }
        });
        let agent = Agent::connect(&Address::Unix(path), WAIT).unwrap();
        (dir, agent)
    }

    #[test]
    fn a_thaw_that_thawed_nothing_is_none() {
        for state in ["frozen", "thawed", "melting"] {
            let (_dir, mut agent) = agent_of(move |command| match command {
                "guest-fsfreeze-thaw" => json!(2),
                _ => json!(state),
            });
            assert_eq!(agent.thaw(WAIT).is_ok(), state == "thawed", "{state}");
        }
    }

    /// The guest says what they are, and each point keeps them.
    #[test]
    fn mount_points_are_taken_if_they_are_few() {
        for (count, taken) in [(0, 0), (100, 100), (1000, 0)] {
            let (_dir, mut agent) = agent_of(move |_| {
                let one = |i: usize| json!({"mountpoint": format!("/mnt/{i}")});
                (0..count).map(one).collect()
            });
            assert_eq!(agent.mountpoints(WAIT).unwrap().len(), taken, "{count}");
        }
    }
}
