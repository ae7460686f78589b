//! The configuration: which VMs are backed up, and how. Written for whoever needs it:
//!
//! - [`load`]`(&`[`ConfigFile`]`, &program)` gives a [`Config`]: `vms`, each a [`Vm`] with `name`, `target()`,
//!   `max_age()` (seconds), `is_enabled()`; `problems`, what is wrong with the files; `notes`, what was passed over.
//!   `program` is the whole command line as clap defines it (`Cli::command()`). [`ConfigFile`] is where it is:
//!   `ConfigFile::named(path)`, or `ConfigFile::usual()`. Commands take `cli::config_file::ConfigFileArgs` among their
//!   options, whose `load(program)` does all this.
//! - A [`Problem`] with a `vm` concerns that VM alone: others are backed up all the same. Its `Display` is
//!   `FILE:LINE:COLUMN: MESSAGE`.
//!
//! The main file is `fleecefs.toml`: `[defaults]`, `[vms.NAME]`, `discover`, `parallel`, `mail`. Beside it may be a folder `vms.d`,
//! where `NAME.toml` has the keys of the VM `NAME`. Keys are the options of `backup`, `prune`, `verify` and `boot --check`
//! as clap defines them (`keys`), so that one table is the truth for both.
//!
//! What is in these files decides what root does: they and their folders have to be root's or the user's own, and nobody
//! else may write to them.

mod discover;
mod keys;
mod mail;
mod place;
mod problem;
mod read;
mod same;
mod settings;
mod values;
mod vm;

use clap::Command;

#[cfg(test)]
pub(crate) use keys::is_left_out;
pub(crate) use mail::Mail;
pub(crate) use place::{ConfigFile, check_program};
pub(crate) use problem::{Place, Problem};
pub(crate) use settings::{Setting, Settings, Source, Value};
pub(crate) use vm::{How, Vm};

use crate::error::{Error, Kind, Result};
use crate::text::path_text;
use keys::Keys;
use read::{MainFile, Reader, VmTable};

/// The most VMs of one configuration.
const MOST_VMS: usize = 1000;

/// What the configuration says.
#[derive(Debug)]
pub(crate) struct Config {
    /// The VMs, by name; also those with problems.
    pub vms: Vec<Vm>,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What was passed over, and why.
    pub notes: Vec<String>,
    /// How many VMs are backed up side by side, if that is said.
    pub parallel: Option<usize>,
    /// Who gets mail of what came of a night.
    pub mail: Option<Mail>,
    /// What runs where a whole night is refused: the defaults' `on_failure`, as far as it is about no one VM.
    pub on_refusal: Vec<Vec<String>>,
}

impl Config {
    /// The VM of this name.
    ///
    /// # Errors
    /// `NotFound`, with the nearest name.
    pub(crate) fn vm(&self, name: &str) -> Result<&Vm> {
        self.vms.iter().find(|vm| vm.name == name).ok_or_else(|| {
            let names = self.vms.iter().map(|vm| vm.name.as_str());
            let hint = keys::did_you_mean(name, names);
            let what = format!("no VM {} in the configuration{hint}", path_text(name));
            Error::new(Kind::NotFound, what).remedy("'fleecefs config list' shows all")
        })
    }

    /// What is wrong with the VM `name`.
    pub(crate) fn problems_of(&self, name: &str) -> Vec<&Problem> {
        self.problems.iter().filter(|p| p.vm.as_deref() == Some(name)).collect()
    }

    /// What is wrong for all VMs.
    pub(crate) fn common_problems(&self) -> Vec<&Problem> {
        self.problems.iter().filter(|p| p.vm.is_none()).collect()
    }
}

/// Whether there is a key of this name.
#[cfg(test)]
pub(crate) fn has_key(program: &Command, name: &str) -> bool {
    Keys::of(program).get(name).is_some()
}

/// The options that are no keys, by command.
#[cfg(test)]
pub(crate) fn left_out() -> Vec<(&'static str, &'static str)> {
    let all = keys::LEFT_OUT.iter();
    all.flat_map(|(command, ids, _)| ids.iter().map(|id| (*command, *id))).collect()
}

/// Reads the configuration.
///
/// # Errors
/// `NotFound` if there is none; `Permission` if others may change it; it cannot be read. What is wrong with its contents
/// is in [`Config::problems`].
pub(crate) fn load(file: &ConfigFile, program: &Command) -> Result<Config> {
    let keys = Keys::of(program);
    let mut problems = Vec::new();
    let (main, vm_files) = file.read()?;
    let main = main.map(|f| {
        let reader = Reader::new((&f.path, &f.text), &keys, &mut problems);
        (reader.main(), f.path)
    });
    let mut read = main.map_or_else(MainFile::default, |(main, _)| main);
    for (name, path, text) in &vm_files {
        let whole = |message| Problem { place: Place::file(path), message, vm: Some(name.clone()) };
        let table = match (values::vm_name(name), text) {
            (Ok(()), Ok(f)) => Reader::new((&f.path, &f.text), &keys, &mut problems).vm(name),
            (Err(why), _) => {
                problems.push(whole(why));
                VmTable::empty(Place::file(path))
            }
            (_, Err(e)) => {
                problems.push(whole(e.report()));
                VmTable::empty(Place::file(path))
            }
        };
        if let Some(there) = read.vms.get(name) {
            let message = format!("VM {name} is also in {}", there.place);
            problems.push(Problem { place: table.place, message, vm: Some(name.clone()) });
            continue;
        }
        read.vms.insert(name.clone(), table);
    }
    let mut notes = Vec::new();
    discovered(&mut read, &mut notes);
    let vms = merged(&read, &keys, program, &mut problems);
    notes.extend(same::nested(&vms));
    let mail = Mail::of(&read.night, &mut problems);
    problems.sort_by(|a, b| (&a.place, &a.message).cmp(&(&b.place, &b.message)));
    problems.dedup();
    let on_refusal = on_refusal(&read.defaults);
    Ok(Config { vms, problems, notes, parallel: read.parallel, mail, on_refusal })
}

/// The commands of the defaults' `on_failure` in which no VM's name has to stand.
fn on_refusal(defaults: &Settings) -> Vec<Vec<String>> {
    let Some(Value::Commands(all)) = defaults.get("on_failure").map(|s| &s.value) else {
        return Vec::new();
    };
    let is_for_all = |command: &&Vec<String>| !command.iter().any(|word| word.contains(read::VM));
    all.iter().filter(is_for_all).cloned().collect()
}

/// Adds the VMs that are found by their sockets. What a file says of one of them holds.
fn discovered(read: &mut MainFile, notes: &mut Vec<String>) {
    for (pattern, place) in std::mem::take(&mut read.discover) {
        for found in discover::found(&pattern, notes) {
            let Some(socket) = found.socket.to_str() else { continue };
            let own = Setting {
                value: Value::Text(socket.to_string()),
                source: Source::Discovered(place.clone()),
            };
            let table = read.vms.entry(found.name).or_insert_with(|| VmTable::empty(place.clone()));
            table.settings.entry("qmp".into()).or_insert(own);
        }
    }
}

fn merged(read: &MainFile, keys: &Keys, program: &Command, problems: &mut Vec<Problem>) -> Vec<Vm> {
    let mut vms = Vec::new();
    if let Some((name, table)) = read.vms.iter().nth(MOST_VMS) {
        let message = format!("more than {MOST_VMS} VMs, {name} is one too many");
        problems.push(Problem { place: table.place.clone(), message, vm: None });
    }
    for (name, table) in read.vms.iter().take(MOST_VMS) {
        // A name that is none becomes part of no path and of no command.
        let safe = match values::vm_name(name) {
            Ok(()) => None,
            Err(_) => Some(without_name(&read.defaults)),
        };
        let defaults = safe.as_ref().unwrap_or(&read.defaults);
        let mut vm = Vm::new((name, table.place.clone()), &table.settings, defaults, keys);
        // A key that could not be read may be the one that is missing.
        let is_known = problems.iter().any(|p| p.vm.as_ref().is_none_or(|of| of == name));
        let wrong = vm.check(program);
        if !is_known {
            problems.extend(wrong);
        }
        vms.push(vm);
    }
    problems.extend(same::targets(&vms));
    problems.extend(same::sources(&vms));
    vms
}

/// The settings in whose texts the VM's name is not.
fn without_name(settings: &Settings) -> Settings {
    let named = |value: &Value| value.map(|text| text.replace(read::VM, "")) != *value;
    let all = settings.iter().filter(|(_, s)| !named(&s.value));
    all.map(|(key, s)| (key.clone(), s.clone())).collect()
}
