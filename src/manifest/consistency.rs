//! What state of the guest a point is.

use serde::{Deserialize, Serialize};

/// The reason in a manifest that was made afterwards: what it says was achieved is a default.
pub const RECORDED: &str = "recorded afterwards";

/// The reason in the manifest of a VM that was shut off.
pub const OFFLINE: &str = "the VM was shut off";

/// What a manifest knows to have been achieved.
pub(super) fn achieved<'a, D: serde::Deserializer<'a>>(
    from: D,
) -> std::result::Result<Option<Achieved>, D::Error> {
    // What a later version may put there is unknown, and no reason to do without the rest.
    let known = serde_json::Value::deserialize(from)?;
    let achieved = known.get("achieved").map(Achieved::deserialize).and_then(|a| a.ok());
    let reason = |text: &str| known.get("reason").is_some_and(|r| r == text);
    Ok(match achieved {
        _ if reason(RECORDED) => None,
        Some(Achieved::Crash) if reason(OFFLINE) => Some(Achieved::Offline),
        known => known,
    })
}

/// What state of the guest the freeze point is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Consistency {
    /// What was achieved.
    pub achieved: Achieved,
    /// Why not more, in words; empty if there is no more.
    pub reason: String,
    /// Whether all disks of the run share one freeze point.
    pub one_moment: bool,
    /// How long the guest was stopped for it, in milliseconds.
    pub stopped_ms: u64,
    /// How long the guest's file systems were frozen for it, in milliseconds: from the order to freeze them to the
    /// agent's word that they are thawed. With `--pause` they are thawed after the manifest is written: 0.
    pub frozen_ms: u64,
    /// Mount points that were frozen.
    pub frozen: Vec<String>,
}

impl Consistency {
    /// Of a point whose consistency nobody recorded.
    pub fn unknown() -> Self {
        Consistency { reason: RECORDED.into(), ..Consistency::default() }
    }
}

/// Degrees of consistency, least first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Achieved {
    /// As after a power cut.
    #[default]
    Crash,
    /// The guest's file systems were frozen.
    FileSystem,
    /// They were frozen, and the commands that were to run in the guest before and after it all succeeded.
    Application,
    /// The guest was stopped for the whole backup.
    Paused,
    /// The VM was shut off. In a manifest this is [`Achieved::Crash`] with the reason [`OFFLINE`].
    #[serde(skip)]
    Offline,
}

impl Achieved {
    /// The word that stands in manifests; `unknown` where nobody knows.
    pub fn word(achieved: Option<Achieved>) -> &'static str {
        match achieved {
            None => "unknown",
            Some(Achieved::Crash) => "crash",
            Some(Achieved::FileSystem) => "file-system",
            Some(Achieved::Application) => "application",
            Some(Achieved::Paused) => "paused",
            Some(Achieved::Offline) => "offline",
        }
    }
}
