//! Retention: which points stay, and taking the others away.
//!
//! `plan` decides, purely, with `reason` and, for chains to be merged, `shorten`; `items` turns a catalog into its input; `execute` carries a plan out, `config` removes the copies of configuration files that
//! nobody needs then.
//! `consolidate` makes the oldest part of a chain one new FULL, `join` makes one disk's history of two names'. What a crash leaves is finished by
//! `recover` at the start of whatever writes to the folder next (a backup too); until then the
//! directory holds the old or the new chain whole. `recover` also finishes what the verbs that alter
//! a chain left: there is one recovery for all.

pub(crate) mod items;
pub mod plan;
mod planned;
pub mod reason;
mod shorten;

pub use items::items;
pub use planned::Unmerged;
pub use shorten::CanMerge;
