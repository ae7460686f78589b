use super::*;
use crate::manifest::tests::example;

fn plain(name: &str) -> PlainName {
    PlainName::new(name).unwrap()
}

/// A commit of two increments, broken off.
fn interrupted() -> ReplacePlan {
    ReplacePlan {
        full: plain("FULL-1-d"),
        interim: plain("FULL-3-d"),
        increments: ["INC-2-d", "INC-3-d"].map(plain).to_vec(),
        linked: BTreeSet::new(),
        raw: false,
        manifest: None,
        old: None,
        known: BTreeMap::new(),
    }
}

#[test]
fn what_depends_on_an_increment_in_the_middle_keeps_a_commit_from_being_finished() {
    let t = tempfile::tempdir().unwrap();
    let dir = Folder::open(&t.path().canonicalize().unwrap()).unwrap();
    let child = |image: &str, parent: &str| {
        std::fs::write(t.path().join(image), "an image").unwrap();
        manifest::write_in(&dir, &example(image, Level::Inc, Some(parent))).unwrap();
    };
    child("INC-2-d", "FULL-1-d");
    child("INC-3-d", "INC-2-d");
    child("INC-4-d", "INC-3-d");
    child("INC-5-d", "INC-4-d");
    assert_eq!(interrupted().children(&dir).unwrap(), [plain("INC-4-d")]);
    // Somebody put it there meanwhile.
    child("DIFF-6-d", "INC-2-d");
    let e = interrupted().children(&dir).unwrap_err();
    assert_eq!(e.kind(), Kind::Incomplete);
    assert!(e.report().contains("DIFF-6-d"), "{}", e.report());
}

#[test]
fn of_killed_runs_all_that_is_unfinished_goes_and_nothing_else() {
    let t = tempfile::tempdir().unwrap();
    let dir = Folder::open(&t.path().canonicalize().unwrap()).unwrap();
    sweep(&dir).unwrap();
    let side = side_folder(&dir).unwrap();
    let own = |beginning: &str| format!("{beginning}x");
    let unfinished = [
        own(folder::TEMPORARY),
        own(manifest::TEMPORARY),
        format!(".INC-2-d{OLD_SUFFIX}"),
        format!("INC-2-d{}", files::UNFINISHED_HEADER),
        format!("FULL-1-d{SECOND}"),
    ];
    let others = [FLATTEN, "FULL-1-d.json", "config-1"];
    for name in unfinished.iter().map(String::as_str).chain(others) {
        std::fs::write(side.join(name), "x").unwrap();
    }
    sweep(&dir).unwrap();
    let left = |names: &[&str]| names.iter().filter(|n| side.has(n)).count();
    assert_eq!(left(&others), others.len());
    assert_eq!(left(&unfinished.each_ref().map(String::as_str)), 0);
}
