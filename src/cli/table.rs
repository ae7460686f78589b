//! Tables that fit a terminal of 80 columns.

use crate::layout::Level;
use crate::output::{Line, Look};
use crate::text::columns;

/// What a table may take without `-v`, which shows all columns.
const WIDTH: usize = 80;

/// Between two columns.
const GAP: usize = 2;

/// In the place of what is cut.
const CUT: &str = "...";

/// What is left of a cell that is cut takes so much at least.
const LEAST: usize = 16;

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

/// What a table is made of.
pub(super) enum Row {
    /// A line of its own, such as a disk's name above its points.
    Heading(String),
    /// Cells, and how they look.
    Cells(Vec<String>, Look),
    /// A sentence of its own below a row.
    Below(String, Look),
}

/// A table: titles, the columns that are numbers, and what goes first where all do not fit.
pub(super) struct Table {
    pub titles: &'static [&'static str],
    pub right: &'static [&'static str],
    pub less: &'static [&'static str],
    /// How far cells are from the edge, as below headings.
    pub indent: usize,
    pub rows: Vec<Row>,
}

impl Table {
    /// Its lines. Without `wide`, columns of `less` are left away until it fits.
    pub(super) fn lines(&self, wide: bool) -> Vec<Line> {
        let widths = self.widths();
        let mut shown: Vec<usize> = (0..self.titles.len()).collect();
        let total = |shown: &[usize]| {
            let cells = shown.iter().map(|i| widths[*i] + GAP).sum::<usize>();
            (self.indent + cells).saturating_sub(GAP)
        };
        for title in self.less {
            if wide || total(&shown) <= WIDTH {
                break;
            }
            shown.retain(|i| self.titles[*i] != *title);
        }
        let titles: Vec<String> = self.titles.iter().map(|t| t.to_string()).collect();
        let mut lines = vec![Line::new(Look::Bold, self.line(&titles, &shown, &widths))];
        lines.extend(self.rows.iter().map(|row| match row {
            Row::Heading(text) => Line::new(Look::Bold, text.clone()),
            Row::Cells(cells, look) => Line::new(*look, self.line(cells, &shown, &widths)),
            Row::Below(text, look) => {
                Line::sentence(*look, format!("{:indent$}{text}", "", indent = self.indent + GAP))
            }
        }));
        lines
    }

    /// Cuts the begin of cells below `title` where a row would be too long even without all of `less`; not if `wide`.
    pub(super) fn cut(mut self, title: &str, wide: bool) -> Self {
        let widths = self.widths();
        let stay = |i: &usize| !self.less.contains(&self.titles[*i]);
        let cells: usize = (0..self.titles.len()).filter(stay).map(|i| widths[i] + GAP).sum();
        let over = (self.indent + cells).saturating_sub(GAP + WIDTH);
        let Some(at) = self.titles.iter().position(|t| *t == title).filter(|_| !wide && over > 0)
        else {
            return self;
        };
        let most = widths[at].saturating_sub(over).max(LEAST);
        for row in &mut self.rows {
            if let Row::Cells(cells, _) = row
                && let Some(cell) = cells.get_mut(at)
            {
                *cell = end_of(cell, most);
            }
        }
        self
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.titles.iter().map(|t| t.len()).collect();
        for row in &self.rows {
            let Row::Cells(cells, _) = row else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(columns(cell));
            }
        }
        widths
    }

    fn line(&self, cells: &[String], shown: &[usize], widths: &[usize]) -> String {
        let mut line = " ".repeat(self.indent);
        for i in shown {
            let Some(cell) = cells.get(*i) else { continue };
            let gap = " ".repeat(widths[*i].saturating_sub(columns(cell)));
            // Numbers to the right, everything else to the left.
            let is_number = self.right.contains(&self.titles[*i]);
            let (before, after) = if is_number { (gap.as_str(), "") } else { ("", gap.as_str()) };
            line.extend([before, cell, after, "  "]);
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// The end of a text that takes more than `most` columns: of paths that tells more than the begin.
fn end_of(text: &str, most: usize) -> String {
    if columns(text) <= most {
        return text.to_string();
    }
    let mut rest = text.chars();
    while columns(rest.as_str()) + CUT.len() > most && rest.next().is_some() {}
    format!("{CUT}{}", rest.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> Table {
        let cells = |name: &str, size: &str| {
            Row::Cells([name, "text", size, "ok"].map(String::from).into(), Look::Plain)
        };
        Table {
            titles: &["NAME", "MORE", "SIZE", "STATE"],
            right: &["SIZE"],
            less: &["MORE", "SIZE"],
            indent: 2,
            rows: vec![Row::Heading("sda".into()), cells(name, "1.0 GiB"), cells("a", "512 B")],
        }
    }

    fn text(lines: &[Line]) -> Vec<&str> {
        lines.iter().map(|l| l.text.as_str()).collect()
    }

    #[test]
    fn sizes_stand_below_each_other_and_headings_at_the_edge() {
        let lines = table("name").lines(false);
        assert_eq!(
            text(&lines),
            [
                "  NAME  MORE     SIZE  STATE",
                "sda",
                "  name  text  1.0 GiB  ok",
                "  a     text    512 B  ok"
            ]
        );
    }

    #[test]
    fn what_is_too_long_even_then_is_cut_at_its_begin() {
        let long = format!("{}/disk1.qcow2", "é".repeat(90));
        let wide = |lines: &[Line]| lines.iter().map(|l| columns(&l.text)).max().unwrap();
        let lines = table(&long).cut("NAME", false).lines(false);
        assert_eq!(wide(&lines), WIDTH, "{:?}", text(&lines));
        let row = text(&lines)[2];
        assert!(row.starts_with("  ...é") && row.ends_with("/disk1.qcow2  ok"), "{row}");
        // All of it with -v, and where there is room.
        assert!(text(&table(&long).cut("NAME", true).lines(true))[2].contains(&long));
        assert!(text(&table("name").cut("NAME", false).lines(false))[2].starts_with("  name "));
    }

    #[test]
    fn what_does_not_fit_goes_in_order_and_all_is_there_with_v() {
        let long = "n".repeat(58);
        let wide = |lines: &[Line]| text(lines).iter().map(|l| l.len()).max().unwrap();
        let t = table(&long);
        let lines = t.lines(false);
        assert!(wide(&lines) <= WIDTH && !text(&lines)[0].contains("MORE"), "{:?}", text(&lines));
        assert!(text(&lines)[0].contains("SIZE"));
        let lines = t.lines(true);
        assert!(wide(&lines) > WIDTH && text(&lines)[0].contains("MORE"));
    }
}
