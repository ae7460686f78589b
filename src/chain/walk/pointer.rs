//! Names of other images as they stand inside one: a path, `file:` with a path, or the `json:`
//! description that QEMU writes for a node with options. Pure: no file is touched.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Kind};

/// A backing pointer that means a plain file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::chain) struct Pointer {
    /// The path, as seen from the image's folder.
    pub path: PathBuf,
    /// The format that a `json:` description gives the file.
    pub format: Option<String>,
}

/// Options that say how a node is used, and not which bytes it has.
const HARMLESS: [&str; 10] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "cache",
    "discard",
    "detect-zeroes",
    "aio",
    "locking",
    "force-share",
    "backing",
];
/// The most that a description may be nested: a format over a protocol.
const MAX_DEPTH: u32 = 2;

/// Reads a backing pointer.
///
/// # Errors
/// `Incomplete` if it is no plain file: another protocol, a folder, a description of more than one
/// file.
pub(in crate::chain) fn parse(pointer: &str) -> Result<Pointer, Error> {
    let plain = |path: &str| Pointer { path: path.into(), format: None };
    let found = match (pointer.strip_prefix("json:"), pointer.strip_prefix("file:")) {
        (Some(text), _) => described(text),
        (None, Some(path)) => Some(plain(path)),
        // QEMU takes everything before a colon for a protocol unless a slash comes first.
        (None, None) => {
            let head = pointer.split('/').next().unwrap_or_default();
            (!head.contains(':')).then(|| plain(pointer))
        }
    };
    found.filter(|p| is_file_name(&p.path)).ok_or_else(|| {
        Error::new(
            Kind::Incomplete,
            format!(
                "its backing file name {pointer:?} is not a plain \
                                              file name"
            ),
        )
        .remedy("files named in an image are only used inside the backup directory")
    })
}

/// Folder and name of a backing pointer.
///
/// # Errors
/// As [`parse`].
pub(in crate::chain) fn split(pointer: &str) -> Result<(PathBuf, OsString), Error> {
    let path = parse(pointer)?.path;
    let name = path.file_name().unwrap_or_default().to_os_string();
    Ok((path.parent().unwrap_or(Path::new("")).to_path_buf(), name))
}

/// The name of the file that a backing pointer means; `None` if that is no plain file.
pub fn backing_name(pointer: &str) -> Option<OsString> {
    split(pointer).ok().map(|(_, name)| name)
}

fn is_file_name(path: &Path) -> bool {
    path.file_name().is_some() && !path.as_os_str().as_encoded_bytes().ends_with(b"/")
}

fn described(text: &str) -> Option<Pointer> {
    let Value::Object(flat) = serde_json::from_str(text).ok()? else { return None };
    // The protocol alone has the file's bytes as they are.
    let raw = |p: Pointer| Pointer { format: p.format.or_else(|| Some("raw".into())), ..p };
    node(&nested(flat)?, MAX_DEPTH).map(raw)
}

/// `{"file.filename": x}` as `{"file": {"filename": x}}`: QEMU takes both.
fn nested(flat: Map<String, Value>) -> Option<Map<String, Value>> {
    let mut out = Map::new();
    for (key, value) in flat {
        let Some((head, rest)) = key.split_once('.') else {
            match (value, out.get_mut(&key)) {
                (value, None) => drop(out.insert(key, value)),
                (Value::Object(more), Some(Value::Object(known))) => known.extend(more),
                _ => return None,
            }
            continue;
        };
        let inner = out.entry(head).or_insert_with(|| Value::Object(Map::new()));
        inner.as_object_mut()?.insert(rest.to_string(), value);
    }
    Some(out)
}

/// A format over a protocol, or the protocol alone.
fn node(options: &Map<String, Value>, depth: u32) -> Option<Pointer> {
    let known = |k: &String| HARMLESS.contains(&k.as_str());
    let own = |k: &String| matches!(k.as_str(), "driver" | "file" | "filename");
    if depth == 0 || !options.keys().all(|k| known(k) || own(k)) {
        return None;
    }
    // A node of its own below would be another chain than the one that is here.
    if options.get("backing").is_some_and(|b| !b.is_null()) {
        return None;
    }
    // Without one QEMU would look at the content.
    let driver = options.get("driver")?.as_str()?;
    match (options.get("file"), options.get("filename")) {
        (None, Some(name)) if driver == "file" => {
            Some(Pointer { path: name.as_str()?.into(), format: None })
        }
        (Some(Value::Object(file)), None) if driver != "file" => {
            let below = node(&nested(file.clone())?, depth.checked_sub(1)?)?;
            below.format.is_none().then(|| Pointer { format: Some(driver.into()), ..below })
        }
        _ => None,
    }
}

/// `path` as seen from `folder`, without `.` and `..`; `None` if it leads above the root. Purely by
/// name: nothing outside may be touched, not even to look whether it is there.
pub(in crate::chain) fn normalise(folder: &Path, path: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in folder.join(path).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop().then_some(())?;
            }
            other => clean.push(other),
        }
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(pointer: &str) -> Option<(String, Option<String>)> {
        let p = parse(pointer).ok()?;
        Some((p.path.to_str().unwrap().to_string(), p.format))
    }

    #[test]
    fn what_qemu_writes_for_a_plain_file_is_its_path() {
        for (pointer, wanted) in [
            ("a", "a"),
            ("../x/a", "../x/a"),
            ("/x/a:b", "/x/a:b"),
            ("file:a", "a"),
            ("file:///x/a", "///x/a"),
        ] {
            assert_eq!(path(pointer), Some((wanted.into(), None)), "{pointer}");
        }
        let bytes = path(r#"json:{"driver":"file","filename":"a"}"#);
        assert_eq!(bytes, Some(("a".into(), Some("raw".into()))));
        for pointer in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/b/a"}}"#,
            r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"/b/a"}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/b/a","locking":"off"},"backing":null}"#,
        ] {
            assert_eq!(path(pointer), Some(("/b/a".into(), Some("qcow2".into()))), "{pointer}");
        }
    }

    #[test]
    fn what_is_more_than_a_plain_file_is_none() {
        for pointer in [
            "",
            "/",
            "..",
            "a/..",
            "a/",
            "nbd:x",
            "https://h/a",
            "fat:a",
            "json:{}",
            "json:[",
            r#"json:{"driver":"nbd","host":"h"}"#,
            r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"a"}}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"nbd","filename":"a"}}"#,
            r#"json:{"driver":"qcow2","file":"node1"}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a"},"backing":{"driver":"null-co"}}"#,
            r#"json:{"driver":"raw","file":{"driver":"qcow2","file":{"driver":"file","filename":"a"}}}"#,
            r#"json:{"file":{"filename":"a"}}"#,
        ] {
            assert_eq!(path(pointer), None, "{pointer}");
        }
        let deep = format!("json:{}1{}", "{\"file\":".repeat(50), "}".repeat(50));
        assert_eq!(path(&deep), None);
    }
}
