//! Running a program where the system refuses what not every file system does.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

/// Where the child keeps the descriptor by which it is asked about.
const LISTENER: i32 = 500;
/// `SECCOMP_IOCTL_NOTIF_RECV` and `_SEND`.
const RECEIVE: u64 = 0xc050_2100;
const SEND: u64 = 0xc018_2101;

/// What is refused.
#[derive(Debug, Clone, Copy)]
pub struct Refusing {
    /// fsync of folders, with this error.
    pub folder_sync: Option<i32>,
    /// Only the first one, of those of which this is true.
    pub once: Option<fn(&Path) -> bool>,
    /// These system calls, with these errors.
    pub calls: &'static [(i64, i32)],
}

impl Refusing {
    pub const NOTHING: Refusing = Refusing { folder_sync: None, once: None, calls: &[] };

    /// Runs `command` to its end.
    pub fn run(self, command: &mut Command) -> Output {
        // SAFETY: system calls, and memory that this process has alone after the fork.
        unsafe { command.pre_exec(move || self.install()) };
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = child.spawn().expect("it starts");
        if self.folder_sync.is_none() {
            return child.wait_with_output().unwrap();
        }
        let listener = listener_of(&child);
        let end = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| self.answer(&listener, &end));
            let out = child.wait_with_output().unwrap();
            end.store(true, Ordering::SeqCst);
            out
        })
    }

    fn install(self) -> io::Result<()> {
        let step =
            |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut code = vec![step(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)];
        let mut rule = |call: i64, action: u32| {
            code.push(step(BPF_JMP | BPF_JEQ | BPF_K, call as u32, 0, 1));
            code.push(step(BPF_RET | BPF_K, action, 0, 0));
        };
        self.calls.iter().for_each(|(c, e)| rule(*c, libc::SECCOMP_RET_ERRNO | *e as u32));
        if self.folder_sync.is_some() {
            rule(libc::SYS_fsync, libc::SECCOMP_RET_USER_NOTIF);
        }
        code.push(step(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0));
        let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
        let listen = self.folder_sync.map_or(0, |_| libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        // SAFETY: the program lives through the call.
        let fd = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                listen,
                &raw const filter,
            )
        };
        // SAFETY: of numbers alone.
        if fd < 0 || listen != 0 && unsafe { libc::dup2(fd as i32, LISTENER) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Refuses the fsyncs of folders that are meant and lets all others be done.
    fn answer(self, listener: &OwnedFd, end: &AtomicBool) {
        let mut is_done = false;
        while !end.load(Ordering::SeqCst) {
            let mut poll =
                libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, which is ours.
            if unsafe { libc::poll(&raw mut poll, 1, 20) } < 1 || poll.revents & libc::POLLIN == 0 {
                if poll.revents & libc::POLLHUP != 0 {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                continue;
            }
            // Its id, process and flags; the system call, its address and its six arguments.
            let mut asked = [0u64; 10];
            // SAFETY: the structure has 80 bytes.
            if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, asked.as_mut_ptr()) } != 0 {
                continue;
            }
            let (task, fd) = (asked[1] as u32, asked[4]);
            let path = std::fs::read_link(format!("/proc/{task}/fd/{fd}")).unwrap_or_default();
            let meant = !is_done && path.is_dir() && self.once.is_none_or(|meant| meant(&path));
            is_done |= meant && self.once.is_some();
            let errno = self.folder_sync.filter(|_| meant);
            let (error, go_on) = errno.map_or((0, 1), |e| (-e, 0));
            let reply = [asked[0], 0, u64::from(error as u32) | go_on << 32];
            // SAFETY: the structure has 24 bytes.
            unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, reply.as_ptr()) };
        }
    }
}

fn listener_of(child: &Child) -> OwnedFd {
    // SAFETY: of numbers alone; what they give is nobody else's.
    unsafe {
        let pid = libc::syscall(libc::SYS_pidfd_open, child.id(), 0) as i32;
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        let pid = OwnedFd::from_raw_fd(pid);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, pid.as_raw_fd(), LISTENER, 0) as i32;
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}
