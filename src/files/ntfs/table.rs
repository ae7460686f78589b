//! [`Table`]: the master file table: records by their number.

use super::super::source::Source;
use super::boot::Boot;
use super::fixup;
use super::record::{NUMBER, Record, check};
use super::runs::Runs;
use crate::error::{Error, Kind, Result};

/// Records in the cache.
const SPACE: u8 = 1;

/// The table, as far as its own runs are known.
pub(super) struct Table {
    pub source: Source,
    pub boot: Boot,
    /// Its own record, or the copy of that.
    pub first: Record,
    /// Where it is.
    pub runs: Runs,
    /// Bytes of it that were ever written.
    pub initialized: u64,
}

impl Table {
    /// A record that is in use.
    ///
    /// # Errors
    /// `NotFound` if it is not; `Corrupt` if it is torn, or what reading the point says.
    pub(super) fn record(&self, number: u64) -> Result<Record> {
        if number == self.first.number {
            return Ok(self.first.clone());
        }
        let size = self.boot.record as u64;
        let at = number
            .checked_mul(size)
            .filter(|at| at.checked_add(size).is_some_and(|end| end <= self.initialized));
        let at = at.ok_or_else(|| self.missing(number))?;
        let bytes = self.source.unit(SPACE, number, || {
            let mut bytes = vec![0; self.boot.record];
            self.runs.read(&self.source, self.boot.cluster, &mut bytes, at)?;
            match bytes.iter().all(|b| *b == 0) {
                true => Err(self.missing(number)),
                false => repaired(bytes, number).map_err(|what| self.bad(number, what)),
            }
        })?;
        let record = Record::new(number, bytes);
        if record.is_used() { Ok(record) } else { Err(self.missing(number)) }
    }

    /// The record that a reference leads to.
    ///
    /// # Errors
    /// `NotFound` if it is that of another file by now; as [`Table::record`].
    pub(super) fn referred(&self, reference: u64) -> Result<Record> {
        let record = self.record(reference & NUMBER)?;
        match record.reference() == reference {
            true => Ok(record),
            false => Err(self.missing(reference & NUMBER)),
        }
    }

    /// Something wrong with a record, or with what it is of.
    pub(super) fn bad(&self, number: u64, what: &str) -> Error {
        let text = format!("MFT record {number} {what}");
        self.source.error(Kind::Corrupt, text, self.place(number))
    }

    /// Where a record is, for messages; 0 if that is not known.
    pub(super) fn place(&self, number: u64) -> u64 {
        let cluster = self.boot.cluster;
        let at = number.saturating_mul(self.boot.record as u64);
        let lcn = self.runs.at(at / cluster).and_then(|run| run.lcn);
        lcn.map_or(0, |lcn| lcn * cluster + at % cluster)
    }

    fn missing(&self, number: u64) -> Error {
        let text = format!("{}: MFT record {number} is not in use", self.source.label());
        Error::new(Kind::NotFound, text).at_path(self.source.path())
    }
}

/// A record after its fixups, if it is right or not in use. In words, what is wrong.
///
/// # Errors
/// A torn record, or an invalid one.
pub(super) fn repaired(mut bytes: Vec<u8>, number: u64) -> Result<Vec<u8>, &'static str> {
    fixup::apply(&mut bytes, b"FILE")?;
    if Record::new(number, bytes.as_slice().into()).is_used() {
        check(&bytes, number)?;
    }
    Ok(bytes)
}
