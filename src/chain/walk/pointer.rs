//! Names of other images as they stand inside one: a path, `file:` with a path, or the `json:`
//! description that QEMU writes for a node with options. Pure: no file is touched.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Kind};
use crate::text::path_text;

/// A backing pointer that means a plain file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::chain) struct Pointer {
    /// The path, as seen from the image's folder.
    pub path: PathBuf,
    /// The format that a `json:` description gives the file.
    pub format: Option<String>,
}

/// Options that say how a node is used, and not which bytes it has.
const HARMLESS: [&str; 24] = [
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
    // Of files.
    "aio-max-batch",
    "drop-cache",
    "x-check-cache-dropped",
    // Of qcow2: what is cached, checked and counted.
    "lazy-refcounts",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
];
/// The most that a description may be nested: a format over raw, which changes nothing, over a protocol.
const MAX_DEPTH: u32 = 3;

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
        let what = format!("its backing file name {pointer:?} is not a plain file name");
        Error::new(Kind::Incomplete, what).remedy(rename(pointer))
    })
}

/// How a user gives an image the plain name of the file that `pointer` means.
fn rename(pointer: &str) -> String {
    // A file of this name is there, if any is: no protocol is called so.
    let file = Path::new(pointer);
    let is_name = file.extension().is_some_and(|e| e == "qcow2") && !pointer.starts_with("json:");
    let name = match is_name && file.components().count() == 1 && is_no_protocol(pointer) {
        true => path_text(&format!("./{pointer}")),
        false => "NAME".into(),
    };
    format!(
        "files named in an image are only used inside the backup directory: if it is one of those, name it \
         plainly, on a copy: 'qemu-img rebase -u -F qcow2 -b {name} IMAGE'"
    )
}

/// Whether what comes before the first colon is no protocol or filter of QEMU's that is written so.
fn is_no_protocol(pointer: &str) -> bool {
    const WRITTEN_SO: [&str; 17] = [
        "blkdebug",
        "blklogwrites",
        "blkverify",
        "fat",
        "ftp",
        "ftps",
        "gluster",
        "host_device",
        "http",
        "https",
        "iscsi",
        "nbd",
        "nfs",
        "rbd",
        "ssh",
        "nvme",
        "quorum",
    ];
    let head = pointer.split(':').next().unwrap_or_default();
    !WRITTEN_SO.iter().any(|p| head.split('+').next() == Some(p))
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
    let quoted = double_quoted(text);
    let Value::Object(flat) = serde_json::from_str(&quoted).ok()? else { return None };
    let options = nested(flat)?;
    if !options.contains_key("driver") && options.contains_key("file") {
        // The format is the header's to say, as for a plain name.
        let with_driver = with(options, "driver", "raw");
        return node(&with_driver, MAX_DEPTH).map(|p| Pointer { format: None, ..p });
    }
    // The protocol alone has the file's bytes as they are.
    let raw = |p: Pointer| Pointer { format: p.format.or_else(|| Some("raw".into())), ..p };
    node(&options, MAX_DEPTH).map(raw)
}

fn with(mut options: Map<String, Value>, key: &str, value: &str) -> Map<String, Value> {
    options.insert(key.into(), value.into());
    options
}

/// The same with all texts in double quotes: QEMU takes single ones as well.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut open = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, open) {
            ('\'' | '"', None) => {
                open = Some(c);
                out.push('"');
            }
            (c, Some(quote)) if c == quote => {
                open = None;
                out.push('"');
            }
            ('"', Some(_)) => out.push_str("\\\""),
            ('\\', Some(_)) => match chars.next() {
                Some('\'') => out.push('\''),
                Some(next) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            (c, _) => out.push(c),
        }
    }
    out
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
    match (options.get("file"), options.get("filename")) {
        // Inside, QEMU takes what has a file's name and no driver for a plain file.
        (None, Some(name)) if driver(options, depth)? == "file" => {
            Some(Pointer { path: name.as_str()?.into(), format: None })
        }
        (Some(Value::Object(file)), None) => {
            let own = options.get("driver")?.as_str().filter(|d| *d != "file")?;
            let below = node(&nested(file.clone())?, depth.checked_sub(1)?)?;
            let is_bytes = below.format.as_deref().is_none_or(|format| format == "raw");
            is_bytes.then(|| Pointer { format: Some(own.into()), ..below })
        }
        _ => None,
    }
}

fn driver(options: &Map<String, Value>, depth: u32) -> Option<&str> {
    match options.get("driver") {
        None => (depth < MAX_DEPTH).then_some("file"),
        Some(driver) => driver.as_str(),
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
            r#"json:{"driver":"qcow2","file":{"filename":"/b/a"}}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"file","filename":"/b/a"}}}"#,
            r#"json:{"driver":"qcow2","l2-cache-size":"1M","lazy-refcounts":"on","overlap-check.template":"all","file":{"driver":"file","filename":"/b/a"}}"#,
            "json:{'driver':'qcow2','file':{'driver':\"file\",'filename':'/b/a'}}",
        ] {
            assert_eq!(path(pointer), Some(("/b/a".into(), Some("qcow2".into()))), "{pointer}");
        }
    }

    #[test]
    fn without_a_driver_the_header_says_the_format() {
        for pointer in [
            r#"json:{"file":{"driver":"file","filename":"a"}}"#,
            r#"json:{"file":{"filename":"a"}}"#,
            r#"json:{"file.filename":"a"}"#,
        ] {
            assert_eq!(path(pointer), Some(("a".into(), None)), "{pointer}");
        }
    }

    #[test]
    fn texts_may_be_in_single_quotes() {
        for (text, wanted) in [
            ("{'a':'b'}", r#"{"a":"b"}"#),
            (r#"{"it's":'say "x"'}"#, r#"{"it's":"say \"x\""}"#),
            (r"{'it\'s':'\\'}", r#"{"it's":"\\"}"#),
            ("'open", "\"open"),
            ("'end\\", "\"end\\"),
        ] {
            assert_eq!(double_quoted(text), wanted);
        }
    }

    #[test]
    fn the_remedy_says_what_to_do() {
        let remedy = |p: &str| parse(p).unwrap_err().remedy_text().unwrap().to_string();
        assert!(remedy("a:b.qcow2").contains("-b ./a:b.qcow2 IMAGE"));
        for pointer in ["blkdebug::a.qcow2", "ssh://h/a.qcow2", "nbd+unix:x.qcow2", "json:{}", ""] {
            assert!(
                remedy(pointer).contains("qemu-img rebase -u -F qcow2 -b NAME IMAGE"),
                "{pointer}"
            );
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
            r#"json:{"filename":"a"}"#,
            r#"json:{"file":{"file":{"filename":"a"}}}"#,
            r#"json:{"file":{"driver":"nbd","filename":"a"}}"#,
            r#"json:{"file":{"driver":"qcow2","file":{"filename":"a"}}}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"raw","size":512,"file":{"filename":"a"}}}"#,
            r#"json:{"driver":"qcow2","data-file":"x","file":{"filename":"a"}}"#,
            "json:{'driver':'qcow2','file':{'driver':'nbd','filename':'a'}}",
            "json:'",
        ] {
            assert_eq!(path(pointer), None, "{pointer}");
        }
        let deep = format!("json:{}1{}", "{\"file\":".repeat(50), "}".repeat(50));
        assert_eq!(path(&deep), None);
    }
}
