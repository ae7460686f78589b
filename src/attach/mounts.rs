//! Mounting a file system of a guest: each kind by its own name, never by guessing, with options that keep it from
//! the host: no devices, no set-uid, no programs, nothing that it says of errors.

use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::device;
use super::tools::{EXFAT_FUSE, NTFS_3G, Tool};
use crate::error::{Error, Kind, Result};
use crate::files::{Content, kernel_hazard};
use crate::folder::{self, Folder};
use crate::mount::table::{self, Mount};
use crate::text::path_text;

/// How long the kernel may hold a file of the private mount.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How often something may be mounted between a look and the removal of the folder.
const TRIES: usize = 16;

/// What may be done to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mode {
    /// Its journal may be replayed: it can be written.
    pub replay: bool,
    /// It is mounted for writing.
    pub write: bool,
}

/// How a file system is mounted.
struct How {
    /// The kernel's name.
    kind: &'static str,
    options: String,
    /// A program that does it, and whether that comes before the kernel.
    program: Option<(Tool, bool)>,
}

fn how(content: &Content, mode: Mode) -> Option<How> {
    let unless = |options: &str, without: &str| match mode.replay {
        true => options.to_string(),
        false => format!("{options},{without}"),
    };
    let kernel = |kind, options: String| Some(How { kind, options, program: None });
    match content {
        // What the superblock says about errors may be to halt the machine.
        Content::Ext => kernel("ext4", unless("errors=remount-ro", "noload")),
        Content::Xfs => kernel("xfs", unless("nouuid", "norecovery")),
        // Without replay it is not mounted: see `check`.
        Content::Btrfs => kernel("btrfs", String::new()),
        Content::Fat => kernel("vfat", "utf8,umask=0077".into()),
        Content::Exfat => Some(How {
            program: Some((EXFAT_FUSE, false)),
            ..kernel("exfat", "umask=0077".into())?
        }),
        // A program has no rights in the kernel that a disk could take over.
        Content::Ntfs => {
            Some(How { program: Some((NTFS_3G, true)), ..kernel("ntfs3", "umask=0077".into())? })
        }
        Content::LvmPv | Content::Other { .. } | Content::Unknown => None,
    }
}

/// Fails where a file system must not be mounted: what it says would reach what is not its own.
///
/// # Errors
/// `Unsupported` with the reason and what to do; it cannot be read.
pub(super) fn check(content: &Content, device: &Path, mode: Mode) -> Result<()> {
    if let Some(hazard) = kernel_hazard(content, &device::open_source(device)?)? {
        return Err(hazard);
    }
    if *content == Content::Btrfs && !mode.replay {
        let what = "a btrfs gets an id of its own only where something may be written, and the kernel takes a copy with \
                    the same id for its original, mounted or not";
        return Err(Error::new(Kind::Unsupported, what)
            .at_path(device)
            .remedy("leave --no-replay away; 'fleecefs files' reads it without its log"));
    }
    Ok(())
}

/// Mounts `device` at the folder `at`, which is empty and ours.
///
/// # Errors
/// `Unsupported` if neither the kernel nor a program can; `Corrupt` or `Io` with what it said.
pub(super) fn mount(content: &Content, device: &Path, at: &Path, mode: Mode) -> Result<()> {
    let Some(how) = how(content, mode) else {
        let what = format!("{} is not mounted", content.name());
        return Err(Error::new(Kind::Unsupported, what).at_path(device));
    };
    let program = how.program.filter(|(tool, _)| tool.is_installed());
    if let Some((tool, true)) = program {
        return by_program(tool, device, at, mode);
    }
    match (by_kernel(&how, device, at, mode), program) {
        (Err(e), Some((tool, _))) if e.raw_os_error() == Some(libc::ENODEV) => {
            by_program(tool, device, at, mode)
        }
        (Err(e), None) if e.raw_os_error() == Some(libc::ENODEV) => {
            let what = format!("this kernel does not know {}", how.kind);
            let remedy = match how.program {
                Some((tool, _)) => format!("install {} (Debian: {})", tool.name, tool.package),
                None => format!("'modprobe {}'; 'fleecefs files' reads it without", how.kind),
            };
            Err(Error::new(Kind::Unsupported, what).at_path(device).remedy(remedy))
        }
        (done, _) => done.map_err(|e| {
            Error::io(e, format!("cannot mount this {}", content.name())).at_path(device).remedy(
                "the kernel's log says why (dmesg); 'fleecefs files' may read it all the same",
            )
        }),
    }
}

fn by_kernel(how: &How, device: &Path, at: &Path, mode: Mode) -> io::Result<()> {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(|_| io::ErrorKind::InvalidFilename);
    let folder = Folder::open(at)?;
    let source = text(device.as_os_str().as_bytes())?;
    let target = text(folder.proc_path().as_os_str().as_bytes())?;
    let (kind, options) = (text(how.kind.as_bytes())?, text(how.options.as_bytes())?);
    let write = if mode.write { 0 } else { libc::MS_RDONLY };
    let flags = write | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME;
    // SAFETY: C strings that live through the call.
    let done = unsafe {
        let options = options.as_ptr().cast();
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn by_program(tool: Tool, device: &Path, at: &Path, mode: Mode) -> Result<()> {
    let mut args: Vec<OsString> = vec!["-o".into()];
    let access = if mode.write { "rw" } else { "ro" };
    args.push(format!("{access},nosuid,nodev,noexec,noatime,umask=0077").into());
    args.extend([device.into(), at.into()]);
    tool.run(&args).map(drop).map_err(|e| e.at_path(device))
}

/// Where a mount of ours is from.
#[derive(Debug, Clone, Copy)]
pub(super) enum From<'a> {
    /// A device of ours.
    Device(&'a Path),
    /// A mount of backups.
    Fleecefs,
    /// Its device is somebody else's by now: whatever is mounted there is not ours.
    Nobody,
}

/// Takes away what is mounted by us at the folder `at`, and the folder.
/// Whoever was at work when the attachment was interrupted may mount it now; then it is taken away again.
///
/// # Errors
/// `Busy` if it is in use, or something else is mounted there.
pub(super) fn undo(at: &Path, from: From<'_>) -> Result<()> {
    for _ in 0..TRIES {
        while let Some(mount) = table::find(at)? {
            let ours = match from {
                From::Device(device) => is_from(&mount, device),
                From::Fleecefs => mount.is_fleecefs(),
                From::Nobody => false,
            };
            if !ours {
                let what = format!("{} is mounted over it", mount.source);
                return Err(Error::new(Kind::Busy, what).at_path(at).remedy("unmount that first"));
            }
            match from {
                From::Fleecefs => end_private(at),
                _ => table::unmount(at, false),
            }
            .map_err(|e| in_use(at, e))?;
        }
        let gone = Folder::of(at).and_then(|(above, name)| above.remove_folder(name));
        match gone {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                log::warn!("{}: not removed: somebody has put files there", path_text(at));
                return Ok(());
            }
            other => {
                return folder::absent_is_none(other)
                    .map(drop)
                    .map_err(|e| Error::io(e, "cannot remove the folder").at_path(at));
            }
        }
    }
    Err(Error::new(Kind::Busy, "it is mounted again and again").at_path(at))
}

/// What is in use is not detached: there is no way around ending its use.
fn in_use(at: &Path, e: Error) -> Error {
    match e.kind() {
        Kind::Busy => Error::new(Kind::Busy, e.message())
            .at_path(at)
            .remedy("close what is open there ('fuser -vm' shows it), and detach again"),
        _ => e,
    }
}

/// Unmounts the private mount. Nobody but the kernel is at work in there: where udev was the last to close a loop
/// device, its file may be closed a little later than the device says so.
fn end_private(at: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match crate::mount::umount(at, false) {
            Err(e) if e.kind() == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(LOOK);
            }
            done => return done,
        }
    }
}

/// Whether a mount is of `device`. (Its source is text: bytes that are no UTF-8 are in no names that we make.)
fn is_from(mount: &Mount, device: &Path) -> bool {
    mount.source == device.to_string_lossy()
}

/// Whether the file system that is mounted at `at` is from `device`.
pub(super) fn is_mounted(at: &Path, device: &Path) -> bool {
    table::find(at).ok().flatten().is_some_and(|m| is_from(&m, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_replay_each_is_told_so_and_none_halts_the_machine() {
        let options = |content: &Content, replay| {
            how(content, Mode { replay, write: false }).map(|h| h.options).unwrap()
        };
        assert_eq!(options(&Content::Ext, true), "errors=remount-ro");
        assert_eq!(options(&Content::Ext, false), "errors=remount-ro,noload");
        assert_eq!(options(&Content::Xfs, false), "nouuid,norecovery");
        assert_eq!(options(&Content::Btrfs, true), "");
        for none in [Content::LvmPv, Content::Unknown] {
            assert!(how(&none, Mode { replay: true, write: false }).is_none());
        }
    }

    #[test]
    fn a_folder_goes_and_one_with_files_stays() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (gone, stays) = (top.join("gone"), top.join("stays"));
        std::fs::create_dir(&gone).unwrap();
        std::fs::create_dir(&stays).unwrap();
        std::fs::write(stays.join("file"), "").unwrap();
        for at in [&gone, &stays, &gone] {
            undo(at, From::Device(Path::new("/dev/loop0"))).unwrap();
        }
        assert!(!gone.exists() && stays.exists());
    }
}
