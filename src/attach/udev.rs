//! udev is kept from our devices: without that the host would look into a guest's disk, point `/dev/disk/by-uuid` of
//! a running original to its copy, and activate volume groups and RAIDs by themselves.
//!
//! The rule comes before all others and is there before the first device is. It goes by the names that only this
//! attachment's files and volumes have.

use std::path::{Path, PathBuf};

use super::place::Place;
use super::record::mapper_prefix;
use super::tools::{UDEVADM, args};
use crate::error::{Error, Result};
use crate::folder::{self, Folder};
use crate::text::path_text;

/// Where a running udev listens.
const CONTROL: &str = "/run/udev/control";
/// Rules that last until the next start of the machine.
const RULES: &str = "/run/udev/rules.d";

/// Whether udev is at work here.
pub(super) fn is_there() -> bool {
    folder::exists(Path::new(CONTROL))
}

/// Before all rules that look at what is on a device (60-persistent-storage, 69-dm-lvm, 64-md-raid, 64-btrfs).
fn file_name(place: &Place) -> String {
    format!("05-fleecefs-{}.rules", place.name())
}

/// The rule.
fn text(place: &Place) -> String {
    let (private, volumes) = (place.name(), mapper_prefix(place));
    format!(
        "# By 'fleecefs attach': disks of a guest are not the host's. 'fleecefs detach {id}' removes it.\n\
         SUBSYSTEM!=\"block\", GOTO=\"fleecefs_end\"\n\
         KERNEL==\"loop*\", ATTRS{{loop/backing_file}}==\"*/{private}/*\", GOTO=\"fleecefs_own\"\n\
         KERNEL==\"dm-*\", ATTR{{dm/name}}==\"{volumes}*\", GOTO=\"fleecefs_own\"\n\
         GOTO=\"fleecefs_end\"\n\
         LABEL=\"fleecefs_own\"\n\
         ENV{{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}}=\"1\"\n\
         ENV{{DM_UDEV_DISABLE_DISK_RULES_FLAG}}=\"1\"\n\
         ENV{{DM_UDEV_DISABLE_OTHER_RULES_FLAG}}=\"1\"\n\
         ENV{{SYSTEMD_READY}}=\"0\"\n\
         OPTIONS:=\"nowatch\"\n\
         LABEL=\"fleecefs_end\"\n",
        id = place.id
    )
}

/// Writes the rule, and has udev read it.
///
/// # Errors
/// It cannot be written, or udev does not answer.
pub(super) fn add(place: &Place) -> Result<()> {
    let path = PathBuf::from(RULES).join(file_name(place));
    folder::make_folders(Path::new(RULES))
        .and_then(|rules| rules.write_whole(file_name(place), text(place).as_bytes()))
        .map_err(|e| Error::io(e, "cannot write a rule for udev").at_path(path))?;
    reload()
}

/// Removes the rule.
///
/// # Errors
/// What the operating system said.
pub(super) fn undo(place: &Place) -> Result<()> {
    let failed = |e| Error::io(e, "cannot remove the rule for udev").at_path(RULES);
    let Some(rules) = folder::absent_is_none(Folder::open(Path::new(RULES))).map_err(failed)?
    else {
        return Ok(());
    };
    if rules.remove_if_there(file_name(place)).map_err(failed)? && is_there() {
        // It is gone all the same, and read no more at the next change.
        if let Err(e) = reload() {
            log::warn!("{}: {}", path_text(RULES), e.report());
        }
    }
    Ok(())
}

fn reload() -> Result<()> {
    UDEVADM.run(&args(["control", "--reload", "--timeout=30"])).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_names_what_only_this_attachment_has() {
        let dir = tempfile::tempdir().unwrap();
        let (place, _lock) = Place::new(&dir.path().canonicalize().unwrap()).unwrap();
        let rule = text(&place);
        let private = place.private();
        let private = private.file_name().unwrap().to_str().unwrap();
        assert!(rule.contains(&format!("==\"*/{private}/*\"")) && rule.contains(&place.id));
        assert_eq!(rule.lines().count(), 12, "{rule}");
        assert!(rule.lines().all(|l| l.matches('"').count().is_multiple_of(2)), "{rule}");
    }
}
