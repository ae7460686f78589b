//! The address of a socket, by a name that stays the same.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Where a socket listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl Address {
    /// Reads `tcp:host:port`, `unix:/path` or a plain path.
    ///
    /// # Errors
    /// `Usage` if it is empty or a TCP address without a port.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            let port = rest.rsplit_once(':').and_then(|(h, p)| {
                (!h.is_empty()).then_some(())?;
                p.parse::<u16>().ok()
            });
            return match port {
                Some(_) => Ok(Address::Tcp(rest.to_string())),
                None => Err(Error::new(Kind::Usage, format!("{text:?} is not tcp:host:port"))),
            };
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(Error::new(Kind::Usage, "the socket's address is empty"));
        }
        Ok(Address::Unix(PathBuf::from(path)))
    }

    /// A text that names the same socket however it was written: its path made absolute.
    pub fn canonical(&self) -> String {
        match self {
            Address::Unix(p) => {
                format!("unix:{}", resolve(p).display())
            }
            Address::Tcp(a) => format!("tcp:{a}"),
        }
    }

    /// The same socket by its real path, which stays right when QEMU has gone and taken the
    /// socket, or its folder, with it.
    pub fn resolved(&self) -> Self {
        match self {
            Address::Unix(p) => Address::Unix(resolve(p)),
            Address::Tcp(_) => self.clone(),
        }
    }
}

/// How many symbolic links are followed: as many as Linux does.
const LINKS: usize = 40;

/// The absolute path without links, as far as it exists: also of a socket that is gone.
// The name is only compared with others: nothing is opened by it but the socket that it is.
#[allow(clippy::disallowed_methods)]
fn resolve(path: &Path) -> PathBuf {
    let mut path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    for _ in 0..LINKS {
        // A link whose end is gone still says where that was.
        let Ok(to) = std::fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("/")).join(to);
    }
    let there = |p: &Path| p.canonicalize().ok();
    let found = path.ancestors().find_map(|a| Some((a, there(a)?)));
    match found {
        Some((old, real)) => match path.strip_prefix(old) {
            Ok(rest) if rest.as_os_str().is_empty() => real,
            Ok(rest) => real.join(rest),
            Err(_) => path,
        },
        None => path,
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(p) => write!(f, "{}", p.display()),
            Address::Tcp(a) => write!(f, "tcp:{a}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::socket::Socket;
    use std::os::unix::net::UnixListener;

    #[test]
    fn addresses() {
        assert_eq!(Address::parse("tcp:h:1").unwrap(), Address::Tcp("h:1".into()));
        assert_eq!(Address::parse("unix:/a").unwrap(), Address::Unix("/a".into()));
        assert_eq!(Address::parse("/a").unwrap(), Address::Unix("/a".into()));
        assert_eq!(Address::parse("tcp:h").unwrap_err().kind(), Kind::Usage);
        assert_eq!(Address::parse("").unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_socket_has_one_name_by_any_link_and_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("vm")).unwrap();
        std::os::unix::fs::symlink("vm", real.join("link")).unwrap();
        std::os::unix::fs::symlink("link/s", real.join("short")).unwrap();
        let want = format!("unix:{}", real.join("vm/s").display());
        let names = || {
            ["vm/s", "link/s", "short"].map(|n| Address::Unix(real.join(n)).canonical()).to_vec()
        };
        let listener = UnixListener::bind(real.join("vm/s")).unwrap();
        assert!(!Socket::is_dead(&Address::Unix(real.join("short"))));
        assert_eq!(names(), vec![want.clone(); 3]);
        drop(listener);
        assert!(Socket::is_dead(&Address::Unix(real.join("short"))));
        std::fs::remove_file(real.join("vm/s")).unwrap();
        assert_eq!(names(), vec![want.clone(); 3]);
        let before = Address::Unix(real.join("link/s")).resolved();
        std::fs::remove_dir(real.join("vm")).unwrap();
        assert_eq!(before.canonical(), want);
    }
}
