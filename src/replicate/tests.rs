//! Each side against one that does not play by the rules.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::message;
use super::message::{Answer, Frame, Held, Modified, Needed, Request, VERSION};
use super::name::{FolderPath, SmallKind, WireName};
use super::receive::{Place, serve};
use super::send::{Options, send, unfinished};
use super::wire::Wire;
use crate::chain::scan::{ScanOptions, scan};
use crate::error::{Error, Kind, Result};
use crate::folder::FileMode;
use crate::job::Work;

/// A directory that is there, without locks.
pub(super) struct Plain(pub(super) PathBuf);

impl Place for Plain {
    fn open(&mut self, _: bool) -> Result<Option<(PathBuf, FileMode)>> {
        Ok(Some((self.0.clone(), FileMode::default())))
    }

    fn close(&mut self) -> Result<(u64, u64)> {
        Ok((0, 0))
    }
}

/// A target, something beside it, and a sender of the test's own.
pub(super) struct Target {
    _dir: tempfile::TempDir,
    pub(super) root: PathBuf,
    pub(super) outside: PathBuf,
}

impl Target {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (root, outside) = (base.join("target"), base.join("outside"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&outside).unwrap();
        Target { _dir: dir, root, outside }
    }

    /// Runs `say` as the sender; gives how the receiver ended.
    fn hears(&self, say: impl FnOnce(&Wire)) -> Result<()> {
        let stop = AtomicBool::new(false);
        let (ours, its) = pair(&stop);
        let ended = std::thread::scope(|scope| {
            let mut place = Plain(self.root.clone());
            let receiver = scope.spawn(move || serve(&its, &mut place));
            let program = "test".to_string();
            ours.send(&Request::Hello { version: VERSION, program, dry_run: false }).unwrap();
            assert!(matches!(ours.receive().unwrap(), Answer::Hello { version: VERSION, .. }));
            say(&ours);
            drop(ours);
            receiver.join().unwrap()
        });
        assert_eq!(files(&self.outside), Vec::<PathBuf>::new(), "written outside");
        ended
    }

    pub(super) fn files(&self) -> Vec<PathBuf> {
        files(&self.root)
    }
}

pub(super) fn pair(stop: &AtomicBool) -> (Wire<'_>, Wire<'_>) {
    let (a, b) = UnixStream::pair().unwrap();
    let wire = |s: UnixStream| {
        let again = s.try_clone().unwrap();
        Wire::new(s.into(), again.into(), "the other side", stop).unwrap()
    };
    (wire(a), wire(b))
}

pub(super) fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut found: Vec<PathBuf> =
        entries.flat_map(|p| if p.is_dir() { files(&p) } else { vec![p] }).collect();
    found.sort();
    found
}

pub(super) fn name(text: &str) -> WireName {
    WireName::of(text.as_ref()).unwrap()
}

pub(super) fn disk() -> FolderPath {
    FolderPath::of(Path::new("sda")).unwrap()
}

pub(super) fn image(image: &str, size: u64) -> Request {
    let modified = Modified { seconds: u64::MAX, nanos: u32::MAX };
    Request::Image { folder: disk(), name: name(image), size, modified, verify: true }
}

/// The kind of a refusal; `None` if it was done.
pub(super) fn answer(wire: &Wire) -> Option<Kind> {
    match wire.receive::<Answer>().unwrap() {
        Answer::Failed { kind, .. } => Some(kind),
        _ => None,
    }
}

pub(super) fn hash(bytes: &[u8]) -> Option<String> {
    Some(blake3::hash(bytes).to_hex().to_string())
}

/// Sends an image whole; gives what is said of it.
pub(super) fn sends(wire: &Wire, to: &str, bytes: &[u8]) -> Option<Kind> {
    wire.send(&image(to, bytes.len() as u64)).unwrap();
    wire.send_data(bytes).unwrap();
    wire.send(&Request::Part { blake3: hash(bytes) }).unwrap();
    answer(wire)
}

pub(super) fn commits(wire: &Wire, manifest: Option<&str>, needs: Vec<Needed>) -> Option<Kind> {
    wire.send(&Request::Commit { manifest: manifest.is_some(), needs }).unwrap();
    if let Some(text) = manifest {
        wire.send_frame(Frame::Whole(text.as_bytes().to_vec())).unwrap();
    }
    answer(wire)
}

fn manifest(image: &str, parent: Option<&str>, size: usize) -> String {
    let parent = parent.map_or("null".to_string(), |p| format!("{p:?}"));
    format!(
        r#"{{"format_version": 1, "run": "r", "image": "{image}", "level": "inc", "time": 2, "parent": {parent},
        "format": "qcow2", "content": "dirty-only", "virtual_size": 1, "file_size": {size}}}"#
    )
}

/// The same manifest that says so of the ends of its image.
fn with_fingerprint(manifest: &str, fingerprint: &str) -> String {
    manifest.replacen('{', &format!(r#"{{"fingerprint": "{fingerprint}", "#), 1)
}

#[test]
fn an_image_is_a_file_only_when_it_is_whole_right_and_committed() {
    let target = Target::new();
    let bytes = vec![7; 5000];
    let ended = target.hears(|wire| {
        // Nothing was sent.
        assert_eq!(commits(wire, None, Vec::new()), Some(Kind::Incomplete));
        // More and less than was said, another hash, and the sender's own regret.
        for (size, sent, hash, want) in [
            (4999, &bytes[..], hash(&bytes), Some(Kind::Corrupt)),
            (5001, &bytes[..], hash(&bytes), Some(Kind::Corrupt)),
            (5000, &bytes[..], hash(b"other"), Some(Kind::Corrupt)),
            (5000, &bytes[..], Some(String::new()), Some(Kind::Corrupt)),
            (5000, &bytes[..100], None, None),
        ] {
            wire.send(&image("FULL-1-sda", size)).unwrap();
            wire.send_data(sent).unwrap();
            wire.send(&Request::Part { blake3: hash }).unwrap();
            assert_eq!(answer(wire), want);
            assert_eq!(commits(wire, None, Vec::new()), Some(Kind::Incomplete));
        }
        // A hole beyond all bounds.
        wire.send(&image("FULL-1-sda", u64::MAX >> 1)).unwrap();
        wire.send_frame(Frame::Hole(1 << 30)).unwrap();
        wire.send(&Request::Part { blake3: None }).unwrap();
        let _ = answer(wire);
        assert_eq!(target.files(), Vec::<PathBuf>::new());
        assert_eq!(sends(wire, "FULL-1-sda", &bytes), None);
        assert_eq!(target.files(), Vec::<PathBuf>::new(), "it has a name before the commit");
        assert_eq!(commits(wire, None, Vec::new()), None);
        // It is not replaced.
        assert_eq!(sends(wire, "FULL-1-sda", b"other"), Some(Kind::Exists));
        wire.send(&Request::Bye).unwrap();
        assert_eq!(answer(wire), None);
    });
    ended.unwrap();
    assert_eq!(target.files(), [target.root.join("sda/FULL-1-sda")]);
    assert_eq!(std::fs::read(target.root.join("sda/FULL-1-sda")).unwrap(), bytes);
}

#[test]
fn a_manifest_is_its_images_own_and_what_it_builds_on_is_there() {
    let target = Target::new();
    let bytes = vec![7; 5000];
    let needs = |fingerprint: &str| {
        let fingerprint = fingerprint.to_string();
        vec![Needed { folder: disk(), name: name("FULL-1-sda"), fingerprint }]
    };
    let ended = target.hears(|wire| {
        let inc = manifest("INC-2-sda", Some("FULL-1-sda"), 5000);
        let other = manifest("INC-3-sda", Some("FULL-1-sda"), 5000);
        let longer = manifest("INC-2-sda", None, 5001);
        let out = manifest("INC-2-sda", Some("../../outside/x"), 5000);
        let printed = with_fingerprint(&manifest("INC-2-sda", None, 5000), &"0".repeat(32));
        for (text, needs, want) in [
            (&inc, Vec::new(), Kind::Incomplete),
            (&other, Vec::new(), Kind::Corrupt),
            (&longer, Vec::new(), Kind::Corrupt),
            (&out, Vec::new(), Kind::Corrupt),
            (&printed, Vec::new(), Kind::Corrupt),
            (&"{".to_string(), Vec::new(), Kind::Corrupt),
            (&manifest("INC-2-sda", None, 5000), needs("x"), Kind::Incomplete),
        ] {
            assert_eq!(sends(wire, "INC-2-sda", &bytes), None);
            assert_eq!(commits(wire, Some(text), needs), Some(want), "{text}");
            assert_eq!(target.files(), Vec::<PathBuf>::new());
        }
        assert_eq!(sends(wire, "FULL-1-sda", &bytes), None);
        assert_eq!(commits(wire, None, Vec::new()), None);
        assert_eq!(sends(wire, "INC-2-sda", &bytes), None);
        assert_eq!(commits(wire, Some(&inc), needs("another state")), Some(Kind::Changed));
        let own = crate::manifest::fingerprint(&target.root.join("sda/FULL-1-sda")).unwrap();
        assert_eq!(sends(wire, "INC-2-sda", &bytes), None);
        let inc = with_fingerprint(&inc, &own);
        assert_eq!(commits(wire, Some(&inc), needs(&own)), None);
    });
    assert_eq!(ended.unwrap_err().kind(), Kind::Peer, "it is gone without a word");
    // One that is there without: by its hash, and by no other; and it is read once in a run.
    let text = manifest("FULL-1-sda", None, 5000);
    let printed = with_fingerprint(&text, &"0".repeat(32));
    for (blake3, text, want) in [
        (hash(b"other"), &text, Some(Kind::Exists)),
        (hash(&bytes), &printed, Some(Kind::Corrupt)),
        (hash(&bytes), &text, None),
    ] {
        let adopts = |wire: &Wire, blake3: Option<String>, text: &str| {
            let (folder, name, blake3) = (disk(), name("FULL-1-sda"), blake3.unwrap());
            wire.send(&Request::Adopt { folder, name, blake3, needs: Vec::new() }).unwrap();
            wire.send_frame(Frame::Whole(text.as_bytes().to_vec())).unwrap();
            answer(wire)
        };
        let ended = target.hears(|wire| {
            assert_eq!(adopts(wire, blake3, text), want);
            assert_eq!(adopts(wire, hash(&bytes), text), Some(Kind::Unsupported));
        });
        ended.unwrap_err();
    }
    let side = target.root.join("sda/.fleecefs");
    assert!(side.join("INC-2-sda.json").exists() && side.join("FULL-1-sda.json").exists());
}

#[test]
fn a_sender_reaches_nothing_but_its_own_kinds_of_files_in_the_directory() {
    let target = Target::new();
    std::fs::write(target.root.join("uuid"), "mine").unwrap();
    std::os::unix::fs::symlink(&target.outside, target.root.join("sda")).unwrap();
    let small = |wire: &Wire, kind, to: &str, folder: &FolderPath, bytes: &[u8]| {
        let folder = folder.clone();
        wire.send(&Request::Small { folder, kind, name: name(to) }).unwrap();
        wire.send_frame(Frame::Whole(bytes.to_vec())).unwrap();
        answer(wire)
    };
    let top = FolderPath::default();
    let vm = FolderPath::of(Path::new("vm")).unwrap();
    let ended = target.hears(|wire| {
        // A folder that is a link is no folder.
        assert_eq!(sends(wire, "FULL-1-sda", b"x"), Some(Kind::Unsupported));
        assert_eq!(
            small(wire, SmallKind::DiskConfig, "x.config", &disk(), b"x"),
            Some(Kind::Unsupported)
        );
        for (kind, to, bytes, want) in [
            (SmallKind::Id, "uuid", &b"theirs"[..], Some(Kind::Exists)),
            (SmallKind::Id, "x", b"x", Some(Kind::Unsupported)),
            (SmallKind::DiskConfig, "passwd", b"x", Some(Kind::Unsupported)),
            (SmallKind::Kept, "lock", b"x", Some(Kind::Unsupported)),
            (SmallKind::Link, "x", b"x", Some(Kind::Unsupported)),
            (SmallKind::Link, "image", b"../outside", Some(Kind::Unsupported)),
            (SmallKind::Link, "image", b"/etc", Some(Kind::Unsupported)),
        ] {
            assert_eq!(small(wire, kind, to, &top, bytes), want, "{kind:?} {to}");
        }
        assert_eq!(small(wire, SmallKind::Link, "image", &vm, b"FULL-1-sda"), None);
        let leads_away = small(wire, SmallKind::Link, "image", &vm, b".fleecefs");
        assert_eq!(leads_away, Some(Kind::Unsupported));
        assert_eq!(small(wire, SmallKind::Kept, "config-1-0-x", &vm, b"x"), None);
        assert_eq!(small(wire, SmallKind::Kept, "config-1-0-x", &vm, b"y"), Some(Kind::Exists));
        for (id, want) in [("mine", None), ("theirs", Some(Kind::Exists))] {
            wire.send(&Request::CheckId { folder: top.clone(), id: id.into() }).unwrap();
            assert_eq!(answer(wire), want);
        }
        let ask = |to: &str, n| Request::Ask {
            folder: top.clone(),
            names: vec![name(to); n],
            look: true,
        };
        wire.send(&ask("x.partial", 1)).unwrap();
        assert_eq!(answer(wire), Some(Kind::Unsupported));
        wire.send(&ask("x", 1000)).unwrap();
        assert_eq!(answer(wire), Some(Kind::Unsupported));
    });
    ended.unwrap_err();
    let kept = target.root.join("vm/.fleecefs/config-1-0-x");
    assert_eq!(std::fs::read(kept).unwrap(), b"x");
    // What is no message of ours ends it, whatever it would do.
    for text in [
        r#"{"image":{"folder":["..","outside"],"name":"FULL-1-x","size":1,"modified":{"seconds":1,"nanos":1},"verify":false}}"#,
        r#"{"small":{"folder":[],"kind":"disk-config","name":"../outside/x.config"}}"#,
        r#"{"image":{"folder":[".ssh"],"name":"authorized_keys","size":1,"modified":{"seconds":1,"nanos":1},"verify":false}}"#,
        r#"{"remove":{}}"#,
        "",
        "[[[[[[[[",
    ] {
        let ended = target.hears(|wire| {
            wire.send_frame(Frame::Message(text.as_bytes().to_vec())).unwrap();
            assert!(wire.receive_frame().is_err(), "{text}");
        });
        assert_eq!(ended.unwrap_err().kind(), Kind::Peer, "{text}");
    }
}

/// A source of one raw image, without manifests.
fn source() -> (tempfile::TempDir, crate::chain::Catalog) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.raw"), vec![3; 2 << 20]).unwrap();
    std::fs::write(dir.path().join("uuid"), "secret id").unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    assert_eq!(catalog.disks.len(), 1);
    (dir, catalog)
}

/// How a sender ends whose receiver answers with these, one per request, and then is gone.
fn sent_to(answers: &[Frame]) -> Result<super::report::Report> {
    let (_dir, catalog) = source();
    let stop = AtomicBool::new(false);
    let (ours, its) = pair(&stop);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for frame in answers {
                // The bytes of an image have no answer.
                while matches!(its.receive_frame(), Ok(Frame::Data(_) | Frame::Hole(_))) {}
                if its.send_frame(frame.clone()).is_err() {
                    return;
                }
            }
            // One that answers to the end hears the last word, too.
            let ended = |f: &Frame| {
                message::parse::<Answer>(f.clone()).is_ok_and(|a| matches!(a, Answer::Ended { .. }))
            };
            if answers.last().is_some_and(ended) {
                while its.receive_frame().is_ok() {}
            }
        });
        let work = Work { cancel: &stop, progress: &(), workers: 1, rate: None };
        let (report, ended) = send(&ours, &catalog, Options::default(), &work);
        // It hears that there is nobody any more.
        drop(ours);
        assert!(ended.is_ok() || (report.sent, report.bytes) == (0, 0), "{report:?}");
        ended.map(|()| report)
    })
}

#[test]
fn a_receiver_that_lies_gets_no_more_than_the_plan_says() {
    let hello = Frame::message(&Answer::Hello { version: VERSION, program: "x".into() }).unwrap();
    let done = Frame::message(&Answer::Done).unwrap();
    let failed = |kind| Frame::message(&Answer::failed(&Error::new(kind, "no"))).unwrap();
    let held = |n: usize| {
        let one = Held {
            is_file: true,
            size: 2 << 20,
            manifest: true,
            blake3: None,
            fingerprint: None,
            modified: None,
        };
        Frame::message(&Answer::Held { files: vec![Some(one); n] }).unwrap()
    };
    let ended = Frame::message(&Answer::Ended { deleted: 0, freed: 0 }).unwrap();
    let request = Frame::message(&Request::Bye).unwrap();
    let cases: [(&[&Frame], Kind); 10] = [
        (&[], Kind::Peer),
        (&[&Frame::Data(vec![1])], Kind::Peer),
        (&[&request], Kind::Peer),
        (&[&done], Kind::Peer),
        (&[&hello, &hello], Kind::Peer),
        (&[&hello, &failed(Kind::Exists)], Kind::Exists),
        (&[&hello, &done, &held(7)], Kind::Peer),
        (&[&hello, &done, &held(0)], Kind::Peer),
        (&[&hello, &done, &failed(Kind::NoSpace)], Kind::NoSpace),
        (&[&hello, &done, &failed(Kind::Interrupted)], Kind::Peer),
    ];
    for (answers, want) in cases {
        let answers: Vec<Frame> = answers.iter().map(|f| (*f).clone()).collect();
        assert_eq!(sent_to(&answers).unwrap_err().kind(), want, "{answers:?}");
    }
    // What it has deleted is told only where that can be.
    for (deleted, freed) in [(u64::MAX, 1), (1, u64::MAX), (0, 1)] {
        let lie = Frame::message(&Answer::Ended { deleted, freed }).unwrap();
        let answers = [hello.clone(), done.clone(), held(1), held(1), done.clone(), lie];
        assert_eq!(sent_to(&answers).unwrap_err().kind(), Kind::Peer, "{deleted} {freed}");
    }
    // It says that it has the file, and another one: nothing is sent, and the user is told.
    let answers = [hello.clone(), done.clone(), held(1), held(1), done.clone(), ended.clone()];
    let report = sent_to(&answers).unwrap();
    assert_eq!((report.sent, report.left, report.bytes), (0, 1, 0));
    let newer = Answer::Hello { version: VERSION + 1, program: "\x1b[2J".into() };
    let e = sent_to(&[Frame::message(&newer).unwrap()]).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(!e.report().contains('\x1b'));
}

#[test]
fn a_receiver_of_holes_lets_the_other_side_know_that_it_is_at_work() {
    let target = Target::new();
    let ended = target.hears(|wire| {
        wire.send(&image("FULL-1-sda", 5)).unwrap();
        wire.send_frame(Frame::Hole(5)).unwrap();
        wire.send(&Request::Part { blake3: None }).unwrap();
        assert_eq!(wire.frame().unwrap(), Frame::Working);
        assert_eq!(answer(wire), None);
        wire.send(&Request::Bye).unwrap();
        assert_eq!(answer(wire), None);
    });
    ended.unwrap();
}

#[test]
fn images_that_are_announced_at_the_source_are_told() {
    let (dir, catalog) = source();
    assert_eq!(unfinished(&catalog).count(), 0);
    std::fs::create_dir(dir.path().join(".fleecefs")).unwrap();
    std::fs::write(dir.path().join(".fleecefs/disk.raw.partial.json"), "{}").unwrap();
    // As other notes are.
    std::fs::write(dir.path().join("FULL-1-sda.partial"), "x").unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    let told: Vec<String> = unfinished(&catalog).map(|f| f.to_string()).collect();
    assert!(told.len() == 1 && told[0].contains("disk.raw: it has no manifest yet"), "{told:?}");
}

#[test]
fn a_sender_in_a_hole_ends_when_the_user_wants_that() {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("disk.raw")).unwrap();
    file.set_len(10 << 20).unwrap();
    let (catalog, _) = scan(dir.path(), &ScanOptions::default(), None).unwrap();
    let (stop, cancel) = (AtomicBool::new(false), AtomicBool::new(true));
    let (ours, its) = pair(&stop);
    let target = Target::new();
    let (report, ended) = std::thread::scope(|scope| {
        let mut place = Plain(target.root.clone());
        scope.spawn(move || serve(&its, &mut place));
        let work = Work { cancel: &cancel, progress: &(), workers: 1, rate: None };
        let sent = send(&ours, &catalog, Options::default(), &work);
        drop(ours);
        sent
    });
    assert_eq!(ended.unwrap_err().kind(), Kind::Interrupted);
    assert_eq!((report.sent, target.files()), (0, Vec::new()));
}

#[test]
fn an_image_that_is_refused_while_it_is_sent_is_not_sent_to_its_end() {
    let hello = Frame::message(&Answer::Hello { version: VERSION, program: "x".into() }).unwrap();
    let none = Frame::message(&Answer::Held { files: vec![None] }).unwrap();
    let done = Frame::message(&Answer::Done).unwrap();
    for (kind, want) in [(Kind::NoSpace, Some(Kind::NoSpace)), (Kind::Exists, None)] {
        let failed = Frame::message(&Answer::failed(&Error::new(kind, "no"))).unwrap();
        let (_dir, catalog) = source();
        let stop = AtomicBool::new(false);
        let (ours, its) = pair(&stop);
        let sent = std::thread::scope(|scope| {
            let (hello, done, none) = (&hello, &done, &none);
            let receiver = scope.spawn(move || {
                for frame in [hello, done, none] {
                    its.receive_frame().unwrap();
                    its.send_frame(frame.clone()).unwrap();
                }
                // The id.
                its.receive::<Request>().unwrap();
                its.receive_whole().unwrap();
                its.send_frame(done.clone()).unwrap();
                let Request::Image { .. } = its.receive().unwrap() else { panic!("no image") };
                // Before a byte of it is read.
                its.send_frame(failed.clone()).unwrap();
                while let Frame::Data(_) | Frame::Hole(_) = its.receive_frame()? {}
                // The end.
                if kind == Kind::Exists {
                    its.receive::<Request>()?;
                    its.send(&Answer::Ended { deleted: 2, freed: 3 })?;
                }
                Ok::<(), Error>(())
            });
            let work = Work { cancel: &stop, progress: &(), workers: 1, rate: None };
            let sent = send(&ours, &catalog, Options::default(), &work);
            drop(ours);
            receiver.join().unwrap().unwrap();
            sent
        });
        let (report, ended) = sent;
        // It is told in any case.
        assert_eq!((report.sent, report.left), (0, 1));
        assert!(report.images[0].why.as_ref().is_some_and(|why| why.contains("no")), "{report:?}");
        match want {
            Some(kind) => assert_eq!(ended.unwrap_err().kind(), kind),
            None => {
                ended.unwrap();
                assert_eq!(report.pruned.map(|p| (p.points, p.bytes)), Some((2, 3)));
            }
        }
    }
}
