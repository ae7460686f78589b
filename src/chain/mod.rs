//! From a backup directory to disks, chains and points.
//!
//! [`scan`] does it: `walk` reads the directory (`tree`), `.fleecefs/` beside the images (`side_folder`) and what files
//! hold (`probe`). `link` decides which files are of one disk (`group`), in which format each is read
//! (`format`), which parent it has, and whether it can be served (`dependencies`). `points` makes the `catalog` of it.
//! `run_gaps` finds what is missing of the newest runs, and `gone` the disks and VMs that are in none; `timeline` is what
//! stays the same of both over the years.
//! The result is a [`Catalog`]: a value that `list`, `mount`, `restore`, `verify` and `prune` share. Nothing here
//! writes.

mod catalog;
pub(crate) mod gone;
pub(crate) mod link;
pub(crate) mod points;
mod run_gaps;
pub mod scan;
mod timeline;
pub(crate) mod walk;

pub(crate) use self::points::beside::{beside, manifest_of};
pub use self::points::foreign::is_foreign_name;
pub use self::points::nearest::nearest;
pub use self::points::record::{check_formats, describe, describe_format, record_from};
pub use self::points::select::{POINT_HELP, time_name};
pub use self::walk::pointer::backing_name;
pub(crate) use catalog::NEWEST_LOST;
pub use catalog::{Catalog, Disk, Point};
pub(crate) use run_gaps::{MissingImage, has_bare_image, missing_of_run, run_gaps};
pub(crate) use timeline::timeline;
