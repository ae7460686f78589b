//! Attaching, step by step.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::place::Place;
use super::record::{Attachment, Begin, Journal, Record, Step, Volume, mapper_prefix};
use super::{crypt, device, loops, lvm, mounts, serve, udev, undo};
use crate::error::{Error, Kind, Result};
use crate::failpoint::step;
use crate::files::{Content, btrfs_with_id, partitions};
use crate::folder::{self, DeviceAccess, FileId, Folder, random};
use crate::output;
use crate::text::path_text;
use crate::units::counted;

/// Volumes in volumes: LVM in LUKS, or LUKS in LVM, and no deeper.
const ROUNDS: usize = 3;
/// Bytes of a sector that all disks have.
const SECTOR: u32 = 512;
/// The longest name of a disk in those of its volumes.
const NAME_MAX: usize = 64;

/// A point that is to be attached.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// The disk's name, as `list` shows it.
    pub name: String,
    /// The point's.
    pub point: String,
    /// Where a mount of the backups shows it.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
}

/// What is to be attached, and how.
pub(crate) struct Options<'a> {
    /// The folder for journals.
    pub state: &'a Path,
    /// The backup directory.
    pub backups: &'a Path,
    /// The points: one, or those of a run.
    pub disks: &'a [Disk],
    /// The folder in which file systems are mounted, without links; none are if omitted.
    pub mount: Option<&'a Path>,
    /// Whether they are mounted for writing.
    pub write: bool,
    /// Whether journals are replayed, over an overlay that is thrown away.
    pub replay: bool,
    /// Bytes of a sector; as the partition table has it if omitted.
    pub sector: Option<u32>,
    /// A file with the key of encrypted volumes.
    pub key: Option<&'a Path>,
    /// Set when it is to be given up.
    pub cancel: &'a AtomicBool,
}

/// What was attached.
#[derive(Debug)]
pub(crate) struct Attached {
    /// Its id.
    pub id: String,
    /// The loop device of each disk.
    pub devices: Vec<PathBuf>,
    /// Partitions and volumes.
    pub volumes: Vec<Volume>,
}

/// Something that may hold a file system.
struct Found {
    name: String,
    device: Option<PathBuf>,
    content: Content,
    mounted: Option<PathBuf>,
    note: Option<String>,
    /// Whether that should have been done.
    failed: bool,
    /// Whether what is inside has been looked for.
    opened: bool,
}

/// Attaches. Where a step fails, all that was done is undone.
///
/// # Errors
/// What failed.
pub(crate) fn attach(o: &Options<'_>) -> Result<Attached> {
    if let Some(mount) = o.mount {
        let remedy = "file systems of a guest are mounted in a folder of yours or root's that nobody else may write \
                      to: name another";
        folder::check_unchangeable(mount, remedy)?;
    }
    let (place, _lock) = Place::new(o.state)?;
    let begin = Begin {
        backups: o.backups.to_path_buf(),
        points: o.disks.iter().map(|d| format!("{}/{}", d.name, d.point)).collect(),
        uid: rustix::process::getuid().as_raw(),
        pid: std::process::id(),
        started: now(),
        mount: o.mount.map(Path::to_path_buf),
    };
    let journal = Journal::begin(&place, &begin)?;
    let mut setup = Setup { place: &place, journal, o, found: Vec::new(), taken: BTreeSet::new() };
    let done = setup.all();
    drop(setup);
    done.inspect_err(|_| {
        let undone = Attachment::read(&place).and_then(|a| a.map_or(Ok(()), |a| undo::undo(&a)));
        if let Err(left) = undone {
            let id = &place.id;
            output::tell(&format!(
                "not all is undone: {}\n'fleecefs detach {id}' goes on\n",
                left.report()
            ));
        }
    })
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(0)
}

struct Setup<'a> {
    place: &'a Place,
    journal: Journal,
    o: &'a Options<'a>,
    found: Vec<Found>,
    /// Names that are given.
    taken: BTreeSet<String>,
}

impl Setup<'_> {
    fn all(&mut self) -> Result<Attached> {
        self.place.make()?;
        step("folder");
        if udev::is_there() {
            self.announce(Step::UdevRule)?;
            udev::add(self.place)?;
            step("udev");
        }
        self.announce(Step::Serve)?;
        serve::mount(self.place, self.o.backups, self.o.replay)?;
        let mut devices = Vec::new();
        for disk in self.o.disks {
            devices.push(self.disk(disk)?);
        }
        self.inside()?;
        if self.o.mount.is_some() {
            self.mount_all()?;
        }
        let volumes: Vec<Volume> = self.found.drain(..).map(Found::volume).collect();
        for volume in &volumes {
            self.journal.write(Record::Volume(volume.clone()))?;
        }
        self.journal.write(Record::Ready)?;
        Ok(Attached { id: self.place.id.clone(), devices, volumes })
    }

    /// Writes down what is about to be done, if it is not to be given up.
    fn announce(&mut self, what: Step) -> Result<()> {
        if self.o.cancel.load(Ordering::SeqCst) {
            return Err(Error::new(Kind::Interrupted, "ended by a signal: all is undone"));
        }
        self.journal.write(Record::Step(what))
    }

    /// Attaches a disk, and finds its partitions.
    fn disk(&mut self, disk: &Disk) -> Result<PathBuf> {
        let file = serve::open(self.place, &disk.path, disk.size, self.o.replay)?;
        let failed = |e| Error::io(e, "cannot open the point").at_path(&disk.path);
        let id = FileId::of(&file.metadata().map_err(failed)?);
        let table = partitions(&device::source(file.try_clone().map_err(failed)?, &disk.path)?)?;
        table.findings.iter().for_each(|f| log::warn!("{f}"));
        let how = (self.sector(table.sector, disk)?, !self.o.replay);
        warn_of_rest(disk);
        let place = self.place;
        let made = loops::attach(place, &file, how, |number| {
            self.announce(Step::Loop { number, file: id })
        })?;
        drop(file);
        let prefix = self.prefix(disk);
        if table.partitions.is_empty() {
            let content = device::content(&made.path)?;
            self.add(&format!("{prefix}disk"), Some(made.path.clone()), content);
        }
        for (number, node) in made.partitions(place, &table.partitions)? {
            let name = format!("{prefix}p{number}");
            match node {
                Ok(node) => {
                    let content = device::content(&node)?;
                    self.add(&name, Some(node), content);
                }
                Err(e) => self.add(&name, None, Content::Unknown).fail(e.report()),
            }
        }
        Ok(made.path)
    }

    /// Bytes of a sector: as they are wanted, or as the table has them if the disk has whole ones only. (Partitions are
    /// made in any case; the kernel would take a disk with a part of a sector at its end for a smaller one.)
    fn sector(&self, of_table: u64, disk: &Disk) -> Result<u32> {
        let fits = |sector: &u32| disk.size.is_multiple_of(u64::from(*sector));
        let Some(wanted) = self.o.sector else {
            return Ok(u32::try_from(of_table).ok().filter(fits).unwrap_or(SECTOR));
        };
        if !fits(&wanted) && wanted > SECTOR {
            let what = format!(
                "{}/{} has no whole number of sectors of {wanted} bytes",
                disk.name, disk.point
            );
            return Err(Error::new(Kind::Usage, what).remedy("attach it with --sector 512"));
        }
        Ok(wanted)
    }

    /// What the names of a disk's volumes begin with, where there are several disks. Whatever the disk is called, it
    /// is a name that does no harm in a path.
    fn prefix(&self, disk: &Disk) -> String {
        if self.o.disks.len() == 1 {
            return String::new();
        }
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
        let name: String = disk.name.chars().map(plain).take(NAME_MAX).collect();
        format!("{}-", name.trim_start_matches(['.', '-']))
    }

    /// Adds something under a name that is still free.
    fn add(&mut self, name: &str, device: Option<PathBuf>, content: Content) -> &mut Found {
        let numbered = (2..).map(|n| format!("{name}-{n}"));
        let mut names = std::iter::once(name.to_string()).chain(numbered);
        let name = names.find(|n| !self.taken.contains(n)).unwrap_or_default();
        self.taken.insert(name.clone());
        let new = Found {
            name,
            device,
            content,
            mounted: None,
            note: None,
            failed: false,
            opened: false,
        };
        self.found.push(new);
        let last = self.found.len() - 1;
        &mut self.found[last]
    }

    /// Opens encrypted volumes, and activates volume groups, and those in them.
    fn inside(&mut self) -> Result<()> {
        for _ in 0..ROUNDS {
            let before = self.found.len();
            self.decrypt()?;
            self.groups()?;
            if self.found.len() == before {
                break;
            }
        }
        Ok(())
    }

    fn decrypt(&mut self) -> Result<()> {
        for i in 0..self.found.len() {
            let (Some(kind), Some(device), false) = (
                crypt::kind(&self.found[i].content),
                self.found[i].device.clone(),
                self.found[i].opened,
            ) else {
                continue;
            };
            self.found[i].opened = true;
            let Some(key) = self.o.key else {
                self.found[i].note = Some(format!(
                    "encrypted: --key-file opens it, or 'cryptsetup open --type {kind} {} NAME'",
                    path_text(&device)
                ));
                continue;
            };
            let name = format!("{}c{i}", mapper_prefix(self.place));
            self.announce(Step::Crypt { name: name.clone() })?;
            let open = crypt::open(self.place, (&device, kind), (&name, key), !self.o.replay);
            match open.and_then(|inner| Ok((device::content(&inner)?, inner))) {
                Ok((content, inner)) => {
                    let name = format!("{}-open", self.found[i].name);
                    self.add(&name, Some(inner), content);
                }
                Err(e) => self.found[i].fail(e.report()),
            }
        }
        Ok(())
    }

    fn groups(&mut self) -> Result<()> {
        let is_new =
            |f: &&mut Found| f.content == Content::LvmPv && !f.opened && f.device.is_some();
        let mut devices = Vec::new();
        for found in self.found.iter_mut().filter(is_new) {
            found.opened = true;
            devices.extend(found.device.clone());
        }
        if devices.is_empty() {
            return Ok(());
        }
        if !self.o.replay {
            let note = "not activated: a group gets a name of its own in the overlay only";
            self.on(&devices, |f| f.note = Some(note.into()));
            return Ok(());
        }
        let groups = match lvm::groups(self.place, &devices) {
            Ok(groups) => groups,
            Err(e) => {
                self.on(&devices, |f| f.fail(e.report()));
                return Ok(());
            }
        };
        for (device, why) in groups.left {
            self.on(&[device], |f| f.fail(why.clone()));
        }
        for group in groups.found {
            let own = format!("{}g{}", mapper_prefix(self.place), self.found.len());
            self.announce(Step::Group { name: own.clone() })?;
            match lvm::activate(self.place, &group, &own) {
                Ok(volumes) => {
                    for volume in volumes {
                        let content = device::content(&volume.device)?;
                        self.add(&volume.name, Some(volume.device), content);
                    }
                }
                Err(e) => self.on(&group.devices, |f| f.fail(e.report())),
            }
        }
        Ok(())
    }

    /// Does something with what has one of these devices.
    fn on(&mut self, devices: &[PathBuf], change: impl Fn(&mut Found)) {
        let is = |f: &&mut Found| f.device.as_ref().is_some_and(|d| devices.contains(d));
        self.found.iter_mut().filter(is).for_each(change);
    }

    /// Mounts each file system in a folder of its name.
    ///
    /// # Errors
    /// None could be mounted; what may not be passed over.
    fn mount_all(&mut self) -> Result<()> {
        let mut failed = None;
        for i in 0..self.found.len() {
            let found = &self.found[i];
            let Some(device) = found.device.clone().filter(|_| found.content.has_files()) else {
                continue;
            };
            let (content, name) = (found.content.clone(), found.name.clone());
            match self.mount(&content, &device, &name) {
                Ok(at) => self.found[i].mounted = Some(at),
                Err(e) if e.kind() == Kind::Interrupted => return Err(e),
                Err(e) => {
                    self.found[i].fail(e.report());
                    failed.get_or_insert(e);
                }
            }
        }
        if self.found.iter().any(|f| f.mounted.is_some()) {
            return Ok(());
        }
        Err(failed.unwrap_or_else(|| {
            let notes = self.found.iter().find_map(|f| f.note.clone());
            let what = "there is no file system to mount";
            match notes {
                Some(note) => Error::new(Kind::Unsupported, format!("{what}: {note}")),
                None => {
                    Error::new(Kind::Unsupported, what).remedy("without --mount there are devices")
                }
            }
        }))
    }

    fn mount(&mut self, content: &Content, device: &Path, name: &str) -> Result<PathBuf> {
        let mode = mounts::Mode { replay: self.o.replay, write: self.o.write };
        mounts::check(content, device, mode)?;
        let top = self.o.mount.unwrap_or(Path::new("/"));
        let at = top.join(name);
        if folder::exists(&at) {
            return Err(Error::new(Kind::Exists, "this name is taken").at_path(&at));
        }
        if *content == Content::Btrfs {
            self.announce(Step::Btrfs { device: device.to_path_buf() })?;
            if mode.replay {
                own_id(device)?;
            }
        }
        self.announce(Step::Mount { at: at.clone(), device: device.to_path_buf() })?;
        let made = Folder::open(top).and_then(|folder| folder.new_folder(name));
        made.map_err(|e| Error::io(e, "cannot make a folder to mount at").at_path(&at))?;
        step("mount folder");
        if let Err(e) = mounts::mount(content, device, &at, mode) {
            mounts::undo(&at, mounts::From::Device(device))?;
            return Err(e);
        }
        step("mount");
        Ok(at)
    }
}

impl Found {
    /// Notes what went wrong with it.
    fn fail(&mut self, why: String) {
        (self.note, self.failed) = (Some(why), true);
    }

    fn volume(self) -> Volume {
        Volume {
            name: self.name,
            device: self.device,
            content: self.content.name().to_string(),
            mounted: self.mounted,
            note: self.note,
            failed: self.failed,
        }
    }
}

/// The kernel's devices are of whole sectors: it leaves out what comes after them, without a word.
fn warn_of_rest(disk: &Disk) {
    let rest = disk.size % u64::from(SECTOR);
    if rest > 0 {
        log::warn!(
            "{}/{}: its last {} are no whole sector, and not in the device: 'fleecefs restore' has them",
            path_text(&disk.name),
            path_text(&disk.point),
            counted(rest, "byte")
        );
    }
}

fn random_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    random(&mut id).map_err(|e| Error::io(e, "cannot choose an id"))?;
    Ok(id)
}

/// Gives a btrfs an id that no other has, so that the kernel does not take it for its original.
fn own_id(device: &Path) -> Result<()> {
    let source = device::open_source(device)?;
    let copies = btrfs_with_id(&source, random_id()?)?;
    let file = device::open(device, DeviceAccess::WriteAlone)?;
    let write = || {
        use std::os::unix::fs::FileExt;
        copies.iter().try_for_each(|(at, raw)| file.write_all_at(raw, *at))?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(e, "cannot give this btrfs an id of its own").at_path(device))?;
    log::info!("{}: has an id of its own", path_text(device));
    step("btrfs id");
    Ok(())
}
