//! [`Dependencies`]: what each file depends on, and whether it can be served.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::follow::DataFiles;
use super::format::DECIDE;
use super::group::{DiskMember, Group, base_name};
use super::open_formats::{not_raw_after_all, qcow2_on_raw};
use super::{BACKING, ChainFile, Parent, follow, link};
use crate::chain::NEWEST_LOST;
use crate::chain::walk::pointer;
use crate::chain::walk::probed::Probed;
use crate::chain::walk::tree::{FileEntry, FileId, Tree};
use crate::error::{Error, Finding, Kind, Severity};
use crate::layer::qcow2::check::REMEDY as RESTORE;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::layout::Level;
use crate::layout::name::Name;
use crate::manifest::ImageFormat;
use crate::storage::SourceFile;
use crate::text::path_text;
use crate::units::counted;

/// Why a file cannot be used.
#[derive(Debug, Clone)]
pub(in crate::chain) struct Blocked {
    /// The finding about the file that is the cause.
    pub cause: Arc<Finding>,
    /// Whether the cause is another file, somewhere below.
    pub inherited: bool,
}

/// What is below a file.
enum Backing {
    Nothing,
    File(FileId),
}

/// What each file depends on and whether it can be used, as far as that is decided.
pub(in crate::chain) struct Dependencies<'a> {
    pub tree: &'a Tree,
    data_files: DataFiles,
    /// As what each file belongs to a disk.
    levels: Vec<Option<Level>>,
    /// What each file depends on by the layout of its disk; `Root` for files of no disk.
    parents: Vec<Option<Result<FileId, Finding>>>,
    below: Vec<Option<Backing>>,
    blocked: Vec<Option<Option<Blocked>>>,
}

/// What files depend on, by the path of the file below.
pub(in crate::chain) type BackingPaths = Vec<(Arc<Probed>, PathBuf)>;

impl<'a> Dependencies<'a> {
    pub(in crate::chain) fn new(tree: &'a Tree, data_files: DataFiles) -> Self {
        let n = tree.files.len();
        let none = |_| None;
        Dependencies {
            tree,
            data_files,
            levels: vec![None; n],
            parents: (0..n).map(|_| None).collect(),
            below: (0..n).map(|_| None).collect(),
            blocked: (0..n).map(none).collect(),
        }
    }

    /// Why a file cannot be used, or `None` if it can.
    pub(crate) fn blocked(&self, file: FileId) -> Option<&Blocked> {
        self.blocked[file].as_ref().and_then(Option::as_ref)
    }

    /// The file that `file` depends on, where that is known.
    pub(crate) fn below(&self, file: FileId) -> Option<FileId> {
        match self.below[file] {
            Some(Backing::File(f)) => Some(f),
            _ => None,
        }
    }

    /// Links the files of one disk.
    pub(in crate::chain) fn link(&mut self, group: &mut Group) {
        let tree = self.tree;
        let members: Vec<ChainFile> = group.members.iter().map(|b| member(tree, b)).collect();
        let (parents, warnings) = link(&members, &group.lost);
        group.findings.extend(warnings);
        group.findings.extend(by_names_alone(tree, &members, &parents));
        group.findings.extend(newest_missing(tree, group));
        let mut suspects = not_raw_after_all(tree, group, &parents);
        suspects.extend(qcow2_on_raw(tree, group, &parents));
        for (belongs, parents) in group.members.iter().zip(&parents) {
            self.levels[belongs.file] = Some(belongs.level);
            self.parents[belongs.file] = match parents {
                Parent::Root => None,
                Parent::On(i) => Some(Ok(group.members[*i].file)),
                Parent::Unknown(e) => Some(Err(Finding::from_error(e, &tree.root))),
            };
        }
        for (i, error) in suspects.into_iter().chain(overwritten(tree, group, &parents)) {
            let file = group.members[i].file;
            let error = error.at_path(&tree.files[file].path);
            self.parents[file] = Some(Err(Finding::from_error(&error, &tree.root)));
        }
    }

    /// What each file depends on; of one whose base is gone, what it depended on.
    pub(in crate::chain) fn bases(&self) -> BackingPaths {
        let base = |file: FileId| match &self.parents[file] {
            Some(Ok(below)) => Some(self.tree.files[*below].path.clone()),
            Some(Err(_)) => self.tree.former.get(&file).cloned(),
            None => None,
        };
        let probed = |file: FileId| self.tree.files[file].probed.clone();
        (0..self.parents.len()).filter_map(|f| Some((probed(f), base(f)?))).collect()
    }

    /// Decides about `file` and everything below it.
    pub(in crate::chain) fn decide(&mut self, file: FileId) {
        let mut path = vec![file];
        let mut on_path = HashSet::from([file]);
        while let Some(&top) = path.last() {
            if self.blocked[top].is_none() {
                let next = self.step(top, &on_path);
                if let Some(below) = next {
                    path.push(below);
                    on_path.insert(below);
                    continue;
                }
            }
            path.pop();
            on_path.remove(&top);
        }
    }

    /// Decides about one file, or returns the file that has to be decided about first.
    fn step(&mut self, file: FileId, on_path: &HashSet<FileId>) -> Option<FileId> {
        let found = self.own_problem(file).map_or_else(|| self.find_below(file), Err);
        let own = |finding: Finding| Blocked { cause: Arc::new(finding), inherited: false };
        let verdict = match found {
            Err(finding) => Some(own(finding)),
            Ok(Backing::Nothing) => {
                self.below[file] = Some(Backing::Nothing);
                None
            }
            Ok(Backing::File(f)) if self.blocked[f].is_none() && on_path.contains(&f) => {
                let what = "backing chain forms a loop";
                let error = Error::new(Kind::Corrupt, what).at_path(&self.tree.files[file].path);
                Some(own(Finding::from_error(&error, &self.tree.root)))
            }
            Ok(Backing::File(f)) => {
                self.below[file] = Some(Backing::File(f));
                let below = self.blocked[f].as_ref();
                let Some(below) = below else { return Some(f) };
                below.clone().map(|b| Blocked { inherited: true, ..b })
            }
        };
        self.blocked[file] = Some(verdict);
        None
    }

    fn own_problem(&self, file: FileId) -> Option<Finding> {
        let entry = &self.tree.files[file];
        let fail = |e: Error| Some(Finding::from_error(&e.at_path(&entry.path), &entry.path));
        if let Some(finding) = entry.content_problem() {
            return Some(finding);
        }
        if entry.name == Name::Ignored {
            return fail(Error::new(Kind::Incomplete, "an unfinished or auxiliary file"));
        }
        let salvage = self.tree.salvage;
        manifest_problem(entry, salvage).or_else(|| self.data_file(file).err()).and_then(fail)
    }

    fn find_below(&self, file: FileId) -> Result<Backing, Finding> {
        let entry = &self.tree.files[file];
        if let Some(parents) = &self.parents[file] {
            let below = parents.clone()?;
            let fits = entry.info().is_none_or(|i| i.backing_file.is_none());
            let checked = if fits { Ok(()) } else { self.check_format(entry, below) };
            return match checked {
                Ok(()) => Ok(Backing::File(below)),
                Err(e) => Err(Finding::from_error(&e, &entry.path)),
            };
        }
        self.backing(file).map_err(|e| {
            let e = e.at_path(&entry.path).remedy(BACKING);
            Finding::from_error(&e, &entry.path)
        })
    }

    /// The backing image of a root: inside the backup directory or not at all.
    fn backing(&self, above: FileId) -> Result<Backing, Error> {
        let entry = &self.tree.files[above];
        let Some(info) = entry.info() else { return Ok(Backing::Nothing) };
        let Some(pointer) = info.backing_file.as_deref() else { return Ok(Backing::Nothing) };
        let path = pointer::parse(pointer)?.path;
        let folder = entry.path.parent().unwrap_or(&self.tree.root);
        let Some(file) = self.tree.lookup(folder, &path) else {
            let what = format!("its backing file {pointer:?} is not in the backup directory");
            return Err(Error::new(Kind::Incomplete, what));
        };
        entry.check_followed(&self.tree.files[file])?;
        let seen = |f: FileId| (&self.tree.files[f], self.levels[f]);
        follow::check_backing(seen(above), seen(file))?;
        self.check_format(entry, file)?;
        Ok(Backing::File(file))
    }

    /// Fails if the file below is not read in the format that an image gives for it, as QEMU would.
    fn check_format(&self, entry: &FileEntry, below: FileId) -> Result<(), Error> {
        let below = &self.tree.files[below];
        let Some(format) = entry.backing_format() else { return Ok(()) };
        let fits = match format.as_str() {
            "raw" => below.is_raw(),
            "qcow2" => below.format() == Format::Qcow2,
            _ => false,
        };
        // What cannot be used says so itself.
        if fits || below.content_problem().is_some() {
            return Ok(());
        }
        let name = path_text(base_name(below));
        let what = format!(
            "its backing file {name} does not have format {format}, as its header \
                            says"
        );
        // Nothing but its own bytes says how the file below is read: this one may be right.
        let remedy = match below.is_unproved() {
            true => DECIDE,
            false => {
                "correct the format in its header with 'qemu-img rebase -u -F FORMAT -b FILE' on \
                 a copy"
            }
        };
        Err(Error::new(Kind::Corrupt, what).at_path(&entry.path).remedy(remedy))
    }

    /// The external data file of an image, if it needs one.
    fn data_file(&self, image: FileId) -> Result<Option<Arc<SourceFile>>, Error> {
        let entry = &self.tree.files[image];
        let Some(name) = entry.info().and_then(|i| i.data_file.as_deref()) else {
            return Ok(None);
        };
        let folder = entry.path.parent().unwrap_or(&self.tree.root);
        let path = pointer::parse(name).ok().map(|p| p.path);
        match path.and_then(|p| self.tree.lookup(folder, &p)) {
            Some(file) if self.tree.files[file].path != entry.path => {
                self.data_files.check(self.tree, image, file)?;
                Ok(Some(self.tree.files[file].probed.file.clone()))
            }
            _ => {
                let what = format!("its data file {name:?} is not in the backup directory");
                Err(Error::new(Kind::Incomplete, what).at_path(&entry.path).remedy(
                    "put it beside the image; files named in an image are only used \
                             inside the backup directory",
                ))
            }
        }
    }

    /// The layer that `part` of a usable file is.
    pub(crate) fn layer(&self, file: FileId, part: LayerPart) -> LayerSpec {
        let entry = &self.tree.files[file];
        LayerSpec {
            file: entry.probed.file.clone(),
            format: entry.format(),
            part,
            // A usable file has its data file: `own_problem` saw to it.
            data_file: self.data_file(file).ok().flatten(),
        }
    }

    /// The layers below a usable root, bottom first.
    pub(crate) fn layers_below(&self, file: FileId) -> Vec<LayerSpec> {
        let mut layers = Vec::new();
        let mut at = self.below(file);
        while let Some(f) = at {
            layers.push(self.layer(f, LayerPart::Whole));
            at = self.below(f);
        }
        layers.reverse();
        layers
    }
}

fn member<'a>(tree: &'a Tree, belongs: &'a DiskMember) -> ChainFile<'a> {
    let entry = &tree.files[belongs.file];
    ChainFile {
        path: &entry.path,
        aliases: &belongs.aliases,
        level: belongs.level,
        stamp: belongs.stamp,
        raw: entry.is_raw(),
        backing: entry.info().and_then(|i| i.backing_file.as_deref()),
        manifest: entry.manifest.as_deref(),
        unreadable: entry.manifest_problem.as_ref(),
        backing_is_beside: is_beside(tree, entry),
        gone: tree.former.get(&belongs.file).map(PathBuf::as_path).filter(|p| !tree.has(p)),
    }
}

/// Whether the backing file that the image names is, by its name, in the image's folder.
fn is_beside(tree: &Tree, entry: &FileEntry) -> bool {
    let Some(info) = entry.info() else { return false };
    let Some(folder) = entry.path.parent() else { return false };
    let name = info.backing_file.as_deref().and_then(pointer::backing_name);
    name.is_some_and(|name| tree.lookup(folder, Path::new(&name)).is_some())
}

/// What a manifest says that its file contradicts; with `salvage` not that the file was cut short.
fn manifest_problem(entry: &FileEntry, salvage: bool) -> Option<Error> {
    let manifest = entry.manifest.as_deref()?;
    let fail = |kind, what| Some(Error::new(kind, what).at_path(&entry.path).remedy(RESTORE));
    if let Name::Backup { level, .. } = entry.name
        && level != manifest.level
    {
        let what = "its name and its manifest have different levels";
        let error = Error::new(Kind::Corrupt, what).at_path(&entry.path);
        return Some(error.remedy("rename the file to the name it was written with"));
    }
    let format = match entry.format() {
        Format::Qcow2 => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    };
    if format != manifest.format {
        let what = match manifest.format {
            ImageFormat::Qcow2 => "its manifest says qcow2, but it has no qcow2 header",
            ImageFormat::Raw => "its manifest says raw, but it has a qcow2 header",
        };
        return fail(Kind::Corrupt, what.into());
    }
    let len = entry.probed.file.identity().size;
    if len < manifest.file_size && salvage && format == ImageFormat::Qcow2 {
        return None;
    }
    if len < manifest.file_size {
        let what = format!("it has {len} bytes, its manifest says {}", manifest.file_size);
        return fail(Kind::Truncated, what);
    }
    // A FULL may have taken in increments by qmprestore's commit; nothing else is written to.
    if manifest.file_size != 0 && len > manifest.file_size && manifest.level != Level::Full {
        let what = format!("it has {len} bytes, its manifest says {}", manifest.file_size);
        return fail(Kind::Changed, what);
    }
    if format == ImageFormat::Raw && len != manifest.virtual_size {
        let size = manifest.virtual_size;
        let what = format!("a raw image of {len} bytes; the disk has {size} by its manifest");
        return fail(Kind::Changed, what);
    }
    None
}

/// Of the backups of which only manifests are left, the newest one, if nothing newer is there. (A COPY
/// is nobody's base: it may be moved away.)
fn newest_missing(tree: &Tree, group: &Group) -> Option<Finding> {
    let time = |b: &DiskMember| match tree.files[b.file].manifest.as_deref() {
        Some(m) => m.state_time(b.stamp.or(Some(m.time))),
        None => b.stamp,
    };
    let newest = group.members.iter().filter_map(time).max();
    let folder = tree.files[group.members.first()?.file].path.parent()?;
    let lost = (group.lost.iter())
        .filter(|l| l.level != Level::Copy && Some(l.stamp) > newest)
        // It may have been published since the images were listed.
        .filter(|l| !crate::folder::exists(&folder.join(&l.name)))
        .max_by_key(|l| l.stamp)?;
    Some(lost_finding(&folder.join(&lost.name)))
}

/// The finding of [`Disk::newest_missing`].
pub(in crate::chain) fn lost_finding(image: &Path) -> Finding {
    let remedy = "restore it from another copy; or remove its manifest, if the image was removed \
                  on purpose, as qmprestore's commit does";
    let finding = Finding::warning(Kind::Incomplete, image, NEWEST_LOST);
    Finding { remedy: Some(remedy.into()), ..finding }
}

/// A note about increments that nothing but the times in names puts where they are.
fn by_names_alone(tree: &Tree, members: &[ChainFile], parents: &[Parent]) -> Option<Finding> {
    let unsure: Vec<&ChainFile> = (members.iter().zip(parents))
        .filter(|(m, l)| matches!(l, Parent::On(_)) && m.backing.is_none())
        .filter(|(m, _)| m.manifest.is_none_or(|m| m.parent.is_none()))
        .map(|(m, _)| m)
        .collect();
    let folder = unsure.first()?.path.parent().unwrap_or(&tree.root);
    let what = format!(
        "{} ordered only by time in the file name: a missing one would not be noticed",
        counted(unsure.len() as u64, "increment")
    );
    let finding = Finding::warning(Kind::Incomplete, folder, what);
    Some(Finding { severity: Severity::Note, ..finding })
}

/// Increments on a FULL without a time in its name that may have been overwritten by a later one:
/// then those before that do not belong to it. Nothing proves it, but file times hint at it, and
/// only a manifest could refute them.
fn overwritten(tree: &Tree, group: &Group, parents: &[Parent]) -> Vec<(usize, Error)> {
    let mut found = Vec::new();
    for (i, (above, parents)) in group.members.iter().zip(parents).enumerate() {
        let Parent::On(below) = parents else { continue };
        let (full, Some(stamp)) = (&group.members[*below], above.stamp) else { continue };
        let (entry, inc) = (&tree.files[full.file], &tree.files[above.file]);
        let older = inc.probed.mtime < entry.probed.mtime && stamp < entry.probed.mtime;
        if full.level != Level::Full || full.stamp.is_some() || inc.manifest.is_some() || !older {
            continue;
        }
        let full = path_text(base_name(entry));
        let what = format!(
            "{full} is newer than it, by their modification times: if that is a later full backup \
             that replaced the first, this increment does not belong to it"
        );
        let remedy = format!(
            "if only the times are wrong, as after a copy without them, set an older one on \
             {full} with 'touch -d'"
        );
        found.push((i, Error::new(Kind::Changed, what).remedy(remedy)));
    }
    found
}

/// Whether snapshots inside a file of this level are points.
pub(in crate::chain) fn carries_snapshots(level: Level) -> bool {
    matches!(level, Level::Full | Level::Copy | Level::Image)
}

/// What a manifest says that its file contradicts, without making the file useless.
pub(in crate::chain) fn manifest_oddity(entry: &FileEntry) -> Option<Finding> {
    let manifest = entry.manifest.as_deref()?;
    let (len, size) = (entry.probed.file.identity().size, entry.virtual_size());
    let grown = manifest.file_size != 0 && len > manifest.file_size;
    // Of a file that cannot be read the size is not known.
    let resized = size != manifest.virtual_size && entry.info().is_some();
    (grown || resized).then(|| {
        let what = "changed after the backup: it may have a later state than its name says";
        Finding::warning(Kind::Changed, &entry.path, what)
    })
}

/// A note that a file is of a later state than its name says.
pub(in crate::chain) fn merged_state(entry: &FileEntry) -> Option<Finding> {
    let state_of = entry.manifest.as_ref()?.state_of.as_ref()?;
    let what = format!("has the state of {state_of}, which a commit merged into it");
    let finding = Finding::warning(Kind::Changed, &entry.path, what);
    Some(Finding { severity: Severity::Note, ..finding })
}
