//! `fleecefs config`: what a VM was, and which point is which of its drives.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::config_file::{FileCommand, Program};
use super::one_run::{self, ChosenPoint, OneRun};
use super::paths::catalog;
use super::restore::names_in_run;
use super::shared::JsonArgs;
use super::table::{Row, Table};
use super::verbosity;
use crate::chain::Disk;
use crate::error::Result;
use crate::machine::{DiskDevice, Machine};
use crate::output;
use crate::output::{Line, Look};
use crate::text::{path_text, to_text};
use crate::units::{human_bytes, iso_time};

/// Show what a VM was: its machine, and which point or restored file is which of its drives
///
/// 'backup' records that with each point: type of machine, processor, memory, firmware, TPM, and of each disk its bus,
/// place on it, serial number, and when it is tried at boot. RESTORED AS is the file that 'restore --run' makes of it.
/// (A file that was given to 'backup --config', such as a libvirt XML, is printed by 'show --config'.)
///
/// What a manifest tells is shown as far as it can be true; what cannot is omitted.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs config /backups/vm1                     of the newest run
  fleecefs config /backups/vm1 2026-11-22          of the newest run of that day
  fleecefs config /backups/vm1 --json | jq .machine.nets
  fleecefs config check                            what 'backup --all' goes by")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(disable_help_subcommand = true)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    file: Option<FileCommand>,
    /// The backup directory (./check for one of that name)
    #[arg(required = true)]
    pub dir: Option<PathBuf>,
    /// The run: latest, a date or time, its id; or a point [default: latest]
    #[arg(value_name = "RUN")]
    run: Option<PathBuf>,
    #[command(flatten)]
    print: JsonArgs,
}

impl ConfigArgs {
    /// Whether it prints JSON.
    pub(super) fn json(&self) -> bool {
        self.file.as_ref().map_or(self.print.json, FileCommand::json)
    }
}

/// Runs `fleecefs config`.
///
/// # Errors
/// The directory cannot be read; as [`one_run::find`].
pub(super) fn run(args: &ConfigArgs, program: Program) -> Result<()> {
    let dir = match (&args.file, &args.dir) {
        (Some(file), _) => return file.run(program),
        (None, Some(dir)) => dir,
        (None, None) => return Err(verbosity::usage("no backup directory is given")),
    };
    let catalog = catalog(dir)?;
    let run = one_run::find(&catalog, args.run.as_slice())?;
    let drives = drives(&run);
    if args.print.json {
        let drives: Vec<Value> = drives.iter().map(Drive::json).collect();
        let document = json!({"machine": run.machine, "drives": drives});
        return output::print(&output::json_document(&document)?);
    }
    let mut lines = machine_lines(&run.machine);
    lines.push(Line::new(Look::Plain, ""));
    lines.extend(drives_table(&drives).lines(verbosity::is_verbose()));
    output::print_lines(&lines)
}

/// A point, and the drive that it is of.
struct Drive<'a> {
    chosen: &'a ChosenPoint<'a>,
    device: Option<&'a DiskDevice>,
    restored: PathBuf,
}

fn drives<'a>(run: &'a OneRun<'a>) -> Vec<Drive<'a>> {
    let points: Vec<(&Disk, usize)> = run.points.iter().map(|c| (c.disk, c.point)).collect();
    let names = names_in_run(None, &points);
    let all = run.points.iter().zip(names);
    let drive = |(chosen, (restored, _)): (&'a ChosenPoint<'a>, _)| Drive {
        chosen,
        device: chosen.manifest.as_ref().and_then(|m| run.machine.disk(&m.disk.qdev)),
        restored,
    };
    all.map(drive).collect()
}

impl Drive<'_> {
    fn json(&self) -> Value {
        let (disk, point) = (self.chosen.disk, &self.chosen.disk.points[self.chosen.point]);
        json!({
            "disk": to_text(disk.path.as_os_str()),
            "point": point.name,
            "time": iso_time(point.time),
            "size": point.size,
            "restored_as": to_text(self.restored.as_os_str()),
            "device": self.device.map(|d| &d.device),
            "type": self.device.map(|d| &d.kind),
            "bus": self.device.and_then(|d| d.bus).map(|b| b.word()),
            "address": self.device.and_then(|d| d.address.as_ref()),
            "serial": self.device.and_then(|d| d.serial.as_ref()),
            "boot_index": self.device.and_then(|d| d.boot_index),
        })
    }
}

fn machine_lines(m: &Machine) -> Vec<Line> {
    let unknown = || "not known".to_string();
    let text = |t: &Option<String>| t.as_ref().map(path_text);
    let processors = m.cpus.map(|n| crate::units::counted(u64::from(n), "processor"));
    let cpu = [text(&m.cpu), processors].into_iter().flatten().collect::<Vec<_>>().join(", ");
    let firmware = match (&m.machine, m.uefi, m.smm) {
        (None, false, _) => unknown(),
        (_, false, _) => "BIOS".into(),
        (_, true, false) => "UEFI".into(),
        (_, true, true) => "UEFI, protected (Secure Boot)".into(),
    };
    let mut rows = vec![
        ("VM", text(&m.name).unwrap_or_else(unknown)),
        ("UUID", text(&m.uuid).unwrap_or_else(unknown)),
        ("machine", text(&m.machine).unwrap_or_else(unknown)),
        ("CPU", if cpu.is_empty() { unknown() } else { cpu }),
        ("memory", m.memory.map_or_else(unknown, human_bytes)),
        ("firmware", firmware),
    ];
    rows.extend(m.tpm.as_ref().map(|t| ("TPM", format!("{t} (its state is not backed up)"))));
    for net in &m.nets {
        let mac = net.mac.as_ref().map_or_else(String::new, |mac| format!(" {mac}"));
        rows.push(("network", format!("{}{mac}", net.kind)));
    }
    if !m.options.is_empty() {
        rows.push(("options", path_text(&m.options.join(" "))));
    }
    rows.into_iter().map(|(k, v)| Line::new(Look::Plain, format!("{k:<10}{v}"))).collect()
}

/// What can be left out where there is no room.
const LESS: &[&str] = &["RESTORED AS", "ADDRESS", "SERIAL"];

fn drives_table(drives: &[Drive<'_>]) -> Table {
    let rows = drives.iter().map(|d| {
        let text = |t: Option<&String>| t.map_or_else(|| "-".to_string(), path_text);
        let cells = vec![
            path_text(&d.chosen.disk.path),
            path_text(&d.chosen.disk.points[d.chosen.point].name),
            d.device.and_then(|d| d.bus).map_or("-", |b| b.word()).to_string(),
            text(d.device.and_then(|d| d.address.as_ref())),
            text(d.device.and_then(|d| d.serial.as_ref())),
            d.device.and_then(|d| d.boot_index).map_or("-".into(), |n| n.to_string()),
            path_text(&d.restored),
        ];
        Row::Cells(cells, Look::Plain)
    });
    let titles = &["DISK", "POINT", "BUS", "ADDRESS", "SERIAL", "BOOT", "RESTORED AS"];
    Table { titles, right: &[], less: LESS, indent: 0, rows: rows.collect() }
}
