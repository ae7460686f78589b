use serde_json::Value;

use super::*;
use crate::qmp::client::testing::{Answer, FakeQemu, Served, fd_set, graph, node, qemu};

const RUN: &str = "0123456789ab";
const OTHER: &str = "ba9876543210";
const SCOPE: Scope<'static> = Scope { run: RUN, index: None };

fn name(role: Role, index: usize) -> String {
    object(RUN, role, index)
}

fn plain(names: &[String]) -> Vec<Value> {
    names.iter().map(|n| node(n, "raw", &[])).collect()
}

/// A job that has come to its end.
fn job(index: usize) -> Value {
    json!({"id": name(Role::Job, index), "type": "backup", "status": "concluded"})
}

/// Which of these disks' targets has a file below it.
fn with_targets(mut q: FakeQemu, disks: usize) -> FakeQemu {
    let targets: Vec<String> = (0..disks).map(|i| name(Role::Target, i)).collect();
    let files: Vec<String> = (0..disks).map(|i| format!("file{i}")).collect();
    let vertices: Vec<_> = targets.iter().chain(&files).map(|n| ("block-driver", &**n)).collect();
    let edges: Vec<_> = targets.iter().zip(&files).map(|(t, f)| (&**t, "file", &**f)).collect();
    q.graph = graph(&vertices, &edges);
    q.nodes.extend(plain(&targets));
    q
}

/// What is refused is what is said of this node.
fn refusing(
    command: &'static str,
    who: String,
    why: &'static str,
) -> impl FnMut(&str, &Value) -> Answer + Send {
    move |c, a| match c == command && a.to_string().contains(&format!("{who:?}")) {
        true => Answer::Refused(why),
        false => Answer::Done,
    }
}

#[test]
fn another_run_stays_and_so_does_what_keeps_the_guest_here_until_all_else_is_gone() {
    let kept = [object(OTHER, Role::Scratch, 0), name(Role::Blocker, 0)];
    let nodes = [name(Role::Scratch, 0), kept[0].clone(), kept[1].clone()];
    let mut q = qemu(plain(&nodes), |_, _| Answer::Done);
    q.commands.push("add-fd");
    let theirs = object(OTHER, Role::Target, 0);
    q.sets = vec![fd_set(1, &name(Role::Target, 0)), fd_set(2, &kept[1]), fd_set(3, &theirs)];
    let mut s = q.start();
    let teardown = teardown_all(&mut s.client, SCOPE).unwrap();
    assert!(teardown.blocked && teardown.refused.is_none());
    let has = |s: &Served, nodes: &[String], sets: &[u64]| {
        let now = s.now();
        assert_eq!(
            (now.node_names(), now.set_ids()),
            (nodes.iter().map(|n| &**n).collect(), sets.to_vec())
        );
    };
    has(&s, &kept, &[2, 3]);
    unblock(&mut s.client, RUN, teardown.blocked).unwrap();
    has(&s, &kept[..1], &[3]);
}

#[test]
fn a_disk_is_stuck_where_qemu_refuses_and_not_where_it_does_not_answer() {
    let mut t = Teardown::default();
    let failed = |kind| Err::<(), Error>(Error::new(kind, "no"));
    assert_eq!(t.note(0, failed(Kind::Timeout)).unwrap_err().kind(), Kind::Timeout);
    assert!(t.stuck.is_empty() && t.refused.is_none());
    t.note(1, failed(Kind::Peer)).unwrap();
    assert_eq!((t.stuck, t.refused.unwrap().kind()), (BTreeSet::from([1]), Kind::Peer));
}

/// While its filter is there the guest writes through it: what belongs to it is for the next recovery.
#[test]
fn what_a_stuck_disk_still_has_stays_and_the_others_goes() {
    let holds = [name(Role::Hold, 0), name(Role::Hold, 1)];
    let mut nodes = plain(&[name(Role::Filter, 0), name(Role::Scratch, 1)]);
    nodes.push(node("disks", "qcow2", &[&holds[0], &holds[1]]));
    let refusal = refusing("blockdev-del", name(Role::Filter, 0), "Node is in use");
    let mut q = with_targets(qemu(nodes, refusal), 2);
    q.jobs = vec![job(0), job(1)];
    let mut s = q.start();
    let teardown = teardown_all(&mut s.client, SCOPE).unwrap();
    assert_eq!((teardown.stuck, teardown.finished), (BTreeSet::from([0]), vec![1]));
    assert!(teardown.refused.unwrap().report().contains("in use"));
    let now = s.now();
    assert_eq!(now.job_ids(), [name(Role::Job, 0)]);
    assert_eq!(now.bitmaps(), [&*holds[0]]);
    assert_eq!(now.node_names(), [name(Role::Filter, 0), "disks".into(), name(Role::Target, 0)]);
}

#[test]
fn an_image_is_complete_if_its_job_was_and_qemu_could_write_the_rest() {
    let refusal = refusing("blockdev-reopen", name(Role::Target, 2), "No space left on device");
    let mut q = with_targets(qemu(Vec::new(), refusal), 3);
    let mut failed = job(1);
    failed["error"] = "Input/output error".into();
    q.jobs = vec![job(0), failed, job(2)];
    let mut s = q.start();
    let teardown = teardown_all(&mut s.client, SCOPE).unwrap();
    assert!(teardown.stuck.is_empty() && teardown.refused.is_none());
    assert_eq!(teardown.finished, [0]);
    let now = s.now();
    assert!(now.nodes.is_empty() && now.jobs.is_empty());
}

/// Whoever ran it did not take the frozen view away: nobody saw its end.
#[test]
fn a_job_that_nobody_saw_end_completes_no_image() {
    let mut q = with_targets(qemu(plain(&[name(Role::Snapshot, 0)]), |_, _| Answer::Done), 2);
    q.jobs = vec![job(0), job(1)];
    let mut s = q.start();
    let teardown = teardown_all(&mut s.client, SCOPE).unwrap();
    assert_eq!(teardown.finished, [1]);
    let now = s.now();
    assert!(now.nodes.is_empty() && now.jobs.is_empty());
}

#[test]
fn a_qemu_that_ends_meanwhile_is_not_one_that_refuses() {
    let ends = |_: &str, _: &Value| Answer::Gone;
    let mut s = qemu(plain(&[name(Role::Scratch, 0)]), ends).start();
    assert_eq!(teardown_all(&mut s.client, SCOPE).unwrap_err().kind(), Kind::Peer);
}

/// Above the filter is what `above` says; takes the filter out from below it.
fn detached(above: (&str, &str, &str)) -> (Served, Result<()>) {
    let (kind, who, role) = above;
    let filter = name(Role::Filter, 0);
    let vertices = [("block-driver", &*filter), ("block-driver", "disk"), (kind, who)];
    let mut q = qemu(plain(&["disk".into(), who.into(), filter.clone()]), |_, _| Answer::Done);
    q.graph = graph(&vertices, &[(&filter, "file", "disk"), (who, role, &filter)]);
    let mut s = q.start();
    let answers = Answers::ask(&mut s.client).unwrap();
    let own = |name: &str| parse_object(name).is_some();
    let job = name(Role::Relink, 0);
    let done = remove_filter::detach(&mut s.client, &answers, &filter, &own, &job);
    (s, done)
}

#[test]
fn a_filter_that_a_job_of_others_works_on_stays() {
    let (s, done) = detached(("block-job", "move", "main node"));
    let e = done.unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
    assert!(e.report().contains("move") && s.now().said.is_empty(), "{}", e.report());
    detached(("block-job", &name(Role::Job, 0), "main node")).1.unwrap();
}

/// The job has ended, and the overlay is where it was.
#[test]
fn a_filter_is_taken_out_from_below_an_overlay_only_if_qemu_says_so() {
    let (s, done) = detached(("block-driver", "overlay", "backing"));
    let e = done.unwrap_err();
    assert_eq!(e.kind(), Kind::Peer);
    assert!(e.report().contains("still below overlay"), "{}", e.report());
    let now = s.now();
    let (command, arguments) = &now.said[0];
    assert_eq!((command.as_str(), &arguments["base-node"]), ("block-stream", &json!("disk")));
}
