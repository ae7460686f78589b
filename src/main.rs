//! The `fleecefs` program: everything is in the library, this turns errors into exit codes.

#![warn(clippy::disallowed_macros)]

use std::process::ExitCode;

fn main() -> ExitCode {
    fleecefs::cli::main()
}
