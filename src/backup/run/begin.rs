//! The beginning of a run: what is to be done, and what it needs of QEMU beside the disks.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::conclude::failure;
use super::session::{Active, DiskState, Run};
use crate::backup::disks::{Answers, Survey, survey};
use crate::backup::fleece::nbdserver;
use crate::backup::fleece::zeros::ChainData;
use crate::backup::plan::folders;
use crate::backup::plan::planned::{DiskPlan, Inputs, Plan, Unsound, unknown_disk};
use crate::backup::publish::vm;
use crate::backup::state::control::DiskStatus;
use crate::backup::state::journal::{DiskRecord, Record};
use crate::backup::{Options, names, now, now_exactly, plan, recover};
use crate::error::{Kind, Result};
use crate::failpoint;
use crate::layout::Level;
use crate::manifest::{
    Consistency, Contents, FORMAT_VERSION, ImageFormat, Manifest, RunImage, VmConfig,
};
use crate::qmp::Client;
use crate::text::path_text;

/// The disks, and what QEMU says of the VM.
///
/// # Errors
/// As [`Answers::ask`] and [`vm::describe`].
pub(in crate::backup) fn look(
    options: &Options,
    client: &mut Client,
) -> Result<(Survey, VmConfig)> {
    let mut answers = Answers::ask(client)?;
    answers.ask_serials(client)?;
    answers.ours = options.offline.is_some();
    if options.offline.is_some() && options.dry_run {
        // We opened them so that nothing is changed.
        answers.nodes.iter_mut().for_each(|n| n.ro = false);
    }
    let (mut seen, mut vm) = (survey(&answers), VmConfig::from(vm::describe(client)?));
    if let Some(known) = &options.offline {
        known.name(&mut seen);
        vm = known.vm.clone().unwrap_or(vm);
    }
    Ok((seen, vm))
}

impl Run<'_> {
    /// Plans; where the chain proves unsound, or an INC needs QEMU's NBD server and that cannot
    /// be had, plans again.
    pub(in crate::backup) fn plan(&mut self) -> Result<Plan> {
        let (seen, vm) = look(self.options, &mut self.client)?;
        self.vm = vm;
        let name = crate::manifest::vm_name(&self.vm).or(crate::manifest::vm_uuid(&self.vm));
        self.watch.run_is(&self.run, name.unwrap_or_default());
        recover::sweep_all(&self.base, self.watch)?;
        let mut unsound: Vec<Unsound> = Vec::new();
        // One time for all plans: it is in the images' names.
        let time = now();
        let make = |run: &Self, no_inc: Option<String>, unsound: &[Unsound]| {
            let inputs = Inputs {
                seen: seen.clone(),
                run: &run.run,
                target: &run.target,
                base: &run.base,
                now: time,
                vm: crate::manifest::vm_uuid(&run.vm),
                vm_name: crate::manifest::vm_name(&run.vm),
                newcomer: run.newcomer,
                renamed: &run.renamed,
                no_inc,
                unsound,
            };
            plan::make(run.options, inputs)
        };
        let mut plan = make(self, None, &unsound)?;
        let walk_all = failpoint::walks_all();
        for d in plan.disks.iter().filter(|d| d.since.is_some()) {
            match ChainData::open(&d.dir, &d.base, d.tail(), walk_all || d.needs_walk()) {
                Ok(c) => drop(self.chains.insert(d.dir.join(&d.image), c)),
                Err(e) => {
                    let tip = d.base.last().map_or_else(String::new, |m| m.image.clone());
                    let why = format!("the chain is unsound: {}", e.report());
                    unsound.push((d.dir.clone(), tip, why));
                }
            }
        }
        if !unsound.is_empty() {
            plan = make(self, None, &unsound)?;
        }
        let builds = plan.disks.iter().any(|d| d.since.is_some());
        let marks = plan.disks.iter().any(DiskPlan::wants_watermark);
        if !builds && !marks && failpoint::hold().is_none() {
            return Ok(plan);
        }
        match self.start_server() {
            Ok(()) => Ok(plan),
            Err(e) if e.kind() == Kind::Busy && builds => make(self, Some(e.report()), &unsound),
            Err(e) if !builds && e.kind() != Kind::Interrupted => {
                // A FULL needs none: its bitmaps get no watermarks.
                log::info!("the new bitmaps get no size watermarks: {}", e.report());
                Ok(plan)
            }
            Err(e) => Err(e),
        }
    }

    fn start_server(&mut self) -> Result<()> {
        nbdserver::check_safe(&self.client, &self.vm)?;
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

    pub(in crate::backup) fn stop_server(&mut self) -> Result<()> {
        if let Some(s) = self.server.take()
            && s.stop(&mut self.client)?
        {
            self.journal.write(&Record::NbdStop)?;
        }
        Ok(())
    }

    pub(in crate::backup) fn announce_plan(&self, plan: &Plan) {
        if let Some(before) = &self.elsewhere {
            self.watch.warn(&first_here(&self.vm, &self.options.target, before));
        }
        for s in &plan.skipped {
            self.watch.say_of(&s.disk, &format!("{}: skipped: {}", s.disk, s.reason));
        }
        for name in &plan.unknown {
            self.watch.warn(&unknown_disk(name));
        }
        for (disk, e) in &plan.refused {
            self.watch.warn_of(disk, &format!("{}: {}", path_text(&disk), e.report()));
        }
        for path in folders::unfinished(plan.disks.iter().map(|d| d.dir.as_path())) {
            self.watch.warn(&format!(
                "{}: an unfinished backup of another program, or one still running: ignored; \
                 remove it if nobody writes to it",
                path_text(&path)
            ));
        }
        plan.disks.iter().for_each(|d| self.announce_disk(d));
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

    /// What there is to say of one disk before it is backed up.
    fn announce_disk(&self, d: &DiskPlan) {
        let label = d.disk.label();
        if d.disk.throwaway {
            self.watch.warn_of(label, &format!(
                "{label}: QEMU runs with snapshot=on: guest writes are in a temporary overlay of {} \
                 and lost when QEMU ends; the point has the disk as the guest sees it",
                path_text(&d.disk.identity.file)
            ));
        }
        if let Some(before) = &d.moved_from {
            let text = format!(
                "{label}: its file was {} and is {} now; its points stay in {}",
                path_text(before),
                path_text(&d.disk.identity.file),
                path_text(&d.dir)
            );
            // Its bitmap came along, which proves that it is the same; else somebody should look.
            match d.since {
                Some(_) => self.watch.say_of(label, &text),
                None => self.watch.warn_of(label, &text),
            }
        }
        if let Some(original) = &d.copy_of {
            self.watch.warn_of(label, &copied(d, original));
        }
        self.announce_level(d);
    }

    /// Its level, and why it is another than was asked for.
    fn announce_level(&self, d: &DiskPlan) {
        let label = d.disk.label();
        match &d.demoted {
            Some(why) if why == crate::backup::target::history::FIRST => self
                .watch
                .say_of(label, &format!("{label}: first backup to this target, taking a FULL")),
            // As the user wants it.
            Some(why) if why == crate::backup::plan::level::DUE => {
                self.watch.say_of(label, &format!("{label}: taking a FULL: {why}"));
            }
            Some(why) => self.watch.warn_of(label, &format!("{label}: taking a FULL: {why}")),
            None => {
                let word = names::level_word(d.level);
                let image = path_text(&d.image);
                self.watch.say_of(label, &format!("{}: {word} -> {image}", path_text(&label)));
            }
        }
    }

    pub(in crate::backup) fn activate(&mut self, plan: &Plan) -> Result<Vec<Active>> {
        let vm = self.vm.clone();
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
                    fleece: PathBuf::new(),
                    node: p.disk.node.clone(),
                    top: p.disk.top.clone(),
                    bitmap: p.new_bitmap.as_ref().map(|b| b.name.clone()),
                    image_id: None,
                    fleece_id: None,
                },
                manifest: self.manifest(p, plan, &vm, &version),
                chain: None,
                folder: None,
                held: None,
                hasher: None,
                progress: self.watch.disk(p.disk.label()),
                shown: 0,
                empty: 0,
                began: Instant::now(),
                plan: p.clone(),
                state: DiskState::Going,
            })
            .collect())
    }

    fn manifest(&self, p: &DiskPlan, plan: &Plan, vm: &VmConfig, version: &str) -> Manifest {
        let (time, time_nanos) = now_exactly();
        let dirty = matches!(p.level, Level::Inc | Level::Diff);
        Manifest {
            format_version: FORMAT_VERSION,
            run: self.run.clone(),
            image: p.image.clone(),
            disk: p.disk.identity.clone(),
            moved_from: p.moved_from.clone(),
            linked_from: None,
            level: p.level,
            time,
            time_nanos,
            parent: p.parent().map(|m| m.image.clone()),
            state_of: None,
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
            backing: Some(p.disk.backing.clone()),
            config_files: Vec::new(),
            skipped: plan.skipped.clone(),
            failed: plan.refused.iter().map(|(d, e)| failure(d, e)).collect(),
            run_images: plan.disks.iter().map(run_image).collect(),
        }
    }
}

/// What is said of the first backup to a target of a VM that has another one: there it may be by mistake.
pub(super) fn first_here(vm: &VmConfig, target: &Path, before: &Path) -> String {
    let name = crate::manifest::vm_name(vm).or(crate::manifest::vm_uuid(vm));
    let who = name.map_or_else(|| "this VM".to_string(), path_text);
    format!(
        "first backup of {who} to {}: it has been backed up to {} until now (check --target, and that its file \
         system is mounted; --init says that a new backup directory is meant)",
        path_text(&target),
        path_text(&before)
    )
}

/// What is said of a disk that has another's bitmaps.
fn copied(d: &DiskPlan, original: &str) -> String {
    let file = path_text(&d.disk.identity.file);
    format!(
        "{}: it has the bitmaps of {}, which is still there: it is taken for a copy of that, and backed up as a \
         disk of its own in {}. If it takes the other's place, --name {file}=NAME goes on in the folder NAME, and \
         'fleecefs link-disk' joins their points; another VM's disk is better in another --target",
        path_text(&d.disk.label()),
        path_text(&original),
        path_text(&d.dir)
    )
}

fn run_image(p: &DiskPlan) -> RunImage {
    RunImage { disk: p.disk.label().to_string(), image: p.image.clone() }
}
