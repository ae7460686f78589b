//! `fleecefs attach` and `detach`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::paths::{catalog, existing_folder, resolved};
use super::shared::JsonArgs;
use super::state::StateArgs;
use super::table::{Row, Table};
use super::{verbosity, work};
use crate::attach;
use crate::attach::{Attached, Disk, Listed, Options, State, Volume, What};
use crate::chain::{Catalog, beside};
use crate::error::{Error, Kind, Result};
use crate::fs::tree::Tree;
use crate::image::Cache;
use crate::output::{Line, Look};
use crate::text::{path_text, to_text};
use crate::units::iso_time;
use crate::{output, privileges};

/// Memory for looking up the points' names.
const CACHE_SIZE: u64 = 1 << 20;

/// Attach a point as a block device, with its partitions and volumes, and mount its file systems
///
/// A loop device is attached to the point, its partitions are made, LUKS and BitLocker volumes are opened with
/// --key-file, volume groups of LVM are activated under names of their own. With --mount, each file system is mounted
/// read-only (nosuid, nodev, noexec) in a folder of its name: p1, vg-root, disk. 'detach' undoes all that, also after
/// a crash. It needs root.
///
/// A point is the disk as after a power cut. So that the kernel can replay journals, what is written goes to an overlay
/// that is thrown away at the end; the backup is never written to. With --no-replay nothing is written at all, and what
/// was only in a journal is missing or old.
///
/// The kernel reads these file systems with all its rights, and a guest has written them. Where the guest is not
/// trusted, 'files' and 'mount --files' read them without the kernel, and a VM (-snapshot) with another one.
#[derive(Debug, Args)]
#[command(after_help = "\
File systems, and how each is mounted (in brackets: with --no-replay):
  ext2, ext3, ext4   ext4   errors=remount-ro [noload]; not if its journal is
                            on another device
  XFS                xfs    nouuid [norecovery]: also beside its original
  btrfs              btrfs  with an id of its own: also beside its original;
                            on one device only; not with --no-replay
  NTFS               ntfs-3g, else the kernel's ntfs3; umask=0077
  FAT                vfat   utf8,umask=0077
  exFAT              exfat  umask=0077, else mount.exfat-fuse
  LVM                lvm2, as volume group fleecefs_ID_gN; not with --no-replay
  LUKS, BitLocker    cryptsetup, with --key-file

Examples:
  fleecefs attach /backups/vm1 sda/latest                  the devices
  fleecefs attach /backups/vm1 sda/latest --mount /view    ls /view/p1
  fleecefs attach /backups/vm1 sda/latest --run            all disks of its run
  fleecefs attach --list
  fleecefs detach /view

By hand: 'Attaching by hand' in recovery.md (contrib/doc or
/usr/share/doc/fleecefs).")]
pub(super) struct AttachArgs {
    /// The backup directory
    #[arg(required_unless_present = "list")]
    dir: Option<PathBuf>,

    #[arg(required_unless_present = "list", help = crate::chain::POINT_HELP)]
    point: Option<PathBuf>,

    /// Mount the file systems in this folder, which has to be there
    #[arg(long, value_name = "FOLDER")]
    mount: Option<PathBuf>,

    /// Mount them for writing: what is written is thrown away by 'detach'
    #[arg(long, requires = "mount", conflicts_with = "no_replay")]
    rw: bool,

    /// Replay no journal and write nothing: devices are read-only
    #[arg(long)]
    no_replay: bool,

    /// Attach all disks of the point's run
    #[arg(long)]
    run: bool,

    /// Bytes of a sector, 512 or 4096 [default: as the partition table has it]
    #[arg(long, value_name = "BYTES", value_parser = sector)]
    sector: Option<u32>,

    /// A file with the key or passphrase of encrypted volumes, as cryptsetup reads it
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    /// List what is attached
    #[arg(long, conflicts_with_all = ["dir", "point", "mount", "rw", "no_replay", "run", "sector", "key_file"])]
    list: bool,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    pub print: JsonArgs,
}

/// Detach what 'attach' attached: mounts, volumes, devices, in this order
///
/// Whatever was written to the attached points is thrown away. What is in use stays, and is named; what an
/// interrupted 'attach' or 'detach' has left is cleaned up.
#[derive(Debug, Args)]
pub(super) struct DetachArgs {
    /// An id of 'attach --list', the folder of --mount or one in it, or a device, also of a partition or volume
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    what: Option<OsString>,

    /// Detach all
    #[arg(long)]
    all: bool,

    #[command(flatten)]
    state: StateArgs,
}

fn sector(text: &str) -> std::result::Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err(format!("'{text}' is neither 512 nor 4096")),
    }
}

/// Runs `fleecefs attach`.
///
/// # Errors
/// As the exit codes say; `Partial` if a partition or volume could not be made ready, or a file system not be mounted, and
/// others are.
pub(super) fn attach(args: &AttachArgs) -> Result<()> {
    let state = args.state.dir()?;
    if args.list {
        return list(&state, args.print.json);
    }
    let (Some(dir), Some(point)) = (&args.dir, &args.point) else {
        return Err(verbosity::usage("a backup directory and a point are needed"));
    };
    needs_root("attach")?;
    let catalog = catalog(dir)?;
    let backups = catalog.root.clone();
    let disks = disks(catalog, point, args.run)?;
    let mount = args.mount.as_deref().map(|m| existing_folder(m, "the folder to mount in"));
    let key = args.key_file.as_deref().map(|k| resolved(k, "cannot read the key"));
    let (mount, key, cancel) = (mount.transpose()?, key.transpose()?, work::undo_flag()?);
    let attached = attach::attach(&Options {
        state: &state,
        backups: &backups,
        disks: &disks,
        mount: mount.as_deref(),
        write: args.rw,
        replay: !args.no_replay,
        sector: args.sector,
        key: key.as_deref(),
        cancel: &cancel,
    })?;
    show(&attached, &disks, args.print.json)?;
    let left = attached.volumes.iter().filter(|v| is_left(v, mount.is_some())).count();
    let what = if mount.is_some() { "not mounted" } else { "not ready" };
    match left {
        0 => Ok(()),
        n => Err(Error::new(
            Kind::Partial,
            format!("{what}: {}", crate::units::counted(n as u64, "volume")),
        )
        .remedy("the reasons are above")),
    }
}

/// Whether a volume is not as it was asked for. What holds no files is no failure; what is not opened since there is no
/// key, or no overlay, is one only where it was to be mounted.
fn is_left(volume: &Volume, mounting: bool) -> bool {
    volume.failed || mounting && volume.mounted.is_none() && volume.note.is_some()
}

fn needs_root(what: &str) -> Result<()> {
    match privileges::is_root() {
        true => Ok(()),
        false => Err(Error::new(Kind::Permission, format!("only root may {what} block devices"))
            .remedy("'fleecefs files' and 'mount --files' read files without root")),
    }
}

/// The point, or all of its run, and where a mount shows them.
fn disks(catalog: Catalog, point: &Path, run: bool) -> Result<Vec<Disk>> {
    let (disk, index) = catalog.find(point)?;
    let mut chosen = vec![(disk, index)];
    if run {
        chosen.extend(beside(&catalog, disk, index));
    }
    let mut wanted = Vec::new();
    for (disk, point) in chosen {
        let at = catalog.disks.iter().position(|d| d.path == disk.path);
        if let Some(why) = &disk.points[point].unavailable {
            return Err(why.to_error());
        }
        wanted.push((at.unwrap_or_default(), point));
    }
    let tree = Tree::build(catalog, None, &Cache::new(CACHE_SIZE), false, |_| false);
    let paths = tree.paths();
    let disk = |(d, p): (usize, usize)| {
        let (disk, point) = (&tree.catalog.disks[d], &tree.catalog.disks[d].points[p]);
        let path = paths.iter().find(|(_, file)| file.index() == (d, p)).map(|(path, _)| path);
        let path = path.ok_or_else(|| {
            Error::new(Kind::NotFound, "a mount does not show this point").at_path(&point.source)
        })?;
        let name = to_text(disk.path.as_os_str());
        Ok(Disk { name, point: point.name.clone(), path: path.clone(), size: point.size })
    };
    wanted.into_iter().map(disk).collect()
}

fn show(attached: &Attached, disks: &[Disk], as_json: bool) -> Result<()> {
    let devices: Vec<String> = attached.devices.iter().map(path_text).collect();
    if as_json {
        let points = disks
            .iter()
            .zip(&devices)
            .map(|(d, device)| json!({"disk": d.name, "point": d.point, "device": device}));
        let document = json!({
            "id": attached.id,
            "points": points.collect::<Vec<_>>(),
            "volumes": volumes_json(&attached.volumes),
        });
        return output::print(&output::json_document(&document)?);
    }
    let mut lines = Vec::new();
    for (disk, device) in disks.iter().zip(&devices) {
        let text = format!("{}/{} is attached as {device}", disk.name, disk.point);
        lines.push(Line::new(Look::Plain, text));
    }
    lines.extend(volumes_table(&attached.volumes).lines(verbosity::is_verbose()));
    let hint = format!("'fleecefs detach {}' undoes it", attached.id);
    lines.push(Line::new(Look::Plain, hint));
    output::print_lines(&lines)
}

fn volumes_table(volumes: &[Volume]) -> Table {
    let or_none = |path: &Option<PathBuf>| path.as_ref().map_or("-".into(), path_text);
    let mut rows = Vec::new();
    for v in volumes {
        let cells = [v.name.clone(), or_none(&v.device), v.content.clone(), or_none(&v.mounted)];
        rows.push(Row::Cells(cells.into(), Look::Plain));
        rows.extend(v.note.clone().map(|note| Row::Below(note, Look::Plain)));
    }
    let titles = &["NAME", "DEVICE", "CONTENT", "MOUNTED"];
    Table { titles, right: &[], less: &[], indent: 2, rows }
}

fn volumes_json(volumes: &[Volume]) -> Vec<Value> {
    let text = |path: &Option<PathBuf>| path.as_ref().map(|p| to_text(p.as_os_str()));
    let one = |v: &Volume| {
        json!({
            "name": v.name,
            "device": text(&v.device),
            "content": v.content,
            "mounted": text(&v.mounted),
            "note": v.note,
        })
    };
    volumes.iter().map(one).collect()
}

fn list(state: &Path, as_json: bool) -> Result<()> {
    let all = attach::list(state)?;
    let unreadable = all.iter().filter(|one| one.error.is_some()).count();
    if as_json {
        let all: Vec<Value> = all.iter().map(listed_json).collect();
        output::print(&output::json_document(&json!({"attached": all}))?)?;
    } else if all.is_empty() {
        output::print("nothing is attached\n")?;
    } else {
        output::print_lines(&lines(&all))?;
    }
    match unreadable {
        0 => Ok(()),
        n => {
            let what = format!("not readable: {}", crate::units::counted(n as u64, "journal"));
            Err(Error::new(Kind::Partial, what).remedy("the reasons are above"))
        }
    }
}

fn lines(all: &[Listed]) -> Vec<Line> {
    let mut lines = Vec::new();
    for one in all {
        lines.push(Line::new(Look::Bold, heading(one)));
        lines.extend(volumes_table(&one.volumes).lines(verbosity::is_verbose()));
    }
    lines
}

/// `1f3a9c2e: sda/FULL-1 of /backups, /dev/loop3, by root since 2024-01-26T09:17:26Z`.
fn heading(one: &Listed) -> String {
    let mut text = format!("{}: ", one.id);
    match &one.begin {
        Some(begin) => {
            let devices =
                if one.devices.is_empty() { String::new() } else { one.devices.join(", ") + ", " };
            text += &format!(
                "{} of {}, {devices}by {} since {}",
                begin.points.join(", "),
                path_text(&begin.backups),
                user(begin.uid),
                iso_time(begin.started)
            );
        }
        None => text += &one.error.as_ref().map_or("nothing is known of it".into(), Error::report),
    }
    match one.state {
        State::Attached => text,
        State::Changing => text + " (being attached or detached)",
        State::Stale => text + " (stale: 'fleecefs detach' cleans up)",
        State::Unreadable => text + " (unreadable)",
    }
}

/// A user's name, or number.
fn user(uid: u32) -> String {
    let name = privileges::users::name(uid);
    name.map_or_else(|| uid.to_string(), |n| n.to_string_lossy().into_owned())
}

fn listed_json(one: &Listed) -> Value {
    let begin = one.begin.as_ref();
    json!({
        "id": one.id,
        "state": one.state,
        "backups": begin.map(|b| to_text(b.backups.as_os_str())),
        "points": begin.map(|b| b.points.clone()).unwrap_or_default(),
        "user": begin.map(|b| user(b.uid)),
        "pid": begin.map(|b| b.pid),
        "since": begin.map(|b| iso_time(b.started)),
        "mount": begin.and_then(|b| b.mount.as_ref()).map(|m| to_text(m.as_os_str())),
        "devices": one.devices,
        "volumes": volumes_json(&one.volumes),
        "error": one.error.as_ref().map(Error::report),
    })
}

/// Runs `fleecefs detach`.
///
/// # Errors
/// `NotFound` if there is no such thing, `Busy` if something of it is in use.
pub(super) fn detach(args: &DetachArgs) -> Result<()> {
    needs_root("detach")?;
    let state = args.state.dir()?;
    let what = args.what.clone().map_or(What::All, What::Named);
    let done = attach::detach(&state, &what)?;
    match (done.is_empty(), verbosity::is_quiet()) {
        (true, false) => output::print("nothing is attached\n"),
        _ => Ok(()),
    }
}
