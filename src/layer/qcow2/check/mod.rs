//! Our own walk over a qcow2 file: every reference in its header, tables and directories.
//!
//! Follows `docs/interop/qcow2.rst`. Each host cluster that something refers to is put into a set
//! by what it holds, so that two uses that exclude each other meet. What may be shared, is: L2
//! tables and data between internal snapshots, a host cluster between compressed clusters.
//! Memory is bounded by a few bits per host cluster and one table.

mod clusters;
mod directories;
mod findings;
mod refcounts;
mod walk;

use std::sync::Arc;

pub(crate) use self::findings::{FindingList, REMEDY};
pub(super) use clusters::ClusterSet;
pub(super) use walk::DATA_FILE;
use walk::{MAX_CLAIMS, Walker};

use crate::error::{Finding, Result};
use crate::layer::qcow2::header::Header;
use crate::storage::ReadAt;

/// What the walk found.
#[derive(Debug, Default)]
pub struct Structure {
    /// What makes reads wrong or fail (errors), and oddities.
    pub findings: Vec<Finding>,
    /// What is wrong with the refcounts of clusters in use. Reading does not need refcounts, but
    /// a pointer that was moved by a flipped bit shows here.
    pub refcounts: Vec<Finding>,
    /// The header, if it could be read.
    pub header: Option<Header>,
    /// Whether there is any compressed cluster.
    pub compressed: bool,
}

/// Walks over `image`; `data` is its external data file.
pub fn check(image: &dyn ReadAt, data: Option<&Arc<dyn ReadAt>>) -> Structure {
    let header = match Header::read(image) {
        Ok(h) => h,
        Err(e) => {
            let findings = vec![Finding::from_error(&e, image.name())];
            return Structure { findings, ..Structure::default() };
        }
    };
    let mut walker = Walker::new(image, &header, data.map(|d| d.len()));
    if let Err(e) = walker.walk() {
        walker.out.push(Finding::from_error(&e, image.name()));
    }
    let refcounts = if header.is_dirty() || !walker.blocks_readable {
        Vec::new()
    } else {
        refcounts::check(image, &header, &walker.used, &walker.blocks)
    };
    let mut findings = walker.out.finish();
    findings.extend(header.oddities(image.name()).into_iter().filter(|f| f.offset.is_none()));
    if header.is_marked_corrupt() {
        findings.push(Finding::from_error(&header.corrupt_mark(image.name()), image.name()));
    }
    let compressed = walker.compressed;
    Structure { findings, refcounts, header: Some(header), compressed }
}

/// The host clusters that two references claim which exclude each other, those of an external data
/// file of `data_len` bytes by their numbers there: in an image that QEMU marked as corrupt, nobody
/// knows whose bytes are in them.
///
/// # Errors
/// A table cannot be read, or what is in it cannot be known: `Corrupt`; `Unsupported` if there is more
/// than is looked at.
pub(super) fn claimed_twice(
    image: &dyn ReadAt,
    header: &Header,
    data_len: Option<u64>,
) -> Result<ClusterSet> {
    let mut walker = Walker::new(image, header, data_len);
    walker.most = MAX_CLAIMS;
    walker.walk()?;
    match walker.left_out {
        None => Ok(walker.twice),
        Some(left_out) => Err(left_out),
    }
}
