//! The guest agent: freezing and thawing the guest's file systems.
//!
//! The agent's socket serves one client, and whatever an earlier client asked may still be in
//! it: every session begins with `guest-sync-delimited`, whose answer is marked by a byte 0xff.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::steps::step;
use super::wire::{Address, Wire};
use crate::error::{Error, Kind, Result};

/// A session with the agent.
#[derive(Debug)]
pub struct Agent {
    wire: Wire,
}

impl Agent {
    /// Connects and synchronises.
    ///
    /// # Errors
    /// `Timeout` if no agent answers (none runs, or another client holds the socket).
    pub fn connect(address: &Address, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let mut agent = Agent { wire: Wire::connect(address, timeout)? };
        agent.sync(deadline)?;
        Ok(agent)
    }

    fn sync(&mut self, deadline: Instant) -> Result<()> {
        let id = u64::from(std::process::id()) & 0x7fff_ffff;
        // The leading 0xff makes the agent drop half a command of an earlier client.
        let mut bytes = vec![0xff];
        let request = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        bytes.extend_from_slice(format!("{request}\n").as_bytes());
        self.wire.send(&bytes, None, deadline)?;
        loop {
            let Some(line) = self.wire.line(deadline)? else { return Err(self.silent()) };
            let start = line.iter().rposition(|b| *b == 0xff).map_or(0, |at| at.saturating_add(1));
            let answer = line.get(start..).and_then(|l| serde_json::from_slice::<Value>(l).ok());
            if answer.and_then(|a| a.get("return")?.as_u64()) == Some(id) {
                return Ok(());
            }
        }
    }

    /// Runs one command.
    ///
    /// # Errors
    /// `Timeout`; `Peer` with the agent's own words.
    pub fn execute(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        let request = json!({"execute": command, "arguments": arguments});
        step(&format!("agent {command}"));
        self.wire.send(format!("{request}\n").as_bytes(), None, deadline)?;
        let Some(mut answer) = self.wire.json(deadline)? else { return Err(self.silent()) };
        step(&format!("agent answered {command}"));
        if let Some(e) = answer.get("error") {
            let desc = e.get("desc").and_then(Value::as_str).unwrap_or("(no reason)");
            return Err(Error::new(Kind::Peer, format!("the agent refused {command}: {desc}")));
        }
        Ok(answer.get_mut("return").map(Value::take).unwrap_or_default())
    }

    /// Whether the guest's file systems are frozen now.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub fn is_frozen(&mut self, timeout: Duration) -> Result<bool> {
        let v = self.execute("guest-fsfreeze-status", json!({}), timeout)?;
        Ok(v.as_str() == Some("frozen"))
    }

    /// Freezes all file systems, or those mounted at `mountpoints`. Gives how many.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub fn freeze(&mut self, mountpoints: &[String], timeout: Duration) -> Result<u64> {
        let v = if mountpoints.is_empty() {
            self.execute("guest-fsfreeze-freeze", json!({}), timeout)?
        } else {
            let arguments = json!({"mountpoints": mountpoints});
            self.execute("guest-fsfreeze-freeze-list", arguments, timeout)?
        };
        Ok(v.as_u64().unwrap_or(0))
    }

    /// Thaws all file systems. Gives how many were frozen.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub fn thaw(&mut self, timeout: Duration) -> Result<u64> {
        Ok(self.execute("guest-fsfreeze-thaw", json!({}), timeout)?.as_u64().unwrap_or(0))
    }

    /// The mount points that the guest has.
    ///
    /// # Errors
    /// As [`Agent::execute`].
    pub fn mountpoints(&mut self, timeout: Duration) -> Result<Vec<String>> {
        let v = self.execute("guest-get-fsinfo", json!({}), timeout)?;
        let list = v.as_array().into_iter().flatten();
        Ok(list.filter_map(|f| Some(f.get("mountpoint")?.as_str()?.to_string())).collect())
    }

    fn silent(&self) -> Error {
        Error::new(Kind::Timeout, "the guest agent does not answer")
            .at_path(self.wire.peer())
            .remedy("is qemu-guest-agent running in the guest, and nobody else on its socket?")
    }
}
