//! Taking everything from a child process that it does not need, between fork and exec.
//!
//! In this order, as each step needs what a later one takes away:
//!
//! 1. Descriptors other than the three standard ones and its sockets close at exec.
//! 2. Limits: memory, processor time, no core dump, no byte written to any file, few descriptors.
//! 3. A network of its own without interfaces, as root and where the system allows.
//! 4. As root: no groups, user and group `nobody`. Then no capabilities, whoever it is.
//! 5. No new privileges by executing anything (`no_new_privs`).
//! 6. Landlock, where the kernel has it: no file is written, made, removed or truncated, no TCP,
//!    no signals to others, no abstract sockets.
//! 7. It dies with its parent. The last step, since a change of user undoes it.
//!
//! What is left to it: reading what every user may read (it loads its libraries after this), system
//! calls (there is no seccomp filter: QEMU's tools have no documented set of them), and the images
//! behind its sockets. A caller without root runs it under its own user: it may read then what the
//! caller may read, but write nothing.
//!
//! Only plain system calls are made here; nothing is allocated.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What it may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of address space.
    pub memory: u64,
    /// Seconds of processor time.
    pub cpu: Option<u64>,
}

/// The user and group that owns nothing, by convention.
const NOBODY: u32 = 65534;
/// Descriptors that it may have open.
const FILES: u64 = 64;
/// Processes and threads of that user altogether: QEMU needs threads, and other services may run
/// under the same user.
const PROCESSES: u64 = 4096;
/// Where `close_range` is missing, descriptors up to here are closed one by one.
const MAX_FD: i32 = 65536;

/// What a QEMU with a guest may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct GuestLimits {
    /// Bytes of address space.
    pub memory: u64,
    /// Bytes of a file that it was handed, at most: it opens none by itself.
    pub file: u64,
    /// The group that may use /dev/kvm, if that is to be used.
    pub kvm: Option<u32>,
    /// Whether it stays in the caller's network: for user networking.
    pub network: bool,
}

/// Descriptors of a QEMU with a guest: its own, and a socket for each disk.
const GUEST_FILES: u64 = 1024;

/// For a QEMU with a guest, in the order of [`enter`]: it opens no file but what every user may read, it writes to
/// none but those that it was handed and `places`, and it dies with its parent. A terminal's signals are for the parent alone.
///
/// # Errors
/// As [`enter`].
pub(super) fn enter_guest(
    keep: &[i32],
    limits: GuestLimits,
    places: &[AllowedPath],
    parent: u32,
) -> io::Result<()> {
    close_others(keep)?;
    cap(libc::RLIMIT_AS, limits.memory)?;
    cap(libc::RLIMIT_CORE, 0)?;
    cap(libc::RLIMIT_FSIZE, limits.file)?;
    cap(libc::RLIMIT_NOFILE, GUEST_FILES)?;
    // SAFETY: a plain system call.
    unsafe { libc::setpgid(0, 0) };
    drop_user(limits.network, limits.kvm)?;
    // SAFETY: prctl with plain numbers.
    done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    restrict(places, false, limits.network);
    die_with(parent, libc::SIGKILL)
}

/// Does it all. `keep` are the descriptors that stay open, `parent` the process to die with.
///
/// # Errors
/// What the operating system said, for those steps that every system must have.
pub(super) fn enter(keep: &[i32], limits: Limits, parent: u32) -> io::Result<()> {
    close_others(keep)?;
    limit(limits)?;
    drop_user(false, None)?;
    // SAFETY: prctl with plain numbers.
    done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    restrict(&[], false, false);
    die_with(parent, libc::SIGKILL)
}

/// A place that a daemon may change: a handle of it, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct AllowedPath {
    /// Its descriptor (`O_PATH`).
    pub fd: i32,
    /// Rights of Landlock.
    pub rights: u64,
}

/// Reading a file, where reading is limited.
pub(super) const READ: u64 = 1 << 2;
/// Using a device: reading it, writing to it, and asking it for more (ioctl).
pub(super) const DEVICE: u64 = READ | 1 << 1 | 1 << 15;
/// Listing a folder.
pub(super) const LIST: u64 = 1 << 3;
/// What a file that is written to needs: reading, writing, truncating, asking a device for its size.
pub(super) const WRITE: u64 = READ | 1 << 1 | 1 << 14 | 1 << 15;
/// What a folder needs in which it makes files and sockets and removes them.
pub(super) const KEEP: u64 = WRITE | 1 << 5 | 1 << 8 | 1 << 9;

/// For a daemon that opens images by their names, with the caller's user: it changes nothing except
/// `places`, and, where `read_limited`, it reads nothing else either; it gets no core dump, no network, no rights of root but
/// those to files, no new ones, no terminal's signals, and ends with its parent: by SIGTERM, so that it
/// closes its images in order.
///
/// # Errors
/// As [`enter`].
pub(super) fn enter_daemon(
    (places, read_limited): (&[AllowedPath], bool),
    keep: &[i32],
    parent: u32,
) -> io::Result<()> {
    close_others(keep)?;
    cap(libc::RLIMIT_CORE, 0)?;
    // SAFETY: plain system calls.
    unsafe {
        libc::setpgid(0, 0);
        if libc::geteuid() == 0 {
            libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWIPC);
        }
    }
    keep_capabilities(FILE_CAPABILITIES)?;
    // SAFETY: prctl with plain numbers.
    done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    restrict(places, read_limited, false);
    die_with(parent, libc::SIGTERM)
}

/// `CAP_DAC_OVERRIDE` and `CAP_DAC_READ_SEARCH`: images belong to other users.
const FILE_CAPABILITIES: u32 = 1 << 1 | 1 << 2;

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// At exec, not now: the standard library reports through a descriptor of its own.
fn close_others(keep: &[i32]) -> io::Result<()> {
    // SAFETY: descriptors get a flag, no memory is involved.
    unsafe {
        let flag = libc::CLOSE_RANGE_CLOEXEC;
        if libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, flag) != 0 {
            for fd in 3..MAX_FD {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
        keep.iter().try_for_each(|fd| done(libc::fcntl(*fd, libc::F_SETFD, 0)))
    }
}

fn limit(limits: Limits) -> io::Result<()> {
    cap(libc::RLIMIT_AS, limits.memory)?;
    cap(libc::RLIMIT_CORE, 0)?;
    cap(libc::RLIMIT_FSIZE, 0)?;
    cap(libc::RLIMIT_NOFILE, FILES)?;
    match limits.cpu {
        Some(seconds) => cap(libc::RLIMIT_CPU, seconds),
        None => Ok(()),
    }
}

/// Lowers a limit; one that is lower already stays.
fn cap(what: libc::__rlimit_resource_t, to: u64) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let to = libc::rlim_t::try_from(to).unwrap_or(libc::RLIM_INFINITY);
    // SAFETY: `limit` is valid for both calls.
    unsafe {
        done(libc::getrlimit(what, &raw mut limit))?;
        // A second more at the hard limit: passing the soft one has a signal of its own.
        let grace = libc::rlim_t::from(what == libc::RLIMIT_CPU);
        limit.rlim_cur = limit.rlim_cur.min(to);
        limit.rlim_max = limit.rlim_max.min(to.saturating_add(grace));
        done(libc::setrlimit(what, &raw const limit))
    }
}

/// From root to nobody, and no capabilities. In a container that has no such user, or whose root
/// may not become another, it stays that container's root without capabilities. It leaves the network unless
/// `network` is set, and belongs to `group` and to no other.
fn drop_user(network: bool, group: Option<u32>) -> io::Result<()> {
    let net = if network { 0 } else { libc::CLONE_NEWNET };
    let groups = group.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: plain numbers, and a pointer to as many groups as are said, which is null for none.
    unsafe {
        if libc::geteuid() == 0 {
            libc::unshare(net | libc::CLONE_NEWIPC);
            let _ = libc::setgroups(usize::from(group.is_some()), groups);
            let _ = libc::setresgid(NOBODY, NOBODY, NOBODY);
            if libc::setresuid(NOBODY, NOBODY, NOBODY) == 0 {
                cap(libc::RLIMIT_NPROC, PROCESSES)?;
            }
        }
    }
    drop_capabilities()
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const CAP_VERSION: u32 = 0x2008_0522;

/// What a change of user leaves: service managers may have set the bits that keep capabilities.
fn drop_capabilities() -> io::Result<()> {
    keep_capabilities(0)
}

/// Keeps those of the first 32 capabilities that are in `mask`, as far as they are there.
fn keep_capabilities(mask: u32) -> io::Result<()> {
    let header = CapHeader { version: CAP_VERSION, pid: 0 };
    let mut sets = [CapData { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: the structures are laid out as capget(2) and capset(2) want them.
    unsafe {
        if mask != 0 {
            done(libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr())
                as libc::c_int)?;
        }
        let [low, high] = &mut sets;
        let kept = low.permitted & mask;
        *low = CapData { effective: kept, permitted: kept, inheritable: 0 };
        *high = CapData { effective: 0, permitted: 0, inheritable: 0 };
        let r = libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr());
        done(r as libc::c_int)
    }
}

/// `struct landlock_ruleset_attr`; older kernels take its first fields alone.
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scoped: u64,
}

/// All rights to files by name but executing, reading, and listing folders; each bit with the
/// version of Landlock that knows it and all before it.
const FILES_BY_VERSION: [(libc::c_long, u64); 4] =
    [(1, 0x1ff2), (2, 0x3ff2), (3, 0x7ff2), (5, 0xfff2)];
/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: libc::c_long = 1;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathRule {
    rights: u64,
    fd: i32,
}
/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: libc::c_long = 1;

/// What the ruleset handles is forbidden, but in `places`. Where there is no Landlock, what else is
/// taken away must do. With `network` it may use TCP.
fn restrict(places: &[AllowedPath], read_limited: bool, network: bool) {
    // SAFETY: the kernel reads `set` as far as `len`, which its version knows.
    unsafe {
        let null = std::ptr::null::<Ruleset>();
        let version = libc::syscall(libc::SYS_landlock_create_ruleset, null, 0, ASK_VERSION);
        let mut set = Ruleset { files: 0, net: 0, scoped: 0 };
        for (since, bits) in FILES_BY_VERSION {
            if version >= since {
                set.files = bits;
            }
        }
        set.files |= if read_limited { READ | LIST } else { 0 };
        // Binding and connecting TCP; abstract sockets and signals.
        set.net = if version >= 4 && !network { 0b11 } else { 0 };
        set.scoped = if version >= 6 { 0b11 } else { 0 };
        let len: libc::size_t = match version {
            ..=0 => return,
            1..=3 => 8,
            4..=5 => 16,
            _ => 24,
        };
        let fd = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const set, len, 0);
        if fd >= 0 {
            for place in places {
                let rule = PathRule { rights: place.rights & set.files, fd: place.fd };
                let at = &raw const rule;
                libc::syscall(libc::SYS_landlock_add_rule, fd, PATH_BENEATH, at, 0);
            }
            libc::syscall(libc::SYS_landlock_restrict_self, fd, 0);
            libc::close(fd as libc::c_int);
        }
    }
}

/// Has the process that `command` starts end with the thread that starts it.
pub(crate) fn tie(command: &mut Command) {
    tie_by(command, libc::SIGKILL);
}

/// As [`tie`], by a signal that the process can act on.
pub(crate) fn tie_by(command: &mut Command, signal: libc::c_int) {
    let parent = std::process::id();
    // SAFETY: `die_with` makes plain system calls only, as must be between fork and exec.
    unsafe { command.pre_exec(move || die_with(parent, signal)) };
}

/// Ties this new process to its parent: left behind by a killed run, QEMU would go on writing to an
/// image while the next run puts it right. (The kernel ends it with the thread that started it,
/// which waits for it.)
fn die_with(parent: u32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: prctl and getppid are plain system calls.
    let (tied, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, signal), libc::getppid()) };
    match tied {
        // A parent that died before has another in its place, and sends no signal any more.
        0 if u32::try_from(now) == Ok(parent) => Ok(()),
        0 => Err(io::ErrorKind::Interrupted.into()),
        _ => Err(io::Error::last_os_error()),
    }
}
