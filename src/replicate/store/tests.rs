use super::*;

/// A directory with the folder of a disk, and what is in it of an image.
fn store() -> (tempfile::TempDir, Store, Folder) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let folder = publish::make_folders(&root.join("sda")).unwrap();
    let store = Store::open(&root, FileMode::default()).unwrap();
    (dir, store, folder)
}

fn is_announced(folder: &Folder) -> bool {
    folder.folder(manifest::FOLDER).unwrap().has("FULL-1-sda.partial.json")
}

fn announce(folder: &Folder) {
    let text = b"of a backup";
    publish::announce_text(folder, "FULL-1-sda".as_ref(), text, FileMode::default()).unwrap();
}

#[test]
fn an_announcement_is_taken_back_only_where_its_image_has_no_name() {
    let (_dir, _store, folder) = store();
    let name = OsStr::new("FULL-1-sda");
    let file = folder.create_new("FULL-1-sda").unwrap();
    announce(&folder);
    withdraw_unnamed(&folder, name, &file).unwrap();
    assert!(is_announced(&folder), "it has its name, which may not survive");
    // Another file's name.
    folder.remove_if_there(name).unwrap();
    folder.create_new(name).unwrap();
    withdraw_unnamed(&folder, name, &file).unwrap();
    assert!(!is_announced(&folder));
    folder.remove_if_there(name).unwrap();
    announce(&folder);
    withdraw_unnamed(&folder, name, &file).unwrap();
    assert!(!is_announced(&folder));
}

#[test]
fn what_a_backup_left_keeps_its_announcement_and_no_other_image_gets_its_name() {
    let (_dir, store, open) = store();
    let folder = FolderPath::of(Path::new("sda")).unwrap();
    let name = WireName::of("FULL-1-sda".as_ref()).unwrap();
    let begin = || store.begin(&folder, &name, 1, Modified { seconds: 1, nanos: 0 });
    let own = blake3::hash(b"x").to_hex().to_string();
    let mut incoming = begin().unwrap();
    incoming.data(b"x").unwrap();
    let whole = incoming.complete(&own, true, &|| Ok(())).unwrap();
    // A backup comes to its end meanwhile, and is killed.
    open.create_new("FULL-1-sda.partial").unwrap();
    announce(&open);
    assert_eq!(begin().err().map(|e| e.kind()), Some(Kind::Exists));
    assert_eq!(store.commit(whole, None, &[]).unwrap_err().kind(), Kind::Exists);
    assert!(!open.has("FULL-1-sda"));
    std::fs::write(open.join("FULL-1-sda"), "x").unwrap();
    let adopted = store.adopt((&folder, &name), &own, b"{}", &[], &|| Ok(()));
    assert_eq!(adopted.unwrap_err().kind(), Kind::Exists);
    assert!(is_announced(&open) && open.has("FULL-1-sda.partial"));
}

#[test]
fn reading_an_image_back_or_for_its_hash_ends_when_the_user_wants_that() {
    let (_dir, store, open) = store();
    let folder = FolderPath::of(Path::new("sda")).unwrap();
    let name = WireName::of("FULL-1-sda".as_ref()).unwrap();
    let own = blake3::hash(b"x").to_hex().to_string();
    let stop = || Err(Error::new(Kind::Interrupted, "interrupted"));
    let mut incoming = store.begin(&folder, &name, 1, Modified { seconds: 1, nanos: 0 }).unwrap();
    incoming.data(b"x").unwrap();
    let ended = incoming.complete(&own, true, &stop).err();
    assert_eq!(ended.map(|e| e.kind()), Some(Kind::Interrupted));
    std::fs::write(open.join("FULL-1-sda"), "x").unwrap();
    let adopted = store.adopt((&folder, &name), &own, b"{}", &[], &stop);
    assert_eq!(adopted.unwrap_err().kind(), Kind::Interrupted);
}

#[test]
fn a_kept_file_is_no_manifest_of_a_file_that_is_there() {
    let (_dir, store, open) = store();
    let folder = FolderPath::of(Path::new("sda")).unwrap();
    let keep = |name: &str| {
        let name = WireName::of(name.as_ref()).unwrap();
        store.small(&folder, SmallKind::Kept, &name, b"{}").map_err(|e| e.kind())
    };
    std::fs::write(open.join("config-web.raw"), "somebody's").unwrap();
    assert_eq!(keep("config-web.raw.json"), Err(Kind::Unsupported));
    assert_eq!(keep("config-1-0-vm.json"), Ok(()));
}

#[test]
fn only_the_description_of_a_disk_that_is_there_is_replaced() {
    let (dir, store, open) = store();
    let (top, sda) = (FolderPath::default(), FolderPath::of(Path::new("sda")).unwrap());
    let describe = |folder: &FolderPath, to: &str| {
        let name = WireName::of(to.as_ref()).unwrap();
        store.small(folder, SmallKind::DiskConfig, &name, b"new").map_err(|e| e.kind())
    };
    std::fs::write(open.join("FULL-1-sda.qcow2"), "an image").unwrap();
    std::fs::write(open.join("vdb"), "an image").unwrap();
    for (folder, name, want) in [
        (&top, "site.config", Err(Kind::Exists)),
        (&top, "sda.config", Err(Kind::Exists)),
        (&sda, "site.config", Err(Kind::Exists)),
        // Beside its images, and one folder up.
        (&sda, "sda.qcow2.config", Ok(())),
        (&top, "sda.qcow2.config", Ok(())),
        (&sda, "vdb.config", Ok(())),
    ] {
        let path = dir.path().join(folder.path()).join(name);
        std::fs::write(&path, "old").unwrap();
        assert_eq!(describe(folder, name), want, "{path:?}");
        let is = std::fs::read(&path).unwrap();
        assert_eq!(is, if want.is_ok() { b"new" } else { b"old" }, "{path:?}");
    }
    // One that is larger than a description is none, and a new one is no matter.
    std::fs::write(open.join("sda.qcow2.config"), vec![0; (1 << 20) + 1]).unwrap();
    assert!(describe(&sda, "sda.qcow2.config").is_err());
    assert_eq!(describe(&sda, "later.config"), Ok(()));
}

#[test]
fn a_link_leads_to_an_image_and_one_that_is_there_to_no_image_that_is_not() {
    let (_dir, store, open) = store();
    let sda = FolderPath::of(Path::new("sda")).unwrap();
    let link = |text: &str| {
        let name = WireName::of("image".as_ref()).unwrap();
        store.small(&sda, SmallKind::Link, &name, text.as_bytes()).map_err(|e| e.kind())
    };
    let leads_to = || open.read_link("image").unwrap();
    std::fs::create_dir(open.join("folder")).unwrap();
    for no_image in [".fleecefs", "uuid", "sda.config", "FULL-2-sda.partial", "folder"] {
        assert_eq!(link(no_image), Err(Kind::Unsupported), "{no_image}");
        assert!(!open.has("image"), "{no_image}");
    }
    // As at the source, where its image is gone, too.
    assert_eq!(link("FULL-1-sda"), Ok(()));
    assert_eq!(link("FULL-2-sda"), Err(Kind::Incomplete));
    std::fs::write(open.join("FULL-2-sda"), "x").unwrap();
    assert_eq!(link("FULL-2-sda"), Ok(()));
    for no_image in [".fleecefs", "folder", "FULL-3-sda"] {
        assert!(link(no_image).is_err(), "{no_image}");
    }
    assert_eq!(leads_to(), Path::new("FULL-2-sda"));
}

#[test]
fn nothing_is_told_of_what_is_in_files_that_are_no_images() {
    let (_dir, store, open) = store();
    let sda = FolderPath::of(Path::new("sda")).unwrap();
    let names = ["sda.config", "uuid", "FULL-1-sda"];
    names.iter().for_each(|n| std::fs::write(open.join(n), "secret").unwrap());
    let asked = names.map(|n| WireName::of(n.as_ref()).unwrap());
    let held = store.held(&sda, &asked, true).unwrap();
    let told: Vec<bool> = held.iter().flatten().map(|h| h.fingerprint.is_some()).collect();
    assert_eq!(told, [false, false, true]);
    // Nor by what a point is said to need.
    let fingerprint = manifest::fingerprint(&open.join("uuid")).unwrap();
    let needs = [Needed { folder: sda, name: asked[1].clone(), fingerprint }];
    assert_eq!(store.check_needs(&needs).unwrap_err().kind(), Kind::Incomplete);
}
