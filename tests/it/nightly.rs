//! `fleecefs backup --all` and `--vm`: the VMs of a configuration, with real QEMUs. One that is off, hangs or fails stops
//! no other.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::backup::{images, leftovers, ours_in_qemu};
use crate::support::guest::Qmp;
use crate::support::qemu::two_disks::{Machine, TOOLS};
use crate::support::tools::{have, write_script};

/// A configuration and the folders of its VMs.
struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    fn new(text: &str) -> Self {
        let setup = Setup { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(setup.path("T")).unwrap();
        setup.write(text);
        setup
    }

    /// `{dir}` in it is this folder.
    fn write(&self, text: &str) {
        let text = text.replace("{dir}", self.dir.path().to_str().unwrap());
        std::fs::write(self.path("fleecefs.toml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.arg("backup").args(more).arg("--config-file").arg(self.path("fleecefs.toml"));
        c.arg("--state-dir").arg(self.path("state")).env_remove("FLEECEFS_STATE_DIR");
        c
    }

    /// Runs it; gives its exit code, the summary, and what it said.
    fn run(&self, more: &[&str]) -> (Option<i32>, Value, String) {
        let out = self.command(&[more, &["--json"]].concat()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        let printed = serde_json::from_slice(&out.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}\n{said}", String::from_utf8_lossy(&out.stdout)));
        (out.status.code(), printed, said)
    }

    /// Runs and must succeed; gives the first VM's row.
    fn must(&self, more: &[&str]) -> Value {
        let (code, printed, said) = self.run(more);
        assert_eq!(code, Some(0), "{printed}\n{said}");
        printed["vms"][0].clone()
    }

    /// Starts a run and waits until its backup is held at the freeze point.
    fn held(&self, more: &[&str]) -> Child {
        let hold = self.path("hold");
        std::fs::create_dir(&hold).unwrap();
        let mut c = self.command(more);
        let err = std::fs::File::create(self.path("stderr")).unwrap();
        let mut child = c.env("FLEECEFS_HOLD", &hold).stderr(err).spawn().unwrap();
        wait_until("the backup is held", || {
            let said = || std::fs::read_to_string(self.path("stderr")).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it has ended: {}", said());
            hold.join("ready").exists()
        });
        child
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not yet");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as i32, signal) };
}

fn row<'a>(printed: &'a Value, vm: &str) -> &'a Value {
    let rows = printed["vms"].as_array().unwrap();
    rows.iter().find(|r| r["vm"] == vm).unwrap_or_else(|| panic!("no {vm}: {printed}"))
}

/// One VM, with keys of its own.
fn one(m: &Machine, keys: &str) -> Setup {
    let qmp = m.text("qmp.sock");
    Setup::new(&format!("[vms.good]\nqmp = \"{qmp}\"\ntarget = \"{{dir}}/T/{{vm}}\"\n{keys}\n"))
}

/// Nothing of a run that was ended is left.
fn undone(qmp: &mut Qmp, target: &Path) {
    assert_eq!(ours_in_qemu(qmp), Vec::<String>::new());
    if target.exists() {
        assert_eq!(leftovers(target), Vec::<PathBuf>::new());
    }
    assert!(["a.qcow2", "o.qcow2"].iter().all(|d| images(&target.join(d)).is_empty()));
}

#[test]
fn one_that_is_off_and_one_that_hangs_stop_no_other() {
    let Some(m) = Machine::start("one_that_is_off_and_one_that_hangs_stop_no_other") else {
        return;
    };
    let setup = Setup::new("");
    // Its process is gone and its socket is left; nobody answers at the other one's.
    drop(UnixListener::bind(setup.path("dead.sock")).unwrap());
    let _hung = UnixListener::bind(setup.path("hung.sock")).unwrap();
    setup.write(&format!(
        "[defaults]\ntarget = \"{{dir}}/T/{{vm}}\"\n[vms.dead]\nqmp = \"{{dir}}/dead.sock\"\n\
         [vms.good]\nqmp = \"{}\"\n[vms.hung]\nqmp = \"{{dir}}/hung.sock\"\n\
         [vms.wrong]\nqmp = \"/x\"\nlevle = \"inc\"\n[vms.later]\nqmp = \"/y\"\nenabled = false\n\
         [vms.lost]\nqmp = \"{{dir}}/no/lost.sock\"\n[vms.none]\nqmp = \"{{dir}}/none.sock\"\n",
        m.text("qmp.sock")
    ));
    std::fs::create_dir(setup.path("vms.d")).unwrap();
    std::os::unix::fs::symlink("nowhere", setup.path("vms.d/dangling.toml")).unwrap();
    std::fs::write(setup.path("vms.d/bad name.toml"), "").unwrap();
    let (code, printed, said) = setup.run(&["--all"]);
    assert_eq!(code, Some(16), "{printed}\n{said}");
    assert_eq!(printed["vms"].as_array().unwrap().len(), 8, "{printed}");
    let good = row(&printed, "good");
    assert_eq!((&good["result"], good["failures"].as_array().unwrap().len()), (&"ok".into(), 0));
    let points = good["points"].as_array().unwrap();
    assert_eq!(points.len(), 2, "{good}");
    assert!(points.iter().all(|p| p["level"] == "full" && p["run"] == points[0]["run"]));
    for disk in ["a.qcow2", "o.qcow2"] {
        assert_eq!(images(&setup.path("T/good").join(disk)).len(), 1);
    }
    let lost = row(&printed, "lost");
    assert_eq!((&lost["result"], &lost["exit_code"]), (&"failed".into(), &3.into()), "{lost}");
    for bad in ["dangling", "bad name"] {
        let bad = row(&printed, bad);
        assert_eq!(bad["failures"][0]["step"], "configuration", "{bad}");
    }
    let none = row(&printed, "none");
    assert!(none["skipped"].as_str().unwrap().contains("there is no socket"), "{none}");
    let dead = row(&printed, "dead");
    assert_eq!(dead["result"], "skipped");
    assert!(dead["skipped"].as_str().unwrap().contains("nobody listens"), "{dead}");
    let hung = row(&printed, "hung");
    assert_eq!((&hung["result"], &hung["exit_code"]), (&"failed".into(), &6.into()), "{hung}");
    let wrong = row(&printed, "wrong");
    assert_eq!(
        (&wrong["exit_code"], &wrong["failures"][0]["step"]),
        (&2.into(), &"configuration".into())
    );
    assert!(wrong["failures"][0]["message"].as_str().unwrap().contains("did you mean level?"));
    assert!(said.contains("failed: 5 of 8 VMs: bad name, dangling, hung, lost, wrong"), "{said}");
    // One of them by name; for people.
    let out = setup.command(&["--vm", "hung"]).output().unwrap();
    assert_eq!(out.status.code(), Some(6));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.starts_with("VM ") && text.contains("\nhung  failed"), "{text}");
    let out = setup.command(&["--vm", "dead", "--strict"]).output().unwrap();
    assert_eq!(out.status.code(), Some(17));
    assert_eq!(setup.command(&["--vm", "dead"]).output().unwrap().status.code(), Some(0));
    let out = setup.command(&["--vm", "gud"]).output().unwrap();
    assert_eq!(out.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&out.stderr).contains("did you mean good?"));
}

#[test]
fn nights_leave_as_many_points_as_the_rules_say() {
    let Some(mut m) = Machine::start("nights_leave_as_many_points_as_the_rules_say") else {
        return;
    };
    let setup = one(&m, "keep_last = 2");
    let target = setup.path("T/good");
    let points = || images(&target.join("o.qcow2")).len();
    let mut levels = Vec::new();
    for night in 0..4 {
        m.scribble();
        let row = setup.must(&["--all"]);
        levels.push(row["points"][0]["level"].as_str().unwrap().to_string());
        assert_eq!(points(), 2.min(night + 1), "{row}");
        // One point of each of the two disks became part of the next one.
        assert_eq!(row["pruned"], if night < 2 { 0 } else { 2 }, "{row}");
    }
    // Forever incremental: the oldest is made a FULL, and INCs go on.
    assert_eq!(levels, ["full", "inc", "inc", "inc"]);
    let out =
        Command::new(env!("CARGO_BIN_EXE_fleecefs")).arg("verify").arg(&target).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    // Without rules nothing is deleted.
    setup.write(&format!(
        "[vms.good]\nqmp = \"{}\"\ntarget = \"{{dir}}/T/{{vm}}\"\n",
        m.text("qmp.sock")
    ));
    let row = setup.must(&["--vm", "good"]);
    assert_eq!((points(), &row["pruned"]), (3, &Value::Null));
}

/// The disks have no operating system, so that nothing comes up: the points are there, and nothing is deleted.
#[test]
fn what_does_not_come_up_deletes_nothing() {
    let Some(m) = Machine::start("what_does_not_come_up_deletes_nothing") else { return };
    let setup =
        one(&m, "keep_last = 1\nboot_check.timeout = \"1s\"\nboot_check.expect = \"login:\"");
    for night in 1..=2 {
        let (code, printed, said) = setup.run(&["--all"]);
        assert_eq!(code, Some(18), "{printed}\n{said}");
        let row = &printed["vms"][0];
        let steps: Vec<&Value> =
            row["failures"].as_array().unwrap().iter().map(|f| &f["step"]).collect();
        assert_eq!(
            (steps, &row["pruned"]),
            (vec![&Value::from("boot --check")], &Value::Null),
            "{row}"
        );
        assert_eq!(images(&setup.path("T/good/o.qcow2")).len(), night);
    }
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_would_be_done() {
    let Some(mut m) = Machine::start("a_dry_run_changes_nothing_and_says_what_would_be_done")
    else {
        return;
    };
    let setup = one(&m, "keep_last = 1\nbefore = [\"/bin/false\"]");
    let row = setup.must(&["--all", "--dry-run"]);
    assert_eq!(
        (&row["points"][0]["level"], &row["points"][0]["point"]),
        (&"full".into(), &"".into())
    );
    assert!(row["points"][1]["copied"].as_u64().unwrap() >= 4 << 20, "{row}");
    assert!(!setup.path("T/good").exists());
    assert!(ours_in_qemu(&mut m.qmp).is_empty());
    let out = setup.command(&["--all", "-n"]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("FULL") && text.ends_with("dry run: nothing was changed\n"), "{text}");
    // What the configuration says is not said beside it.
    for more in
        [&["--all", "--level", "full"][..], &["--all", "--vm", "good"], &["--all", "--quiesce"]]
    {
        let out = setup.command(more).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{more:?}");
    }
    assert_eq!(setup.command(&["--json"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn two_do_not_run_at_once_and_sigterm_undoes() {
    let Some(mut m) = Machine::start("two_do_not_run_at_once_and_sigterm_undoes") else { return };
    let setup = one(&m, "");
    let mut first = setup.held(&["--all"]);
    let out = setup.command(&["--all"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(6), "{said}");
    assert!(said.contains("another 'backup --all' is running"), "{said}");
    // The same VM by name.
    let (code, printed, _) = setup.run(&["--vm", "good"]);
    assert_eq!((code, &printed["vms"][0]["exit_code"]), (Some(6), &6.into()), "{printed}");
    signal(&first, libc::SIGTERM);
    let status = first.wait().unwrap();
    let said = std::fs::read_to_string(setup.path("stderr")).unwrap();
    assert_eq!(status.code(), Some(130), "{said}");
    undone(&mut m.qmp, &setup.path("T/good"));
    // Nothing is in the way of the next one.
    assert_eq!(setup.must(&["--all"])["points"][0]["level"], "full");
}

#[test]
fn a_killed_night_ends_its_backups_in_order() {
    let Some(mut m) = Machine::start("a_killed_night_ends_its_backups_in_order") else { return };
    let setup = one(&m, "");
    let mut first = setup.held(&["--all"]);
    signal(&first, libc::SIGKILL);
    first.wait().unwrap();
    wait_until("the backup has undone all", || ours_in_qemu(&mut m.qmp).is_empty());
    // It may still be about to end.
    let mut printed = Value::Null;
    wait_until("the next one runs", || {
        let (code, all, said) = setup.run(&["--all"]);
        assert!([Some(0), Some(6)].contains(&code), "{all}\n{said}");
        printed = all;
        code == Some(0)
    });
    assert_eq!(printed["vms"][0]["points"][0]["level"], "full");
}

#[test]
fn one_whose_time_is_over_is_ended_and_undone() {
    let Some(mut m) = Machine::start("one_whose_time_is_over_is_ended_and_undone") else { return };
    let setup = one(&m, "timeout = \"2s\"");
    let hold = setup.path("hold");
    std::fs::create_dir(&hold).unwrap();
    // Held for ever.
    let out = setup.command(&["--all", "--json"]).env("FLEECEFS_HOLD", &hold).output().unwrap();
    let printed: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(15), "{printed}");
    assert!(printed["vms"][0]["failures"][0]["message"].as_str().unwrap().contains("timeout"));
    undone(&mut m.qmp, &setup.path("T/good"));
}

#[test]
fn commands_run_before_after_and_on_failure_with_the_facts() {
    let Some(m) = Machine::start("commands_run_before_after_and_on_failure_with_the_facts") else {
        return;
    };
    let setup = one(&m, "");
    let script = |name: &str, text: &str| write_script(&setup.path(name), text);
    let dir = setup.path("");
    let dir = dir.to_str().unwrap();
    script("note", &format!("echo $FLEECEFS_HOOK $FLEECEFS_RESULT $FLEECEFS_VM >>{dir}/log"));
    script("facts", &format!("env | grep ^FLEECEFS_ >{dir}/env; cat >{dir}/json"));
    script("refuse", "echo not tonight >&2; exit 3");
    let qmp = m.text("qmp.sock");
    let write = |before: &str, more: &str| {
        setup.write(&format!(
            "[vms.good]\nqmp = \"{qmp}\"\ntarget = \"{{dir}}/T/{{vm}}\"\nbefore = [{before}]\n\
             after = [\"{{dir}}/note\"]\non_failure = [[\"{{dir}}/note\"], [\"{{dir}}/facts\"]]\n{more}"
        ));
    };
    let log = || std::fs::read_to_string(setup.path("log")).unwrap_or_default();
    write("\"{dir}/note\"", "");
    setup.must(&["--all"]);
    assert_eq!(log(), "before ok good\nafter ok good\n");
    std::fs::remove_file(setup.path("log")).unwrap();
    // Where the first of several fails, there is no backup.
    let before = images(&setup.path("T/good/o.qcow2")).len();
    write("[\"{dir}/refuse\"], [\"{dir}/note\"]", "");
    let (code, printed, _) = setup.run(&["--all"]);
    assert_eq!(code, Some(1), "{printed}");
    let failure = &printed["vms"][0]["failures"][0];
    assert_eq!(failure["step"], "before");
    assert!(
        failure["message"]
            .as_str()
            .unwrap()
            .ends_with("refuse ended with exit code 3: not tonight")
    );
    assert_eq!(log(), "after failed good\non_failure failed good\n");
    assert_eq!(images(&setup.path("T/good/o.qcow2")).len(), before);
    let env = std::fs::read_to_string(setup.path("env")).unwrap();
    for fact in [
        "FLEECEFS_VM=good",
        "FLEECEFS_STEP=before",
        "FLEECEFS_EXIT_CODE=1",
        "FLEECEFS_RESULT=failed",
    ] {
        assert!(env.lines().any(|l| l == fact), "{env}");
    }
    assert!(env.contains("FLEECEFS_ERROR=") && env.contains("not tonight"), "{env}");
    let json: Value = serde_json::from_slice(&std::fs::read(setup.path("json")).unwrap()).unwrap();
    assert_eq!((&json["vm"], &json["failures"][0]["step"]), (&"good".into(), &"before".into()));
    // Words that are longer than an environment.
    script("chatter", "head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2; exit 3");
    std::fs::remove_file(setup.path("env")).unwrap();
    write("\"{dir}/chatter\"", "");
    let (code, printed, _) = setup.run(&["--all"]);
    assert_eq!(code, Some(1), "{printed}");
    assert_eq!(printed["vms"][0]["failures"].as_array().unwrap().len(), 1, "{printed}");
    let env = std::fs::read_to_string(setup.path("env")).unwrap();
    assert!(env.contains("FLEECEFS_STEP=before") && env.contains("xxx..."), "{env}");
    // One whose time is over takes what it has started with it.
    script("slow", &format!("sleep 1000 & echo $! >{dir}/pid; wait"));
    write("\"{dir}/slow\"", "timeout = \"2s\"\n");
    let (code, printed, _) = setup.run(&["--all"]);
    assert_eq!(code, Some(15), "{printed}");
    assert!(printed.to_string().contains("slow: its time was over ('timeout')"), "{printed}");
    let pid = std::fs::read_to_string(setup.path("pid")).unwrap();
    wait_until("its child has ended", || {
        let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        status.map_or(true, |s| s.contains(") Z "))
    });
    std::fs::remove_file(setup.path("log")).unwrap();
    // A program that others could exchange is not run.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(setup.path("note"), std::fs::Permissions::from_mode(0o777)).unwrap();
    write("\"{dir}/note\"", "");
    let (code, printed, _) = setup.run(&["--all"]);
    assert_eq!((code, log().as_str()), (Some(5), ""), "{printed}");
    assert!(printed.to_string().contains("other users may write to it"), "{printed}");
}

#[test]
fn a_vm_that_is_shut_off_is_backed_up_by_its_images_if_that_is_said() {
    let test = "a_vm_that_is_shut_off_is_backed_up_by_its_images_if_that_is_said";
    if !have(test, &[TOOLS, &["qemu-storage-daemon"]].concat()) {
        return;
    }
    let mut m = Machine::begin();
    let keys = format!(
        "when_off = \"offline\"\noffline = [\"{}\", \"{}\"]\nbacking_file = \"{}\"",
        m.text("a.qcow2"),
        m.text("o.qcow2"),
        m.text("base.qcow2")
    );
    let setup = one(&m, &keys);
    assert_eq!(setup.must(&["--all"])["points"][0]["level"], "full");
    m.scribble();
    m.off();
    let row = setup.must(&["--all"]);
    let levels: Vec<&str> =
        row["points"].as_array().unwrap().iter().map(|p| p["level"].as_str().unwrap()).collect();
    assert_eq!(levels, ["inc", "inc"], "{row}");
}

#[test]
fn a_part_of_the_day_is_kept_to() {
    let Some(m) = Machine::start("a_part_of_the_day_is_kept_to") else { return };
    let setup = one(&m, "");
    // In this zone it is the sixth hour of the day at any time that the test may run at.
    let hour = utc_hour();
    let zone = format!("XXX{}", if hour >= 6 { hour - 6 } else { hour + 18 });
    let at = |hours: &str| {
        setup.write(&format!(
            "[vms.good]\nqmp = \"{}\"\ntarget = \"{{dir}}/T/{{vm}}\"\nhours = \"{hours}\"\n",
            m.text("qmp.sock")
        ));
        let out: Output =
            setup.command(&["--all", "--json", "-n"]).env("TZ", &zone).output().unwrap();
        let printed: Value = serde_json::from_slice(&out.stdout).unwrap();
        printed["vms"][0]["result"].as_str().unwrap().to_string()
    };
    assert_eq!(at("12:00-20:00"), "skipped");
    assert_eq!(at("22:00-12:00"), "ok");
}

/// The hour of the day in UTC.
fn utc_hour() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() / 3600 % 24
}
