//! `fleecefs scratch`: what was written to points and kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::table::{Row, Table};
use super::{paths, verbosity};
use crate::chain::nearest;
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder, user_paths};
use crate::output::{self, Look};
use crate::overlay::Budget;
use crate::overlay::kept::{self, About, KeptFolder, Listed};
use crate::restore::overlay;
use crate::text::{path_text, visible};
use crate::units::{counted, human_bytes, iso_time};

/// List, export and drop what was written to points and kept
///
/// 'fleecefs mount --writable=SCRATCH --keep' keeps what is written to points in the folder SCRATCH, one overlay per
/// point. A later mount of the same backup directory with the same SCRATCH and --keep goes on with them. An overlay is
/// of one point and its contents: if the backup has others by then, neither is shown, and dropping the overlay shows
/// the point again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs mount --writable=/var/tmp/vm1-scratch --keep /backups/vm1 /mnt/vm1
  fleecefs scratch list /var/tmp/vm1-scratch
  fleecefs scratch export /var/tmp/vm1-scratch sda/INC-1706260646-sda new.qcow2
  fleecefs scratch drop /var/tmp/vm1-scratch --all")]
pub(super) struct ScratchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    List(ListArgs),
    Drop(DropArgs),
    Export(ExportArgs),
}

/// List the overlays in a scratch folder, also while it is mounted
#[derive(Debug, Args)]
struct ListArgs {
    /// The scratch folder
    scratch: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Drop overlays, for good: the points are as they were backed up
#[derive(Debug, Args)]
struct DropArgs {
    /// The scratch folder, which no mount has
    scratch: PathBuf,
    /// Which, as 'scratch list' shows them: DISK/POINT
    #[arg(required_unless_present = "all", value_name = "DISK/POINT")]
    overlays: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "overlays")]
    all: bool,
}

/// Write an overlay as a qcow2 image whose backing file is the point
///
/// The image has what was written and nothing else, so it is used where the point is: in a mount of the backup
/// directory. Clusters have subclusters (extended L2 entries), which QEMU has read since 5.2.
#[derive(Debug, Args)]
struct ExportArgs {
    /// The scratch folder, which no mount has
    scratch: PathBuf,
    /// Which, as 'scratch list' shows it: DISK/POINT
    #[arg(value_name = "DISK/POINT")]
    overlay: String,
    /// The new image
    target: PathBuf,
    /// The backing file: the point's raw image in a mount [default: where it was shown when the overlay was made]
    #[arg(long, value_name = "FILE")]
    backing: Option<PathBuf>,
    /// Replace TARGET if it exists
    #[arg(long)]
    force: bool,
}

impl ScratchArgs {
    /// The folder, which decides whose work it is.
    pub(super) fn dir(&self) -> &Path {
        match &self.what {
            What::List(a) => &a.scratch,
            What::Drop(a) => &a.scratch,
            What::Export(a) => &a.scratch,
        }
    }

    /// Whether JSON is to be printed.
    pub(super) fn json(&self) -> bool {
        matches!(&self.what, What::List(a) if a.json)
    }
}

/// Runs `fleecefs scratch`.
///
/// # Errors
/// As the exit codes say.
pub(super) fn run(args: &ScratchArgs) -> Result<()> {
    let folder = folder(args.dir())?;
    match &args.what {
        What::List(a) => list(&folder, a.json),
        What::Drop(a) => drop_some(folder, a),
        What::Export(a) => export(folder, a),
    }
}

/// What is in it decides what is removed.
fn folder(path: &Path) -> Result<Folder> {
    let real = user_paths::existing_folder(path, "the scratch folder")?;
    folder::check_unchangeable(&real, "name a folder of yours, or use --as-owner")?;
    Folder::open(&real).map_err(|e| Error::io(e, "cannot open the scratch folder").at_path(path))
}

/// As the user names it.
fn name(about: &About) -> String {
    format!("{}/{}", about.of.disk, about.of.point)
}

fn list(folder: &Folder, json: bool) -> Result<()> {
    let all = kept::listed(folder)?;
    if json {
        return output::print(&output::json_document(&Overlays { overlays: all })?);
    }
    let row = |l: &Listed| {
        let made = iso_time(l.about.made);
        Row::Cells(vec![visible(&name(&l.about)), human_bytes(l.takes), made], Look::Plain)
    };
    let table = Table {
        titles: &["OVERLAY", "TAKES", "MADE"],
        right: &["TAKES"],
        less: &["MADE"],
        indent: 0,
        rows: all.iter().map(row).collect(),
    };
    output::print_lines(&table.lines(verbosity::is_verbose()))
}

#[derive(Serialize)]
struct Overlays {
    overlays: Vec<Listed>,
}

fn drop_some(folder: Folder, args: &DropArgs) -> Result<()> {
    let kept = KeptFolder::lock(folder)?;
    let all = kept.list()?;
    let chosen: Vec<&About> = match args.all {
        true => all.iter().collect(),
        false => args.overlays.iter().map(|n| find(&kept, &all, n)).collect::<Result<_>>()?,
    };
    chosen.iter().try_for_each(|about| kept.drop(&about.of))?;
    output::print(&format!("dropped {}\n", counted(chosen.len() as u64, "overlay")))
}

fn find<'a>(kept: &KeptFolder, all: &'a [About], wanted: &str) -> Result<&'a About> {
    all.iter().find(|about| name(about) == wanted).ok_or_else(|| {
        let text = format!("no overlay '{}' here", path_text(wanted));
        let near = nearest(wanted, all.iter().map(name));
        Error::new(Kind::NotFound, text)
            .at_path(kept.path())
            .remedy(format!("{near}'fleecefs scratch list' shows them"))
    })
}

fn export(folder: Folder, args: &ExportArgs) -> Result<()> {
    let kept = KeptFolder::lock(folder)?;
    let all = kept.list()?;
    let about = find(&kept, &all, &args.overlay)?;
    let backing = backing(about, args.backing.as_deref())?;
    let overlay = kept.open(about, &Arc::new(Budget::new(u64::MAX)))?;
    let target = paths::to_make(&args.target)?;
    let done = overlay::export(&overlay, about.size, &backing, &target, args.force)?;
    let (data, zeros) = (human_bytes(done.data), human_bytes(done.zeros));
    output::print(&format!(
        "{}: {data} of data and {zeros} of zeros over {}\n",
        path_text(&target),
        path_text(&backing)
    ))
}

fn backing(about: &About, named: Option<&Path>) -> Result<String> {
    let Some(path) = named else {
        return about.shown.clone().ok_or_else(|| {
            let text = "it is not known where the point was shown";
            Error::new(Kind::Usage, text).remedy("name it by --backing")
        });
    };
    let absolute = std::path::absolute(path)
        .map_err(|e| Error::io(e, "cannot use the backing file").at_path(path))?;
    absolute.into_os_string().into_string().map_err(|_| {
        Error::new(Kind::Unsupported, "a backing file's name has to be UTF-8").at_path(path)
    })
}
