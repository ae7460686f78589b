//! `backup --guest-before`, `--guest-after`: commands that the agent of a real guest runs round the freeze point.

use crate::support::backup::Caller;
use crate::support::guest::Guest;
use crate::support::small_guest::{clean, journal, manifest, small_guest};

/// Each appends to a file in the guest what it is, and the first that files can still be written then.
#[test]
fn commands_in_the_guest_round_the_freeze_point() {
    let name = "commands_in_the_guest_round_the_freeze_point";
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small_guest(name, dir.path(), "churn /dev/disk/a 1", &[]) else { return };
    let agent = guest.agent_socket().display().to_string();
    let quiesce = Caller::guest(&guest).with(&["--include", "a", "--quiesce", "--agent", &agent]);
    let commands = |before, after| {
        let log = |what| format!("echo {what} >>/tmp/log; ");
        let (before, after) = (log("before") + before, log("after") + after);
        quiesce.with(&["--guest-before", &before, "--guest-after", &after])
    };
    let log = || {
        wait_undone(&guest);
        guest.shell("cat /tmp/log; : >/tmp/log")
    };
    let consistency = |caller: &Caller| manifest(caller, "a.img")["consistency"].clone();

    let both = commands("sync", "true");
    let said = both.must("full");
    assert!(said.contains("--guest-before") && said.contains("--guest-after"), "{said}");
    assert_eq!(log(), "before\nafter\n");
    assert_eq!(consistency(&both)["achieved"], "application");
    assert_eq!(consistency(&both)["reason"], "");
    both.with(&["--strict"]).must("inc");
    assert_eq!(log(), "before\nafter\n");

    // What stays in the guest, and lets go of its output, is not waited for.
    let staying = commands("sleep 1000 >/dev/null 2>&1 &", "true");
    staying.must("inc");
    assert_eq!(log(), "before\nafter\n");
    assert_eq!(consistency(&staying)["achieved"], "application");

    // One that fails, one that takes too long, and one after that fails: the point is one of frozen file systems.
    let failing = commands("echo no lock >&2; exit 3", "true");
    let late = commands("sleep 1000", "true").with(&["--guest-timeout", "1"]);
    let undo = commands("true", "kill -9 $$");
    let cases = [
        (&failing, "the command in the guest ended with 3: no lock"),
        (&late, "did not end in time"),
        (&undo, "a signal ended the command"),
    ];
    for (caller, why) in cases {
        let said = caller.must("inc");
        assert!(said.contains(why), "{said}");
        assert_eq!(log(), "before\nafter\n", "{why}");
        let c = consistency(caller);
        assert_eq!(c["achieved"], "file-system", "{c}");
        assert!(c["reason"].as_str().unwrap().contains(why), "{c}");
        let out = caller.with(&["--strict"]).run("inc");
        assert_eq!(out.status.code(), Some(17), "{out:?}");
        assert_eq!(log(), "before\nafter\n", "{why}");
    }

    // File systems that were not frozen are not consistent whatever was run.
    let unfrozen = both.with(&["--freeze", "/nosuch"]);
    unfrozen.must("inc");
    assert_eq!(
        (log(), consistency(&unfrozen)["achieved"].as_str()),
        ("before\nafter\n".into(), Some("crash"))
    );

    // A run that is ended while the first command runs.
    let waiting = commands("while [ ! -e /tmp/go ]; do sleep 0.05; done", "touch /tmp/go");
    let mut child = waiting.command("inc").spawn().expect("fleecefs starts");
    while !journal(&waiting).contains("guest-command") {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(130));
    wait_undone(&guest);
    clean(&guest, dir.path());
}

/// Waits until the command that has to be run after the freeze point was.
fn wait_undone(guest: &Guest) {
    for _ in 0..200 {
        if guest.shell("tail -n 1 /tmp/log") == "after\n" {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("nobody has run the command after the freeze point");
}
