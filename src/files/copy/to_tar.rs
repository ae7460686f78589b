//! Into a tar archive.

use std::io::Write;

use super::super::tree::{NodeKind, OpenFile};
use super::container::{Container, Entry, after_header, cannot};
use super::report::Options;
use super::sparse::each_data;
use super::tar::{self, Head};
use crate::error::{Error, Kind, Result};

/// Stretches of data that an archive tells apart in a file; behind them all is data.
const MAX_STRETCHES: usize = 1 << 16;

pub(super) struct ToTar<'a> {
    out: &'a mut (dyn Write + 'a),
}

impl<'a> ToTar<'a> {
    pub(super) fn new(out: &'a mut (dyn Write + 'a)) -> Self {
        ToTar { out }
    }

    fn begin(&mut self, head: &Head<'_>) -> Result<()> {
        tar::head(self.out, head).map_err(cannot)
    }
}

fn head<'b>(entry: &'b Entry<'_>, kind: u8) -> Head<'b> {
    let a = entry.attributes;
    let record = |name: &[u8], value: &[u8]| ([b"SCHILY.xattr.", name].concat(), value.to_vec());
    let device = a.device.unwrap_or_default();
    Head {
        path: entry.path,
        kind,
        mode: entry.mode,
        uid: a.uid,
        gid: a.gid,
        size: 0,
        seconds: a.mtime.seconds,
        nanos: a.mtime.nanos,
        link: &[],
        device: (device.major, device.minor),
        records: entry.xattrs.iter().map(|x| record(&x.name, &x.value)).collect(),
    }
}

impl Container for ToTar<'_> {
    fn folder(&mut self, entry: &Entry<'_>) -> Result<()> {
        let path = [entry.path, b"/"].concat();
        self.begin(&Head { path: &path, ..head(entry, b'5') })
    }

    fn file(
        &mut self,
        entry: &Entry<'_>,
        file: &dyn OpenFile,
        options: &Options<'_>,
    ) -> Result<u64> {
        let mut head = head(entry, b'0');
        head.size = file.size();
        let mut before = Vec::new();
        let name = [b"GNUSparseFile.0/", entry.path].concat();
        if let Some(map) = map(file)? {
            before = map_bytes(&map, file.size());
            head.size = map.iter().map(|(_, len)| *len).sum::<u64>() + before.len() as u64;
            let size = file.size().to_string();
            let records: [(&[u8], &[u8]); 4] = [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", entry.path),
                (b"GNU.sparse.realsize", size.as_bytes()),
            ];
            head.records.extend(records.map(|(k, v)| (k.to_vec(), v.to_vec())));
            head.path = &name;
        }
        self.begin(&head)?;
        self.out.write_all(&before).map_err(cannot)?;
        let (out, mut written) = (&mut *self.out, before.len() as u64);
        let result = each_data(file, options, |bytes, _| {
            written += bytes.len() as u64;
            out.write_all(bytes).map_err(cannot)
        });
        result.map_err(|e| after_header(e, entry.path))?;
        self.out.write_all(tar::padding(written)).map_err(cannot)?;
        Ok(written)
    }

    fn link(&mut self, entry: &Entry<'_>, text: &[u8]) -> Result<()> {
        self.begin(&Head { link: text, ..head(entry, b'2') })
    }

    fn special(&mut self, entry: &Entry<'_>) -> Result<()> {
        let letter = match entry.attributes.kind {
            NodeKind::CharDevice => b'3',
            NodeKind::BlockDevice => b'4',
            _ => b'6',
        };
        self.begin(&head(entry, letter))
    }

    fn further_name(&mut self, entry: &Entry<'_>, first: &[u8]) -> Result<bool> {
        self.begin(&Head { link: first, ..head(entry, b'1') }).map(|()| true)
    }

    fn has_setuid(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> Result<()> {
        tar::end(self.out).and_then(|()| self.out.flush()).map_err(cannot)
    }
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
