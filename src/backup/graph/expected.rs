//! What the block graph round a disk has to be while we work on it, and how it differs.

use super::{GraphState, Path};
use crate::backup::names::{Role, object, parse_object};
use crate::qmp::types::GraphNode;

/// How far a disk has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Its filter is not in place.
    Before,
    /// Its filter is in place.
    Inserted,
    /// Its frozen view is being copied.
    Copying,
}

/// What the graph round a disk has to be: what planning saw, and what we added.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected<'a> {
    /// Our run.
    pub run: &'a str,
    /// The disk's number in it.
    pub index: usize,
    /// What it is called in messages.
    pub label: &'a str,
    /// What planning saw.
    pub path: &'a Path,
    /// What the job reads.
    pub source: Role,
}

impl Expected<'_> {
    fn own(&self, role: Role) -> String {
        object(self.run, role, self.index)
    }

    /// The first thing that is not as it has to be.
    pub(crate) fn difference(&self, state: GraphState<'_>, stage: Stage) -> Option<String> {
        let filter = self.own(Role::Filter);
        let below = self.path.nodes.iter().map(String::as_str);
        let nodes: Vec<&str> = match stage {
            Stage::Before => below.collect(),
            _ => [filter.as_str()].into_iter().chain(below).collect(),
        };
        let beside = self.allowed(state, &filter);
        let bypassed = if stage == Stage::Before { self.bypassed(state) } else { None };
        bypassed
            .or_else(|| self.path_differs(state, &nodes, &beside))
            .or_else(|| self.view_differs(state, stage))
            .or_else(|| self.job_works(state, &nodes, &beside))
    }

    /// A node that another program has put above the disk since planning and that nobody uses: it is about
    /// to put the guest's device there; or it has, between our last look at the device and our own putting
    /// it elsewhere, which QEMU offers no way to do in one.
    pub(crate) fn bypassed(&self, state: GraphState<'_>) -> Option<String> {
        let fresh = |n: &&str| !self.path.unused.iter().any(|u| u == n);
        let top = self.path.nodes.first()?;
        let node = super::unused_above(state.graph, top).into_iter().find(fresh)?;
        Some(format!("{} was inserted above {} during the backup", state.node(node), self.label))
    }

    /// Backups of other programs that copy before a write below our filter, by their own nodes:
    /// both views stay what they are. (Ours gets a write first and reads what was there through the
    /// other's filter, which passes reads through.)
    fn allowed<'s>(&self, state: GraphState<'s>, filter: &str) -> Vec<(&'s str, &'s str)> {
        let jobs = state.graph.all("block-job").filter(|j| parse_object(&j.name).is_none());
        let backups =
            jobs.filter(|j| state.jobs.iter().any(|o| o.id == j.name && o.kind == "backup"));
        let own = |j: &'s GraphNode| {
            let main = state.graph.links(j.id).iter().find(|l| l.role == "main node")?;
            Some((j.name.as_str(), state.graph.name(main.child)?))
        };
        let chain = state.chain(filter, self.path.disk());
        let below: Vec<&str> = chain.into_iter().skip(1).collect();
        backups.filter_map(own).filter(|(_, node)| below.contains(node)).collect()
    }

    fn path_differs(
        &self,
        state: GraphState<'_>,
        nodes: &[&str],
        beside: &[(&str, &str)],
    ) -> Option<String> {
        let top = nodes.first()?;
        // A device that is gone writes no more: what its filter holds stays as it is.
        let tops = self.path.root.tops(state.graph);
        let attached = tops.iter().find(|t| *t != top).filter(|_| !tops.contains(top));
        if let Some(other) = attached {
            let above = state.chain(other, self.path.disk());
            return Some(match above.contains(top) {
                true => self.between(state, other),
                false if above.contains(&self.path.disk()) => self.between(state, other),
                false => format!("{} is attached to {} now", self.label, state.node(other)),
            });
        }
        let chain = state.chain(top, self.path.disk());
        let on_path: Vec<&str> =
            chain.into_iter().filter(|n| !beside.iter().any(|(_, node)| node == n)).collect();
        if on_path == nodes {
            return None;
        }
        match on_path.iter().find(|n| !nodes.contains(n)) {
            Some(other) => Some(self.between(state, other)),
            None => Some(format!("the nodes below {} have changed", self.label)),
        }
    }

    fn between(&self, state: GraphState<'_>, node: &str) -> String {
        format!("{} is between {} and its disk", state.node(node), self.label)
    }

    /// Whether what the job reads is our filter's frozen view, and nothing else.
    fn view_differs(&self, state: GraphState<'_>, stage: Stage) -> Option<String> {
        if stage < Stage::Copying {
            return None;
        }
        let (filter, view) = (self.own(Role::Filter), self.own(Role::Snapshot));
        let mut wanted = vec![
            (view.clone(), "file", filter.clone()),
            (filter.clone(), "target", self.own(Role::Fleece)),
        ];
        if self.source == Role::HiddenStatus {
            wanted.push((self.own(Role::HiddenStatus), "image", view));
        }
        // A job that has ended holds nothing.
        if let Some(copier) = self.copier(state) {
            wanted.push((copier.to_string(), "file", self.own(self.source)));
        }
        let wrong = |(parent, role, child): &(String, &str, String)| {
            let now = state.graph.child(parent, role);
            let right = now == Some(child.as_str());
            let now = now.map_or_else(|| "nothing".into(), |n| state.node(n));
            (!right).then(|| format!("{parent} reads {now} instead of {child}"))
        };
        wanted.iter().find_map(wrong)
    }

    /// The node that QEMU put above the frozen view for our job.
    fn copier<'s>(&self, state: GraphState<'s>) -> Option<&'s str> {
        let job = self.own(Role::Job);
        let job = state.graph.all("block-job").find(|j| j.name == job)?;
        let main = state.graph.links(job.id).iter().find(|l| l.role == "main node")?;
        state.graph.name(main.child)
    }

    fn job_works(
        &self,
        state: GraphState<'_>,
        nodes: &[&str],
        beside: &[(&str, &str)],
    ) -> Option<String> {
        let roles = [Role::Snapshot, Role::HiddenStatus, Role::Fleece, Role::Target, Role::Lock];
        let own: Vec<String> = roles.into_iter().map(|r| self.own(r)).collect();
        let all: Vec<&str> = nodes.iter().copied().chain(own.iter().map(String::as_str)).collect();
        let jobs = state.working_on(&all);
        let job = jobs.iter().find(|j| !beside.iter().any(|(id, _)| id == *j))?;
        Some(format!("{} works on {}", state.job(job), self.label))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::graph::Root;
    use crate::backup::graph::tests::{RUN, graph, job, own};
    use crate::qmp::types::Job;

    fn path() -> Path {
        Path {
            root: Root::Device("v0".into()),
            nodes: vec!["t".into(), "a".into()],
            unused: vec!["u".into()],
        }
    }

    fn differs(edges: &[(&str, &str, &str)], jobs: &[Job], stage: Stage) -> Option<String> {
        let (graph, path) = (graph(edges), path());
        let e = Expected { run: RUN, index: 0, label: "v0", path: &path, source: Role::Snapshot };
        e.difference(GraphState { graph: &graph, jobs }, stage)
    }

    #[test]
    fn before_and_after_the_filter_the_path_is_what_it_was() {
        let before = [("b:v0", "root", "t"), ("t", "file", "a")];
        assert_eq!(differs(&before, &[], Stage::Before), None);
        assert!(differs(&before, &[], Stage::Inserted).unwrap().contains("node t is between"));
        let c = own(Role::Filter);
        let inserted = [("b:v0", "root", c.as_str()), (&c, "file", "t"), ("t", "file", "a")];
        assert_eq!(differs(&inserted, &[], Stage::Inserted), None);
        // Unplugged from the guest, it stays as it is.
        assert_eq!(differs(&inserted[1..], &[], Stage::Inserted), None);
        let elsewhere = [inserted[1], inserted[2], ("b:v0", "root", "x")];
        let said = differs(&elsewhere, &[], Stage::Inserted).unwrap();
        assert_eq!(said, "v0 is attached to node x now");
    }

    #[test]
    fn a_node_that_came_above_the_disk_and_is_not_used_is_noticed_before_the_filter_is() {
        let disk = [("b:v0", "root", "t"), ("t", "file", "a")];
        let with = |node| [disk.as_slice(), &[(node, "file", "t")]].concat();
        let said = differs(&with("n"), &[], Stage::Before).unwrap();
        assert_eq!(said, "node n was inserted above v0 during the backup");
        // One that planning saw, and ours.
        assert_eq!(differs(&with("u"), &[], Stage::Before), None);
        let c = own(Role::Filter);
        assert_eq!(differs(&with(&c), &[], Stage::Before), None);
        // While we copy anybody may.
        let inserted = [("b:v0", "root", c.as_str()), (&c, "file", "t"), ("t", "file", "a")];
        let late = [inserted.as_slice(), &[("n", "file", "t")]].concat();
        assert_eq!(differs(&late, &[], Stage::Inserted), None);
        let used = [disk.as_slice(), &[("n", "file", "t"), ("b:x", "root", "n")]].concat();
        assert_eq!(differs(&used, &[], Stage::Before), None);
    }

    #[test]
    fn a_mirror_is_named_wherever_it_stands() {
        let jobs = [job("move", "mirror")];
        let edges = [
            ("b:v0", "root", "#block1"),
            ("#block1", "backing", "t"),
            ("t", "file", "a"),
            ("j:move", "main node", "#block1"),
            ("j:move", "source", "t"),
        ];
        let said = differs(&edges, &jobs, Stage::Before).unwrap();
        assert_eq!(said, "node #block1 of job move (mirror) is between v0 and its disk");
        let aside = [("b:v0", "root", "t"), ("t", "file", "a"), ("j:move", "target", "a")];
        let said = differs(&aside, &jobs, Stage::Before).unwrap();
        assert_eq!(said, "job move (mirror) works on v0");
    }

    #[test]
    fn a_backup_below_our_filter_is_let_be_and_one_above_is_not() {
        let (c, s, f) = (own(Role::Filter), own(Role::Snapshot), own(Role::Fleece));
        let (c, s) = (c.as_str(), s.as_str());
        let jobs = [job("other", "backup")];
        let ours = [(s, "file", c), (c, "target", f.as_str()), ("t", "file", "a")];
        let below = [
            ("b:v0", "root", c),
            (c, "file", "o"),
            ("o", "file", "t"),
            ("j:other", "main node", "o"),
        ];
        let all = [ours.as_slice(), &below].concat();
        assert_eq!(differs(&all, &jobs, Stage::Copying), None);
        // A stream is no backup.
        assert!(differs(&all, &[job("other", "stream")], Stage::Copying).is_some());
        let above = [
            ("b:v0", "root", "o"),
            ("o", "file", c),
            (c, "file", "t"),
            ("j:other", "main node", "o"),
        ];
        let said = differs(&[ours.as_slice(), &above].concat(), &jobs, Stage::Copying).unwrap();
        assert_eq!(said, "node o of job other (backup) is between v0 and its disk");
        // The view was moved along.
        let moved = [
            (s, "file", "o"),
            ("o", "file", c),
            (c, "target", f.as_str()),
            ("t", "file", "a"),
            (c, "file", "t"),
        ];
        assert!(differs(&moved, &[], Stage::Copying).unwrap().contains("instead of"));
    }

    #[test]
    fn a_job_on_another_disk_that_reads_a_shared_image_is_none_of_ours() {
        let edges = [
            ("b:v0", "root", "t"),
            ("t", "file", "a"),
            ("a", "backing", "base"),
            ("b", "backing", "base"),
            ("j:move", "main node", "m"),
            ("m", "file", "b"),
            ("j:move", "intermediate node", "base"),
        ];
        assert_eq!(differs(&edges, &[job("move", "stream")], Stage::Before), None);
        let inside = [edges.as_slice(), &[("j:move", "main node", "base")]].concat();
        assert!(differs(&inside, &[job("move", "commit")], Stage::Before).is_some());
    }

    #[test]
    fn a_graph_that_cannot_be_ends() {
        let edges =
            [("b:v0", "root", "t"), ("t", "file", "x"), ("x", "file", "t"), ("x", "backing", "a")];
        assert!(differs(&edges, &[], Stage::Before).is_some());
        assert!(differs(&[], &[], Stage::Copying).is_some());
    }
}
