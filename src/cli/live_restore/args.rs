//! The options of `fleecefs live-restore`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::boot::{Net, Wanted};
use crate::cli::backup::ShowArgs;
use crate::cli::boot::HardwareArgs;
use crate::cli::state::StateArgs;
use crate::error::Result;
use crate::units::parse_bytes;

/// Run a VM again at once from its backup, and copy its disks to new storage while it runs
///
/// The VM starts within seconds: each disk is a new qcow2 image in the folder --to over the backup, into which QEMU copies
/// the rest while the guest runs. At the end nothing refers to the backup. It is the same VM: its UUID, its name, the MACs
/// of its network devices; so the original must not run.
///
/// This command may end at any time: the VM runs on. The same command goes on watching, and if QEMU has ended too, starts
/// the VM again over the same images, with all that its guest had flushed. Until the end the VM needs the backup, which is
/// locked against 'backup', 'prune' and the like while this command runs.
///
/// If the backup cannot be read, or the storage is full, the guest stops, and continues when that is over.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs live-restore /backups/vm1 --to /srv/vm1             the newest run
  fleecefs live-restore /backups/vm1 2026-11-22 --to /srv/vm1 --rate-limit 50M
  fleecefs live-restore /backups/vm1 --to /srv/vm1 --net own -- \\
      -netdev bridge,id=net0,br=br0 -sandbox off
  fleecefs live-restore /backups/vm1 --to /srv/vm1 --print")]
pub(in crate::cli) struct LiveRestoreArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// The run: latest, a date or time, its id; or points, one of each disk [default: latest]
    #[arg(value_name = "RUN|POINT")]
    pub points: Vec<PathBuf>,
    /// The folder for the new disks, which is created
    #[arg(long, value_name = "FOLDER")]
    pub to: PathBuf,
    /// At most this many bytes per second for each disk (K, M, G); 0: no limit
    #[arg(long, alias = "speed-limit", value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    pub rate_limit: u64,
    /// The network of the guest
    #[arg(long, value_enum, default_value = "none")]
    net: LiveNet,
    /// Memory of the guest (M, G) [default: as the VM had]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Processors of the guest [default: as the VM had]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Give the guest a UUID and MACs of its own: the original runs
    #[arg(long)]
    pub(super) new_identity: bool,
    #[command(flatten)]
    hardware: HardwareArgs,
    /// Start it also from a point that 'list' calls UNSOUND
    #[arg(long)]
    pub(super) force: bool,
    /// Print the commands that do the same, and do nothing
    #[arg(long)]
    pub print: bool,
    #[command(flatten)]
    pub state: StateArgs,
    /// More options for QEMU, such as -netdev or -vnc
    #[arg(last = true, value_name = "QEMU-OPTION")]
    pub more: Vec<String>,
    #[command(flatten)]
    pub show: ShowArgs,
}

/// What network the guest gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LiveNet {
    /// No network device
    None,
    /// A network of its own behind QEMU, from which nothing can be reached
    Isolated,
    /// This machine's network, behind QEMU (NAT)
    User,
    /// The VM's network devices, on -netdev options of yours with the ids net0, net1 ...
    Own,
}

impl LiveRestoreArgs {
    /// Whether it prints JSON.
    pub(in crate::cli) fn json(&self) -> bool {
        self.show.is_json() && !self.print
    }

    /// What the user wants of the machine.
    ///
    /// # Errors
    /// A file is not there.
    pub(super) fn wanted(&self) -> Result<Wanted> {
        Ok(Wanted {
            // All that the VM had: this is no test.
            memory: Some(self.memory.unwrap_or(u64::MAX)),
            cpus: Some(self.cpus.unwrap_or(u32::MAX)),
            net: Some(match self.net {
                LiveNet::None => Net::None,
                LiveNet::Isolated => Net::Isolated,
                LiveNet::User | LiveNet::Own => Net::User,
            }),
            same_identity: !self.new_identity,
            stop_on_errors: true,
            ..self.hardware.wanted()?
        })
    }

    /// What counts only when the VM is started, an option each, as it is repeated to the user.
    pub(super) fn asked(&self) -> Vec<String> {
        let number = |name: &str, value: Option<String>| value.map(|v| format!("{name} {v}"));
        let net = self.net.to_possible_value();
        let net = net.filter(|_| self.net != LiveNet::None);
        let all = [
            number("--net", net.map(|v| v.get_name().to_string())),
            number("--memory", self.memory.map(|n| n.to_string())),
            number("--cpus", self.cpus.map(|n| n.to_string())),
            self.new_identity.then(|| "--new-identity".to_string()),
        ];
        let more = (!self.more.is_empty()).then(|| format!("-- {}", self.more.join(" ")));
        all.into_iter().flatten().chain(self.hardware.asked()).chain(more).collect()
    }

    /// Whether QEMU's own networks are wanted.
    pub(super) fn wants_networks(&self) -> bool {
        self.net != LiveNet::Own
    }
}
