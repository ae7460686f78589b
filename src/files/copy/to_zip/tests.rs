use std::sync::atomic::AtomicBool;

use super::super::super::tree::{Attributes, NodeKind, Stretch};
use super::*;

/// A file of `data`, then zeros up to `size`; what is behind the data is a hole, or cannot be read.
struct File {
    data: Vec<u8>,
    size: u64,
    is_damaged: bool,
}

impl OpenFile for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let rest = self.data.get(offset as usize..).unwrap_or_default();
        if rest.is_empty() {
            return Err(Error::new(Kind::Corrupt, "damaged"));
        }
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn stretch(&self, offset: u64) -> Result<Option<Stretch>> {
        let data = self.data.len() as u64;
        Ok(match offset {
            at if at >= self.size => None,
            at if at < data && !self.is_damaged => Some(Stretch { end: data, hole: false }),
            _ => Some(Stretch { end: self.size, hole: !self.is_damaged }),
        })
    }
}

fn attributes(kind: NodeKind, allocated: u64) -> Attributes {
    let time = Time { seconds: 1_700_000_000, nanos: 0 };
    Attributes {
        kind,
        size: 0,
        allocated,
        mode: 0o640,
        uid: 5,
        gid: 70000,
        links: 1,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: None,
        device: None,
        flags: Default::default(),
    }
}

fn with_entry<T>(path: &[u8], attributes: &Attributes, act: impl FnOnce(&Entry<'_>) -> T) -> T {
    act(&Entry { path, attributes, mode: 0o640, xattrs: Vec::new() })
}

/// Writes the files; the bytes, and what became of each and of the end.
fn written(files: &[(&[u8], File)]) -> (Vec<u8>, Vec<Result<u64>>) {
    let (mut out, mut results) = (Vec::new(), Vec::new());
    let cancel = AtomicBool::new(false);
    let options = Options { all: false, cancel: &cancel, progress: &() };
    let mut zip = Box::new(ToZip::new(&mut out, Blocks::new(64 << 20)));
    for (path, file) in files {
        let a = attributes(NodeKind::File, file.data.len() as u64);
        results.push(with_entry(path, &a, |e| zip.file(e, file, &options)));
    }
    match results.iter().all(|r| r.as_ref().map_or_else(|e| e.os_code().is_none(), |_| true)) {
        true => drop(zip.finish().map(|()| results.push(Ok(0)))),
        false => drop(zip),
    }
    (out, results)
}

fn end_of_archive(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|w| w == b"PK\x05\x06")
}

#[test]
fn what_is_cut_off_in_a_file_is_no_archive() {
    let good = || File { data: b"good".to_vec(), size: 10, is_damaged: false };
    let (bytes, results) = written(&[(b"a", good())]);
    assert!(results.iter().all(Result::is_ok) && end_of_archive(&bytes));

    let bad = File { data: vec![7; 3 << 20], size: 4 << 20, is_damaged: true };
    let mut out = Vec::new();
    let cancel = AtomicBool::new(false);
    let options = Options { all: false, cancel: &cancel, progress: &() };
    let mut zip = ToZip::new(&mut out, Blocks::new(64 << 20));
    let a = attributes(NodeKind::File, 4 << 20);
    let said = with_entry(b"bad", &a, |e| zip.file(e, &bad, &options)).unwrap_err();
    assert!(said.report().contains("ends in the middle of bad: damaged"), "{}", said.report());
    drop(zip);
    assert!(!out.is_empty() && !end_of_archive(&out));
}

#[test]
fn what_has_no_place_is_told_and_nothing_of_it_is_written() {
    let file = |size| File { data: b"x".to_vec(), size, is_damaged: false };
    let names: [&[u8]; 4] = [b"n\xff", b"..\\up", b"c:x", &[b'a'; MAX_PATH + 1]];
    for name in names {
        let (bytes, results) = written(&[(b"a", file(1)), (name, file(1))]);
        let said = results[1].as_ref().unwrap_err().report();
        assert!(said.contains("not in a zip archive") && said.contains("--tar"), "{said}");
        let (without, _) = written(&[(b"a", file(1))]);
        assert_eq!(bytes, without, "{said}");
    }
    let (_, results) = written(&[(b"a", file((64 << 30) + 2))]);
    assert!(results[0].as_ref().unwrap_err().report().contains("holes"));
    // The second of a name.
    let (bytes, results) = written(&[(b"a", file(1)), (b"a", file(1))]);
    assert!(results[1].is_err() && end_of_archive(&bytes));
}

#[test]
fn many_entries_need_the_memory_that_there_is() {
    let mut out = std::io::sink();
    let mut zip = ToZip::new(&mut out, Blocks::new(4 << 20));
    let a = attributes(NodeKind::Folder, 0);
    let name = |n: u32| format!("folder-{n}");
    let failed = (0..100_000u32)
        .find_map(|n| with_entry(name(n).as_bytes(), &a, |e| zip.folder(e)).err().map(|e| (n, e)));
    let (n, said) = failed.unwrap();
    assert!((2000..6000).contains(&n) && said.report().contains("--cache-size"), "{n}");
}

#[test]
fn times_that_dos_has_not_are_its_first() {
    let first = DateTime::default();
    for seconds in [i64::MIN, -1, 0, i64::MAX, 5_000_000_000] {
        assert_eq!(dos_time(Time { seconds, nanos: 0 }), first, "{seconds}");
    }
    assert_eq!(dos_time(Time { seconds: 1_700_000_000, nanos: 0 }).year(), 2023);
}
