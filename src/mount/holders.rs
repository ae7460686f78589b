//! Who holds a mount that cannot be unmounted. The mount itself is not touched: only what `/sys` and
//! `/proc` say of paths below it.

use std::path::{Path, PathBuf};

use super::table::Mount;
use crate::error::{Error, Kind};
use crate::folder::{self, system};
use crate::text::path_text;

/// More than these need not be named.
const MOST: usize = 5;

/// Who holds a mount, and how to make each let go.
struct Holder {
    who: String,
    release: Option<String>,
}

/// The error for a mount that is in use: who holds it, and whether its server is gone.
pub(super) fn busy(mount: &Mount) -> Error {
    let mut all = loops(&mount.path, Path::new("/sys/block"));
    all.extend(processes(&mount.path, Path::new("/proc")));
    let at = path_text(&mount.path);
    let what = match is_dead(mount) {
        true => format!(
            "its server has ended, so nothing can be read, but this dead mount of {} is still in \
             use",
            mount.source
        ),
        false => "still in use".into(),
    };
    let names: Vec<&str> = all.iter().take(MOST).map(|h| h.who.as_str()).collect();
    let by = match names.as_slice() {
        [] => ": a file is open or a process works inside".into(),
        names if all.len() > MOST => format!(" by {} and others", names.join(", ")),
        names => format!(" by {}", names.join(", ")),
    };
    let steps: Vec<&str> = all.iter().take(MOST).filter_map(|h| h.release.as_deref()).collect();
    let remedy = match steps.as_slice() {
        [] => format!("end what uses it, or detach it: 'fleecefs umount --lazy {at}'"),
        steps => format!(
            "unmount what is mounted from it, '{}', then 'fleecefs umount {at}'; or detach it now \
             with --lazy",
            steps.join("; ")
        ),
    };
    Error::new(Kind::Busy, what + &by).at_path(&mount.path).remedy(remedy)
}

/// Whether its server was killed. Asking the mount is safe where nobody serves it: the kernel
/// answers.
pub(super) fn is_dead(mount: &Mount) -> bool {
    let asked = || folder::ask(&mount.path).err().and_then(|e| e.raw_os_error());
    mount.server().is_none() && asked() == Some(libc::ENOTCONN)
}

/// Loop devices over files below `mount`, by the kernel's list of block devices.
fn loops(mount: &Path, blocks: &Path) -> Vec<Holder> {
    let mut found = Vec::new();
    for device in system::names(blocks) {
        let backing = blocks.join(&device).join("loop/backing_file");
        let Ok(text) = system::text(&backing) else { continue };
        let Some(file) = below(mount, Path::new(text.trim_end_matches('\n'))) else { continue };
        let name = format!("/dev/{}", path_text(Path::new(&device)));
        found.push(Holder {
            who: format!("{name} ({file})"),
            release: Some(format!("losetup -d {name}")),
        });
    }
    found.sort_by(|a, b| a.who.cmp(&b.who));
    found
}

/// Processes with a file or folder below `mount` open, as far as we may look.
fn processes(mount: &Path, proc: &Path) -> Vec<Holder> {
    let mut found = Vec::new();
    for process in system::names(proc) {
        let Some(pid) = process.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let process = proc.join(process);
        let open = system::names(&process.join("fd")).into_iter();
        let links = open.map(|n| process.join("fd").join(n)).chain([process.join("cwd")]);
        let mut files = links.filter_map(|l| below(mount, &system::link(&l).ok()?));
        let Some(file) = files.next() else { continue };
        let name = system::text(&process.join("comm")).unwrap_or_default();
        let name = path_text(Path::new(name.trim()));
        found.push(Holder { who: format!("process {pid}, {name} ({file})"), release: None });
    }
    found
}

/// `path` as seen from the mount, if it is below it.
fn below(mount: &Path, path: &Path) -> Option<String> {
    let inside: PathBuf = path.strip_prefix(mount).ok()?.into();
    Some(if inside.as_os_str().is_empty() { ".".into() } else { path_text(&inside) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn loop_devices_and_processes_are_found_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("loop3/loop/backing_file", "/m/vm 1/sda/latest.raw\n");
        put("loop4/loop/backing_file", "/m/vm 12/x\n");
        put("sda/size", "1");
        let found = loops(Path::new("/m/vm 1"), dir.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].who, "/dev/loop3 (sda/latest.raw)");
        assert_eq!(found[0].release.as_deref(), Some("losetup -d /dev/loop3"));

        put("77/comm", "qemu-nbd\n");
        put("78/comm", "other\n");
        fs::create_dir(dir.path().join("77/fd")).unwrap();
        std::os::unix::fs::symlink("/m/a/f", dir.path().join("77/fd/9")).unwrap();
        std::os::unix::fs::symlink("/m/ab", dir.path().join("78/cwd")).unwrap();
        let found = processes(Path::new("/m/a"), dir.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].who, "process 77, qemu-nbd (f)");
    }
}
