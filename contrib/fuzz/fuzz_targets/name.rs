//! File names of any bytes: parsed or not, never a panic.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = fleecefs::layout::name::parse(OsStr::from_bytes(bytes));
});
