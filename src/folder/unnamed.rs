//! Files that are held open: made without a name, opened once more, compared with a name.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::open::refused;
use super::{Access, FileId, Folder, absent_is_none, open, plain};

/// Connections that wait to be taken, as the standard library has it.
const BACKLOG: i32 = 128;

impl Folder {
    /// A new empty file, mode 0600, that has no name and can never get one: it is gone with its last
    /// descriptor. `None` where the file system has no such files.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn create_unnamed(&self) -> io::Result<Option<File>> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::openat(self.as_fd(), ".", flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT | Errno::NOSYS) => {
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Whether `name` stands for this very file.
    ///
    /// # Errors
    /// What the operating system said; that there is no such name is no error.
    pub fn is_same(&self, name: impl AsRef<OsStr>, file: &File) -> io::Result<bool> {
        let there = absent_is_none(self.look(name))?;
        Ok(there.map(|m| FileId::of(&m)) == Some(FileId::of(&file.metadata()?)))
    }

    /// Listens on a new socket `name`, mode 0600.
    ///
    /// # Errors
    /// What the operating system said, `AddrInUse` if the name is there.
    pub fn listen(&self, name: impl AsRef<OsStr>) -> io::Result<UnixListener> {
        let name = plain(name.as_ref())?;
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
        // The name gets the mode that the socket has, so that nothing is done to what the name stands for later.
        let private = rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR);
        // By the folder's descriptor: a socket's address has 108 bytes.
        net::bind(&socket, &SocketAddrUnix::new(self.proc_path().join(name))?)?;
        if let Err(e) = private
            && self.look(name)?.mode() & 0o022 != 0
        {
            // Others could connect.
            return Err(e.into());
        }
        net::listen(&socket, BACKLOG)?;
        Ok(socket.into())
    }
}

/// Opens a file that is open already once more, whatever has become of its name: a description of
/// its own, with a position and flags of its own.
///
/// # Errors
/// What the operating system said (`NotFound` without /proc).
pub fn reopen(file: &File, access: Access) -> io::Result<File> {
    let again = open::through_proc(file, access)?;
    if FileId::of(&again.metadata()?) != FileId::of(&file.metadata()?) {
        return Err(refused("another file has taken its place"));
    }
    // Whoever gets it need not know how it was opened; io_uring would fail instead of waiting.
    let flags = rustix::fs::fcntl_getfl(&again)?;
    rustix::fs::fcntl_setfl(&again, flags - OFlags::NONBLOCK)?;
    Ok(again)
}
