//! The answer of a check as Nagios, Icinga, Checkmk and Zabbix read it: a first line with performance data, further
//! lines, and an exit code of 0 to 3.

use super::report::{DirectoryHealth, Status, worst};
use crate::text::{path_text, visible};
use crate::units::{age, counted};

/// Trouble that is told; Nagios reads some 8 KiB.
const MOST_LINES: usize = 30;
/// Characters of a line.
const MOST_TEXT: usize = 200;

/// What is printed, and the exit code.
pub(crate) fn answer(all: &[DirectoryHealth], max_age: Option<u64>) -> (String, u8) {
    let status = worst(all.iter().map(|d| d.status));
    let (word, code) = match status {
        Status::Ok => ("OK", 0),
        Status::Warning => ("WARNING", 1),
        Status::Error => ("CRITICAL", 2),
    };
    let mut text = format!("FLEECEFS {word} - {} | {}\n", summary(all), performance(all, max_age));
    let lines: Vec<String> = trouble_lines(all);
    for line in lines.iter().take(MOST_LINES) {
        text += &format!("{}\n", plain(line));
    }
    if let Some(more) = lines.len().checked_sub(MOST_LINES).filter(|n| *n > 0) {
        text += &format!("and {more} more\n");
    }
    (text, code)
}

/// The exit code where nothing can be told.
pub(crate) const UNKNOWN: u8 = 3;

/// What is printed then.
pub(crate) fn unknown(message: &str) -> String {
    format!("FLEECEFS UNKNOWN - {}\n", plain(message))
}

/// Of the first line: how many disks, and the worst trouble.
fn summary(all: &[DirectoryHealth]) -> String {
    let disks: Vec<_> = all.iter().flat_map(|d| &d.disks).collect();
    let count = counted(disks.len() as u64, "disk");
    match trouble_lines(all).split_first() {
        Some((first, [])) => format!("{count}: {}", plain(first)),
        Some((first, more)) => format!("{count}: {} (and {} more)", plain(first), more.len()),
        None => match oldest(all) {
            Some(seconds) => format!("{count}, newest points made {} or later", age(seconds)),
            None => count,
        },
    }
}

/// All trouble, the worst first.
fn trouble_lines(all: &[DirectoryHealth]) -> Vec<String> {
    let mut found: Vec<(Status, String)> = Vec::new();
    for dir in all {
        for (disk, trouble) in dir.all_trouble() {
            let place = match disk {
                Some(disk) => path_text(&dir.directory.join(&disk.disk)),
                None => path_text(&dir.directory),
            };
            found.push((trouble.status, format!("{place}: {}", trouble.text)));
        }
    }
    found.sort_by_key(|(status, _)| std::cmp::Reverse(*status));
    found.into_iter().map(|(_, line)| line).collect()
}

/// Seconds since the newest point of the disk whose newest point is the oldest; those that are gone are not meant.
fn oldest(all: &[DirectoryHealth]) -> Option<i64> {
    let here = all.iter().flat_map(|d| &d.disks).filter(|d| !d.is_gone());
    let newest = here.filter_map(|d| d.newest.as_ref());
    newest.map(|n| n.age_seconds).max()
}

fn performance(all: &[DirectoryHealth], max_age: Option<u64>) -> String {
    let count =
        |status| all.iter().flat_map(|d| d.all_trouble()).filter(|t| t.1.status == status).count();
    let disks: usize = all.iter().map(|d| d.disks.len()).sum();
    let mut parts = vec![format!("disks={disks};;;0")];
    if let Some(seconds) = oldest(all) {
        let limit = max_age.map_or_else(String::new, |s| s.to_string());
        parts.push(format!("age={}s;;{limit};0", seconds.max(0)));
    }
    parts.push(format!("errors={};;0;0", count(Status::Error)));
    parts.push(format!("warnings={};0;;0", count(Status::Warning)));
    for dir in all {
        if let (Some(free), Some(size)) = (dir.free_bytes, dir.size_bytes) {
            let label: String = plain(&path_text(&dir.directory));
            let label = label.replace(['\'', '='], "_");
            parts.push(format!("'free {label}'={free}B;;;0;{size}"));
        }
    }
    parts.join(" ")
}

/// Without what has a meaning in such an answer, on one line, and not long.
fn plain(text: &str) -> String {
    visible(text).replace('|', "/").chars().take(MOST_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::report::Trouble;

    fn directory(trouble: Vec<Trouble>) -> DirectoryHealth {
        DirectoryHealth {
            directory: "/b=|'x".into(),
            status: worst(trouble.iter().map(|t| t.status)),
            free_bytes: Some(5),
            size_bytes: Some(9),
            disks: Vec::new(),
            trouble,
            last_runs: Vec::new(),
            failed_runs: Vec::new(),
        }
    }

    #[test]
    fn the_first_line_has_the_worst_and_one_bar() {
        let one = |status, text: &str| Trouble { status, kind: "finding", text: text.into() };
        let (text, code) = answer(&[directory(vec![])], Some(60));
        let want = "FLEECEFS OK - 0 disks | disks=0;;;0 errors=0;;0;0 warnings=0;0;;0 'free /b_/_x'=5B;;;0;9\n";
        assert_eq!((text.as_str(), code), (want, 0));
        let all = vec![one(Status::Warning, "odd"), one(Status::Error, "a|b\nc")];
        let (text, code) = answer(&[directory(all)], None);
        assert_eq!(code, 2);
        let first = text.lines().next().unwrap();
        assert!(
            first.starts_with("FLEECEFS CRITICAL - 0 disks: /b=/'x: a/b\\nc (and 1 more) | "),
            "{first}"
        );
        assert_eq!(text.matches('|').count(), 1, "{text}");
        assert_eq!(text.lines().count(), 3, "{text}");
        let (_, code) = answer(&[directory(vec![one(Status::Warning, "odd")])], None);
        assert_eq!(code, 1);
        let many = (0..500).map(|_| one(Status::Error, &"x".repeat(9999))).collect();
        let (text, _) = answer(&[directory(many)], None);
        assert!(text.len() < 8192 && text.ends_with("and 470 more\n"), "{}", text.len());
    }
}
