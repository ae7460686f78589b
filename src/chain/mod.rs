//! From a backup directory to disks, chains and points.
//!
//! `scan` walks the directory and gives a `tree`, `side` looks at `.fleecefs/` beside the images, `name` reads
//! file names, `probe` says what files hold (`probed`), `format` how they are read, `fates` which of them can
//! be served, by what `link` says of which parent each has; `assemble` makes the `catalog` of it.
//! `manifest` reads and writes `.fleecefs/*.json`. The result is a [`Catalog`]: a value that `list`, `mount`,
//! `restore`, `verify` and `prune` share.
//! Nothing here writes but `manifest`, `removal` and `linking`.

mod assemble;
mod catalog;
mod doubt;
mod fates;
mod follow;
mod foreign;
mod format;
mod group;
mod info;
mod inside;
pub mod journal;
mod level;
mod link;
pub mod linking;
pub mod manifest;
pub mod name;
mod nearest;
mod pointer;
mod points;
mod probe;
mod probed;
mod record;
pub mod removal;
pub mod scan;
mod select;
mod side;
mod stream_name;
mod tree;
pub mod unfinished;
mod virtnbd;

pub(crate) use catalog::NEWEST_LOST;
pub use catalog::{Catalog, Disk, Point};
pub use foreign::is_foreign_name;
pub use level::Level;
pub use nearest::nearest;
pub use pointer::backing_name;
pub use record::{check_formats, describe, describe_format, record_from};
pub use select::{POINT_HELP, time_name};
