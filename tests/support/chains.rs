//! Backup directories of real chains with the right bytes of each point, and running fleecefs on them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fleecefs::chain::scan::{ScanOptions, scan};
use fleecefs::image::{Cache, open_point};

use crate::support::images::{Chain, Oracle, Rng};
use crate::support::tools::run;

pub const TOOLS: [&str; 3] = ["qemu-img", "qemu-io", "cp"];
pub const SIZE: u64 = 8 << 20;
pub const CLUSTER: u64 = 65536;

/// A backup directory and the right bytes of each point, oldest first.
pub struct Backups {
    pub dir: tempfile::TempDir,
    pub files: Vec<PathBuf>,
    pub truth: Vec<Vec<u8>>,
}

impl Backups {
    /// One disk, `chains` times a FULL and `incs` INCs, an hour apart.
    pub fn new(chains: usize, incs: usize, options: &str, compressed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut files, mut truth) = (Vec::new(), Vec::new());
        let mut rng = Rng(77);
        for c in 0..chains {
            let aside = tempfile::tempdir().unwrap();
            let mut chain = Chain::new(aside.path(), "sda");
            for point in 0..=incs as u64 {
                let ops = ops(&mut rng, c as u64 * 40 + point, compressed);
                chain.point(options, SIZE, &ops);
            }
            let chain = chain.finish();
            let oracle = Oracle::new(&chain.files);
            for (i, file) in chain.files.iter().enumerate() {
                let time = 1_700_000_000 + (c * 100 + i) as u64 * 3600;
                let level = if i == 0 { "FULL" } else { "INC" };
                let to = dir.path().join("sda").join(format!("{level}-{time}-sda.qcow2"));
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(file, &to).unwrap();
                files.push(to);
                truth.push(oracle.bytes(i));
            }
        }
        Backups { dir, files, truth }
    }

    pub fn copy(&self) -> Copy {
        let dir = tempfile::tempdir().unwrap();
        copy_to(self.dir.path(), dir.path());
        Copy { root: dir.path().to_path_buf(), _dir: dir }
    }

    pub fn name(&self, i: usize) -> String {
        self.files[i].file_name().unwrap().to_str().unwrap().to_string()
    }

    /// Asserts that these points are there, by their times, and right.
    pub fn check(&self, root: &Path, points: impl IntoIterator<Item = usize>, what: &str) {
        let (catalog, _) = scan(root, &ScanOptions::default(), None).unwrap();
        for i in points {
            let name = self.name(i);
            let full = name.replace("INC-", "FULL-");
            let disk = &catalog.disks[0];
            let wanted = |p: &&fleecefs::chain::Point| p.name == name || p.name == full;
            let found: Vec<_> = disk.points.iter().filter(wanted).collect();
            assert!(!found.is_empty(), "{what}: {name} is lost");
            for p in found {
                let index = disk.points.iter().position(|q| q.name == p.name).unwrap();
                let image = open_point(disk, index, &Cache::new(16 << 20))
                    .unwrap_or_else(|e| panic!("{what}: {}: {}", p.name, e.report()));
                let mut bytes = vec![0; SIZE as usize];
                image.read_at(&mut bytes, 0).unwrap();
                assert!(bytes == self.truth[i], "{what}: {} is wrong", p.name);
            }
        }
    }
}

pub struct Copy {
    pub root: PathBuf,
    pub _dir: tempfile::TempDir,
}

pub fn copy_to(from: &Path, to: &Path) {
    let from = format!("{}/.", from.display());
    run("cp", &["-a", "--sparse=always", &from, to.to_str().unwrap()]);
}

pub fn ops(rng: &mut Rng, seed: u64, compressed: bool) -> Vec<String> {
    let c = if compressed { "-c " } else { "" };
    let mut ops: Vec<String> = (0..30)
        .map(|i| {
            let at = (i * 4 + rng.below(4)) * CLUSTER;
            format!("write {c}-P {} {at} {CLUSTER}", 1 + (seed * 31 + i) % 255)
        })
        .collect();
    ops.push(format!("write -z {} {CLUSTER}", (rng.below(2) + 126) * CLUSTER));
    ops
}

pub fn fleecefs(args: &[&str], dir: &Path) -> Output {
    let (verb, rest) = args.split_first().unwrap();
    spoken(&["-q", verb], dir, rest)
}

/// As [`fleecefs`], without `-q`.
pub fn aloud(args: &[&str], dir: &Path) -> Output {
    let (verb, rest) = args.split_first().unwrap();
    spoken(&[verb], dir, rest)
}

fn spoken(verb: &[&str], dir: &Path, rest: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    command.args(verb).arg(dir).args(rest).output().unwrap()
}

pub fn code(out: &Output) -> i32 {
    out.status.code().unwrap_or(-1)
}

pub fn succeed(args: &[&str], dir: &Path) -> String {
    let out = fleecefs(args, dir);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub fn names(root: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(root.join("sda")).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|n| n != ".fleecefs");
    names.sort_by_key(|n| n.split_once('-').map(|(_, rest)| rest.to_string()));
    names
}
