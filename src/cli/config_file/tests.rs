//! Mistakes that people make in a configuration, and what they are told; and that options and keys are one table.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::CommandFactory;

use super::*;
use crate::cli::args::Cli;

/// A configuration in a folder: the main file, and files of VMs.
struct Files(tempfile::TempDir);

impl Files {
    fn new(main: &str) -> Self {
        let files = Files(tempfile::tempdir().unwrap());
        files.put("fleecefs.toml", main);
        files
    }

    fn put(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn load(&self) -> Result<Config> {
        let args = ConfigFileArgs { config_file: Some(self.0.path().join("fleecefs.toml")) };
        args.load(Cli::command)
    }

    /// What is wrong, without the folder.
    fn told(&self) -> Vec<String> {
        let config = self.load().unwrap();
        let dir = format!("{}/", self.0.path().display());
        config.problems.iter().map(|p| p.to_string().replace(&dir, "")).collect()
    }
}

/// A VM that is right, for mistakes after it.
const GOOD: &str = "[vms.a]\nqmp = \"/run/a.sock\"\ntarget = \"/b/{vm}\"\n";

/// What is told of lines that follow [`GOOD`].
fn told(lines: &str) -> Vec<String> {
    Files::new(&format!("{GOOD}{lines}")).told()
}

#[test]
fn a_right_configuration_has_nothing_wrong() {
    assert_eq!(told(""), Vec::<String>::new());
    let all = r#"
discover = "/nonexistent-run/*/qmp.sock"
parallel = 2
[defaults]
target = "/backups/{vm}"
agent = "/run/{vm}/ga.sock"
quiesce = true
freeze = ["/", "/srv"]
keep_daily = 7
keep_within = "2d"
keep_gone = 3
compress = "zstd"
mode = 0o640
max_age = "36h"
hours = "22:00-06:00"
timeout = "6h"
before = ["/bin/true"]
after = [["/bin/true"], ["/bin/sh", "-c", "exit 0"]]
[defaults.boot_check]
timeout = "3m"
expect = "login:"
[vms.one]
qmp = "/run/one/qmp.sock"
level = "diff"
verify = "full"
[vms."two.example"]
qmp = "tcp:127.0.0.1:4444"
offline = ["/srv/two.qcow2", "raw:/srv/data.img"]
when_off = "offline"
compress = true
boot_check = false
"#;
    let files = Files::new(all);
    files.put("vms.d/three.toml", "qmp = \"/run/three/qmp.sock\"\nenabled = false\n");
    files.put("vms.d/three.toml~", "not TOML");
    assert_eq!(files.told(), Vec::<String>::new());
    let config = files.load().unwrap();
    let names: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(
        (names.as_slice(), config.parallel),
        (["one", "three", "two.example"].as_slice(), Some(2))
    );
    let (one, three, two) = (&config.vms[0], &config.vms[1], &config.vms[2]);
    assert_eq!(one.target(), Some(Path::new("/backups/one")));
    assert_eq!((one.max_age(), one.seconds("timeout")), (Some(36 * 3600), Some(6 * 3600)));
    assert!(one.boots() && !two.boots() && one.has_rules() && !three.is_enabled());
    assert_eq!(one.commands("after")[1], ["/bin/sh", "-c", "exit 0"]);
    let line = |words: Vec<std::ffi::OsString>| {
        words.into_iter().map(|w| w.into_string().unwrap()).collect::<Vec<_>>()
    };
    let running = line(two.backup(config::How::Running));
    let wanted = [
        "--qmp=tcp:127.0.0.1:4444",
        "--agent=/run/two.example/ga.sock",
        "--quiesce",
        "--freeze=/srv",
        "--compress",
        "--mode=640",
        "--target=/backups/two.example",
    ];
    assert!(wanted.iter().all(|w| running.iter().any(|r| r == w)), "{running:?}");
    assert!(!running.iter().any(|r| r.starts_with("--offline")), "{running:?}");
    let off = line(two.backup(config::How::Offline));
    assert!(off.contains(&"--offline=raw:/srv/data.img".into()), "{off:?}");
    let not = ["--qmp", "--agent", "--quiesce", "--freeze"];
    assert!(!off.iter().any(|o| not.iter().any(|n| o.starts_with(n))), "{off:?}");
    assert_eq!(line(one.options("prune")), ["--keep-daily=7", "--keep-within=2d", "--keep-gone=3"]);
    assert_eq!(line(one.options("boot")), ["--expect=login:", "--timeout=3m"]);
}

/// Each with the whole message.
#[test]
fn typical_mistakes_are_told_with_their_place_and_what_is_right() {
    let cases = [
        ("keep_dayly = 7", "4:1: unknown key keep_dayly; did you mean keep_daily?"),
        ("keep-daily = 7", "4:1: unknown key keep-daily; did you mean keep_daily?"),
        ("Target = \"/b\"", "4:1: unknown key Target; did you mean target?"),
        ("xyzzy = \"red\"", "4:1: unknown key xyzzy"),
        ("keep_daily = \"seven\"", "4:14: keep_daily: 'seven': invalid digit found in string"),
        ("keep_daily = true", "4:14: keep_daily must be a text or a number, not true or false"),
        (
            "keep_gone = \"none\"",
            "4:13: keep_gone: 'none' is not 'all', a number from 1 or a duration like 90d",
        ),
        (
            "keep_gone = 0",
            "4:13: keep_gone: '0' is not 'all', a number from 1 or a duration like 90d",
        ),
        (
            "keep_within = \"7\"",
            "4:15: keep_within: '7' is not a duration; use s, m, h, d, w, M or y as in 7d or 1y6M",
        ),
        ("quiesce = \"yes\"", "4:11: quiesce must be true or false, not a text"),
        ("agent = \"run/a-ga.sock\"", "4:9: agent: 'run/a-ga.sock' is not an absolute path"),
        ("fleece_dir = \"fleece\"", "4:14: fleece_dir: 'fleece' is not an absolute path"),
        (
            "level = \"incremental\"",
            "4:9: level: 'incremental' is not one of full, inc, diff, copy, auto",
        ),
        ("verify = true", "4:10: verify must be a text or a number, not true or false"),
        ("verify = \"fast\"", "4:10: verify: 'fast' is not one of quick, full, none"),
        ("hold_limit = 0", "4:14: hold_limit: 0 is not in 1..=3600"),
        ("rate_limit = \"10X\"", "4:14: rate_limit: '10X' has an unknown unit; use K, M, G or T"),
        ("mode = \"0777\"", "4:8: mode: '0777' lets everybody write to the backups"),
        ("hours = \"22-6\"", "4:9: hours: '22-6' is not a part of the day like 22:00-06:00"),
        ("max_age = \"0s\"", "4:11: max_age: '0s': must be at least 1s"),
        ("quiesce = true", "4:1: VM a: quiesce needs agent"),
        ("pause = true\nno_stop = true", "5:1: VM a: no_stop cannot be used with pause"),
        (
            "freeze = [1.5]",
            "4:11: freeze must be a text or a list of texts, not a number with a point",
        ),
        (
            "before = \"/bin/true\"",
            "4:10: before must be a command as a list of texts, such as [\"/usr/bin/logger\", \"x\"], not a text",
        ),
        ("when_off = \"offline\"", "4:1: VM a: when_off = \"offline\" needs offline: the images"),
        (
            "level = \"full\"\nfull_every = \"7d\"",
            "5:1: VM a: full_every goes with level = \"auto\"",
        ),
        (
            "verify = \"full\"\nno_hash = true",
            "5:1: VM a: verify = \"full\" compares with the hash that no_hash leaves out: no night would go well (verify = \"quick\")",
        ),
        ("boot_check.expect = \"(\"", "4:21: boot_check.expect: '(': error: unclosed group"),
        (
            "boot_check.timeuot = \"5m\"",
            "4:12: unknown key boot_check.timeuot; did you mean timeout?",
        ),
        (
            "boot_check.firmware = \"/f\"",
            "4:12: VM a: boot_check.firmware needs boot_check.firmware_vars",
        ),
        ("prune_options = 4", "4:1: prune_options must be a table"),
        ("dry_run = true", "4:1: unknown key dry_run"),
        ("discover = \"/run/*/s\"", "4:1: unknown key discover"),
        ("[defualts]\nlevel = \"inc\"", "4:2: unknown key defualts; did you mean defaults?"),
        (
            "[vms.\"a b\"]\n",
            "4:6: vms.a b: a VM's name has at most 64 letters, digits and . _ + @ -, and begins with a letter or digit",
        ),
        (
            "[vms.b]\nqmp = \"/run/b.sock\"",
            "4:6: VM b: target is missing (target = \"/backups/{vm}\")",
        ),
        (
            "[vms.b]\ntarget = \"/b/b\"",
            "4:6: VM b: qmp is missing: QEMU's QMP socket (or offline: its images)",
        ),
        (
            "[vms.b]\nqmp = \"/b.sock\"\ntarget = \"/b/a\"",
            "6:1: VM b has the target of VM a: /b/a (use {vm} in it, or shared = true)",
        ),
    ];
    for (lines, wanted) in cases {
        let got = told(lines);
        assert_eq!(got, [format!("fleecefs.toml:{wanted}")], "{lines}");
    }
}

#[test]
fn mistakes_in_the_main_tables_and_in_toml_itself_are_told() {
    let told = |text: &str| Files::new(text).told();
    let one = |text: &str| {
        let all = told(text);
        assert_eq!(all.len(), 1, "{text}: {all:?}");
        all.into_iter().next().unwrap()
    };
    assert_eq!(
        one("keep_daily = 7\n"),
        "fleecefs.toml:1:1: keep_daily is said of VMs: put it below [defaults] or [vms.NAME]"
    );
    assert_eq!(one("parallel = 0\n"), "fleecefs.toml:1:12: parallel must be a number from 1 to 64");
    assert_eq!(one("vms = 1\n"), "fleecefs.toml:1:7: vms must be a table, not a number");
    assert_eq!(
        one("discover = \"/run/qmp.sock\"\n"),
        "fleecefs.toml:1:12: discover: '/run/qmp.sock' is not an absolute path with one *, which stands for the VM's name"
    );
    let open = told("[vms.a]\nqmp = \"/run/a.sock\ntarget = \"/b\"\n");
    assert!(
        open[0].starts_with("fleecefs.toml:2:") && open[0].contains(": not TOML: "),
        "{open:?}"
    );
    let twice = one(&format!("{GOOD}target = \"/c\"\n"));
    assert!(
        twice.starts_with("fleecefs.toml:4:1: not TOML: ") && twice.contains("duplicate"),
        "{twice}"
    );
    // All of them at once, in their order.
    let all = told(&format!("[defaults]\nkep_last = 1\n{GOOD}x = 1\nquiesce = 3\n"));
    assert_eq!(all.len(), 3, "{all:?}");
    assert!(
        all[0].contains(":2:1:") && all[1].contains(":6:1:") && all[2].contains(":7:11:"),
        "{all:?}"
    );
}

#[test]
fn a_mistake_of_one_vm_is_that_vms_alone() {
    let files = Files::new(GOOD);
    files.put("vms.d/b.toml", "qmp = \"/run/b.sock\"\ntarget = \"/b/b\"\nlevle = \"inc\"\n");
    files.put("vms.d/a.toml", "qmp = \"/run/a2.sock\"\n");
    let config = files.load().unwrap();
    assert!(config.common_problems().is_empty());
    let of = |vm| config.problems_of(vm).iter().map(|p| p.message.clone()).collect::<Vec<_>>();
    assert_eq!(of("b"), ["unknown key levle; did you mean level?"]);
    assert_eq!(of("a").len(), 1);
    assert!(of("a")[0].starts_with("VM a is also in "), "{:?}", of("a"));
    // Where it can be any VM's, it is everybody's.
    let files = Files::new(&format!("{GOOD}[defaults]\nlevle = \"inc\"\n"));
    assert_eq!(files.load().unwrap().common_problems().len(), 1);
    let e = files.load().unwrap().vm("aa").unwrap_err();
    assert!(e.kind() == Kind::NotFound && e.report().contains("did you mean a?"), "{}", e.report());
}

#[test]
fn a_file_that_is_no_configuration_is_its_vms_mistake() {
    let files = Files::new(&format!("{GOOD}[vms.\"no name\"]\n[vms.number]\n"));
    files.put("vms.d/b.toml", "qmp = \"/run/b.sock\"\ntarget = \"/b/b\"\n");
    files.put("vms.d/bad name.toml", "");
    let folder = files.0.path().join("vms.d");
    std::os::unix::fs::symlink("nowhere", folder.join("dangling.toml")).unwrap();
    std::fs::write(folder.join("latin.toml"), b"qmp = \"\xe9\"\n").unwrap();
    use std::os::unix::ffi::OsStrExt;
    let latin = std::ffi::OsStr::from_bytes(b"n\xe9.toml");
    std::fs::write(folder.join(latin), "").unwrap();
    let config = files.load().unwrap();
    assert!(config.common_problems().is_empty(), "{:?}", config.problems);
    for good in ["a", "b"] {
        assert!(config.problems_of(good).is_empty(), "{:?}", config.problems);
    }
    for (bad, why) in [
        ("bad name", "a VM's name has"),
        ("no name", "a VM's name has"),
        ("n\u{fffd}", "a VM's name has"),
        ("dangling", "cannot find the configuration"),
        ("latin", "not UTF-8"),
        ("number", "target is missing"),
    ] {
        // It has a row of its own, which fails.
        assert!(config.vms.iter().any(|vm| vm.name == bad), "{bad}");
        let wrong = config.problems_of(bad);
        assert!(wrong.iter().any(|p| p.message.contains(why)), "{bad}: {wrong:?}");
    }
    // A name that is none gets into no path and no command.
    files.put(
        "fleecefs.toml",
        "[defaults]\ntarget = \"/b/{vm}\"\nafter = [\"/bin/true\"]\non_failure = [\"/bin/sh\", \"-c\", \"x {vm}\"]\n",
    );
    let config = files.load().unwrap();
    let bad = config.vm("bad name").unwrap();
    assert_eq!((bad.target(), bad.commands("on_failure").len()), (None, 0));
    assert_eq!(bad.commands("after").len(), 1);
}

#[test]
fn two_vms_have_not_one_socket_or_image() {
    let b = "[vms.b]\ntarget = \"/b2/b\"\n";
    assert_eq!(
        told(&format!("agent = \"/run/g\"\n{b}qmp = \"unix:/run/a.sock\"\nagent = \"/run/g\"\n")),
        [
            "fleecefs.toml:7:1: VM b has the same 'qmp' as VM a: /run/a.sock",
            "fleecefs.toml:8:1: VM b has the same 'agent' as VM a: /run/g"
        ]
    );
    assert_eq!(
        told(&format!("offline = [\"/i/x\", \"/i/y\"]\n{b}offline = \"qcow2:/i/y\"\n")),
        ["fleecefs.toml:7:1: VM b has the same 'offline' as VM a: /i/y"]
    );
    let off = format!("{b}qmp = \"/run/a.sock\"\nenabled = false\n");
    assert_eq!(told(&off), Vec::<String>::new());
    // One target in another is told, and allowed.
    let files =
        Files::new(&format!("{GOOD}[vms.b]\nqmp = \"/run/b.sock\"\ntarget = \"/b/a/x/b\"\n"));
    let config = files.load().unwrap();
    assert_eq!(files.told(), Vec::<String>::new());
    assert!(
        config.notes.len() == 1
            && config.notes[0].ends_with("the target of VM b is in that of VM a: /b/a/x/b"),
        "{:?}",
        config.notes
    );
}

#[test]
fn no_number_is_left_out_and_no_vm_is_not_checked() {
    let large = "99999999999999999999";
    assert_eq!(
        told(&format!("keep_last = {large}\n")),
        ["fleecefs.toml:4:13: keep_last: the number is too large"]
    );
    assert_eq!(told(&format!("include = [\"a\", -{large}]\n")).len(), 1);
    // Where it is not enabled, '--vm' backs it up all the same.
    assert_eq!(
        told("[vms.b]\nqmp = \"/run/b.sock\"\nenabled = false\n"),
        ["fleecefs.toml:4:6: VM b: target is missing (target = \"/backups/{vm}\")"]
    );
    assert!(told("init = true\n")[0].contains("unknown key init"));
}

#[test]
fn a_pattern_in_a_folder_that_is_not_there_is_told() {
    let files = Files::new(&format!("discover = \"/nowhere-run/*/q.sock\"\n{GOOD}"));
    let notes = files.load().unwrap().notes;
    assert!(notes.len() == 1 && notes[0].contains("/nowhere-run"), "{notes:?}");
}

#[test]
fn what_others_may_change_is_refused() {
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let files = Files::new(GOOD);
    files.put("vms.d/b.toml", "qmp = \"/run/b.sock\"\ntarget = \"/b/b\"\n");
    let dir = files.0.path();
    files.load().unwrap();
    for (name, bad, good) in
        [("fleecefs.toml", 0o666, 0o644), ("vms.d", 0o777, 0o755), (".", 0o777, 0o700)]
    {
        mode(&dir.join(name), bad);
        let e = files.load().unwrap_err();
        assert!(
            e.kind() == Kind::Permission && e.report().contains("chmod go-w"),
            "{name}: {}",
            e.report()
        );
        mode(&dir.join(name), good);
        files.load().unwrap();
    }
    // That of a single VM is refused alone.
    mode(&dir.join("vms.d/b.toml"), 0o646);
    let config = files.load().unwrap();
    assert!(config.common_problems().is_empty() && config.problems_of("a").is_empty());
    let wrong = config.problems_of("b");
    assert!(wrong.len() == 1 && wrong[0].message.contains("chmod go-w"), "{wrong:?}");
    // A program that somebody else could exchange.
    files.put("bin/hook", "#!/bin/sh\n");
    let hook = dir.join("bin/hook");
    let name = hook.to_str().unwrap();
    assert!(config::check_program(name).unwrap_err().report().contains("chmod +x"));
    mode(&hook, 0o755);
    config::check_program(name).unwrap();
    mode(&dir.join("bin"), 0o777);
    assert_eq!(config::check_program(name).unwrap_err().kind(), Kind::Permission);
    assert_eq!(config::check_program("bin/hook").unwrap_err().kind(), Kind::Usage);
    std::fs::remove_file(dir.join("fleecefs.toml")).unwrap();
    assert_eq!(files.load().unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn what_is_no_text_or_too_large_is_refused() {
    let files = Files::new("");
    std::fs::write(files.0.path().join("fleecefs.toml"), b"[vms.a]\nqmp = \"\xff\"\n").unwrap();
    let e = files.load().unwrap_err();
    assert!(
        e.kind() == Kind::Usage && e.to_string().ends_with("fleecefs.toml:2:8: not UTF-8"),
        "{e}"
    );
    std::fs::write(files.0.path().join("fleecefs.toml"), vec![b'\n'; (1 << 20) + 1]).unwrap();
    assert_eq!(files.load().unwrap_err().kind(), Kind::Unsupported);
    // Deep nesting ends in an error, not in a stack that is too deep.
    let deep = format!("discover = {}{}\n", "[".repeat(100_000), "]".repeat(100_000));
    assert!(!Files::new(&deep).told().is_empty());
}

/// Sockets in folders of others are passed over; a file's word on one that is found holds.
#[test]
fn vms_are_found_by_their_sockets() {
    let files = Files::new("");
    let run = files.0.path().join("run");
    let mut sockets = Vec::new();
    for name in ["vm1", "vm2", "open", "bad name", "dir"] {
        std::fs::create_dir_all(run.join(name)).unwrap();
        if name != "dir" {
            sockets.push(
                std::os::unix::net::UnixListener::bind(run.join(name).join("q.sock")).unwrap(),
            );
        }
    }
    std::fs::set_permissions(run.join("open"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let pattern = format!("discover = \"{}/*/q.sock\"\n", run.display());
    files.put(
        "fleecefs.toml",
        &format!("{pattern}[defaults]\ntarget = \"/b/{{vm}}\"\n[vms.vm2]\nlevel = \"full\"\n"),
    );
    let config = files.load().unwrap();
    assert_eq!(files.told(), Vec::<String>::new());
    let names: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["vm1", "vm2"]);
    assert_eq!(config.vms[1].text("level"), Some("full"));
    assert_eq!(config.vms[0].text("qmp"), run.join("vm1/q.sock").to_str());
    assert_eq!(config.notes.len(), 2, "{:?}", config.notes);
    assert!(config.notes.iter().any(|n| n.contains("open") && n.contains("other users may write")));
}

/// Every option of the commands is a key or is left out by name, and every key is an option or the configuration's own.
#[test]
fn options_and_keys_are_one_table() {
    let mut seen = 0;
    for (command, table) in [
        ("backup", ""),
        ("prune", "prune_options."),
        ("verify", "verify_options."),
        ("boot", "boot_check."),
    ] {
        let program = Cli::command();
        let mut found = program.find_subcommand(command).unwrap().clone();
        found.build();
        for arg in found.get_arguments() {
            let (Some(long), id) = (arg.get_long(), arg.get_id().as_str()) else { continue };
            let long = long.replace('-', "_");
            let name = if long.starts_with("keep_") { long } else { format!("{table}{long}") };
            let is_key = config::has_key(&program, &name);
            let is_left_out = config::is_left_out(command, id);
            assert!(
                is_key != is_left_out,
                "{command} --{name}: a key of the configuration: {is_key}, listed as none: {is_left_out}"
            );
            seen += 1;
        }
    }
    assert!(seen > 80, "{seen}");
    // What is left out is there.
    for (command, id) in config::left_out() {
        let program = Cli::command();
        let command = program.find_subcommand(command).unwrap();
        assert!(command.get_arguments().any(|a| a.get_id() == id), "{} {id}", command.get_name());
    }
}
