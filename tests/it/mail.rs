//! The mail of a night, as Python's mail parser reads it; and who is told where a whole night was refused. None of it needs
//! a VM: those that are backed up here are off, fail, or wait in a command.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::guard::tied;
use crate::support::tools::{have, run, write_script};

/// A configuration with a program that keeps the mail that it gets.
struct Night {
    dir: tempfile::TempDir,
}

impl Night {
    /// `{dir}` in the text is this folder.
    fn new(text: &str) -> Self {
        let night = Night { dir: tempfile::tempdir().unwrap() };
        let at = night.dir.path().display().to_string();
        write_script(&night.path("sendmail"), &format!("echo \"$@\" >{at}/args; cat >{at}/mail"));
        write_script(
            &night.path("note"),
            &format!("env | grep ^FLEECEFS_ >{at}/env; cat >{at}/in"),
        );
        night.write(text);
        night
    }

    fn write(&self, text: &str) {
        let text = text.replace("{dir}", self.dir.path().to_str().unwrap());
        std::fs::write(self.path("fleecefs.toml"), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(words).env_remove("FLEECEFS_STATE_DIR").arg("--state-dir").arg(self.path("state"));
        c
    }

    /// `backup --all` to its end.
    fn all(&self, more: &[&str]) -> Output {
        let mut c = self.command(&[&["backup", "--all"], more].concat());
        c.arg("--config-file").arg(self.path("fleecefs.toml")).output().unwrap()
    }

    /// What was mailed since the last look: all headers in their order, and the body, by Python's `email`.
    fn mail(&self) -> Option<(Vec<(String, String)>, String)> {
        let mail = self.path("mail");
        if !mail.exists() {
            return None;
        }
        let code = "import email, email.policy, json, sys\n\
                    m = email.message_from_binary_file(open(sys.argv[1], 'rb'), policy=email.policy.default)\n\
                    assert not m.defects, m.defects\n\
                    print(json.dumps([[[k, str(v)] for k, v in m.items()], m.get_content()]))";
        let out = run("python3", &["-c", code, mail.to_str().unwrap()]);
        std::fs::remove_file(mail).unwrap();
        Some(serde_json::from_slice(&out.stdout).unwrap())
    }

    fn history(&self) -> Vec<Value> {
        let out = self.command(&["history", "--json"]).output().unwrap();
        let all: Value = serde_json::from_slice(&out.stdout).unwrap();
        all["runs"].as_array().unwrap().clone()
    }
}

fn code(out: &Output) -> Option<i32> {
    out.status.code()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn subject(headers: &[(String, String)]) -> &str {
    &headers.iter().find(|(name, _)| name == "Subject").unwrap().1
}

const MAIL: &str = "mail = [\"root\", \"a@b\"]\nsendmail = \"{dir}/sendmail\"\n";
/// It is shut off.
const OFF: &str = "[vms.off]\nqmp = \"{dir}/off.sock\"\ntarget = \"{dir}/off\"\n";

#[test]
fn names_and_errors_make_no_headers_and_all_is_told() {
    if !have("names_and_errors_make_no_headers_and_all_is_told", &["python3"]) {
        return;
    }
    let lost = "[vms.lost]\nqmp = \"{dir}/no/lost.sock\"\ntarget = \"{dir}/lost\"\n";
    let night = Night::new(&format!("{MAIL}{OFF}{lost}"));
    let evil = "x=?utf-8?q?=0a?=\nBcc: evil@example.org\n\n\u{1b}[2J\u{202e}";
    std::fs::create_dir(night.path("vms.d")).unwrap();
    std::fs::write(night.path("vms.d").join(format!("{evil}.toml")), "").unwrap();
    let out = night.all(&[]);
    assert_eq!(code(&out), Some(16), "{}", said(&out));
    let (headers, body) = night.mail().expect("a mail");
    let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    let wanted = [
        "To",
        "Subject",
        "Auto-Submitted",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
    ];
    assert_eq!(names, wanted);
    assert_eq!(headers[0].1, "root, a@b");
    assert!(subject(&headers).contains("failed: 2 of 3 VMs"), "{headers:?}");
    assert!(!headers.iter().any(|(_, v)| v.chars().any(char::is_control)), "{headers:?}");
    assert_eq!(std::fs::read_to_string(night.path("args")).unwrap(), "-i root a@b\n");
    for part in ["exit code 16", "\nlost: failed", "lost.sock", "\noff: skipped", "Bcc: evil"] {
        assert!(body.contains(part), "{part}: {body}");
    }
    let hidden = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!body.contains(hidden) && !body.contains("\nBcc"), "{body:?}");
    // A dry run tells nobody.
    night.all(&["--dry-run"]);
    assert_eq!(night.mail(), None);
}

#[test]
fn what_went_well_is_mailed_only_if_that_is_said() {
    if !have("what_went_well_is_mailed_only_if_that_is_said", &["python3"]) {
        return;
    }
    let night = Night::new(&format!("{MAIL}{OFF}"));
    assert_eq!(code(&night.all(&[])), Some(0));
    assert_eq!(night.mail(), None);
    night.write(&format!("{MAIL}mail_on = \"always\"\n{OFF}"));
    assert_eq!(code(&night.all(&[])), Some(0));
    let (headers, body) = night.mail().expect("a mail");
    assert!(subject(&headers).ends_with(": all is well: 1 VM"), "{headers:?}");
    assert!(body.contains("off: skipped") && !body.contains("exit code"), "{body}");
}

#[test]
fn a_night_that_was_refused_is_told_too() {
    if !have("a_night_that_was_refused_is_told_too", &["python3"]) {
        return;
    }
    let hook = "[defaults]\non_failure = [[\"{dir}/nowhere/{vm}\"], [\"{dir}/note\"]]\n";
    let night = Night::new(&format!("parallell = 2\n{MAIL}{hook}{OFF}"));
    let facts = || {
        let env = std::fs::read_to_string(night.path("env")).unwrap();
        let json: Value =
            serde_json::from_slice(&std::fs::read(night.path("in")).unwrap()).unwrap();
        std::fs::remove_file(night.path("env")).unwrap();
        (env, json)
    };
    let out = night.all(&["--dry-run"]);
    assert!(code(&out) == Some(2) && !night.path("env").exists(), "{}", said(&out));
    let out = night.all(&[]);
    assert_eq!(code(&out), Some(2), "{}", said(&out));
    let (headers, body) = night.mail().expect("a mail");
    assert!(subject(&headers).contains("no backups: the configuration has 1 mistake"));
    assert!(body.contains("unknown key parallell; did you mean parallel?"), "{body}");
    let (env, json) = facts();
    for fact in ["FLEECEFS_VM=", "FLEECEFS_RESULT=failed", "FLEECEFS_STEP=configuration"] {
        assert!(env.lines().any(|l| l == fact), "{env}");
    }
    assert_eq!((&json["vm"], &json["failures"][0]["exit_code"]), (&"".into(), &2.into()), "{json}");
    let why = json["failures"][0]["message"].as_str().unwrap();
    assert!(why.contains("toml:1:1: unknown key parallell") && env.contains(why), "{json}\n{env}");
    let last = night.history().pop().unwrap();
    assert_eq!((&last["command"], &last["exit_code"]), (&"backup".into(), &2.into()), "{last}");
    // Another night is at work.
    write_script(&night.path("wait"), "echo >ready; read x <go");
    let fifo = night.path("go");
    run("mkfifo", &[fifo.to_str().unwrap()]);
    night.write(&format!(
        "{MAIL}{hook}[vms.a]\noffline = [\"{{dir}}/none.qcow2\"]\ntarget = \"{{dir}}/a\"\nbefore = [\"{{dir}}/wait\"]\n"
    ));
    let mut first = night.command(&["backup", "--all"]);
    first.arg("--config-file").arg(night.path("fleecefs.toml")).current_dir(night.dir.path());
    let mut first = tied(first.stdout(Stdio::null()).stderr(Stdio::null())).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while !night.path("ready").exists() {
        assert!(Instant::now() < end && first.try_wait().unwrap().is_none(), "it does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let out = night.all(&[]);
    assert_eq!(code(&out), Some(6), "{}", said(&out));
    let (headers, body) = night.mail().expect("a mail");
    assert!(subject(&headers).contains("another 'backup --all' is running"), "{headers:?}");
    assert!(body.contains("exit code 6"), "{body}");
    let (env, json) = facts();
    assert!(
        env.contains("FLEECEFS_EXIT_CODE=6\n") && env.contains("FLEECEFS_STEP=backup\n"),
        "{env}"
    );
    assert_eq!(json["result"], "failed");
    std::fs::write(&fifo, "x\n").unwrap();
    first.wait().unwrap();
}

#[test]
fn mail_that_cannot_be_sent_is_a_warning_and_in_the_history() {
    if !have("mail_that_cannot_be_sent_is_a_warning_and_in_the_history", &["python3"]) {
        return;
    }
    let night = Night::new(&format!("{MAIL}mail_on = \"always\"\n{OFF}"));
    let failed = |why: &str| {
        let out = night.all(&[]);
        assert!(code(&out) == Some(0) && said(&out).contains(why), "{}", said(&out));
        let run = night.history().pop().unwrap();
        assert_eq!(run["command"], "mail", "{run}");
        assert!(run["message"].as_str().unwrap().contains(why), "{run}");
    };
    let sendmail = night.path("sendmail");
    write_script(&sendmail, "cat >/dev/null; echo no queue here >&2; exit 75");
    failed("it ended with exit code 75: no queue here");
    // Whoever may write to it would be root at night.
    std::fs::set_permissions(&sendmail, std::fs::Permissions::from_mode(0o777)).unwrap();
    failed("other users may write to it");
    let check = |night: &Night| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        c.args(["config", "check", "--config-file"]).arg(night.path("fleecefs.toml"));
        let out = c.output().unwrap();
        (code(&out), String::from_utf8(out.stdout).unwrap())
    };
    let (wrong, text) = check(&night);
    assert!(wrong == Some(2) && text.contains("fleecefs.toml:1:1: sendmail: "), "{text}");
    std::fs::remove_file(&sendmail).unwrap();
    failed("cannot find the program");
    for (keys, why) in [
        ("mail = \"-oQ/tmp\"\n", "is not an address"),
        ("mail = \"root\"\nsendmail = \"sendmail\"\n", "is not an absolute path"),
        ("mail = \"root\"\nmail_on = \"never\"\n", "is not one of failure, always"),
        ("mail_on = \"always\"\n", "mail_on goes with mail"),
        ("mial = \"root\"\n", "did you mean mail?"),
        ("mail = 7.5\n", "mail must be a text or a list of texts"),
    ] {
        night.write(&format!("{keys}{OFF}"));
        let (wrong, text) = check(&night);
        assert!(wrong == Some(2) && text.contains(why), "{keys}: {text}");
    }
}
