//! Asynchronous messages: what QEMU says unasked.

use serde::Deserialize;
use serde_json::Value;

/// One event.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    /// Its name, such as `JOB_STATUS_CHANGE`.
    #[serde(rename = "event")]
    pub name: String,
    /// What it carries.
    #[serde(default)]
    pub data: Value,
}

impl Event {
    /// The job that this event says has left the running states: concluded, or its status null.
    pub fn job_ended(&self) -> Option<&str> {
        let status = self.data.get("status").and_then(Value::as_str);
        match (self.name.as_str(), status) {
            ("JOB_STATUS_CHANGE", Some("concluded" | "null" | "aborting")) => {
                self.data.get("id").and_then(Value::as_str)
            }
            ("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_ERROR", _) => {
                self.data.get("device").and_then(Value::as_str)
            }
            _ => None,
        }
    }

    /// The export that is gone now.
    pub fn export_deleted(&self) -> Option<&str> {
        (self.name == "BLOCK_EXPORT_DELETED")
            .then(|| self.data.get("id").and_then(Value::as_str))
            .flatten()
    }
}
