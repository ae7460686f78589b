//! [`FlattenPlan`].

use std::path::PathBuf;

use super::member::Member;

/// What `commit` or `snapshot-rebase` is going to do.
#[derive(Debug, Clone, serde::Serialize)]
pub struct FlattenPlan {
    /// The FULL.
    pub full: Member,
    /// What it takes in, in order; these files go.
    pub increments: Vec<Member>,
    /// The new FULL's name while both chains are there: a FULL of the last point's time.
    pub interim: PathBuf,
    /// Images that depend on the last one and will depend on the FULL.
    pub children: Vec<PathBuf>,
    /// Names of the internal snapshots, the FULL's own first; empty for a plain commit. The FULL's
    /// state may have one from an earlier run.
    pub snapshots: Vec<Option<String>>,
}
