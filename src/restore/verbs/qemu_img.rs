//! Jobs of qemu-img that can be told to stop.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::qemu_img;
use crate::restore::work::Work;
use crate::text::is_hidden;

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
        (_, said) => Err(qemu_img::failure(args, about, &said)),
    }
}

/// The same; gives back the exit code and what it said instead of failing.
///
/// # Errors
/// As [`run`], but not for a failure of qemu-img itself.
pub fn run_code(args: &[&OsStr], about: &Path, work: &Work) -> Result<(i32, String)> {
    log::info!("qemu-img {}", shown(args));
    let mut child = qemu_img::command(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(qemu_img::not_started)?;
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

/// Bytes that are not fit to be shown, as `$'...'` of bash and POSIX 2024.
fn quote_bytes(bytes: &[u8]) -> String {
    let mut text = String::from("$'");
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' | '\'' => text.extend(['\\', c]),
                c if is_hidden(c) => octal(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes()),
                c => text.push(c),
            }
        }
        octal(&mut text, chunk.invalid());
    }
    text.push('\'');
    text
}

/// In octal, which ends after three digits whatever follows.
fn octal(text: &mut String, bytes: &[u8]) {
    bytes.iter().for_each(|b| text.push_str(&format!("\\{b:03o}")));
}

/// Arguments as a shell would take them.
pub fn shown(args: &[&OsStr]) -> String {
    let quote = |a: &&OsStr| {
        let text = match a.to_str() {
            Some(text) if !text.chars().any(is_hidden) => text,
            _ => return quote_bytes(a.as_bytes()),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
        match !text.is_empty() && text.chars().all(plain) {
            true => text.to_string(),
            false => format!("'{}'", text.replace('\'', "'\\''")),
        }
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}
