//! A VM of the configuration: its settings over the defaults, and the command lines that they make.

use std::ffi::OsString;
use std::path::Path;

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use super::keys::{BOOT_CHECK, Key, Keys};
use super::problem::{Place, Problem};
use super::read::VM;
use super::settings::{Setting, Settings, Source, Value};
use super::values::{self, Hours};
use crate::units::parse_duration;

/// How a VM that runs, and one that is shut off, are backed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// By its QMP socket.
    Running,
    /// By its images.
    Offline,
}

/// A VM.
#[derive(Debug, Clone)]
pub(crate) struct Vm {
    /// Its name in the configuration.
    pub name: String,
    /// Where it is set down.
    pub place: Place,
    settings: Settings,
    /// Options by command, in the order of the table of keys.
    options: Vec<(&'static str, String, Vec<OsString>)>,
    /// Options that a VM that is shut off has no use for.
    running_only: Vec<String>,
}

impl Vm {
    /// Of its own settings and the defaults; `{vm}` in them is its name.
    pub(super) fn new(
        (name, place): (&str, Place),
        own: &Settings,
        defaults: &Settings,
        keys: &Keys,
    ) -> Self {
        let mut settings = Settings::new();
        let level = Value::Text("auto".into());
        settings.insert("level".into(), Setting { value: level, source: Source::Default });
        for key in keys.all().iter().filter(|k| k.command.is_empty()) {
            if let Some(value) = key.default() {
                let value = match value.as_str() {
                    "true" => Value::Flag(true),
                    "false" => Value::Flag(false),
                    _ => Value::Text(value),
                };
                settings.insert(key.name.clone(), Setting { value, source: Source::Default });
            }
        }
        for (key, setting) in defaults.iter().chain(own) {
            let value = setting.value.map(|text| named(text, name));
            settings.insert(key.clone(), Setting { value, source: setting.source.clone() });
        }
        let options = keys.all().iter().filter_map(|key| {
            let setting = settings.get(&key.name).filter(|_| !key.command.is_empty())?;
            Some((key.command, key.long().to_string(), written(key, &setting.value)))
        });
        let options = options.collect();
        Vm { name: name.to_string(), place, settings, options, running_only: Vec::new() }
    }

    /// All that is set.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A switch.
    pub(crate) fn is_on(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Flag(true)))
    }

    /// A text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.value(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A text, or all texts of a list.
    pub(super) fn texts(&self, key: &str) -> &[String] {
        match self.value(key) {
            Some(Value::Text(text)) => std::slice::from_ref(text),
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }

    /// Commands.
    pub(crate) fn commands(&self, key: &str) -> &[Vec<String>] {
        match self.value(key) {
            Some(Value::Commands(all)) => all,
            _ => &[],
        }
    }

    /// A duration in seconds.
    pub(crate) fn seconds(&self, key: &str) -> Option<u64> {
        self.text(key).and_then(|text| parse_duration(text).ok())
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.settings.get(key).map(|s| &s.value)
    }

    /// The backup directory. It is there where the VM has no problems.
    pub(crate) fn target(&self) -> Option<&Path> {
        self.text("target").map(Path::new)
    }

    /// How old the last point may be, in seconds.
    pub(crate) fn max_age(&self) -> Option<u64> {
        self.seconds("max_age")
    }

    /// Whether `--all` is about it.
    pub(crate) fn is_enabled(&self) -> bool {
        self.is_on("enabled")
    }

    /// When a backup of it may begin.
    pub(crate) fn hours(&self) -> Option<Hours> {
        self.text("hours").and_then(|text| values::hours(text).ok())
    }

    /// Whether its images are named.
    pub(crate) fn has_images(&self) -> bool {
        self.value("offline").is_some()
    }

    /// Whether it has a rule of retention; one for what is gone is none for the rest.
    pub(crate) fn has_rules(&self) -> bool {
        let is_rule = |long: &str| long.starts_with("keep-") && long != "keep-gone";
        self.options.iter().any(|(_, long, _)| is_rule(long))
    }

    /// Whether its new points are booted.
    pub(crate) fn boots(&self) -> bool {
        self.is_on(BOOT_CHECK)
    }

    /// The options of `backup`.
    pub(crate) fn backup(&self, how: How) -> Vec<OsString> {
        let is_for = |long: &str| match how {
            How::Running => !["offline", "backing-file"].contains(&long),
            How::Offline => !self.running_only.iter().any(|l| l == long),
        };
        self.of("backup", is_for)
    }

    /// The options of another command, without what the night itself says.
    pub(crate) fn options(&self, command: &str) -> Vec<OsString> {
        self.of(command, |_| true)
    }

    fn of(&self, command: &str, is_for: impl Fn(&str) -> bool) -> Vec<OsString> {
        let own = self.options.iter().filter(|(c, long, _)| *c == command && is_for(long));
        own.flat_map(|(_, _, words)| words.iter().cloned()).collect()
    }

    /// The command lines that it makes, as they are checked.
    fn lines(&self) -> Vec<(&'static str, Vec<OsString>)> {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let dir = self.target().unwrap_or(Path::new("/")).as_os_str().to_os_string();
        let begin = |name: &str, more: &[&str]| {
            let mut line = words(&["fleecefs", name]);
            line.push(dir.clone());
            line.extend(words(more));
            line.extend(self.options(name));
            line
        };
        let mut lines = Vec::new();
        for (how, key) in [(How::Running, "qmp"), (How::Offline, "offline")] {
            if self.value(key).is_some() {
                lines.push(("", [words(&["fleecefs", "backup"]), self.backup(how)].concat()));
            }
        }
        lines.push(("verify_options.", begin("verify", &[])));
        lines.push(("boot_check.", begin("boot", &["--check"])));
        lines.push(("prune_options.", begin("prune", &[])));
        lines
    }

    /// What cannot be together, or is missing.
    pub(super) fn check(&mut self, program: &Command) -> Vec<Problem> {
        self.running_only = running_only(program);
        let mut problems = Vec::new();
        let mut say = |place: Place, message: String| {
            problems.push(Problem { place, message, vm: Some(self.name.clone()) });
        };
        if self.target().is_none() {
            say(
                self.place.clone(),
                format!("VM {}: target is missing (target = \"/backups/{VM}\")", self.name),
            );
        }
        if self.value("qmp").is_none() && !self.has_images() {
            say(
                self.place.clone(),
                format!(
                    "VM {}: qmp is missing: QEMU's QMP socket (or offline: its images)",
                    self.name
                ),
            );
        }
        if self.text("when_off") == Some("offline") && !self.has_images() {
            say(
                self.place_of("when_off"),
                format!("VM {}: when_off = \"offline\" needs offline: the images", self.name),
            );
        }
        if self.value("full_every").is_some() && self.text("level") != Some("auto") {
            say(
                self.place_of("full_every"),
                format!("VM {}: full_every goes with level = \"auto\"", self.name),
            );
        }
        if self.text("verify") == Some("full") && self.is_on("no_hash") {
            let what = "verify = \"full\" compares with the hash that no_hash leaves out: no night would go well";
            say(self.place_of("no_hash"), format!("VM {}: {what} (verify = \"quick\")", self.name));
        }
        if problems.is_empty() {
            for (table, line) in self.lines() {
                if let Err(e) = program.clone().try_get_matches_from(&line) {
                    problems.push(self.combination((program, table, line.as_slice()), &e));
                }
            }
        }
        problems
    }

    /// Where a key was set, else the VM itself.
    pub(crate) fn place_of(&self, key: &str) -> Place {
        match self.settings.get(key).map(|s| &s.source) {
            Some(Source::File(place) | Source::Discovered(place)) => place.clone(),
            _ => self.place.clone(),
        }
    }

    /// What clap says of options that do not go together.
    fn combination(
        &self,
        (program, table, line): (&Command, &str, &[OsString]),
        e: &clap::Error,
    ) -> Problem {
        let name = |arg: &String| format!("{table}{}", key_of(arg));
        let args = |kind| match e.get(kind) {
            Some(ContextValue::String(one)) => vec![name(one)],
            Some(ContextValue::Strings(all)) => all.iter().map(name).collect(),
            _ => Vec::new(),
        };
        let (these, others) = (args(ContextKind::InvalidArg), args(ContextKind::PriorArg));
        let (key, what) = match e.kind() {
            ErrorKind::MissingRequiredArgument => match needing(program, line) {
                Some(word) => {
                    let key = name(&word);
                    let what = format!("{key} needs {}", these.join(", "));
                    (Some(key), what)
                }
                None => (None, format!("{} is missing", these.join(", "))),
            },
            ErrorKind::ArgumentConflict => {
                let what =
                    format!("{} cannot be used with {}", these.join(", "), others.join(", "));
                (these.first().cloned(), what)
            }
            _ => (None, e.to_string().lines().next().unwrap_or_default().to_string()),
        };
        let place = key.map_or_else(|| self.place.clone(), |key| self.place_of(&key));
        Problem { place, message: format!("VM {}: {what}", self.name), vm: Some(self.name.clone()) }
    }
}

/// The option without which nothing is missing.
fn needing(program: &Command, line: &[OsString]) -> Option<String> {
    let words = line.iter().filter_map(|w| w.to_str()).filter(|w| w.starts_with("--"));
    let mut options: Vec<&str> = words.map(|w| w.split('=').next().unwrap_or(w)).collect();
    options.dedup();
    let is_other = |word: &OsString, option: &str| {
        let word = word.to_str().unwrap_or_default();
        word.split('=').next() != Some(option)
    };
    let found = options.into_iter().find(|option| {
        let rest: Vec<&OsString> = line.iter().filter(|w| is_other(w, option)).collect();
        program.clone().try_get_matches_from(rest).is_ok()
    });
    found.map(str::to_string)
}

/// `--keep-daily <N>` as a key.
fn key_of(arg: &str) -> String {
    let long = arg.trim_start_matches('-');
    let end = long.find([' ', '=', '[']).unwrap_or(long.len());
    long.get(..end).unwrap_or(long).replace('-', "_")
}

/// A text with the VM's name where `{vm}` stands; not where a shell's own `${vm}` does.
fn named(text: &str, name: &str) -> String {
    let mut parts = text.split(VM);
    let first = parts.next().unwrap_or_default().to_string();
    parts.fold(first, |done, part| {
        let put = if done.ends_with('$') { VM } else { name };
        done + put + part
    })
}

/// Options that cannot be with images of a VM that is shut off.
fn running_only(program: &Command) -> Vec<String> {
    let Some(backup) = program.find_subcommand("backup") else { return Vec::new() };
    let mut backup = backup.clone();
    backup.build();
    let offline = backup.get_arguments().find(|a| a.get_id() == "offline");
    let conflicts = offline.map(|a| backup.get_arg_conflicts_with(a)).unwrap_or_default();
    let mut longs: Vec<String> =
        conflicts.iter().filter_map(|a| a.get_long()).map(str::to_string).collect();
    // What needs one of them.
    longs.extend(["freeze", "guest-before", "guest-after"].map(str::to_string));
    longs
}

/// A value as it stands on a command line.
fn written(key: &Key, value: &Value) -> Vec<OsString> {
    let long = key.long();
    let one = |text: &String| OsString::from(format!("--{long}={text}"));
    match value {
        Value::Flag(true) => vec![format!("--{long}").into()],
        Value::Flag(false) | Value::Commands(_) => Vec::new(),
        Value::Text(text) => vec![one(text)],
        Value::List(list) => list.iter().map(one).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vms_name_stands_for_its_place_and_not_for_a_shells_variable() {
        assert_eq!(named("/backups/{vm}/{vm}x", "web"), "/backups/web/webx");
        assert_eq!(
            named("for vm in a; do x ${vm} {vm}; done", "web"),
            "for vm in a; do x ${vm} web; done"
        );
        assert_eq!(named("none", "web"), "none");
    }
}
