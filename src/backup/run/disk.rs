//! The steps of one disk: prepare before the freeze point, view and job after it, completion.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::session::{Active, DiskState, Run, Syncing};
use crate::backup::disks::HostView;
use crate::backup::fleece::nbdserver::ExportUse;
use crate::backup::fleece::space::Space;
use crate::backup::fleece::teardown::{Scope, detach, take_back};
use crate::backup::fleece::{Fleece, TargetFile, nbdserver, space, zeros};
use crate::backup::graph::bitmap;
use crate::backup::names::{Role, object, work_bitmap};
use crate::backup::publish::{Hashing, vm};
use crate::backup::state::journal::Record;
use crate::backup::state::leftover;
use crate::backup::{fleece, names, publish};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::manifest::{BackingFile, Skipped};
use crate::qmp::budget::short;
use crate::qmp::types::Job;
use crate::units::human_bytes;
use crate::{failpoint, folder};

impl Run<'_> {
    /// The node that the job reads, and that carries the bitmap it copies by.
    pub(in crate::backup) fn source(&self) -> Role {
        if self.hides_status { Role::HiddenStatus } else { Role::Snapshot }
    }

    /// Files, nodes and the new bitmap: all before the freeze point.
    pub(in crate::backup) fn prepare(&mut self, d: &mut Active) -> Result<()> {
        d.chain = self.chains.remove(&d.plan.dir.join(&d.plan.image));
        self.create_files(d)?;
        step("files created");
        self.hand_over(d)?;
        match &d.plan.new_bitmap {
            Some(_) => {
                self.add_bitmap(d)?;
                self.add_open_mark(d)?;
            }
            None => {
                let name = object(&self.run, Role::Hold, d.index);
                bitmap::hold(&mut self.client, &d.plan.disk.node, &name)?;
            }
        }
        let timeout = self.options.copy.cbw_timeout;
        fleece::add_filter(&mut self.client, &self.run, d.index, &d.plan.disk.top, timeout)
    }

    /// What tells the next INC whether QEMU has had the disk open all the time, where nothing else tells that
    /// what it depends on is as it was.
    fn add_open_mark(&mut self, d: &Active) -> Result<()> {
        let Some(b) = d.plan.new_bitmap.as_ref().filter(|b| b.persistent) else { return Ok(()) };
        match d.plan.disk.backing.iter().all(BackingFile::is_known) {
            true => Ok(()),
            false => bitmap::hold(&mut self.client, &b.node, &names::open(&b.name)),
        }
    }

    /// Fails if what the disk depends on was written to since the run began: the frozen view reads it, and is no
    /// view of one time then.
    fn check_below(&self, d: &Active) -> Result<()> {
        if !d.plan.disk.backing.iter().any(BackingFile::is_known) {
            return Ok(());
        }
        let view = HostView::of(self.client.process(), self.options.offline.is_some());
        let Some(file) = view.changed(&d.plan.disk.backing) else { return Ok(()) };
        Err(Error::new(
            Kind::Changed,
            "the backing file was written to or replaced during the backup",
        )
        .at_path(&file.file)
        .remedy("do not write to a backing file while a VM uses it; then take a FULL"))
    }

    /// Where the fleece image goes; if it needs no name, it is there already.
    pub(in crate::backup) fn place_fleece(&mut self, d: &mut Active) -> Result<()> {
        let copy = &self.options.copy;
        let place = Fleece::place(&self.client, copy, &d.plan, (&self.run, d.index), self.watch)?;
        d.record.fleece = place.made().map(|m| m.path).unwrap_or_default();
        self.fleeces.insert(d.index, place);
        Ok(())
    }

    /// Before anything is made, it is written down what that will be; then, which file it is.
    fn create_files(&mut self, d: &mut Active) -> Result<()> {
        let Some(place) = self.fleeces.get_mut(&d.index) else { return Err(no_fleece()) };
        let p = &d.plan;
        let folder = Arc::new(publish::make_folders(&p.dir)?);
        self.reserves.note(&place.space()?);
        self.journal.write(&Record::Disk(d.record.clone()))?;
        publish::side_folder(&folder)?;
        publish::announce(&folder, &d.manifest)?;
        if let Some(made) = place.made() {
            publish::note_fleece(&folder, &p.image, &made)?;
        }
        let image = fleece::new_image(p, &self.options.copy);
        let held = publish::create_image(&folder, &p.image, &image, self.options.share)?;
        place.create(p.disk.size)?;
        d.record.image_id = Some(held.id()?);
        if let Some(made) = place.made() {
            publish::note_fleece(&folder, &p.image, &made)?;
            d.record.fleece_id = made.id;
        }
        d.held = Some(held);
        d.folder = Some(folder);
        self.journal.write(&Record::Disk(d.record.clone()))
    }

    /// Gives image and fleece image to QEMU.
    fn hand_over(&mut self, d: &Active) -> Result<()> {
        let Some(place) = self.fleeces.get(&d.index) else { return Err(no_fleece()) };
        let held = d.held()?;
        let by_name = !self.client.takes_descriptors();
        let image = TargetFile { file: held.file(), name: held.path(), by_name };
        let target = object(&self.run, Role::Target, d.index);
        let more = fleece::target_options(&self.options.copy);
        // (For the second see `GuestDisk::has_backing`.)
        let find_zeros = self.hides_status || d.plan.disk.has_backing;
        fleece::add_image(&mut self.client, &target, "qcow2", image, more, find_zeros)?;
        let handed = place.handed(&self.client)?;
        let name = object(&self.run, Role::Fleece, d.index);
        fleece::add_image(&mut self.client, &name, place.driver(), handed, json!({}), false)
    }

    /// Whether all that will be written has room, before anything is begun. A disk that does not
    /// fit beside those before it fails alone.
    pub(in crate::backup) fn check_space(&mut self, disks: &mut [Active]) -> Result<()> {
        let copy = &self.options.copy;
        if copy.no_space_check {
            return Ok(());
        }
        let mut budget = space::Budget::default();
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            let need = d.plan.estimate();
            let image = if copy.compress.is_some() { space::compressed(need) } else { need };
            let claims = || -> Result<_> {
                let fleece = self.fleeces.get(&d.index).ok_or_else(no_fleece)?.space()?;
                Ok([
                    (Space::at(&d.plan.dir)?, image, "the new image"),
                    (fleece, space::fleece_need(need), "the fleece image"),
                ])
            };
            if let Err(e) = claims().and_then(|c| budget.take(&c)) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// Gives up the disk with the largest fleece where fleeces have eaten up the room that must
    /// stay: the guest's own files may be there, and a guest without room stops.
    pub(in crate::backup) fn guard_fleeces(&mut self, disks: &mut [Active]) -> Result<()> {
        let short = |f: &&Fleece| match f.space() {
            Ok(space) => self.reserves.is_short(&space),
            Err(e) => {
                log::warn!("cannot watch the fleece image: {}", e.report());
                false
            }
        };
        let open = disks.iter_mut().filter(|d| d.is_active());
        let open = open.filter_map(|d| Some((self.fleeces.get(&d.index).filter(short)?, d)));
        let Some((fleece, d)) = open.max_by_key(|(f, _)| f.blocks()) else { return Ok(()) };
        // The image first: what is copied from now on is wrong, and must not become a point
        // whoever dies in between.
        if let Err(e) = d
            .folder()
            .and_then(|f| publish::discard_image(f, &d.plan.image))
            .and_then(|()| fleece.empty_in_use())
        {
            self.watch.warn(&e.report());
        }
        let e = Error::new(Kind::NoSpace, "the fleece image had nearly filled its file system")
            .at_path(fleece.dir())
            .remedy("name a larger one with --fleece-dir, or back up when the guest writes less");
        self.fail(d, e)
    }

    /// The bitmap of what to copy out of the frozen view.
    pub(in crate::backup) fn view(&mut self, d: &mut Active) -> Result<()> {
        if self.hides_status {
            fleece::add_hidden_status(&mut self.client, &self.run, d.index)?;
        }
        let Some(since) = &d.plan.since else { return Ok(()) };
        let view = object(&self.run, self.source(), d.index);
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
        let now = bitmap::of(&mut self.client, &d.plan.disk.node)?;
        bitmap::check_records(&now, &since.name)?;
        match d.plan.needs_walk() {
            true => self.add_lost_zeros(d, &view, &work)?,
            false => self.add_unmarked(d, &now)?,
        }
        if let Some(grown) = d.plan.grown() {
            if d.plan.disk.identity.format != "qcow2" {
                self.watch.say_of(
                    d.plan.disk.label(),
                    &format!(
                        "{}: has grown by {} since the last point: all of that is copied",
                        d.plan.disk.label(),
                        human_bytes(grown.end - grown.start)
                    ),
                );
            }
            self.mark(d, &[grown])?;
        }
        match failpoint::walks_all() {
            true => self.check_by_walk(d, &view, &work),
            false => Ok(()),
        }
    }

    /// See `zeros`: what became zero without a dirty bit is copied as well.
    fn add_lost_zeros(&mut self, d: &Active, view: &str, work: &str) -> Result<()> {
        let lost = zeros::with_cuts(self.lost_zeros(d, view, work)?);
        // (A file's end is cut in the middle of a block, which stays data.)
        if d.plan.disk.identity.format != "qcow2" {
            self.watch.say_of(d.plan.disk.label(), &format!(
                "{}: its storage may not report all zeros: if the disk was shrunk and grown again \
                 since {}, take a FULL",
                d.plan.disk.label(),
                d.plan.parent().map_or("the last point", |m| &m.image)
            ));
        }
        let marked = self.mark(d, &lost)?;
        if marked > 0 {
            self.watch.warn(&format!(
                "{}: {marked} bytes have become zeros without a dirty bit (shrunk and grown \
                 again?): copied as well",
                d.plan.disk.label()
            ));
        }
        Ok(())
    }

    /// What the frozen view has as zeros and the chain as something else.
    fn lost_zeros(&mut self, d: &Active, view: &str, work: &str) -> Result<Vec<Range<u64>>> {
        let (Some(server), Some(chain)) = (&self.server, &d.chain) else {
            return Err(Error::new(Kind::Peer, "no NBD server to read zeros from"));
        };
        let export = object(&self.run, Role::ViewExport, d.index);
        let node = object(&self.run, Role::Snapshot, d.index);
        let mut lost = chain.lost()?;
        let size = d.plan.disk.size;
        // An export takes possession of a disk that is being handed over.
        self.migration.as_ref().map_or(Ok(None), |g| g.check(&mut self.client))?;
        server.with_export(&mut self.client, &export, &node, ExportUse::Status, |n| {
            nbdserver::check_size(n, size)?;
            n.zero_ranges(|zeros| lost.add(zeros))
        })?;
        if let Some(since) = &d.plan.since {
            // What was written between the first merge and the question is data in the fleece
            // (or, with QEMUs that mix up old and new, data of now): it may hide zeros of the
            // freeze point, and is dirty by now.
            self.client.execute(
                "block-dirty-bitmap-merge",
                json!({"node": view, "target": work,
                    "bitmaps": [{"node": d.plan.disk.node, "name": since.name}]}),
            )?;
        }
        Ok(lost.ranges())
    }

    /// See [`failpoint::walks_all`].
    fn check_by_walk(&mut self, d: &Active, view: &str, work: &str) -> Result<()> {
        let lost = self.lost_zeros(d, view, work)?;
        match self.mark(d, &lost)? {
            0 => Ok(()),
            missed => {
                let what = format!("{missed} bytes are zeros that would not have been copied");
                Err(Error::new(Kind::Unsound, what))
            }
        }
    }

    pub(in crate::backup) fn start_job(&mut self, d: &mut Active) -> Result<()> {
        let copy = &self.options.copy;
        let mut a = json!({
            "job-id": object(&self.run, Role::Job, d.index),
            "device": object(&self.run, self.source(), d.index),
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
            a["x-perf"]["max-workers"] = json!(n);
        }
        if d.plan.disk.has_backing && !self.hides_status {
            // The target looks at whole requests for zeros.
            a["x-perf"]["max-chunk"] = json!(fleece::least_chunk(&d.plan));
        }
        // No `discard-source`: where another program's backup is put above our filter, our view
        // becomes one of theirs, and what is discarded there goes from their copy.
        d.empty = d.held.as_ref().and_then(publish::OpenImage::length).unwrap_or(0);
        d.began = Instant::now();
        self.client.execute("blockdev-backup", a)?;
        d.hasher = self.barriers(d);
        d.progress.begin(d.plan.disk.label(), d.plan.estimate());
        self.disk_status(d.index, |s| s.state = "copying".into());
        Ok(())
    }

    /// The job is done: the guest is let go of at once, whatever else has to be done. The image is
    /// then synced beside the run, since that may take minutes on a slow disk.
    pub(in crate::backup) fn detach(&mut self, d: &mut Active, job: &Job) -> Result<()> {
        self.check_migration()?;
        self.check_below(d)?;
        self.disk_status(d.index, |s| s.state = "syncing".into());
        d.manifest.bytes_copied = d.copied(job);
        d.manifest.duration_ms = u64::try_from(d.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        detach(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        if let Some(fleece) = self.fleeces.get(&d.index)
            && let Err(e) = fleece.empty()
        {
            log::warn!("{}", e.report());
        }
        let (held, folder) = (d.held()?.clone(), d.folder()?.clone());
        let image = d.plan.image.clone();
        let sync = move || {
            // Nobody is told of such an error twice: what a recovery might find must be gone.
            held.sync().inspect_err(|_| drop(publish::discard_image(&folder, &image)))
        };
        d.state = DiskState::Syncing(Syncing::begin(sync));
        Ok(())
    }

    /// QEMU closes the image. There is little left to write: its tables.
    pub(in crate::backup) fn close(&mut self, d: &mut Active) -> Result<()> {
        if let DiskState::Syncing(s) = std::mem::replace(&mut d.state, DiskState::Going) {
            s.end()?;
        }
        let target = object(&self.run, Role::Target, d.index);
        fleece::close_image(&mut self.client, &target)?;
        // Says to a recovery that has lost the journal that it is complete.
        d.manifest.fingerprint = Some(d.held()?.fingerprint()?);
        publish::announce(d.folder()?, &d.manifest)?;
        self.journal.write(&Record::Closed(d.index))?;
        let job = object(&self.run, Role::Job, d.index);
        self.client.execute("job-dismiss", json!({"id": job}))?;
        take_back(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        d.state = DiskState::Closed;
        self.disk_status(d.index, |s| s.state = "copied".into());
        Ok(())
    }

    /// The image becomes a point, and only then the old bitmap goes.
    pub(in crate::backup) fn publish(&mut self, d: &mut Active, failed: &[Skipped]) -> Result<()> {
        self.disk_status(d.index, |s| s.state = "publishing".into());
        std::thread::sleep(self.options.copy.remove_delay);
        self.drop_fleece(d.index)?;
        let mut m = d.manifest.clone();
        m.failed = failed.to_vec();
        match vm::keep_config(&self.config, d.folder()?, &self.run, self.options.share) {
            Ok(kept) => m.config_files = kept,
            // The disk is worth more.
            Err(e) => self.watch.warn(&e.report()),
        }
        let hashing = match (self.options.no_hash, d.hasher.take()) {
            (true, _) => Hashing::Left,
            (_, None) => Hashing::Whole,
            (_, Some(b)) => Hashing::Begun(b.hasher()),
        };
        let m = publish::publish(d.folder()?, m, hashing, d.held()?, &|| Ok(()))?;
        d.held = None;
        self.beside(d);
        d.state = DiskState::Done(Box::new(m));
        self.journal.write(&Record::Settled(d.index))?;
        // The disk may be another QEMU's by now.
        let here = self.check_migration().is_ok();
        for name in d.plan.obsolete.iter().filter(|_| here) {
            // The point is good whether or not this works; the next run tries again.
            if let Err(e) = bitmap::remove(&mut self.client, &d.plan.disk.node, name) {
                self.watch.warn(&format!("bitmap {name} stays for now: {}", e.report()));
            }
        }
        self.disk_status(d.index, |s| s.state = "done".into());
        Ok(())
    }

    /// The fleece image goes, its name too if it has one.
    pub(in crate::backup) fn drop_fleece(&mut self, index: usize) -> Result<()> {
        let made = self.fleeces.remove(&index).and_then(|f| f.made());
        made.map_or(Ok(()), |m| leftover::remove_recorded(&m))
    }

    /// What qmpbackup keeps beside the images. Nothing depends on it.
    pub(in crate::backup) fn beside(&self, d: &Active) {
        let p = &d.plan;
        let write = || -> Result<()> {
            let text = serde_json::to_vec_pretty(&p.disk.info)
                .map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e))?;
            let name =
                crate::backup::names::parse_image(&p.image).map_or(p.image.as_str(), |i| i.2);
            let config = self.base.join(format!("{name}.config"));
            folder::write_shared(&config, &text, self.options.share)
                .map_err(|e| Error::io(e, "cannot write the file").at_path(&config))?;
            let l = &self.options.layout;
            let plain = crate::backup::names::parse_image(&p.image).is_none();
            if plain && l.no_timestamp && !l.no_symlink {
                publish::link_plain(d.folder()?, &p.image, p.level)?;
            }
            Ok(())
        };
        if let Err(e) = write() {
            self.watch.warn(&e.report());
        }
    }
}

fn no_fleece() -> Error {
    Error::new(Kind::Io, "there is no folder for the fleece image")
}

/// A job's error in our words.
pub(crate) fn job_error(text: &str) -> Error {
    if text.contains("No space left") {
        return Error::new(Kind::NoSpace, "no space left for the image")
            .remedy("free space in the target, or prune it");
    }
    if text.contains("File too large") {
        return fleece::too_large();
    }
    if text.contains("Permission denied") || text.contains("Operation not permitted") {
        return Error::new(
            Kind::Peer,
            "the frozen view was lost: the fleece image could not take a \
            write of the guest in time",
        )
        .remedy("check free space, speed and file size limit of --fleece-dir");
    }
    Error::new(Kind::Peer, format!("the backup job failed: {}", short(text)))
}
