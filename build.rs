//! Tells the program which commit it is built from, for `--version`. Without git and without a repository, as in
//! a tarball, that is left out; whoever packages it can say it by `FLEECEFS_COMMIT`.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=FLEECEFS_COMMIT");
    let number = env!("CARGO_PKG_VERSION");
    let commit =
        std::env::var("FLEECEFS_COMMIT").ok().filter(|c| is_commit(c)).or_else(of_repository);
    let version = commit.map_or_else(|| number.to_string(), |c| format!("{number} ({c})"));
    println!("cargo::rustc-env=FLEECEFS_VERSION={version}");
}

/// The commit of the repository that this folder is the top of: it may lie in another one.
fn of_repository() -> Option<String> {
    if !Path::new(".git").exists() {
        println!("cargo::rerun-if-changed=build.rs");
        return None;
    }
    // Written at each commit and checkout, also in a worktree, whose folder is elsewhere.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) =
            git(&["rev-parse", "--git-path", name]).filter(|p| Path::new(p).exists())
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    println!("cargo::rerun-if-changed=build.rs");
    git(&["rev-parse", "--short=10", "HEAD"]).filter(|c| is_commit(c))
}

fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn git(args: &[&str]) -> Option<String> {
    let out = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    out.status.success().then(|| text.trim().to_string())
}
