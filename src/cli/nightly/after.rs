//! Who is told of a night once it is over: whoever gets mail; where it was refused as a whole, so that no VM's steps could
//! tell, also the commands of the defaults' `on_failure`, and the history.

use std::path::Path;

use super::child::{GRACE, StepError};
use super::mail::{self, Outcome};
use super::one_vm::{HOOK_TIME, in_any_case};
use super::row::VmRow;
use super::{hooks, told};
use crate::config::Config;
use crate::error::{Error, Kind};

/// Tells of a night that came to `rows`, and ended with `error`. What cannot be told is a warning: it changes nothing
/// of the night.
pub(super) fn tell(config: &Config, state: &Path, rows: &[VmRow], error: Option<&Error>) {
    let problems = config.common_problems();
    let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
    // What was told on the terminal stands above no message elsewhere.
    let wrong = (!all.is_empty()).then(|| Error::new(Kind::Usage, all.join("; ")));
    let (step, why) = match &wrong {
        Some(_) => ("configuration", wrong.as_ref()),
        None => ("backup", error),
    };
    if let Some(e) = why.filter(|_| rows.is_empty()) {
        refused(config, state, (step, e));
    }
    let wanted = config.mail.as_ref().filter(|mail| mail.always || error.is_some());
    let Some(mail) = wanted else { return };
    let sent = mail::send(mail, &Outcome { rows, error, problems: &all });
    if let Err(e) = &sent {
        log::warn!("no mail was sent: {}", e.report());
        told::note(state, "mail", e);
    }
}

/// What a VM's run would do where it failed.
fn refused(config: &Config, state: &Path, (step, e): (&'static str, &Error)) {
    told::note(state, "backup", e);
    let mut row = VmRow::default();
    row.fail(step, StepError::from(e));
    let runner = in_any_case("on_failure", HOOK_TIME, GRACE);
    if let Err(e) = hooks::run(runner, &config.on_refusal, "on_failure", &row) {
        log::warn!("on_failure: {}", e.report());
    }
}
