//! The rules of retention, for `prune` and what tells what it would do.

use std::ffi::OsString;

use clap::Args;

use crate::prune::plan::Rules;
use crate::units::parse_duration;

/// What is kept.
#[derive(Debug, Args)]
pub(super) struct KeepArgs {
    /// Keep the newest N points
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    keep_last: usize,
    /// Keep one point of each of the newest N days
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    keep_daily: usize,
    /// Keep one point of each of the newest N weeks
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    keep_weekly: usize,
    /// Keep one point of each of the newest N months
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    keep_monthly: usize,
    /// Keep one point of each of the newest N years
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    keep_yearly: usize,
    /// Keep all points that are at most so much older than the newest (12h, 7d, 2w, 6M, 1y)
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    keep_within: Option<u64>,
}

impl KeepArgs {
    /// The same as words of a command line.
    pub(super) fn words(&self) -> Vec<OsString> {
        let counts = [
            ("last", self.keep_last),
            ("daily", self.keep_daily),
            ("weekly", self.keep_weekly),
            ("monthly", self.keep_monthly),
            ("yearly", self.keep_yearly),
        ];
        let given = counts.into_iter().filter(|(_, n)| *n > 0);
        let mut words: Vec<OsString> =
            given.map(|(name, n)| format!("--keep-{name}={n}").into()).collect();
        words.extend(self.keep_within.map(|s| format!("--keep-within={s}s").into()));
        words
    }

    /// The rules that were given.
    pub(super) fn rules(&self) -> Rules {
        Rules {
            last: self.keep_last,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
        }
    }
}
