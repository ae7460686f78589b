//! A test VM that runs: the process, the threads that serve its disks, and its sockets.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use regex::bytes::Regex;
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::command::{self, Nodes};
use super::disk::{Disks, MemoryDevice};
use super::firmware;
use super::serial::{Serial, SerialOutputs};
use super::vm::{Accel, Kernel, Net, Vm};
use crate::error::{Error, Kind, Result};
use crate::folder;
use crate::folder::Access;
use crate::qemu_img::guest::{Allowed, GuestProcess, KVM, LARGEST_FILE};
use crate::qemu_img::nbd::{self, Device};
use crate::qmp::Client;
use crate::qmp::agent::Agent;

/// How long QEMU may take until it greets: it reads its firmware, and takes the guest's memory.
const STARTING: Duration = Duration::from_secs(60);
/// How often it is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// A kernel and its initial file system are at most this large, in bytes.
const LARGEST_KERNEL: u64 = 1 << 30;
/// The set of descriptors for a picture.
const PICTURE: u64 = 1;
/// Errors of disks that are told.
const MOST_ERRORS: usize = 16;

/// What a person gets to see.
#[derive(Default)]
pub(crate) struct Outputs {
    /// Where the serial log goes.
    pub log: Option<File>,
    /// Whether what comes over the serial port is printed.
    pub echo: bool,
    /// What is waited for on the serial port.
    pub expect: Option<Regex>,
    /// Where viewers of the console (VNC) connect.
    pub display: Option<UnixListener>,
    /// Ports of the guest that are forwarded.
    pub ports: Vec<u16>,
}

/// One that runs; its QEMU ends when this is dropped.
pub(crate) struct Running {
    process: Option<GuestProcess>,
    pub(super) qmp: Client,
    pub(super) agent: Agent,
    pub(super) serial: Serial,
    display: Option<UnixListener>,
    errors: Arc<Mutex<Vec<String>>>,
    full: Arc<AtomicBool>,
    pub(super) cancel: Arc<AtomicBool>,
}

/// What QEMU gets: descriptors, and what serves their other ends.
#[derive(Default)]
struct Sockets {
    theirs: Vec<OwnedFd>,
    served: Vec<(UnixStream, Arc<dyn Device + Send + Sync>)>,
}

impl Sockets {
    /// A new pair: our end, and the number of its.
    fn pair(&mut self) -> Result<(UnixStream, i32)> {
        let failed = |e| Error::new(Kind::Busy, "cannot make a socket").with_source(e);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let number = theirs.as_raw_fd();
        self.theirs.push(theirs.into());
        Ok((ours, number))
    }

    /// A node for a device that is served.
    fn node(&mut self, name: &str, device: Arc<dyn Device + Send + Sync>) -> Result<Value> {
        let (ours, number) = self.pair()?;
        let writable = device.is_writable();
        self.served.push((ours, device));
        let server = json!({"type": "fd", "str": number.to_string()});
        Ok(json!({
            "driver": "raw",
            "node-name": name,
            "read-only": !writable,
            "discard": if writable { "unmap" } else { "ignore" },
            "file": {"driver": "nbd", "server": server},
        }))
    }

    /// The words for a kernel: QEMU reads copies of the user's files, which it may not open itself.
    fn kernel(&mut self, kernel: &Kernel) -> Result<Vec<OsString>> {
        let mut words: Vec<OsString> = vec!["-kernel".into(), self.copy(&kernel.kernel)?];
        if let Some(initrd) = &kernel.initrd {
            words.extend(["-initrd".into(), self.copy(initrd)?]);
        }
        words.extend(["-append".into(), OsString::from(&kernel.append)]);
        Ok(words)
    }

    fn copy(&mut self, path: &Path) -> Result<OsString> {
        let failed = |e| Error::io(e, "cannot read the kernel").at_path(path);
        let bytes =
            folder::resolve(path).and_then(|real| folder::read_small(&real, LARGEST_KERNEL));
        let copy = memory_file(&bytes.map_err(failed)?).map_err(failed)?;
        let name = format!("/proc/self/fd/{}", copy.as_raw_fd());
        self.theirs.push(copy.into());
        Ok(name.into())
    }
}

fn memory_file(bytes: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("fleecefs-boot", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

impl Running {
    /// Starts `vm` over `disks`, which are in the order of [`Vm::sources`]. `cancel` ends all waits. Must be called by a
    /// thread that outlives the VM.
    ///
    /// # Errors
    /// `NotFound` if QEMU is not installed; `Peer` with its own words if it does not start; a file of the user's cannot
    /// be read.
    pub(crate) fn start(
        vm: &Vm,
        disks: Disks,
        outputs: Outputs,
        cancel: &Arc<AtomicBool>,
    ) -> Result<Self> {
        let mut sockets = Sockets::default();
        let nodes = nodes(vm, disks, &mut sockets)?;
        let mut args = command::arguments(vm, &nodes)?;
        args.extend(command::networks(vm, &outputs.ports));
        let (serial, number) = sockets.pair()?;
        args.extend(chardev("serial", number));
        args.extend(["-serial", "chardev:serial"].map(OsString::from));
        let (agent, number) = sockets.pair()?;
        args.extend(chardev("agent", number));
        args.extend(AGENT.map(OsString::from));
        let (qmp, number) = sockets.pair()?;
        args.extend(chardev("qmp", number));
        args.extend(["-mon", "chardev=qmp,mode=control"].map(OsString::from));
        let shown = if outputs.display.is_some() { "-vnc" } else { "-display" };
        args.extend([shown, "none"].map(OsString::from));
        args.extend(["-sandbox", SANDBOX].map(OsString::from));
        let network = vm.net == Net::User || !outputs.ports.is_empty();
        let accelerated = vm.accel == Accel::Kvm;
        let kvm = accelerated.then(kvm_group).flatten();
        let allowed = Allowed { memory: vm.memory, accelerated, kvm, network };
        let process = GuestProcess::start(&args, &sockets.theirs, allowed)?;
        // So that its end ends the connections.
        drop(sockets.theirs);
        let (errors, full) = serve_all(sockets.served);
        let expect = outputs.expect;
        let serial =
            Serial::read(serial, SerialOutputs { log: outputs.log, echo: outputs.echo, expect });
        let agent = Agent::over(agent)?;
        let qmp = match Client::over(qmp, STARTING, Some(cancel.clone())) {
            Ok(qmp) => qmp,
            Err(e) if e.kind() == Kind::Interrupted => return Err(e),
            Err(e) => return Err(not_started(process, e, vm.accel)),
        };
        let display = outputs.display;
        let cancel = cancel.clone();
        Ok(Running { process: Some(process), qmp, agent, serial, display, errors, full, cancel })
    }

    /// Waits until the guest is shut off, or the user ends it. What QEMU said, if anything.
    ///
    /// # Errors
    /// `Peer` if QEMU cannot be talked to, or ended by itself otherwise than with the guest.
    pub(crate) fn wait(mut self) -> Result<String> {
        while !self.cancel.load(Ordering::SeqCst) {
            if let Some(status) = self.process.as_mut().and_then(GuestProcess::ended) {
                let said = self.end();
                return match status.success() {
                    true => Ok(said),
                    false => Err(Error::new(Kind::Peer, format!("QEMU failed ({status}): {said}"))),
                };
            }
            self.serve_display()?;
            std::thread::sleep(LOOK);
        }
        Ok(self.end())
    }

    /// Whether QEMU has ended.
    pub(super) fn has_ended(&mut self) -> bool {
        self.process.as_mut().is_none_or(|p| p.ended().is_some())
    }

    /// Ends QEMU; what it said.
    pub(super) fn end(&mut self) -> String {
        self.process.take().map(GuestProcess::end).unwrap_or_default()
    }

    /// Whether the scratch folder was full for some write.
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// What could not be read or written of the disks.
    pub(super) fn disk_errors(&self) -> Vec<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Hands the next viewer of the console to QEMU.
    ///
    /// # Errors
    /// QEMU cannot be talked to.
    pub(super) fn serve_display(&mut self) -> Result<()> {
        let Some(Ok((viewer, _))) = self.display.as_ref().map(UnixListener::accept) else {
            return Ok(());
        };
        let name = json!({"fdname": "viewer"});
        self.qmp.call_with("getfd", name, Some(viewer.as_fd()))??;
        self.qmp.execute("add_client", json!({"protocol": "vnc", "fdname": "viewer"}))?;
        Ok(())
    }

    /// A picture of the console, as PNG.
    ///
    /// # Errors
    /// QEMU takes none: it has ended, or was built without PNG.
    pub(super) fn picture(&mut self) -> Result<Vec<u8>> {
        let failed = |e| Error::io(e, "no file for the screenshot can be made or read");
        let file = memory_file(&[]).map_err(failed)?;
        // QEMU wants one that is open for writing alone.
        let theirs = folder::reopen(&file, Access::Write).map_err(failed)?;
        let add = json!({"fdset-id": PICTURE});
        self.qmp.call_with("add-fd", add.clone(), Some(theirs.as_fd()))??;
        let arguments = json!({"filename": format!("/dev/fdset/{PICTURE}"), "format": "png"});
        let taken = self.qmp.execute("screendump", arguments);
        self.qmp.execute("remove-fd", add)?;
        taken?;
        let ours = folder::reopen(&file, Access::Read).map_err(failed)?;
        folder::read_bounded(ours, LARGEST_FILE).map_err(failed)
    }
}

/// A port for the guest agent.
const AGENT: [&str; 4] = [
    "-device",
    "virtio-serial-pci",
    "-device",
    "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
];
/// System calls that QEMU never needs.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

fn chardev(name: &str, number: i32) -> [OsString; 2] {
    ["-chardev".into(), format!("socket,id={name},fd={number}").into()]
}

/// The nodes of all disks, behind sockets.
fn nodes(vm: &Vm, disks: Disks, sockets: &mut Sockets) -> Result<Nodes> {
    let mut nodes = Nodes::default();
    let mut devices = disks.all.into_iter();
    for (number, device) in devices.by_ref().take(vm.disks.len()).enumerate() {
        nodes.disks.push(sockets.node(&command::node_name(number), device)?);
    }
    if let Some(uefi) = &vm.uefi {
        let code = MemoryDevice::new(firmware::bytes(&uefi.files.code)?, false);
        let vars: Arc<dyn Device + Send + Sync> = match devices.next() {
            Some(point) => point,
            None => Arc::new(MemoryDevice::new(firmware::bytes(&uefi.files.vars)?, true)),
        };
        nodes.flash = Some((sockets.node("code", Arc::new(code))?, sockets.node("vars", vars)?));
    }
    if let Some(kernel) = &vm.kernel {
        nodes.kernel = sockets.kernel(kernel)?;
    }
    Ok(nodes)
}

/// Serves each device in a thread of its own, until QEMU ends. The list gets the errors, the flag whether one was that
/// there is no space.
fn serve_all(
    all: Vec<(UnixStream, Arc<dyn Device + Send + Sync>)>,
) -> (Arc<Mutex<Vec<String>>>, Arc<AtomicBool>) {
    let (errors, full): (Arc<Mutex<Vec<String>>>, Arc<AtomicBool>) = Default::default();
    for (socket, device) in all {
        let (errors, full) = (errors.clone(), full.clone());
        std::thread::spawn(move || {
            let watched = Watched { device, errors, full };
            nbd::serve(&watched, &socket);
        });
    }
    (errors, full)
}

/// A device whose errors are told as soon as they come.
struct Watched {
    device: Arc<dyn Device + Send + Sync>,
    errors: Arc<Mutex<Vec<String>>>,
    full: Arc<AtomicBool>,
}

impl Watched {
    fn noted<T>(&self, result: std::io::Result<T>) -> std::io::Result<T> {
        result.inspect_err(|e| {
            if nbd::is_no_space(e) {
                self.full.store(true, Ordering::SeqCst);
            }
            let text = e.to_string();
            let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
            if errors.len() < MOST_ERRORS && !errors.contains(&text) {
                log::error!("a disk of the test VM: {text}");
                errors.push(text);
            }
        })
    }
}

impl Device for Watched {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn is_writable(&self) -> bool {
        self.device.is_writable()
    }

    fn patience(&self) -> Option<Duration> {
        self.device.patience()
    }

    fn read(&self, from: u64, len: usize) -> std::io::Result<Vec<u8>> {
        self.noted(self.device.read(from, len))
    }

    fn write(&self, data: &[u8], from: u64) -> std::io::Result<()> {
        self.noted(self.device.write(data, from))
    }

    fn zero(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        self.noted(self.device.zero(range))
    }
}

/// The group of /dev/kvm, where that may be used by its group and not by all. Root's group is no group for that.
fn kvm_group() -> Option<u32> {
    let meta = folder::look(Path::new(KVM)).ok()?;
    let by_group = meta.mode() & 0o066 == 0o060 && meta.gid() != 0;
    by_group.then(|| meta.gid())
}

fn not_started(process: GuestProcess, error: Error, accel: Accel) -> Error {
    let said = process.end();
    if said.is_empty() {
        return error;
    }
    let e = Error::new(Kind::Peer, format!("QEMU does not start: {said}"));
    match accel {
        Accel::Kvm => e.remedy("if the processor cannot do that, try --accel tcg"),
        Accel::Tcg => e,
    }
}
