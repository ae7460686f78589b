//! Copying a backup directory to another one, here or on another host: only the points that it lacks.
//!
//! The sender ([`send`]) reads the source and decides ([`plan`]); the receiver ([`receive`]) alone writes to the
//! target ([`store`]). They speak by [`message`]s over a [`wire`]: a socket pair between two threads, or the standard
//! streams of `fleecefs replicate --receive` behind ssh ([`peer`]). Neither trusts the other, and neither is waited for
//! without end ([`patience`]).
//!
//! State: none but the two directories. An image has no name at the target until all of it is there, compared with its
//! hash and on disk; then its manifest is announced, it gets its name, and then its manifest, as an image of a backup
//! does. So a run that is killed leaves whole points, and the next one sends the rest. What is there is never changed or
//! replaced: where the source has another file under a name, or one that builds on another state, that chain is refused.

mod message;
mod name;
mod patience;
pub(crate) mod peer;
pub(crate) mod plan;
pub(crate) mod receive;
pub(crate) mod report;
pub(crate) mod send;
mod source;
mod store;
pub(crate) mod wire;

#[cfg(test)]
mod hostile {
    mod tests;
}
#[cfg(test)]
mod tests;
