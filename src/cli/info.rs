//! `fleecefs info` and `fleecefs cleanup`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use super::shared::{JsonArgs, QmpArgs};
use super::state::{StateArgs, of_owners};
use super::status::StatusArgs;
use super::{paths, status, verbosity};
use crate::backup::fleece::migration;
use crate::backup::graph::bitmap;
use crate::backup::info;
use crate::backup::info::{BitmapLine, CleanupChoice};
use crate::backup::state::control;
use crate::backup::state::lock::Lock;
use crate::backup::target::target_id::TargetId;
use crate::backup::target::targets::Targets;
use crate::error::{Error, Kind, Result};
use crate::output;
use crate::qmp::{Address, Client};
use crate::text::path_text;
use crate::units::human_bytes;

/// Show disks, bitmaps and jobs of a running VM, or the state of its backup
#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// What to show
    #[command(subcommand)]
    what: InfoCommand,
}

#[derive(Debug, Subcommand)]
enum InfoCommand {
    /// Show the disks: which would be backed up and how, and why others would be skipped
    Blockdev(Common),
    /// Show the dirty bitmaps, whose they are, and how much is dirty
    Bitmaps(Common),
    /// Show the jobs that run in QEMU
    Jobs(Common),
    /// Show the running backup of this VM, or that a killed one has to be cleaned up
    Status(StatusArgs),
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    vm: QmpArgs,

    #[command(flatten)]
    print: JsonArgs,

    #[command(flatten)]
    state: StateArgs,
}

/// Remove dirty bitmaps that no chain needs any more
///
/// Without --keep, --uuid or --all only inconsistent bitmaps are removed: QEMU marks a bitmap so when it did
/// not end cleanly. A disk whose bitmap is removed gets a FULL next time.
///
/// After 'backup --init' started a new backup directory, the bitmaps of the old one keep recording, which
/// takes memory, and space in the image. 'cleanup --uuid ID' removes them; 'info bitmaps' shows the ID.
/// 'cleanup --keep DIR' removes the bitmaps of all directories but DIR. It is refused if this would remove
/// bitmaps of another directory that this machine remembers, mounted or not.
#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    #[command(flatten)]
    vm: QmpArgs,

    /// Remove all bitmaps of fleecefs except those of this backup directory; may be given more than once
    #[arg(long, value_name = "DIR", conflicts_with_all = ["uuid", "all"])]
    keep: Vec<PathBuf>,

    /// With --keep: also remove those of remembered backup directories that are not named (their next backup
    /// is a FULL)
    #[arg(long, requires = "keep")]
    all_targets: bool,

    /// Remove the bitmaps of the backup directory with this id: the content of its file 'uuid', or the eight
    /// digits that 'info bitmaps' shows as target
    #[arg(long, value_name = "ID")]
    uuid: Option<String>,

    /// Remove all bitmaps of fleecefs, of every backup directory
    #[arg(long, visible_alias = "remove-bitmap", conflicts_with = "uuid")]
    all: bool,

    /// Also remove those of qmpbackup
    #[arg(long)]
    foreign: bool,

    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,

    #[command(flatten)]
    state: StateArgs,
}

impl InfoArgs {
    /// The backup directory, if `info status` names it.
    pub(super) fn target(&self) -> Option<&Path> {
        if let InfoCommand::Status(a) = &self.what { a.target() } else { None }
    }

    /// Whether it prints JSON.
    pub(super) fn json(&self) -> bool {
        match &self.what {
            InfoCommand::Blockdev(c) | InfoCommand::Bitmaps(c) | InfoCommand::Jobs(c) => {
                c.print.json
            }
            InfoCommand::Status(a) => a.json(),
        }
    }

    /// Where the state is that `info status` shows.
    pub(super) fn state(&mut self) -> Option<&mut StateArgs> {
        if let InfoCommand::Status(a) = &mut self.what { Some(a.state()) } else { None }
    }
}

/// Runs `fleecefs info`.
///
/// # Errors
/// QEMU cannot be reached.
pub(super) fn run(args: InfoArgs) -> Result<()> {
    let (common, what): (&Common, fn(&Common) -> Result<String>) = match &args.what {
        InfoCommand::Blockdev(c) => (c, blockdev),
        InfoCommand::Bitmaps(c) => (c, bitmaps),
        InfoCommand::Jobs(c) => (c, jobs),
        InfoCommand::Status(args) => return status::run(args),
    };
    let text = what(common)?;
    if common.print.json { output::print(&text) } else { output::print_sentences(&text) }
}

/// The text, or that there is nothing to show.
fn or_none(text: String, what: &str) -> String {
    if text.is_empty() { format!("no {what}\n") } else { text }
}

fn connect(common: &Common) -> Result<Client> {
    let vm = common.vm.address()?;
    Client::connect(&vm).map_err(|e| match e.kind() {
        Kind::Busy if is_running(common, &vm) => {
            Error::new(Kind::Busy, "a backup of this VM is running and uses the socket")
                .remedy("'fleecefs info status' shows it")
        }
        _ => e,
    })
}

fn is_running(common: &Common, vm: &Address) -> bool {
    let asked = common.state.dir().and_then(|d| control::ask(&d, vm, "status"));
    matches!(asked, Ok(Some(_)))
}

fn blockdev(common: &Common) -> Result<String> {
    let list = info::disks(&mut connect(common)?)?;
    if common.print.json {
        return output::json_document(&json!({"disks": list}));
    }
    let mut text = String::new();
    for d in &list {
        let word = if d.included { "backed up" } else { "skipped" };
        output::push_line(&mut text, format!("{}: {word}: {}", path_text(&d.disk), d.how));
        if !d.file.is_empty() {
            let size = human_bytes(d.size);
            output::push_line(
                &mut text,
                format!("  {} {size} {} node {}", d.format, path_text(&d.file), path_text(&d.node)),
            );
        }
        for b in &d.bitmaps {
            output::push_line(&mut text, format!("  {}", bitmap_line(b)));
        }
    }
    Ok(text)
}

fn bitmap_line(b: &BitmapLine) -> String {
    let flags = [
        (b.recording, "recording"),
        (b.persistent, "persistent"),
        (b.inconsistent, "INCONSISTENT"),
        (b.busy, "busy"),
    ];
    let flags = flags.iter().filter(|f| f.0).map(|f| f.1);
    let what = match (b.dirty, b.watermark) {
        (Some(dirty), _) => format!("{} dirty", human_bytes(dirty)),
        (None, Some(size)) => format!("watermark over {}", human_bytes(size)),
        (None, None) => "watermark".to_string(),
    };
    let facts: Vec<&str> = std::iter::once(what.as_str()).chain(flags).collect();
    format!("bitmap {}: {} ({})", b.name, facts.join(", "), b.owner)
}

fn lines(all: impl Iterator<Item = String>) -> String {
    let mut text = String::new();
    all.for_each(|line| output::push_line(&mut text, line));
    text
}

fn bitmaps(common: &Common) -> Result<String> {
    let list = info::bitmaps(&mut connect(common)?)?;
    if common.print.json {
        return output::json_document(&json!({"bitmaps": list}));
    }
    let text = lines(list.iter().map(|b| format!("{}: {}", node_and_disk(b), bitmap_line(b))));
    Ok(or_none(text, "dirty bitmaps"))
}

/// The node, and the disk beside it.
fn node_and_disk(b: &BitmapLine) -> String {
    let node = path_text(&b.node);
    match b.disk.as_str() {
        "" => node,
        disk if disk == b.node => node,
        disk => format!("{node} ({})", path_text(disk)),
    }
}

fn jobs(common: &Common) -> Result<String> {
    let list = info::jobs(&mut connect(common)?)?;
    if common.print.json {
        return output::json_document(&json!({"jobs": list}));
    }
    let line = |j: &crate::qmp::types::Job| {
        let done = human_bytes(j.current_progress);
        let error = j.error.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
        format!(
            "{} {} {} {done} of {}{error}",
            j.id,
            j.kind,
            j.status,
            human_bytes(j.total_progress)
        )
    };
    Ok(or_none(lines(list.iter().map(line)), "jobs"))
}

/// Fails if bitmaps of another backup directory that is remembered are chosen, whether it is there or not: a
/// bitmap that stays does no harm, and one that goes costs a FULL.
fn check_targets(targets: &Targets, chosen: &[BitmapLine]) -> Result<()> {
    let (mut there, mut gone) = (Vec::new(), Vec::new());
    for (path, id, now) in targets.with_ids() {
        let is_there = now.is_some();
        let Some(known) = now.or_else(|| TargetId::named(&id).ok()) else { continue };
        // Those that QEMU calls inconsistent are good for nobody.
        if !chosen.iter().any(|b| !b.inconsistent && known.owns(&b.name)) {
            continue;
        }
        match is_there {
            true => there.push(path_text(&path)),
            false => gone.push((path_text(&path), known.id)),
        }
    }
    if there.is_empty() && gone.is_empty() {
        return Ok(());
    }
    let absent = |(path, id): &(String, String)| format!("{path} (not mounted or moved, id {id})");
    let all: Vec<String> = there.iter().cloned().chain(gone.iter().map(absent)).collect();
    let what = format!("this would remove bitmaps of other backup directories: {}", all.join(", "));
    Err(Error::new(Kind::Usage, what).remedy(remedies(&there, &gone)))
}

/// What to do about bitmaps of the backup directories `there`, and of those that are `gone`, with their ids.
fn remedies(there: &[String], gone: &[(String, String)]) -> String {
    let mut remedies = Vec::new();
    if !there.is_empty() {
        let keep: Vec<String> = there.iter().map(|p| format!("--keep '{p}'")).collect();
        remedies.push(format!("add {} to keep theirs", keep.join(" ")));
    }
    if !gone.is_empty() {
        let ids: Vec<String> = gone.iter().map(|(_, id)| format!("--uuid {id}")).collect();
        remedies.push(format!(
            "mount what is not mounted; name what was moved with --keep; 'fleecefs cleanup {}' \
             removes the bitmaps of what is gone for good",
            ids.join("' and 'fleecefs cleanup ")
        ));
    }
    format!("{}; or remove all with --all-targets", remedies.join("; "))
}

/// Runs `fleecefs cleanup`.
///
/// # Errors
/// QEMU cannot be reached or refuses.
pub(super) fn cleanup(args: CleanupArgs) -> Result<()> {
    let vm = args.vm.address()?;
    let state = args.state.dir()?;
    let keep = args.keep.iter().map(|dir| TargetId::stored(&paths::backups(dir)?));
    let choice = CleanupChoice {
        of: args.uuid.as_deref().map(TargetId::named).transpose()?,
        uuid: args.uuid,
        keep: keep.collect::<Result<_>>()?,
        all: args.all,
        foreign: args.foreign,
    };
    let _lock = Lock::vm(&state, &vm)?;
    let mut client = Client::connect(&vm)?;
    let _qemu_lock = Lock::qemu(&state, &client)?;
    migration::check(&mut client)?;
    let mut text = String::new();
    let mut chosen = info::bitmaps(&mut client)?;
    chosen.retain(|b| choice.takes(b));
    if !choice.keep.is_empty() && !args.all_targets {
        check_targets(&Targets::read(&state, &vm, &of_owners(&state))?, &chosen)?;
    }
    for b in &chosen {
        if !args.dry_run {
            bitmap::remove(&mut client, &b.node, &b.name)?;
        }
        let word = if args.dry_run { "would remove" } else { "removed" };
        output::push_line(
            &mut text,
            format!("{word} {} from {}", path_text(&b.name), node_and_disk(b)),
        );
    }
    if text.is_empty() {
        text = match &choice.uuid {
            Some(id) => format!(
                "nothing to remove: no bitmap is of a backup directory with the id '{id}' ('fleecefs \
                 info bitmaps' shows whose they are)\n"
            ),
            None => "nothing to remove\n".into(),
        };
    }
    if args.dry_run {
        text += verbosity::UNCHANGED;
    }
    output::print_sentences(&text)
}
