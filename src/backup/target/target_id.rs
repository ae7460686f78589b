//! The id of a backup directory: by it a bitmap is known to be of this one.

use std::path::{Path, PathBuf};

use crate::backup::names;
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::{EntryKind, FileMode};

/// Whose bitmaps are a target's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TargetId {
    /// Eight digits that stand for its id in the names of bitmaps.
    pub id: String,
    /// Those of other ids that are its own too.
    others: Vec<String>,
}

impl TargetId {
    /// One that has this id alone.
    pub(crate) fn new(id: &str) -> Self {
        TargetId { id: id.to_string(), others: Vec::new() }
    }

    /// The id of `target`, as qmpbackup keeps it: a file `uuid` of 36 bytes without a newline, or of any
    /// words that a user put there.
    /// `base` is where this run's disks go: the target itself, or its folder of the month. Months
    /// share the target's id, else nobody would let go of last month's bitmaps; each has a copy of
    /// it, where qmpbackup looks. Months that have ids of their own, as they had once, are known
    /// too. With `make` an id that is missing is written.
    ///
    /// # Errors
    /// `Corrupt` if it is no id, or what the operating system said.
    pub(crate) fn of(target: &Path, base: &Path, make: bool) -> Result<Self> {
        Self::shared(target, base, make, FileMode::default())
    }

    /// As [`TargetId::of`]; an id that is written is shared.
    ///
    /// # Errors
    /// As [`TargetId::of`].
    pub(crate) fn shared(target: &Path, base: &Path, make: bool, share: FileMode) -> Result<Self> {
        let (own, month) = (target.join("uuid"), base.join("uuid"));
        let (of_target, of_month) = (read_id(&own)?, read_id(&month)?);
        let text = match of_target.as_ref().or(of_month.as_ref()) {
            Some(t) => t.clone(),
            None => new_id()?,
        };
        if make && of_target.is_none() {
            write_id(&own, &text, share)?;
        }
        if make && base != target && of_month.is_none() {
            write_id(&month, &text, share)?;
        }
        let others = if base == target { Vec::new() } else { months(target) };
        Self::with(&text, &own, others)
    }

    fn with(text: &str, path: &Path, mut others: Vec<String>) -> Result<Self> {
        // What 0.1.0 made of ids that are no UUIDs.
        let digits_alone: String = text.chars().filter(char::is_ascii_hexdigit).take(8).collect();
        if digits_alone.len() == 8 {
            others.push(digits_alone.to_ascii_lowercase());
        }
        Ok(TargetId { id: digits(text, path)?, others })
    }

    /// The id that the target has, and those of its months.
    ///
    /// # Errors
    /// `NotFound` if it has none; as [`TargetId::of`].
    pub(crate) fn stored(target: &Path) -> Result<Self> {
        let own = target.join("uuid");
        let (text, mut months) = (read_id(&own)?, months(target));
        match text {
            Some(text) => Self::with(&text, &own, months),
            None if !months.is_empty() => {
                let id = months.remove(0);
                Ok(TargetId { id, others: months })
            }
            None => Err(Error::new(Kind::NotFound, "no backup directory: there is no file 'uuid'")
                .at_path(target)
                .remedy("is its file system mounted?")),
        }
    }

    /// The id as the user writes it: the text of a file `uuid`, or the eight digits that bitmaps' names
    /// have for it.
    ///
    /// # Errors
    /// `Usage` if it is empty.
    pub(crate) fn named(text: &str) -> Result<Self> {
        let text = text.trim();
        let short = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match short {
            true => Ok(Self::new(&text.to_ascii_lowercase())),
            false if text.is_empty() => Err(Error::new(Kind::Usage, "--uuid is empty")),
            false => Self::with(text, Path::new("uuid"), Vec::new()),
        }
    }

    /// Whether a bitmap of ours is of this target.
    pub(crate) fn owns(&self, bitmap: &str) -> bool {
        let of = |t: &str| self.id == t || self.others.iter().any(|o| o == t);
        names::parse_bitmap(bitmap).is_some_and(|b| of(b.target))
    }
}

/// The largest id, in bytes: one has 36, and perhaps a newline.
const LARGEST_ID: u64 = 256;

fn read_id(path: &Path) -> Result<Option<String>> {
    let failed = |e| Error::io(e, "cannot read the target's id").at_path(path);
    let read = folder::absent_is_none(folder::read_small(path, LARGEST_ID)).map_err(failed)?;
    let Some(bytes) = read else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes).into_owned();
    digits(&text, path).map(|_| Some(text))
}

/// The text of the file `uuid` in `target`, if there is one.
///
/// # Errors
/// `Corrupt` if it is no id, or what the operating system said.
pub(crate) fn stored_id(target: &Path) -> Result<Option<String>> {
    Ok(read_id(&target.join("uuid"))?.map(|text| text.trim_end().to_string()))
}

fn write_id(path: &Path, text: &str, share: FileMode) -> Result<()> {
    let failed = |e| Error::io(e, "cannot write the target's id").at_path(path);
    folder::write_shared(path, text.as_bytes(), share).map_err(failed)
}

/// Of a UUID its first eight digits; any other words count whole, by their hash.
fn digits(text: &str, path: &Path) -> Result<String> {
    let text = text.trim();
    if text.is_empty() {
        let what = "the id of this backup directory is empty";
        return Err(Error::new(Kind::Corrupt, what)
            .at_path(path)
            .remedy("restore the id, or remove the file: then a FULL begins a new chain"));
    }
    let first = text.get(..8).filter(|_| is_uuid(text)).map(str::to_ascii_lowercase);
    let hashed = || blake3::hash(text.as_bytes()).to_hex().chars().take(8).collect();
    Ok(first.unwrap_or_else(hashed))
}

/// Whether this is what qmpbackup and fleecefs write as an id.
pub(in crate::backup) fn is_uuid(text: &str) -> bool {
    let dashes = [8, 13, 18, 23];
    let fits = |(i, c): (usize, char)| match dashes.contains(&i) {
        true => c == '-',
        false => c.is_ascii_hexdigit(),
    };
    text.len() == 36 && text.chars().enumerate().all(fits)
}

fn new_id() -> Result<String> {
    let hex = names::random_hex(16)?;
    let part = |r: std::ops::Range<usize>| hex.get(r).unwrap_or_default();
    Ok(format!(
        "{}-{}-4{}-8{}-{}",
        part(0..8),
        part(8..12),
        part(13..16),
        part(17..20),
        part(20..32)
    ))
}

/// The folders of all months.
pub(in crate::backup) fn months_of(target: &Path) -> Vec<PathBuf> {
    let is_month = |n: &str| {
        let shape = n.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b });
        shape.eq(*b"0000-00")
    };
    let list = folder::entries(target).unwrap_or_default().into_iter();
    let folders =
        list.filter(|e| e.kind == EntryKind::Folder && e.name.to_str().is_some_and(is_month));
    folders.map(|e| target.join(e.name)).collect()
}

/// The ids in the folders of all months, as far as they have one.
fn months(target: &Path) -> Vec<String> {
    let ids = months_of(target).into_iter().map(|m| m.join("uuid"));
    ids.filter_map(|p| digits(&read_id(&p).ok()??, &p).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_share_the_targets_id() {
        let t = tempfile::tempdir().unwrap();
        let month = |m: &str| {
            std::fs::create_dir_all(t.path().join(m)).unwrap();
            t.path().join(m)
        };
        let november = TargetId::of(t.path(), &month("2026-11"), true).unwrap();
        let december = TargetId::of(t.path(), &month("2026-12"), true).unwrap();
        assert_eq!(november.id, december.id);
        let text = |p: PathBuf| std::fs::read_to_string(p.join("uuid")).unwrap();
        assert_eq!(text(month("2026-12")), text(t.path().into()));
        assert_eq!(text(month("2026-12")).len(), 36);
    }

    #[test]
    fn a_month_with_an_id_of_its_own_is_the_targets_all_the_same() {
        let t = tempfile::tempdir().unwrap();
        let ids = ["aaaaaaaa", "bbbbbbbb", "cccccccc"]
            .map(|i| format!("{i}-1111-4222-8333-444455556666"));
        for (m, id) in ["2026-10", "2026-11", "other"].into_iter().zip(&ids) {
            std::fs::create_dir(t.path().join(m)).unwrap();
            std::fs::write(t.path().join(m).join("uuid"), id).unwrap();
        }
        let id = TargetId::of(t.path(), &t.path().join("2026-11"), true).unwrap();
        assert_eq!(id.id, "bbbbbbbb");
        let of = |target| names::bitmap(target, "000000000001", "000000000002", 0);
        assert!(id.owns(&of("aaaaaaaa")) && id.owns(&of("bbbbbbbb")) && !id.owns(&of("cccccccc")));
        // Without --monthly the months are somebody else's.
        let id = TargetId::of(t.path(), t.path(), false).unwrap();
        assert!(!id.owns(&of("aaaaaaaa")));
        std::fs::write(t.path().join("uuid"), "\n").unwrap();
        assert_eq!(TargetId::of(t.path(), t.path(), true).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn any_words_are_an_id_and_count_whole() {
        let t = tempfile::tempdir().unwrap();
        let id = |text: &str| {
            std::fs::write(t.path().join("uuid"), text).unwrap();
            TargetId::of(t.path(), t.path(), true).unwrap().id
        };
        let words =
            ["no id", "backup of the office", "backup of the officf", "aaaaaaaa-1", "aaaaaaaa-2"];
        let ids: std::collections::BTreeSet<String> = words.iter().map(|w| id(w)).collect();
        assert_eq!(ids.len(), words.len(), "{ids:?}");
        assert!(ids.iter().all(|i| i.len() == 8), "{ids:?}");
        assert_eq!(id("no id"), id("no id\n"));
        assert_eq!(id("0A1b2c3d-1111-4222-8333-444455556666"), "0a1b2c3d");
    }
}
