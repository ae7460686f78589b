//! Paths from the command line, resolved once: links are followed, but not where somebody uses one to
//! lead root to what is not his.
//!
//! The rule is systemd's CHASE_SAFE for links: a link that belongs to neither root nor the caller may
//! lead only to what belongs to the link's owner. What is resolved has no link on it, and is opened
//! by the gate, which follows none.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::stat_timeout::remembered;
use super::{absent_is_none, look, refused};

/// How many links are followed: as many as Linux does.
const LINKS: usize = 40;

/// The absolute path of something that exists, without links.
///
/// # Errors
/// What the operating system said; a refusal where a link of somebody else's leads to what isn't his.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    let real = resolve_path(path)?;
    look(&real)?;
    Ok(real)
}

/// As [`resolve`], but what is mounted there is not asked for anything: its server may be dead or hang.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_path(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    PathWalk::default().follow(PathBuf::from("/"), &path)
}

/// What decides where a path leads.
pub struct ResolvedPath {
    /// Where it leads, as [`resolve_path`] says.
    pub real: io::Result<PathBuf>,
    /// Each name that was looked up for that, in its folder, which has no link on its path. The last one
    /// is missing if the path leads nowhere.
    pub names: Vec<(PathBuf, OsString)>,
}

/// Resolves `path` as [`resolve_path`] does and says what that depends on.
pub fn follow_path(path: &Path) -> ResolvedPath {
    let mut walk = PathWalk::default();
    let real = std::path::absolute(path).and_then(|p| walk.follow(PathBuf::from("/"), &p));
    ResolvedPath { real, names: walk.names }
}

/// As [`resolve`], of something that need not exist yet: its folder has to.
///
/// # Errors
/// As [`resolve`]; `InvalidInput` if the path has no last name.
pub fn resolve_target(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return resolve(&path);
    };
    let target = resolve(parent)?.join(name);
    match absent_is_none(look(&target))? {
        Some(meta) if meta.is_symlink() => resolve(&target),
        _ => Ok(target),
    }
}

/// As [`resolve`], of something that may have to be made, as folders above it may: what is there is
/// resolved, the rest is kept.
///
/// # Errors
/// As [`resolve`], but for `NotFound`.
pub fn resolve_to_make(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    for there in path.ancestors() {
        if let Some(real) = absent_is_none(resolve(there))? {
            let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
            // Joining nothing would add a slash.
            return Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) });
        }
    }
    Ok(path)
}

/// A path that is being resolved.
#[derive(Default)]
struct PathWalk {
    /// How many links were followed.
    links: usize,
    names: Vec<(PathBuf, OsString)>,
}

impl PathWalk {
    /// Walks `path` from `base`, which has no links.
    fn follow(&mut self, base: PathBuf, path: &Path) -> io::Result<PathBuf> {
        let mut at = if path.is_absolute() { PathBuf::from("/") } else { base };
        let parts: Vec<OsString> = path.components().filter_map(part).collect();
        for (i, part) in parts.iter().enumerate() {
            if part == ".." {
                at.pop();
                continue;
            }
            self.names.push((at.clone(), part.clone()));
            let next = at.join(part);
            let found = remembered(&next)?;
            if found.kind.is_symlink() {
                at = self.follow_link(&at, &next, found.uid)?;
            } else if i + 1 < parts.len() && !found.kind.is_dir() {
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            } else {
                at = next;
            }
        }
        Ok(at)
    }

    /// Where the link `link` in the folder `folder` leads, if its owner may lead there.
    fn follow_link(&mut self, folder: &Path, link: &Path, owner: u32) -> io::Result<PathBuf> {
        self.links += 1;
        if self.links > LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let text = std::fs::read_link(link)?;
        let end = self.follow(folder.to_path_buf(), &text)?;
        let own = rustix::process::geteuid().as_raw();
        if owner != 0 && owner != own && look(&end)?.uid() != owner {
            return Err(refused(
                "a symbolic link of another user leads to something that user does not own",
            ));
        }
        Ok(end)
    }
}

fn part(component: Component<'_>) -> Option<OsString> {
    match component {
        Component::Normal(name) => Some(name.to_os_string()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    }
}
