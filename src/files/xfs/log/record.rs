//! Records of the log: where they are, and where the last one ends.

use super::super::super::bytes::{be32, be64, part};
use super::super::volume::Volume;
use crate::error::{Kind, Result};

/// The log is written in units of this size; each begins with its cycle: how often the log went round.
pub(super) const UNIT: u64 = 512;
/// What the first unit of a record begins with.
const MAGIC: u32 = 0xfeed_babe;
/// The largest record, with its headers, in units.
const MAX_RECORD: u64 = (256 << 10) / UNIT + 8;
/// Bytes of a record for which one header has the cycles.
const PER_HEADER: u64 = 32 << 10;
/// Numbers with the lowest byte first: those inside of records are in the order of the guest's processor.
const LITTLE_ENDIAN: u32 = 1;
/// The largest log, in units: 2 GiB.
const MAX_LOG: u64 = (2 << 30) / UNIT;

/// A record.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// Where its data is: in units from the begin of the log.
    pub data: u64,
    /// Bytes of data.
    pub len: u64,
    /// Where the one after it is; not wrapped.
    pub end: u64,
    /// The first record that has something that may be nowhere else.
    pub tail: u64,
    /// How many operations it has.
    pub count: u32,
    /// What belongs at the begin of each unit of its data.
    pub firsts: Vec<u8>,
    /// Whether numbers in it have the lowest byte first.
    pub little_endian: bool,
}

/// The log of a file system.
pub(super) struct Log<'a> {
    volume: &'a Volume,
    start: u64,
    units: u64,
}

impl<'a> Log<'a> {
    /// Finds it.
    ///
    /// # Errors
    /// `Corrupt` if it is not inside.
    pub(super) fn new(volume: &'a Volume) -> Result<Log<'a>> {
        let sup = &volume.sup;
        let place = sup.place(sup.log_start, sup.log_blocks);
        let units = (sup.log_blocks << sup.block_log) / UNIT;
        let place = place.filter(|_| (1..=MAX_LOG).contains(&units)).ok_or_else(|| {
            volume.source.error(Kind::Corrupt, "invalid place of the log in the superblock", 48)
        })?;
        Ok(Log { volume, start: place << sup.block_log, units })
    }

    /// A place that may be behind the end, from the begin again.
    pub(super) fn wrapped(&self, unit: u64) -> u64 {
        unit % self.units
    }

    /// The bytes of a unit.
    pub(super) fn unit(&self, unit: u64) -> Result<Vec<u8>> {
        self.volume.source.meta(self.start + self.wrapped(unit) * UNIT, UNIT as usize)
    }

    fn cycle(&self, unit: u64) -> Result<u32> {
        let bytes = self.unit(unit)?;
        Ok(match be32(&bytes, 0) {
            MAGIC => be32(&bytes, 4),
            cycle => cycle,
        })
    }

    /// Where the next record would be written: behind the last one with the highest cycle. `None` if nothing was
    /// ever written.
    pub(super) fn head(&self) -> Result<Option<u64>> {
        let (first, last) = (self.cycle(0)?, self.cycle(self.units - 1)?);
        if first == 0 {
            return Ok(None);
        }
        if first == last {
            return Ok(Some(self.units));
        }
        // Units before the head have the cycle of the first.
        let (mut low, mut high) = (1, self.units - 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.cycle(middle)? == first {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(Some(low))
    }

    /// The record that ends at `head`.
    pub(super) fn last(&self, head: u64) -> Result<Option<Record>> {
        // A log may have gone round in the middle of a record.
        let from = head + self.units;
        for back in 1..=MAX_RECORD.min(self.units) {
            if let Some(record) = self.record(self.wrapped(from - back))? {
                let ends = self.wrapped(record.end) == self.wrapped(head);
                return Ok(ends.then_some(record));
            }
        }
        Ok(None)
    }

    /// The record that begins at a unit, if one does.
    pub(super) fn record(&self, unit: u64) -> Result<Option<Record>> {
        let bytes = self.unit(unit)?;
        let version = be32(&bytes, 8);
        let len = u64::from(be32(&bytes, 12));
        let is_here = be64(&bytes, 16) & 0xffff_ffff == unit;
        let is_record = be32(&bytes, 0) == MAGIC && matches!(version, 1 | 2) && is_here;
        if !is_record || part(&bytes, 304, 16) != self.volume.sup.uuid || len / UNIT > MAX_RECORD {
            return Ok(None);
        }
        let headers = match version {
            1 => 1,
            _ => u64::from(be32(&bytes, 320)).div_ceil(PER_HEADER).clamp(1, 8),
        };
        let data = unit + headers;
        Ok(Some(Record {
            data,
            len,
            end: data + len.div_ceil(UNIT),
            tail: self.wrapped(be64(&bytes, 24) & 0xffff_ffff),
            count: be32(&bytes, 40),
            firsts: part(&bytes, 44, 256).to_vec(),
            little_endian: be32(&bytes, 300) == LITTLE_ENDIAN,
        }))
    }

    /// The data of a record as it was before it was written: as much of it as the first header tells the begins of
    /// units of.
    pub(super) fn data(&self, record: &Record) -> Result<Vec<u8>> {
        let units = record.len.min(PER_HEADER).div_ceil(UNIT);
        let mut all = Vec::new();
        for (i, first) in (0..units).zip(record.firsts.chunks_exact(4)) {
            let unit = self.unit(record.data + i)?;
            all.extend_from_slice(first);
            all.extend_from_slice(part(&unit, 4, unit.len()));
        }
        all.truncate(record.len as usize);
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::made::{Made, UUID};
    use super::super::{State, state};
    use super::*;

    /// Where the log of [`Made`] begins, and its units.
    const START: usize = 100 << 10;
    const UNITS: usize = 32;

    /// A record at a unit: its cycle, its tail, its operations.
    fn record(made: &mut Made, unit: usize, cycle: u32, tail: usize, count: u32, data: &[u8]) {
        let at = START + unit * 512;
        made.number(at, 4, u64::from(MAGIC));
        made.number(at + 4, 4, u64::from(cycle));
        made.number(at + 8, 4, 2);
        made.number(at + 12, 4, 512);
        made.number(at + 16, 8, u64::from(cycle) << 32 | unit as u64);
        made.number(at + 24, 8, u64::from(cycle) << 32 | tail as u64);
        made.number(at + 40, 4, u64::from(count));
        made.put(at + 44, &data[..4]);
        made.number(at + 300, 4, 1);
        made.put(at + 304, &UUID);
        made.number(at + 320, 4, 32768);
        let next = START + (unit + 1) % UNITS * 512;
        made.put(next, data);
        made.number(next, 4, u64::from(cycle));
    }

    const UNMOUNT: [u8; 12] = [0, 0, 0, 1, 0, 0, 0, 0, 0xaa, 0x20, 0, 0];
    /// A mark of a transaction's begin, and nothing else.
    const START_ONLY: [u8; 12] = [0, 0, 0, 1, 0, 0, 0, 0, 0x69, 0x1, 0, 0];
    /// An operation of something else.
    const CHANGE: [u8; 16] = [0, 0, 0, 1, 0, 0, 0, 4, 0x69, 0, 0, 0, 0x3b, 0x12, 2, 0];

    /// All units have a cycle: those before `head` this one, the others the one before.
    fn cycles(made: &mut Made, cycle: u64, head: usize) {
        for unit in 0..UNITS {
            made.number(START + unit * 512, 4, if unit < head { cycle } else { cycle - 1 });
        }
    }

    fn of(fill: impl FnOnce(&mut Made)) -> State {
        let mut made = Made::new(true);
        fill(&mut made);
        state(&made.volume()).unwrap()
    }

    #[test]
    fn the_last_record_says_whether_all_is_written() {
        assert_eq!(of(|_| {}), State::Clean);
        assert_eq!(of(|m| m.number(48, 8, 0)), State::Elsewhere);
        for (cycle, at) in [(1, 0), (1, 10), (7, 10), (7, 29), (7, 30)] {
            let with = |data: &[u8], count| {
                of(|m| {
                    cycles(m, cycle, at + 2);
                    record(m, at, cycle as u32, at, count, data);
                })
            };
            assert_eq!(with(&UNMOUNT, 1), State::Clean, "{cycle} {at}");
            assert_eq!(with(&UNMOUNT, 2), State::Dirty, "{cycle} {at}");
            assert_eq!(with(&CHANGE, 1), State::Dirty, "{cycle} {at}");
            assert_eq!(with(&START_ONLY, 1), State::Clean, "nothing but a mark");
        }
    }

    #[test]
    fn all_records_from_the_tail_on_count() {
        let with = |first: &[u8], tail| {
            of(|m| {
                cycles(m, 3, 12);
                record(m, 8, 3, 8, 1, first);
                record(m, 10, 3, tail, 1, &START_ONLY);
            })
        };
        assert_eq!(with(&START_ONLY, 8), State::Clean);
        assert_eq!(with(&CHANGE, 8), State::Dirty);
        assert_eq!(with(&CHANGE, 10), State::Clean);
        // A tail where no record is.
        assert_eq!(with(&START_ONLY, 9), State::Dirty);
    }

    #[test]
    fn what_is_no_record_is_none() {
        let changed = |at: usize, value: u8| {
            of(|m| {
                cycles(m, 3, 12);
                record(m, 10, 3, 10, 1, &UNMOUNT);
                let at = START + 10 * 512 + at;
                m.bytes[at] = value;
            })
        };
        assert_eq!(changed(330, 1), State::Clean);
        // Its version, its place, its file system, its length.
        for (at, value) in [(11, 9), (23, 11), (304, 1), (13, 0xff), (14, 9)] {
            assert_eq!(changed(at, value), State::Dirty, "{at}");
        }
        let mut made = Made::new(true);
        made.number(96, 4, 100);
        assert!(state(&made.volume()).is_err(), "over the end of its group");
    }
}
