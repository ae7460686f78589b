//! [`Volume`]: the master file table and what else all parts of the reader share; and the state that the guest
//! left the volume in.

use std::sync::Arc;

use super::super::blocks::Holding;
use super::super::bytes::{byte, le16};
use super::super::findings::Findings;
use super::super::source::Source;
use super::boot::Boot;
use super::logfile::{self, State};
use super::names::{Upcase, to_bytes};
use super::node::Node;
use super::record::{Record, kind};
use super::runs::Runs;
use super::stream::Stream;
use super::table::{Table, repaired};
use crate::error::{Error, Kind, Result};

/// Records that every volume has.
pub(super) mod number {
    pub(in super::super) const MFT: u64 = 0;
    pub(in super::super) const LOG: u64 = 2;
    pub(in super::super) const VOLUME: u64 = 3;
    pub(in super::super) const ROOT: u64 = 5;
    pub(in super::super) const BITMAP: u64 = 6;
    pub(in super::super) const UPCASE: u64 = 10;
    /// The first that is not the file system's own.
    pub(in super::super) const FIRST: u64 = 24;
}

/// Upper case for each of 65536 units.
const UPCASE_BYTES: u64 = 128 << 10;
/// Of $Volume: chkdsk shall run.
const DIRTY: u16 = 1;
/// What helps where metadata may be old.
pub(super) const REPLAY: &str = "if a file is missing or damaged, start the guest from this point, or copy the \
    disk and run chkdsk on the copy";

/// An open volume.
pub(super) struct Volume {
    pub table: Table,
    pub upcase: Upcase,
    pub findings: Findings,
    pub label: String,
    pub version: (u8, u8),
    /// For the letters.
    _held: Holding,
}

impl Volume {
    /// Reads what is needed before anything else can be read.
    ///
    /// # Errors
    /// `Corrupt` if there is no master file table, or what reading the point says.
    pub(super) fn open(source: Source) -> Result<Volume> {
        let findings = Findings::default();
        let table = opened(&source, &findings)?;
        if table.boot.total() > source.size() {
            let what = "the file system is larger than the disk or partition that it is in";
            findings.warn(&source, Kind::Truncated, what, None);
        }
        let held = table.source.blocks().hold(UPCASE_BYTES)?;
        let mut volume = Volume {
            table,
            upcase: Upcase::new(&[]),
            findings,
            label: String::new(),
            version: (0, 0),
            _held: held,
        };
        let upcase =
            volume.stream(number::UPCASE, kind::DATA).and_then(|s| s.read_all(UPCASE_BYTES));
        let upcase = volume.or_told(upcase, "its table of upper case letters is damaged")?;
        volume.upcase = upcase.map_or_else(Upcase::usual, |table| Upcase::new(&table));
        volume.read_info()?;
        volume.check_log()?;
        Ok(volume)
    }

    pub(super) fn source(&self) -> &Source {
        &self.table.source
    }

    /// A file or folder by its number.
    pub(super) fn node(&self, number: u64) -> Result<Node> {
        Node::of(&self.table, self.table.record(number)?)
    }

    /// A stream without name of one of the file system's own files.
    pub(super) fn stream(&self, number: u64, kind: u32) -> Result<Stream> {
        let node = self.node(number)?;
        let stream = Stream::open(&self.table, &node, kind, &[])?;
        stream.ok_or_else(|| node.bad(&self.table, "lacks an attribute that it should have"))
    }

    /// Something wrong with a file or folder.
    pub(super) fn bad(&self, node: &Node, what: &str) -> Error {
        node.bad(&self.table, what)
    }

    /// Makes a lasting error a finding, and hands it on.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        self.findings.noted(self.source(), result)
    }

    /// Something odd about a file or folder that is served all the same.
    pub(super) fn odd(&self, kind: Kind, node: &Node, what: &str, remedy: Option<&str>) {
        let text = format!("MFT record {} {what}", node.record.number);
        self.findings.warn(self.source(), kind, &text, remedy);
    }

    /// Makes a lasting error a finding.
    fn or_told<T>(&self, result: Result<T>, what: &str) -> Result<Option<T>> {
        match result {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.kind().is_lasting() || e.kind() == Kind::NotFound => {
                let text = format!("{what}: {}", e.message());
                self.findings.warn(self.source(), Kind::Corrupt, &text, None);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Name, version and state, by $Volume.
    fn read_info(&mut self) -> Result<()> {
        let found = self.node(number::VOLUME).and_then(|node| {
            let value = |kind| {
                node.first(&self.table, kind, &[], |a| a.resident().unwrap_or_default().to_vec())
            };
            Ok((value(kind::VOLUME_NAME)?, value(kind::VOLUME_INFO)?))
        });
        let found = self.or_told(found, "$Volume is damaged")?;
        let Some((name, info)) = found else { return Ok(()) };
        self.label = String::from_utf8_lossy(&to_bytes(&name.unwrap_or_default())).into_owned();
        let info = info.unwrap_or_default();
        self.version = (byte(&info, 8), byte(&info, 9));
        if le16(&info, 0xa) & DIRTY != 0 {
            let what = "the volume is marked as dirty: the guest wants to run chkdsk on it";
            let remedy = "run chkdsk in the guest, or on a restored copy";
            self.findings.warn(self.source(), Kind::Corrupt, what, Some(remedy));
        }
        Ok(())
    }

    /// Whether the guest had closed the volume.
    fn check_log(&self) -> Result<()> {
        let pages = self.stream(number::LOG, kind::DATA).and_then(|log| {
            let mut pages = vec![0; 2 * logfile::PAGE];
            log.fill(&mut pages, 0)?;
            Ok(pages)
        });
        let Some(pages) = self.or_told(pages, "$LogFile is damaged")? else { return Ok(()) };
        let what = match logfile::state(&pages) {
            State::Clean => return Ok(()),
            State::Dirty => {
                "NTFS was in use when this point was made, and its log is not replayed: what was changed last \
                may be missing, old or torn"
            }
            State::Unknown => {
                "the state of NTFS's log is not known, and it is not replayed: what was changed last may be \
                missing, old or torn"
            }
        };
        self.findings.warn(self.source(), Kind::Unproven, what, Some(REPLAY));
        Ok(())
    }
}

/// The master file table that the boot sector leads to; or its copy, if it leads to none.
fn opened(source: &Source, findings: &Findings) -> Result<Table> {
    let first = Boot::read(source);
    let error = match first.and_then(|boot| table(source.clone(), boot, findings)) {
        Err(e) if e.kind().is_lasting() => e,
        other => return other,
    };
    let copy = Boot::copy(source)
        .and_then(|(at, boot)| Some((at, table(source.clone(), boot, findings).ok()?)));
    let Some((at, table)) = copy else { return Err(error) };
    let why = format!("the boot sector is damaged ({})", error.message());
    findings.copy_used(source, &why, at, "run chkdsk on a restored copy");
    Ok(table)
}

/// Whether there is a volume whose boot sector is gone, and whose copy of it leads to a master file table.
pub(in super::super) fn has_copy(source: &Source) -> bool {
    let copy = Boot::copy(source);
    copy.is_some_and(|(_, boot)| table(source.clone(), boot, &Findings::default()).is_ok())
}

/// The master file table, from its own first record.
fn table(source: Source, boot: Boot, findings: &Findings) -> Result<Table> {
    let first = first(&source, &boot, boot.mft).or_else(|e| {
        if !e.kind().is_lasting() {
            return Err(e);
        }
        let mirror = first(&source, &boot, boot.mirror).map_err(|_| e)?;
        let what = "the first record of the MFT is damaged; its copy ($MFTMirr) is used";
        findings.warn(&source, Kind::Corrupt, what, Some("run chkdsk on a restored copy"));
        Ok(mirror)
    })?;
    let mut table = Table { source, boot, first, runs: Runs::default(), initialized: 0 };
    let node = Node::of(&table, table.first.clone())?;
    let written = node.first(&table, kind::DATA, &[], |a| a.initialized().min(a.size()))?;
    table.initialized = written.ok_or_else(|| node.bad(&table, "has no data: there is no MFT"))?;
    for part in parts(&node) {
        if let Err(e) = add(&mut table, &node, part) {
            // What is mapped so far can be read.
            if !e.kind().is_lasting() || table.runs.end() == 0 {
                return Err(e);
            }
            findings.failed(&table.source, e);
            break;
        }
    }
    Ok(table)
}

/// The parts of the table's data: entries of the attribute list, or the only one.
fn parts(node: &Node) -> Vec<Option<usize>> {
    match node.parts(kind::DATA, &[]) {
        Some(parts) => parts.into_iter().map(Some).collect(),
        None => vec![None],
    }
}

/// Adds the runs of one part; those before it tell where its record is.
fn add(table: &mut Table, node: &Node, part: Option<usize>) -> Result<()> {
    let mut found = None;
    let mut keep = |a: &super::record::Attribute<'_>| {
        found = a.resident().is_none().then(|| (a.mapping().to_vec(), a.span()));
        Ok(false)
    };
    match part {
        Some(index) => node.part(table, index, &mut keep).map(drop)?,
        None => node.each_part(table, kind::DATA, &[], &mut keep)?,
    }
    let (mapping, span) = found.ok_or_else(|| node.bad(table, "has no runs: there is no MFT"))?;
    let blocks: Arc<_> = table.source.blocks().clone();
    let added = table.runs.add(&mapping, span, table.boot.clusters, &blocks)?;
    added.map_err(|what| node.bad(table, what))
}

/// The table's own record, at cluster `lcn`.
fn first(source: &Source, boot: &Boot, lcn: u64) -> Result<Record> {
    let at = lcn.saturating_mul(boot.cluster);
    let bytes = source.meta(at, boot.record)?;
    let bad =
        |what: &str| source.error(Kind::Corrupt, format!("MFT record {} {what}", number::MFT), at);
    let record = Record::new(number::MFT, repaired(bytes, number::MFT).map_err(bad)?.into());
    if record.is_used() { Ok(record) } else { Err(bad("is not in use")) }
}
