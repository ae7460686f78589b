//! One file, as a line for people or a line of JSON.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde::Serialize;

use crate::error::Result;
use crate::files::{Attributes, Flags, NodeId, NodeKind, Time, Tree};
use crate::text::{path_text, to_text};
use crate::units::iso_time;

/// All that is told about a file.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub path: String,
    pub kind: NodeKind,
    pub size: u64,
    pub allocated: u64,
    /// Octal, as people write it.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub links: u64,
    pub inode: u64,
    pub atime_utc: String,
    pub mtime_utc: String,
    pub ctime_utc: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crtime_utc: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<&'static str>,
}

impl Row {
    /// Of a node under this path.
    pub(super) fn new(tree: &dyn Tree, path: &[u8], node: NodeId, a: &Attributes) -> Row {
        let is_link = a.kind == NodeKind::Link;
        let target = is_link.then(|| tree.read_link(node).ok()).flatten();
        Row {
            path: to_text(OsStr::from_bytes(path)),
            kind: a.kind,
            size: a.size,
            allocated: a.allocated,
            mode: format!("{:04o}", a.mode),
            uid: a.uid,
            gid: a.gid,
            links: a.links,
            inode: node.number,
            atime_utc: time(a.atime),
            mtime_utc: time(a.mtime),
            ctime_utc: time(a.ctime),
            crtime_utc: a.crtime.map(time),
            target: target.map(|t| to_text(OsStr::from_bytes(&t))),
            device: a.device.map(|d| format!("{}:{}", d.major, d.minor)),
            flags: flags(&a.flags),
        }
    }
}

/// With nanoseconds, where there are some.
pub(in crate::cli) fn time(time: Time) -> String {
    let text = iso_time(time.seconds);
    match (time.nanos, text.strip_suffix('Z')) {
        (0, _) | (_, None) => text,
        (nanos, Some(whole)) => format!("{whole}.{nanos:09}Z"),
    }
}

pub(super) fn flags(flags: &Flags) -> Vec<&'static str> {
    let all = [
        (flags.encrypted, "encrypted"),
        (flags.compressed, "compressed"),
        (flags.immutable, "immutable"),
        (flags.append_only, "append-only"),
        (flags.verity, "verity"),
        (flags.read_only, "read-only"),
        (flags.hidden, "hidden"),
        (flags.system, "system"),
    ];
    all.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect()
}

/// As `ls -l` shows it.
pub(super) fn long(tree: &dyn Tree, name: &[u8], node: NodeId, a: &Attributes) -> Result<String> {
    let size = match a.device {
        Some(d) => format!("{}, {}", d.major, d.minor),
        None => a.size.to_string(),
    };
    let mut line = format!(
        "{}{} {:>3} {:>6} {:>6} {size:>12} {} {}",
        a.kind.letter(),
        bits(a.mode),
        a.links,
        a.uid,
        a.gid,
        iso_time(a.mtime.seconds),
        path_text(OsStr::from_bytes(name))
    );
    if a.kind == NodeKind::Link {
        let target = match tree.read_link(node) {
            Ok(text) => path_text(OsStr::from_bytes(&text)),
            Err(e) => format!("? ({})", e.message()),
        };
        line.push_str(&format!(" -> {target}"));
    }
    if a.flags.encrypted {
        line.push_str(" (encrypted)");
    }
    Ok(line)
}

/// `rwxr-xr-x`, with setuid, setgid and sticky.
fn bits(mode: u32) -> String {
    let group = |shift: u32, special: u32, letter: char| {
        let has = |bit: u32| mode >> shift & bit != 0;
        let x = match (mode & special != 0, has(1)) {
            (false, true) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        };
        [if has(4) { 'r' } else { '-' }, if has(2) { 'w' } else { '-' }, x]
    };
    let all = [group(6, 0o4000, 's'), group(3, 0o2000, 's'), group(0, 0o1000, 't')];
    all.as_flattened().iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_as_in_ls() {
        assert_eq!(bits(0o755), "rwxr-xr-x");
        assert_eq!(bits(0o4711), "rws--x--x");
        assert_eq!(bits(0o3640), "rw-r-S--T");
    }
}
