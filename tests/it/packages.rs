//! The packages that are compiled in are such as `deny.toml` allows: by their licences, where they are from, and by
//! name. (cargo-deny checks the same and more; few machines have it.)

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The texts of a list in deny.toml.
fn list(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let begin = format!("\n{name} = [");
    let list = text.split_once(&begin).expect(name).1.split_once(']').unwrap().0;
    list.split('"').skip(1).step_by(2).map(str::to_string).collect()
}

/// Whether a licence expression can be met by what is allowed.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.trim();
    // `A/B` is how `A OR B` was written once.
    for (separator, all) in [(" AND ", true), (" OR ", false), ("/", false)] {
        let parts = outermost(expression, separator);
        if parts.len() > 1 {
            let mut met = parts.iter().map(|p| is_allowed(p, allowed));
            return if all { met.all(|m| m) } else { met.any(|m| m) };
        }
    }
    match expression.strip_prefix('(').and_then(|e| e.strip_suffix(')')) {
        Some(inner) => is_allowed(inner, allowed),
        None => allowed.iter().any(|a| a == expression),
    }
}

/// The parts of an expression at the separators that are in no parentheses. (OR binds less than AND: whoever asks for
/// AND first gets a part that is too long, and that no licence is called.)
fn outermost<'a>(expression: &'a str, separator: &str) -> Vec<&'a str> {
    let (mut parts, mut from) = (Vec::new(), 0);
    for (at, _) in expression.match_indices(separator) {
        let open = expression[..at].matches('(').count();
        if open == expression[..at].matches(')').count() {
            parts.push(&expression[from..at]);
            from = at + separator.len();
        }
    }
    parts.push(&expression[from..]);
    parts
}

#[test]
fn expressions_are_met_by_one_of_several_or_by_all() {
    let allowed = ["MIT".to_string(), "Unicode-3.0".to_string()];
    for good in ["MIT", "Apache-2.0 OR MIT", "GPL-3.0/MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(is_allowed(good, &allowed), "{good}");
    }
    for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0"] {
        assert!(!is_allowed(bad, &allowed), "{bad}");
    }
}

#[test]
fn packages_are_such_as_deny_toml_allows() {
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50, "{}", packages.len());
    let (allowed, denied) = (list("allow"), list("deny"));
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let (name, licence) = (text("name"), text("license"));
        assert!(is_allowed(licence, &allowed), "{name}: {licence:?}");
        assert!(!denied.iter().any(|d| d == name), "{name}");
        let source = text("source");
        let is_ours = name == env!("CARGO_PKG_NAME") && source.is_empty();
        let registry = "registry+https://github.com/rust-lang/crates.io-index";
        assert!(is_ours || source == registry, "{name}: {source}");
    }
}

/// What `Cargo.toml` says of the Debian package.
fn deb() -> Value {
    let out = Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    metadata["packages"][0]["metadata"]["deb"].clone()
}

/// The source of an asset, and where it goes.
fn asset(asset: &Value) -> (Option<String>, String) {
    let text = |v: &Value| v.as_str().map(str::to_string);
    match asset.as_array() {
        Some(three) => (text(&three[0]), text(&three[1]).unwrap()),
        None => (text(&asset["source"]), text(&asset["dest"]).unwrap()),
    }
}

/// Whether a path is one that a pattern with at most one star names, which stands for no folder.
fn is_named(path: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        None => path == pattern,
        Some((before, after)) => {
            let rest = path.strip_prefix(before).and_then(|r| r.strip_suffix(after));
            rest.is_some_and(|r| !r.contains('/'))
        }
    }
}

fn files_below(dir: &Path, found: &mut Vec<String>, top: &Path) {
    for path in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if path.is_dir() && !path.is_symlink() {
            files_below(&path, found, top);
        } else {
            found.push(path.strip_prefix(top).unwrap().to_str().unwrap().to_string());
        }
    }
}

/// The Debian package is made of what install.sh installs and of files of the source: each is there, and nothing that
/// is installed is missing.
#[test]
fn the_debian_package_has_all_that_is_installed() {
    let dest = tempfile::tempdir().unwrap();
    let out = Command::new(root().join("contrib/install.sh"))
        .env("DESTDIR", dest.path())
        .env("PREFIX", "/usr")
        .env("BINARY", env!("CARGO_BIN_EXE_fleecefs"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut installed = Vec::new();
    files_below(dest.path(), &mut installed, dest.path());
    let deb = deb();
    let assets: Vec<_> = deb["assets"].as_array().unwrap().iter().map(asset).collect();
    let mut source = Vec::new();
    for folder in ["contrib/systemd", "contrib/deb", "contrib/doc", "contrib"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap()) {
            source.push(format!("{folder}/{}", entry.file_name().into_string().unwrap()));
        }
    }
    source.extend(["README.md".to_string(), "CHANGELOG.md".to_string()]);
    for (from, to) in &assets {
        let Some(from) = from else { continue };
        let found = match from.strip_prefix("target/package/root/") {
            Some(made) => installed.iter().any(|f| is_named(f, made)),
            None => source.iter().any(|f| is_named(f, from)),
        };
        assert!(found, "there is no {from} for {to}");
    }
    let name = |path: &str| Path::new(path).file_name().unwrap().to_str().unwrap().to_string();
    let folder = |path: &str| path[..path.len() - name(path).len()].to_string();
    let has = |file: &String| {
        assets.iter().any(|(from, to)| match from {
            None => name(to) == name(file),
            Some(from) => match from.strip_prefix("target/package/root/") {
                Some(made) => is_named(file, made),
                // A file of the source that goes to the same folder.
                None => *to == folder(file) && is_named(&name(file), &name(from)),
            },
        })
    };
    // A package has its own list; its configuration is where it is read.
    let apart = ["installed", "fleecefs.toml"].map(|n| format!("usr/share/doc/fleecefs/{n}"));
    installed.retain(|f| !apart.contains(f));
    assert!(installed.len() > 50, "{installed:?}");
    let missing: Vec<_> = installed.iter().filter(|f| !has(f)).collect();
    assert!(missing.is_empty(), "not in the package: {missing:?}");
}

/// Runs install.sh for `/usr/local` below `dest`.
fn install(dest: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(root().join("contrib/install.sh"))
        .args(args)
        .env("DESTDIR", dest)
        .env("PREFIX", "/usr/local")
        .env("BINARY", env!("CARGO_BIN_EXE_fleecefs"))
        .output()
        .unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn all_below(dest: &Path) -> Vec<String> {
    let mut found = Vec::new();
    files_below(dest, &mut found, dest);
    found.sort();
    found
}

fn put(dest: &Path, path: &str, text: &str) {
    let path = dest.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// What others have put is neither overwritten nor removed.
#[test]
fn install_sh_leaves_alone_what_it_has_not_put() {
    let dest = tempfile::tempdir().unwrap();
    let dest = dest.path();
    // A program that was copied there.
    put(dest, "usr/local/bin/fleecefs", "mine");
    assert_eq!(install(dest, &["--uninstall"]).0, Some(3));
    let (code, said) = install(dest, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("/usr/local/bin/fleecefs is there"), "{said}");
    assert_eq!(all_below(dest), ["usr/local/bin/fleecefs"]);
    std::fs::remove_file(dest.join("usr/local/bin/fleecefs")).unwrap();

    // A completion of somebody's own, and a file where a link would be.
    let own = "usr/local/share/zsh/site-functions/_fleecefs";
    put(dest, own, "mine");
    put(dest, "sbin/mount.fleecefs", "mine");
    let (code, said) = install(dest, &[]);
    assert!(said.contains(own) && said.contains("/sbin/mount.fleecefs is there"), "{said}");
    assert_eq!((code, all_below(dest).len()), (Some(1), 2), "{said}");
    std::fs::remove_file(dest.join(own)).unwrap();
    std::fs::remove_file(dest.join("sbin/mount.fleecefs")).unwrap();

    // Another fleecefs, as of a package.
    put(dest, "usr/bin/fleecefs", "theirs");
    let link = dest.join("sbin/mount.fuse.fleecefs");
    std::os::unix::fs::symlink("../usr/bin/fleecefs", &link).unwrap();
    let before = all_below(dest);
    for _ in 0..2 {
        let (code, said) = install(dest, &[]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("mount.fuse.fleecefs leads to ../usr/bin/fleecefs"), "{said}");
    }
    assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../usr/bin/fleecefs"));
    assert!(all_below(dest).len() > 50);
    assert_eq!(install(dest, &["--uninstall"]), (Some(0), String::new()));
    assert_eq!(all_below(dest), before);
}

/// Version 0.1.0 wrote no list: what it alone has put says that it was there.
#[test]
fn install_sh_removes_and_replaces_0_1_0() {
    for upgraded in [false, true] {
        let dest = tempfile::tempdir().unwrap();
        let dest = dest.path();
        assert_eq!(install(dest, &[]), (Some(0), String::new()));
        std::fs::remove_file(dest.join("usr/local/share/doc/fleecefs/installed")).unwrap();
        std::fs::remove_file(dest.join("usr/local/share/doc/fleecefs/fleecefs.toml")).unwrap();
        for entry in std::fs::read_dir(dest.join("usr/local/lib/systemd/system")).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "fleecefs@.service" {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
        if upgraded {
            assert_eq!(install(dest, &[]), (Some(0), String::new()));
        }
        assert_eq!(install(dest, &["--uninstall"]), (Some(0), String::new()));
        assert_eq!(all_below(dest), [""; 0]);
    }
}
