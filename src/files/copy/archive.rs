//! Into a tar archive.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::super::blocks::{Blocks, Holding};
use super::super::tree::{NodeId, NodeKind, OpenFile, Tree};
use super::super::walk::{At, Visitor, walk};
use super::report::{Options, Report};
use super::sparse::each_data;
use super::tar::{self, Head};
use crate::error::{Error, Kind, Result};
use crate::text::path_text;

/// Stretches of data that an archive tells apart in a file; behind them all is data.
const MAX_STRETCHES: usize = 1 << 16;
/// First entries that are counted against the cache at once, and what one takes, roughly.
const STEP: usize = 1024;
const ENTRY_BYTES: u64 = 256;

/// Writes `start` and all below it as a tar archive; `name` is what the archive calls it (empty: `.`).
///
/// # Errors
/// Writing failed, or a file's contents turned out unreadable after its header was written. What cannot be read
/// before that is counted in the report.
pub fn archive(
    tree: &dyn Tree,
    start: NodeId,
    name: &[u8],
    out: &mut dyn Write,
    blocks: &Arc<Blocks>,
    options: &Options<'_>,
) -> Result<Report> {
    let name = if name.is_empty() { b"." } else { name };
    let (report, first, held) = (Report::default(), HashMap::new(), Vec::new());
    let mut writing = Writing { tree, options, report, name, out, first, blocks, held };
    walk(tree, start, &mut writing)?;
    let Writing { out, report, .. } = writing;
    tar::end(out).and_then(|()| out.flush()).map_err(cannot)?;
    Ok(report)
}

fn cannot(e: io::Error) -> Error {
    Error::io(e, "cannot write the archive")
}

struct Writing<'a> {
    tree: &'a dyn Tree,
    options: &'a Options<'a>,
    report: Report,
    name: &'a [u8],
    out: &'a mut dyn Write,
    /// The entries of files that have several names.
    first: HashMap<NodeId, Vec<u8>>,
    blocks: &'a Arc<Blocks>,
    held: Vec<Holding>,
}

/// The stretches of data of a file, if it has holes.
fn map(file: &dyn OpenFile) -> Result<Option<Vec<(u64, u64)>>> {
    let (mut at, mut found, mut holes) = (0, Vec::<(u64, u64)>::new(), false);
    while let Some(stretch) = file.stretch(at)? {
        if stretch.end <= at {
            return Err(Error::new(Kind::Corrupt, "the file's extents do not advance"));
        }
        let full = found.len() >= MAX_STRETCHES;
        match found.last_mut() {
            _ if stretch.hole => holes = true,
            Some((begin, len)) if *begin + *len == at => *len += stretch.end - at,
            _ if full => {
                return Err(Error::new(
                    Kind::Unsupported,
                    "the file has too many holes for an archive",
                ));
            }
            _ => found.push((at, stretch.end - at)),
        }
        at = stretch.end;
    }
    Ok(holes.then_some(found))
}

/// The map as the archive has it, before the data: in decimal numbers, whole blocks.
fn map_bytes(map: &[(u64, u64)], size: u64) -> Vec<u8> {
    let mut text = format!("{}\n", map.len() + 1);
    for (at, len) in map {
        text.push_str(&format!("{at}\n{len}\n"));
    }
    // Tells where the file ends.
    text.push_str(&format!("{size}\n0\n"));
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(tar::padding(bytes.len() as u64));
    bytes
}

impl Writing<'_> {
    fn path(&self, at: &At<'_>) -> Vec<u8> {
        match at.path.is_empty() {
            true => self.name.to_vec(),
            false => [self.name, at.path].join(&b'/'),
        }
    }

    fn head<'b>(&self, at: &At<'_>, path: &'b [u8], kind: u8) -> Result<Head<'b>> {
        let a = at.attributes;
        let xattrs = self.tree.xattrs(at.node)?;
        let wanted = xattrs.into_iter().filter(|x| self.options.wants(x));
        let records = wanted.map(|x| ([b"SCHILY.xattr.", x.name.as_slice()].concat(), x.value));
        let device = a.device.unwrap_or_default();
        Ok(Head {
            path,
            kind,
            mode: self.options.mode(a),
            uid: a.uid,
            gid: a.gid,
            size: 0,
            seconds: a.mtime.seconds,
            nanos: a.mtime.nanos,
            link: &[],
            device: (device.major, device.minor),
            records: records.collect(),
        })
    }

    fn file(&mut self, at: &At<'_>, path: &[u8]) -> Result<()> {
        let file = self.tree.open(at.node)?;
        let mut head = self.head(at, path, b'0')?;
        head.size = file.size();
        let mut before = Vec::new();
        let name = [b"GNUSparseFile.0/", path].concat();
        if let Some(map) = map(&*file)? {
            before = map_bytes(&map, file.size());
            head.size = map.iter().map(|(_, len)| *len).sum::<u64>() + before.len() as u64;
            let size = file.size().to_string();
            let records: [(&[u8], &[u8]); 4] = [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", path),
                (b"GNU.sparse.realsize", size.as_bytes()),
            ];
            head.records.extend(records.map(|(k, v)| (k.to_vec(), v.to_vec())));
            head.path = &name;
        }
        self.begin(&head)?;
        self.out.write_all(&before).map_err(cannot)?;
        let (out, mut written) = (&mut *self.out, before.len() as u64);
        let result = each_data(&*file, self.options, |bytes, _| {
            written += bytes.len() as u64;
            out.write_all(bytes).map_err(cannot)
        });
        // The header has promised these bytes.
        result.map_err(|e| after_header(e, path))?;
        self.out.write_all(tar::padding(written)).map_err(cannot)?;
        self.report.bytes += written;
        self.report.files += 1;
        Ok(())
    }

    fn begin(&mut self, head: &Head<'_>) -> Result<()> {
        tar::head(self.out, head).map_err(cannot)
    }

    fn add(&mut self, at: &At<'_>) -> Result<()> {
        self.options.check()?;
        let kind = at.attributes.kind;
        if !self.options.wants_kind(kind) {
            self.report.devices_left_out += 1;
            return Ok(());
        }
        let path = self.path(at);
        if let Some(first) = self.first.get(&at.node).cloned() {
            let head = Head { link: &first, records: Vec::new(), ..self.head(at, &path, b'1')? };
            self.report.others += 1;
            return self.begin(&head);
        }
        self.report.count_mode(self.options, at.attributes);
        match kind {
            NodeKind::File => self.file(at, &path)?,
            NodeKind::Link => {
                let text = self.tree.read_link(at.node)?;
                let head = Head { link: &text, ..self.head(at, &path, b'2')? };
                self.begin(&head)?;
            }
            // tar has no sockets.
            NodeKind::Socket => return Ok(()),
            kind => {
                let letter = match kind {
                    NodeKind::CharDevice => b'3',
                    NodeKind::BlockDevice => b'4',
                    _ => b'6',
                };
                let head = self.head(at, &path, letter)?;
                self.begin(&head)?;
            }
        }
        self.report.others += u64::from(kind != NodeKind::File);
        self.remember(at, path);
        Ok(())
    }

    fn remember(&mut self, at: &At<'_>, path: Vec<u8>) {
        if at.attributes.links < 2 {
            return;
        }
        if self.first.len() >= self.held.len() * STEP {
            let Ok(held) = self.blocks.hold(STEP as u64 * ENTRY_BYTES) else { return };
            self.held.push(held);
        }
        self.first.insert(at.node, path);
    }

    fn counted(&mut self, path: &[u8], result: Result<()>) -> Result<()> {
        match result {
            // What was read can be passed over; a pipe that is gone, and half an entry, cannot.
            Err(e) if e.kind().is_lasting() && e.os_code().is_none() => {
                self.report.fail(&path_text(OsStr::from_bytes(path)), &e);
                Ok(())
            }
            other => other,
        }
    }
}

fn after_header(error: Error, path: &[u8]) -> Error {
    if error.kind() == Kind::Interrupted {
        return error;
    }
    let name = path_text(OsStr::from_bytes(path));
    let what = format!("the archive ends in the middle of {name}: {}", error.report());
    Error::new(Kind::Io, what)
        .remedy("copy into a folder, which goes on after a file that cannot be read")
}

impl Visitor for Writing<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        self.options.check()?;
        let path = [self.path(at), b"/".to_vec()].concat();
        let begun = self.head(at, &path, b'5').and_then(|head| self.begin(&head));
        self.report.folders += 1;
        self.counted(at.path, begun).map(|()| true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        let added = self.add(at);
        self.counted(at.path, added)
    }

    fn failed(&mut self, path: &[u8], error: Error) -> Result<()> {
        self.report.fail(&path_text(OsStr::from_bytes(path)), &error);
        Ok(())
    }
}
