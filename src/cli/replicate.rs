//! `fleecefs replicate`: a backup directory copied to another one, here or on another host.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::{Args, ValueHint};

use super::bar::Bar;
use super::keep::KeepArgs;
use super::paths::{backups, catalog, to_make};
use super::prune;
use super::shared::{DryRunArgs, JsonArgs};
use super::verbosity;
use super::work::{WorkArgs, cancel_flag};
use super::writing::finished;
use crate::backup::target::{file_mode, targets};
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;
use crate::lock::Locks;
use crate::prune::plan::Rules;
use crate::replicate::peer::{Remote, Ssh, Target};
use crate::replicate::plan::Action;
use crate::replicate::receive::{Place, serve};
use crate::replicate::report::Report;
use crate::replicate::send::{self, Options};
use crate::replicate::wire::Wire;
use crate::text::path_text;
use crate::units::{counted, human_bytes};
use crate::{folder, output};

const AFTER_HELP: &str = "\
Examples:
  fleecefs replicate /backups/vm1 /mnt/usb/vm1
  fleecefs replicate --keep-daily 30 /backups backup@nas:/srv/backups
  fleecefs replicate -n /backups ssh://backup@nas:2222/srv/backups

For a key that can do nothing else, there in ~/.ssh/authorized_keys:
  restrict,command=\"fleecefs replicate --receive=/srv/backups\" ssh-ed25519 ...";

/// Copy the points that another backup directory lacks to it
///
/// DST is a folder, or one on another host, which is reached by ssh and needs fleecefs, too. Only files that are
/// missing there are sent, each after those that it builds on. Each is compared with its hash on arrival, and is a
/// point only when it is whole and on disk. If it is interrupted, the next run sends the rest. Both directories may be
/// mounted, and the source backed up to, meanwhile; a point that is not complete yet is not sent.
///
/// Nothing that is there is changed: points that SRC no longer has stay. With --keep-... the target is pruned
/// afterwards, and what is older than its newest points is not sent again. A chain whose files are others there (after
/// 'commit' or 'rebase') is not sent, and what could not be sent is reported (exit code 16).
///
/// The copy has the same id: if SRC is lost, backups to DST continue its chains.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ReplicateArgs {
    /// The backup directory
    #[arg(value_name = "SRC", required_unless_present = "receive")]
    source: Option<PathBuf>,
    /// Where it is copied to: a folder, [user@]host:path, or ssh://[user@]host[:port]/path
    #[arg(value_name = "DST", required_unless_present = "receive", value_hint = ValueHint::AnyPath)]
    target: Option<OsString>,
    /// Be the other end: write to this directory what comes on standard input
    #[arg(long, value_name = "DIR", conflicts_with_all = ["source", "target", "dry_run", "json", "newer", "verify"])]
    receive: Option<PathBuf>,
    #[command(flatten)]
    keep: KeepArgs,
    /// Send only points newer than the newest of their disk at the target (--keep-... does so, too)
    #[arg(long)]
    newer: bool,
    /// Have each file read back from its disk and compared once it is written
    #[arg(long)]
    verify: bool,
    /// The command that reaches the other host, with its options
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    ssh: String,
    /// The program on the other host
    #[arg(long, value_name = "PATH", default_value = "fleecefs")]
    remote_program: String,
    #[command(flatten)]
    only: DryRunArgs,
    #[command(flatten)]
    pub print: JsonArgs,
    #[command(flatten)]
    work: WorkArgs,
}

impl ReplicateArgs {
    /// The directory whose owner's work it is.
    pub(super) fn dir(&self) -> Option<&Path> {
        self.receive.as_deref().or(self.source.as_deref())
    }
}

/// Runs `fleecefs replicate`.
///
/// # Errors
/// `Usage` for what is no target, `NotFound` for a source without backups, `Partial` if some points could not be sent,
/// or why none could.
pub(super) fn run(args: &ReplicateArgs) -> Result<()> {
    let rules = args.keep.rules();
    if let Some(dir) = &args.receive {
        return receive(dir, rules);
    }
    let (Some(source), Some(target)) = (&args.source, &args.target) else {
        return Err(verbosity::usage("SRC and DST are not given"));
    };
    let target = Target::parse(target)?;
    let root = backups(source)?;
    let options = Options {
        dry_run: args.only.dry_run,
        newer: args.newer || !rules.is_empty(),
        verify: args.verify,
    };
    if let Target::Here(path) = &target {
        check_apart(&root, &to_make(path)?)?;
    }
    let catalog = catalog(source)?;
    catalog.check_any()?;
    let (mut report, ended) = match &target {
        Target::Here(path) => here(path, rules, &catalog, options, args)?,
        Target::Remote(remote) => there(remote, &catalog, options, args)?,
    };
    if let Err(e) = &ended {
        // Where there is nothing to report the error alone is told.
        if report.images.is_empty() {
            return ended;
        }
        report.error = serde_json::to_value(e.object()).ok();
    }
    show(&report, args.print.json)?;
    ended.and_then(|()| verdict(&report))
}

/// A copy inside the source would be copied the next time, and one above it holds what it is copied from.
fn check_apart(source: &Path, target: &Path) -> Result<()> {
    if !source.starts_with(target) && !target.starts_with(source) {
        return Ok(());
    }
    let what = format!("SRC and DST overlap: {}", path_text(source));
    Err(Error::new(Kind::Usage, what).at_path(target).remedy("name a folder beside it"))
}

/// Sends to a receiver in this process.
fn here(
    path: &Path,
    rules: Rules,
    catalog: &Catalog,
    options: Options,
    args: &ReplicateArgs,
) -> Result<(Report, Result<()>)> {
    let cancel = cancel_flag()?;
    let (ours, its) = pair(&cancel)?;
    std::thread::scope(|scope| {
        let mut place = Here { path: path.to_path_buf(), rules, opened: None };
        let receiver = std::thread::Builder::new().name("receiver".into());
        let receiver = receiver.spawn_scoped(scope, move || serve(&its, &mut place));
        let receiver = receiver.map_err(|e| Error::io(e, "cannot start a thread"))?;
        let bar = Bar::default();
        let sent = send::send(&ours, catalog, options, &args.work.work(&cancel, &bar));
        // It ends when its other side is gone.
        drop(ours);
        match (sent, receiver.join()) {
            (sent, Ok(_)) => Ok(sent),
            (_, Err(panic)) => std::panic::resume_unwind(panic),
        }
    })
}

fn pair(cancel: &AtomicBool) -> Result<(Wire<'_>, Wire<'_>)> {
    let failed = |e| Error::io(e, "cannot make a socket");
    let (a, b) = UnixStream::pair().map_err(failed)?;
    let wire = |s: UnixStream, peer| {
        let again = s.try_clone().map_err(failed)?;
        Wire::new(s.into(), again.into(), peer, cancel)
    };
    Ok((wire(a, "the receiver")?, wire(b, "the sender")?))
}

/// Sends to a receiver on another host.
fn there(
    remote: &Remote,
    catalog: &Catalog,
    options: Options,
    args: &ReplicateArgs,
) -> Result<(Report, Result<()>)> {
    let cancel = cancel_flag()?;
    let ssh = Ssh {
        command: args.ssh.clone(),
        program: args.remote_program.clone(),
        more: args.keep.words(),
    };
    let mut connection = ssh.start(remote)?;
    let wire = connection.wire(&cancel)?;
    let bar = Bar::default();
    let sent = send::send(&wire, catalog, options, &args.work.work(&cancel, &bar));
    // Before the connection, which waits for the end of the other side.
    drop(wire);
    Ok(sent)
}

/// The other end, on standard input and output.
fn receive(dir: &Path, rules: Rules) -> Result<()> {
    let (input, output) = (std::io::stdin(), std::io::stdout());
    if input.is_terminal() || output.is_terminal() {
        return Err(verbosity::usage(
            "--receive is started by the 'fleecefs replicate' that sends",
        ));
    }
    let cancel = cancel_flag()?;
    let owned = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let failed = |e| Error::io(e, "cannot use standard input and output");
    let input = owned(input.as_fd()).map_err(failed)?;
    let output = owned(output.as_fd()).map_err(failed)?;
    let wire = Wire::new(input, output, "the sender", &cancel)?;
    serve(&wire, &mut Here { path: dir.to_path_buf(), rules, opened: None })
}

/// The target on this host.
struct Here {
    path: PathBuf,
    rules: Rules,
    opened: Option<(PathBuf, Locks)>,
}

impl Place for Here {
    fn open(&mut self, dry_run: bool) -> Result<Option<(PathBuf, FileMode)>> {
        let root = to_make(&self.path)?;
        targets::check_new(&root).map_err(|e| {
            // How to begin one is another thing there.
            let error = Error::new(e.kind(), e.message()).at_path(&root);
            error.remedy("name another or an empty folder, whose file system is mounted")
        })?;
        if dry_run {
            return Ok(folder::exists(&root).then_some((root, FileMode::default())));
        }
        folder::make_folders(&root)
            .map_err(|e| Error::io(e, "cannot make the backup directory").at_path(&root))?;
        let locks = finished(&root)?;
        let share = file_mode::with_kept(&root, FileMode::default())?;
        self.opened = Some((root.clone(), locks));
        Ok(Some((root, share)))
    }

    fn close(&mut self) -> Result<(u64, u64)> {
        match self.opened.take() {
            Some((root, locks)) if !self.rules.is_empty() => {
                // Pruning takes them again.
                drop(locks);
                prune::quietly(&root, &self.rules)
            }
            _ => Ok((0, 0)),
        }
    }
}

fn show(report: &Report, as_json: bool) -> Result<()> {
    match as_json {
        true => output::print(&output::json_document(report)?),
        false if verbosity::is_quiet() => Ok(()),
        false => output::print_sentences(&text(report)),
    }
}

fn text(report: &Report) -> String {
    let (mut out, mut there) = (String::new(), 0u64);
    for image in &report.images {
        let path = path_text(&image.path);
        let line = match image.action {
            Action::Sent if report.dry_run => {
                format!("send   {path}  {}", human_bytes(image.bytes))
            }
            Action::Sent => format!("sent   {path}  {}", human_bytes(image.bytes)),
            Action::Recorded => format!("record {path}  its manifest alone was missing"),
            Action::Left => {
                format!("left   {path}: {}", image.why.as_deref().unwrap_or("not sent"))
            }
            Action::Older => format!("older  {path}  than the newest at the target"),
            Action::Merged => format!("there  {path}  as another level"),
            Action::Present => {
                there += 1;
                continue;
            }
        };
        output::push_line(&mut out, line);
    }
    let sent = counted(report.sent, "image");
    let word = if report.dry_run { "to send" } else { "sent" };
    let line = format!("{sent} {word}, {}; {there} there already", human_bytes(report.bytes));
    output::push_line(&mut out, line);
    if let Some(pruned) = report.pruned {
        let points = counted(pruned.points, "point");
        let line = format!("{points} deleted at the target, {}", human_bytes(pruned.bytes));
        output::push_line(&mut out, line);
    }
    if report.dry_run {
        out += verbosity::UNCHANGED;
    }
    out
}

/// `Partial` if something could not be sent.
fn verdict(report: &Report) -> Result<()> {
    if report.left == 0 {
        return Ok(());
    }
    let all = counted(report.images.len() as u64, "image");
    let what = format!("{} of {all} could not be sent", report.left);
    // A quiet run says why all the same.
    let first = report.images.iter().find_map(|i| Some((&i.path, i.why.as_ref()?)));
    let why = first
        .map_or_else(String::new, |(path, why)| format!("the first: {}: {why}", path_text(path)));
    Err(Error::new(Kind::Partial, what).remedy(why))
}
