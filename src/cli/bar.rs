//! A progress bar on standard error, if that is a terminal; nothing otherwise.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::Progress;

/// One bar for one piece of work after the other.
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar that shows when work begins.
    pub fn new() -> Self {
        // Hidden by indicatif where standard error is no terminal.
        Bar(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
    }
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: u64) {
        if total == 0 {
            return;
        }
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.reset();
        self.0.set_length(total);
        self.0.set_message(what.to_string());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn note(&self, text: &str) {
        self.0.suspend(|| eprintln!("fleecefs: {text}"));
    }

    fn end(&self, _took: Duration) {
        self.0.finish_and_clear();
    }
}
