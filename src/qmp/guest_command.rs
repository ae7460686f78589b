//! Commands in the guest, run by its agent (`guest-exec`, see QEMU's guest agent protocol).
//!
//! The agent is not trusted: what a command is said to have written is bounded, and each wait ends.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::agent::Agent;
use crate::error::Result;

/// How long the agent is given for one answer, at most; and at least, also where a command's time is over.
const ANSWER: Duration = Duration::from_secs(60);
const LEAST_ANSWER: Duration = Duration::from_secs(1);
/// How long to wait before it is asked whether a command has ended: at first, and at most.
const LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// Of what a command wrote, so much is kept, in bytes of base64.
const LONGEST_OUTPUT: usize = 1 << 20;

/// What a command in the guest did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Executed {
    /// Its exit code; `None` if a signal ended it.
    pub exit_code: Option<i64>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// How running a command went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ran {
    /// It has ended.
    Ended(Executed),
    /// It runs on: it took too long, or nobody waits for it any more.
    RunsOn,
    /// It was not begun: why, in the agent's words.
    Refused(String),
}

impl Ran {
    /// What is wrong with it, in words; `Ok` if the command ended with 0.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        match self {
            Ran::Refused(why) => Err(format!("the guest agent does not run the command: {why}")),
            Ran::RunsOn => Err("the command in the guest did not end in time".into()),
            Ran::Ended(Executed { exit_code: Some(0), .. }) => Ok(()),
            Ran::Ended(Executed { exit_code: None, .. }) => {
                Err("a signal ended the command in the guest".into())
            }
            Ran::Ended(Executed { exit_code: Some(code), .. }) => {
                Err(format!("the command in the guest ended with {code}"))
            }
        }
    }
}

/// Runs a command by the guest's shell until `deadline`, as long as `may_wait`. It is not ended where it is not waited
/// for any longer: no agent can do that.
///
/// # Errors
/// As [`Agent::ask`]: the command may have been begun.
pub(crate) fn run(
    agent: &mut Agent,
    command: &str,
    deadline: Instant,
    may_wait: impl Fn() -> bool,
) -> Result<Ran> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let answer = || left().clamp(LEAST_ANSWER, ANSWER);
    // Not every agent says what it runs on.
    let windows = agent
        .ask("guest-get-osinfo", json!({}), answer())?
        .is_ok_and(|info| info.get("id").is_some_and(|id| id == "mswindows"));
    let (shell, option) = if windows { ("cmd.exe", "/c") } else { ("/bin/sh", "-c") };
    let what = json!({"path": shell, "arg": [option, command], "capture-output": true});
    let begun = match agent.ask("guest-exec", what, answer())? {
        Ok(begun) => json!({"pid": begun.get("pid")}),
        Err(why) => return Ok(Ran::Refused(why)),
    };
    let (mut pause, longest) = LOOK;
    loop {
        let status = match agent.ask("guest-exec-status", begun.clone(), answer())? {
            Ok(status) => status,
            Err(_) => return Ok(Ran::RunsOn),
        };
        if status.get("exited").and_then(Value::as_bool) == Some(true) {
            return Ok(Ran::Ended(Executed {
                exit_code: status.get("exitcode").and_then(Value::as_i64),
                stdout: output(status.get("out-data")),
                stderr: output(status.get("err-data")),
            }));
        }
        if Instant::now() >= deadline || !may_wait() {
            return Ok(Ran::RunsOn);
        }
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2).min(longest);
    }
}

fn output(data: Option<&Value>) -> String {
    let text = data.and_then(Value::as_str).unwrap_or_default();
    let text = text.get(..LONGEST_OUTPUT).unwrap_or(text);
    String::from_utf8_lossy(&decoded(text)).into_owned()
}

/// Base64 (RFC 4648), as far as it is that.
fn decoded(text: &str) -> Vec<u8> {
    let value = |b: u8| match b {
        b'A'..=b'Z' => Some(b - b'A'),
        b'a'..=b'z' => Some(b - b'a' + 26),
        b'0'..=b'9' => Some(b - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut out = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for v in text.bytes().map_while(value) {
        bits = bits << 6 | u32::from(v);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648, section 10.
    #[test]
    fn base64_is_that_of_its_rfc() {
        let all = [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmE=", "fooba"),
            ("Zm9vYmFy", "foobar"),
        ];
        for (text, bytes) in all {
            assert_eq!(decoded(text), bytes.as_bytes(), "{text}");
        }
        assert_eq!(decoded("/+8="), [0xff, 0xef]);
        assert_eq!(decoded("Zm9v\u{e9}Zm9v"), b"foo");
    }
}
