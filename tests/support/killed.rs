//! What has to hold after a killed backup and the next one: the points are there and right, and nothing else is left.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::backup::{Caller, Views, bitmaps, images, leftovers, ours_in_qemu};
use crate::support::guest::Qmp;
use crate::support::mount::Mount;

/// In place of the hash of a point whose bytes nobody has seen.
const UNKNOWN: [u8; 32] = [0; 32];

/// What is known of the points: their bytes' hash at the freeze point.
pub struct Matrix {
    pub caller: Caller,
    pub disks: Vec<String>,
    pub known: BTreeMap<PathBuf, [u8; 32]>,
    pub table: Vec<String>,
}

impl Matrix {
    pub fn new(caller: Caller, disks: &[&str]) -> Self {
        let disks = disks.iter().map(|d| d.to_string()).collect();
        Matrix { caller, disks, known: BTreeMap::new(), table: Vec::new() }
    }

    /// Learns which images are new, and what they must hold.
    pub fn learn(&mut self, crashed: &Views, recovered: &Views) -> usize {
        let mut adopted = 0;
        for disk in &self.disks {
            let all = images(&self.caller.target.join(disk));
            let fresh: Vec<_> = all.into_iter().filter(|p| !self.known.contains_key(p)).collect();
            let view = |v: &Views| v.iter().find(|(d, _)| d == disk).map(|(_, b)| b.clone());
            let mut expected: Vec<Vec<u8>> = view(recovered).into_iter().collect();
            if fresh.len() == 2 {
                let bytes = view(crashed).expect("a point of a run that never had its moment");
                expected.insert(0, bytes);
                adopted += 1;
            }
            assert_eq!(fresh.len(), expected.len(), "{disk}: {fresh:?}");
            for (image, bytes) in fresh.into_iter().zip(expected) {
                self.known.insert(image, *blake3::hash(&bytes).as_bytes());
            }
        }
        adopted
    }

    /// Leaves out of the comparison the points that are new: nobody has seen what they must hold.
    pub fn ignore_new(&mut self) {
        for disk in &self.disks {
            for image in images(&self.caller.target.join(disk)) {
                self.known.entry(image).or_insert(UNKNOWN);
            }
        }
    }

    pub fn note(&mut self, step: &str, fault: &str, outcome: &str) {
        let line = format!("{step:34} | {fault:8} | {outcome}");
        println!("{line}");
        self.table.push(line);
    }

    /// Reads every point through the mount.
    pub fn check_points(&self) {
        let mount = Mount::new(&self.caller.target);
        for (image, hash) in self.known.iter().filter(|(_, hash)| **hash != UNKNOWN) {
            let disk = image.parent().unwrap().file_name().unwrap().to_str().unwrap();
            let got = std::fs::read(mount.point(disk, image)).unwrap();
            assert_eq!(blake3::hash(&got).as_bytes(), hash, "{} is wrong", image.display());
        }
    }

    /// Every so many steps: checks what is there, and goes on with a new chain alone. (What a run
    /// looks at grows with what there is, and so would the time of the whole.)
    pub fn renew(&mut self) {
        if !self.table.len().is_multiple_of(40) {
            return;
        }
        self.check_points();
        let (_, views) = self.caller.held("full");
        self.learn(&Vec::new(), &views);
        let mut prune = std::process::Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        prune.args(["prune", "--quiet", "--keep-last", "1"]).arg(&self.caller.target);
        let out = prune.output().unwrap();
        assert!(out.status.success(), "prune: {}", String::from_utf8_lossy(&out.stderr));
        self.known.retain(|image, _| image.exists());
        assert_eq!(self.known.len(), self.disks.len(), "{:?}", self.known.keys());
    }

    pub fn check_clean(&self, qmp: &mut Qmp, folders: &[&Path], step: &str) {
        assert_eq!(ours_in_qemu(qmp), Vec::<String>::new(), "{step}");
        for f in folders {
            assert_eq!(leftovers(f), Vec::<PathBuf>::new(), "{step}");
        }
        let maps = bitmaps(qmp);
        let most = 2 * self.disks.len();
        assert!(maps.len() <= most && maps.len() >= self.disks.len(), "{step}: {maps:?}");
    }
}
