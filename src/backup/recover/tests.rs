mod undone;

use super::*;
use crate::backup::Quiet;
use crate::folder::FileMode;
use crate::layer::qcow2::create::NewImage;
use crate::layout::Level;
use crate::manifest::tests::example;

const IMAGE: &str = "FULL-1-d";

fn test_folder() -> (tempfile::TempDir, Folder) {
    let d = tempfile::tempdir().unwrap();
    let folder = Folder::open(&d.path().canonicalize().unwrap()).unwrap();
    (d, folder)
}

fn concluded(folder: &Folder, finished: bool) -> ImageOutcome {
    conclude_image(folder, IMAGE, (finished, None), &Quiet).unwrap()
}

/// Whether there is an image with its final name, an unfinished one, a manifest, and an announcement.
fn there(folder: &Folder) -> [bool; 4] {
    let manifest = |image: &str| manifest::read_in(folder, image.as_ref()).unwrap().is_some();
    let partial = publish::partial_name(IMAGE);
    [folder.has(IMAGE), folder.has(&partial), manifest(IMAGE), manifest(&partial)]
}

#[test]
fn an_unfinished_image_is_no_point_though_it_is_sound() {
    let shape = NewImage::plain(1 << 20, 65536);
    for finished in [false, true] {
        let (_d, folder) = test_folder();
        publish::announce(&folder, &example(IMAGE, Level::Full, None)).unwrap();
        publish::create_image(&folder, IMAGE, &shape, FileMode::default()).unwrap();
        let wanted = if finished { ImageOutcome::Published } else { ImageOutcome::Removed };
        assert_eq!(concluded(&folder, finished), wanted);
        assert_eq!(there(&folder), [finished, false, finished, false]);
    }
}

/// Its name came by a rename of ours only where the announcement was complete.
#[test]
fn what_has_the_name_and_was_never_announced_as_checked_stays() {
    let (d, folder) = test_folder();
    publish::announce(&folder, &example(IMAGE, Level::Full, None)).unwrap();
    std::fs::write(d.path().join(IMAGE), "somebody's").unwrap();
    assert_eq!(concluded(&folder, false), ImageOutcome::Removed);
    assert_eq!(there(&folder), [true, false, false, false]);
}

#[test]
fn what_changed_after_it_was_checked_is_no_point() {
    let (d, folder) = test_folder();
    let path = d.path().join(IMAGE);
    std::fs::write(&path, "as it was").unwrap();
    let fingerprint = Some(manifest::fingerprint(&path).unwrap());
    let m = Manifest { fingerprint, ..example(IMAGE, Level::Full, None) };
    for same in [true, false] {
        publish::announce(&folder, &m).unwrap();
        if !same {
            manifest::remove_in(&folder, IMAGE.as_ref()).unwrap();
            std::fs::write(&path, "as it is now").unwrap();
        }
        let wanted = if same { ImageOutcome::Published } else { ImageOutcome::Removed };
        assert_eq!(concluded(&folder, false), wanted);
        assert_eq!(there(&folder), [same, false, same, false]);
    }
}

#[test]
fn a_manifest_without_its_image_is_no_point() {
    let (_d, folder) = test_folder();
    manifest::write_in(&folder, &example(IMAGE, Level::Full, None)).unwrap();
    assert_eq!(concluded(&folder, false), ImageOutcome::Removed);
}

/// Two names of one file are one image; another file under the final name is somebody else's.
#[test]
fn another_file_under_the_final_name_stays() {
    let (d, folder) = test_folder();
    publish::announce(&folder, &example(IMAGE, Level::Full, None)).unwrap();
    for name in [IMAGE, &publish::partial_name(IMAGE)] {
        std::fs::write(d.path().join(name), name).unwrap();
    }
    assert_eq!(concluded(&folder, false), ImageOutcome::Removed);
    assert_eq!(std::fs::read(d.path().join(IMAGE)).unwrap(), IMAGE.as_bytes());
    assert_eq!(there(&folder), [true, false, false, false]);
}

/// As `replicate` announces what came whole: to the byte, and of the image itself.
fn announce_whole(folder: &Folder, m: &Manifest) {
    let text = serde_json::to_vec(m).unwrap();
    publish::announce_text(folder, IMAGE.as_ref(), &text, FileMode::default()).unwrap();
}

fn swept(folder: &Folder) -> [bool; 4] {
    sweep(folder, &Quiet).unwrap();
    there(folder)
}

#[test]
fn what_was_announced_as_whole_is_a_point_if_it_is_that_and_is_never_removed() {
    let (d, folder) = test_folder();
    let path = d.path().join(IMAGE);
    std::fs::write(&path, "as it came").unwrap();
    let print = Some(manifest::fingerprint(&path).unwrap());
    let own = Manifest { file_size: 10, ..example(IMAGE, Level::Full, None) };
    for (fingerprint, bytes, is_point) in [
        (&print, "as it came", true),
        (&None, "as it came", true),
        (&print, "somebody's", false),
        (&None, "of another length", false),
    ] {
        let _ = manifest::remove_in(&folder, IMAGE.as_ref());
        std::fs::write(&path, bytes).unwrap();
        announce_whole(&folder, &Manifest { fingerprint: fingerprint.clone(), ..own.clone() });
        assert_eq!(swept(&folder), [true, false, is_point, false], "{bytes}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes.as_bytes());
    }
    // It is no point without its parent; with it, it is.
    let inc = Manifest { parent: Some("FULL-0-d".into()), fingerprint: print, ..own.clone() };
    std::fs::write(&path, "as it came").unwrap();
    announce_whole(&folder, &inc);
    sweep(&folder, &Quiet).unwrap();
    assert!(folder.has(IMAGE) && publish::came_whole(&folder, IMAGE).unwrap());
    assert!(manifest::read_in(&folder, IMAGE.as_ref()).unwrap().is_none());
    std::fs::write(d.path().join("FULL-0-d"), "x").unwrap();
    assert_eq!(swept(&folder), [true, false, true, false]);
    // It never got its name.
    manifest::remove_in(&folder, IMAGE.as_ref()).unwrap();
    std::fs::remove_file(&path).unwrap();
    announce_whole(&folder, &own);
    assert_eq!(swept(&folder), [false; 4]);
}

/// That it is whole was said of another file than what a backup left beside it.
#[test]
fn what_a_backup_left_is_not_published_as_what_came_whole() {
    let (_d, folder) = test_folder();
    let m = Manifest { fingerprint: Some("0".repeat(32)), ..example(IMAGE, Level::Full, None) };
    let shape = NewImage::plain(1 << 20, 65536);
    for finished in [false, true] {
        publish::create_image(&folder, IMAGE, &shape, FileMode::default()).unwrap();
        announce_whole(&folder, &m);
        assert_eq!(concluded(&folder, finished), ImageOutcome::Removed);
        assert_eq!(there(&folder), [false; 4]);
    }
}
