//! The program as users build it: it logs (a dependency switches the log crate off in release builds, which
//! `[profile.release.package.log]` in Cargo.toml undoes), and it has none of the hooks that tests use.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What may differ from the release profile.
const UNOPTIMISED: [(&str, &str); 4] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "0"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16"),
];

/// The release program. In CI it is built, by the release profile but for its optimisation, which takes minutes and
/// changes neither what is compiled in nor what is logged; elsewhere only an existing one is looked at.
fn release() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The program under test stands in <target>/debug.
    let mut target = Path::new(env!("CARGO_BIN_EXE_fleecefs")).parent()?.parent()?.to_path_buf();
    if std::env::var_os("CI").is_some() {
        target.push("release-unoptimised");
        // By the name: rustup's own program says to all it starts which toolchain it is.
        let build = Command::new("cargo")
            .args(["build", "--release", "--quiet", "--target-dir"])
            .arg(&target)
            .envs(UNOPTIMISED)
            .current_dir(root)
            .status()
            .unwrap();
        assert!(build.success(), "the release build fails");
    }
    let program = target.join("release/fleecefs");
    program.exists().then_some(program)
}

#[test]
fn release_builds_log() {
    let Some(program) = release() else {
        println!("skipped: release_builds_log needs a release build");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    std::fs::File::create(&path).unwrap().write_all_at(&broken_image(), 0).unwrap();
    let out = Command::new(program).arg("map").arg(dir.path()).arg("disk.qcow2").output().unwrap();
    let log = String::from_utf8_lossy(&out.stderr);
    assert!(log.contains("error: ") && log.contains("disk.qcow2 at offset 0x20000"), "{log}");
}

/// The variables of ours that a program names.
fn variables(program: &Path) -> BTreeSet<String> {
    let bytes = std::fs::read(program).unwrap();
    let begins = |i: &usize| bytes[*i..].starts_with(b"FLEECEFS_");
    let name = |i: usize| {
        let name = bytes[i..].iter().take_while(|b| b.is_ascii_uppercase() || **b == b'_');
        String::from_utf8(name.copied().collect()).unwrap()
    };
    (0..bytes.len()).filter(begins).map(name).collect()
}

#[test]
fn what_users_build_has_no_hooks_for_tests() {
    let hooks = [
        "ANSWER_TIMEOUT",
        "BARRIER",
        "HIDES_STATUS",
        "CRASH_AT",
        "HANG_AT",
        "HOLD",
        "STEPS",
        "WALK",
    ];
    let under_test = variables(Path::new(env!("CARGO_BIN_EXE_fleecefs")));
    let missing: Vec<_> = hooks
        .iter()
        // Constants may lie side by side in a program.
        .filter(|hook| !under_test.iter().any(|v| v.contains(&format!("FLEECEFS_{hook}"))))
        .collect();
    assert!(missing.is_empty(), "the program under test has no {missing:?}: {under_test:?}");
    let Some(program) = release() else {
        println!("skipped: what_users_build_has_no_hooks_for_tests needs a release build");
        return;
    };
    let found = variables(&program);
    // What users set, and what commands of a configuration are given (contrib/doc/nightly.md).
    let set = ["CONFIG", "LOG", "STATE_DIR"];
    let given = ["HOOK", "VM", "TARGET", "RESULT", "STEP", "EXIT_CODE", "ERROR"];
    let known = || set.iter().chain(&given);
    let is_ours = |v: &&String| known().any(|k| v.starts_with(&format!("FLEECEFS_{k}")));
    assert!(found.len() >= 2 && found.iter().all(|v| is_ours(&v)), "{found:?}");
    for hook in hooks {
        assert!(!found.iter().any(|v| v.contains(&format!("FLEECEFS_{hook}"))), "{found:?}");
    }
}

/// A qcow2 header and an L1 table whose only entry points far past the end of the file.
fn broken_image() -> Vec<u8> {
    let mut image = vec![0; 0x20008];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &0x20000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(0x20000, &((1u64 << 63) | (1 << 40)).to_be_bytes());
    image
}
