//! The one definition of the command line: `--help`, completions and man pages come from it.

use clap::{ArgAction, Parser, Subcommand};

/// Mount a directory of QEMU backups: every point in time of every disk is a plain, read-only raw
/// image.
#[derive(Debug, Parser)]
#[command(name = "fleecefs", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Say more: once for progress of the work, twice for details, three times for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    /// Say only errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    Backup(Box<super::backup::BackupArgs>),
    Info(super::info::InfoArgs),
    Cleanup(super::info::CleanupArgs),
    Recover(super::recover::RecoverArgs),
    Cancel(super::recover::CancelArgs),
    #[command(hide = true)]
    Guardian(super::recover::GuardianArgs),
    Mount(super::mount::MountArgs),
    Umount(super::umount::UmountArgs),
    List(super::list::ListArgs),
    Map(super::map::MapArgs),
    Restore(super::restore::RestoreArgs),
    Merge(super::verbs::MergeArgs),
    Rebase(super::verbs::RebaseArgs),
    Commit(super::verbs::CommitArgs),
    SnapshotRebase(super::verbs::SnapshotRebaseArgs),
    Verify(super::verify::VerifyArgs),
    Prune(super::prune::PruneArgs),
    Consolidate(super::consolidate::ConsolidateArgs),
    Completions(super::docs::CompletionsArgs),
    Man(super::docs::ManArgs),
}
