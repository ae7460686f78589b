//! What is set, and where.

use std::collections::BTreeMap;

use super::problem::Place;

/// The value of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// `true` or `false`.
    Flag(bool),
    /// A text, or a number as a text.
    Text(String),
    /// Several texts.
    List(Vec<String>),
    /// Commands with their arguments.
    Commands(Vec<Vec<String>>),
}

impl Value {
    /// With what `with` makes of each text.
    pub(super) fn map(&self, with: impl Fn(&str) -> String) -> Self {
        let all = |list: &[String]| list.iter().map(|t| with(t)).collect::<Vec<_>>();
        match self {
            Value::Flag(on) => Value::Flag(*on),
            Value::Text(text) => Value::Text(with(text)),
            Value::List(list) => Value::List(all(list)),
            Value::Commands(list) => Value::Commands(list.iter().map(|c| all(c)).collect()),
        }
    }

    /// As JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        match self {
            Value::Flag(on) => serde_json::json!(on),
            Value::Text(text) => serde_json::json!(text),
            Value::List(list) => serde_json::json!(list),
            Value::Commands(list) => serde_json::json!(list),
        }
    }
}

impl std::fmt::Display for Value {
    /// As it is written in a file.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let quoted =
            |list: &[String]| list.iter().map(|t| format!("{t:?}")).collect::<Vec<_>>().join(", ");
        match self {
            Value::Flag(on) => write!(f, "{on}"),
            Value::Text(text) => write!(f, "{text:?}"),
            Value::List(list) => write!(f, "[{}]", quoted(list)),
            Value::Commands(list) => {
                let commands: Vec<String> =
                    list.iter().map(|c| format!("[{}]", quoted(c))).collect();
                write!(f, "[{}]", commands.join(", "))
            }
        }
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nothing is said.
    Default,
    /// A line of a file.
    File(Place),
    /// It was found; the pattern is there.
    Discovered(Place),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(place) => write!(f, "{place}"),
            Source::Discovered(place) => write!(f, "found by {place}"),
        }
    }
}

/// A value and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The value.
    pub value: Value,
    /// Where it comes from.
    pub source: Source,
}

/// Settings by key; a key in a table has that table's name and a dot before its own.
pub(crate) type Settings = BTreeMap<String, Setting>;
