//! What a killed qmpbackup leaves in QEMU: jobs, and nodes round the disks.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::remove_filter;
use crate::backup::disks::Answers;
use crate::backup::{Watch, names};
use crate::error::{Error, Kind, Result};
use crate::qmp::Client;
use crate::qmp::budget::short;
use crate::qmp::types::{Job, Node};

/// The job that takes its filter out from below an overlay.
const RELINK: &str = "fleecefs-relink";

/// What qmpbackup leaves behind when it is killed: recognised by its names.
///
/// # Errors
/// QEMU refuses.
pub(crate) fn remove(client: &mut Client, watch: &dyn Watch) -> Result<usize> {
    let mut count = 0;
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    for j in jobs.iter().filter(|j| is_foreign(&j.id)) {
        client.call("job-cancel", json!({"id": j.id}))?.ok();
        count += 1;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while client.poll::<Vec<Job>>("query-jobs")?.iter().any(|j| is_foreign(&j.id) && !j.concluded())
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    for j in client.query::<Vec<Job>>("query-jobs", json!({}))? {
        if is_foreign(&j.id) {
            client.call("job-dismiss", json!({"id": j.id}))?.ok();
        }
    }
    count += remove_foreign_nodes(client, watch)?;
    Ok(count)
}

/// Fails while a job of qmpbackup runs: it takes the events of any job in this QEMU for its own, so
/// that ours would end its run before its time.
///
/// # Errors
/// `Busy`; QEMU does not answer.
pub(crate) fn refuse_at_work(client: &mut Client) -> Result<()> {
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    let Some(job) = jobs.iter().find(|j| is_foreign(&j.id) && !j.concluded()) else {
        return Ok(());
    };
    let what = format!("qmpbackup is running in this QEMU (job {})", short(&job.id));
    Err(Error::new(Kind::Busy, what).remedy(
        "wait until it ends (--wait); it mistakes our jobs for its own. If it was killed: \
         'fleecefs recover --foreign'",
    ))
}

/// Fails where stopping the guest and letting it go on would end QEMU: seen with 7.2 while a
/// `block-stream` works on any disk, not with 10.0; nobody looked at those between.
///
/// # Errors
/// `Busy`; QEMU does not answer.
pub(crate) fn refuse_stop(client: &mut Client) -> Result<()> {
    if client.version().number >= (10, 0, 0) {
        return Ok(());
    }
    let jobs: Vec<Job> = client.query("query-jobs", json!({}))?;
    let Some(job) = jobs.iter().find(|j| j.kind == "stream") else { return Ok(()) };
    let what = format!(
        "job {} (stream) of another program is running: QEMU {} may crash when the guest is paused",
        short(&job.id),
        client.version()
    );
    let remedy = "back up when it has ended (it may need a job-dismiss); --wait DURATION waits \
                  for it, --no-stop does not pause the guest";
    Err(Error::new(Kind::Busy, what).remedy(remedy))
}

fn is_foreign(id: &str) -> bool {
    id.starts_with("qmpbackup")
}

/// Its nodes end in `-snap`, `-cbw`, `-fleece` or `-target` and hang on each other as ours do.
fn remove_foreign_nodes(client: &mut Client, watch: &dyn Watch) -> Result<usize> {
    let mut removed = 0;
    // A node that others hang on is refused; each round frees the next layer.
    for driver in ["snapshot-access", "copy-before-write", "qcow2", "raw", "file"] {
        let answers = Answers::ask(client)?;
        for n in answers.nodes.iter().filter(|n| n.drv == driver) {
            if names::parse_object(&n.node_name).is_some() || !foreign_node(&answers, n) {
                continue;
            }
            if driver == "copy-before-write" {
                let own = |name: &str| {
                    is_foreign(name)
                        || answers.node(name).is_some_and(|p| p.drv == "snapshot-access")
                };
                remove_filter::detach(client, &answers, &n.node_name, &own, RELINK)?;
            }
            let answer: std::result::Result<Value, _> =
                client.call("blockdev-del", json!({"node-name": n.node_name}))?;
            if answer.is_ok() {
                watch.say(&format!("removed node {} of qmpbackup", n.node_name));
                removed += 1;
            }
        }
    }
    Ok(removed)
}

/// All nodes that qmpbackup adds carry its name. What was added by hand over its files does not:
/// such a node is known by the file's name, and is never a filter, which has no file of its own.
fn foreign_node(answers: &Answers, n: &Node) -> bool {
    if is_foreign(&n.node_name) {
        return true;
    }
    let filter = matches!(n.drv.as_str(), "copy-before-write" | "snapshot-access");
    let used = answers
        .drives
        .iter()
        .any(|d| d.inserted.as_ref().is_some_and(|i| i.node_name == n.node_name));
    !filter && !used && foreign_file(Path::new(&n.file))
}

/// `<LEVEL>-<seconds>-<node>.fleece.<format>` or `<LEVEL>-<seconds>-<disk>.partial`.
fn foreign_file(file: &Path) -> bool {
    let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let Some((_, _, rest)) = names::parse_image(name) else { return false };
    rest.contains(".fleece.") || rest.ends_with(".partial")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, driver: &str, file: &str) -> Node {
        serde_json::from_value(json!({"node-name": name, "drv": driver, "file": file})).unwrap()
    }

    #[test]
    fn only_what_carries_its_names_is_qmpbackups() {
        let none = Answers::default();
        for (name, driver, file) in [
            ("qmpbackup-sda-cbw", "copy-before-write", "/vm/sda.qcow2"),
            ("qmpbackup-sda-snap", "snapshot-access", ""),
            ("qmpbackup-sda", "qcow2", "/T/sda.qcow2/INC-17-sda.qcow2.partial"),
            ("x", "qcow2", "/T/sda.qcow2/INC-17-sda.qcow2.partial"),
            ("x", "raw", "/vm/FULL-17-sda.fleece.raw"),
        ] {
            assert!(foreign_node(&none, &node(name, driver, file)), "{name} {file}");
        }
        for (name, driver, file) in [
            ("backup0-cbw", "copy-before-write", "/vm/FULL-17-sda.fleece.raw"),
            ("libvirt-3-snap", "snapshot-access", ""),
            ("download", "raw", "/vm/iso.partial"),
            ("theirs", "qcow2", "/vm/sda.fleece.qcow2"),
            ("disk", "qcow2", "/vm/sda.qcow2"),
        ] {
            assert!(!foreign_node(&none, &node(name, driver, file)), "{name} {file}");
        }
    }
}
