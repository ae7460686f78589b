//! The options of `fleecefs boot`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use regex::bytes::Regex;

use crate::boot::{Accel, FirmwareFiles, Kernel, Net, Wanted, WantedBus};
use crate::cli::paths::resolved;
use crate::cli::shared::JsonArgs;
use crate::cli::state::StateArgs;
use crate::cli::verbosity;
use crate::error::Result;
use crate::text::path_text;
use crate::units::{parse_bytes, parse_duration};

/// Boot a backup run as a test VM, and check that it comes up
///
/// All disks of the run are started over throw-away overlays: nothing is written to the backup, and what the guest
/// writes is gone with the VM. It has no network, another UUID and other MACs than the original, and QEMU runs without
/// rights to your files. The machine is what the manifests tell ('fleecefs config'); without one it is a PC with virtio
/// disks and the firmware that the disks need. What comes over the serial port is printed.
///
/// With --check nobody has to look: it waits until the guest agent answers (or what --expect, --tcp and --exec say), and
/// ends the VM. If it does not come up, the exit code is 18. 'fleecefs list' shows when a point was booted.
///
/// --print, --print-blockdev and --libvirt print what it takes to start the VM yourself, over the files of the backup.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs boot /backups/vm1                            the newest run
  fleecefs boot /backups/vm1 2026-11-22 --display /tmp/vnc
  fleecefs boot /backups/vm1 --check --out report       agent; picture, log
  fleecefs boot /backups/vm1 --check --expect 'login:' --timeout 3m
  fleecefs boot /backups/vm1 --check --exec 'systemctl is-active postgresql'
  fleecefs boot /backups --check --all-latest --keep-going --json
  fleecefs boot /backups/vm1 --print")]
pub(in crate::cli) struct BootArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The run: latest, a date or time, its id; or points, one of each disk [default: latest]
    #[arg(value_name = "RUN|POINT", conflicts_with = "all_latest")]
    pub points: Vec<PathBuf>,
    #[command(flatten)]
    pub how: MachineArgs,
    #[command(flatten)]
    pub check: CheckArgs,
    #[command(flatten)]
    pub state: StateArgs,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// What the machine is.
#[derive(Debug, Args)]
pub(in crate::cli) struct MachineArgs {
    /// At most this much memory (M, G) [default: as the VM had, at most half of this machine's]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// At most this many processors [default: as the VM had, at most those of this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// The network of the guest [default: none; isolated with --tcp]
    #[arg(long, value_enum)]
    net: Option<Net>,
    /// Show the console: VNC viewers connect to this socket, which is created (vncviewer SOCKET)
    #[arg(long, value_name = "SOCKET")]
    pub display: Option<PathBuf>,
    /// Give the guest the UUID and the MACs of the original, which must not run in the same network
    #[arg(long)]
    same_identity: bool,
    #[command(flatten)]
    hardware: HardwareArgs,
    /// The folder for what the guest writes [default: unnamed files in TMPDIR or /var/tmp]
    #[arg(long, value_name = "FOLDER")]
    pub scratch: Option<PathBuf>,
    /// How much the guest may write (M, G) [default: 95 % of the free space there]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub scratch_size: Option<u64>,
    /// Print the commands that start the VM over the files of the backup, and do not start it
    #[arg(long, conflicts_with_all = ["print_blockdev", "libvirt", "check", "json", "display"])]
    pub print: bool,
    /// Print each disk as JSON for QEMU's -blockdev, read-only, over the files of the backup
    #[arg(long, conflicts_with_all = ["libvirt", "check", "json", "display"])]
    pub print_blockdev: bool,
    /// Print the VM as XML for libvirt ('virsh define')
    #[arg(long, conflicts_with_all = ["check", "json", "display"])]
    pub libvirt: bool,
}

/// What the machine is made of.
#[derive(Debug, Args)]
pub(in crate::cli) struct HardwareArgs {
    /// Attach all disks to this bus [default: as the VM had them, else virtio]
    #[arg(long, value_enum)]
    bus: Option<WantedBus>,
    /// How QEMU runs the guest's processors [default: kvm where /dev/kvm can be used]
    #[arg(long, value_enum)]
    accel: Option<Accel>,
    /// Boot by BIOS, whatever the VM had
    #[arg(long, conflicts_with_all = ["uefi", "firmware"])]
    bios: bool,
    /// Boot by UEFI, whatever the VM had
    #[arg(long)]
    uefi: bool,
    /// The UEFI firmware, such as OVMF_CODE_4M.fd [default: what is installed]
    #[arg(long, value_name = "FILE", requires = "firmware_vars")]
    firmware: Option<PathBuf>,
    /// The template of its variables, such as OVMF_VARS_4M.fd, which is copied
    #[arg(long, value_name = "FILE", requires = "firmware")]
    firmware_vars: Option<PathBuf>,
    /// Start this kernel instead of what the disks have: for VMs that QEMU gives a kernel
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initrd of that kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The command line of that kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
}

impl HardwareArgs {
    /// The options that were given, as they are repeated to the user.
    pub(in crate::cli) fn asked(&self) -> Vec<String> {
        let word = |v: Option<clap::builder::PossibleValue>| v.map(|v| v.get_name().to_string());
        let path = |p: &Option<PathBuf>| p.as_ref().map(|p| path_text(p).to_string());
        let all = [
            ("--bus", word(self.bus.and_then(|b| b.to_possible_value()))),
            ("--accel", word(self.accel.and_then(|a| a.to_possible_value()))),
            ("--bios", self.bios.then(String::new)),
            ("--uefi", self.uefi.then(String::new)),
            ("--firmware", path(&self.firmware)),
            ("--firmware-vars", path(&self.firmware_vars)),
            ("--kernel", path(&self.kernel)),
            ("--initrd", path(&self.initrd)),
            ("--append", self.append.clone()),
        ];
        let given = |(name, value): (&str, Option<String>)| {
            Some(format!("{name} {}", value?).trim_end().to_string())
        };
        all.into_iter().filter_map(given).collect()
    }

    /// What the user wants of it; nothing is said of memory, processors, network and identity.
    ///
    /// # Errors
    /// A file is not there.
    pub(in crate::cli) fn wanted(&self) -> Result<Wanted> {
        let real = |path: &PathBuf| resolved(path, "cannot use this file");
        let firmware = match (&self.firmware, &self.firmware_vars) {
            (Some(code), Some(vars)) => {
                Some(FirmwareFiles { code: real(code)?, vars: real(vars)? })
            }
            _ => None,
        };
        let kernel = match &self.kernel {
            Some(kernel) => Some(Kernel {
                kernel: real(kernel)?,
                initrd: self.initrd.as_ref().map(real).transpose()?,
                append: self.append.clone().unwrap_or_default(),
            }),
            None => None,
        };
        Ok(Wanted {
            accel: self.accel,
            bus: self.bus,
            uefi: if self.bios { Some(false) } else { self.uefi.then_some(true) },
            firmware,
            kernel,
            ..Wanted::default()
        })
    }
}

/// Whether it comes up.
#[derive(Debug, Args)]
pub(in crate::cli) struct CheckArgs {
    /// Check that the VM comes up, and end it: the guest agent has to answer, or what the following options say
    #[arg(long)]
    pub check: bool,
    /// A line on the serial port has to match REGEX
    #[arg(long, value_name = "REGEX", requires = "check")]
    pub expect: Option<Regex>,
    /// This TCP port of the guest has to answer, over a network of its own
    #[arg(long, value_name = "PORT", requires = "check", value_parser = clap::value_parser!(u16).range(1..))]
    pub tcp: Option<u16>,
    /// Run COMMAND in the guest by its agent: it has to end with 0
    #[arg(long, value_name = "COMMAND", requires = "check")]
    pub exec: Option<String>,
    /// How long it may take until it is up (s, m, h)
    #[arg(long, value_name = "DURATION", requires = "check", default_value = "5m", value_parser = seconds)]
    pub timeout: Duration,
    /// Write a screenshot of the console (PNG) and the serial log into FOLDER, which is created
    #[arg(long, value_name = "FOLDER", requires = "check")]
    pub out: Option<PathBuf>,
    /// Check the newest run of each VM, one after the other
    #[arg(long, requires = "check")]
    pub all_latest: bool,
    /// Go on with the next VM where one does not come up (one whose images are missing stops no other)
    #[arg(long, requires = "all_latest")]
    pub keep_going: bool,
}

/// `90s`, `5m`, `1h`.
fn seconds(text: &str) -> std::result::Result<Duration, String> {
    match parse_duration(text)? {
        seconds @ 1..=604_800 => Ok(Duration::from_secs(seconds)),
        _ => Err("must be between 1s and 7d".into()),
    }
}

impl BootArgs {
    /// Whether it prints JSON.
    pub(in crate::cli) fn json(&self) -> bool {
        self.print.json
    }

    /// What clap cannot say.
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn check(&self) -> Result<()> {
        if self.print.json && !self.check.check {
            return Err(verbosity::usage("--json goes with --check"));
        }
        if self.check.tcp.is_some() && self.how.net == Some(Net::None) {
            return Err(verbosity::usage("--tcp needs a network: --net isolated or user"));
        }
        Ok(())
    }

    /// What the user wants of the machine.
    ///
    /// # Errors
    /// A file is not there.
    pub(super) fn wanted(&self) -> Result<Wanted> {
        let how = &self.how;
        Ok(Wanted {
            memory: how.memory,
            cpus: how.cpus,
            net: how.net.or(self.check.tcp.map(|_| Net::Isolated)),
            same_identity: how.same_identity,
            ..how.hardware.wanted()?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_between_a_second_and_a_week() {
        assert_eq!(seconds("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(seconds("2h"), Ok(Duration::from_secs(7200)));
        for bad in ["0s", "s", "8d", "x", "-1s", "99999999999999999999s"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
