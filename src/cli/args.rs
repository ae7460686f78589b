//! The one definition of the command line: `--help`, completions and man pages come from it.

use std::path::Path;

use clap::{ArgAction, Parser, Subcommand};

/// The codes are those of [`crate::error::Kind::table`].
const AFTER_HELP: &str = "\
Examples:
  fleecefs list /backups/vm1                        what is there, and can it be used
  fleecefs mount /backups/vm1 /mnt/vm1              every point as a raw image
  fleecefs restore /backups/vm1 sda/latest vm1.qcow2
  fleecefs backup --qmp /run/vm1.sock --level auto --target /backups/vm1
  fleecefs verify /backups/vm1

Exit codes:
    0  all is well
    1  reading or writing failed
    2  the command line makes no sense
    3  a file, disk or point does not exist
    4  what should be made exists already
    5  not permitted
    6  in use by somebody else: a lock, a socket, a mount
    7  no space left
   10  a backup is corrupt or cut
   11  a backup is encrypted, or needs a feature that is not known; or a file is refused (a link, a
      pipe, too large)
   12  a point needs something that is missing
   13  a file changed while it was being read
   14  QEMU or the guest agent answered with an error
   15  no answer in time
   16  part of the work was done: some disks have a new point, others have not
   17  something was skipped, or there was a warning, and --strict was given
   18  a check found a backup unsound
   19  a check could not prove a backup sound
  130  ended by a signal or by 'cancel'";

/// Mount a directory of QEMU backups: every point in time of every disk is a plain, read-only raw
/// image.
#[derive(Debug, Parser)]
#[command(name = "fleecefs", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Cli {
    /// Say more: once for progress of the work, twice for details, three times for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    /// Say less: once for errors and warnings (but for those about a set-up that stays as it is, such
    /// as a folder of another user), twice for errors only
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "verbose")]
    pub quiet: u8,

    /// Drop root's rights and work as the user who owns the backup directory
    ///
    /// For a backup directory of another user: nothing outside that user's reach is read or written.
    /// Everything else that is named (restore target, QEMU's and the agent's socket) must be within
    /// that user's reach, too. 'backup' keeps its state in a folder of that user's beside root's, such
    /// as /var/lib/fleecefs.as-1000, where 'info status', 'recover' and 'cancel' with --target look. 'mount' mounts as root, and a process of that user serves it.
    #[arg(long, global = true)]
    pub as_owner: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Backup(Box<super::backup::BackupArgs>),
    Info(super::info::InfoArgs),
    Cleanup(super::info::CleanupArgs),
    Recover(super::recover::RecoverArgs),
    Cancel(super::recover::CancelArgs),
    #[command(hide = true)]
    Guardian(super::recover::GuardianArgs),
    Mount(super::mount::args::MountArgs),
    Umount(super::umount::UmountArgs),
    List(super::list::ListArgs),
    Show(super::show::ShowArgs),
    Map(super::map::MapArgs),
    Files(super::files::FilesArgs),
    Restore(super::restore::RestoreArgs),
    Merge(super::verbs::MergeArgs),
    Rebase(super::verbs::RebaseArgs),
    Commit(super::verbs::CommitArgs),
    SnapshotRebase(super::verbs::SnapshotRebaseArgs),
    Verify(super::verify::VerifyArgs),
    Prune(super::prune::PruneArgs),
    Consolidate(super::consolidate::ConsolidateArgs),
    LinkDisk(super::link_disk::LinkDiskArgs),
    Completions(super::docs::CompletionsArgs),
    Man(super::docs::ManArgs),
}

impl Command {
    /// Where its locks and journals are, if it has some.
    pub(super) fn state(&mut self) -> Option<&mut super::state::StateArgs> {
        match self {
            Command::Backup(a) => Some(a.state()),
            Command::Info(a) => a.state(),
            Command::Recover(a) => Some(a.state()),
            Command::Cancel(a) => Some(a.state()),
            _ => None,
        }
    }

    /// The backup directory that it names, if that decides whose work it is.
    pub(super) fn backups(&self) -> Option<&Path> {
        match self {
            Command::Backup(a) => Some(a.target()),
            Command::Mount(a) => Some(&a.backups),
            Command::List(a) => Some(&a.dir),
            Command::Show(a) => Some(&a.dir),
            Command::Map(a) => Some(&a.dir),
            Command::Files(a) => Some(a.dir()),
            Command::Restore(a) => Some(&a.dir),
            Command::Merge(a) => Some(a.verb.dir()),
            Command::Rebase(a) => Some(a.verb.dir()),
            Command::Commit(a) => Some(a.verb.dir()),
            Command::SnapshotRebase(a) => Some(a.verb.dir()),
            Command::Verify(a) => Some(&a.dir),
            Command::Prune(a) => Some(&a.dir),
            Command::Consolidate(a) => Some(&a.dir),
            Command::LinkDisk(a) => Some(&a.dir),
            Command::Info(a) => a.target(),
            Command::Recover(a) => a.target(),
            Command::Cancel(a) => a.target(),
            Command::Cleanup(_) => None,
            Command::Guardian(_) | Command::Umount(_) => None,
            Command::Completions(_) | Command::Man(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_dry_run_is_n_for_short() {
        let cli = Cli::command();
        let dry = |c: &clap::Command| {
            c.get_arguments().find(|a| a.get_id() == "dry_run").map(|a| a.get_short())
        };
        let all: Vec<_> = cli.get_subcommands().filter_map(dry).collect();
        assert!(all.len() >= 9 && all.iter().all(|s| *s == Some('n')), "{all:?}");
    }
}
