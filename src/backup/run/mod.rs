//! A backup from connection to published points.
//!
//! The order loses no write while the guest goes on writing (the undo of each step is on disk before the
//! step):
//!
//! 1. the new bitmap is added beside the recording one; both record through the freeze point;
//! 2. fleece and filter nodes are added, which do nothing yet;
//! 3. the freeze point: all filters are inserted at once;
//! 4. frozen views are added; a disabled bitmap on each view takes what the old bitmap has;
//! 5. jobs copy what it names, out of the frozen view;
//! 6. each finished image is closed, its nodes are removed, it is published; only then the old bitmap goes.
//!
//! Whatever fails before 6 removes the new bitmap, and the old one has recorded everything.

pub(crate) mod barrier;
pub(crate) mod begin;
pub(crate) mod conclude;
pub(crate) mod disk;
pub(crate) mod interference;
pub(crate) mod session;
pub(crate) mod watermark;
pub(crate) mod work;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use self::begin::{first_here, look};
use self::session::Run;
use super::fleece::space::Reserves;
use super::fleece::{migration, nbdserver};
use super::graph::foreign_jobs::ForeignJobs;
use super::plan::folders;
use super::plan::planned::Inputs;
use super::publish::report::Report;
use super::publish::vm;
use super::recover::{RecoverCause, RecoverContext, wait};
use super::state::control::{Control, Shared, Status};
use super::state::journal::{Journal, Record};
use super::state::lock::{Lock, real_path, refuse_inside, state_folder};
use super::target::file_mode;
use super::target::targets::Targets;
use super::{Options, RequestedLevel, Stopping, Watch, names, now, plan, publish};
use crate::backup::target::target_id::TargetId;
use crate::error::{Error, Kind, Result};
use crate::folder::{FileMode, Folder};
use crate::journal::unfinished;
use crate::lock::Locks;
use crate::manifest::{Consistency, VmConfig};
use crate::qmp::Client;
use crate::text::path_text;
use crate::{failpoint, folder, manifest};

/// Makes the backup.
///
/// # Errors
/// Nothing could be begun, or QEMU is gone. What concerns one disk is in its report.
pub(crate) fn backup(
    options: &Options,
    watch: &dyn Watch,
    interrupt: Arc<AtomicBool>,
) -> Result<Report> {
    let watch: &dyn Watch = &Stopping { watch, flag: &interrupt };
    let config = vm::read_config(&options.config)?;
    let options = &resolved(options)?;
    let _vm_lock = Lock::vm(&options.state_dir, &options.qmp)?;
    let mut targets = Targets::read(&options.state_dir, &options.qmp, &options.more_state)?;
    if !options.init {
        targets.check(&options.target)?;
    }
    let mut client = connect(options, &interrupt)?;
    if options.dry_run {
        migration::check(&mut client)?;
        return dry_run(options, &targets, &mut client, watch);
    }
    let _qemu_lock = Lock::qemu(&options.state_dir, &client)?;
    let run = names::new_run()?;
    let _mark = Lock::run(&options.state_dir, &run)?;
    let status = first_status(options, &run);
    let _control =
        Control::open(&options.state_dir, &options.qmp, status.clone(), interrupt.clone())?;
    let place = RecoverContext {
        state: &options.state_dir,
        vm: &options.qmp,
        cause: RecoverCause::Backup(&options.target),
        agent: None,
    };
    wait::until_free(&mut client, place, options, watch)?;
    // It may have gone while we waited.
    if !options.init {
        targets.check(&options.target)?;
    }
    let base = base_dir(options);
    let elsewhere = used_before(options, &targets);
    if !folder::exists(&base) {
        watch.say(&format!("{}: a new folder for backups", path_text(&base)));
    }
    make_base(options, &base)?;
    let _target_lock = target_lock(options, &base)?;
    share_side(options)?;
    let make = options.level != RequestedLevel::Copy;
    let target = TargetId::shared(&options.target, &base, make, options.share)?;
    let first = Record::Begin {
        run: run.clone(),
        target: options.target.clone(),
        agent: options.agent.as_ref().map(|a| a.canonical()),
        qemu: client.process(),
    };
    let journal = Journal::begin(&options.state_dir, &options.qmp, &first)?;
    let hides_status = hides_status(&client);
    let mut r = Run {
        options,
        watch,
        client,
        journal,
        run,
        target,
        base,
        status,
        server: None,
        migration: None,
        watchdog: None,
        consistency: Consistency::default(),
        hides_status,
        vm: VmConfig::default(),
        chains: HashMap::new(),
        config,
        reserves: Reserves::default(),
        fleeces: HashMap::new(),
        foreign_jobs: ForeignJobs::default(),
        newcomer: !options.shared && !targets.knows(&options.target),
        renamed: targets.folders(&options.target),
        elsewhere,
    };
    let result = r.execute();
    let report = r.finish(result)?;
    // What was given for a run that made no point is no promise.
    if report.disks.iter().any(|d| d.result.is_ok()) {
        remember(options, &report, &mut targets, watch);
    }
    Ok(report)
}

/// With all links followed: once, and from here on no more. (One on the way to the socket may change, and the
/// socket goes with QEMU.)
fn resolved(options: &Options) -> Result<Options> {
    let target = real_path(&options.target, "the backup directory")?;
    refuse_dangling(&target)?;
    let state_dir = state_folder(&options.state_dir)?.path().to_path_buf();
    refuse_inside(&state_dir, &target)?;
    Ok(Options {
        qmp: options.qmp.resolved(),
        state_dir,
        share: file_mode::with_kept(&target, options.share)?,
        target,
        ..options.clone()
    })
}

/// A link in the resolved path of a target leads nowhere: what it leads to is on a disk that is not mounted,
/// more often than not.
fn refuse_dangling(target: &Path) -> Result<()> {
    let is_link = |path: &&Path| folder::look(path).is_ok_and(|meta| meta.is_symlink());
    let Some(link) = target.ancestors().find(is_link) else { return Ok(()) };
    let what = "the symbolic link to the backup directory leads to nothing";
    let remedy =
        "is the file system mounted that it leads to? A new folder there has to be made first";
    Err(Error::new(Kind::NotFound, what).at_path(link).remedy(remedy))
}

/// A QEMU that can do what a backup needs.
fn connect(options: &Options, interrupt: &Arc<AtomicBool>) -> Result<Client> {
    let mut client = Client::connect_until(&options.qmp, interrupt.clone())?;
    client.require(&[
        "blockdev-add",
        "blockdev-backup",
        "block-dirty-bitmap-merge",
        "query-jobs",
        "query-block-exports",
        "blockdev-reopen",
    ])?;
    require_views(&mut client)?;
    Ok(client)
}

/// Keeps what the next run to this target needs to know. The points are there: where that fails it is a
/// warning.
fn remember(options: &Options, report: &Report, targets: &mut Targets, watch: &dyn Watch) {
    if let Err(e) = file_mode::keep(&options.target, options.share) {
        watch.warn(&e.report());
    }
    let renamed = folders::renamed(options, &report.plan);
    let disks = report.plan.disks.iter().map(|d| d.disk.identity.file.clone());
    if let Err(e) = targets.remember(&options.target, renamed, disks.collect()) {
        watch.warn(&e.report());
    }
}

/// Where the VM, or a disk of it, was backed up to until now, where the target is a new one and nothing says that
/// this is meant.
fn used_before(options: &Options, targets: &Targets) -> Option<PathBuf> {
    if options.init || options.level == RequestedLevel::Copy {
        return None;
    }
    let known = |file: &str| {
        options.offline.iter().flat_map(|known| &known.disks).any(|disk| disk.is(file))
    };
    targets.used_before(&options.target, known).map(Path::to_path_buf)
}

/// Makes the target, or its folder of the month. One that was there before has the mode that somebody
/// gave it.
fn make_base(options: &Options, base: &Path) -> Result<()> {
    for folder in [options.target.as_path(), base] {
        let is_new = !folder::exists(folder);
        let made = publish::make_folders(folder)?;
        let share = if is_new { options.share } else { FileMode::default() };
        share
            .give_folder(&made)
            .map_err(|e| Error::io(e, "cannot give it the --group and --mode").at_path(folder))?;
    }
    Ok(())
}

/// What belongs to the target as a whole can be listed by those with whom it is shared. (Its lock file
/// stays private: who may open that could keep every run out.)
fn share_side(options: &Options) -> Result<()> {
    let side = options.target.join(manifest::FOLDER);
    let shared = Folder::open(&side).and_then(|f| options.share.give_folder(&f));
    shared.map_err(|e| Error::io(e, "cannot give it the --group and --mode").at_path(side))
}

fn first_status(options: &Options, run: &str) -> Shared {
    Arc::new(Mutex::new(Status {
        run: run.to_string(),
        pid: std::process::id(),
        started: now(),
        target: options.target.clone(),
        phase: "beginning".into(),
        disks: Vec::new(),
    }))
}

fn dry_run(
    options: &Options,
    targets: &Targets,
    client: &mut Client,
    watch: &dyn Watch,
) -> Result<Report> {
    let run = names::new_run()?;
    let base = base_dir(options);
    let target = TargetId::of(&options.target, &base, false)?;
    let ((seen, vm), now) = (look(options, client)?, now());
    if let Some(before) = used_before(options, targets) {
        watch.warn(&first_here(&vm, &options.target, &before));
    }
    let renamed = targets.folders(&options.target);
    let make = |no_inc: Option<String>| {
        let inputs = Inputs {
            seen: seen.clone(),
            run: &run,
            target: &target,
            base: &base,
            now,
            vm: crate::manifest::vm_uuid(&vm),
            vm_name: crate::manifest::vm_name(&vm),
            newcomer: !options.shared && !targets.knows(&options.target),
            renamed: &renamed,
            no_inc,
            unsound: &[],
        };
        plan::make(options, inputs)
    };
    let mut plan = make(None)?;
    // An INC or a DIFF needs QEMU's NBD server.
    if let Some(d) = plan.disks.iter().find(|d| d.since.is_some()) {
        let socket = nbdserver::socket_path(&options.state_dir, &options.qmp);
        let free = nbdserver::check_safe(client, &vm).and_then(|()| match options.nbd {
            Some(_) => Ok(()),
            None => nbdserver::check_free(client, &socket, &d.disk.node),
        });
        match free {
            Err(e) if e.kind() == Kind::Busy => plan = make(Some(e.report()))?,
            other => other?,
        }
    }
    let consistency = Consistency::default();
    Ok(Report { plan, disks: Vec::new(), consistency, undo: None, run, vm })
}

/// Whether the frozen view shows the disk of now where one request covers clusters that the fleece
/// has and clusters that it has not. Seen with 7.2 (reads and block status), not with 10.0; nobody
/// looked at those between. A hook lets tests take this way with any QEMU.
fn hides_status(client: &Client) -> bool {
    client.version().number < (10, 0, 0) || failpoint::hides_status()
}

/// Fails unless QEMU has the driver of frozen views, as each since 7.2 has. What an older one has is in
/// its schema alone. (To tell that takes QEMU's main loop some tens of milliseconds, in which the guest's
/// devices stand still: one that is known to have it is not asked.)
fn require_views(client: &mut Client) -> Result<()> {
    let known = client.version().number >= (7, 2, 0);
    if known || client.features()?.has("snapshot-access") {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "this QEMU has no snapshot-access driver")
        .remedy("QEMU 7.2 or newer is needed"))
}

/// The lock that prune and the verbs take as well.
fn target_lock(options: &Options, base: &Path) -> Result<Locks> {
    let locks = Locks::take(&options.target)?;
    // What depends on files that are about to go, or to be replaced, must not get a child.
    unfinished::refuse(base)?;
    Ok(locks)
}

/// The target, or its folder of this month.
fn base_dir(options: &Options) -> PathBuf {
    if !options.layout.monthly {
        return options.target.clone();
    }
    options.target.join(jiff::Zoned::now().strftime("%Y-%m").to_string())
}
