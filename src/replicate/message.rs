//! What the two sides say: frames, and the messages in them. Pure: any bytes are valid input.
//!
//! A frame is one byte for its kind, four for its length (big-endian), and that many bytes. The sender asks, the
//! receiver answers each request once; data, holes and [`Request::Part`] alone have no answer. While one side works
//! for long on something it sends [`Frame::Working`], so that the other can tell work from a dead peer.

use serde::{Deserialize, Serialize};

use super::name::{FolderPath, SmallKind, WireName};
use crate::error::{Error, Kind, Result};

/// The protocol's version. Both sides must have the same.
pub(crate) const VERSION: u32 = 1;
/// Bytes of a frame before its contents.
pub(crate) const HEADER: usize = 5;
/// Names in one [`Request::Ask`]: with the longest names it is far below a message's limit.
pub(crate) const MOST_NAMES: usize = 256;
/// The most images that another one needs at once.
pub(crate) const MOST_NEEDS: usize = 64;
/// The longest hole in one frame: hashing its zeros takes less than a second, after which the other side hears of us.
pub(crate) const LONGEST_HOLE: u64 = 1 << 30;
/// The most bytes of an image in one frame.
pub(crate) const LONGEST_DATA: usize = 1 << 20;
/// The longest message in bytes.
const LONGEST_MESSAGE: usize = 1 << 20;
/// The longest small file, or manifest, in bytes.
const LONGEST_WHOLE: usize = 16 << 20;
/// The longest text of the other side that is shown, in bytes.
const LONGEST_TEXT: usize = 2000;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A message: JSON.
    Message(Vec<u8>),
    /// The next bytes of an image.
    Data(Vec<u8>),
    /// So many zeros that are a hole in the image.
    Hole(u64),
    /// A whole small file, or a manifest.
    Whole(Vec<u8>),
    /// Nothing to say yet.
    Working,
}

impl Frame {
    /// A message as a frame.
    ///
    /// # Errors
    /// `Io` if it has no form in JSON.
    pub(crate) fn message<T: Serialize>(message: &T) -> Result<Frame> {
        let bytes = crate::text::json(message).map(String::into_bytes);
        let bytes = bytes.map_err(|e| Error::new(Kind::Io, "cannot write JSON").with_source(e))?;
        Ok(Frame::Message(bytes))
    }

    /// What stands before its contents, and these.
    pub(crate) fn into_parts(self) -> ([u8; HEADER], Vec<u8>) {
        let (kind, body) = match self {
            Frame::Message(bytes) => (b'M', bytes),
            Frame::Data(bytes) => (b'D', bytes),
            Frame::Hole(len) => (b'H', len.to_be_bytes().to_vec()),
            Frame::Whole(bytes) => (b'F', bytes),
            Frame::Working => (b'W', Vec::new()),
        };
        (header(kind, body.len()), body)
    }

    /// How many bytes follow a header.
    ///
    /// # Errors
    /// `Peer` if it is no header, or of a frame that is too long.
    pub(crate) fn length(header: [u8; HEADER]) -> Result<usize> {
        let [kind, a, b, c, d] = header;
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        let fits = match kind {
            b'M' => len <= LONGEST_MESSAGE,
            b'D' => (1..=LONGEST_DATA).contains(&len),
            b'H' => len == 8,
            b'F' => len <= LONGEST_WHOLE,
            b'W' => len == 0,
            _ => false,
        };
        match fits {
            true => Ok(len),
            false => Err(nonsense()),
        }
    }

    /// The frame of a header that [`Frame::length`] has passed, and its contents.
    ///
    /// # Errors
    /// `Peer` if it is none.
    pub(crate) fn of(header: [u8; HEADER], body: Vec<u8>) -> Result<Frame> {
        Ok(match header[0] {
            b'M' => Frame::Message(body),
            b'D' => Frame::Data(body),
            b'F' => Frame::Whole(body),
            b'W' => Frame::Working,
            b'H' => {
                let bytes = <[u8; 8]>::try_from(body.as_slice()).map_err(|_| nonsense())?;
                match u64::from_be_bytes(bytes) {
                    len if (1..=LONGEST_HOLE).contains(&len) => Frame::Hole(len),
                    _ => return Err(nonsense()),
                }
            }
            _ => return Err(nonsense()),
        })
    }
}

/// What stands before `len` bytes of a frame.
pub(crate) fn header(kind: u8, len: usize) -> [u8; HEADER] {
    let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [kind, a, b, c, d]
}

/// What is said of a peer that does not keep to the protocol.
pub(crate) fn nonsense() -> Error {
    Error::new(Kind::Peer, "the other side does not speak this protocol")
        .remedy("is it 'fleecefs replicate', and does its login print nothing?")
}

/// A message out of a frame.
///
/// # Errors
/// `Peer` if it is none.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(frame: Frame) -> Result<T> {
    match frame {
        Frame::Message(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| nonsense().with_source(e))
        }
        _ => Err(nonsense()),
    }
}

/// When a file was last written to: seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Modified {
    /// Seconds.
    pub seconds: u64,
    /// Nanoseconds after the full second.
    pub nanos: u32,
}

impl Modified {
    /// As the kernel tells it; `None` for a time before 1970.
    pub(crate) fn from_parts(seconds: i64, nanos: i64) -> Option<Self> {
        let nanos = u32::try_from(nanos).ok()?;
        Some(Modified { seconds: u64::try_from(seconds).ok()?, nanos })
    }

    /// Whether a copy has this time, as far as its file system can keep it: some have whole seconds, FAT every other.
    pub(crate) fn is(self, copy: Modified) -> bool {
        self == copy || (copy.nanos == 0 && self.seconds.abs_diff(copy.seconds) <= 2)
    }
}

/// An image that the receiver must have for another to be right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Needed {
    /// The folder.
    pub folder: FolderPath,
    /// The image.
    pub name: WireName,
    /// Its fingerprint, as manifests have it.
    pub fingerprint: String,
}

/// What the sender asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// The first one.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// The sender's program, for messages.
        program: String,
        /// Whether nothing is to be changed.
        dry_run: bool,
    },
    /// Whether this may be the id of that folder.
    CheckId {
        /// The folder.
        folder: FolderPath,
        /// The text of its file `uuid`.
        id: String,
    },
    /// What there is under these names, at most [`MOST_NAMES`].
    Ask {
        /// The folder.
        folder: FolderPath,
        /// The names.
        names: Vec<WireName>,
        /// Whether to look into the files.
        look: bool,
    },
    /// An image comes: data and holes, then [`Request::Part`].
    Image {
        /// The folder.
        folder: FolderPath,
        /// The image.
        name: WireName,
        /// Its length in bytes.
        size: u64,
        /// When it was last written to.
        modified: Modified,
        /// Whether it is to be read back once it is on disk.
        verify: bool,
    },
    /// What follows an image's bytes: with its hash it is complete, without it is dropped.
    Part {
        /// BLAKE3 of all of it, in hexadecimal.
        blake3: Option<String>,
    },
    /// The complete image gets its name, and then its manifest, which follows as a whole file if there is one.
    Commit {
        /// Whether a manifest follows.
        manifest: bool,
        /// What must be there, and the same.
        needs: Vec<Needed>,
    },
    /// An image that is there without a manifest gets one, which follows, if it has this hash.
    Adopt {
        /// The folder.
        folder: FolderPath,
        /// The image.
        name: WireName,
        /// BLAKE3 of all of it, in hexadecimal.
        blake3: String,
        /// What must be there, and the same.
        needs: Vec<Needed>,
    },
    /// A small file, which follows.
    Small {
        /// The folder of the images that it belongs to.
        folder: FolderPath,
        /// What it is.
        kind: SmallKind,
        /// Its name.
        name: WireName,
    },
    /// The last one.
    Bye,
}

/// What the receiver has under a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// Whether it is a plain file; if not, the rest says nothing.
    pub is_file: bool,
    /// Its length in bytes.
    pub size: u64,
    /// Whether it has a manifest.
    pub manifest: bool,
    /// The hash in that.
    pub blake3: Option<String>,
    /// The fingerprint of the file, if it was looked into.
    pub fingerprint: Option<String>,
    /// When it was last written to: as its source was, if nobody has written to it.
    #[serde(default)]
    pub modified: Option<Modified>,
}

/// What the receiver answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// To the first request.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// The receiver's program, for messages.
        program: String,
    },
    /// What there is, in the order of the names.
    Held {
        /// For each name.
        files: Vec<Option<Held>>,
    },
    /// It is done, and on disk.
    Done,
    /// To the last request: what the receiver's rules of retention deleted.
    Ended {
        /// How many points.
        deleted: u64,
        /// How many bytes.
        freed: u64,
    },
    /// It could not be done.
    Failed {
        /// As an error has it.
        kind: Kind,
        /// What failed and why, without the file.
        message: String,
        /// The file.
        path: Option<String>,
        /// What the user can do.
        remedy: Option<String>,
    },
}

impl Answer {
    /// An error as an answer.
    pub(crate) fn failed(e: &Error) -> Answer {
        // Causes are part of the message, as JSON has it.
        let flat = crate::error::Finding::from_error(e, "");
        let path = Some(flat.path).filter(|p| !p.as_os_str().is_empty());
        Answer::Failed {
            kind: e.kind(),
            message: short(&flat.message),
            path: path.map(|p| short(&crate::text::to_text(p.as_os_str()))),
            remedy: flat.remedy.as_deref().map(short),
        }
    }

    /// The error that it says, if it does. Its texts are the other side's: bounded here, and made visible where they
    /// are shown.
    ///
    /// # Errors
    /// What the receiver said.
    pub(crate) fn checked(self) -> Result<Answer> {
        let Answer::Failed { kind, message, path, remedy } = self else { return Ok(self) };
        let mut error = Error::new(meant(kind), short(&message));
        if let Some(path) = path {
            error = error.at_path(short(&path));
        }
        Err(match remedy {
            Some(remedy) => error.remedy(short(&remedy)),
            None => error,
        })
    }
}

/// What the other side can mean by a kind of error. What is about this side (its user, its findings) is
/// not for the other one to say: exit codes follow from it.
fn meant(kind: Kind) -> Kind {
    match kind {
        Kind::Usage
        | Kind::NotFound
        | Kind::Exists
        | Kind::Permission
        | Kind::Busy
        | Kind::NoSpace
        | Kind::Io
        | Kind::Corrupt
        | Kind::Truncated
        | Kind::Unsupported
        | Kind::Encrypted
        | Kind::Incomplete
        | Kind::Changed
        | Kind::Peer => kind,
        Kind::Timeout
        | Kind::Interrupted
        | Kind::Partial
        | Kind::Skipped
        | Kind::Unsound
        | Kind::Unproven => Kind::Peer,
    }
}

fn short(text: &str) -> String {
    let mut end = LONGEST_TEXT.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn back(frame: &Frame) -> Result<Frame> {
        let (header, body) = frame.clone().into_parts();
        assert_eq!(Frame::length(header)?, body.len());
        Frame::of(header, body)
    }

    #[test]
    fn frames_come_back_and_too_long_ones_do_not() {
        let good = [
            Frame::Message(b"{}".to_vec()),
            Frame::Data(vec![7; LONGEST_DATA]),
            Frame::Hole(LONGEST_HOLE),
            Frame::Whole(Vec::new()),
            Frame::Working,
        ];
        for frame in good {
            assert_eq!(back(&frame).unwrap(), frame);
        }
        for frame in [Frame::Hole(0), Frame::Hole(LONGEST_HOLE + 1), Frame::Data(Vec::new())] {
            assert!(back(&frame).is_err(), "{frame:?}");
        }
        for (kind, len) in [(b'M', LONGEST_MESSAGE), (b'D', LONGEST_DATA), (b'F', LONGEST_WHOLE)] {
            assert!(Frame::length(header(kind, len)).is_ok());
            let e = Frame::length(header(kind, len + 1)).unwrap_err();
            assert_eq!(e.kind(), Kind::Peer);
        }
    }

    #[test]
    fn an_error_comes_over_with_its_kind_and_remedy_and_no_more_than_fits() {
        let e =
            Error::new(Kind::NoSpace, "é".repeat(LONGEST_TEXT)).at_path("/x").remedy("make room");
        let Answer::Failed { message, .. } = Answer::failed(&e) else { panic!("no failure") };
        assert!(message.len() <= LONGEST_TEXT);
        let there = Answer::failed(&e).checked().unwrap_err();
        assert_eq!((there.kind(), there.remedy_text()), (Kind::NoSpace, Some("make room")));
        assert_eq!(there.path(), Some(std::path::Path::new("/x")));
    }

    #[test]
    fn what_is_about_this_side_the_other_one_cannot_say() {
        let there = |kind| Answer::failed(&Error::new(kind, "no")).checked().unwrap_err().kind();
        for kind in [Kind::Exists, Kind::Permission, Kind::Busy, Kind::NoSpace, Kind::Changed] {
            assert_eq!(there(kind), kind);
        }
        for kind in [Kind::Interrupted, Kind::Partial, Kind::Unsound, Kind::Timeout] {
            assert_eq!(there(kind), Kind::Peer, "{kind:?}");
        }
    }

    #[test]
    fn the_longest_question_and_its_answer_fit_into_a_message() {
        let name = WireName::of(std::os::unix::ffi::OsStrExt::from_bytes(&[255; 255])).unwrap();
        let folder = FolderPath::try_from(vec![name.clone(); 8]).unwrap();
        let ask = Request::Ask { folder, names: vec![name; MOST_NAMES], look: true };
        let held = Held {
            is_file: true,
            size: u64::MAX,
            manifest: true,
            blake3: Some("f".repeat(64)),
            fingerprint: Some("f".repeat(32)),
            modified: None,
        };
        let answer = Answer::Held { files: vec![Some(held); MOST_NAMES] };
        back(&Frame::message(&ask).unwrap()).unwrap();
        back(&Frame::message(&answer).unwrap()).unwrap();
    }

    proptest! {
        #![proptest_config(crate::failpoint::properties(2000))]

        #[test]
        fn any_bytes_are_a_frame_within_its_limits_or_an_error(
            header in any::<[u8; HEADER]>(), body in proptest::collection::vec(any::<u8>(), 0..64)
        ) {
            if let Ok(len) = Frame::length(header) {
                prop_assert!(len <= LONGEST_WHOLE);
            }
            if let Ok(frame) = Frame::of(header, body) {
                let _ = parse::<Request>(frame.clone());
                let _ = parse::<Answer>(frame);
            }
        }

        #[test]
        fn any_text_is_a_message_or_an_error(text in "\\{\"(ask|image|small|commit|held|failed)\":.{0,80}\\}?") {
            let frame = Frame::Message(text.into_bytes());
            let _ = parse::<Request>(frame.clone());
            let _ = parse::<Answer>(frame);
        }

        #[test]
        fn whatever_is_named_stays_below_the_directory(names in proptest::collection::vec(".{0,6}", 0..5)) {
            let text = serde_json::to_string(&names).unwrap();
            if let Ok(folder) = serde_json::from_str::<FolderPath>(&text) {
                let plain = |c: std::path::Component| matches!(c, std::path::Component::Normal(_));
                prop_assert!(folder.path().components().all(plain));
                prop_assert_eq!(folder.path().components().count(), names.len());
            }
        }
    }
}
