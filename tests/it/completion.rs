//! What shells offer for points and for files in them; real shells are asked.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::file_systems::{Image, Points, TOOLS};
use crate::support::mount::Mount;
use crate::support::process::{Stopped, server_pid};
use crate::support::tools::{have, is_root, run};

const FLEECEFS: &str = env!("CARGO_BIN_EXE_fleecefs");

/// Disks `vda` and `my disk`, each with a point that has a few files.
fn backups() -> Points {
    let image = Image::new(16 << 20, &["mke2fs", "-q", "-F", "-t", "ext4"]);
    let files = image.dir.path().join("files");
    std::fs::create_dir_all(files.join("etc/a folder")).unwrap();
    std::fs::write(files.join("etc/fstab"), "x").unwrap();
    std::fs::write(files.join("etc/tw\no"), "x").unwrap();
    let (path, files) = (image.path(), files.to_str().unwrap().to_string());
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &files, path.to_str().unwrap()]);
    let mut points = Points::new();
    points.add(&path);
    let at = |name: &str| points.dir.path().join(name).to_str().unwrap().to_string();
    run("cp", &["-r", &at("vda"), &at("my disk")]);
    points
}

fn complete(words: &[&str]) -> Output {
    Command::new("timeout").args(["60", FLEECEFS, "complete", "--"]).args(words).output().unwrap()
}

fn offered(words: &[&str]) -> Vec<String> {
    let out = complete(words);
    assert!(out.status.success() && out.stderr.is_empty(), "{words:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap().lines().map(str::to_string).collect()
}

fn ready(test: &str, more: &[&str]) -> bool {
    have(test, &[TOOLS.as_slice(), &["timeout", "mke2fs"], more].concat())
}

#[test]
fn disks_points_and_paths_are_offered_where_they_belong() {
    if !ready("disks_points_and_paths_are_offered_where_they_belong", &[]) {
        return;
    }
    let points = backups();
    let dir = points.dir.path().to_str().unwrap();
    let own = std::fs::read_dir(points.dir.path().join("vda")).unwrap();
    let full = own.map(|e| e.unwrap().file_name().into_string().unwrap());
    let full = full.into_iter().find(|n| n.starts_with("FULL")).unwrap();
    assert_eq!(offered(&["files", "ls", "-l", dir, ""]), ["my disk/", "vda/"]);
    assert_eq!(offered(&["show", dir, "vda/"]), [format!("vda/{full}"), "vda/latest".into()]);
    assert_eq!(offered(&["verify", dir, "--point", "vda/l"]), ["vda/latest"]);
    assert_eq!(offered(&["map", "--start-offset", "0", dir, "my"]), ["my disk/"]);
    assert_eq!(offered(&["files", "cat", dir, "vda/latest:"]), ["vda/latest:disk/"]);
    let etc = "vda/latest:disk/etc/";
    assert_eq!(offered(&["files", "cat", dir, "vda/latest:disk/e"]), [etc]);
    let inside = [format!("{etc}a folder/"), format!("{etc}fstab")];
    assert_eq!(offered(&["files", "cp", dir, etc]), inside);
    // Two points, with partitions and paths where files are compared.
    assert_eq!(offered(&["diff", dir, "vda/latest", "vda/l"]), ["vda/latest"]);
    assert_eq!(offered(&["diff", "--files", dir, "vda/l"]), ["vda/latest:"]);
    let second = offered(&["diff", "--files", dir, "vda/latest:disk/", "vda/latest:disk/e"]);
    assert_eq!(second, [etc]);
    assert!(offered(&["diff", dir, "vda/latest", "vda/latest:"]).is_empty());
    // A disk stands for its newest point.
    assert_eq!(offered(&["files", "versions", dir, ""]), ["my disk:", "vda:"]);
    assert_eq!(offered(&["files", "versions", dir, "vda:disk/e"]), ["vda:disk/etc/"]);
    let find = ["files", "find", dir, "--all-points", "vda/latest:disk/e"];
    assert_eq!(offered(&find), [etc]);
    // Disks, by options too, in one word or two.
    for words in [
        &["list", dir, "--disk", ""][..],
        &["consolidate", dir, ""],
        &["link-disk", dir, "vda", ""],
        &["backup", "--level", "inc", "--target", dir, "--exclude", ""],
        &["backup", "-t", dir, "-i", ""],
    ] {
        assert_eq!(offered(words), ["my disk", "vda"], "{words:?}");
    }
    assert_eq!(offered(&["stats", dir, "--disk=v"]), ["--disk=vda"]);
    assert_eq!(offered(&["consolidate", dir, "vda", "--until", ""]), [full.as_str()]);
    let folder = format!("{dir}/vda");
    assert_eq!(offered(&["merge", &folder, "--until", "F"]), [full.as_str()]);
    // Runs by time and, where there are manifests, by id.
    let runs = offered(&["restore", dir, "--run", ""]);
    assert_eq!(runs.last().map(String::as_str), Some("latest"));
    assert!(runs.len() == 2 && runs[0].ends_with('Z'), "{runs:?}");
    assert_eq!(offered(&["restore", dir, "--run=la"]), ["--run=latest"]);
    // Nothing where there is nothing, or something is wrong.
    for words in [
        &["files", "ls", ""][..],
        &["restore", dir, "vda/latest", ""],
        &["show", "/nowhere", ""],
        &["files", "cat", dir, "vda/none:p1/"],
        &["files", "cat", dir, "vda/latest:p7/"],
        &["nothing", dir, ""],
        &["list", dir, "--since", ""],
        &["restore", dir, "--to", ""],
        &["stats", dir, "--nothing=v"],
        &[],
    ] {
        assert!(offered(words).is_empty(), "{words:?}");
    }
}

/// A configuration of `web` and `db`, the second of which has a mistake.
fn configured() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("fleecefs.toml");
    let vms = "[vms.web]\nqmp = \"/run/w\"\ntarget = \"/b/w\"\n[vms.db]\nlevle = \"x\"\n";
    std::fs::write(&file, vms).unwrap();
    let file = file.to_str().unwrap().to_string();
    (dir, file)
}

#[test]
fn configured_vms_are_offered_by_their_names() {
    if !have("configured_vms_are_offered_by_their_names", &["timeout"]) {
        return;
    }
    let (_dir, file) = configured();
    let file = file.as_str();
    assert_eq!(offered(&["backup", "--config-file", file, "--vm", ""]), ["db", "web"]);
    assert_eq!(offered(&["backup", "--config-file", file, "--vm", "db", "--vm=w"]), ["--vm=web"]);
    let equal = format!("--config-file={file}");
    assert_eq!(offered(&["config", "show", &equal, "d"]), ["db"]);
    let mut known = Command::new(FLEECEFS);
    known.args(["complete", "--", "backup", "--vm", "w"]).env("FLEECEFS_CONFIG", file);
    assert_eq!(known.output().unwrap().stdout, b"web\n");
    // Nothing of what is not there, or may not be trusted.
    assert!(offered(&["backup", "--config-file", "/nowhere/x", "--vm", ""]).is_empty());
    let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    std::fs::set_permissions(file, everybody).unwrap();
    assert!(offered(&["backup", "--config-file", file, "--vm", ""]).is_empty());
}

#[test]
fn storage_that_does_not_answer_holds_no_prompt() {
    let name = "storage_that_does_not_answer_holds_no_prompt";
    if !ready(name, &["/dev/fuse"]) || !is_root(name) {
        return;
    }
    let points = backups();
    let storage = Mount::new(points.dir.path());
    let stopped = Stopped::new(server_pid(storage.path()));
    let dir = storage.path().to_str().unwrap();
    assert!(offered(&["show", dir, ""]).is_empty());
    drop(stopped);
}

/// What bash would offer: `words` as readline takes them apart.
fn bash(words: &[&str], setup: &Path) -> String {
    const SCRIPT: &str = r#"
        source "$SETUP"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _fleecefs_points "$FLEECEFS" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s|' "${COMPREPLY[@]}""#;
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", SCRIPT, "bash"]).args(words);
    let out = command.env("SETUP", setup).env("FLEECEFS", FLEECEFS).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn bash_gets_names_quoted_and_from_the_last_colon_on() {
    let name = "bash_gets_names_quoted_and_from_the_last_colon_on";
    if !ready(name, &["bash"]) {
        return;
    }
    let points = backups();
    let dir = points.dir.path().to_str().unwrap();
    let setup = points.dir.path().join("setup");
    std::fs::write(&setup, run(FLEECEFS, &["completions", "bash"]).stdout).unwrap();
    let asked = |words: &[&str]| bash(&[&["fleecefs"], words].concat(), &setup);
    assert_eq!(asked(&["show", dir, ""]), r"my\ disk/|vda/|");
    let (_folder, file) = configured();
    assert_eq!(asked(&["backup", "--config-file", &file, "--vm", ""]), "db|web|");
    assert_eq!(asked(&["backup", "--config-file", &file, "--vm", "=", "w"]), "web|");
    assert_eq!(asked(&["show", dir, r"my\ disk/l"]), r"my\ disk/latest|");
    assert_eq!(asked(&["show", dir, "'my disk/l"]), "my disk/latest|");
    assert_eq!(asked(&["files", "ls", dir, "vda/latest", ":"]), "disk/|");
    let etc = ["files", "ls", dir, "vda/latest", ":", "disk/etc/"];
    assert_eq!(asked(&etc), r"disk/etc/a\ folder/|disk/etc/fstab|");
    assert_eq!(asked(&["list", dir, "--disk", ""]), r"my\ disk|vda|");
    assert_eq!(asked(&["list", dir, "--disk", "=", "v"]), "vda|");
    assert_eq!(asked(&["list", dir, "--disk", "="]), r"my\ disk|vda|");
    let time = offered(&["restore", dir, "--run", "2"]).remove(0);
    let (hour, rest) = time.split_once(':').unwrap();
    // Time is taken apart at its colons.
    assert_eq!(asked(&["restore", dir, "--run", hour, ":"]), format!("{rest}|"));
    assert_eq!(
        asked(&["diff", "--files", dir, "vda/latest", ":", "disk/etc", "vda/l"]),
        "vda/latest:|"
    );
    // Nothing in a word is a command.
    let evil = points.dir.path().join("evil");
    asked(&["show", dir, &format!("$(touch {})", evil.display())]);
    assert!(!evil.exists());
}

#[test]
fn fish_and_zsh_ask_the_program_too() {
    let name = "fish_and_zsh_ask_the_program_too";
    if !ready(name, &["fish", "zsh"]) {
        return;
    }
    let points = backups();
    let dir = points.dir.path().to_str().unwrap();
    let folder = Path::new(FLEECEFS).parent().unwrap().to_str().unwrap();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap());
    let (_folder, file) = configured();
    for (line, offer) in [
        ("show DIR vda/l", "vda/latest"),
        ("diff DIR vda/latest vda/l", "vda/latest"),
        ("files versions DIR vda:disk/etc/f", "vda:disk/etc/fstab"),
        ("list DIR --disk v", "vda"),
        ("list DIR --disk=v", "--disk=vda"),
        ("restore DIR --run l", "latest"),
        ("backup --config-file FILE --vm w", "web"),
        ("backup --config-file=FILE --vm=w", "--vm=web"),
        ("config show --config-file FILE d", "db"),
    ] {
        let line = line.replace("DIR", dir).replace("FILE", &file);
        let fish = format!("fleecefs completions fish | source; complete -C 'fleecefs {line}'");
        let mut command = Command::new("fish");
        let out = command.args(["-N", "-c", &fish]).env("PATH", &path).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.lines().any(|l| l == offer), "{line}: {out:?}");
    }
    for (line, offer) in [
        ("files ls DIR vda/latest:disk/etc/fs", "vda/latest:disk/etc/fstab"),
        ("diff DIR vda/latest vda/lat", "vda/latest vda/latest"),
        ("list DIR --disk v", "--disk vda"),
        ("stats DIR --disk=v", "--disk=vda"),
        ("restore DIR --run la", "--run latest"),
        ("link-disk DIR vda my", "vda my\\ disk"),
        ("backup --config-file FILE --vm w", "--vm web"),
    ] {
        // A terminal of its own, in which keys are pressed.
        let zsh = format!(
            "zmodload zsh/zpty; zpty z zsh -f -i
             zpty -w z 'PS1=; autoload -U compinit; compinit -u -D; source <(fleecefs completions zsh)'
             zpty -w z \"compdef _fleecefs fleecefs; print rea''dy\"; zpty -r z x '*ready*'
             zpty -n -w z $'fleecefs {}\\t'
             zpty -r z y {} && print -r -- $y",
            line.replace("DIR", dir).replace("FILE", &file),
            format_args!("'*{}*'", offer.replace('\\', "\\\\")),
        );
        let mut command = Command::new("timeout");
        let args = ["60", "zsh", "-f", "-c", &zsh];
        let out = command.args(args).env("PATH", &path).output().unwrap();
        assert!(String::from_utf8_lossy(&out.stdout).contains(offer), "{line}: {out:?}");
    }
}
