//! The options of `fleecefs mount`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::privileges::users;
use crate::units;
use crate::units::parse_bytes;

/// Mount a backup directory: every point of every disk becomes a raw image
///
/// MOUNTPOINT has a folder per disk, and in it a file per point, named after the backup file with .raw
/// appended. latest.raw is a link to the newest, by-time/ has a link per point by its time (UTC), in
/// order. With --files, the folder .files beside each .raw has the files of that point.
/// .fleecefs/status.json tells what was found. New backups appear without remounting. Everything is
/// read-only, but for points with --writable; the backup itself is never written to.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "\
Examples:
  fleecefs mount /backups/vm1 /mnt/vm1
  qemu-img convert /mnt/vm1/sda/latest.raw restored.qcow2
  losetup -r -P --show -f /mnt/vm1/sda/latest.raw
  fleecefs umount /mnt/vm1

Boot a test VM from a point, or repair a file system; changes are thrown away:
  fleecefs mount --writable /backups/vm1 /mnt/vm1
  qemu-system-x86_64 ... -drive file=/mnt/vm1/sda/latest.raw,format=raw
Keep them, and go on another day:
  fleecefs mount --writable=/var/tmp/vm1-scratch --keep /backups/vm1 /mnt/vm1
  fleecefs scratch list /var/tmp/vm1-scratch

In /etc/fstab:
  /backups /mnt/points fuse.fleecefs nofail,allow_other,mode=0440,gid=backup 0 0")]
pub(crate) struct MountArgs {
    /// The backup directory
    #[arg(value_name = "DIR")]
    pub backups: PathBuf,

    /// An existing directory to mount at
    pub mountpoint: PathBuf,

    /// Also show the files in each point: POINT.files has a folder per partition or volume, as 'files ls' names
    /// them ('disk' where there is no partition table)
    #[arg(long)]
    pub files: bool,

    /// With --files: all files inside points belong to the owner of the mount, who may read them all [default:
    /// owners, permissions and access lists as in the guest]
    #[arg(long)]
    pub squash: bool,

    /// Let points be written to. What is written goes to files in SCRATCH_DIR [default: unnamed files in TMPDIR or
    /// /var/tmp] and is gone when it is unmounted; the backup stays as it is
    ///
    /// A point has one size: it cannot be truncated or extended. Discards (punched holes) give their space back. fsync
    /// writes to disk. The folder must be yours or root's, and outside the backup directory. With --as-owner it is
    /// SCRATCH_DIR.as-UID. The folders of --files show the points as they were backed up.
    #[arg(long, value_name = "SCRATCH_DIR", num_args = 0..=1, require_equals = true)]
    pub writable: Option<Option<PathBuf>>,

    /// With --writable: all that is written may take so much, then there is no space left [default: what is free in
    /// the scratch folder, less a twentieth or 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub scratch_size: Option<u64>,

    /// With --writable=SCRATCH_DIR: keep what was written when it is unmounted; the next mount with this folder and
    /// --keep goes on with it ('fleecefs scratch' lists, exports and drops it)
    #[arg(long)]
    pub keep: bool,

    /// Stay in the foreground and log to standard error, or to --log-file
    #[arg(short, long)]
    pub foreground: bool,

    /// Let other users in, as owner, group and mode of the files allow (see --mode)
    #[arg(long, conflicts_with = "allow_root")]
    pub allow_other: bool,

    /// Let root in too
    #[arg(long)]
    pub allow_root: bool,

    /// Owner of all files, by name or number [default: the user who mounts]
    #[arg(long, value_name = "UID", value_parser = users::user)]
    pub uid: Option<u32>,

    /// Group of all files, by name or number [default: that of the user who mounts]
    #[arg(long, value_name = "GID", value_parser = users::group)]
    pub gid: Option<u32>,

    /// Permission bits of the files, octal; folders get x where files have r [default: 0400; with --writable 0600].
    /// With --writable, w is for points, and without any w their owner may write
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub mode: Option<u16>,

    /// Memory for extent maps and decompressed clusters [default: 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub cache_size: Option<u64>,

    /// Number of threads that serve requests [default: one per processor, 4 to 8]
    #[arg(long, alias = "workers", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    pub threads: Option<u16>,

    /// Unmount after this time without use (90, 90s, 15m, 2h) [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub idle_timeout: Option<Duration>,

    /// Also look for new points at this interval [default: 10s on network file systems, else
    /// only when the kernel reports a change]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub poll_interval: Option<Duration>,

    /// Log to this file [default: the system log; with --foreground standard error]
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// The same options in the form of mount(8) and /etc/fstab: allow_other,uid=1000,cache_size=1G
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
}

/// `0440`, `440`: permission bits. What can never be done in a mount is refused.
pub(super) fn parse_mode(text: &str) -> std::result::Result<u16, String> {
    let mode = u16::from_str_radix(text, 8).map_err(|_| format!("'{text}' is not octal"))?;
    if mode & !0o666 != 0 {
        return Err(format!("'{text}' has bits other than r and w"));
    }
    Ok(mode)
}

/// `90`, `90s`, `15m`, `2h`: as everywhere, and a number alone is seconds.
pub(super) fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time; write 90, 90s, 15m or 2h");
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let seconds = match is_number {
        true => text.parse().map_err(|_| wrong())?,
        false => units::parse_duration(text).map_err(|_| wrong())?,
    };
    // A hundred years; more makes no sense to any clock.
    let sensible = Some(seconds).filter(|s| (1..=3_155_760_000).contains(s));
    sensible.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_times_read_as_written() {
        assert_eq!(parse_mode("0440"), Ok(0o440));
        assert_eq!(parse_mode("0660"), Ok(0o660));
        assert!(parse_mode("0750").is_err() && parse_mode("rw").is_err());
        assert_eq!(parse_duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(parse_duration("1d"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        for bad in ["", "0", "1x", "m", "99999999999999999999", "9999999999999999h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
