//! A backup from connection to published points.
//!
//! The order is the one that held under continuous writes (every step's undo is named, and on
//! disk, before the step):
//!
//! 1. the new bitmap is added beside the recording one; both record through the moment;
//! 2. fleece and filter nodes are added, which do nothing yet;
//! 3. the moment: all filters are inserted at once;
//! 4. frozen views are added; a disabled bitmap on each view takes what the old bitmap has;
//! 5. jobs copy what it names, out of the frozen view;
//! 6. each finished image is closed, taken down, published; only then the old bitmap goes.
//!
//! Whatever fails before 6 removes the new bitmap, and the old one has recorded everything.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::control::{Control, DiskStatus, Shared};
use super::guardian::Guardian;
use super::journal::{DiskRecord, Journal, Record};
use super::lock::Lock;
use super::moment::{Insert, Scene};
use super::names::{Role, object, work_bitmap};
use super::plan::{DiskPlan, Inputs, Plan};
use super::publish::{self, partial_name};
use super::seen::{Answers, survey};
use super::teardown::{Scope, teardown};
use super::zeros::ChainData;
use super::{
    LevelWish, Options, StopWish, Watch, bitmap, fleece, moment, names, plan, recover, space,
};
use super::{journal, nbdserver, vm};
use crate::chain::Level;
use crate::chain::manifest::{
    Consistency, Contents, FORMAT_VERSION, ImageFormat, Manifest, Skipped,
};
use crate::error::{Error, Kind, Result};
use crate::progress::Progress;
use crate::qmp::Client;
use crate::qmp::steps::step;
use crate::qmp::types::Job;

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    /// The run's id.
    pub run: String,
    /// The plan that was made, and in a dry run not executed.
    pub plan: Plan,
    /// What became of each disk.
    pub disks: Vec<DiskReport>,
    /// What the moment achieved.
    pub consistency: Consistency,
}

/// What became of a disk.
#[derive(Debug)]
pub struct DiskReport {
    /// Its name.
    pub disk: String,
    /// Its level.
    pub level: Level,
    /// The image.
    pub path: PathBuf,
    /// Its manifest, or why there is no point.
    pub result: Result<Manifest>,
}

impl Report {
    /// The error to end with: `Partial` if some disks have a point and others not, the first
    /// error if none has, `Skipped` with `strict`.
    pub fn verdict(&self, strict: bool) -> Result<()> {
        let refused = self.plan.refused.iter().map(|(d, e)| (d.as_str(), e));
        let failed =
            self.disks.iter().filter_map(|d| Some((d.disk.as_str(), d.result.as_ref().err()?)));
        let bad: Vec<_> = refused.chain(failed).collect();
        let good = self.disks.iter().filter(|d| d.result.is_ok()).count();
        if let Some((disk, e)) = bad.first() {
            let kind = if good > 0 { Kind::Partial } else { e.kind() };
            let text = format!(
                "{} of {} disks have no new point; {disk}: {}",
                bad.len(),
                bad.len().saturating_add(good),
                e.report()
            );
            return Err(Error::new(kind, text));
        }
        match self.plan.skipped.first() {
            Some(s) if strict => {
                Err(Error::new(Kind::Skipped, format!("{} was skipped: {}", s.disk, s.reason)))
            }
            _ => Ok(()),
        }
    }
}

/// Makes the backup.
///
/// # Errors
/// Nothing could be begun, or QEMU is gone. What concerns one disk is in its report.
pub fn backup(options: &Options, watch: &dyn Watch, interrupt: Arc<AtomicBool>) -> Result<Report> {
    let _vm_lock = Lock::vm(&options.state_dir, &options.qmp)?;
    let mut client = Client::connect(&options.qmp)?;
    client.require(&[
        "blockdev-add",
        "blockdev-backup",
        "block-dirty-bitmap-merge",
        "query-jobs",
        "query-block-exports",
    ])?;
    if !client.features()?.has("snapshot-access") {
        return Err(Error::new(Kind::Unsupported, "this QEMU has no snapshot-access driver")
            .remedy("QEMU 7.2 or newer is needed"));
    }
    if options.dry_run {
        return dry_run(options, &mut client);
    }
    recover::recover(&mut client, &options.state_dir, &options.qmp, watch)?;
    let base = base_dir(options);
    super::lock::make_dir(&base)?;
    let _target_lock = Lock::target(&options.target)?;
    let run = names::new_run()?;
    let status = Shared::default();
    let _control =
        Control::open(&options.state_dir, &options.qmp, status.clone(), interrupt.clone())?;
    let target_id = target_id(options, &base, true)?;
    let first = Record::Begin {
        run: run.clone(),
        target: options.target.clone(),
        agent: options.agent.as_ref().map(|a| a.canonical()),
    };
    let journal = Journal::begin(&options.state_dir, &options.qmp, &first)?;
    client.interrupt_by(Some(interrupt));
    let mut r = Run {
        options,
        watch,
        client,
        journal,
        run,
        target_id,
        base,
        status,
        server: None,
        guardian: None,
        consistency: Consistency::default(),
        chains: HashMap::new(),
    };
    let result = r.execute();
    r.finish(result)
}

fn dry_run(options: &Options, client: &mut Client) -> Result<Report> {
    let run = names::new_run()?;
    let base = base_dir(options);
    let target_id = target_id(options, &base, false)?;
    let inputs = Inputs {
        seen: survey(&Answers::ask(client)?),
        run: &run,
        target_id: &target_id,
        base: &base,
        now: now(),
        no_inc: None,
        unsound: &[],
    };
    let plan = plan::make(options, inputs)?;
    Ok(Report { run, plan, disks: Vec::new(), consistency: Consistency::default() })
}

/// The target, or its folder of this month.
fn base_dir(options: &Options) -> PathBuf {
    if !options.layout.monthly {
        return options.target.clone();
    }
    options.target.join(jiff::Zoned::now().strftime("%Y-%m").to_string())
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// The first eight digits of the id in `uuid`, as qmpbackup keeps it: 36 bytes, no newline.
fn target_id(options: &Options, base: &Path, make: bool) -> Result<String> {
    let path = base.join("uuid");
    let text = match std::fs::read_to_string(&path) {
        Ok(t) => t,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let hex = names::random_hex(16)?;
            let part = |r: std::ops::Range<usize>| hex.get(r).unwrap_or_default();
            let uuid = format!(
                "{}-{}-4{}-8{}-{}",
                part(0..8),
                part(8..12),
                part(13..16),
                part(17..20),
                part(20..32)
            );
            if make && options.level != LevelWish::Copy {
                publish::write_whole(&path, uuid.as_bytes())?;
            }
            uuid
        }
        Err(e) => return Err(Error::io(e, "cannot read the target's id").at_path(&path)),
    };
    let id: String = text.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    if id.len() == 8 {
        return Ok(id.to_ascii_lowercase());
    }
    Err(Error::new(Kind::Corrupt, "this is not the id of a backup directory").at_path(&path))
}

struct Run<'a> {
    options: &'a Options,
    watch: &'a dyn Watch,
    client: Client,
    journal: Journal,
    run: String,
    target_id: String,
    base: PathBuf,
    status: Shared,
    server: Option<nbdserver::Server>,
    guardian: Option<Guardian>,
    consistency: Consistency,
    /// Chains that INCs build on, by the new image's path.
    chains: HashMap<PathBuf, ChainData>,
}

/// A disk on its way.
struct Active {
    index: usize,
    plan: DiskPlan,
    record: DiskRecord,
    manifest: Manifest,
    chain: Option<ChainData>,
    progress: Arc<dyn Progress>,
    shown: u64,
    began: Instant,
    state: State,
}

enum State {
    Going,
    Done(Box<Manifest>),
    Failed(Error),
}

impl Active {
    fn going(&self) -> bool {
        matches!(self.state, State::Going)
    }
}

impl Run<'_> {
    fn execute(&mut self) -> Result<Report> {
        self.phase("planning");
        let plan = self.plan()?;
        self.announce_plan(&plan);
        let mut disks = self.activate(&plan)?;
        let outcome = self.copy_all(&mut disks);
        if let Err(e) = outcome {
            // Disks that are points already stay points; the rest is undone by `finish`.
            if !disks.iter().any(|d| matches!(d.state, State::Done(_)))
                || e.kind() == Kind::Interrupted
            {
                return Err(e);
            }
            self.watch.warn(&e.report());
            let text = e.report();
            for d in disks.iter_mut().filter(|d| d.going()) {
                d.state = State::Failed(Error::new(e.kind(), text.clone()));
            }
        }
        Ok(self.report(plan, disks))
    }

    fn report(&self, plan: Plan, disks: Vec<Active>) -> Report {
        let disks = disks.into_iter().map(|d| DiskReport {
            disk: d.plan.disk.label().to_string(),
            level: d.plan.level,
            path: d.plan.dir.join(&d.plan.image),
            result: match d.state {
                State::Done(m) => Ok(*m),
                State::Failed(e) => Err(e),
                State::Going => Err(Error::new(Kind::Interrupted, "it was not finished")),
            },
        });
        Report {
            run: self.run.clone(),
            disks: disks.collect(),
            plan,
            consistency: self.consistency.clone(),
        }
    }

    /// Whatever happened: nothing of ours stays in QEMU, and the journal ends.
    fn finish(mut self, result: Result<Report>) -> Result<Report> {
        self.client.interrupt_by(None);
        self.phase("cleaning up");
        if let Some(g) = self.guardian.take() {
            self.release(g)?;
        }
        let pending =
            journal::pending(&self.options.state_dir, &self.options.qmp)?.unwrap_or_default();
        let undone = match recover::undo(&mut self.client, &pending, self.watch) {
            Err(e) if e.kind() == Kind::Peer && gone(&self.options.qmp) => {
                recover::undo_offline(&pending, self.watch)
            }
            other => other,
        };
        match (result, undone) {
            (Ok(r), Ok(())) => self.journal.end().map(|()| r),
            (Err(e), Ok(())) => {
                self.journal.end()?;
                Err(e)
            }
            (Ok(_), Err(u)) => Err(u.remedy("run fleecefs recover when QEMU answers again")),
            (Err(e), Err(u)) => {
                self.watch.warn(&format!("cleaning up failed: {}", u.report()));
                Err(e.remedy("run fleecefs recover when QEMU answers again"))
            }
        }
    }

    fn release(&mut self, guardian: Guardian) -> Result<()> {
        let mut scene = Scene {
            client: &mut self.client,
            options: self.options,
            journal: &mut self.journal,
            watch: self.watch,
        };
        moment::release(&mut scene, guardian)
    }

    fn phase(&self, phase: &str) {
        let mut s = self.status.lock().unwrap_or_else(|e| e.into_inner());
        s.phase = phase.to_string();
        if s.run.is_empty() {
            s.run = self.run.clone();
            s.pid = std::process::id();
            s.started = now();
            s.target = self.options.target.clone();
        }
    }

    fn disk_status(&self, index: usize, change: impl FnOnce(&mut DiskStatus)) {
        let mut s = self.status.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(d) = s.disks.get_mut(index) {
            change(d);
        }
    }

    /// Plans; where the chain proves unsound, or an INC needs QEMU's NBD server and that cannot
    /// be had, plans again.
    fn plan(&mut self) -> Result<Plan> {
        let seen = survey(&Answers::ask(&mut self.client)?);
        self.sweep()?;
        let mut unsound: Vec<(PathBuf, String)> = Vec::new();
        // One time for all plans: it is in the images' names.
        let time = now();
        let make = |run: &Self, no_inc: Option<String>, unsound: &[(PathBuf, String)]| {
            let inputs = Inputs {
                seen: seen.clone(),
                run: &run.run,
                target_id: &run.target_id,
                base: &run.base,
                now: time,
                no_inc,
                unsound,
            };
            plan::make(run.options, inputs)
        };
        let mut plan = make(self, None, &unsound)?;
        for d in plan.disks.iter().filter(|d| d.since.is_some()) {
            match ChainData::open(&d.dir, &d.base) {
                Ok(c) => drop(self.chains.insert(d.dir.join(&d.image), c)),
                Err(e) => {
                    unsound.push((d.dir.clone(), format!("the chain is unsound: {}", e.report())))
                }
            }
        }
        if !unsound.is_empty() {
            plan = make(self, None, &unsound)?;
        }
        if !plan.disks.iter().any(|d| d.since.is_some()) && std::env::var_os(HOLD).is_none() {
            return Ok(plan);
        }
        match self.start_server() {
            Ok(()) => Ok(plan),
            Err(e) if e.kind() == Kind::Busy => make(self, Some(e.report()), &unsound),
            Err(e) => Err(e),
        }
    }

    fn start_server(&mut self) -> Result<()> {
        if let Some(a) = &self.options.nbd {
            self.server = Some(nbdserver::Server::existing(a.clone()));
            return Ok(());
        }
        self.journal.write(&Record::NbdStart)?;
        let path = nbdserver::socket_path(&self.options.state_dir, &self.options.qmp);
        match nbdserver::Server::start(&mut self.client, &path) {
            Ok(s) => self.server = Some(s),
            Err(e) => {
                self.journal.write(&Record::NbdStop)?;
                return Err(e);
            }
        }
        Ok(())
    }

    fn stop_server(&mut self) -> Result<()> {
        if let Some(s) = self.server.take()
            && s.stop(&mut self.client)?
        {
            self.journal.write(&Record::NbdStop)?;
        }
        Ok(())
    }

    fn sweep(&self) -> Result<()> {
        recover::sweep(&self.base, self.watch)?;
        let list = std::fs::read_dir(&self.base)
            .map_err(|e| Error::io(e, "cannot read the target").at_path(&self.base))?;
        for e in list.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            recover::sweep(&e.path(), self.watch)?;
        }
        Ok(())
    }

    fn announce_plan(&self, plan: &Plan) {
        for s in &plan.skipped {
            self.watch.say(&format!("{}: left out: {}", s.disk, s.reason));
        }
        for (disk, e) in &plan.refused {
            self.watch.warn(&format!("{disk}: {}", e.report()));
        }
        for d in &plan.disks {
            let word = names::level_word(d.level);
            match &d.demoted {
                Some(why) => self.watch.warn(&format!("{}: a FULL, since {why}", d.disk.label())),
                None => self.watch.say(&format!("{}: {word} -> {}", d.disk.label(), d.image)),
            }
        }
        let mut s = self.status.lock().unwrap_or_else(|e| e.into_inner());
        s.disks = plan
            .disks
            .iter()
            .map(|d| DiskStatus {
                disk: d.disk.label().to_string(),
                level: names::level_word(d.level).to_string(),
                state: "waiting".into(),
                total: d.estimate(),
                ..Default::default()
            })
            .collect();
    }

    fn activate(&mut self, plan: &Plan) -> Result<Vec<Active>> {
        let vm = vm::describe(&mut self.client);
        let version = self.client.version().to_string();
        Ok(plan
            .disks
            .iter()
            .enumerate()
            .map(|(index, p)| Active {
                index,
                record: DiskRecord {
                    index,
                    dir: p.dir.clone(),
                    image: p.image.clone(),
                    fleece: fleece::fleece_path(&self.options.copy, p, &self.run, index),
                    node: p.disk.node.clone(),
                    top: p.disk.top.clone(),
                    bitmap: p.new_bitmap.as_ref().map(|b| b.name.clone()),
                },
                manifest: self.manifest(p, &plan.skipped, &vm, &version),
                chain: None,
                progress: self.watch.disk(p.disk.label()),
                shown: 0,
                began: Instant::now(),
                plan: p.clone(),
                state: State::Going,
            })
            .collect())
    }

    fn manifest(&self, p: &DiskPlan, skipped: &[Skipped], vm: &Value, version: &str) -> Manifest {
        let dirty = matches!(p.level, Level::Inc | Level::Diff);
        Manifest {
            format_version: FORMAT_VERSION,
            run: self.run.clone(),
            image: p.image.clone(),
            disk: p.disk.identity.clone(),
            level: p.level,
            time: now(),
            parent: p.parent().map(|m| m.image.clone()),
            format: ImageFormat::Qcow2,
            content: if dirty { Contents::DirtyOnly } else { Contents::Full },
            virtual_size: p.disk.size,
            file_size: 0,
            bitmap: p.new_bitmap.clone(),
            diff_bitmap: p.diff_bitmap.clone(),
            bytes_copied: 0,
            consistency: Consistency::default(),
            qemu_version: version.to_string(),
            duration_ms: 0,
            blake3: None,
            fingerprint: None,
            vm: vm.clone(),
            config_files: Vec::new(),
            skipped: skipped.to_vec(),
        }
    }

    fn copy_all(&mut self, disks: &mut [Active]) -> Result<()> {
        self.phase("preparing");
        self.each(disks, Self::prepare)?;
        self.phase("taking the moment");
        self.take_moment(disks)?;
        self.phase("copying");
        self.each(disks, Self::view)?;
        self.stop_after_views(disks)?;
        self.each(disks, Self::start_job)?;
        self.wait(disks)
    }

    /// Does `step` for every disk still going; a failure ends that disk alone.
    fn each(
        &mut self,
        disks: &mut [Active],
        step: fn(&mut Self, &mut Active) -> Result<()>,
    ) -> Result<()> {
        for d in disks.iter_mut().filter(|d| d.going()) {
            self.client.check_interrupt()?;
            if let Err(e) = step(self, d) {
                self.fail(d, e)?;
            }
        }
        if disks.iter().all(|d| matches!(d.state, State::Failed(_))) && !disks.is_empty() {
            return Ok(());
        }
        Ok(())
    }

    /// Ends one disk: its objects leave QEMU, its new bitmap goes, its files are removed.
    fn fail(&mut self, d: &mut Active, error: Error) -> Result<()> {
        let over = matches!(error.kind(), Kind::Interrupted | Kind::Timeout);
        if over || gone_error(&error, &mut self.client) {
            return Err(error);
        }
        self.watch.warn(&format!("{}: {}", d.plan.disk.label(), error.report()));
        self.disk_status(d.index, |s| s.state = "failed".into());
        d.state = State::Failed(error);
        teardown(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        recover::settle_disk(&mut self.client, &d.record, false, &super::Quiet)?;
        self.journal.write(&Record::Settled(d.index))
    }

    /// Files, nodes and the new bitmap: all before the moment.
    fn prepare(&mut self, d: &mut Active) -> Result<()> {
        let p = &d.plan;
        super::lock::make_dir(&p.dir)?;
        self.check_space(d)?;
        d.chain = self.chains.remove(&p.dir.join(&p.image));
        self.journal.write(&Record::Disk(d.record.clone()))?;
        publish::announce(&p.dir, &d.manifest)?;
        let partial = p.dir.join(partial_name(&p.image));
        let options = fleece::image_options(p, &self.options.copy);
        publish::create_image(&partial, p.disk.size, &options)?;
        fleece::create_fleece(&d.record.fleece, p.disk.size)?;
        step("files created");
        let target = object(&self.run, Role::Target, d.index);
        let more = fleece::target_options(&self.options.copy);
        fleece::add_image(&mut self.client, &target, "qcow2", &partial, more)?;
        let name = object(&self.run, Role::Fleece, d.index);
        fleece::add_image(&mut self.client, &name, "raw", &d.record.fleece, json!({}))?;
        if let Some(b) = &p.new_bitmap {
            bitmap::add(&mut self.client, b)?;
        }
        let timeout = self.options.copy.cbw_timeout;
        fleece::add_filter(&mut self.client, &self.run, d.index, &p.disk.top, timeout)
    }

    fn check_space(&self, d: &Active) -> Result<()> {
        let copy = &self.options.copy;
        if copy.no_space_check {
            return Ok(());
        }
        let need = d.plan.estimate();
        if copy.compress.is_none() {
            space::require(&d.plan.dir, need, "the new image")?;
        }
        let dir = d.record.fleece.parent().unwrap_or(Path::new("/"));
        space::require(dir, space::fleece_need(need), "the fleece image")
    }

    fn take_moment(&mut self, disks: &mut [Active]) -> Result<()> {
        let inserts: Vec<Insert> = disks
            .iter()
            .filter(|d| d.going())
            .map(|d| Insert {
                index: d.index,
                insertion: d.plan.disk.insertion.clone(),
                filter: object(&self.run, Role::Filter, d.index),
            })
            .collect();
        if inserts.is_empty() {
            return Ok(());
        }
        let mut scene = Scene {
            client: &mut self.client,
            options: self.options,
            journal: &mut self.journal,
            watch: self.watch,
        };
        let taken = moment::take(&mut scene, &inserts)?;
        self.guardian = taken.held;
        self.consistency = taken.consistency;
        let time = now();
        for d in disks.iter_mut().filter(|d| d.going()) {
            d.manifest.time = time;
            d.manifest.consistency = self.consistency.clone();
        }
        let c = &self.consistency;
        if c.stopped_ms > 0
            || self.client.has_guest() && self.options.moment.stop == StopWish::Moment
        {
            self.watch.say(&format!("the guest was stopped for {} ms", c.stopped_ms));
        }
        for (index, e) in taken.failed {
            if let Some(d) = disks.iter_mut().find(|d| d.index == index) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// The frozen view, and the bitmap of what to copy out of it.
    fn view(&mut self, d: &mut Active) -> Result<()> {
        fleece::add_view(&mut self.client, &self.run, d.index)?;
        let Some(since) = &d.plan.since else { return Ok(()) };
        let view = object(&self.run, Role::Snapshot, d.index);
        let work = work_bitmap(&self.run);
        self.client.execute(
            "transaction",
            json!({"actions": [
                {"type": "block-dirty-bitmap-add", "data": {"node": view, "name": work,
                    "granularity": since.granularity, "disabled": true}},
                {"type": "block-dirty-bitmap-merge", "data": {"node": view, "target": work,
                    "bitmaps": [{"node": d.plan.disk.node, "name": since.name}]}},
            ]}),
        )?;
        self.add_lost_zeros(d, &view, &work)
    }

    /// See `zeros`: what became zero without a dirty bit is copied as well.
    fn add_lost_zeros(&mut self, d: &Active, view: &str, work: &str) -> Result<()> {
        let (Some(server), Some(chain)) = (&self.server, &d.chain) else {
            return Err(Error::new(Kind::Peer, "there is no NBD server to ask for zeros"));
        };
        let export = object(&self.run, Role::ViewExport, d.index);
        let zeros =
            server.with_export(&mut self.client, &export, view, false, |n| n.zero_ranges())?;
        let lost = chain.lost(&zeros, d.plan.disk.cluster_size.max(65536))?;
        if lost.is_empty() {
            return Ok(());
        }
        let before = bitmap::count(&mut self.client, view, work)?;
        let scratch = object(&self.run, Role::Scratch, d.index);
        self.client.execute(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": scratch,
            "size": d.plan.disk.size, "read-zeroes": true}),
        )?;
        let granularity = d.plan.since.as_ref().map_or(65536, |b| b.granularity);
        self.client.execute(
            "block-dirty-bitmap-add",
            json!({"node": scratch, "name": work,
            "granularity": granularity}),
        )?;
        let export = object(&self.run, Role::ScratchExport, d.index);
        server.with_export(&mut self.client, &export, &scratch, true, |n| {
            lost.iter().try_for_each(|r| n.write_zeroes(r.clone()))
        })?;
        self.client.execute(
            "block-dirty-bitmap-merge",
            json!({"node": view, "target": work,
            "bitmaps": [{"node": scratch, "name": work}]}),
        )?;
        self.client.execute("blockdev-del", json!({"node-name": scratch}))?;
        let grown = bitmap::count(&mut self.client, view, work)?.saturating_sub(before);
        if grown > 0 {
            self.watch.warn(&format!(
                "{}: {grown} bytes have become zeros without a dirty bit (shrunk and grown \
                 again?): copied as well",
                d.plan.disk.label()
            ));
        }
        Ok(())
    }

    fn stop_after_views(&mut self, disks: &[Active]) -> Result<()> {
        if let (Some(dir), Some(server)) = (std::env::var_os(HOLD), &self.server) {
            let going = disks.iter().filter(|d| d.going());
            let views: Vec<_> = going.map(|d| (d.index, d.plan.disk.base_name())).collect();
            nbdserver::hold(&mut self.client, server, &self.run, &views, Path::new(&dir))?;
        }
        self.stop_server()
    }

    fn start_job(&mut self, d: &mut Active) -> Result<()> {
        let copy = &self.options.copy;
        let mut a = json!({
            "job-id": object(&self.run, Role::Job, d.index),
            "device": object(&self.run, Role::Snapshot, d.index),
            "target": object(&self.run, Role::Target, d.index),
            "sync": "full",
            // It stays listed until its image is closed: a recovery can see how it ended.
            "auto-dismiss": false,
            "compress": copy.compress.is_some(),
        });
        if d.plan.since.is_some() {
            a["sync"] = json!("bitmap");
            a["bitmap-mode"] = json!("never");
            a["bitmap"] = json!(work_bitmap(&self.run));
        }
        if copy.speed > 0 {
            a["speed"] = json!(copy.speed);
        }
        if let Some(n) = copy.workers {
            a["x-perf"] = json!({"max-workers": n});
        }
        if self.client.features()?.has("discard-source") {
            a["discard-source"] = json!(true);
        }
        d.began = Instant::now();
        self.client.execute("blockdev-backup", a)?;
        d.progress.begin(d.plan.disk.label(), d.plan.estimate());
        self.disk_status(d.index, |s| s.state = "copying".into());
        Ok(())
    }

    fn wait(&mut self, disks: &mut [Active]) -> Result<()> {
        while disks.iter().any(Active::going) {
            let jobs: Vec<Job> = self.client.poll("query-jobs")?;
            for d in disks.iter_mut().filter(|d| d.going()) {
                let id = object(&self.run, Role::Job, d.index);
                let ended = match jobs.iter().find(|j| j.id == id) {
                    Some(j) => self.follow(d, j),
                    None => Some(Err(Error::new(Kind::Peer, "the backup job has vanished"))),
                };
                match ended {
                    None => {}
                    Some(Ok(job)) => {
                        if let Err(e) = self.complete(d, &job) {
                            self.fail(d, e)?;
                        }
                    }
                    Some(Err(e)) => self.fail(d, e)?,
                }
            }
            if disks.iter().any(Active::going) {
                self.client.check_interrupt()?;
                self.client.next_event(Instant::now() + POLL)?;
            }
        }
        Ok(())
    }

    /// Shows progress; gives the job once it has ended.
    fn follow(&mut self, d: &mut Active, job: &Job) -> Option<Result<Job>> {
        let fresh = job.current_progress.saturating_sub(d.shown);
        d.shown = job.current_progress;
        d.progress.advance(fresh);
        self.disk_status(d.index, |s| {
            s.done = job.current_progress;
            s.total = job.total_progress;
        });
        if !job.concluded() {
            return None;
        }
        step("job concluded");
        d.progress.end(d.began.elapsed());
        Some(match &job.error {
            None => Ok(job.clone()),
            Some(e) => Err(job_error(e)),
        })
    }

    /// The job is done: close, take down, publish, and only then let go of the old bitmap.
    fn complete(&mut self, d: &mut Active, job: &Job) -> Result<()> {
        self.disk_status(d.index, |s| s.state = "publishing".into());
        let target = object(&self.run, Role::Target, d.index);
        self.client.execute("blockdev-del", json!({"node-name": target}))?;
        self.journal.write(&Record::Closed(d.index))?;
        self.client.execute("job-dismiss", json!({"id": job.id}))?;
        teardown(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        std::thread::sleep(self.options.copy.remove_delay);
        publish::remove_if_there(&d.record.fleece)?;
        d.manifest.bytes_copied = job.current_progress;
        d.manifest.duration_ms = u64::try_from(d.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut m = d.manifest.clone();
        m.config_files = super::vm::keep_config(&self.options.config, &d.plan.dir, &self.run)?;
        let m = publish::publish(&d.plan.dir, m, !self.options.no_hash)?;
        self.beside(d);
        d.state = State::Done(Box::new(m));
        self.journal.write(&Record::Settled(d.index))?;
        for name in &d.plan.obsolete {
            // The point is good whether or not this works; the next run tries again.
            if let Err(e) = bitmap::remove(&mut self.client, &d.plan.disk.node, name) {
                self.watch.warn(&format!("bitmap {name} stays for now: {}", e.report()));
            }
        }
        self.disk_status(d.index, |s| s.state = "done".into());
        Ok(())
    }

    /// What qmpbackup keeps beside the images. Nothing depends on it.
    fn beside(&self, d: &Active) {
        let p = &d.plan;
        let write = || -> Result<()> {
            let text = serde_json::to_vec_pretty(&p.disk.info)
                .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e))?;
            publish::write_whole(&self.base.join(format!("{}.config", p.disk.base_name())), &text)?;
            let l = &self.options.layout;
            if l.no_timestamp && !l.no_symlink && matches!(p.level, Level::Full | Level::Copy) {
                publish::link_plain(&p.dir, &p.image, p.level)?;
            }
            Ok(())
        };
        if let Err(e) = write() {
            self.watch.warn(&e.report());
        }
    }
}

/// How often a job's progress is asked for.
const POLL: Duration = Duration::from_millis(250);

/// A test hook: a folder. While the frozen views stand and before anything is copied, they are
/// exported over NBD, `ready` says where, and the run waits for a file `go`.
const HOLD: &str = "FLEECEFS_HOLD";

fn job_error(text: &str) -> Error {
    if text.contains("No space left") {
        return Error::new(Kind::NoSpace, "no space left for the image")
            .remedy("free space in the target, or prune it");
    }
    if text.contains("Permission denied") || text.contains("Operation not permitted") {
        return Error::new(
            Kind::Peer,
            "the frozen view was lost: the fleece image could not take a \
            write of the guest in time",
        )
        .remedy("look at the space and speed of --fleece-dir");
    }
    Error::new(Kind::Peer, format!("the backup job failed: {text}"))
}

/// Whether an error means that QEMU is not there any more.
fn gone_error(e: &Error, client: &mut Client) -> bool {
    e.kind() == Kind::Peer && client.execute("query-version", json!({})).is_err()
}

fn gone(qmp: &crate::qmp::Address) -> bool {
    matches!(Client::connect(qmp), Err(e) if matches!(e.kind(), Kind::Peer | Kind::NotFound))
}
