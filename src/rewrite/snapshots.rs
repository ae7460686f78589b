//! The names of internal snapshots: qmprestore's, made unique.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Member, files};
use crate::error::Result;
use crate::layer::{self, Format, LayerPart, LayerSpec};
use crate::storage::SourceFile;

/// The snapshot of the FULL itself, as qmprestore calls it.
const FULL_SNAPSHOT: &str = "FULL-BACKUP";
/// Bytes of the disk looked at in one go.
const WINDOW: u64 = 1 << 30;

/// Names for the FULL's state and each increment's: `FULL-BACKUP`, then local times. No name is
/// taken twice, neither by the FULL's own snapshots nor in the night that has an hour twice. No
/// name for the FULL's state if its newest snapshot holds just that.
///
/// # Errors
/// The FULL cannot be read.
pub(super) fn names(full: &Member, increments: &[Member]) -> Result<Vec<Option<String>>> {
    let taken = files::probe(&full.path)?.snapshots;
    let known = match (0u32..).zip(&taken).last() {
        Some((place, _)) => is_state_of(full, place)?,
        None => false,
    };
    // After a commit the FULL is of a later time than its name says, and than that snapshot's.
    let folded = files::manifest_of(&full.path)?.is_some_and(|m| m.state_of.is_some());
    let mut used: HashSet<String> = taken.into_iter().map(|s| s.name).collect();
    let first = match (known, folded || used.contains(FULL_SNAPSHOT)) {
        (true, _) => None,
        (false, false) => Some(unique(FULL_SNAPSHOT.into(), &mut used)),
        (false, true) => Some(unique(local(full.time), &mut used)),
    };
    let rest = increments.iter().map(|m| Some(unique(local(m.time), &mut used)));
    Ok(std::iter::once(first).chain(rest).collect())
}

fn local(time: i64) -> String {
    match jiff::Timestamp::from_second(time) {
        Ok(t) => t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d-%H:%M:%S").to_string(),
        Err(_) => time.to_string(),
    }
}

fn unique(name: String, used: &mut HashSet<String>) -> String {
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    let mut free = std::iter::once(name.clone()).chain(numbered).filter(|n| !used.contains(n));
    let chosen = free.next().unwrap_or_default();
    used.insert(chosen.clone());
    chosen
}

/// Whether the active state is that of a snapshot: the same clusters, as nothing was written since.
fn is_state_of(full: &Member, place: u32) -> Result<bool> {
    let open = |part| {
        let file = Arc::new(SourceFile::look(&full.path)?);
        layer::open(&LayerSpec { file, format: Format::Qcow2, part, data_file: None })
    };
    let (active, snapshot) = (open(LayerPart::Whole)?, open(LayerPart::Snapshot(place))?);
    if active.size() != snapshot.size() {
        return Ok(false);
    }
    let mut at = 0;
    while at < active.size() {
        let end = at.saturating_add(WINDOW).min(active.size());
        let (a, b) = (active.map(at..end), snapshot.map(at..end));
        if a.extents.as_slice() != b.extents.as_slice() {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_taken_twice() {
        let mut used = HashSet::from(["a".to_string(), "a-2".to_string()]);
        assert_eq!(unique("b".into(), &mut used), "b");
        assert_eq!(unique("a".into(), &mut used), "a-3");
        assert_eq!(unique("a".into(), &mut used), "a-4");
        assert_eq!(unique("b".into(), &mut used), "b-2");
    }
}
