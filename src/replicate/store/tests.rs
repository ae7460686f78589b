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
