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

use super::config_file::CONFIG_VARIABLE;
use super::files::point_path;
use super::paths::catalog;
use super::runs;
use crate::chain::{Catalog, Disk};
use crate::config::{self, ConfigFile};
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
        return output::print_as_is(&ask_process(&args.words).unwrap_or_default());
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
fn ask_process(words: &[OsString]) -> Option<Vec<u8>> {
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

/// What may stand for an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// A point.
    Point,
    /// A point, and where it may have some, a partition and a path in it.
    InPoint,
    /// The same of the newest point, which is named by its disk.
    InDisk,
    /// A disk.
    Disk,
    /// A point of the disk that was named.
    OfDisk,
    /// The file of a point, in the folder that was named.
    File,
    /// A backup run.
    Run,
    /// A backup run, or a point.
    RunOrPoint,
    /// A VM of the configuration.
    Vm,
}

/// What stands for `arg` of `command`, if the backup directory or the configuration tells it.
pub(super) fn wanted(command: &Command, arg: &Arg) -> Option<Wanted> {
    let value = arg.get_value_names()?.first()?.as_str();
    Some(match (command.get_name(), value) {
        ("consolidate", "POINT") => Wanted::OfDisk,
        ("diff", "FROM" | "TO") => Wanted::InPoint,
        (_, "POINT") => Wanted::Point,
        (_, "POINT[:PARTITION][/PATH]") => Wanted::InPoint,
        (_, "DISK[:PARTITION]/PATH") => Wanted::InDisk,
        (_, "DISK" | "OLD" | "NEW") => Wanted::Disk,
        (_, "RUN") => Wanted::Run,
        (_, "RUN|POINT") => Wanted::RunOrPoint,
        ("backup" | "show", "VM") => Wanted::Vm,
        (_, "FILE") if arg.get_id() == "until" => Wanted::File,
        _ => return None,
    })
}

/// What is to be completed.
struct Completion<'a> {
    wanted: Wanted,
    /// The backup directory; nothing where none is needed.
    dir: &'a OsStr,
    /// The configuration, where one is named.
    config: Option<&'a OsStr>,
    /// The arguments after that.
    others: Vec<&'a OsStr>,
    /// What is there of it.
    begun: &'a [u8],
    /// What stands before that in the same word: `--disk=`.
    option: &'a [u8],
    /// Whether it is about files in points.
    has_files: bool,
}

fn candidates(program: &Command, words: &[OsString]) -> Result<Vec<OsString>> {
    let Some(place) = completion_of(program, words) else { return Ok(Vec::new()) };
    let (dir, begun) = (Path::new(place.dir), place.begun);
    let mut found = match (place.wanted, in_point(begun)) {
        (Wanted::InPoint | Wanted::InDisk, Some((point, inside))) if place.has_files => {
            files(dir, point, inside)?
        }
        (Wanted::InPoint, _) => {
            points(&catalog(dir)?, begun, if place.has_files { ":" } else { "" })
        }
        (Wanted::Point, _) => points(&catalog(dir)?, begun, ""),
        (Wanted::InDisk, _) => disks(&catalog(dir)?, ":"),
        (Wanted::Disk, _) => disks(&catalog(dir)?, ""),
        (Wanted::OfDisk, _) => points_of(&catalog(dir)?, place.others.first()),
        (Wanted::File, _) => points_of(&catalog(dir)?, None),
        (Wanted::Run, _) => run_names(&catalog(dir)?),
        (Wanted::Vm, _) => vms(program, place.config)?,
        (Wanted::RunOrPoint, _) => {
            let catalog = catalog(dir)?;
            let mut all = run_names(&catalog);
            all.extend(points(&catalog, begun, ""));
            all
        }
    };
    found.retain(|c| c.as_bytes().starts_with(begun));
    found.sort();
    found.dedup();
    let whole = |c: OsString| joined(&[OsStr::from_bytes(place.option), &c]);
    Ok(found.into_iter().map(whole).collect())
}

/// The VMs of the configuration that is named, or of the usual one.
fn vms(program: &Command, file: Option<&OsStr>) -> Result<Vec<OsString>> {
    let file = file.map(OsStr::to_os_string).or_else(|| std::env::var_os(CONFIG_VARIABLE));
    let file = match &file {
        Some(path) => ConfigFile::named(Path::new(path)),
        None => ConfigFile::usual()?,
    };
    let config = config::load(&file, program)?;
    Ok(config.vms.into_iter().map(|vm| OsString::from(vm.name)).collect())
}

fn run_names(catalog: &Catalog) -> Vec<OsString> {
    runs::names(catalog).into_iter().map(OsString::from).collect()
}

/// Which argument the last word is, by the definition of the command line.
fn completion_of<'a>(program: &'a Command, words: &'a [OsString]) -> Option<Completion<'a>> {
    let (last, before) = words.split_last()?;
    let (mut command, mut positionals) = (program, Vec::new());
    let (mut target, mut config): (Option<&OsStr>, Option<&OsStr>) = (None, None);
    let mut option: Option<&Arg> = None;
    for word in before {
        if let Some(of) = option.take() {
            match of.get_id().as_str() {
                "target" => target = target.or(Some(word)),
                "config_file" => config = Some(word),
                _ => {}
            }
            continue;
        }
        if let Some(file) = word.as_bytes().strip_prefix(b"--config-file=") {
            config = Some(OsStr::from_bytes(file));
        }
        option = option_of(command, word);
        if word.as_bytes().starts_with(b"-") && word.len() > 1 {
            continue;
        }
        match command.find_subcommand(word).filter(|_| positionals.is_empty()) {
            Some(inner) => command = inner,
            None => positionals.push(word.as_os_str()),
        }
    }
    // `--disk=sda` is one word.
    let (before, begun) = match last.as_bytes().iter().position(|b| *b == b'=') {
        Some(at) if option.is_none() && last.as_bytes().starts_with(b"--") => {
            last.as_bytes().split_at(at + 1)
        }
        _ => (&[][..], last.as_bytes()),
    };
    if let Some((_, name)) = before.split_last() {
        option = Some(option_of(command, OsStr::from_bytes(name))?);
    }
    let arg = option.or_else(|| command.get_positionals().nth(positionals.len()))?;
    // A backup has no other way to say where.
    let wanted = wanted(command, arg)?;
    let dir = positionals.first().copied().or(target);
    let dir = dir.or((wanted == Wanted::Vm).then_some(OsStr::new("")))?;
    let others = positionals.get(1..).unwrap_or_default().to_vec();
    let has_files = command.get_name() != "diff" || words.iter().any(|w| w == "--files");
    Some(Completion { wanted, dir, config, others, begun, option: before, has_files })
}

/// The option that a word is, if its value stands in the next one.
fn option_of<'a>(command: &'a Command, word: &OsStr) -> Option<&'a Arg> {
    let text = word.to_str()?;
    let is = |arg: &&Arg| match text.strip_prefix("--") {
        Some(long) => arg.get_long_and_visible_aliases().is_some_and(|all| all.contains(&long)),
        None => {
            let short = text.strip_prefix('-').filter(|s| !s.is_empty());
            short.is_some_and(|s| arg.get_short().is_some_and(|c| s == c.to_string()))
        }
    };
    let takes_one = |arg: &&Arg| arg.get_num_args().is_some_and(|n| n.min_values() > 0);
    command.get_arguments().find(is).filter(takes_one)
}

/// All disks.
fn disks(catalog: &Catalog, ending: &str) -> Vec<OsString> {
    catalog.disks.iter().map(|d| joined(&[d.path.as_os_str(), OsStr::new(ending)])).collect()
}

/// The points of one disk, or of all, by their names alone.
fn points_of(catalog: &Catalog, disk: Option<&&OsStr>) -> Vec<OsString> {
    let is = |d: &&Disk| disk.is_none_or(|name| d.path == Path::new(name));
    let points = catalog.disks.iter().filter(is).flat_map(|d| &d.points);
    points.filter(|p| p.is_served()).map(|p| OsString::from(&p.name)).collect()
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
    let folder = point_path::node(&opened, &*tree, true)?;
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

fn from(dir: &Path, what: &[u8]) -> point_path::From {
    let what = OsStr::from_bytes(what).into();
    point_path::From { dir: dir.into(), what, cache_size: CACHE_SIZE }
}

fn joined(parts: &[&OsStr]) -> OsString {
    parts.iter().fold(OsString::new(), |mut all, part| {
        all.push(part);
        all
    })
}
