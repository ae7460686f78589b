//! Values of options that clap has no parser for.

use std::time::Duration;

use clap::ValueEnum;

use crate::backup::FullEvery;
use crate::folder::PlainName;

/// `DISK=NAME`.
pub(super) fn disk_name(text: &str) -> Result<(String, String), String> {
    match text.rsplit_once('=') {
        Some((disk, name)) if !disk.is_empty() && PlainName::new(name).is_ok() => {
            Ok((disk.into(), name.into()))
        }
        _ => Err(format!("{text:?} is not DISK=NAME with a name without '/'")),
    }
}

/// `10` points, or `7d`.
pub(super) fn every(text: &str) -> Result<FullEvery, String> {
    if let Ok(n) = text.parse::<u64>() {
        return if n > 0 { Ok(FullEvery::Points(n)) } else { Err("must be at least 1".into()) };
    }
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 86_400,
        Some('w') => 604_800,
        _ => return Err(format!("{text:?} is neither a number nor a duration like 7d")),
    };
    let number = text.get(..text.len() - 1).and_then(|n| n.parse::<u64>().ok());
    let seconds = number.and_then(|n| n.checked_mul(unit)).filter(|s| *s > 0);
    seconds
        .map(|s| FullEvery::Age(Duration::from_secs(s)))
        .ok_or_else(|| format!("{text:?} is neither a number nor a duration like 7d"))
}

/// `0640`: permission bits.
pub(super) fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).map_err(|_| format!("'{text}' is not octal"))?;
    match mode {
        m if m & 0o002 != 0 => Err(format!("'{text}' lets everybody write to the backups")),
        m if m & !0o664 != 0 => Err(format!("'{text}' has bits other than r and w")),
        m if m & 0o600 != 0o600 => Err(format!(
            "'{text}' has no r and w for the owner, who writes \
                                                them"
        )),
        m => Ok(m),
    }
}

/// How the clusters of new files are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CompressArg {
    Zlib,
    Zstd,
}

/// Formats of new files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum FileFormat {
    Raw,
    Qcow2,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_a_full_is_due() {
        assert_eq!(every("10"), Ok(FullEvery::Points(10)));
        assert_eq!(every("7d"), Ok(FullEvery::Age(Duration::from_secs(604_800))));
        for bad in ["0", "", "d", "7y", "-1", "0h", "7\u{e9}", "99999999999999999999w"] {
            assert!(every(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn modes_let_the_owner_write_and_nobody_else_but_the_group() {
        for (text, is) in [("0600", 0o600), ("640", 0o640), ("0664", 0o664)] {
            assert_eq!(mode(text), Ok(is));
        }
        for bad in ["", "8", "0666", "0755", "0440", "04600", "-1"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
    }
}
