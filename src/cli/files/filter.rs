//! Which files `find` shows.

use clap::{Args, ValueEnum};

use crate::files::{At, NodeKind};
use crate::units::{parse_bytes, parse_when};

/// What files have to be like.
#[derive(Debug, Args)]
pub(super) struct Filter {
    /// Only files of this name; '*' matches anything, '?' one byte
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,
    /// Only files of this kind
    #[arg(long = "type", value_enum, value_name = "KIND")]
    kind: Option<KindArg>,
    /// Only files of at least this size (K, M, G)
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    larger: Option<u64>,
    /// Only files modified since then: 2026-11-22, 7d, @SECONDS
    #[arg(long, value_name = "WHEN", value_parser = parse_when)]
    since: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArg {
    /// Plain files
    File,
    /// Folders
    Folder,
    /// Symbolic links
    Link,
    /// Pipes, sockets and devices
    Other,
}

impl KindArg {
    fn of(kind: NodeKind) -> KindArg {
        match kind {
            NodeKind::File => KindArg::File,
            NodeKind::Folder => KindArg::Folder,
            NodeKind::Link => KindArg::Link,
            NodeKind::CharDevice | NodeKind::BlockDevice => KindArg::Other,
            NodeKind::Pipe | NodeKind::Socket => KindArg::Other,
        }
    }
}

impl Filter {
    /// Whether this is one of them.
    pub(super) fn is_wanted(&self, at: &At<'_>) -> bool {
        let a = at.attributes;
        self.name.as_ref().is_none_or(|p| matches(p.as_bytes(), at.name))
            && self.kind.is_none_or(|k| k == KindArg::of(a.kind))
            && self.larger.is_none_or(|n| a.size >= n)
            && self.since.is_none_or(|t| a.mtime.seconds >= t)
    }
}

/// Whether a name fits a pattern with `*` and `?`; in time that grows with the product of their lengths at most.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == b'?' || name.get(n) == Some(c) => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, n) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name) in
            [("*.odt", "a.odt"), ("a?c*", "abc"), ("**", ""), ("a*b*c", "axbxbc")]
        {
            assert!(matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
        for (pattern, name) in [("*.odt", "a.od"), ("?", ""), ("a*b", "abc"), ("", "a")] {
            assert!(!matches(pattern.as_bytes(), name.as_bytes()), "{pattern} {name}");
        }
    }
}
