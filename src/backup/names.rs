//! Names that we give: to runs, nodes, jobs, bitmaps and images.
//!
//! QEMU allows 31 bytes for a node's name, so a run id has 12 hexadecimal digits:
//! `fleecefs-0123456789ab-c12` has 25.

use std::ffi::OsStr;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::chain::is_foreign_name;
use crate::error::{Error, Result};
use crate::folder::{PlainName, TEMPORARY};
use crate::layout::Level;
use crate::layout::name::{Name, parse};

/// What every name of ours begins with.
pub(crate) const PREFIX: &str = "fleecefs-";

/// Length of a run id in hexadecimal digits.
const RUN_DIGITS: usize = 12;

/// What an object in QEMU is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Role {
    /// The frozen view.
    Snapshot,
    /// A filter above the frozen view that hides its block status.
    HiddenStatus,
    /// A node above the filter that lets nobody resize the disk.
    Lock,
    /// The copy-before-write filter.
    Filter,
    /// The image that is being written.
    Target,
    /// The fleece image.
    Fleece,
    /// What the fleece image of a filter that cannot be taken out yet is replaced by.
    Dummy,
    /// The scratch node on which extra dirty bits are made.
    Scratch,
    /// The backup job.
    Job,
    /// The job that takes the filter out from below another program's overlay.
    Relink,
    /// The NBD export of the frozen view.
    ViewExport,
    /// The NBD export of the scratch node.
    ScratchExport,
    /// The node that keeps the guest from being migrated; one for the whole run.
    Blocker,
    /// A disabled bitmap on a disk that gets no other: while one is there QEMU loads no snapshot.
    Hold,
}

impl Role {
    fn letter(self) -> char {
        match self {
            Role::Snapshot => 's',
            Role::HiddenStatus => 'b',
            Role::Lock => 'l',
            Role::Relink => 'r',
            Role::Filter => 'c',
            Role::Target => 't',
            Role::Fleece => 'f',
            Role::Dummy => 'd',
            Role::Scratch => 'z',
            Role::Job => 'j',
            Role::ViewExport => 'v',
            Role::ScratchExport => 'x',
            Role::Blocker => 'm',
            Role::Hold => 'k',
        }
    }

    fn of(letter: char) -> Option<Role> {
        use Role::*;
        let nodes = [Snapshot, HiddenStatus, Lock, Filter, Target, Fleece, Dummy, Scratch];
        let others = [Blocker, Job, Relink, ViewExport, ScratchExport, Hold];
        nodes.into_iter().chain(others).find(|r| r.letter() == letter)
    }
}

/// `fleecefs-<run>-<role><index>`.
pub(crate) fn object(run: &str, role: Role, index: usize) -> String {
    format!("{PREFIX}{run}-{}{index}", role.letter())
}

/// Reads [`object`] back: run, role, index of the disk.
pub(crate) fn parse_object(name: &str) -> Option<(&str, Role, usize)> {
    let (run, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    if !is_run(run) {
        return None;
    }
    let role = Role::of(rest.chars().next()?)?;
    Some((run, role, rest.get(1..)?.parse().ok()?))
}

fn is_run(text: &str) -> bool {
    text.len() == RUN_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `fleecefs-<target>-<chain>-<run>-<index>`: the bitmap that a run adds to a disk. `target` is the
/// first eight digits of the backup directory's id; `chain` is the run of the chain's FULL; with
/// the disk's index no two disks have one of the same name.
pub(crate) fn bitmap(target: &str, chain: &str, run: &str, index: usize) -> String {
    format!("{PREFIX}{target}-{chain}-{run}-{index}")
}

/// The disabled bitmap beside a [`bitmap`] that says how small the disk has been since.
pub(crate) fn watermark(bitmap: &str) -> String {
    format!("{bitmap}{WATERMARK}")
}

/// Whether a bitmap's name is that of a [`watermark`].
pub(crate) fn is_watermark(name: &str) -> bool {
    name.ends_with(WATERMARK)
}

/// The bitmap beside a [`bitmap`] that is in no image, so that it is there as long as QEMU has the disk open.
pub(crate) fn open(bitmap: &str) -> String {
    format!("{bitmap}{OPEN}")
}

/// Whether a bitmap's name is that of an [`open`].
pub(crate) fn is_open(name: &str) -> bool {
    name.ends_with(OPEN)
}

/// The name of a [`bitmap`], and of all that may be beside it.
pub(crate) fn with_companions(bitmap: &str) -> [String; 3] {
    [bitmap.to_string(), watermark(bitmap), open(bitmap)]
}

/// What the name of an [`open`] ends in.
const OPEN: &str = "-open";

/// What the name of a [`watermark`] ends in.
const WATERMARK: &str = "-floor";

/// A bitmap's name taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BitmapName<'a> {
    /// Which backup directory it belongs to.
    pub target: &'a str,
    /// The run that began its chain.
    pub chain: &'a str,
    /// The run that added it.
    pub run: &'a str,
}

/// Reads [`bitmap`], [`watermark`] or [`open`] back; `None` for other programs' bitmaps.
pub(crate) fn parse_bitmap(name: &str) -> Option<BitmapName<'_>> {
    let beside = name.strip_suffix(WATERMARK).or_else(|| name.strip_suffix(OPEN));
    let name = beside.unwrap_or(name);
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    let (target, chain, run) = (parts.next()?, parts.next()?, parts.next()?);
    parts.next()?.parse::<usize>().ok()?;
    let whole = parts.next().is_none() && is_run(chain) && is_run(run);
    whole.then_some(BitmapName { target, chain, run })
}

/// Name of the disabled, merged bitmap that a job copies by; it lives on the frozen view.
pub(crate) fn work_bitmap(run: &str) -> String {
    format!("{PREFIX}work-{run}")
}

/// A new run id.
///
/// # Errors
/// `Io` if the system has no random numbers.
pub(crate) fn new_run() -> Result<String> {
    random_hex(RUN_DIGITS / 2)
}

/// `bytes` random bytes in hexadecimal.
///
/// # Errors
/// `Io` if the system has no random numbers.
pub(crate) fn random_hex(bytes: usize) -> Result<String> {
    let mut buf = vec![0u8; bytes];
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
        match getrandom(rest, GetRandomFlags::empty()) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io(e.into(), "cannot get random numbers")),
        }
    }
    Ok(buf.iter().map(|b| format!("{b:02x}")).collect())
}

/// The file name of a fleece image: `fleecefs-<run>-<index>.fleece.raw`.
pub(crate) fn fleece(run: &str, index: usize) -> String {
    format!("{PREFIX}{run}-{index}{FLEECE}")
}

/// Whether a file name is that of a [`fleece`] image.
pub(crate) fn is_fleece(name: &str) -> bool {
    let between = name.strip_prefix(PREFIX).and_then(|n| n.strip_suffix(FLEECE));
    let parts = between.and_then(|n| n.split_once('-'));
    parts.is_some_and(|(run, index)| {
        is_run(run) && !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit())
    })
}

/// What the name of a [`fleece`] image ends in.
const FLEECE: &str = ".fleece.raw";

/// The longest name of a disk's folder in bytes: what is put before and behind it in file names (level,
/// time, `.partial.json`, `-2` and the name of a temporary file) needs the rest of the usual 255.
const LONGEST_FOLDER: usize = 200;

/// How much of a name is kept in one that is made from it, in bytes.
const KEPT: usize = 160;

/// How many digits of its hash keep such names apart. (Where two are the same all the same, the second
/// gets a number like any other.)
const HASH_DIGITS: usize = 8;

/// The name of the folder of a disk that QEMU calls `name`, and the end of its images' names: the very
/// name where that can be, else what can be kept of it (no dots) and some digits of its hash. Whatever QEMU says,
/// it is one plain name, no file of ours, and every command sees the points under it. With `plain`
/// images carry it alone (`--no-timestamp`).
///
/// A chain goes on under the same name: what this makes of a name must stay the same for good.
pub(crate) fn folder(name: &str, plain: bool) -> String {
    if can_be_folder(name, plain) {
        return name.to_string();
    }
    let mut kept = String::new();
    for c in name.chars().map(|c| if matches!(c, '/' | '.') || is_invisible(c) { '_' } else { c }) {
        if kept.len().saturating_add(c.len_utf8()) > KEPT {
            break;
        }
        kept.push(c);
    }
    let hash = blake3::hash(name.as_bytes()).to_hex();
    let made = format!("{kept}~{}", hash.get(..HASH_DIGITS).unwrap_or_default());
    match can_be_folder(&made, true) {
        true => made,
        false => format!("disk-{made}"),
    }
}

fn can_be_folder(name: &str, plain: bool) -> bool {
    let lower = name.to_lowercase();
    let own = [crate::manifest::FOLDER, TEMPORARY].iter().any(|p| lower.starts_with(p))
        || lower == "uuid"
        || [".partial", ".config"].iter().any(|s| lower.ends_with(s));
    if PlainName::new(name).is_err()
        || name.len() > LONGEST_FOLDER
        || name.chars().any(is_invisible)
        || own
    {
        return false;
    }
    let seen = match parse(OsStr::new(&format!("FULL-1-{name}"))) {
        Name::Backup { disk, .. } => disk == name,
        _ => false,
    };
    // Without a time `FULL-1-x` is a backup of the disk x, or the link of one, `x.vma` an archive, and
    // `latest` what everybody calls the newest point.
    let file = OsStr::new(name);
    let other = || parse(file) == Name::Other && !is_foreign_name(file) && name != "latest";
    seen && (!plain || other())
}

/// Characters that do not show, or that change the order of those that do.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{e0000}'..='\u{e007f}')
}

/// The word for a level in file names.
pub(crate) fn level_word(level: Level) -> &'static str {
    match level {
        Level::Full => "FULL",
        Level::Inc => "INC",
        Level::Diff => "DIFF",
        _ => "COPY",
    }
}

/// Level and timestamp of an image's file name; the name after the timestamp.
pub(crate) fn parse_image(name: &str) -> Option<(Level, i64, &str)> {
    let (word, rest) = name.split_once('-')?;
    let level = match word {
        "FULL" => Level::Full,
        "INC" => Level::Inc,
        "DIFF" => Level::Diff,
        "COPY" => Level::Copy,
        _ => return None,
    };
    let (time, disk) = rest.split_once('-')?;
    Some((level, time.parse().ok()?, disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_fit_into_a_node_name_and_come_back() {
        let run = new_run().unwrap();
        let name = object(&run, Role::Filter, 999);
        assert!(name.len() <= 31);
        assert_eq!(parse_object(&name), Some((run.as_str(), Role::Filter, 999)));
        for other in ["fleecefs-", "drive0", "fleecefs-xyz-c0", "fleecefs-0123456789ab-q0"] {
            assert_eq!(parse_object(other), None, "{other}");
        }
    }

    #[test]
    fn bitmaps_come_back_and_foreign_ones_do_not() {
        let name = bitmap("0a1b2c3d", "0123456789ab", "ba9876543210", 3);
        let parsed = parse_bitmap(&name).unwrap();
        assert_eq!((parsed.target, parsed.run), ("0a1b2c3d", "ba9876543210"));
        assert_eq!(parse_bitmap(&watermark(&name)), Some(parsed));
        assert_eq!(parse_bitmap(&watermark(&watermark(&name))), None);
        assert_eq!(parse_bitmap(&open(&name)), Some(parsed));
        assert_eq!(parse_bitmap("qmpbackup-0a1b2c3d"), None);
        assert_eq!(parse_bitmap(&work_bitmap("0123456789ab")), None);
    }

    #[test]
    fn image_names() {
        assert_eq!(parse_image("INC-17-d.qcow2"), Some((Level::Inc, 17, "d.qcow2")));
        assert_eq!(parse_image("FULL-d.qcow2"), None);
    }

    #[test]
    fn names_of_folders() {
        for good in
            ["sda", "disk 1.qcow2", ".hidden.qcow2", "f\u{fc}r.img", "FULL-1-x", "a:b", "2026-01"]
        {
            assert_eq!(folder(good, false), good);
        }
        assert_eq!(folder(&"x".repeat(200), true), "x".repeat(200));
        let long = "\u{fc}".repeat(150);
        let mut all = std::collections::BTreeSet::new();
        let bad = [
            "",
            ".",
            "..",
            "../x",
            "/abs",
            "a/b",
            "a\0b",
            "a\nb",
            "a\u{1b}[31m",
            "a\u{202e}b",
            "a\u{200b}",
            ".fleecefs",
            ".FleeceFS",
            ".fleecefs-tmp-1",
            "uuid",
            "UUID",
            "a.partial",
            "a.config",
            "a.fleece.raw",
            &long,
        ];
        for name in bad {
            let made = folder(name, false);
            assert!(made != name && made.len() < 180 && can_be_folder(&made, true), "{made:?}");
            assert!(made.chars().rev().nth(HASH_DIGITS) == Some('~'), "{made:?}");
            assert_eq!(folder(&made, true), made);
            assert!(all.insert(made), "{name:?}");
        }
        // For all time.
        assert_eq!(folder("uuid", false), "uuid~8114f0b4");
        assert!(folder("FULL-1-x", true).starts_with("disk-FULL-1-x~"));
        for name in [
            "x.vma.zst",
            "sda.full.data",
            ".hidden.qcow2",
            "FULL-1-x",
            "FULL-x",
            "COPY-x",
            "vm-1-fleece-0.raw",
        ] {
            let made = folder(name, true);
            assert!(made.len() > name.len(), "{made}");
            assert_eq!(parse(OsStr::new(&made)), Name::Other);
        }
    }

    #[test]
    fn fleece_names() {
        assert!(is_fleece(&fleece("0123456789ab", 12)));
        for other in [
            "fleecefs-0123456789ab-.fleece.raw",
            "fleecefs-x-1.fleece.raw",
            "shadow",
            "fleecefs-0123456789ab-1.fleece.raw.bak",
            "fleecefs-0123456789ab-1x.fleece.raw",
        ] {
            assert!(!is_fleece(other), "{other}");
        }
    }
}
