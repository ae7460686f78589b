//! Which files of a backup directory go to another one, by their names: a message can name nothing else.
//!
//! A name is a [`PlainName`] of the folder gate; a folder is a list of such names below the backup directory. Hidden
//! ones are refused, so that a receiver whose directory is somebody's home can be led to nothing in it that counts.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backup::publish;
use crate::error::{Error, Kind, Result};
use crate::folder::PlainName;
use crate::layout::name;

/// Folders nested deeper than this are refused: nobody has them, and a path has its limits.
const DEEPEST: usize = 32;
/// And those whose path has more bytes: half of what the kernel takes, so that there is room for where the backup
/// directory is, and for an image or its manifest. No command could reach a point there.
const LONGEST: usize = 2048;

/// One plain file name, as text, or as bytes where it is none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub(crate) struct WireName(PlainName);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes(Vec<u8>),
}

impl TryFrom<Form> for WireName {
    type Error = Error;

    fn try_from(form: Form) -> Result<Self> {
        WireName::of(&match form {
            Form::Text(text) => OsString::from(text),
            Form::Bytes(bytes) => OsString::from_vec(bytes),
        })
    }
}

impl From<WireName> for Form {
    fn from(name: WireName) -> Form {
        let name = name.as_os_str();
        match name.to_str() {
            Some(text) => Form::Text(text.to_string()),
            None => Form::Bytes(name.as_bytes().to_vec()),
        }
    }
}

impl WireName {
    /// Takes it if it is a plain name that is not hidden, and can be shown as it is.
    ///
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn of(name: &OsStr) -> Result<Self> {
        let refused = |why: &str| {
            let text = crate::text::path_text(name);
            Error::new(Kind::Unsupported, format!("'{text}' is not replicated: {why}"))
        };
        if name.as_bytes().starts_with(b".") {
            return Err(refused("a hidden name"));
        }
        if name.as_bytes().iter().any(u8::is_ascii_control) {
            return Err(refused("a control character in its name"));
        }
        PlainName::new(name).map(WireName).map_err(|_| refused("not a plain file name"))
    }

    /// The name.
    pub(crate) fn as_os_str(&self) -> &OsStr {
        self.0.as_os_str()
    }
}

/// A folder below a backup directory; that itself if there are no names.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<WireName>", into = "Vec<WireName>")]
pub(crate) struct FolderPath(Vec<WireName>);

impl TryFrom<Vec<WireName>> for FolderPath {
    type Error = Error;

    fn try_from(names: Vec<WireName>) -> Result<Self> {
        let length: usize = names.iter().map(|n| n.as_os_str().len() + 1).sum();
        match names.len() > DEEPEST || length > LONGEST {
            true => Err(Error::new(
                Kind::Unsupported,
                "folders nested too deep, or with too long names, to be replicated",
            )),
            false => Ok(FolderPath(names)),
        }
    }
}

impl From<FolderPath> for Vec<WireName> {
    fn from(path: FolderPath) -> Self {
        path.0
    }
}

impl FolderPath {
    /// A path relative to the backup directory.
    ///
    /// # Errors
    /// `Unsupported` for hidden folders, those with control characters in their names, and those nested too deep.
    pub(crate) fn of(relative: &Path) -> Result<Self> {
        let names = relative.components().map(|c| WireName::of(c.as_os_str()));
        names.collect::<Result<Vec<_>>>()?.try_into()
    }

    /// The names, outermost first.
    pub(crate) fn names(&self) -> &[WireName] {
        &self.0
    }

    /// The same as a relative path.
    pub(crate) fn path(&self) -> PathBuf {
        self.0.iter().map(WireName::as_os_str).collect()
    }

    /// The folder that it is in; `None` of the backup directory itself.
    pub(crate) fn above(&self) -> Option<FolderPath> {
        let (_, above) = self.0.split_last()?;
        Some(FolderPath(above.to_vec()))
    }
}

/// Small files that belong to images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SmallKind {
    /// The target's id: never replaced.
    Id,
    /// QEMU's description of a disk at its last backup.
    DiskConfig,
    /// A link to an image in the same folder: its text is one name.
    Link,
    /// A file that was given with `--config`, beside the manifests: never replaced.
    Kept,
}

impl SmallKind {
    /// What a name beside images stands for, if it is one of these.
    pub(crate) fn beside_images(name: &OsStr, is_link: bool) -> Option<SmallKind> {
        match () {
            () if is_link && SmallKind::Link.has(name) => Some(SmallKind::Link),
            () if !is_link && SmallKind::Id.has(name) => Some(SmallKind::Id),
            () if !is_link && SmallKind::DiskConfig.has(name) => Some(SmallKind::DiskConfig),
            () => None,
        }
    }

    /// Whether such a file may be called so.
    pub(crate) fn has(self, name: &OsStr) -> bool {
        let bytes = name.as_bytes();
        match self {
            SmallKind::Id => bytes == b"uuid",
            SmallKind::DiskConfig => bytes.ends_with(b".config") && !bytes.starts_with(b"."),
            SmallKind::Link => bytes == b"image" || name::parse_link(name).is_some(),
            SmallKind::Kept => bytes.starts_with(b"config-") && !publish::is_acted_on(bytes),
        }
    }

    /// How many bytes it has at most.
    pub(crate) fn largest(self) -> u64 {
        match self {
            SmallKind::Id => 256,
            SmallKind::Link => 255,
            SmallKind::DiskConfig => 1 << 20,
            SmallKind::Kept => 16 << 20,
        }
    }
}

/// Whether a receiver takes an image of this name: what it leaves must mean an image and its manifest, and nothing
/// else, to whoever comes next. A manifest in the place of a journal would be carried out.
pub(crate) fn may_be_received(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    name::is_image(name)
        && crate::manifest::has_room(name)
        && PlainName::new(crate::manifest::announcement(name)).is_ok()
        && !bytes.starts_with(b"config-")
        && !publish::is_acted_on(bytes)
        && !bytes.iter().any(u8::is_ascii_control)
}

/// Whether the receiver tells anything about a file of this name: an image, or one of its small files.
pub(crate) fn is_known(name: &OsStr) -> bool {
    let small = [SmallKind::Id, SmallKind::DiskConfig, SmallKind::Link];
    name::is_image(name) || small.iter().any(|kind| kind.has(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_plain_files_below_the_directory_and_nothing_else() {
        let read = |text: &str| serde_json::from_str::<WireName>(text).is_ok();
        for name in [r#""FULL-1-sda""#, r#""sda.qcow2""#, "[255, 254]", r#""a b""#] {
            assert!(read(name), "{name}");
        }
        let bad = [
            r#""a\u001b[31m""#,
            "[97,10]",
            r#""..""#,
            r#"".""#,
            r#""""#,
            r#""a/b""#,
            r#"".ssh""#,
            r#""a\u0000""#,
            "[47]",
            "[]",
        ];
        for name in bad.iter().copied().chain(["[46,46]", "7", r#""/""#]) {
            assert!(!read(name), "{name}");
        }
        assert!(!read(&format!("{:?}", "x".repeat(256))));
        let folder = |text: &str| serde_json::from_str::<FolderPath>(text);
        assert_eq!(folder("[]").unwrap().path(), Path::new(""));
        assert_eq!(folder(r#"["vm", "sda"]"#).unwrap().path(), Path::new("vm/sda"));
        assert!(folder(r#"["vm", ".fleecefs"]"#).is_err());
        assert!(folder(&format!("[{}\"x\"]", "\"x\",".repeat(DEEPEST))).is_err());
        // As long as a path may be, and not longer.
        let long =
            |names: usize| format!("[{}\"x\"]", format!("{:?},", "x".repeat(255)).repeat(names));
        assert!(folder(&long(7)).is_ok() && folder(&long(8)).is_err());
        assert!(FolderPath::of(Path::new("vm/a\nb")).is_err());
        assert!(FolderPath::of(Path::new("../x")).is_err());
        assert!(FolderPath::of(Path::new("/x")).is_err());
    }

    #[test]
    fn nothing_is_received_that_would_be_taken_for_a_journal() {
        let received = |name: &str| may_be_received(OsStr::new(name));
        for name in ["FULL-1-sda.qcow2", "sda.raw", "folder", "live.raw", "x.config.raw"] {
            assert!(received(name), "{name}");
        }
        for name in [
            "fold",
            "live-restore-0a",
            "config-x",
            "x.header",
            "removal.journal",
            "a\u{1b}[31m",
            "x\n",
        ] {
            assert!(!received(name), "{name:?}");
        }
    }

    #[test]
    fn names_that_are_no_text_come_through() {
        let name = WireName::of(OsStr::from_bytes(b"FULL-1-\xff")).unwrap();
        let text = serde_json::to_string(&name).unwrap();
        assert_eq!(serde_json::from_str::<WireName>(&text).unwrap(), name);
    }

    #[test]
    fn each_small_file_has_its_names() {
        let of = |name: &str, link| SmallKind::beside_images(OsStr::new(name), link);
        assert_eq!(of("uuid", false), Some(SmallKind::Id));
        assert_eq!(of("sda.qcow2.config", false), Some(SmallKind::DiskConfig));
        assert_eq!(of("FULL-sda", true), Some(SmallKind::Link));
        assert_eq!(of("image", true), Some(SmallKind::Link));
        for (name, link) in [("uuid", true), ("FULL-sda", false), ("x", true), (".config", false)] {
            assert_eq!(of(name, link), None, "{name}");
        }
        assert!(SmallKind::Kept.has(OsStr::new("config-1-0-vm.xml")));
        // What a backup or a recovery does something about, and in the end removes what it names.
        for end in ["header", "journal", "partial", "partial.json", "fleece", "partial.fleece"] {
            let name = format!("config-web.tar.gz.{end}");
            assert!(!SmallKind::Kept.has(OsStr::new(&name)), "{name}");
        }
        assert!(!SmallKind::Kept.has(OsStr::new("lock")) && !is_known(OsStr::new("x.partial")));
    }
}
