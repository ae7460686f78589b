//! Other programs at work in the same QEMU while a backup runs: at each look the graph round each
//! disk has to be what planning saw and what we added, and what was heard of jobs has to be
//! explained by it. What is not concerns a disk, or all where it cannot be told which.

use std::collections::{HashMap, HashSet};

use serde_json::json;

use super::expected::{Expected, Stage};
use super::graph::{BLOCK_JOBS, SNAPSHOT_LOAD, Scene, ask, in_the_way};
use super::names::{PREFIX, Role, object, parse_object};
use super::work::{Active, Run};
use crate::error::{Error, Kind, Result};
use crate::qmp::budget::short;
use crate::qmp::client::JobEvents;
use crate::qmp::types::{Graph, Job, Node};
use crate::units::human_bytes;

/// How often graph and jobs are asked for until they tell of the same jobs.
const LOOKS: u32 = 3;

/// What is known of other programs' jobs.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// Jobs that were looked at while they lived.
    known: HashSet<String>,
    /// Jobs that had loaded a snapshot before the run.
    over: HashSet<String>,
    /// This QEMU would not keep the disks' sizes.
    unlocked: bool,
}

/// Whether a job has loaded a snapshot, and is done.
fn loaded(job: &Job) -> bool {
    job.kind == SNAPSHOT_LOAD && job.concluded()
}

impl Neighbours {
    /// A job that loads a snapshot, which gives all disks and the guest what they were: QEMU refuses it to
    /// disks with a bitmap, and to these alone. `now` are the jobs that there are.
    fn loads(&self, now: &[Job]) -> Option<String> {
        let refused = |j: &Job| j.concluded() && j.error.is_some();
        let loads = |j: &&Job| j.kind == SNAPSHOT_LOAD && !refused(j) && !self.over.contains(&j.id);
        let job = now.iter().find(loads)?;
        Some(format!(
            "job {} ({SNAPSHOT_LOAD}) of another program loads a snapshot",
            short(&job.id)
        ))
    }

    /// Whether something was heard that no look explains: a job that began and ended between two
    /// of them. `now` are the jobs that have just been looked at, `graph` shows where they work.
    fn unexplained(&mut self, heard: JobEvents, now: &[Job], graph: &Graph) -> Option<String> {
        if heard.lost {
            return Some("other programs began more jobs than can be followed".into());
        }
        let mut found = None;
        let mut fresh: HashMap<String, Life> = HashMap::new();
        for e in heard.events {
            let life = fresh.entry(e.job.clone()).or_default();
            match e.status.as_deref() {
                None => life.in_graph = true,
                Some("created") => {
                    self.known.remove(&e.job);
                    *life = Life::default();
                }
                Some("running") => life.ran = true,
                Some("concluded") if !self.known.contains(&e.job) => {
                    found = found.or_else(|| life.trace(&e.job));
                    self.known.insert(e.job);
                }
                Some("null") if !self.known.remove(&e.job) => {
                    found = found.or_else(|| life.trace(&e.job));
                }
                Some(_) => {}
            }
        }
        self.know(now, graph);
        found
    }

    /// What ended before the answer was heard of before it: nothing else need be kept, however many names
    /// a QEMU makes up. One that the graph does not show works nobody knows where: it is not known.
    fn know(&mut self, now: &[Job], graph: &Graph) {
        let drawn: HashSet<&str> = graph.all("block-job").map(|j| j.name.as_str()).collect();
        let seen = |j: &&Job| {
            let id = j.id.as_str();
            drawn.contains(id) || !BLOCK_JOBS.contains(&j.kind.as_str()) || self.known.contains(id)
        };
        self.known = now.iter().filter(seen).map(|j| j.id.clone()).collect();
    }
}

/// What was heard of one job.
#[derive(Debug, Default)]
struct Life {
    ran: bool,
    in_graph: bool,
}

impl Life {
    /// Jobs without nodes (such as one that creates an image) run and end without an event that only
    /// block jobs have. One that never ran has failed at its beginning: it may have had nodes.
    fn trace(&self, job: &str) -> Option<String> {
        let harmless = self.ran && !self.in_graph;
        (!harmless).then(|| {
            let job = short(job);
            format!("job {job} of another program has begun and ended: which disks it touched cannot be told")
        })
    }
}

impl Run<'_> {
    /// Graph and jobs as they are at one time.
    fn look(&mut self) -> Result<(Graph, Vec<Job>)> {
        let mut tries = 0u32;
        loop {
            let graph = ask(&mut self.client)?;
            let jobs: Vec<Job> = self.client.poll("query-jobs")?;
            let drawn: HashSet<&str> = graph.all("block-job").map(|j| j.name.as_str()).collect();
            let listed = jobs.iter().filter(|j| BLOCK_JOBS.contains(&j.kind.as_str()));
            let listed: HashSet<&str> = listed.map(|j| j.id.as_str()).collect();
            tries = tries.saturating_add(1);
            if drawn == listed || tries == LOOKS {
                return Ok((graph, jobs));
            }
        }
    }

    /// Begins to listen, once our filters stand on what they will be plugged above: from then on
    /// whatever another program puts there takes them along.
    pub(super) fn begin_beside(&mut self, disks: &mut [Active]) -> Result<()> {
        self.client.listen_to_jobs(&format!("{PREFIX}{}-", self.run));
        let (graph, jobs) = self.look()?;
        self.neighbours.over = jobs.iter().filter(|j| loaded(j)).map(|j| j.id.clone()).collect();
        self.neighbours.know(&jobs, &graph);
        self.look_beside(disks, Stage::Before)
    }

    /// Fails the disks round which something is not as it has to be.
    pub(super) fn look_beside(&mut self, disks: &mut [Active], stage: Stage) -> Result<()> {
        if !disks.iter().any(Active::going) {
            return Ok(());
        }
        let (graph, jobs) = self.look()?;
        let heard = self.client.job_events();
        let others: Vec<Job> =
            jobs.iter().filter(|j| parse_object(&j.id).is_none()).cloned().collect();
        let unexplained = self.neighbours.unexplained(heard, &others, &graph);
        let unexplained = unexplained.or_else(|| self.neighbours.loads(&others));
        let scene = Scene { graph: &graph, jobs: &jobs };
        for d in disks.iter_mut().filter(|d| d.going()) {
            let expected = Expected {
                run: &self.run,
                index: d.index,
                label: d.plan.disk.label(),
                path: &d.plan.disk.path,
                source: self.source(),
            };
            if let Some(what) = expected.difference(scene, stage).or_else(|| unexplained.clone()) {
                self.fail(d, in_the_way(what))?;
            }
        }
        if self.neighbours.unlocked { self.check_sizes(disks) } else { Ok(()) }
    }

    /// From here on nobody resizes a disk: a frozen view of a disk that has become smaller has lost
    /// bytes, and reading them there ends QEMU (seen with 7.2 and 10.0).
    pub(super) fn keep_sizes(&mut self, disks: &mut [Active]) -> Result<()> {
        for d in disks.iter_mut().filter(|d| d.going()) {
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
                self.neighbours.unlocked = true;
            }
        }
        self.check_sizes(disks)
    }

    /// Fails the disks that have not the size that was planned with.
    fn check_sizes(&mut self, disks: &mut [Active]) -> Result<()> {
        if !disks.iter().any(Active::going) {
            return Ok(());
        }
        let nodes: Vec<Node> =
            self.client.query("query-named-block-nodes", json!({"flat": true}))?;
        let sizes: HashMap<&str, u64> =
            nodes.iter().map(|n| (n.node_name.as_str(), n.image.virtual_size)).collect();
        for d in disks.iter_mut().filter(|d| d.going()) {
            let filter = object(&self.run, Role::Filter, d.index);
            let now = [filter.as_str(), &d.plan.disk.node].map(|n| sizes.get(n));
            let wanted = d.plan.disk.size;
            if let Some(other) = now.into_iter().find(|s| *s != Some(&wanted)) {
                let other = other.map_or_else(|| "gone".into(), |s| human_bytes(*s));
                let what =
                    format!("it was resized meanwhile: from {} to {other}", human_bytes(wanted));
                self.fail(d, Error::new(Kind::Busy, what).remedy("back up again"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::client::JobEvent;

    fn heard(list: &[(&str, &str)]) -> JobEvents {
        let event = |(job, status): &(&str, &str)| JobEvent {
            job: job.to_string(),
            status: (*status != "block").then(|| status.to_string()),
        };
        JobEvents { events: list.iter().map(event).collect(), lost: false }
    }

    fn job(id: &str) -> Job {
        Job { id: id.into(), ..Default::default() }
    }

    #[test]
    fn a_job_that_was_never_seen_concerns_all() {
        let mut n = Neighbours::default();
        let gone =
            [("x", "created"), ("x", "running"), ("x", "block"), ("x", "concluded"), ("x", "null")];
        assert!(n.unexplained(heard(&gone), &[], &Graph::default()).unwrap().contains("job x"));
        // It may wait to be dismissed.
        assert!(n.unexplained(heard(&gone[..4]), &[job("x")], &Graph::default()).is_some());
        assert!(n.unexplained(heard(&gone[4..]), &[], &Graph::default()).is_none());
        // It failed at once.
        assert!(
            n.unexplained(heard(&[("y", "created"), ("y", "null")]), &[], &Graph::default())
                .is_some()
        );
        let lost = JobEvents { lost: true, ..Default::default() };
        assert!(n.unexplained(lost, &[], &Graph::default()).is_some());
    }

    #[test]
    fn a_job_that_was_looked_at_is_explained_until_another_has_its_name() {
        let mut n = Neighbours::default();
        assert!(
            n.unexplained(
                heard(&[("x", "created"), ("x", "running")]),
                &[job("x")],
                &Graph::default()
            )
            .is_none()
        );
        let end = [("x", "block"), ("x", "concluded"), ("x", "null")];
        let again = [end.as_slice(), &[("x", "created"), ("x", "running")], &end].concat();
        assert!(n.unexplained(heard(&end), &[], &Graph::default()).is_none());
        n.known.insert("x".into());
        assert!(n.unexplained(heard(&again), &[], &Graph::default()).is_some());
    }

    #[test]
    fn a_job_that_the_graph_never_shows_is_not_known() {
        let block = |id: &str| Job { kind: "backup".into(), ..job(id) };
        let begin = [("x", "created"), ("x", "running")];
        let end = [("x", "block"), ("x", "concluded"), ("x", "null")];
        let drawn: Graph = serde_json::from_value(
            json!({"nodes": [{"id": 1, "type": "block-job", "name": "x"}], "edges": []}),
        )
        .unwrap();
        let mut n = Neighbours::default();
        assert!(n.unexplained(heard(&begin), &[block("x")], &Graph::default()).is_none());
        assert!(n.unexplained(heard(&end), &[], &Graph::default()).is_some());
        assert!(n.unexplained(heard(&begin), &[block("x")], &drawn).is_none());
        // Once it was shown, where it works is known.
        assert!(n.unexplained(heard(&[]), &[block("x")], &Graph::default()).is_none());
        assert!(n.unexplained(heard(&end), &[], &Graph::default()).is_none());
    }

    #[test]
    fn a_job_that_loads_a_snapshot_concerns_all() {
        let load = |status: &str, error: Option<&str>| {
            let (kind, status) = (SNAPSHOT_LOAD.to_string(), status.to_string());
            let error = error.map(str::to_string);
            vec![Job { id: "l".into(), kind, status, error, ..Default::default() }]
        };
        let mut n = Neighbours::default();
        for status in ["created", "running", "aborting", "concluded"] {
            assert!(n.loads(&load(status, None)).unwrap().contains("job l (snapshot-load)"));
        }
        assert_eq!(n.loads(&load("concluded", Some("Device has active dirty bitmaps"))), None);
        assert_eq!(n.loads(&[job("x")]), None);
        n.over.insert("l".into());
        assert_eq!(n.loads(&load("concluded", None)), None);
    }

    #[test]
    fn a_job_without_nodes_is_none_of_ours() {
        let mut n = Neighbours::default();
        let create = [("c", "created"), ("c", "running"), ("c", "concluded"), ("c", "null")];
        assert!(n.unexplained(heard(&create), &[], &Graph::default()).is_none());
    }
}
