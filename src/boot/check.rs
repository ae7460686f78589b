//! Whether a test VM comes up.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::ports::GuestPort;
use super::running::{LOOK, Running};
use crate::error::{Error, Kind, Result};

/// How long the agent is given for one answer before it is asked anew.
const AGENT_ANSWER: Duration = Duration::from_secs(2);
/// How long it is given for an answer once it is up.
const AGENT_COMMAND: Duration = Duration::from_secs(60);
/// Of what a command in the guest wrote, so much is kept, in bytes of base64.
const LONGEST_OUTPUT: usize = 1 << 20;

/// What has to be seen before a guest counts as up: all of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Criteria {
    /// The guest agent answers.
    pub agent: bool,
    /// What is expected on the serial port has come.
    pub serial: bool,
    /// This TCP port answers.
    pub tcp: Option<u16>,
    /// This command, run in the guest, ends with 0.
    pub exec: Option<String>,
    /// How long all that may take.
    pub timeout: Duration,
}

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

/// How a check ended.
#[derive(Debug)]
pub(crate) struct Checked {
    /// Whether the guest came up, and the command in it ended well.
    pub passed: bool,
    /// Why, in words.
    pub reason: String,
    /// How long it took until it was up, or given up.
    pub took: Duration,
    /// What a command in the guest did.
    pub exec: Option<Executed>,
    /// The console at the end, as PNG, or why there is no picture.
    pub picture: std::result::Result<Vec<u8>, String>,
    /// The last that came over the serial port.
    pub serial: String,
    /// What could not be read or written of the disks.
    pub disk_errors: Vec<String>,
}

/// What is still waited for.
struct Waiting {
    agent: bool,
    serial: bool,
    tcp: Option<GuestPort>,
}

/// Waits until a VM is up, and looks at it.
///
/// # Errors
/// `Interrupted`; `NoSpace` if what the guest wrote had no room, which says nothing of the point. That it does not come
/// up is no error.
pub(crate) fn check(mut vm: Running, criteria: &Criteria) -> Result<Checked> {
    let begun = Instant::now();
    let deadline = begun + criteria.timeout;
    let mut verdict = wait(&mut vm, criteria, deadline);
    let mut exec = None;
    if let (Ok(()), Some(command)) = (&verdict, &criteria.exec) {
        (verdict, exec) = run(&mut vm, command, deadline);
    }
    if vm.cancel.load(Ordering::SeqCst) {
        return Err(Error::new(Kind::Interrupted, "interrupted"));
    }
    if verdict.is_err() && vm.is_full() {
        let what = "no space left for what the guest writes";
        let remedy = "give it more (--scratch-size), or another folder (--scratch)";
        return Err(Error::new(Kind::NoSpace, what).remedy(remedy));
    }
    let took = begun.elapsed();
    let picture = match vm.has_ended() {
        true => Err("QEMU has ended".to_string()),
        false => vm.picture().map_err(|e| e.report()),
    };
    let said = vm.end();
    let disk_errors = vm.disk_errors();
    let (passed, mut reason) = match verdict {
        Ok(()) => (true, seen(criteria)),
        Err(reason) => (false, reason),
    };
    if !passed && !said.is_empty() {
        reason += &format!("; QEMU said: {said}");
    }
    if let (false, Some(first)) = (passed, disk_errors.first()) {
        reason += &format!("; a disk could not be read or written: {first}");
    }
    let serial = vm.serial.last();
    Ok(Checked { passed, reason, took, exec, picture, serial, disk_errors })
}

fn seen(criteria: &Criteria) -> String {
    let mut all = Vec::new();
    all.extend(criteria.agent.then(|| "the guest agent answers".to_string()));
    all.extend(criteria.serial.then(|| "what was expected came over the serial port".to_string()));
    all.extend(criteria.tcp.map(|port| format!("TCP port {port} answers")));
    all.extend(criteria.exec.as_ref().map(|_| "the command in the guest ended with 0".to_string()));
    all.join(", ")
}

/// Waits for all that the criteria say; why it did not come otherwise.
fn wait(vm: &mut Running, criteria: &Criteria, deadline: Instant) -> Result<(), String> {
    let mut waiting = Waiting {
        agent: criteria.agent,
        serial: criteria.serial,
        tcp: criteria.tcp.map(GuestPort::new),
    };
    loop {
        let looked = look(vm, &mut waiting);
        if !waiting.agent && !waiting.serial && waiting.tcp.is_none() {
            return Ok(());
        }
        if vm.cancel.load(Ordering::SeqCst) {
            return Err("interrupted".into());
        }
        if vm.has_ended() {
            return Err("the guest was shut off, or QEMU has ended, before it was up".into());
        }
        // What QEMU could not be asked while it ends, it cannot be asked the next time either.
        looked.map_err(|e| e.report())?;
        if Instant::now() >= deadline {
            return Err(missing(&waiting, criteria));
        }
        std::thread::sleep(LOOK);
    }
}

fn missing(waiting: &Waiting, criteria: &Criteria) -> String {
    let mut all = Vec::new();
    all.extend(waiting.agent.then(|| "the guest agent does not answer".to_string()));
    all.extend(
        waiting.serial.then(|| "nothing that was expected came over the serial port".into()),
    );
    let port = criteria.tcp.filter(|_| waiting.tcp.is_some());
    all.extend(port.map(|port| format!("TCP port {port} does not answer")));
    format!("{} within {} s", all.join(", "), criteria.timeout.as_secs())
}

/// Looks once.
fn look(vm: &mut Running, waiting: &mut Waiting) -> Result<()> {
    vm.serve_display()?;
    waiting.serial &= !vm.serial.matched();
    if let Some(port) = &mut waiting.tcp
        && port.answers(&mut vm.qmp)?
    {
        waiting.tcp = None;
    }
    if waiting.agent {
        waiting.agent = !vm.agent.answers(AGENT_ANSWER)?;
    }
    Ok(())
}

/// Runs a command in the guest, by its shell.
fn run(
    vm: &mut Running,
    command: &str,
    deadline: Instant,
) -> (Result<(), String>, Option<Executed>) {
    match executed(vm, command, deadline) {
        Err(e) => (Err(format!("the command cannot be run in the guest: {}", e.report())), None),
        Ok(None) => (Err("the command in the guest did not end in time".into()), None),
        Ok(Some(done)) => {
            let verdict = match done.exit_code {
                Some(0) => Ok(()),
                Some(code) => Err(format!("the command in the guest ended with {code}")),
                None => Err("a signal ended the command in the guest".into()),
            };
            (verdict, Some(done))
        }
    }
}

fn executed(vm: &mut Running, command: &str, deadline: Instant) -> Result<Option<Executed>> {
    let info = vm.agent.execute("guest-get-osinfo", json!({}), AGENT_COMMAND);
    let windows = info.is_ok_and(|i| i["id"] == "mswindows");
    let (shell, option) = if windows { ("cmd.exe", "/c") } else { ("/bin/sh", "-c") };
    let what = json!({"path": shell, "arg": [option, command], "capture-output": true});
    let begun = vm.agent.execute("guest-exec", what, AGENT_COMMAND)?;
    let pid = json!({"pid": begun["pid"]});
    loop {
        let status = vm.agent.execute("guest-exec-status", pid.clone(), AGENT_COMMAND)?;
        if status["exited"].as_bool() == Some(true) {
            return Ok(Some(Executed {
                exit_code: status["exitcode"].as_i64(),
                stdout: output(&status["out-data"]),
                stderr: output(&status["err-data"]),
            }));
        }
        if Instant::now() >= deadline || vm.cancel.load(Ordering::SeqCst) {
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

fn output(data: &Value) -> String {
    let text = data.as_str().unwrap_or_default();
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
