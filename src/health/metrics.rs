//! The same for Prometheus, in the text format that node_exporter's textfile collector reads, and which is OpenMetrics
//! as well: gauges only. Times are seconds since the epoch, so that they stay right however old the file gets; an age
//! is `time() - fleecefs_newest_point_timestamp_seconds`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::report::{DirectoryHealth, DiskHealth, Status};
use crate::history::{DiskEntry, Entry};
use crate::text::to_text;
use crate::verify::Outcome;

/// One metric: its name without the program's, what it means, and its values by their labels.
type Family = (&'static str, &'static str, BTreeMap<String, f64>);

/// All metrics; `now` in seconds since the epoch.
pub(crate) fn text(all: &[DirectoryHealth], now: i64) -> String {
    let mut families = vec![(
        "health_timestamp_seconds",
        "When these metrics were written.",
        BTreeMap::from([(String::new(), now as f64)]),
    )];
    families.extend(of_directories(all));
    families.extend(of_disks(all));
    families.extend(of_runs(all));
    families.extend(of_run_disks(all));
    let mut text = String::new();
    for (name, help, values) in families {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP fleecefs_{name} {help}\n# TYPE fleecefs_{name} gauge");
        for (labels, value) in values {
            let _ = writeln!(text, "fleecefs_{name}{labels} {value}");
        }
    }
    text + "# EOF\n"
}

/// Label names and values, as they stand behind a name.
fn labels(all: &[(&str, &str)]) -> String {
    let quoted =
        |value: &str| value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
    let one = |(name, value): &(&str, &str)| format!("{name}=\"{}\"", quoted(value));
    format!("{{{}}}", all.iter().map(one).collect::<Vec<_>>().join(","))
}

fn directory_name(dir: &DirectoryHealth) -> String {
    to_text(dir.directory.as_os_str())
}

/// A metric of each directory that has it.
fn by_directory(
    all: &[DirectoryHealth],
    (name, help): (&'static str, &'static str),
    value: impl Fn(&DirectoryHealth) -> Option<f64>,
) -> Family {
    let one = |dir| Some((labels(&[("directory", &directory_name(dir))]), value(dir)?));
    (name, help, all.iter().filter_map(one).collect())
}

fn of_directories(all: &[DirectoryHealth]) -> Vec<Family> {
    let mut troubles = BTreeMap::new();
    let mut failed = BTreeMap::new();
    for dir in all {
        let directory = directory_name(dir);
        for status in [Status::Warning, Status::Error] {
            let count = dir.all_trouble().filter(|(_, t)| t.status == status).count();
            let word = status.word().to_ascii_lowercase();
            troubles.insert(labels(&[("directory", &directory), ("status", &word)]), count as f64);
        }
        for f in &dir.failed_runs {
            let of =
                [("directory", directory.as_str()), ("command", &f.command), ("kind", &f.result)];
            failed.insert(labels(&of), f.count as f64);
        }
    }
    vec![
        by_directory(all, ("free_bytes", "Bytes that are free where the backups are."), |d| {
            d.free_bytes.map(|b| b as f64)
        }),
        by_directory(all, ("size_bytes", "Bytes of the file system where the backups are."), |d| {
            d.size_bytes.map(|b| b as f64)
        }),
        ("troubles", "What is not well, by how bad it is.", troubles),
        (
            "failed_runs",
            "Runs of which the history knows that failed, by the kind of error.",
            failed,
        ),
    ]
}

/// A metric of each disk that has it.
fn by_disk(
    all: &[DirectoryHealth],
    (name, help): (&'static str, &'static str),
    value: impl Fn(&DiskHealth) -> Option<f64>,
) -> Family {
    let mut values = BTreeMap::new();
    for dir in all {
        for disk in &dir.disks {
            let Some(value) = value(disk) else { continue };
            let (directory, path) = (directory_name(dir), to_text(disk.disk.as_os_str()));
            let vm = disk.vm.as_deref().unwrap_or_default();
            values.insert(labels(&[("directory", &directory), ("vm", vm), ("disk", &path)]), value);
        }
    }
    (name, help, values)
}

fn of_disks(all: &[DirectoryHealth]) -> Vec<Family> {
    let number = |is: bool| f64::from(u8::from(is));
    vec![
        by_disk(
            all,
            (
                "newest_point_timestamp_seconds",
                "When the newest point was made that can be restored.",
            ),
            |d| d.newest.as_ref().map(|n| n.time as f64),
        ),
        by_disk(all, ("disk_gone", "Whether the VM has the disk no more."), |d| {
            Some(number(d.is_gone()))
        }),
        by_disk(all, ("points", "Points of a disk."), |d| Some(d.points as f64)),
        by_disk(all, ("chain_points", "Points that the newest one is made of."), |d| {
            Some(d.chain_points as f64)
        }),
        by_disk(all, ("stored_bytes", "Bytes that the points of a disk take."), |d| {
            Some(d.stored_bytes as f64)
        }),
        by_disk(all, ("disk_errors", "Errors of a disk's backups."), |d| {
            Some(d.trouble.iter().filter(|t| t.status == Status::Error).count() as f64)
        }),
        by_disk(all, ("last_verify_timestamp_seconds", "When verify last read a point."), |d| {
            d.verified.map(|v| v.time as f64)
        }),
        by_disk(all, ("last_verify_sound", "Whether what verify last read was sound."), |d| {
            d.verified.map(|v| number(v.outcome == Outcome::Sound))
        }),
        by_disk(
            all,
            ("last_boot_check_timestamp_seconds", "When a test VM was last booted from a point."),
            |d| d.booted.map(|b| b.time as f64),
        ),
        by_disk(all, ("last_boot_check_passed", "Whether that test VM came up."), |d| {
            d.booted.map(|b| number(b.passed))
        }),
    ]
}

/// A metric of the last run of each command on each directory.
fn by_run(
    all: &[DirectoryHealth],
    (name, help): (&'static str, &'static str),
    value: impl Fn(&Entry) -> Option<f64>,
) -> Family {
    let runs = all.iter().flat_map(|d| &d.last_runs);
    let one = |run| Some((labels(&labels_of(run)), value(run)?));
    (name, help, runs.filter_map(one).collect())
}

fn labels_of(run: &Entry) -> [(&str, &str); 3] {
    [
        ("directory", run.directory.as_deref().unwrap_or_default()),
        ("qmp", run.qmp.as_deref().unwrap_or_default()),
        ("command", &run.command),
    ]
}

fn of_runs(all: &[DirectoryHealth]) -> Vec<Family> {
    let seconds = |ms: Option<u64>| ms.map(|ms| ms as f64 / 1000.0);
    vec![
        by_run(all, ("last_run_timestamp_seconds", "When the last run of a command began."), |r| {
            Some(r.time as f64)
        }),
        by_run(all, ("last_run_duration_seconds", "How long it took."), |r| Some(r.seconds)),
        by_run(all, ("last_run_exit_code", "Its exit code."), |r| Some(f64::from(r.exit_code))),
        by_run(all, ("last_run_stopped_seconds", "How long it had the guest stopped."), |r| {
            seconds(r.stopped_ms)
        }),
        by_run(
            all,
            ("last_run_frozen_seconds", "How long it had the guest's file systems frozen."),
            |r| seconds(r.frozen_ms),
        ),
    ]
}

fn of_run_disks(all: &[DirectoryHealth]) -> Vec<Family> {
    let by = |(name, help): (&'static str, &'static str), value: fn(&DiskEntry) -> Option<u64>| {
        let mut values = BTreeMap::new();
        for run in all.iter().flat_map(|d| &d.last_runs) {
            for disk in &run.disks {
                let of = [labels_of(run).as_slice(), &[("disk", disk.disk.as_str())]].concat();
                values.extend(value(disk).map(|bytes| (labels(&of), bytes as f64)));
            }
        }
        (name, help, values)
    };
    vec![
        by(("last_run_read_bytes", "Bytes of a disk that its job went through."), |d| d.read),
        by(("last_run_copied_bytes", "Bytes that were copied into the image."), |d| d.copied),
        by(("last_run_dirty_bytes", "Bytes that were to be copied."), |d| d.dirty),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_end_their_line_or_their_quotes() {
        let of = labels(&[("disk", "a\"b\\c\nd"), ("vm", "")]);
        assert_eq!(of, r#"{disk="a\"b\\c\nd",vm=""}"#);
    }

    #[test]
    fn each_sample_is_there_once_and_each_metric_is_described() {
        let mut run = Entry::begun("backup", 100);
        run.directory = Some("/b".into());
        run.stopped_ms = Some(1500);
        run.disks = vec![DiskEntry { disk: "sda".into(), copied: Some(7), ..DiskEntry::default() }];
        let dir = DirectoryHealth {
            directory: "/b".into(),
            status: Status::Ok,
            free_bytes: Some(1 << 40),
            size_bytes: None,
            disks: Vec::new(),
            trouble: Vec::new(),
            last_runs: vec![run],
            failed_runs: Vec::new(),
        };
        let text = text(&[dir.clone(), dir], 1_700_000_000);
        let samples: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
        let once: std::collections::BTreeSet<_> = samples.iter().collect();
        assert_eq!(samples.len(), once.len(), "{text}");
        for wanted in [
            "fleecefs_health_timestamp_seconds 1700000000",
            "fleecefs_free_bytes{directory=\"/b\"} 1099511627776",
            "fleecefs_last_run_stopped_seconds{directory=\"/b\",qmp=\"\",command=\"backup\"} 1.5",
            "fleecefs_last_run_copied_bytes{directory=\"/b\",qmp=\"\",command=\"backup\",disk=\"sda\"} 7",
        ] {
            assert!(samples.contains(&wanted), "{wanted}: {text}");
        }
        let (mut known, mut families) = (std::collections::BTreeSet::new(), 0);
        for line in text.lines() {
            let name = |l: &str| l.split([' ', '{']).next().unwrap().to_string();
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                families += 1;
                assert!(known.insert(name(rest)), "{line}");
            } else if !line.starts_with('#') {
                assert!(known.contains(&name(line)), "{line}");
            }
        }
        assert!(families > 20 && text.ends_with("# EOF\n"));
    }
}
