//! What a long command shows: bars on a terminal, lines or JSON elsewhere; log file and syslog.

use std::ffi::CString;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;

use crate::backup::Watch;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::units::human_bytes;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// Bars on a terminal, lines elsewhere
    Auto,
    /// Lines
    Plain,
    /// An object per line, on standard output
    Json,
    /// Nothing
    None,
}

/// Shows messages and progress.
pub struct Console {
    style: Style,
    interval: Duration,
    bars: Option<MultiProgress>,
    file: Option<Mutex<File>>,
    syslog: bool,
}

impl Console {
    /// Opens it.
    ///
    /// # Errors
    /// The log file cannot be opened.
    pub fn open(
        style: Style,
        interval: Duration,
        log_file: Option<&Path>,
        syslog: bool,
    ) -> Result<Self> {
        let open = |p: &Path| {
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(p)
                .map_err(|e| Error::io(e, "cannot open the log file").at_path(p))
        };
        let file = log_file.map(open).transpose()?.map(Mutex::new);
        let bars = style == Style::Auto && std::io::stderr().is_terminal();
        Ok(Console { style, interval, bars: bars.then(MultiProgress::new), file, syslog })
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        if let Some(b) = &self.bars {
            // A terminal that is gone needs no clearing.
            let _ = b.clear();
        }
    }

    /// An error that ends the program; the caller prints it.
    pub fn log_error(&self, e: &Error) {
        self.record(libc::LOG_ERR, &e.report());
    }

    fn show(&self, priority: libc::c_int, kind: &str, line: &str) {
        match (self.style, &self.bars) {
            (style, _) if style != Style::Json && super::is_quiet() => {}
            (Style::Json, _) => {
                let _ = super::print(&format!("{}\n", json!({"event": kind, "text": line})));
            }
            (_, Some(b)) => {
                let _ = b.println(line);
            }
            _ => eprintln!("{line}"),
        }
        self.record(priority, line);
    }

    fn record(&self, priority: libc::c_int, line: &str) {
        if let Some(f) = &self.file {
            let mut f = f.lock().unwrap_or_else(|e| e.into_inner());
            // A full disk must not end the backup for its log's sake.
            let _ = writeln!(f, "{} {line}", jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"));
        }
        if self.syslog
            && let Ok(text) = CString::new(format!("fleecefs: {line}"))
        {
            // SAFETY: a constant format with one matching C string.
            unsafe { libc::syslog(priority | libc::LOG_DAEMON, c"%s".as_ptr(), text.as_ptr()) };
        }
    }
}

impl Watch for Console {
    fn disk(&self, name: &str) -> Arc<dyn Progress> {
        match (self.style, &self.bars) {
            (Style::None, _) => Arc::new(()),
            (_, Some(all)) => Arc::new(Bar {
                name: name.into(),
                bar: all.add(ProgressBar::hidden()),
                all: all.clone(),
            }),
            (style, None) => Arc::new(Lines {
                name: name.to_string(),
                json: style == Style::Json,
                interval: self.interval,
                state: Mutex::new(LineState {
                    done: 0,
                    total: 0,
                    began: Instant::now(),
                    shown: Instant::now(),
                }),
            }),
        }
    }

    fn say(&self, line: &str) {
        self.show(libc::LOG_INFO, "note", line);
    }

    fn warn(&self, line: &str) {
        self.show(libc::LOG_WARNING, "warning", &format!("warning: {line}"));
    }
}

struct Bar {
    name: String,
    bar: ProgressBar,
    all: MultiProgress,
}

impl Progress for Bar {
    fn begin(&self, _what: &str, total: u64) {
        let template = "{prefix:16!} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_prefix(self.name.clone());
        self.bar.set_length(total.max(1));
        self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        let _ = self.all.add(self.bar.clone());
    }
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
        // The job may find more to copy than was estimated.
        if self.bar.position() > self.bar.length().unwrap_or(0) {
            self.bar.set_length(self.bar.position());
        }
    }
    fn end(&self, _took: Duration) {
        self.bar.finish();
    }
}

struct Lines {
    name: String,
    json: bool,
    interval: Duration,
    state: Mutex<LineState>,
}

struct LineState {
    done: u64,
    total: u64,
    began: Instant,
    shown: Instant,
}

impl Lines {
    fn print(&self, s: &LineState, event: &str) {
        let seconds = s.began.elapsed().as_secs_f64().max(0.001);
        let rate = s.done as f64 / seconds;
        if self.json {
            let line = json!({"event": event, "disk": self.name, "done": s.done,
                "total": s.total.max(s.done), "bytes_per_second": rate as u64});
            let _ = super::print(&format!("{line}\n"));
            return;
        }
        let total = s.total.max(s.done);
        let left = if rate > 1.0 { ((total - s.done) as f64 / rate) as u64 } else { 0 };
        eprintln!(
            "{}: {} of {}, {}/s, {left} s left",
            self.name,
            human_bytes(s.done),
            human_bytes(total),
            human_bytes(rate as u64)
        );
    }
}

impl Progress for Lines {
    fn begin(&self, _what: &str, total: u64) {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        *s = LineState { done: 0, total, began: Instant::now(), shown: Instant::now() };
        if self.json {
            self.print(&s, "begin");
        }
    }
    fn advance(&self, bytes: u64) {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        s.done = s.done.saturating_add(bytes);
        if s.shown.elapsed() >= self.interval {
            s.shown = Instant::now();
            self.print(&s, "progress");
        }
    }
    fn end(&self, _took: Duration) {
        let s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if self.json {
            self.print(&s, "end");
        }
    }
}
