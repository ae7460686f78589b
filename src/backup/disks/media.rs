//! Devices whose medium can be removed: CD and floppy drives, and disks on buses that call all of
//! theirs so.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::error::Result;
use crate::qmp::Client;
use crate::qmp::budget;
use crate::qmp::types::Drive;

/// How many are asked for: more than any machine has.
const MOST: usize = 512;
/// The longest serial number, in bytes: most disks have 20 characters, SCSI's page has room for 251.
const LONGEST_SERIAL: usize = 251;

/// Asks for the types of the devices whose medium can be removed: their buses call SD cards, USB
/// sticks and some SCSI disks so as well.
///
/// # Errors
/// As [`Client::execute`].
pub(super) fn types(client: &mut Client, drives: &[Drive]) -> Result<HashMap<String, String>> {
    let mut types = HashMap::new();
    let removable = drives.iter().filter(|d| d.removable && d.inserted.is_some()).take(MOST);
    for qdev in removable.filter_map(|d| d.qdev.as_deref()).filter(|q| !q.is_empty()) {
        let arguments = json!({"path": qom_path(qdev), "property": "type"});
        if let Ok(Value::String(kind)) = client.call("qom-get", arguments)? {
            types.insert(qdev.to_string(), budget::clip(&kind, 64));
        }
    }
    Ok(types)
}

/// Asks for the serial numbers of the guest's disks, by the names of their devices. Not every device has one.
///
/// # Errors
/// As [`Client::execute`].
pub(super) fn serials(client: &mut Client, drives: &[Drive]) -> Result<HashMap<String, String>> {
    let mut serials = HashMap::new();
    if !client.has_guest() || !client.has("qom-get") {
        return Ok(serials);
    }
    let disks = drives.iter().filter(|d| d.inserted.as_ref().is_some_and(|n| !n.ro)).take(MOST);
    for qdev in disks.filter_map(|d| d.qdev.as_deref()).filter(|q| !q.is_empty()) {
        let path = qom_path(qdev.trim_end_matches("/virtio-backend"));
        let arguments = json!({"path": path, "property": "serial"});
        match client.call("qom-get", arguments)? {
            Ok(Value::String(serial)) if (1..=LONGEST_SERIAL).contains(&serial.len()) => {
                serials.insert(qdev.to_string(), serial);
            }
            _ => {}
        }
    }
    Ok(serials)
}

/// The path of a guest device. (By id alone it may be ambiguous: an NVMe controller's bus has its name.)
pub fn qom_path(qdev: &str) -> String {
    match qdev.starts_with('/') {
        true => qdev.to_string(),
        false => format!("/machine/peripheral/{qdev}"),
    }
}

/// Whether a device whose medium can be removed is a CD or floppy drive. One that says nothing of
/// itself is taken for one.
pub(super) fn is_media_drive(kind: Option<&String>) -> bool {
    kind.is_none_or(|k| k.ends_with("-cd") || k == "floppy" || k == "swim-drive")
}
