//! What a target knows of the images of a shut-off VM: their disks' names and format, and the VM.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::history::History;
use super::target_id;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::EntryKind;
use crate::layout::name::{Promise, promise};
use crate::manifest::{DiskIdentity, Manifest, VmConfig, vm_name, vm_uuid};
use crate::text::{path_text, to_text};

/// The disks of a shut-off VM, as the VM's own QEMU names them where the target knows that.
#[derive(Debug)]
pub struct KnownDisks {
    /// What the VM's QEMU said of it at the last point.
    pub vm: Option<VmConfig>,
    /// In the order in which they were given.
    pub disks: Vec<KnownDisk>,
}

/// One disk of a shut-off VM.
#[derive(Debug)]
pub struct KnownDisk {
    /// Its image, without links.
    pub real: PathBuf,
    /// What it is called.
    pub identity: DiskIdentity,
    /// Its format, if the user or a point says it.
    pub format: Option<String>,
}

impl KnownDisks {
    /// Looks for each of `disks`, `FILE` or `FORMAT:FILE`, in the target, which others may share; `names`
    /// says what disks are called.
    ///
    /// # Errors
    /// `NotFound` if there is no such file; `Usage` if they are disks of several VMs, or of none that
    /// the target knows while it has points of another.
    pub fn find(
        names: &[(String, String)],
        shared: bool,
        target: &Path,
        disks: &[String],
    ) -> Result<Self> {
        let histories = histories(target)?;
        let mut found = KnownDisks { vm: None, disks: Vec::new() };
        let mut points: Vec<&Manifest> = Vec::new();
        for text in disks {
            let (format, path) = split(text);
            let real = folder::resolve(Path::new(path))
                .map_err(|e| Error::io(e, "cannot find the image").at_path(path))?;
            if found.disks.iter().any(|d| d.real == real) {
                return Err(Error::new(Kind::Usage, "the same image is given twice").at_path(real));
            }
            let called = std::path::absolute(path).unwrap_or_else(|_| real.clone());
            let of_file = |m: &&Manifest| is_file(&m.disk.file, &called, &real);
            let newest = |m: &&Manifest| m.time;
            let manifests = || histories.iter().flat_map(|h| h.entries.iter());
            let all = || manifests().filter_map(|e| e.manifest.as_ref());
            let named = names.iter().find(|(disk, _)| means(disk, &real));
            let under = named.and_then(|(_, name)| {
                let of = histories.iter().filter(|h| h.dir.file_name() == Some(name.as_ref()));
                of.filter_map(History::last_manifest).max_by_key(newest)
            });
            let point = all().filter(of_file).max_by_key(newest);
            let mut identity = point.or(under).map(|m| m.disk.clone()).unwrap_or_default();
            let said = format.map(str::to_string);
            // Since that point a raw image may have taken the place of a qcow2 one.
            let is_sure = |f: &String| f != "qcow2" || promise(to_name(&real)) == Promise::Qcow2;
            let recorded = point.map(|m| m.disk.format.clone()).filter(is_sure);
            let format = said.or(recorded);
            if point.is_none() {
                identity.file = to_text(called.as_os_str());
            }
            points.extend(point.or(under));
            found.disks.push(KnownDisk { real, identity, format });
        }
        found.vm = one_vm(&points)?;
        if found.vm.is_none() && !shared && names.is_empty() {
            refuse_other_vm(&histories)?;
        }
        Ok(found)
    }
}

impl KnownDisks {
    /// The names that the user gives to disks, with each disk as a point calls it: he wrote its path as it
    /// is on the command line, perhaps a relative one, or one with links.
    pub fn names(&self, given: &[(String, String)]) -> Vec<(String, String)> {
        let as_known = |(disk, name): &(String, String)| {
            let known = self.disks.iter().find(|k| means(disk, &k.real));
            (known.map_or(disk, |k| &k.identity.file).clone(), name.clone())
        };
        given.iter().map(as_known).collect()
    }
}

impl KnownDisk {
    /// Whether a file that QEMU, or an earlier run, named is this one.
    pub(crate) fn is(&self, recorded: &str) -> bool {
        is_file(recorded, Path::new(&self.identity.file), &self.real)
    }
}

/// Whether a user who wrote `disk`, with or without a format, means the image `real`.
fn means(disk: &str, real: &Path) -> bool {
    folder::resolve(Path::new(split(disk).1)).is_ok_and(|r| r == real)
}

fn to_name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

fn split(text: &str) -> (Option<&str>, &str) {
    let of = |format: &'static str| {
        text.strip_prefix(format)?.strip_prefix(':').map(|p| (Some(format), p))
    };
    of("qcow2").or_else(|| of("raw")).unwrap_or((None, text))
}

/// Whether a file that QEMU named is the one of this path.
fn is_file(recorded: &str, called: &Path, real: &Path) -> bool {
    let recorded = Path::new(recorded);
    recorded == called
        || recorded == real
        || recorded.is_absolute()
            && recorded.file_name() == called.file_name()
            && folder::resolve(recorded).is_ok_and(|r| r == real)
}

/// What is in the target: in itself, in its folders, and in those of its months.
fn histories(target: &Path) -> Result<Vec<History>> {
    let mut all = vec![History::read(target, None)?];
    let mut bases = vec![target.to_path_buf()];
    bases.extend(target_id::months_of(target));
    for base in bases {
        let failed = |e| Error::io(e, "cannot read the folder").at_path(&base);
        let entries = folder::absent_is_none(folder::entries(&base)).map_err(failed)?;
        for entry in entries.unwrap_or_default() {
            if entry.kind == EntryKind::Folder {
                all.push(History::read(&base.join(entry.name), None)?);
            }
        }
    }
    Ok(all)
}

/// What identifies a VM; `None` if nothing does.
fn vm_id(m: &Manifest) -> Option<&str> {
    vm_uuid(&m.vm).or(vm_name(&m.vm))
}

fn one_vm(points: &[&Manifest]) -> Result<Option<VmConfig>> {
    let mut vms = points.iter().filter(|m| vm_id(m).is_some());
    let Some(first) = vms.next() else { return Ok(None) };
    match vms.find(|m| vm_id(m) != vm_id(first)) {
        None => Ok(Some(first.vm.clone())),
        Some(other) => {
            let what = format!(
                "{} and {} are disks of two VMs",
                path_text(&first.disk.file),
                path_text(&other.disk.file)
            );
            Err(Error::new(Kind::Usage, what).remedy("back them up by two commands"))
        }
    }
}

/// Of disks that the target does not know nobody can tell whose they are.
fn refuse_other_vm(histories: &[History]) -> Result<()> {
    let all = histories.iter().filter_map(|h| Some((h, h.last_manifest()?)));
    let Some((h, m)) = all.into_iter().find(|(_, m)| vm_id(m).is_some()) else { return Ok(()) };
    let who = vm_name(&m.vm).or(vm_uuid(&m.vm)).unwrap_or_default();
    let what =
        format!("this backup directory has backups of a VM ({who}), and none of these disks");
    Err(Error::new(Kind::Usage, what).at_path(&h.dir).remedy(
        "--name FILE=NAME says which of its disks this is, --shared that it is another VM's",
    ))
}
