//! What a long command shows: bars on a terminal, lines or JSON elsewhere; log file and syslog.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::json;

use super::verbosity;
use crate::backup::Watch;
use crate::error::{Error, Result};
use crate::output;
use crate::output::system_log::{self, About};
use crate::progress::{Position, Progress};
use crate::text::{path_text, visible};
use crate::units::human_bytes;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Style {
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
pub(super) struct Console {
    style: Style,
    interval: Duration,
    bars: Option<MultiProgress>,
    file: Option<Mutex<File>>,
    syslog: bool,
    first_warning: Mutex<Option<String>>,
    /// The run and its VM, once they are known.
    run_and_vm: Mutex<(String, String)>,
}

impl Console {
    /// Opens it.
    ///
    /// # Errors
    /// The log file cannot be opened.
    pub(super) fn open(
        style: Style,
        interval: Duration,
        log_file: Option<&Path>,
        syslog: bool,
    ) -> Result<Self> {
        let file = log_file.map(super::paths::log_file).transpose()?.map(Mutex::new);
        let bars = style == Style::Auto && std::io::stderr().is_terminal();
        let bars = bars.then(MultiProgress::new);
        Ok(Console {
            style,
            interval,
            bars,
            file,
            syslog,
            first_warning: Mutex::default(),
            run_and_vm: Mutex::default(),
        })
    }

    /// Takes the bars away.
    pub(super) fn finish(&self) {
        if let Some(b) = &self.bars {
            // A terminal that is gone needs no clearing.
            let _ = b.clear();
        }
    }

    /// Tells what does not change while it runs, and what came of it, where events are printed.
    pub(super) fn event(&self, event: &serde_json::Value) {
        if self.style == Style::Json {
            print_event(event);
        }
    }

    /// An error that ends the program; the caller prints it.
    pub(super) fn log_error(&self, e: &Error) {
        self.record(libc::LOG_ERR, &e.report(), About::default());
    }

    /// A point that was made of a disk.
    pub(super) fn say_point(&self, disk: &str, point: &str, line: &str) {
        self.show(libc::LOG_INFO, "note", line, About { disk, point, ..About::default() });
    }

    /// The first warning that was shown.
    pub(super) fn first_warning(&self) -> Option<String> {
        self.first_warning.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn show(&self, priority: libc::c_int, kind: &str, line: &str, about: About<'_>) {
        let hidden = if kind == "warning" { verbosity::is_silent() } else { verbosity::is_quiet() };
        let marked = if kind == "warning" { format!("warning: {line}") } else { line.to_string() };
        match (self.style, &self.bars) {
            (style, _) if style != Style::Json && hidden => {}
            // What it is, the event says.
            (Style::Json, _) => print_event(&json!({"event": kind, "text": line})),
            (_, Some(b)) => {
                let _ = b.println(output::for_stderr(&visible(&marked)));
            }
            _ => output::tell(&format!("{}\n", visible(&marked))),
        }
        self.record(priority, &marked, about);
    }

    fn record(&self, priority: libc::c_int, line: &str, about: About<'_>) {
        let line = visible(line);
        if let Some(f) = &self.file {
            let mut f = f.lock().unwrap_or_else(|e| e.into_inner());
            // A full disk must not end the backup for its log's sake.
            let _ = writeln!(f, "{} {line}", jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"));
        }
        if self.syslog {
            let known = self.run_and_vm.lock().unwrap_or_else(|e| e.into_inner());
            let (run, vm) = (known.0.as_str(), known.1.as_str());
            system_log::send(priority, &line, About { run, vm, ..about });
        }
    }
}

impl Watch for Console {
    fn disk(&self, name: &str) -> Arc<dyn Progress> {
        match (self.style, &self.bars) {
            (Style::None, _) => Arc::new(()),
            (_, Some(all)) => Arc::new(Bar {
                name: path_text(name),
                bar: all.add(ProgressBar::hidden()),
                all: all.clone(),
                figures: Mutex::new(Figures::new(0)),
            }),
            (style, None) => Arc::new(Lines {
                name: name.to_string(),
                json: style == Style::Json,
                interval: self.interval,
                state: Mutex::new(LineState { figures: Figures::new(0), shown: Instant::now() }),
            }),
        }
    }

    fn say(&self, line: &str) {
        self.show(libc::LOG_INFO, "note", line, About::default());
    }

    fn warn(&self, line: &str) {
        self.warn_of("", line);
    }

    fn say_of(&self, disk: &str, line: &str) {
        self.show(libc::LOG_INFO, "note", line, About { disk, ..About::default() });
    }

    fn run_is(&self, run: &str, vm: &str) {
        let mut known = self.run_and_vm.lock().unwrap_or_else(|e| e.into_inner());
        *known = (run.to_string(), vm.to_string());
    }

    fn warn_of(&self, disk: &str, line: &str) {
        let mut first = self.first_warning.lock().unwrap_or_else(|e| e.into_inner());
        first.get_or_insert_with(|| line.to_string());
        drop(first);
        self.show(libc::LOG_WARNING, "warning", line, About { disk, ..About::default() });
    }
}

/// A reader that is gone must not end the backup.
fn print_event(event: &serde_json::Value) {
    let _ = output::json_line(event).and_then(|line| output::print(&line));
}

/// What is known of a disk's copying.
#[derive(Debug, Clone, Copy)]
struct Figures {
    /// Bytes copied.
    done: u64,
    /// Bytes to copy, as was thought before.
    total: u64,
    position: Option<Position>,
    began: Instant,
}

impl Figures {
    fn new(total: u64) -> Self {
        Figures { done: 0, total, position: None, began: Instant::now() }
    }

    /// Bytes per second so far.
    fn rate(&self, elapsed: Duration) -> u64 {
        (self.done as f64 / elapsed.as_secs_f64().max(0.001)) as u64
    }

    /// Seconds left, if that can be told.
    fn left(&self, elapsed: Duration) -> Option<u64> {
        let (done, total) = match self.position {
            Some(p) if p.of > 0 && p.at >= p.of => return Some(0),
            Some(p) if p.paced => (p.at, p.of),
            // More was found to copy than was thought.
            _ if self.done >= self.total => return None,
            _ => (self.done, self.total),
        };
        let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
        (done > 0).then(|| (total.saturating_sub(done) as f64 / rate) as u64)
    }

    fn text(&self) -> String {
        let elapsed = self.began.elapsed();
        let left = self.left(elapsed).map_or_else(|| "?".into(), |s| s.to_string());
        let (done, rate) = (human_bytes(self.done), human_bytes(self.rate(elapsed)));
        format!("{done} copied, {rate}/s, {left} s left")
    }
}

struct Bar {
    name: String,
    bar: ProgressBar,
    all: MultiProgress,
    figures: Mutex<Figures>,
}

impl Progress for Bar {
    fn begin(&self, _what: &str, total: u64) {
        *self.figures.lock().unwrap_or_else(|e| e.into_inner()) = Figures::new(total);
        let template = "{prefix:16!} [{bar:30}] {bytes}/{total_bytes} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_prefix(self.name.clone());
        self.bar.set_length(total.max(1));
        self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        let _ = self.all.add(self.bar.clone());
    }
    fn position(&self, position: Position) {
        self.figures.lock().unwrap_or_else(|e| e.into_inner()).position = Some(position);
        self.bar.set_length(position.of.max(1));
        self.bar.set_position(position.at);
    }
    fn advance(&self, bytes: u64) {
        let mut f = self.figures.lock().unwrap_or_else(|e| e.into_inner());
        f.done = f.done.saturating_add(bytes);
        self.bar.set_message(f.text());
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
    figures: Figures,
    shown: Instant,
}

impl Lines {
    fn print(&self, f: &Figures, event: &str) {
        let total = f.total.max(f.done);
        let position = f.position;
        if self.json {
            let elapsed = f.began.elapsed();
            let line = json!({"event": event, "disk": self.name, "done": f.done, "total": total,
                "position": position.map(|p| p.at), "positions": position.map(|p| p.of),
                "bytes_per_second": f.rate(elapsed), "seconds_left": f.left(elapsed)});
            print_event(&line);
            return;
        }
        let (at, of) = position.map_or((f.done, total), |p| (p.at, p.of));
        let (at, of) = (human_bytes(at), human_bytes(of));
        output::tell(&format!("{}: {}, at {at} of {of}\n", path_text(&self.name), f.text()));
    }
}

impl Progress for Lines {
    fn begin(&self, _what: &str, total: u64) {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        *s = LineState { figures: Figures::new(total), shown: Instant::now() };
        if self.json {
            self.print(&s.figures, "begin");
        }
    }
    fn position(&self, position: Position) {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).figures.position = Some(position);
    }
    fn advance(&self, bytes: u64) {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        s.figures.done = s.figures.done.saturating_add(bytes);
        if s.shown.elapsed() >= self.interval {
            s.shown = Instant::now();
            self.print(&s.figures, "progress");
        }
    }
    fn end(&self, _took: Duration) {
        let s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if self.json {
            self.print(&s.figures, "end");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says_is_one_visible_line_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let console = Console::open(Style::None, Duration::ZERO, Some(&log), false).unwrap();
        console.warn("QEMU: a\x1b]0;x\x07\n2026 error: \u{202e}\u{9b}");
        console.log_error(&Error::new(crate::error::Kind::Peer, "b\r\u{2028}"));
        let text = std::fs::read_to_string(log).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert_eq!(text, crate::text::visible_lines(&text), "{text:?}");
    }

    #[test]
    fn holes_are_no_copied_bytes_and_do_not_end_the_time_left() {
        let second = Duration::from_secs(1);
        let mut f = Figures { done: 100, ..Figures::new(400) };
        f.position = Some(Position { at: 900, of: 1000, paced: false });
        assert_eq!((f.rate(second), f.left(second)), (100, Some(3)));
        // All that was thought to be there is copied, and the job goes on.
        f.done = 400;
        assert_eq!(f.left(second), None);
        // QEMU's limit holds for holes as well.
        f.position = Some(Position { at: 250, of: 1000, paced: true });
        assert_eq!(f.left(second), Some(3));
        f.position = Some(Position { at: 1000, of: 1000, paced: false });
        assert_eq!(f.left(second), Some(0));
        assert_eq!(Figures::new(400).left(second), None);
        // QEMU may say anything.
        f.position = Some(Position { at: u64::MAX, of: 0, paced: true });
        assert_eq!(f.left(second), Some(0));
    }
}
