//! Where the program keeps its state unless a test says otherwise: not where that of this machine's own backups is.

use std::ffi::CString;

const FOLDER: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/state");

/// Runs before `main`, and so before there is a second thread.
#[used]
#[unsafe(link_section = ".init_array")]
static SET: extern "C" fn() = set;

extern "C" fn set() {
    let folder = CString::new(FOLDER).unwrap_or_default();
    // SAFETY: two C strings, of which a copy is kept; there is one thread.
    unsafe { libc::setenv(c"FLEECEFS_STATE_DIR".as_ptr(), folder.as_ptr(), 1) };
}
