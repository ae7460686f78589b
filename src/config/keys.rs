//! The table of keys: one for each option of the commands that a night consists of, taken from clap's own definitions, so
//! that an option which is added is a key at once; and those that the configuration has besides.

use std::any::TypeId;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command};

use super::values;

/// Options that are no keys, by command, with the reason.
pub(super) const LEFT_OUT: &[(&str, &[&str], &str)] = &[
    (
        "backup",
        &["all", "vm", "parallel", "config_file", "json"],
        "they say which VMs, not how one is backed up",
    ),
    ("backup", &["dry_run", "progress", "progress_interval"], "'backup --all' has its own"),
    ("backup", &["include_raw"], "has no effect"),
    (
        "backup",
        &["init"],
        "every night it would begin a new target below a mount point that is not mounted",
    ),
    ("prune", &["consolidate"], "the key 'consolidate' is on where there are rules"),
    ("prune", &["force", "dry_run", "json"], "decided by hand"),
    ("verify", &["quick"], "the key 'verify' says it"),
    ("verify", &["point", "since"], "it is the new point that is verified"),
    ("verify", &["create", "format", "json"], "decided by hand"),
    ("boot", &["check", "all_latest", "keep_going"], "it is the new run that is checked"),
    ("boot", &["print", "print_blockdev", "libvirt", "display", "json"], "for people who look"),
    ("backup", &["state_dir"], "one for all: 'backup --all --state-dir' or FLEECEFS_STATE_DIR"),
    ("prune", &["state_dir"], "as above"),
    ("verify", &["state_dir"], "as above"),
    ("boot", &["state_dir"], "as above"),
];

/// The commands that have keys, and the table in which they are; `None` for the VM's own.
pub(super) const COMMANDS: &[(&str, Option<&str>)] = &[
    ("backup", None),
    ("prune", Some("prune_options")),
    ("verify", Some("verify_options")),
    ("boot", Some("boot_check")),
];

/// The rules of `prune` are a VM's own keys, not those of its table.
const RULES: &str = "keep_";

/// The key that is a switch, and the table of how.
pub(crate) const BOOT_CHECK: &str = "boot_check";

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `true` or `false`.
    Flag,
    /// A text or a number.
    Text,
    /// One of them, or a list of them.
    List,
    /// A text, or `true` for the option without value.
    FlagOrText,
    /// A command and its arguments, or a list of commands.
    Commands,
}

impl Form {
    /// What has to stand there.
    pub(super) fn words(self) -> &'static str {
        match self {
            Form::Flag => "true or false",
            Form::Text => "a text or a number",
            Form::List => "a text or a list of texts",
            Form::FlagOrText => "true, false or a text",
            Form::Commands => "a command as a list of texts, such as [\"/usr/bin/logger\", \"x\"]",
        }
    }
}

/// A key.
#[derive(Debug, Clone)]
pub(super) struct Key {
    /// Its name, after that of its table and a dot if it is in one.
    pub name: String,
    /// The command whose option it is; empty for the configuration's own.
    pub command: &'static str,
    /// What it may be.
    pub form: Form,
    /// clap's definition.
    pub arg: Arg,
}

impl Key {
    fn of(command: &'static str, table: Option<&str>, arg: &Arg) -> Option<Self> {
        let long = arg.get_long()?.replace('-', "_");
        let table = table.filter(|_| !long.starts_with(RULES));
        let name = table.map_or_else(|| long.clone(), |t| format!("{t}.{long}"));
        let least = arg.get_num_args().map_or(1, |n| n.min_values());
        let form = match arg.get_action() {
            ArgAction::Append => Form::List,
            action if !action.takes_values() => Form::Flag,
            _ if least == 0 => Form::FlagOrText,
            _ => Form::Text,
        };
        Some(Key { name, command, form, arg: arg.clone() })
    }

    /// Its name without that of its table.
    pub(super) fn short(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// The option's long name.
    pub(super) fn long(&self) -> &str {
        self.arg.get_long().unwrap_or_default()
    }

    /// What it is if nothing is said, where that is a value.
    pub(super) fn default(&self) -> Option<String> {
        let values = self.arg.get_default_values();
        values
            .first()
            .filter(|_| !self.arg.is_hide_default_value_set())
            .map(|v| v.to_string_lossy().into())
    }

    /// Whether a text is a value of it, as clap's own parser has it.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check(&self, text: &str) -> Result<(), String> {
        let arg = Arg::new("value").long("value").num_args(1).action(ArgAction::Set);
        let arg = arg.value_parser(self.arg.get_value_parser().clone());
        let one = Command::new("key").no_binary_name(true).disable_help_flag(true).arg(arg);
        match one.try_get_matches_from([format!("--value={text}")]) {
            Ok(_) => self.check_path(text),
            Err(e) => Err(reason(&e, text)),
        }
    }

    /// Nobody knows in which folder a night begins.
    fn check_path(&self, text: &str) -> Result<(), String> {
        let path = match self.long() {
            "qmp" | "agent" | "nbd" if text.starts_with("tcp:") => return Ok(()),
            "qmp" | "agent" | "nbd" => text.strip_prefix("unix:").unwrap_or(text),
            "offline" => {
                ["raw:", "qcow2:"].iter().find_map(|p| text.strip_prefix(p)).unwrap_or(text)
            }
            _ if self.arg.get_value_parser().type_id() == TypeId::of::<PathBuf>() => text,
            _ => return Ok(()),
        };
        match path.starts_with('/') {
            true => Ok(()),
            false => Err(format!("'{text}' is not an absolute path")),
        }
    }
}

/// What clap says of a value.
fn reason(e: &clap::Error, text: &str) -> String {
    // A regular expression's error draws a picture; its last line says it.
    let source = std::error::Error::source(e).map(ToString::to_string);
    let source = source.map(|s| s.lines().next_back().unwrap_or_default().to_string());
    match (e.get(ContextKind::ValidValue), source) {
        (Some(ContextValue::Strings(all)), _) if !all.is_empty() => {
            format!("'{text}' is not one of {}", all.join(", "))
        }
        (_, Some(source)) if source.contains(text) => source,
        (_, Some(source)) => format!("'{text}': {source}"),
        _ => format!("'{text}' is not a value of it"),
    }
}

/// The configuration's own keys, written as options are, so that values are read in the same way.
fn own() -> Vec<(Form, Arg)> {
    let arg = |name: &'static str, help: &'static str| Arg::new(name).long(name).help(help);
    let time = |name, help| (Form::Text, arg(name, help).value_parser(values::duration));
    let flag = |name, help, on: &'static str| (Form::Flag, arg(name, help).default_value(on));
    let commands = |name, help| (Form::Commands, arg(name, help));
    vec![
        flag("enabled", "Whether the VM is backed up by --all", "true"),
        time("max-age", "How old the last point may be; what 'health' goes by"),
        time("timeout", "After so long a run of the VM is ended, and undone"),
        (
            Form::Text,
            arg("hours", "Begin no backup at other times of the day, as in 22:00-06:00")
                .value_parser(values::hours),
        ),
        (
            Form::Text,
            arg("when-off", "What is done where the VM is shut off")
                .value_parser(["skip", "offline"])
                .default_value("skip"),
        ),
        (
            Form::Text,
            arg("verify", "How new points are verified")
                .value_parser(["quick", "full", "none"])
                .default_value("quick"),
        ),
        flag("consolidate", "Shorten chains while pruning, where there are rules", "true"),
        flag("as-owner", "Work as the owner of the backup directory", "false"),
        flag("boot-check", "Boot the new points as a test VM ('boot --check')", "false"),
        commands("before", "Run this before the backup; where it fails there is none"),
        commands("after", "Run this after the backup, whatever came of it"),
        commands("on-failure", "Run this where something failed"),
    ]
}

/// The keys of the main file that are about no VM, and are read as the others are.
fn of_night() -> Vec<Key> {
    let arg = |name: &'static str, help: &'static str| Arg::new(name).long(name).help(help);
    let all = [
        (
            Form::List,
            arg("mail", "Who gets mail of what came of a night").value_parser(values::address),
        ),
        (Form::Text, arg("mail-on", "When there is mail").value_parser(["failure", "always"])),
        (
            Form::Text,
            arg("sendmail", "The program that takes it").value_parser(clap::value_parser!(PathBuf)),
        ),
    ];
    let key = |(form, arg): (Form, Arg)| {
        let name = arg.get_long().unwrap_or_default().replace('-', "_");
        Key { name, command: "", form, arg }
    };
    all.map(key).into()
}

/// All keys.
pub(super) struct Keys {
    of_vms: Vec<Key>,
    of_night: Vec<Key>,
}

impl Keys {
    /// Of a program's command line.
    pub(super) fn of(program: &Command) -> Self {
        let mut keys: Vec<Key> = Vec::new();
        for (form, arg) in own() {
            let name = arg.get_long().unwrap_or_default().replace('-', "_");
            keys.push(Key { name, command: "", form, arg });
        }
        for (name, table) in COMMANDS {
            let Some(command) = program.find_subcommand(name) else { continue };
            // It alone: options of all commands are none of it.
            let mut command = command.clone();
            command.build();
            let args = command.get_arguments().filter(|a| !is_left_out(name, a.get_id().as_str()));
            keys.extend(args.filter_map(|arg| Key::of(name, *table, arg)));
        }
        Keys { of_vms: keys, of_night: of_night() }
    }

    /// All of them that are said of VMs.
    pub(super) fn all(&self) -> &[Key] {
        &self.of_vms
    }

    /// The key of this name, which has that of its table.
    pub(super) fn get(&self, name: &str) -> Option<&Key> {
        self.of_vms.iter().find(|k| k.name == name)
    }

    /// The key of this name that is said of the night as a whole.
    pub(super) fn of_night(&self, name: &str) -> Option<&Key> {
        self.of_night.iter().find(|k| k.name == name)
    }

    /// Whether there is a table of this name.
    pub(super) fn is_table(name: &str) -> bool {
        COMMANDS.iter().any(|(_, table)| *table == Some(name))
    }

    /// `; did you mean X?`, if there is something alike in `table`.
    pub(super) fn hint(&self, table: &str, wrong: &str) -> String {
        let prefix = if table.is_empty() { String::new() } else { format!("{table}.") };
        let is_here = |k: &&Key| match k.name.strip_prefix(&prefix) {
            Some(rest) => !rest.contains('.'),
            None => false,
        };
        let tables = COMMANDS.iter().filter_map(|(_, t)| *t).filter(|_| table.is_empty());
        let names = self.of_vms.iter().filter(is_here).map(Key::short).chain(tables);
        did_you_mean(wrong, names)
    }
}

/// `; did you mean X?`, if one of the names is alike.
pub(super) fn did_you_mean<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> String {
    /// As clap's own for options: what is less alike is another word.
    const ALIKE: f64 = 0.7;
    let plain = wrong.to_lowercase().replace('-', "_");
    // A letter or two are in every word.
    let names = names.filter(|n| n.len() <= plain.len() * 2);
    let scored = names.map(|n| (strsim::jaro(&plain, n), n)).filter(|(score, _)| *score > ALIKE);
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"))
}

/// Whether an option is no key.
pub(crate) fn is_left_out(command: &str, id: &str) -> bool {
    let listed = LEFT_OUT.iter().any(|(c, ids, _)| *c == command && ids.contains(&id));
    listed || ["help", "version"].contains(&id)
}
