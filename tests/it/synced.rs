//! What is on disk before what: no power cut leaves a name without its bytes, or a point whose image has no name.

use std::path::Path;
use std::process::Command;

use crate::support::chains::{Backups, succeed};
use crate::support::qemu::one_disk::image;
use crate::support::renamed::Renamed;
use crate::support::shut_off::{self, caller, s, write};
use crate::support::synced::{Act, Then, acts, assert_all_synced, assert_in_order, before_each};
use crate::support::tools::have;
use crate::support::verbs::{self, MIB};
use fleecefs::manifest;

fn fleecefs(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.args(args);
    c
}

/// What a command does in order below `root`, when it ends well.
fn done(command: &mut Command, root: &Path) -> Vec<Act> {
    let (out, acts) = acts(command, root);
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    assert_in_order(&acts);
    acts
}

/// Where in `acts` something gets a name that ends in this.
fn named(acts: &[Act], end: &str) -> usize {
    let is = |a: &Act| matches!(a, Act::Named { path, .. } if s(path).ends_with(end));
    acts.iter().position(is).unwrap_or_else(|| panic!("nothing is called {end}: {acts:#?}"))
}

/// Where in `acts` the first image loses its name.
fn gone(acts: &[Act]) -> usize {
    let is = |a: &Act| matches!(a, Act::Gone { path, .. } if s(path).ends_with(".qcow2"));
    acts.iter().position(is).unwrap_or_else(|| panic!("no image goes: {acts:#?}"))
}

#[test]
fn a_point_counts_when_all_it_needs_is_on_disk() {
    let tools = ["qemu-img", "qemu-io", "qemu-storage-daemon"];
    if !have("a_point_counts_when_all_it_needs_is_on_disk", &tools) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir.path().join("vm/data.qcow2"));
    let caller = caller(dir.path());
    std::fs::create_dir(&caller.target).unwrap();
    for (level, op) in [("full", "write -P 1 0 1M"), ("inc", "write -P 2 64k 64k")] {
        write(&file, op);
        let mut command = shut_off::command(&caller, level, &[s(&file)], &[]);
        let acts = done(&mut command, &caller.target);
        let at = named(&acts, ".qcow2");
        let Act::Named { file: image, path, .. } = &acts[at] else { unreachable!() };
        let (name, side) = (path.file_name().unwrap().to_str().unwrap(), ".fleecefs");
        let announced = format!("{side}/{name}.partial.json");
        let is = |a: &Act| matches!(a, Act::Named { path, .. } if s(path).ends_with(&announced));
        let places: Vec<usize> = (0..at).filter(|i| is(&acts[*i])).collect();
        let [.., before, complete] = places[..] else { panic!("not announced: {acts:#?}") };
        // All that is known of it is written down when it is on disk: before it is read, and with its time.
        let synced = |part: &[Act]| part.iter().filter(|a| **a == Act::Synced(*image)).count();
        assert_eq!(synced(&acts[before..complete]), 2, "{acts:#?}");
        assert_eq!(synced(&acts[complete..at]), 0, "{acts:#?}");
        assert!(named(&acts, &format!("{side}/{name}.json")) > at, "{acts:#?}");
    }
}

/// The journal of a run's changes to QEMU and its files is on disk before it gets its name.
#[test]
fn what_a_backup_changes_is_journalled_on_disk() {
    let tools = ["qemu-img", "qemu-io", "qemu-storage-daemon"];
    if !have("what_a_backup_changes_is_journalled_on_disk", &tools) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir.path().join("vm/data.qcow2"));
    let caller = caller(dir.path());
    let mut command = shut_off::command(&caller, "full", &[s(&file)], &[]);
    let (out, acts) = acts(&mut command, dir.path());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let at = named(&acts, ".journal");
    let Act::Named { file: journal, folder, .. } = &acts[at] else { unreachable!() };
    let synced = |part: &[Act], id| part.contains(&Act::Synced(id));
    assert!(synced(&acts[..at], *journal) && synced(&acts[at..], *folder), "{acts:#?}");
    assert!(synced(&acts[at..], *journal), "each record: {acts:#?}");
}

#[test]
fn what_goes_from_a_chain_is_journalled_on_disk() {
    if !have("what_goes_from_a_chain_is_journalled_on_disk", &verbs::TOOLS) {
        return;
    }
    for consolidate in [false, true] {
        let b = Backups::new(if consolidate { 1 } else { 2 }, 2, "", false);
        succeed(&["verify", "--create"], b.dir.path());
        let (dir, until) = (s(b.dir.path()), b.name(1));
        let acts = match consolidate {
            true => {
                let words = ["consolidate", dir, "sda", "--until", &until];
                done(&mut fleecefs(&words), b.dir.path())
            }
            false => done(&mut fleecefs(&["prune", "--keep-last", "1", dir]), b.dir.path()),
        };
        assert!(named(&acts, "/removal.journal") < gone(&acts), "{acts:#?}");
    }
}

#[test]
fn what_a_commit_or_a_link_changes_is_journalled_on_disk() {
    if !have("what_a_commit_or_a_link_changes_is_journalled_on_disk", &verbs::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = verbs::chain(dir.path(), "sda", &[8 * MIB]);
    verbs::add_manifests(&chain, &[8 * MIB]);
    done(&mut fleecefs(&["rebase", s(&chain.dir)]), &chain.dir);
    let until = verbs::name(&chain.files[2]);
    let commit = done(&mut fleecefs(&["commit", s(&chain.dir), "--until", until]), &chain.dir);
    assert!(named(&commit, "/fold.json") < gone(&commit), "{commit:#?}");
    for r in [Renamed::folders(), Renamed::flat()] {
        let dir = r.dir.path();
        let (out, acts) = acts(&mut fleecefs(&["link-disk", s(dir), r.old, r.new]), dir);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_all_synced(&acts);
        // Under their new names, before the old ones go.
        assert_all_synced(&acts[..gone(&acts)]);
        assert!(named(&acts, "/link-disk.journal") < named(&acts, ".qcow2"), "{acts:#?}");
        assert!(named(&acts, "/removal.journal") < gone(&acts), "{acts:#?}");
    }
}

/// Whoever looks at any time, or after a power cut, finds a hash that is right, or none.
#[test]
fn no_manifest_has_a_wrong_hash_at_any_time() {
    if !have("no_manifest_has_a_wrong_hash_at_any_time", &verbs::TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (chain, _) = verbs::chain(dir.path(), "sda", &[4 * MIB]);
    verbs::add_manifests(&chain, &[4 * MIB]);
    let until = verbs::name(&chain.files[2]);
    // The last is of a FULL alone, which is replaced itself.
    let all = [&["rebase"][..], &["commit", "--until", until], &["commit"], &["snapshot-rebase"]];
    for words in all {
        let mut command = fleecefs(words);
        let mut wrong = Vec::new();
        let out = before_each(command.arg(&chain.dir), &chain.dir, |act| {
            for name in verbs::files(&chain.dir) {
                let known = manifest::read(&chain.dir, name.as_ref()).ok().flatten();
                let Some(hash) = known.and_then(|m| m.blake3) else { continue };
                let bytes = std::fs::read(chain.dir.join(&name)).unwrap();
                if blake3::hash(&bytes).to_hex().as_str() != hash {
                    wrong.push(format!("{name} before {act:?}"));
                }
            }
            Then::GoOn
        });
        assert!(out.status.success() && wrong.is_empty(), "{words:?}: {wrong:#?}");
        verbs::manifests_fit(&chain.dir);
    }
}
