//! VMs that are set down as two, and have by mistake what only one of them can have.

use std::collections::BTreeMap;
use std::path::Path;

use super::problem::Problem;
use super::vm::Vm;
use crate::text::path_text;

/// Two VMs that write to one directory: without `shared` a backup refuses that.
pub(super) fn targets(vms: &[Vm]) -> Vec<Problem> {
    let mut seen: BTreeMap<&Path, &Vm> = BTreeMap::new();
    let mut problems = Vec::new();
    for vm in vms.iter().filter(|vm| vm.is_enabled() && !vm.is_on("shared")) {
        let Some(target) = vm.target() else { continue };
        if let Some(first) = seen.insert(target, vm) {
            let why = format!("{} (use {{vm}} in it, or shared = true)", path_text(target));
            problems.push(problem(
                vm,
                "target",
                &format!("the target of VM {}: {why}", first.name),
            ));
        }
    }
    problems
}

/// Two VMs that are one QEMU, or one guest, or have an image in common: a line that was copied. The second one would be
/// a backup of the first.
pub(super) fn sources(vms: &[Vm]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for key in ["qmp", "agent", "offline"] {
        let mut seen: BTreeMap<&str, &Vm> = BTreeMap::new();
        for vm in vms.iter().filter(|vm| vm.is_enabled()) {
            for text in vm.texts(key) {
                let plain = plain(text);
                let Some(first) = seen.insert(plain, vm).filter(|f| f.name != vm.name) else {
                    continue;
                };
                let what = format!("the same '{key}' as VM {}: {}", first.name, path_text(plain));
                problems.push(problem(vm, key, &what));
            }
        }
    }
    problems
}

/// Targets in one another: allowed, but what deletes or copies the outer one has the inner one in it.
pub(super) fn nested(vms: &[Vm]) -> Vec<String> {
    let enabled = || vms.iter().filter(|vm| vm.is_enabled());
    let all: BTreeMap<&Path, &Vm> = enabled().filter_map(|vm| Some((vm.target()?, vm))).collect();
    let mut notes = Vec::new();
    for vm in enabled() {
        let Some(target) = vm.target() else { continue };
        let outer = target.ancestors().skip(1).find_map(|above| all.get(above));
        notes.extend(outer.map(|outer| {
            format!(
                "{}: the target of VM {} is in that of VM {}: {}",
                vm.place_of("target"),
                vm.name,
                outer.name,
                path_text(target)
            )
        }));
    }
    notes
}

fn problem(vm: &Vm, key: &str, what: &str) -> Problem {
    let message = format!("VM {} has {what}", vm.name);
    Problem { place: vm.place_of(key), message, vm: Some(vm.name.clone()) }
}

/// A socket or an image without what says how it is meant.
fn plain(text: &str) -> &str {
    let prefixes = ["unix:", "raw:", "qcow2:"];
    prefixes.iter().find_map(|p| text.strip_prefix(p)).unwrap_or(text)
}
