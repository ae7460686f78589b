//! The promise: a file's format is what the manifest, an image above it, its container or its name
//! says. A guest, which writes all bytes of a raw disk, cannot make it another disk's.

use std::path::Path;

use crate::support::tools::{have, run};
use crate::support::tree::{self, Backups, fleecefs};
use fleecefs::chain::Catalog;
use fleecefs::chain::scan::{FormatOverride, ScanOptions, scan};
use fleecefs::error::Severity;
use fleecefs::image::{Cache, open_point};
use fleecefs::layer::Format;
use fleecefs::manifest::ImageFormat;

const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

/// What only the other guest may know, and 1 MiB of disk.
const SECRET: u8 = 0x53;
const SIZE: u64 = 1 << 20;

/// Makes an image with `byte` in its first 64 KiB.
fn image(path: &Path, options: &[&str], byte: u8) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let path = path.to_str().unwrap();
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], options, &[path, "1M"]].concat());
    if byte != 0 {
        run("qemu-io", &["-c", &format!("write -P {byte} 0 64k"), path]);
    }
}

/// Writes what a guest writes to its raw disk: a header that names `backing` or `data`.
fn hostile(b: &Backups, relative: &str, backing: Option<&str>, data: Option<&str>) -> Vec<u8> {
    let aside = tempfile::tempdir().unwrap();
    let at = aside.path().join("a/b/disk");
    match data {
        Some(name) => {
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            let here = at.parent().unwrap();
            std::fs::create_dir_all(here.join(name).parent().unwrap()).unwrap();
            let option = format!("data_file={name},data_file_raw=on");
            let mut create = std::process::Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", "-o", &option, "disk", "1M"]);
            assert!(create.current_dir(here).status().unwrap().success());
        }
        None => image(&at, &[], 0),
    }
    if let Some(name) = backing {
        run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", name, at.to_str().unwrap()]);
    }
    let mut bytes = std::fs::read(&at).unwrap();
    bytes.resize(SIZE as usize, 0);
    b.file(relative, &bytes);
    bytes
}

fn first_bytes(catalog: &Catalog, source: &Path) -> Option<Vec<u8>> {
    let mut points = catalog.disks.iter().flat_map(|d| (0..d.points.len()).map(move |i| (d, i)));
    let (disk, i) = points.find(|(d, i)| d.points[*i].source == source).expect("it is listed");
    let image = open_point(disk, i, &Cache::new(1 << 20)).ok()?;
    let mut bytes = vec![0; usize::try_from(image.size().min(SIZE)).unwrap()];
    image.read_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

#[test]
fn a_header_on_a_raw_disk_shows_nothing_of_another_guest() {
    if !have("a_header_on_a_raw_disk_shows_nothing_of_another_guest", &TOOLS) {
        return;
    }
    let (image_of, raw_of) = ("../../vm2/sda/FULL-1700000000-sda.qcow2", "../../vm2/sda/disk.raw");
    for name in [
        "FULL-1700000000-sda.raw",
        "COPY-1700000000-sda.img",
        "disk.raw",
        "disk.img",
        "FULL-1700000000-sda",
        "INC-1700000001-sda",
        "INC-1700000001-sda.raw",
        "disk",
        "FULL-1700000000-sda.RAW",
    ] {
        for (backing, data) in [(Some(image_of), None), (None, Some(raw_of)), (Some(raw_of), None)]
        {
            let b = Backups::new();
            image(&b.path("vm2/sda/FULL-1700000000-sda.qcow2"), &[], SECRET);
            b.file("vm2/sda/disk.raw", &vec![SECRET; SIZE as usize]);
            let disks = b.scan().disks.len();
            let relative = format!("vm1/sda/{name}");
            let own = hostile(&b, &relative, backing, data);
            let catalog = b.scan();
            assert_eq!(catalog.disks.len(), disks + 1, "{name}: nobody disappears");
            let got = first_bytes(&catalog, &b.path(&relative));
            assert!(got.is_none_or(|got| got == own), "{name}: {backing:?} {data:?}");
            let why = b.why(name);
            assert!(why.remedy.is_some(), "{name}: {why}");
            for other in ["vm2/sda/FULL-1700000000-sda.qcow2", "vm2/sda/disk.raw"] {
                let got = first_bytes(&catalog, &b.path(other)).expect("it is as it was");
                assert_eq!(got[0], SECRET, "{other}");
            }
        }
    }
}

#[test]
fn a_raw_name_with_a_whole_image_inside_is_read_with_a_finding() {
    if !have("a_raw_name_with_a_whole_image_inside_is_read_with_a_finding", &TOOLS) {
        return;
    }
    let b = Backups::new();
    image(&b.path("cloud.img"), &[], 0x41);
    let catalog = b.scan();
    assert_eq!(first_bytes(&catalog, &b.path("cloud.img")).unwrap()[0], 0x41);
    let findings = b.findings();
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0].severity, Severity::Warning);
    assert!(findings[0].remedy.as_ref().unwrap().contains("--format"), "{findings:?}");
    // An overlay that is an image by its name says what it is.
    let overlay = |format: &str, name: &str| {
        let path = b.path(name);
        image(&path, &["-F", format, "-b", "cloud.img"], 0);
        path
    };
    let above = overlay("qcow2", "vm.qcow2");
    assert!(b.findings().is_empty(), "{:?}", b.findings());
    assert_eq!(first_bytes(&b.scan(), &above).unwrap()[0], 0x41);
    std::fs::remove_file(&above).unwrap();
    // As QEMU reads it where that says raw.
    let above = overlay("raw", "vm.qcow2");
    let wanted = std::fs::read(b.path("cloud.img")).unwrap();
    let got = first_bytes(&b.scan(), &above).unwrap();
    let len = wanted.len().min(got.len());
    assert_eq!(got[..len], wanted[..len]);
    // Two that disagree decide nothing.
    overlay("qcow2", "other.qcow2");
    assert!(first_bytes(&b.scan(), &b.path("cloud.img")).is_none());
    assert!(b.why("cloud.img").message.contains("name different formats for it"));
    assert!(first_bytes(&b.scan(), &above).is_none());
}

/// Neither the name says what it is, nor anything beside it.
#[test]
fn a_name_without_a_level_with_a_whole_image_inside_is_read_with_a_finding() {
    if !have("a_name_without_a_level_with_a_whole_image_inside_is_read_with_a_finding", &TOOLS) {
        return;
    }
    let name = "FULL-1700000000-vda";
    let warned = |prepare: &dyn Fn(&Backups)| {
        let b = Backups::new();
        image(&b.path(&format!("vda/{name}")), &[], 0x41);
        prepare(&b);
        let path = b.path(&format!("vda/{name}"));
        assert_eq!(first_bytes(&b.scan(), &path).unwrap()[0], 0x41);
        let findings = b.findings();
        let of_it = findings.iter().filter(|f| f.severity == Severity::Warning);
        let remedies = of_it.map(|f| f.remedy.clone().unwrap_or_default()).collect::<Vec<_>>();
        assert!(remedies.iter().all(|r| r.contains("--format")), "{findings:?}");
        remedies.len()
    };
    assert_eq!(warned(&|_| {}), 1);
    assert_eq!(warned(&|b| image(&b.path("vda/FULL-1700000001-vda"), &[], 0)), 1);
    // An increment that says that it is raw is no proof of the contrary.
    let full = Path::new(name);
    let on_raw = |b: &Backups| {
        let path = b.path("vda/INC-1700000001-vda");
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
        let rebase = ["rebase", "-u", "-F", "raw", "-b", full.to_str().unwrap()];
        run("qemu-img", &[&rebase[..], &[path.to_str().unwrap()]].concat());
    };
    assert_eq!(warned(&on_raw), 1);
    // There are increments, or its disk was one, or it was recorded.
    assert_eq!(warned(&|b| image(&b.path("vda/INC-1700000001-vda"), &[], 0)), 0);
    assert_eq!(warned(&|b| b.file("vda/vda.config", br#"{"format": "qcow2"}"#)), 0);
    let level = fleecefs::layout::Level::Full;
    assert_eq!(warned(&|b| recorded(&b.path("vda"), name, level)), 0);
}

fn recorded(dir: &Path, name: &str, level: fleecefs::layout::Level) {
    use fleecefs::manifest::{read, write};
    tree::manifest(dir, name, level, None, 0);
    let known = read(dir, name.as_ref()).unwrap().unwrap();
    write(dir, &fleecefs::manifest::Manifest { virtual_size: SIZE, ..known }).unwrap();
}

#[test]
fn images_that_depend_on_each_other_are_refused_and_reading_ends() {
    if !have("images_that_depend_on_each_other_are_refused_and_reading_ends", &TOOLS) {
        return;
    }
    let b = Backups::new();
    for (name, below) in [("B.raw", "C.raw"), ("C.raw", "B.raw"), ("A.qcow2", "B.raw")] {
        let path = b.path(name);
        image(&path, &[], 0);
        run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", below, path.to_str().unwrap()]);
    }
    let (tell, told) = std::sync::mpsc::channel();
    let root = b.root().to_path_buf();
    std::thread::spawn(move || {
        let _ = tell.send(scan(&root, &ScanOptions::default(), None).unwrap().0);
    });
    let catalog = told.recv_timeout(std::time::Duration::from_secs(60)).expect("the scan ends");
    let points: Vec<_> = catalog.disks.iter().flat_map(|d| &d.points).collect();
    assert_eq!(points.len(), 3);
    assert!(points.iter().all(|p| p.unavailable.as_ref().unwrap().message.contains("loop")));
}

/// To open an image that is marked as corrupt takes a walk over all tables that it claims to have.
#[test]
fn the_mark_of_a_corrupt_image_on_a_raw_disk_starts_no_walk() {
    if !have("the_mark_of_a_corrupt_image_on_a_raw_disk_starts_no_walk", &TOOLS) {
        return;
    }
    for (name, read) in [("disk.raw", false), ("FULL-1-sda", false), ("disk.qcow2", true)] {
        let b = Backups::new();
        let path = b.path(name);
        image(&path, &[], 0x41);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[79] |= 2;
        b.file(name, &bytes);
        assert_eq!(first_bytes(&b.scan(), &path).is_some(), read, "{name}");
        if !read {
            let why = b.why(name);
            assert!(why.message.contains("marked") && why.remedy.is_some(), "{why}");
        }
    }
}

#[test]
fn an_increment_says_how_its_full_is_read() {
    if !have("an_increment_says_how_its_full_is_read", &TOOLS) {
        return;
    }
    for (full, format, wanted) in [
        ("FULL-1-sda", "raw", Some(Format::Raw)),
        ("FULL-1-sda", "qcow2", Some(Format::Qcow2)),
        // Its name says what it is, the increment says otherwise.
        ("FULL-1-sda.qcow2", "raw", None),
    ] {
        let b = Backups::new();
        let tail = full.strip_prefix("FULL-1-").unwrap();
        image(&b.path(&format!("sda/{full}")), &[], 0x41);
        let file = std::fs::File::options().write(true).open(b.path(&format!("sda/{full}")));
        file.unwrap().set_len(SIZE).unwrap();
        let inc = format!("INC-2-{tail}");
        let path = b.path(&format!("sda/{inc}"));
        image(&path, &["-F", format, "-b", full], 0);
        if wanted.is_some() {
            // Nothing but a manifest proves what has no extension.
            tree::manifest(&b.path("sda"), &inc, fleecefs::layout::Level::Inc, Some(full), 0);
        }
        let catalog = b.scan();
        let points = &catalog.disks[0].points;
        let above = points.iter().find(|p| p.name == inc).unwrap();
        match wanted {
            Some(format) => {
                assert!(above.is_served(), "{format:?}: {:?}", above.unavailable);
                assert_eq!(points[0].layers[0].format, format);
            }
            None => {
                let why = above.unavailable.as_ref().unwrap();
                assert!(why.message.contains("does not have format raw"), "{why}");
            }
        }
    }
}

#[test]
fn verify_records_what_a_user_says() {
    if !have("verify_records_what_a_user_says", &TOOLS) {
        return;
    }
    for format in ["raw", "qcow2"] {
        let b = Backups::new();
        image(&b.path("base.qcow2"), &[], 0x42);
        let own = hostile(&b, "vm1/disk.raw", Some("../base.qcow2"), None);
        b.file("vm1/gz.raw", &[&[0x1f, 0x8b][..], &[7; 4094]].concat());
        let root = b.root().to_str().unwrap();
        let verify = |point: &str, format: &str| {
            let args = ["verify", "--create", "--format", format, root, "--point", point];
            let out = fleecefs(&args);
            String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
        };
        assert!(first_bytes(&b.scan(), &b.path("vm1/disk.raw")).is_none());
        let said = verify("disk.raw", format);
        assert!(said.contains("the hashes of 1 point were recorded"), "{said}");
        let got = first_bytes(&b.scan(), &b.path("vm1/disk.raw")).expect("it is decided");
        match format {
            "raw" => assert!(got == own),
            _ => assert_eq!(got[0], 0x42),
        }
        // Only what was asked for, and only what a format can be given to.
        assert!(first_bytes(&b.scan(), &b.path("vm1/gz.raw")).is_none());
        let said = verify("gz.raw", format);
        assert_eq!(said.contains("1 point were recorded"), format == "raw", "{said}");
        assert_eq!(first_bytes(&b.scan(), &b.path("vm1/gz.raw")).is_some(), format == "raw");
    }
    // Without a user's word nothing is recorded of a plain image.
    let b = Backups::new();
    image(&b.path("x.qcow2"), &[], 1);
    fleecefs(&["verify", "--create", b.root().to_str().unwrap()]);
    assert!(!b.path(".fleecefs/x.qcow2.json").exists());
}

/// A volume has no extension: whatever its guest writes to its beginning, nothing is damaged.
#[test]
fn a_raw_disk_whose_name_says_nothing_is_decided_by_the_user() {
    if !have("a_raw_disk_whose_name_says_nothing_is_decided_by_the_user", &TOOLS) {
        return;
    }
    let b = Backups::new();
    let disk = |first: &[u8]| [first, &[0x41; 4096][first.len()..]].concat();
    // A FULL beside an INC to whose beginning the guest wrote a header, and what begins like others.
    b.file("vm1/sda/FULL-1700000000-sda", &disk(b""));
    hostile(&b, "vm1/sda/INC-1700000100-sda", None, None);
    b.file("vm2/sda/FULL-1700000001-sda", &disk(b"KDMV"));
    b.file("vm3/sda/FULL-1700000002-sda", &disk(&[0x1f, 0x8b]));
    let root = b.root().to_str().unwrap();
    for (vm, point, first) in [
        ("vm1", "FULL-1700000000-sda", &b""[..]),
        ("vm2", "FULL-1700000001-sda", b"KDMV"),
        ("vm3", "FULL-1700000002-sda", &[0x1f, 0x8b]),
    ] {
        let path = b.path(&format!("{vm}/sda/{point}"));
        assert!(first_bytes(&b.scan(), &path).is_none(), "{point}");
        let remedy = b.why(point).remedy.unwrap();
        assert!(remedy.contains("verify --create --format raw"), "{remedy}");
        // Only raw decides, as nothing in it is qcow2.
        fleecefs(&["verify", "--create", "--format", "qcow2", root, "--point", point]);
        assert!(first_bytes(&b.scan(), &path).is_none(), "{point}");
        fleecefs(&["verify", "--create", "--format", "raw", root, "--point", point]);
        assert!(first_bytes(&b.scan(), &path) == Some(disk(first)), "{point}");
    }
}

/// To read it as qcow2 is no remedy for what is none.
#[test]
fn a_raw_name_with_another_formats_header_is_raw_or_nothing() {
    let b = Backups::new();
    for (name, first) in [
        ("FULL-1700000000-a.raw", &b"KDMV"[..]),
        ("FULL-1700000000-b.img", b"vhdxfile"),
        ("FULL-1700000000-c.img", b"conectix"),
        ("FULL-1700000000-d.raw", b"<<< "),
        ("FULL-1700000000-e.raw", b"QFI\xfb\0\0\0\x01"),
    ] {
        b.file(&format!("v/{name}"), &[first, &[0x41; 4096][first.len()..]].concat());
        let remedy = b.why(name).remedy.unwrap();
        assert!(remedy.contains("--format raw") && !remedy.contains("qcow2"), "{name}: {remedy}");
    }
    b.file("v/FULL-1700000000-f.raw", b"QFI\xfb\0\0\0\x03");
    assert!(b.why("FULL-1700000000-f.raw").remedy.unwrap().contains("--format qcow2"));
}

/// An archive is one whatever is said of it, and a name that says qcow2 is no raw disk's.
#[test]
fn what_another_format_begins_with_is_named_as_such() {
    let b = Backups::new();
    b.file("sda/FULL-1700000000-sda.qcow2", &[&b"KDMV"[..], &[1; 4092]].concat());
    b.file("sdb/FULL-1700000000-sdb.qcow2", &[1; 4096]);
    let why = b.why("FULL-1700000000-sda.qcow2");
    let remedy = why.remedy.as_deref().unwrap();
    assert!(why.message.contains("a VMDK image"), "{why}");
    assert!(remedy.contains("convert") && !remedy.contains("another copy"), "{remedy}");
    assert!(b.why("FULL-1700000000-sdb.qcow2").message.contains("no qcow2 header"));
}

/// A manifest lets an image name other files: a guest may write what it is to name later.
#[test]
fn verify_records_no_format_that_only_the_bytes_say() {
    if !have("verify_records_no_format_that_only_the_bytes_say", &TOOLS) {
        return;
    }
    for (name, recorded) in [
        ("FULL-1700000000-sda.raw", false),
        ("FULL-1700000000-sda", false),
        ("FULL-1700000000-sda.qcow2", true),
    ] {
        let b = Backups::new();
        image(&b.path(&format!("sda/{name}")), &[], 1);
        let root = b.root().to_str().unwrap();
        let manifest = b.path(&format!("sda/.fleecefs/{name}.json"));
        fleecefs(&["verify", "--create", root]);
        assert_eq!(manifest.exists(), recorded, "{name}");
        fleecefs(&["verify", "--create", "--format", "qcow2", root]);
        assert!(manifest.exists(), "{name}");
    }
}

/// What is merged would be qcow2 for good, by the word of its own bytes.
#[test]
fn nothing_is_merged_whose_format_only_its_bytes_say() {
    if !have("nothing_is_merged_whose_format_only_its_bytes_say", &TOOLS) {
        return;
    }
    for tail in ["sda.raw", "sda.img"] {
        let full = &format!("FULL-1700000000-{tail}");
        let inc = format!("INC-1700000001-{tail}");
        let inc = inc.as_str();
        let b = Backups::new();
        let path = b.path(&format!("sda/{full}"));
        image(&path, &[], 0x41);
        image(&b.path(&format!("sda/{inc}")), &[], 0x42);
        let disks = b.scan().disks;
        let disk = disks[0].path.to_str().unwrap();
        let (root, folder) = (b.root().to_str().unwrap(), b.path("sda"));
        let folder = folder.to_str().unwrap();
        let before = std::fs::read(&path).unwrap();
        let verbs: [&[&str]; 6] = [
            &["consolidate", root, disk, "--until", inc],
            &["consolidate", root, disk, "--until", inc, "--dry-run"],
            &["prune", "--keep-last", "1", "--consolidate", "--force", root],
            &["commit", folder],
            &["commit", folder, "--until", inc, "--dry-run"],
            &["snapshot-rebase", folder],
        ];
        for verb in verbs {
            let out = fleecefs(verb);
            let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
            assert!(said.contains("verify --create --format"), "{verb:?}: {said}");
            // To prune is more than to consolidate: that says why the point stays what it is.
            assert_eq!(out.status.success(), verb[0] == "prune", "{verb:?}: {said}");
            assert_eq!(std::fs::read(&path).unwrap(), before, "{verb:?}");
            assert!(!b.path(&format!("sda/.fleecefs/{full}.json")).exists(), "{verb:?}");
            assert!(!b.path(&format!("sda/.fleecefs/{inc}.json")).exists(), "{verb:?}");
        }
        fleecefs(&["verify", "--create", "--format", "qcow2", root]);
        let out = fleecefs(verbs[0]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn a_format_given_by_the_user_counts_for_what_was_asked_for_only() {
    if !have("a_format_given_by_the_user_counts_for_what_was_asked_for_only", &TOOLS) {
        return;
    }
    let b = Backups::new();
    image(&b.path("vm2/secret.qcow2"), &[], SECRET);
    let asked = b.path("vm1/asked.raw");
    let other = b.path("vm1/other.raw");
    image(&asked, &[], 0x41);
    let own = hostile(&b, "vm1/other.raw", Some("../vm2/secret.qcow2"), None);
    run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", "other.raw", asked.to_str().unwrap()]);
    let files = [asked.clone()].into();
    let format_override = Some(FormatOverride { format: ImageFormat::Qcow2, files });
    let options = ScanOptions { format_override, ..ScanOptions::default() };
    let (catalog, _) = scan(b.root(), &options, None).unwrap();
    // What it depends on it says itself, once it is told what it is.
    assert_eq!(first_bytes(&catalog, &asked).unwrap()[0], 0x41);
    let files = [b.path("vm1/none.raw")].into();
    let format_override = Some(FormatOverride { format: ImageFormat::Qcow2, files });
    let options = ScanOptions { format_override, ..ScanOptions::default() };
    let (catalog, _) = scan(b.root(), &options, None).unwrap();
    assert!(first_bytes(&catalog, &asked).is_none());
    assert!(first_bytes(&catalog, &other).is_none_or(|got| got == own));
    // And on the command line.
    let c = Backups::new();
    for name in ["a.raw", "b.raw"] {
        hostile(&c, &format!("vm1/{name}"), Some("../base.qcow2"), None);
    }
    image(&c.path("base.qcow2"), &[], 0x42);
    let catalog = c.scan();
    let point = Some(std::path::PathBuf::from("a.raw"));
    let options = fleecefs::verify::Options { point, ..Default::default() };
    let asked = fleecefs::verify::requested(&catalog, &options).unwrap();
    assert_eq!(asked, [c.path("vm1/a.raw")].into());
}

#[test]
fn backing_pointers_in_other_forms_are_followed_as_plain_ones() {
    if !have("backing_pointers_in_other_forms_are_followed_as_plain_ones", &TOOLS) {
        return;
    }
    let b = Backups::new();
    image(&b.path("sda/FULL-1-sda.qcow2"), &[], 0x41);
    image(&b.path("base.qcow2"), &[], 0x42);
    let (inc, top) = (b.path("sda/INC-2-sda.qcow2"), b.path("top.qcow2"));
    for (image_path, full) in [(&inc, "sda/FULL-1-sda.qcow2"), (&top, "base.qcow2")] {
        image(image_path, &[], 0);
        let below = b.path(full);
        let name = below.file_name().unwrap().to_str().unwrap();
        for pointer in [
            format!("file:{}", below.display()),
            format!("file:{name}"),
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{name}"}}}}"#),
            format!(r#"json:{{"driver":"qcow2","file.driver":"file","file.filename":"{name}"}}"#),
        ] {
            let path = image_path.to_str().unwrap();
            run("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", &pointer, path]);
            let got = first_bytes(&b.scan(), image_path).unwrap_or_else(|| panic!("{pointer}"));
            assert_eq!(got[0], if full.starts_with("sda") { 0x41 } else { 0x42 }, "{pointer}");
            let warned: Vec<_> = b.findings();
            assert!(warned.iter().all(|f| f.severity == Severity::Note), "{pointer}: {warned:?}");
        }
    }
}

/// QEMU writes the headers of backups, and QEMU is one guest's.
#[test]
fn a_backup_shows_nothing_of_another_disk() {
    if !have("a_backup_shows_nothing_of_another_disk", &TOOLS) {
        return;
    }
    let (image_of, raw_of) = ("../../vmb/sda/FULL-1700000000-sda.qcow2", "../../vmb/sda/other.raw");
    for name in
        ["FULL-1700000000-sda.qcow2", "COPY-1700000000-sda.qcow2", "INC-1700000001-sda.qcow2"]
    {
        for (backing, data) in [(Some(image_of), None), (None, Some(raw_of))] {
            let b = Backups::new();
            image(&b.path("vmb/sda/FULL-1700000000-sda.qcow2"), &[], SECRET);
            b.file("vmb/sda/other.raw", &vec![SECRET; SIZE as usize]);
            if name.starts_with("INC") {
                image(&b.path("vma/sda/FULL-1700000000-sda.qcow2"), &[], 0x41);
            }
            let relative = format!("vma/sda/{name}");
            hostile(&b, &relative, backing, data);
            let catalog = b.scan();
            let got = first_bytes(&catalog, &b.path(&relative));
            // An increment depends on its own FULL, wherever it was made.
            let moved = name.starts_with("INC") && data.is_none();
            match moved {
                true => assert_eq!(got.unwrap()[0], 0x41),
                false => assert!(got.is_none() && b.why(name).remedy.is_some(), "{name} {data:?}"),
            }
            let catalog = b.scan();
            for other in ["vmb/sda/FULL-1700000000-sda.qcow2", "vmb/sda/other.raw"] {
                assert_eq!(first_bytes(&catalog, &b.path(other)).unwrap()[0], SECRET);
            }
        }
    }
    // Its manifest says what it is.
    let b = Backups::new();
    image(&b.path("vmb/sda/FULL-1700000000-sda.qcow2"), &[], SECRET);
    hostile(&b, "vma/sda/sda", Some(image_of), None);
    tree::manifest(&b.path("vma/sda"), "sda", fleecefs::layout::Level::Full, None, 0);
    assert!(first_bytes(&b.scan(), &b.path("vma/sda/sda")).is_none());
}

#[test]
fn a_data_file_is_no_other_disk_of_the_folder() {
    if !have("a_data_file_is_no_other_disk_of_the_folder", &TOOLS) {
        return;
    }
    let full = "FULL-1700000000-sda.qcow2";
    for (data, served) in [
        ("disk1.raw", false),
        ("disk1", false),
        ("FULL-1700000000-sdb.raw", false),
        ("FULL-1700000000-sda.raw", true),
        ("FULL-1700000000-sda.data", true),
        ("data", true),
    ] {
        let b = Backups::new();
        hostile(&b, full, None, Some(data));
        b.file(data, &vec![SECRET; SIZE as usize]);
        if data.starts_with("disk1") {
            b.file(&format!("{data}.config"), br#"{"format": "raw"}"#);
            image(&b.path(&format!("INC-4000000000-{data}")), &[], 0);
        }
        let catalog = b.scan();
        let points = || catalog.disks.iter().flat_map(|d| &d.points);
        let at = |name: &str| points().find(|p| p.name == name);
        assert_eq!(at(full).unwrap().is_served(), served, "{data}");
        assert_eq!(
            at(data).is_some(),
            !served,
            "{data}: {:?}",
            points().map(|p| &p.name).collect::<Vec<_>>()
        );
    }
}
