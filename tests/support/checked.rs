//! A daemon with disks that have something on them, and what has to hold after each backup of it.

use std::path::PathBuf;

use crate::support::backup::{Caller, leftovers, level, newest, ours_in_qemu, same};
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::run;

/// A daemon with a qcow2 disk `a` of 16 MiB and the further disks given.
pub fn daemon(more: &[(&str, &str)]) -> Daemon {
    let dir = tempfile::tempdir().unwrap();
    let mut list = vec![("a", "driver=qcow2")];
    list.extend_from_slice(more);
    for (name, format) in &list {
        let path = dir.path().join(format!("{name}.img"));
        let kind = if format.contains("qcow2") { "qcow2" } else { "raw" };
        run("qemu-img", &["create", "-q", "-f", kind, path.to_str().unwrap(), "16M"]);
    }
    let d = Daemon::start(dir, &list);
    for (name, _) in &list {
        d.io(name, &["write -P 1 0 6M", "write -P 2 12M 4M"]);
    }
    d
}

pub fn image_of(d: &Daemon, disk: &str) -> String {
    d.path(&format!("{disk}.img")).display().to_string()
}

/// One more backup: succeeds, is right, leaves nothing; gives what it said.
pub fn good(fault: &str, d: &Daemon, caller: &Caller, expect: &[(&str, &str)]) -> String {
    let (said, views) = caller.held("auto");
    let mount = Mount::new(&caller.target);
    for (disk, view) in &views {
        same(&mount, disk, &newest(&caller.target, disk), view);
    }
    for (disk, want) in expect {
        assert_eq!(level(caller, disk), *want, "{fault}: {said}");
        println!("{fault:44} | {disk} | exit 0, {want}");
    }
    clean(fault, d);
    said
}

pub fn clean(fault: &str, d: &Daemon) {
    assert_eq!(ours_in_qemu(&mut d.qmp()), Vec::<String>::new(), "{fault}");
    assert_eq!(leftovers(d.dir.path()), Vec::<PathBuf>::new(), "{fault}");
}

pub fn code(caller: &Caller, level: &str) -> (Option<i32>, String) {
    let out = caller.run(level);
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}
