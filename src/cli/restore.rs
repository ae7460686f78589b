//! `fleecefs restore`: a point, or all disks of a run, as files, on a device, or to a pipe.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::IsTerminal;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::bar::Bar;
use super::recorded::Recorded;
use super::shared::ForceArgs;
use super::state::StateArgs;
use super::values::{CompressArg, FileFormat};
use super::work::{WorkArgs, cancel_flag};
use super::{one_run, paths, unsound, verbosity};
use crate::chain::{Catalog, Disk, POINT_HELP};
use crate::error::{Error, Kind, Result};
use crate::folder::FileId;
use crate::history::Entry;
use crate::image::{Cache, open_point};
use crate::job::Work;
use crate::restore::{
    Compression, Options, Plan, Preallocation, Qcow2Options, Reflink, Summary, Target, run,
};
use crate::text::{path_text, to_text};
use crate::units::{counted, human_bytes};
use crate::{folder, output};

/// Restore a point to a file, a block device or standard output
///
/// The target gets its name when it is complete and on disk: a restore that fails leaves no file of that
/// name. What a killed restore left is removed by the next one into the same folder. Holes stay holes.
///
/// If backup and target are on the same XFS or btrfs, ranges are cloned: this copies nothing and takes no
/// space. The output tells whether data was cloned or
/// copied.
///
/// With --run, all disks of one run are restored into the folder --to, with the file names and formats
/// that the VM had, as far as manifests tell. A run is named by 'latest', by its time as 'list --runs' shows
/// it (UTC, or with +01:00), by the beginning of that time (2026-11-22: the newest run of the day), by the
/// seconds in its file names, or by its id. A time that fits several runs of one VM is refused, and their
/// ids are shown. Without manifests a run is all points of exactly that time. If a directory has several
/// VMs, 'latest' and dates take the newest run of each.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The backup directory
    pub dir: PathBuf,
    #[arg(help = POINT_HELP, required_unless_present = "run", conflicts_with = "run")]
    point: Option<PathBuf>,
    /// A new file, an existing block device, or '-' for standard output
    #[arg(required_unless_present = "run", conflicts_with = "run")]
    target: Option<PathBuf>,
    /// Restore all disks of a run: latest, a date or time, its time in seconds, or its id
    #[arg(long, value_name = "RUN", requires = "to")]
    run: Option<String>,
    /// The folder to restore the disks of a run into
    #[arg(long, value_name = "FOLDER", requires = "run")]
    to: Option<PathBuf>,
    #[command(flatten)]
    how: OutputArgs,
    #[command(flatten)]
    pub state: StateArgs,
    #[command(flatten)]
    work: WorkArgs,
}

impl RestoreArgs {
    /// Whether errors are told as JSON too: not where the disk itself goes to standard output.
    pub(super) fn json(&self) -> bool {
        self.how.json && self.target.as_deref() != Some(Path::new("-"))
    }
}

impl FileFormat {
    fn extension(self) -> &'static str {
        match self {
            FileFormat::Raw => "raw",
            FileFormat::Qcow2 => "qcow2",
        }
    }
}

/// Options that do not depend on what is restored.
#[derive(Debug, Args)]
struct OutputArgs {
    /// The format of the new file; by default qcow2 if its name ends so, else raw
    #[arg(long, value_enum)]
    format: Option<FileFormat>,
    /// qcow2: bytes per cluster
    #[arg(long, value_name = "BYTES", value_parser = crate::units::parse_bytes, default_value = "64K")]
    cluster_size: u64,
    /// qcow2: compress the clusters
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, default_missing_value = "zlib")]
    compress: Option<CompressArg>,
    /// qcow2: what to preallocate for empty clusters
    #[arg(long, value_enum, default_value = "off")]
    preallocation: PreallocationArg,
    #[command(flatten)]
    over: ForceArgs,
    /// Confirm that the block device is overwritten
    #[arg(long)]
    yes: bool,
    /// Discard the whole device first
    #[arg(long)]
    discard: bool,
    /// Read the result back from the disk and compare it
    #[arg(long)]
    verify: bool,
    /// Write zeros where the backup cannot be read, report it, and continue (exit code 16)
    #[arg(long)]
    salvage: bool,
    /// Whether to clone ranges instead of copying them
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    reflink: ReflinkArg,
    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Print JSON: the plan, or one object per disk
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PreallocationArg {
    Off,
    Metadata,
    Falloc,
    Full,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReflinkArg {
    Auto,
    Always,
    Never,
}

/// Memory for merged windows: the plan merges them, the execution finds them there.
const CACHE_BYTES: u64 = 256 << 20;

/// One thing to restore.
struct Job<'a> {
    disk: &'a Disk,
    point: usize,
    target: Target,
    /// Whether it is one of several disks, which get a folder.
    of_run: bool,
}

/// Runs `fleecefs restore`.
///
/// # Errors
/// The directory, run or point cannot be read; see [`crate::restore::restore`]. `Partial` if
/// ranges were given up.
pub(super) fn run(args: RestoreArgs) -> Result<()> {
    let (dir, dry_run) = (Some(args.dir.as_path()), args.how.dry_run);
    let run = Recorded { command: "restore", dir, state: &args.state, dry_run };
    run.run(|entry| act(&args, entry))
}

fn act(args: &RestoreArgs, entry: &mut Entry) -> Result<()> {
    let catalog = paths::catalog_to_salvage(&args.dir, args.how.salvage)?;
    let (jobs, missing) = jobs(args, &catalog)?;
    for job in &jobs {
        check_target(&args.how, &catalog, job)?;
    }
    unsound::warn(&args.state, &catalog, jobs.iter().map(|j| (j.disk, j.point)));
    let (cancel, bar) = (cancel_flag()?, Bar::default());
    let work = args.work.work(&cancel, &bar);
    let (mut given_up, mut failed) = (0, Vec::new());
    for job in &jobs {
        let done = one(&args.how, job, &work);
        let (disk, error) = (job.disk, done.as_ref().err().map(Error::report));
        entry.add_point(&disk.path, &disk.points[job.point].name, error);
        match done {
            Ok(bytes) => given_up += bytes,
            // What one disk of a run lacks is no reason to leave the others.
            Err(e) if job.of_run && !ends_all(&e) => failed.push((job, e)),
            Err(e) => return Err(e),
        }
    }
    check_failed(failed, jobs.len())?;
    check_missing(missing, jobs.len())?;
    if given_up > 0 {
        let text = format!("{given_up} bytes could not be read and are zeros in the result");
        return Err(Error::new(Kind::Partial, text));
    }
    Ok(())
}

/// Whether the next disk would fail as well.
fn ends_all(e: &Error) -> bool {
    matches!(e.kind(), Kind::Interrupted | Kind::NoSpace)
}

/// Fails if disks of a run were not restored; `Partial` if others were.
fn check_failed(mut failed: Vec<(&Job, Error)>, all: usize) -> Result<()> {
    if failed.len() <= 1 && all == 1 {
        return failed.pop().map_or(Ok(()), |(_, e)| Err(e));
    }
    let Some(kind) = failed.first().map(|(_, e)| e.kind()) else { return Ok(()) };
    for (job, e) in &failed {
        log::error!("{}: not restored: {}", path_text(&job.disk.path), e.report());
    }
    let kind = if failed.len() < all { Kind::Partial } else { kind };
    let text = format!("{} of {} not restored", failed.len(), counted(all as u64, "disk"));
    Err(Error::new(kind, text).remedy("the reasons are above"))
}

/// Fails if the run made images that are gone.
fn check_missing(missing: usize, restored: usize) -> Result<()> {
    if missing == 0 {
        return Ok(());
    }
    let all = counted((restored + missing) as u64, "disk");
    let text = format!("{missing} of {all} not restored: images of this run are missing");
    Err(Error::new(Kind::Partial, text).remedy("their names are above"))
}

/// What is to be restored, and how many images of a run are missing.
fn jobs<'a>(args: &RestoreArgs, catalog: &'a Catalog) -> Result<(Vec<Job<'a>>, usize)> {
    if let (Some(name), Some(to)) = (&args.run, &args.to) {
        let run = run::find(catalog, name)?;
        one_run::warn_of_others(&run.without);
        let missing = one_run::tell_missing(catalog, &run);
        let to = paths::to_make(to)?;
        let names = names_in_run(args.how.format, &run.points);
        let job = |((disk, point), (name, format)): (&(&'a Disk, usize), (PathBuf, FileFormat))| {
            let target = args.how.file_of(&to.join(name), format)?;
            Ok(Job { disk, point: *point, target, of_run: true })
        };
        let jobs = run.points.iter().zip(names).map(job).collect::<Result<Vec<_>>>()?;
        return check_apart(&jobs).map(|()| (jobs, missing));
    }
    let (Some(point), Some(target)) = (&args.point, &args.target) else {
        return Err(verbosity::usage("name POINT and TARGET, or --run and --to"));
    };
    let (disk, point) = catalog.find(point)?;
    Ok((vec![Job { disk, point, target: args.how.target(target)?, of_run: false }], 0))
}

/// File and format of each of a run's points, below the folder that they are restored to: what the VM
/// had, so that it finds its disks again. Where that is not known, or would be one name for two, the
/// name of the disk's folder in the backup directory.
pub(in crate::cli) fn names_in_run(
    wanted: Option<FileFormat>,
    points: &[(&Disk, usize)],
) -> Vec<(PathBuf, FileFormat)> {
    let named: Vec<_> = points.iter().map(|(disk, point)| original(wanted, disk, *point)).collect();
    let mut count: HashMap<&Path, usize> = HashMap::new();
    for (path, _) in named.iter().flatten() {
        *count.entry(path).or_default() += 1;
    }
    let is_one = |path: &Path| count.get(path) == Some(&1);
    let by_folder = |(disk, point): &(&Disk, usize)| {
        let format = wanted.unwrap_or(FileFormat::Raw);
        (run::file_name(disk, *point, format.extension()), format)
    };
    let known = |one: &Option<(PathBuf, FileFormat)>| one.clone().filter(|(path, _)| is_one(path));
    named.iter().zip(points).map(|(one, p)| known(one).unwrap_or_else(|| by_folder(p))).collect()
}

/// What the VM had, but for another format where the user wants one.
fn original(
    wanted: Option<FileFormat>,
    disk: &Disk,
    point: usize,
) -> Option<(PathBuf, FileFormat)> {
    let was = run::original(disk, point)?;
    let had = if was.is_qcow2 { FileFormat::Qcow2 } else { FileFormat::Raw };
    let format = wanted.unwrap_or(had);
    let mut name = was.name.as_os_str().to_os_string();
    if format != had {
        name.push(".");
        name.push(format.extension());
    }
    let guest = disk.path.parent().unwrap_or(Path::new(""));
    Some((guest.join(name), format))
}

/// Fails if two points of a run would get the same file (disks `a` and `a.raw`; two points of one
/// disk at the same time).
fn check_apart(jobs: &[Job]) -> Result<()> {
    let mut seen: HashMap<&Path, &Job> = HashMap::new();
    for job in jobs {
        let Some(path) = job.target.path() else { continue };
        if let Some(other) = seen.insert(path, job) {
            let name = |j: &Job| path_text(&j.disk.point_path(j.point));
            let text = format!("{} and {} would get the same file", name(other), name(job));
            return Err(Error::new(Kind::Usage, text)
                .at_path(path)
                .remedy("restore the points of this run one by one"));
        }
    }
    Ok(())
}

impl OutputArgs {
    /// What the user means by a target; its path is resolved.
    fn target(&self, path: &Path) -> Result<Target> {
        if paths::is_stdout(path) {
            if self.format == Some(FileFormat::Qcow2) {
                return Err(verbosity::usage(
                    "a qcow2 file cannot be written to a pipe; name a file, or use --format raw",
                ));
            }
            return Ok(Target::Stdout);
        }
        let path = &paths::to_make(path)?;
        let is_device = folder::look(path).is_ok_and(|m| m.file_type().is_block_device());
        if is_device {
            if self.format == Some(FileFormat::Qcow2) {
                return Err(verbosity::usage("a block device gets the raw disk; use --format raw"));
            }
            return Ok(Target::Device(path.to_path_buf()));
        }
        self.file_target(path)
    }

    fn file_target(&self, path: &Path) -> Result<Target> {
        let by_name = || match path.extension().and_then(|e| e.to_str()) {
            Some("qcow2") => FileFormat::Qcow2,
            _ => FileFormat::Raw,
        };
        self.file_of(path, self.format.unwrap_or_else(by_name))
    }

    fn file_of(&self, path: &Path, format: FileFormat) -> Result<Target> {
        match format {
            FileFormat::Raw if self.compress.is_some() => {
                Err(verbosity::usage("a raw file cannot be compressed; use --format qcow2"))
            }
            FileFormat::Raw => Ok(Target::Raw(path.to_path_buf())),
            FileFormat::Qcow2 => Ok(Target::Qcow2(path.to_path_buf(), self.qcow2()?)),
        }
    }

    fn qcow2(&self) -> Result<Qcow2Options> {
        let cluster_size = u32::try_from(self.cluster_size)
            .map_err(|_| verbosity::usage("the cluster size must be at most 2M"))?;
        Ok(Qcow2Options {
            cluster_size,
            compression: match self.compress {
                None => Compression::None,
                Some(CompressArg::Zlib) => Compression::Zlib,
                Some(CompressArg::Zstd) => Compression::Zstd,
            },
            preallocation: match self.preallocation {
                PreallocationArg::Off => Preallocation::Off,
                PreallocationArg::Metadata => Preallocation::Metadata,
                PreallocationArg::Falloc => Preallocation::Falloc,
                PreallocationArg::Full => Preallocation::Full,
            },
        })
    }

    fn options(&self) -> Options {
        Options {
            force: self.over.force,
            verify: self.verify,
            salvage: self.salvage,
            discard: self.discard,
            reflink: match self.reflink {
                ReflinkArg::Auto => Reflink::Auto,
                ReflinkArg::Always => Reflink::Always,
                ReflinkArg::Never => Reflink::Never,
            },
        }
    }
}

/// What can be refused before anything is read.
fn check_target(how: &OutputArgs, catalog: &Catalog, job: &Job) -> Result<()> {
    match &job.target {
        Target::Stdout if std::io::stdout().is_terminal() => {
            Err(verbosity::usage("will not write a disk image to a terminal; use a pipe"))
        }
        Target::Stdout if how.verify => {
            Err(verbosity::usage("--verify cannot read back from a pipe"))
        }
        Target::Device(path) if !how.yes && !how.dry_run => {
            let text = "this would overwrite the whole device";
            Err(Error::new(Kind::Usage, text).at_path(path).remedy("confirm with --yes"))
        }
        Target::Raw(path) | Target::Qcow2(path, _) => {
            if let Target::Qcow2(_, q) = &job.target {
                q.check(job.disk.points[job.point].size)?;
            }
            check_outside(catalog, path)
        }
        _ => Ok(()),
    }
}

/// Fails for a target inside the backup directory, which is left as it is, also if a bind mount or a
/// second name leads there. `path` is resolved.
///
/// # Errors
/// `Usage`.
pub(crate) fn check_outside(catalog: &Catalog, path: &Path) -> Result<()> {
    let refuse = |text: &str| {
        Err(Error::new(Kind::Usage, text)
            .at_path(path)
            .remedy("restore to another folder: files in there are taken for backups"))
    };
    let id = |p: &Path| folder::look(p).ok().map(|m| FileId::of(&m));
    let specs = || catalog.disks.iter().flat_map(|d| &d.points);
    let sources: HashSet<FileId> = specs().filter_map(|p| id(&p.source)).collect();
    if id(path).is_some_and(|i| sources.contains(&i)) {
        return refuse("the target is a file of the backup");
    }
    let folders: HashSet<&Path> = specs().filter_map(|p| p.source.parent()).collect();
    let inside: HashSet<FileId> =
        folders.into_iter().chain([catalog.root.as_path()]).filter_map(id).collect();
    if path.ancestors().any(|a| a == catalog.root || id(a).is_some_and(|i| inside.contains(&i))) {
        return refuse("the target is inside the backup directory");
    }
    Ok(())
}

/// Plans and restores one point; the number of bytes that were given up.
fn one(how: &OutputArgs, job: &Job, work: &Work) -> Result<u64> {
    let name = job.disk.point_path(job.point);
    let image = open_point(job.disk, job.point, &Cache::new(CACHE_BYTES))?;
    // The plan, or the line of each range that is zeros then, has them.
    if how.dry_run || how.salvage {
        image.log_no_findings();
    }
    let plan = Plan::new(&image, work)?;
    if how.dry_run {
        let text = show_plan(how, &name, &job.target, &plan)?;
        return if how.json { output::print(&text) } else { output::print_sentences(&text) }
            .map(|()| 0);
    }
    if let Target::Raw(path) | Target::Qcow2(path, _) = &job.target {
        if job.of_run { make_folder(path) } else { has_folder(path) }?;
    }
    let summary = crate::restore::restore(&image, &plan, &job.target, &how.options(), work)
        .map_err(|e| with_salvage(e, job))?;
    let given_up = summary.bad.iter().map(|b| b.len).sum();
    for b in &summary.bad {
        log::error!("{} bytes at {:#x} are zeros in the result: {}", b.len, b.start, b.reason);
    }
    if !verbosity::is_quiet() {
        say(&job.target, show_summary(how, &name, &job.target, &summary)?, how.json)?;
    }
    Ok(given_up)
}

/// Of a part of the backup that cannot be read, what to do.
fn with_salvage(e: Error, job: &Job<'_>) -> Error {
    let is_local = matches!(e.kind(), Kind::Io | Kind::Corrupt | Kind::Truncated);
    let is_layer = |path: &Path| job.disk.points.iter().any(|p| p.source == path);
    match e.path() {
        Some(path) if is_local && is_layer(path) => e.remedy(
            "restore this file from another copy of the backup; or take the rest out with --salvage",
        ),
        _ => e,
    }
}

/// The target's folder has to be there: a mistyped one, or that of a file system that is not mounted,
/// would fill another.
///
/// # Errors
/// `NotFound`.
fn has_folder(path: &Path) -> Result<()> {
    match path.parent() {
        Some(file) if folder::is_file(file) => {
            Err(Error::new(Kind::NotFound, "the target's folder is a file")
                .at_path(file)
                .remedy("name a file in a folder"))
        }
        Some(folder) if !folder::is_folder(folder) => {
            Err(Error::new(Kind::NotFound, "there is no such folder for the target")
                .at_path(folder)
                .remedy("make it first, or mount what belongs there"))
        }
        _ => Ok(()),
    }
}

/// Makes the folder that the target goes into.
///
/// # Errors
/// What the operating system said.
pub(super) fn make_folder(path: &Path) -> Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    folder::make_folders(folder)
        .map(drop)
        .map_err(|e| Error::io(e, "cannot make the target's folder").at_path(folder))
        .map_err(|e| match e.kind() {
            Kind::Exists => e.remedy("this is a file: name a folder"),
            _ => e,
        })
}

/// Prints to standard output, unless the disk itself goes there.
fn say(target: &Target, text: String, as_json: bool) -> Result<()> {
    match (target, as_json) {
        (Target::Stdout, true) => output::tell_as_is(&text),
        (Target::Stdout, false) => output::tell(&text),
        (_, true) => output::print(&text)?,
        (_, false) => output::print_sentences(&text)?,
    }
    Ok(())
}

fn target_name(target: &Target) -> String {
    target.path().map_or("standard output".into(), |p| path_text(&p))
}

fn kind_name(target: &Target) -> &'static str {
    match target {
        Target::Raw(_) => "raw",
        Target::Qcow2(..) => "qcow2",
        Target::Device(_) => "device",
        Target::Stdout => "stdout",
    }
}

/// Disk, point and target as JSON has them.
fn names(point: &Path, target: &Target) -> (String, String, Option<String>) {
    let text = |p: Option<&OsStr>| to_text(p.unwrap_or_default());
    let disk = text(point.parent().map(Path::as_os_str));
    (disk, text(point.file_name()), target.path().map(|p| to_text(p.as_os_str())))
}

fn show_plan(how: &OutputArgs, name: &Path, target: &Target, plan: &Plan) -> Result<String> {
    if how.json {
        let (disk, point, path) = names(name, target);
        let value = json!({
            "disk": disk, "point": point, "target": path, "format": kind_name(target),
            "size": plan.size, "depth": plan.depth, "totals": plan.totals, "chunks": plan.chunks,
            "findings": plan.findings,
        });
        return output::json_object(&value);
    }
    let t = &plan.totals;
    let mut text = format!(
        "{} -> {} ({}): {}, {} of data ({} compressed) in {} of {}\n",
        path_text(&name),
        target_name(target),
        kind_name(target),
        human_bytes(plan.size),
        human_bytes(t.data),
        human_bytes(t.compressed),
        counted(t.extents, "extent"),
        counted(plan.depth as u64, "layer")
    );
    if t.bad > 0 {
        text.push_str(&format!("{} cannot be read\n", human_bytes(t.bad)));
    }
    plan.findings.iter().for_each(|f| text.push_str(&format!("{f}\n")));
    Ok(text + verbosity::UNCHANGED)
}

fn show_summary(how: &OutputArgs, name: &Path, target: &Target, s: &Summary) -> Result<String> {
    if how.json {
        let (disk, point, path) = names(name, target);
        let value = json!({
            "disk": disk, "point": point, "target": path, "format": kind_name(target),
            "way": s.method(), "result": s,
        });
        return output::json_object(&value);
    }
    let seconds = s.duration_ms as f64 / 1000.0;
    let verified = if s.verified { ", read back and equal" } else { "" };
    let bytes = |n: u64, what: &str| (n > 0).then(|| format!("{} {what}, ", human_bytes(n)));
    Ok(format!(
        "{} -> {}: {}{}{} of {} are holes, {seconds:.1} s{verified}\n",
        path_text(&name),
        target_name(target),
        bytes(s.copied, "copied").unwrap_or_default(),
        bytes(s.cloned, "cloned").unwrap_or_default(),
        human_bytes(s.holes),
        human_bytes(s.size),
    ))
}
