//! Other programs that work in the same QEMU while a backup runs. At each look the graph round each disk
//! has to be what planning saw plus what we added, and each event of a job has to be explained by the jobs
//! in it. Anything else fails the disk that it concerns, or all disks where that cannot be told.

use std::collections::{HashMap, HashSet};

use serde_json::json;

use super::session::{Active, Run};
use crate::backup::graph::expected::{Expected, Stage};
use crate::backup::graph::foreign_jobs::{LOOKS, loaded};
use crate::backup::graph::{BLOCK_JOBS, GraphState, ask_with_jobs, in_the_way};
use crate::backup::names::{PREFIX, Role, object, parse_object};
use crate::error::{Error, Kind, Result};
use crate::qmp::budget::short;
use crate::qmp::types::{Graph, Job, Node};
use crate::units::human_bytes;

impl Run<'_> {
    /// Graph and jobs as they are at one time.
    fn look(&mut self) -> Result<(Graph, Vec<Job>)> {
        let mut tries = 0u32;
        loop {
            let (graph, jobs) = ask_with_jobs(&mut self.client)?;
            let drawn: HashSet<&str> = graph.all("block-job").map(|j| j.name.as_str()).collect();
            let listed = jobs.iter().filter(|j| BLOCK_JOBS.contains(&j.kind.as_str()));
            let listed: HashSet<&str> = listed.map(|j| j.id.as_str()).collect();
            tries = tries.saturating_add(1);
            if drawn == listed || tries == LOOKS {
                return Ok((graph, jobs));
            }
        }
    }

    /// Begins to listen, once our filters are above the nodes whose parents they will get: from then on
    /// whatever another program puts there takes them along.
    pub(in crate::backup) fn watch_graph(&mut self, disks: &mut [Active]) -> Result<()> {
        self.client.listen_to_jobs(&format!("{PREFIX}{}-", self.run));
        let (graph, jobs) = self.look()?;
        self.foreign_jobs.over = jobs.iter().filter(|j| loaded(j)).map(|j| j.id.clone()).collect();
        self.foreign_jobs.know(&jobs, &graph);
        self.judge(disks, Stage::Before, &graph, &jobs)
    }

    /// Fails the disks round which something is not as it has to be.
    pub(in crate::backup) fn check_graph(
        &mut self,
        disks: &mut [Active],
        stage: Stage,
    ) -> Result<()> {
        if !disks.iter().any(Active::is_active) {
            return Ok(());
        }
        let (graph, jobs) = self.look()?;
        self.judge(disks, stage, &graph, &jobs)
    }

    /// Fails the disks whose graph differs, and, for job events that nothing explains, all.
    fn judge(
        &mut self,
        disks: &mut [Active],
        stage: Stage,
        graph: &Graph,
        jobs: &[Job],
    ) -> Result<()> {
        let heard = self.client.job_events();
        let others: Vec<Job> =
            jobs.iter().filter(|j| parse_object(&j.id).is_none()).cloned().collect();
        let unexplained = self.foreign_jobs.unexplained(heard, &others, graph);
        let unexplained = unexplained.or_else(|| self.foreign_jobs.loads(&others));
        let state = GraphState { graph, jobs };
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            let expected = Expected {
                run: &self.run,
                index: d.index,
                label: d.plan.disk.label(),
                path: &d.plan.disk.path,
                source: self.source(),
            };
            if let Some(what) = expected.difference(state, stage).or_else(|| unexplained.clone()) {
                self.fail(d, in_the_way(what))?;
            }
        }
        if self.foreign_jobs.unlocked { self.check_sizes(disks) } else { Ok(()) }
    }

    /// From here on nobody resizes a disk: a frozen view of a disk that has become smaller has lost
    /// bytes, and reading them there ends QEMU (seen with 7.2 and 10.0).
    pub(in crate::backup) fn keep_sizes(&mut self, disks: &mut [Active]) -> Result<()> {
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            let lock = json!({
                "driver": "blkdebug",
                "node-name": object(&self.run, Role::Lock, d.index),
                "image": object(&self.run, Role::Filter, d.index),
                "read-only": true,
                "unshare-child-perms": ["resize"],
            });
            if let Err(r) = self.client.call("blockdev-add", lock)? {
                log::warn!(
                    "a resize of {} cannot be refused: {}",
                    d.plan.disk.label(),
                    short(&r.desc)
                );
                self.foreign_jobs.unlocked = true;
            }
        }
        self.check_sizes(disks)
    }

    /// Fails the disks that have not the size that was planned with.
    fn check_sizes(&mut self, disks: &mut [Active]) -> Result<()> {
        if !disks.iter().any(Active::is_active) {
            return Ok(());
        }
        let nodes: Vec<Node> =
            self.client.query("query-named-block-nodes", json!({"flat": true}))?;
        let sizes: HashMap<&str, u64> =
            nodes.iter().map(|n| (n.node_name.as_str(), n.image.virtual_size)).collect();
        for d in disks.iter_mut().filter(|d| d.is_active()) {
            let filter = object(&self.run, Role::Filter, d.index);
            let now = [filter.as_str(), &d.plan.disk.node].map(|n| sizes.get(n));
            let wanted = d.plan.disk.size;
            if let Some(other) = now.into_iter().find(|s| *s != Some(&wanted)) {
                let other = other.map_or_else(|| "gone".into(), |s| human_bytes(*s));
                let what = format!(
                    "it was resized during the backup: from {} to {other}",
                    human_bytes(wanted)
                );
                self.fail(d, Error::new(Kind::Busy, what).remedy("back up again"))?;
            }
        }
        Ok(())
    }
}
