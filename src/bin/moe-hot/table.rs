//! Rows of text as a table for people or as comma-separated values.

use std::io::{self, Write};

/// Writes `rows`, the first one being the head; the first `n_left` columns to the left, numbers to the right.
///
/// # Errors
/// What the system says; nothing when the reader (`head`, say) has seen enough.
pub fn print(rows: &[Vec<String>], n_left: usize, csv: bool) -> Result<(), String> {
    let text = if csv { as_csv(rows) } else { as_text(rows, n_left) };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(format!("standard output: {e}")),
        _ => Ok(()),
    }
}

fn as_csv(rows: &[Vec<String>]) -> String {
    let cell = |c: &String| {
        if c.contains([',', '"', '\n']) { format!("\"{}\"", c.replace('"', "\"\"")) } else { c.clone() }
    };
    rows.iter().map(|r| r.iter().map(cell).collect::<Vec<_>>().join(",") + "\n").collect()
}

fn as_text(rows: &[Vec<String>], n_left: usize) -> String {
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let cell = |(c, text): (usize, &String)| {
        let w = widths[c];
        if c < n_left { format!("{text:<w$}") } else { format!("{text:>w$}") }
    };
    let line = |r: &Vec<String>| r.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
    rows.iter().map(|r| line(r).trim_end().to_string() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_commas_are_quoted() {
        let rows = [["name", "n"], ["a,\"b\"", "12"]].map(|r| r.map(String::from).to_vec());
        assert_eq!(as_text(&rows, 1), "name    n\na,\"b\"  12\n");
        assert_eq!(as_csv(&rows), "name,n\n\"a,\"\"b\"\"\",12\n");
    }
}
