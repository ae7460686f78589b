//! A point's image: layers merged into extents, cached in windows, read by position.
//!
//! `map` merges the layers over one window of guest offsets, `cache` bounds what is kept, `reader`
//! is [`Image`]: windows in lock-free slots, reads, and the search for data and holes; `window` is one
//! stretch of a point, as `map` merged it; `lazy` opens layers when they are needed; `held_point` keeps the
//! files of open points open, and `holds` knows which those are. What changed between two points is told by
//! `reader::changes` from their maps; `changed_map` keeps that as bits, `traced` remembers what was read of a point.

mod cache;
mod changed_map;
mod held_point;
mod holds;
mod lazy;
mod map;
mod points;
mod reader;
mod traced;
mod window;

pub use self::held_point::HeldPoint;
pub use cache::{Cache, CacheFigures};
pub use changed_map::ChangedMap;
pub use holds::Holds;
pub use map::{KnownParent, LayerMerge, MergedExtent, MergedMap, Source};
pub use points::{open_point, open_point_sharing};
pub use reader::{Change, Image, RangeContent, RangeKind};
pub use traced::{Trace, Traced};
