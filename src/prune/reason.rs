//! [`Reason`]: why a point is kept, as the plan shows it.
use crate::text::path_text;

/// Why a point is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// `--keep-last`.
    Last,
    /// `--keep-daily`: the day.
    Daily(String),
    /// `--keep-weekly`: the week.
    Weekly(String),
    /// `--keep-monthly`: the month.
    Monthly(String),
    /// `--keep-yearly`: the year.
    Yearly(String),
    /// `--keep-within`.
    Within,
    /// `--keep-gone`: its disk, or VM, is gone.
    Gone,
    /// The next backup builds on it, or it is the newest at all.
    Newest,
    /// It is of the last run that has all disks.
    LastCompleteRun,
    /// Another disk's point of the same run is kept.
    SameRun,
    /// This point needs it.
    NeededBy(String),
    /// This point depends on something that is missing, and that may depend on it.
    MayBeNeededBy(String),
    /// It becomes part of this point, which becomes a FULL (`--consolidate`).
    MergedInto(String),
    /// It is an image of another kind.
    NotABackup,
    /// It cannot be restored now; what is missing may turn up.
    CannotBeServed,
    /// The newest point failed or is not verified.
    Held(String),
}

impl Reason {
    /// Whether the point is wanted for itself, and not only because another depends on it.
    pub fn is_own(&self) -> bool {
        use Reason::{MayBeNeededBy, MergedInto, NeededBy};
        !matches!(self, NeededBy(_) | MayBeNeededBy(_) | MergedInto(_))
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Last => f.write_str("last"),
            Reason::Daily(d) => write!(f, "daily {d}"),
            Reason::Weekly(d) => write!(f, "weekly {d}"),
            Reason::Monthly(d) => write!(f, "monthly {d}"),
            Reason::Yearly(d) => write!(f, "yearly {d}"),
            Reason::Within => f.write_str("within"),
            Reason::Gone => f.write_str("gone"),
            Reason::Newest => f.write_str("newest"),
            Reason::LastCompleteRun => f.write_str("last complete run"),
            Reason::SameRun => f.write_str("another disk of this run is kept"),
            Reason::NeededBy(p) => write!(f, "needed by {}", path_text(p)),
            Reason::MayBeNeededBy(p) => {
                write!(f, "{} may depend on it", path_text(p))
            }
            Reason::MergedInto(p) => write!(f, "merged into {}", path_text(p)),
            Reason::NotABackup => f.write_str("not a backup"),
            Reason::CannotBeServed => f.write_str(
                "cannot be restored (see 'list'; override with \
                                                   --force)",
            ),
            Reason::Held(why) => write!(f, "nothing deleted: {why}"),
        }
    }
}
