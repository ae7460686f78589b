//! What is done with each item, decided by what the other side has. Pure.

use serde::Serialize;

use super::message::Held;

/// What an item is, as far as the plan needs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Which disk it is of.
    pub disk: usize,
    /// When it was taken, in seconds since the epoch.
    pub time: i64,
    /// What it builds on: items before it.
    pub needs: Vec<usize>,
    /// Why it cannot be sent.
    pub blocked: Option<String>,
    /// Whether a manifest goes with it.
    pub has_manifest: bool,
    /// How it is found at the other side.
    pub there: There,
    /// Whether the other side has its state under another name.
    pub has_twin: bool,
}

/// How an item is found at the other side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum There {
    /// Not at all.
    #[default]
    Absent,
    /// It is the same.
    Same,
    /// The same, and without a manifest.
    Bare,
    /// Another file has its name.
    Other,
}

/// Whether what is held is the file of this size, hash and fingerprint; `None` if only a look into it tells.
pub(crate) fn compare(
    held: &Held,
    size: u64,
    blake3: Option<&str>,
    fingerprint: Option<&str>,
) -> Option<There> {
    if !held.is_file || held.size != size {
        return Some(There::Other);
    }
    let same = if held.manifest { There::Same } else { There::Bare };
    match (blake3, held.blake3.as_deref(), fingerprint, held.fingerprint.as_deref()) {
        (Some(own), Some(theirs), ..) if own != theirs => Some(There::Other),
        (_, _, Some(own), Some(theirs)) => Some(if own == theirs { same } else { There::Other }),
        (Some(_), Some(_), ..) => Some(same),
        _ => None,
    }
}

/// What is done with an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Action {
    /// It is sent.
    Sent,
    /// Its manifest alone is sent.
    Recorded,
    /// It is there.
    Present,
    /// Its state is there, in an image of another name.
    Merged,
    /// It is older than the newest that is there, and no longer wanted there.
    Older,
    /// It cannot be sent.
    Left,
}

/// The plan for one item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// What is done.
    pub action: Action,
    /// Why it is left.
    pub why: Option<String>,
}

/// What is said of a file that is another one there.
pub(crate) const ANOTHER: &str = "another file has this name at the target: the source was changed (commit, rebase), \
                                  or it is another backup; remove that chain there, or replicate to an empty folder";

/// Decides for all items. With `newer` nothing is sent that is older than the newest of its disk at the other side,
/// unless something newer builds on it.
pub(crate) fn plan(facts: &[Facts], newer: bool) -> Vec<Step> {
    let mut steps: Vec<Step> = facts.iter().map(first).collect();
    if newer {
        leave_older(facts, &mut steps);
    }
    // What is wanted brings what it builds on: those come before it.
    for i in (0..facts.len()).rev().filter(|i| steps[*i].action == Action::Sent).collect::<Vec<_>>()
    {
        want(facts, &mut steps, i);
    }
    for i in 0..facts.len() {
        let is_new = matches!(steps[i].action, Action::Sent | Action::Recorded);
        if is_new && facts[i].needs.iter().any(|n| steps[*n].action == Action::Left) {
            let why = Some("it depends on a point that is not sent".to_string());
            steps[i] = Step { action: Action::Left, why };
        }
    }
    steps
}

fn first(facts: &Facts) -> Step {
    let step = |action| Step { action, why: None };
    let left = |why: &str| Step { action: Action::Left, why: Some(why.to_string()) };
    match (&facts.blocked, facts.there) {
        (_, There::Same) => step(Action::Present),
        (Some(why), _) => left(why),
        (None, There::Bare) if facts.has_manifest => step(Action::Recorded),
        (None, There::Bare) => step(Action::Present),
        (None, There::Other) => left(ANOTHER),
        (None, There::Absent) if facts.has_twin => step(Action::Merged),
        (None, There::Absent) => step(Action::Sent),
    }
}

fn leave_older(facts: &[Facts], steps: &mut [Step]) {
    let is_there =
        |s: &Step| matches!(s.action, Action::Present | Action::Recorded | Action::Merged);
    let disks = facts.iter().map(|f| f.disk).max().map_or(0, |d| d + 1);
    let mut newest: Vec<Option<i64>> = vec![None; disks];
    for (f, _) in facts.iter().zip(steps.iter()).filter(|(_, s)| is_there(s)) {
        newest[f.disk] = newest[f.disk].max(Some(f.time));
    }
    for (f, step) in facts.iter().zip(steps) {
        if step.action == Action::Sent && newest[f.disk].is_some_and(|n| f.time <= n) {
            step.action = Action::Older;
        }
    }
}

/// Brings what item `i` builds on, down to what is there.
fn want(facts: &[Facts], steps: &mut [Step], i: usize) {
    let mut todo = facts[i].needs.clone();
    while let Some(n) = todo.pop() {
        if matches!(steps[n].action, Action::Merged | Action::Older) {
            steps[n].action = Action::Sent;
            todo.extend(&facts[n].needs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain as text: a letter per item, each on the one before it.
    fn chain(text: &str) -> Vec<Facts> {
        let fact = |(i, c): (usize, char)| Facts {
            time: i as i64,
            needs: i.checked_sub(1).into_iter().collect(),
            has_manifest: true,
            there: match c {
                '=' => There::Same,
                '~' => There::Bare,
                '!' => There::Other,
                _ => There::Absent,
            },
            blocked: (c == 'x').then(|| "damaged".to_string()),
            has_twin: c == 't',
            ..Facts::default()
        };
        text.chars().enumerate().map(fact).collect()
    }

    fn planned(facts: &[Facts], newer: bool) -> String {
        let letter = |s: &Step| match s.action {
            Action::Sent => 's',
            Action::Recorded => 'r',
            Action::Present => 'p',
            Action::Merged => 'm',
            Action::Older => 'o',
            Action::Left => 'l',
        };
        plan(facts, newer).iter().map(letter).collect()
    }

    #[test]
    fn what_is_missing_is_sent_and_nothing_is_built_on_what_is_not_there() {
        for (chain_text, want) in [
            ("", ""),
            ("...", "sss"),
            ("==.", "pps"),
            ("=~.", "prs"),
            // A damaged one takes those above it along, also if it is there in another state.
            (".x..", "slll"),
            ("=x..", "plll"),
            ("=!..", "plll"),
            ("!==.", "lpps"),
            // What is there stays, whatever the source's own state.
            ("t==.", "mpps"),
            // Its state is there by another name, but what is to come builds on this one.
            ("t..", "sss"),
            ("t=.", "mps"),
        ] {
            assert_eq!(planned(&chain(chain_text), false), want, "{chain_text}");
        }
    }

    #[test]
    fn what_the_target_has_deleted_is_not_sent_again() {
        assert_eq!(planned(&chain("..=."), true), "oops");
        assert_eq!(planned(&chain("..=."), false), "ssps");
        assert_eq!(planned(&chain("..."), true), "sss", "an empty target");
        // A chain of another disk, and one that is newer and builds on what was deleted.
        let mut facts = chain("..=..");
        facts[3].needs = vec![1];
        assert_eq!(planned(&facts, true), "sspss");
        facts[4] = Facts { disk: 1, ..Facts::default() };
        assert_eq!(planned(&facts, true), "sspss");
    }

    #[test]
    fn the_same_is_proved_by_size_and_hash_or_a_look() {
        let held = Held {
            is_file: true,
            size: 5,
            manifest: true,
            blake3: Some("a".into()),
            fingerprint: None,
            modified: None,
        };
        let looked = Held { fingerprint: Some("f".into()), ..held.clone() };
        let bare = Held { manifest: false, blake3: None, ..looked.clone() };
        let cases = [
            (&held, 5, Some("a"), None, Some(There::Same)),
            (&held, 6, Some("a"), None, Some(There::Other)),
            (&held, 5, Some("b"), None, Some(There::Other)),
            (&held, 5, None, None, None),
            (&looked, 5, None, Some("f"), Some(There::Same)),
            (&looked, 5, Some("a"), Some("g"), Some(There::Other)),
            (&looked, 5, Some("b"), Some("f"), Some(There::Other)),
            (&bare, 5, Some("a"), Some("f"), Some(There::Bare)),
            (&bare, 5, Some("a"), None, None),
        ];
        for (held, size, blake3, fingerprint, want) in cases {
            assert_eq!(compare(held, size, blake3, fingerprint), want, "{held:?} {blake3:?}");
        }
        let no_file = Held { is_file: false, ..looked };
        assert_eq!(compare(&no_file, 5, Some("a"), Some("f")), Some(There::Other));
    }
}
