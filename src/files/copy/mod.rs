//! Out of a tree: into a folder, or into a tar archive.
//!
//! Nothing that a guest wrote decides where is written: see `folder`. What cannot be had or made is counted and
//! told, and the rest goes on.

mod archive;
mod folder;
mod report;
mod sparse;
mod tar;

pub use archive::archive;
pub use folder::{Target, copy};
pub use report::{Options, Report};
