//! Encrypted volumes: opened by cryptsetup with a key from a file, under a name of ours.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::mapper;
use super::place::Place;
use super::tools::CRYPTSETUP;
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::files::Content;

/// How cryptsetup calls what it can open; `None` for what is not encrypted.
pub(super) fn kind(content: &Content) -> Option<&'static str> {
    match content {
        Content::Other { name, encrypted: true, .. } => match *name {
            "LUKS1" | "LUKS2" => Some("luks"),
            "BitLocker" => Some("bitlk"),
            _ => None,
        },
        _ => None,
    }
}

/// Opens `device`, and gives the device of what is inside.
///
/// # Errors
/// `Permission` if the key is not right; what cryptsetup says.
pub(super) fn open(
    place: &Place,
    (device, kind): (&Path, &str),
    (name, key): (&str, &Path),
    read_only: bool,
) -> Result<PathBuf> {
    let mut args: Vec<OsString> =
        ["open", "--batch-mode", "--type", kind, "--key-file"].map(OsString::from).into();
    args.push(key.into());
    args.extend(read_only.then(|| "--readonly".into()));
    args.extend(["--".into(), device.into(), name.into()]);
    CRYPTSETUP.run(&args).map_err(|e| match e.report().contains("No key available") {
        true => Error::new(Kind::Permission, "this key does not open it").at_path(device),
        false => e.at_path(device),
    })?;
    step("crypt");
    let found = mapper::find(name);
    let found = found.ok_or_else(|| {
        Error::new(Kind::NotFound, "the opened volume is not there").at_path(device)
    })?;
    mapper::node(place, &found, name)
}
