//! A module imports only from modules above its own: the order is the one in the head of `src/lib.rs`.

use std::path::{Path, PathBuf};

/// The modules, lowest first: as the head of `src/lib.rs` lists them, and the program. A module may import
/// from those before it, and from itself.
fn order() -> Vec<String> {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"));
    let lib = lib.unwrap();
    let head = lib.lines().filter_map(|l| l.strip_prefix("//! "));
    // `- [`text`], [`error`]: what everybody needs`.
    let named = |line: &str| -> Vec<String> {
        let modules = line.split("[`").skip(1).filter_map(|part| part.split_once("`]"));
        modules.map(|(module, _)| module.to_string()).collect()
    };
    let modules = head.flat_map(named).chain(["main".to_string()]).collect::<Vec<_>>();
    assert!(modules.len() > 20, "{modules:?}");
    modules
}

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

/// The module of a source file: the first folder or the file's name below `src`.
fn module(src: &Path, file: &Path) -> String {
    let below = file.strip_prefix(src).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_string()
}

fn rank(order: &[String], module: &str) -> usize {
    let place = order.iter().position(|r| r == module);
    place.unwrap_or_else(|| panic!("{module} has no place in the head of src/lib.rs"))
}

/// The modules that a source names as `crate::module`, outside its tests.
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("");
    let lines: Vec<_> = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = lines.join("\n");
    code.split("crate::").skip(1).flat_map(named).collect()
}

/// The modules named by what follows `crate::`: one, or several in braces.
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
fn modules_import_only_from_modules_above() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let (order, mut wrong) = (order(), Vec::new());
    for file in &files {
        let own = module(&src, file);
        if own == "lib" {
            continue;
        }
        for import in imports(&std::fs::read_to_string(file).unwrap()) {
            if rank(&order, &import) > rank(&order, &own) {
                wrong.push(format!("{} imports {import}", file.display()));
            }
        }
    }
    assert!(files.len() > 30 && wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_one_module_names_the_fuse_library() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let names = |f: &&PathBuf| std::fs::read_to_string(f).unwrap().contains("fuser::");
    let modules: Vec<_> = files.iter().filter(names).map(|f| module(&src, f)).collect();
    assert!(!modules.is_empty() && modules.iter().all(|r| r == "fuse"), "{modules:?}");
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
    // Apart from the images that `restore` writes, what a watchdog tells the backup that started
    // it, what `replicate --receive` tells the sender, and the question whether there is a terminal.
    let others =
        ["output/mod.rs", "restore/mod.rs", "backup/freeze/watchdog.rs", "cli/replicate.rs"];
    let others = others.map(Path::new);
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
    // Files of the backup's own, orders to a watchdog, addresses.
    let data = [
        "text.rs",
        "journal/lines.rs",
        "journal/linking.rs",
        "journal/removal.rs",
        "manifest/mod.rs",
        "manifest/store.rs",
        "overlay/kept.rs",
        "rewrite/replace.rs",
    ];
    let data = [
        data.as_slice(),
        &[
            "backup/target/targets.rs",
            "backup/target/file_mode.rs",
            "backup/run/disk.rs",
            "backup/state/leftover.rs",
            "backup/freeze/watchdog.rs",
        ],
    ]
    .concat();
    let paths = ["qmp/address.rs", "backup/publish/vm.rs"];
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

/// A file, by the names of the modules down to it: `["chain", "scan"]`; `mod.rs` has its folder's.
type Module = Vec<String>;

/// Paths with their braces and line breaks resolved: `a::{b, c::d as e}` names `a::b` and `a::c::d`.
fn paths(written: &str) -> Vec<String> {
    let written = written.split_whitespace().collect::<Vec<_>>().join(" ");
    let Some((head, rest)) = written.split_once('{') else {
        return vec![written.split(" as ").next().unwrap_or("").trim().to_string()];
    };
    let body = rest.rsplit_once('}').map_or(rest, |(body, _)| body);
    let (mut items, mut item, mut depth) = (Vec::new(), String::new(), 0);
    for c in body.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match c {
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            c => item.push(c),
        }
    }
    items.push(item);
    let items = items.iter().filter(|i| !i.trim().is_empty());
    items.flat_map(|i| paths(i)).map(|p| format!("{}{p}", head.trim())).collect()
}

/// The code without comments, texts, and who may see an item.
fn bare(code: &str) -> String {
    let mut bare = String::new();
    for line in code.lines().filter(|l| !l.trim_start().starts_with("//")) {
        // Every second part is inside a text, in lines without escaped quotes.
        let line = line.trim_start();
        let line = match line.strip_prefix("pub(in ").and_then(|rest| rest.split_once(')')) {
            Some((_, item)) => item,
            None => line,
        };
        bare.extend(line.split('"').step_by(2));
        bare.push('\n');
    }
    bare
}

/// All that a file names: in its `use` lines, with those that it passes on, and in its code.
struct Named {
    imports: Vec<String>,
    passed_on: Vec<String>,
}

/// Whether this ends with `pub` or `pub(somewhere)`.
fn is_public(before: &str) -> bool {
    let word = before.rsplit(|c: char| c.is_whitespace() || c == ']' || c == '}').next();
    word.is_some_and(|w| w == "pub" || w.starts_with("pub("))
}

fn named_in(code: &str) -> Named {
    let (mut imports, mut passed_on, mut rest) = (Vec::new(), Vec::new(), String::new());
    for statement in code.split_inclusive(';') {
        let begin = statement.rfind("use ").filter(|b| {
            let before = statement[..*b].trim_end();
            before.is_empty() || before.ends_with(['}', ';', ']']) || is_public(before)
        });
        match begin {
            Some(b) => {
                rest.push_str(&statement[..b]);
                let list = paths(statement[b + 4..].trim_end_matches(';'));
                let public = is_public(statement[..b].trim_end());
                passed_on.extend(list.clone());
                imports.extend(list.into_iter().filter(|_| !public));
            }
            None => rest.push_str(statement),
        }
    }
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let words = rest.split(|c| !is_path(c)).filter(|w| w.contains("::"));
    imports.extend(words.map(str::to_string));
    Named { imports, passed_on }
}

/// All files, and what they name.
struct Files(std::collections::BTreeMap<Module, Named>);

impl Files {
    fn read() -> Files {
        let mut files = std::collections::BTreeMap::new();
        for (file, code) in code() {
            let name = file.file_stem().unwrap();
            if name == "tests" || name == "testing" {
                continue;
            }
            let mut module: Module =
                file.with_extension("").iter().map(|p| p.to_string_lossy().into()).collect();
            module.pop_if(|last| last == "mod");
            files.insert(module, named_in(&bare(&code)));
        }
        Files(files)
    }

    /// The file in which what `from` calls `path` is.
    fn find(&self, from: &Module, path: &str, depth: usize) -> Option<Module> {
        let mut at = from.clone();
        let mut words = path.split("::").map(str::trim).peekable();
        match words.peek()? {
            &"crate" => (at, _) = (Module::new(), words.next()),
            &"self" => _ = words.next(),
            &"super" => {
                while words.next_if(|w| *w == "super").is_some() {
                    at.pop();
                }
            }
            word => {
                self.0.contains_key(&[at.clone(), vec![word.to_string()]].concat()).then_some(())?
            }
        }
        while let Some(word) = words.peek() {
            let below = [at.clone(), vec![word.to_string()]].concat();
            if !self.0.contains_key(&below) && !self.0.keys().any(|k| k.starts_with(&below)) {
                break;
            }
            at = below;
            words.next();
        }
        // What a module passes on is where it comes from.
        let item = words.next().filter(|_| depth < 5);
        let passed = item.and_then(|item| {
            let list = &self.0.get(&at)?.passed_on;
            let path = list.iter().find(|p| p.rsplit("::").next() == Some(item))?;
            self.find(&at, path, depth + 1)
        });
        passed.or_else(|| self.0.contains_key(&at).then_some(at))
    }

    /// What a file imports from other files of its top module.
    fn beside(&self, file: &Module) -> Vec<Module> {
        let found = self.0[file].imports.iter().filter_map(|p| self.find(file, p, 0));
        found.filter(|f| f != file && f.first() == file.first()).collect()
    }

    /// A way from `file` back to it.
    fn circle(&self, file: &Module) -> Option<Vec<Module>> {
        let mut ways = vec![vec![file.clone()]];
        let mut seen = std::collections::BTreeSet::new();
        while let Some(way) = ways.pop() {
            for next in self.beside(way.last()?) {
                let longer = [way.clone(), vec![next.clone()]].concat();
                if next == *file {
                    return Some(longer);
                }
                if seen.insert(next) {
                    ways.push(longer);
                }
            }
        }
        None
    }
}

#[test]
fn what_a_file_names_is_found_however_it_is_written() {
    let code = "pub use a::A;\nuse super::{b::{C, D as E}, f};\nfn g() { crate::h::i(); j::k() }";
    let named = named_in(code);
    assert_eq!(named.passed_on, ["a::A", "super::b::C", "super::b::D", "super::f"]);
    let all = ["super::b::C", "super::b::D", "super::f", "crate::h::i", "j::k"];
    assert_eq!(named.imports, all);
}

#[test]
fn a_circle_of_files_is_found() {
    let module = |name: &str| -> Module { name.split('/').map(str::to_string).collect() };
    let files = |last: &str| {
        let code = [
            ("a", "mod b;\nmod c;\nmod d;\npub use b::B;"),
            ("a/b", "use super::c::{C, E};\npub struct B;"),
            ("a/c", "fn f() { crate::a::d::g() }"),
            ("a/d", last),
        ];
        Files(code.map(|(name, code)| (module(name), named_in(&bare(code)))).into())
    };
    let circle = files("use super::B;\nfn g() {}").circle(&module("a/b"));
    let way = ["a/b", "a/c", "a/d", "a/b"].map(module);
    assert_eq!(circle.as_deref(), Some(way.as_slice()));
    assert_eq!(files("use crate::z::B;\nfn g() {}").circle(&module("a/b")), None);
}

#[test]
fn files_of_a_module_import_one_way() {
    let files = Files::read();
    let mut wrong = Vec::new();
    for file in files.0.keys().filter(|f| f.first().is_some_and(|top| top != "lib")) {
        if let Some(way) = files.circle(file) {
            let names: Vec<String> = way.iter().map(|m| m.join("/")).collect();
            wrong.push(names.join(" -> "));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Seen at all: what a folder's own file imports, what it passes on, what is inside it.
    let [scan, tree, format] = [&["scan"][..], &["walk", "tree"], &["link", "format"]]
        .map(|f| ["chain"].iter().chain(f).map(|s| s.to_string()).collect::<Module>());
    assert!(files.beside(&scan).contains(&tree) && files.beside(&scan).contains(&format));
}

/// What each folder inside a top module imports from its other folders and files, by the files that do.
fn between_folders(files: &Files) -> std::collections::BTreeMap<[String; 2], [String; 2]> {
    let mut found = std::collections::BTreeMap::new();
    for from in files.0.keys().filter(|f| f.len() > 1) {
        for to in files.beside(from).into_iter().filter(|to| to.len() > 1 && to[1] != from[1]) {
            let edge = [&from[..2], &to[..2]].map(|m| m.join("/"));
            found.entry(edge).or_insert([from.join("/"), to.join("/")]);
        }
    }
    found
}

#[test]
fn folders_of_a_module_import_one_way() {
    let edges = between_folders(&Files::read());
    assert!(edges.len() > 60, "{edges:?}");
    // Whatever imports nothing that is left is taken away; what stays is in a circle, or leads to one.
    let mut left: std::collections::BTreeSet<&[String; 2]> = edges.keys().collect();
    loop {
        let from: std::collections::BTreeSet<_> = left.iter().map(|[from, _]| from).collect();
        let before = left.len();
        left = left.iter().copied().filter(|[_, to]| from.contains(to)).collect();
        if left.len() == before {
            break;
        }
    }
    let circle: Vec<_> = left.iter().map(|e| edges[*e].join(" -> ")).collect();
    assert!(circle.is_empty(), "{}", circle.join("\n"));
}
