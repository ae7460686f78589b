//! Options of `fleecefs backup` that say what is done to the guest.

use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use crate::backup::{FreezeOptions, GuestCommands, StopMode};

/// The longest limit, in seconds, for what a guest has to bear. QEMU takes 0 for "no limit" where a
/// guest's write waits for the fleece, so that is none.
const LONGEST_WAIT: u64 = 3600;

#[derive(Debug, Args)]
#[command(next_help_heading = "Freezing")]
pub(super) struct FreezeArgs {
    /// Do not stop the guest: each disk is frozen at its own time
    #[arg(long, conflicts_with = "pause")]
    no_stop: bool,

    /// Keep the guest stopped for the whole backup
    #[arg(long)]
    pause: bool,

    /// Freeze the guest's file systems through its agent
    #[arg(long, requires = "agent")]
    quiesce: bool,

    /// Freeze only this mount point; may be given more than once
    #[arg(long, value_name = "PATH", requires = "quiesce")]
    freeze: Vec<String>,

    /// Run this command in the guest, by its agent, before its file systems are frozen: it makes an application's
    /// files consistent. The point counts as 'application' consistent if all succeeded
    #[arg(long, value_name = "COMMAND", requires = "quiesce", conflicts_with = "pause",
        value_parser = NonEmptyStringValueParser::new())]
    guest_before: Option<String>,

    /// Run this command in the guest after its file systems are thawed, also if the backup fails or is killed
    #[arg(long, value_name = "COMMAND", requires = "quiesce", conflicts_with = "pause",
        value_parser = NonEmptyStringValueParser::new())]
    guest_after: Option<String>,

    /// How long each of these commands may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    guest_timeout: u64,

    /// Maximum time, in seconds, the guest may stay stopped or frozen (except with --pause); a watchdog
    /// process then ends the backup and lets the guest go on
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    hold_limit: u64,

    /// How long to wait for the agent's answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=LONGEST_WAIT))]
    agent_timeout: u64,
}

impl FreezeArgs {
    /// What they say.
    pub(super) fn options(&self) -> FreezeOptions {
        FreezeOptions {
            stop: match (self.no_stop, self.pause) {
                (true, _) => StopMode::Never,
                (_, true) => StopMode::WholeBackup,
                _ => StopMode::FreezePoint,
            },
            quiesce: self.quiesce,
            mountpoints: self.freeze.clone(),
            deadline: Duration::from_secs(self.hold_limit),
            agent_timeout: Duration::from_secs(self.agent_timeout),
            commands: GuestCommands {
                before: self.guest_before.clone(),
                after: self.guest_after.clone(),
                timeout: Duration::from_secs(self.guest_timeout),
            },
        }
    }
}
