//! Giving up what is not needed.
//!
//! Both ways are taken while there is one thread: capabilities, and the promise to gain none, belong
//! to a thread, and the threads that begin later inherit them. Users and groups by name: `users`.

pub(crate) mod users;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::user_paths;
use crate::text::visible;

/// The group that owns nothing, for an owner who has none but root's.
const NOGROUP: u32 = 65534;
/// The highest capability number that the kernel's sets have room for.
const CAPABILITIES: u64 = 64;

/// Who does the work with `--as-owner`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// User.
    pub uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// Whether this process may do as root may.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Owner {
    /// The owner of the folder at `path`; `None` if that is the user who runs this, or root, so that
    /// there is nobody to become.
    ///
    /// # Errors
    /// The folder cannot be looked at; `Permission` if the caller may not become somebody else.
    pub(crate) fn of(path: &Path) -> Result<Option<Self>> {
        let real = user_paths::backups(path)?;
        let meta = folder::look(&real)
            .map_err(|e| Error::io(e, "cannot read the backup directory").at_path(path))?;
        let caller = rustix::process::geteuid().as_raw();
        if meta.uid() == 0 && caller == 0 {
            log::warn!("--as-owner has no effect: the backup directory belongs to root");
        }
        if meta.uid() == 0 || meta.uid() == caller {
            return Ok(None);
        }
        if caller != 0 {
            let what = format!("only root can work as its owner, user {}", meta.uid());
            return Err(Error::new(Kind::Permission, what)
                .at_path(path)
                .remedy("leave --as-owner out, or run it as root"));
        }
        let uid = meta.uid();
        // Somebody without an entry has no groups but the folder's.
        let (gid, groups) = match users::groups_of(uid) {
            Some((gid, groups)) => (gid, groups),
            None => (meta.gid(), vec![meta.gid()]),
        };
        Ok(Some(Owner::with_groups(uid, gid, groups)))
    }

    /// Root's group, or none at all, is nothing to work with for somebody else's folder.
    fn with_groups(uid: u32, gid: u32, groups: Vec<u32>) -> Self {
        let groups: Vec<u32> = groups.into_iter().filter(|g| *g != 0).collect();
        let gid = if gid == 0 { groups.first().copied().unwrap_or(NOGROUP) } else { gid };
        Owner { uid, gid, groups }
    }

    /// His name or number, for messages.
    pub(crate) fn name(&self) -> String {
        name_of(self.uid)
    }

    /// Becomes this user, for good.
    ///
    /// # Errors
    /// What the operating system said; the process must not go on then.
    pub(crate) fn become_it(&self) -> Result<()> {
        self.switch().map_err(|e| {
            Error::io(e, format!("cannot work as user {}, the owner of the folder", self.uid))
        })
    }

    fn switch(&self) -> io::Result<()> {
        let check = |r: libc::c_int| match r {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        empty_bounding_set();
        // The C library's calls, which see to it that every thread changes.
        // SAFETY: a list as long as said, and no other pointers.
        unsafe {
            check(libc::setgroups(self.groups.len(), self.groups.as_ptr()))?;
            check(libc::setresgid(self.gid, self.gid, self.gid))?;
            check(libc::setresuid(self.uid, self.uid, self.uid))?;
        }
        // A way back would be a grave error of the kernel's or of ours.
        // SAFETY: no pointers.
        if unsafe { libc::setresuid(0, 0, 0) } == 0 {
            return Err(io::Error::other("the user change could be undone"));
        }
        harden()
    }
}

/// No program that is started gains rights, and nobody else of this user may look into this process:
/// it may hold files that root has opened.
fn harden() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Gives up all of root's capabilities but that of reading every file and folder.
///
/// # Errors
/// What the operating system said; the process must not go on then.
pub(crate) fn keep_reading() -> Result<()> {
    drop_to(CapabilitySet::DAC_READ_SEARCH)
        .map_err(|e| Error::io(e, "cannot give up the capabilities of root"))
}

fn drop_to(kept: CapabilitySet) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    empty_bounding_set();
    let have = rustix::thread::capabilities(None)?.permitted;
    let kept = have & kept;
    let inheritable = CapabilitySet::empty();
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(())
}

/// No program that is started has capabilities, whatever its file says.
fn empty_bounding_set() {
    for n in 0..CAPABILITIES {
        let one = CapabilitySet::from_bits_retain(1 << n);
        // Numbers that this kernel does not know; or a container in which one may not. Without new
        // privileges it is a second line only.
        if let Err(e) = rustix::thread::remove_capability_from_bounding_set(one) {
            log::trace!("capability {n} stays in the bounding set: {e}");
        }
    }
}

/// Ends this process, at once, when the one that forked it ends. False if it has ended already.
///
/// # Errors
/// What the operating system said.
pub(crate) fn end_with(parent: rustix::process::Pid) -> io::Result<bool> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(rustix::process::getppid() == Some(parent))
}

/// A user's name where the system knows one, else the number; for messages.
pub(crate) fn name_of(uid: u32) -> String {
    match users::name(uid) {
        Some(name) => format!("user {}", visible(&name.to_string_lossy())),
        None => format!("user {uid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_to_become_himself() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Owner::of(dir.path()).unwrap(), None);
        assert_eq!(Owner::of(Path::new("/nonexistent")).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn the_owner_comes_with_his_groups() {
        if !is_root() {
            println!("skipped: the_owner_comes_with_his_groups (needs root)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(4_000_000), Some(4_000_001)).unwrap();
        let owner = Owner::of(dir.path()).unwrap().unwrap();
        assert_eq!((owner.uid, owner.gid), (4_000_000, 4_000_001));
        assert_eq!(owner.groups, [4_000_001]);
        assert!(!users::groups_of(0).unwrap().1.is_empty());
    }

    #[test]
    fn roots_group_comes_with_nobody() {
        let of = |gid, groups: &[u32]| {
            let owner = Owner::with_groups(7, gid, groups.to_vec());
            (owner.gid, owner.groups)
        };
        assert_eq!(of(0, &[0]), (NOGROUP, vec![]));
        assert_eq!(of(0, &[]), (NOGROUP, vec![]));
        assert_eq!(of(0, &[0, 5, 6]), (5, vec![5, 6]));
        assert_eq!(of(5, &[5, 0, 6]), (5, vec![5, 6]));
    }
}
