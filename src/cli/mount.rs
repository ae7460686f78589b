//! `fleecefs mount`.
//!
//! The order matters: the background process is forked before any thread exists, watches are set
//! before the directory is read (so that no change falls between), and the command returns only
//! after the mount has answered a first request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::logging::{self, Sink};
use super::mountinfo::Mount;
use super::privileges::{self, Owner};
use super::{daemon, mountinfo, options, paths, serve, users};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::fuse::{self, Access};
use crate::text::path_text;
use crate::units::parse_bytes;

/// Mount a backup directory: every point of every disk becomes a raw image
///
/// Below MOUNTPOINT there is a folder per disk, and in it a file per point in time, named after the
/// backup file with .raw appended; latest.raw leads to the newest, by-time/ to each by its date.
/// .fleecefs/status.json tells what was found. Everything is read-only. New backups appear
/// without remounting.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "\
Examples:
  fleecefs mount /backups/vm1 /mnt/vm1
  qemu-img convert /mnt/vm1/sda/latest.raw restored.qcow2
  losetup -r -P --show -f /mnt/vm1/sda/latest.raw
  fleecefs umount /mnt/vm1

In /etc/fstab:
  /backups/vm1  /mnt/vm1  fuse.fleecefs  noauto,x-systemd.requires-mounts-for=/backups/vm1,allow_other,mode=0440,gid=backup  0 0")]
pub struct MountArgs {
    /// The backup directory
    pub backups: PathBuf,

    /// An existing directory to mount at
    pub mountpoint: PathBuf,

    /// Stay in the foreground and log to standard error, or to --log-file
    #[arg(short, long)]
    pub foreground: bool,

    /// Let other users in, as far as owner, group and mode of the files allow (see --mode)
    #[arg(long, conflicts_with = "allow_root")]
    pub allow_other: bool,

    /// Let root in, too
    #[arg(long)]
    pub allow_root: bool,

    /// Owner of all files, by name or number [default: the user who mounts]
    #[arg(long, value_name = "UID", value_parser = users::user)]
    pub uid: Option<u32>,

    /// Group of all files, by name or number [default: that of the user who mounts]
    #[arg(long, value_name = "GID", value_parser = users::group)]
    pub gid: Option<u32>,

    /// Permission bits of the files, octal; folders get x where files have r [default: 0400]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub mode: Option<u16>,

    /// Memory for folded maps and decompressed clusters [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub cache_size: Option<u64>,

    /// Threads that serve requests [default: one per processor, 4 to 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub threads: Option<u16>,

    /// Unmount after this time without use (90, 90s, 15m, 2h) [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub idle_timeout: Option<Duration>,

    /// Also look for new points at this interval [default: 10s on network file systems, else
    /// only when the kernel reports a change]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub poll_interval: Option<Duration>,

    /// Where to log [default: the system log, in the foreground standard error]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// The same options as mount(8) and /etc/fstab write them: allow_other,uid=1000,cache_size=1G
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
}

/// Dead mounts on top of each other that are taken away.
const MOST_DEAD: usize = 16;
/// More than any `/etc/fuse.conf` has, in bytes.
const FUSE_CONF_MAX: u64 = 1 << 20;

/// Everything that was checked and decided before mounting.
pub struct Plan {
    /// The backup directory, without links.
    pub backups: PathBuf,
    /// The same as the user calls it, absolute.
    pub called: PathBuf,
    /// The mount point, without links.
    pub mountpoint: PathBuf,
    /// Who may use it.
    pub access: Access,
    /// Owner and mode of the files.
    pub owner: crate::fs::attr::Owner,
    /// Bytes of cache.
    pub cache_size: u64,
    /// Serving threads.
    pub threads: usize,
    /// Unmount after so long without use.
    pub idle_timeout: Option<Duration>,
    /// Polling interval, if the user wants one.
    pub poll_interval: Option<Duration>,
    /// Who serves it, if that is not the user who mounts.
    pub as_owner: Option<Owner>,
}

/// Runs `fleecefs mount`; with `as_owner`, the directory's owner serves it.
///
/// # Errors
/// As the exit codes say.
pub fn mount(mut args: MountArgs, as_owner: bool) -> Result<()> {
    for list in std::mem::take(&mut args.options) {
        options::apply(&mut args, &list)?;
    }
    let mut plan = plan(&args)?;
    if as_owner {
        plan.as_owner = Owner::of(&plan.backups)?;
    }
    let log = args.log_file.as_deref().map(paths::log_file).transpose()?;
    if args.foreground {
        if let Some(file) = log {
            logging::redirect(Sink::File(file));
        }
        return match serve::serve(&plan, daemon::Ready::Foreground)? {
            0 => Ok(()),
            code => std::process::exit(i32::from(code)),
        };
    }
    daemon::background(log, |ready| serve::serve(&plan, ready))
}

fn plan(args: &MountArgs) -> Result<Plan> {
    let backups = directory(&args.backups, "the backup directory")?;
    // Looked up before anything asks the mount itself: its server may be dead.
    for _ in 0..MOST_DEAD {
        match mountinfo::at(&args.mountpoint)?.filter(Mount::is_fleecefs) {
            Some(mount) => take_over(&mount)?,
            None => break,
        }
    }
    let mountpoint = directory(&args.mountpoint, "the mount point")?;
    if let Some(mount) = mountinfo::find(&mountpoint)?.filter(Mount::is_fleecefs) {
        return Err(mounted_already(&mount));
    }
    check_apart(&backups, &mountpoint)?;
    let access = access(args)?;
    // SAFETY: these calls cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let owner = crate::fs::attr::Owner {
        uid: args.uid.unwrap_or(uid),
        gid: args.gid.unwrap_or(gid),
        mode: args.mode.unwrap_or(0o400),
    };
    if access == Access::Everybody && args.mode.is_none() && args.uid.is_none() {
        log::warn!("--allow-other without --mode: only the owner and root may read the files");
    }
    let called = std::path::absolute(&args.backups)
        .map_err(|e| Error::io(e, "cannot use the backup directory").at_path(&args.backups))?;
    Ok(Plan {
        backups,
        called,
        mountpoint,
        access,
        owner,
        cache_size: args.cache_size.unwrap_or(64 << 20),
        threads: args.threads.map_or_else(fuse::default_threads, usize::from),
        idle_timeout: args.idle_timeout,
        poll_interval: args.poll_interval,
        as_owner: None,
    })
}

/// Takes away a mount whose server was killed. Whoever still has a file of it open keeps that, dead.
fn take_over(mount: &Mount) -> Result<()> {
    if folder::ask(&mount.path).err().and_then(|e| e.raw_os_error()) != Some(libc::ENOTCONN) {
        return Err(mounted_already(mount));
    }
    let path = path_text(&mount.path);
    mount.end(true).map_err(|e| {
        let text = format!("a dead mount of {} is in the way: {}", mount.source, e.report());
        Error::new(Kind::Busy, text)
            .at_path(&mount.path)
            .remedy(format!("'fleecefs umount --lazy {path}' as its owner or root first"))
    })?;
    log::warn!(
        "{path}: took the place of a dead mount of {}, whose process was killed",
        mount.source
    );
    Ok(())
}

fn mounted_already(mount: &Mount) -> Error {
    let text = format!("{} is mounted here already", mount.source);
    let remedy = format!("'fleecefs umount {}' first", path_text(&mount.path));
    Error::new(Kind::Busy, text).at_path(&mount.path).remedy(remedy)
}

fn directory(path: &Path, what: &str) -> Result<PathBuf> {
    paths::existing_folder(path, what).map_err(|e| match e.os_code() {
        Some(libc::ENOTCONN) => e.remedy("a dead mount is in the way; unmount it first"),
        _ => e,
    })
}

/// The mount must not cover what it reads. Inside the backup directory it may lie; it is left out.
pub(super) fn check_apart(backups: &Path, mountpoint: &Path) -> Result<()> {
    if backups.starts_with(mountpoint) {
        let text = "mounting here would cover the backup directory";
        return Err(Error::new(Kind::Usage, text)
            .at_path(mountpoint)
            .remedy("choose an empty directory elsewhere"));
    }
    Ok(())
}

fn access(args: &MountArgs) -> Result<Access> {
    let access = match (args.allow_other, args.allow_root) {
        (true, true) => {
            return Err(super::usage("allow_other and allow_root exclude each other"));
        }
        (true, false) => Access::Everybody,
        (false, true) => Access::Root,
        (false, false) => return Ok(Access::Owner),
    };
    let config = Path::new("/etc/fuse.conf");
    // A link on some systems.
    let text = folder::resolve(config).and_then(|p| folder::read_small(&p, FUSE_CONF_MAX));
    let allowed = text.is_ok_and(|t| allows_others(&String::from_utf8_lossy(&t)));
    if !privileges::is_root() && !allowed {
        let text = "--allow-other and --allow-root need 'user_allow_other' there";
        return Err(Error::new(Kind::Permission, text)
            .at_path(config)
            .remedy("ask the administrator to add a line 'user_allow_other', or mount as root"));
    }
    Ok(access)
}

fn allows_others(config: &str) -> bool {
    config.lines().any(|l| l.trim() == "user_allow_other")
}

/// `0440`, `440`: permission bits. What could not be done on a read-only mount is refused.
pub(super) fn parse_mode(text: &str) -> std::result::Result<u16, String> {
    let mode = u16::from_str_radix(text, 8).map_err(|_| format!("'{text}' is not octal"))?;
    if mode & !0o444 != 0 {
        return Err(format!("'{text}' has bits other than r; the mount is read-only"));
    }
    Ok(mode)
}

/// `90`, `90s`, `15m`, `2h`.
pub(super) fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time; write 90, 90s, 15m or 2h");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let factor = match &text[digits..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    match number.checked_mul(factor) {
        // A hundred years; more makes no sense to any clock.
        Some(s) if (1..=3_155_760_000).contains(&s) => Ok(Duration::from_secs(s)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_times_read_as_written() {
        assert_eq!(parse_mode("0440"), Ok(0o440));
        assert!(parse_mode("0640").is_err() && parse_mode("rw").is_err());
        assert_eq!(parse_duration("15m"), Ok(Duration::from_secs(900)));
        for bad in ["", "0", "1d", "m", "99999999999999999999", "9999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_commented_line_allows_nothing() {
        assert!(allows_others("# x\nuser_allow_other\n"));
        assert!(!allows_others("#user_allow_other\n") && !allows_others(""));
    }

    #[test]
    fn a_mount_never_covers_its_backups() {
        let check = |a: &str, b: &str| check_apart(Path::new(a), Path::new(b)).is_ok();
        assert!(!check("/b", "/b") && !check("/m/b", "/m"));
        assert!(check("/b", "/b2") && check("/b", "/b/mnt"));
    }
}
