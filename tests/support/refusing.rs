//! Running a program whose system calls are refused, as by a lesser file system, or looked at before they are made.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
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
        let mut is_done = false;
        // Refuses the fsyncs of folders that are meant and lets all others be done.
        let answer = |asked: &Asked| {
            let path = asked.open_path(asked.args[0]);
            let meant = !is_done && path.is_dir() && self.once.is_none_or(|meant| meant(&path));
            is_done |= meant && self.once.is_some();
            self.folder_sync.filter(|_| meant)
        };
        let ask: &[i64] = if self.folder_sync.is_some() { &[libc::SYS_fsync] } else { &[] };
        run_asking(command, ask, self.calls, answer)
    }
}

/// A system call that waits for an answer.
pub struct Asked {
    pub call: i64,
    pub args: [u64; 6],
    task: u32,
}

impl Asked {
    /// Kills the process that asks.
    pub fn kill(&self) {
        drop(Waits(self.task));
    }

    /// What the task's descriptor leads to by its name.
    pub fn open_path(&self, fd: u64) -> PathBuf {
        std::fs::read_link(self.path_of(fd)).unwrap_or_default()
    }

    /// A path to the very file that the task has open.
    pub fn path_of(&self, fd: u64) -> PathBuf {
        PathBuf::from(match fd as i32 {
            libc::AT_FDCWD => format!("/proc/{}/cwd", self.task),
            fd => format!("/proc/{}/fd/{fd}", self.task),
        })
    }

    /// The text at an address of the task.
    pub fn text(&self, address: u64) -> String {
        let memory = std::fs::File::open(format!("/proc/{}/mem", self.task)).unwrap();
        let mut bytes = vec![0; 4096];
        // It may end where the next page is none.
        let room = 4096 - (address % 4096) as usize;
        let n = memory.read_at(&mut bytes[..room], address).unwrap();
        if !bytes[..n].contains(&0) {
            let _ = memory.read_at(&mut bytes[n..], address + n as u64);
        }
        let end = bytes.iter().position(|b| *b == 0).unwrap();
        String::from_utf8_lossy(&bytes[..end])
            .replace("/proc/self/", &format!("/proc/{}/", self.task))
    }
}

/// Runs `command` to its end; `answer` gives the error of each call of `ask`, or lets it be done.
pub fn run_asking(
    command: &mut Command,
    ask: &'static [i64],
    refuse: &'static [(i64, i32)],
    answer: impl FnMut(&Asked) -> Option<i32> + Send,
) -> Output {
    // SAFETY: system calls, and memory that this process has alone after the fork.
    unsafe { command.pre_exec(move || install(ask, refuse)) };
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = child.spawn().expect("it starts");
    if ask.is_empty() {
        return child.wait_with_output().unwrap();
    }
    let listener = listener_of(&child);
    let end = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| serve(&listener, &end, answer));
        let out = child.wait_with_output().unwrap();
        end.store(true, Ordering::SeqCst);
        out
    })
}

fn install(ask: &[i64], refuse: &[(i64, i32)]) -> io::Result<()> {
    let step =
        |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut code = vec![step(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0)];
    let mut rule = |call: i64, action: u32| {
        code.push(step(BPF_JMP | BPF_JEQ | BPF_K, call as u32, 0, 1));
        code.push(step(BPF_RET | BPF_K, action, 0, 0));
    };
    refuse.iter().for_each(|(c, e)| rule(*c, libc::SECCOMP_RET_ERRNO | *e as u32));
    ask.iter().for_each(|c| rule(*c, libc::SECCOMP_RET_USER_NOTIF));
    code.push(step(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0));
    let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    let listen = if ask.is_empty() { 0 } else { libc::SECCOMP_FILTER_FLAG_NEW_LISTENER };
    // SAFETY: the program lives through the call.
    let fd = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, listen, &raw const filter)
    };
    // SAFETY: of numbers alone.
    if fd < 0 || listen != 0 && unsafe { libc::dup2(fd as i32, LISTENER) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Who waits for an answer, and is killed when there will be none.
struct Waits(u32);

impl Drop for Waits {
    fn drop(&mut self) {
        // SAFETY: of numbers alone; it waits, so it is there.
        unsafe { libc::kill(self.0 as i32, libc::SIGKILL) };
    }
}

fn serve(listener: &OwnedFd, end: &AtomicBool, mut answer: impl FnMut(&Asked) -> Option<i32>) {
    while !end.load(Ordering::SeqCst) {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
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
        let call = i64::from(asked[2] as u32);
        let [.., a, b, c, d, e, f] = asked;
        let task = asked[1] as u32;
        // The test may fail in there, and whoever waits for the answer would wait for ever.
        let waits = Waits(task);
        let said = answer(&Asked { call, task, args: [a, b, c, d, e, f] });
        std::mem::forget(waits);
        let (error, go_on) = said.map_or((0, 1), |e| (-e, 0));
        let reply = [asked[0], 0, u64::from(error as u32) | go_on << 32];
        // SAFETY: the structure has 24 bytes.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, reply.as_ptr()) };
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
