//! A step of a night as a process of its own: one that hangs or dies ends no other. It is asked to end where the night is,
//! or its time is over, and is waited for, so that it undoes what it did to a guest; it is asked the same by the kernel
//! where this process is killed.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

use crate::cli::verbosity;
use crate::error::{Error, Kind, Result};
use crate::output;
use crate::qemu_img::tie_by;
use crate::text::visible;

/// How often it is looked at whether a process has ended, or has to.
const TICK: Duration = Duration::from_millis(50);
/// How long one that was asked to end may undo, before it is killed: longer than what it waits for itself.
pub(super) const GRACE: Duration = Duration::from_secs(600);
/// How long the last words of a process that has ended are waited for: what it left behind may hold its output open.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// How long one that was killed may take to end: in a call to a dead server it never does.
const KILLED: Duration = Duration::from_secs(30);
/// The longest line, and the most that a document may have.
const MAX_LINE: u64 = 1 << 20;
const MAX_DOCUMENT: usize = 16 << 20;
/// What is kept of a warning or of an error, in characters: the environment of a command has to hold it.
const LONGEST_TEXT: usize = 2000;
/// Events that are kept of one process.
const MOST_EVENTS: usize = 1000;

/// What a process prints on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prints {
    /// An event per line.
    Events,
    /// One document of JSON.
    Document,
    /// Lines for people.
    Text,
}

/// Who is told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// The process, which tells those that it started.
    Itself,
    /// All that it started as well: a shell tells nobody.
    Group,
}

/// How a process ended.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Its exit code; 128 and the signal's number if it was killed.
    pub code: u8,
    /// What it printed: events, or the document.
    pub out: Vec<Value>,
    /// Its last line on standard error.
    pub said: Option<String>,
    /// Its warnings.
    pub warnings: Vec<String>,
    /// Whether it was ended because its time was over.
    pub timed_out: bool,
    /// Whether it was killed, since it did not end when it was asked.
    pub killed: bool,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

/// Whose processes, and what ends them.
#[derive(Clone, Copy)]
pub(super) struct Runner<'a> {
    /// The VM, for messages.
    pub vm: &'a str,
    /// Set when the night is to end.
    pub stop: &'a AtomicBool,
    /// When the VM's time is over.
    pub deadline: Option<Instant>,
    /// How long one that was asked to end may take, before it is killed.
    pub grace: Duration,
}

enum Said {
    Out(Vec<u8>),
    Err(Vec<u8>),
    End,
}

impl Runner<'_> {
    /// Runs this program.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn fleecefs(&self, prints: Prints, args: &[OsString]) -> Result<Ended> {
        // This very program, also where an upgrade has replaced its file since it was started.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("fleecefs").args(args);
        self.run(command, (prints, Who::Itself), None)
    }

    /// Runs a command of the configuration; `input` is its standard input.
    ///
    /// # Errors
    /// As for a step.
    pub(super) fn command(&self, command: Command, input: Vec<u8>) -> Result<Ended> {
        self.run(command, (Prints::Text, Who::Group), Some(input))
    }

    /// # Errors
    /// It cannot be started, or does not end even when it is killed.
    fn run(
        &self,
        mut command: Command,
        (prints, who): (Prints, Who),
        input: Option<Vec<u8>>,
    ) -> Result<Ended> {
        let failed = |e| Error::io(e, "cannot start the process");
        // Not in our group: who presses Ctrl-C asks us, and we ask each of them once.
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        tie_by(&mut command, libc::SIGTERM);
        let mut child = command.spawn().map_err(failed)?;
        let (send, receive) = sync_channel(64);
        if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), input) {
            // Whether it reads that is its own affair.
            detached(move || drop(pipe.write_all(&bytes)));
        }
        if let Some(out) = child.stdout.take() {
            let send = send.clone();
            detached(move || pass_on(out, &send, Said::Out));
        }
        if let Some(err) = child.stderr.take() {
            detached(move || pass_on(err, &send, Said::Err));
        }
        let mut heard =
            Heard { vm: self.vm, prints, document: Vec::new(), ended: Ended::default() };
        let status = self
            .wait((&mut child, who), &receive, &mut heard)
            .map_err(|e| Error::io(e, "cannot wait for the process"))?;
        heard.last_words(&receive);
        Ok(heard.end(status))
    }

    fn wait(
        &self,
        (child, who): (&mut Child, Who),
        receive: &Receiver<Said>,
        heard: &mut Heard<'_>,
    ) -> std::io::Result<ExitStatus> {
        let mut asked: Option<Instant> = None;
        loop {
            match receive.recv_timeout(TICK) {
                Ok(said) => heard.take(said),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            let is_late = self.deadline.is_some_and(|d| Instant::now() >= d);
            match asked {
                None if is_late || self.stop.load(Ordering::Relaxed) => {
                    heard.ended.timed_out = is_late && !self.stop.load(Ordering::Relaxed);
                    who.signal(child, Signal::TERM);
                    asked = Some(Instant::now());
                }
                Some(since) if since.elapsed() >= self.grace + KILLED => {
                    let what = "it does not end, even when it is killed: is its storage there?";
                    return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what));
                }
                Some(since) if since.elapsed() >= self.grace => {
                    heard.ended.killed = true;
                    who.signal(child, Signal::KILL);
                }
                _ => {}
            }
        }
    }
}

impl Who {
    /// Sends a signal to a process that is not waited for yet, so that its number is its own. It may have ended just now;
    /// then that is seen next.
    fn signal(self, child: &Child, signal: Signal) {
        let pid = Pid::from_child(child);
        let _ = match self {
            Who::Itself => kill_process(pid, signal),
            Who::Group => kill_process_group(pid, signal),
        };
    }
}

/// A thread that ends by itself: where none can be made, the output is lost and the process is waited for all the same.
fn detached(act: impl FnOnce() + Send + 'static) {
    if let Err(e) = std::thread::Builder::new().spawn(act) {
        log::warn!("the output of a process is lost: {e}");
    }
}

fn pass_on(stream: impl Read, send: &SyncSender<Said>, as_what: fn(Vec<u8>) -> Said) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(n) if n > 0 => {
                if send.send(as_what(line)).is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    let _ = send.send(Said::End);
}

/// What was heard of a process so far.
struct Heard<'a> {
    vm: &'a str,
    prints: Prints,
    document: Vec<u8>,
    ended: Ended,
}

impl Heard<'_> {
    fn take(&mut self, said: Said) {
        match (said, self.prints) {
            (Said::Out(line), Prints::Events) => self.event(&line),
            (Said::Out(line), Prints::Document) => {
                if self.document.len().saturating_add(line.len()) <= MAX_DOCUMENT {
                    self.document.extend_from_slice(&line);
                }
            }
            (Said::Out(line), Prints::Text) => self.tell(&line),
            (Said::Err(line), _) => {
                let text = String::from_utf8_lossy(&line).trim_end().to_string();
                // Its last words are in the summary.
                match text.strip_prefix("fleecefs: ") {
                    Some(_) => {}
                    None => self.tell(&line),
                }
                self.ended.said = Some(text).filter(|t| !t.is_empty()).or(self.ended.said.take());
            }
            (Said::End, _) => {}
        }
    }

    fn tell(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        output::tell(&format!("{}: {}\n", self.vm, visible(text.trim_end())));
    }

    fn event(&mut self, line: &[u8]) {
        let Ok(event) = serde_json::from_slice::<Value>(line) else { return self.tell(line) };
        let text = event.get("text").and_then(Value::as_str).unwrap_or_default();
        let text: String = text.chars().take(LONGEST_TEXT).collect();
        match event.get("event").and_then(Value::as_str) {
            Some("warning") => {
                if !verbosity::is_silent() {
                    self.tell(format!("warning: {text}").as_bytes());
                }
                if self.ended.warnings.len() < MOST_EVENTS {
                    self.ended.warnings.push(text);
                }
            }
            Some("note") if verbosity::is_verbose() => self.tell(text.as_bytes()),
            Some("note" | "begin" | "progress" | "end") => {}
            _ if self.ended.out.len() < MOST_EVENTS => self.ended.out.push(event),
            _ => {}
        }
    }

    /// What is still on the way.
    fn last_words(&mut self, receive: &Receiver<Said>) {
        let until = Instant::now() + LAST_WORDS;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // One that was left behind may say something again and again.
                return;
            }
            match receive.recv_timeout(left) {
                Ok(said) => self.take(said),
                Err(_) => return,
            }
        }
    }

    fn end(mut self, status: ExitStatus) -> Ended {
        if self.prints == Prints::Document {
            let all = serde_json::Deserializer::from_slice(&self.document).into_iter();
            self.ended.out = all.map_while(std::result::Result::ok).collect();
        }
        self.ended.signal = status.signal();
        let killed = || status.signal().map_or(1, |s| 128 + s);
        let code = status.code().unwrap_or_else(killed);
        self.ended.code = u8::try_from(code).unwrap_or(1);
        self.ended
    }
}

impl Ended {
    /// Why it failed, if it did.
    pub(super) fn error(&self) -> Option<StepError> {
        if self.code == 0 {
            return None;
        }
        let told = self.out.iter().rev().find_map(|v| v.get("error")).filter(|e| !e.is_null());
        let text = |key: &str| told?.get(key)?.as_str().map(str::to_string);
        let kind = told.and_then(|e| serde_json::from_value(e.get("kind")?.clone()).ok());
        let kind = kind.unwrap_or_else(|| Kind::of_exit_code(self.code));
        let said = || self.said.as_deref().map(|s| s.trim_start_matches("fleecefs: ").to_string());
        let message = match (text("message"), self.by_us()) {
            (_, Some(why)) => why,
            (Some(message), _) => match text("path") {
                Some(path) => format!("{path}: {message}"),
                None => message,
            },
            (None, _) => said().unwrap_or_else(|| format!("it ended with exit code {}", self.code)),
        };
        let kind = if self.timed_out { Kind::Timeout } else { kind };
        let remedy = if self.killed { None } else { text("remedy") };
        Some(StepError::new(kind, &message, remedy.as_deref()))
    }

    /// What is said where it was not the process that decided.
    fn by_us(&self) -> Option<String> {
        let why = match (self.timed_out, self.killed) {
            (false, false) => return self.signal.map(|s| format!("it was ended by signal {s}")),
            (true, _) => "its time was over ('timeout')",
            (false, true) => "it was to end",
        };
        Some(match (self.killed, self.signal) {
            (true, _) => format!("{why}; it had to be killed: 'fleecefs recover' cleans up"),
            (false, Some(s)) => format!("{why}; it was ended by signal {s}"),
            (false, None) => format!("{why}; what it did was undone"),
        })
    }
}

/// Why a step failed.
#[derive(Debug, Clone)]
pub(super) struct StepError {
    /// What a script would do about it.
    pub kind: Kind,
    /// The exit code.
    pub exit_code: u8,
    /// What failed.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl StepError {
    /// Of texts that may be as long as a file.
    pub(super) fn new(kind: Kind, message: &str, remedy: Option<&str>) -> Self {
        let (message, remedy) = (shortened(message), remedy.map(shortened));
        StepError { kind, exit_code: kind.exit_code(), message, remedy }
    }
}

/// Not longer than [`LONGEST_TEXT`].
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(LONGEST_TEXT) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or(text)),
        None => text.to_string(),
    }
}

impl From<&Error> for StepError {
    fn from(e: &Error) -> Self {
        StepError::new(e.kind(), &e.report(), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_was_killed_has_undone_nothing() {
        let said = |timed_out, killed, signal: Option<i32>| {
            let code = if signal.is_none() { 130 } else { 137 };
            let ended = Ended { code, timed_out, killed, signal, ..Ended::default() };
            ended.error().unwrap().message
        };
        assert_eq!(
            said(true, false, None),
            "its time was over ('timeout'); what it did was undone"
        );
        let killed = said(true, true, Some(9));
        assert!(killed.contains("'fleecefs recover'") && !killed.contains("undone"), "{killed}");
        assert!(said(false, true, Some(9)).contains("'fleecefs recover'"));
        assert_eq!(said(false, false, Some(11)), "it was ended by signal 11");
        assert_eq!(said(false, false, None), "it ended with exit code 130");
    }

    #[test]
    fn what_is_told_is_not_longer_than_an_environment() {
        let long = "\u{e9}".repeat(LONGEST_TEXT + 1);
        let e = StepError::new(Kind::Io, &long, Some(&long));
        assert_eq!(e.message.chars().count(), LONGEST_TEXT + 3);
        assert_eq!(e.remedy, Some(e.message));
        assert_eq!(shortened(&long[2..]), &long[2..]);
    }

    #[test]
    fn one_left_behind_that_goes_on_talking_holds_up_nobody() {
        let (send, receive) = sync_channel(1);
        std::thread::spawn(move || while send.send(Said::Out(b"x".to_vec())).is_ok() {});
        let ended = Ended::default();
        let mut heard = Heard { vm: "a", prints: Prints::Document, document: Vec::new(), ended };
        heard.last_words(&receive);
        assert!(!heard.document.is_empty());
    }
}
