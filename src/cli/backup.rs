//! `fleecefs backup`.

use std::path::{Path, PathBuf};

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::console::{Console, Style};
use super::shared::{QmpArgs, qmp_unless};
use super::state::StateArgs;
use super::values::CompressArg;
use super::work::undo_flag;
use super::{paths, state, values, verbosity};
use crate::backup::offline::backup_offline;
use crate::backup::plan::{Printed, unknown_disk};
use crate::backup::publish::report::Report;
use crate::backup::run::backup;
use crate::backup::{
    Compression, CopyOptions, FreezeOptions, FullEvery, Layout, Options, RequestedLevel, StopMode,
    Watch, names,
};
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;
use crate::output;
use crate::privileges::users;
use crate::qmp::Address;
use crate::text::path_text;
use crate::units::{human_bytes, parse_bytes, parse_duration};

/// Back up the disks of a running guest
///
/// Copies what changed since the last point out of a frozen view, while the guest runs on. The
/// frozen moment is one for all disks; the guest is stopped for it for some tens of milliseconds.
#[derive(Debug, Args)]
#[command(mut_args(qmp_unless("offline", "")))]
pub(super) struct BackupArgs {
    #[command(flatten)]
    vm: QmpArgs,

    /// Back up these images of a VM that is shut off: files, with 'raw:' or 'qcow2:' before them where
    /// neither the target nor the name says what they are
    ///
    /// A qemu-storage-daemon is started for it. Disks are known by their files, so their chains go on:
    /// the bitmaps in qcow2 images (version 3) say what has changed, and the VM's next backup goes on
    /// from this one. A raw image has none: FULL. An image that is in use is refused; the VM cannot be
    /// started while it is backed up.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all =
        ["qmp", "agent", "nbd", "include", "exclude", "quiesce", "pause", "no_stop", "wait"])]
    offline: Vec<String>,

    /// A backing file of one of --offline's images: its header alone is not believed, since a guest may have
    /// written it (give it again for each)
    #[arg(long, value_name = "FILE", requires = "offline")]
    backing_file: Vec<PathBuf>,

    /// The guest agent's socket, for --quiesce
    #[arg(long, value_name = "SOCKET", visible_alias = "agent-socket")]
    agent: Option<String>,

    /// full: a new chain; inc: since the last FULL or INC; diff: since the FULL; copy: a full copy
    /// beside the chains; auto: inc where that is possible, full elsewhere
    #[arg(short, long, value_enum)]
    level: LevelArg,

    /// With --level auto: a new FULL when the chain has N points, or when it is older than a
    /// DURATION such as 12h, 7d or 4w
    #[arg(long, value_name = "N|DURATION", value_parser = values::every)]
    full_every: Option<FullEvery>,

    /// The backup directory
    #[arg(short, long, value_name = "DIR")]
    target: PathBuf,

    /// Permission bits of what is made, octal; folders get x where files have r. What is said of an
    /// image later, and what is made of it, follows the image [default: as at the last backup to this
    /// directory that was given it, else 0600]
    #[arg(long, value_name = "MODE", value_parser = values::mode)]
    mode: Option<u32>,

    /// Group of what is made, by name or number: those who pull the backups as another user [default: as
    /// with --mode, else the user's own]
    #[arg(long, value_name = "GROUP", value_parser = users::group, requires = "mode")]
    group: Option<u32>,

    /// Begin a new backup directory where the one that this VM was backed up to is gone, or in a folder
    /// that has other files, and make the folders above it
    ///
    /// Bitmaps of the one that is gone go on recording in QEMU: 'fleecefs cleanup --uuid ID', with its id,
    /// which 'fleecefs info bitmaps' shows, removes them.
    #[arg(long)]
    init: bool,

    /// Back up to a directory that has backups of another VM
    #[arg(long)]
    shared: bool,

    /// Call the folder of a disk NAME, whatever its file is called; where there is such a folder its
    /// chain goes on
    #[arg(long = "name", value_name = "DISK=NAME", value_parser = values::disk_name)]
    names: Vec<(String, String)>,

    /// Only these disks, by node, device, qdev or file name
    #[arg(short, long, value_name = "DISK", value_delimiter = ',')]
    include: Vec<String>,

    /// All disks but these
    #[arg(short, long, value_name = "DISK", value_delimiter = ',')]
    exclude: Vec<String>,

    /// Accepted for qmpbackup's sake: raw disks are always included
    #[arg(long, hide = true)]
    include_raw: bool,

    #[command(flatten)]
    layout: LayoutArgs,

    #[command(flatten)]
    freeze_point: FreezeArgs,

    #[command(flatten)]
    copy: CopyArgs,

    /// Do not keep the FULL's bitmap: no DIFF until the next FULL
    #[arg(long)]
    no_diff: bool,

    /// Leave the BLAKE3 of the image out of its manifest
    #[arg(long)]
    no_hash: bool,

    /// A disk that is skipped, a failed freeze and every other warning end with exit code 17; what is
    /// there is backed up all the same
    #[arg(long)]
    strict: bool,

    /// Write an encrypted disk in plain text
    #[arg(long)]
    allow_plaintext: bool,

    /// Keep this file with the backup; may be given more than once
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,

    /// An NBD server that QEMU runs already (path or tcp:HOST:PORT)
    #[arg(long, value_name = "SOCKET")]
    nbd: Option<String>,

    /// Wait up to this long (30m, 2h) for what stands in the way to end: another program's job or
    /// filter on a disk, such as a storage move, or a migration; else it is refused at once
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    wait: Option<u64>,

    /// Only say what would be done
    #[arg(short = 'n', long)]
    dry_run: bool,

    #[command(flatten)]
    state: StateArgs,

    /// See [`Self::look_at_owners`].
    #[arg(skip)]
    more_state: Vec<PathBuf>,

    #[command(flatten)]
    show: ShowArgs,
}

/// How progress and messages are shown.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// How progress is shown: bars on a terminal, else lines; json: an object per line
    #[arg(long, value_enum, default_value = "auto")]
    progress: Style,

    /// Seconds between lines of progress
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    progress_interval: u64,

    /// Append all messages to this file as well
    #[arg(long, value_name = "FILE", visible_alias = "logfile")]
    log_file: Option<PathBuf>,

    /// Send all messages to syslog (on most systems: the journal) as well
    #[arg(long)]
    syslog: bool,
}

impl ShowArgs {
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
    /// A folder per month; each begins with a FULL
    #[arg(long)]
    monthly: bool,

    /// All disks in one folder
    #[arg(long)]
    no_subdir: bool,

    /// FULL and COPY images carry the disk's name alone
    #[arg(long)]
    no_timestamp: bool,

    /// No link beside an image without timestamp
    #[arg(long, requires = "no_timestamp")]
    no_symlink: bool,
}

/// The longest limit, in seconds, for what a guest has to bear. QEMU takes 0 for "no limit" where a
/// guest's write waits for the fleece, so that is none.
const LONGEST_WAIT: u64 = 3600;

#[derive(Debug, Args)]
#[command(next_help_heading = "The frozen moment")]
struct FreezeArgs {
    /// Do not stop the guest: each disk has a moment of its own
    #[arg(long, conflicts_with = "pause")]
    no_stop: bool,

    /// Keep the guest stopped for the whole backup
    #[arg(long)]
    pause: bool,

    /// Freeze the guest's file systems by its agent
    #[arg(long, requires = "agent")]
    quiesce: bool,

    /// Freeze only this mount point; may be given more than once
    #[arg(long, value_name = "PATH", requires = "quiesce")]
    freeze: Vec<String>,

    /// The longest time, in seconds, that the guest may be held against its will (so --pause does
    /// not count); a child process ends it then
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    hold_limit: u64,

    /// How long to wait for an answer of the agent, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    agent_timeout: u64,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Copying")]
struct CopyArgs {
    /// Where the temporary fleece images go [default: the folder of each disk's file, as an unnamed
    /// file; where that is not possible, the target]
    #[arg(long, value_name = "DIR")]
    fleece_dir: Option<PathBuf>,

    /// How many seconds a guest's write may wait for the fleece before the backup of that disk is
    /// given up; a guest's own limit is usually 30
    #[arg(long, value_name = "SECONDS", default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(1..=3600))]
    cbw_timeout: u32,

    /// Bytes per second for each disk, such as 50M (QEMU counts holes, too)
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = parse_bytes)]
    speed_limit: u64,

    /// Compress the images
    #[arg(long, value_enum, num_args = 0..=1, default_missing_value = "zlib", require_equals = true)]
    compress: Option<CompressArg>,

    /// Parallel requests per disk
    #[arg(long, value_name = "N")]
    workers: Option<u32>,

    /// How QEMU writes the images
    #[arg(long, value_name = "MODE", visible_alias = "blockdev-aio",
        value_parser = ["threads", "native", "io_uring"])]
    aio: Option<String>,

    /// Write the images past the host's page cache
    #[arg(long, visible_alias = "blockdev-disable-cache")]
    direct: bool,

    /// Seconds to wait before a fleece image is removed
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    remove_delay: u64,

    /// Begin even where space looks short
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

impl BackupArgs {
    /// The backup directory.
    pub(super) fn target(&self) -> &Path {
        &self.target
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
        let level = match (self.level, self.full_every) {
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
            target: paths::to_make(&self.target)?,
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
            freeze_point: self.freeze_point(),
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

    fn freeze_point(&self) -> FreezeOptions {
        let m = &self.freeze_point;
        FreezeOptions {
            stop: match (m.no_stop, m.pause) {
                (true, _) => StopMode::Never,
                (_, true) => StopMode::WholeBackup,
                _ => StopMode::FreezePoint,
            },
            quiesce: m.quiesce,
            mountpoints: m.freeze.clone(),
            deadline: Duration::from_secs(m.hold_limit),
            agent_timeout: Duration::from_secs(m.agent_timeout),
        }
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
pub(super) fn run(args: &BackupArgs) -> Result<()> {
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

/// With `--strict` a warning is an error, since nobody may read it.
fn no_warning(options: &Options, console: &Console) -> Result<()> {
    match console.first_warning() {
        Some(text) if options.strict => {
            Err(Error::new(Kind::Skipped, format!("there was a warning: {text}"))
                .remedy("the points are there and restorable"))
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
        console.say(&text);
    }
}

fn print_plan(report: &Report, as_json: bool) -> Result<()> {
    let disks: Vec<Printed> = report.plan.disks.iter().map(Printed::from).collect();
    let refused: Vec<_> = report.plan.refused.iter().map(|(d, e)| (d, e.report())).collect();
    if as_json {
        let all = json!({"disks": disks, "skipped": report.plan.skipped, "unknown": report.plan.unknown,
            "refused": refused.iter().map(|(d, e)| json!({"disk": d, "reason": e})).collect::<Vec<_>>()});
        return output::print(&output::json_pretty(&all)?);
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
    output::print(&(text + verbosity::UNCHANGED))
}
