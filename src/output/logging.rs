//! Where log lines go: standard error, a file, or the system log once in the background. One message
//! is one line: names in it come from outside and must not look like lines of their own.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use log::{Level, Log, Metadata, Record};

use crate::text::visible;

/// Where lines go from now on.
pub(crate) enum Sink {
    /// Standard error, in colours on a terminal.
    Stderr,
    /// A file, appended to.
    File(File),
    /// syslog(3), which the journal reads, too.
    System,
}

static SINK: Mutex<Sink> = Mutex::new(Sink::Stderr);

/// Sends further lines elsewhere.
pub(crate) fn redirect(sink: Sink) {
    if matches!(sink, Sink::System) {
        // SAFETY: the name is a string constant, which syslog keeps.
        unsafe { libc::openlog(c"fleecefs".as_ptr(), libc::LOG_PID, libc::LOG_DAEMON) };
    }
    *SINK.lock().unwrap_or_else(|e| e.into_inner()) = sink;
}

/// Starts logging: all that `stderr` lets through, to wherever [`redirect`] says.
pub(crate) fn start(stderr: env_logger::Logger) {
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
            Sink::File(file) => to_file(file, record),
            Sink::System => to_system(record),
        }
    }

    fn flush(&self) {}
}

fn to_file(file: &mut File, record: &Record) {
    let word = word(record.level());
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    let text = visible(&record.args().to_string());
    // There is nobody left to tell if this fails.
    let _ = file.write_all(format!("{now} {word}: {text}\n").as_bytes());
}

fn to_system(record: &Record) {
    let priority = match record.level() {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    };
    if let Ok(text) = CString::new(visible(&record.args().to_string())) {
        // SAFETY: a constant format and a C string for its one argument.
        unsafe { libc::syslog(priority, c"%s".as_ptr(), text.as_ptr()) };
    }
}
