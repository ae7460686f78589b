//! `fleecefs completions` and `fleecefs man`: made from the same definitions as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::args::Cli;
use crate::error::{Error, Result};

/// Print a shell completion script
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell to complete for
    shell: Shell,
}

/// Write the man pages, one per subcommand, into a folder
#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder to write into; it must exist
    dir: PathBuf,
}

/// Runs `fleecefs completions`.
pub fn completions(args: CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "fleecefs", &mut text);
    super::print(&String::from_utf8_lossy(&text))
}

/// Runs `fleecefs man`.
pub fn man(args: ManArgs) -> Result<()> {
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .map_err(|e| Error::io(e, "cannot write the man pages").at_path(&args.dir))
}
