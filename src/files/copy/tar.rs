//! The format of tar archives: ustar with the extended headers of pax, sparse files as GNU tar 1.0 has them.

use std::io::{self, Write};

/// Archives are made of such blocks.
pub(super) const BLOCK: usize = 512;
/// The longest name, and text of a link, that a header has room for.
const NAME: usize = 100;
/// The largest number that eleven octal digits tell.
const LARGEST: u64 = (1 << 33) - 1;

/// What an entry is.
pub(super) struct Head<'a> {
    pub path: &'a [u8],
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes that follow.
    pub size: u64,
    pub seconds: i64,
    pub nanos: u32,
    /// The text of a link, or the entry that this is a further name of.
    pub link: &'a [u8],
    pub device: (u32, u32),
    /// More records for the extended header.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Writes the headers of an entry; its bytes follow, and [`padding`].
pub(super) fn head(out: &mut dyn Write, head: &Head<'_>) -> io::Result<()> {
    let mut records = Vec::new();
    let mut add = |key: &str, value: &[u8]| record(&mut records, key.as_bytes(), value);
    if head.path.len() > NAME {
        add("path", head.path);
    }
    if head.link.len() > NAME {
        add("linkpath", head.link);
    }
    if head.size > LARGEST {
        add("size", head.size.to_string().as_bytes());
    }
    for (key, id) in [("uid", head.uid), ("gid", head.gid)] {
        if id > 0o7_777_777 {
            add(key, id.to_string().as_bytes());
        }
    }
    if head.nanos > 0 || head.seconds < 0 || head.seconds.cast_unsigned() > LARGEST {
        add("mtime", time(head.seconds, head.nanos).as_bytes());
    }
    for (key, value) in &head.records {
        record(&mut records, key, value);
    }
    if !records.is_empty() {
        let fields = Fields {
            path: b"PaxHeaders/x",
            kind: b'x',
            size: records.len() as u64,
            ..Fields::of(head)
        };
        out.write_all(&fields.block())?;
        out.write_all(&records)?;
        out.write_all(padding(records.len() as u64))?;
    }
    out.write_all(&Fields::of(head).block())
}

/// The zeros after `len` bytes.
pub(super) fn padding(len: u64) -> &'static [u8] {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let over = (len % BLOCK as u64) as usize;
    ZEROS.get(..(BLOCK - over) % BLOCK).unwrap_or_default()
}

/// The end of an archive.
pub(super) fn end(out: &mut dyn Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

/// Seconds with their fraction, before 1970 as well.
fn time(seconds: i64, nanos: u32) -> String {
    match (seconds < 0, nanos) {
        (_, 0) => seconds.to_string(),
        (false, n) => format!("{seconds}.{n:09}"),
        (true, n) => {
            let whole = (seconds + 1).unsigned_abs();
            format!("-{whole}.{:09}", 1_000_000_000 - n)
        }
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len.to_string().len() + rest != len {
        len = len.to_string().len() + rest;
    }
    records.extend_from_slice(format!("{len} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

struct Fields<'a> {
    path: &'a [u8],
    kind: u8,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    seconds: i64,
    link: &'a [u8],
    device: (u32, u32),
}

impl<'a> Fields<'a> {
    fn of(head: &Head<'a>) -> Fields<'a> {
        let Head { path, kind, mode, uid, gid, size, seconds, link, device, .. } = *head;
        Fields { path, kind, size, mode, uid, gid, seconds, link, device }
    }

    fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut put = |at: usize, room: usize, bytes: &[u8]| {
            let to = block.iter_mut().skip(at).take(room);
            to.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let octal = |n: u64, digits: usize| format!("{n:0digits$o}");
        let seconds = u64::try_from(self.seconds).unwrap_or(0).min(LARGEST);
        put(0, NAME, self.path);
        put(100, 8, octal(u64::from(self.mode & 0o7777), 7).as_bytes());
        put(108, 8, octal(u64::from(self.uid.min(0o7_777_777)), 7).as_bytes());
        put(116, 8, octal(u64::from(self.gid.min(0o7_777_777)), 7).as_bytes());
        put(124, 12, octal(self.size.min(LARGEST), 11).as_bytes());
        put(136, 12, octal(seconds, 11).as_bytes());
        put(148, 8, b"        ");
        put(156, 1, &[self.kind]);
        put(157, NAME, self.link);
        put(257, 8, b"ustar\x0000");
        put(329, 8, octal(u64::from(self.device.0 & 0o7_777_777), 7).as_bytes());
        put(337, 8, octal(u64::from(self.device.1 & 0o7_777_777), 7).as_bytes());
        let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
        let sum = format!("{sum:06o}\0 ");
        block.iter_mut().skip(148).zip(sum.as_bytes()).for_each(|(to, from)| *to = *from);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_themselves() {
        let mut records = Vec::new();
        record(&mut records, b"path", &[b'a'; 90]);
        assert!(records.starts_with(b"99 path=a") && records.len() == 99);
        records.clear();
        record(&mut records, b"path", &[b'a'; 91]);
        assert!(records.starts_with(b"101 path=a") && records.len() == 101);
    }

    #[test]
    fn times_before_1970_read_as_numbers() {
        assert_eq!(time(5, 7), "5.000000007");
        assert_eq!(time(-1, 500_000_000), "-0.500000000");
        assert_eq!(time(-2, 0), "-2");
    }
}
