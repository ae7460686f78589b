//! What changed between points: ranges against the bytes that were written and against `qemu-img compare`.

use std::path::Path;
use std::process::Command;

use crate::support::chains::{Backups, CLUSTER, SIZE, TOOLS, code, fleecefs, succeed};
use crate::support::tools::{have, run};
use serde_json::Value;

/// What `diff --json` says.
fn diff(dir: &Path, from: &str, to: &str, more: &[&str]) -> Value {
    let args = [&["diff", from, to, "--json"], more].concat();
    serde_json::from_str(&succeed(&args, dir)).unwrap()
}

/// Its ranges, in order and not touching where they are of one kind.
fn ranges(said: &Value) -> Vec<(usize, usize)> {
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let all = said["ranges"].as_array().unwrap();
    let all: Vec<_> = all
        .iter()
        .map(|r| (number(&r["start"]), number(&r["start"]) + number(&r["length"])))
        .collect();
    assert!(all.windows(2).all(|w| w[0].1 <= w[1].0), "{said}");
    assert_eq!(all.iter().map(|r| r.1 - r.0).sum::<usize>(), number(&said["bytes"]), "{said}");
    all
}

/// Which sectors are in ranges that begin and end at sectors.
fn sectors(ranges: &[(usize, usize)]) -> Vec<bool> {
    let mut found = vec![false; SIZE as usize / 512];
    for (start, end) in ranges {
        assert!(start % 512 == 0 && end % 512 == 0);
        found[start / 512..end / 512].fill(true);
    }
    found
}

/// Sectors that an image has something about, without those below it.
fn written(image: &Path) -> Vec<bool> {
    let out = run("qemu-img", &["map", "--output=json", "-f", "qcow2", image.to_str().unwrap()]);
    let map: Value = serde_json::from_slice(&out.stdout).unwrap();
    let present = map.as_array().unwrap().iter().filter(|e| e["present"] == true);
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let all = present.map(|e| (number(&e["start"]), number(&e["start"]) + number(&e["length"])));
    sectors(&all.collect::<Vec<_>>())
}

#[test]
fn ranges_have_all_that_differs_and_nothing_that_no_image_between_has() {
    if !have("ranges_have_all_that_differs_and_nothing_that_no_image_between_has", &TOOLS) {
        return;
    }
    for (compressed, options) in [(false, "cluster_size=65536"), (true, "compression_type=zstd")] {
        let backups = Backups::new(2, 4, options, compressed);
        let dir = backups.dir.path();
        let raw = tempfile::tempdir().unwrap();
        let file = |i: usize| raw.path().join(i.to_string());
        backups.truth.iter().enumerate().for_each(|(i, b)| std::fs::write(file(i), b).unwrap());
        let own: Vec<_> = backups.files.iter().map(|f| written(f)).collect();
        let n = backups.truth.len();
        for (a, b) in
            (0..n).flat_map(|a| (0..n).map(move |b| (a, b))).filter(|(a, b)| (a + b) % 3 != 1)
        {
            let (from, to) = (backups.name(a), backups.name(b));
            let differ: Vec<bool> = backups.truth[a]
                .chunks(512)
                .zip(backups.truth[b].chunks(512))
                .map(|(x, y)| x != y)
                .collect();
            let may = sectors(&ranges(&diff(dir, &from, &to, &[])));
            let exact = sectors(&ranges(&diff(dir, &from, &to, &["--exact"])));
            assert!(exact == differ, "{from} {to}");
            assert!(differ.iter().zip(&may).all(|(d, m)| !d || *m), "{from} {to}");
            // Of one chain: only what the images between them have.
            let (low, high) = (a.min(b), a.max(b));
            if low / 5 == high / 5 {
                let between = |i: usize| own[low + 1..=high].iter().any(|o| o[i]);
                assert!((0..may.len()).all(|i| !may[i] || between(i)), "{from} {to}");
                assert_eq!(may.contains(&true), a != b);
            }
            let mut compare = Command::new("qemu-img");
            let args = [file(a), file(b)];
            let status =
                compare.args(["compare", "-q", "-f", "raw", "-F", "raw"]).args(args).status();
            assert_eq!(status.unwrap().success(), !exact.contains(&true), "{from} {to}");
        }
    }
}

#[test]
fn points_are_named_and_summed_up_and_what_cannot_be_compared_is_refused() {
    if !have("points_are_named_and_summed_up_and_what_cannot_be_compared_is_refused", &TOOLS) {
        return;
    }
    let backups = Backups::new(1, 2, "", false);
    let dir = backups.dir.path();
    let (first, last) = (backups.name(0), backups.name(2));
    let text = succeed(&["diff", &first, "sda/latest"], dir);
    let bytes = diff(dir, &first, &last, &[])["bytes"].as_u64().unwrap();
    assert_eq!(bytes % CLUSTER, 0);
    for part in [&first, &last, "ranges may differ", "8.0 MiB"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let mut verbose = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let out = verbose.args(["diff", "-v"]).arg(dir).args([&first, &last]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(text.lines().filter(|l| l.starts_with("0x")).count(), {
        ranges(&diff(dir, &first, &last, &[])).len()
    });
    let none = diff(dir, &last, "latest", &["--exact"]);
    assert!(none["bytes"] == 0 && none["ranges"].as_array().unwrap().is_empty(), "{none}");
    // A disk of another size is another thing; one of the same size is not.
    for (name, size, exit) in [("sdb", SIZE, 0), ("sdc", 2 * SIZE, 2)] {
        let folder = dir.join(name);
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join(format!("FULL-1700000000-{name}.qcow2"));
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &size.to_string()],
        );
        let out = fleecefs(&["diff", "sda/latest", &format!("{name}/latest"), "--json"], dir);
        assert_eq!(code(&out), exit, "{}", String::from_utf8_lossy(&out.stderr));
        let said: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(said["error"].is_object(), exit != 0, "{said}");
    }
    assert_eq!(code(&fleecefs(&["diff", &first, "nothing"], dir)), 3);
}

#[test]
fn stats_have_what_each_point_adds_and_what_prune_would_free() {
    if !have("stats_have_what_each_point_adds_and_what_prune_would_free", &TOOLS) {
        return;
    }
    let backups = Backups::new(2, 3, "", false);
    let dir = backups.dir.path();
    let json = |args: &[&str]| -> Value { serde_json::from_str(&succeed(args, dir)).unwrap() };
    let stats = json(&["stats", "--json"]);
    assert!(stats["prune"].is_null());
    let chains = stats["disks"][0]["chains"].as_array().unwrap();
    let points: Vec<_> = chains.iter().flat_map(|c| c["points"].as_array().unwrap()).collect();
    assert_eq!((chains.len(), points.len()), (2, 8));
    let mut all = 0;
    for (i, point) in points.iter().enumerate() {
        assert_eq!(point["point"], backups.name(i));
        let file = &backups.files[i];
        let out = run("qemu-img", &["map", "--output=json", "-f", "qcow2", file.to_str().unwrap()]);
        let map: Value = serde_json::from_slice(&out.stdout).unwrap();
        let data = map.as_array().unwrap().iter().filter(|e| e["data"] == true);
        let data: u64 = data.map(|e| e["length"].as_u64().unwrap()).sum();
        assert_eq!(point["data_bytes"], data, "{point}");
        let taken = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
        assert_eq!(point["own_bytes"], taken);
        all += taken;
    }
    assert_eq!(stats["own_bytes"], all);
    let changed = &stats["disks"][0]["changed"];
    let differ = diff(dir, &backups.name(0), &backups.name(7), &[]);
    assert_eq!(changed["bytes"], differ["bytes"]);
    let keep = ["--keep-last", "2"];
    let pruned = json(&[&["stats", "--json"], keep.as_slice()].concat());
    let plan = fleecefs(&[&["prune", "-n"], keep.as_slice()].concat(), dir);
    let plan = String::from_utf8(plan.stdout).unwrap();
    let deleted = plan.lines().filter(|l| l.starts_with("delete ")).count();
    assert_eq!(pruned["prune"]["points"], deleted, "{plan}");
    let text = succeed(&["stats", "--keep-last", "2"], dir);
    assert!(text.contains("prune with these rules") && !text.contains('#'), "{text}");
}
