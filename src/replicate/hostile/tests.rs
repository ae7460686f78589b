//! Tables of lies: what each side may do wrong, one by one, and that it gains nothing, and no time.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::Duration;

use crate::backup::publish;
use crate::chain;
use crate::chain::scan::{ScanOptions, scan};
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;
use crate::job::Work;
use crate::manifest;
use crate::replicate::message::{Answer, Frame, Modified, Request, VERSION};
use crate::replicate::name::SmallKind;
use crate::replicate::receive::{Place, serve};
use crate::replicate::report::Report;
use crate::replicate::send::{Options, send};
use crate::replicate::tests::{
    Plain, Target, answer, commits, disk, files, hash, image, name, pair, sends,
};
use crate::replicate::wire::Wire;

/// What nobody waits for in these tests, and how long somebody is waited for of whom nothing comes.
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_secs(2);

/// The sides of a connection: a wire of the test's own, and the bytes of the same.
struct Ours {
    wire: Wire<'static>,
    bytes: UnixStream,
}

/// No test stops by a signal.
static STOP: AtomicBool = AtomicBool::new(false);

/// A connection whose other side waits so long for what nothing comes of.
fn connected(patience: Duration) -> (Ours, Wire<'static>) {
    let (a, b) = UnixStream::pair().unwrap();
    let wire = |s: &UnixStream| {
        let again = || s.try_clone().unwrap().into();
        Wire::new(again(), again(), "the other side", &STOP).unwrap().waiting_for(LONG, LONG)
    };
    (Ours { wire: wire(&a), bytes: a }, wire(&b).waiting_for(LONG, patience))
}

/// A way not to play by the rules, after the first words.
type Lie = fn(&Ours);

/// Sends a frame again and again until nobody takes it.
fn for_ever(ours: &Ours, frame: &Frame) {
    while ours.wire.send_frame(frame.clone()).is_ok() {}
}

/// Asks again and again until there is no answer.
fn ask_for_ever(ours: &Ours, request: &Request, file: Option<&[u8]>) {
    let ask = || {
        ours.wire.send(request)?;
        file.map_or(Ok(()), |f| ours.wire.send_frame(Frame::Whole(f.to_vec())))?;
        ours.wire.receive::<Answer>()
    };
    while ask().is_ok() {}
}

/// An image that is there, without a manifest.
const THERE: &[u8] = b"there";

/// Says again and again that the image which is there has these bytes, and what its manifest is.
fn adopt_for_ever(ours: &Ours, bytes: &[u8]) {
    let mut m = manifest::tests::example("FULL-9-there", crate::layout::Level::Full, None);
    m.file_size = THERE.len() as u64;
    let text = serde_json::to_vec(&m).unwrap();
    let blake3 = blake3::hash(bytes).to_hex().to_string();
    let (folder, name) = (disk(), name("FULL-9-there"));
    ask_for_ever(ours, &Request::Adopt { folder, name, blake3, needs: Vec::new() }, Some(&text));
}

fn raw(ours: &Ours, bytes: &[u8]) {
    (&ours.bytes).write_all(bytes).unwrap();
}

fn huge() -> Request {
    let modified = Modified { seconds: 1, nanos: 0 };
    Request::Image {
        folder: disk(),
        name: name("FULL-1-sda"),
        size: 1 << 40,
        modified,
        verify: false,
    }
}

/// What is cut, wrong or out of order: the session ends at once, and it is the sender's fault.
const WRONG: [(&str, Lie); 15] = [
    ("nothing", |_| {}),
    ("a header that is cut", |o| raw(o, b"M\0\0")),
    ("a message that is cut", |o| raw(o, b"M\0\0\0\x64{\"image\"")),
    ("a frame of no kind", |o| raw(o, b"X\0\0\0\0")),
    ("a message of 4 GiB", |o| raw(o, b"M\xff\xff\xff\xff")),
    ("a hole of no length", |o| raw(o, b"H\0\0\0\x08\0\0\0\0\0\0\0\0")),
    ("a sign of work that says something", |o| raw(o, b"W\0\0\0\x01x")),
    ("the first word twice", |o| {
        o.wire
            .send(&Request::Hello { version: VERSION, program: "x".into(), dry_run: false })
            .unwrap();
    }),
    ("an answer", |o| o.wire.send(&Answer::Done).unwrap()),
    ("the end of no image", |o| o.wire.send(&Request::Part { blake3: hash(b"") }).unwrap()),
    ("bytes of no image", |o| o.wire.send_data(b"x").unwrap()),
    ("a hole in no image", |o| o.wire.send_frame(Frame::Hole(1)).unwrap()),
    ("a file that nobody asked for", |o| o.wire.send_frame(Frame::Whole(Vec::new())).unwrap()),
    ("an image within an image", |o| {
        o.wire.send(&image("FULL-1-sda", 5)).unwrap();
        o.wire.send(&image("FULL-2-sda", 5)).unwrap();
    }),
    ("a manifest that does not follow", |o| {
        assert_eq!(sends(&o.wire, "FULL-1-sda", b"x"), None);
        o.wire.send(&Request::Commit { manifest: true, needs: Vec::new() }).unwrap();
        o.wire.send(&Request::Bye).unwrap();
    }),
];

/// What never ends, and nothing comes of: signs of work, bytes that were refused, questions, files that are there.
const ENDLESS: [(&str, Lie); 11] = [
    ("work", |o| for_ever(o, &Frame::Working)),
    ("work in an image", |o| {
        o.wire.send(&huge()).unwrap();
        for_ever(o, &Frame::Working);
    }),
    ("the smallest holes", |o| {
        o.wire.send(&huge()).unwrap();
        for_ever(o, &Frame::Hole(1));
    }),
    ("bytes of an image that was refused", |o| {
        o.wire.send(&image("uuid", 5)).unwrap();
        for_ever(o, &Frame::Data(vec![7; 65536]));
    }),
    ("questions", |o| {
        let ask = Request::Ask { folder: disk(), names: vec![name("FULL-1-sda")], look: true };
        ask_for_ever(o, &ask, None);
    }),
    ("work that is due to a question before the last one", |o| {
        let names = vec![name("FULL-8-large")];
        for look in [true, false] {
            o.wire.send(&Request::Ask { folder: disk(), names: names.clone(), look }).unwrap();
            let _ = o.wire.receive::<Answer>();
        }
        for_ever(o, &Frame::Working);
    }),
    ("ids", |o| ask_for_ever(o, &Request::CheckId { folder: disk(), id: "x".into() }, None)),
    ("descriptions", |o| {
        let kind = SmallKind::DiskConfig;
        let small = Request::Small { folder: disk(), kind, name: name("x.config") };
        ask_for_ever(o, &small, Some(b"x"));
    }),
    ("the manifest of an image that has it", |o| adopt_for_ever(o, THERE)),
    ("the manifest of another image", |o| adopt_for_ever(o, b"another")),
    ("images that are given up", |o| {
        let give_up = || {
            o.wire.send(&image("FULL-1-sda", 5))?;
            o.wire.send(&Request::Part { blake3: None })?;
            o.wire.receive::<Answer>()
        };
        while give_up().is_ok() {}
    }),
];

/// How a receiver ends to which this is said after the first words.
fn told(target: &Target, patience: Duration, lie: Lie) -> Result<()> {
    let (ours, its) = connected(patience);
    std::thread::scope(|scope| {
        let mut place = Plain(target.root.clone());
        let receiver = scope.spawn(move || serve(&its, &mut place));
        let hello = Request::Hello { version: VERSION, program: "x".into(), dry_run: false };
        let greeted = ours.wire.send(&hello).and_then(|()| ours.wire.receive::<Answer>());
        // On a host that stands still for so long it may have lost patience by now.
        if greeted.is_ok() {
            lie(&ours);
        }
        drop(ours);
        receiver.join().unwrap()
    })
}

#[test]
fn whatever_a_sender_does_wrong_ends_the_run_and_nothing_is_a_file() {
    for (what, lie) in WRONG {
        let target = Target::new();
        assert_eq!(told(&target, LONG, lie).unwrap_err().kind(), Kind::Peer, "{what}");
        assert_eq!(target.files(), Vec::<PathBuf>::new(), "{what}");
        assert_eq!(files(&target.outside), Vec::<PathBuf>::new(), "{what}");
    }
}

#[test]
fn a_sender_of_whom_nothing_comes_holds_the_directory_no_longer_than_patience_lasts() {
    std::thread::scope(|scope| {
        for (what, lie) in ENDLESS {
            scope.spawn(move || {
                let target = Target::new();
                std::fs::create_dir(target.root.join("sda")).unwrap();
                std::fs::write(target.root.join("sda/FULL-9-there"), THERE).unwrap();
                // Whoever is told to read it has an hour for that.
                let large = std::fs::File::create(target.root.join("sda/FULL-8-large")).unwrap();
                large.set_len(30 << 30).unwrap();
                // A receiver that has no end hangs here.
                let ended = told(&target, SHORT, lie);
                assert_eq!(ended.unwrap_err().kind(), Kind::Timeout, "{what}");
                let known = ["x.config", "FULL-8-large", "FULL-9-there", "FULL-9-there.json"];
                let images = target.files().into_iter();
                let images = images.filter(|f| !known.iter().any(|k| f.ends_with(k)));
                assert_eq!(images.collect::<Vec<_>>(), Vec::<PathBuf>::new(), "{what}");
            });
        }
    });
}

#[test]
fn images_may_come_to_nothing_so_many_times_and_one_is_committed_once() {
    let target = Target::new();
    let ended = told(&target, LONG, |o| {
        assert_eq!(sends(&o.wire, "FULL-1-sda", b"x"), None);
        assert_eq!(commits(&o.wire, None, Vec::new()), None);
        assert_eq!(commits(&o.wire, None, Vec::new()), Some(Kind::Incomplete));
        for n in 0..1000 {
            // Given up, not what was said, and followed by another instead of a commit.
            o.wire.send(&image("FULL-2-sda", 5)).unwrap();
            o.wire.send_data(b"12345").unwrap();
            let (blake3, want) = match n % 100 {
                7 => (hash(b"12345"), None),
                n if n % 2 == 0 => (hash(b"other"), Some(Kind::Corrupt)),
                _ => (None, None),
            };
            o.wire.send(&Request::Part { blake3 }).unwrap();
            assert_eq!(answer(&o.wire), want, "{n}");
        }
        o.wire.send(&image("FULL-2-sda", 5)).unwrap();
        assert_eq!(answer(&o.wire), Some(Kind::Peer));
        o.wire.send(&Request::Part { blake3: hash(b"") }).unwrap();
        o.wire.send(&Request::Bye).unwrap();
        assert_eq!(answer(&o.wire), None);
    });
    ended.unwrap();
    assert_eq!(target.files(), [target.root.join("sda/FULL-1-sda")]);
}

/// A source of one raw image of this name, without a manifest.
fn source(image: &str) -> (tempfile::TempDir, chain::Catalog) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sda")).unwrap();
    std::fs::write(dir.path().join("sda").join(image), vec![3; 2 << 20]).unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    assert_eq!(catalog.disks.len(), 1);
    (dir, catalog)
}

/// What a sender reports, and how it ends, whose receiver does this.
fn sent_to(patience: Duration, silence: Duration, lie: Lie) -> (Report, Result<()>) {
    let (_dir, catalog) = source("disk.raw");
    let (ours, its) = connected(patience);
    let its = its.waiting_for(silence, patience);
    let (over, ended) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            lie(&ours);
            // It stays as long as the sender is there.
            let _ = ended.recv();
        });
        let work = Work { cancel: &STOP, progress: &(), workers: 1, rate: None };
        let sent = send(&its, &catalog, Options::default(), &work);
        drop((its, over));
        sent
    })
}

/// Says these, one for each request.
fn answers(ours: &Ours, answers: &[Answer]) {
    for answer in answers {
        while matches!(ours.wire.receive_frame(), Ok(Frame::Data(_) | Frame::Hole(_))) {}
        ours.wire.send(answer).unwrap();
    }
}

fn hello() -> Answer {
    Answer::Hello { version: VERSION, program: "x".into() }
}

fn nothing_there() -> Answer {
    Answer::Held { files: vec![None] }
}

#[test]
fn whatever_a_receiver_does_nothing_is_reported_as_sent_and_no_wait_is_without_end() {
    let lies: [(&str, Lie, Kind); 9] = [
        ("work at once", |o| for_ever(o, &Frame::Working), Kind::Timeout),
        (
            "work instead of an answer",
            |o| {
                answers(o, &[hello()]);
                for_ever(o, &Frame::Working);
            },
            Kind::Timeout,
        ),
        (
            "work at the end of an image",
            |o| {
                answers(o, &[hello(), nothing_there()]);
                // The image, and its end.
                let _ = o.wire.receive::<Request>();
                while matches!(o.wire.receive_frame(), Ok(Frame::Data(_) | Frame::Hole(_))) {}
                for_ever(o, &Frame::Working);
            },
            Kind::Timeout,
        ),
        ("silence", |o| answers(o, &[hello()]), Kind::Timeout),
        // It takes nothing: the image does not fit into what lies between.
        ("nothing is taken", |o| answers(o, &[hello(), nothing_there()]), Kind::Timeout),
        (
            "an answer too many",
            |o| {
                let _ = o.wire.receive::<Request>();
                o.wire.send(&hello()).unwrap();
                o.wire.send(&hello()).unwrap();
            },
            Kind::Peer,
        ),
        ("an answer that is no message", |o| raw(o, b"M\0\0\0\x08{\"held\"X"), Kind::Peer),
        (
            "an answer that is cut",
            |o| {
                raw(o, b"M\0\0\0\x10{\"held\"");
                o.bytes.shutdown(std::net::Shutdown::Write).unwrap();
            },
            Kind::Peer,
        ),
        (
            "done before it is",
            |o| {
                answers(o, &[hello(), nothing_there()]);
                let _ = o.wire.receive::<Request>();
                o.wire.send(&Answer::Done).unwrap();
                while matches!(o.wire.receive_frame(), Ok(Frame::Data(_) | Frame::Hole(_))) {}
                // The end that it was told, and no commit.
                assert!(o.wire.receive_frame().is_err());
            },
            Kind::Peer,
        ),
    ];
    std::thread::scope(|scope| {
        for (what, lie, want) in lies {
            scope.spawn(move || {
                let is_timed = want == Kind::Timeout;
                let (patience, silence) = if is_timed { (SHORT * 2, SHORT) } else { (LONG, LONG) };
                let (report, ended) = sent_to(patience, silence, lie);
                assert_eq!(ended.unwrap_err().kind(), want, "{what}");
                assert_eq!((report.sent, report.bytes, report.pruned), (0, 0, None), "{what}");
            });
        }
    });
}

/// A directory that writes something at the source when it is opened: after the source was looked at.
struct Meanwhile<'a> {
    place: Plain,
    act: &'a (dyn Fn() + Sync),
}

impl Place for Meanwhile<'_> {
    fn open(&mut self, dry_run: bool) -> Result<Option<(PathBuf, FileMode)>> {
        (self.act)();
        self.place.open(dry_run)
    }

    fn close(&mut self) -> Result<(u64, u64)> {
        self.place.close()
    }
}

fn replicated(from: &Path, to: &Path, act: &(dyn Fn() + Sync)) -> (Report, Result<()>) {
    let (catalog, _) = scan(from, &ScanOptions::default(), None).unwrap();
    let (ours, its) = pair(&STOP);
    std::thread::scope(|scope| {
        let mut place = Meanwhile { place: Plain(to.to_path_buf()), act };
        let receiver = scope.spawn(move || serve(&its, &mut place));
        let work = Work { cancel: &STOP, progress: &(), workers: 1, rate: None };
        let sent = send(&ours, &catalog, Options::default(), &work);
        drop(ours);
        receiver.join().unwrap().unwrap();
        sent
    })
}

#[test]
fn a_backup_that_ends_while_it_is_looked_at_is_sent_with_its_own_manifest_or_not_at_all() {
    // An image that would get a manifest on the way, and one that would get none.
    for image in ["FULL-1700000000-sda.raw", "disk.raw"] {
        let (dir, catalog) = source(image);
        let from = dir.path().canonicalize().unwrap();
        let folder = crate::folder::Folder::open(&from.join("sda")).unwrap();
        let mut m = chain::describe_format(&catalog.disks[0], 0).unwrap();
        m.fingerprint = Some(manifest::fingerprint(&from.join("sda").join(image)).unwrap());
        m.consistency.reason = "the guest was frozen".into();
        let text = manifest::sealed_text(&m).unwrap();
        let target = Target::new();
        let left_out = |act: &(dyn Fn() + Sync)| {
            let (report, ended) = replicated(&from, &target.root, act);
            ended.unwrap();
            assert_eq!((report.sent, report.left), (0, 1), "{report:?}");
            let why = report.images[0].why.clone().unwrap();
            assert!(why.contains("it got its manifest") && why.contains("run it again"), "{why}");
            assert_eq!(target.files(), Vec::<PathBuf>::new());
        };
        let share = FileMode::default();
        // It is announced, and it is there, when all of the image has been sent.
        left_out(&|| publish::announce_text(&folder, image.as_ref(), &text, share).unwrap());
        publish::withdraw(&folder, image.as_ref()).unwrap();
        left_out(&|| manifest::write_in(&folder, &m).unwrap());
        let (report, ended) = replicated(&from, &target.root, &|| ());
        ended.unwrap();
        assert_eq!((report.sent, report.left), (1, 0), "{report:?}");
        let there = target.root.join("sda/.fleecefs").join(format!("{image}.json"));
        assert_eq!(std::fs::read(there).unwrap(), text);
    }
}

/// A directory of a receiver that cannot prune at the end.
struct Busy(Plain);

impl Place for Busy {
    fn open(&mut self, dry_run: bool) -> Result<Option<(PathBuf, FileMode)>> {
        self.0.open(dry_run)
    }

    fn close(&mut self) -> Result<(u64, u64)> {
        Err(Error::new(Kind::Busy, "somebody else is writing here"))
    }
}

#[test]
fn what_was_sent_is_told_where_the_end_fails() {
    let (_dir, catalog) = source("disk.raw");
    let target = Target::new();
    let (ours, its) = pair(&STOP);
    let (report, ended) = std::thread::scope(|scope| {
        let mut place = Busy(Plain(target.root.clone()));
        let receiver = scope.spawn(move || serve(&its, &mut place));
        let work = Work { cancel: &STOP, progress: &(), workers: 1, rate: None };
        let sent = send(&ours, &catalog, Options::default(), &work);
        drop(ours);
        receiver.join().unwrap().unwrap();
        sent
    });
    assert_eq!(ended.unwrap_err().kind(), Kind::Busy);
    assert_eq!((report.sent, report.left, report.bytes), (1, 0, 2 << 20));
    assert_eq!(target.files(), [target.root.join("sda/disk.raw")]);
}
