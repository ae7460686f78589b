//! [`StreamName`]: names of virtnbdbackup's streams.

use super::Level;

/// What a stream's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamName {
    pub disk: String,
    /// Full, inc, diff or copy.
    pub level: Level,
    /// What stands for the backup in the name: a checkpoint or a time; empty for full and copy.
    pub ident: String,
}

impl StreamName {
    /// Reads a file's name.
    pub(crate) fn parse(name: &str) -> Option<StreamName> {
        let name = name.strip_suffix(".data")?;
        let (disk, level, ident) = if let Some(disk) = name.strip_suffix(".full") {
            (disk, Level::Full, "")
        } else if let Some(disk) = name.strip_suffix(".copy") {
            (disk, Level::Copy, "")
        } else if let Some((disk, ident)) = name.split_once(".inc.") {
            (disk, Level::Inc, ident)
        } else {
            let (disk, ident) = name.split_once(".diff.")?;
            (disk, Level::Diff, ident)
        };
        let named = !disk.is_empty() && (!ident.is_empty() || !level.builds_on());
        named.then(|| StreamName { disk: disk.to_owned(), level, ident: ident.to_owned() })
    }
}

impl StreamName {
    /// Whether a file of this name describes the disk at the time of this backup, which holds all of it.
    pub(crate) fn is_description(&self, file: &str) -> bool {
        let inner = || file.strip_prefix(&self.disk)?.strip_prefix('.')?.strip_suffix(".qcow.json");
        inner().is_some_and(|ident| match self.level {
            Level::Copy => ident == "copy",
            // It is called after the first checkpoint.
            Level::Full => ident == "full" || ident.ends_with(".0"),
            _ => false,
        })
    }
}

impl Level {
    /// Whether a stream of this level needs another one.
    pub(crate) fn builds_on(self) -> bool {
        matches!(self, Level::Inc | Level::Diff)
    }
}
