//! A module imports only from rooms above its own: the order is the one in `src/lib.rs`.

use std::path::{Path, PathBuf};

/// The rooms, lowest first. A room may import from those before it, and from itself.
const ORDER: [&str; 22] = [
    "text", "error", "units", "progress", "folder", "storage", "hash", "lock", "extent", "layer",
    "qemu_img", "chain", "image", "fs", "fuse", "qmp", "backup", "restore", "verify", "prune",
    "cli", "main",
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// The room of a source file: the first folder or the file's name below `src`.
fn room(src: &Path, file: &Path) -> String {
    let below = file.strip_prefix(src).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_string()
}

fn rank(room: &str) -> usize {
    ORDER.iter().position(|r| *r == room).unwrap_or_else(|| panic!("{room} has no place in ORDER"))
}

/// The rooms that a source names as `crate::room`, outside its tests.
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("");
    let lines: Vec<_> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = lines.join("\n");
    code.split("crate::").skip(1).flat_map(named).collect()
}

/// The rooms named by what follows `crate::`: one, or several in braces.
fn named(rest: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        let text = text.trim_start();
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = vec![word(rest)];
    if let Some(list) = rest.strip_prefix('{') {
        let (mut depth, mut item) = (1, String::new());
        for c in list.chars() {
            depth += i32::from(c == '{') - i32::from(c == '}');
            if depth == 0 || (depth == 1 && c == ',') {
                found.push(word(&item));
                item.clear();
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

#[test]
fn imports_are_seen_however_they_are_written() {
    let source = "use crate::error::Kind;\n// crate::nobody\nuse crate::{\n    cli::{map, list},\n    \
        fs, units as u,\n};\nfn f() { crate::fuse::mount() }\n#[cfg(test)]\nmod tests {crate::main}";
    assert_eq!(imports(source), ["error", "cli", "fs", "units", "fuse"]);
}

#[test]
fn rooms_import_only_from_rooms_above() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in &files {
        let own = room(&src, file);
        if own == "lib" {
            continue;
        }
        for import in imports(&std::fs::read_to_string(file).unwrap()) {
            if rank(&import) > rank(&own) {
                wrong.push(format!("{} imports {import}", file.display()));
            }
        }
    }
    assert!(files.len() > 30 && wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_one_room_names_the_fuse_library() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let names = |f: &&PathBuf| std::fs::read_to_string(f).unwrap().contains("fuser::");
    let rooms: Vec<_> = files.iter().filter(names).map(|f| room(&src, f)).collect();
    assert!(!rooms.is_empty() && rooms.iter().all(|r| r == "fuse"), "{rooms:?}");
}

/// The code of each source outside its tests.
fn code() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let code = |f: PathBuf| {
        let text = std::fs::read_to_string(&f).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("").to_string();
        (f.strip_prefix(&src).unwrap().to_path_buf(), code)
    };
    files.into_iter().map(code).collect()
}

#[test]
fn text_reaches_the_terminal_in_one_way() {
    // Apart from the images that `restore` writes, what a guardian tells the backup that started
    // it, and the question whether there is a terminal.
    let others = ["cli/output.rs", "restore/mod.rs", "backup/guardian.rs"].map(Path::new);
    let wrong = |code: &str| {
        code.lines().any(|l| {
            let asks = l.contains("is_terminal()");
            !asks && (l.contains("io::stdout()") || l.contains("io::stderr()"))
        })
    };
    let found: Vec<_> =
        code().into_iter().filter(|(f, c)| !others.contains(&f.as_path()) && wrong(c)).collect();
    assert!(found.is_empty(), "{:?}", found.iter().map(|f| &f.0).collect::<Vec<_>>());
}

#[test]
fn json_for_people_and_paths_in_messages_are_made_visible() {
    // Files of the backup's own, orders to a guardian, addresses.
    let data = [
        "text.rs",
        "chain/linking.rs",
        "chain/removal.rs",
        "chain/manifest/mod.rs",
        "chain/manifest/store.rs",
        "restore/verbs/switch.rs",
    ];
    let data = [
        data.as_slice(),
        &[
            "backup/targets.rs",
            "backup/shared.rs",
            "backup/disk.rs",
            "backup/journal.rs",
            "backup/leftover.rs",
            "backup/guardian.rs",
        ],
    ]
    .concat();
    let paths = ["qmp/address.rs", "backup/vm.rs"];
    let mut wrong = Vec::new();
    for (file, code) in code() {
        let is = |list: &[&str]| list.iter().any(|f| file == Path::new(f));
        let tests = file.ends_with("tests.rs") || file.ends_with("testing.rs");
        let json = ["to_string", "to_vec", "to_writer"]
            .iter()
            .any(|f| code.contains(&format!("serde_json::{f}")));
        if !tests && ((json && !is(&data)) || (code.contains(".display()") && !is(&paths))) {
            wrong.push(file);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
