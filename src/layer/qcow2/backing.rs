//! Changing the backing file that an image names, in its header alone.
//!
//! As `qemu-img rebase -u` does it: the header's fixed part, the backing format, all other
//! extensions as they were, and the name behind them; all of it within the first cluster, which is
//! written in one go. Nothing else of the image is read or changed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::header::{EXT_BACKING_FORMAT, EXT_END, Header, MAX_BACKING_NAME, V2_HEADER_LEN};
use crate::error::{Error, Kind, Result};
use crate::storage::{OpenFile, ReadAt};

/// A version 3 header is at least this long, in bytes.
const V3_HEADER_LEN: usize = 104;
/// Autoclear features that a change of the header leaves true: bitmaps, a raw data file. All others
/// a writer has to clear, as it does not know what they promise.
const KEPT_AUTOCLEAR: u64 = 0b11;

/// Lets the image `file`, called `path` in errors, name a backing file and its format, or none. The
/// caller syncs it, and has saved the first cluster if a crash matters.
///
/// # Errors
/// `Corrupt`, `Encrypted` and the like if the header cannot be read; `Unsupported` if the new one
/// does not fit into the first cluster; reading or writing failed.
pub fn set_backing(file: &File, path: &Path, backing: Option<(&OsStr, &str)>) -> Result<()> {
    let image = OpenFile::new(file, path)?;
    let header = Header::read(&image)?;
    let mut cluster = vec![0; header.cluster_size() as usize];
    image.read_exact_at(&mut cluster, 0)?;
    let new = rewritten(&cluster, header.version, backing)
        .map_err(|what| Error::new(Kind::Unsupported, what).at_path(path))?;
    file.write_all_at(&new, 0)
        .map_err(|e| Error::io(e, "writing failed").at_path(path).at_offset(0))
}

/// The first cluster with another backing file.
fn rewritten(
    old: &[u8],
    version: u32,
    backing: Option<(&OsStr, &str)>,
) -> Result<Vec<u8>, &'static str> {
    const CUT: &str = "the header is cut off";
    let long = || be32(old, 100).filter(|len| *len >= V3_HEADER_LEN);
    let fixed = if version == 2 { V2_HEADER_LEN as usize } else { long().ok_or(CUT)? };
    let mut new = old.get(..fixed).ok_or(CUT)?.to_vec();
    if let Some((_, format)) = backing {
        extension(&mut new, EXT_BACKING_FORMAT, format.as_bytes());
    }
    let name_at = usize::try_from(be64(old, 8).ok_or(CUT)?).unwrap_or(usize::MAX);
    let end = if name_at == 0 { old.len() } else { name_at.min(old.len()) };
    let mut at = fixed;
    while let (Some(kind), Some(len)) = (be32(old, at), be32(old, at + 4)) {
        if kind == EXT_END as usize || at + 8 > end {
            break;
        }
        let data = old[..end].get(at + 8..at + 8 + len).ok_or(CUT)?;
        if kind != EXT_BACKING_FORMAT as usize {
            extension(&mut new, kind as u32, data);
        }
        at += 8 + len.next_multiple_of(8);
    }
    extension(&mut new, EXT_END, &[]);
    let name = backing.map(|(name, _)| name.as_bytes()).unwrap_or_default();
    let name_at = if name.is_empty() { 0 } else { new.len() as u64 };
    new.extend(name);
    if new.len() > old.len() || name.len() > MAX_BACKING_NAME as usize {
        return Err("the name of the backing file does not fit into the header");
    }
    new[8..16].copy_from_slice(&name_at.to_be_bytes());
    new[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    if version > 2 {
        let autoclear = be64(old, 88).ok_or(CUT)? & KEPT_AUTOCLEAR;
        new[88..96].copy_from_slice(&autoclear.to_be_bytes());
    }
    new.resize(old.len(), 0);
    Ok(new)
}

fn extension(header: &mut Vec<u8>, kind: u32, data: &[u8]) {
    header.extend(kind.to_be_bytes());
    header.extend((data.len() as u32).to_be_bytes());
    header.extend(data);
    header.resize(header.len().next_multiple_of(8), 0);
}

fn be32(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(word.iter().fold(0, |v, b| v << 8 | usize::from(*b)))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(word.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 3 header with an unknown extension of 3 bytes and a backing file.
    fn image() -> Vec<u8> {
        let mut h = vec![0; 104];
        h[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        h[88..96].copy_from_slice(&0x85_u64.to_be_bytes());
        h[100..104].copy_from_slice(&104_u32.to_be_bytes());
        extension(&mut h, EXT_BACKING_FORMAT, b"raw");
        extension(&mut h, 0x1234_5678, b"abc");
        extension(&mut h, EXT_END, &[]);
        let at = h.len() as u64;
        h[8..16].copy_from_slice(&at.to_be_bytes());
        h[16..20].copy_from_slice(&3_u32.to_be_bytes());
        h.extend(b"old");
        h.resize(512, 0);
        h
    }

    fn set(image: &[u8], backing: Option<(&str, &str)>) -> Vec<u8> {
        rewritten(image, 3, backing.map(|(n, f)| (OsStr::new(n), f))).unwrap()
    }

    #[test]
    fn what_is_not_the_backing_file_stays() {
        let new = set(&image(), Some(("a new one", "qcow2")));
        assert_eq!(be64(&new, 88), Some(1), "only known autoclear features stay");
        let at = be64(&new, 8).unwrap() as usize;
        assert_eq!(&new[at..at + be32(&new, 16).unwrap()], b"a new one");
        let mut wanted = Vec::new();
        extension(&mut wanted, EXT_BACKING_FORMAT, b"qcow2");
        extension(&mut wanted, 0x1234_5678, b"abc");
        extension(&mut wanted, EXT_END, &[]);
        assert_eq!(&new[104..at], wanted);
        // And back again.
        let mut first = image();
        first[88..96].copy_from_slice(&1_u64.to_be_bytes());
        assert_eq!(set(&new, Some(("old", "raw"))), first);
    }

    #[test]
    fn without_a_backing_file_no_trace_of_it_is_left() {
        let new = set(&image(), None);
        assert_eq!((be64(&new, 8), be32(&new, 16)), (Some(0), Some(0)));
        assert!(!new.windows(3).any(|w| w == b"old" || w == b"raw"));
        assert!(new.windows(3).any(|w| w == b"abc"));
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        let long = "x".repeat(512);
        assert!(rewritten(&image(), 3, Some((OsStr::new(&long), "raw"))).is_err());
        let mut image = image();
        image.resize(65536, 0);
        let longer = "x".repeat(1024);
        assert!(rewritten(&image, 3, Some((OsStr::new(&longer), "raw"))).is_err());
    }

    #[test]
    fn no_header_makes_it_panic() {
        for at in 0..160 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = image();
                image[at] = value;
                for version in [2, 3] {
                    let _ = rewritten(&image, version, Some((OsStr::new("b"), "raw")));
                    let _ = rewritten(&image[..at], version, None);
                }
            }
        }
    }
}
