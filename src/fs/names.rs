//! Names below the mount point: which are possible, and who gives way when two clash.
//!
//! Folders stand; points and the folders of their files get `-2`; `latest.raw` is omitted; links in `by-time` get
//! `-2`.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::point::PointFile;
use crate::chain::time_name;

/// The longest file name that Linux takes.
const NAME_MAX: usize = 255;

/// A folder while names are being given out.
#[derive(Default)]
pub(crate) struct Folder {
    /// What is in it, sorted by name.
    pub children: BTreeMap<OsString, Child>,
    /// The first number that may still be free, of names that are taken.
    numbers: HashMap<OsString, usize>,
}

/// What a name stands for.
pub(crate) enum Child {
    /// A folder.
    Dir(Folder),
    /// A point.
    File(Arc<PointFile>),
    /// A symbolic link.
    Link {
        /// Where it leads, relative to its folder.
        target: PathBuf,
        /// The time of the point behind it.
        time: i64,
    },
    /// The folder of a point's files.
    Files(Arc<PointFile>),
    /// `status.json`.
    Status,
}

impl Folder {
    /// The folder at `path`, made where it is missing. Only called before files get names, so
    /// nothing but folders is in the way.
    pub(crate) fn at(&mut self, path: &Path) -> &mut Folder {
        let mut folder = self;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let child =
                folder.children.entry(name.into()).or_insert_with(|| Child::Dir(Folder::default()));
            if !matches!(child, Child::Dir(_)) {
                *child = Child::Dir(Folder::default());
            }
            let Child::Dir(next) = child else { unreachable!("made a folder just above") };
            folder = next;
        }
        folder
    }

    /// A name that is still free: `stem.raw`, else `stem-2.raw` and so on.
    pub(crate) fn free_name(&mut self, stem: &OsStr, ending: &str) -> OsString {
        let name = with_ending(stem, 1, ending);
        if !self.children.contains_key(&name) {
            return name;
        }
        // Thousands of points may have the same time: do not count from 2 for each.
        let next = self.numbers.entry(name).or_insert(2);
        loop {
            let name = with_ending(stem, *next, ending);
            *next += 1;
            if !self.children.contains_key(&name) {
                return name;
            }
        }
    }
}

/// How the names of points end, and those of the folders of their files.
pub(crate) const RAW: &str = ".raw";
pub(crate) const FILES: &str = ".files";

/// A point's name in the mount without its ending.
fn without_raw(name: &OsStr) -> &OsStr {
    let bytes = name.as_bytes();
    OsStr::from_bytes(bytes.strip_suffix(RAW.as_bytes()).unwrap_or(bytes))
}

/// `stem.raw` (or `stem-n.raw`), without bytes that cannot be in a name and not too long.
fn with_ending(stem: &OsStr, n: usize, ending: &str) -> OsString {
    let tail = if n == 1 { ending.to_string() } else { format!("-{n}{ending}") };
    let mut bytes: Vec<u8> =
        stem.as_bytes().iter().map(|&b| if b == b'/' || b == 0 { b'_' } else { b }).collect();
    if bytes.len() + tail.len() > NAME_MAX {
        let hash = blake3::hash(&bytes).to_hex();
        bytes.truncate(NAME_MAX - tail.len() - 9);
        bytes.push(b'~');
        bytes.extend_from_slice(&hash.as_bytes()[..8]);
    }
    bytes.extend_from_slice(tail.as_bytes());
    OsString::from_vec(bytes)
}

/// A folder for the files of each point, called like the point itself; says which name each got.
pub(crate) fn add_files(folder: &mut Folder, points: &[(OsString, i64)]) -> Vec<(OsString, i64)> {
    let mut named = Vec::with_capacity(points.len());
    for (raw, time) in points {
        let Some(Child::File(file)) = folder.children.get(raw) else { continue };
        let file = file.clone();
        let name = folder.free_name(without_raw(raw), FILES);
        folder.children.insert(name.clone(), Child::Files(file));
        named.push((name, *time));
    }
    named
}

/// `latest.raw` and `by-time/`, or the same for the folders of files.
pub(crate) fn add_links(folder: &mut Folder, points: &[(OsString, i64)], ending: &str) {
    if let Some((name, time)) = points.last() {
        let link = Child::Link { target: name.into(), time: *time };
        folder.children.entry(format!("latest{ending}").into()).or_insert(link);
    }
    if matches!(folder.children.get(OsStr::new("by-time")), Some(Child::Dir(_)) | None) {
        let by_time = folder.at(Path::new("by-time"));
        for (name, time) in points {
            let Some(stem) = time_name(*time) else { continue };
            let target = Path::new("..").join(name);
            let link = by_time.free_name(OsStr::new(&stem), ending);
            by_time.children.insert(link, Child::Link { target, time: *time });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_names_of_one_stem_are_numbered_without_counting_again() {
        let mut folder = Folder::default();
        folder.children.insert("a-3.raw".into(), Child::Status);
        let mut names = Vec::new();
        // Counting from 1 each time would take 2,000,000,000 steps.
        for _ in 0..65_536 {
            let name = folder.free_name(OsStr::new("a"), RAW);
            assert!(folder.children.insert(name.clone(), Child::Status).is_none());
            names.push(name);
        }
        assert_eq!(names[..4], ["a.raw", "a-2.raw", "a-4.raw", "a-5.raw"]);
        assert_eq!(names[65_535], "a-65537.raw");
    }

    #[test]
    fn hostile_names_become_possible_ones() {
        assert_eq!(with_ending(OsStr::new("a@b/../c"), 1, RAW), "a@b_.._c.raw");
        let long = with_ending(OsStr::new(&"x".repeat(300)), 12, RAW);
        assert_eq!(long.len(), NAME_MAX);
        assert!(long.to_str().unwrap().ends_with("-12.raw"));
        let other = with_ending(OsStr::new(&format!("{}y", "x".repeat(299))), 12, RAW);
        assert_ne!(long, other);
    }
}
