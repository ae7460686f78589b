//! Options that several commands have.

use clap::{Arg, Args};

use super::verbosity;
use crate::error::Result;
use crate::qmp::Address;

/// QEMU's own socket. It has to be given; where something else may stand for it, see [`qmp_unless`].
#[derive(Debug, Args)]
pub(super) struct QmpArgs {
    /// QEMU's QMP socket: a path, or tcp:HOST:PORT
    #[arg(long, value_name = "SOCKET", visible_alias = "socket", required = true)]
    pub qmp: Option<String>,
}

impl QmpArgs {
    /// Where QEMU listens, if it was said.
    ///
    /// # Errors
    /// `Usage` if that is no address.
    pub(super) fn given(&self) -> Result<Option<Address>> {
        self.qmp.as_deref().map(Address::parse).transpose()
    }

    /// Where QEMU listens.
    ///
    /// # Errors
    /// As [`Self::given`], and where nothing was said.
    pub(super) fn address(&self) -> Result<Address> {
        self.given()?.ok_or_else(|| verbosity::usage("--qmp is not given"))
    }
}

/// For `mut_args` of a command with [`QmpArgs`]: `other` may stand for it, and more is said about it.
pub(super) fn qmp_unless(other: &'static str, more: &'static str) -> impl FnMut(Arg) -> Arg {
    move |arg| match arg.get_help().map(|help| format!("{help}{more}")) {
        Some(help) if arg.get_id() == "qmp" => {
            arg.required(false).required_unless_present(other).help(help)
        }
        _ => arg,
    }
}

/// How what is found is printed.
#[derive(Debug, Args)]
pub(super) struct JsonArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Whether it is done at all.
#[derive(Debug, Args)]
pub(super) struct DryRunArgs {
    /// Show what would be done, and change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// What to do where the new file is there already.
#[derive(Debug, Args)]
pub(super) struct ForceArgs {
    /// Replace a target that exists
    #[arg(long)]
    pub force: bool,
}
