//! Sentences on a terminal: lines that are longer than it is wide are broken at spaces, as `--help` is. What goes into
//! a pipe, a file or the system log stays one line per message.

use std::os::fd::AsFd;

use rustix::termios::{isatty, tcgetwinsize};

use crate::text::columns;

/// Lines are no longer than this on wider terminals either; `--help` has the same limit.
pub(crate) const MAX_WIDTH: usize = 100;
/// What is taken for the width of a terminal that does not say it.
const USUAL_WIDTH: usize = 80;
/// Nothing is broken to fit a terminal that is narrower: it would be a column of words.
const MIN_WIDTH: usize = 30;
/// How much further in the second line of a sentence begins, in columns.
const HANGING: usize = 2;

/// How wide lines on `stream` may be, in columns; `None` if it is no terminal, so that nothing is to be broken.
pub(crate) fn width_of(stream: impl AsFd) -> Option<usize> {
    if !isatty(&stream) {
        return None;
    }
    let told = tcgetwinsize(&stream).map_or(0, |size| usize::from(size.ws_col));
    Some(if told == 0 { USUAL_WIDTH } else { told.clamp(MIN_WIDTH, MAX_WIDTH) })
}

/// `line` broken into lines of at most `width` columns; a word that is longer, such as a path, stays whole. All but
/// the first begin further in.
pub(crate) fn wrapped(line: &str, width: usize) -> Vec<String> {
    if columns(line) <= width {
        return vec![line.to_string()];
    }
    let text = line.trim_start_matches(' ');
    let indent = line.len() - text.len();
    let hanging = " ".repeat(indent + HANGING);
    let (mut lines, mut last) = (Vec::new(), " ".repeat(indent));
    let mut is_empty = true;
    for word in text.split(' ') {
        if !is_empty && columns(&last) + 1 + columns(word) > width {
            lines.push(std::mem::replace(&mut last, hanging.clone()));
            is_empty = true;
        }
        if !is_empty {
            last.push(' ');
        }
        last.push_str(word);
        is_empty = false;
    }
    lines.push(last);
    lines
}

/// All lines of `text` as [`wrapped`] breaks them; as they are without a width.
pub(crate) fn wrapped_lines(text: &str, width: Option<usize>) -> String {
    let Some(width) = width.filter(|w| text.lines().any(|l| columns(l) > *w)) else {
        return text.to_string();
    };
    let mut broken = String::with_capacity(text.len() + 64);
    for line in text.split_inclusive('\n') {
        let (line, end) = line.strip_suffix('\n').map_or((line, ""), |l| (l, "\n"));
        broken.push_str(&wrapped(line, width).join("\n"));
        broken.push_str(end);
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_at_spaces_and_go_on_further_in() {
        let line = "  warning: sda/INC-1: the guest was not frozen";
        assert_eq!(wrapped(line, 46), [line]);
        assert_eq!(wrapped(line, 30), ["  warning: sda/INC-1: the", "    guest was not frozen"]);
        // What it says is the same.
        let joined = wrapped(line, 30).iter().map(|l| l.trim()).collect::<Vec<_>>().join(" ");
        assert_eq!(joined, line.trim());
    }

    #[test]
    fn a_word_that_is_too_long_stays_whole() {
        let path = format!("/{}", "x".repeat(60));
        let lines = wrapped(&format!("error: {path}: gone"), 30);
        assert_eq!(lines, ["error:".to_string(), format!("  {path}:"), "  gone".into()]);
    }

    #[test]
    fn columns_count_and_not_bytes() {
        let line = "漢字 漢字 漢字 漢字";
        assert_eq!(wrapped(line, 19), [line]);
        assert_eq!(wrapped(line, 14), ["漢字 漢字 漢字", "  漢字"]);
    }

    #[test]
    fn several_lines_stay_several_and_nothing_is_broken_without_a_width() {
        let text = "a b c\n\nd e f\n";
        assert_eq!(wrapped_lines(text, None), text);
        assert_eq!(wrapped_lines(text, Some(80)), text);
        assert_eq!(wrapped_lines(text, Some(3)), "a b\n  c\n\nd e\n  f\n");
        assert_eq!(wrapped_lines("a b c", Some(3)), "a b\n  c");
    }
}
