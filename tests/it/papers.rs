//! The papers in contrib/doc are found, and say what the source says: each is linked from the README, what they
//! link to is there, and architecture.md has the modules of src/lib.rs in their order.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every paper.
fn papers() -> Vec<PathBuf> {
    let own =
        ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "contrib/SEMANTICS.md"];
    let mut all: Vec<PathBuf> = own.into_iter().map(|p| root().join(p)).collect();
    let list = std::fs::read_dir(root().join("contrib/doc")).unwrap();
    all.extend(
        list.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "md")),
    );
    all
}

/// What a text links to: `[words](target)`.
fn links(text: &str) -> Vec<&str> {
    text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0)).collect()
}

/// How a heading is linked to.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
    words.chars().filter(|c| c.is_alphanumeric() || *c == '-').collect()
}

#[test]
fn what_papers_link_to_is_there() {
    let mut seen = 0;
    for paper in papers() {
        let all = text(&paper);
        for link in links(&all).into_iter().filter(|l| !l.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { paper.clone() } else { paper.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: no {link}", paper.display());
            let known =
                || text(&target).lines().any(|l| l.starts_with('#') && anchor(l) == heading);
            assert!(heading.is_empty() || known(), "{}: no {link}", paper.display());
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen}");
}

/// The paths below the repository that a text names, wherever they stand: in code, between backticks, in links.
fn paths(text: &str) -> Vec<&str> {
    let is_of_path = |c: char| c.is_alphanumeric() || "_./*-".contains(c);
    let words = text.split(|c| !is_of_path(c)).map(|w| w.trim_end_matches(['.', '*', '/']));
    let tops = ["contrib/", "src/", "tests/", "examples/"];
    words.filter(|w| tops.iter().any(|top| w.starts_with(top))).collect()
}

#[test]
fn files_of_this_repository_that_papers_name_are_there() {
    let mut seen = 0;
    for paper in papers() {
        let all = text(&paper);
        // NAME stands for one that the reader chooses.
        for path in paths(&all).into_iter().filter(|p| !p.contains("NAME") && !p.contains('*')) {
            let ends = ["", ".rs"].map(|end| root().join(format!("{path}{end}")));
            assert!(ends.iter().any(|p| p.exists()), "{}: no {path}", paper.display());
            seen += 1;
        }
    }
    assert!(seen > 60, "{seen}");
    assert_eq!(paths("`src/a.rs`, x/src/b; sh contrib/c.sh."), ["src/a.rs", "contrib/c.sh"]);
}

#[test]
fn every_paper_is_linked_from_the_readme() {
    let readme = text(&root().join("README.md"));
    let linked: Vec<PathBuf> = links(&readme).into_iter().map(|l| root().join(l)).collect();
    for paper in papers().into_iter().filter(|p| !p.ends_with("README.md")) {
        assert!(linked.contains(&paper), "{} is not linked", paper.display());
    }
}

#[test]
fn the_architecture_has_the_modules_in_their_order() {
    let lib = text(&root().join("src/lib.rs"));
    let head = lib.lines().filter_map(|l| l.strip_prefix("//! "));
    let named = |l: &str| -> Vec<String> {
        l.split("[`").skip(1).filter_map(|p| Some(p.split_once("`]")?.0.to_string())).collect()
    };
    let modules: Vec<String> = head.flat_map(named).collect();
    let paper = text(&root().join("contrib/doc/architecture.md"));
    let table = paper.split_once("## Modules").unwrap().1.split_once("## Decisions").unwrap().0;
    let first =
        |l: &str| l.strip_prefix("| ").and_then(|l| Some(l.split_once(" | ")?.0.to_string()));
    let cells = table.lines().filter_map(first).filter(|c| c.starts_with('`'));
    let told: Vec<String> = cells
        .flat_map(|c| c.split('`').skip(1).step_by(2).map(str::to_string).collect::<Vec<_>>())
        .collect();
    assert_eq!(told, modules);
}
