//! Which file of a disk depends on which. Pure: names, manifests and backing pointers come in as
//! values, and an answer comes out for each file.
//!
//! The rules, in order of authority: a manifest's parent, the times in the names, and, where two
//! names have the same second, the backing pointer. A backing pointer may confirm what names and
//! manifests say; where it contradicts them the point is incomplete. Modification times are never
//! looked at: copying changes them.

pub(crate) mod dependencies;
pub(crate) mod follow;
pub(crate) mod format;
pub(crate) mod group;
pub(crate) mod open_formats;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::walk::pointer;
use super::walk::pointer::normalise;
use super::walk::tree::LostImage;
use crate::error::{Error, Finding, Kind};
use crate::layout::Level;
use crate::layout::name::{Name, parse};
use crate::manifest::{Brief, Contents};
use crate::text::path_text;

/// One file of a disk.
pub(super) struct ChainFile<'a> {
    /// Its path.
    pub path: &'a Path,
    /// Other names that stand for it in its folder (`FULL-<disk>` links).
    pub aliases: &'a [OsString],
    /// Its kind of backup.
    pub level: Level,
    /// Seconds since the epoch as its name has it.
    pub stamp: Option<i64>,
    /// Whether it is raw: it cannot leave a range to its parent.
    pub raw: bool,
    /// The name of its backing file as it stands in the image.
    pub backing: Option<&'a str>,
    /// Its manifest.
    pub manifest: Option<&'a Brief>,
    /// Why its manifest cannot be read.
    pub unreadable: Option<&'a Finding>,
    /// Whether there is a file beside it of the name of its backing file.
    pub backing_is_beside: bool,
    /// What it depended on when it was last looked at, if that is gone.
    pub gone: Option<&'a Path>,
}

/// What a file depends on.
#[derive(Debug)]
pub(super) enum Parent {
    /// None: it is a root.
    Root,
    /// This other member.
    On(usize),
    /// Unknown, or missing.
    Unknown(Error),
}

impl ChainFile<'_> {
    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    fn is_called(&self, name: &OsStr) -> bool {
        // Names inside images come as text; one that is not UTF-8 comes lossily.
        let same = |own: &OsStr| own == name || own.to_string_lossy() == name.to_string_lossy();
        same(self.name()) || self.aliases.iter().any(|a| same(a))
    }

    fn may_carry(&self, above: Level) -> bool {
        match above {
            Level::Diff => self.level == Level::Full,
            _ => matches!(self.level, Level::Full | Level::Inc),
        }
    }
}

/// Gives the parent of each member, and findings about it. `lost` are backups of this disk
/// that are known to have been there.
pub(super) fn link(members: &[ChainFile], lost: &[LostImage]) -> (Vec<Parent>, Vec<Finding>) {
    let linker = Linker::new(members, lost);
    let mut findings = Vec::new();
    let parents = (0..members.len()).map(|i| linker.link_one(i, &mut findings)).collect();
    (parents, findings)
}

struct Linker<'a> {
    members: &'a [ChainFile<'a>],
    /// FULLs and INCs that are gone, by time.
    missing_bases: Vec<&'a LostImage>,
    /// FULLs that are gone, by time.
    missing_fulls: Vec<&'a LostImage>,
    by_name: HashMap<&'a OsStr, usize>,
    /// FULLs and INCs with a time, by time.
    bases: Vec<(i64, usize)>,
    /// FULLs with a time, by time.
    fulls: Vec<(i64, usize)>,
    /// FULLs without a time.
    timeless: Vec<usize>,
}

impl<'a> Linker<'a> {
    fn new(members: &'a [ChainFile<'a>], lost: &'a [LostImage]) -> Self {
        let stamped = |wanted: fn(Level) -> bool| {
            let mut list: Vec<_> = (members.iter().enumerate())
                .filter(|(_, m)| wanted(m.level))
                .filter_map(|(i, m)| Some((m.stamp?, i)))
                .collect();
            list.sort_unstable();
            list
        };
        let gone = |wanted: fn(Level) -> bool| {
            let mut list: Vec<_> = lost.iter().filter(|l| wanted(l.level)).collect();
            list.sort_by_key(|l| l.stamp);
            list
        };
        let timeless = |(_, m): &(usize, &ChainFile)| m.level == Level::Full && m.stamp.is_none();
        Linker {
            members,
            missing_bases: gone(|l| matches!(l, Level::Full | Level::Inc)),
            missing_fulls: gone(|l| l == Level::Full),
            by_name: names(members),
            bases: stamped(|l| matches!(l, Level::Full | Level::Inc)),
            fulls: stamped(|l| l == Level::Full),
            timeless: members.iter().enumerate().filter(timeless).map(|(i, _)| i).collect(),
        }
    }

    fn link_one(&self, me: usize, findings: &mut Vec<Finding>) -> Parent {
        let m = &self.members[me];
        if !matches!(m.level, Level::Inc | Level::Diff) {
            return Parent::Root;
        }
        if m.raw {
            return raw_increment(m);
        }
        let below = self.below(me).and_then(|b| self.confirm(me, b, findings).map(|()| b));
        below.map_or_else(|e| Parent::Unknown(e.at_path(m.path)), Parent::On)
    }

    fn below(&self, me: usize) -> Result<usize, Error> {
        let m = &self.members[me];
        match m.manifest.and_then(|m| m.parent.as_deref()) {
            Some(parent) => self.by_manifest(m, OsStr::new(parent)),
            None => self.by_time(me).and_then(|base| self.nothing_between(me, base)),
        }
    }

    /// Names give an order, but do not tell of a file that is missing from it. Only the image's own
    /// pointer does; without one, whatever else hints at a gap counts.
    fn nothing_between(&self, me: usize, base: usize) -> Result<usize, Error> {
        let (m, b) = (&self.members[me], &self.members[base]);
        if m.backing
            .and_then(|p| pointer::split(p).ok())
            .is_some_and(|(_, name)| b.is_called(&name))
        {
            return Ok(base);
        }
        if let Some(finding) = m.unreadable {
            let what = format!("its parent image is not known: {}", finding.message);
            return Err(Error::new(finding.kind, what).remedy(UNREADABLE));
        }
        let lost = if m.level == Level::Diff { &self.missing_fulls } else { &self.missing_bases };
        let upto = lost.partition_point(|l| Some(l.stamp) <= m.stamp);
        if let Some(last) = lost[..upto].last().filter(|l| b.stamp <= Some(l.stamp)) {
            return Err(missing(&last.name));
        }
        match m.gone.and_then(Path::file_name) {
            Some(name) if !b.is_called(name) => Err(missing(name)),
            _ => Ok(base),
        }
    }

    fn by_manifest(&self, m: &ChainFile, parent: &OsStr) -> Result<usize, Error> {
        let Some(found) = self.by_name.get(parent) else { return Err(missing(parent)) };
        if self.members[*found].may_carry(m.level) {
            return Ok(*found);
        }
        let what = format!("its manifest names {parent:?} as parent, which cannot be its parent");
        Err(Error::new(Kind::Corrupt, what))
    }

    fn by_time(&self, me: usize) -> Result<usize, Error> {
        let m = &self.members[me];
        let Some(stamp) = m.stamp else {
            let what = "its name has no time, and it has no manifest: its place in the chain is \
                        not known";
            return Err(incomplete(what).remedy("restore its manifest from .fleecefs/"));
        };
        let bases = if m.level == Level::Diff { &self.fulls } else { &self.bases };
        let start = bases.partition_point(|(t, _)| *t < stamp);
        let ties: Vec<usize> = (bases[start..].iter())
            .take_while(|(t, _)| *t == stamp)
            .map(|(_, i)| *i)
            .filter(|i| *i != me && self.stated_parent(*i) != Some(me))
            .collect();
        let last = bases[..start].last().map(|(t, _)| *t);
        let from = bases.partition_point(|(t, _)| last.is_some_and(|l| *t < l));
        let before: Vec<usize> = bases[from..start].iter().map(|(_, i)| *i).collect();
        self.choose(m, &before, &ties)
    }

    /// `before` are the candidates of the last second before, `ties` those of the very same second.
    fn choose(&self, m: &ChainFile, before: &[usize], ties: &[usize]) -> Result<usize, Error> {
        let mixed = !self.timeless.is_empty() && !self.fulls.is_empty();
        let candidates: Vec<usize> = match (before, mixed) {
            ([], _) => [&self.timeless, ties].concat(),
            (_, false) => [before, ties].concat(),
            (_, true) => [before, ties, &self.timeless].concat(),
        };
        match candidates[..] {
            [] => Err(self.no_full(m)),
            // A tie alone is never enough: this one may come before the other.
            [one] if ties.is_empty() => Ok(one),
            _ => self.conclude(m, &candidates, ties),
        }
    }

    /// Why nothing comes before `m`: its FULL is not there, or the file that its pointer names is, and is
    /// a later one by its name.
    fn no_full(&self, m: &ChainFile) -> Error {
        let named = m.backing.and_then(|p| pointer::split(p).ok()).map(|(_, name)| name);
        let found = named.as_ref().and_then(|name| self.by_name.get(name.as_os_str()).copied());
        let Some(base) = found else {
            return match named.filter(|name| !is_of_disk(m, name)) {
                Some(name) => not_of_disk(m, &name),
                None => incomplete("its chain has no FULL")
                    .remedy("restore the FULL of this chain from another copy of the backup"),
            };
        };
        let base = &self.members[base];
        let why =
            if base.stamp >= m.stamp { "is not older by its name" } else { "is no parent for it" };
        incomplete(format!("its backing file {} {why}", path_text(base.name()))).remedy(
            "rename both files to the names they were written with, or restore their manifests",
        )
    }

    /// Decides between candidates by the image's own pointer, or by what links them to each other.
    fn conclude(
        &self,
        m: &ChainFile,
        candidates: &[usize],
        ties: &[usize],
    ) -> Result<usize, Error> {
        if let Some(Ok((_, base))) = m.backing.map(pointer::split) {
            let named: Vec<_> =
                candidates.iter().filter(|i| self.members[**i].is_called(&base)).collect();
            if let [one] = named[..] {
                return Ok(*one);
            }
        }
        let is_below = |i: usize| {
            candidates.iter().any(|above| self.stated_parent(*above).is_some_and(|p| p == i))
        };
        let ends: Vec<_> = candidates.iter().filter(|i| !is_below(**i)).collect();
        match ends[..] {
            [one] if ties.is_empty() => Ok(*one),
            _ => Err(self.tie(m, candidates)),
        }
    }

    /// The parent that a member's manifest or backing pointer names, whatever names say.
    fn stated_parent(&self, i: usize) -> Option<usize> {
        let m = &self.members[i];
        if let Some(parent) = m.manifest.and_then(|m| m.parent.as_deref()) {
            return self.by_name.get(OsStr::new(parent)).copied();
        }
        let (_, base) = pointer::split(m.backing?).ok()?;
        self.by_name.get(base.as_os_str()).copied()
    }

    fn tie(&self, m: &ChainFile, candidates: &[usize]) -> Error {
        let names: Vec<_> = candidates.iter().map(|i| path_text(self.members[*i].name())).collect();
        let what = format!(
            "its parent image is not known ({}): neither the times in the names nor a manifest \
             order them",
            names.join(", ")
        );
        incomplete(what).remedy(self.how_to_order(m, candidates))
    }

    /// What tells which of two files of one time is the later one.
    fn how_to_order(&self, m: &ChainFile, candidates: &[usize]) -> String {
        // Whoever wrote these disks writes no manifests: there is none to restore.
        if self.members.iter().any(|m| m.manifest.is_some()) {
            return "restore the manifests of these files from .fleecefs/".into();
        }
        let all = candidates.iter().map(|i| &self.members[*i]).chain([m]);
        let mut by_time: BTreeMap<i64, BTreeSet<&OsStr>> = BTreeMap::new();
        for file in all {
            by_time.entry(file.stamp.unwrap_or(i64::MIN)).or_default().insert(file.name());
        }
        let clash = by_time.iter().find(|(time, names)| **time != i64::MIN && names.len() > 1);
        let Some((time, names)) = clash else {
            return "rename the files without a time in their names to the names they were written with"
                .into();
        };
        let names: Vec<_> = names.iter().map(path_text).collect();
        let names = names.join(" and ");
        let Some(free) = self.free_time(*time) else {
            return format!(
                "{names} have the same time: rename them so that times follow their order"
            );
        };
        format!(
            "{names} have the same time: rename the one that was written later ('ls -l --full-time' shows when), with \
             {free} instead of {time} in its name"
        )
    }

    /// The next second, if no file has it.
    fn free_time(&self, time: i64) -> Option<i64> {
        let next = time.checked_add(1)?;
        self.members.iter().all(|m| m.stamp != Some(next)).then_some(next)
    }

    /// Compares with what the image itself says about its backing file.
    fn confirm(&self, me: usize, below: usize, out: &mut Vec<Finding>) -> Result<(), Error> {
        let (m, base) = (&self.members[me], &self.members[below]);
        let Some(pointer) = m.backing else { return Ok(()) };
        let (folder, name) = pointer::split(pointer)?;
        if !base.is_called(&name) {
            return Err(match self.by_name.contains_key(&*name) || is_of_disk(m, &name) {
                true => contradiction(pointer, &name, base, self.by_name.contains_key(&*name)),
                false => not_of_disk(m, &name),
            });
        }
        let own = m.path.parent().unwrap_or(Path::new(""));
        if normalise(own, &folder).as_deref() != Some(own) {
            let what = format!(
                "its backing file name {pointer:?} leads to another folder; {} beside it is used",
                path_text(base.name())
            );
            out.push(Finding::warning(Kind::Incomplete, m.path, what));
        }
        Ok(())
    }
}

fn names<'a>(members: &'a [ChainFile<'a>]) -> HashMap<&'a OsStr, usize> {
    let mut names = HashMap::new();
    for (i, m) in members.iter().enumerate() {
        for alias in m.aliases {
            names.entry(alias.as_os_str()).or_insert(i);
        }
    }
    for (i, m) in members.iter().enumerate() {
        names.insert(m.name(), i);
    }
    names
}

fn raw_increment(m: &ChainFile) -> Parent {
    let what = match m.manifest.map(|m| m.content) {
        Some(Contents::Full) => return Parent::Root,
        Some(Contents::DirtyOnly) => {
            "a raw increment has only changed ranges and does not record which"
        }
        None => {
            "a raw increment: whether it has the whole disk or only changed ranges is not known"
        }
    };
    Parent::Unknown(
        Error::new(Kind::Unsupported, what)
            .at_path(m.path)
            .remedy("use the FULL before it; back the disk up as qcow2"),
    )
}

const UNREADABLE: &str = "make its manifest readable, or restore it from .fleecefs/ of another \
                          copy; else remove it if the names are right";

fn incomplete(what: impl Into<String>) -> Error {
    Error::new(Kind::Incomplete, what)
}

fn missing(name: &OsStr) -> Error {
    let name = path_text(name);
    incomplete(format!("parent image {name} is missing"))
        .remedy(format!("restore {name} from another copy of the backup"))
}

/// Whether a file of this name is, or was, an image of the disk that `m` is of.
fn is_of_disk(m: &ChainFile, name: &OsStr) -> bool {
    match (parse(m.name()), parse(name)) {
        (Name::Backup { disk, .. }, Name::Backup { disk: other, .. }) => disk == other,
        // A FULL without a level in its name.
        (Name::Backup { disk, .. }, _) => disk == name,
        // Its manifest says what it is; its name says nothing of what others are called.
        _ => true,
    }
}

/// The image depends on what is no backup of its disk: no other copy of the backup has it.
fn not_of_disk(m: &ChainFile, name: &OsStr) -> Error {
    let pointer = m.backing.unwrap_or_default();
    if !m.backing_is_beside {
        return incomplete(format!("its backing file {pointer:?} is not in the backup directory"))
            .remedy(BACKING);
    }
    let own = match parse(m.name()) {
        Name::Backup { disk, .. } => path_text(&disk),
        _ => "DISK".into(),
    };
    let full = match parse(name) {
        Name::Backup { level: Level::Full, stamp: Some(time), .. } => format!("FULL-{time}-{own}"),
        _ => format!("FULL-TIME-{own}"),
    };
    let name = path_text(&name);
    let what = format!("its backing file {name} counts as another disk, by the end of its name");
    incomplete(what).remedy(format!(
        "what belongs together ends alike: 'qemu-img convert -O qcow2 {name} {full}', then on a copy \
         'qemu-img rebase -u -F qcow2 -b {full} {}'",
        path_text(&m.name())
    ))
}

/// What to do where a backing file is not in the backup directory.
pub(in crate::chain) const BACKING: &str = "put the backing image into the backup directory, or flatten the image with \
                                 'qemu-img convert'";

fn contradiction(pointer: &str, name: &OsStr, base: &ChainFile, exists: bool) -> Error {
    if !exists {
        return missing(name);
    }
    let base = path_text(base.name());
    incomplete(format!("its backing file name is {pointer:?}, but its parent is {base}"))
        .remedy(format!("if {base} is right: qemu-img rebase -u -b {base} on a copy"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn paths_are_made_plain_without_touching_a_file() {
        let at = |p: &str| normalise(Path::new("/b/d"), Path::new(p));
        assert_eq!(at("./../e//f"), Some("/b/e/f".into()));
        assert_eq!(at("/x/../y"), Some("/y".into()));
        assert_eq!(at("../../../../etc/hostname"), None);
    }

    fn file<'a>(
        path: &'a OsStr,
        level: Level,
        stamp: i64,
        backing: Option<&'a str>,
    ) -> ChainFile<'a> {
        ChainFile {
            path: Path::new(path),
            aliases: &[],
            level,
            stamp: Some(stamp),
            raw: false,
            backing,
            backing_is_beside: false,
            manifest: None,
            unreadable: None,
            gone: None,
        }
    }

    /// The parents of these files: `None` where it is not known, and of roots.
    fn parents(files: &[ChainFile]) -> Vec<Option<usize>> {
        let parent = |p: Parent| if let Parent::On(i) = p { Some(i) } else { None };
        link(files, &[]).0.into_iter().map(parent).collect()
    }

    #[test]
    fn names_that_are_not_utf8_are_found_by_what_images_say_of_them() {
        let full = OsStr::from_bytes(b"d/FULL-1-\xff");
        let inc = OsStr::from_bytes(b"d/INC-2-\xff");
        let files =
            |pointer| [file(full, Level::Full, 1, None), file(inc, Level::Inc, 2, Some(pointer))];
        assert_eq!(parents(&files("FULL-1-\u{fffd}")), [None, Some(0)]);
        assert_eq!(parents(&files("FULL-1-x")), [None, None]);
    }

    #[test]
    fn of_two_of_one_second_the_one_that_names_the_other_is_no_parent_of_it() {
        let [full, inc, next] = ["FULL-1-d", "INC-5-d", "INC-5-d.qcow2"].map(OsStr::new);
        let files = |backing| {
            let above = file(next, Level::Inc, 5, backing);
            [file(full, Level::Full, 1, None), file(inc, Level::Inc, 5, None), above]
        };
        assert_eq!(parents(&files(Some("INC-5-d"))), [None, Some(0), Some(1)]);
        // Either may be the first.
        assert_eq!(parents(&files(None)), [None, None, None]);
    }

    #[test]
    fn one_of_the_same_second_alone_is_a_parent_only_if_the_image_says_so() {
        let [full, inc] = ["FULL-5-d", "INC-5-d"].map(OsStr::new);
        let files = |backing| [file(full, Level::Full, 5, None), file(inc, Level::Inc, 5, backing)];
        assert_eq!(parents(&files(None)), [None, None]);
        assert_eq!(parents(&files(Some("FULL-5-d"))), [None, Some(0)]);
    }
}
