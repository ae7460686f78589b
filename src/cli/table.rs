//! Tables.

use std::fmt::Write;

use crate::layout::Level;
use crate::output;
use crate::text::columns;

/// A level as tables show it.
pub(super) fn level_name(level: Level) -> &'static str {
    match level {
        Level::Full => "FULL",
        Level::Inc => "INC",
        Level::Diff => "DIFF",
        Level::Copy => "COPY",
        Level::Image => "image",
        Level::Snapshot => "snapshot",
    }
}

/// A table with its titles in the first row; the columns `right` are numbers.
pub(super) fn write_rows<const N: usize>(text: &mut String, rows: &[[String; N]], right: &[usize]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(columns(cell));
        }
    }
    for row in rows {
        let mut line = String::new();
        for (i, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Numbers to the right, everything else to the left.
            let gap = " ".repeat(width.saturating_sub(columns(cell)));
            let _ = match i {
                i if right.contains(&i) => write!(line, "{gap}{cell}  "),
                _ => write!(line, "{cell}{gap}  "),
            };
        }
        output::push_line(text, line.trim_end());
    }
}
