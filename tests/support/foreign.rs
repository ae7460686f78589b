//! Files of other backup programs, made by hand: virtnbdbackup's streams and Proxmox archives.

use md5::{Digest, Md5};

fn head(kind: &str, start: usize, len: usize) -> Vec<u8> {
    format!("{kind} {start:016x} {len:016x}\r\n").into_bytes()
}

/// A stream with checkpoint `number`; the first is full and has zeros between its data.
pub fn stream(disk: &str, number: u32, size: usize, data: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let parent = number.checked_sub(1).map(|n| format!("virtnbdbackup.{n}")).unwrap_or_default();
    let meta = serde_json::json!({
        "virtualSize": size, "dataSize": data.iter().map(|d| d.1.len()).sum::<usize>(),
        "date": format!("2026-11-22T01:30:4{number}.480751"), "diskName": disk,
        "diskFormat": "qcow2", "checkpointName": format!("virtnbdbackup.{number}"),
        "compressed": false, "compressionMethod": "lz4", "parentCheckpoint": parent,
        "incremental": number > 0, "streamVersion": 2,
    })
    .to_string();
    let mut out = head("meta", 0, meta.len());
    out.extend(meta.bytes().chain(*b"\r\n"));
    let mut at = 0;
    for (start, bytes) in data {
        if number == 0 && *start > at {
            out.extend(head("zero", at, start - at));
        }
        out.extend(head("data", *start, bytes.len()));
        out.extend(bytes.iter().chain(b"\r\n"));
        at = start + bytes.len();
    }
    if number == 0 && at < size {
        out.extend(head("zero", at, size - at));
    }
    out.extend(head("stop", 0, 0));
    out
}

/// An archive with one disk of one cluster: blocks 0 and 2 are stored, the others zero.
pub fn archive(first: u8, third: u8) -> Vec<u8> {
    archive_of(12800, 0b101, &[vec![first; 4096], vec![third; 4096]].concat())
}

/// An archive with one disk of one cluster, of which the blocks in `mask` are `stored`. They begin
/// 512 bytes after the header.
pub fn archive_of(header: u32, mask: u16, stored: &[u8]) -> Vec<u8> {
    let put = |at: &mut [u8], bytes: &[u8]| at[..bytes.len()].copy_from_slice(bytes);
    let mut h = vec![0; header as usize];
    put(&mut h, b"VMA\0\0\0\0\x01an archive's id.");
    put(&mut h[24..], &1_700_000_000u64.to_be_bytes());
    put(&mut h[48..], &[12288u32, 100, header].map(u32::to_be_bytes).concat());
    put(&mut h[4096 + 32..], &1u32.to_be_bytes());
    put(&mut h[4096 + 40..], &65536u64.to_be_bytes());
    put(&mut h[12289..], b"\x0c\0drive-scsi0\0");
    let mut e = vec![0; 512];
    put(&mut e, b"VMAE\0\0\0\0an archive's id.");
    e[7] = mask.count_ones() as u8;
    put(&mut e[40..], &[[mask.to_be_bytes(), [0, 1]].concat(), vec![0; 4]].concat());
    for (block, at) in [(&mut h, 32), (&mut e, 24)] {
        let sum = Md5::digest(&*block);
        put(&mut block[at..], &sum);
    }
    [h, e, stored.to_vec()].concat()
}
