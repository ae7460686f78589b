//! Which file QEMU reads where it names one. A name alone does not tell: the file that has it may have been
//! exchanged since QEMU opened it, and QEMU may see other names than this process does.
//!
//! The files that QEMU has open are in `/proc/PID/fd`, each with the path that leads to it now. Nothing of it is
//! opened, and nothing is asked of a FUSE server: such a file may hang, and its times are what the server says.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::folder::{self, system};
use crate::manifest::{BackingFile, Compared};
use crate::qmp::peer;
use crate::qmp::timeout::answer_timeout;

/// The longest path, in bytes.
const LONGEST_PATH: usize = 4096;
/// More descriptors than a QEMU has.
const MOST_OPEN: usize = 100_000;
/// A file system like others, below a folder of devices.
const SHARED_MEMORY: &str = "/dev/shm";
/// Bits of `open(2)`'s flags, as `/proc/PID/fdinfo` shows them.
const ACCESS: u32 = libc::O_ACCMODE as u32;
const WRITE_ONLY: u32 = libc::O_WRONLY as u32;
const NO_FILE: u32 = (libc::O_DIRECTORY | libc::O_PATH) as u32;

/// How long a file must not have been written to, so that a later write shows in its time: some file systems
/// count whole seconds, or two; the others ticks of the kernel's clock.
const COARSE: Duration = Duration::from_millis(2100);
const FINE: Duration = Duration::from_millis(20);

/// A file that QEMU has open.
#[derive(Debug, Clone)]
struct OpenFile {
    /// By its descriptor, below `/proc`.
    at: PathBuf,
    /// The path that leads to it now, or led to it last.
    path: PathBuf,
    /// Whether it is served by FUSE.
    is_fuse: bool,
}

/// How this host sees what QEMU reads.
#[derive(Debug)]
pub(crate) struct HostView {
    /// The files that QEMU has open; `None` if this user may not see them.
    open: Option<Vec<OpenFile>>,
    /// QEMU's working directory.
    cwd: Option<PathBuf>,
    /// Whether names mean the same to QEMU as here: it has this process's mounts.
    same_names: bool,
    /// Whether its names are those of this host, and lead to what it has open: it is ours.
    ours: bool,
}

impl HostView {
    /// Of QEMU's process (see [`peer::process`]), if it is one of this host; `ours` says that we started it,
    /// over files that nobody else can exchange.
    pub(crate) fn of(process: Option<String>, ours: bool) -> Self {
        let pid = process.as_deref().and_then(peer::pid);
        let dir = pid.map(|pid| PathBuf::from(format!("/proc/{pid}")));
        let link = |name: &str| system::link(&dir.as_ref()?.join(name)).ok();
        let own = system::link(Path::new("/proc/self/ns/mnt")).ok();
        HostView {
            open: dir.as_ref().and_then(|d| open_files(d)),
            // One that was daemonized has left the folder in which it opened its files.
            cwd: link("cwd").filter(|c| c.parent().is_some()),
            same_names: own.is_some() && link("ns/mnt") == own,
            ours,
        }
    }

    /// Where QEMU's name for a file leads, by its letters alone.
    fn named(&self, name: &str) -> Option<PathBuf> {
        match Path::new(name) {
            _ if name.is_empty() || name.len() > LONGEST_PATH => None,
            p if p.is_absolute() => Some(p.to_path_buf()),
            p => Some(self.cwd.as_ref()?.join(p)),
        }
    }

    /// The open files that may be the one of this name.
    fn candidates<'a>(&self, open: &'a [OpenFile], name: &str) -> Vec<&'a OpenFile> {
        let Some(path) = self.named(name) else { return Vec::new() };
        let of =
            |path: &Path| -> Vec<&'a OpenFile> { open.iter().filter(|o| o.path == path).collect() };
        let found = of(&path);
        if !found.is_empty() || !self.same_names {
            return found;
        }
        let real = folder::within(answer_timeout(), move || folder::resolve(&path));
        real.map_or(Vec::new(), |real| of(&real))
    }

    /// Whether each of QEMU's open files is one of those that its nodes name. Where one is not, names were
    /// exchanged, and a name may lead to a file that another node reads.
    fn explains(&self, open: &[OpenFile], names: &HashSet<&str>) -> bool {
        let named = names.iter().flat_map(|n| self.candidates(open, n));
        let named: HashSet<&Path> = named.map(|o| o.path.as_path()).collect();
        // A guest's memory may be a file there, where no disk is.
        let there = |p: &Path| p.starts_with(SHARED_MEMORY);
        let all = named.iter().any(|p| there(p));
        let counts = |o: &&OpenFile| all || !there(&o.path);
        open.iter().filter(counts).all(|o| named.contains(o.path.as_path()))
    }

    /// Whether the names `all` of QEMU's files, those of all its nodes, lead to all that it has open.
    pub(super) fn is_certain(&self, all: &HashSet<&str>) -> bool {
        // One of ours holds its lock, too.
        self.ours || self.open.as_ref().is_none_or(|open| self.explains(open, all))
    }

    /// What tells whether the file is written to that QEMU calls so, if it is certain which one that is.
    pub(super) fn record(&self, name: &str) -> Option<BackingFile> {
        let at = match &self.open {
            Some(open) => {
                let found = self.candidates(open, name);
                let first = found.first().filter(|_| found.iter().all(|o| !o.is_fuse))?;
                let id = |o: &OpenFile| system::behind(&o.at).ok().map(|m| (m.dev(), m.ino()));
                let which = id(first)?;
                found.iter().all(|o| id(o) == Some(which)).then(|| first.at.clone())?
            }
            None if self.ours => {
                let real = folder::resolve(&self.named(name)?).ok()?;
                return of_stable(|| folder::look(&real).ok(), name)
                    .filter(|_| folder::is_on_fuse(&real).is_ok_and(|fuse| !fuse));
            }
            None => return None,
        };
        of_stable(|| system::behind(&at).ok(), name)
    }

    /// The first of `then` that is not as it was, or not open any more. Those of which nothing is known are
    /// passed over.
    pub(crate) fn changed<'a>(&self, then: &'a [BackingFile]) -> Option<&'a BackingFile> {
        then.iter().filter(|b| b.is_known()).find(|b| !self.has(b))
    }

    /// Whether QEMU has this file open, as it was.
    fn has(&self, file: &BackingFile) -> bool {
        let Some(open) = &self.open else {
            return self.record(&file.file).is_none_or(|now| now.is_unwritten(file));
        };
        let same = |o: &&OpenFile| {
            let at = o.at.clone();
            let meta = folder::within(answer_timeout(), move || system::behind(&at));
            meta.ok().and_then(|m| of_meta(&m, &file.file)).is_some_and(|m| m.is_unwritten(file))
        };
        // Under its own name first: nothing is asked of other files' servers.
        let named = self.candidates(open, &file.file);
        let asked = named.iter().copied().find(same);
        asked.or_else(|| open.iter().filter(|o| !o.is_fuse).find(same)).is_some()
    }
}

/// Whether the file of a record, which QEMU may have closed since, is there and as it was.
pub(crate) fn is_as_recorded(then: &BackingFile) -> bool {
    let name = PathBuf::from(&then.file);
    if !name.is_absolute() {
        return false;
    }
    let look = move || folder::look(&folder::resolve(&name)?);
    let now = folder::within(answer_timeout(), look).ok().and_then(|m| of_meta(&m, &then.file));
    now.is_some_and(|now| {
        let now = BackingFile { format: then.format.clone(), ..now };
        now.compare(then) == Compared::Same
    })
}

/// What tells whether a file is written to, once a later write is certain to show.
fn of_stable(look: impl Fn() -> Option<Metadata>, name: &str) -> Option<BackingFile> {
    let age = |m: &Metadata| {
        let written = Duration::new(m.mtime().try_into().ok()?, m.mtime_nsec().try_into().ok()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let enough = if written.subsec_nanos() == 0 { COARSE } else { FINE };
        // A clock was set back, where it is in the future: a write has an earlier time then.
        Some((now.abs_diff(written), enough))
    };
    let meta = look()?;
    let (old, enough) = age(&meta)?;
    if old >= enough {
        return of_meta(&meta, name);
    }
    // Twice: it may be in the future.
    std::thread::sleep(enough.saturating_mul(2));
    let meta = look()?;
    let (old, enough) = age(&meta)?;
    of_meta(&meta, name).filter(|_| old >= enough)
}

fn of_meta(meta: &Metadata, name: &str) -> Option<BackingFile> {
    if !meta.is_file() {
        return None;
    }
    let nanos = |s: i64, n: i64| s.checked_mul(1_000_000_000)?.checked_add(n);
    Some(BackingFile {
        file: name.to_string(),
        size: meta.size(),
        mtime_ns: nanos(meta.mtime(), meta.mtime_nsec())?,
        ctime_ns: nanos(meta.ctime(), meta.ctime_nsec()),
        inode: meta.ino(),
        ..Default::default()
    })
}

/// The files that a process has open: those it can read, on file systems.
fn open_files(process: &Path) -> Option<Vec<OpenFile>> {
    let fuse = fuse_mounts(&system::text(&process.join("mountinfo")).unwrap_or_default());
    let fds = process.join("fd");
    let names = system::names(&fds);
    if names.is_empty() {
        return None;
    }
    let open = |name: &OsStr| {
        // Not what it was started with: a script, a terminal.
        let number: u32 = name.to_str()?.parse().ok().filter(|n| *n > 2)?;
        let at = fds.join(name);
        let path = system::link(&at).ok()?;
        let info = system::text(&process.join("fdinfo").join(number.to_string())).ok()?;
        let flags = u32::from_str_radix(field(&info, "flags:")?, 8).ok()?;
        let is_file = is_stored(&path) && flags & NO_FILE == 0 && flags & ACCESS != WRITE_ONLY;
        is_file.then(|| OpenFile {
            at,
            path: without_mark(&path),
            is_fuse: field(&info, "mnt_id:").is_none_or(|id| fuse.contains(id)),
        })
    };
    Some(names.iter().take(MOST_OPEN).filter_map(|n| open(n)).collect())
}

/// The value of a line of `/proc/PID/fdinfo`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|l| l.strip_prefix(name)).map(str::trim)
}

/// The numbers of the mounts that FUSE serves.
fn fuse_mounts(mountinfo: &str) -> HashSet<String> {
    let is_fuse = |l: &&str| {
        let (_, end) = l.split_once(" - ").unwrap_or_default();
        let kind = end.split(' ').next().unwrap_or_default();
        kind == "fuse" || kind == "fuseblk" || kind.starts_with("fuse.")
    };
    let number = |l: &str| l.split(' ').next().map(str::to_string);
    mountinfo.lines().filter(is_fuse).filter_map(number).collect()
}

/// Whether a path of `/proc/PID/fd` is that of a file on a file system.
fn is_stored(path: &Path) -> bool {
    let kernel = ["/dev", "/proc", "/sys"].iter().any(|k| path.starts_with(k));
    path.is_absolute()
        && (!kernel || path.starts_with(SHARED_MEMORY))
        && !path.as_os_str().as_bytes().starts_with(b"/memfd:")
        && !path.as_os_str().as_bytes().starts_with(b"/anon_hugepage")
}

/// So the kernel marks what has no name any more.
fn without_mark(path: &Path) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)))
}
