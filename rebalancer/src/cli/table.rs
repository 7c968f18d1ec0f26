//! Plain tables: columns as wide as their widest cell, no lines.

use std::fmt;

use rebalancer_core::unseen::is_unseen;

/// Rows of text under a head.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with that head.
    pub fn new(head: &[&str]) -> Self {
        Self {
            rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// Adds a row; see [`clean`].
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| clean(cell)).collect());
    }
}

/// What somebody else wrote, such as a client's user agent, for a terminal: characters that command it, turn the direction of
/// writing or end a line are shown as `?`.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if is_unseen(c) { '?' } else { c }).collect()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let gap = width + 2 - cell.chars().count();
                line.extend(std::iter::repeat_n(' ', gap));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(&["A", "LONG"]);
        table.row(["wide\u{1b}[2J".to_owned(), "x".to_owned()]);
        assert_eq!(table.to_string(), "A         LONG\nwide?[2J  x\n");
        let mut table = Table::new(&["A"]);
        table.row(["a\u{9b}2J\u{202e}b\u{2066}\u{2028}\u{2029}\u{200b}\u{feff}ü".to_owned()]);
        assert_eq!(table.to_string(), "A\na?2J?b?????ü\n");
    }
}
