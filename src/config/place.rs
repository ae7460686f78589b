//! Where the configuration is, and that nobody else can change it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::problem::{Place, Problem};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, EntryKind, Folder};

/// The main file's name, and that of the folder with a file for each VM.
const MAIN: &str = "fleecefs.toml";
const VMS: &str = "vms.d";
const ENDING: &str = ".toml";

/// A thousand VMs in one file take less.
const MAX_FILE: u64 = 1 << 20;
/// Files in `vms.d`.
const MOST_FILES: usize = 2000;

/// What to do where others could change what root does.
const REMEDY: &str = "the configuration must be in files and folders of root's or your own that nobody else may write to: chown, \
                      chmod go-w";

/// What to do about a program.
const PROGRAM_REMEDY: &str = "a program that is run must be root's or your own, in a folder that nobody else may write to: chown, chmod go-w";

/// A file and its text.
#[derive(Debug)]
pub(super) struct ConfigText {
    /// As it is named in messages.
    pub path: PathBuf,
    /// What it says.
    pub text: String,
}

/// What was read: the main file, and those of VMs by name.
pub(super) type ConfigTexts = (Option<ConfigText>, Vec<VmFile>);

/// A VM's name, its file, and its text; or why that cannot be read.
pub(super) type VmFile = (String, PathBuf, Result<ConfigText>);

/// Where the configuration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConfigFile {
    /// The main file.
    pub path: PathBuf,
    /// Whether somebody has named it, so that it has to be there.
    named: bool,
}

impl ConfigFile {
    /// The file that the user names.
    pub(crate) fn named(path: &Path) -> Self {
        ConfigFile { path: path.to_path_buf(), named: true }
    }

    /// `/etc/fleecefs/fleecefs.toml`; for others than root in the folder of their own configuration.
    ///
    /// # Errors
    /// `Usage` for a user who has no such folder.
    pub(crate) fn usual() -> Result<Self> {
        let folder = match rustix::process::geteuid().is_root() {
            true => PathBuf::from("/etc"),
            false => users_folder()?,
        };
        Ok(ConfigFile { path: folder.join("fleecefs").join(MAIN), named: false })
    }

    /// Reads all its files.
    ///
    /// # Errors
    /// `NotFound` if there is none; `Permission` if others may change one; it cannot be read, or is too large.
    pub(super) fn read(&self) -> Result<ConfigTexts> {
        let main = match folder::absent_is_none(folder::resolve(&self.path)) {
            Ok(None) if self.named => {
                return Err(
                    Error::new(Kind::NotFound, "no such configuration file").at_path(&self.path)
                );
            }
            Ok(found) => found.map(|real| text(&real, &self.path)).transpose()?,
            Err(e) => return Err(Error::io(e, "cannot find the configuration").at_path(&self.path)),
        };
        let vms = self.vm_files()?;
        if main.is_none() && vms.is_empty() {
            return Err(Error::new(Kind::NotFound, "there is no configuration")
                .at_path(&self.path)
                .remedy(
                    "make it, see nightly.md in contrib/doc or /usr/share/doc/fleecefs, or name one \
                     with --config-file",
                ));
        }
        Ok((main, vms))
    }

    fn vm_files(&self) -> Result<Vec<VmFile>> {
        let path = self.path.with_file_name(VMS);
        let failed = |e| Error::io(e, "cannot read the configuration").at_path(&path);
        let Some(real) = folder::absent_is_none(folder::resolve(&path)).map_err(failed)? else {
            return Ok(Vec::new());
        };
        folder::check_unchangeable(&real, REMEDY)?;
        let mut names = Vec::new();
        for entry in Folder::open(&real).and_then(|f| f.entries()).map_err(failed)? {
            // Copies that editors and packagers leave have other names.
            let shown = entry.name.to_string_lossy().into_owned();
            let Some(name) = shown.strip_suffix(ENDING).filter(|n| !n.starts_with('.')) else {
                continue;
            };
            if matches!(entry.kind, EntryKind::File | EntryKind::Link) {
                names.push((name.to_string(), path.join(&entry.name)));
            }
        }
        if names.len() > MOST_FILES {
            let what = format!("more than {MOST_FILES} files");
            return Err(Error::new(Kind::Unsupported, what).at_path(&path));
        }
        names.sort();
        // One that cannot be read is its VM's affair.
        let read = |(name, shown): (String, PathBuf)| {
            let real = folder::resolve(&shown)
                .map_err(|e| Error::io(e, "cannot find the configuration").at_path(&shown));
            let text = real.and_then(|real| text(&real, &shown));
            (name, shown, text)
        };
        Ok(names.into_iter().map(read).collect())
    }
}

/// The text of the file at `real`, which is called `shown`.
fn text(real: &Path, shown: &Path) -> Result<ConfigText> {
    folder::check_unchangeable_file(real, REMEDY)?;
    let failed = |e| Error::io(e, "cannot read the configuration").at_path(shown);
    let bytes = folder::read_small(real, MAX_FILE).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let before = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
        let before = String::from_utf8_lossy(before).into_owned();
        let place = Place::of(shown, &before, before.len());
        let problem = Problem { place, message: "not UTF-8".into(), vm: None };
        Error::new(Kind::Usage, problem.to_string())
    })?;
    Ok(ConfigText { path: shown.to_path_buf(), text })
}

/// The program of a command of the configuration, by its real path.
///
/// # Errors
/// It is not there, or cannot be run; `Permission` if somebody else could put another one in its place.
pub(crate) fn check_program(program: &str) -> Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let path = Path::new(program);
    if !path.is_absolute() {
        let what = format!("'{program}' is not an absolute path");
        return Err(Error::new(Kind::Usage, what).remedy("name the program with its folder"));
    }
    let real =
        folder::resolve(path).map_err(|e| Error::io(e, "cannot find the program").at_path(path))?;
    let meta = folder::check_unchangeable_file(&real, PROGRAM_REMEDY)?;
    match meta.mode() & 0o111 {
        0 => Err(Error::new(Kind::Permission, "the program may not be run")
            .at_path(path)
            .remedy("chmod +x")),
        _ => Ok(real),
    }
}

fn users_folder() -> Result<PathBuf> {
    let absolute = |v: OsString| Some(PathBuf::from(v)).filter(|p| p.is_absolute());
    let base = std::env::var_os("XDG_CONFIG_HOME").and_then(absolute);
    let home = || Some(std::env::var_os("HOME").and_then(absolute)?.join(".config"));
    base.or_else(home).ok_or_else(|| {
        let what = "neither XDG_CONFIG_HOME nor HOME is set, so the configuration is not known";
        Error::new(Kind::Usage, what).remedy("name it with --config-file")
    })
}
