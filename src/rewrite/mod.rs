//! All that changes backups in place.
//!
//! - [`remove`]: takes points away, for `prune`; `config`: the copies of configuration files that go with them
//! - [`consolidate`]: the oldest part of a chain becomes one new FULL
//! - [`flatten`]: qmprestore's `commit` and `snapshot-rebase`; [`rebase`]: its `rebase`; `replace` puts a new FULL
//!   into the place of a chain's beginning
//! - [`join`]: `link-disk`: the points of a renamed disk go to its new name
//! - `section`, `member`: which files are meant; `files`, `folders`: steps on one file or folder
//!
//! Crash safety: no step ever takes away bytes that a point which is to stay still needs. What is
//! rewritten is made under another name and renamed; a header that is changed in place is saved
//! first; what a crash may leave is written down before ([`crate::journal`]), and whoever writes to the folder
//! next finishes it ([`recover`]).

pub(crate) mod config;
pub(crate) mod consolidate;
pub(crate) mod files;
pub(crate) mod flatten;
mod folders;
pub(crate) mod join;
mod member;
pub(crate) mod plan;
pub(crate) mod rebase;
pub mod remove;
mod replace;
pub(crate) mod section;
mod snapshots;

pub use self::folders::{open_folder, side_folder};
pub use self::member::Member;
pub use self::plan::FlattenPlan;
pub use self::replace::recover;
pub use self::section::{ChainSection, Newest, Users, merged_into, select};
