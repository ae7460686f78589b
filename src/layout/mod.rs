//! How backup programs name their files: qmpbackup's (and ours), virtnbdbackup's.

pub(crate) mod level;
pub mod name;
pub(crate) mod stream_name;

pub use self::level::Level;
