//! `--wait`: no migration runs, what an earlier run left is undone, and no other program works on the
//! disks that are wanted, or the time is over.

use std::time::{Duration, Instant};

use super::RecoverContext;
use crate::backup::disks::{Answers, survey};
use crate::backup::fleece::{foreign, migration};
use crate::backup::{Options, Quiet, StopMode, Watch, plan, recover};
use crate::error::{Kind, Result};
use crate::qmp::Client;

/// How often it is looked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Undoes what earlier runs left, and waits as long as the user allows for other programs to end.
/// Who is still at work then is for planning to refuse.
///
/// # Errors
/// As [`migration::check`] and [`recover::recover`]; `Interrupted`.
pub(crate) fn until_free(
    client: &mut Client,
    place: RecoverContext<'_>,
    options: &Options,
    watch: &dyn Watch,
) -> Result<()> {
    let end = Instant::now().checked_add(options.wait);
    let over = || end.is_some_and(|e| Instant::now() >= e);
    let stops = options.freeze_point.stop != StopMode::Never && client.has_guest();
    let mut said: Option<String> = None;
    loop {
        let tell: &dyn Watch = if said.is_some() { &Quiet } else { watch };
        let undone = migration::check(client)
            .and_then(|()| recover::recover(client, place, tell))
            .and_then(|n| foreign::refuse_at_work(client).map(|()| n))
            .and_then(|n| if stops { foreign::refuse_stop(client).map(|()| n) } else { Ok(n) });
        let who = match undone {
            // One that has left does not come back by itself.
            Err(e) if e.kind() != Kind::Busy || over() || has_left(client)? => return Err(e),
            Err(e) => e.to_string(),
            Ok(_) if options.wait.is_zero() => return Ok(()),
            Ok(_) => match busy(client, options)? {
                Some(who) if !over() => who,
                _ => return Ok(()),
            },
        };
        if said.as_ref() != Some(&who) {
            watch.say(&format!("waiting: {who}"));
            said = Some(who);
        }
        let next = Instant::now() + AGAIN;
        while Instant::now() < next {
            client.pause(next)?;
            // Events of jobs end a pause.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn has_left(client: &mut Client) -> Result<bool> {
    Ok(migration::owner(client)? == migration::Owner::Left)
}

/// Who works on a disk that is wanted.
fn busy(client: &mut Client, options: &Options) -> Result<Option<String>> {
    let seen = survey(&Answers::ask(client)?);
    let wanted = seen.disks.iter().filter(|d| plan::left_out(options, d).is_none());
    let mut busy = wanted.filter_map(|d| Some(format!("{}: {}", d.label(), d.busy.as_ref()?)));
    Ok(busy.next())
}
