//! Programs of others that are run: never by a shell, with a clean environment, bounded in time and words.

use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::qemu_img::{installed_in, said, shown, tie};

/// No such program takes long; LUKS keys are derived within seconds.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Where such programs are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program, and the package in which Debian has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tool {
    /// Its name.
    pub name: &'static str,
    /// The package.
    pub package: &'static str,
}

/// dmsetup
pub(super) const DMSETUP: Tool = Tool { name: "dmsetup", package: "dmsetup" };
/// cryptsetup
pub(super) const CRYPTSETUP: Tool = Tool { name: "cryptsetup", package: "cryptsetup-bin" };
/// lvm
pub(super) const LVM: Tool = Tool { name: "lvm", package: "lvm2" };
/// ntfs-3g
pub(super) const NTFS_3G: Tool = Tool { name: "ntfs-3g", package: "ntfs-3g" };
/// mount.exfat-fuse
pub(super) const EXFAT_FUSE: Tool = Tool { name: "mount.exfat-fuse", package: "exfat-fuse" };
/// udevadm
pub(super) const UDEVADM: Tool = Tool { name: "udevadm", package: "udev" };

impl Tool {
    /// Whether it is there.
    pub(super) fn is_installed(self) -> bool {
        self.find().is_ok()
    }

    /// Where it is. Cron and su leave the folders of administrators' programs out of PATH: it is not asked.
    fn find(self) -> Result<PathBuf> {
        installed_in(PATH.as_ref(), self.name, self.package)
    }

    /// Runs it and gives what it wrote to standard output; it has to succeed.
    ///
    /// # Errors
    /// `NotFound` if it is not installed, `Peer` with its own words if it fails, `Timeout`.
    pub(super) fn run(self, args: &[OsString]) -> Result<String> {
        self.run_with(args, &[])
    }

    /// As [`Tool::run`], with these variables.
    ///
    /// # Errors
    /// As [`Tool::run`].
    pub(super) fn run_with(self, args: &[OsString], variables: &[(&str, &Path)]) -> Result<String> {
        let program = self.find()?;
        let mut command = Command::new(program);
        command.args(args).env_clear().env("LC_ALL", "C").env("PATH", PATH).current_dir("/");
        command.envs(variables.iter().copied());
        log::info!("{} {}", self.name, shown(args));
        let ended = run(&mut command, self.name)?;
        match ended.status.success() {
            true => Ok(ended.out),
            false => {
                let what = format!("{} failed: {}", self.name, one_line(&ended.said));
                Err(Error::new(Kind::Peer, what))
            }
        }
    }
}

/// How a program ended.
pub(super) struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub said: String,
}

/// What a program said on several lines, for a message.
fn one_line(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|l| !l.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}

/// Runs `command`, and keeps some of what it says. It ends with us: whoever cleans up after this process was killed must
/// not be followed by what it had begun.
///
/// # Errors
/// It cannot be started; `Timeout`.
pub(super) fn run(command: &mut Command, name: &str) -> Result<Ended> {
    failpoint::keep_from(command);
    tie(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn();
    let mut child = child
        .map_err(|e| Error::new(Kind::Busy, format!("cannot run {name} now")).with_source(e))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let out = scope.spawn(|| words(out));
        let err = scope.spawn(|| words(err));
        let status = wait(&mut child, name);
        let text = |t: std::thread::ScopedJoinHandle<'_, String>| t.join().unwrap_or_default();
        Ok(Ended { status: status?, out: text(out), said: text(err) })
    })
}

fn words(pipe: Option<impl Read>) -> String {
    pipe.map(said).unwrap_or_default()
}

fn wait(child: &mut Child, name: &str) -> Result<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Ok(None) => break Error::new(Kind::Timeout, format!("{name} does not end")),
            Err(e) => break Error::io(e, format!("cannot wait for {name}")),
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(ended)
}

/// Arguments of one call.
pub(super) fn args<const N: usize>(all: [&str; N]) -> Vec<OsString> {
    all.iter().map(OsString::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_is_told_and_its_absence_names_the_package() {
        let tool = |name| Tool { name, package: "some-package" };
        assert_eq!(tool("echo").run(&args(["a b", "$HOME;"])).unwrap(), "a b $HOME;");
        let e = tool("ls").run(&args(["/nowhere"])).unwrap_err();
        assert!(e.kind() == Kind::Peer && e.report().contains("/nowhere"), "{e}");
        // (Of ls there are two lines, one for each.)
        let e = tool("ls").run(&args(["/nowhere", "/no-where"])).unwrap_err();
        let text = e.report();
        assert!(text.contains("; ") && !text.contains('\n') && !text.contains("\\n"), "{text}");
        let e = tool("fleecefs-no-such-program").run(&[]).unwrap_err();
        assert!(e.kind() == Kind::NotFound && e.report().contains("some-package"), "{e}");
    }
    #[test]
    fn a_program_ends_with_who_has_started_it() {
        use std::os::unix::process::ExitStatusExt;
        let started = std::thread::spawn(|| {
            let mut command = Command::new("sleep");
            command.arg("1000000");
            tie(&mut command);
            command.spawn().unwrap()
        });
        let mut child = started.join().unwrap();
        let ended = child.wait().unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGKILL));
    }
}
