//! Names that somebody may have meant.

use crate::text::path_text;

/// So many are told.
const FEW: usize = 3;

/// A question that names those of `names` that are the most like `wanted` ("did you mean sda/latest? "), to be
/// followed by what the user can do besides; empty where none is alike.
pub fn nearest(wanted: &str, names: impl Iterator<Item = String>) -> String {
    let mut best: Vec<(usize, String)> = Vec::new();
    for name in names {
        // What was given is not what was meant: it is none of them in the end.
        if name == wanted || !is_alike(wanted, &name) || best.iter().any(|b| b.1 == name) {
            continue;
        }
        let score = alike(wanted, &name);
        let at = best.partition_point(|b| b.0 >= score);
        best.insert(at, (score, name));
        best.truncate(FEW);
    }
    let mut best: Vec<String> = best.iter().map(|b| path_text(&b.1)).collect();
    match best.pop() {
        None => String::new(),
        Some(only) if best.is_empty() => format!("did you mean {only}? "),
        Some(last) => format!("did you mean {} or {last}? ", best.join(", ")),
    }
}

/// Whether more than half of either is the same.
pub(super) fn is_alike(a: &str, b: &str) -> bool {
    alike(a, b) * 2 > a.len().max(b.len())
}

/// Bytes that both have in common at their begin and at their end: names of points differ in level and time.
fn alike(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let begin = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let rest = a.len().min(b.len()) - begin;
    begin + a.iter().rev().zip(b.iter().rev()).take(rest).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_alike_are_told_and_others_not() {
        let names = ["FULL-1700000000-sda", "INC-1700000100-sda", "INC-1700000200-sda", "x"];
        let told = |wanted: &str| nearest(wanted, names.iter().map(|n| n.to_string()));
        let two = "did you mean INC-1700000100-sda or INC-1700000200-sda? ";
        assert_eq!(told("INC-1700000101-sda"), two);
        assert!(told("FULL-1700000000-sdb").starts_with("did you mean FULL-1700000000-sda"));
        assert_eq!(told("y"), "");
        assert_eq!(nearest("lates", ["latest".to_string()].into_iter()), "did you mean latest? ");
        assert_eq!(nearest("latest", ["latest".to_string()].into_iter()), "");
        assert_eq!(told("nothing"), "");
        assert_eq!(told(""), "");
        assert_eq!(nearest("a", std::iter::empty()), "");
    }
}
