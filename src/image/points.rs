//! From a catalog's points to images.

use std::sync::Arc;

use super::{Cache, Image};
use crate::chain::Disk;
use crate::error::{Error, Kind, Result};

/// Opens the image of one point; the images of the points below it are made on the way and shared.
///
/// # Errors
/// `Incomplete` with the reason if the point cannot be served.
pub fn open_point(disk: &Disk, point: usize, cache: &Arc<Cache>) -> Result<Arc<Image>> {
    let mut images = vec![None; disk.points.len()];
    open_point_sharing(disk, point, cache, &mut images)
}

/// The same with the images made so far: `images[i]` is point `i`'s, filled in as needed.
///
/// # Errors
/// See [`open_point`].
pub fn open_point_sharing(
    disk: &Disk,
    point: usize,
    cache: &Arc<Cache>,
    images: &mut [Option<Arc<Image>>],
) -> Result<Arc<Image>> {
    let mut line = vec![point];
    while let Some(parent) = disk.points[line[line.len() - 1]].parent {
        line.push(parent);
    }
    let mut below = None;
    for &i in line.iter().rev() {
        let image = match images[i].take() {
            Some(image) => image,
            None => open_one(disk, i, below, cache)?,
        };
        images[i] = Some(image.clone());
        below = Some(image);
    }
    below.ok_or_else(|| Error::new(Kind::NotFound, "no such point"))
}

fn open_one(
    disk: &Disk,
    point: usize,
    below: Option<Arc<Image>>,
    cache: &Arc<Cache>,
) -> Result<Arc<Image>> {
    let p = &disk.points[point];
    if let Some(finding) = &p.unavailable {
        let text = format!("this point is not available: {}", finding.message);
        let mut error = Error::new(finding.kind, text).at_path(&finding.path);
        if let Some(offset) = finding.offset {
            error = error.at_offset(offset);
        }
        return Err(match &finding.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        });
    }
    Image::new(p.size, &p.layers, below, cache)
}
