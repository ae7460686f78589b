//! Streams made by hand, right and wrong ones.

use std::io::Write;

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

use super::*;
use crate::error::Kind;
use crate::layer::testing::{pattern, read_onto};
use crate::storage::MemStorage;

/// A stream in the making; the tests spoil it before it is written.
#[derive(Clone)]
struct Made {
    size: u64,
    data_size: Option<u64>,
    incremental: bool,
    /// `None`: plain; else the guest bytes of an lz4 frame inside a long data frame.
    chunk: Option<usize>,
    version: &'static str,
    /// Kind, start, data (for `zero` its length only).
    frames: Vec<(&'static str, u64, Vec<u8>)>,
    end: String,
}

fn head(kind: &str, start: u64, len: usize) -> String {
    format!("{kind} {start:016x} {len:016x}\r\n")
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let info = FrameInfo::new()
        .block_mode(BlockMode::Linked)
        .block_size(BlockSize::Max64KB)
        .block_checksums(true)
        .content_checksum(true)
        .content_size(Some(data.len() as u64));
    let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

impl Made {
    fn new(size: u64, frames: Vec<(&'static str, u64, Vec<u8>)>) -> Made {
        let (version, end) = ("\"streamVersion\": 2", head("stop", 0, 0));
        Made { size, data_size: None, incremental: false, chunk: None, version, frames, end }
    }

    fn meta(&self) -> String {
        let data = self.frames.iter().filter(|f| f.0 == "data").map(|f| f.2.len() as u64).sum();
        let compressed = if self.chunk.is_some() { "2" } else { "false" };
        format!(
            "{{\"virtualSize\": {}, \"dataSize\": {}, \"date\": \"2026-11-22T01:30:45.480751\", \
             \"diskName\": \"sda\", \"diskFormat\": \"qcow2\", \"checkpointName\": \"c.1\", \
             \"compressed\": {compressed}, \"compressionMethod\": \"lz4\", \
             \"parentCheckpoint\": \"c.0\", \"incremental\": {}, {}}}",
            self.size,
            self.data_size.unwrap_or(data),
            self.incremental,
            self.version
        )
    }

    fn bytes(&self) -> Vec<u8> {
        let meta = self.meta();
        let mut out = head("meta", 0, meta.len()).into_bytes();
        out.extend(meta.bytes().chain(*b"\r\n"));
        let mut sizes = Vec::new();
        for (kind, start, data) in &self.frames {
            out.extend(head(kind, *start, data.len()).bytes());
            if *kind == "zero" {
                continue;
            }
            match self.chunk {
                None => out.extend(data),
                Some(chunk) => {
                    let packed: Vec<Vec<u8>> = data.chunks(chunk).map(lz4).collect();
                    let list: Vec<usize> = packed.iter().map(Vec::len).collect();
                    let total: usize = list.iter().sum();
                    sizes.push(match list[..] {
                        [one] => one.to_string(),
                        _ => format!("{{\"{total}\": {list:?}}}"),
                    });
                    out.extend(packed.concat());
                }
            }
            out.extend(b"\r\n");
        }
        out.extend(self.end.bytes());
        if self.chunk.is_some() {
            let list = format!("[{}]", sizes.join(", "));
            out.extend(list.bytes().chain(*b"\r\n").chain(head("comp", 0, list.len()).bytes()));
        }
        out
    }
}

fn open_bytes(bytes: Vec<u8>) -> Result<StreamLayer> {
    StreamLayer::open(Arc::new(MemStorage::new("sda.full.data", bytes)))
}

fn read(bytes: Vec<u8>) -> Result<Vec<u8>> {
    read_onto(&open_bytes(bytes)?, vec![0xbe; 1 << 20], 70_000)
}

const SIZE: u64 = 300_000 + 512;

fn full() -> Made {
    let frames = vec![
        ("zero", 0, vec![0; 65536]),
        ("data", 65536, pattern(100_000, 2)),
        ("data", 165_536, pattern(512, 4)),
        ("zero", 166_048, vec![0; 133_952]),
        ("data", 300_000, vec![9; 512]),
    ];
    Made::new(SIZE, frames)
}

fn want(made: &Made, below: u8) -> Vec<u8> {
    let mut disk = vec![below; made.size as usize];
    for (_, start, data) in &made.frames {
        disk[*start as usize..][..data.len()].copy_from_slice(data);
    }
    disk
}

#[test]
fn full_streams_read_right_plain_and_compressed() {
    let mut made = full();
    for chunk in [None, Some(usize::MAX), Some(32768)] {
        made.chunk = chunk;
        assert!(read(made.bytes()).unwrap() == want(&made, 0), "{chunk:?}");
    }
    // Version 1 had other words and no compression.
    made.chunk = None;
    made.version = "\"stream-version\": 1";
    assert!(read(made.bytes()).unwrap() == want(&made, 0));
}

#[test]
fn an_incremental_stream_lets_what_is_below_shine_through() {
    let mut made = full();
    made.incremental = true;
    made.frames.retain(|f| f.0 == "data");
    assert!(read(made.bytes()).unwrap() == want(&made, 0xbe));
    let layer = open_bytes(made.bytes()).unwrap();
    assert_eq!(layer.next_mapped(0), 65536);
    assert_eq!(layer.next_mapped(65537), 65537);
    assert_eq!(layer.next_mapped(200_000), 300_000);
    made.frames.clear();
    let empty = open_bytes(made.bytes()).unwrap();
    assert_eq!(empty.next_mapped(5), SIZE);
    assert_eq!(empty.map(0..SIZE).extents.as_slice()[0].content, Mapping::Below);
}

#[test]
fn a_full_stream_without_data_is_zeros() {
    let made = Made::new(4096, Vec::new());
    assert_eq!(read(made.bytes()).unwrap(), [0; 4096]);
}

#[test]
fn streams_that_break_a_rule_are_refused() {
    let kind = |spoil: &dyn Fn(&mut Made)| {
        let mut made = full();
        spoil(&mut made);
        open_bytes(made.bytes()).err().map(|e| e.kind())
    };
    let corrupt = Some(Kind::Corrupt);
    assert_eq!(kind(&|_| ()), None);
    assert_eq!(kind(&|m| m.version = "\"streamVersion\": 3"), Some(Kind::Unsupported));
    assert_eq!(kind(&|m| m.data_size = Some(4096)), corrupt);
    // A frame that is lost leaves a gap; a writer without zero frames leaves gaps everywhere.
    assert_eq!(kind(&|m| drop(m.frames.remove(2))), corrupt);
    assert_eq!(kind(&|m| drop(m.frames.remove(3))), corrupt);
    assert_eq!(kind(&|m| drop(m.frames.remove(4))), corrupt);
    assert_eq!(kind(&|m| m.frames.retain(|f| f.0 == "data")), None);
    assert_eq!(
        kind(&|m| {
            m.data_size = Some(101_024);
            m.frames.remove(2);
        }),
        corrupt
    );
    assert_eq!(kind(&|m| m.frames.swap(1, 2)), corrupt);
    assert_eq!(kind(&|m| m.frames[2].1 -= 1), corrupt);
    assert_eq!(kind(&|m| m.frames[4].1 += 1), corrupt);
    assert_eq!(kind(&|m| m.frames[0].2.clear()), corrupt);
    assert_eq!(kind(&|m| m.frames[1].0 = "meta"), corrupt);
    assert_eq!(kind(&|m| m.size = 300_000), corrupt);
    assert_eq!(kind(&|m| m.size = 1 << 63), corrupt);
    assert_eq!(kind(&|m| m.end.push('x')), corrupt);
    assert_eq!(kind(&|m| m.end = head("stop", 0, 1)), corrupt);
}

#[test]
fn hostile_lengths_are_refused() {
    let bytes = full().bytes();
    let frames = bytes.windows(5).enumerate().filter(|(_, w)| w == b"meta " || w == b"data ");
    for (at, _) in frames.collect::<Vec<_>>() {
        for value in
            ["7fffffffffffffff", "ffffffffffffffff", "zzzzzzzzzzzzzzzz", "+000000000000001"]
        {
            for field in [5, 22] {
                let mut bad = bytes.clone();
                bad[at + field..at + field + 16].copy_from_slice(value.as_bytes());
                assert!(open_bytes(bad).is_err(), "{at} {field} {value}");
            }
        }
    }
}

#[test]
fn trailers_that_contradict_the_stream_are_refused() {
    let mut made = full();
    made.chunk = Some(32768);
    let bytes = made.bytes();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let stop = bytes.windows(9).rposition(|w| w == b"stop 0000").unwrap();
    let list_at = stop + HEADER_AND_TERM - 2;
    let list = text(&bytes[list_at..bytes.len() - 42]);
    let with = |list: String| {
        let mut bad = bytes[..list_at].to_vec();
        bad.extend(list.bytes().chain(*b"\r\n").chain(head("comp", 0, list.len()).bytes()));
        open_bytes(bad).err().map(|e| e.kind())
    };
    assert_eq!(with(list.clone()), None);
    let entries = list.rsplit_once(", ").unwrap().0.to_owned();
    assert!(with(format!("{entries}]")).is_some(), "one entry less");
    assert!(with(list.replace(']', ", 5]")).is_some(), "one entry more");
    assert!(with(list.replacen(", ", ", 1", 1)).is_some(), "another size");
    assert!(with("[]".into()).is_some() && with("{}".into()).is_some());
    assert!(with(format!("[{}]", u64::MAX)).is_some());
}

/// What can be read of each 4 KiB.
fn units(layer: &StreamLayer) -> Vec<Option<Vec<u8>>> {
    let read = |start: u64| {
        let range = start..(start + 4096).min(layer.size());
        let map = layer.map(range.clone());
        map.extents.check(&range).unwrap();
        let mut out = vec![0; (range.end - start) as usize];
        for e in map.extents.as_slice() {
            let at = (e.start - start) as usize;
            let into = &mut out[at..at + e.len as usize];
            match e.content {
                Mapping::Data { file, host } => layer.read_data(file, host, into).ok()?,
                Mapping::Compressed { host, len, unit, skip } => {
                    let mut unit = vec![0; unit as usize];
                    layer.decompress(host, len, &mut unit).ok()?;
                    into.copy_from_slice(&unit[skip as usize..skip as usize + e.len as usize]);
                }
                Mapping::Zero | Mapping::Below => {}
                Mapping::Bad => {
                    assert_eq!(map.findings[0].kind, Kind::Truncated);
                    return None;
                }
            }
        }
        Some(out)
    };
    (0..layer.size()).step_by(4096).map(read).collect()
}

#[test]
fn of_a_stream_cut_anywhere_what_is_before_the_cut_is_served() {
    let mut made = full();
    let want = want(&made, 0);
    for chunk in [None, Some(32768)] {
        made.chunk = chunk;
        let bytes = made.bytes();
        let meta = HEADER_AND_TERM + made.meta().len();
        let step = if chunk.is_some() { 1 + bytes.len() / 4000 } else { 37 };
        let mut most = 0;
        for len in (0..bytes.len()).step_by(step).chain(bytes.len() - 200..bytes.len()) {
            let opened = open_bytes(bytes[..len].to_vec());
            assert_eq!(opened.is_err(), len < meta, "cut at {len}: {:?}", opened.err());
            let Ok(layer) = opened else { continue };
            let got = units(&layer);
            let known = got.iter().zip(want.chunks(4096)).filter(|(got, _)| got.is_some());
            let count = known.clone().count();
            for (got, want) in known {
                assert!(got.as_ref().is_some_and(|got| got == want), "cut at {len}");
            }
            // Half a frame of plain data is half of it; of lz4 frames it is none.
            let read = (len - meta).saturating_sub(made.frames.len() * 42 + 4096) / 4096;
            assert!(count >= read || chunk.is_some(), "cut at {len}: {count} of {read}");
            most = most.max(count);
        }
        assert_eq!(most, want.len().div_ceil(4096));
    }
}

#[test]
fn of_a_cut_stream_no_more_pieces_are_kept_than_there_is_room_for() {
    let mut made = full();
    for chunk in [None, Some(64)] {
        made.chunk = chunk;
        let mut bytes = made.bytes();
        let read = |bytes: &[u8], most| {
            let storage = MemStorage::new("sda.full.data", bytes.to_vec());
            let (meta, at) = frame::read_meta(&storage).unwrap();
            index::read_at_most(&storage, &meta, at, most).unwrap()
        };
        // A whole one is bounded by its list of sizes.
        let whole = read(&bytes, 2).pieces;
        assert!(whole.len() > 2);
        bytes.truncate(bytes.len() - 1);
        let found = read(&bytes, 2);
        assert_eq!(found.pieces, whole[..2]);
        // Zeros in between are known still.
        let from = found.cut.unwrap().from;
        assert!((whole[1].end()..=whole[2].start).contains(&from), "{from}");
    }
    assert!(index::MAX_PIECES * size_of::<Piece>() <= 64 << 20);
}

#[test]
fn flipped_bits_in_compressed_streams_never_give_other_bytes() {
    let mut made = full();
    made.frames[1].2.truncate(20_000);
    made.chunk = Some(8192);
    let (bytes, want) = (made.bytes(), want(&made, 0));
    // Behind the metadata, which has no checksum. Frame headers have none either, but a range that
    // moves or shrinks collides with another or leaves a gap.
    let meta = HEADER_AND_TERM + made.meta().len();
    let mut refused = 0;
    for at in (meta..bytes.len()).step_by(1 + bytes.len() / 6000) {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        match read(bad) {
            Err(_) => refused += 1,
            Ok(read) => assert!(read == want, "flipped at {at}"),
        }
    }
    assert!(refused > 1000, "{refused}");
}

const HEADER_AND_TERM: usize = 42;

#[test]
fn a_changed_byte_of_compressed_data_is_an_error_of_its_range_alone() {
    let mut made = full();
    made.chunk = Some(usize::MAX);
    let mut bytes = made.bytes();
    let layer = open_bytes(bytes.clone()).unwrap();
    let Mapping::Compressed { host, len, .. } =
        layer.map(65536..65537).extents.as_slice()[0].content
    else {
        panic!("not compressed")
    };
    bytes[(host + u64::from(len) / 2) as usize] ^= 4;
    let layer = open_bytes(bytes).unwrap();
    assert_eq!(
        layer.decompress(host, len, &mut vec![0; 100_000]).unwrap_err().kind(),
        Kind::Corrupt
    );
    let Mapping::Compressed { host, len, unit, .. } =
        layer.map(165_536..165_537).extents.as_slice()[0].content
    else {
        panic!("not compressed")
    };
    layer.decompress(host, len, &mut vec![0; unit as usize]).unwrap();
    // Neither more nor less than the frame holds.
    assert!(layer.decompress(host, len, &mut vec![0; unit as usize - 1]).is_err());
    assert!(layer.decompress(host, len, &mut vec![0; unit as usize + 1]).is_err());
    assert!(layer.decompress(host, len - 4, &mut vec![0; unit as usize]).is_err());
}

#[test]
fn sizes_are_read_one_by_one_and_kept_small() {
    let read = |text: &str| serde_json::from_str::<frame::Sizes>(text).ok();
    let mut sizes = read(r#"[5, 6, {"9": [4, 5]}, {"3": [1, 2]}, 7]"#).unwrap();
    let mut all = Vec::new();
    while let Some(places) = sizes.next() {
        all.push(places.map(|p| sizes.size(p)).collect::<Vec<_>>());
    }
    assert_eq!(all, [vec![5], vec![6], vec![4, 5], vec![1, 2], vec![7]]);
    assert!(read("[]").unwrap().next().is_none());
    for wrong in [
        r#"[{"8": [4, 5]}]"#,
        r#"[{"0": []}]"#,
        r#"[{}]"#,
        r#"[{"4": [4], "5": [5]}]"#,
        "[4294967296]",
        "[-1]",
        "[1.5]",
        "[[1]]",
        r#"["1"]"#,
        "{}",
        "[1] 2",
    ] {
        assert!(read(wrong).is_none(), "{wrong}");
    }
}
