//! Options as mount(8) and fstab write them.

use super::args::{MountArgs, parse_duration, parse_mode};
use crate::cli::verbosity;
use crate::error::Result;
use crate::privileges::users;
use crate::units::parse_bytes;

/// Options of mount(8) and its friends that say nothing to us: what is always so here, and what
/// others act on.
const IGNORED: [&str; 38] = [
    "defaults",
    "ro",
    "rw",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "sync",
    "async",
    "dirsync",
    "silent",
    "loud",
    "nosymfollow",
    "default_permissions",
    "nonempty",
    "iversion",
    "noiversion",
];

/// Applies a comma-separated list.
///
/// # Errors
/// `Usage` for an unknown option, a value that makes no sense, or one that is missing.
pub(super) fn apply(args: &mut MountArgs, list: &str) -> Result<()> {
    let sloppy = list.split(',').any(|o| o == "sloppy");
    for option in list.split(',').map(str::trim).filter(|o| !o.is_empty()) {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        let key = key.replace('-', "_");
        if !set(args, &key, value)? && !is_ignored(&key) && !sloppy {
            return Err(verbosity::usage(format!("unknown mount option '{option}'"))
                .remedy("'fleecefs mount --help' lists them all"));
        }
    }
    Ok(())
}

fn is_ignored(key: &str) -> bool {
    const PREFIXES: [&str; 2] = ["x_", "X_"];
    const WITH_VALUE: [&str; 4] = ["comment", "fsname", "subtype", "sloppy"];
    IGNORED.contains(&key)
        || WITH_VALUE.contains(&key)
        || PREFIXES.iter().any(|p| key.starts_with(p))
}

/// Sets one option; false if there is none of that name.
fn set(args: &mut MountArgs, key: &str, value: Option<&str>) -> Result<bool> {
    let need = || {
        value
            .ok_or_else(|| verbosity::usage(format!("mount option '{key}' needs a value: {key}=…")))
    };
    let number = |text: &str| {
        text.parse().map_err(|_| verbosity::usage(format!("{key}={text}: not a number")))
    };
    let wrong = |e: String| verbosity::usage(format!("mount option '{key}': {e}"));
    match key {
        "allow_other" => args.allow_other = true,
        "allow_root" => args.allow_root = true,
        "files" => args.files = true,
        "squash" => args.squash = true,
        "writable" => args.writable = Some(value.map(Into::into)),
        "scratch_size" => args.scratch_size = Some(parse_bytes(need()?).map_err(wrong)?),
        "keep" => args.keep = true,
        "foreground" => args.foreground = true,
        "uid" => args.uid = Some(users::user(need()?).map_err(wrong)?),
        "gid" => args.gid = Some(users::group(need()?).map_err(wrong)?),
        "mode" => args.mode = Some(parse_mode(need()?).map_err(wrong)?),
        "cache_size" => args.cache_size = Some(parse_bytes(need()?).map_err(wrong)?),
        "threads" => args.threads = Some(threads(number(need()?)?)?),
        "idle_timeout" => args.idle_timeout = Some(parse_duration(need()?).map_err(wrong)?),
        "poll_interval" => args.poll_interval = Some(parse_duration(need()?).map_err(wrong)?),
        "log_file" => args.log_file = Some(need()?.into()),
        _ => return Ok(false),
    }
    Ok(true)
}

fn threads(n: u32) -> Result<u16> {
    match u16::try_from(n) {
        Ok(n @ 1..=128) => Ok(n),
        _ => Err(verbosity::usage("threads must be from 1 to 128")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn applied(list: &str) -> Result<MountArgs> {
        let mut args = MountArgs::default();
        apply(&mut args, list).map(|()| args)
    }

    #[test]
    fn fstab_lines_map_onto_the_same_options() {
        let list = "rw,noauto,nofail,_netdev,x-systemd.automount,allow_other,uid=7,mode=0444,\
            cache-size=1G,idle_timeout=5m,defaults";
        let args = applied(list).unwrap();
        assert!(args.allow_other && args.uid == Some(7) && args.mode == Some(0o444));
        assert_eq!(args.cache_size, Some(1 << 30));
    }

    #[test]
    fn unknown_options_and_bad_values_are_named() {
        for bad in ["frobnicate", "uid", "uid=x", "mode=9", "threads=0", "cache_size=1Q"] {
            let e = applied(bad).unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{bad}");
            assert!(e.message().contains(bad.split('=').next().unwrap()), "{}", e.message());
        }
        assert!(applied("frobnicate,sloppy").is_ok());
    }
}
