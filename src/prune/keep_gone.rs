//! [`KeepGone`]: what stays of a disk or VM that is gone. Its points may be the only copy of what was on it.

use std::num::NonZeroUsize;
use std::str::FromStr;

use crate::chain::gone::Gone;
use crate::units::parse_duration;

/// The rule for what is gone, to which no other rule applies. The newest point stays whatever it says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KeepGone {
    /// All points.
    #[default]
    All,
    /// The newest N.
    Newest(NonZeroUsize),
    /// All, until it has been gone for so many seconds.
    For(u64),
}

impl KeepGone {
    /// How many of the newest points of what is gone stay, of `points`.
    pub(super) fn stay(self, gone: &Gone, points: usize) -> usize {
        match self {
            KeepGone::All => points,
            KeepGone::Newest(n) => n.get(),
            KeepGone::For(seconds) if gone.seconds() <= seconds => points,
            KeepGone::For(_) => 0,
        }
    }
}

impl FromStr for KeepGone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not 'all', a number from 1 or a duration like 90d");
        match text.trim() {
            "all" => Ok(KeepGone::All),
            n if n.chars().all(|c| c.is_ascii_digit()) => {
                n.parse().map(KeepGone::Newest).map_err(|_| bad())
            }
            duration => parse_duration(duration).map(KeepGone::For).map_err(|_| bad()),
        }
    }
}

impl std::fmt::Display for KeepGone {
    /// As it is written.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KeepGone::All => f.write_str("all"),
            KeepGone::Newest(n) => write!(f, "{n}"),
            KeepGone::For(seconds) => write!(f, "{seconds}s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_is_written() {
        for (text, is) in [("all", "all"), ("3", "3"), ("90d", "7776000s"), (" 1d12h", "129600s")] {
            let read: KeepGone = text.parse().unwrap();
            assert_eq!(read.to_string(), is);
            assert_eq!(is.parse(), Ok(read));
        }
        for bad in ["", "0", "none", "-1", "3 points", "99999999999999999999999"] {
            assert!(bad.parse::<KeepGone>().is_err(), "{bad}");
        }
    }
}
