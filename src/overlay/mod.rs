//! Throw-away writes: overlays over points, so that a point can be written to while its backup stays as it is.
//!
//! - `map`: which blocks of a disk an overlay has, by levels; `map_file`: the same on disk
//! - `one`: [`Overlay`], the writes over one point; `stripes`: the locks of writers; `budget`: the limit for all
//! - `file`: what is written to; `unnamed`: the files of overlays that are not kept; `holes`: sparse files
//! - `kept`: overlays that outlive their mount, in a scratch folder
//! - `all`: [`Overlays`], those of a mount, by point
//!
//! An overlay has its file for one point of one content. The point itself is read by whoever reads: this module never
//! opens a backup.

mod all;
mod budget;
mod file;
mod holes;
pub(crate) mod kept;
mod map;
mod map_file;
mod one;
mod stripes;
mod unnamed;

pub use all::{Overlays, Scratch};
pub(crate) use all::{Slot, Told};
pub(crate) use budget::Budget;
pub(crate) use map::{BLOCK, State};
pub(crate) use one::Overlay;
