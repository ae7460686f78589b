//! The steps of one disk: prepare before the moment, view and job after it, completion.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::journal::Record;
use super::names::{Role, object, work_bitmap};
use super::publish::{self, partial_name};
use super::teardown::{Scope, teardown};
use super::work::{Active, Run, State};
use super::{bitmap, fleece, space, vm};
use crate::chain::Level;
use crate::error::{Error, Kind, Result};
use crate::qmp::steps::step;
use crate::qmp::types::Job;

impl Run<'_> {
    /// Files, nodes and the new bitmap: all before the moment.
    pub(super) fn prepare(&mut self, d: &mut Active) -> Result<()> {
        let p = &d.plan;
        super::lock::make_dir(&p.dir)?;
        self.check_space(d)?;
        d.chain = self.chains.remove(&p.dir.join(&p.image));
        self.journal.write(&Record::Disk(d.record.clone()))?;
        publish::announce(&p.dir, &d.manifest)?;
        publish::note_fleece(&p.dir, &p.image, &d.record.fleece)?;
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

    pub(super) fn check_space(&self, d: &Active) -> Result<()> {
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

    /// The frozen view, and the bitmap of what to copy out of it.
    pub(super) fn view(&mut self, d: &mut Active) -> Result<()> {
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
    pub(super) fn add_lost_zeros(&mut self, d: &Active, view: &str, work: &str) -> Result<()> {
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

    pub(super) fn start_job(&mut self, d: &mut Active) -> Result<()> {
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

    /// The job is done: close, take down, publish, and only then let go of the old bitmap.
    pub(super) fn complete(&mut self, d: &mut Active, job: &Job) -> Result<()> {
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
        m.config_files = vm::keep_config(&self.options.config, &d.plan.dir, &self.run)?;
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
