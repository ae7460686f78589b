//! A night of thirty VMs, one of which is dead, one hangs, and one has a disk that is broken: what comes of the others,
//! and what it takes.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::backup::{images, leftovers};
use crate::support::checked::daemon;
use crate::support::guard::tied;
use crate::support::process::{Stopped, signal};
use crate::support::qemu::storage_daemon::Daemon;
use crate::support::tools::have;

const TOOLS: &[&str] = &["qemu-storage-daemon", "qemu-img", "qemu-io"];
const VMS: usize = 30;
const DEAD: usize = 7;
const HUNG: usize = 13;
const BROKEN: usize = 21;
/// What all processes of the night together may have in memory.
const MOST_MEMORY: u64 = 256 << 20;

/// A disk of which a sector cannot be read.
const BAD: &str = "driver=raw,file.driver=blkdebug,file.inject-error.0.event=none,\
                   file.inject-error.0.iotype=read,file.inject-error.0.sector=4096";

/// Resident bytes of each process that is there, and its parent.
fn processes() -> HashMap<u32, (u32, u64)> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let text = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        if let Some(parent) = field("PPid:") {
            // (Of a process that is ending there is no more.)
            let kib = field("VmRSS:").unwrap_or(0);
            found.insert(pid, (u32::try_from(parent).unwrap(), kib << 10));
        }
    }
    found
}

/// What a process and all below it have in memory.
fn memory(root: u32) -> u64 {
    let all = processes();
    let is_below = |mut pid: u32| {
        // No tree is deeper; one that changes while it is read may look like a circle.
        for _ in 0..20 {
            match all.get(&pid) {
                _ if pid == root => return true,
                Some((parent, _)) => pid = *parent,
                None => return false,
            }
        }
        false
    };
    all.iter().filter(|(pid, _)| is_below(**pid)).map(|(_, (_, bytes))| bytes).sum()
}

/// The most that was seen of the night's memory until it ended, while its output is read elsewhere.
fn watched(night: &mut Child) -> u64 {
    let (mut most, end) = (0, Instant::now() + Duration::from_secs(900));
    while night.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "the night does not end");
        most = most.max(memory(night.id()));
        std::thread::sleep(Duration::from_millis(10));
    }
    most
}

#[test]
fn a_dead_one_a_hung_one_and_a_broken_disk_among_thirty() {
    if !have("a_dead_one_a_hung_one_and_a_broken_disk_among_thirty", TOOLS) {
        return;
    }
    let daemons: Vec<Daemon> =
        (0..VMS).map(|n| daemon(if n == BROKEN { &[("b", BAD)] } else { &[] })).collect();
    signal(daemons[DEAD].pid(), libc::SIGKILL);
    let hung = Stopped::new(daemons[HUNG].pid());
    let dir = tempfile::tempdir().unwrap();
    let mut text = format!("[defaults]\ntarget = \"{}/{{vm}}\"\n", dir.path().display());
    for (n, d) in daemons.iter().enumerate() {
        text += &format!("[vms.vm{n:02}]\nqmp = \"{}\"\n", d.path("qmp.sock").display());
    }
    let config = dir.path().join("fleecefs.toml");
    std::fs::write(&config, text).unwrap();
    let out = dir.path().join("summary");
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(["backup", "--all", "--json", "--parallel", "4", "--config-file"]).arg(&config);
    c.arg("--state-dir").arg(dir.path().join("state")).env_remove("FLEECEFS_STATE_DIR");
    c.stdout(std::fs::File::create(&out).unwrap()).stderr(Stdio::null());
    let began = Instant::now();
    let mut night = tied(&mut c).spawn().unwrap();
    let most = watched(&mut night);
    let took = began.elapsed();
    drop(hung);
    let status = night.wait().unwrap();
    println!("thirty VMs: {:.1} s, at most {} MiB", took.as_secs_f64(), most >> 20);
    assert_eq!((status.code(), status.signal()), (Some(16), None));
    assert!((1..MOST_MEMORY).contains(&most), "{most} bytes");
    let printed: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let rows = printed["vms"].as_array().unwrap();
    assert_eq!(rows.len(), VMS);
    for (n, row) in rows.iter().enumerate() {
        assert_eq!(row["vm"], format!("vm{n:02}"));
        let points = images(&dir.path().join(format!("vm{n:02}/a.img"))).len();
        let (result, made) = match n {
            DEAD => ("skipped", 0),
            HUNG => ("failed", 0),
            BROKEN => ("failed", 1),
            _ => ("ok", 1),
        };
        assert_eq!((&row["result"], points), (&result.into(), made), "{row:#}");
        assert_eq!(row["points"].as_array().unwrap().len(), made, "{row:#}");
    }
    assert!(rows[DEAD]["skipped"].as_str().unwrap().contains("shut off"), "{:#}", rows[DEAD]);
    let why = |n: usize| rows[n]["failures"][0]["message"].as_str().unwrap().to_string();
    assert!(why(HUNG).contains("does not answer"), "{}", why(HUNG));
    assert_eq!(rows[BROKEN]["failures"][0]["exit_code"], 16, "{}", why(BROKEN));
    // Each good one's point is what its disk holds, and nothing is left over.
    for n in (0..VMS).filter(|n| ![DEAD, HUNG].contains(n)) {
        let target = dir.path().join(format!("vm{n:02}"));
        assert_eq!(leftovers(&target), Vec::<std::path::PathBuf>::new(), "{n}");
        let point = images(&target.join("a.img")).remove(0);
        let (point, disk) = (point.display().to_string(), daemons[n].uri("a"));
        crate::support::tools::run(
            "qemu-img",
            &["compare", "-U", "-f", "qcow2", "-F", "raw", &point, &disk],
        );
    }
}
