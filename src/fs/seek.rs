//! `lseek` for data and holes.

use super::{Errno, FileSystem, OpenFile};
use crate::error::Error;
use crate::image::{Image, RangeKind};

/// Stretches of a file inside a point, or of an overlay, that are looked at by a thread that serves requests.
const NEAR: usize = 256;

impl FileSystem {
    /// `lseek` for `SEEK_DATA` and `SEEK_HOLE`.
    ///
    /// # Errors
    /// ENXIO past the end or where no data follows, EINVAL for another `whence`, EIO.
    pub fn seek(&self, handle: u64, offset: i64, whence: i32) -> Result<i64, Errno> {
        let far = |image: &Image, offset, wanted| match wanted {
            RangeKind::Data => Ok(image.seek_data(offset)?.unwrap_or(image.size())),
            RangeKind::Hole => image.seek_hole(offset),
        };
        let found =
            self.seek_by(handle, offset, whence, usize::MAX, |i, o, w| far(i, o, w).map(Some));
        found?.ok_or(libc::EIO)
    }

    /// The same where the answer is near; `None` if finding it may take seconds.
    ///
    /// # Errors
    /// See [`Self::seek`].
    pub fn seek_near(&self, handle: u64, offset: i64, whence: i32) -> Result<Option<i64>, Errno> {
        self.seek_by(handle, offset, whence, NEAR, Image::seek_near)
    }

    /// `find` gives the size where there is no such byte. Of a file inside a point, and of
    /// an overlay, `most` stretches are looked at.
    fn seek_by(
        &self,
        handle: u64,
        offset: i64,
        whence: i32,
        most: usize,
        find: impl Fn(&Image, u64, RangeKind) -> Result<Option<u64>, Error>,
    ) -> Result<Option<i64>, Errno> {
        let open = self.files.get(handle).ok_or(libc::EBADF)?;
        let open = open.as_deref().ok_or(libc::EBADF)?;
        let offset = u64::try_from(offset).map_err(|_| libc::ENXIO)?;
        let size = match open {
            OpenFile::Point(open) => open.file.image.size(),
            OpenFile::Status(text) => text.len() as u64,
            OpenFile::Inside(file) => file.size(),
        };
        if offset >= size {
            return Err(libc::ENXIO);
        }
        let wanted = match whence {
            libc::SEEK_DATA => RangeKind::Data,
            libc::SEEK_HOLE => RangeKind::Hole,
            _ => return Err(libc::EINVAL),
        };
        let found = match (open, wanted) {
            (OpenFile::Point(open), _) => {
                let below = |at| find(&open.file.image, at, wanted);
                open.seek((offset, size), wanted, most, below)
                    .map_err(|e| self.failed_point(open, &e))?
            }
            (OpenFile::Inside(file), _) => {
                file.seek(offset, wanted, most).map_err(|e| self.inside_failed(file.point(), &e))?
            }
            (OpenFile::Status(_), RangeKind::Data) => Some(offset),
            (OpenFile::Status(_), RangeKind::Hole) => Some(size),
        };
        match found {
            Some(at) if at >= size && wanted == RangeKind::Data => Err(libc::ENXIO),
            Some(at) => i64::try_from(at).map(Some).map_err(|_| libc::EOVERFLOW),
            None => Ok(None),
        }
    }
}
