//! `fleecefs files cp`.

use std::ffi::OsStr;
use std::io::{BufWriter, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::super::bar::Bar;
use super::super::shared::JsonArgs;
use super::super::work::cancel_flag;
use super::super::{paths, verbosity};
use super::point_path::{From, Opened, node};
use crate::error::{Error, Kind, Result};
use crate::files::copy::{Format, Options, Report, Target, archive, copy};
use crate::files::{NodeId, NodeKind, Tree};
use crate::folder::{self, Folder, PlainName};
use crate::output;
use crate::progress::Progress;
use crate::units::{counted, human_bytes};

/// Copy a file, or a folder with all that is in it, out of a point
///
/// If TARGET is a folder, the copy goes into it, else it becomes TARGET, which must not exist: nothing is ever
/// replaced. Of the root of a file system, the contents go into the folder TARGET.
///
/// Copies keep times, permissions, holes, hard links, access lists and user.* attributes, and, where you may set them,
/// owner and group by number. Skipped unless --preserve=all is given: setuid and setgid bits, device nodes, and
/// attributes that a kernel obeys (security.*, trusted.*). Symbolic links are copied as links and never followed.
///
/// What cannot be read is reported and skipped, the rest is copied, and the exit code is 16.
#[derive(Debug, Args)]
pub(super) struct CpArgs {
    #[command(flatten)]
    pub from: From,
    /// A folder to copy into, or the name of the copy
    #[arg(required_unless_present_any = ["tar", "zip"], conflicts_with_all = ["tar", "zip"])]
    target: Option<PathBuf>,
    /// Write a tar archive to standard output
    #[arg(long)]
    tar: bool,
    /// Write a zip archive to standard output, for those who cannot unpack tar
    ///
    /// It has no hard links (each name has the contents), holes, attributes, pipes and setuid bits. A name that is not
    /// UTF-8, or has a backslash or a colon, is reported and skipped.
    #[arg(long, conflicts_with = "tar")]
    zip: bool,
    /// What copies keep
    #[arg(long, value_enum, value_name = "WHAT", default_value = "usual")]
    preserve: Preserve,
    /// Folders are always copied with all that is in them; for those who are used to it
    #[arg(short, long, hide = true)]
    recursive: bool,
    #[command(flatten)]
    pub print: JsonArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preserve {
    /// Times, permissions, owners, links, holes and user.* attributes
    Usual,
    /// Also setuid, setgid, device nodes and all attributes
    All,
}

/// Runs it.
///
/// # Errors
/// As [`super::run`]; the target is there, or cannot be made; `Partial` if something is missing.
pub(super) fn run(args: &CpArgs) -> Result<()> {
    let opened = args.from.open()?;
    let tree = opened.tree()?;
    let start = node(&opened, &*tree, false)?;
    let (cancel, bar) = (cancel_flag()?, Bar::default());
    let all = args.preserve == Preserve::All;
    let options = Options { all, cancel: &cancel, progress: &bar };
    let begun = Instant::now();
    bar.begin("copying", total(&*tree, start)?);
    let report = match &args.target {
        Some(target) => {
            let target = target_of(&opened, &*tree, start, target)?;
            copy(&*tree, start, target, &opened.blocks, &options)
        }
        None if args.zip => to_stdout(&opened, &*tree, start, &options, Format::Zip),
        None => to_stdout(&opened, &*tree, start, &options, Format::Tar),
    };
    bar.end(begun.elapsed());
    tell(args, &report?)
}

/// Bytes that there are to copy, at most.
fn total(tree: &dyn Tree, start: NodeId) -> Result<u64> {
    let attributes = tree.attributes(start)?;
    let system = tree.statistics();
    Ok(match attributes.kind {
        NodeKind::File => attributes.size.min(attributes.allocated.max(1)),
        _ => system.total.saturating_sub(system.free),
    })
}

fn target_of(opened: &Opened, tree: &dyn Tree, start: NodeId, target: &Path) -> Result<Target> {
    let real = paths::to_make(target)?;
    let failed = |e| Error::io(e, "cannot use the target").at_path(target);
    let is_folder = tree.attributes(start)?.kind == NodeKind::Folder;
    if folder::is_folder(&real) {
        let folder = Folder::open(&real).map_err(failed)?;
        let name = OsStr::from_bytes(opened.name());
        if name.is_empty() || name == ".." {
            return Ok(Target { folder, name: None });
        }
        let name = PlainName::new(name).map_err(failed)?.as_os_str().to_os_string();
        return Ok(Target { folder, name: Some(name) });
    }
    if folder::exists(&real) {
        let error = Error::new(Kind::Exists, "the target exists already").at_path(target);
        return Err(error.remedy("nothing is ever replaced: give another name, or a folder"));
    }
    if !is_folder && target.as_os_str().as_bytes().ends_with(b"/") {
        return Err(Error::new(Kind::NotFound, "there is no such folder for the target")
            .at_path(target)
            .remedy("make it first, or mount what belongs there"));
    }
    let (folder, name) = Folder::of(&real).map_err(failed)?;
    Ok(Target { folder, name: Some(name) })
}

fn to_stdout(
    opened: &Opened,
    tree: &dyn Tree,
    start: NodeId,
    options: &Options<'_>,
    format: Format,
) -> Result<Report> {
    if std::io::stdout().is_terminal() {
        return Err(verbosity::usage("an archive is not written to a terminal; use a pipe"));
    }
    let mut result = Ok(Report::default());
    output::written(|out| {
        let mut out = BufWriter::with_capacity(1 << 20, out);
        result = archive(tree, start, opened.name(), &mut out, &opened.blocks, options, format);
        Ok(())
    })?;
    match result {
        // Whoever reads it has had enough.
        Err(e) if e.os_code() == Some(libc::EPIPE) => Ok(Report::default()),
        other => other,
    }
}

fn tell(args: &CpArgs, report: &Report) -> Result<()> {
    let left_out = [
        (report.devices_left_out, "device node"),
        (report.setuid_left_out, "setuid or setgid bit"),
    ];
    for (count, what) in left_out.into_iter().filter(|(count, _)| *count > 0) {
        let why = match args.zip {
            true => "which zip archives do not have; --tar does",
            false => "--preserve=all copies them",
        };
        log::warn!("skipped: {} ({why})", counted(count, what));
    }
    match (args.tar || args.zip, args.print.json) {
        (true, _) => {}
        (false, true) => output::print(&output::json_document(report)?)?,
        (false, false) if !verbosity::is_quiet() => output::print(&format!(
            "{}, {}, {} of other kinds; {} written\n",
            counted(report.files, "file"),
            counted(report.folders, "folder"),
            report.others,
            human_bytes(report.bytes)
        ))?,
        (false, false) => {}
    }
    match report.failed {
        0 => Ok(()),
        n => {
            Err(Error::new(Kind::Partial, format!("{} not copied completely", counted(n, "file"))))
        }
    }
}
