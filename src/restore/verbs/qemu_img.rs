//! Calling qemu-img.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::restore::work::Work;

/// How often a running qemu-img is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Of what it says, this much is kept.
const MAX_SAID: u64 = 64 << 10;

/// Runs `qemu-img` with `args`; `about` is the file to name in errors. Ends it when the job is
/// told to stop.
///
/// # Errors
/// `NotFound` if there is no qemu-img, `NoSpace` if it met that, `Interrupted`, `Peer` with what
/// it said.
pub fn run(args: &[&OsStr], about: &Path, work: &Work) -> Result<()> {
    let code = run_code(args, about, work)?;
    match code {
        (0, _) => Ok(()),
        (_, said) => Err(failure(args, about, &said)),
    }
}

/// The same; gives back the exit code and what it said instead of failing.
///
/// # Errors
/// As [`run`], but not for a failure of qemu-img itself.
pub fn run_code(args: &[&OsStr], about: &Path, work: &Work) -> Result<(i32, String)> {
    log::info!("qemu-img {}", shown(args));
    let mut command = Command::new("qemu-img");
    // SAFETY: prctl is a plain system call. Left behind by a killed run, QEMU would go on writing
    // to an image while the next run puts it right.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut child = command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            Error::io(e, "cannot run qemu-img").remedy("install it (Debian: qemu-utils)")
        })?;
    let stderr = child.stderr.take();
    let said = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut text = Vec::new();
            if let Some(mut stderr) = stderr {
                let _ = stderr.by_ref().take(MAX_SAID).read_to_end(&mut text);
                // A full pipe would block it for ever.
                let _ = std::io::copy(&mut stderr, &mut std::io::sink());
            }
            String::from_utf8_lossy(&text).trim().to_string()
        });
        let status = wait(&mut child, work);
        (status, reader.join().unwrap_or_default())
    });
    let (status, said) = said;
    status.map(|code| (code, said)).map_err(|e| e.at_path(about))
}

fn wait(child: &mut Child, work: &Work) -> Result<i32> {
    loop {
        let failed = |e| Error::io(e, "cannot wait for qemu-img");
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status.code().unwrap_or(-1));
        }
        if let Err(e) = work.check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(e);
        }
        std::thread::sleep(LOOK);
    }
}

fn failure(args: &[&OsStr], about: &Path, said: &str) -> Error {
    let kind = if said.contains("No space left") { Kind::NoSpace } else { Kind::Peer };
    let verb = args.first().map_or(String::new(), |v| v.to_string_lossy().into_owned());
    Error::new(kind, format!("qemu-img {verb} failed: {said}")).at_path(about)
}

/// Arguments as a shell would take them.
pub fn shown(args: &[&OsStr]) -> String {
    let quote = |a: &&OsStr| {
        let text = a.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
        match !text.is_empty() && text.chars().all(plain) {
            true => text.into_owned(),
            false => format!("'{}'", text.replace('\'', "'\\''")),
        }
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}
