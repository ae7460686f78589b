//! A virtual machine boots from a point of the mount, without restoring it, and changes nothing.

use std::path::Path;
use std::process::Command;

use crate::support::guest::{Guest, must};
use crate::support::mount::Mount;

const FULL: &str = "FULL-1700003600-root.qcow2";
const INC: &str = "INC-1700007200-root.qcow2";

/// The guest's own disk as a FULL, and as an INC what it writes when it runs on top of that.
fn make_backups(dir: &Path, guest: &Guest, root: &Path) {
    let (full, inc) = (dir.join("root").join(FULL), dir.join("root").join(INC));
    std::fs::create_dir(dir.join("root")).unwrap();
    std::fs::copy(root, &full).unwrap();
    must(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&full, &inc]),
    );
    guest.boot(&inc, &[], &[], &[]);
    guest.wait_ready();
    guest.shell("echo written later > /marker; sync");
    guest.kill();
    must(Command::new("qemu-img").args(["rebase", "-q", "-u", "-f", "qcow2", "-b", ""]).arg(&inc));
}

/// Boots from a point with a throw-away overlay and says what the guest sees.
fn boot(guest: &Guest, point: &Path) -> String {
    let root = format!("{},format=raw,snapshot=on", point.display());
    guest.boot(Path::new(&root), &[], &[], &[]);
    guest.wait_ready();
    let seen =
        guest.shell("cat /marker 2>/dev/null || echo nothing; echo scribble > /marker; sync");
    guest.kill();
    seen.trim().to_string()
}

#[test]
fn a_guest_boots_from_either_point() {
    let name = "a_guest_boots_from_either_point";
    let Some((guest, root)) = Guest::unstarted(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    make_backups(dir.path(), &guest, &root);
    let mount = Mount::new(dir.path());
    // One of them twice: what the first guest wrote is gone.
    for (file, expected) in [(FULL, "nothing"), (FULL, "nothing"), (INC, "written later")] {
        let point = mount.point("root", Path::new(file));
        assert_eq!(boot(&guest, &point), expected, "{file}");
    }
}
