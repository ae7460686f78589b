//! Volume groups of a guest, under names and ids of their own: a group of the host with the same name is another one.
//!
//! LVM's tools see nothing but the devices of the group, and neither read nor write what is the host's: they have a
//! folder of settings of their own (`LVM_SYSTEM_DIR`). What `vgimportclone` writes goes to the overlay of the point.
//! Names of groups and volumes come from a guest: of those that LVM would not make itself nothing is taken.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::mapper;
use super::place::Place;
use super::tools::{LVM, args};
use super::udev;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::folder;

/// The folder of settings of a group.
const SETTINGS: &str = "lvm";
/// What is said of a device that LVM does not list.
const NO_VOLUME: &str =
    "not activated: LVM does not take it for a physical volume, or some of its group are missing";
/// The longest name that LVM takes.
const NAME_MAX: usize = 127;

/// A volume group on devices of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Its name in the guest.
    pub name: String,
    /// Which machine it belongs to, if it says so.
    system_id: String,
    /// Its devices.
    pub devices: Vec<PathBuf>,
}

/// The groups on some physical volumes, and why others of these are in none.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Groups {
    /// Those that can be activated.
    pub found: Vec<Group>,
    /// Physical volumes that are in none of them, with the reason.
    pub left: Vec<(PathBuf, String)>,
}

/// A logical volume that is active.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Logical {
    /// Its name in the guest: `vg-root`, as `files ls` has it.
    pub name: String,
    /// Its device.
    pub device: PathBuf,
}

/// The groups that are on these physical volumes; groups of other machines, and of clusters, are listed as well.
///
/// # Errors
/// LVM is not installed, or fails.
pub(super) fn groups(place: &Place, devices: &[PathBuf]) -> Result<Groups> {
    const COLUMNS: &str = "pv_name,vg_name,vg_uuid,vg_systemid,vg_lock_type";
    let settings = settings(place, "look", devices, "")?;
    let list = ["pvs", "--foreign", "--shared", "--reportformat", "json", "-o", COLUMNS];
    Ok(grouped(devices, &rows(&run(&settings, &args(list))?, "pv")))
}

/// Each device to its group, or why it is in none.
fn grouped(devices: &[PathBuf], rows: &[Value]) -> Groups {
    let mut found: BTreeMap<String, Group> = BTreeMap::new();
    let mut left = Vec::new();
    for device in devices {
        let row = rows.iter().find(|row| device.to_str() == Some(&text(row, "pv_name")));
        match row.map_or_else(|| Err(NO_VOLUME.to_string()), group) {
            Ok((id, group)) => found.entry(id).or_insert(group).devices.push(device.clone()),
            Err(why) => left.push((device.clone(), why)),
        }
    }
    Groups { found: found.into_values().collect(), left }
}

/// The group that a physical volume is in, by its id; why there is none that can be activated.
fn group(row: &Value) -> std::result::Result<(String, Group), String> {
    let of = |key| text(row, key);
    let (name, system_id, lock_type) = (of("vg_name"), of("vg_systemid"), of("vg_lock_type"));
    if name.is_empty() {
        return Err("not activated: it is in no volume group".into());
    }
    if !is_name(&name) || !(system_id.is_empty() || is_name(&system_id)) {
        return Err(
            "not activated: the volume group has a name or system id that LVM would not give"
                .into(),
        );
    }
    if !["", "none"].contains(&lock_type.as_str()) {
        return Err(format!(
            "not activated: the volume group {name} is shared with locks of a cluster ({lock_type}); \
             'fleecefs files' reads it, or a VM (-snapshot)"
        ));
    }
    Ok((of("vg_uuid"), Group { name, system_id, devices: Vec::new() }))
}

/// A text of a report.
fn text(row: &Value, key: &str) -> String {
    row.get(key).and_then(Value::as_str).unwrap_or_default().to_string()
}

/// Gives a group the name `own` and an id of its own, and activates it.
///
/// # Errors
/// `Incomplete` if devices of it are missing; what LVM says.
pub(super) fn activate(place: &Place, group: &Group, own: &str) -> Result<Vec<Logical>> {
    let settings = settings(place, own, &group.devices, &group.system_id)?;
    let mut import = args(["vgimportclone", "--basevgname", own]);
    import.extend(group.devices.iter().map(OsString::from));
    run(&settings, &import).map_err(|e| {
        let what = format!("cannot take over the volume group {}", group.name);
        let missing = e.report().contains("missing");
        let kind = if missing { Kind::Incomplete } else { e.kind() };
        Error::new(kind, what)
            .with_source(e)
            .remedy("a group on several disks needs all disks of its run: --run")
    })?;
    step("lvm import");
    run(&settings, &args(["vgchange", "--activate", "y", own]))?;
    step("lvm activate");
    let list = ["lvs", "--reportformat", "json", "-o", "lv_name,lv_active,lv_dm_path", own];
    let rows = rows(&run(&settings, &args(list))?, "lv");
    let logical = rows.iter().filter_map(|row| {
        let name = row.get("lv_name").and_then(Value::as_str).filter(|n| is_name(n))?;
        let active = row.get("lv_active").and_then(Value::as_str) == Some("active");
        active.then(|| logical(place, group, (own, name)))
    });
    logical.collect()
}

fn logical(place: &Place, group: &Group, (own, name): (&str, &str)) -> Result<Logical> {
    let doubled = |name: &str| name.replace('-', "--");
    let mapped = format!("{}-{}", doubled(own), doubled(name));
    let device = mapper::find(&mapped)
        .ok_or_else(|| Error::new(Kind::NotFound, format!("the volume {mapped} is not there")))?;
    let name = format!("{}-{}", doubled(&group.name), doubled(name));
    Ok(Logical { name, device: mapper::node(place, &device, &mapped)? })
}

/// Deactivates the group `own`, if any of it is active: by LVM where that can still read it.
///
/// # Errors
/// `Busy` if a volume is in use.
pub(super) fn undo(place: &Place, own: &str) -> Result<()> {
    let settings = place.private().join(SETTINGS).join(own);
    if folder::is_folder(&settings)
        && let Err(e) = run(&settings, &args(["vgchange", "--activate", "n", own]))
    {
        log::info!("{}", e.report());
    }
    mapper::remove(&format!("{}-", own.replace('-', "--")))?;
    mapper::remove_links(own)
}

/// Whether LVM itself would make a group or volume of this name.
fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"+_.-".contains(&b);
    let other = name.starts_with('-') || [".", ".."].contains(&name);
    !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(plain) && !other
}

/// The folder of settings for what is to be seen of these devices.
fn settings(place: &Place, name: &str, devices: &[PathBuf], system_id: &str) -> Result<PathBuf> {
    let text = config(place, devices, system_id)?;
    let path = place.private().join(SETTINGS).join(name);
    folder::make_folders(&path)
        .and_then(|f| f.write_whole("lvm.conf", text.as_bytes()))
        .map_err(|e| Error::io(e, "cannot write settings for LVM").at_path(&path))?;
    Ok(path)
}

/// Settings with which LVM knows these devices alone, takes itself for the machine `system_id`, and leaves nothing behind.
fn config(place: &Place, devices: &[PathBuf], system_id: &str) -> Result<String> {
    let mut accepted = Vec::new();
    for device in devices {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/_-.".contains(b);
        let text = device.to_str().filter(|t| t.as_bytes().iter().all(plain)).ok_or_else(|| {
            Error::new(Kind::Unsupported, "LVM takes no device of this name")
                .at_path(device)
                .remedy("name a state folder of letters and digits with --state-dir")
        })?;
        accepted.push(format!("\"a|^{}$|\"", text.replace('.', "\\\\.")));
    }
    let filter = format!("[{},\"r|.*|\"]", accepted.join(","));
    let own = place.nodes();
    let own = own.to_str().filter(|_| devices.iter().any(|d| d.starts_with(&own)));
    let scan = own.map_or("[\"/dev\"]".into(), |own| format!("[\"/dev\",\"{own}\"]"));
    let udev = u8::from(udev::is_there());
    let id_from = if system_id.is_empty() { "none" } else { "lvmlocal" };
    Ok(format!(
        "devices {{ filter={filter} global_filter={filter} scan={scan} use_devicesfile=0\n\
         obtain_device_list_from_udev=0 external_device_info_source=\"none\" hints=\"none\" }}\n\
         activation {{ udev_sync={udev} udev_rules={udev} monitoring=0 auto_activation_volume_list=[] }}\n\
         global {{ use_lvmpolld=0 use_lvmlockd=0 event_activation=0 system_id_source=\"{id_from}\"\n\
         thin_check_executable=\"\" cache_check_executable=\"\" }}\n\
         local {{ system_id=\"{system_id}\" }}\n\
         backup {{ backup=0 archive=0 }}\n"
    ))
}

fn run(settings: &Path, args: &[OsString]) -> Result<String> {
    LVM.run_with(args, &[("LVM_SYSTEM_DIR", settings)])
}

/// The rows of a report.
fn rows(report: &str, kind: &str) -> Vec<Value> {
    let parsed: Value = serde_json::from_str(report).unwrap_or_default();
    let reports = parsed.get("report").and_then(Value::as_array).cloned().unwrap_or_default();
    let rows = reports.iter().filter_map(|r| r.get(kind).and_then(Value::as_array));
    rows.flatten().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lvm_would_not_make_are_none() {
        for good in ["vg", "vg-x.1+_", "ROOT"] {
            assert!(is_name(good), "{good}");
        }
        let long = "x".repeat(128);
        for bad in ["", ".", "..", "-vg", "a/b", "../x", "a b", "a\nb", "a\"b", "ä", &long] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_group_is_looked_for_on_its_own_devices_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (place, _lock) = Place::new(&dir.path().canonicalize().unwrap()).unwrap();
        let text = config(&place, &["/dev/loop3p1".into(), "/dev/loop4".into()], "").unwrap();
        let filter = r#"filter=["a|^/dev/loop3p1$|","a|^/dev/loop4$|","r|.*|"]"#;
        assert_eq!(text.matches(filter).count(), 2, "{text}");
        assert!(text.contains("scan=[\"/dev\"]"));
        let e = config(&place, &["/dev/a\"]b".into()], "").unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported);
    }

    #[test]
    fn reports_of_all_kinds_are_read_or_empty() {
        let report = r#"{"report":[{"pv":[{"pv_name":"/dev/x","vg_name":"g"}]}],"log":[]}"#;
        assert_eq!(rows(report, "pv").len(), 1);
        assert!(rows(report, "lv").is_empty() && rows("x", "pv").is_empty());
    }
    #[test]
    fn each_physical_volume_is_in_a_group_or_it_is_said_why_not() {
        let row = |device: &str, name: &str, system_id: &str, lock: &str| {
            serde_json::json!({
                "pv_name": device, "vg_name": name, "vg_uuid": format!("id of {name}"),
                "vg_systemid": system_id, "vg_lock_type": lock,
            })
        };
        let rows = [
            row("/dev/a", "vg", "", ""),
            row("/dev/b", "vg", "", ""),
            row("/dev/c", "of-other", "other.host-1", "none"),
            row("/dev/d", "", "", ""),
            row("/dev/e", "locked", "", "sanlock"),
            row("/dev/f", "x", "a\" ]", ""),
            row("/dev/host", "root", "", ""),
        ];
        let devices = ["a", "b", "c", "d", "e", "f", "g"].map(|d| Path::new("/dev").join(d));
        let groups = grouped(&devices, &rows);
        let found: Vec<_> =
            groups.found.iter().map(|g| (g.name.as_str(), g.devices.len())).collect();
        assert_eq!(found, [("of-other", 1), ("vg", 2)]);
        let left: Vec<_> = groups.left.iter().map(|(d, _)| d.to_str().unwrap()).collect();
        assert_eq!(left, ["/dev/d", "/dev/e", "/dev/f", "/dev/g"]);
        assert!(groups.left[1].1.contains("sanlock"), "{:?}", groups.left);
        let dir = tempfile::tempdir().unwrap();
        let (place, _lock) = Place::new(&dir.path().canonicalize().unwrap()).unwrap();
        let text = config(&place, &devices, &groups.found[0].system_id).unwrap();
        assert!(text.contains("lvmlocal") && text.contains("system_id=\"other.host-1\""), "{text}");
    }
}
