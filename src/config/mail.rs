//! Who gets mail of what came of a night, and when.

use super::problem::{Place, Problem};
use super::settings::{Setting, Settings, Source, Value};

/// The program that takes mail where nothing else is said.
const SENDMAIL: &str = "/usr/sbin/sendmail";

/// The mail of a night.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mail {
    /// Addresses.
    pub to: Vec<String>,
    /// Whether it is sent also where all went well.
    pub always: bool,
    /// The program that takes it, by its path.
    pub sendmail: String,
    /// Where `mail` stands.
    pub place: Place,
}

impl Mail {
    /// Of the main file's keys; `None` where nobody is to get mail.
    pub(super) fn of(keys: &Settings, problems: &mut Vec<Problem>) -> Option<Self> {
        let place = |s: &Setting| match &s.source {
            Source::File(place) | Source::Discovered(place) => Some(place.clone()),
            Source::Default => None,
        };
        let text = |key: &str| match keys.get(key).map(|s| &s.value) {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        };
        let Some(mail) = keys.get("mail") else {
            for (key, setting) in keys {
                let message = format!("{key} goes with mail: who gets it");
                let place = place(setting);
                problems.extend(place.map(|place| Problem { place, message, vm: None }));
            }
            return None;
        };
        let to = if let Value::List(all) = &mail.value { all.clone() } else { Vec::new() };
        Some(Mail {
            to,
            always: text("mail_on").as_deref() == Some("always"),
            sendmail: text("sendmail").unwrap_or_else(|| SENDMAIL.to_string()),
            place: place(mail)?,
        })
        .filter(|mail| !mail.to.is_empty())
    }
}
