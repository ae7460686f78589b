//! From a backup directory to disks, chains and points.
//!
//! `scan` walks the directory and gives a `tree`, `side` looks at `.fleecefs/` beside the images, `name` reads
//! file names, `probe` says what files hold (`probed`), `format` how they are read, `fates` which of them can
//! be served, by what `link` says of which parent each has; `assemble` makes the `catalog` of it.
//! `manifest` reads and writes `.fleecefs/*.json`. The result is a [`Catalog`]: a value that `list`, `mount`,
//! `restore`, `verify` and `prune` share.
//! Nothing here writes but `manifest`, `removal` and `linking`.

mod catalog;
pub(crate) mod link;
pub(crate) mod points;
pub mod scan;
pub mod walk;

pub use self::points::foreign::is_foreign_name;
pub use self::points::nearest::nearest;
pub use self::points::record::{check_formats, describe, describe_format, record_from};
pub use self::points::select::{POINT_HELP, time_name};
pub use self::walk::pointer::backing_name;
pub(crate) use catalog::NEWEST_LOST;
pub use catalog::{Catalog, Disk, Point};
