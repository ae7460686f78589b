//! The options of `backup --all` and `backup --vm`.

use clap::{Arg, Args};

use crate::cli::config_file::ConfigFileArgs;

/// The group of `--all` and `--vm`.
const GROUP: &str = "configured";
const EITHER: [&str; 2] = ["all", "vm"];

/// Options of `backup` that go with `--all` and `--vm`; the configuration says the rest.
const OWN: &[&str] =
    &["all", "vm", "parallel", "json", "config_file", "dry_run", "strict", "state_dir"];

/// Which VMs of the configuration.
#[derive(Debug, Args)]
#[command(next_help_heading = "VMs of the configuration")]
pub(in crate::cli) struct ConfiguredArgs {
    /// Back up all VMs of the configuration, as their keys say
    #[arg(long, group = GROUP)]
    pub all: bool,
    /// Back up this VM of the configuration; may be given more than once
    #[arg(long, value_name = "VM", group = GROUP)]
    pub vm: Vec<String>,
    /// With --all or --vm: at most so many VMs at the same time [default: one per file system of targets, at most 4]
    #[arg(long, value_name = "N", requires = GROUP, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub parallel: Option<u16>,
    /// With --all or --vm: print the summary as JSON
    #[arg(long, requires = GROUP)]
    pub json: bool,
    #[command(flatten)]
    pub file: ConfigFileArgs,
}

impl ConfiguredArgs {
    /// Whether it is about VMs of the configuration.
    pub(in crate::cli) fn is_given(&self) -> bool {
        self.all || !self.vm.is_empty()
    }
}

/// For `mut_args` of `backup`, after `before`: what the configuration says is not said beside it.
pub(in crate::cli) fn apart(mut before: impl FnMut(Arg) -> Arg) -> impl FnMut(Arg) -> Arg {
    move |arg| {
        let arg = before(arg);
        let id = arg.get_id().as_str().to_string();
        match id.as_str() {
            "help" | "version" => arg,
            own if OWN.contains(&own) => arg,
            "qmp" | "level" | "target" => {
                arg.required(false).required_unless_present_any(EITHER).conflicts_with_all(EITHER)
            }
            _ => arg.conflicts_with_all(EITHER),
        }
    }
}
