//! What a hostile guest has made of its XFS: each image ends in time, with errors or with the right bytes, and
//! within the cache's memory. The bytes are changed in memory, the same ones in every run.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::file_systems::{Image, Points, TOOLS, said, set_xattr, shell};
use crate::support::tools::{have, is_root, run};
use fleecefs::error::{Error, Kind, Result};
use fleecefs::files::{At, Blocks, NodeKind, Source, Tree, Visitor, open_tree, volumes_of, walk};
use fleecefs::storage::MemStorage;

/// Memory for a reader.
const CACHE: u64 = 8 << 20;
/// Longer than any of these images takes, by far.
const LONGEST: Duration = Duration::from_secs(20);

fn ready(test: &str) -> bool {
    have(test, &[TOOLS.as_slice(), &["mkfs.xfs"]].concat()) && is_root(test)
}

/// A small file system with one of each kind of metadata; its bytes.
fn filled() -> Vec<u8> {
    let image = Image::new(16 << 20, &["mkfs.xfs", "-q", "-f", "--unsupported", "-b", "size=1024"]);
    let mounted = image.mount("");
    shell(
        &image.mnt(),
        "mkdir good few some many; echo 1 > good/file; ln -s \"$(printf %0900d 7)\" long; ln -s good short; \
         i=0; while [ $i -lt 20 ]; do echo $i > some/name-$i; i=$((i + 1)); done; \
         i=0; while [ $i -lt 400 ]; do : > many/a-name-$i; i=$((i + 1)); done; \
         i=0; while [ $i -lt 200 ]; do printf yy | dd of=holes bs=1 seek=$((i * 4000)) conv=notrunc status=none; \
         i=$((i + 1)); done; mknod device b 8 1; : > few/one; fallocate -l 300K preallocated; ",
    );
    for i in 0..60 {
        assert!(set_xattr(&image.mnt().join("holes"), &format!("user.number-{i}"), &[7; 70]));
    }
    assert!(set_xattr(&image.mnt().join("many"), "user.large", &[8; 5000]));
    assert!(set_xattr(&image.mnt().join("good/file"), "user.short", b"9"));
    drop(mounted);
    std::fs::read(image.path()).unwrap()
}

/// The same of version 4, which has no checksums: what mkfs puts into it.
fn filled_old() -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("data"), vec![b'x'; 9000]).unwrap();
    let data = at("data").display().to_string();
    let mut lines = vec!["/nothing".into(), "1 1".into(), "d--755 0 0".into()];
    lines.push(format!("file ---644 0 0 {data}"));
    lines.push(format!("long l--777 0 0 {}", "x".repeat(900)));
    for (folder, count) in [("good", 2), ("some", 20), ("many", 400)] {
        lines.push(format!("{folder} d--755 0 0"));
        lines.extend((0..count).map(|i| format!("name-{i} ---644 0 0 {data}")));
        lines.push("$".into());
    }
    lines.push("$".into());
    std::fs::write(at("prototype"), lines.join("\n") + "\n").unwrap();
    std::fs::File::create(at("image")).unwrap().set_len(16 << 20).unwrap();
    let options = ["-q", "-f", "--unsupported", "-m", "crc=0", "-b", "size=1024", "-p"];
    let mut mkfs = std::process::Command::new("mkfs.xfs");
    let made = mkfs.args(options).arg(at("prototype")).arg(at("image")).output().unwrap();
    made.status.success().then(|| std::fs::read(at("image")).unwrap())
}

/// What a reader makes of everything in an image.
#[derive(Default)]
struct Listing {
    files: BTreeMap<Vec<u8>, String>,
    errors: usize,
}

struct Look<'a> {
    tree: &'a dyn Tree,
    seen: Listing,
    left: usize,
}

impl Look<'_> {
    fn count(&mut self) -> Result<()> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| Error::new(Kind::Interrupted, "enough"))?;
        Ok(())
    }

    /// All that is known about a node, as far as it can be read.
    fn line(&mut self, at: &At<'_>) -> Result<String> {
        let mut line = format!("{:?}", at.attributes);
        for x in self.tree.xattrs(at.node)? {
            line += &format!(" {:?}={}", x.name.escape_ascii().to_string(), blake3::hash(&x.value));
        }
        match at.attributes.kind {
            NodeKind::File => line += &self.contents(at)?,
            NodeKind::Link => {
                line += &self.tree.read_link(at.node)?.escape_ascii().to_string();
            }
            _ => {}
        }
        Ok(line)
    }

    fn contents(&self, at: &At<'_>) -> Result<String> {
        const BYTES: u64 = 4 << 20;
        let file = self.tree.open(at.node)?;
        let mut buf = vec![0; file.size().min(BYTES) as usize];
        let n = file.read_at(&mut buf, 0)?;
        // Less only where something bad follows.
        if n < buf.len() {
            file.read_at(&mut buf, n as u64)?;
        }
        let mut offset = 0;
        for _ in 0..10_000 {
            let Some(stretch) = file.stretch(offset)? else { break };
            assert!(stretch.end > offset && stretch.end <= file.size());
            offset = stretch.end;
        }
        Ok(format!(" {} {}", buf.len(), blake3::hash(&buf)))
    }
}

impl Visitor for Look<'_> {
    fn enter(&mut self, at: &At<'_>) -> Result<bool> {
        let _ = self.tree.lookup(at.node, b"a-name-77");
        self.node(at).map(|()| true)
    }

    fn node(&mut self, at: &At<'_>) -> Result<()> {
        self.count()?;
        assert!(!at.name.contains(&b'/') && !at.name.contains(&0) && at.name != b"..");
        match self.line(at) {
            Ok(line) => drop(self.seen.files.insert(at.path.to_vec(), line)),
            Err(_) => self.seen.errors += 1,
        }
        Ok(())
    }

    fn failed(&mut self, _: &[u8], _: Error) -> Result<()> {
        self.seen.errors += 1;
        self.count()
    }
}

/// Everything in an image; `None` if it is refused.
fn look(bytes: Vec<u8>) -> Option<Listing> {
    let blocks = Blocks::new(CACHE);
    let begun = Instant::now();
    let disk = Source::new(Arc::new(MemStorage::new("disk", bytes)), "disk", &blocks);
    let (volumes, _) = volumes_of(&disk, Vec::new).ok()?;
    let tree = open_tree(&volumes[0]).ok()?;
    let mut look = Look { tree: &*tree, seen: Listing::default(), left: 5000 };
    let walked = walk(&*tree, tree.root(), &mut look);
    let _ = (tree.statistics(), tree.findings().list());
    assert!(blocks.used() <= CACHE && begun.elapsed() < LONGEST, "{:?}", begun.elapsed());
    walked.is_ok().then_some(look.seen)
}

/// Numbers that look random and are the same in every run.
struct Seed(u64);

impl Seed {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }
}

/// A piece of metadata: where, how long, and where its checksum is.
type Piece = (usize, usize, usize);

/// All metadata that files are read by, found by its magic numbers.
fn pieces(image: &[u8]) -> Vec<Piece> {
    let mut found = vec![(0, 512, 224)];
    for at in (512..image.len()).step_by(512) {
        let has =
            |offset: usize, magic: &[u8]| &image[at + offset..at + offset + magic.len()] == magic;
        let block = |crc| Some((at, 1024, crc));
        let piece = match () {
            () if has(0, b"IN") && has(4, &[3]) && !has(2, &[0, 0]) => Some((at, 512, 100)),
            () if at % 1024 != 0 => None,
            () if has(0, b"BMA3") => block(64),
            () if has(0, b"XARM") || has(0, b"XSLM") => block(12),
            () if has(0, b"XDB3") || has(0, b"XDD3") => Some((at, 4096, 4)),
            () if [[0x3e, 0xbe], [0x3b, 0xee]].iter().any(|m| has(8, m)) => block(12),
            () if [[0x3d, 0xf1], [0x3d, 0xff]].iter().any(|m| has(8, m)) => Some((at, 4096, 12)),
            () => None,
        };
        found.extend(piece);
    }
    found
}

/// Gives a piece the checksum that it should have, where it has one at that place and of that length.
fn seal(image: &mut [u8], (at, len, crc): Piece) {
    let bytes = &mut image[at..at + len];
    bytes[crc..crc + 4].fill(0);
    let value = checksum(bytes);
    bytes[crc..crc + 4].copy_from_slice(&value.to_le_bytes());
}

/// CRC-32C, bit by bit.
fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// Changes a few bytes of a piece: to values that are likely to matter.
fn mutate(image: &mut [u8], (at, len, _): Piece, seed: &mut Seed) {
    const VALUES: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xff, 8, 64];
    for _ in 0..1 + seed.next(3) {
        // More often where heads and the entries behind them are.
        let bound = if seed.next(2) == 0 { len.min(200) } else { len };
        let place = at + seed.next(bound);
        image[place] = match seed.next(3) {
            0 => VALUES[seed.next(VALUES.len())],
            1 => image[place] ^ (1 << seed.next(8)),
            _ => seed.next(256) as u8,
        };
        if seed.next(6) == 0 {
            let run = 1 + seed.next(8);
            let end = (place + run).min(at + len);
            image[place..end].fill(VALUES[seed.next(VALUES.len())]);
        }
    }
}

#[test]
fn damage_that_checksums_tell_gives_errors_or_the_right_bytes() {
    if !ready("damage_that_checksums_tell_gives_errors_or_the_right_bytes") {
        return;
    }
    let image = filled();
    let right = look(image.clone()).expect("it is read");
    assert!(right.errors == 0 && right.files.len() > 430, "{}", right.files.len());
    let all = pieces(&image);
    let (mut damaged, mut seed) = (0, Seed(0x1234_5678_9abc_def1));
    for round in 0..150 {
        let mut broken = image.clone();
        for _ in 0..3 {
            mutate(&mut broken, all[seed.next(all.len())], &mut seed);
        }
        let Some(seen) = look(broken) else { continue };
        damaged += usize::from(seen.errors > 0);
        for (path, line) in &seen.files {
            assert_eq!(right.files.get(path), Some(line), "{round}: {}", path.escape_ascii());
        }
    }
    assert!(damaged > 50, "{damaged} of them had damage");
}

#[test]
fn lies_with_right_checksums_end_in_time() {
    if !ready("lies_with_right_checksums_end_in_time") {
        return;
    }
    let image = filled();
    let all = pieces(&image);
    let (mut read, mut seed) = (0, Seed(0x0fed_cba9_8765_4321));
    for _ in 0..350 {
        let mut broken = image.clone();
        for _ in 0..3 {
            let piece = all[seed.next(all.len())];
            mutate(&mut broken, piece, &mut seed);
            seal(&mut broken, piece);
        }
        read += usize::from(look(broken).is_some());
    }
    assert!(read > 100, "{read} of them could be read");
}

#[test]
fn lies_of_version_4_end_in_time() {
    if !ready("lies_of_version_4_end_in_time") {
        return;
    }
    let Some(image) = filled_old() else { return println!("mkfs.xfs makes no version 4 here") };
    let right = look(image.clone()).expect("it is read");
    assert!(right.errors == 0 && right.files.len() > 420, "{}", right.files.len());
    // Without magic numbers: whatever is not empty.
    let used: Vec<usize> = (0..image.len())
        .step_by(512)
        .filter(|at| image[*at..at + 512] != [b'x'; 512][..])
        .collect();
    let used: Vec<usize> =
        used.into_iter().filter(|at| image[*at..at + 512].iter().any(|b| *b != 0)).collect();
    let (mut read, mut seed) = (0, Seed(0x5555_1234_aaaa_4321));
    for _ in 0..350 {
        let mut broken = image.clone();
        for _ in 0..6 {
            mutate(&mut broken, (used[seed.next(used.len())], 512, 0), &mut seed);
        }
        read += usize::from(look(broken).is_some());
    }
    assert!(read > 100, "{read} of them could be read");
}

/// Changes bytes of the superblock, which stays right otherwise; what `files ls` says then.
fn with_superblock(image: &[u8], at: usize, bytes: &[u8]) -> String {
    let mut changed = image.to_vec();
    changed[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&mut changed, (0, 512, 224));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image");
    std::fs::write(&file, changed).unwrap();
    let mut points = Points::new();
    points.add(&file);
    let out = points.files(&["ls"], "vda/latest/", &[]);
    format!("{:?} {}", out.status.code().unwrap(), said(&out))
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    if !ready("what_cannot_be_read_is_refused_by_name") {
        return;
    }
    let image = filled();
    let incompat = u32::from_be_bytes(image[216..220].try_into().unwrap());
    let with = |bit: u32| with_superblock(&image, 216, &(incompat | bit).to_be_bytes());
    let says = |text: String, code: &str, what: &str| {
        assert!(text.starts_with(code) && text.contains(what), "{what}: {text}");
    };
    says(with(0x10), "11", "xfs_repair");
    says(with(0x100), "11", "unsupported file system feature metadir");
    says(with(0x8000_0000), "11", "unsupported file system feature 0x80000000");
    says(with(0x40), "0", "");
    says(with_superblock(&image, 88, &[0xff]), "10", "in the superblock");
    says(with_superblock(&image, 48, &[0; 8]), "0", "its log is on another device");
    let mut broken = image.clone();
    broken[110] ^= 1;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("image"), broken).unwrap();
    let mut points = Points::new();
    points.add(&dir.path().join("image"));
    let out = points.files(&["ls"], "vda/latest/", &[]);
    assert!(said(&out).contains("bad checksum of the superblock"), "{}", said(&out));
}

#[test]
fn a_wrong_checksum_costs_one_file_or_folder() {
    if !ready("a_wrong_checksum_costs_one_file_or_folder") {
        return;
    }
    let mut image = filled();
    let inode = find(&image, b"IN", |at| image[at + 2..at + 4] == [0x81, 0xa4]);
    image[inode + 9] ^= 1;
    let folder = find(&image, b"XDB3", |_| true);
    image[folder + 100] ^= 1;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("image"), image).unwrap();
    let mut points = Points::new();
    points.add(&dir.path().join("image"));
    let to = dir.path().join("to");
    let out = points.files(&["cp"], "vda/latest", &[to.to_str().unwrap()]);
    let text = said(&out);
    assert_eq!(out.status.code(), Some(16), "{text}");
    assert!(text.contains("has a bad checksum"), "{text}");
    assert!(
        text.contains("a metadata block of inode") && text.contains(": bad checksum"),
        "{text}"
    );
    assert!(count(&to.join("many")) >= 399 && count(&to) >= 8, "{text}");
    run("rm", &["-rf", to.to_str().unwrap()]);
}

fn count(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

/// The first 512 bytes that begin so.
fn find(image: &[u8], magic: &[u8], also: impl Fn(usize) -> bool) -> usize {
    let mut places = (0..image.len()).step_by(512);
    places.find(|at| image[*at..].starts_with(magic) && also(*at)).expect("it is there")
}
