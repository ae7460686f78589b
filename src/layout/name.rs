//! What a file name says. Pure: no file is touched, and any sequence of bytes is a valid input.
//!
//! The layout is qmpbackup's, `<LEVEL>-<seconds since the epoch>-<disk>`; see the layouts that
//! [`crate::chain::scan`] understands. Names that are not UTF-8 are kept as they are.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::Level;
pub use crate::text::to_text;

/// What a file is, judged by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// `<LEVEL>-<seconds>-<disk>`, or `<LEVEL>-<disk>` without a time.
    Backup {
        /// FULL, INC, DIFF or COPY.
        level: Level,
        /// Seconds since the epoch; `None` if the name has none.
        stamp: Option<i64>,
        /// The disk's name, never empty.
        disk: OsString,
    },
    /// Not a point whatever it holds: `.partial`, `.config`, `uuid`, fleece images, hidden files.
    Ignored,
    /// Any other name. Whether it is a disk image, its contents and its neighbours decide.
    Other,
}

/// Name extensions that promise qcow2's magic bytes.
const QCOW2_EXTENSIONS: [&[u8]; 2] = [b"qcow2", b"qcow"];
/// Name extensions that make a file without magic a raw image.
const RAW_EXTENSIONS: [&[u8]; 2] = [b"raw", b"img"];
/// Name extensions of files that are surely not the guest's bytes one to one.
const FOREIGN_EXTENSIONS: [&[u8]; 16] = [
    b"gz", b"zst", b"xz", b"bz2", b"lz4", b"lzo", b"zip", b"7z", b"vmdk", b"vdi", b"vhd", b"vhdx",
    b"vpc", b"qed", b"luks", b"gpg",
];

/// Those of them that are formats of disk images.
const IMAGE_EXTENSIONS: [&[u8]; 6] = [b"vmdk", b"vdi", b"vhd", b"vhdx", b"vpc", b"qed"];

/// What the extension of a name promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// A qcow2 image.
    Qcow2,
    /// A raw image.
    Raw,
    /// Something that is no disk image that we read.
    Foreign,
    /// No format.
    Nothing,
}

/// Reads a file name.
pub fn parse(name: &OsStr) -> Name {
    let bytes = name.as_bytes();
    let ignored = bytes.ends_with(b".partial")
        || bytes.ends_with(b".config")
        || bytes == b"uuid"
        || is_lone_fleece(bytes)
        // Copying tools (rsync) write to hidden names first.
        || bytes.starts_with(b".");
    if ignored {
        return Name::Ignored;
    }
    let Some((level, rest)) = split_level(bytes).or_else(|| split_any_case(bytes)) else {
        return Name::Other;
    };
    let (stamp, disk) = split_stamp(rest);
    // "." and ".." could be no folder of a disk.
    if disk.is_empty() || disk == b"." || disk == b".." {
        return Name::Other;
    }
    if stamp.is_some() && is_fleece(disk) {
        return Name::Ignored;
    }
    Name::Backup { level, stamp, disk: OsString::from_vec(disk.to_vec()) }
}

/// The name that the FULL has which an INC of this name becomes; `None` for any other name.
pub fn as_full(name: &str) -> Option<String> {
    match parse(OsStr::new(name)) {
        Name::Backup { level: Level::Inc, .. } => {
            Some(format!("FULL-{}", name.get("INC-".len()..)?))
        }
        _ => None,
    }
}

/// Whether `name`, wherever it comes from, is the name of a file in a folder that may be an image.
pub fn is_image(name: &OsStr) -> bool {
    crate::folder::plain(name).is_ok() && parse(name) != Name::Ignored
}

/// The level and the disk's name of a `FULL-<disk>` or `COPY-<disk>` link, as `--no-timestamp`
/// leaves it beside the image.
pub fn parse_link(name: &OsStr) -> Option<(Level, &OsStr)> {
    match split_level(name.as_bytes()) {
        Some((level @ (Level::Full | Level::Copy), rest)) if !rest.is_empty() => {
            Some((level, OsStr::from_bytes(rest)))
        }
        _ => None,
    }
}

/// The level, time and disk of a backup that is not finished, `<backup's name>.partial`.
pub fn parse_partial(name: &OsStr) -> Option<(Level, Option<i64>, OsString)> {
    let finished = name.as_bytes().strip_suffix(b".partial")?;
    match parse(OsStr::from_bytes(finished)) {
        Name::Backup { level, stamp, disk } => Some((level, stamp, disk)),
        _ => None,
    }
}

/// What the extension says, without regard to case.
pub fn promise(name: &OsStr) -> Promise {
    let bytes = name.as_bytes();
    let Some(dot) = bytes.iter().rposition(|b| *b == b'.') else { return Promise::Nothing };
    let extension = bytes[dot + 1..].to_ascii_lowercase();
    let is_in = |list: &[&[u8]]| list.contains(&extension.as_slice());
    match () {
        () if is_in(&QCOW2_EXTENSIONS) => Promise::Qcow2,
        () if is_in(&RAW_EXTENSIONS) => Promise::Raw,
        () if is_in(&FOREIGN_EXTENSIONS) => Promise::Foreign,
        () => Promise::Nothing,
    }
}

/// Whether a name is that of a disk image which is not read: of another format, or a compressed one.
pub fn is_unread_image(name: &OsStr) -> bool {
    let path = Path::new(name);
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let inner = path.file_stem().map_or(Promise::Nothing, promise);
    let is_other = IMAGE_EXTENSIONS.contains(&extension.as_bytes());
    let is_packed = matches!(inner, Promise::Qcow2 | Promise::Raw);
    is_other || promise(name) == Promise::Foreign && is_packed
}

const PREFIXES: [(&[u8], Level); 4] = [
    (b"FULL-", Level::Full),
    (b"INC-", Level::Inc),
    (b"DIFF-", Level::Diff),
    (b"COPY-", Level::Copy),
];

fn split_level(bytes: &[u8]) -> Option<(Level, &[u8])> {
    PREFIXES.iter().find_map(|(p, level)| Some((*level, bytes.strip_prefix(*p)?)))
}

/// Times before this, in 1973, are numbers that a user gave: `full-1-x`.
const FIRST_TIME: i64 = 100_000_000;

/// As [`split_level`], without regard to case, if a time follows: some file systems and shares give
/// all names in lower case, and an increment must not be taken for a whole disk then.
fn split_any_case(bytes: &[u8]) -> Option<(Level, &[u8])> {
    let found = PREFIXES.iter().find_map(|(p, level)| {
        let (head, rest) = bytes.split_at_checked(p.len())?;
        head.eq_ignore_ascii_case(p).then_some((*level, rest))
    });
    found.filter(|(_, rest)| split_stamp(rest).0.is_some_and(|t| t >= FIRST_TIME))
}

/// Splits `<digits>-<disk>`; without a time, or with one that is no 64-bit number, all is the disk.
fn split_stamp(rest: &[u8]) -> (Option<i64>, &[u8]) {
    let Some(dash) = rest.iter().position(|b| *b == b'-') else { return (None, rest) };
    let (digits, disk) = (&rest[..dash], &rest[dash + 1..]);
    if digits.is_empty() || disk.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return (None, rest);
    }
    match std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok()) {
        Some(stamp) => (Some(stamp), disk),
        None => (None, rest),
    }
}

/// A fleece image that has no level in its name: ours, `fleecefs-<run>-<number>.fleece.raw`, and that of
/// a Proxmox guest, `vm-<number>-fleece-<number>` with or without an extension.
fn is_lone_fleece(name: &[u8]) -> bool {
    let digits = |b: &[u8]| !b.is_empty() && b.iter().all(u8::is_ascii_digit);
    let halves = |b: &[u8], between: &[u8]| {
        let at = b.windows(between.len()).position(|w| w == between)?;
        Some((b[..at].to_vec(), b[at + between.len()..].to_vec()))
    };
    let ours = || {
        let inner = name.strip_prefix(b"fleecefs-")?.strip_suffix(b".fleece.raw")?;
        let (run, index) = halves(inner, b"-")?;
        Some(run.iter().all(u8::is_ascii_hexdigit) && digits(&index))
    };
    let proxmox = || {
        let (guest, rest) = halves(name.strip_prefix(b"vm-")?, b"-fleece-")?;
        let stem = rest.split(|b| *b == b'.').next().unwrap_or_default();
        Some(digits(&guest) && digits(stem))
    };
    ours() == Some(true) || proxmox() == Some(true)
}

/// `<node>.fleece.<format>`
fn is_fleece(disk: &[u8]) -> bool {
    let Some(dot) = disk.iter().rposition(|b| *b == b'.') else { return false };
    disk[..dot].ends_with(b".fleece") && disk[dot + 1..].iter().all(u8::is_ascii_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backup(level: Level, stamp: Option<i64>, disk: &str) -> Name {
        Name::Backup { level, stamp, disk: disk.into() }
    }

    #[test]
    fn names_of_all_layouts() {
        let p = |s: &str| parse(OsStr::new(s));
        assert_eq!(p("FULL-1706260639-d.qcow2"), backup(Level::Full, Some(1706260639), "d.qcow2"));
        assert_eq!(p("INC-1-a-b-c"), backup(Level::Inc, Some(1), "a-b-c"));
        assert_eq!(p("DIFF-7-x"), backup(Level::Diff, Some(7), "x"));
        assert_eq!(p("COPY-7-x"), backup(Level::Copy, Some(7), "x"));
        assert_eq!(p("FULL-nt.qcow2"), backup(Level::Full, None, "nt.qcow2"));
        assert_eq!(p("FULL-1-"), backup(Level::Full, None, "1-"));
        assert_eq!(p("FULL-99999999999999999999-x").clone(), {
            backup(Level::Full, None, "99999999999999999999-x")
        });
        // As shares without case give them.
        assert_eq!(p("inc-1706260639-d"), backup(Level::Inc, Some(1706260639), "d"));
        assert_eq!(p("Full-170626063-x"), backup(Level::Full, Some(170626063), "x"));
        for other in [
            "full-1-x",
            "FULL",
            "FULL-",
            "INC-",
            "disk.qcow2",
            "",
            "FULLER-1-x",
            "FULL-1-..",
            "INC-.",
        ] {
            assert_eq!(p(other), Name::Other, "{other}");
        }
    }

    #[test]
    fn an_increment_becomes_a_full() {
        assert_eq!(as_full("INC-7-x").as_deref(), Some("FULL-7-x"));
        assert_eq!(as_full("inc-1706260639-d").as_deref(), Some("FULL-1706260639-d"));
        assert!(as_full("FULL-7-x").is_none() && as_full("inc-7-x").is_none());
    }

    #[test]
    fn what_is_no_point() {
        for n in [
            "FULL-1-x.partial",
            "x.partial",
            "sda.qcow2.config",
            "uuid",
            "INC-1-node.fleece.qcow2",
            "FULL-1-a.b.fleece.raw",
            "fleecefs-0123456789ab-0.fleece.raw",
            "vm-100-fleece-0.qcow2",
            "vm-100-fleece-1",
            ".FULL-1-sda.qcow2.a8Xk2p",
        ] {
            assert_eq!(parse(OsStr::new(n)), Name::Ignored, "{n}");
        }
        // A disk that happens to be called so.
        assert_eq!(
            parse(OsStr::new("FULL-1-my.fleece.old.qcow2")),
            backup(Level::Full, Some(1), "my.fleece.old.qcow2")
        );
        for disk in
            ["fleecefs-x-0.fleece.raw", "vm-a-fleece-0.raw", "vm-100-fleece-.raw", "vm-1.raw"]
        {
            assert_eq!(parse(OsStr::new(disk)), Name::Other, "{disk}");
        }
    }

    #[test]
    fn links_and_extensions() {
        assert_eq!(parse_link(OsStr::new("FULL-1-x")), Some((Level::Full, OsStr::new("1-x"))));
        assert_eq!(parse_link(OsStr::new("COPY-d")), Some((Level::Copy, OsStr::new("d"))));
        assert_eq!(parse_link(OsStr::new("INC-d")), None);
        assert_eq!(promise(OsStr::new("a.QCOW2")), Promise::Qcow2);
        assert_eq!(promise(OsStr::new("a.qcow2.gz")), Promise::Foreign);
        assert_eq!(promise(OsStr::new("a.img")), Promise::Raw);
        assert_eq!(promise(OsStr::new("a")), Promise::Nothing);
    }

    #[test]
    fn bytes_that_are_no_text_stay() {
        let name = OsStr::from_bytes(b"INC-5-d\xff\xfe.raw");
        let Name::Backup { disk, .. } = parse(name) else { panic!() };
        assert_eq!(disk.as_bytes(), b"d\xff\xfe.raw");
        assert_eq!(to_text(name), "INC-5-d\\xff\\xfe.raw");
    }

    proptest! {
        #![proptest_config(crate::failpoint::properties(256))]
        #[test]
        fn any_bytes_parse(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let name = OsStr::from_bytes(&bytes);
            parse(name);
            parse_link(name);
            parse_partial(name);
            promise(name);
            to_text(name);
        }

        #[test]
        fn what_is_put_together_comes_apart(
            level in prop::sample::select(vec!["FULL", "INC", "DIFF", "COPY"]),
            stamp in 0..i64::MAX,
            disk in "[a-z0-9_-]{1,12}",
        ) {
            let parsed = parse(OsStr::new(&format!("{level}-{stamp}-{disk}")));
            let Name::Backup { stamp: s, disk: d, .. } = parsed else { panic!() };
            prop_assert_eq!(s, Some(stamp));
            prop_assert_eq!(d, OsString::from(disk));
        }
    }
}
