//! The one definition of the command line: `--help`, completions and man pages come from it.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Parser, Subcommand};

use crate::output::wrap::MAX_WIDTH;

/// The version and the commit that it was built from, where that is known (`build.rs`).
const VERSION: &str = env!("FLEECEFS_VERSION");

/// The heading of what every command has.
const GLOBAL: &str = "Global options";

/// The codes are those of [`crate::error::Kind::table`].
const AFTER_HELP: &str = "\
Examples:
  fleecefs list /backups/vm1                        what is there
  fleecefs mount /backups/vm1 /mnt/vm1              every point as a raw image
  fleecefs restore /backups/vm1 sda/latest vm1.qcow2
  fleecefs backup --qmp /run/vm1.sock --level auto --target /backups/vm1
  fleecefs backup --all                             all VMs of a file
  fleecefs verify /backups/vm1

Exit codes:
    0  all is well
    1  reading or writing failed
    2  invalid command line
    3  a file, disk or point does not exist
    4  the target exists already
    5  not permitted
    6  in use: a lock, a socket, a mount
    7  no space left
   10  a backup is damaged or truncated
   11  a backup is encrypted or uses an unknown feature; or a file is refused
       (a link, a pipe, too large)
   12  a point needs something that is missing
   13  a file changed while it was being read
   14  QEMU or the guest agent answered with an error
   15  no answer in time
   16  partly done: some disks have a new point, others have not
   17  something was skipped, or there was a warning, and --strict was given
   18  a check found a backup unsound; 'health' has errors
   19  a check could not prove a backup sound; 'health' has warnings
  130  ended by a signal or by 'cancel'";

/// Back up QEMU guests, and mount the backups: every point of every disk is a plain, read-only raw image
#[derive(Debug, Parser)]
#[command(name = "fleecefs", version = VERSION, propagate_version = true, max_term_width = MAX_WIDTH)]
#[command(disable_help_flag = true, disable_version_flag = true)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Cli {
    /// Show more: -v for steps, -vv for details, -vvv for everything
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = GLOBAL)]
    pub verbose: u8,

    /// Show less: -q for warnings and errors only, -qq for errors only
    ///
    /// -q also hides warnings about a set-up that stays the same, such as a folder of another user.
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "verbose",
        help_heading = GLOBAL)]
    pub quiet: u8,

    /// Drop root's rights and work as the user who owns the backup directory
    ///
    /// Nothing is read or written that this user may not access. So the restore target and the sockets of QEMU and
    /// the agent must be accessible to that user. 'backup' keeps its state in a folder of that user beside root's,
    /// such as /var/lib/fleecefs.as-1000. 'mount' mounts as root, and a process of that user serves it.
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub as_owner: bool,

    /// Print help; -h is shorter
    #[arg(short, long, global = true, action = ArgAction::Help, help_heading = GLOBAL)]
    help: Option<bool>,

    /// Print the version
    #[arg(short = 'V', long, global = true, action = ArgAction::Version, help_heading = GLOBAL)]
    version: Option<bool>,

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
    Attach(super::attach::AttachArgs),
    Detach(super::attach::DetachArgs),
    Scratch(super::scratch::ScratchArgs),
    #[command(alias = "snapshots")]
    List(super::list::ListArgs),
    Show(super::show::ShowArgs),
    Config(super::config::ConfigArgs),
    Boot(Box<super::boot::BootArgs>),
    LiveRestore(Box<super::live_restore::LiveRestoreArgs>),
    Map(super::map::MapArgs),
    Diff(super::diff::DiffArgs),
    Files(super::files::FilesArgs),
    Restore(super::restore::RestoreArgs),
    Merge(super::verbs::MergeArgs),
    Rebase(super::verbs::RebaseArgs),
    Commit(super::verbs::CommitArgs),
    #[command(alias = "snapshotrebase")]
    SnapshotRebase(super::verbs::SnapshotRebaseArgs),
    #[command(alias = "check")]
    Verify(super::verify::VerifyArgs),
    Stats(super::stats::StatsArgs),
    History(super::history::HistoryArgs),
    Health(super::survey::HealthArgs),
    Prune(super::prune::PruneArgs),
    Consolidate(super::consolidate::ConsolidateArgs),
    LinkDisk(super::link_disk::LinkDiskArgs),
    Replicate(Box<super::replicate::ReplicateArgs>),
    Completions(super::docs::CompletionsArgs),
    #[command(hide = true)]
    Complete(super::complete::CompleteArgs),
    Man(super::docs::ManArgs),
}

/// How a command prints JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Json {
    /// Not at all.
    No,
    /// One document.
    Document,
    /// An object per line.
    Objects,
    /// An event per line.
    Events,
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

    /// Where it keeps what was verified when, and what it did, if it does; or only reads that.
    pub(super) fn verified(&mut self) -> Option<(&mut super::state::StateArgs, bool)> {
        match self {
            Command::List(a) => Some((&mut a.state, true)),
            Command::Show(a) => Some((&mut a.state, true)),
            Command::Verify(a) => Some((&mut a.state, false)),
            Command::Boot(a) => Some((&mut a.state, false)),
            Command::Prune(a) => Some((&mut a.state, false)),
            Command::Consolidate(a) => Some((&mut a.state, false)),
            Command::Restore(a) => Some((&mut a.state, false)),
            Command::History(a) => Some((&mut a.state, true)),
            Command::Health(a) => Some((&mut a.state, true)),
            _ => None,
        }
    }

    /// Whether it answers as a check of Nagios does, whatever happens.
    pub(super) fn is_nagios(&self) -> bool {
        matches!(self, Command::Health(a) if a.nagios)
    }

    /// Whether it prints JSON, and in which way.
    pub(super) fn json(&self) -> Json {
        let (asked, kind) = match self {
            // A dry run prints a document, which says what is refused.
            Command::Backup(a) if a.is_configured() => (a.json(), Json::Document),
            Command::Backup(a) if a.is_dry_run() => (a.json(), Json::Document),
            Command::Backup(a) => (a.json(), Json::Events),
            Command::Recover(a) => (a.json(), Json::Events),
            Command::Restore(a) => (a.json(), Json::Objects),
            Command::Diff(a) if a.files => (a.print.json, Json::Objects),
            Command::Diff(a) => (a.print.json, Json::Document),
            Command::Files(a) if a.prints_objects() => (a.json(), Json::Objects),
            Command::Files(a) => (a.json(), Json::Document),
            Command::Info(a) => (a.json(), Json::Document),
            Command::List(a) => (a.json, Json::Document),
            Command::Show(a) => (a.json, Json::Document),
            Command::Config(a) => (a.json(), Json::Document),
            Command::Boot(a) => (a.json(), Json::Document),
            Command::LiveRestore(a) => (a.json(), Json::Events),
            Command::Attach(a) => (a.print.json, Json::Document),
            Command::Verify(a) => (a.json, Json::Document),
            Command::Stats(a) => (a.print.json, Json::Document),
            Command::History(a) => (a.print.json, Json::Document),
            Command::Health(a) => (a.json, Json::Document),
            Command::Prune(a) => (a.json, Json::Document),
            Command::Consolidate(a) => (a.print.json, Json::Document),
            Command::LinkDisk(a) => (a.json, Json::Document),
            Command::Replicate(a) => (a.print.json, Json::Document),
            Command::Scratch(a) => (a.json(), Json::Document),
            // An array, which may be interrupted.
            Command::Map(_) => (false, Json::No),
            Command::Cleanup(_) | Command::Cancel(_) | Command::Guardian(_) => (false, Json::No),
            Command::Mount(_) | Command::Umount(_) => (false, Json::No),
            Command::Detach(_) => (false, Json::No),
            Command::Merge(_) | Command::Rebase(_) => (false, Json::No),
            Command::Commit(_) | Command::SnapshotRebase(_) => (false, Json::No),
            Command::Completions(_) | Command::Man(_) | Command::Complete(_) => (false, Json::No),
        };
        if asked { kind } else { Json::No }
    }

    /// The backup directory that it names, if that decides whose work it is.
    pub(super) fn backups(&self) -> Option<&Path> {
        match self {
            Command::Backup(a) => a.target(),
            Command::Mount(a) => Some(&a.backups),
            Command::Scratch(a) => Some(a.dir()),
            Command::List(a) => Some(&a.dir),
            Command::Show(a) => Some(&a.dir),
            Command::Config(a) => a.dir.as_deref(),
            Command::Boot(a) => Some(&a.dir),
            Command::Map(a) => Some(&a.dir),
            Command::Diff(a) => Some(&a.dir),
            Command::Files(a) => Some(a.dir()),
            Command::Restore(a) => Some(&a.dir),
            Command::Merge(a) => Some(a.verb.dir()),
            Command::Rebase(a) => Some(a.verb.dir()),
            Command::Commit(a) => Some(a.verb.dir()),
            Command::SnapshotRebase(a) => Some(a.verb.dir()),
            Command::Verify(a) => Some(&a.dir),
            Command::Stats(a) => Some(&a.dir),
            Command::History(a) => a.dir.as_deref(),
            // That of all: whoever has several owners asks for each.
            Command::Health(a) => a.dirs.first().map(PathBuf::as_path),
            Command::Prune(a) => Some(&a.dir),
            Command::Consolidate(a) => Some(&a.dir),
            Command::LinkDisk(a) => Some(&a.dir),
            Command::Replicate(a) => a.dir(),
            Command::Info(a) => a.target(),
            Command::Recover(a) => a.target(),
            Command::Cancel(a) => a.target(),
            Command::Cleanup(_) => None,
            Command::Guardian(_) | Command::Umount(_) => None,
            // Devices and mounts are root's work, and a VM is of whoever starts it.
            Command::Attach(_) | Command::Detach(_) | Command::LiveRestore(_) => None,
            Command::Completions(_) | Command::Man(_) | Command::Complete(_) => None,
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

    /// All commands and theirs, as they are built for help.
    fn commands() -> Vec<clap::Command> {
        fn add(c: &clap::Command, all: &mut Vec<clap::Command>) {
            all.push(c.clone());
            c.get_subcommands().for_each(|s| add(s, all));
        }
        let (mut cli, mut all) = (Cli::command(), Vec::new());
        cli.build();
        add(&cli, &mut all);
        all
    }

    /// Texts are broken at the terminal's width; examples and tables are typed, and looked at, line by line.
    #[test]
    fn examples_fit_eighty_columns() {
        let mut seen = 0;
        for c in commands() {
            let text = c.get_after_help().map(|t| t.to_string()).unwrap_or_default();
            for line in text.lines() {
                assert!(crate::text::columns(line) <= 80, "{}: {line}", c.get_name());
                seen += 1;
            }
        }
        assert!(seen > 50, "{seen}");
    }

    /// What the commands say about the option `id`, each text once.
    fn said(id: &str) -> std::collections::BTreeSet<String> {
        let all = commands();
        let args = all.iter().flat_map(|c| c.get_arguments().filter(|a| a.get_id() == id));
        args.filter_map(|a| a.get_help().map(|h| h.to_string())).collect()
    }

    #[test]
    fn one_thing_has_one_name_and_one_wording() {
        assert_eq!(said("dry_run").len(), 1, "{:?}", said("dry_run"));
        for c in commands().iter().filter(|c| !c.is_hide_set()) {
            let mut shown = c.get_arguments().filter(|a| !a.is_hide_set());
            let old = ["jobs", "speed-limit", "output"];
            let is_old = |a: &clap::Arg| {
                let visible = a.get_visible_aliases().unwrap_or_default();
                a.get_long().into_iter().chain(visible).any(|l| old.contains(&l))
            };
            assert!(!shown.any(is_old), "{}", c.get_name());
        }
    }

    #[test]
    fn the_old_names_of_options_go_on_working() {
        for line in [
            "backup --qmp q --level full --target t --speed-limit 1M",
            "restore d p t --speed-limit 1M --jobs 2",
            "verify d --jobs 2",
            "verify d -j 2",
            "map d p --output json",
            "prune d --keep-last 1 --jobs 2",
        ] {
            let args = ["fleecefs"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(args).is_ok(), "{line}");
        }
    }

    #[test]
    fn the_version_names_the_commit_it_was_built_from() {
        let (number, commit) = VERSION.split_once(' ').unwrap_or((VERSION, "(0000000)"));
        assert_eq!(number, env!("CARGO_PKG_VERSION"));
        let commit = commit.strip_prefix('(').and_then(|c| c.strip_suffix(')')).unwrap();
        assert!(commit.len() >= 7 && commit.bytes().all(|b| b.is_ascii_hexdigit()), "{VERSION}");
    }

    #[test]
    fn what_every_command_has_stands_apart_and_no_heading_leaks() {
        for c in commands().iter().filter(|c| c.get_name() != "help") {
            for a in c.get_arguments().filter(|a| a.is_global_set()) {
                assert_eq!(a.get_help_heading(), Some(GLOBAL), "{} {}", c.get_name(), a.get_id());
            }
        }
        let all = commands();
        let backup = all.iter().find(|c| c.get_name() == "backup").unwrap();
        let heading = |id: &str| {
            backup.get_arguments().find(|a| a.get_id() == id).unwrap().get_help_heading()
        };
        for id in ["strict", "config", "nbd", "dry_run", "state_dir"] {
            assert_eq!(heading(id), None, "{id}");
        }
        assert_eq!(heading("log_file"), Some("Progress and logging"));
        assert_eq!(heading("speed_limit"), Some("Copying"));
    }
}
