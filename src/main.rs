//! The `fleecefs` program: everything is in the library, this turns errors into exit codes.

use std::process::ExitCode;

fn main() -> ExitCode {
    fleecefs::cli::main()
}
