//! [`RangeKind`].

/// What a search is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// The next byte that is not in a hole.
    Data,
    /// The next byte that is in one.
    Hole,
}
