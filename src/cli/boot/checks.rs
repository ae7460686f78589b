//! `fleecefs boot --check`: of one run, or of the newest of each VM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::args::BootArgs;
use super::prepare::{prepared, scratch};
use super::with_display;
use crate::boot::{Checked, Criteria, Disks, Outputs, Running, check};
use crate::chain::Catalog;
use crate::cli::one_run::{self, OneRun};
use crate::cli::paths::to_make;
use crate::cli::{unsound, work};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder};
use crate::history::Entry;
use crate::mount::check_outside;
use crate::output;
use crate::restore::run;
use crate::restore::run::{Guest, Run};
use crate::text::{path_text, to_text, visible_lines};
use crate::units::iso_time;
use crate::verify::last_verified::{remember_boot, wait_for_clock};

/// What can be done where the newest run of a VM is not whole.
const OLDER_RUNS: &str =
    "'fleecefs list --runs' shows older runs, which can be checked by their ids";
/// The longest part of a file's name that comes from a VM's.
const LONGEST_NAME: usize = 64;

/// A VM to check: its points, or why it cannot be started as it was.
enum Chosen<'a> {
    Whole(Box<OneRun<'a>>),
    /// Nothing of it is started.
    Refused(Box<Report>),
}

/// A VM that was checked, or why it could not be.
struct Report {
    name: String,
    run: Option<String>,
    /// Of its newest point.
    time: Option<i64>,
    points: Vec<(String, String)>,
    result: Result<Checked>,
    picture: Option<PathBuf>,
    log: Option<PathBuf>,
}

impl Report {
    /// Of a VM of which nothing is known.
    fn none() -> Self {
        Report {
            name: String::new(),
            run: None,
            time: None,
            points: Vec::new(),
            result: Err(Error::new(Kind::Interrupted, "not checked")),
            picture: None,
            log: None,
        }
    }

    /// Of what was not checked yet.
    fn of(run: &OneRun<'_>) -> Self {
        let first = run.points.first();
        let manifest = first.and_then(|c| c.manifest.as_ref());
        Report {
            name: first.map(|c| Guest::of(c.disk, manifest).name()).unwrap_or_default(),
            run: manifest.map(|m| m.run.clone()).filter(|r| !r.is_empty()),
            time: run.points.iter().map(|c| c.disk.points[c.point].time).max(),
            points: run
                .points
                .iter()
                .map(|c| (to_text(c.disk.path.as_os_str()), c.disk.points[c.point].name.clone()))
                .collect(),
            ..Report::none()
        }
    }
}

impl Report {
    /// For the history.
    fn tell(&self, entry: &mut Entry) {
        let error = match &self.result {
            Ok(c) if c.passed => None,
            Ok(c) => Some(c.reason.clone()),
            Err(e) => Some(e.report()),
        };
        for (disk, point) in &self.points {
            entry.add_point(Path::new(disk), point, error.clone());
        }
        entry.vm = (!self.name.is_empty()).then(|| self.name.clone());
        entry.run.clone_from(&self.run);
    }
}

/// Checks what the user says.
///
/// # Errors
/// `Unsound` if a VM does not come up; why one could not be started.
pub(super) fn run(args: &BootArgs, catalog: &Catalog, entry: &mut Entry) -> Result<()> {
    let cancel = work::undo_flag()?;
    let chosen = match args.check.all_latest {
        true => newest_of_each(catalog)?,
        false => vec![Chosen::Whole(Box::new(one_run::find(catalog, &args.points)?))],
    };
    // What can be said without the folder is said before it is made.
    args.wanted()?;
    let out = args.check.out.as_deref().map(|path| out_folder(path, catalog)).transpose()?;
    let mut reports = Vec::new();
    for (number, chosen) in chosen.into_iter().enumerate() {
        let number = args.check.all_latest.then_some(number + 1);
        let (tried, report) = match chosen {
            Chosen::Whole(run) => (true, one(args, catalog, &run, (out.as_ref(), number), &cancel)),
            Chosen::Refused(report) => (false, *report),
        };
        if let Err(e) = &report.result
            && e.kind() == Kind::Interrupted
        {
            return report.result.map(drop);
        }
        let passed = report.result.as_ref().is_ok_and(|c| c.passed);
        report.tell(entry);
        if !args.json() {
            output::print(&text(&report))?;
        }
        reports.push(report);
        // What one VM lacks says nothing of the next.
        if tried && !passed && !args.check.keep_going {
            break;
        }
    }
    if args.json() {
        let all: Vec<Value> = reports.iter().map(as_json).collect();
        output::print(&output::json_document(&json!({"checks": all}))?)?;
    }
    verdict(reports)
}

/// The error for those that did not come up.
fn verdict(reports: Vec<Report>) -> Result<()> {
    let all = reports.len();
    let down = reports.iter().filter(|r| r.result.as_ref().is_ok_and(|c| !c.passed)).count();
    let mut errors: Vec<Error> = reports.into_iter().filter_map(|r| r.result.err()).collect();
    match (down, errors.len()) {
        (0, 0) => Ok(()),
        // One that was never started says nothing of the others.
        (0, 1) if all == 1 => Err(errors.remove(0)),
        (0, n) => Err(Error::new(Kind::Unproven, format!("not started: {n} of {all} VMs"))
            .remedy("the reasons are above")),
        (n, _) if all == 1 && n == 1 => Err(Error::new(Kind::Unsound, "the VM does not come up")),
        (n, 0) => Err(Error::new(Kind::Unsound, format!("not up: {n} of {all} VMs"))),
        (n, m) => {
            let what = format!("not up: {n} of {all} VMs, and {m} were not started");
            Err(Error::new(Kind::Unsound, what))
        }
    }
}

/// The newest run of each VM.
///
/// # Errors
/// `NotFound` if there is none.
fn newest_of_each(catalog: &Catalog) -> Result<Vec<Chosen<'_>>> {
    let all = run::newest_of_each(catalog)?.into_iter();
    let choose = |(guest, run)| choose(catalog, run).unwrap_or_else(|e| refused(&guest, e));
    Ok(all.map(choose).collect())
}

fn refused<'a>(guest: &Guest, e: Error) -> Chosen<'a> {
    let report = Report { name: guest.name(), result: Err(e), ..Report::none() };
    Chosen::Refused(Box::new(report))
}

/// Whether a run can be started as it was.
fn choose<'a>(catalog: &Catalog, run: Result<Run<'a>>) -> Result<Chosen<'a>> {
    let Run { points, without, missing } = run?;
    one_run::warn_of_others(&without);
    let run = one_run::of_points(points)?;
    Ok(match missing.first() {
        None => Chosen::Whole(Box::new(run)),
        Some(i) => {
            let result = Err(one_run::is_missing(catalog, i).remedy(OLDER_RUNS));
            Chosen::Refused(Box::new(Report { result, ..Report::of(&run) }))
        }
    })
}

fn out_folder(path: &Path, catalog: &Catalog) -> Result<Folder> {
    let real = to_make(path)?;
    check_outside(&real, &catalog.root)?;
    let failed = |e| Error::io(e, "cannot make the folder for the report").at_path(path);
    folder::make_folders(&real).map_err(failed)
}

/// Checks one VM, and keeps what was found.
fn one(
    args: &BootArgs,
    catalog: &Catalog,
    run: &OneRun<'_>,
    (out, number): (Option<&Folder>, Option<usize>),
    cancel: &Arc<AtomicBool>,
) -> Report {
    unsound::warn(&args.state, catalog, run.points.iter().map(|c| (c.disk, c.point)));
    let mut report = Report::of(run);
    let base = file_name(&report.name, report.time.unwrap_or(0), number);
    let since = wait_for_clock(catalog);
    let log = out.map(|folder| new_file(folder, &format!("{base}.log"))).transpose();
    report.result = log.and_then(|log| {
        report.log = log.as_ref().map(|(_, path)| path.clone());
        started(args, catalog, run, log.map(|(file, _)| file), cancel)
    });
    if let Ok(checked) = &report.result {
        remember(args, catalog, run, (checked.passed, since));
        report.picture =
            out.and_then(|folder| keep_picture(folder, &format!("{base}.png"), checked));
    }
    report
}

fn started(
    args: &BootArgs,
    catalog: &Catalog,
    run: &OneRun<'_>,
    log: Option<File>,
    cancel: &Arc<AtomicBool>,
) -> Result<Checked> {
    let prepared = prepared(&args.wanted()?, run)?;
    let check_args = &args.check;
    let criteria = Criteria {
        agent: check_args.exec.is_some()
            || (check_args.expect.is_none() && check_args.tcp.is_none()),
        serial: check_args.expect.is_some(),
        tcp: check_args.tcp,
        exec: check_args.exec.clone(),
        timeout: check_args.timeout,
    };
    let outputs = Outputs {
        log,
        echo: false,
        expect: check_args.expect.clone(),
        display: None,
        ports: check_args.tcp.into_iter().collect(),
    };
    let scratch = scratch(args, catalog)?;
    with_display((args.how.display.as_deref(), catalog), |listener| {
        let outputs = Outputs { display: listener, ..outputs };
        let disks = Disks::new(prepared.points, scratch, &catalog.root)?;
        check(Running::start(&prepared.vm, disks, outputs, cancel)?, &criteria)
    })
}

/// A name that can be a file's, of a VM's name and a run's time.
fn file_name(guest: &str, time: i64, number: Option<usize>) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let guest: String = guest.chars().take(LONGEST_NAME).map(plain).collect();
    let time = iso_time(time).replace(':', "");
    let guest = if guest.is_empty() { "vm".to_string() } else { guest };
    match number {
        Some(number) => format!("{number}-{guest}-{time}"),
        None => format!("{guest}-{time}"),
    }
}

/// A new file in the place of an older one.
fn new_file(folder: &Folder, name: &str) -> Result<(File, PathBuf)> {
    let path = folder.join(name);
    let made = folder.remove_if_there(name).and_then(|_| folder.create_new(name));
    let file = made.map_err(|e| Error::io(e, "cannot make the serial log").at_path(&path))?;
    Ok((file, path))
}

fn keep_picture(folder: &Folder, name: &str, checked: &Checked) -> Option<PathBuf> {
    let bytes = match &checked.picture {
        Ok(bytes) => bytes,
        Err(why) => {
            log::warn!("cannot take a screenshot of the console: {why}");
            return None;
        }
    };
    match folder.write_whole(name, bytes) {
        Ok(()) => Some(folder.join(name)),
        Err(e) => {
            log::warn!("cannot save the screenshot {}: {e}", path_text(name));
            None
        }
    }
}

/// For `list`. Where that is not possible the result is no worse.
fn remember(
    args: &BootArgs,
    catalog: &Catalog,
    run: &OneRun<'_>,
    (passed, since): (bool, SystemTime),
) {
    let points: Vec<(&Path, usize)> =
        run.points.iter().map(|c| (c.disk.path.as_path(), c.point)).collect();
    let state = args.state.dir();
    let kept = state.and_then(|dir| remember_boot(&dir, catalog, &points, passed, since));
    if let Err(e) = kept {
        log::info!("'list' will not show that this was booted: {}", e.report());
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let name = if report.name.is_empty() { "VM".into() } else { path_text(&report.name) };
    let time = report.time.map(|t| format!(", {}", iso_time(t)));
    let head = format!("{name}{}", time.unwrap_or_default());
    match &report.result {
        Ok(c) if c.passed => {
            let line = format!("{head}: up after {} s: {}", c.took.as_secs(), c.reason);
            output::push_line(&mut text, line);
        }
        Ok(c) => {
            output::push_line(&mut text, format!("{head}: NOT UP: {}", path_text(&c.reason)));
            for line in visible_lines(&c.serial.replace('\r', ""))
                .lines()
                .rev()
                .take(5)
                .collect::<Vec<_>>()
                .iter()
                .rev()
            {
                output::push_line(&mut text, format!("  serial: {line}"));
            }
        }
        Err(e) => output::push_line(&mut text, format!("{head}: not started: {}", e.report())),
    }
    if let Ok(Some(done)) = report.result.as_ref().map(|c| c.exec.as_ref()) {
        let both = format!("{}{}", done.stdout, done.stderr);
        for line in visible_lines(&both).lines() {
            output::push_line(&mut text, format!("  {line}"));
        }
    }
    for (what, path) in [("picture", &report.picture), ("serial log", &report.log)] {
        if let Some(path) = path {
            output::push_line(&mut text, format!("  {what}: {}", path_text(path)));
        }
    }
    text
}

fn as_json(report: &Report) -> Value {
    let path = |p: &Option<PathBuf>| p.as_ref().map(|p| to_text(p.as_os_str()));
    let points = report.points.iter().map(|(disk, point)| json!({"disk": disk, "point": point}));
    let checked = report.result.as_ref().ok();
    json!({
        "vm": report.name,
        "run": report.run,
        "time": report.time.map(iso_time),
        "points": points.collect::<Vec<_>>(),
        "passed": checked.is_some_and(|c| c.passed),
        "reason": checked.map(|c| &c.reason),
        "seconds": checked.map(|c| c.took.as_secs_f64()),
        "exec": checked.and_then(|c| c.exec.as_ref()),
        "picture": path(&report.picture),
        "serial_log": path(&report.log),
        "serial_end": checked.map(|c| &c.serial),
        "disk_errors": checked.map(|c| &c.disk_errors),
        "error": report.result.as_ref().err().map(Error::object),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_name_makes_no_path() {
        assert_eq!(file_name("../../a b", 0, Some(3)), "3-______a_b-1970-01-01T000000Z");
        assert_eq!(file_name("", 0, None), "vm-1970-01-01T000000Z");
        assert!(file_name(&"\u{e9}".repeat(500), 0, None).len() < 100);
    }
}
