//! What contrib/SEMANTICS.md and the documents in contrib/doc promise has a test, and what the tests of mounts test is
//! promised.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The tests that the documents name, as `file::name`.
fn promised() -> BTreeSet<String> {
    let read = |path: String| std::fs::read_to_string(root(&path)).unwrap();
    let documents = ["SEMANTICS.md", "doc/security.md", "doc/beside.md", "doc/from-qmpbackup.md"];
    let documents = documents.map(|d| format!("contrib/{d}"));
    let text: String = documents.into_iter().map(read).collect();
    let named = text.split('`').skip(1).step_by(2).filter(|word| word.contains("::"));
    named.map(str::to_string).collect()
}

/// The source of a module of the tests.
fn test_module(name: &str) -> PathBuf {
    let places = ["tests/it", "tests/slow", "tests"];
    let mut places = places.into_iter().map(|d| root(d).join(name).with_extension("rs"));
    places.find(|p| p.exists()).unwrap_or_else(|| panic!("no tests called {name}"))
}

/// The names of the test functions in a file.
fn tests_in(path: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let after = text.split("#[test]").skip(1);
    let name = |rest: &str| Some(rest.split_once("fn ")?.1.split_once('(')?.0.to_string());
    after.filter_map(name).collect()
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let promised = promised();
    assert!(promised.len() > 15, "{promised:?}");
    for promise in &promised {
        let (file, test) = promise.rsplit_once("::").unwrap();
        let path = match file.strip_suffix("::tests") {
            Some(module) => {
                let path = root("src").join(module.replace("::", "/"));
                let places =
                    [path.join("tests.rs"), path.join("mod.rs"), path.with_extension("rs")];
                places.into_iter().find(|p| p.exists()).unwrap_or(path)
            }
            // Tests of a module that are a folder.
            None if file.contains("::tests::") => {
                root("src").join(file.replace("::", "/")).with_extension("rs")
            }
            None => test_module(file),
        };
        assert!(tests_in(&path).contains(test), "no test {promise}");
    }
}

#[test]
fn every_promise_has_a_test() {
    let text = std::fs::read_to_string(root("contrib/SEMANTICS.md")).unwrap();
    let (mut items, mut open) = (Vec::new(), false);
    for line in text.lines() {
        match (line.strip_prefix("- "), items.last_mut()) {
            (Some(begin), _) => {
                items.push(begin.to_string());
                open = true;
            }
            (None, Some(item)) if open && line.starts_with("  ") => item.push_str(line),
            _ => open = false,
        }
    }
    assert!(items.len() > 200, "{}", items.len());
    for item in items.iter().filter(|i| !i.starts_with("Not promised")) {
        assert!(item.contains("::"), "no test for: {item}");
    }
}

#[test]
fn every_mount_test_is_promised() {
    let promised = promised();
    // How it runs, not what it promises to whoever reads a point.
    let inside = [
        "the_foreground_process_is_the_mount",
        "the_table_of_descriptors_is_large_before_the_first_read",
    ];
    for file in ["mount", "mount_process", "loop_device"] {
        for test in tests_in(&test_module(file)) {
            let known = promised.contains(&format!("{file}::{test}"));
            assert!(known || inside.contains(&test.as_str()), "{test} is not in the document");
        }
    }
}
