//! Retention: which points stay. (What takes the others away is in [`crate::rewrite`].)
//!
//! [`plan`] decides, purely, with `reason` and, for chains to be merged, `merge`; `items` turns a catalog into
//! its input.

pub(crate) mod items;
mod merge;
pub mod plan;
mod planned;
pub(crate) mod reason;

pub use self::merge::CanMerge;
pub use items::items;
pub use planned::Unmerged;
