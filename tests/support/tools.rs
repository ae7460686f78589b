//! The tools that a test needs, and running them.

use std::path::Path;
use std::process::{Command, Output};

/// Whether the tools are there. In CI a missing one is a failure, elsewhere the test says that it
/// was skipped.
pub fn have(test: &str, tools: &[&str]) -> bool {
    let found = |t: &str| match t.strip_prefix('/') {
        Some(_) => Path::new(t).exists(),
        None => std::env::var_os("PATH")
            .is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(t).is_file())),
    };
    let missing: Vec<_> = tools.iter().filter(|t| !found(t)).collect();
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "{test} needs {missing:?}");
    println!("skipped: {test} needs {missing:?}");
    false
}

/// Whether this user may do what root may: attach devices, mount, give files away. In CI it is a failure if not,
/// elsewhere the test says that it was skipped.
pub fn is_root(test: &str) -> bool {
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        println!("skipped: {test} needs root");
    }
    root
}

/// Runs a command that has to succeed.
pub fn run(program: &str, args: &[&str]) -> Output {
    let out =
        Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {}\n{err}", out.status);
    out
}
