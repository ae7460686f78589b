//! What another program does in the same QEMU, on a [`Machine`]: it begins, ends, and what it made is right.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::images::first_difference;
use crate::support::qemu::two_disks::{Machine, SIZE, bytes};

macro_rules! operations {
    ($($op:ident),* $(,)?) => {
        /// What another program does with `v0`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Op { $($op),* }

        /// All of them.
        pub const ALL: &[Op] = &[$(Op::$op),*];
    };
}

operations! {
    Mirror,
    NamedMirror,
    DriveMirror,
    DriveBackup,
    NodeBackup,
    Commit,
    Stream,
    SnapshotByDevice,
    SnapshotByNode,
    InternalSnapshot,
    Grow,
    Shrink,
    Unplug,
    TheirFilter,
    Export,
    WritableExport,
    Reset,
    Iothread,
}

pub use Op::*;

/// An operation under way.
pub struct Begun {
    pub op: Op,
    /// What `v0` held then.
    then: Vec<u8>,
    /// The node that their filter was put above.
    node: String,
}

impl Op {
    /// Begins it; `None` if QEMU refuses.
    pub fn begin(self, m: &mut Machine) -> Option<Begun> {
        let then = m.expect[0].clone();
        let inserted = m.inserted(0)?;
        let node = inserted["node-name"].as_str().unwrap().to_string();
        let id = "other";
        let file = |name: &str| m.text(name);
        let (command, arguments) = match self {
            Mirror => (
                "blockdev-mirror",
                json!({"job-id": id, "device": "dr0", "target": "b", "sync": "full"}),
            ),
            NamedMirror => (
                "blockdev-mirror",
                json!({"job-id": id, "device": "dr0", "target": "b", "sync": "full",
                    "filter-node-name": "theirs"}),
            ),
            DriveMirror => (
                "drive-mirror",
                json!({"job-id": id, "device": "dr0", "target": file("m.qcow2"), "sync": "full",
                    "format": "qcow2"}),
            ),
            DriveBackup => (
                "drive-backup",
                json!({"job-id": id, "device": "dr0", "target": file("x.qcow2"), "sync": "full",
                    "format": "qcow2", "speed": 1 << 20}),
            ),
            NodeBackup => (
                "blockdev-backup",
                json!({"job-id": id, "device": "a", "target": "b", "sync": "full", "speed": 1 << 20}),
            ),
            Commit => ("block-commit", json!({"job-id": id, "device": "dr0"})),
            Stream => ("block-stream", json!({"job-id": id, "device": "a", "speed": 1 << 20})),
            SnapshotByDevice => (
                "blockdev-snapshot-sync",
                json!({"device": "dr0", "snapshot-file": file("ov.qcow2"), "snapshot-node-name": "ov"}),
            ),
            SnapshotByNode => (
                "blockdev-snapshot-sync",
                json!({"node-name": "a", "snapshot-file": file("ov.qcow2"), "snapshot-node-name": "ov"}),
            ),
            InternalSnapshot => {
                ("blockdev-snapshot-internal-sync", json!({"device": "dr0", "name": "s"}))
            }
            Grow => ("block_resize", json!({"device": "dr0", "size": SIZE + (2 << 20)})),
            Shrink => ("block_resize", json!({"device": "dr0", "size": SIZE - (1 << 20)})),
            Reset => ("system_reset", json!({})),
            Iothread => {
                m.do_it("object-add", json!({"qom-type": "iothread", "id": "it"}));
                ("x-blockdev-set-iothread", json!({"node-name": "a", "iothread": "it"}))
            }
            Unplug => return self.unplug(m).then_some(Begun { op: self, then, node }),
            TheirFilter => {
                return self.put_filter(m, &node).then_some(Begun { op: self, then, node });
            }
            Export | WritableExport => {
                return self.export(m).then_some(Begun { op: self, then, node });
            }
        };
        if let Err(why) = m.qmp.try_execute(command, arguments) {
            println!("    {self:?}: QEMU refuses: {why}");
            if self == Iothread {
                m.do_it("object-del", json!({"id": "it"}));
            }
            return None;
        }
        match self {
            Grow => m.expect[0].resize(SIZE + (2 << 20), 0),
            Shrink => m.expect[0].truncate(SIZE - (1 << 20)),
            _ => {}
        }
        Some(Begun { op: self, then, node })
    }

    fn unplug(self, m: &mut Machine) -> bool {
        if m.do_it("query-status", json!({}))["status"] != "running" {
            return false;
        }
        m.do_it("device_del", json!({"id": "v0"}));
        let end = Instant::now() + Duration::from_secs(60);
        while m.inserted(0).is_some() {
            assert!(Instant::now() < end, "v0 is not unplugged");
            // A reset is an answer to the request as well.
            m.do_it("system_reset", json!({}));
            std::thread::sleep(Duration::from_millis(200));
        }
        true
    }

    fn put_filter(self, m: &mut Machine, node: &str) -> bool {
        let raw = m.path("theirs.raw");
        std::fs::File::create(&raw).unwrap().set_len(m.expect[0].len() as u64).unwrap();
        m.do_it(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "tf", "file": {"driver": "file", "filename": raw}}),
        );
        let filter =
            json!({"driver": "copy-before-write", "node-name": "tc", "file": node, "target": "tf"});
        let path = "/machine/peripheral/v0/virtio-backend";
        let set = json!({"path": path, "property": "drive", "value": "tc"});
        let added = m.qmp.try_execute("blockdev-add", filter).is_ok();
        if added && m.qmp.try_execute("qom-set", set).is_ok() {
            return true;
        }
        for n in ["tc", "tf"].into_iter().skip(usize::from(!added)) {
            m.do_it("blockdev-del", json!({"node-name": n}));
        }
        false
    }

    fn export(self, m: &mut Machine) -> bool {
        let address = json!({"type": "unix", "data": {"path": m.text("their-nbd.sock")}});
        if m.qmp.try_execute("nbd-server-start", json!({"addr": address})).is_err() {
            return false;
        }
        let writable = self == WritableExport;
        let export = json!({"type": "nbd", "id": "theirs", "node-name": "a", "writable": writable});
        let done = m.qmp.try_execute("block-export-add", export).is_ok();
        if !done {
            m.do_it("nbd-server-stop", json!({}));
        }
        done
    }
}

impl Begun {
    /// Ends it; what it made is right.
    pub fn end(&self, m: &mut Machine) {
        let gone = |j: &serde_json::Value| j.is_null();
        match self.op {
            Mirror | NamedMirror | DriveMirror | Commit => {
                m.wait_job("other", |j| j.is_null() || j["status"] == "ready");
                m.do_it("job-complete", json!({"id": "other"}));
                m.wait_job("other", gone);
            }
            DriveBackup | NodeBackup | Stream => {
                // It may have ended.
                let _ = m
                    .qmp
                    .try_execute("block-job-set-speed", json!({"device": "other", "speed": 0}));
                m.wait_job("other", gone);
                let copy = if self.op == DriveBackup { "x.qcow2" } else { "b.qcow2" };
                if self.op == NodeBackup {
                    // Until it is closed, some of it is in QEMU's memory.
                    m.do_it("blockdev-del", json!({"node-name": "b"}));
                }
                if self.op != Stream {
                    let got = bytes(&m.path(copy), "qcow2");
                    assert_eq!(first_difference(&got, &self.then), None, "the other's copy");
                }
            }
            SnapshotByDevice | SnapshotByNode => {
                let got = bytes(&m.path("a.qcow2"), "qcow2");
                assert_eq!(first_difference(&got, &self.then), None, "below the snapshot");
            }
            TheirFilter => {
                let path = "/machine/peripheral/v0/virtio-backend";
                // Whoever puts a device where it is already ends QEMU.
                let now = m.inserted(0).map(|i| i["node-name"].clone());
                if now.is_none_or(|n| n != self.node) {
                    let value = json!({"path": path, "property": "drive", "value": self.node});
                    m.do_it("qom-set", value);
                }
                for n in ["tc", "tf"] {
                    m.do_it("blockdev-del", json!({"node-name": n}));
                }
            }
            Export | WritableExport => {
                m.do_it("block-export-del", json!({"id": "theirs", "mode": "hard"}));
                m.qmp.wait_event("BLOCK_EXPORT_DELETED");
                m.do_it("nbd-server-stop", json!({}));
            }
            Iothread => {
                m.do_it("x-blockdev-set-iothread", json!({"node-name": "a", "iothread": null}));
                m.do_it("object-del", json!({"id": "it"}));
            }
            InternalSnapshot | Grow | Shrink | Unplug | Reset => {}
        }
    }
}
