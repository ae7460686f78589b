//! Users and groups by name or number, as `--uid`, `--gid` and fstab take them.

use std::ffi::{CStr, CString};

/// The user `text` names.
///
/// # Errors
/// It is no number, and the system knows no user of that name.
pub(crate) fn user(text: &str) -> Result<u32, String> {
    id(text, "user", |name| {
        // SAFETY: a C string; the result is read at once, and mounting parses its options before
        // there is a second thread.
        unsafe { libc::getpwnam(name.as_ptr()).as_ref().map(|user| user.pw_uid) }
    })
}

/// The group `text` names.
///
/// # Errors
/// It is no number, and the system knows no group of that name.
pub(crate) fn group(text: &str) -> Result<u32, String> {
    id(text, "group", |name| {
        // SAFETY: as above.
        unsafe { libc::getgrnam(name.as_ptr()).as_ref().map(|group| group.gr_gid) }
    })
}

fn id(text: &str, what: &str, find: impl FnOnce(&CString) -> Option<u32>) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let name = CString::new(text).ok();
    name.and_then(|n| find(&n))
        .ok_or_else(|| format!("'{text}' is neither a number nor the name of a {what}"))
}

/// A user's name; `None` if the system knows no such user.
pub(crate) fn name(uid: u32) -> Option<CString> {
    // SAFETY: the result is copied at once; nobody else asks for users beside us.
    unsafe { libc::getpwuid(uid).as_ref().map(|user| CStr::from_ptr(user.pw_name).to_owned()) }
}

/// A user's main group and all his groups; `None` if the system knows no such user.
pub(crate) fn groups_of(uid: u32) -> Option<(u32, Vec<u32>)> {
    // SAFETY: the result is copied at once.
    let (name, gid) = unsafe {
        let user = libc::getpwuid(uid).as_ref()?;
        (CStr::from_ptr(user.pw_name).to_owned(), user.pw_gid)
    };
    // As many as the kernel takes.
    let mut groups = vec![0; 65_536];
    let mut count = libc::c_int::try_from(groups.len()).ok()?;
    // SAFETY: a C string, and a list as long as said.
    let got = unsafe { libc::getgrouplist(name.as_ptr(), gid, groups.as_mut_ptr(), &mut count) };
    groups.truncate(usize::try_from(count).ok().filter(|_| got >= 0)?);
    Some((gid, groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_taken() {
        assert_eq!((user("root"), group("root")), (Ok(0), Ok(0)));
        assert_eq!((user("4294967295"), group("7")), (Ok(u32::MAX), Ok(7)));
        for wrong in ["", "-1", "4294967296", "nobody has this name", "a\0b"] {
            assert!(user(wrong).is_err() && group(wrong).is_err(), "{wrong}");
        }
    }
}
