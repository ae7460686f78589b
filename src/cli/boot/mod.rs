//! `fleecefs boot`: a run as a test VM.
//!
//! - `args`: the options; `prepare`: from a run to a VM and its disks; `checks`: `--check`

mod args;
mod checks;
mod prepare;

use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::path::Path;

use self::prepare::{Prepared, scratch};
use super::one_run;
use super::paths::{catalog, to_make};
use super::recorded::Recorded;
use super::{unsound, verbosity, work};
use crate::boot::{self, Disks, Outputs, Running};
use crate::chain::Catalog;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::layer::LayerSpec;
use crate::mount::check_outside;
use crate::output;
use crate::text::path_text;
pub(super) use args::{BootArgs, HardwareArgs};
pub(super) use prepare::prepared;

/// Runs `fleecefs boot`.
///
/// # Errors
/// As the exit codes say; `Unsound` if a VM was to be checked and does not come up.
pub(super) fn run(args: &BootArgs) -> Result<()> {
    args.check()?;
    if args.check.check {
        let dir = Some(args.dir.as_path());
        let run = Recorded { command: "boot --check", dir, state: &args.state, dry_run: false };
        return run.run(|entry| checks::run(args, &catalog(&args.dir)?, entry));
    }
    let catalog = catalog(&args.dir)?;
    let run = one_run::find(&catalog, &args.points)?;
    unsound::warn(&args.state, &catalog, run.points.iter().map(|c| (c.disk, c.point)));
    let prepared = prepared(&args.wanted()?, &run)?;
    let how = &args.how;
    if how.print || how.print_blockdev || how.libvirt {
        return print(args, &prepared);
    }
    let cancel = work::undo_flag()?;
    let scratch = scratch(args, &catalog)?;
    let said = with_display((how.display.as_deref(), &catalog), |display| {
        let outputs = Outputs { echo: true, display, ..Outputs::default() };
        let disks = Disks::new(prepared.points, scratch, &catalog.root)?;
        let vm = Running::start(&prepared.vm, disks, outputs, &cancel)?;
        tell_where(how.display.as_deref());
        vm.wait()
    })?;
    if !said.is_empty() {
        log::warn!("QEMU said: {said}");
    }
    Ok(())
}

fn tell_where(display: Option<&Path>) {
    if verbosity::is_quiet() {
        return;
    }
    let hint = display.map_or_else(
        || "its serial port follows; --display shows the console".to_string(),
        |socket| format!("connect a VNC viewer to {}", path_text(socket)),
    );
    output::tell(&format!("fleecefs: the VM runs, Ctrl-C ends it: {hint}\n"));
}

/// Prints what is asked for instead of a start.
fn print(args: &BootArgs, prepared: &Prepared) -> Result<()> {
    let vm = &prepared.vm;
    let stacks: Vec<Vec<LayerSpec>> = prepared.stacks.clone();
    if args.how.libvirt {
        let folder =
            std::env::current_dir().map_err(|e| Error::io(e, "cannot tell the current folder"))?;
        let folder = folder.to_str().unwrap_or("/var/tmp").to_string();
        let domain = boot::domain(vm, &stacks, &folder)?;
        for (number, disk) in vm.disks.iter().enumerate() {
            let size = disk.size;
            output::tell(&format!(
                "before: qemu-img create -q -f qcow2 fleecefs-boot-{number}.qcow2 {size}\n"
            ));
        }
        return output::print(&domain);
    }
    let names = (0..vm.disks.len()).map(|n| format!("disk{n}")).chain(["vars".to_string()]);
    let graphs = stacks.iter().zip(names).map(|(stack, name)| boot::graph(stack, &name));
    let graphs = graphs.collect::<Result<Vec<_>>>()?;
    let lines = match args.how.print {
        true => boot::printed(vm, &graphs)?,
        false => graphs.iter().map(boot::argument).collect(),
    };
    output::written_by_others(|out| writeln!(out, "{}", lines.join("\n")))
}

/// Does `act` with a socket for viewers of the console, if there is to be one, and removes that.
///
/// # Errors
/// The socket cannot be made, or would be in the backup directory; what `act` says.
fn with_display<T>(
    (socket, catalog): (Option<&Path>, &Catalog),
    act: impl FnOnce(Option<UnixListener>) -> Result<T>,
) -> Result<T> {
    let Some(socket) = socket else { return act(None) };
    let failed = |e| Error::io(e, "cannot make the socket").at_path(socket);
    let real = to_make(socket)?;
    check_outside(&real, &catalog.root)?;
    let (folder, name) = Folder::of(&real).map_err(failed)?;
    let listener = folder.listen(&name).map_err(|e| {
        let in_use = e.kind() == ErrorKind::AddrInUse;
        let e = failed(e);
        if in_use {
            e.remedy("remove it if nobody uses it (a boot that was killed leaves it)")
        } else {
            e
        }
    })?;
    listener.set_nonblocking(true).map_err(failed)?;
    let done = act(Some(listener));
    if let Err(e) = folder.remove_if_there(&name) {
        log::debug!("cannot remove {}: {e}", path_text(socket));
    }
    done
}
