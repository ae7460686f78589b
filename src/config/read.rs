//! One file to settings: TOML whose every key and value is held against the table of keys.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::keys::{BOOT_CHECK, Form, Key, Keys, did_you_mean};
use super::problem::{Place, Problem};
use super::settings::{Setting, Settings, Source, Value};
use super::values::vm_name;

/// A VM's own settings, and where they begin.
#[derive(Debug)]
pub(super) struct VmTable {
    /// Its name in a file.
    pub place: Place,
    /// What is set.
    pub settings: Settings,
}

impl VmTable {
    /// Nothing is set, or nothing could be read.
    pub(super) fn empty(place: Place) -> Self {
        VmTable { place, settings: Settings::new() }
    }
}

/// What the main file says.
#[derive(Debug, Default)]
pub(super) struct MainFile {
    /// For all VMs.
    pub defaults: Settings,
    /// Of each VM.
    pub vms: BTreeMap<String, VmTable>,
    /// Patterns of sockets.
    pub discover: Vec<(String, Place)>,
    /// How many are backed up side by side.
    pub parallel: Option<usize>,
    /// What is said of the night as a whole: the keys about mail.
    pub night: Settings,
}

/// Reads one file.
pub(super) struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    keys: &'a Keys,
    /// The VM that what is read is about.
    vm: Option<String>,
    problems: &'a mut Vec<Problem>,
}

type Table<'i> = DeTable<'i>;
type Item<'i> = Spanned<DeValue<'i>>;

/// The keys of the main file.
const MAIN: &[&str] = &["defaults", "vms", "discover", "parallel", "mail", "mail_on", "sendmail"];

impl<'a> Reader<'a> {
    /// For the file at `path` with this text.
    pub(super) fn new(
        (path, text): (&'a Path, &'a str),
        keys: &'a Keys,
        problems: &'a mut Vec<Problem>,
    ) -> Self {
        Reader { path, text, keys, vm: None, problems }
    }

    /// Reads it as the main file.
    pub(super) fn main(mut self) -> MainFile {
        let mut file = MainFile::default();
        let (table, keys) = (self.parsed(), self.keys);
        for (name, item) in &table {
            match (name.get_ref().as_ref(), item.get_ref()) {
                ("defaults", DeValue::Table(inner)) => file.defaults = self.settings(inner),
                ("vms", DeValue::Table(inner)) => self.vms(inner, &mut file.vms),
                ("defaults" | "vms", other) => self.wrong_type(name, item, "a table", other),
                ("discover", _) => file.discover = self.discover(name, item),
                ("parallel", value) => file.parallel = self.parallel(name, item, value),
                (other, _) => match keys.of_night(other) {
                    Some(key) => self.of_night(key, name, item, &mut file.night),
                    None => self.unknown_in_main(name, other),
                },
            }
        }
        file
    }

    /// Reads it as the file of the VM `name`.
    pub(super) fn vm(mut self, name: &str) -> VmTable {
        self.vm = Some(name.to_string());
        let table = self.parsed();
        VmTable { place: Place::file(self.path), settings: self.settings(&table) }
    }

    fn parsed(&mut self) -> Table<'a> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for e in &errors {
            self.problem(
                e.span().map_or(0, |s| s.start),
                format!("not TOML: {}", first_line(e.message())),
            );
        }
        // What else would be said of it may come of the same mistake.
        if errors.is_empty() { table.into_inner() } else { DeTable::default() }
    }

    fn place(&self, at: usize) -> Place {
        Place::of(self.path, self.text, at)
    }

    fn problem(&mut self, at: usize, message: String) {
        let place = self.place(at);
        self.problems.push(Problem { place, message, vm: self.vm.clone() });
    }

    fn wrong_type<K: AsRef<str>>(
        &mut self,
        name: &Spanned<K>,
        item: &Item<'_>,
        wanted: &str,
        is: &DeValue<'_>,
    ) {
        let what = format!("{} must be {wanted}, not {}", name.get_ref().as_ref(), type_of(is));
        self.problem(start(item.span()), what);
    }

    fn unknown_in_main<K>(&mut self, name: &Spanned<K>, wrong: &str) {
        let what = match self.keys.get(wrong).is_some() || Keys::is_table(wrong) {
            true => format!("{wrong} is said of VMs: put it below [defaults] or [vms.NAME]"),
            false => format!("unknown key {wrong}{}", did_you_mean(wrong, MAIN.iter().copied())),
        };
        self.problem(start(name.span()), what);
    }

    fn vms(&mut self, table: &Table<'_>, vms: &mut BTreeMap<String, VmTable>) {
        for (name, item) in table {
            let vm = name.get_ref().to_string();
            let at = start(name.span());
            self.vm = Some(vm.clone());
            if let Err(why) = vm_name(&vm) {
                self.problem(at, format!("vms.{vm}: {why}"));
                vms.insert(vm, VmTable::empty(self.place(at)));
                self.vm = None;
                continue;
            }
            match item.get_ref() {
                DeValue::Table(inner) => {
                    let (place, settings) = (self.place(at), self.settings(inner));
                    vms.insert(vm, VmTable { place, settings });
                }
                other => {
                    self.wrong_type(name, item, "a table", other);
                    vms.insert(vm, VmTable::empty(self.place(at)));
                }
            }
            self.vm = None;
        }
    }

    fn discover<K: AsRef<str>>(
        &mut self,
        name: &Spanned<K>,
        item: &Item<'_>,
    ) -> Vec<(String, Place)> {
        let items: Vec<&Item<'_>> = match item.get_ref() {
            DeValue::Array(list) => list.iter().collect(),
            _ => vec![item],
        };
        let mut found = Vec::new();
        for item in items {
            let Some(text) = item.get_ref().as_str() else {
                self.wrong_type(name, item, Form::List.words(), item.get_ref());
                continue;
            };
            let at = start(item.span());
            match text.starts_with('/') && text.matches('*').count() == 1 && !text.contains("/../") {
                true => found.push((text.to_string(), self.place(at))),
                false => self.problem(
                    at,
                    format!("discover: '{text}' is not an absolute path with one *, which stands for the VM's name"),
                ),
            }
        }
        found
    }

    fn parallel<K: AsRef<str>>(
        &mut self,
        name: &Spanned<K>,
        item: &Item<'_>,
        value: &DeValue<'_>,
    ) -> Option<usize> {
        let number = value.as_integer().and_then(decimal).and_then(|n| n.parse::<usize>().ok());
        let good = number.filter(|n| (1..=MOST_PARALLEL).contains(n));
        if good.is_none() {
            let what =
                format!("{} must be a number from 1 to {MOST_PARALLEL}", name.get_ref().as_ref());
            self.problem(start(item.span()), what);
        }
        good
    }

    fn of_night<K>(&mut self, key: &Key, name: &Spanned<K>, item: &Item<'_>, night: &mut Settings) {
        if let Some(value) = self.value(key, item) {
            let source = Source::File(self.place(start(name.span())));
            night.insert(key.name.clone(), Setting { value, source });
        }
    }

    /// The keys of a VM, or of the defaults.
    fn settings(&mut self, table: &Table<'_>) -> Settings {
        let mut settings = Settings::new();
        for (name, item) in table {
            match item.get_ref() {
                DeValue::Table(inner) if Keys::is_table(name.get_ref()) => {
                    if name.get_ref() == BOOT_CHECK {
                        let source = Source::File(self.place(start(name.span())));
                        let on = Setting { value: Value::Flag(true), source };
                        settings.insert(BOOT_CHECK.into(), on);
                    }
                    for (inside, item) in inner {
                        self.setting(name.get_ref(), inside, item, &mut settings);
                    }
                }
                _ => self.setting("", name, item, &mut settings),
            }
        }
        settings
    }

    fn setting<K: AsRef<str>>(
        &mut self,
        table: &str,
        name: &Spanned<K>,
        item: &Item<'_>,
        settings: &mut Settings,
    ) {
        let short = name.get_ref().as_ref();
        let full = if table.is_empty() { short.to_string() } else { format!("{table}.{short}") };
        let keys = self.keys;
        let Some(key) = keys.get(&full) else {
            let what = match Keys::is_table(short) && table.is_empty() {
                true => format!("{short} must be a table"),
                false => format!("unknown key {full}{}", keys.hint(table, short)),
            };
            return self.problem(start(name.span()), what);
        };
        if let Some(value) = self.value(key, item) {
            let source = Source::File(self.place(start(name.span())));
            settings.insert(full, Setting { value, source });
        }
    }

    /// The value of a key, if it is one.
    fn value(&mut self, key: &Key, item: &Item<'_>) -> Option<Value> {
        match (key.form, item.get_ref()) {
            (Form::Flag | Form::FlagOrText, DeValue::Boolean(on)) => Some(Value::Flag(*on)),
            (Form::Flag, _) => self.not_a_value(key, item),
            (Form::Commands, DeValue::Array(list)) => match commands(list) {
                Some(commands) => Some(Value::Commands(commands)),
                None => self.not_a_value(key, item),
            },
            (Form::List, DeValue::Array(list)) => {
                let all: Vec<Option<String>> =
                    list.iter().map(|item| self.text(key, item)).collect();
                all.into_iter().collect::<Option<Vec<_>>>().map(Value::List)
            }
            (Form::List, _) => self.text(key, item).map(|text| Value::List(vec![text])),
            (Form::Text | Form::FlagOrText, _) => self.text(key, item).map(Value::Text),
            (Form::Commands, _) => self.not_a_value(key, item),
        }
    }

    fn not_a_value<T>(&mut self, key: &Key, item: &Item<'_>) -> Option<T> {
        let what =
            format!("{} must be {}, not {}", key.name, key.form.words(), type_of(item.get_ref()));
        self.problem(start(item.span()), what);
        None
    }

    fn text(&mut self, key: &Key, item: &Item<'_>) -> Option<String> {
        let text = match item.get_ref() {
            DeValue::String(text) => text.to_string(),
            // Permissions are octal on the command line, too.
            DeValue::Integer(n) if n.radix() == 8 && key.long() == "mode" => n.as_str().to_string(),
            DeValue::Integer(n) => match decimal(n) {
                Some(text) => text,
                None => {
                    let what = format!("{}: the number is too large", key.name);
                    self.problem(start(item.span()), what);
                    return None;
                }
            },
            _ => return self.not_a_value(key, item),
        };
        let wrong = match text.contains('\0') {
            true => Err("a text with a NUL".to_string()),
            false => key.check(&text.replace(VM, "vm")),
        };
        match wrong {
            Ok(()) => Some(text),
            Err(why) => {
                self.problem(start(item.span()), format!("{}: {why}", key.name));
                None
            }
        }
    }
}

/// The most VMs that may be backed up side by side.
pub(super) const MOST_PARALLEL: usize = 64;

/// What stands for the VM's name in texts.
pub(super) const VM: &str = "{vm}";

fn start(span: Range<usize>) -> usize {
    span.start
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a point",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// An integer in decimal digits, however it is written.
fn decimal(n: &DeInteger<'_>) -> Option<String> {
    i64::from_str_radix(n.as_str(), n.radix()).ok().map(|n| n.to_string())
}

/// A command, or several.
fn commands(list: &[Item<'_>]) -> Option<Vec<Vec<String>>> {
    let one = |list: &[Item<'_>]| -> Option<Vec<String>> {
        let words: Option<Vec<String>> =
            list.iter().map(|i| i.get_ref().as_str().map(str::to_string)).collect();
        words.filter(|w| !w.is_empty() && w.iter().all(|w| !w.contains('\0')))
    };
    if list.first().is_some_and(|i| i.get_ref().is_str()) {
        return one(list).map(|c| vec![c]);
    }
    list.iter().map(|i| one(i.get_ref().as_array()?)).collect()
}
