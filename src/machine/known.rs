//! The types of machines and devices that are known: names of QEMU's, each with the one that is used to start a VM.

use serde::Serialize;

/// What kind of PC a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Chipset {
    /// The newer one, with PCI Express and SATA.
    Q35,
    /// i440FX, with PCI and IDE.
    Pc,
}

impl Chipset {
    /// Of a machine's type, such as `pc-q35-10.0`.
    pub(super) fn of(machine: &str) -> Option<Self> {
        let is = |name: &str| machine == name || machine.starts_with(&format!("{name}-"));
        match () {
            () if is("q35") || is("pc-q35") => Some(Chipset::Q35),
            () if is("pc") || is("pc-i440fx") => Some(Chipset::Pc),
            () => None,
        }
    }

    /// QEMU's name of the newest of this kind.
    pub fn name(self) -> &'static str {
        match self {
            Chipset::Q35 => "q35",
            Chipset::Pc => "pc",
        }
    }
}

/// What a disk is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// A SCSI disk, on a controller of this model.
    Scsi(ScsiModel),
    /// SATA.
    Sata,
    /// IDE.
    Ide,
    /// NVMe.
    Nvme,
    /// USB.
    Usb,
    /// Flash memory of the firmware.
    Flash,
}

impl Bus {
    /// The word for it, which `--bus` takes.
    pub fn word(self) -> &'static str {
        match self {
            Bus::Virtio => "virtio",
            Bus::Scsi(_) => "scsi",
            Bus::Sata => "sata",
            Bus::Ide => "ide",
            Bus::Nvme => "nvme",
            Bus::Usb => "usb",
            Bus::Flash => "flash",
        }
    }

    /// Of the type of a disk's device, and of that of its controller.
    pub(super) fn of(
        kind: &str,
        controller: Option<&str>,
        chipset: Option<Chipset>,
    ) -> Option<Self> {
        match kind {
            _ if kind.starts_with("virtio-blk") => Some(Bus::Virtio),
            "nvme" | "nvme-ns" => Some(Bus::Nvme),
            "usb-storage" => Some(Bus::Usb),
            "scsi-hd" | "scsi-disk" | "scsi-block" => match controller {
                Some("usb-storage" | "usb-bot" | "usb-uas") => Some(Bus::Usb),
                Some(name) => ScsiModel::of(name).map(Bus::Scsi),
                None => None,
            },
            "ide-hd" | "ide-drive" => match (controller, chipset) {
                (Some("ich9-ahci" | "ahci"), _) => Some(Bus::Sata),
                (Some(name), _) if name.contains("-ide") => Some(Bus::Ide),
                // The machine's own.
                (_, Some(Chipset::Q35)) => Some(Bus::Sata),
                (_, Some(Chipset::Pc)) => Some(Bus::Ide),
                (_, None) => None,
            },
            _ => None,
        }
    }
}

/// The models of SCSI controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScsiModel {
    /// virtio-scsi.
    Virtio,
    /// LSI 53C895A.
    Lsi,
    /// LSI MegaRAID SAS.
    Megasas,
    /// LSI SAS1068.
    Mptsas,
    /// VMware's.
    Pvscsi,
}

impl ScsiModel {
    const ALL: [(ScsiModel, &'static str); 5] = [
        (ScsiModel::Virtio, "virtio-scsi-pci"),
        (ScsiModel::Lsi, "lsi53c895a"),
        (ScsiModel::Megasas, "megasas"),
        (ScsiModel::Mptsas, "mptsas1068"),
        (ScsiModel::Pvscsi, "pvscsi"),
    ];

    fn of(name: &str) -> Option<Self> {
        let is = |known: &str| {
            name == known
                || (known == "virtio-scsi-pci" && name.starts_with("virtio-scsi"))
                || (known == "megasas" && name.starts_with("megasas"))
                || (known == "lsi53c895a" && name == "lsi")
        };
        Self::ALL.into_iter().find(|(_, known)| is(known)).map(|(model, _)| model)
    }

    /// QEMU's name of the controller.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(m, _)| *m == self).map_or("virtio-scsi-pci", |(_, name)| name)
    }
}

/// The models of network devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetModel {
    /// virtio-net.
    Virtio,
    /// Intel 82540EM.
    E1000,
    /// Intel 82574L.
    E1000e,
    /// Realtek 8139.
    Rtl8139,
    /// VMware's.
    Vmxnet3,
}

impl NetModel {
    const ALL: [(NetModel, &'static str); 5] = [
        (NetModel::Virtio, "virtio-net-pci"),
        (NetModel::E1000, "e1000"),
        (NetModel::E1000e, "e1000e"),
        (NetModel::Rtl8139, "rtl8139"),
        (NetModel::Vmxnet3, "vmxnet3"),
    ];

    /// Of a device's type.
    pub(super) fn of(name: &str) -> Option<Self> {
        if name.starts_with("virtio-net") {
            return Some(NetModel::Virtio);
        }
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(model, _)| model)
    }

    /// QEMU's name of the device.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(m, _)| *m == self).map_or("virtio-net-pci", |(_, name)| name)
    }
}
