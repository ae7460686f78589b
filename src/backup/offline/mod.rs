//! Backups of shut-off VMs: the images are opened by a qemu-storage-daemon of our own, which is a QMP
//! server like any other, and the usual run works on that. So the chain goes on where the VM's own QEMU left
//! it, by the bitmaps in its qcow2 images, and the VM's next backup goes on from here.
//!
//! The daemon has its sockets in a folder of the state folder, one for each target. What a run that died
//! left is undone by the next run to that target, online or not.
//!
//! `image` says how an image is opened: with every layer given explicitly, since its header may have been
//! written by a QEMU that a guest has taken over. `known_disks` finds what the target knows of it.

mod image;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::disks::Survey;
use super::publish::report::Report;
use super::run::backup;
use super::state::journal;
use super::state::lock::{Lock, real_path, refuse_inside, state_folder};
pub(crate) use super::target::known_disks::KnownDisks;
use super::target::reachable;
use super::target::targets::Targets;
use super::{Options, Watch};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::Folder;
use crate::qemu_img::daemon::{Daemon, Rights};
use crate::qmp::Address;
use crate::text::path_text;
use image::Image;

/// How long opening the images may take: one that was not closed in order has its tables checked.
const OPENING: Duration = Duration::from_secs(120);
/// How long the daemon of a run that was killed may still have the images open.
const CLOSING: Duration = Duration::from_secs(60);

/// Where the sockets of the daemon for `target` are.
fn folder_name(target: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let hash = blake3::hash(target.as_os_str().as_bytes()).to_hex();
    format!("offline-{}", hash.as_str().get(..16).unwrap_or_default())
}

/// What stands for a VM that is shut off in the names of journals and locks, and where its runs are
/// reached: the socket of the daemon for `target`. Neither has to be there.
///
/// # Errors
/// A path that cannot be followed.
pub(crate) fn address(state: &Path, target: &Path) -> Result<Address> {
    of_real(state, &real_path(target, "the backup directory")?)
}

fn of_real(state: &Path, target: &Path) -> Result<Address> {
    let own = real_path(state, "the state folder")?.join(folder_name(target));
    Ok(Address::Unix(own.join(QMP)))
}

/// The addresses of runs on the images of `vm` while it was off that did not end in order: of those to its
/// backup directories.
///
/// # Errors
/// A list or a journal cannot be read.
pub(crate) fn journals(state: &Path, vm: &Address) -> Result<Vec<Address>> {
    let mut found = Vec::new();
    for target in Targets::read(state, vm, &[])?.paths() {
        // One that cannot be followed is not there. One that does not answer was followed before.
        let address = match reachable::answers(&target) {
            true => address(state, &target),
            false => of_real(state, &target),
        };
        let Ok(address) = address else { continue };
        if !found.contains(&address) && journal::pending(state, &address)?.is_some() {
            found.push(address);
        }
    }
    Ok(found)
}

/// Backs up the images `disks`, `FILE` or `FORMAT:FILE`, of a VM that does not run. (`options.qmp`,
/// `options.nbd` and `options.offline` are those of the daemon.) `backing` are the backing files that they may have.
///
/// # Errors
/// `Busy` if an image is in use; `Usage` or `Unsupported` for an image that cannot be opened safely; as
/// [`backup`].
pub(crate) fn backup_offline(
    options: &Options,
    (disks, backing): (&[String], &[PathBuf]),
    watch: &dyn Watch,
    interrupt: Arc<AtomicBool>,
) -> Result<Report> {
    let state = state_folder(&options.state_dir)?;
    let target = real_path(&options.target, "the backup directory")?;
    refuse_inside(state.path(), &target)?;
    let name = folder_name(&target);
    let _lock = Lock::offline(state.path(), &name)?;
    let failed = |e| Error::io(e, "cannot make a folder for sockets").at_path(state.join(&name));
    let own = state.make_folder(&name).map_err(failed)?;
    let known = KnownDisks::find(&options.names, options.shared, &target, disks)?;
    for dir in std::iter::once(&target).chain(&options.copy.fleece_dir) {
        image::check_place(dir.ancestors().find(|a| folder::exists(a)).unwrap_or(dir))?;
    }
    let backing: Vec<PathBuf> =
        backing.iter().map(|f| real_path(f, "the backing file")).collect::<Result<_>>()?;
    let images: Vec<Image> =
        known.disks.iter().map(|d| Image::of(d, &backing)).collect::<Result<_>>()?;
    let (qmp, nbd) = (own.join(QMP), own.join(NBD));
    let places = DaemonPaths {
        own: own.path(),
        target: &target,
        fleece: options.copy.fleece_dir.as_deref(),
    };
    let args = arguments(&images, options.dry_run)?;
    let lock = daemon_lock(&own)?;
    images.iter().try_for_each(Image::check_free)?;
    let daemon = start(&args, &places, &images, (&lock, options.dry_run))?;
    let options = Options {
        qmp: Address::Unix(qmp),
        nbd: Some(Address::Unix(nbd)),
        names: known.names(&options.names),
        offline: Some(Arc::new(known)),
        ..options.clone()
    };
    let report = backup(&options, watch, interrupt);
    let ended = daemon.end();
    if let Err(e) = &ended {
        watch.warn(&format!(
            "the images were not closed cleanly, the next backup may be a FULL: {}",
            e.report()
        ));
    }
    let mut removed = remove_sockets(own.path());
    if ended.is_ok() {
        removed = removed.and_then(|()| remove_folder(&state, &own, &name));
    }
    if let Err(e) = removed {
        watch.warn(&e.report());
    }
    report
}

/// Removes the folder of a daemon that has ended; the target's lock is still held, so nobody waits for its own.
fn remove_folder(state: &Folder, own: &Folder, name: &str) -> Result<()> {
    let removed = own.remove_if_there(LOCK).and_then(|_| state.remove_folder(name));
    removed.map_err(|e| Error::io(e, "cannot remove the folder for sockets").at_path(own.path()))
}

/// What the daemon may change, beside the images.
struct DaemonPaths<'a> {
    own: &'a Path,
    target: &'a Path,
    fleece: Option<&'a Path>,
}

impl DaemonPaths<'_> {
    fn rights(&self, images: &[Image], dry_run: bool) -> Result<Rights> {
        let mut rights = Rights::default();
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |e| Error::io(e, "cannot check it").at_path(path)
        };
        rights.own(self.own).map_err(failed(self.own))?;
        // QEMU tries there which kind of locks the system has.
        rights.image(Path::new("/dev/null")).map_err(failed(Path::new("/dev/null")))?;
        for below in images.iter().flat_map(Image::below_it) {
            rights.read(below).map_err(failed(below))?;
        }
        for image in images {
            let path = &image.real;
            let allow = if dry_run { Rights::read } else { Rights::image };
            allow(&mut rights, path).map_err(failed(path))?;
        }
        if dry_run {
            return Ok(rights);
        }
        // A new target is made later.
        let there = self.target.ancestors().find(|a| folder::exists(a)).unwrap_or(self.target);
        for dir in std::iter::once(there).chain(self.fleece) {
            let dir = folder::resolve(dir).map_err(failed(dir))?;
            rights.files_in(&dir).map_err(failed(&dir))?;
        }
        Ok(rights)
    }
}

/// Starts it.
fn start(
    args: &[OsString],
    places: &DaemonPaths<'_>,
    images: &[Image],
    (lock, dry_run): (&folder::Lock, bool),
) -> Result<Daemon> {
    remove_sockets(places.own)?;
    let ready = places.own.join(NBD);
    let rights = places.rights(images, dry_run)?;
    Daemon::start(args, (places.own, rights), lock.file(), (&ready, OPENING))
        .map_err(|e| explained(e, images))
}

/// The lock that each daemon has until it ends: that of a run that was killed closes its images yet.
fn daemon_lock(own: &Folder) -> Result<folder::Lock> {
    let deadline = Instant::now() + CLOSING;
    loop {
        let failed = |e| Error::io(e, "cannot take the lock").at_path(own.join(LOCK));
        if let Some(lock) = own.lock(LOCK).map_err(failed)? {
            return Ok(lock);
        }
        if Instant::now() >= deadline {
            let what = "the qemu-storage-daemon of a backup that was killed has not ended yet";
            return Err(Error::new(Kind::Busy, what)
                .at_path(own.path())
                .remedy("try again later; if its storage hangs, end it"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Its sockets.
const QMP: &str = "qmp.sock";
const NBD: &str = "nbd.sock";
/// See [`daemon_lock`].
const LOCK: &str = "daemon.lock";

fn remove_sockets(own: &Path) -> Result<()> {
    [QMP, NBD].into_iter().try_for_each(|name| {
        let path = own.join(name);
        let removed = folder::remove_if_there(&path).map(drop);
        removed.map_err(|e| Error::io(e, "cannot remove an old socket").at_path(&path))
    })
}

fn is_locked(e: &Error) -> bool {
    let text = e.report();
    text.contains("Failed to get") && text.contains("lock")
}

/// The daemon's words in ours.
fn explained(e: Error, images: &[Image]) -> Error {
    let text = e.report();
    let of = images.iter().find(|i| text.contains(&*i.real.to_string_lossy()) || images.len() == 1);
    let path = of.map_or_else(PathBuf::new, |i| i.real.clone());
    let of_all = || images.iter().map(|i| path_text(&i.real)).collect::<Vec<_>>().join(", ");
    if is_locked(&e) {
        let name = of.map_or_else(of_all, |i| path_text(&i.real));
        return image::in_use(&name);
    }
    if text.contains("key-secret") || text.contains("encrypt") {
        let what = "an encrypted image, whose key only the VM's QEMU has";
        return Error::new(Kind::Encrypted, what)
            .at_path(path)
            .remedy("back it up while its VM runs, with --allow-plaintext");
    }
    match of {
        Some(_) => e.at_path(path),
        None => e,
    }
}

/// The arguments of the daemon. Each image is exported, though nobody uses that: so the raw node into which
/// the filter goes has a user above it, and the image a writer, beside which QEMU lets no other write.
fn arguments(images: &[Image], dry_run: bool) -> Result<Vec<OsString>> {
    let mut args: Vec<OsString> = Vec::new();
    // By its working directory: a socket's address has 108 bytes.
    let socket = format!("socket,id=qmp,server=on,wait=off,path={QMP}");
    args.extend(["--chardev", &socket, "--monitor", "chardev=qmp"].map(OsString::from));
    for image in images {
        for node in image.nodes(dry_run) {
            args.extend(["--blockdev".into(), text(&node)?.into()]);
        }
    }
    // Last: whoever sees its socket finds all images open.
    args.extend(["--nbd-server".into(), format!("addr.type=unix,addr.path={NBD}").into()]);
    for image in images {
        let export = json!({"type": "nbd", "id": image.top(), "node-name": image.top(),
            "name": image.top(), "writable": !dry_run});
        args.extend(["--export".into(), text(&export)?.into()]);
    }
    Ok(args)
}

fn text(value: &Value) -> Result<String> {
    crate::text::json(value).map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e))
}

impl KnownDisks {
    /// Gives the disks the names that they have when their VM runs.
    pub fn name(&self, seen: &mut Survey) {
        for d in &mut seen.disks {
            let known = self.disks.iter().find(|k| k.real.to_str() == Some(&*d.identity.file));
            let Some(known) = known else { continue };
            let format = d.identity.format.clone();
            d.identity = known.identity.clone();
            d.identity.format = format;
        }
        for other in seen.skipped.iter_mut().chain(&mut seen.blocked) {
            let known = self.disks.iter().find(|k| image::top(&k.real) == other.disk);
            if let Some(known) = known {
                other.disk = known.identity.file.clone();
            }
        }
    }
}
