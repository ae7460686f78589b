//! `fleecefs complete`: what may come next on a command line, for the scripts of `fleecefs completions`.
//!
//! It is asked at each press of a key, and storage may not answer: so a second process looks, and is not waited for for
//! long. Whatever goes wrong, nothing is printed.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::{Arg, Args, Command};

use super::files::place;
use super::paths::catalog;
use crate::chain::{Catalog, Disk};
use crate::error::{Error, Result};
use crate::files::NodeKind;
use crate::output;
use crate::text::is_hidden;

/// How long somebody waits for a completion.
const PATIENCE: Duration = Duration::from_secs(2);
/// Candidates beyond these help nobody.
const MOST: usize = 1000;
/// Memory for looking into a point.
const CACHE_SIZE: u64 = 16 << 20;

/// Print what may come next, one a line
#[derive(Debug, Args)]
pub(super) struct CompleteArgs {
    /// Look by itself, for as long as it takes
    #[arg(long)]
    look: bool,
    /// The words so far; the last one is to be completed
    #[arg(last = true)]
    words: Vec<OsString>,
}

/// Runs it for the whole program's command line.
///
/// # Errors
/// Standard output cannot be written to.
pub(super) fn run(args: &CompleteArgs, mut program: Command) -> Result<()> {
    if !args.look {
        return output::print_as_is(&asked(&args.words).unwrap_or_default());
    }
    program.build();
    let found = candidates(&program, &args.words).unwrap_or_default();
    let mut text = Vec::new();
    // What no line can hold, or a terminal would obey, is not offered.
    let shown = found.iter().filter(|c| c.to_str().is_some_and(|t| !t.chars().any(is_hidden)));
    for candidate in shown.take(MOST) {
        text.extend_from_slice(candidate.as_bytes());
        text.push(b'\n');
    }
    output::print_as_is(&text)
}

/// What a process that looks has found in time. One that does not end is left to itself: it may not even be possible to
/// end it.
fn asked(words: &[OsString]) -> Option<Vec<u8>> {
    let mut process = Process::new(std::env::current_exe().ok()?);
    process.args(["-qq", "complete", "--look", "--"]).args(words);
    process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut process = process.spawn().ok()?;
    let mut out = process.stdout.take()?;
    let (send, receive) = channel();
    let read = move || {
        let mut text = Vec::new();
        let whole = out.read_to_end(&mut text).is_ok();
        let _ = send.send(Some(text).filter(|_| whole));
    };
    std::thread::Builder::new().spawn(read).ok()?;
    let found = receive.recv_timeout(PATIENCE).ok().flatten();
    match found {
        Some(_) => drop(process.wait()),
        None => drop(process.kill()),
    }
    found
}

/// What is to be completed.
struct Place<'a> {
    arg: &'a Arg,
    /// The backup directory.
    dir: &'a OsStr,
    /// What is there of it.
    begun: &'a OsStr,
}

fn candidates(program: &Command, words: &[OsString]) -> Result<Vec<OsString>> {
    let Some(place) = place_of(program, words) else { return Ok(Vec::new()) };
    let dir = Path::new(place.dir);
    let begun = place.begun.as_bytes();
    let mut found = match place.arg.get_id().as_str() {
        "point" => points(&catalog(dir)?, begun, ""),
        "what" => match in_point(begun) {
            Some((point, inside)) => files(dir, point, inside)?,
            None => points(&catalog(dir)?, begun, ":"),
        },
        _ => Vec::new(),
    };
    found.retain(|c| c.as_bytes().starts_with(begun));
    found.sort();
    found.dedup();
    Ok(found)
}

/// Which argument the last word is, by the definition of the command line.
fn place_of<'a>(program: &'a Command, words: &'a [OsString]) -> Option<Place<'a>> {
    let (begun, before) = words.split_last()?;
    let (mut command, mut positionals) = (program, Vec::new());
    let mut option: Option<&Arg> = None;
    for word in before {
        let text = word.to_string_lossy();
        if option.take().is_some() {
            continue;
        }
        match (text.strip_prefix("--"), text.strip_prefix('-')) {
            (Some(long), _) => {
                option = command.get_arguments().find(|a| a.get_long() == Some(long))
            }
            (None, Some(short)) if !short.is_empty() => {
                let is = |a: &&Arg| a.get_short().is_some_and(|s| short == s.to_string());
                option = command.get_arguments().find(is);
            }
            _ => match command.find_subcommand(word).filter(|_| positionals.is_empty()) {
                Some(inner) => command = inner,
                None => positionals.push(word),
            },
        }
        option = option.filter(|a| a.get_num_args().is_some_and(|n| n.min_values() > 0));
    }
    let arg = option.or_else(|| command.get_positionals().nth(positionals.len()))?;
    Some(Place { arg, dir: positionals.first()?, begun })
}

/// Disks, as long as none is named, or the points of one.
fn points(catalog: &Catalog, begun: &[u8], ending: &str) -> Vec<OsString> {
    let mut found = Vec::new();
    for disk in &catalog.disks {
        let folder = joined(&[disk.path.as_os_str(), OsStr::new("/")]);
        if !begun.starts_with(folder.as_bytes()) && catalog.disks.len() > 1 {
            found.push(folder);
            continue;
        }
        // Where nobody else has that name, it does without the disk.
        if !begun.is_empty() && !begun.contains(&b'/') {
            found.extend(names(disk).map(|name| joined(&[OsStr::new(name), OsStr::new(ending)])));
        }
        found.extend(
            names(disk).map(|name| joined(&[&folder, OsStr::new(name), OsStr::new(ending)])),
        );
    }
    found
}

fn names(disk: &Disk) -> impl Iterator<Item = &str> {
    let served = disk.points.iter().filter(|p| p.is_served());
    served.map(|p| p.name.as_str()).chain(["latest"])
}

/// Point, and partition and path, where there is a colon between them.
fn in_point(begun: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = begun.iter().rposition(|b| *b == b':')?;
    Some((begun.get(..colon)?, begun.get(colon + 1..)?))
}

/// The partitions of a point, or what is in a folder of one.
fn files(dir: &Path, point: &[u8], inside: &[u8]) -> Result<Vec<OsString>> {
    let Some(slash) = inside.iter().rposition(|b| *b == b'/') else {
        let opened = from(dir, point).open()?;
        let with_files = opened.volumes.iter().filter(|v| v.content.has_files());
        let name = |v: &crate::files::Volume| {
            joined(&[
                OsStr::from_bytes(point),
                OsStr::new(":"),
                OsStr::new(&v.name),
                OsStr::new("/"),
            ])
        };
        return Ok(with_files.map(name).collect());
    };
    let (folder, begun) = inside.split_at(slash + 1);
    let above = [point, b":", folder].concat();
    let opened = from(dir, &above).open()?;
    let tree = opened.tree()?;
    let folder = place::node(&opened, &*tree, true)?;
    let mut entries = Vec::new();
    tree.read_folder(folder, 0, &mut |entry| {
        if entry.name.starts_with(begun) {
            entries.push(entry);
        }
        entries.len() < MOST
    })?;
    let shown = |entry: crate::files::Entry| -> Result<OsString, Error> {
        let kind = match entry.kind {
            Some(kind) => kind,
            None => tree.attributes(entry.node)?.kind,
        };
        let slash = if kind == NodeKind::Folder { "/" } else { "" };
        let name = OsStr::from_bytes(&entry.name);
        Ok(joined(&[OsStr::from_bytes(&above), name, OsStr::new(slash)]))
    };
    entries.into_iter().map(shown).collect()
}

fn from(dir: &Path, what: &[u8]) -> place::From {
    let what = OsStr::from_bytes(what).into();
    place::From { dir: dir.into(), what, cache_size: CACHE_SIZE }
}

fn joined(parts: &[&OsStr]) -> OsString {
    parts.iter().fold(OsString::new(), |mut all, part| {
        all.push(part);
        all
    })
}
