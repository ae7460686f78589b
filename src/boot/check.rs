//! Whether a test VM comes up.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::ports::GuestPort;
use super::running::{LOOK, Running};
use crate::error::{Error, Kind, Result};
use crate::qmp::guest_command::{self, Executed, Ran};

/// How long the agent is given for one answer before it is asked anew.
const AGENT_ANSWER: Duration = Duration::from_secs(2);

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
    let Running { agent, cancel, .. } = vm;
    let may_wait = || !cancel.load(Ordering::SeqCst);
    match guest_command::run(agent, command, deadline, may_wait) {
        Err(e) => (Err(format!("the command cannot be run in the guest: {}", e.report())), None),
        Ok(ran) => {
            let verdict = ran.verdict();
            let Ran::Ended(done) = ran else { return (verdict, None) };
            (verdict, Some(done))
        }
    }
}
