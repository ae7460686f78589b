//! The way to the other side: frames over two descriptors, of pipes or a socket.
//!
//! Nothing waits for ever: a side from which no byte comes for [`SILENCE`], or that takes none, is given up. Whoever
//! works for longer says so every now and then ([`Wire::busy`]), which is heard also while there is something to send; how
//! long that helps is said in [`super::patience`].
//! Both descriptors are set not to block.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::{self, Frame, HEADER};
use super::patience::Patience;
use crate::error::{Error, Kind, Result};
use crate::failpoint;

/// How long the other side may be silent: a disk that is waking up, or a network that is lost for a moment, takes
/// less.
const SILENCE: Duration = Duration::from_secs(120);
/// How much longer than that the other side may take if it is not silent, and nothing comes of it: an hour.
const PATIENCE: u32 = 30;
/// How often within that time it is said that work goes on.
const SIGNS: u32 = 8;
/// The longest wait before a look at the stop flag.
const SLICE: Duration = Duration::from_millis(200);

/// As much of a frame's header as has come.
#[derive(Default)]
struct BegunHeader {
    bytes: [u8; HEADER],
    len: usize,
}

/// The connection.
pub(crate) struct Wire<'a> {
    input: File,
    /// The beginning of the next frame, where it came while something was to be sent.
    begun: Mutex<BegunHeader>,
    output: Mutex<File>,
    /// When it was last said, between one thing and the next, that work goes on.
    signed: Mutex<Option<Instant>>,
    stop: &'a AtomicBool,
    silence: Duration,
    patience: Patience,
    /// What to call the other side in messages.
    peer: String,
}

impl<'a> Wire<'a> {
    /// Takes both directions; `stop` ends every wait.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn new(
        input: OwnedFd,
        output: OwnedFd,
        peer: impl Into<String>,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let not_blocking = |fd: &OwnedFd| {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
        };
        let set = not_blocking(&input).and_then(|()| not_blocking(&output));
        set.map_err(|e| Error::io(e.into(), "cannot use the connection"))?;
        let (input, output) = (File::from(input), Mutex::new(File::from(output)));
        let silence = failpoint::answer_timeout(SILENCE);
        let patience = Patience::new(silence * PATIENCE);
        let signed = Mutex::new(None);
        let begun = Mutex::default();
        Ok(Wire { input, begun, output, signed, stop, silence, patience, peer: peer.into() })
    }

    /// The same, with another measure for silence and for what nothing comes of.
    #[cfg(test)]
    pub(super) fn waiting_for(self, silence: Duration, whole: Duration) -> Self {
        Wire { silence, patience: Patience::new(whole), ..self }
    }

    /// How long the other side is waited for, which whoever knows what comes of it changes.
    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Sends a message.
    ///
    /// # Errors
    /// `Peer` if the other side is gone, `Timeout` if it takes nothing, `Interrupted`.
    pub(crate) fn send<T: Serialize>(&self, message: &T) -> Result<()> {
        self.send_frame(Frame::message(message)?)
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// As [`Wire::send`].
    pub(crate) fn send_frame(&self, frame: Frame) -> Result<()> {
        let (header, body) = frame.into_parts();
        let output = self.output();
        self.write(&output, &header)?;
        self.write(&output, &body)
    }

    /// Sends the next bytes of an image: at most as many as [`message::LONGEST_DATA`].
    ///
    /// # Errors
    /// As [`Wire::send`].
    pub(crate) fn send_data(&self, bytes: &[u8]) -> Result<()> {
        let output = self.output();
        self.write(&output, &message::header(b'D', bytes.len()))?;
        self.write(&output, bytes)
    }

    /// The next frame that says something.
    ///
    /// # Errors
    /// `Peer` if the other side is gone or sends nonsense, `Timeout` if nothing comes, `Interrupted`.
    pub(crate) fn receive_frame(&self) -> Result<Frame> {
        loop {
            match self.frame()? {
                Frame::Working => {}
                frame => return Ok(frame),
            }
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// As [`Wire::receive_frame`].
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> Result<T> {
        self.receive_frame().and_then(message::parse)
    }

    /// The whole file that is to come now.
    ///
    /// # Errors
    /// As [`Wire::receive_frame`].
    pub(crate) fn receive_whole(&self) -> Result<Vec<u8>> {
        match self.receive_frame()? {
            Frame::Whole(bytes) => Ok(bytes),
            _ => Err(message::nonsense()),
        }
    }

    /// A message that is there already, for whoever does not wait for one.
    ///
    /// # Errors
    /// As [`Wire::receive_frame`].
    pub(crate) fn waiting(&self) -> Result<Option<Frame>> {
        let has_come = || poll(&self.input, libc::POLLIN, Duration::ZERO).map_err(|e| self.lost(e));
        while self.has_header() || has_come()? {
            match self.frame()? {
                Frame::Working => {}
                frame => return Ok(Some(frame)),
            }
        }
        Ok(None)
    }

    /// Does what takes long, and lets the other side know meanwhile.
    pub(crate) fn busy<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = self.with_signs(work);
        self.patience.forgive(start.elapsed());
        result
    }

    /// Lets the other side know that work goes on, if that was not said for a while: for whoever does much, each of
    /// which takes no time.
    ///
    /// # Errors
    /// As [`Wire::send`].
    pub(crate) fn sign(&self) -> Result<()> {
        let mut signed = lock(&self.signed);
        if signed.is_some_and(|at| at.elapsed() < self.silence / SIGNS) {
            return Ok(());
        }
        *signed = Some(Instant::now());
        self.send_frame(Frame::Working)
    }

    fn with_signs<T>(&self, work: impl FnOnce() -> T) -> T {
        let (done, ended) = (Mutex::new(false), Condvar::new());
        let tell = || {
            let mut over = lock(&done);
            while !*over {
                let waited = ended.wait_timeout(over, self.silence / SIGNS);
                over = waited.unwrap_or_else(|e| e.into_inner()).0;
                // What comes of it is seen when there is something to say.
                if !*over && self.send_frame(Frame::Working).is_err() {
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            // Without a thread the other side loses patience, if it takes that long.
            let _ = std::thread::Builder::new().name("working".into()).spawn_scoped(scope, tell);
            let _end = SetOnDrop { done: &done, ended: &ended };
            work()
        })
    }

    fn output(&self) -> MutexGuard<'_, File> {
        lock(&self.output)
    }

    /// The next frame, whatever it says.
    pub(super) fn frame(&self) -> Result<Frame> {
        // Also of one who never lets us wait.
        self.check_stop()?;
        self.check_patience()?;
        let BegunHeader { bytes: mut header, len } = std::mem::take(&mut *lock(&self.begun));
        self.read(&mut header[len..])?;
        let mut body = vec![0; Frame::length(header)?];
        self.read(&mut body)?;
        Frame::of(header, body)
    }

    fn read(&self, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match (&self.input).read(&mut buf[done..]) {
                Ok(0) => return Err(self.gone()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(&self.input, libc::POLLIN, "it does not answer")?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.lost(e)),
            }
        }
        Ok(())
    }

    fn write(&self, mut output: &File, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match output.write(&bytes[done..]) {
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait_for_room(output)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Err(self.gone()),
                Err(e) => return Err(self.lost(e)),
            }
        }
        Ok(())
    }

    fn wait(&self, file: &File, what: libc::c_short, silent: &str) -> Result<()> {
        let end = Instant::now() + self.silence;
        while !poll(file, what, self.slice(end, silent)?).map_err(|e| self.lost(e))? {}
        Ok(())
    }

    /// Waits until the other side takes more. One that takes nothing, since it is at work on what it has, says so.
    fn wait_for_room(&self, output: &File) -> Result<()> {
        let mut end = Instant::now() + self.silence;
        loop {
            let slice = self.slice(end, "it takes nothing more")?;
            let input = (!self.has_header()).then_some(&self.input);
            let (has_room, has_come) = poll_both(output, input, slice).map_err(|e| self.lost(e))?;
            if has_room {
                return Ok(());
            }
            if has_come && self.has_signed()? {
                end = Instant::now() + self.silence;
            }
        }
    }

    /// How long to wait now, until the other side has been silent up to `end`.
    fn slice(&self, end: Instant, silent: &str) -> Result<Duration> {
        self.check_stop()?;
        self.check_patience()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("{}: {silent} for {} s", self.peer, self.silence.as_secs());
            return Err(Error::new(Kind::Timeout, text)
                .remedy("check the connection, and run it again: it continues where it stopped"));
        }
        Ok(left.min(SLICE).min(self.patience.left()))
    }

    /// Whether the header of a frame that says something was read already.
    fn has_header(&self) -> bool {
        lock(&self.begun).len == HEADER
    }

    /// Takes what is there of the next header; a sign of work ends with it. Whether it has come to its end: all else is
    /// left to whoever receives.
    fn has_signed(&self) -> Result<bool> {
        let mut begun = lock(&self.begun);
        let BegunHeader { bytes, len } = &mut *begun;
        match (&self.input).read(&mut bytes[*len..]) {
            Ok(0) if *len < HEADER => return Err(self.gone()),
            Ok(n) => *len += n,
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(self.lost(e)),
        }
        let is_whole = *len == HEADER;
        if is_whole && *bytes == message::header(b'W', 0) {
            *begun = BegunHeader::default();
        }
        Ok(is_whole)
    }

    /// Fails if the user wants an end.
    ///
    /// # Errors
    /// `Interrupted`.
    pub(crate) fn check_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::SeqCst) {
            true => Err(Error::new(Kind::Interrupted, "interrupted")),
            false => Ok(()),
        }
    }

    fn check_patience(&self) -> Result<()> {
        if !self.patience.left().is_zero() {
            return Ok(());
        }
        let text = format!(
            "{}: it is not silent, but for {} s nothing has come of it",
            self.peer,
            self.patience.whole().as_secs()
        );
        Err(Error::new(Kind::Timeout, text).remedy("see what it does there, and run it again"))
    }

    fn gone(&self) -> Error {
        Error::new(Kind::Peer, format!("{} ended the connection", self.peer))
            .remedy("what it said is above; run it again: it continues where it stopped")
    }

    fn lost(&self, e: io::Error) -> Error {
        Error::new(Kind::Peer, format!("the connection to {} failed", self.peer)).with_source(e)
    }
}

/// Ends the signs of work, also if that panics.
struct SetOnDrop<'a> {
    done: &'a Mutex<bool>,
    ended: &'a Condvar,
}

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        *lock(self.done) = true;
        self.ended.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether something can be done now, or within `wait`.
fn poll(file: &File, what: libc::c_short, wait: Duration) -> io::Result<bool> {
    let ms = libc::c_int::try_from(wait.as_millis()).unwrap_or(libc::c_int::MAX);
    let mut p = libc::pollfd { fd: file.as_raw_fd(), events: what, revents: 0 };
    // SAFETY: one pollfd that lives on our stack.
    match unsafe { libc::poll(&mut p, 1, ms) } {
        n if n >= 0 => Ok(n > 0),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

/// Whether `output` takes something now, or within `wait`, and whether something has come from `input`.
fn poll_both(output: &File, input: Option<&File>, wait: Duration) -> io::Result<(bool, bool)> {
    let ms = libc::c_int::try_from(wait.as_millis()).unwrap_or(libc::c_int::MAX);
    // One that is negative is passed over.
    let input = input.map_or(-1, |file| file.as_raw_fd());
    let mut p = [
        libc::pollfd { fd: output.as_raw_fd(), events: libc::POLLOUT, revents: 0 },
        libc::pollfd { fd: input, events: libc::POLLIN, revents: 0 },
    ];
    // SAFETY: two pollfds that live on our stack.
    match unsafe { libc::poll(p.as_mut_ptr(), 2, ms) } {
        n if n >= 0 => Ok((p[0].revents != 0, p[1].revents != 0)),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok((false, false)),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair(stop: &AtomicBool) -> (Wire<'_>, Wire<'_>) {
        let (a, b) = UnixStream::pair().unwrap();
        let wire = |s: UnixStream| {
            let again = s.try_clone().unwrap();
            Wire::new(s.into(), again.into(), "the other side", stop).unwrap()
        };
        (wire(a), wire(b))
    }

    #[test]
    fn work_that_takes_longer_than_patience_is_waited_for_and_silence_is_not() {
        let stop = AtomicBool::new(false);
        let (mut a, mut b) = pair(&stop);
        a.silence = Duration::from_millis(200);
        b.silence = Duration::from_millis(200);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Not asleep, but at work until the other side's patience is over several times.
                let start = Instant::now();
                b.busy(|| {
                    while start.elapsed() < Duration::from_secs(1) {
                        std::thread::yield_now();
                    }
                });
                b.send(&7).unwrap();
            });
            assert_eq!(a.receive::<u32>().unwrap(), 7);
        });
        assert_eq!(a.receive_frame().unwrap_err().kind(), Kind::Timeout);
        // It takes nothing either: what fits is sent, and no more.
        let sent = std::iter::repeat_with(|| a.send_data(&[1; 65536])).find_map(Result::err);
        assert_eq!(sent.unwrap().kind(), Kind::Timeout);
    }

    #[test]
    fn signs_of_work_and_single_bytes_are_not_waited_for_without_end() {
        let stop = AtomicBool::new(false);
        let tell_for_ever = |b: &Wire| while b.send_frame(Frame::Working).is_ok() {};
        // A frame that never comes to its end, byte by byte.
        let drip_for_ever = |b: &Wire| {
            b.output().write_all(&message::header(b'F', 16 << 20)).unwrap();
            while b.write(&b.output(), b"x").is_ok() {}
        };
        let ways: [&(dyn Fn(&Wire) + Sync); 2] = [&tell_for_ever, &drip_for_ever];
        for (i, way) in ways.into_iter().enumerate() {
            let (a, b) = pair(&stop);
            let a = a.waiting_for(SILENCE, Duration::from_millis(200));
            std::thread::scope(|scope| {
                scope.spawn(|| way(&b));
                let e = a.receive_frame().unwrap_err();
                assert!(e.kind() == Kind::Timeout && e.report().contains("nothing"), "{i}: {e}");
                // Nor by one who only looks whether there is something.
                if i == 0 {
                    let e = std::iter::repeat_with(|| a.waiting()).find_map(Result::err);
                    assert_eq!(e.unwrap().kind(), Kind::Timeout);
                }
                drop(a);
            });
        }
        // What takes us long is not the other side's, and the other side is waited for again when something came of it.
        let (a, b) = pair(&stop);
        let a = a.waiting_for(SILENCE, Duration::from_millis(50));
        let start = Instant::now();
        a.busy(|| {
            while start.elapsed() < Duration::from_millis(200) {
                std::thread::yield_now();
            }
        });
        assert!(!a.patience().left().is_zero());
        drop(b);
    }

    /// Zeros of holes are short to send and long to hash.
    #[test]
    fn one_that_takes_nothing_since_it_is_at_work_is_waited_for_and_nothing_else_that_it_says_is_lost()
     {
        let stop = AtomicBool::new(false);
        let (a, b) = pair(&stop);
        let a = a.waiting_for(Duration::from_secs(1), SILENCE);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Longer than its silence would be waited for, without taking anything.
                let start = Instant::now();
                while start.elapsed() < Duration::from_secs(2) {
                    b.send_frame(Frame::Working).unwrap();
                }
                b.send(&7).unwrap();
                while matches!(b.receive_frame(), Ok(Frame::Data(_))) {}
            });
            // More than lies between.
            for _ in 0..64 {
                a.send_data(&[1; 65536]).unwrap();
            }
            assert_eq!(a.receive::<u32>().unwrap(), 7);
            drop(a);
        });
        // Its signs come to an end all the same, and so does its silence.
        for (signs, silence, patience) in
            [(true, SILENCE, 200), (false, Duration::from_millis(200), 100_000)]
        {
            let (a, b) = pair(&stop);
            let a = a.waiting_for(silence, Duration::from_millis(patience));
            std::thread::scope(|scope| {
                scope.spawn(|| while signs && b.send_frame(Frame::Working).is_ok() {});
                let full =
                    std::iter::repeat_with(|| a.send_data(&[1; 65536])).find_map(Result::err);
                let e = full.unwrap();
                assert!(e.kind() == Kind::Timeout && e.report().contains("nothing"), "{e}");
                drop(a);
            });
        }
        // One that ends, or says what is no frame.
        let (a, b) = pair(&stop);
        b.output().write_all(b"W\0").unwrap();
        drop(b);
        let full = std::iter::repeat_with(|| a.send_data(&[1; 65536])).find_map(Result::err);
        assert_eq!(full.unwrap().kind(), Kind::Peer);
    }

    #[test]
    fn the_end_of_the_other_side_nonsense_and_a_signal_end_the_wait() {
        let stop = AtomicBool::new(false);
        let (a, b) = pair(&stop);
        b.output().write_all(b"Welcome to this host!").unwrap();
        assert_eq!(a.receive_frame().unwrap_err().kind(), Kind::Peer);
        let (a, b) = pair(&stop);
        b.send(&1).unwrap();
        b.output().write_all(b"M\0\0").unwrap();
        drop(b);
        assert_eq!(a.receive::<u32>().unwrap(), 1);
        assert_eq!(a.receive_frame().unwrap_err().kind(), Kind::Peer);
        assert_eq!(a.send_data(&[0; 10]).unwrap_err().kind(), Kind::Peer);
        let (a, _b) = pair(&stop);
        stop.store(true, Ordering::SeqCst);
        assert_eq!(a.receive_frame().unwrap_err().kind(), Kind::Interrupted);
    }

    #[test]
    fn work_in_small_pieces_is_told_of_now_and_then() {
        let stop = AtomicBool::new(false);
        for (often, told) in [(Duration::ZERO, 3), (SILENCE * 1000, 1)] {
            let (a, b) = pair(&stop);
            let b = b.waiting_for(often, SILENCE);
            for _ in 0..3 {
                b.sign().unwrap();
            }
            b.send(&7).unwrap();
            for _ in 0..told {
                assert_eq!(a.frame().unwrap(), Frame::Working);
            }
            assert_eq!(a.frame().unwrap(), Frame::message(&7).unwrap());
        }
    }

    #[test]
    fn a_message_is_found_behind_signs_of_work_and_none_is_no_wait() {
        let stop = AtomicBool::new(false);
        let (a, b) = pair(&stop);
        assert_eq!(a.waiting().unwrap(), None);
        b.send_frame(Frame::Working).unwrap();
        assert_eq!(a.waiting().unwrap(), None);
        b.send_frame(Frame::Working).unwrap();
        b.send(&3).unwrap();
        assert_eq!(a.waiting().unwrap(), Some(Frame::message(&3).unwrap()));
    }
}
