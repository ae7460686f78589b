//! The rules of retention, for `prune` and what tells what it would do.

use std::ffi::OsString;

use clap::Args;

use crate::prune::KeepGone;
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
    /// What to keep of a disk that its VM has no more, and of a VM that has had no backup for 30 days while others had,
    /// instead of the other rules: all, the newest N points, or all until it has been gone for so long (90d). Its
    /// newest point stays in any case
    #[arg(long, value_name = "all|N|DURATION", default_value = "all")]
    keep_gone: KeepGone,
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
        let other = Some(self.keep_gone).filter(|gone| *gone != KeepGone::default());
        words.extend(other.map(|gone| format!("--keep-gone={gone}").into()));
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
            gone: self.keep_gone,
        }
    }
}
