//! In which format a file is read: decided here, once for each scan, and nowhere else.
//!
//! A guest writes all bytes of a raw disk, so what a file holds is the last thing to ask. In this
//! order: the manifest; the format that an image above it gives for its backing file (as QEMU
//! believes it); the container (`foreign`, by name); the name; and only then the content. An image
//! whose content alone says qcow2 is read as such while it needs no other file: then the worst a
//! guest can do is to show its own bytes in another order. A pointer in it is not followed, and its
//! word on the format of others not taken. `verify --create --format` writes the manifest that
//! decides.

use std::collections::HashSet;
use std::path::PathBuf;

use super::follow;
use crate::chain::walk::foreign_content;
use crate::chain::walk::pointer;
use crate::chain::walk::probed::Content;
use crate::chain::walk::tree::{FileEntry, FileId, Reading, Tree};
use crate::error::{Error, Finding, Kind};
use crate::layer::{Format, ImageInfo};
use crate::layout::name::{Name, Promise, promise};
use crate::manifest::ImageFormat;

/// The format that the user gives for files about which nothing else decides.
#[derive(Debug, Clone)]
pub struct FormatOverride {
    /// How they are to be read.
    pub format: ImageFormat,
    /// Which files are meant, as a scan gives their paths. Of others nothing is said.
    pub files: HashSet<PathBuf>,
}

/// How a user decides it.
pub(in crate::chain) const DECIDE: &str = "'fleecefs verify --create --format raw DIR --point \
                                           POINT' if it is a raw disk, '--format qcow2' if it is \
                                           a qcow2 image";

/// How a user says that it is raw.
pub(in crate::chain) const DECIDE_RAW: &str = "if it is a raw disk, 'fleecefs verify --create \
                                               --format raw DIR --point POINT'";

impl FileEntry {
    /// What the header says, if the file is read as an image that has one.
    pub(crate) fn info(&self) -> Option<&ImageInfo> {
        match self.decision.reading {
            Reading::Content => self.probed.info(),
            Reading::Raw | Reading::Undecided(_) => None,
        }
    }

    /// The format to open it with.
    pub(crate) fn format(&self) -> Format {
        self.info().map_or(Format::Raw, |i| i.format)
    }

    /// Size in bytes of the virtual disk; 0 if it cannot be known.
    pub(crate) fn virtual_size(&self) -> u64 {
        match self.decision.reading {
            Reading::Content => self.probed.virtual_size(),
            Reading::Raw => self.probed.file.identity().size,
            Reading::Undecided(_) => 0,
        }
    }

    /// Whether it is read as the guest's bytes one to one.
    pub(crate) fn is_raw(&self) -> bool {
        match self.decision.reading {
            Reading::Content => matches!(self.probed.content, Content::Plain),
            Reading::Raw => true,
            Reading::Undecided(_) => false,
        }
    }

    /// Why its content cannot be used.
    pub(crate) fn content_problem(&self) -> Option<Finding> {
        match (&self.decision.reading, &self.probed.content) {
            (Reading::Raw, _) => None,
            (Reading::Undecided(finding), _) | (_, Content::Bad(finding)) => Some(finding.clone()),
            (_, Content::Foreign(what)) => {
                let error = Error::new(Kind::Unsupported, *what).at_path(&self.path);
                // Of one that is named qcow2 nobody's word is asked.
                let name = self.path.file_name().unwrap_or_default();
                let remedy = match self.is_malformed() && promise(name) != Promise::Qcow2 {
                    true => format!("{UNPACK}; or, {DECIDE_RAW}"),
                    false => UNPACK.into(),
                };
                Some(Finding::from_error(&error.remedy(remedy), &self.path))
            }
            (_, Content::Image(_) | Content::Plain) => None,
        }
    }

    /// Fails if a name inside the image must not be followed.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn check_followed(&self, to: &FileEntry) -> Result<(), Error> {
        if !self.decision.proved {
            let what = "it names another file, and only its content says qcow2: a guest can write \
                        a qcow2 header to a raw disk";
            return Err(Error::new(Kind::Unsupported, what).at_path(&self.path).remedy(DECIDE));
        }
        if self.probed.owner != to.probed.owner {
            let what = "it names a file that belongs to somebody else";
            return Err(Error::new(Kind::Unsupported, what).at_path(&self.path).remedy(
                "make both files belong to one owner, or flatten the image with 'qemu-img convert'",
            ));
        }
        Ok(())
    }

    /// Whether it is read as an image because of its own bytes alone.
    pub(crate) fn is_unproved(&self) -> bool {
        self.info().is_some() && !self.decision.proved
    }

    /// The format that it gives for its backing file: as for QEMU, a description in the place of the
    /// name comes second.
    pub(crate) fn backing_format(&self) -> Option<String> {
        let info = self.info()?;
        let described = || pointer::parse(info.backing_file.as_deref()?).ok()?.format;
        info.backing_format.clone().or_else(described)
    }

    /// Whether it begins like an image, and no manifest says what it is.
    fn is_open_question(&self) -> bool {
        let looks = self.probed.magic || self.is_malformed();
        self.name != Name::Ignored && self.manifest.is_none() && looks
    }

    /// Whether its bytes are nothing that is read, though there is nothing wrong with reading them.
    fn is_malformed(&self) -> bool {
        let len = self.probed.file.identity().size;
        match &self.probed.content {
            Content::Bad(f) => f.kind != Kind::Io && len > 0,
            // A raw disk may begin with anything: where the name speaks of no other format it can be one.
            Content::Foreign(_) => {
                let name = self.path.file_name().unwrap_or_default();
                promise(name) != Promise::Foreign && foreign_content::layout(name).is_none()
            }
            Content::Image(_) | Content::Plain => false,
        }
    }
}

const UNPACK: &str = "unpack or convert it to raw or qcow2";

/// Decides about all files of a walked directory. `format_override` is what a user says of those about which
/// nothing else decides.
pub(in crate::chain) fn decide(tree: &mut Tree, format_override: Option<&FormatOverride>) {
    let mut proved = Vec::new();
    for file in 0..tree.files.len() {
        if by_manifest_or_name(&mut tree.files[file]) {
            proved.push(file);
        }
    }
    by_overlays(tree, proved);
    if let Some(format_override) = format_override {
        let is_told = |f: &FileEntry| {
            (is_undecided(f) || is_plain(f)) && format_override.files.contains(&f.path)
        };
        let open: Vec<FileId> =
            (0..tree.files.len()).filter(|f| is_told(&tree.files[*f])).collect();
        let by_override = |f: &FileId| by_override(&mut tree.files[*f], format_override.format);
        let decided = open.into_iter().filter(by_override).collect();
        by_overlays(tree, decided);
    }
    tree.files.iter_mut().filter(|f| is_undecided(f)).for_each(by_content);
}

/// Takes the manifest's word, then the name's; whether it is proved to be qcow2 now.
fn by_manifest_or_name(entry: &mut FileEntry) -> bool {
    let name = entry.path.file_name().unwrap_or_default();
    entry.decision.proved = match entry.manifest.as_deref().map(|m| m.format) {
        Some(ImageFormat::Qcow2) => entry.probed.magic,
        Some(ImageFormat::Raw) => {
            if entry.probed.magic || entry.is_malformed() {
                entry.decision.reading = Reading::Raw;
            }
            false
        }
        None => entry.probed.magic && promise(name) == Promise::Qcow2,
    };
    entry.decision.proved
}

fn is_undecided(entry: &FileEntry) -> bool {
    let name = entry.path.file_name().unwrap_or_default();
    let open = matches!(entry.decision.reading, Reading::Content) && !entry.decision.proved;
    open && entry.is_open_question() && promise(name) != Promise::Qcow2
}

/// Whether it is raw because nothing says anything else: what the other files of its disk are may.
fn is_plain(entry: &FileEntry) -> bool {
    let plain = matches!(entry.probed.content, Content::Plain) && entry.manifest.is_none();
    plain && entry.name != Name::Ignored
}

/// Takes the word of images that are proved to be qcow2 for what they depend on, from one to the next.
fn by_overlays(tree: &mut Tree, mut proved: Vec<FileId>) {
    while let Some(above) = proved.pop() {
        let Some((below, format)) = stated_parent_format(tree, above) else { continue };
        let entry = &mut tree.files[below];
        match (&entry.decision.reading, format) {
            // Whoever was proved before has been asked, or will be: two may depend on each other.
            (Reading::Content, ImageFormat::Qcow2)
                if entry.probed.magic && !entry.decision.proved =>
            {
                entry.decision.proved = true;
                proved.push(below);
            }
            (Reading::Content, ImageFormat::Raw) if !entry.decision.proved => {
                entry.decision.reading = Reading::Raw;
            }
            (Reading::Content, ImageFormat::Raw) | (Reading::Raw, ImageFormat::Qcow2) => {
                let what = "images that have it as backing file name different formats for it";
                let error = Error::new(Kind::Corrupt, what).at_path(&entry.path).remedy(DECIDE);
                let finding = Finding::from_error(&error, &entry.path);
                entry.decision.reading = Reading::Undecided(finding);
            }
            _ => {}
        }
    }
}

/// The file below, if its format is an open question, and the format that `above` gives it.
fn stated_parent_format(tree: &Tree, above: FileId) -> Option<(FileId, ImageFormat)> {
    let entry = &tree.files[above];
    let format = match entry.backing_format()?.as_str() {
        "raw" => ImageFormat::Raw,
        "qcow2" => ImageFormat::Qcow2,
        _ => return None,
    };
    let path = pointer::parse(entry.info()?.backing_file.as_deref()?).ok()?.path;
    let folder = entry.path.parent()?;
    // A chain that was moved names its old place: the file beside it is what it depends on.
    let beside = || tree.lookup(folder, path.file_name()?.as_ref());
    let is_backup = matches!(entry.name, Name::Backup { .. });
    let below = tree.lookup(folder, &path).or_else(|| is_backup.then(beside).flatten())?;
    let (file, name) = (&tree.files[below], tree.files[below].path.file_name()?);
    let open = file.is_open_question() && promise(name) != Promise::Qcow2;
    // What may not depend on it has no say in it.
    let may = follow::check_backing((entry, None), (file, None)).is_ok();
    let same_owner = file.probed.owner == entry.probed.owner;
    (below != above && open && may && same_owner).then_some((below, format))
}

/// Takes the user's word; whether it is proved to be qcow2 now.
fn by_override(entry: &mut FileEntry, format: ImageFormat) -> bool {
    match format {
        ImageFormat::Raw => entry.decision.reading = Reading::Raw,
        ImageFormat::Qcow2 => entry.decision.proved = entry.probed.magic,
    }
    entry.decision.proved
}

/// Nothing decides but the content: of a name that says raw, no more than it must.
fn by_content(entry: &mut FileEntry) {
    let name = entry.path.file_name().unwrap_or_default();
    // A VMDK, or a qcow of version 1, is no qcow2 whatever a user says.
    let may_be_qcow2 = match &entry.probed.content {
        Content::Bad(finding) => finding.kind != Kind::Unsupported,
        Content::Foreign(_) => false,
        Content::Image(_) | Content::Plain => true,
    };
    let decide = if may_be_qcow2 { DECIDE } else { DECIDE_RAW };
    let refuse = |kind, what: String| {
        let error = Error::new(kind, what).at_path(&entry.path).at_offset(0).remedy(decide);
        Reading::Undecided(Finding::from_error(&error, &entry.path))
    };
    // To read such an image takes a walk over all of its tables.
    if matches!(&entry.probed.content, Content::Image(info) if info.marked_corrupt) {
        let what = "QEMU marked it as corrupt, and only its content says qcow2: a guest can write \
                    a qcow2 header to a raw disk";
        entry.decision.reading = refuse(Kind::Unsupported, what.into());
        return;
    }
    if promise(name) != Promise::Raw {
        return;
    }
    let reading = match &entry.probed.content {
        _ if entry.manifest_problem.is_some() => {
            let what = "its manifest cannot be read, and only that says whether it is raw";
            refuse(Kind::Corrupt, what.into())
        }
        Content::Image(info) if info.backing_file.is_none() && info.data_file.is_none() => {
            let what = "its name says raw, its content is qcow2: read as qcow2; if this is a raw \
                        disk whose guest wrote a qcow2 header, it is not right";
            let finding = Finding::warning(Kind::Unsupported, &entry.path, what);
            entry.decision.note = Some(Finding { remedy: Some(DECIDE.into()), ..finding });
            return;
        }
        Content::Image(_) => {
            let what = "its name says raw, its content is qcow2 and needs another file: a guest \
                        can write a qcow2 header to a raw disk";
            refuse(Kind::Unsupported, what.into())
        }
        Content::Bad(finding) => refuse(
            finding.kind,
            format!("its name says raw, but its content does not: {}", finding.message),
        ),
        Content::Foreign(what) => refuse(
            Kind::Unsupported,
            format!("its name says raw, but its content does not: {what}"),
        ),
        Content::Plain => return,
    };
    entry.decision.reading = reading;
}
