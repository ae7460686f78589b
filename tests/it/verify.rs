//! `verify` finds every kind of damage, names the file, and raises no false alarm.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::images::{Chain, Rng, qemu_io};
use crate::support::tools::{self, run};
use serde_json::Value;

const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];
const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 65536;

const SOUND: i32 = 0;
const UNSOUND: i32 = 18;
const UNPROVEN: i32 = 19;

/// A disk of a FULL and three INCs, with plain and compressed clusters in each.
fn chain(parent: &Path, name: &str, seed: u64) -> Chain {
    let mut chain = Chain::new(parent, name);
    let mut rng = Rng(seed);
    for point in 0..4 {
        let ops: Vec<String> = (0..24)
            .map(|i| {
                let at = (i * 4 + rng.below(4)) * CLUSTER;
                let c = if i % 3 == 0 { "-c " } else { "" };
                format!("write {c}-P {} {at} {CLUSTER}", 1 + point * 50 + i)
            })
            .collect();
        chain.point("", SIZE, &ops);
    }
    chain.finish()
}

fn verify(dir: &Path, args: &[&str]) -> (i32, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = command.args(["-q", "verify", "--json"]).args(args).arg(dir).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|e| {
        panic!("{e}: {text}\n{}", String::from_utf8_lossy(&out.stderr));
    });
    (out.status.code().unwrap(), report)
}

/// All findings of severity error: file and message.
fn errors(report: &Value) -> Vec<(PathBuf, String)> {
    let own =
        report["points"].as_array().unwrap().iter().flat_map(|p| p["findings"].as_array().unwrap());
    own.chain(report["findings"].as_array().unwrap())
        .filter(|f| f["severity"] == "error")
        .map(|f| (f["path"].as_str().unwrap().into(), f["message"].to_string()))
        .collect()
}

/// The outcomes of the points, in order.
fn outcomes(report: &Value) -> Vec<&str> {
    let points = report["points"].as_array().unwrap().iter();
    points.map(|p| p["outcome"].as_str().unwrap()).collect()
}

fn create(dir: &Path) {
    let (code, report) = verify(dir, &["--create"]);
    assert_eq!(code, SOUND, "{report:#}");
}

/// Offsets in an image: what a flipped bit may hit.
struct Places {
    l1: u64,
    l2: u64,
    refcounts: u64,
    /// L2 entries that are in use: their offset in the file, and themselves.
    entries: Vec<(u64, u64)>,
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

impl Places {
    fn of(path: &Path) -> Self {
        let b = std::fs::read(path).unwrap();
        let l1 = be64(&b, 40);
        let l2 = be64(&b, l1) & 0x00ff_ffff_ffff_fe00;
        let refcounts = be64(&b, be64(&b, 48));
        let entries = (0..SIZE / CLUSTER).map(|i| l2 + i * 8);
        let entries = entries.map(|at| (at, be64(&b, at))).filter(|e| e.1 != 0).collect();
        Places { l1, l2, refcounts, entries }
    }

    fn plain(&self) -> (u64, u64) {
        let (at, e) = *self.entries.iter().find(|e| e.1 >> 62 & 1 == 0).unwrap();
        (at, e & 0x00ff_ffff_ffff_fe00)
    }

    fn compressed(&self) -> u64 {
        let (_, e) = *self.entries.iter().find(|e| e.1 >> 62 & 1 != 0).unwrap();
        e & ((1 << 54) - 1)
    }
}

fn flip(path: &Path, at: u64, bit: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at as usize] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
}

fn manifest(image: &Path) -> PathBuf {
    let name = format!("{}.json", image.file_name().unwrap().to_str().unwrap());
    image.parent().unwrap().join(".fleecefs").join(name)
}

/// One way of damaging the chain of files; returns the file that must be named.
struct Damage {
    name: &'static str,
    /// The exit code without manifests.
    bare: i32,
    apply: fn(&Chain, &Path) -> PathBuf,
}

/// A flip in the second INC.
fn flip_in(c: &Chain, place: impl Fn(&Places) -> (u64, u8)) -> PathBuf {
    let (at, bit) = place(&Places::of(&c.files[2]));
    flip(&c.files[2], at, bit);
    c.files[2].clone()
}

fn swap(a: &Path, b: &Path) {
    let t = a.with_extension("swap");
    std::fs::rename(a, &t).unwrap();
    std::fs::rename(b, a).unwrap();
    std::fs::rename(&t, b).unwrap();
}

fn damages() -> Vec<Damage> {
    let d = |name, bare, apply| Damage { name, bare, apply };
    vec![
        d("header: cluster_bits", UNSOUND, |c, _| flip_in(c, |_| (23, 5))),
        d("header: backing file name's length", UNPROVEN, |c, _| flip_in(c, |_| (19, 0))),
        d("L1: offset", UNSOUND, |c, _| flip_in(c, |p| (p.l1 + 5, 6))),
        d("L1: reserved bit", UNSOUND, |c, _| flip_in(c, |p| (p.l1 + 7, 1))),
        d("L2: offset past the end", UNSOUND, |c, _| flip_in(c, |p| (p.plain().0 + 3, 0))),
        d("L2: offset to another cluster", UNSOUND, |c, _| flip_in(c, |p| (p.plain().0 + 5, 0))),
        d("L2: alignment", UNSOUND, |c, _| flip_in(c, |p| (p.plain().0 + 6, 3))),
        d("L2: zero flag", UNPROVEN, |c, _| flip_in(c, |p| (p.plain().0 + 7, 0))),
        d("L2: an unused entry", UNSOUND, |c, _| {
            flip_in(c, |p| {
                let used = |at: u64| p.entries.iter().any(|e| e.0 == at);
                let free = (0..SIZE / CLUSTER).map(|i| p.l2 + i * 8).find(|at| !used(*at));
                (free.unwrap() + 5, 3)
            })
        }),
        d("refcount block", UNSOUND, |c, _| {
            flip_in(c, |p| (p.refcounts + 2 * (p.plain().1 / CLUSTER) + 1, 0))
        }),
        d("data", UNPROVEN, |c, _| flip_in(c, |p| (p.plain().1 + 1000, 4))),
        d("compressed data", UNSOUND, |c, _| flip_in(c, |p| (p.compressed(), 1))),
        d("cut file", UNSOUND, |c, _| {
            let f = std::fs::OpenOptions::new().write(true).open(&c.files[2]).unwrap();
            f.set_len(Places::of(&c.files[2]).plain().1 + 100).unwrap();
            c.files[2].clone()
        }),
        d("missing middle INC", UNPROVEN, |c, _| {
            std::fs::remove_file(&c.files[2]).unwrap();
            c.files[2].clone()
        }),
        d("swapped INCs", UNPROVEN, |c, _| {
            swap(&c.files[1], &c.files[2]);
            c.files[1].clone()
        }),
        d("INC of another disk", UNPROVEN, |c, other| {
            std::fs::copy(other, &c.files[2]).unwrap();
            c.files[2].clone()
        }),
        d("FULL written to", UNPROVEN, |c, _| {
            qemu_io(&c.files[0], &["write -P 9 65536 4096".into()]);
            c.files[0].clone()
        }),
    ]
}

/// A chain whose points have manifests, unless a tool that `test` needs is missing.
fn recorded(test: &str, seed: u64) -> Option<(tempfile::TempDir, Chain)> {
    tools::have(test, &TOOLS).then(|| {
        let dir = tempfile::tempdir().unwrap();
        let c = chain(dir.path(), "sda", seed);
        create(dir.path());
        (dir, c)
    })
}

#[test]
fn every_damage_is_found() {
    if !tools::have("every_damage_is_found", &TOOLS) {
        return;
    }
    let mut wrong = Vec::new();
    for damage in damages() {
        for manifests in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let c = chain(dir.path(), "sda", 1);
            let aside = tempfile::tempdir().unwrap();
            let other = chain(aside.path(), "sda", 2);
            if manifests {
                create(dir.path());
            }
            let culprit = (damage.apply)(&c, &other.files[2]);
            let (code, report) = verify(dir.path(), &[]);
            let named = errors(&report).iter().any(|(f, _)| *f == culprit);
            let expected = if manifests { UNSOUND } else { damage.bare };
            if code != expected || (code == UNSOUND && !named) {
                wrong.push(format!(
                    "{} ({manifests}): {code}, named {named}: {:?}",
                    damage.name,
                    errors(&report)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn points_below_the_damage_stay_sound() {
    if !tools::have("points_below_the_damage_stay_sound", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 3);
    chain(dir.path(), "sdb", 4);
    create(dir.path());
    flip_in(&c, |p| (p.plain().1, 0));
    let (_, report) = verify(dir.path(), &[]);
    let sound = ["sound"; 4];
    assert_eq!(outcomes(&report)[..4], ["sound", "sound", "unsound", "unsound"]);
    assert_eq!(outcomes(&report)[4..], sound);
    let since = report["points"][3]["time"].as_str().unwrap().to_string();
    // Only what is asked for.
    let name = |i: usize| c.files[i].file_name().unwrap().to_str().unwrap().to_string();
    let (code, report) = verify(dir.path(), &["--point", &name(1)]);
    assert_eq!((code, outcomes(&report).len()), (SOUND, 1));
    let (code, _) = verify(dir.path(), &["--point", &name(3)]);
    assert_eq!(code, UNSOUND);
    // What is older than asked for is not read.
    let (code, report) = verify(dir.path(), &["--since", &since]);
    assert_eq!((code, outcomes(&report)), (SOUND, vec!["sound"; 2]), "{report:#}");
}

/// A file of another length than its manifest says is told at once: what has grown by terabytes of
/// zeros is not hashed to say so.
#[test]
fn a_file_of_another_length_is_not_hashed() {
    let Some((dir, c)) = recorded("a_file_of_another_length_is_not_hashed", 5) else { return };
    let resize = |path: &Path, len: u64| {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
    };
    for by in [-1, 1, 1 << 40] {
        for image in &c.files[..2] {
            let len = std::fs::metadata(image).unwrap().len();
            let kept = std::fs::read(image).unwrap();
            resize(image, len.checked_add_signed(by).unwrap());
            for args in [&[][..], &["--create"]] {
                let (code, report) = verify(dir.path(), args);
                assert_eq!(code, UNSOUND, "{by}: {report:#}");
                let told = errors(&report);
                let says = |text: &str| told.iter().any(|(f, m)| f == image && m.contains(text));
                assert!(says(&format!("its manifest says {len}")), "{by}: {told:?}");
                assert!(!says("BLAKE3"), "{by}: {told:?}");
            }
            std::fs::write(image, kept).unwrap();
        }
    }
    assert_eq!(verify(dir.path(), &[]).0, SOUND);
}

#[test]
fn a_flipped_bit_in_a_manifest_is_found() {
    let Some((dir, c)) = recorded("a_flipped_bit_in_a_manifest_is_found", 5) else { return };
    let path = manifest(&c.files[1]);
    let good = std::fs::read(&path).unwrap();
    let mut rng = Rng(6);
    for _ in 0..40 {
        let at = rng.below(good.len() as u64);
        let bit = rng.below(8) as u8;
        flip(&path, at, bit);
        let (code, _) = verify(dir.path(), &["--quick"]);
        assert!([UNSOUND, UNPROVEN].contains(&code), "byte {at} bit {bit}: {code}");
        std::fs::write(&path, &good).unwrap();
    }
    assert_eq!(verify(dir.path(), &["--quick"]).0, SOUND);
}

#[test]
fn a_manifest_changed_by_hand_gets_its_checksum_again() {
    let Some((dir, c)) = recorded("a_manifest_changed_by_hand_gets_its_checksum_again", 9) else {
        return;
    };
    let path = manifest(&c.files[1]);
    let good = std::fs::read_to_string(&path).unwrap();
    let open =
        good.lines().filter(|l| !l.contains("\"checksum\": ")).collect::<Vec<_>>().join("\n");
    let open = open.replace(",\n}", "\n}");
    // With another file's hash the point is unsound, and stays it.
    let hash = good.lines().find(|l| l.contains("\"blake3\": ")).unwrap();
    let wrong = hash.replace(['0', '1'], "2");
    assert_ne!(hash, wrong);
    std::fs::write(&path, open.replace(hash, &wrong)).unwrap();
    assert_eq!(verify(dir.path(), &["--create"]).0, UNSOUND);
    std::fs::write(&path, &open).unwrap();
    assert_eq!(verify(dir.path(), &[]).0, UNPROVEN);
    create(dir.path());
    assert_eq!(verify(dir.path(), &[]).0, SOUND);
    assert!(std::fs::read_to_string(&path).unwrap().contains("\"checksum\": "));
}

#[test]
fn files_mixed_up_with_their_manifests_are_found() {
    let Some((dir, c)) = recorded("files_mixed_up_with_their_manifests_are_found", 7) else {
        return;
    };
    // Swapped with their manifests: each manifest is of another image than its name says.
    swap(&c.files[1], &c.files[2]);
    swap(&manifest(&c.files[1]), &manifest(&c.files[2]));
    assert_eq!(verify(dir.path(), &["--quick"]).0, UNSOUND);
    // An INC without a manifest among others that have one.
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 8);
    create(dir.path());
    std::fs::remove_file(manifest(&c.files[2])).unwrap();
    let (code, report) = verify(dir.path(), &[]);
    assert_eq!(code, UNPROVEN, "{report:#}");
    // An INC of another disk with its manifest: the manifests know their disks.
    let dir = tempfile::tempdir().unwrap();
    let c = chain(dir.path(), "sda", 9);
    create(dir.path());
    for (i, file) in c.files.iter().enumerate() {
        let (folder, name) = (file.parent().unwrap(), file.file_name().unwrap());
        let mut m = fleecefs::manifest::read(folder, name).unwrap().unwrap();
        let node = if i == 2 { "drive1" } else { "drive0" };
        m.disk.node = node.into();
        fleecefs::manifest::write(folder, &m).unwrap();
    }
    let (code, report) = verify(dir.path(), &["--quick"]);
    assert_eq!(code, UNSOUND, "{report:#}");
    assert!(errors(&report).iter().any(|(f, _)| *f == c.files[2]));
}

#[test]
fn no_false_alarm_whatever_the_format() {
    if !tools::have("no_false_alarm_whatever_the_format", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let variants = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "compat=0.10",
        "extended_l2=on",
        "cluster_size=16k,extended_l2=on",
        "compression_type=zstd",
        "refcount_bits=1",
        "refcount_bits=4",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "cluster_size=4k,refcount_bits=2",
    ];
    let mut rng = Rng(10);
    for (i, options) in variants.iter().enumerate() {
        let mut chain = Chain::new(dir.path(), &format!("d{i}"));
        let inc = options.split(",prealloc").next().unwrap().replace("preallocation", "");
        let inc = if inc.starts_with('=') { String::new() } else { inc };
        for point in 0..3u64 {
            let z = if *options == "compat=0.10" { "" } else { "-z " };
            // A refcount of one bit cannot count two compressed clusters; a compressed cluster can
            // be written only where there is nothing yet.
            let packed =
                if options.contains("bits=1") || options.contains("prealloc") { "" } else { "-c " };
            let mut ops = vec![format!("write {packed}-P 7 {} 2M", rng.below(4) * (2 << 20))];
            for _ in 0..6 {
                let (at, len) = rng.range(SIZE, 512);
                ops.push(format!("write -P {} {at} {len}", 1 + point));
                ops.push(format!("write {z}{at} 512"));
            }
            chain.point(if point == 0 { options } else { &inc }, SIZE, &ops);
        }
        let chain = chain.finish();
        let full = chain.files[0].to_str().unwrap();
        // A snapshot counts compressed clusters twice; small refcounts cannot.
        if !options.contains("refcount_bits") || options.contains("bits=64") {
            run("qemu-img", &["snapshot", "-c", "one", full]);
            qemu_io(&chain.files[0], &["write -P 3 0 1M".into()]);
        }
        if *options != "compat=0.10" {
            run("qemu-img", &["bitmap", "--add", full, "b0"]);
        }
    }
    let (code, report) = verify(dir.path(), &[]);
    assert_eq!((code, errors(&report)), (UNPROVEN, Vec::new()));
    create(dir.path());
    for args in [&[][..], &["--quick"], &["--jobs", "1"]] {
        let (code, report) = verify(dir.path(), args);
        assert_eq!((code, errors(&report)), (SOUND, Vec::new()));
    }
}

#[test]
fn hostile_images_are_looked_at_without_a_panic() {
    if !tools::have("hostile_images_are_looked_at_without_a_panic", &TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(11);
    for options in ["cluster_size=512", "cluster_size=16k,extended_l2=on", "refcount_bits=1"] {
        let path = dir.path().join("image");
        let p = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, p, "1M"]);
        qemu_io(&path, &["write -c -P 1 0 64k".into(), "write -P 2 128k 200k".into()]);
        if !options.contains("bits=1") {
            run("qemu-img", &["snapshot", "-c", "s", p]);
        }
        run("qemu-img", &["bitmap", "--add", p, "b"]);
        let good = std::fs::read(&path).unwrap();
        let allocated: Vec<usize> = (0..good.len()).filter(|i| good[*i] > 2).collect();
        for _ in 0..3000 {
            let mut bytes = good.clone();
            for _ in 0..=rng.below(3) {
                // Mostly where there is metadata, else anywhere in the first clusters.
                let at = match rng.below(3) {
                    0 => rng.below(2048.min(bytes.len() as u64)) as usize,
                    _ => allocated[rng.below(allocated.len() as u64) as usize],
                };
                bytes[at] = rng.next() as u8;
            }
            if rng.below(4) == 0 {
                bytes.truncate(rng.below(bytes.len() as u64) as usize);
            }
            let image = fleecefs::storage::MemStorage::new("hostile", bytes);
            fleecefs::verify::check_structure(&image, None);
        }
    }
}
