//! Joining a renamed disk's points with those that it has under its new name.
//!
//! The old points go to the new name's folder and get names that end as its images' do, with the times
//! that they have; their manifests say the same. What results is a folder as any other disk's: one
//! with several chains.
//!
//! Whatever dies whenever, each point is whole in one of both places:
//!
//! 0. A journal in both folders says what is going on: whoever writes to one of them next goes on.
//! 1. Of each point, parents first: its manifest under the new name, then the image's second name (a
//!    hard link). The old ones are untouched.
//! 2. All of it is synced.
//! 3. The old names go, newest first, by the journal that prune has for that. Then the first goes.
//!
//! Broken off, it is done again from the beginning: what has its second name already is known by the file
//! that it is.
//!
//! `plan` makes the plan (`planned`) of the `images` under both names, or says why not (`refuse`); `execute`
//! carries it out, and `unfinished` goes on with one that was interrupted.

mod execute;
mod images;
mod plan;
mod planned;
mod refuse;
mod unfinished;

pub(crate) use self::execute::execute;
pub(crate) use self::plan::plan;
pub(crate) use self::planned::{JoinPlan, is_joined};
pub(crate) use self::unfinished::finish;
