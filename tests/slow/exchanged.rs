//! Whoever owns a backup directory may put another file in the place of an image at any time while it is rewritten: what
//! he has put there is neither removed nor replaced, and the command does not say that all is well.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::chains::{Backups, copy_to, succeed};
use crate::support::renamed::Renamed;
use crate::support::synced::{Then, before_each};
use crate::support::tools::have;
use crate::support::verbs::{self, MIB, s};
use fleecefs::manifest;
use fleecefs::manifest::Manifest;

const THEIRS: &[u8] = b"somebody else's";

/// The command on the folder `DIR`, for which `victim` is exchanged before change number `at` of other names. None if
/// there are fewer.
fn exchanged(words: &[&str], dir: &Path, victim: &Path, at: usize) -> Option<Output> {
    let words = words.iter().map(|w| if *w == "DIR" { s(dir) } else { w });
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let (mut count, mut done) = (0, false);
    let out = before_each(command.args(words), dir, |act| {
        // Between the last look at a name and the change of that very name nobody can look.
        if act.path().is_none_or(|p| p == victim) {
            return Then::GoOn;
        }
        if count == at {
            let new = victim.with_extension("theirs");
            // Its folder may be gone, where the last point was moved out of it.
            done = std::fs::write(&new, THEIRS).is_ok();
            assert!(!done || std::fs::rename(&new, victim).is_ok());
        }
        count += 1;
        Then::GoOn
    });
    done.then_some(out)
}

/// Exchanges the victim before each change in turn, each time in a fresh copy of `from`.
fn at_each_change(words: &[&str], from: &Path, victim: &str) {
    for at in 0.. {
        let aside = tempfile::tempdir().unwrap();
        let dir: PathBuf = aside.path().canonicalize().unwrap().join("copy");
        copy_to(from, &dir);
        let file = dir.join(victim);
        let Some(out) = exchanged(words, &dir, &file, at) else {
            assert!(at > 3, "{words:?}: there are {at} changes");
            return;
        };
        let said = String::from_utf8_lossy(&out.stderr);
        let there = std::fs::read(&file).unwrap_or_default();
        assert!(there == THEIRS, "{words:?}: {victim} exchanged before change {at}: {said}");
    }
}

/// A copy of `from` as the command leaves it that is killed before change number `at` of a name. None if there are fewer.
fn killed(words: &[&str], from: &Path, dir: &Path, at: usize) -> Option<()> {
    copy_to(from, dir);
    let words = words.iter().map(|w| if *w == "DIR" { s(dir) } else { w });
    let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    let mut left = at;
    let out = before_each(command.args(words), dir, |act| {
        left = left.wrapping_sub(usize::from(act.path().is_some()));
        if left == usize::MAX { Then::Kill } else { Then::GoOn }
    });
    out.status.code().is_none().then_some(())
}

/// Kills the command before each change in turn, and exchanges one image after the other: by a file of another length,
/// and by one of the same. Whoever writes next leaves it where it is.
fn after_each_kill(words: &[&str], from: &Path, folder: &str) {
    let mut exchanged = 0;
    for at in 0.. {
        let aside = tempfile::tempdir().unwrap();
        let dir = aside.path().canonicalize().unwrap().join("copy");
        if killed(words, from, &dir, at).is_none() {
            assert!(exchanged > 20, "{words:?}: {exchanged}");
            return;
        }
        let names = std::fs::read_dir(dir.join(folder)).unwrap().map(|e| e.unwrap().file_name());
        for name in names.filter(|n| n.as_encoded_bytes().ends_with(b".qcow2")) {
            let length = dir.join(folder).join(&name).metadata().unwrap().len();
            for theirs in [THEIRS.to_vec(), vec![0x5a; usize::try_from(length).unwrap()]] {
                let other = aside.path().join("other");
                copy_to(&dir, &other);
                let victim = other.join(folder).join(&name);
                std::fs::remove_file(&victim).unwrap();
                std::fs::write(&victim, &theirs).unwrap();
                let next = ["verify", "--create", s(&other)];
                let out = Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(next).output().unwrap();
                let said = String::from_utf8_lossy(&out.stderr);
                let there = std::fs::read(&victim).unwrap_or_default();
                assert!(there == theirs, "{words:?}: killed before {at}, {name:?}: {said}");
                std::fs::remove_dir_all(&other).unwrap();
                exchanged += 1;
            }
        }
    }
}

#[test]
fn what_is_exchanged_after_a_kill_stays() {
    if !have("what_is_exchanged_after_a_kill_stays", &verbs::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = verbs::chain(dir.path(), "sda", &[4 * MIB]);
    verbs::add_manifests(&chain, &[4 * MIB]);
    for file in &chain.files {
        let m = manifest::read(&chain.dir, file.file_name().unwrap()).unwrap().unwrap();
        let fingerprint = manifest::fingerprint_of(&File::open(file).unwrap()).ok();
        manifest::write(&chain.dir, &Manifest { fingerprint, ..m }).unwrap();
    }
    let until = verbs::name(&chain.files[2]);
    after_each_kill(&["commit", "DIR", "--until", until], dir.path(), "sda");
    after_each_kill(&["consolidate", "DIR", "sda", "--until", until], dir.path(), "sda");
    let b = Backups::new(2, 1, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    after_each_kill(&["prune", "DIR", "--keep-last", "1"], b.dir.path(), "sda");
}

#[test]
fn what_is_exchanged_while_a_chain_is_merged_stays() {
    if !have("what_is_exchanged_while_a_chain_is_merged_stays", &verbs::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = verbs::chain(dir.path(), "sda", &[4 * MIB]);
    verbs::add_manifests(&chain, &[4 * MIB]);
    let name = |i: usize| format!("sda/{}", verbs::name(&chain.files[i]));
    let until = verbs::name(&chain.files[2]);
    let commit = ["commit", "DIR", "--until", until];
    at_each_change(&commit, dir.path(), &name(0));
    at_each_change(&commit, dir.path(), &name(1));
    at_each_change(&["consolidate", "DIR", "sda", "--until", until], dir.path(), &name(1));
}

#[test]
fn what_is_exchanged_while_points_go_or_get_names_stays() {
    if !have("what_is_exchanged_while_points_go_or_get_names_stays", &verbs::TOOLS) {
        return;
    }
    let b = Backups::new(2, 1, "", false);
    succeed(&["verify", "--create"], b.dir.path());
    for i in [0, 1] {
        let victim = format!("sda/{}", b.name(i));
        at_each_change(&["prune", "DIR", "--keep-last", "1"], b.dir.path(), &victim);
    }
    let r = Renamed::folders();
    let victim = "old/FULL-1700003600-old.qcow2";
    assert!(r.dir.path().join(victim).exists());
    at_each_change(&["link-disk", "DIR", r.old, r.new], r.dir.path(), victim);
}
