//! The points of one disk, in chain order.

pub(crate) mod assemble;
pub(crate) mod beside;
pub(crate) mod foreign;
pub(crate) mod nearest;
pub(crate) mod record;
pub(crate) mod select;
pub(crate) mod virtnbd;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::Point;
use super::link::dependencies::{Blocked, Dependencies, carries_snapshots};
use super::link::group::{DiskMember, Group, base_name};
use super::link::open_formats::open_formats;
use super::walk::tree::FileId;
use crate::error::{Finding, Kind, Severity};
use crate::layer::{LayerPart, LayerSpec, SnapshotInfo};
use crate::layout::Level;
use crate::layout::name::to_text;
use crate::text::path_text;

/// The name that `qmprestore snapshotrebase` gives to the state before the first increment.
const FULL_SNAPSHOT: &str = "FULL-BACKUP";
/// The names it gives to the others, in the local time of the machine it ran on.
const DATE_SNAPSHOT: &str = "%Y-%m-%d-%H:%M:%S";
/// The length of such a name.
const DATE_LEN: usize = "2026-10-25-02:30:00".len();
/// A file name has at most 255 bytes, and the mount appends `.raw`.
const MAX_NAME: usize = 251;
/// Characters of a snapshot's id that are shown; QEMU's are short numbers.
const MAX_ID: usize = 40;

/// The points of a disk, each after the one it depends on, and why those that cannot be served cannot.
pub(super) fn points(deps: &Dependencies, group: &Group) -> Vec<(Point, Option<Blocked>)> {
    let mut maker = PointBuilder {
        open: open_formats(deps.tree, group),
        deps,
        group,
        made: HashMap::new(),
        names: HashSet::new(),
        numbers: HashMap::new(),
        points: Vec::new(),
    };
    for member in in_chain_order(deps, group) {
        maker.file(&group.members[member]);
    }
    maker.points
}

/// Indices of a group's members by time, but never one before the file it depends on.
fn in_chain_order(deps: &Dependencies, group: &Group) -> Vec<usize> {
    let index: HashMap<FileId, usize> =
        group.members.iter().enumerate().map(|(i, b)| (b.file, i)).collect();
    let mut by_time: Vec<usize> = (0..group.members.len()).collect();
    by_time.sort_by_key(|i| {
        let b = &group.members[*i];
        (stamp(deps, b), rank(b.level), base_name(&deps.tree.files[b.file]))
    });
    let mut done = vec![false; group.members.len()];
    let mut order = Vec::with_capacity(done.len());
    for i in by_time {
        let mut path = Vec::new();
        let mut at = Some(i);
        // Marking on the way down also ends a loop.
        while let Some(j) = at.filter(|j| !done[*j]) {
            done[j] = true;
            path.push(j);
            at = deps.below(group.members[j].file).and_then(|f| index.get(&f).copied());
        }
        order.extend(path.into_iter().rev());
    }
    order
}

/// The time in a file's name; after a commit that of the image whose state the file has taken over.
fn stamp(deps: &Dependencies, belongs: &DiskMember) -> Option<i64> {
    let manifest = deps.tree.files[belongs.file].manifest.as_ref();
    manifest.map_or(belongs.stamp, |m| m.state_time(belongs.stamp))
}

fn rank(level: Level) -> u8 {
    match level {
        Level::Full => 0,
        Level::Copy => 1,
        Level::Diff => 2,
        Level::Inc => 3,
        Level::Image | Level::Snapshot => 4,
    }
}

struct PointBuilder<'a> {
    deps: &'a Dependencies<'a>,
    group: &'a Group,
    /// Files of which only their content says that they are images.
    open: HashSet<FileId>,
    /// Where the point of each file is.
    made: HashMap<FileId, usize>,
    names: HashSet<String>,
    /// The next number to try behind a name that is taken.
    numbers: HashMap<String, u32>,
    points: Vec<(Point, Option<Blocked>)>,
}

impl PointBuilder<'_> {
    fn file(&mut self, belongs: &DiskMember) {
        let entry = &self.deps.tree.files[belongs.file];
        let blocked = self.deps.blocked(belongs.file).cloned();
        let is_root = !matches!(belongs.level, Level::Inc | Level::Diff);
        let below = self.deps.below(belongs.file).filter(|_| !is_root);
        let parent = below.and_then(|f| self.made.get(&f).copied());
        let name = self.unique(to_text(base_name(entry)), "");
        let chain = match parent {
            Some(p) => self.points[p].0.chain.clone(),
            // Whatever it depends on is not known.
            None if !is_root && blocked.is_some() => String::new(),
            None => name.clone(),
        };
        let mut layers = Vec::new();
        if blocked.is_none() {
            if parent.is_none() {
                layers = self.deps.layers_below(belongs.file);
            }
            layers.push(self.deps.layer(belongs.file, LayerPart::Whole));
        }
        let unavailable = blocked.as_ref().map(|b| reason(b, &name));
        let mut point = Point {
            name,
            source: entry.path.clone(),
            level: belongs.level,
            chain,
            parent,
            time: self.time(belongs),
            size: entry.virtual_size(),
            own_bytes: entry.probed.own_bytes,
            consistency: entry.manifest.as_ref().and_then(|m| m.achieved),
            layers,
            format_is_open: self.open.contains(&belongs.file),
            unavailable,
        };
        if carries_snapshots(belongs.level) {
            self.snapshots(belongs, &mut point, blocked.as_ref());
        }
        self.made.insert(belongs.file, self.points.len());
        self.points.push((point, blocked));
    }

    /// The internal snapshots of an image are points too, older than its active state.
    fn snapshots(&mut self, belongs: &DiskMember, active: &mut Point, blocked: Option<&Blocked>) {
        let Some(info) = self.deps.tree.files[belongs.file].info() else { return };
        let rebased = info.snapshots.iter().any(|s| s.name == FULL_SNAPSHOT);
        let rebased = rebased.then(|| self.latest_rebased(belongs)).flatten();
        // The snapshot of the FULL's own state is of the time in its name, whatever was merged since.
        let full_time = belongs.stamp.unwrap_or(active.time);
        for (index, snapshot) in (0..).zip(&info.snapshots) {
            let time = snapshot_time(snapshot, full_time);
            if let Some(latest) = rebased {
                // The increments were written into the FULL: its active state is the last of them.
                active.time = active.time.max(time.min(latest));
            }
            let blocked = blocked.cloned().or_else(|| unusable(snapshot));
            let mut layers = Vec::new();
            if blocked.is_none() {
                layers = self.deps.layers_below(belongs.file);
                layers.push(self.deps.layer(belongs.file, LayerPart::Snapshot(index)));
            }
            let point = self.snapshot(active, snapshot, time, layers, blocked.as_ref());
            self.points.push((point, blocked));
        }
    }

    /// The latest time that the active state of a rebased FULL can be of, by the names of its
    /// snapshots: they are in local time, perhaps of another zone, and what depends on the FULL is newer.
    /// `None` if a manifest says the time.
    fn latest_rebased(&self, belongs: &DiskMember) -> Option<i64> {
        if self.deps.tree.files[belongs.file].manifest.is_some() {
            return None;
        }
        let later =
            self.group.members.iter().filter_map(|b| b.stamp).filter(|t| Some(*t) > belongs.stamp);
        Some(later.min().map_or(i64::MAX, |t| t.saturating_sub(1)))
    }

    fn snapshot(
        &mut self,
        active: &Point,
        snapshot: &SnapshotInfo,
        time: i64,
        layers: Vec<LayerSpec>,
        blocked: Option<&Blocked>,
    ) -> Point {
        let name = self.unique(snapshot_name(&active.name, snapshot), &snapshot.id);
        Point {
            unavailable: blocked.map(|b| reason(b, &name)),
            name,
            source: active.source.clone(),
            level: Level::Snapshot,
            chain: active.chain.clone(),
            parent: None,
            time,
            size: snapshot.virtual_size,
            // Its clusters are in the same file, and are counted there.
            own_bytes: 0,
            consistency: None,
            layers,
            format_is_open: active.format_is_open,
        }
    }

    fn time(&self, belongs: &DiskMember) -> i64 {
        let entry = &self.deps.tree.files[belongs.file];
        if let Some(time) = stamp(self.deps, belongs).or(entry.manifest.as_ref().map(|m| m.time)) {
            return time;
        }
        // The file's time, unless what depends on it is older: copying changes file times.
        let first = self.group.members.iter().filter_map(|b| b.stamp).min();
        let before_first = first.map_or(i64::MAX, |t| t.saturating_sub(1));
        match belongs.level {
            Level::Full => entry.probed.mtime.min(before_first),
            _ => entry.probed.mtime,
        }
    }

    /// A name that no other point of the disk has: `name`, or with the snapshot's id, or a number.
    fn unique(&mut self, name: String, id: &str) -> String {
        if self.names.insert(name.clone()) {
            return name;
        }
        let mut stem = name;
        if !id.is_empty() {
            stem = with_suffix(&stem, &format!("#{}", clean(id, MAX_ID)));
            if self.names.insert(stem.clone()) {
                return stem;
            }
        }
        let first = if id.is_empty() { 2 } else { 3 };
        let number = self.numbers.entry(stem.clone()).or_insert(first);
        loop {
            let candidate = with_suffix(&stem, &format!("-{number}"));
            *number = number.saturating_add(1);
            if self.names.insert(candidate.clone()) {
                return candidate;
            }
        }
    }
}

/// `name` with a suffix, cut before it where it would get too long for a file name.
fn with_suffix(name: &str, suffix: &str) -> String {
    let mut end = MAX_NAME.saturating_sub(suffix.len()).min(name.len());
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{suffix}", &name[..end])
}

/// Why a snapshot cannot be used, though its image can.
fn unusable(snapshot: &SnapshotInfo) -> Option<Blocked> {
    let cause = Arc::new(snapshot.unusable.clone()?);
    Some(Blocked { cause, inherited: false })
}

/// The finding of a point that cannot be served: the file to blame and why.
fn reason(blocked: &Blocked, name: &str) -> Finding {
    let cause = (*blocked.cause).clone();
    if !blocked.inherited {
        return cause;
    }
    let file = cause.path.file_name().map(path_text).unwrap_or_default();
    Finding {
        severity: Severity::Error,
        kind: Kind::Incomplete,
        message: format!(
            "{} needs {file}, which is not usable: {}",
            path_text(name),
            cause.message
        ),
        // What is only not understood is in every copy.
        remedy: cause.remedy.or_else(|| {
            let lost =
                !matches!(cause.kind, Kind::Unsupported | Kind::Encrypted | Kind::Permission);
            lost.then(|| format!("restore {file} from another copy of the backup"))
        }),
        ..cause
    }
}

/// What the names of qmprestore's snapshots say; for others when they were taken.
fn snapshot_time(snapshot: &SnapshotInfo, full: i64) -> i64 {
    if snapshot.name == FULL_SNAPSHOT {
        return full;
    }
    let taken = || i64::try_from(snapshot.time).unwrap_or(i64::MAX);
    local_time(&snapshot.name).unwrap_or_else(taken)
}

fn local_time(text: &str) -> Option<i64> {
    // A second one of that time has a number behind it.
    let date = text.get(..DATE_LEN).unwrap_or(text);
    let date = jiff::civil::DateTime::strptime(DATE_SNAPSHOT, date).ok()?;
    Some(date.to_zoned(jiff::tz::TimeZone::system()).ok()?.timestamp().as_second())
}

/// `<file>@<snapshot name>`, or the snapshot's id where its name is empty or too long.
fn snapshot_name(file: &str, snapshot: &SnapshotInfo) -> String {
    let name = clean(&snapshot.name, MAX_NAME);
    let full = format!("{file}@{name}");
    if name.is_empty() || full.len() > MAX_NAME {
        return with_suffix(file, &format!("@{}", clean(&snapshot.id, MAX_ID)));
    }
    full
}

/// Text from inside an image as a part of a file name, at most `most` characters of it.
fn clean(text: &str, most: usize) -> String {
    text.chars().map(|c| if c == '/' || c.is_control() { '_' } else { c }).take(most).collect()
}
