//! Which process is at the other end of a unix socket: to tell two of them apart, for locks and for
//! what an earlier run has left. It proves nothing and nobody is trusted for it: SO_PEERCRED names who
//! made the socket listen, not who answers, and a process chooses its own name.

use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::folder::system;

/// Names that QEMU's processes go by: qemu-system-…, qemu-kvm, qemu-storage-daemon, and Debian's kvm.
const QEMU: [&str; 2] = ["qemu", "kvm"];

/// Tells this process from every other one since the machine was installed: boot, process id and
/// start time. `None` where that cannot be told (TCP, another process namespace), and where the
/// socket was made by another program than QEMU (libvirt hands over its own), which may have made
/// many.
pub(crate) fn process(fd: RawFd) -> Option<String> {
    let pid = u32::try_from(peer_pid(fd)?).ok()?;
    if is_qemu(&folder(pid)) { named(pid) } else { None }
}

fn folder(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// The name of the process that has this id now.
pub(crate) fn named(pid: u32) -> Option<String> {
    let start = start_time(&system::text(&folder(pid).join("stat")).ok()?)?;
    Some(format!("{}-{pid}-{start}", boot()?))
}

fn boot() -> Option<String> {
    let id = system::text(Path::new("/proc/sys/kernel/random/boot_id")).ok()?;
    Some(id.trim().to_string())
}

/// How often it is looked again whether a process has ended.
const AGAIN: Duration = Duration::from_millis(20);

/// The process id in what [`process`] said.
pub(crate) fn pid(process: &str) -> Option<u32> {
    process.rsplit('-').nth(1)?.parse().ok()
}

/// The words of the command line of the process that [`process`] told of, as far as they are text; `None` where they
/// may not be read, or it has ended. They are what the process says of itself.
pub(crate) fn command_line(process: &str) -> Option<Vec<String>> {
    let bytes = system::read(&folder(pid(process)?).join("cmdline")).ok()?;
    // Asked afterwards: then it is no other's.
    if !runs(process) {
        return None;
    }
    let words = bytes.split(|b| *b == 0).filter_map(|w| String::from_utf8(w.to_vec()).ok());
    Some(words.collect())
}

/// Whether the process that [`process`] told of still runs.
pub(crate) fn runs(process: &str) -> bool {
    let told = || {
        let (rest, start) = process.rsplit_once('-')?;
        let (then, pid) = rest.rsplit_once('-')?;
        let pid: u32 = pid.parse().ok()?;
        let stat = system::text(&folder(pid).join("stat")).ok()?;
        let same = start_time(&stat) == start.parse().ok() && boot().as_deref() == Some(then);
        Some(same && !is_ending(&stat))
    };
    told().unwrap_or(false)
}

/// As [`runs`], but gives it `patience` to end: its sockets go before it does.
pub(crate) fn runs_on(process: &str, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    while runs(process) {
        if Instant::now() >= end {
            return true;
        }
        std::thread::sleep(AGAIN);
    }
    false
}

fn peer_pid(fd: RawFd) -> Option<i32> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = mem::size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the buffer is a ucred of the length given.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &mut len,
        )
    };
    (r == 0 && cred.pid > 0).then_some(cred.pid)
}

fn is_qemu(proc: &Path) -> bool {
    let command = system::text(&proc.join("comm")).unwrap_or_default();
    let exe = system::link(&proc.join("exe")).unwrap_or_default();
    let exe = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let known = |n: &str| QEMU.iter().any(|q| n.trim_start_matches('.').starts_with(q));
    known(&command) || known(&exe)
}

/// Whether it has ended and waits for its parent, or the kernel takes it down: fields 3 and 9 of
/// `/proc/PID/stat`, the latter with `PF_EXITING`.
fn is_ending(stat: &str) -> bool {
    let Some((_, rest)) = stat.rsplit_once(')') else { return false };
    let mut fields = rest.split_ascii_whitespace();
    let dead = fields.next().is_some_and(|s| ["Z", "X", "x"].contains(&s));
    dead || fields.nth(5).and_then(|f| f.parse::<u64>().ok()).is_some_and(|f| f & 4 != 0)
}

/// Field 22 of `/proc/PID/stat` (proc(5)), in clock ticks since the boot. The name before it may
/// hold anything, also brackets and blanks.
fn start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let tail: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        let stat = format!("17 (a) (b c) {}", tail.join(" "));
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("17 (a"), None);
        assert_eq!(start_time("17 (a) S 1"), None);
    }

    #[test]
    fn a_process_runs_until_it_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let here = named(child.id()).unwrap();
        assert!(runs(&here) && runs_on(&here, Duration::ZERO));
        assert_eq!(pid(&here), Some(child.id()));
        // Of another boot, or begun at another time.
        assert!(!runs(&format!("x{here}")) && !runs(&format!("{here}0")));
        assert!(!runs("") && !runs("a-b-c"));
        child.kill().unwrap();
        // Nobody has waited for it yet.
        assert!(!runs_on(&here, Duration::from_secs(60)));
        child.wait().unwrap();
        assert!(!runs(&here));
    }

    #[test]
    fn a_socket_of_another_program_names_no_qemu() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(peer_pid(a.as_raw_fd()), i32::try_from(std::process::id()).ok());
        assert_eq!(process(a.as_raw_fd()), None);
    }
}
