//! What QEMU tells without being asked: of jobs of other programs, and what may end a wait.

use serde_json::Value;

use super::budget::clip;

/// How many events of jobs are kept between two looks, and how long the name of a job may be.
const JOB_EVENTS: usize = 1024;
const LONGEST_JOB: usize = 256;
/// The longest word for a state that is kept.
const LONGEST_STATUS: usize = 64;

/// What was heard of jobs of other programs.
#[derive(Debug, Default)]
pub struct JobEvents {
    /// In order.
    pub events: Vec<JobEvent>,
    /// More came than are kept.
    pub lost: bool,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEvent {
    /// The job.
    pub job: String,
    /// The state that it has come to; `None` for an event that only block jobs have.
    pub status: Option<String>,
}

impl JobEvents {
    /// Keeps the event if it is one of a job whose name does not begin with `own`; whether one begins.
    pub(super) fn note(&mut self, own: &str, event: &str, data: Option<&Value>) -> bool {
        let text = |key: &str| data.and_then(|d| d.get(key)?.as_str());
        let (job, status) = match event {
            "JOB_STATUS_CHANGE" => (text("id"), text("status")),
            e if e.starts_with("BLOCK_JOB_") => (text("device"), None),
            _ => return false,
        };
        let Some(job) = job.filter(|j| !j.starts_with(own)) else { return false };
        if self.events.len() >= JOB_EVENTS || job.len() > LONGEST_JOB {
            self.lost = true;
        } else {
            let status = status.map(|s| clip(s, LONGEST_STATUS));
            self.events.push(JobEvent { job: job.to_string(), status });
        }
        status == Some("created")
    }
}

/// Whether this event is news for who waits for a job or an export to end, or for a job to pause.
pub(super) fn ends_a_wait(event: &str, data: Option<&Value>) -> bool {
    let status = data.and_then(|d| d.get("status")?.as_str());
    match event {
        "JOB_STATUS_CHANGE" => {
            matches!(status, Some("concluded" | "null" | "aborting" | "paused"))
        }
        "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_ERROR" => true,
        other => other == "BLOCK_EXPORT_DELETED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn of_other_jobs_a_bounded_list_is_kept() {
        let mut heard = JobEvents::default();
        let change = |id: &str, status: &str| json!({"id": id, "status": status});
        assert!(heard.note("own-", "JOB_STATUS_CHANGE", Some(&change("x", "created"))));
        assert!(!heard.note("own-", "JOB_STATUS_CHANGE", Some(&change("own-1", "created"))));
        assert!(!heard.note("own-", "JOB_STATUS_CHANGE", Some(&change("x", "null"))));
        heard.note("own-", "BLOCK_JOB_COMPLETED", Some(&json!({"device": "x"})));
        heard.note("own-", "RESUME", None);
        let kept: Vec<_> = heard.events.iter().map(|e| e.status.as_deref()).collect();
        assert_eq!((kept, heard.lost), (vec![Some("created"), Some("null"), None], false));
        heard.note("own-", "JOB_STATUS_CHANGE", Some(&change(&"x".repeat(257), "created")));
        assert!(heard.lost && heard.events.len() == 3);
        let mut heard = JobEvents::default();
        for _ in 0..2000 {
            heard.note("own-", "JOB_STATUS_CHANGE", Some(&change("x", "paused")));
        }
        assert!(heard.lost && heard.events.len() == JOB_EVENTS);
    }
}
