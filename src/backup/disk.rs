//! The steps of one disk: prepare before the moment, view and job after it, completion.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::journal::Record;
use super::names::{Role, object, work_bitmap};
use super::publish::{self, partial_name};
use super::teardown::{Scope, detach, teardown};
use super::work::{Active, Run, State};
use super::{bitmap, fleece, space, vm};
use crate::chain::Level;
use crate::chain::manifest::{Skipped, fingerprint};
use crate::error::{Error, Kind, Result};
use crate::qmp::steps::step;
use crate::qmp::types::Job;
use crate::units::human_bytes;

impl Run<'_> {
    /// The node that the job reads, and that carries the bitmap it copies by.
    pub(super) fn source(&self) -> Role {
        if self.blind { Role::Blind } else { Role::Snapshot }
    }

    /// Files, nodes and the new bitmap: all before the moment.
    pub(super) fn prepare(&mut self, d: &mut Active) -> Result<()> {
        let p = &d.plan;
        publish::make_dir(&p.dir)?;
        d.chain = self.chains.remove(&p.dir.join(&p.image));
        self.reserves.note(&d.record.fleece)?;
        self.journal.write(&Record::Disk(d.record.clone()))?;
        publish::announce(&p.dir, &d.manifest)?;
        publish::note_fleece(&p.dir, &p.image, &d.record.fleece)?;
        let partial = p.dir.join(partial_name(&p.image));
        let image = fleece::new_image(p, &self.options.copy);
        d.held = Some(publish::create_image(&partial, &image)?);
        fleece::create_fleece(&d.record.fleece, p.disk.size)?;
        step("files created");
        let target = object(&self.run, Role::Target, d.index);
        let more = fleece::target_options(&self.options.copy);
        fleece::add_image(&mut self.client, &target, "qcow2", &partial, more, self.blind)?;
        let name = object(&self.run, Role::Fleece, d.index);
        fleece::add_image(&mut self.client, &name, "raw", &d.record.fleece, json!({}), false)?;
        self.add_bitmap(d)?;
        let timeout = self.options.copy.cbw_timeout;
        fleece::add_filter(&mut self.client, &self.run, d.index, &d.plan.disk.top, timeout)
    }

    /// Whether all that will be written has room, before anything is begun. A disk that does not
    /// fit beside those before it fails alone.
    pub(super) fn check_space(&mut self, disks: &mut [Active]) -> Result<()> {
        let copy = &self.options.copy;
        if copy.no_space_check {
            return Ok(());
        }
        let mut budget = space::Budget::default();
        for d in disks {
            let need = d.plan.estimate();
            let image = if copy.compress.is_some() { space::compressed(need) } else { need };
            let fleece = d.record.fleece.parent().unwrap_or(Path::new("/"));
            let claims = [
                (d.plan.dir.as_path(), image, "the new image"),
                (fleece, space::fleece_need(need), "the fleece image"),
            ];
            if let Err(e) = budget.take(&claims) {
                self.fail(d, e)?;
            }
        }
        Ok(())
    }

    /// Gives up the disk with the largest fleece where fleeces have eaten up the room that must
    /// stay: the guest's own files may lie there, and a guest without room stops.
    pub(super) fn guard_fleeces(&mut self, disks: &mut [Active]) -> Result<()> {
        let open = disks.iter().filter(|d| d.going()).map(|d| d.record.fleece.as_path());
        let worst = self.reserves.worst(open).unwrap_or_else(|e| {
            log::warn!("cannot watch the fleece images: {}", e.report());
            None
        });
        let Some(worst) = worst else { return Ok(()) };
        let Some(d) = disks.iter_mut().find(|d| d.going() && d.record.fleece == worst) else {
            return Ok(());
        };
        // The image first: what is copied from now on is wrong, and must not become a point
        // whoever dies in between.
        if let Err(e) = publish::discard_image(&d.plan.dir, &d.plan.image)
            .and_then(|()| fleece::empty(&d.record.fleece))
        {
            self.watch.warn(&e.report());
        }
        let dir = worst.parent().unwrap_or(Path::new("/"));
        let e = Error::new(Kind::NoSpace, "the fleece image had nearly filled its file system")
            .at_path(dir)
            .remedy("name a larger one with --fleece-dir, or back up when the guest writes less");
        self.fail(d, e)
    }

    /// The frozen view, and the bitmap of what to copy out of it.
    pub(super) fn view(&mut self, d: &mut Active) -> Result<()> {
        fleece::add_view(&mut self.client, &self.run, d.index)?;
        if self.blind {
            fleece::add_blind(&mut self.client, &self.run, d.index)?;
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
        self.add_cut(d)?;
        self.add_lost_zeros(d, &view, &work)?;
        let Some(grown) = d.plan.grown() else { return Ok(()) };
        if d.plan.disk.identity.format != "qcow2" {
            self.watch.say(&format!(
                "{}: has grown by {} since the last point: that is copied whole",
                d.plan.disk.label(),
                human_bytes(grown.end - grown.start)
            ));
        }
        self.mark(d, &[grown]).map(drop)
    }

    /// See `zeros`: what became zero without a dirty bit is copied as well.
    pub(super) fn add_lost_zeros(&mut self, d: &Active, view: &str, work: &str) -> Result<()> {
        let (Some(server), Some(chain)) = (&self.server, &d.chain) else {
            return Err(Error::new(Kind::Peer, "there is no NBD server to ask for zeros"));
        };
        let export = object(&self.run, Role::ViewExport, d.index);
        let node = object(&self.run, Role::Snapshot, d.index);
        let zeros =
            server.with_export(&mut self.client, &export, &node, false, |n| n.zero_ranges())?;
        if let Some(since) = &d.plan.since {
            // What was written between the first merge and the question is data in the fleece
            // (or, with QEMUs that mix up old and new, data of now): it may hide zeros of the
            // moment, and is dirty by now.
            self.client.execute(
                "block-dirty-bitmap-merge",
                json!({"node": view, "target": work,
                    "bitmaps": [{"node": d.plan.disk.node, "name": since.name}]}),
            )?;
        }
        // (A file's end is cut in the middle of a block, which stays data.)
        let tells = d.plan.disk.identity.format == "qcow2";
        if !tells && d.plan.doubtful().is_none() {
            self.watch.say(&format!(
                "{}: its storage may not tell all that became zero, nor the point whether it was smaller: \
                 if it was shrunk and grown again since {}, take a FULL",
                d.plan.disk.label(),
                d.plan.parent().map_or("the last point", |m| &m.image)
            ));
        }
        let lost = chain.lost(&zeros, d.plan.disk.cluster_size.max(65536))?;
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

    pub(super) fn start_job(&mut self, d: &mut Active) -> Result<()> {
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
            a["x-perf"] = json!({"max-workers": n});
        }
        if !self.blind && self.client.features()?.has("discard-source") {
            a["discard-source"] = json!(true);
        }
        d.empty = d.held.as_ref().and_then(publish::Held::length).unwrap_or(0);
        d.began = Instant::now();
        self.client.execute("blockdev-backup", a)?;
        d.progress.begin(d.plan.disk.label(), d.plan.estimate());
        self.disk_status(d.index, |s| s.state = "copying".into());
        Ok(())
    }

    /// The job is done: the guest is let go of at once, whatever else has to be done. The image is
    /// then synced beside the run, since that may take minutes on a slow disk.
    pub(super) fn detach(&mut self, d: &mut Active, job: &Job) -> Result<()> {
        self.disk_status(d.index, |s| s.state = "syncing".into());
        d.manifest.bytes_copied = d.copied(job);
        d.manifest.duration_ms = u64::try_from(d.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        detach(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        let held = d.held.clone().ok_or_else(|| Error::new(Kind::Io, "the image is not open"))?;
        let (dir, image) = (d.plan.dir.clone(), d.plan.image.clone());
        let sync = move || {
            // Nobody is told of such an error twice: what a recovery might find must be gone.
            held.sync().inspect_err(|_| drop(publish::discard_image(&dir, &image)))
        };
        d.state = State::Syncing(std::thread::spawn(sync));
        Ok(())
    }

    /// QEMU closes the image. There is little left to write: its tables.
    pub(super) fn close(&mut self, d: &mut Active) -> Result<()> {
        if let State::Syncing(t) = std::mem::replace(&mut d.state, State::Going) {
            t.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "the sync has crashed")))?;
        }
        let target = object(&self.run, Role::Target, d.index);
        fleece::close_image(&mut self.client, &target)?;
        // Says to a recovery that has lost the journal that it is complete.
        let partial = d.plan.dir.join(partial_name(&d.plan.image));
        d.manifest.fingerprint = Some(fingerprint(&partial)?);
        publish::announce(&d.plan.dir, &d.manifest)?;
        self.journal.write(&Record::Closed(d.index))?;
        let job = object(&self.run, Role::Job, d.index);
        self.client.execute("job-dismiss", json!({"id": job}))?;
        teardown(&mut self.client, Scope { run: &self.run, index: Some(d.index) })?;
        d.state = State::Closed;
        self.disk_status(d.index, |s| s.state = "copied".into());
        Ok(())
    }

    /// The image becomes a point, and only then the old bitmap goes.
    pub(super) fn publish(&mut self, d: &mut Active, failed: &[Skipped]) -> Result<()> {
        self.disk_status(d.index, |s| s.state = "publishing".into());
        std::thread::sleep(self.options.copy.remove_delay);
        publish::remove_if_there(&d.record.fleece)?;
        let mut m = d.manifest.clone();
        m.failed = failed.to_vec();
        m.config_files = vm::keep_config(&self.config, &d.plan.dir, &self.run)?;
        let hash = !self.options.no_hash;
        let m = match &d.held {
            Some(held) => publish::publish_held(&d.plan.dir, m, hash, held)?,
            None => publish::publish(&d.plan.dir, m, hash)?,
        };
        d.held = None;
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
    pub(super) fn beside(&self, d: &Active) {
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

/// A job's error in our words.
pub fn job_error(text: &str) -> Error {
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
