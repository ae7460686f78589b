//! UEFI: the files of OVMF, where distributions have them.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::folder;

/// Firmware and a store of variables are at most this large, in bytes.
const LARGEST: u64 = 64 << 20;
/// Where OVMF is: the firmware, the same that needs system management mode (Secure Boot), and an empty store of
/// variables for both. Those of 4 MiB first: Debian, Fedora, Arch, SUSE.
const INSTALLED: [(&str, &str, &str); 5] = [
    (
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd",
        "/usr/share/OVMF/OVMF_VARS_4M.fd",
    ),
    (
        "/usr/share/OVMF/OVMF_CODE.fd",
        "/usr/share/OVMF/OVMF_CODE.secboot.fd",
        "/usr/share/OVMF/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/ovmf/OVMF_CODE.fd",
        "/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd",
        "/usr/share/edk2/ovmf/OVMF_VARS.fd",
    ),
    (
        "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
        "/usr/share/edk2/x64/OVMF_CODE.secboot.4m.fd",
        "/usr/share/edk2/x64/OVMF_VARS.4m.fd",
    ),
    (
        "/usr/share/qemu/ovmf-x86_64-code.bin",
        "/usr/share/qemu/ovmf-x86_64-smm-code.bin",
        "/usr/share/qemu/ovmf-x86_64-vars.bin",
    ),
];

/// The files of one UEFI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FirmwareFiles {
    /// The firmware.
    pub code: PathBuf,
    /// An empty store of variables.
    pub vars: PathBuf,
}

impl FirmwareFiles {
    /// Those that are installed, for a store of variables of `vars` bytes if that is known.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub(super) fn installed(vars: Option<u64>, smm: bool) -> Result<Self> {
        let there = |path: &str| folder::resolve(Path::new(path)).ok();
        for (code, secure, template) in INSTALLED {
            let code = if smm { secure } else { code };
            if let (Some(code), Some(template)) = (there(code), there(template))
                && vars.is_none_or(|size| length(&template) == Some(size))
            {
                return Ok(FirmwareFiles { code, vars: template });
            }
        }
        let what = match vars {
            Some(size) => {
                format!("no UEFI firmware with a variable store of {size} bytes is installed")
            }
            None => "the VM is booted by UEFI, and no UEFI firmware is installed".into(),
        };
        let error = Error::new(Kind::NotFound, what);
        Err(error.remedy("install it (Debian: ovmf), or name it: --firmware and --firmware-vars"))
    }
}

fn length(path: &Path) -> Option<u64> {
    folder::look(path).ok().map(|m| m.len())
}

/// The bytes of such a file, in whole sectors as they are.
///
/// # Errors
/// It cannot be read, or is too large.
pub(super) fn bytes(path: &Path) -> Result<Vec<u8>> {
    folder::resolve(path)
        .and_then(|real| folder::read_small(&real, LARGEST))
        .map_err(|e| Error::io(e, "cannot read the firmware").at_path(path))
}
