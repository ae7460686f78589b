//! What a walk over a backup directory sees: folders, files, and what the files hold.

pub(crate) mod info;
pub(crate) mod inside;
pub(crate) mod pointer;
pub(crate) mod probe;
pub(crate) mod probed;
pub(crate) mod side;
pub(crate) mod tree;
