//! The language of LVM's metadata: sections in braces, values that are numbers, texts, or lists of them.

use std::collections::BTreeMap;

/// Sections inside each other: LVM has four.
const MAX_DEPTH: usize = 8;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Number(i64),
    Text(String),
    List(Vec<Value>),
    Section(Section),
}

/// Names and their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Section(pub BTreeMap<String, Value>);

impl Section {
    /// The number of this name.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Number(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The text of this name.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The list of this name; empty if there is none.
    pub(super) fn list(&self, name: &str) -> &[Value] {
        match self.0.get(name) {
            Some(Value::List(list)) => list,
            _ => &[],
        }
    }

    /// The section of this name.
    pub(super) fn section(&self, name: &str) -> Option<&Section> {
        match self.0.get(name)? {
            Value::Section(section) => Some(section),
            _ => None,
        }
    }

    /// All sections in it.
    pub(super) fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((name.as_str(), section)),
            _ => None,
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Text(String),
    Mark(u8),
}

/// Reads a text.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(text: &[u8]) -> Result<Section, String> {
    let mut tokens = Tokens { rest: text };
    // The sections that are open, each with its name in the one around it.
    let mut open = vec![(String::new(), Section::default())];
    loop {
        match tokens.next() {
            None | Some(Token::Mark(0)) => break,
            Some(Token::Mark(b'}')) => {
                let (Some((name, done)), Some((_, around))) = (open.pop(), open.last_mut()) else {
                    return Err("unexpected closing brace".into());
                };
                around.0.insert(name, Value::Section(done));
            }
            Some(Token::Word(name)) => match tokens.next() {
                Some(Token::Mark(b'{')) if open.len() < MAX_DEPTH => {
                    open.push((name, Section::default()));
                }
                Some(Token::Mark(b'=')) => {
                    let value = tokens.value()?;
                    if let Some((_, section)) = open.last_mut() {
                        section.0.insert(name, value);
                    }
                }
                _ => return Err(format!("'{name}' has no value")),
            },
            Some(other) => return Err(format!("expected a name, found {other:?}")),
        }
    }
    match (open.pop(), open.is_empty()) {
        (Some((_, section)), true) => Ok(section),
        _ => Err("missing closing brace".into()),
    }
}

struct Tokens<'a> {
    rest: &'a [u8],
}

impl Tokens<'_> {
    fn value(&mut self) -> Result<Value, String> {
        let single = |token: Option<Token>| match token {
            Some(Token::Text(text)) => Ok(Value::Text(text)),
            Some(Token::Word(word)) => Ok(match word.parse() {
                Ok(number) => Value::Number(number),
                Err(_) => Value::Text(word),
            }),
            _ => Err("missing value".to_string()),
        };
        match self.next() {
            Some(Token::Mark(b'[')) => {
                let mut list = Vec::new();
                loop {
                    match self.next() {
                        Some(Token::Mark(b']')) => return Ok(Value::List(list)),
                        Some(Token::Mark(b',')) => {}
                        token => list.push(single(token)?),
                    }
                }
            }
            token => single(token),
        }
    }

    fn next(&mut self) -> Option<Token> {
        loop {
            let first = *self.rest.first()?;
            match first {
                b'#' => self.take_while(|b| b != b'\n'),
                b if b.is_ascii_whitespace() => self.take_while(|b| b.is_ascii_whitespace()),
                _ => break,
            };
        }
        let first = *self.rest.first()?;
        if first == b'"' {
            return Some(Token::Text(self.quoted()));
        }
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b"_.+-/:@".contains(&b);
        if is_word(first) {
            return Some(Token::Word(self.take_while(is_word)));
        }
        self.skip(1);
        Some(Token::Mark(first))
    }

    fn quoted(&mut self) -> String {
        self.skip(1);
        let mut text = Vec::new();
        while let Some(byte) = self.rest.first().copied() {
            self.skip(1);
            match byte {
                b'"' => break,
                b'\\' => {
                    text.extend(self.rest.first());
                    self.skip(1);
                }
                byte => text.push(byte),
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn take_while(&mut self, is: impl Fn(u8) -> bool) -> String {
        let len = self.rest.iter().take_while(|b| is(**b)).count();
        let word = self.rest.get(..len).unwrap_or_default();
        self.skip(len);
        String::from_utf8_lossy(word).into_owned()
    }

    fn skip(&mut self, n: usize) {
        self.rest = self.rest.get(n..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_values_and_comments() {
        let text = b"vg {\nid = \"a-\\\"b\" # c }\nn = 8192\nlist = [\"x\", 0]\nempty = []\nin {\n}\n}\n\0";
        let parsed = parse(text).unwrap();
        let vg = parsed.section("vg").unwrap();
        assert_eq!((vg.text("id"), vg.number("n")), (Some("a-\"b"), Some(8192)));
        assert_eq!(vg.list("list"), [Value::Text("x".into()), Value::Number(0)]);
        assert!(vg.list("empty").is_empty() && vg.section("in").is_some());
    }

    #[test]
    fn what_is_no_such_text_is_refused() {
        let deep = "a {".repeat(100);
        for bad in ["a {", "}", "a = ", "= 3", "a = [1", "a b", deep.as_str()] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
