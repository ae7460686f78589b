//! What a test does to the machine and nobody else takes back: loop devices, mounts, processes. A
//! guard process takes it back when its handle is dropped, and when the test is killed and drops
//! nothing.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The handle. What it guards is made by the guard process itself, so that there is no moment at which
/// it exists and nobody would take it back.
pub struct Guard {
    keeper: Child,
    made: String,
}

/// `$MAKE` says on its standard output what it made: `$made` for `$UNDO`. (What it warns of is no part of that: a device
/// of such a name would never be detached.) Without the word `done` the
/// test was killed: what it makes by itself, without `$MAKE`, may come yet, and is undone twice. (Not
/// what has been made here: by then a device may be somebody else's.)
const KEEP: &str = r#"
    exec 4>&1
    made=$(eval "$MAKE" 2>&4 4>&-)
    printf '\0%s\n%s' $? "$made"
    exec >/dev/null 2>&1 4>&-
    read -r end
    eval "$UNDO"
    if [ -z "$MAKE" ] && [ "$end" != done ]; then sleep 0.4; eval "$UNDO"; fi
"#;

/// `$1` is where it is mounted.
pub const UNMOUNT: &str = r#"umount "$1" || umount -l "$1""#;

impl Guard {
    /// Runs the shell commands `make`, and `undo` in the end, both with the arguments `args`.
    ///
    /// # Errors
    /// What `make` said if it failed; `undo` is run then, too.
    pub fn try_new(make: &str, undo: &str, args: &[&Path]) -> Result<Self, String> {
        let mut command = Command::new("sh");
        command.args(["-c", KEEP, "sh"]).args(args).env("MAKE", make).env("UNDO", undo);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // A signal to the test's process group is not for it.
        let mut keeper = command.process_group(0).spawn().expect("sh starts");
        let mut said = String::new();
        keeper.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let (errors, said) = said.split_once('\0').expect("the end of what it warns of");
        let (code, made) = said.split_once('\n').expect("an exit code");
        let guard = Guard { keeper, made: made.to_owned() };
        if code == "0" { Ok(guard) } else { Err(format!("{errors}{}", guard.made)) }
    }

    /// As [`Guard::try_new`], of what has to succeed.
    pub fn new(make: &str, undo: &str, args: &[&Path]) -> Self {
        Self::try_new(make, undo, args).unwrap_or_else(|said| panic!("{make} {args:?}: {said}"))
    }

    /// Makes nothing: the test does itself what is to be undone.
    pub fn of(undo: &str, args: &[&Path]) -> Self {
        Self::new("", undo, args)
    }

    /// Attaches a loop device to `file`.
    ///
    /// # Errors
    /// What losetup said.
    pub fn try_attach(options: &str, file: &Path) -> Result<Self, String> {
        let make = format!(r#"losetup {options} --show -f "$1""#);
        Self::try_new(&make, r#"[ -z "$made" ] || losetup -d "$made""#, &[file])
    }

    /// As [`Guard::try_attach`], where it has to succeed.
    pub fn attach(options: &str, file: &Path) -> Self {
        Self::try_attach(options, file).unwrap_or_else(|said| panic!("losetup: {said}"))
    }

    /// `mount OPTIONS WHAT AT`.
    ///
    /// # Errors
    /// What mount said.
    pub fn try_mount(options: &str, what: &Path, at: &Path) -> Result<Self, String> {
        Self::try_new(&format!(r#"mount {options} "$2" "$1""#), UNMOUNT, &[at, what])
    }

    /// As [`Guard::try_mount`], where it has to succeed.
    pub fn mount(options: &str, what: &Path, at: &Path) -> Self {
        Self::try_mount(options, what, at).unwrap_or_else(|said| panic!("mount {options}: {said}"))
    }

    /// A tmpfs of `size` at `at`.
    pub fn tmpfs(size: &str, at: &Path) -> Self {
        Self::mount(&format!("-t tmpfs -o size={size}"), Path::new("none"), at)
    }

    /// What was made, as its maker called it: a device.
    pub fn made(&self) -> &Path {
        Path::new(&self.made)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut end) = self.keeper.stdin.take() {
            let _ = end.write_all(b"done\n");
        }
        let _ = self.keeper.wait();
    }
}

/// Has the kernel end the process with the thread that starts it: a test's own.
pub fn tied(command: &mut Command) -> &mut Command {
    let parent = std::process::id();
    // SAFETY: system calls alone.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // It may have ended before.
            if libc::getppid() as u32 != parent {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        })
    }
}
