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
