//! How far a night is, as `systemctl status` shows it.

use std::collections::BTreeSet;
use std::sync::Mutex;

use crate::output::systemd;

/// Which VMs are done, and which are worked on.
pub(super) struct Standing {
    all: usize,
    now: Mutex<Now>,
}

#[derive(Default)]
struct Now {
    at_work: BTreeSet<String>,
    done: usize,
    failed: Vec<String>,
}

impl Standing {
    /// Before the first of so many VMs.
    pub(super) fn new(all: usize) -> Self {
        Standing { all, now: Mutex::default() }
    }

    /// A VM's steps begin.
    pub(super) fn begins(&self, vm: &str) {
        self.tell(|now| {
            now.at_work.insert(vm.to_string());
        });
    }

    /// They have ended.
    pub(super) fn ends(&self, vm: &str, failed: bool) {
        self.tell(|now| {
            now.at_work.remove(vm);
            now.done += 1;
            now.failed.extend(failed.then(|| vm.to_string()));
        });
    }

    fn tell(&self, change: impl FnOnce(&mut Now)) {
        // Told while it is held, so that an older line never comes after a newer one.
        let mut now = self.now.lock().unwrap_or_else(|e| e.into_inner());
        change(&mut now);
        systemd::status(&now.line(self.all));
    }
}

impl Now {
    fn line(&self, all: usize) -> String {
        let mut line = format!("{} of {all} VMs done", self.done);
        if !self.failed.is_empty() {
            line += &format!(", failed: {}", self.failed.join(" "));
        }
        if !self.at_work.is_empty() {
            let names: Vec<&str> = self.at_work.iter().map(String::as_str).collect();
            line += &format!(", running: {}", names.join(" "));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_done_what_failed_and_what_is_worked_on() {
        let standing = Standing::new(3);
        let line = || standing.now.lock().unwrap().line(3);
        standing.begins("b");
        standing.begins("a");
        assert_eq!(line(), "0 of 3 VMs done, running: a b");
        standing.ends("b", true);
        assert_eq!(line(), "1 of 3 VMs done, failed: b, running: a");
        standing.ends("a", false);
        assert_eq!(line(), "2 of 3 VMs done, failed: b");
    }
}
