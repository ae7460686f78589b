//! FUSE: the only module that names `fuser`.
//!
//! `adapter` has a small method per operation, which calls [`FileSystem`] and replies (`reply`), `negotiate` what
//! is asked of the kernel; this file
//! mounts, waits for the end, and tells the kernel what to forget ([`Notify`]). It does so from a
//! thread that serves no requests, because the kernel may wait for a request while it handles that.

mod adapter;
mod negotiate;
mod reply;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, Session, SessionACL};

use crate::error::{Error, Kind, Result};
use crate::fs::FileSystem;
use crate::fs::tree::Changes;
use adapter::Adapter;
pub use negotiate::negotiate;

/// Who may use the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only the user who mounts.
    Owner,
    /// That user and root.
    Root,
    /// Everybody whom the permission bits let.
    Everybody,
}

/// How to mount.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who may use it.
    pub access: Access,
    /// Threads that read from storage at the same time, at least 1. There is another, for names.
    pub threads: usize,
    /// What `mount` shows as the source.
    pub source: String,
    /// Whether something can be written to.
    pub writable: bool,
}

/// A mounted file system. It ends when it is unmounted.
pub struct Mounted {
    session: BackgroundSession,
}

/// Tells the kernel what to forget.
pub struct Notify(Notifier);

/// The largest read that the kernel sends. It splits a longer one and sends the parts side by side,
/// so that several threads serve it: a direct read of 1 MiB takes two thirds of the time on two
/// processors. Smaller parts lose more by their number than they gain.
const MAX_READ: u32 = 256 << 10;

/// Mounts `fs` at `mountpoint` and serves it in background threads.
///
/// # Errors
/// The kernel or fusermount refuses.
pub fn mount(fs: Arc<FileSystem>, mountpoint: &Path, options: &Options) -> Result<Mounted> {
    let failed = |e: io::Error| mount_error(e, mountpoint);
    let adapter = Adapter::new(fs, options.threads);
    let session = Session::new(adapter, mountpoint, &config(options)).map_err(failed)?;
    Ok(Mounted { session: session.spawn().map_err(failed)? })
}

/// Where the kernel's side of a mount is opened.
const DEVICE: &str = "/dev/fuse";

/// Opens the device that [`attach`] and [`serve`] share, in one process or two.
///
/// # Errors
/// What the operating system said.
pub fn open_device() -> Result<File> {
    crate::folder::system::device(Path::new(DEVICE)).map_err(|e| mount_error(e, Path::new(DEVICE)))
}

/// Mounts at `mountpoint`, by the mount system call and so for root only, what somebody serves
/// through `device`. `shown` is the mount point's name in messages.
///
/// # Errors
/// The kernel refuses.
pub fn attach(device: &File, mountpoint: &Path, shown: &Path, options: &Options) -> Result<()> {
    let text =
        |bytes: &[u8]| CString::new(bytes).map_err(|e| mount_error(io::Error::other(e), shown));
    let (fd, ids) = (device.as_raw_fd(), (rustix::process::getuid(), rustix::process::getgid()));
    let others = if options.access == Access::Owner { "" } else { ",allow_other" };
    let (uid, gid) = (ids.0.as_raw(), ids.1.as_raw());
    let data = text(
        format!(
            "fd={fd},rootmode={:o},user_id={uid},group_id={gid},default_permissions,\
             max_read={MAX_READ}{others}",
            libc::S_IFDIR
        )
        .as_bytes(),
    )?;
    let (source, target) =
        (text(options.source.as_bytes())?, text(mountpoint.as_os_str().as_bytes())?);
    let read_only = if options.writable { 0 } else { libc::MS_RDONLY };
    let flags = read_only | libc::MS_NODEV | libc::MS_NOSUID | libc::MS_NOATIME;
    // SAFETY: C strings that live through the call.
    let done = unsafe {
        let kind = c"fuse.fleecefs".as_ptr();
        libc::mount(source.as_ptr(), target.as_ptr(), kind, flags, data.as_ptr().cast())
    };
    match done {
        0 => Ok(()),
        _ => Err(mount_error(io::Error::last_os_error(), shown)),
    }
}

/// Serves `fs` through a device that is mounted by [`attach`].
///
/// # Errors
/// The kernel speaks another protocol; no threads.
pub fn serve(fs: Arc<FileSystem>, device: File, options: &Options) -> Result<Mounted> {
    let failed = |e: io::Error| Error::io(e, "cannot serve the mount");
    let mut config = config(options);
    // Each thread opens the device for itself, if this user may.
    config.clone_fd = crate::folder::system::device(Path::new(DEVICE)).is_ok();
    let acl = match options.access {
        // The kernel has its own check of that, and this process may be somebody else's by now.
        Access::Owner => SessionACL::All,
        _ => config.acl,
    };
    let session =
        Session::from_fd(Adapter::new(fs, options.threads), OwnedFd::from(device), acl, config);
    let session = session.map_err(failed)?;
    Ok(Mounted { session: session.spawn().map_err(failed)? })
}

/// How many threads read from storage if the user does not say: more than the processors of a small
/// machine, since the file system under the backups may be slow.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(4, |n| n.get()).clamp(4, 8)
}

/// The settings of fuser for a mount.
pub fn config(options: &Options) -> Config {
    let mut config = Config::default();
    // Only the direct way of mounting takes the name as it is; fusermount splits at commas.
    let escaped = options.source.replace('\\', "\\\\").replace(',', "\\,");
    // SAFETY: geteuid cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    config.mount_options = vec![
        MountOption::FSName(if root { options.source.clone() } else { escaped }),
        // Not `Subtype`, which the direct way of mounting drops.
        MountOption::CUSTOM("subtype=fleecefs".into()),
        MountOption::DefaultPermissions,
        if options.writable { MountOption::RW } else { MountOption::RO },
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
        MountOption::CUSTOM(format!("max_read={MAX_READ}")),
    ];
    config.acl = match options.access {
        Access::Owner => SessionACL::Owner,
        Access::Root => SessionACL::RootAndOwner,
        Access::Everybody => SessionACL::All,
    };
    // And one that is left when the storage does not answer.
    config.n_threads = Some(options.threads.max(1).saturating_add(1));
    config.clone_fd = true;
    config
}

fn mount_error(e: io::Error, mountpoint: &Path) -> Error {
    let code = e.raw_os_error();
    // Without a code it is what fusermount3 said, which refuses a user.
    let is_user = !rustix::process::geteuid().is_root();
    let error = match code {
        None if is_user => {
            Error::new(Kind::Permission, format!("cannot mount here: {}", e.to_string().trim()))
        }
        _ => Error::io(e, "cannot mount here"),
    };
    let text = error.to_string();
    let error = error.at_path(mountpoint);
    let has_device = crate::folder::look(Path::new(DEVICE)).is_ok();
    match code {
        Some(libc::EACCES | libc::EPERM) => error.remedy(device_remedy()),
        Some(libc::ENOENT) if has_device => {
            error.remedy("install fusermount3 (package fuse3), or mount as root")
        }
        Some(libc::ENOENT | libc::ENODEV) => {
            error.remedy("is the fuse module loaded, and is there a /dev/fuse?")
        }
        None if text.contains("no write access") || text.contains("not owned by user") => {
            error.remedy("users can only mount on folders they own; or mount as root")
        }
        None if text.contains("Operation not permitted") => error.remedy(
            "fusermount3 has no root rights: is it setuid root (ls -l, package fuse3), and does \
             no_new_privs of a unit or container prevent it? Or mount as root",
        ),
        _ => error,
    }
}

/// What an ordinary user, or a root of a container, lacks.
fn device_remedy() -> String {
    use std::os::unix::fs::MetadataExt;
    let device = Path::new(DEVICE);
    let opened = crate::folder::system::device(device);
    match (opened, crate::folder::look(device)) {
        (Err(e), Ok(meta)) => format!(
            "this user may not open {DEVICE} (mode {:04o} of user {}: {e}): as root 'chmod 0666 \
             {DEVICE}', as udev has it (it lets nobody mount what he may not), or mount as root",
            meta.mode() & 0o7777,
            meta.uid(),
        ),
        _ => "users need fusermount3 (package fuse3) and access to /dev/fuse".into(),
    }
}

impl Mounted {
    /// What tells the kernel about changes.
    pub fn notifier(&self) -> Notify {
        Notify(self.session.notifier())
    }

    /// Waits until it is unmounted.
    ///
    /// # Errors
    /// The connection to the kernel broke in an unforeseen way.
    pub fn wait(self) -> Result<()> {
        let guard: JoinHandle<io::Result<()>> = self.session.guard;
        match guard.join() {
            Ok(ended) => ended.map_err(|e| Error::io(e, "serving the mount failed")),
            Err(_) => Err(Error::new(
                Kind::Io,
                "internal error: a thread that served the mount \
                                                panicked",
            )),
        }
    }
}

impl Notify {
    /// Tells the kernel. What it does not know it cannot forget: such errors mean nothing.
    pub fn tell(&self, changes: &Changes) {
        for ino in &changes.inodes {
            let _ = self.0.inval_inode(INodeNo(*ino), 0, 0);
        }
        for (parent, name) in &changes.entries {
            let _ = self.0.inval_entry(INodeNo(*parent), name);
        }
    }
}
