//! The mail of a night: what came of it, handed to sendmail. Texts in it are of guests, QEMUs and names that anybody may
//! have chosen: none of them makes a header, nor does anything to a terminal.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::one_vm::in_any_case;
use super::row::VmRow;
use crate::config::{Mail, check_program};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::text::{path_text, visible};
use crate::units::{counted, human_bytes};

/// How long sendmail may take: it only has to queue the mail.
const TIME: Duration = Duration::from_secs(120);
/// How long it may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);
/// Bytes of a line: mail servers take 998 (RFC 5322, 2.1.1).
const LONGEST_LINE: usize = 900;
/// Characters of the subject: with its name it is one line.
const LONGEST_SUBJECT: usize = 200;
/// Lines of a mail, and warnings of a VM.
const MOST_LINES: usize = 5000;
const MOST_WARNINGS: usize = 20;

/// What came of a night.
pub(super) struct Outcome<'a> {
    /// Of each VM; none where the night was refused.
    pub rows: &'a [VmRow],
    /// The error that the program ends with.
    pub error: Option<&'a Error>,
    /// What is wrong with the configuration for all VMs.
    pub problems: &'a [String],
}

/// Sends it.
///
/// # Errors
/// `sendmail` is not there, somebody else could exchange it, or it did not take the mail.
pub(super) fn send(mail: &Mail, outcome: &Outcome<'_>) -> Result<()> {
    let program = mail.sendmail.as_str();
    let mut command = Command::new(check_program(program)?);
    // It goes by its name what it does. Addresses begin with no hyphen.
    command.arg0(program).arg("-i").args(&mail.to);
    let text = message(mail, outcome, &host());
    let ended = in_any_case("sendmail", TIME, GRACE).command(command, text.into_bytes())?;
    let Some(e) = ended.error() else { return Ok(()) };
    let said = ended.said.as_deref().map(|s| format!(": {}", visible(s))).unwrap_or_default();
    let why = match (ended.timed_out, ended.signal) {
        (true, _) => "its time was over (two minutes)".to_string(),
        (false, Some(signal)) => format!("it was ended by signal {signal}"),
        (false, None) => format!("it ended with exit code {}", ended.code),
    };
    let kind = if e.kind == Kind::Timeout { Kind::Timeout } else { Kind::Io };
    Err(Error::new(kind, format!("the mail was not taken: {why}{said}")).at_path(program))
}

fn host() -> String {
    let name = folder::system::text(Path::new("/proc/sys/kernel/hostname")).unwrap_or_default();
    name.trim().to_string()
}

/// Headers and body. The sender, the date and an id are sendmail's to say.
fn message(mail: &Mail, outcome: &Outcome<'_>, host: &str) -> String {
    let result = result(outcome);
    let headers = [
        format!("To: {}", mail.to.join(",\n ")),
        format!("Subject: {}", in_header(&format!("fleecefs on {host}: {result}"))),
        "Auto-Submitted: auto-generated".to_string(),
        "MIME-Version: 1.0".to_string(),
        "Content-Type: text/plain; charset=utf-8".to_string(),
        "Content-Transfer-Encoding: 8bit".to_string(),
    ];
    let mut text = headers.join("\n") + "\n\n";
    let all = body(outcome, &result);
    for line in all.iter().take(MOST_LINES) {
        push(&mut text, line);
    }
    if let Some(more) = all.len().checked_sub(MOST_LINES).filter(|n| *n > 0) {
        push(&mut text, &format!("and {}", counted(more as u64, "more line")));
    }
    text
}

/// In a few words.
fn result(outcome: &Outcome<'_>) -> String {
    match outcome.error {
        Some(e) if outcome.rows.is_empty() => format!("no backups: {}", e.message()),
        Some(e) => e.message().to_string(),
        None => format!("all is well: {}", counted(outcome.rows.len() as u64, "VM")),
    }
}

/// A text as it may stand in a header: printable ASCII, in one line, and nothing that a reader would decode (RFC 2047).
fn in_header(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let plain: String = text.chars().take(LONGEST_SUBJECT).map(plain).collect();
    plain.replace("=?", "= ?")
}

fn body(outcome: &Outcome<'_>, result: &str) -> Vec<String> {
    let mut lines = vec![result.to_string()];
    if let Some(e) = outcome.error {
        lines.push(format!("exit code {}", e.kind().exit_code()));
        if outcome.rows.is_empty() && outcome.problems.is_empty() {
            lines.push(e.report());
        }
    }
    lines.extend(outcome.problems.iter().cloned());
    for row in outcome.rows {
        lines.push(String::new());
        lines.push(of_vm(row));
        lines.extend(row.skipped.iter().map(|why| format!("  skipped: {why}")));
        lines.extend(row.failures.iter().map(|f| {
            let remedy = f.error.remedy.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
            format!("  {}: {}{remedy}", f.step, f.error.message)
        }));
        let warnings = row.warnings.iter().take(MOST_WARNINGS);
        lines.extend(warnings.map(|w| format!("  warning: {w}")));
        if let Some(more) = row.warnings.len().checked_sub(MOST_WARNINGS).filter(|n| *n > 0) {
            lines.push(format!("  and {}", counted(more as u64, "more warning")));
        }
    }
    lines.push(String::new());
    lines.push(
        "'fleecefs health' says whether all is well, 'fleecefs history' what runs did.".into(),
    );
    lines
}

fn of_vm(row: &VmRow) -> String {
    let mut words = vec![row.result().to_string()];
    if !row.points.is_empty() {
        let copied = row.points.iter().fold(0u64, |sum, p| sum.saturating_add(p.copied));
        words.push(counted(row.points.len() as u64, "new point"));
        words.push(format!("{} copied", human_bytes(copied)));
    }
    words.extend(row.pruned.filter(|n| *n > 0).map(|n| format!("{} pruned", counted(n, "point"))));
    words.push(format!("{:.1} s", row.seconds));
    format!("{}: {}", path_text(&row.vm), words.join(", "))
}

/// Adds a line in which nothing is hidden, in as many as mail needs.
fn push(text: &mut String, line: &str) {
    let shown = visible(line);
    let mut rest = shown.as_str();
    loop {
        let end = (0..=LONGEST_LINE.min(rest.len())).rev().find(|at| rest.is_char_boundary(*at));
        let (now, later) = rest.split_at(end.unwrap_or(0));
        text.push_str(now);
        text.push('\n');
        rest = later;
        if rest.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::child::StepError;
    use super::*;

    fn mail() -> Mail {
        let place = crate::config::Place { path: "/x".into(), line: 1, column: 1 };
        Mail { to: vec!["root".into(), "a@b".into()], always: false, sendmail: "/x".into(), place }
    }

    fn headers(text: &str) -> Vec<&str> {
        text.lines().take_while(|l| !l.is_empty()).collect()
    }

    #[test]
    fn no_name_and_no_error_makes_a_header_or_moves_a_cursor() {
        let evil = "x=?utf-8?q?=0a?=\r\nBcc: evil@example.org\r\n\r\n\u{1b}[2J\u{202e}";
        let mut row = VmRow { vm: evil.into(), ..VmRow::default() };
        row.fail("backup", StepError::from(&Error::new(Kind::Peer, evil)));
        row.warnings = (0..100).map(|n| format!("{n}{evil}")).collect();
        row.skipped = Some("\u{e9}".repeat(5000));
        let e = Error::new(Kind::Partial, format!("failed: 1 of 1 VM: {evil}"));
        let rows = [row];
        let problems = [evil.to_string()];
        let outcome = Outcome { rows: &rows, error: Some(&e), problems: &problems };
        let text = message(&mail(), &outcome, evil);
        let names: Vec<&str> = headers(&text)
            .iter()
            .filter(|l| !l.starts_with(' '))
            .map(|l| l.split(':').next().unwrap())
            .collect();
        let wanted = [
            "To",
            "Subject",
            "Auto-Submitted",
            "MIME-Version",
            "Content-Type",
            "Content-Transfer-Encoding",
        ];
        assert_eq!(names, wanted, "{text}");
        assert!(headers(&text).iter().all(|l| l.is_ascii() && !l.contains("=?")));
        assert!(text.lines().all(|l| l.len() <= LONGEST_LINE));
        assert!(!text.chars().any(|c| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text}");
        assert!(!text.lines().any(|l| l.starts_with("Bcc")), "{text}");
        assert!(text.contains("and 80 more warnings"), "{text}");
    }

    #[test]
    fn a_night_that_was_refused_says_why_and_one_that_went_well_too() {
        let e = Error::new(Kind::Busy, "another 'backup --all' is running").at_path("/s/l");
        let refused = Outcome { rows: &[], error: Some(&e), problems: &[] };
        let text = message(&mail(), &refused, "h");
        assert_eq!(headers(&text)[..2], ["To: root,", " a@b"]);
        assert!(text.contains("\nSubject: fleecefs on h: no backups: another 'backup"), "{text}");
        assert!(text.contains("/s/l: ") && text.contains("exit code 6"), "{text}");
        let rows = [VmRow { vm: "a".into(), pruned: Some(1), ..VmRow::default() }];
        let well = Outcome { rows: &rows, error: None, problems: &[] };
        let text = message(&mail(), &well, "h");
        assert!(text.contains("all is well: 1 VM\n"), "{text}");
        assert!(text.contains("\na: ok, 1 point pruned, 0.0 s\n"), "{text}");
    }
}
