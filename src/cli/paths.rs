//! Backup directories that the user names, and standard output.

use std::path::{Path, PathBuf};

use crate::chain::Catalog;
use crate::chain::scan::{FormatOverride, ScanOptions, scan};
use crate::error::{Error, Result};
pub(super) use crate::folder::user_paths::{backups, existing_folder, log_file, resolved, to_make};

/// Reads the backup directory that the user calls `path`. (Images may name it the same way.)
///
/// # Errors
/// See [`backups`] and [`scan`].
pub(super) fn catalog(path: &Path) -> Result<Catalog> {
    catalog_with(path, ScanOptions::default())
}

/// As [`catalog`], with images that were cut short served as far as they go if `salvage`.
///
/// # Errors
/// As [`catalog`].
pub(super) fn catalog_to_salvage(path: &Path, salvage: bool) -> Result<Catalog> {
    catalog_with(path, ScanOptions { salvage, ..ScanOptions::default() })
}

/// As [`catalog`]; `format_override` is what the user says of files whose format nothing else decides.
///
/// # Errors
/// As [`catalog`].
pub(super) fn catalog_with_format(
    path: &Path,
    format_override: Option<FormatOverride>,
) -> Result<Catalog> {
    catalog_with(path, ScanOptions { format_override, ..ScanOptions::default() })
}

fn catalog_with(path: &Path, options: ScanOptions) -> Result<Catalog> {
    let real = backups(path)?;
    let options = ScanOptions { called: Some(absolute(path)?), ..options };
    scan(&real, &options, None).map(|(catalog, _)| catalog)
}

/// Whether the user means standard output by this: `-`, or one of the names that systems have for it.
pub(super) fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|p| path == Path::new(p))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io(e, "cannot use this path").at_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_output_has_several_names() {
        assert!(is_stdout(Path::new("/dev/stdout")) && !is_stdout(Path::new("./-")));
    }
}
