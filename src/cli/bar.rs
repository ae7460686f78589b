//! Progress on a terminal.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output;
use crate::progress::Progress;
use crate::text::visible;

/// A bar on standard error; nothing if that is no terminal.
#[derive(Debug, Default)]
pub(super) struct Bar {
    bar: Mutex<Option<ProgressBar>>,
}

impl Progress for Bar {
    fn begin(&self, what: &str, total: u64) {
        if !std::io::stderr().is_terminal() || !log::log_enabled!(log::Level::Warn) {
            return;
        }
        let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template);
        let bar = ProgressBar::new(total).with_message(visible(what));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        self.replace(Some(bar));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(|e| e.into_inner()) {
            bar.inc(bytes);
        }
    }

    fn note(&self, text: &str) {
        match &*self.bar.lock().unwrap_or_else(|e| e.into_inner()) {
            Some(bar) => bar.println(output::for_stderr(text)),
            None => log::warn!("{text}"),
        }
    }

    fn end(&self, _took: Duration) {
        self.replace(None);
    }
}

impl Bar {
    fn replace(&self, new: Option<ProgressBar>) {
        let mut bar = self.bar.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(old) = std::mem::replace(&mut *bar, new) {
            old.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.replace(None);
    }
}
