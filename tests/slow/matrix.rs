//! Every feature of the formats, as chains of 2 to 6 points: the bytes through a real mount equal
//! `qemu-img convert` over a copy linked by `rebase -u`, and the map equals `qemu-img map`.

use std::path::Path;
use std::process::Command;

use crate::support::guard::Guard;
use crate::support::images::{self, Chain, Oracle, Rng, first_difference, qemu_io};
use crate::support::mount::Mount;
use crate::support::tools::{self, run};
use fleecefs::manifest;
use serde_json::Value;

/// One chain of the matrix.
struct Case {
    name: String,
    /// Image options of the FULL and of each INC (cycled).
    full: String,
    incs: Vec<String>,
    /// Disk sizes, cycled over the points.
    sizes: Vec<u64>,
    twist: Twist,
}

/// What is special about a chain beside its image options.
#[derive(Clone, Copy, PartialEq)]
enum Twist {
    None,
    /// Compressed writes in INCs.
    CompressedWrites,
    /// The FULL goes through `qemu-img convert -c`, which packs clusters tightly.
    PackedFull,
    /// Internal snapshots in the FULL.
    Snapshots,
    /// Persistent bitmaps in every image.
    Bitmaps,
    /// Images that were not closed cleanly.
    Dirty,
    /// A raw FULL below qcow2 INCs.
    RawFull,
    /// Zero writes, aligned and not, over data.
    Zeroes,
    /// No data at all.
    Empty,
    /// The FULL is resized in place after data was written.
    ResizedInPlace,
}

const MIB: u64 = 1 << 20;

fn case(name: &str, full: &str, inc: &str, sizes: &[u64], twist: Twist) -> Case {
    Case {
        name: name.into(),
        full: full.into(),
        incs: vec![inc.into()],
        sizes: sizes.to_vec(),
        twist,
    }
}

fn cases() -> Vec<Case> {
    use Twist::*;
    let mut all = Vec::new();
    let plain = [8 * MIB];
    for cs in
        ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M", "2M"]
    {
        let o = format!("cluster_size={cs}");
        all.push(case(&format!("cluster-{cs}"), &o, &o, &plain, None));
        let z = format!("cluster_size={cs},compression_type=zstd");
        all.push(case(&format!("zstd-{cs}"), &z, &z, &plain, CompressedWrites));
    }
    for cs in ["512", "4k", "64k", "2M"] {
        let o = format!("cluster_size={cs}");
        all.push(case(&format!("zlib-{cs}"), &o, &o, &[8 * MIB - 512], CompressedWrites));
        all.push(case(&format!("packed-{cs}"), &o, &o, &plain, PackedFull));
        let v2 = format!("cluster_size={cs},compat=0.10");
        all.push(case(&format!("v2-{cs}"), &v2, &v2, &plain, None));
        all.push(case(&format!("v2-below-v3-{cs}"), &v2, &o, &plain, None));
    }
    for cs in ["16k", "64k", "512k", "2M"] {
        let o = format!("cluster_size={cs},extended_l2=on");
        all.push(case(&format!("subclusters-{cs}"), &o, &o, &plain, None));
        all.push(case(&format!("subclusters-zeroes-{cs}"), &o, &o, &[8 * MIB + 1536], Zeroes));
        all.push(case(&format!("subclusters-compressed-{cs}"), &o, &o, &plain, CompressedWrites));
    }
    for bits in ["1", "2", "4", "8", "32", "64"] {
        let o = format!("refcount_bits={bits}");
        all.push(case(&format!("refcount-{bits}"), &o, &o, &plain, None));
    }
    for kind in ["metadata", "falloc", "full"] {
        let o = format!("preallocation={kind}");
        all.push(case(&format!("preallocation-{kind}"), &o, "", &plain, None));
    }
    all.push(case(
        "prealloc-subclusters",
        "extended_l2=on,preallocation=metadata",
        "",
        &plain,
        None,
    ));
    all.push(case("lazy", "lazy_refcounts=on", "lazy_refcounts=on", &plain, None));
    all.push(case("dirty", "lazy_refcounts=on", "lazy_refcounts=on", &plain, Dirty));
    all.push(case("grow", "", "", &[3 * MIB, 5 * MIB + 512, 9 * MIB], None));
    all.push(case("shrink", "", "", &[9 * MIB, 5 * MIB + 512, 3 * MIB], None));
    all.push(case("shrink-grow", "", "cluster_size=4k", &[8 * MIB, 2 * MIB, 8 * MIB], None));
    all.push(case("odd-size", "", "", &[5 * MIB + 512], Zeroes));
    all.push(case("one-sector", "", "", &[512], None));
    all.push(case("one-cluster", "", "", &[65536], None));
    all.push(case("zeroes", "", "", &plain, Zeroes));
    all.push(case("empty", "", "", &plain, Empty));
    all.push(case("snapshots", "", "", &plain, Snapshots));
    all.push(case("bitmaps", "", "", &plain, Bitmaps));
    all.push(case("raw-full", "", "cluster_size=4k", &[6 * MIB], RawFull));
    all.push(case("raw-full-grows", "", "", &[3 * MIB, 6 * MIB], RawFull));
    all.push(case("resized", "", "", &[6 * MIB], ResizedInPlace));
    let mixed = ["cluster_size=512", "cluster_size=2M", "cluster_size=16k,extended_l2=on"];
    let mut case = case("mixed", "cluster_size=4k", "", &plain, CompressedWrites);
    case.incs = mixed.map(String::from).to_vec();
    all.push(case);
    all
}

/// Random writes for one point, in qemu-io's words.
fn ops(rng: &mut Rng, case: &Case, size: u64, options: &str) -> Vec<String> {
    let v2 = options.contains("compat=0.10");
    let cluster = cluster_size(options);
    let mut ops = Vec::new();
    let mut taken = std::collections::HashSet::new();
    let count = if case.twist == Twist::Empty { 0 } else { 3 + rng.below(12) };
    for _ in 0..count {
        let (at, len) = rng.range(size, 512);
        let byte = 1 + rng.below(255);
        let clusters = at / cluster..(at + len).div_ceil(cluster);
        // QEMU 10.0.2 corrupts an image of small clusters when compressed writes mix with discards or
        // zero writes over them.
        let compressed = case.twist == Twist::CompressedWrites;
        match rng.below(if case.twist == Twist::Zeroes { 3 } else { 8 }) {
            0 if !compressed => ops.push(format!("write -z {at} {len}")),
            1 if !v2 && case.twist == Twist::Zeroes => ops.push(format!("write -z -u {at} {len}")),
            3 if !v2 && !compressed => ops.push(format!("discard {at} {len}")),
            4..=7 if compressed && size >= cluster => {
                let at = rng.below(size / cluster);
                if taken.insert(at) {
                    ops.push(format!("write -c -P {byte} {} {cluster}", at * cluster));
                }
                continue;
            }
            _ if compressed && clusters.clone().any(|c| taken.contains(&c)) => continue,
            _ => ops.push(format!("write -P {byte} {at} {len}")),
        }
        taken.extend(clusters);
    }
    ops
}

fn cluster_size(options: &str) -> u64 {
    let value = options.split(',').find_map(|o| o.strip_prefix("cluster_size="));
    fleecefs::units::parse_bytes(value.unwrap_or("64k")).unwrap()
}

fn build(parent: &Path, case: &Case, seed: u64) -> Chain {
    let mut rng = Rng(seed);
    let mut chain = Chain::new(parent, &case.name);
    if case.twist == Twist::RawFull {
        chain = chain.without_extension();
    }
    let points = 2 + rng.below(5).max(case.sizes.len() as u64 - 1) as usize;
    for i in 0..points {
        let size = case.sizes[i.min(case.sizes.len() - 1)];
        let options = if i == 0 { &case.full } else { &case.incs[(i - 1) % case.incs.len()] };
        let ops = ops(&mut rng, case, size, options);
        if i == 0 && case.twist == Twist::RawFull {
            raw_full(&chain.next_path(), size, &ops);
            continue;
        }
        let path = chain.point(options, size, &ops);
        twist(case.twist, &path, i, size);
    }
    chain.finish()
}

/// A raw FULL. Its manifest says that it is one: below qcow2 increments, a FULL without qcow2's
/// magic bytes would else be taken for a damaged image.
fn raw_full(path: &Path, size: u64, ops: &[String]) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
    qemu_io(path, ops);
    let manifest = serde_json::json!({
        "format_version": 1, "run": "test", "level": "full", "format": "raw", "content": "full",
        "image": path.file_name().unwrap().to_str().unwrap(),
        "time": 1_700_003_600, "virtual_size": size, "file_size": size,
    });
    let manifest = manifest::parse(manifest.to_string().as_bytes()).unwrap();
    manifest::write(path.parent().unwrap(), &manifest).unwrap();
}

fn twist(twist: Twist, path: &Path, point: usize, size: u64) {
    let p = path.to_str().unwrap();
    match twist {
        Twist::PackedFull if point == 0 => {
            let packed = path.with_extension("packed");
            let to = packed.to_str().unwrap();
            run("qemu-img", &["convert", "-q", "-c", "-f", "qcow2", "-O", "qcow2", p, to]);
            std::fs::rename(&packed, path).unwrap();
        }
        Twist::Snapshots if point == 0 => {
            run("qemu-img", &["snapshot", "-c", "before", p]);
            qemu_io(path, &[format!("write -P 77 0 {}", size / 2)]);
            run("qemu-img", &["snapshot", "-c", "after", p]);
            qemu_io(path, &["write -z 4096 8192".into()]);
        }
        Twist::Bitmaps => {
            run("qemu-img", &["bitmap", "--add", "-g", "65536", p, "b0"]);
            run("qemu-img", &["bitmap", "--add", "-g", "4096", p, "b1"]);
        }
        Twist::Dirty => {
            // An abort leaves the dirty flag; the process does not end well on purpose.
            let args = ["-f", "qcow2", "-c", "write -P 99 0 64k", "-c", "abort", p];
            let _ = Command::new("qemu-io").args(args).output().unwrap();
        }
        Twist::ResizedInPlace if point == 0 => {
            run("qemu-img", &["resize", "-q", "--shrink", p, &(size / 2).to_string()]);
            run("qemu-img", &["resize", "-q", p, &size.to_string()]);
        }
        _ => {}
    }
}

/// In two halves, so that they run at the same time.
#[test]
fn bytes_and_maps_equal_qemus_for_even_chains() {
    bytes_and_maps_equal_qemus("bytes_and_maps_equal_qemus_for_even_chains", 0);
}

#[test]
fn bytes_and_maps_equal_qemus_for_odd_chains() {
    bytes_and_maps_equal_qemus("bytes_and_maps_equal_qemus_for_odd_chains", 1);
}

fn bytes_and_maps_equal_qemus(test: &str, half: u64) {
    let tools = ["qemu-img", "qemu-io", "/dev/fuse"];
    if !tools::have(test, &tools) {
        return;
    }
    let dir = images::tempdir();
    let cases = cases();
    assert!(cases.len() >= 60, "{} chains", cases.len());
    let mine: Vec<(&Case, u64)> = cases.iter().zip(1..).filter(|(_, n)| n % 2 == half).collect();
    let chains: Vec<Chain> = mine.iter().map(|(c, seed)| build(dir.path(), c, *seed)).collect();
    let mount = Mount::new(dir.path());
    let targets = Targets::new();
    let mut wrong = Vec::new();
    for ((case, _), chain) in mine.iter().zip(&chains) {
        let oracle = Oracle::new(&chain.files);
        for (i, file) in chain.files.iter().enumerate() {
            let shown = mount.point(&chain.name, file);
            let right = oracle.bytes(i);
            let difference = match std::fs::read(&shown) {
                Ok(bytes) => first_difference(&bytes, &right),
                Err(e) => Some(e.to_string()),
            };
            if let Some(d) = difference {
                wrong.push(format!("{} point {i}: bytes differ {d}", case.name));
            }
            // Restored, the last point of each chain is the same in every kind of target.
            if i + 1 == chain.files.len() {
                for d in targets.differences(dir.path(), chain, file, &right) {
                    wrong.push(format!("{} point {i}: {d}", case.name));
                }
            }
            if let Some(d) = map_difference(&ours(dir.path(), chain, file), &oracle.map(i), &right)
            {
                wrong.push(format!("{} point {i}: {d}", case.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}

/// Where points are restored to: files, and a loop device where we may have one.
struct Targets {
    dir: tempfile::TempDir,
    device: Option<Guard>,
}

/// As large as the largest disk of the matrix, and then some.
const DEVICE: u64 = 16 * MIB;

impl Targets {
    fn device(&self) -> Option<&Path> {
        self.device.as_ref().map(Guard::made)
    }

    fn new() -> Self {
        let dir = images::tempdir();
        // SAFETY: geteuid has no preconditions.
        let root = unsafe { libc::geteuid() } == 0;
        assert!(root || std::env::var_os("CI").is_none(), "a loop device needs root");
        let device = (root && tools::have("matrix (loop device)", &["losetup"])).then(|| {
            let file = dir.path().join("device");
            std::fs::File::create(&file).unwrap().set_len(DEVICE).unwrap();
            Guard::attach("", &file)
        });
        if device.is_none() {
            println!("skipped: matrix (loop device) needs root");
        }
        Targets { dir, device }
    }

    fn differences(&self, dir: &Path, chain: &Chain, file: &Path, right: &[u8]) -> Vec<String> {
        let point = Path::new(&chain.name).join(file.file_name().unwrap());
        let (raw, qcow2) = (self.dir.path().join("r.raw"), self.dir.path().join("r.qcow2"));
        let mut found = Vec::new();
        let all = [Some(raw.as_path()), Some(qcow2.as_path()), self.device()];
        for target in all.into_iter().flatten() {
            let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
            command.args(["-q", "restore", "--force", "--yes"]).args([dir, &point, target]);
            let out = command.output().unwrap();
            if !out.status.success() {
                found.push(format!("restore: {}", String::from_utf8_lossy(&out.stderr)));
                continue;
            }
            if target == qcow2 {
                let q = qcow2.to_str().unwrap();
                run("qemu-img", &["check", "-q", "-f", "qcow2", q]);
                let to = raw.to_str().unwrap();
                run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", q, to]);
            }
            let from = if target == qcow2 { &raw } else { target };
            let mut got = std::fs::read(from).unwrap();
            if Some(from) == self.device() {
                got.truncate(right.len());
            }
            if let Some(d) = first_difference(&got, right) {
                found.push(format!("restored to {}: {d}", target.display()));
            }
        }
        found
    }
}

fn ours(dir: &Path, chain: &Chain, file: &Path) -> Value {
    let point = Path::new(&chain.name).join(file.file_name().unwrap());
    let args = [Path::new("map"), Path::new("--output=json"), dir, &point];
    let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// One row of a map, of ours or QEMU's.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    start: u64,
    end: u64,
    depth: Option<u64>,
    compressed: bool,
    hole: bool,
    offset: Option<u64>,
}

fn rows(map: &Value) -> Vec<Row> {
    let row = |row: &Value| {
        let number = |k: &str| row[k].as_u64();
        let flag = |k: &str| row[k].as_bool().unwrap();
        let hole = flag("zero") || !flag("data");
        let start = number("start").unwrap();
        Row {
            start,
            end: start + number("length").unwrap(),
            depth: number("depth").filter(|_| flag("present")),
            compressed: flag("compressed"),
            hole,
            // QEMU also tells where a zero cluster would have its data.
            offset: number("offset").filter(|_| !hole),
        }
    };
    map.as_array().unwrap().iter().map(row).collect()
}

/// Where the maps disagree. One may call a hole what the other calls data, as long as it is zeros:
/// QEMU looks for holes inside clusters only in images that seem to be preallocated.
fn map_difference(ours: &Value, qemu: &Value, bytes: &[u8]) -> Option<String> {
    let (ours, qemus) = (rows(ours), rows(qemu));
    let at = |map: &[Row], start: u64| {
        let row = map[map.partition_point(|r| r.end <= start)].clone();
        let offset = row.offset.map(|o| o + (start - row.start));
        Row { start, offset, ..row }
    };
    let mut starts: Vec<u64> = ours.iter().chain(&qemus).map(|r| r.start).collect();
    starts.sort_unstable();
    starts.dedup();
    for start in starts {
        let (mut a, mut b) = (at(&ours, start), at(&qemus, start));
        let end = a.end.min(b.end);
        (a.end, b.end) = (end, end);
        let is_zero = bytes[start as usize..end as usize].iter().all(|b| *b == 0);
        if a.hole != b.hole && is_zero {
            (a.hole, a.offset) = (b.hole, b.offset);
        }
        if a != b {
            return Some(format!("the maps differ: ours {a:x?}, QEMU's {b:x?}"));
        }
    }
    (ours.last()?.end != qemus.last()?.end).then(|| "the maps end elsewhere".to_string())
}
