//! `fleecefs config check`, `list` and `show`: the configuration of `backup --all`.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::tools::is_root;

fn config(dir: &Path, args: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
    c.arg("config").args(args).env("FLEECEFS_CONFIG", dir.join("fleecefs.toml"));
    c.output().unwrap()
}

fn text(out: &Output) -> String {
    String::from_utf8(out.stdout.clone()).unwrap()
}

fn two_vms() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let main = "[defaults]\ntarget = \"/backups/{vm}\"\nkeep_daily = 7\n\n[vms.web]\nqmp = \"/run/web.sock\"\n";
    std::fs::write(dir.path().join("fleecefs.toml"), main).unwrap();
    std::fs::create_dir(dir.path().join("vms.d")).unwrap();
    let own = "qmp = \"/run/db.sock\"\nkeep_daily = 30\nmax_age = \"36h\"\nenabled = false\n";
    std::fs::write(dir.path().join("vms.d/db.toml"), own).unwrap();
    dir
}

#[test]
fn check_tells_all_that_is_wrong_and_where() {
    let dir = two_vms();
    let out = config(dir.path(), &["check"]);
    assert_eq!(
        (out.status.code(), text(&out).as_str()),
        (Some(0), "the configuration is good: 2 VMs\n")
    );
    let path = dir.path().join("vms.d/db.toml");
    let own = "qmp = \"/run/db.sock\"\nkeep_dayly = 30\nafter = [\"/nowhere/x\"]\n[boot_check]\ntimeout = 5\n";
    std::fs::write(&path, own).unwrap();
    let out = config(dir.path(), &["check"]);
    assert_eq!(out.status.code(), Some(2));
    let told = text(&out);
    let lines: Vec<&str> = told.lines().collect();
    let at = path.display();
    assert_eq!(lines.len(), 3, "{told}");
    assert_eq!(lines[0], format!("{at}:2:1: unknown key keep_dayly; did you mean keep_daily?"));
    assert!(lines[1].starts_with(&format!("{at}:5:11: boot_check.timeout: ")), "{told}");
    assert!(
        lines[2].starts_with(&format!("{at}:3:1: after: ")) && lines[2].contains("/nowhere/x"),
        "{told}"
    );
    let out = config(dir.path(), &["check", "--json"]);
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        (&told["problems"][0]["line"], &told["problems"][0]["vm"]),
        (&2.into(), &"db".into())
    );
    // A backup directory of that name is asked for by its path.
    let out =
        Command::new(env!("CARGO_BIN_EXE_fleecefs")).args(["config", "./check"]).output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&out.stderr).contains("backup directory"), "{out:?}");
}

#[test]
fn show_says_where_each_value_comes_from() {
    let dir = two_vms();
    let shown = text(&config(dir.path(), &["show", "db"]));
    let line = |key: &str| {
        let found = shown.lines().find(|l| l.split_whitespace().next() == Some(key));
        found
            .unwrap_or_else(|| panic!("{key}: {shown}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };
    let at = |name: &str| dir.path().join(name).display().to_string();
    assert_eq!(line("keep_daily"), format!("keep_daily \"30\" {}:2:1", at("vms.d/db.toml")));
    assert_eq!(line("target"), format!("target \"/backups/db\" {}:2:1", at("fleecefs.toml")));
    assert_eq!(line("verify"), "verify \"quick\" default");
    let out = config(dir.path(), &["show", "web", "--json"]);
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    let values = told["values"].as_array().unwrap();
    let keep = values.iter().find(|v| v["key"] == "keep_daily").unwrap();
    assert_eq!((&keep["value"], &keep["line"]), (&"7".into(), &3.into()));
    let listed = text(&config(dir.path(), &["list"]));
    assert!(
        listed.contains("web") && listed.contains("not enabled") && listed.contains("36h"),
        "{listed}"
    );
    let out = config(dir.path(), &["show", "webb"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&out.stderr).contains("did you mean web?"));
    assert_eq!(config(&dir.path().join("none"), &["check"]).status.code(), Some(3));
}

#[test]
fn a_configuration_of_another_user_is_refused() {
    if !is_root("a_configuration_of_another_user_is_refused") {
        return;
    }
    let dir = two_vms();
    std::os::unix::fs::chown(dir.path().join("vms.d/db.toml"), Some(4_000_000), None).unwrap();
    let out = config(dir.path(), &["check"]);
    let said = text(&out);
    assert_eq!((out.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("db.toml") && said.contains("belongs to user 4000000"), "{said}");
}

/// The examples of the paper are right.
#[test]
fn examples_in_the_paper_are_good_configurations() {
    let paper = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/doc/nightly.md");
    let paper = std::fs::read_to_string(paper).unwrap();
    let mut seen = 0;
    for example in paper.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        let dir = tempfile::tempdir().unwrap();
        // Programs that the example names are not there.
        let example = example.replace("/usr/local/sbin/", "/nowhere/");
        let example = example.replace("/usr/sbin/", "/nowhere/");
        std::fs::write(dir.path().join("fleecefs.toml"), &example).unwrap();
        let told = text(&config(dir.path(), &["check"]));
        let wrong = told.lines().filter(|l| !l.contains("/nowhere/") && !l.contains("is good"));
        // The folder of its pattern is not there.
        let wrong: Vec<&str> = wrong.filter(|l| !l.starts_with("note: ")).collect();
        assert!(wrong.is_empty(), "{example}\n{wrong:?}");
        seen += 1;
    }
    assert!(seen >= 3, "{seen}");
}
