//! [`ForeignJobs`]: the jobs of other programs, as they were last seen.

use std::collections::{HashMap, HashSet};

use super::{BLOCK_JOBS, SNAPSHOT_LOAD};
use crate::qmp::budget::short;
use crate::qmp::client::JobEvents;
use crate::qmp::types::{Graph, Job};

/// How often graph and jobs are asked for until they tell of the same jobs.
pub(in crate::backup) const LOOKS: u32 = 3;

/// Jobs of other programs in the same QEMU.
#[derive(Debug, Default)]
pub(crate) struct ForeignJobs {
    /// Jobs that were looked at while they lived.
    pub(in crate::backup) known: HashSet<String>,
    /// Jobs that had loaded a snapshot before the run.
    pub(in crate::backup) over: HashSet<String>,
    /// This QEMU would not keep the disks' sizes.
    pub(in crate::backup) unlocked: bool,
}

/// Whether a job has loaded a snapshot, and is done.
pub(in crate::backup) fn loaded(job: &Job) -> bool {
    job.kind == SNAPSHOT_LOAD && job.concluded()
}

impl ForeignJobs {
    /// A job that loads a snapshot, which gives all disks and the guest what they were: QEMU refuses it to
    /// disks with a bitmap, and to these alone. `now` are the jobs that there are.
    pub(in crate::backup) fn loads(&self, now: &[Job]) -> Option<String> {
        let refused = |j: &Job| j.concluded() && j.error.is_some();
        let loads = |j: &&Job| j.kind == SNAPSHOT_LOAD && !refused(j) && !self.over.contains(&j.id);
        let job = now.iter().find(loads)?;
        Some(format!(
            "job {} ({SNAPSHOT_LOAD}) of another program loads a snapshot",
            short(&job.id)
        ))
    }

    /// Whether there was an event that no look explains: a job that began and ended between two
    /// of them. `now` are the jobs that have just been looked at, `graph` shows where they work.
    pub(in crate::backup) fn unexplained(
        &mut self,
        heard: JobEvents,
        now: &[Job],
        graph: &Graph,
    ) -> Option<String> {
        if heard.lost {
            return Some("other programs began more jobs than can be followed".into());
        }
        let mut found = None;
        let mut fresh: HashMap<String, JobTrace> = HashMap::new();
        for e in heard.events {
            let life = fresh.entry(e.job.clone()).or_default();
            match e.status.as_deref() {
                None => life.in_graph = true,
                Some("created") => {
                    self.known.remove(&e.job);
                    *life = JobTrace::default();
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
    pub(in crate::backup) fn know(&mut self, now: &[Job], graph: &Graph) {
        let drawn: HashSet<&str> = graph.all("block-job").map(|j| j.name.as_str()).collect();
        let seen = |j: &&Job| {
            let id = j.id.as_str();
            drawn.contains(id) || !BLOCK_JOBS.contains(&j.kind.as_str()) || self.known.contains(id)
        };
        self.known = now.iter().filter(seen).map(|j| j.id.clone()).collect();
    }
}

/// The events of one job.
#[derive(Debug, Default)]
struct JobTrace {
    ran: bool,
    in_graph: bool,
}

impl JobTrace {
    /// Jobs without nodes (such as one that creates an image) run and end without an event that only
    /// block jobs have. One that never ran has failed at its beginning: it may have had nodes.
    fn trace(&self, job: &str) -> Option<String> {
        let harmless = self.ran && !self.in_graph;
        (!harmless).then(|| {
            let job = short(job);
            format!(
                "job {job} of another program has begun and ended: the disks it used are not \
                     known"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::client::JobEvent;
    use serde_json::json;

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
        let mut n = ForeignJobs::default();
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
        let mut n = ForeignJobs::default();
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
        let mut n = ForeignJobs::default();
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
        let mut n = ForeignJobs::default();
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
        let mut n = ForeignJobs::default();
        let create = [("c", "created"), ("c", "running"), ("c", "concluded"), ("c", "null")];
        assert!(n.unexplained(heard(&create), &[], &Graph::default()).is_none());
    }
}
