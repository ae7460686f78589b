//! What came of a VM, for the history: what failed before, between and after its steps, of which each keeps its own run;
//! and what failed of the night as a whole.

use std::path::Path;
use std::time::Duration;

use super::one_vm::Night;
use super::row::VmRow;
use crate::cli::recorded::real;
use crate::config::Vm;
use crate::error::Error;
use crate::history::{self, Entry};
use crate::qmp::Address;
use crate::text::to_text;

/// Keeps what nobody else does. The steps of a VM that is backed up as another user have their history in that one's
/// state folder, so that all is kept here that was done, and a night that went well clears one that failed.
pub(super) fn keep(night: &Night<'_>, vm: &Vm, row: &VmRow) {
    let is_wanted = match row.failures.is_empty() {
        true => row.skipped.is_none() && vm.is_on("as_owner"),
        false => row.is_untold || vm.is_on("as_owner"),
    };
    if night.dry_run || !is_wanted {
        return;
    }
    if let Err(e) = history::append(night.state, &entry(vm, row)) {
        log::warn!("the result of VM {} is not in the history: {}", vm.name, e.report());
    }
}

/// Keeps that something of the night as a whole failed, of no one VM.
pub(super) fn note(state: &Path, command: &str, e: &Error) {
    let mut entry = Entry::begun(command, jiff::Timestamp::now().as_second());
    entry.end(Duration::ZERO, Some(e));
    if let Err(e) = history::append(state, &entry) {
        log::warn!("this is not in the history: {}", e.report());
    }
}

fn entry(vm: &Vm, row: &VmRow) -> Entry {
    let seconds = row.seconds.clamp(0.0, 1e9);
    let began = jiff::Timestamp::now().as_second().saturating_sub(seconds as i64);
    let mut entry = Entry::begun("backup", began);
    entry.vm = Some(vm.name.clone());
    entry.qmp = vm.text("qmp").and_then(|q| Address::parse(q).ok()).map(|a| a.canonical());
    entry.shared = vm.is_on("shared");
    // Without links where it is there, as its other runs have it.
    entry.directory = vm.target().map(|target| to_text(real(target).as_os_str()));
    let why = row.failures.first().map(|f| {
        let message = format!("{}: {}", f.step, f.error.message);
        Error::new(f.error.kind, message)
    });
    entry.end(Duration::from_secs_f64(seconds), why.as_ref());
    entry
}
