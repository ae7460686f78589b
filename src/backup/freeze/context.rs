//! What freezing works with: QEMU, the options, the journal, the watchdog.

use super::watchdog::{Message, Watchdog};
use crate::backup::state::journal::{Journal, Record};
use crate::backup::{Options, Watch};
use crate::error::Result;
use crate::qmp::Client;

/// What freezing works with.
pub(crate) struct FreezeContext<'a> {
    /// QEMU.
    pub client: &'a mut Client,
    /// What was wanted.
    pub options: &'a Options,
    /// Where what must be undone is written down.
    pub journal: &'a mut Journal,
    /// The run's id.
    pub run: &'a str,
    /// Who is told.
    pub watch: &'a dyn Watch,
}

/// Before something is done to the guest, its undo is on disk and the watchdog knows.
pub(super) fn announce(
    context: &mut FreezeContext<'_>,
    watchdog: Option<&mut Watchdog>,
    record: Record,
    message: Message,
) -> Result<()> {
    context.journal.write(&record)?;
    watchdog.map_or(Ok(()), |g| g.tell(message))
}

/// After it is undone, the watchdog first: it must not act on what is over.
pub(super) fn withdraw(
    context: &mut FreezeContext<'_>,
    watchdog: Option<&mut Watchdog>,
    record: Record,
    message: Message,
) -> Result<()> {
    watchdog.map_or(Ok(()), |g| g.tell(message))?;
    context.journal.write(&record)
}
