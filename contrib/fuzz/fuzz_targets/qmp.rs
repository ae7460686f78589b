//! Answers of QEMU from hostile bytes: refused, or all that planning makes of them; never a panic.
#![no_main]

use fleecefs::backup::disks::{survey, Answers};
use fleecefs::qmp::budget;
use fleecefs::qmp::types::{Features, Graph, Job, Version};
use serde_json::Value;

/// As much as a QEMU may send at once here.
const MEMORY: usize = 1 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // One line for each question.
    let mut values = bytes.split(|b| *b == b'\n').map(|line| budget::parse(line, MEMORY));
    let mut next = || values.next().and_then(Result::ok).unwrap_or(Value::Null);
    let first = next();
    let _ = (Version::from_greeting(&first), Features::from_schema(&first));
    let _ = serde_json::from_value::<Vec<Job>>(first);
    let drives = serde_json::from_value(next()).unwrap_or_default();
    let nodes = next();
    let graph = serde_json::from_value::<Graph>(next()).unwrap_or_default();
    let Ok(answers) = Answers::of(drives, nodes, graph, true) else { return };
    let seen = survey(&answers);
    for disk in &seen.disks {
        let _ = (disk.base_name(), disk.label(), disk.folder());
    }
});
