//! A disk's folder of real images for qmprestore's verbs.

use std::path::Path;
use std::process::{Command, Output};

use fleecefs::layout::Level;
use fleecefs::manifest;
use fleecefs::manifest::{Contents, ImageFormat, Manifest};

use crate::support::images::{Chain, Oracle, Rng, first_difference};
use crate::support::tools::run;

pub const MIB: u64 = 1 << 20;
pub const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

pub fn fleecefs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(args).output().unwrap()
}

pub fn ok(args: &[&str]) -> Output {
    let out = fleecefs(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn name(file: &Path) -> &str {
    file.file_name().unwrap().to_str().unwrap()
}

/// Four points whose sizes may differ, with every kind of cluster, and their bytes.
pub fn chain(dir: &Path, disk: &str, sizes: &[u64]) -> (Chain, Vec<Vec<u8>>) {
    let mut rng = Rng(disk.bytes().map(u64::from).sum());
    let mut chain = Chain::new(dir, disk);
    for i in 0..4 {
        let size = sizes[i.min(sizes.len() - 1)];
        let mut ops = vec![format!("write -c -P 8 {} 64k", i << 20)];
        for k in 0..8 {
            let (at, len) = rng.range(size, 512);
            ops.push(match k % 4 {
                3 => format!("write -z {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + rng.below(255)),
            });
        }
        chain.point("", size, &ops);
    }
    // By name, not by time: what qmprestore goes by.
    for (i, file) in chain.files.iter().enumerate() {
        run("touch", &["-d", &format!("@{}", 1_800_000_000 - i), s(file)]);
    }
    let oracle = Oracle::new(&chain.files);
    let bytes = (0..4).map(|i| oracle.bytes(i)).collect();
    (chain, bytes)
}

/// Gives every point a manifest with its hash.
pub fn add_manifests(chain: &Chain, sizes: &[u64]) {
    for (i, file) in chain.files.iter().enumerate() {
        let bytes = std::fs::read(file).unwrap();
        let text = serde_json::json!({
            "format_version": manifest::FORMAT_VERSION, "run": format!("run{i}"),
            "image": name(file), "level": if i == 0 { "full" } else { "inc" },
            "time": 1_700_003_600 + 3600 * i, "format": "qcow2",
            "parent": (i > 0).then(|| name(&chain.files[i - 1])),
            "content": if i == 0 { "full" } else { "dirty-only" },
            "virtual_size": sizes[i.min(sizes.len() - 1)], "file_size": bytes.len(),
            "blake3": blake3::hash(&bytes).to_hex().to_string(),
        });
        let m: Manifest = manifest::parse(text.to_string().as_bytes()).unwrap();
        assert_eq!((m.level == Level::Full, m.content == Contents::Full), (i == 0, i == 0));
        assert_eq!(m.format, ImageFormat::Qcow2);
        manifest::write(&chain.dir, &m).unwrap();
    }
}

/// What fleecefs makes of a point.
pub fn restored(dir: &Path, point: &str) -> Vec<u8> {
    ok(&["restore", s(dir), point, "-"]).stdout
}

pub fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(first_difference(got, want), None, "{what}");
}

pub fn files(dir: &Path) -> Vec<String> {
    let plain = |e: &std::fs::DirEntry| e.file_type().unwrap().is_file();
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap()).filter(plain);
    let mut names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every manifest fits its image, and no image is without.
pub fn manifests_fit(dir: &Path) {
    for name in files(dir) {
        let m = manifest::read(dir, name.as_ref()).unwrap().expect(&name);
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        assert_eq!(m.file_size, bytes.len() as u64, "{name}");
        assert_eq!(m.blake3, Some(blake3::hash(&bytes).to_hex().to_string()), "{name}");
        if let Some(parent) = m.parent {
            assert!(dir.join(&parent).exists(), "{name} lies on {parent}");
        }
    }
}
