//! What a walk over a backup directory sees: folders, files, and what the files hold.

pub(crate) mod foreign_content;
pub(crate) mod info;
pub(crate) mod pointer;
pub(crate) mod probe;
pub(crate) mod probed;
pub(crate) mod side_folder;
pub(crate) mod tree;
