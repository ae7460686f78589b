//! Into a folder.
//!
//! - Everything is made by us and was not there before: a name that is there already (from before, or because a
//!   guest's folder has it twice) is refused, be it a file, a folder or a link. So no name leads a write elsewhere.
//! - Each folder is held by its descriptor while it is filled, with mode 0700; it gets owner, permissions and times
//!   when it is full.
//! - Files get what belongs to them by their descriptors. A further name of a file is made only of that very file.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::blocks::{Blocks, Holding};
use super::super::tree::{Attributes, NodeId, NodeKind, Tree};
use super::super::walk::{At, Visitor, walk};
use super::report::{Options, Report};
use super::sparse::each_data;
use crate::error::{Error, Kind, Result};
use crate::folder::{FileId, FileTime, Folder, Made, NewNode};
use crate::text::path_text;

/// First copies that are counted against the cache at once, and what one takes, roughly.
const STEP: usize = 1024;
const ENTRY_BYTES: u64 = 256;

/// Where a copy goes.
pub struct Target {
    /// The folder that it is made in.
    pub folder: Folder,
    /// Its name there; `None`: what is in the folder that is copied goes into `folder` itself.
    pub name: Option<OsString>,
}

/// Copies `start` and all that is below it.
///
/// # Errors
/// `Exists` if the target's name is there; what stops everything: no space, a signal. What is wrong with single
/// files is counted in the report.
pub fn copy(
    tree: &dyn Tree,
    start: NodeId,
    target: Target,
    blocks: &std::sync::Arc<Blocks>,
    options: &Options<'_>,
) -> Result<Report> {
    let mut copying = Copying {
        tree,
        options,
        report: Report::default(),
        top: target,
        folders: Vec::new(),
        first: HashMap::new(),
        blocks,
        held: Vec::new(),
        lacking: BTreeSet::new(),
    };
    walk(tree, start, &mut copying)?;
    Ok(copying.report)
}

/// The first copy of a file with several names.
struct First {
    id: FileId,
    /// The folder below the target that has it.
    folder: PathBuf,
    name: OsString,
}

struct Copying<'a> {
    tree: &'a dyn Tree,
    options: &'a Options<'a>,
    report: Report,
    top: Target,
    /// The folders that the walk is in.
    folders: Vec<Folder>,
    first: HashMap<NodeId, First>,
    blocks: &'a std::sync::Arc<Blocks>,
    held: Vec<Holding>,
    /// What the target does not have.
    lacking: BTreeSet<&'static str>,
}

/// A failure that ends the whole copy: what comes next would fail as well.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), Kind::Interrupted | Kind::NoSpace)
}

impl Copying<'_> {
    /// The folder in which something is made, and its name there.
    fn place<'b>(&'b self, at: &'b At<'_>) -> Option<(&'b Folder, &'b OsStr)> {
        match self.folders.last() {
            Some(folder) => Some((folder, OsStr::from_bytes(at.name))),
            None => Some((&self.top.folder, self.top.name.as_deref()?)),
        }
    }

    /// Counts what went wrong, unless that ends everything.
    fn count_failure(&mut self, at: &At<'_>, result: Result<()>) -> Result<()> {
        match result {
            Err(e) if is_final(&e) => Err(e),
            // The whole copy is one thing that could not be made.
            Err(e) if at.path.is_empty() => Err(e),
            Err(e) => {
                self.report.fail(&path_text(OsStr::from_bytes(at.path)), &e);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn make_folder(&mut self, at: &At<'_>) -> Result<Folder> {
        let Some((folder, name)) = self.place(at) else {
            return self.top.folder.try_clone().map_err(|e| Error::io(e, "cannot open the target"));
        };
        let made = folder.new_folder(name);
        made.map_err(|e| Error::io(e, "cannot make the folder").at_path(folder.join(name)))
    }

    fn make(&mut self, at: &At<'_>) -> Result<()> {
        self.options.check()?;
        if !self.options.wants_kind(at.attributes.kind) {
            self.report.devices_left_out += 1;
            return Ok(());
        }
        if self.further_name(at)? {
            return Ok(());
        }
        let Some((folder, name)) = self.place(at) else {
            return Err(Error::new(
                Kind::Usage,
                "only a directory can be copied without a target name",
            ));
        };
        let failed = |e| Error::io(e, "cannot make it").at_path(folder.join(name));
        let (made, written) = match at.attributes.kind {
            NodeKind::File => {
                let file = folder.create_new(name).map_err(failed)?;
                let written = self.write(at, &file);
                if written.is_err() {
                    // Half a file is no copy.
                    let _ = folder.remove(name);
                }
                (Made::of(&file).map_err(failed)?, written?)
            }
            NodeKind::Link => {
                let text = self.tree.read_link(at.node)?;
                let text = Path::new(OsStr::from_bytes(&text));
                (folder.new_link(name, text).map_err(failed)?, 0)
            }
            kind => (folder.new_node(name, node(kind, at.attributes)).map_err(failed)?, 0),
        };
        self.remember(at, &made);
        self.report.bytes += written;
        match at.attributes.kind {
            NodeKind::File => self.report.files += 1,
            _ => self.report.others += 1,
        }
        self.finish(at, &made)
    }

    /// Writes a file's contents; how many bytes.
    fn write(&self, at: &At<'_>, file: &File) -> Result<u64> {
        let failed = |e| Error::io(e, "cannot write the file");
        let source = self.tree.open(at.node)?;
        let mut written = 0;
        each_data(&*source, self.options, |bytes, offset| {
            written += bytes.len() as u64;
            file.write_all_at(bytes, offset).map_err(failed)
        })?;
        file.set_len(source.size()).map_err(failed)?;
        Ok(written)
    }

    /// Gives a second name to a copy that is there, if this is one of a file that has been copied; whether it was.
    fn further_name(&mut self, at: &At<'_>) -> Result<bool> {
        let Some(first) = self.first.get(&at.node) else { return Ok(false) };
        let Some((folder, name)) = self.place(at) else { return Ok(false) };
        let base = self.folders.first().unwrap_or(&self.top.folder);
        let linked = base
            .beneath(&first.folder)
            .and_then(|from| folder.further_name(name, &from, &first.name, first.id));
        linked
            .map_err(|e| Error::io(e, "cannot create the hard link").at_path(folder.join(name)))?;
        self.report.others += 1;
        Ok(true)
    }

    /// Remembers a file that has more names than this one.
    fn remember(&mut self, at: &At<'_>, made: &Made) {
        if at.attributes.links < 2 || self.folders.is_empty() {
            return;
        }
        if self.first.len() >= self.held.len() * STEP {
            // Without room further names become files of their own.
            let Ok(held) = self.blocks.hold(STEP as u64 * ENTRY_BYTES) else { return };
            self.held.push(held);
        }
        let path = Path::new(OsStr::from_bytes(at.path));
        if let (Ok(id), Some(folder), Some(name)) = (made.id(), path.parent(), path.file_name()) {
            let first = First { id, folder: folder.to_path_buf(), name: name.to_os_string() };
            self.first.insert(at.node, first);
        }
    }

    /// Gives a copy all that belongs to it but its contents.
    fn finish(&mut self, at: &At<'_>, made: &Made) -> Result<()> {
        let a = at.attributes;
        let failed = |what: &'static str| move |e: io::Error| Error::io(e, what);
        self.report.count_mode(self.options.all, a);
        let mut mode = self.options.mode(a);
        match made.set_owner(a.uid, a.gid) {
            // Whoever is not root keeps what they copy; then it must not run as them either.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => mode &= 0o1777,
            other => other.map_err(failed("cannot set its owner"))?,
        }
        if a.kind != NodeKind::Link {
            let set = self.without("permissions", made.set_mode(mode));
            set.map_err(failed("cannot set its permissions"))?;
        }
        for xattr in self.tree.xattrs(at.node)?.iter().filter(|x| self.options.wants(x)) {
            let name = OsStr::from_bytes(&xattr.name);
            let set = self.without("extended attributes", made.set_attribute(name, &xattr.value));
            let lacking = |e: io::Error| {
                Error::io(e, format!("cannot set its attribute {}", path_text(name)))
            };
            if let Err(e) = set.map_err(lacking) {
                self.report.fail(&path_text(OsStr::from_bytes(at.path)), &e);
            }
        }
        let time = |t: super::super::tree::Time| FileTime { seconds: t.seconds, nanos: t.nanos };
        let set = self.without("times", made.set_times(time(a.atime), time(a.mtime)));
        set.map_err(failed("cannot set its times"))
    }
}

impl Copying<'_> {
    /// `Ok` where the target's file system does not have such a thing at all, which is told once.
    fn without(&mut self, what: &'static str, done: io::Result<()>) -> io::Result<()> {
        /// FAT answers so.
        const REFUSALS: [io::ErrorKind; 2] =
            [io::ErrorKind::PermissionDenied, io::ErrorKind::Unsupported];
        match done {
            Err(e) if REFUSALS.contains(&e.kind()) => {
                if self.lacking.insert(what) {
                    log::warn!("the target does not support all {what}: copied without: {e}");
                }
                Ok(())
            }
            other => other,
        }
    }
}

impl Visitor for Copying<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.options.check()?;
        match self.make_folder(at) {
            Ok(folder) => {
                self.folders.push(folder);
                self.report.folders += 1;
                Ok(true)
            }
            Err(e) => self.count_failure(at, Err(e)).map(|()| false),
        }
    }

    fn leave(&mut self, at: &At<'_>) -> Result<()> {
        let Some(folder) = self.folders.pop() else { return Ok(()) };
        // A folder that was there before stays as it was.
        if at.path.is_empty() && self.top.name.is_none() {
            return Ok(());
        }
        let made = folder.as_made().map_err(|e| Error::io(e, "cannot open the directory"));
        let finished = made.and_then(|made| self.finish(at, &made));
        match finished {
            Err(e) if !is_final(&e) => {
                self.report.fail(&path_text(OsStr::from_bytes(at.path)), &e);
                Ok(())
            }
            other => other,
        }
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        let made = self.make(at);
        self.count_failure(at, made)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        if is_final(&error) {
            return Err(error);
        }
        self.report.fail(&path_text(OsStr::from_bytes(path)), &error);
        Ok(())
    }
}

fn node(kind: NodeKind, attributes: &Attributes) -> NewNode {
    let device = attributes.device.unwrap_or_default();
    match kind {
        NodeKind::CharDevice => NewNode::CharDevice(device.major, device.minor),
        NodeKind::BlockDevice => NewNode::BlockDevice(device.major, device.minor),
        NodeKind::Socket => NewNode::Socket,
        NodeKind::Pipe | NodeKind::File | NodeKind::Folder | NodeKind::Link => NewNode::Pipe,
    }
}
