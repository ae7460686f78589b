use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::*;
use crate::layer::qcow2::create::NewImage;

/// In CI a missing qemu-img is a failure; elsewhere the test says that it was skipped.
fn have(test: &str) -> bool {
    let found = program("qemu-img").is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "{test} needs qemu-img");
    if !found {
        println!("skipped: {test} needs qemu-img");
    }
    found
}

fn new_image(cluster_size: u64, size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let shape = NewImage::plain(size, cluster_size);
    shape.write(&file, Path::new("image")).unwrap();
    file
}

#[test]
fn an_endless_check_ends() {
    if !have("an_endless_check_ends") {
        return;
    }
    // Four million L1 entries that all lead to one L2 table of 262,144 entries.
    const CLUSTER: u64 = 2 << 20;
    let file = new_image(CLUSTER, 1 << 61);
    let path = Path::new("image");
    let header = Header::read(&OpenFile::new(&file, path).unwrap()).unwrap();
    let table = header.l1.offset + header.l1.byte_len();
    file.set_len(table + CLUSTER).unwrap();
    let entries = (table | 1 << 63).to_be_bytes().repeat(header.l1.entries as usize);
    file.write_all_at(&entries, header.l1.offset).unwrap();
    let image = OpenFile::new(&file, path).unwrap();
    let exports = [Export::reading(&image)];
    let limits = Limits { memory: MEMORY, cpu: Some(1) };
    let job = Job { verb: "check", about: path, limits, exports: &exports };
    let args = |fds: &[i32]| vec!["check".into(), named(&qcow2(fds[0], None))];
    let e = job.run(args, &|| Ok(())).unwrap_err();
    assert_eq!(e.kind(), Kind::Peer, "{}", e.report());
    assert!(e.report().contains("too long"), "{}", e.report());
    // And at once when it is told to.
    let stopped = || Err(Error::new(Kind::Interrupted, "interrupted"));
    assert_eq!(check(&file, path, &stopped).unwrap_err().kind(), Kind::Interrupted);
}

#[test]
fn a_check_takes_no_memory_for_a_huge_sparse_file() {
    if !have("a_check_takes_no_memory_for_a_huge_sparse_file") {
        return;
    }
    let file = new_image(512, 1 << 20);
    // 16 GiB of refcounts to count.
    file.set_len(4 << 40).unwrap();
    let result = check(&file, Path::new("image"), &|| Ok(()));
    assert_eq!(result.unwrap_err().kind(), Kind::Peer);
}

#[test]
fn data_and_keys_from_elsewhere_are_refused() {
    let file = new_image(65536, 1 << 20);
    let path = Path::new("image");
    let stop = || Ok(());
    file.write_all_at(&[1 << 2], 79).unwrap();
    for result in [
        check(&file, path, &stop).map(drop),
        resize(&file, 2 << 20, path, &stop),
        snapshot(&file, "s", path, &stop),
        commit((&file, &file), Format::Raw, 0, path, &stop),
    ] {
        assert_eq!(result.unwrap_err().kind(), Kind::Unsupported);
    }
    file.write_all_at(&[0], 79).unwrap();
    file.write_all_at(&[2], 35).unwrap();
    assert_eq!(check(&file, path, &stop).unwrap_err().kind(), Kind::Encrypted);
}

/// A client of an export of `size` bytes over a file with these contents: what it got for `sent`,
/// all that there is in the file in the end.
fn talk(contents: &[u8], size: Option<u64>, sent: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(contents, 0).unwrap();
    let image = OpenFile::new(&file, Path::new("image")).unwrap();
    let export = match size {
        Some(size) => Export::writing(&image, size),
        None => Export::reading(&image),
    };
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut got = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| nbd::serve(&export, &ours));
        // The server may hang up before it has read everything.
        let _ = theirs.write_all(sent);
        let _ = theirs.shutdown(std::net::Shutdown::Write);
        let _ = theirs.read_to_end(&mut got);
    });
    let mut left = Vec::new();
    let mut file = &file;
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut left).unwrap();
    (got, left)
}

/// The handshake up to the data, without padding.
fn hello() -> Vec<u8> {
    let export_name = [&b"IHAVEOPT"[..], &1_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat();
    [&3_u32.to_be_bytes()[..], &export_name].concat()
}

fn request(kind: u16, from: u64, len: u32) -> Vec<u8> {
    let mut r = 0x2560_9513_u32.to_be_bytes().to_vec();
    r.extend([0, 0]);
    r.extend(kind.to_be_bytes());
    r.extend(b"a cookie");
    r.extend(from.to_be_bytes());
    r.extend(len.to_be_bytes());
    r
}

/// Greeting, then size and flags of the export.
const GREETING: usize = 18 + 10;

fn error_of(reply: &[u8]) -> u32 {
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

#[test]
fn an_export_is_read_and_not_written() {
    let sent = [hello(), request(0, 1, 3), request(6, 0, 2), request(1, 0, 2), b"xy".to_vec()];
    let (got, left) = talk(b"abcdef", None, &sent.concat());
    let replies = &got[GREETING..];
    assert_eq!((error_of(replies), &replies[16..19]), (0, &b"bcd"[..]));
    assert_eq!((error_of(&replies[19..]), error_of(&replies[35..])), (1, 1));
    assert_eq!(left, b"abcdef");
}

#[test]
fn an_export_that_grows_ends_at_its_size() {
    let inside = [request(1, 510, 2), b"yz".to_vec()].concat();
    let beyond = [request(1, 511, 2), b"yz".to_vec()].concat();
    let sent = [hello(), inside, beyond, request(0, 5, 2), request(6, u64::MAX, 9)];
    let (got, left) = talk(b"abcdef", Some(512), &sent.concat());
    let replies = &got[GREETING..];
    assert_eq!((error_of(replies), error_of(&replies[16..])), (0, 22));
    assert_eq!((error_of(&replies[32..]), &replies[48..50]), (0, &b"f\0"[..]));
    assert_eq!(error_of(&replies[50..]), 22);
    assert_eq!((left.len(), &left[..6], &left[510..]), (512, &b"abcdef"[..], &b"yz"[..]));
    let (_, left) = talk(b"abcdef", Some(512), &[hello(), request(6, 2, 6)].concat());
    assert_eq!(left, b"ab\0\0\0\0\0\0");
}

#[test]
fn no_request_takes_more_memory_than_the_client_is_told() {
    let go = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &7_u32.to_be_bytes(), &0_u32.to_be_bytes()];
    let (got, _) = talk(&[5; 512], Some(8 << 20), &go.concat());
    // Behind the greeting an answer has 20 bytes, and what it says: of the size, and of those of a request.
    let sizes = &got[18 + 20 + 12 + 20..][..14];
    assert_eq!(sizes[..2], [0, 3]);
    let most = u32::from_be_bytes(sizes[10..].try_into().unwrap());
    assert!((1 << 20..=4 << 20).contains(&most), "{most}");
    let (got, _) = talk(
        &[5; 512],
        Some(8 << 20),
        &[hello(), request(0, 0, most), request(0, 0, most + 1)].concat(),
    );
    let replies = &got[GREETING..];
    assert_eq!((error_of(replies), &replies[16..18]), (0, &[5, 5][..]));
    assert_eq!(error_of(&replies[16 + most as usize..]), 22);
    // What it would write is not waited for.
    let (got, left) = talk(&[5; 512], Some(8 << 20), &[hello(), request(1, 0, most + 1)].concat());
    assert_eq!((got.len(), left.len()), (GREETING, 512));
}

#[test]
fn nonsense_ends_the_connection() {
    let huge = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &[0xff; 8]].concat();
    let write = [hello(), request(1, 0, u32::MAX)].concat();
    let read = [hello(), request(0, 0, u32::MAX), request(99, 0, 1)].concat();
    for sent in [huge, write, read, vec![0x55; 4096], [hello(), vec![0x55; 4096]].concat()] {
        let (got, left) = talk(b"abcdef", Some(1 << 40), &sent);
        assert!(got.len() < 100, "{}", got.len());
        assert_eq!(left, b"abcdef");
    }
}

#[test]
fn a_file_that_ends_within_a_sector_is_checked() {
    if !have("a_file_that_ends_within_a_sector_is_checked") {
        return;
    }
    // A header of version 2 for an empty disk, and nothing else.
    let mut header = b"QFI\xfb\0\0\0\x02".to_vec();
    header.resize(72, 0);
    header[23] = 16;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&header, 0).unwrap();
    // Long after it should have ended: a guard, no limit.
    let looks = std::sync::atomic::AtomicU32::new(0);
    let stop = || match looks.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
        20_000.. => Err(Error::new(Kind::Timeout, "it does not end")),
        _ => Ok(()),
    };
    let result = check(&file, Path::new("image"), &stop);
    assert_ne!(result.err().map(|e| e.kind()), Some(Kind::Timeout));
}
