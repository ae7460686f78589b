//! qmprestore's verbs, which alter the backup in place: [`rebase`], [`fold`] (`commit` and
//! `snapshot-rebase`). (`merge` restores into a file and alters nothing.)
//!
//! Crash safety: no step ever takes away bytes that a point which is to stay still needs. What is
//! rewritten is made under another name and renamed; a header that is changed in place is saved
//! first; what a crash may leave is written down before (`.fleecefs/fold.json`,
//! `.fleecefs/<file>.header`), and whoever writes to the folder next finishes it ([`recover`]).

pub(crate) mod config;
pub mod consolidate;
pub mod files;
pub mod fold;
mod folders;
pub mod join;
pub(crate) mod line;
mod member;
pub(crate) mod plan;
pub mod rebase;
pub mod remove;
mod snapshots;
mod switch;

pub use self::folders::{open_folder, side_folder};
pub use self::line::{Line, Users, folded, select};
pub use self::member::Member;
pub use self::plan::FoldPlan;
pub use self::switch::recover;
