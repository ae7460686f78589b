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
