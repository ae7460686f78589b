//! Values of keys that no option has.

use crate::units::parse_duration;

/// A part of the day, in minutes since midnight of this machine's time zone; it may go over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hours {
    from: u32,
    to: u32,
}

impl Hours {
    /// Whether a minute of the day is in it.
    pub(crate) fn has(self, minute: u32) -> bool {
        match self.from < self.to {
            true => (self.from..self.to).contains(&minute),
            false => minute >= self.from || minute < self.to,
        }
    }
}

/// `22:00-06:00`.
pub(crate) fn hours(text: &str) -> Result<Hours, String> {
    let bad = || format!("'{text}' is not a part of the day like 22:00-06:00");
    let minute = |text: &str| {
        let (hours, minutes) = text.trim().split_once(':')?;
        let two = |t: &str| (t.len() == 2).then(|| t.parse::<u8>().ok()).flatten();
        let (hours, minutes) = (u32::from(two(hours)?), u32::from(two(minutes)?));
        (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
    };
    let (from, to) = text.split_once('-').ok_or_else(bad)?;
    let (from, to) = (minute(from).ok_or_else(bad)?, minute(to).ok_or_else(bad)?);
    if from == to { Err(bad()) } else { Ok(Hours { from, to }) }
}

/// A duration of at least a second.
pub(super) fn duration(text: &str) -> Result<u64, String> {
    match parse_duration(text)? {
        0 => Err("must be at least 1s".into()),
        seconds => Ok(seconds),
    }
}

/// An address that mail is sent to, or a user's name. It stands on a command line and in a header of the mail.
pub(super) fn address(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+=@-".contains(c);
    let begins = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    if begins && text.len() <= 254 && text.chars().all(allowed) {
        return Ok(text.to_string());
    }
    Err(format!(
        "'{text}' is not an address like root or admin@example.org (letters, digits and . _ + = @ -)"
    ))
}

/// A VM's name: part of names of files and units.
pub(super) fn vm_name(text: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+@-".contains(c);
    let begins = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if begins && text.len() <= 64 && text.chars().all(allowed) {
        return Ok(());
    }
    Err("a VM's name has at most 64 letters, digits and . _ + @ -, and begins with a letter or digit"
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_the_day_go_over_midnight() {
        let night = hours("22:00-06:00").unwrap();
        let (late, early) = (22 * 60, 6 * 60);
        assert!(night.has(late) && night.has(0) && night.has(early - 1));
        assert!(!night.has(late - 1) && !night.has(early) && !night.has(12 * 60));
        let day = hours("06:00 - 22:00").unwrap();
        assert!(day.has(early) && !day.has(late) && !day.has(0));
        for bad in ["", "22", "22:00", "24:00-01:00", "1:00-2:00", "10:00-10:00", "10:60-11:00"] {
            assert!(hours(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_neither_options_nor_headers_nor_programs() {
        for good in ["root", "a.b+c@mail.example.org", "_x"] {
            assert_eq!(address(good).as_deref(), Ok(good));
        }
        let long = "a".repeat(255);
        for bad in ["", "-oQ/tmp", "a b", "a,b", "a\nBcc: x", "|/bin/sh", "/etc/x", "<a@b>", &long]
        {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_of_vms_make_no_paths_and_no_options() {
        for good in ["vm1", "a", "web.example-1", "7+x@y_z"] {
            assert_eq!(vm_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "\u{e9}", &"a".repeat(65)] {
            assert!(vm_name(bad).is_err(), "{bad}");
        }
    }
}
