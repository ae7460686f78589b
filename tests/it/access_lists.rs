//! Access control lists (acl(5)) count when it is asked who else may write to a folder.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Users without an entry in the user database.
const OWNER: u32 = 4_000_000;
const STRANGER: u32 = 4_000_001;

/// Entries of a list, as the kernel has them.
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const READ: u16 = 5;
const ALL: u16 = 7;

/// The owner may do all, others nothing; what `STRANGER` may, and what the mask lets through.
fn list(stranger: u16, mask: u16) -> Vec<u8> {
    let entries = [
        (USER_OBJ, ALL, u32::MAX),
        (USER, stranger, STRANGER),
        (GROUP_OBJ, 0, u32::MAX),
        (MASK, mask, u32::MAX),
        (OTHER, 0, u32::MAX),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

struct Setup(tempfile::TempDir);

impl Setup {
    /// `None`, and the test says why, where there are no lists or no rights to give files away.
    fn new(test: &str) -> Option<Self> {
        // SAFETY: geteuid has no preconditions.
        if unsafe { libc::geteuid() } != 0 {
            println!("skipped: {test} needs root");
            return None;
        }
        let setup = Setup(tempfile::tempdir().unwrap());
        std::fs::set_permissions(setup.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let probe = setup.folder("probe", 0, 0o700);
        if set_list(&probe, &list(READ, READ)).is_err() {
            println!("skipped: {test}: the file system has no access control lists");
            return None;
        }
        copy_program(&setup.path("fleecefs"));
        Some(setup)
    }

    fn path(&self, below: &str) -> PathBuf {
        self.0.path().join(below)
    }

    fn folder(&self, name: &str, owner: u32, mode: u32) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    fn run(&self, user: u32, args: &[&str]) -> Output {
        let mut command = Command::new(self.path("fleecefs"));
        command.args(args).uid(user).gid(user).env_remove("FLEECEFS_LOG").current_dir("/");
        command.output().unwrap()
    }
}

/// By another process: a program that is open for writing here cannot be run, and what another test
/// forks meanwhile has it open, too.
fn copy_program(to: &Path) {
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_fleecefs")).arg(to).status();
    assert!(copied.unwrap().success());
}

fn set_list(path: &Path, list: &[u8]) -> rustix::io::Result<()> {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path, "system.posix_acl_access", list, flags)
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn a_state_folder_that_a_list_opens_to_others_is_refused() {
    let test = "a_state_folder_that_a_list_opens_to_others_is_refused";
    let Some(setup) = Setup::new(test) else { return };
    // Owner and mode of the folder, its list, and whether it is refused.
    let cases = [
        ("none", 0, 0o700, None, false),
        ("writes", 0, 0o700, Some(list(ALL, ALL)), true),
        ("reads", 0, 0o700, Some(list(READ, READ)), false),
        ("masked", 0, 0o700, Some(list(ALL, READ)), false),
        // A group of the same number is the user himself, but not what a list adds to it.
        ("group", OWNER, 0o770, None, false),
        ("own-writes", OWNER, 0o770, Some(list(ALL, ALL)), true),
        ("own-masked", OWNER, 0o770, Some(list(ALL, READ)), false),
    ];
    for (name, owner, mode, list, refused) in cases {
        let state = setup.folder(name, owner, mode);
        if let Some(list) = list {
            set_list(&state, &list).unwrap();
        }
        let state = state.to_str().unwrap();
        let args = ["recover", "--qmp", "/nonexistent/qmp", "--state-dir", state];
        let out = setup.run(owner, &args);
        let code = if refused { 5 } else { 3 };
        assert_eq!(out.status.code(), Some(code), "{name}: {}", stderr(&out));
        assert_eq!(stderr(&out).contains("not safe here"), refused, "{name}: {}", stderr(&out));
    }
}

#[test]
fn a_backup_directory_that_a_list_opens_to_others_is_warned_of() {
    let test = "a_backup_directory_that_a_list_opens_to_others_is_warned_of";
    let Some(setup) = Setup::new(test) else { return };
    for (name, list, warned) in [
        ("writes", list(ALL, ALL), true),
        ("reads", list(READ, READ), false),
        ("masked", list(ALL, READ), false),
    ] {
        let dir = setup.folder(name, 0, 0o700);
        std::fs::write(dir.join("disk.raw"), [7; 4096]).unwrap();
        set_list(&dir, &list).unwrap();
        let out = setup.run(0, &["verify", "--create", dir.to_str().unwrap()]);
        assert!(matches!(out.status.code(), Some(0 | 19)), "{name}: {}", stderr(&out));
        let says = stderr(&out).contains("users may write there");
        assert_eq!(says, warned, "{name}: {}", stderr(&out));
    }
}
