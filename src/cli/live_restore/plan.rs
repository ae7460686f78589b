//! From the points of a run to what is begun in the storage folder.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::args::LiveRestoreArgs;
use crate::backup::names::{parse_bitmap, random_hex};
use crate::backup::target::target_id::stored_id;
use crate::boot::{self, Vm};
use crate::chain::{Catalog, Disk};
use crate::cli::boot::prepared;
use crate::cli::one_run::{self, ChosenPoint, OneRun};
use crate::cli::restore::names_in_run;
use crate::cli::values::FileFormat;
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Access, PlainName};
use crate::image::{Cache, open_point};
use crate::layer::LayerSpec;
use crate::live::{
    BackupDirectory, Base, Bases, Begun, CopiedVars, LiveFile, LivePoint, NewDisk, Recording,
    base_name,
};
use crate::manifest::fingerprint_of;
use crate::storage::SourceFile;
use crate::text::{path_text, to_text};

/// The node of the store of UEFI's variables.
const VARS: &str = "vars";
/// Its file, where it is a copy of an empty one.
const VARS_FILE: &str = "efi-vars.fd";
/// Digits of an id.
const ID_BYTES: usize = 6;
/// Digits of the folder for sockets.
const KEY_DIGITS: usize = 12;
/// Memory for looking whether a point is available.
const CACHE_SIZE: u64 = 16 << 20;

/// What is begun, and over which points.
pub(super) struct Planned {
    /// What is begun.
    pub begun: Begun,
    /// The points as QEMU's nodes, in the order of its disks.
    pub graphs: Vec<Value>,
    /// The layers of each.
    stacks: Vec<Vec<LayerSpec>>,
    /// What the user should know.
    pub notes: Vec<String>,
}

impl Planned {
    /// The points, with their files open.
    ///
    /// # Errors
    /// A file cannot be opened, or is another by now.
    pub(super) fn bases(&self) -> Result<Bases> {
        let points = self.begun.disks.iter().zip(&self.graphs).zip(&self.stacks);
        let base = |((disk, graph), stack): ((&NewDisk, &Value), &Vec<LayerSpec>)| {
            Ok((disk.node.clone(), Base { graph: graph.clone(), files: files(stack)? }))
        };
        points.map(base).collect()
    }
}

/// The files of layers, open.
fn files(stack: &[LayerSpec]) -> Result<Vec<(PathBuf, File)>> {
    let all = stack.iter().flat_map(|layer| [Some(&layer.file), layer.data_file.as_ref()]);
    let open = |source: &Arc<SourceFile>| {
        let opened = source.file()?;
        // A description of its own, which waits for what it reads.
        let file = folder::reopen(&opened, Access::Read);
        let failed = |e| Error::io(e, "cannot open the image").at_path(source.path());
        Ok((source.path().to_path_buf(), file.map_err(failed)?))
    };
    all.flatten().map(open).collect()
}

/// Plans the start of a run's VM, with the disks in the folder `storage`.
///
/// # Errors
/// A point is not available, or QEMU cannot read its files; as [`Vm::plan`].
pub(super) fn plan(
    args: &LiveRestoreArgs,
    catalog: &Catalog,
    run: &OneRun<'_>,
    storage: &Path,
) -> Result<Planned> {
    let prepared = prepared(&args.wanted()?, run)?;
    let vm = &prepared.vm;
    let sources = vm.sources();
    let chosen: Vec<&ChosenPoint<'_>> = sources.iter().filter_map(|i| run.points.get(*i)).collect();
    let nodes = (0..vm.disks.len()).map(boot::node_name).chain([VARS.to_string()]);
    let (mut disks, mut graphs, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    let files = file_names(&chosen);
    for (((node, chosen), stack), file) in nodes.zip(&chosen).zip(&prepared.stacks).zip(files) {
        graphs.push(boot::graph(stack, &base_name(&node)).map_err(by_restore)?);
        let point = point_of(chosen, stack)?;
        let bitmap = match recording(chosen) {
            Ok(bitmap) => Some(bitmap),
            Err(why) => {
                let disk = path_text(&chosen.disk.path);
                notes.extend(
                    (node != VARS)
                        .then(|| format!("{disk}: its first backup will be a FULL: {why}")),
                );
                None
            }
        };
        disks.push(NewDisk { node, file, point, bitmap });
    }
    let begun = Begun {
        format_version: 0,
        id: random_hex(ID_BYTES)?,
        storage: storage.to_path_buf(),
        sockets: sockets(&args.state.dir()?, storage),
        backup: directory(&catalog.root)?,
        new_identity: args.new_identity,
        asked: args.asked(),
        arguments: arguments(args, vm)?,
        disks,
        vars: copied_vars(vm),
    };
    Ok(Planned { begun, graphs, stacks: prepared.stacks, notes })
}

/// The points of what was begun, with their files open.
///
/// # Errors
/// `NotFound` or `Incomplete` if a point is not there any more; `Changed` if it is another.
pub(super) fn bases_of(catalog: &Catalog, begun: &Begun, disks: &[&NewDisk]) -> Result<Bases> {
    if directory(&catalog.root)? != begun.backup {
        let e = Error::new(Kind::Changed, "the VM of this folder was started from another backup");
        let own = path_text(&begun.backup.root);
        return Err(e.at_path(&catalog.root).remedy(format!("name {own}, as it was then")));
    }
    let mut bases = Bases::new();
    for disk in disks {
        let (of, point) = catalog.find(&Path::new(&disk.point.disk).join(&disk.point.name))?;
        let run = one_run::of_points(vec![(of, point)])?;
        let Some(chosen) = run.points.first() else { continue };
        open_point(of, point, &Cache::new(CACHE_SIZE))?;
        let stack = of.stack(point);
        if point_of(chosen, &stack)? != disk.point {
            let e = Error::new(
                Kind::Changed,
                "the files of this point are not those that the VM was started from",
            );
            let e = e.at_path(&chosen.disk.points[point].source);
            return Err(e.remedy("put its files back as they were, with their times"));
        }
        let graph = boot::graph(&stack, &base_name(&disk.node)).map_err(by_restore)?;
        bases.insert(disk.node.clone(), Base { graph, files: files(&stack)? });
    }
    Ok(bases)
}

/// What can be done where QEMU cannot read the files.
fn by_restore(e: Error) -> Error {
    match e.kind() {
        Kind::Unsupported => e.remedy("use 'fleecefs restore --run'"),
        _ => e,
    }
}

fn directory(root: &Path) -> Result<BackupDirectory> {
    Ok(BackupDirectory { root: root.to_path_buf(), uuid: stored_id(root)? })
}

/// A layer's file, with what tells it from any other.
fn live_file(source: &SourceFile) -> Result<LiveFile> {
    let failed = |e| Error::io(e, "cannot read the image").at_path(source.path());
    let identity = source.identity();
    let fingerprint = fingerprint_of(&*source.file()?).map_err(failed)?;
    Ok(LiveFile {
        path: to_text(source.path().as_os_str()),
        length: identity.size,
        modified: i64::try_from(identity.mtime).unwrap_or(i64::MAX),
        fingerprint,
    })
}

fn point_of(chosen: &ChosenPoint<'_>, stack: &[LayerSpec]) -> Result<LivePoint> {
    let point = &chosen.disk.points[chosen.point];
    let manifest = chosen.manifest.as_ref();
    let all = stack.iter().flat_map(|layer| [Some(&layer.file), layer.data_file.as_ref()]);
    Ok(LivePoint {
        disk: to_text(chosen.disk.path.as_os_str()),
        name: point.name.clone(),
        run: manifest.map(|m| m.run.clone()),
        state_of: manifest.and_then(|m| m.state_of.clone()),
        size: point.size,
        files: all.flatten().map(|source| live_file(source)).collect::<Result<_>>()?,
    })
}

/// The bitmap that the next backup looks for on a disk which is as the point was; why there is none otherwise.
fn recording(chosen: &ChosenPoint<'_>) -> Result<Recording, &'static str> {
    let manifest = chosen.manifest.as_ref().ok_or("no manifest names a bitmap")?;
    if manifest.disk.format != "qcow2" {
        return Err("the disk was raw, and is qcow2 now");
    }
    // After a commit it is the bitmap of a state before.
    let bitmap = manifest.bitmap.as_ref().filter(|_| manifest.state_of.is_none());
    let bitmap = bitmap.ok_or("its point names no bitmap")?;
    match parse_bitmap(&bitmap.name) {
        Some(_) if bitmap.persistent => {
            Ok(Recording { name: bitmap.name.clone(), granularity: bitmap.granularity })
        }
        _ => Err("the bitmap that its point names is not kept in images"),
    }
}

/// The files: called as the VM's were, where that can be, and no two alike.
fn file_names(chosen: &[&ChosenPoint<'_>]) -> Vec<String> {
    let points: Vec<(&Disk, usize)> = chosen.iter().map(|c| (c.disk, c.point)).collect();
    let wanted = names_in_run(Some(FileFormat::Qcow2), &points);
    let mut taken: BTreeSet<String> = BTreeSet::from([VARS_FILE.to_string()]);
    let mut names = Vec::new();
    for (number, (path, _)) in wanted.iter().enumerate() {
        let own = path.file_name().and_then(|n| n.to_str()).filter(|n| !n.starts_with('.'));
        let own = own.filter(|n| PlainName::new(n).is_ok()).map(str::to_string);
        let made = format!("disk{number}.qcow2");
        let mut name = own.filter(|n| !taken.contains(n)).unwrap_or_else(|| made.clone());
        while taken.contains(&name) {
            name = format!("live-{name}");
        }
        taken.insert(name.clone());
        names.push(name);
    }
    names
}

fn copied_vars(vm: &Vm) -> Option<CopiedVars> {
    let uefi = vm.uefi.as_ref().filter(|u| u.vars.is_none())?;
    Some(CopiedVars { file: VARS_FILE.into(), template: uefi.files.vars.clone() })
}

fn arguments(args: &LiveRestoreArgs, vm: &Vm) -> Result<Vec<String>> {
    let text = |word: OsString| {
        word.into_string().map_err(|word| {
            let e = Error::new(Kind::Unsupported, "QEMU's options take names in UTF-8 only");
            e.at_path(PathBuf::from(word))
        })
    };
    let machine = boot::machine_arguments(vm, args.wants_networks())?;
    let machine: Result<Vec<String>> = machine.into_iter().map(text).collect();
    Ok([machine?, args.more.clone()].concat())
}

/// The folder of QEMU's sockets: one of each storage folder.
fn sockets(state: &Path, storage: &Path) -> PathBuf {
    let hash = blake3::hash(storage.as_os_str().as_bytes()).to_hex();
    state.join("live").join(hash.get(..KEY_DIGITS).unwrap_or_default())
}
