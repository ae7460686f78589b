//! The receiver: answers each request, and trusts none. What it writes is decided by [`super::store`].
//!
//! It holds the directory's lock, so a sender gets time for what comes of it alone: bytes of images, and images that
//! become files. Requests, refused bytes and signs of work earn nothing ([`super::patience`]); and only so many images
//! may come to nothing.

use std::collections::HashSet;
use std::path::PathBuf;

use super::message::{self, Answer, Frame, MOST_NAMES, MOST_NEEDS, Needed, Request, VERSION};
use super::name::{FolderPath, SmallKind, WireName};
use super::store::{Incoming, Store, Whole};
use super::wire::Wire;
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;

/// How many images may come to nothing in a run: begun and given up, or not what was said. Whoever sends has read
/// each of them to its end and found it damaged, or it was changed meanwhile.
const MOST_LOST: u32 = 1000;

/// Where it all goes: made, locked and tidied up by whoever has the command line.
pub(crate) trait Place {
    /// Opens it for a run; gives its path, and how new files are shared. `None`: it is not there, and is not made,
    /// since nothing is to be changed.
    ///
    /// # Errors
    /// Why it cannot be written to.
    fn open(&mut self, dry_run: bool) -> Result<Option<(PathBuf, FileMode)>>;

    /// What is done after the last file; gives how many points it deleted, and their bytes.
    ///
    /// # Errors
    /// Why not.
    fn close(&mut self) -> Result<(u64, u64)>;
}

/// A receiver at work.
struct Receiver<'a, 'b> {
    wire: &'a Wire<'b>,
    store: Option<Store>,
    dry_run: bool,
    whole: Option<Whole>,
    /// Images that came to nothing.
    lost: u32,
    /// Files of ours that the sender was told to compare with its own: it gets the time for each once.
    looked: HashSet<FileKey>,
    /// Images of ours that were read since the sender has their manifest: that is done once.
    adopted: HashSet<FileKey>,
}

/// A hash of a folder and a name: they may be long, and there may be many.
type FileKey = [u8; 32];

fn key(folder: &FolderPath, name: &WireName) -> FileKey {
    let path = folder.path().join(name.as_os_str());
    *blake3::hash(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())).as_bytes()
}

/// Answers until the sender has said its last word.
///
/// # Errors
/// `Peer` if it does not keep to the protocol or is gone, `Timeout`, `Interrupted`. All else is told to the sender.
pub(crate) fn serve(wire: &Wire, place: &mut dyn Place) -> Result<()> {
    let Request::Hello { version, program, dry_run } = wire.receive()? else {
        return Err(message::nonsense());
    };
    let opened = check_version(version, &program).and_then(|()| wire.busy(|| place.open(dry_run)));
    let opened =
        opened.and_then(|found| found.map(|(root, share)| Store::open(&root, share)).transpose());
    let store = match opened {
        Ok(store) => store,
        // Whoever called tells it.
        Err(e) => return wire.send(&Answer::failed(&e)),
    };
    wire.send(&Answer::Hello { version: VERSION, program: program_name() })?;
    let (looked, adopted) = (HashSet::new(), HashSet::new());
    let mut receiver = Receiver { wire, store, dry_run, whole: None, lost: 0, looked, adopted };
    loop {
        let request = wire.receive()?;
        wire.patience().settle();
        match request {
            Request::Bye => break,
            request => receiver.serve(request)?,
        }
    }
    drop(receiver);
    let answer = match wire.busy(|| if dry_run { Ok((0, 0)) } else { place.close() }) {
        Ok((deleted, freed)) => Answer::Ended { deleted, freed },
        Err(e) => Answer::failed(&e),
    };
    wire.send(&answer)
}

/// What this program is called by the other side.
pub(crate) fn program_name() -> String {
    format!("fleecefs {}", env!("CARGO_PKG_VERSION"))
}

/// Fails if the other side speaks another version of the protocol.
///
/// # Errors
/// `Unsupported`.
pub(crate) fn check_version(theirs: u32, program: &str) -> Result<()> {
    if theirs == VERSION {
        return Ok(());
    }
    let program: String = program.chars().take(80).collect();
    let what = format!(
        "{} speaks version {VERSION} of the protocol, the other side ({program}) version {theirs}",
        program_name()
    );
    Err(Error::new(Kind::Unsupported, what).remedy("install the same version on both hosts"))
}

impl Receiver<'_, '_> {
    /// Answers one request. An error of this function ends the connection; all others are answers.
    fn serve(&mut self, request: Request) -> Result<()> {
        let answer = match request {
            Request::Image { folder, name, size, modified, verify } => {
                let may_begin = self.check_lost();
                let begin = |s: &Store| s.begin(&folder, &name, size, modified);
                let begun = may_begin.and_then(|()| self.store()).and_then(begin);
                return self.image(begun, verify);
            }
            Request::Commit { manifest, needs } => {
                let manifest = manifest.then(|| self.wire.receive_whole()).transpose()?;
                self.commit(manifest.as_deref(), &needs).map(|()| Answer::Done)
            }
            Request::Adopt { folder, name, blake3, needs } => {
                let manifest = self.wire.receive_whole()?;
                self.adopt((folder, name), &blake3, &manifest, &needs).map(|()| Answer::Done)
            }
            Request::Small { folder, kind, name } => {
                let bytes = self.wire.receive_whole()?;
                self.small(&folder, kind, &name, &bytes).map(|()| Answer::Done)
            }
            Request::CheckId { folder, id } => match &self.store {
                Some(store) => store.check_id(&folder, &id).map(|()| Answer::Done),
                None => Ok(Answer::Done),
            },
            Request::Ask { folder, names, look } => self.ask(&folder, names, look),
            Request::Hello { .. } | Request::Part { .. } | Request::Bye => {
                return Err(message::nonsense());
            }
        };
        self.wire.send(&answer.unwrap_or_else(|e| Answer::failed(&e)))
    }

    /// The directory, where it may be written to.
    fn store(&self) -> Result<&Store> {
        let refused = || Error::new(Kind::Permission, "this is a dry run: nothing is written");
        self.store.as_ref().filter(|_| !self.dry_run).ok_or_else(refused)
    }

    fn ask(&mut self, folder: &FolderPath, names: Vec<WireName>, look: bool) -> Result<Answer> {
        if names.len() > MOST_NAMES {
            return Err(Error::new(Kind::Unsupported, "too many names at once"));
        }
        let files = match &self.store {
            Some(store) => self.wire.busy(|| store.held(folder, &names, look))?,
            None => vec![None; names.len()],
        };
        for (name, held) in names.iter().zip(&files).filter(|_| look) {
            // It reads its own file of that name and size, and perhaps all of it.
            let Some(held) = held.as_ref().filter(|h| h.is_file) else { continue };
            if self.looked.insert(key(folder, name)) {
                self.wire.patience().allow(1, held.size);
            }
        }
        Ok(Answer::Held { files })
    }

    /// Fails once too many images have come to nothing.
    fn check_lost(&self) -> Result<()> {
        if self.lost < MOST_LOST {
            return Ok(());
        }
        let what = format!("{MOST_LOST} images have come to nothing: this run gets no more");
        Err(Error::new(Kind::Peer, what)
            .remedy("see what is wrong with them: 'fleecefs verify SRC'"))
    }

    /// An image that was begun has come to its end: it is a point now, or nothing.
    fn ended(&mut self, is_point: bool) {
        match is_point {
            true => self.wire.patience().renew(),
            false => self.lost = self.lost.saturating_add(1),
        }
    }

    /// Gives an image that is there its manifest. Where that comes to nothing, or was done before, no time is earned.
    fn adopt(
        &mut self,
        place: (FolderPath, WireName),
        blake3: &str,
        manifest: &[u8],
        needs: &[Needed],
    ) -> Result<()> {
        self.check_lost()?;
        check_few(needs)?;
        if self.adopted.contains(&key(&place.0, &place.1)) {
            let what = "this image was asked for before in this run: it is not read again";
            self.ended(false);
            return Err(Error::new(Kind::Unsupported, what).at_path(place.1.as_os_str()));
        }
        let stop = || self.wire.check_stop();
        let adopt = |s: &Store| s.adopt((&place.0, &place.1), blake3, manifest, needs, &stop);
        let adopted = self.wire.busy(|| self.store().and_then(adopt));
        self.adopted.insert(key(&place.0, &place.1));
        self.ended(matches!(adopted, Ok(true)));
        adopted.map(drop)
    }

    /// Takes an image's bytes to their end; those of one that failed are passed over.
    fn image(&mut self, begun: Result<Incoming>, verify: bool) -> Result<()> {
        if self.whole.take().is_some() {
            self.ended(false);
        }
        let mut incoming = match begun {
            Ok(incoming) => Some(incoming),
            Err(e) => {
                self.wire.send(&Answer::failed(&e))?;
                None
            }
        };
        let mut told = incoming.is_none();
        let last = loop {
            let frame = self.wire.receive_frame()?;
            let taken = match (&frame, &mut incoming) {
                (Frame::Data(bytes), Some(image)) => {
                    image.data(bytes).map(|()| self.wire.patience().moved(bytes.len() as u64))
                }
                (Frame::Hole(len), Some(image)) => {
                    image.hole(*len).map(|()| self.wire.patience().passed(*len))
                }
                (Frame::Data(_) | Frame::Hole(_), None) => Ok(()),
                _ => break frame,
            };
            // Hashing the zeros of many holes takes long.
            self.wire.sign()?;
            if let Err(e) = taken {
                incoming = None;
                self.ended(false);
                if !told {
                    self.wire.send(&Answer::failed(&e))?;
                    told = true;
                }
            }
        };
        match message::parse(last)? {
            Request::Part { blake3 } => self.part(incoming, blake3, verify, told),
            _ => Err(message::nonsense()),
        }
    }

    /// The end of an image. What failed was told already; then nothing waits for another answer.
    fn part(
        &mut self,
        incoming: Option<Incoming>,
        blake3: Option<String>,
        verify: bool,
        told: bool,
    ) -> Result<()> {
        let Some(incoming) = incoming.filter(|_| !told) else { return Ok(()) };
        let Some(blake3) = blake3 else {
            self.ended(false);
            return self.wire.send(&Answer::Done);
        };
        let stop = || self.wire.check_stop();
        let answer = match self.wire.busy(|| incoming.complete(&blake3, verify, &stop)) {
            Ok(whole) => {
                self.whole = Some(whole);
                Answer::Done
            }
            Err(e) => {
                self.ended(false);
                Answer::failed(&e)
            }
        };
        self.wire.send(&answer)
    }

    fn commit(&mut self, manifest: Option<&[u8]>, needs: &[Needed]) -> Result<()> {
        let missing = || Error::new(Kind::Incomplete, "no image was received before this");
        let whole = self.whole.take().ok_or_else(missing)?;
        let commit = |store: &Store| self.wire.busy(|| store.commit(whole, manifest, needs));
        let committed = check_few(needs).and_then(|()| self.store()).and_then(commit);
        self.ended(committed.is_ok());
        committed
    }

    fn small(
        &self,
        folder: &FolderPath,
        kind: SmallKind,
        name: &WireName,
        bytes: &[u8],
    ) -> Result<()> {
        self.store()?.small(folder, kind, name, bytes)
    }
}

fn check_few(needs: &[Needed]) -> Result<()> {
    match needs.len() > MOST_NEEDS {
        true => Err(Error::new(Kind::Unsupported, "an image that needs too many others at once")),
        false => Ok(()),
    }
}
