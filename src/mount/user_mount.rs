//! A user's mount, in one process that mounts by way of fusermount3. A thread unmounts on a signal or when
//! idle.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use signal_hook::iterator::Signals;

use super::daemon::Ready;
use super::mounted::{answers, finish, print_mounted};
use super::plan::Plan;
use super::prepared::Prepared;
use super::process::{TICK, signals, start};
use super::table::{Announced, Mount, Waiting};
use crate::error::{Kind, Result};
use crate::fs::FileSystem;
use crate::fuse;

/// Mounts, tells `ready`, and serves until it is unmounted.
///
/// # Errors
/// Mounting failed, or the connection to the kernel broke.
pub(super) fn run(plan: &Plan, ready: Ready) -> Result<()> {
    let prepared = Prepared::new(plan)?;
    // Until now a signal simply ended the process, however long the scan took.
    let signals = signals()?;
    let mounted = fuse::mount(prepared.fs.clone(), &plan.mountpoint, &plan.fuse())?;
    let (mount, announced) = answers(&plan.mountpoint)?;
    let fs = prepared.fs.clone();
    prepared.watch(&mounted)?;
    let (tell, told) = channel();
    start("signals", 0, move || forward(signals, &tell))?;
    let served = fs.clone();
    let control = Control { mount, idle_timeout: plan.idle_seconds(), fs, told };
    start("control", 0, move || control.run())?;
    ready.tell()?;
    print_mounted(plan);
    let mut waiting = Waiting::default();
    let ended = finish(mounted, &served, plan, || {
        waiting = announced.map(Announced::end).unwrap_or_default();
    });
    waiting.tell(ended.as_ref().map_or_else(|e| e.kind().exit_code(), |()| 0));
    ended
}

fn forward(mut signals: Signals, tell: &Sender<i32>) {
    for signal in signals.forever() {
        if tell.send(signal).is_err() {
            return;
        }
    }
}

struct Control {
    mount: Mount,
    idle_timeout: Option<u64>,
    fs: Arc<FileSystem>,
    told: Receiver<i32>,
}

impl Control {
    /// Waits for a reason to unmount. A busy mount is tried again until it is free; a second
    /// signal detaches it at once, and the process ends with its last open file. A third ends it
    /// there and then.
    fn run(self) {
        let (mut signals, mut unmounted) = (0, false);
        loop {
            match self.told.recv_timeout(TICK) {
                Ok(signal) if signals < 2 => {
                    signals += 1;
                    log::info!("signal {signal}: unmounting");
                }
                Ok(signal) => {
                    log::warn!("signal {signal}, the third: ending with files still open");
                    std::process::exit(i32::from(Kind::Interrupted.exit_code()));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let idle = self.idle_timeout.is_some_and(|t| self.fs.idle_seconds() >= t);
            if !unmounted && (signals > 0 || idle) {
                unmounted = self.unmount(signals);
            }
        }
    }

    /// Tries once; true if there is nothing left to do.
    fn unmount(&self, signals: u32) -> bool {
        match self.mount.end(signals > 1) {
            Ok(()) => true,
            Err(e) => {
                log::debug!("{}; a second signal detaches it", e.report());
                // Somebody works inside without reading: ask again after another idle time.
                self.fs.touch();
                false
            }
        }
    }
}
