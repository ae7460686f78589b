//! What came of all VMs: one table, one document, one exit code.

use serde_json::json;

use super::row::VmRow;
use crate::cli::table::{Row, Table};
use crate::cli::verbosity;
use crate::error::{Error, Kind, Result};
use crate::output::{self, Line, Look};
use crate::text::path_text;
use crate::units::{counted, human_bytes};

/// Prints what came of it.
///
/// # Errors
/// Standard output cannot be written to.
pub(super) fn show(rows: &[VmRow], dry_run: bool, as_json: bool) -> Result<()> {
    if as_json {
        let vms: Vec<_> = rows.iter().map(VmRow::json).collect();
        let all = json!({"dry_run": dry_run, "vms": vms});
        return output::print(&output::json_document(&all)?);
    }
    let is_news = |row: &&VmRow| !verbosity::is_quiet() || row.result() == "failed";
    let shown: Vec<&VmRow> = rows.iter().filter(is_news).collect();
    if shown.is_empty() {
        return Ok(());
    }
    output::print_lines(&lines(&shown, dry_run))
}

fn lines(rows: &[&VmRow], dry_run: bool) -> Vec<Line> {
    let mut shown = Vec::new();
    for row in rows {
        let look = match row.result() {
            "failed" => Look::Red,
            "skipped" => Look::Yellow,
            _ => Look::Plain,
        };
        shown.push(Row::Cells(cells(row, dry_run), look));
        let why = row.skipped.iter().map(|why| format!("skipped: {why}"));
        let failures = row.failures.iter().map(|f| {
            let remedy = f.error.remedy.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
            format!("{}: {}{remedy}", f.step, f.error.message)
        });
        shown.extend(why.chain(failures).map(|text| Row::Below(text, look)));
    }
    let titles = &["VM", "RESULT", "LEVEL", "POINTS", "COPIED", "PRUNED", "SECONDS"];
    let right = &["POINTS", "COPIED", "PRUNED", "SECONDS"];
    let table = Table { titles, right, less: &["PRUNED"], indent: 0, rows: shown };
    let wide = verbosity::is_verbose();
    let mut lines = table.cut("VM", wide).lines(wide);
    if dry_run {
        lines.push(Line::sentence(Look::Plain, verbosity::UNCHANGED.trim_end()));
    }
    lines
}

fn cells(row: &VmRow, dry_run: bool) -> Vec<String> {
    let mut levels: Vec<String> = row.points.iter().map(|p| p.level.to_ascii_uppercase()).collect();
    levels.sort();
    levels.dedup();
    let copied = row.points.iter().fold(0u64, |sum, p| sum.saturating_add(p.copied));
    let copied = if dry_run { format!("~{}", human_bytes(copied)) } else { human_bytes(copied) };
    let some = |text: String| if row.points.is_empty() { "-".to_string() } else { text };
    vec![
        path_text(&row.vm),
        row.result().to_string(),
        some(levels.join("+")),
        row.points.len().to_string(),
        some(copied),
        row.pruned.map_or_else(|| "-".into(), |n| n.to_string()),
        format!("{:.1}", row.seconds),
    ]
}

/// The error that the program ends with: where all VMs failed alike theirs, else that some failed.
///
/// # Errors
/// As said; `Skipped` with `strict` if nothing failed and a VM was skipped.
pub(super) fn verdict(rows: &[VmRow], (strict, stopped): (bool, bool)) -> Result<()> {
    let failed: Vec<&VmRow> = rows.iter().filter(|r| !r.failures.is_empty()).collect();
    if stopped && !failed.is_empty() {
        return Err(Error::new(
            Kind::Interrupted,
            "ended by a signal: VMs without a new point are above",
        ));
    }
    let Some(first) = failed.first().and_then(|row| row.kind()) else {
        let skipped = rows.iter().filter(|r| r.skipped.is_some()).count();
        return match skipped {
            n if strict && n > 0 => {
                Err(Error::new(Kind::Skipped, format!("{} skipped", counted(n as u64, "VM"))))
            }
            _ => Ok(()),
        };
    };
    let alike = failed.len() == rows.len() && failed.iter().all(|r| r.kind() == Some(first));
    let kind = if alike { first } else { Kind::Partial };
    let names: Vec<String> = failed.iter().take(MOST_NAMES).map(|r| path_text(&r.vm)).collect();
    let more = if failed.len() > MOST_NAMES { ", ..." } else { "" };
    let what = format!(
        "failed: {} of {}: {}{more}",
        failed.len(),
        counted(rows.len() as u64, "VM"),
        names.join(", ")
    );
    Err(Error::new(kind, what).remedy("the reasons are above"))
}

/// How many VMs the last words name.
const MOST_NAMES: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::nightly::child::StepError;
    use crate::cli::nightly::row::NewPoint;

    fn row(vm: &str, kind: Option<Kind>) -> VmRow {
        let mut row = VmRow { vm: vm.into(), ..VmRow::default() };
        if let Some(kind) = kind {
            row.fail("backup", StepError::from(&Error::new(kind, "why").remedy("do it")));
        }
        row
    }

    #[test]
    fn one_code_where_all_failed_alike_else_partly_done() {
        let kind = |rows: &[VmRow]| verdict(rows, (false, false)).map_err(|e| e.kind());
        assert_eq!(kind(&[row("a", None), row("b", None)]), Ok(()));
        assert_eq!(kind(&[row("a", Some(Kind::Peer))]), Err(Kind::Peer));
        let both = [row("a", Some(Kind::NoSpace)), row("b", Some(Kind::NoSpace))];
        assert_eq!(kind(&both), Err(Kind::NoSpace));
        let other = [row("a", Some(Kind::NoSpace)), row("b", Some(Kind::Peer))];
        assert_eq!(kind(&other), Err(Kind::Partial));
        let some = [row("a", None), row("b", Some(Kind::Peer))];
        assert_eq!(kind(&some), Err(Kind::Partial));
        let e = verdict(&some, (false, false)).unwrap_err();
        assert_eq!(e.to_string(), "failed: 1 of 2 VMs: b");
        assert_eq!(verdict(&some, (false, true)).unwrap_err().kind(), Kind::Interrupted);
        let mut off = row("c", None);
        off.skipped = Some("it is shut off".into());
        let rows = [row("a", None), off];
        assert_eq!(verdict(&rows, (false, false)).map_err(|e| e.kind()), Ok(()));
        assert_eq!(verdict(&rows, (true, false)).unwrap_err().kind(), Kind::Skipped);
    }

    #[test]
    fn a_row_says_what_failed_and_what_to_do() {
        let mut good = row("a", None);
        let point = |level: &str| NewPoint {
            disk: "sda".into(),
            level: level.into(),
            point: String::new(),
            run: String::new(),
            time: String::new(),
            copied: 1 << 20,
        };
        good.points = vec![point("inc"), point("full"), point("inc")];
        let bad = row("b", Some(Kind::Peer));
        let text: Vec<String> = lines(&[&good, &bad], false).into_iter().map(|l| l.text).collect();
        assert!(text[1].contains("FULL+INC") && text[1].contains("3.0 MiB"), "{text:?}");
        assert_eq!(text[3], "  backup: why (do it)");
    }
}
