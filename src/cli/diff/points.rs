//! Two points, opened and named.

use std::sync::Arc;

use serde_json::json;

use crate::chain::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::{Cache, Image, open_point_sharing};
use crate::text::{path_text, to_text};
use crate::units::iso_time;

/// A disk, and which of its points.
pub(super) type Which<'a> = (&'a Disk, usize);

/// Opens two points; of one disk, they share what both are made of.
///
/// # Errors
/// One of them is not available; `Usage` if they are of two disks of different sizes.
pub(super) fn open_both(
    from: Which<'_>,
    to: Which<'_>,
    cache: &Arc<Cache>,
) -> Result<(Arc<Image>, Arc<Image>)> {
    let mut images = vec![None; from.0.points.len()];
    let a = open_point_sharing(from.0, from.1, cache, &mut images)?;
    let of_one = from.0.path == to.0.path;
    if !of_one {
        images = vec![None; to.0.points.len()];
    }
    let b = open_point_sharing(to.0, to.1, cache, &mut images)?;
    if !of_one && a.size() != b.size() {
        let what = format!(
            "{} has {} bytes and {} has {}: two disks can be compared only if they have the same size",
            path_text(&from.0.path),
            a.size(),
            path_text(&to.0.path),
            b.size()
        );
        return Err(Error::new(Kind::Usage, what));
    }
    Ok((a, b))
}

/// A point, for JSON.
pub(super) fn point_json((disk, point): Which<'_>) -> serde_json::Value {
    let p = disk.points.get(point);
    json!({
        "disk": to_text(disk.path.as_os_str()),
        "point": p.map(|p| p.name.clone()),
        "time": p.map(|p| iso_time(p.time)),
        "size": p.map(|p| p.size),
    })
}

/// A point, for people.
pub(super) fn point_text((disk, point): Which<'_>) -> String {
    let name = path_text(&disk.point_path(point));
    match disk.points.get(point) {
        Some(p) => format!("{name} ({})", iso_time(p.time)),
        None => name,
    }
}
