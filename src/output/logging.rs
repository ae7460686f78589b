//! Where log lines go: standard error, a file, or the system log once in the background. One message
//! is one line: names in it come from outside and must not look like lines of their own. Results of commands that go on
//! running, such as `mount`, go the same way, whatever level is logged: [`result`].

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use log::{Level, Log, Metadata, Record};

use super::system_log::{self, About};
use crate::text::visible;

/// Where lines go from now on.
pub(crate) enum Sink {
    /// Standard error, in colours on a terminal.
    Stderr,
    /// A file, appended to.
    File(File),
    /// The system log.
    System,
}

static SINK: Mutex<Sink> = Mutex::new(Sink::Stderr);

/// Sends further lines elsewhere.
pub(crate) fn redirect(sink: Sink) {
    *SINK.lock().unwrap_or_else(|e| e.into_inner()) = sink;
}

/// Where the user wants to read that a command has done what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Results {
    /// Nowhere (`-q`).
    Nowhere,
    /// In a log, which somebody reads later.
    InLogs,
    /// On standard error, too (`-v`).
    Everywhere,
}

/// A [`Results`].
static RESULTS: AtomicU8 = AtomicU8::new(Results::InLogs as u8);

/// Starts logging: all that `stderr` lets through, to wherever [`redirect`] says; and `results`.
pub(crate) fn start(stderr: env_logger::Logger, results: Results) {
    RESULTS.store(results as u8, Ordering::Relaxed);
    log::set_max_level(stderr.filter());
    // Fails only if a logger is set already, as in a test; that one is as good.
    let _ = log::set_boxed_logger(Box::new(Switch { stderr }));
}

/// A level as messages begin with it, the same ones as `backup` prints and keeps.
pub(crate) fn word(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

/// Tells what a command that goes on running has done: a result, which no level of the log hides.
pub(crate) fn result(text: &str) {
    let wanted = RESULTS.load(Ordering::Relaxed);
    if wanted < Results::InLogs as u8 {
        return;
    }
    match &mut *SINK.lock().unwrap_or_else(|e| e.into_inner()) {
        Sink::Stderr if wanted > Results::InLogs as u8 || log::log_enabled!(Level::Info) => {
            super::tell(&format!("{text}\n"));
        }
        Sink::Stderr => {}
        Sink::File(file) => write_line(file, Level::Info, text),
        Sink::System => write_to_system(Level::Info, text),
    }
}

struct Switch {
    stderr: env_logger::Logger,
}

impl Log for Switch {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.stderr.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if !self.stderr.matches(record) {
            return;
        }
        match &mut *SINK.lock().unwrap_or_else(|e| e.into_inner()) {
            Sink::Stderr => self.stderr.log(record),
            Sink::File(file) => write_line(file, record.level(), &record.args().to_string()),
            Sink::System => write_to_system(record.level(), &record.args().to_string()),
        }
    }

    fn flush(&self) {}
}

fn write_line(file: &mut File, level: Level, text: &str) {
    let word = word(level);
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    let text = visible(text);
    // There is nobody left to tell if this fails.
    let _ = file.write_all(format!("{now} {word}: {text}\n").as_bytes());
}

fn write_to_system(level: Level, text: &str) {
    let priority = match level {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    };
    system_log::send(priority, text, About::default());
}
