//! Disks that were smaller between two points: whatever happened to them, and however it was told, each
//! point holds what the disk held; and a disk that nothing happened to costs what has changed.
//!
//! `cargo test --test slow watermark:: -- --nocapture` prints a line per backup.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::backup::{
    Caller, bitmaps, leftovers, level, manifest_of, newest, ours_in_qemu, same,
};
use crate::support::images;
use crate::support::mount::Mount;
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::{have, run};
use serde_json::{Value, json};

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io", "/dev/fuse"];
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What is said where marks are missing.
const SMALLER: &str = "was shrunk and grown again since";
/// What is said where the whole disk was walked and something was found.
const WALKED: &str = "have become zeros without a dirty bit";

/// A daemon with one disk `a`, and how to back it up.
struct Setup {
    d: Daemon,
    caller: Caller,
}

impl Setup {
    /// One of a qcow2 disk, unless a tool that `test` needs is missing.
    fn new(test: &str, size: u64, options: &[&str]) -> Option<Self> {
        have(test, TOOLS).then(|| {
            let dir = tempfile::tempdir().unwrap();
            create(dir.path(), "a", size, options);
            Self::over(dir, size)
        })
    }

    /// A qcow2 disk over a template full of data.
    fn clone_of_template(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), "base", size, &[]);
        let base = dir.path().join("base.img").display().to_string();
        run("qemu-io", &["-c", &format!("write -P 9 0 {size}"), &base]);
        create(dir.path(), "a", size, &["-b", &base, "-F", "qcow2"]);
        Self::started(dir)
    }

    fn over(dir: tempfile::TempDir, size: u64) -> Self {
        let s = Self::started(dir);
        s.d.io("a", &[&format!("write -P 1 0 {size}")]);
        s
    }

    fn started(dir: tempfile::TempDir) -> Self {
        let d = Daemon::start(dir, &[("a", "driver=qcow2")]);
        let caller = Caller::of(&d);
        Setup { d, caller }
    }

    fn image(&self) -> String {
        self.d.path("a.img").display().to_string()
    }

    /// A backup that is right and leaves nothing; gives what it said.
    fn good(&self, wish: &str, want: &str) -> String {
        let (said, views) = self.caller.held(wish);
        let mount = Mount::new(&self.caller.target);
        let point = newest(&self.caller.target, "a.img");
        same(&mount, "a.img", &point, &views[0].1);
        assert_eq!(level(&self.caller, "a.img"), want, "{said}");
        assert_eq!(ours_in_qemu(&mut self.d.qmp()), Vec::<String>::new());
        assert_eq!(leftovers(self.d.dir.path()), Vec::<PathBuf>::new());
        println!("{want:4} of {} KiB, {} stored", views[0].1.len() as u64 / KIB, self.stored());
        said
    }

    /// The same, of a disk that nothing happened to but a few writes.
    fn plain(&self, wish: &str, want: &str) {
        let said = self.good(wish, want);
        assert!(!said.contains("shrunk") && !said.contains("without a dirty bit"), "{said}");
        assert!(self.has_watermark() || want == "DIFF", "{said}");
    }

    /// The same, of a disk whose marks are missing.
    fn smaller(&self, wish: &str, want: &str) {
        let said = self.good(wish, want);
        assert!(said.contains(SMALLER) && !said.contains(WALKED), "{said}");
        assert!(self.has_watermark() || want == "DIFF", "{said}");
    }

    /// KiB that the newest image takes.
    fn stored(&self) -> u64 {
        newest(&self.caller.target, "a.img").metadata().unwrap().len() / KIB
    }

    fn has_watermark(&self) -> bool {
        manifest_of(&newest(&self.caller.target, "a.img"))["bitmap"]["floor"] == json!(true)
    }

    /// The name of the watermark that is beside the newest point's bitmap.
    fn watermark(&self) -> String {
        let m = manifest_of(&newest(&self.caller.target, "a.img"));
        format!("{}-floor", m["bitmap"]["name"].as_str().unwrap())
    }

    /// What QEMU says of a bitmap.
    fn bitmap(&self, name: &str) -> Option<Value> {
        let nodes = self.d.qmp().execute("query-named-block-nodes", json!({}));
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "a").unwrap();
        let list = node["dirty-bitmaps"].as_array()?;
        list.iter().find(|b| b["name"] == name).cloned()
    }

    fn execute(&self, command: &str, arguments: Value) {
        self.d.qmp().execute(command, arguments);
    }

    /// Gives the disk one size after the other, while QEMU lives or while it is down.
    fn resize(&mut self, how: How, sizes: &[u64]) {
        match how {
            How::Live => live(&self.d, sizes),
            How::Offline(options) => {
                self.d.stop();
                for (i, size) in sizes.iter().enumerate() {
                    let (path, size) = (self.image(), size.to_string());
                    let grows = if i > 0 { options } else { &[] };
                    let args = [&["resize", "-q", "--shrink"], grows, &[&path, &size]].concat();
                    run("qemu-img", &args);
                }
                self.d.respawn();
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum How {
    Live,
    /// Growing is done with these options.
    Offline(&'static [&'static str]),
}

fn create(dir: &Path, name: &str, size: u64, options: &[&str]) {
    let (path, size) = (dir.join(format!("{name}.img")).display().to_string(), size.to_string());
    let args = [&["create", "-q", "-f", "qcow2"], options, &[&path, &size]].concat();
    run("qemu-img", &args);
}

/// Resizes by QMP. (An exported node cannot be resized.)
fn live(d: &Daemon, sizes: &[u64]) {
    let mut qmp = d.qmp();
    qmp.execute("block-export-del", json!({"id": "a-export"}));
    while qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]["id"] != "a-export" {}
    for size in sizes {
        qmp.execute("block_resize", json!({"node-name": "a-top", "size": size}));
    }
    let again = json!({"type": "nbd", "id": "a-export", "node-name": "a-top", "name": "a",
        "writable": true});
    qmp.execute("block-export-add", again);
}

#[test]
fn each_bitmap_has_a_watermark_that_survives_a_restart() {
    let Some(mut s) =
        Setup::new("each_bitmap_has_a_watermark_that_survives_a_restart", 16 * MIB, &[])
    else {
        return;
    };
    s.plain("full", "FULL");
    for restarted in [false, true, false] {
        if restarted {
            s.d.restart();
        }
        let mark = s.bitmap(&s.watermark()).expect("it is there");
        assert_eq!((&mark["recording"], &mark["persistent"]), (&json!(false), &json!(true)));
        assert_eq!(mark["count"], json!(16 * MIB));
        s.d.io("a", &["write -P 3 5M 4k"]);
        s.plain("inc", "INC");
        // A cluster of data; no more was copied than was written.
        assert!(s.stored() < 600, "{}", s.stored());
    }
    s.plain("diff", "DIFF");
    // Those of the FULL and of the last INC, each with its watermark.
    assert_eq!(bitmaps(&mut s.d.qmp()).len(), 2);
    s.plain("full", "FULL");
    assert_eq!(bitmaps(&mut s.d.qmp()).len(), 1, "no watermark is left alone");
}

/// Cuts at each place that matters, by each way to cut and to grow.
#[test]
fn a_cut_anywhere_is_copied() {
    let name = "a_cut_anywhere_is_copied";
    // Each granule has a mark; or each second, and the end is inside one.
    for (size, step) in [(4 * MIB, 64 * KIB), (20 * MIB + 512, 128 * KIB)] {
        let last = (size - 1) / (64 * KIB) * (64 * KIB);
        let Some(mut s) = Setup::new(name, size, &[]) else { return };
        s.plain("full", "FULL");
        s.resize(How::Live, &[0, size]);
        s.smaller("inc", "INC");
        s.d.io("a", &[&format!("write -P 1 0 {size}")]);
        s.plain("inc", "INC");
        let cuts = [512, step - 512, step, step + 512, MIB + step, last - 64 * KIB, last];
        for (i, cut) in cuts.into_iter().enumerate() {
            let how = [How::Live, How::Offline(&[])][(i + usize::from(size % MIB > 0)) % 2];
            println!("cut to {cut}, {how:?}");
            s.resize(how, &[cut, size]);
            s.d.io("a", &[&format!("write -P {} {} 512", 2 + i, size - 512)]);
            s.smaller("inc", "INC");
            s.d.io("a", &[&format!("write -P 1 0 {size}")]);
            s.plain("inc", "INC");
        }
        // All marks stay where the cut is inside the last granule.
        for how in [How::Live, How::Offline(&[])].into_iter().filter(|_| size - 512 > last) {
            s.resize(how, &[size - 512, size]);
            s.plain("inc", "INC");
        }
    }
}

/// Nobody is told then that there are zeros.
#[test]
fn a_part_that_is_given_back_preallocated() {
    let Some(mut s) = Setup::new("a_part_that_is_given_back_preallocated", 16 * MIB, &[]) else {
        return;
    };
    s.plain("full", "FULL");
    s.resize(How::Offline(&["--preallocation=full"]), &[10 * MIB, 16 * MIB]);
    s.smaller("inc", "INC");
    s.plain("inc", "INC");
}

/// QEMU writes zeros to the rest of the cluster of the old end where a template would show, and sets
/// no bit for that.
#[test]
fn a_disk_over_a_template_that_was_smaller() {
    let name = "a_disk_over_a_template_that_was_smaller";
    if !have(name, TOOLS) {
        return;
    }
    const SIZE: u64 = 8 * MIB;
    for how in [How::Live, How::Offline(&[])] {
        let mut s = Setup::clone_of_template(SIZE);
        s.plain("full", "FULL");
        s.plain("inc", "INC");
        // Inside the last granule.
        s.resize(how, &[SIZE - 4096, SIZE]);
        let said = s.good("inc", "INC");
        assert!(said.contains("differ from INC") && !said.contains(SMALLER), "{said}");
        s.plain("inc", "INC");
        // The cluster after the cut is written to: no zeros begin behind the cut.
        s.resize(how, &[3 * MIB + 512, SIZE]);
        s.d.io("a", &[&format!("write -P 5 {} 64k", 3 * MIB + 64 * KIB)]);
        s.smaller("inc", "INC");
        s.plain("inc", "INC");
    }
}

#[test]
fn growing_shrinking_and_growing() {
    let name = "growing_shrinking_and_growing";
    const SIZE: u64 = 8 * MIB + 4096;
    for cluster in ["cluster_size=64k", "cluster_size=2M", "cluster_size=4k"] {
        for how in [How::Live, How::Offline(&[])] {
            let Some(mut s) = Setup::new(name, SIZE, &["-o", cluster]) else { return };
            s.plain("full", "FULL");
            // Never smaller than at the point.
            s.resize(how, &[12 * MIB]);
            s.d.io("a", &[&format!("write -P 2 {SIZE} 3M")]);
            s.resize(how, &[9 * MIB + 512, 12 * MIB]);
            let said = s.good("inc", "INC");
            assert!(!said.contains(SMALLER) && s.has_watermark(), "{said}");
            // The end of the disk at the point, with what comes back behind it.
            s.resize(how, &[SIZE + 512]);
            s.plain("auto", "FULL");
            s.resize(how, &[12 * MIB]);
            assert!(!s.good("inc", "INC").contains(SMALLER));
            s.d.io("a", &["write -P 3 0 12M"]);
            s.plain("inc", "INC");
            s.resize(how, &[5 * MIB + 512, 7 * MIB, 6 * MIB, 16 * MIB]);
            s.d.io("a", &["write -P 4 6M 64k"]);
            s.smaller("inc", "INC");
            s.plain("inc", "INC");
        }
    }
}

#[test]
fn a_diff_is_measured_by_the_fulls_watermark() {
    let Some(mut s) = Setup::new("a_diff_is_measured_by_the_fulls_watermark", 8 * MIB, &[]) else {
        return;
    };
    s.plain("full", "FULL");
    s.d.io("a", &["write -P 2 1M 64k"]);
    s.plain("inc", "INC");
    s.plain("diff", "DIFF");
    s.resize(How::Live, &[6 * MIB, 8 * MIB]);
    s.smaller("diff", "DIFF");
    s.smaller("inc", "INC");
    s.plain("inc", "INC");
    s.d.restart();
    s.smaller("diff", "DIFF");
    s.plain("inc", "INC");
    s.plain("full", "FULL");
    s.plain("diff", "DIFF");
}

/// What proves nothing leads to a walk over the whole disk, and the new point has a watermark again.
#[test]
fn a_watermark_that_proves_nothing() {
    const SIZE: u64 = 20 * MIB;
    let Some(mut s) = Setup::new("a_watermark_that_proves_nothing", SIZE, &[]) else { return };
    s.plain("full", "FULL");
    let remove = |s: &Setup| {
        s.execute("block-dirty-bitmap-remove", json!({"node": "a", "name": s.watermark()}));
    };
    let add = |s: &Setup, granularity: u64, persistent: bool| {
        s.execute(
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": s.watermark(), "granularity": granularity,
                "disabled": true, "persistent": persistent}),
        );
    };
    type Case<'a> = (&'a str, &'a dyn Fn(&Setup));
    let cases: [Case<'_>; 5] = [
        ("it is gone", &|s| remove(s)),
        ("it records", &|s| {
            s.execute("block-dirty-bitmap-enable", json!({"node": "a", "name": s.watermark()}));
        }),
        ("it has another granularity", &|s| {
            remove(s);
            add(s, 4096, true);
        }),
        ("it is not kept in the image", &|s| {
            remove(s);
            add(s, 64 * KIB, false);
        }),
        ("an older version made the point", &|s| {
            remove(s);
            without_watermark(&newest(&s.caller.target, "a.img"));
        }),
    ];
    for (what, change) in cases {
        println!("{what}");
        change(&s);
        s.resize(How::Live, &[15 * MIB, SIZE]);
        let said = s.good("inc", "INC");
        assert!(said.contains(WALKED) && !said.contains(SMALLER), "{what}: {said}");
        assert!(s.has_watermark(), "{what}: {said}");
        s.d.io("a", &[&format!("write -P 1 0 {SIZE}")]);
        s.plain("inc", "INC");
    }
    // One without marks says that the disk was as small as can be.
    remove(&s);
    add(&s, 64 * KIB, true);
    s.smaller("inc", "INC");
    s.plain("inc", "INC");
}

/// The manifest as a version without watermarks for qcow2 wrote it.
fn without_watermark(image: &Path) {
    let mut m = manifest_of(image);
    let all = m.as_object_mut().unwrap();
    all.remove("checksum");
    all["bitmap"].as_object_mut().unwrap().remove("floor");
    let name = format!(".fleecefs/{}.json", image.file_name().unwrap().to_str().unwrap());
    std::fs::write(image.with_file_name(name), m.to_string()).unwrap();
}

/// QEMU reports no zeros where a template has none of its own.
#[test]
fn a_full_over_a_template_takes_what_disk_and_template_hold() {
    let name = "a_full_over_a_template_takes_what_disk_and_template_hold";
    if !have(name, TOOLS) {
        return;
    }
    for cluster in ["cluster_size=64k", "cluster_size=512k,extended_l2=on", "cluster_size=4k"] {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), "base", 64 * MIB, &[]);
        let base = dir.path().join("base.img").display().to_string();
        run("qemu-io", &["-c", "write -P 9 1M 1M", "-c", "write -P 8 40M 64k", &base]);
        create(dir.path(), "a", 64 * MIB, &["-o", cluster, "-b", &base, "-F", "qcow2"]);
        let s = Setup::started(dir);
        s.d.io("a", &["write -P 1 8M 64k", "write -z 1M 64k"]);
        s.plain("full", "FULL");
        assert!(s.stored() < 6000, "{cluster}: {}", s.stored());
        s.d.io("a", &["write -P 2 20M 64k", "write -P 3 1M 512"]);
        s.plain("inc", "INC");
        assert!(s.stored() < 6000, "{cluster}: {}", s.stored());
    }
}

/// A template that is copied into the disk changes nothing that a guest sees.
#[test]
fn a_disk_that_was_streamed_is_not_called_smaller() {
    let name = "a_disk_that_was_streamed_is_not_called_smaller";
    if !have(name, TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), "base", 16 * MIB, &[]);
    let base = dir.path().join("base.img").display().to_string();
    run("qemu-io", &["-c", "write -P 9 1M 1M", &base]);
    create(dir.path(), "a", 16 * MIB, &["-b", &base, "-F", "qcow2"]);
    let s = Setup::started(dir);
    s.d.io("a", &["write -P 1 4M 1M"]);
    s.plain("full", "FULL");
    let mut qmp = s.d.qmp();
    qmp.execute("block-stream", json!({"device": "a", "job-id": "their-stream"}));
    while qmp.execute("query-jobs", json!({})) != json!([]) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop(qmp);
    s.d.io("a", &["write -P 2 8M 64k"]);
    s.plain("inc", "INC");
    assert!(s.stored() < 600, "{}", s.stored());
    // Nor by a walk.
    s.execute("block-dirty-bitmap-remove", json!({"node": "a", "name": s.watermark()}));
    s.plain("inc", "INC");
}

/// What came from an NBD server, in bytes.
struct Counted {
    path: PathBuf,
    bytes: Arc<AtomicU64>,
}

impl Counted {
    /// Listens at `path` and passes all on to `real`.
    fn new(path: PathBuf, real: PathBuf) -> Self {
        let (listener, bytes) = (UnixListener::bind(&path).unwrap(), Arc::<AtomicU64>::default());
        let count = bytes.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&real) else { continue };
                let (a, b) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let count = count.clone();
                std::thread::spawn(move || pass(a, b, &AtomicU64::new(0)));
                std::thread::spawn(move || pass(server, client, &count));
            }
        });
        Counted { path, bytes }
    }

    /// What came since the last question.
    fn taken(&self) -> u64 {
        self.bytes.swap(0, Ordering::SeqCst)
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, count: &AtomicU64) {
    let mut buf = [0; 65536];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        count.fetch_add(n as u64, Ordering::SeqCst);
        if to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// A disk of `extents` extents of data, as many holes, and a few writes: bytes that come over NBD for an
/// INC.
fn bytes_for_an_inc(extents: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let size = 64 * MIB;
    create(dir.path(), "a", size, &["-o", "cluster_size=4k"]);
    let step = size / extents;
    let path = dir.path().join("a.img").display().to_string();
    let ops = (0..extents).map(|i| format!("write -P {} {} 4k", 1 + i % 250, i * step));
    let ops: Vec<String> = ops.collect();
    for part in ops.chunks(500) {
        images::qemu_io(Path::new(&path), part);
    }
    let mut s = Setup::started(dir);
    let counted = Counted::new(s.d.path("counted.sock"), s.d.path("nbd.sock"));
    s.caller.more = vec!["--nbd".into(), counted.path.display().to_string()];
    let run = |level: &str| {
        let mut command = s.caller.command(level);
        let out = command.env_remove("FLEECEFS_WALK").output().unwrap();
        assert!(out.status.success(), "{out:?}");
        counted.taken()
    };
    run("full");
    s.d.io("a", &["write -P 3 1M 1M", "write -P 3 40M 1M"]);
    let bytes = run("inc");
    // Without a watermark all of the disk has to be asked for.
    s.execute("block-dirty-bitmap-remove", json!({"node": "a", "name": s.watermark()}));
    let walk = run("inc");
    assert!(walk > bytes + 8 * extents, "{extents} extents: {bytes}, and {walk} by a walk");
    s.plain("inc", "INC");
    bytes
}

#[test]
fn an_inc_asks_no_more_of_a_disk_with_more_extents() {
    let name = "an_inc_asks_no_more_of_a_disk_with_more_extents";
    if !have(name, TOOLS) {
        return;
    }
    let (few, many) = (bytes_for_an_inc(300), bytes_for_an_inc(3000));
    println!("{few} bytes for 300 extents, {many} for 3000");
    assert!(many * 10 <= few * 12, "{few} and {many}");
}
