//! Numbers as people read them.

/// A time in three digits and its unit.
pub fn time(ns: u64) -> String {
    let units = [(1_000_000_000.0, "s"), (1_000_000.0, "ms"), (1_000.0, "us")];
    let ns = ns as f64;
    match units.iter().find(|(unit, _)| ns >= *unit) {
        Some((unit, name)) => format!("{} {name}", three(ns / unit)),
        None => format!("{ns} ns"),
    }
}

/// Bytes in three digits and their unit.
pub fn bytes(bytes: u64) -> String {
    let units = [((1u64 << 30) as f64, "GiB"), ((1 << 20) as f64, "MiB"), ((1 << 10) as f64, "KiB")];
    match units.iter().find(|(unit, _)| bytes as f64 >= *unit) {
        Some((unit, name)) => format!("{} {name}", three(bytes as f64 / unit)),
        None => format!("{bytes} B"),
    }
}

/// A number of things, in thousands where it is large.
pub fn count(count: u64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e4, "k")];
    match units.iter().find(|(unit, _)| count as f64 >= *unit) {
        Some((1e4, name)) => format!("{}{name}", three(count as f64 / 1e3)),
        Some((unit, name)) => format!("{}{name}", three(count as f64 / unit)),
        None => count.to_string(),
    }
}

fn three(number: f64) -> String {
    let digits = if number < 9.995 { 2 } else { usize::from(number < 99.95) };
    format!("{number:.digits$}")
}

/// A table with the columns as wide as they have to be, the first `left` of them flush left and the others right.
pub fn table(head: &[&str], left: usize, rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = head
        .iter()
        .enumerate()
        .map(|(i, name)| rows.iter().map(|row| row[i].len()).chain([name.len()]).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|name| (*name).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells = row.iter().zip(&widths).enumerate().map(|(i, (cell, width))| match i < left {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let times = [0, 999, 1_000, 99_960, 1_234_567, 60_000_000_000].map(time);
        assert_eq!(times, ["0 ns", "999 ns", "1.00 us", "100 us", "1.23 ms", "60.0 s"]);
        assert_eq!([0, 1023, 1024, 3 << 20].map(bytes), ["0 B", "1023 B", "1.00 KiB", "3.00 MiB"]);
        assert_eq!([0, 9_999, 10_000, 1_500_000].map(count), ["0", "9999", "10.0k", "1.50M"]);
    }

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let rows = [vec!["echo".to_owned(), "7".to_owned()], vec!["x".to_owned(), "12345".to_owned()]];
        assert_eq!(table(&["type", "n"], 1, &rows), "type      n\necho      7\nx     12345\n");
    }
}
