//! What came of a VM.

use serde_json::{Value, json};

use super::child::{Ended, StepError};
use crate::config::Vm;
use crate::error::Kind;

/// A new point.
#[derive(Debug, Clone)]
pub(super) struct NewPoint {
    /// Its disk.
    pub disk: String,
    /// Its level, in lower case.
    pub level: String,
    /// Its name; empty if it is only planned.
    pub point: String,
    /// The run that made it.
    pub run: String,
    /// Its time, as in JSON.
    pub time: String,
    /// Bytes copied, or thought to be.
    pub copied: u64,
}

/// Something that failed.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// What was being done: a command's name, or a key's.
    pub step: &'static str,
    /// Why it failed.
    pub error: StepError,
}

/// A VM's line in the summary.
#[derive(Debug, Default)]
pub(super) struct VmRow {
    /// The VM.
    pub vm: String,
    /// Its backup directory.
    pub target: Option<String>,
    /// Why nothing was done.
    pub skipped: Option<String>,
    /// The new points.
    pub points: Vec<NewPoint>,
    /// How many points pruning deleted or merged; `None` if nothing was pruned.
    pub pruned: Option<u64>,
    /// What failed.
    pub failures: Vec<Failure>,
    /// Whether something failed of which no process of a step has told the history.
    pub is_untold: bool,
    /// Warnings of the backup.
    pub warnings: Vec<String>,
    /// How long it took.
    pub seconds: f64,
}

impl VmRow {
    /// For a VM of which nothing was done yet.
    pub(super) fn new(vm: &Vm) -> Self {
        let target = vm.text("target").map(str::to_string);
        VmRow { vm: vm.name.clone(), target, ..VmRow::default() }
    }

    /// Adds what failed beside the processes of the steps.
    pub(super) fn fail(&mut self, step: &'static str, error: StepError) {
        self.is_untold = true;
        self.failures.push(Failure { step, error });
    }

    /// Takes a step's end; gives whether it went well.
    pub(super) fn took(
        &mut self,
        step: &'static str,
        ended: crate::error::Result<Ended>,
    ) -> Option<Ended> {
        let error = match &ended {
            Err(e) => Some(StepError::from(e)),
            Ok(ended) => ended.error(),
        };
        let is_good = error.is_none();
        // One that was killed, or never began, told nothing.
        self.is_untold |= ended.as_ref().map_or(true, |e| e.signal.is_some());
        self.failures.extend(error.map(|error| Failure { step, error }));
        let mut ended = ended.ok()?;
        self.warnings.append(&mut ended.warnings);
        if step == "backup" {
            self.points.extend(ended.out.iter().flat_map(new_points));
        }
        Some(ended).filter(|_| is_good)
    }

    /// One word for it.
    pub(super) fn result(&self) -> &'static str {
        match (&self.skipped, self.failures.is_empty()) {
            (_, false) => "failed",
            (Some(_), true) => "skipped",
            (None, true) => "ok",
        }
    }

    /// The code that it would end with alone.
    pub(super) fn exit_code(&self) -> u8 {
        self.failures.first().map_or(0, |f| f.error.exit_code)
    }

    /// The kind of its first failure.
    pub(super) fn kind(&self) -> Option<Kind> {
        self.failures.first().map(|f| f.error.kind)
    }

    /// As JSON.
    pub(super) fn json(&self) -> Value {
        let points = self.points.iter().map(|p| {
            json!({"disk": p.disk, "level": p.level, "point": p.point, "run": p.run,
                "time": p.time, "copied": p.copied})
        });
        let failures = self.failures.iter().map(|f| {
            json!({"step": f.step, "exit_code": f.error.exit_code, "message": f.error.message,
                "remedy": f.error.remedy})
        });
        json!({"vm": self.vm, "target": self.target, "result": self.result(),
            "exit_code": self.exit_code(), "skipped": self.skipped,
            "points": points.collect::<Vec<_>>(), "pruned": self.pruned,
            "failures": failures.collect::<Vec<_>>(), "warnings": self.warnings,
            "seconds": self.seconds})
    }
}

/// The points of a backup's last event, or of the plan of a dry run.
fn new_points(printed: &Value) -> Vec<NewPoint> {
    let is_plan = printed.get("event").is_none();
    let list = printed.get(if is_plan { "disks" } else { "points" }).and_then(Value::as_array);
    let point = |p: &Value| {
        let text = |key: &str| p.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
        let bytes = if is_plan { "estimate" } else { "copied" };
        NewPoint {
            disk: text("disk"),
            level: text("level").to_ascii_lowercase(),
            point: text("point"),
            run: text("run"),
            time: text("time"),
            copied: p.get(bytes).and_then(Value::as_u64).unwrap_or(0),
        }
    };
    list.into_iter().flatten().map(point).collect()
}
