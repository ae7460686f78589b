//! Users and groups by name or number, as `--uid`, `--gid` and fstab take them.

use std::ffi::CString;

/// The user `text` names.
///
/// # Errors
/// It is no number, and the system knows no user of that name.
pub fn user(text: &str) -> Result<u32, String> {
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
pub fn group(text: &str) -> Result<u32, String> {
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
        .ok_or_else(|| format!("'{text}' is no number, and no {what}'s name"))
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
