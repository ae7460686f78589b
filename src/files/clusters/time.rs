//! Dates and times as DOS packed them: a local time without its zone.

use super::super::tree::Time;

/// A packed date and time.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Stamp {
    /// Years since 1980, month, day.
    pub date: u16,
    /// Hour, minute, and every second second.
    pub time: u16,
    /// Hundredths of a second beyond that, below 200.
    pub hundredths: u8,
    /// Seconds that its clock was ahead of UTC.
    pub offset: i64,
}

/// The time that it stands for. What is out of range is taken as the nearest that is not, as Linux does.
pub(in super::super) fn time(stamp: Stamp) -> Time {
    let (date, time) = (stamp.date, stamp.time);
    let year = 1980 + (date >> 9) as i16;
    let month = ((date >> 5 & 0xf) as i8).clamp(1, 12);
    let day = ((date & 0x1f) as i8).max(1);
    let (hour, minute) = (((time >> 11) as i8).min(23), ((time >> 5 & 0x3f) as i8).min(59));
    let hundredths = stamp.hundredths.min(199);
    let second = (2 * (time & 0x1f) as i8).min(58);
    // A 31st of February is its last day.
    let at = |day| jiff::civil::DateTime::new(year, month, day, hour, minute, second, 0).ok();
    let Some(at) = (day - 3..=day).rev().find_map(at) else { return Time::default() };
    let utc = jiff::tz::Offset::UTC.to_timestamp(at).map_or(0, |t| t.as_second());
    let seconds = utc + i64::from(hundredths / 100) - stamp.offset;
    Time { seconds, nanos: u32::from(hundredths % 100) * 10_000_000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(date: u16, time_of_day: u16, hundredths: u8) -> (i64, u32) {
        let found = time(Stamp { date, time: time_of_day, hundredths, offset: 0 });
        (found.seconds, found.nanos)
    }

    #[test]
    fn packed_times_are_unpacked() {
        // 2024-02-29 13:14:57.25
        let (date, day) = (44 << 9 | 2 << 5 | 29, 13 << 11 | 14 << 5 | 28);
        assert_eq!(at(date, day, 125), (1_709_212_497, 250_000_000));
        let stamp = Stamp { date, time: day, hundredths: 125, offset: -5400 };
        assert_eq!(time(stamp).seconds, 1_709_212_497 + 5400);
        // Nothing at all; and what no calendar has.
        assert_eq!(at(0, 0, 0), (315_532_800, 0));
        assert_eq!(at(2 << 5 | 31, 0xffff, 255), (320_716_799, 990_000_000));
        assert_eq!(at(0xffff, 0xffff, 0), at(127 << 9 | 12 << 5 | 31, 23 << 11 | 59 << 5 | 29, 0));
    }
}
