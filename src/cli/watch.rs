//! `fleecefs info status --watch`: the backups that run on this host, again and again until Ctrl-C.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::work::cancel_flag;
use crate::backup::state::control::{self, DiskStatus, Status};
use crate::error::Result;
use crate::output;
use crate::qmp::Address;
use crate::text::{path_text, visible};
use crate::units::human_bytes;

/// How soon it ends after a signal.
const STEP: Duration = Duration::from_millis(50);

/// Shows what runs in the state folder, or the one of `vm`, every `interval`.
///
/// # Errors
/// The state folder cannot be read; standard output cannot be written to.
pub(super) fn run(state: &Path, vm: Option<&Address>, interval: Duration) -> Result<()> {
    let ended = cancel_flag()?;
    let mut shown: Box<dyn Show> = match std::io::stderr().is_terminal() {
        true => Box::new(Bars::default()),
        false => Box::new(Lines { was_idle: false }),
    };
    while !ended.load(Ordering::SeqCst) {
        let all = match vm {
            Some(vm) => control::ask(state, vm, "status")?.into_iter().collect(),
            None => control::running(state)?,
        };
        shown.show(&all)?;
        rest(&ended, interval);
    }
    Ok(())
}

fn rest(ended: &AtomicBool, interval: Duration) {
    let began = Instant::now();
    while !ended.load(Ordering::SeqCst) && began.elapsed() < interval {
        std::thread::sleep(STEP.min(interval));
    }
}

trait Show {
    /// Shows what runs now.
    fn show(&mut self, all: &[Status]) -> Result<()>;
}

/// A line for each disk, and one where nothing runs, once.
struct Lines {
    was_idle: bool,
}

impl Show for Lines {
    fn show(&mut self, all: &[Status]) -> Result<()> {
        let mut text = String::new();
        if all.is_empty() && !self.was_idle {
            text = "no backup is running\n".to_string();
        }
        self.was_idle = all.is_empty();
        for run in all {
            output::push_line(&mut text, head(run));
            for disk in &run.disks {
                output::push_line(&mut text, format!("  {}", line(disk)));
            }
        }
        output::print(&text)
    }
}

/// Which run it is, and what it does.
fn head(run: &Status) -> String {
    format!("{}: run {} (process {}): {}", path_text(&run.target), run.run, run.pid, run.phase)
}

/// How far a disk is.
pub(super) fn line(d: &DiskStatus) -> String {
    format!(
        "{} {} {}: {} copied, at {} of {}",
        path_text(&d.disk),
        d.level,
        d.state,
        human_bytes(d.copied),
        human_bytes(d.done),
        human_bytes(d.total)
    )
}

/// A bar for each disk below a line for its run.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    /// By run, and disk; the line of the run itself has none.
    bars: BTreeMap<(String, Option<String>), ProgressBar>,
    idle: Option<ProgressBar>,
}

impl Show for Bars {
    fn show(&mut self, all: &[Status]) -> Result<()> {
        let mut seen = Vec::new();
        for run in all {
            let key = (run.run.clone(), None);
            self.bar(&key, "{msg}").set_message(visible(&head(run)));
            seen.push(key);
            for disk in &run.disks {
                let key = (run.run.clone(), Some(disk.disk.clone()));
                let template =
                    "  {prefix:16!} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {msg}";
                let bar = self.bar(&key, template);
                bar.set_prefix(path_text(&disk.disk));
                bar.set_length(disk.total.max(1));
                bar.set_position(disk.done);
                bar.set_message(visible(&format!("{} {}", disk.level, disk.state)));
                seen.push(key);
            }
        }
        self.bars.retain(|key, bar| {
            let stays = seen.contains(key);
            if !stays {
                bar.finish_and_clear();
            }
            stays
        });
        self.say_idle(all.is_empty());
        Ok(())
    }
}

impl Bars {
    /// The bar of a disk, or the line of a run, below those that are there.
    fn bar(&mut self, key: &(String, Option<String>), template: &str) -> ProgressBar {
        let all = &self.all;
        let made = self.bars.entry(key.clone()).or_insert_with(|| {
            let style = ProgressStyle::with_template(template);
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            all.add(ProgressBar::new(1).with_style(style.progress_chars("=> ")))
        });
        made.clone()
    }

    fn say_idle(&mut self, is_idle: bool) {
        match (is_idle, self.idle.take()) {
            (true, Some(line)) => self.idle = Some(line),
            (true, None) => {
                let style = ProgressStyle::with_template("{msg}");
                let line = self.all.add(ProgressBar::new(1));
                line.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                line.set_message("no backup is running");
                line.tick();
                self.idle = Some(line);
            }
            (false, Some(line)) => line.finish_and_clear(),
            (false, None) => {}
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // A terminal that is gone needs no clearing.
        let _ = self.all.clear();
    }
}
