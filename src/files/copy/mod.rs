//! Out of a tree: into a folder, or into an archive.
//!
//! Nothing that a guest wrote decides where is written: see `folder`. What cannot be had or made is counted and
//! told, and the rest goes on.

mod archive;
mod container;
mod folder;
mod report;
mod sparse;
mod tar;
mod to_tar;
mod to_zip;

pub use archive::{Format, archive};
pub use folder::{Target, copy};
pub use report::{Options, Report};
