//! `fleecefs show`: all that is known about one point.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::health::{self, Booted, Boots, Health};
use super::paths::catalog;
use super::state::StateArgs;
use super::table::level_name;
use crate::chain::{Disk, POINT_HELP, manifest_of};
use crate::error::{Error, Kind, Result};
use crate::folder::PlainName;
use crate::manifest::{Achieved, ConfigFile, Manifest, vm_name, vm_uuid};
use crate::text::{path_text, to_text};
use crate::units::{human_bytes, iso_time};
use crate::{folder, manifest, output};

/// Show all that is known about a point: what its manifest says, and which VM and disk it is of
///
/// Times are in UTC. With --config a file that was stored with the backup is printed instead, by the
/// name that 'show' gives, such as a libvirt XML or a start script.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs show /backups/vm1 sda/latest
  fleecefs show /backups/vm1 sda/latest --config vm1.xml
  fleecefs show /backups/vm1 INC-1706260646-sda.qcow2 --json | jq .manifest.vm")]
pub(super) struct ShowArgs {
    /// The backup directory
    pub dir: PathBuf,
    #[arg(help = POINT_HELP)]
    point: PathBuf,
    /// Print the stored file of this name
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    config: Option<String>,
    /// Print JSON, with the VM's whole configuration as QEMU reported it
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub state: StateArgs,
}

/// The largest file that `backup --config` keeps, in bytes.
const LARGEST: u64 = 16 << 20;

/// Runs `fleecefs show`.
///
/// # Errors
/// The directory, the point or its manifest cannot be read; `NotFound` if there is no such file.
pub(super) fn run(args: ShowArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let (disk, point) = catalog.find(&args.point)?;
    let source = &disk.points[point].source;
    let (dir, image) = match (source.parent(), source.file_name()) {
        (Some(dir), Some(image)) => (dir, image),
        _ => return Err(Error::new(Kind::NotFound, "the point has no file").at_path(source)),
    };
    let manifest = manifest::read(dir, image)?;
    if let Some(name) = &args.config {
        return print_config(dir, manifest.as_ref(), name).map_err(|e| match e.kind() {
            Kind::NotFound => e.remedy(kept_elsewhere(disk, name)),
            _ => e,
        });
    }
    let last = health::memory(&args.state, &catalog).of(disk).into_iter().nth(point).flatten();
    let health = Health::of(&disk.points[point], last);
    let known = (health, Boots::of(&args.state, &catalog).get(disk, point));
    output::print(&match args.json {
        true => output::json_document(&as_json(disk, point, known, manifest.as_ref()))?,
        false => text(disk, point, known, manifest.as_ref()),
    })
}

fn print_config(dir: &Path, manifest: Option<&Manifest>, name: &str) -> Result<()> {
    let files = manifest.map(|m| m.config_files.as_slice()).unwrap_or_default();
    let file = files.iter().find(|c| base_name(c) == name).ok_or_else(|| {
        let what = format!("no file '{}' was kept with this point", path_text(name));
        Error::new(Kind::NotFound, what)
    })?;
    let failed = |e| Error::io(e, "cannot read the kept file").at_path(dir.join(&file.stored));
    let side =
        folder::Folder::open(dir).and_then(|d| d.folder(manifest::FOLDER)).map_err(failed)?;
    let stored = Path::new(&file.stored).file_name().unwrap_or_default();
    let bytes = PlainName::new(stored).and_then(|n| side.read_small(n, LARGEST)).map_err(failed)?;
    if blake3::hash(&bytes).to_hex().as_str() != file.blake3 {
        let what = "the kept file is damaged: its BLAKE3 differs";
        return Err(Error::new(Kind::Corrupt, what)
            .at_path(side.join(stored))
            .remedy("restore this file from another copy of the backup"));
    }
    output::written_by_others(|out| out.write_all(&bytes))
}

/// Where a kept file of this name is, else which files there are: the newest point need not have one.
fn kept_elsewhere(disk: &Disk, name: &str) -> String {
    let mut others = BTreeSet::new();
    for at in (0..disk.points.len()).rev() {
        let files = manifest_of(disk, at).map(|m| m.config_files).unwrap_or_default();
        if files.iter().any(|c| base_name(c) == name) {
            let point = path_text(&disk.path.join(&disk.points[at].name));
            return format!("the newest one is with {point}: name that point");
        }
        others.extend(files.iter().map(|c| path_text(&base_name(c))));
    }
    match others.is_empty() {
        true => {
            "with no point of this disk a file was kept: 'backup --config FILE' keeps one".into()
        }
        false => {
            let others = others.into_iter().collect::<Vec<_>>().join(", ");
            format!("files kept with points of this disk: {others}")
        }
    }
}

fn base_name(file: &ConfigFile) -> &str {
    file.path.rsplit('/').next().unwrap_or_default()
}

fn as_json(
    disk: &Disk,
    point: usize,
    (health, booted): (Health, Booted),
    manifest: Option<&Manifest>,
) -> Value {
    let p = &disk.points[point];
    json!({
        "disk": to_text(disk.path.as_os_str()),
        "point": p.name,
        "file": to_text(p.source.as_os_str()),
        "level": p.level,
        "time": iso_time(p.time),
        "size": p.size,
        "own_bytes": p.own_bytes,
        "depth": disk.stack(point).len(),
        "served": p.is_served(),
        "unavailable": p.unavailable,
        "verified": health.verified(),
        "booted": booted.json(),
        "manifest": manifest,
    })
}

/// Rows of a title and what stands there; empty ones are not shown.
struct Rows(String);

impl Rows {
    fn row(&mut self, title: &str, value: impl AsRef<str>) {
        if !value.as_ref().is_empty() {
            output::push_line(&mut self.0, format!("{title:<16}{}", path_text(value.as_ref())));
        }
    }
}

fn text(
    disk: &Disk,
    point: usize,
    (health, booted): (Health, Booted),
    manifest: Option<&Manifest>,
) -> String {
    let p = &disk.points[point];
    let mut rows = Rows(String::new());
    rows.row("point", to_text(disk.point_path(point).as_os_str()));
    rows.row("file", to_text(p.source.as_os_str()));
    rows.row("level", level_name(p.level));
    rows.row("time", iso_time(p.time));
    if p.is_served() || p.size > 0 {
        rows.row("disk size", human_bytes(p.size));
    }
    rows.row("takes", human_bytes(p.own_bytes));
    rows.row("parent", p.parent.map(|i| disk.points[i].name.as_str()).unwrap_or_default());
    rows.row("chain", &p.chain);
    rows.row("state", p.unavailable.as_ref().map_or(health.text(p), |f| f.message.clone()));
    rows.row("booted", booted.text());
    match manifest {
        Some(m) => of_manifest(&mut rows, m, p.consistency),
        None => {
            rows.row("manifest", "none: not made by fleecefs, or not recorded ('verify --create')")
        }
    }
    rows.0
}

fn of_manifest(rows: &mut Rows, m: &Manifest, known: Option<Achieved>) {
    rows.row("state of", m.state_of.as_deref().unwrap_or_default());
    rows.row("was of disk", m.linked_from.as_deref().unwrap_or_default());
    rows.row("run", &m.run);
    rows.row("VM", vm_name(&m.vm).unwrap_or_default());
    rows.row("VM uuid", vm_uuid(&m.vm).unwrap_or_default());
    rows.row("QEMU", &m.qemu_version);
    let d = &m.disk;
    for (title, value) in [
        ("disk file", &d.file),
        ("disk format", &d.format),
        ("device", &d.device),
        ("qdev", &d.qdev),
        ("serial", &d.serial),
        ("node", &d.node),
    ] {
        rows.row(title, value);
    }
    let c = &m.consistency;
    rows.row("consistency", Achieved::word(known));
    rows.row("because", &c.reason);
    if c.one_moment {
        rows.row("freeze point", "one for all disks of the run");
    }
    if c.stopped_ms > 0 {
        rows.row("guest stopped", format!("{} ms", c.stopped_ms));
    }
    if c.frozen_ms > 0 {
        rows.row("guest frozen", format!("{} ms", c.frozen_ms));
    }
    rows.row("frozen", c.frozen.join(", "));
    rows.row(
        "copied",
        format!("{} in {:.1} s", human_bytes(m.bytes_copied), m.duration_ms as f64 / 1000.0),
    );
    rows.row("file size", m.file_size.to_string());
    rows.row("blake3", m.blake3.as_deref().unwrap_or_default());
    rows.row("bitmap", m.bitmap.as_ref().map(|b| b.name.as_str()).unwrap_or_default());
    for file in &m.config_files {
        rows.row("config file", format!("{} (from {})", base_name(file), file.path));
    }
    for (title, list) in [("disk skipped", &m.skipped), ("disk failed", &m.failed)] {
        for s in list {
            rows.row(title, format!("{}: {}", s.disk, s.reason));
        }
    }
}
