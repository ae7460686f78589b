//! Standard output: every byte in order, read ahead by several workers.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::Summary;
use super::plan::Plan;
use super::source::Reader;
use crate::error::{Error, Result};
use crate::job::{Work, pool};

/// Bytes per piece.
const PIECE: u64 = 1 << 20;
/// Pieces that a worker may be ahead.
const AHEAD: usize = 2;

type Piece = Result<Vec<u8>>;

/// Writes the whole disk to `out`.
///
/// # Errors
/// Reading or writing failed, `Interrupted`.
pub(super) fn to_writer(
    reader: &Reader,
    plan: &Plan,
    out: &mut dyn Write,
    work: &Work,
) -> Result<Summary> {
    let pieces = usize::try_from(plan.size.div_ceil(PIECE)).map_err(|_| pool::too_large())?;
    let workers = work.workers.clamp(1, pieces.max(1));
    let stop = AtomicBool::new(false);
    work.progress.begin("restore", plan.size);
    std::thread::scope(|scope| {
        let mut queues: Vec<Receiver<Piece>> = Vec::new();
        for number in 0..workers {
            let (send, receive) = sync_channel(AHEAD);
            let stop = &stop;
            scope.spawn(move || read_pieces(reader, plan.size, number, workers, &send, stop));
            queues.push(receive);
        }
        let done = write_all(&queues, pieces, out, work);
        // Workers that wait for room in their queue see that nobody listens any more.
        stop.store(true, Ordering::Relaxed);
        drop(queues);
        done
    })?;
    Ok(Summary { copied: plan.size, ..Summary::default() })
}

/// Worker `number` of `workers` reads every `workers`th piece.
fn read_pieces(
    reader: &Reader,
    size: u64,
    number: usize,
    workers: usize,
    send: &SyncSender<Piece>,
    stop: &AtomicBool,
) {
    let mut start = number as u64 * PIECE;
    while start < size && !stop.load(Ordering::Relaxed) {
        let mut buf = vec![0; PIECE.min(size - start) as usize];
        let piece = reader.read(&mut buf, start).map(|()| buf);
        let failed = piece.is_err();
        if send.send(piece).is_err() || failed {
            return;
        }
        start += PIECE * workers as u64;
    }
}

fn write_all(
    queues: &[Receiver<Piece>],
    pieces: usize,
    out: &mut dyn Write,
    work: &Work,
) -> Result<()> {
    let failed = |e| Error::io(e, "cannot write to standard output");
    for i in 0..pieces {
        work.check()?;
        let piece = queues[i % queues.len()].recv();
        let bytes =
            piece.map_err(|_| Error::io(std::io::Error::other("worker"), "ended early"))??;
        out.write_all(&bytes).map_err(failed)?;
        work.did(bytes.len() as u64)?;
    }
    out.flush().map_err(failed)
}
