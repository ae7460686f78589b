//! `fleecefs backup`.

use std::path::{Path, PathBuf};

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::config_file::Program;
use super::console::{Console, Style};
use super::freeze::FreezeArgs;
use super::nightly::ConfiguredArgs;
use super::recorded::Recorded;
use super::shared::{QmpArgs, qmp_unless};
use super::state::StateArgs;
use super::values::CompressArg;
use super::work::undo_flag;
use super::{nightly, paths, state, values, verbosity};
use crate::backup::offline::backup_offline;
use crate::backup::plan::{Printed, unknown_disk};
use crate::backup::publish::report::Report;
use crate::backup::run::backup;
use crate::backup::{Compression, CopyOptions, FullEvery, Layout, Options, RequestedLevel, names};
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;
use crate::history::Entry;
use crate::output;
use crate::privileges::users;
use crate::qmp::Address;
use crate::text::{path_text, to_text};
use crate::units::{human_bytes, iso_time, parse_bytes, parse_duration};

/// Back up the disks of a running guest
///
/// Copies what changed since the last point from a frozen view of each disk, while the guest runs. All
/// disks are frozen at the same time, for which the guest is stopped for some tens of milliseconds.
///
/// With --all, or --vm, the configuration says what is backed up and how: of each VM what a killed backup left is cleaned
/// up, it is backed up, the new points are verified, booted if that is wanted, and old ones are deleted where there are
/// rules. What fails for one VM stops no other.
#[derive(Debug, Args)]
#[command(mut_args(nightly::apart(qmp_unless("offline", ""))))]
pub(super) struct BackupArgs {
    #[command(flatten)]
    vm: QmpArgs,

    /// Back up these images of a VM that is shut off; 'raw:FILE' or 'qcow2:FILE' if neither the target
    /// nor the name tells the format
    ///
    /// A qemu-storage-daemon is started for it. Disks are identified by their files, and their chains
    /// continue: bitmaps in qcow2 images (version 3) tell what has changed, and the VM's next backup
    /// continues from this one. Raw images have no bitmaps and get a FULL. An image that is in use is
    /// refused; the VM cannot be started during the backup.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all =
        ["qmp", "agent", "nbd", "include", "exclude", "quiesce", "pause", "no_stop", "wait"])]
    offline: Vec<String>,

    /// A backing file of one of --offline's images; may be given more than once
    ///
    /// The image's header alone is not trusted, since a guest may have written it.
    #[arg(long, value_name = "FILE", requires = "offline")]
    backing_file: Vec<PathBuf>,

    /// The guest agent's socket, for --quiesce
    #[arg(long, value_name = "SOCKET", visible_alias = "agent-socket")]
    agent: Option<String>,

    /// full: a new chain; inc: changes since the last FULL or INC; diff: changes since the FULL; copy: a
    /// full copy outside the chain; auto: inc if possible, else full
    #[arg(short, long, value_enum, required = true)]
    level: Option<LevelArg>,

    /// With --level auto: start a new chain when this one has N points, or is older than DURATION
    /// (12h, 7d, 4w)
    #[arg(long, value_name = "N|DURATION", value_parser = values::every)]
    full_every: Option<FullEvery>,

    /// The backup directory
    #[arg(short, long, value_name = "DIR", required = true)]
    target: Option<PathBuf>,

    /// Permission bits of new files, octal; folders get x where files have r [default: as in the last
    /// backup with --mode to this directory, else 0600]
    #[arg(long, value_name = "MODE", value_parser = values::mode)]
    mode: Option<u32>,

    /// Group of new files, by name or number, such as that of a user who fetches the backups [default: as
    /// with --mode, else your own]
    #[arg(long, value_name = "GROUP", value_parser = users::group, requires = "mode")]
    group: Option<u32>,

    /// Start a new backup directory where this VM's old one is missing, or in a folder that has other files, or
    /// beside the one that it has (without a warning); makes parent folders too
    ///
    /// Bitmaps of the old one keep recording in QEMU; 'fleecefs cleanup --uuid ID' removes them ('fleecefs
    /// info bitmaps' shows the ID).
    #[arg(long)]
    init: bool,

    /// Allow a directory that has backups of another VM
    #[arg(long)]
    shared: bool,

    /// Use NAME for the folder of a disk instead of its file name; an existing folder's chain continues
    #[arg(long = "name", value_name = "DISK=NAME", value_parser = values::disk_name)]
    names: Vec<(String, String)>,

    /// Only these disks, by node, device, qdev or file name
    #[arg(short, long, value_name = "DISK", value_delimiter = ',')]
    include: Vec<String>,

    /// All disks but these
    #[arg(short, long, value_name = "DISK", value_delimiter = ',')]
    exclude: Vec<String>,

    /// For qmpbackup users: raw disks are always included
    #[arg(long, hide = true)]
    include_raw: bool,

    /// Do not keep the FULL's bitmap (no DIFF until the next FULL)
    #[arg(long)]
    no_diff: bool,

    /// Do not store the image's BLAKE3 hash in its manifest
    #[arg(long)]
    no_hash: bool,

    /// Exit with code 17 after any warning, such as a skipped disk or a failed freeze; the backup is made
    /// anyway
    #[arg(long)]
    strict: bool,

    /// Allow an encrypted disk to be backed up in plain text
    #[arg(long)]
    allow_plaintext: bool,

    /// Store this file with the backup, such as the VM's configuration; may be given more than once
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,

    /// The NBD server that another program has started in QEMU: a path, or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET")]
    nbd: Option<String>,

    /// Wait up to this long (30m, 2h) for a migration, or for another program's job or filter on a disk,
    /// to end; without it the disk is refused at once
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    wait: Option<u64>,

    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,

    #[command(flatten)]
    state: StateArgs,

    /// See [`Self::look_at_owners`].
    #[arg(skip)]
    more_state: Vec<PathBuf>,

    // Each has a heading, which holds for all that follows it.
    #[command(flatten)]
    layout: LayoutArgs,

    #[command(flatten)]
    freeze_point: FreezeArgs,

    #[command(flatten)]
    copy: CopyArgs,

    #[command(flatten)]
    show: ShowArgs,

    #[command(flatten)]
    configured: ConfiguredArgs,
}

/// How progress and messages are shown.
#[derive(Debug, Args)]
#[command(next_help_heading = "Progress and logging")]
pub(super) struct ShowArgs {
    /// How to show progress: bars on a terminal, else lines; json: one object per line
    #[arg(long, value_enum, default_value = "auto")]
    progress: Style,

    /// Seconds between lines of progress
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    progress_interval: u64,

    /// Append all messages to this file too
    #[arg(long, value_name = "FILE", visible_alias = "logfile")]
    log_file: Option<PathBuf>,

    /// Send all messages to syslog (on most systems: the journal) too
    #[arg(long)]
    syslog: bool,
}

impl ShowArgs {
    /// Whether it is told as events.
    pub(super) fn is_json(&self) -> bool {
        self.progress == Style::Json
    }

    /// The console.
    ///
    /// # Errors
    /// The log file cannot be opened.
    pub(super) fn console(&self) -> Result<Console> {
        let interval = Duration::from_secs(self.progress_interval.max(1));
        Console::open(self.progress, interval, self.log_file.as_deref(), self.syslog)
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Names and folders")]
struct LayoutArgs {
    /// Use a folder per month, each starting with a FULL
    #[arg(long)]
    monthly: bool,

    /// Put all disks into one folder
    #[arg(long)]
    no_subdir: bool,

    /// Name FULL and COPY images after the disk, without time
    #[arg(long)]
    no_timestamp: bool,

    /// Do not make a link beside an image without time
    #[arg(long, requires = "no_timestamp")]
    no_symlink: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Copying")]
struct CopyArgs {
    /// Folder for the temporary fleece images [default: the folder of each disk's file, as an unnamed
    /// file; if not possible, the target]
    #[arg(long, value_name = "FOLDER")]
    fleece_dir: Option<PathBuf>,

    /// Seconds that a guest's write may wait for the fleece image before the backup of that disk is
    /// cancelled (a guest's own limit is usually 30)
    #[arg(long, value_name = "SECONDS", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..=3600))]
    cbw_timeout: u32,

    /// At most this many bytes per second for each disk (K, M, G); QEMU counts holes too; 0: no limit
    #[arg(long = "rate-limit", alias = "speed-limit", value_name = "BYTES", default_value = "0",
        value_parser = parse_bytes)]
    speed_limit: u64,

    /// Compress the images
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "zlib", require_equals = true)]
    compress: Option<CompressArg>,

    /// Number of parallel requests per disk
    #[arg(long, value_name = "N")]
    workers: Option<u32>,

    /// How QEMU writes the images
    #[arg(long, value_name = "MODE", visible_alias = "blockdev-aio",
        value_parser = ["threads", "native", "io_uring"])]
    aio: Option<String>,

    /// Write the images with O_DIRECT, bypassing the host's page cache
    #[arg(long, visible_alias = "blockdev-disable-cache")]
    direct: bool,

    /// Seconds to wait before a fleece image is removed
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    remove_delay: u64,

    /// Start even if free space looks too small
    #[arg(long)]
    no_space_check: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LevelArg {
    Full,
    Inc,
    Diff,
    Copy,
    Auto,
}

impl ShowArgs {
    /// Whether events are printed as JSON.
    pub(super) fn json(&self) -> bool {
        self.progress == Style::Json
    }
}

impl BackupArgs {
    /// Whether events are printed as JSON; for VMs of the configuration the summary.
    pub(super) fn json(&self) -> bool {
        if self.is_configured() { self.configured.json } else { self.show.json() }
    }

    /// Whether it is about VMs of the configuration.
    pub(super) fn is_configured(&self) -> bool {
        self.configured.is_given()
    }

    /// Whether only the plan is shown.
    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// The backup directory.
    pub(super) fn target(&self) -> Option<&Path> {
        self.target.as_deref()
    }

    /// Where its state is.
    pub(super) fn state(&mut self) -> &mut StateArgs {
        &mut self.state
    }

    /// For `--as-owner` where the target belongs to root: it may be a mount point whose file system, of
    /// another owner, is not mounted. So the lists of targets of all owners' state folders count.
    ///
    /// # Errors
    /// The state folder cannot be found.
    pub(super) fn look_at_owners(&mut self) -> Result<()> {
        self.more_state = state::of_owners(&self.state.dir()?);
        Ok(())
    }

    fn options(&self) -> Result<Options> {
        let (Some(level), Some(target)) = (self.level, &self.target) else {
            return Err(verbosity::usage("--level or --target is not given"));
        };
        let level = match (level, self.full_every) {
            (LevelArg::Auto, every) => RequestedLevel::Auto(every),
            (_, Some(_)) => return Err(verbosity::usage("--full-every goes with --level auto")),
            (LevelArg::Full, None) => RequestedLevel::Full,
            (LevelArg::Inc, None) => RequestedLevel::Inc,
            (LevelArg::Diff, None) => RequestedLevel::Diff,
            (LevelArg::Copy, None) => RequestedLevel::Copy,
        };
        let config = self.config.iter().map(|p| paths::resolved(p, "cannot keep this file"));
        let address = |t: &Option<String>| t.as_deref().map(Address::parse).transpose();
        Ok(Options {
            // With --offline: that of our own daemon, later.
            qmp: self.vm.given()?.unwrap_or_else(|| Address::Unix(PathBuf::new())),
            agent: address(&self.agent)?,
            target: paths::to_make(target)?,
            init: self.init,
            shared: self.shared,
            names: self.names.clone(),
            level,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            layout: Layout {
                monthly: self.layout.monthly,
                no_subdir: self.layout.no_subdir,
                no_timestamp: self.layout.no_timestamp,
                no_symlink: self.layout.no_symlink,
            },
            freeze_point: self.freeze_point.options(),
            copy: self.copy()?,
            no_diff: self.no_diff,
            no_hash: self.no_hash,
            strict: self.strict,
            allow_plaintext: self.allow_plaintext,
            config: config.collect::<Result<_>>()?,
            state_dir: self.state.dir()?,
            more_state: self.more_state.clone(),
            wait: Duration::from_secs(self.wait.unwrap_or(0)),
            dry_run: self.dry_run,
            nbd: address(&self.nbd)?,
            offline: None,
            share: FileMode { mode: self.mode, group: self.group },
        })
    }

    fn copy(&self) -> Result<CopyOptions> {
        let c = &self.copy;
        Ok(CopyOptions {
            fleece_dir: c.fleece_dir.as_deref().map(paths::to_make).transpose()?,
            cbw_timeout: c.cbw_timeout,
            speed: c.speed_limit,
            compress: c.compress.map(|c| match c {
                CompressArg::Zlib => Compression::Zlib,
                CompressArg::Zstd => Compression::Zstd,
            }),
            workers: c.workers,
            aio: c.aio.clone(),
            direct: c.direct,
            remove_delay: Duration::from_secs(c.remove_delay),
            no_space_check: c.no_space_check,
        })
    }
}

/// Runs `fleecefs backup`.
///
/// # Errors
/// As the exit codes say: 16 if some disks have a point and others not, 17 with `--strict`.
pub(super) fn run(args: &BackupArgs, program: Program) -> Result<()> {
    if args.is_configured() {
        let state = args.state.dir()?;
        let wanted = nightly::Wanted { dry_run: args.dry_run, strict: args.strict, state };
        return nightly::run(&args.configured, &wanted, program);
    }
    let dir = args.target.as_deref();
    let run = Recorded { command: "backup", dir, state: &args.state, dry_run: args.dry_run };
    run.run(|entry| act(args, entry))
}

fn act(args: &BackupArgs, entry: &mut Entry) -> Result<()> {
    entry.shared = args.shared;
    entry.qmp = args.vm.given()?.map(|address| address.canonical());
    let options = args.options()?;
    let console = args.show.console()?;
    if !options.dry_run {
        super::writing::finish_what_is_left(&options.target)?;
    }
    let flag = undo_flag()?;
    let result = match args.offline.as_slice() {
        [] => backup(&options, &console, flag),
        disks => backup_offline(&options, (disks, &args.backing_file), &console, flag),
    };
    console.finish();
    let report = result.inspect_err(|e| console.log_error(e))?;
    entry.add_backup(&report);
    if !options.dry_run {
        console.event(&result_event(&report));
    }
    if options.dry_run {
        print_plan(&report, args.show.progress == Style::Json)?;
        return report.forecast(options.strict);
    }
    tell(&console, &report);
    // Events go elsewhere, and with -qq there are no warnings.
    let told = args.show.progress != Style::Json && !verbosity::is_silent();
    let verdict = report.verdict(options.strict, options.freeze_point.quiesce, told);
    verdict.and_then(|()| no_warning(&options, &console)).inspect_err(|e| console.log_error(e))
}

/// What came of it, as an event.
fn result_event(report: &Report) -> serde_json::Value {
    let (mut points, mut failed) = (Vec::new(), Vec::new());
    for d in &report.disks {
        match &d.result {
            Ok(m) => points.push(json!({
                "disk": d.disk, "level": names::level_word(d.level).to_ascii_lowercase(),
                "point": to_text(d.path.file_name().unwrap_or_default()),
                "file": to_text(d.path.as_os_str()), "run": m.run, "time": iso_time(m.time),
                "copied": m.bytes_copied, "duration_ms": m.duration_ms})),
            Err(e) => failed.push(json!({"disk": d.disk, "error": e.object()})),
        }
    }
    let refused = report.plan.refused.iter();
    failed.extend(refused.map(|(d, e)| json!({"disk": d, "error": e.object()})));
    json!({"event": "result", "format_version": output::JSON_VERSION, "points": points,
        "failed": failed, "skipped": report.plan.skipped})
}

/// With `--strict` a warning is an error, since nobody may read it.
fn no_warning(options: &Options, console: &Console) -> Result<()> {
    match console.first_warning() {
        Some(text) if options.strict => {
            Err(Error::new(Kind::Skipped, format!("there was a warning: {text}"))
                .remedy("the points were made and can be restored"))
        }
        _ => Ok(()),
    }
}

fn tell(console: &Console, report: &Report) {
    for d in &report.disks {
        let Ok(m) = &d.result else { continue };
        let text = format!(
            "{}: {} {} ({} copied in {:.1} s)",
            path_text(&d.disk),
            names::level_word(d.level),
            path_text(&d.path),
            human_bytes(m.bytes_copied),
            m.duration_ms as f64 / 1000.0
        );
        let point = path_text(d.path.file_name().unwrap_or_default());
        console.say_point(&d.disk, &point, &text);
    }
}

fn print_plan(report: &Report, as_json: bool) -> Result<()> {
    let disks: Vec<Printed> = report.plan.disks.iter().map(Printed::from).collect();
    let refused: Vec<_> = report.plan.refused.iter().map(|(d, e)| (d, e.report())).collect();
    if as_json {
        let all = json!({"disks": disks, "skipped": report.plan.skipped, "unknown": report.plan.unknown,
            "refused": refused.iter().map(|(d, e)| json!({"disk": d, "reason": e})).collect::<Vec<_>>()});
        return output::print(&output::json_document(&all)?);
    }
    let mut text = String::new();
    for d in &disks {
        output::push_line(
            &mut text,
            format!("{}: {} -> {}", path_text(&d.disk), d.level, path_text(&d.image)),
        );
        output::push_line(&mut text, format!("  about {} to copy", human_bytes(d.estimate)));
        for (label, value) in [
            ("on", &d.parent),
            ("because", &d.why),
            ("by bitmap", &d.since),
            ("adds bitmap", &d.adds),
        ] {
            if let Some(v) = value {
                output::push_line(&mut text, format!("  {label} {v}"));
            }
        }
        for b in &d.removes {
            output::push_line(&mut text, format!("  removes bitmap {b}"));
        }
    }
    for s in &report.plan.skipped {
        output::push_line(&mut text, format!("{}: skipped: {}", path_text(&s.disk), s.reason));
    }
    for name in &report.plan.unknown {
        output::push_line(&mut text, unknown_disk(name));
    }
    for (d, e) in refused {
        output::push_line(&mut text, format!("{}: cannot be backed up: {e}", path_text(d)));
    }
    output::print_sentences(&(text + verbosity::UNCHANGED))
}
