//! What people type who know qmpbackup or restic: understood where it has one meaning, else a hint.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Commands of restic and others, and what does their work here.
const HINTS: &[(&str, &str)] = &[
    (
        "ls",
        "'fleecefs list DIR' shows the points; their files are reached through 'fleecefs mount'",
    ),
    ("forget", "'fleecefs prune DIR --keep-daily N ...' deletes old points"),
    (
        "init",
        "no step of its own: 'fleecefs backup --qmp SOCKET --level auto --target DIR' makes the backup directory",
    ),
    ("dump", "'fleecefs restore DIR POINT -' writes a point to standard output"),
    ("unlock", "locks end with their process; 'fleecefs recover' cleans up after a killed backup"),
];

/// Options that qmpbackup has before its command, and whether a value follows.
const BEFORE: &[(&str, bool)] = &[
    ("--socket", true),
    ("--qmp", true),
    ("--agent-socket", true),
    ("--agent", true),
    ("--logfile", true),
    ("--log-file", true),
    ("--syslog", false),
    ("--debug", false),
];

/// Commands that qmpbackup has, too.
const COMMANDS: &[&str] = &["backup", "cleanup", "info"];

/// Verbs of qmprestore; it takes the folder, and the new file, by options.
const VERBS: &[&str] = &["merge", "rebase", "commit", "snapshotrebase", "snapshot-rebase"];

/// What to say of a command that is another program's.
pub(super) fn hint(args: &[OsString]) -> Option<String> {
    let first = args.iter().skip(1).find(|a| !a.as_bytes().starts_with(b"-"))?;
    let (name, hint) = HINTS.iter().find(|(name, _)| first == name)?;
    Some(format!("no command '{name}': {hint}"))
}

/// The same command line as this program has it.
pub(super) fn translated(args: Vec<OsString>) -> Vec<OsString> {
    options_behind(show_as_words(verbs(args)))
}

/// Takes `info --show WORD` of qmpbackup for `info WORD`.
fn show_as_words(args: Vec<OsString>) -> Vec<OsString> {
    let Some(info) = args.iter().position(|a| a == "info") else { return args };
    let Some(at) = args.iter().position(|a| split_option(a).0 == "--show").filter(|at| *at > info)
    else {
        return args;
    };
    let mut out = args;
    let word = match split_option(&out[at]).1 {
        true => OsString::from_vec(out.remove(at).as_bytes()[b"--show=".len()..].to_vec()),
        false if at + 1 < out.len() => {
            out.remove(at);
            out.remove(at)
        }
        false => return out,
    };
    out.insert(info + 1, word);
    out
}

/// Moves qmpbackup's options behind its command: `--socket S backup ...`.
fn options_behind(args: Vec<OsString>) -> Vec<OsString> {
    let mut moved = Vec::new();
    let mut rest = args.iter().enumerate().skip(1);
    while let Some((at, arg)) = rest.next() {
        if COMMANDS.iter().any(|c| arg == c) {
            // What 'info' shows is a command of its own.
            let is_word = |a: &OsString| !a.as_bytes().starts_with(b"-");
            let two = arg == "info" && args.get(at + 1).is_some_and(is_word);
            let (before, after) = args.split_at(at + 1 + usize::from(two));
            let stay = args.iter().take(1).chain(before.iter().skip(at)).cloned();
            return stay.chain(moved).chain(after.iter().cloned()).collect();
        }
        let (name, has_value) = split_option(arg);
        match BEFORE.iter().find(|(n, _)| name == *n) {
            Some(("--debug", _)) => moved.push("-vv".into()),
            Some((_, true)) if !has_value => {
                moved.push(arg.clone());
                moved.extend(rest.next().map(|(_, value)| value.clone()));
            }
            Some(_) => moved.push(arg.clone()),
            // An option of every command may stand where it is.
            None if arg.as_bytes().starts_with(b"-") => moved.push(arg.clone()),
            None => break,
        }
    }
    args
}

/// Takes `--dir F` and `--targetfile T` of qmprestore's verbs for the arguments F and T.
fn verbs(args: Vec<OsString>) -> Vec<OsString> {
    if !args.get(1).is_some_and(|a| VERBS.iter().any(|v| a == v)) {
        return args;
    }
    let (mut out, mut dir, mut target) = (Vec::new(), None, None);
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        let (name, has_value) = split_option(&arg);
        let place = match name.as_bytes() {
            b"--dir" => &mut dir,
            b"--targetfile" => &mut target,
            _ => {
                out.push(arg);
                continue;
            }
        };
        *place = match has_value {
            true => Some(OsString::from_vec(arg.as_bytes()[name.len() + 1..].to_vec())),
            false => rest.next(),
        };
    }
    out.into_iter().chain(dir).chain(target).collect()
}

/// The name of an option, and whether its value stands in the same argument.
fn split_option(arg: &OsStr) -> (&OsStr, bool) {
    let bytes = arg.as_bytes();
    match bytes.iter().position(|b| *b == b'=') {
        Some(at) if bytes.starts_with(b"--") => (OsStr::from_bytes(&bytes[..at]), true),
        _ => (arg, false),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::Cli;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn same(line: &str, as_this: &str) {
        assert_eq!(translated(words(line)), words(as_this), "{line}");
        if let Err(e) = Cli::try_parse_from(words(as_this)) {
            panic!("{as_this}: {e}");
        }
    }

    #[test]
    fn qmpbackups_options_go_behind_its_command() {
        same(
            "fleecefs --socket /s --agent-socket=/a --debug backup -l full --target /t",
            "fleecefs backup --socket /s --agent-socket=/a -vv -l full --target /t",
        );
        same("fleecefs --socket /s -v info blockdev", "fleecefs info blockdev --socket /s -v");
        for shown in ["--show bitmaps", "--show=bitmaps"] {
            same(
                &format!("fleecefs --socket /s info {shown}"),
                "fleecefs info bitmaps --socket /s",
            );
        }
        for line in ["fleecefs -v backup --qmp q -l full -t t", "fleecefs list backup", "fleecefs"]
        {
            let told = translated(words(line));
            assert_eq!(told.len(), words(line).len(), "{line}");
        }
    }

    #[test]
    fn qmprestores_options_are_arguments_here() {
        same(
            "fleecefs merge --dir /b/sda --targetfile=/t.qcow2 --until INC-1-sda",
            "fleecefs merge --until INC-1-sda /b/sda /t.qcow2",
        );
        same("fleecefs snapshotrebase --dir /b/sda", "fleecefs snapshotrebase /b/sda");
        let other = words("fleecefs list --dir /b");
        assert_eq!(translated(other.clone()), other);
    }

    #[test]
    fn restics_commands_are_understood_or_lead_to_ours() {
        for line in [
            "fleecefs snapshots /b",
            "fleecefs stats /b",
            "fleecefs check /b",
            "fleecefs snapshotrebase /b",
        ] {
            assert_eq!(hint(&words(line)), None);
            assert!(Cli::try_parse_from(words(line)).is_ok(), "{line}");
        }
        let told = hint(&words("fleecefs -v ls /b")).unwrap();
        assert!(told.contains("fleecefs list DIR"), "{told}");
        // Each leads to a command that is there, and none is one of ours.
        for (name, hint) in HINTS {
            assert!(hint.contains("'fleecefs "), "{hint}");
            let e = Cli::try_parse_from(["fleecefs", name]).unwrap_err();
            assert_eq!(e.kind(), clap::error::ErrorKind::InvalidSubcommand, "{name}");
        }
    }
}
