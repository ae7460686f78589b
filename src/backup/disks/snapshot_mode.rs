//! Disks with `snapshot=on`: what the guest writes goes to a temporary overlay, which ends with QEMU.

use super::answers::Answers;
use super::disk::base_name;
use crate::backup::graph;
use crate::qmp::types::Node;

/// What is below the overlay that QEMU makes for `snapshot=on`, if `disk` is one. It has a temporary
/// file, `vl.XXXXXX`, and no name otherwise.
pub(super) fn below_snapshot<'a>(answers: &'a Answers, disk: &Node) -> Option<&'a Node> {
    let file = base_name(&answers.file_of(disk))?;
    let random = file.strip_prefix("vl.")?;
    let temporary = random.len() == 6 && random.bytes().all(|b| b.is_ascii_alphanumeric());
    let below = answers.graph.child(&disk.node_name, "backing")?;
    let path = answers.path_down(graph::Root::Node(disk.node_name.clone()), below);
    answers.node(path.disk()).filter(|_| temporary && disk.drv == "qcow2")
}
