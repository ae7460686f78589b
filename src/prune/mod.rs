//! Retention: which points stay. (What takes the others away is in [`crate::rewrite`].)
//!
//! [`plan`] decides, purely, with `reason`, `keep_gone` for what is gone, and, for chains to be merged, `merge`; `items` turns a catalog into
//! its input.

pub(crate) mod items;
mod keep_gone;
mod merge;
pub mod plan;
mod planned;
pub(crate) mod reason;

pub use self::merge::CanMerge;
pub use items::items;
pub use keep_gone::KeepGone;
pub use planned::Unmerged;
