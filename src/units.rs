//! Numbers and times as people write and read them.

/// `bytes` in words: `512 B`, `64.0 KiB`, `1.2 TiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A number of things: `1 point`, `2 points`.
pub fn counted(n: u64, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// Parses `64M`, `1GiB`, `4096`: binary units, as QEMU's tools take them.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| format!("'{text}' is not a size"))?;
    let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("'{text}' has an unknown unit; use K, M, G or T")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// Parses an age or duration, `90s`, `30m`, `12h`, `7d`, `3w`, `6M` (30 days each), `1y` (365
/// days), into seconds; several may follow each other.
pub fn parse_duration(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a duration; use s, m, h, d, w, M or y as in 7d or 1y6M");
    let (mut total, mut number) = (0u64, String::new());
    for c in text.trim().chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let unit = match c {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            'w' => 7 * 86_400,
            'M' => 30 * 86_400,
            'y' => 365 * 86_400,
            _ => return Err(bad()),
        };
        let n: u64 = number.parse().map_err(|_| bad())?;
        total = n.checked_mul(unit).and_then(|s| total.checked_add(s)).ok_or_else(bad)?;
        number.clear();
    }
    if number.is_empty() && !text.trim().is_empty() { Ok(total) } else { Err(bad()) }
}

/// A time, in seconds since the epoch, as UTC: `2026-11-22T04:00:00Z`. The bare number where no
/// calendar has it.
pub fn iso_time(time: i64) -> String {
    jiff::Timestamp::from_second(time).map_or_else(|_| format!("@{time}"), |t| t.to_string())
}

/// How long ago something was, in the units of [`parse_duration`]: `5m ago`, `30h ago`, `2d ago`.
pub fn age(seconds: i64) -> String {
    match seconds {
        i64::MIN..60 => "just now".into(),
        60..3600 => format!("{}m ago", seconds / 60),
        3600..172_800 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86_400),
    }
}

/// A duration in the largest unit of [`parse_duration`] that it is whole numbers of: `36h`, `7d`.
pub fn human_duration(seconds: u64) -> String {
    let units = [(86_400, 'd'), (3600, 'h'), (60, 'm')];
    let whole = units.into_iter().find(|(unit, _)| seconds > 0 && seconds.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{seconds}s"), |(unit, name)| format!("{}{name}", seconds / unit))
}

/// Serializes a time as [`iso_time`] shows it.
///
/// # Errors
/// Those of the serializer.
pub fn as_time<S: serde::Serializer>(time: &i64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&iso_time(*time))
}

/// Parses a point in time: an age ([`parse_duration`]), `@` and seconds since the epoch, a date, or
/// a date and time, in UTC unless it says otherwise: what is shown is UTC. Returns seconds since the epoch.
pub fn parse_when(text: &str) -> Result<i64, String> {
    let text = text.trim();
    if let Some(seconds) = text.strip_prefix('@') {
        return seconds.parse().map_err(|_| format!("'{text}' is not a number of seconds"));
    }
    if let Ok(age) = parse_duration(text) {
        let now = jiff::Timestamp::now().as_second();
        return Ok(now.saturating_sub(i64::try_from(age).unwrap_or(i64::MAX)));
    }
    if let Ok(t) = text.parse::<jiff::Timestamp>() {
        return Ok(t.as_second());
    }
    let utc =
        text.parse::<jiff::civil::DateTime>().and_then(|d| d.to_zoned(jiff::tz::TimeZone::UTC));
    utc.map(|z| z.timestamp().as_second()).map_err(|_| {
        format!("'{text}' is not a time; use 2026-11-22, 2026-11-22T04:00, 7d or @SECONDS")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_times_read() {
        assert_eq!(parse_duration("7d"), Ok(604_800));
        assert_eq!(parse_duration("1h30m"), Ok(5400));
        for bad in ["", "7", "d", "7x", "99999999999999999999d", "-1d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_when("@12"), Ok(12));
        assert_eq!(parse_when("1970-01-02T00:00:00Z"), Ok(86_400));
        assert_eq!(parse_when("1970-01-02"), Ok(86_400));
        assert_eq!(parse_when("1970-01-02T01:00"), Ok(90_000));
        assert_eq!(parse_when("1970-01-02T01:00+01:00"), Ok(86_400));
        assert!(parse_when("soon").is_err());
    }

    #[test]
    fn ages_are_in_the_largest_unit_of_which_there_are_some() {
        let hour = 3600;
        for (seconds, text) in [(59, "just now"), (60, "1m ago"), (hour - 1, "59m ago")] {
            assert_eq!(age(seconds), text);
        }
        assert_eq!((age(47 * hour), age(48 * hour)), ("47h ago".into(), "2d ago".into()));
        // A clock that was set back.
        assert_eq!(age(-5), "just now");
    }

    #[test]
    fn durations_are_written_as_they_are_read() {
        for text in ["36h", "7d", "90s", "5m", "0s"] {
            assert_eq!(human_duration(parse_duration(text).unwrap()), text);
        }
    }

    #[test]
    fn sizes_read_and_print() {
        assert_eq!(parse_bytes("64M"), Ok(64 << 20));
        assert_eq!(parse_bytes("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(parse_bytes("99999999999T").is_err());
        assert!(parse_bytes("4x").is_err());
        assert_eq!(human_bytes(512), "512 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
    }
}
