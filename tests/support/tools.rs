//! The tools that a test needs, and running them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};

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

/// A command's exit code and what it writes, both streams together, to a terminal of so many columns.
pub fn on_terminal(command: &mut Command, columns: u16) -> (Option<i32>, String) {
    let size = libc::winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut ours, mut its) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: room for two descriptors; a size; nothing else is asked for.
    let made = unsafe { libc::openpty(&mut ours, &mut its, none, std::ptr::null(), &size) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: two fresh descriptors.
    let (mut ours, its) = unsafe { (File::from_raw_fd(ours), File::from_raw_fd(its)) };
    command.stdout(its.try_clone().unwrap()).stderr(its);
    let mut child = command.spawn().unwrap();
    // The command has the other ends of the terminal, too.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut text = Vec::new();
    // A terminal whose last user has gone ends with EIO.
    let end = ours.read_to_end(&mut text);
    assert!(end.is_ok() || end.is_err_and(|e| e.raw_os_error() == Some(libc::EIO)));
    let code = child.wait().unwrap().code();
    (code, String::from_utf8(text).unwrap().replace("\r\n", "\n"))
}

/// Copies a program to where the test starts it.
///
/// Another process writes the file: were it this one, a command that another test starts meanwhile would
/// have the file open for writing until it has become its program, and starting ours would fail
/// with "text file busy".
pub fn copy_program(from: &str, to: &Path) {
    run("install", &["-m", "755", from, to.to_str().unwrap()]);
}

/// Makes a shell script that the test starts, as [`copy_program`] does.
pub fn write_script(to: &Path, text: &str) {
    let mut text_file = tempfile::NamedTempFile::new().unwrap();
    text_file.write_all(format!("#!/bin/sh\n{text}\n").as_bytes()).unwrap();
    copy_program(text_file.path().to_str().unwrap(), to);
}

/// Runs a command that has to succeed.
pub fn run(program: &str, args: &[&str]) -> Output {
    let out =
        Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {}\n{err}", out.status);
    out
}
