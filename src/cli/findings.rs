//! Findings as commands print them.

use std::path::Path;

use crate::error::{Finding, Severity};
use crate::output::{Line, Look};

/// A finding as a line, for lists of them. Paths below `root` are shown from there on, if it is given.
pub(super) fn line(finding: &Finding, root: Option<&Path>, indent: usize) -> Line {
    let (word, look) = match finding.severity {
        Severity::Note => ("note", Look::Plain),
        Severity::Warning => ("warning", Look::Yellow),
        Severity::Error => ("error", Look::Red),
    };
    let below = root.and_then(|root| finding.path.strip_prefix(root).ok());
    let below = below.filter(|path| !path.as_os_str().is_empty());
    let shown = match below {
        Some(path) => Finding { path: path.to_path_buf(), ..finding.clone() }.to_string(),
        None => finding.to_string(),
    };
    Line::sentence(look, format!("{:indent$}{word}: {shown}", ""))
}
