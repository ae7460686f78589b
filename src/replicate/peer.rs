//! Where the target is: a path, or `ssh://[user@]host[:port]/path`, or `[user@]host:path` as users of rsync and scp
//! write it; and the program at the other end of ssh.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::wire::Wire;
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::output;
use crate::text::{path_text, visible};

/// The longest line of messages, in bytes, and how many are shown.
const LONGEST_MESSAGE: u64 = 4096;
const MOST_MESSAGES: usize = 1000;

/// How long ssh may take to end after the last word was said.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// A target as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A folder here.
    Here(PathBuf),
    /// One on another host.
    Remote(Remote),
}

/// A folder on another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    /// `[user@]host`
    pub host: String,
    /// The port, if it was said.
    pub port: Option<u16>,
    /// The path there.
    pub path: OsString,
}

impl Target {
    /// Reads it. A name with a colon is a host unless a slash comes first.
    ///
    /// # Errors
    /// `Usage` if it names no host or no path.
    pub(crate) fn parse(text: &OsStr) -> Result<Target> {
        let bytes = text.as_bytes();
        if let Some(rest) = bytes.strip_prefix(b"ssh://") {
            return url(rest, text).map(Target::Remote);
        }
        let colon = bytes.iter().position(|b| *b == b':');
        match colon.map(|at| (&bytes[..at], &bytes[at + 1..])) {
            Some((host, path)) if !host.contains(&b'/') => {
                remote(host, None, path, text).map(Target::Remote)
            }
            _ => Ok(Target::Here(text.into())),
        }
    }
}

fn wrong(text: &OsStr, why: &str) -> Error {
    let what = format!("'{}' is no target: {why}", path_text(text));
    Error::new(Kind::Usage, what)
        .remedy("name a folder, ssh://[user@]host[:port]/path, or [user@]host:path")
}

fn url(rest: &[u8], text: &OsStr) -> Result<Remote> {
    let slash = rest.iter().position(|b| *b == b'/');
    let slash = slash.ok_or_else(|| wrong(text, "there is no path"))?;
    let (host, path) = rest.split_at(slash);
    let is_port = |b: &[u8]| !b.is_empty() && b.iter().all(u8::is_ascii_digit);
    // The colons of an address in brackets are its own.
    let after_bracket = host.iter().rposition(|b| *b == b']').map_or(0, |at| at + 1);
    match host[after_bracket..].iter().rposition(|b| *b == b':').map(|at| at + after_bracket) {
        Some(colon) => {
            let port = &host[colon + 1..];
            let number = std::str::from_utf8(port).ok().filter(|_| is_port(port));
            let number = number.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
            let number = number.ok_or_else(|| wrong(text, "no such port"))?;
            remote(&host[..colon], Some(number), path, text)
        }
        None => remote(host, None, path, text),
    }
}

fn remote(host: &[u8], port: Option<u16>, path: &[u8], text: &OsStr) -> Result<Remote> {
    let host = std::str::from_utf8(host).map_err(|_| wrong(text, "the host is no text"))?;
    let host = host.replace(['[', ']'], "");
    let plain = |c: char| c.is_alphanumeric() || "-_.:@%+".contains(c);
    let (user, name) = host.rsplit_once('@').unwrap_or(("user", &host));
    // Else ssh would take it for an option.
    if [user, name].iter().any(|n| n.is_empty() || n.starts_with('-')) || !host.chars().all(plain) {
        return Err(wrong(text, "no such host"));
    }
    match path.is_empty() || path.contains(&0) {
        true => Err(wrong(text, "there is no path")),
        false => Ok(Remote { host, port, path: OsStr::from_bytes(path).into() }),
    }
}

/// How the receiver on another host is started.
#[derive(Debug, Clone)]
pub(crate) struct Ssh {
    /// The command and its first arguments, parted by white space.
    pub command: String,
    /// The program there.
    pub program: String,
    /// Further arguments for it.
    pub more: Vec<OsString>,
}

impl Ssh {
    /// The words of the command: `ssh [-p port] -- host 'fleecefs replicate --receive=path'`.
    fn words(&self, remote: &Remote) -> Vec<OsString> {
        let mut words: Vec<OsString> = self.command.split_whitespace().map(Into::into).collect();
        if let Some(port) = remote.port {
            words.extend(["-p".into(), port.to_string().into()]);
        }
        words.extend(["--".into(), remote.host.clone().into()]);
        // One argument: a shell there takes it apart.
        let mut line = quoted(OsStr::new(&self.program));
        line.push(" replicate");
        for arg in &self.more {
            line.push(" ");
            line.push(quoted(arg));
        }
        // A word of its own, for a shell expands `~` only where a word begins.
        line.push(" --receive ");
        if remote.path.as_bytes().starts_with(b"-") {
            line.push("./");
        }
        line.push(quoted(&remote.path));
        words.push(line);
        words
    }

    /// Starts it.
    ///
    /// # Errors
    /// `Usage` if there is no command, `NotFound` if there is no such program, what the operating system said.
    pub(crate) fn start(&self, remote: &Remote) -> Result<Connection> {
        let words = self.words(remote);
        let (program, args) =
            words.split_first().ok_or_else(|| Error::new(Kind::Usage, "--ssh is empty"))?;
        let mut command = Command::new(program);
        failpoint::keep_from(&mut command);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| {
            Error::io(e, "cannot run the program").at_path(program).remedy("is it installed?")
        })?;
        let messages = child
            .stderr
            .take()
            .and_then(|err| std::thread::Builder::new().spawn(move || pass_on(err)).ok());
        Ok(Connection { child, messages, host: remote.host.clone() })
    }
}

/// Shows what the program and the other host say, each line made visible. (Passwords are asked for on the terminal
/// itself.)
fn pass_on(messages: impl Read) {
    let mut messages = BufReader::new(messages);
    for _ in 0..MOST_MESSAGES {
        let mut line = Vec::new();
        match messages.by_ref().take(LONGEST_MESSAGE).read_until(b'\n', &mut line) {
            Ok(n) if n > 0 => {
                let text = String::from_utf8_lossy(&line);
                output::tell(&format!("{}\n", visible(text.trim_end())));
            }
            _ => return,
        }
    }
    // Whoever writes on is not stopped by a full pipe.
    let _ = std::io::copy(&mut messages, &mut std::io::sink());
}

/// A word as a shell takes it.
fn quoted(word: &OsStr) -> OsString {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_./=,+@%".contains(b);
    let bytes = word.as_bytes();
    // `~/backups` is the shell's there to expand.
    let (home, rest) = match bytes.strip_prefix(b"~/") {
        Some(rest) => (&b"~/"[..], rest),
        None => (&b""[..], bytes),
    };
    if !rest.is_empty() && rest.iter().all(plain) {
        return word.to_os_string();
    }
    let mut text = home.to_vec();
    text.push(b'\'');
    for b in rest {
        match b {
            b'\'' => text.extend_from_slice(b"'\\''"),
            b => text.push(*b),
        }
    }
    text.push(b'\'');
    OsStr::from_bytes(&text).to_os_string()
}

/// A running ssh. It ends with this.
pub(crate) struct Connection {
    child: Child,
    /// Passes its messages on.
    messages: Option<JoinHandle<()>>,
    host: String,
}

impl Connection {
    /// The way to what it has started.
    ///
    /// # Errors
    /// What the operating system said.
    pub(crate) fn wire<'a>(&mut self, stop: &'a AtomicBool) -> Result<Wire<'a>> {
        let gone = || Error::new(Kind::Io, "the connection is used already");
        let input: OwnedFd = self.child.stdout.take().ok_or_else(gone)?.into();
        let output: OwnedFd = self.child.stdin.take().ok_or_else(gone)?.into();
        Wire::new(input, output, &*self.host, stop)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Our ends are closed by now, so that it ends by itself; one that does not is ended.
        let end = Instant::now() + LAST_WORDS;
        while Instant::now() < end {
            let runs = matches!(self.child.try_wait(), Ok(None));
            // A master connection of ssh's may keep its end open, and is not waited for.
            if !runs && self.messages.as_ref().is_none_or(JoinHandle::is_finished) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target> {
        Target::parse(OsStr::new(text))
    }

    #[test]
    fn targets_are_read_as_users_of_rsync_write_them() {
        let far = |host: &str, port, path: &str| {
            Target::Remote(Remote { host: host.into(), port, path: path.into() })
        };
        for (text, want) in [
            ("/b/vm1", Target::Here("/b/vm1".into())),
            ("vm1", Target::Here("vm1".into())),
            ("./a:b", Target::Here("./a:b".into())),
            ("/x:y", Target::Here("/x:y".into())),
            ("nas:/b", far("nas", None, "/b")),
            ("me@nas:b c", far("me@nas", None, "b c")),
            ("ssh://nas/b", far("nas", None, "/b")),
            ("ssh://me@nas:2222/b/c", far("me@nas", Some(2222), "/b/c")),
            ("ssh://[::1]:22/b", far("::1", Some(22), "/b")),
            ("ssh://[fe80::1%eth0]/b", far("fe80::1%eth0", None, "/b")),
        ] {
            assert_eq!(parse(text).unwrap(), want, "{text}");
        }
        for text in [
            "nas:",
            ":/b",
            "ssh://nas",
            "ssh:///b",
            "ssh://nas:/b",
            "ssh://nas:0/b",
            "ssh://nas:70000/b",
            "ssh://nas:+1/b",
            "-oProxyCommand=x:/b",
            "ssh://-x/b",
            "a b:/b",
            "me@-x:/b",
            "-x@nas:/b",
            "$(x):/b",
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::Usage, "{text}");
        }
    }

    #[test]
    fn the_shell_there_gets_every_word_whole() {
        let ssh = Ssh {
            command: "ssh -i key".into(),
            program: "fleecefs".into(),
            more: vec!["--keep-last=3".into()],
        };
        let last = |path: &str| {
            let remote = Remote { host: "nas".into(), port: None, path: path.into() };
            ssh.words(&remote).pop().unwrap().into_string().unwrap()
        };
        assert!(last("~/b").ends_with(" --receive ~/b") && last("-b").ends_with(" ./-b"));
        let remote = |path: &str, port| Remote { host: "nas".into(), port, path: path.into() };
        let words = ssh.words(&remote("/b/it's; rm -r", Some(22)));
        let want = [
            "ssh",
            "-i",
            "key",
            "-p",
            "22",
            "--",
            "nas",
            r"fleecefs replicate --keep-last=3 --receive '/b/it'\''s; rm -r'",
        ];
        assert_eq!(words, want.map(OsString::from));
        assert_eq!(quoted(OsStr::new("~/b c")), "~/'b c'");
        assert_eq!(quoted(OsStr::new("~x")), "'~x'");
        assert_eq!(quoted(OsStr::new("")), "''");
        // A real shell agrees.
        for text in ["a b", "'", "$HOME `x` \\ \"", "x\ny", "*"] {
            let mut line = OsString::from("printf %s ");
            line.push(quoted(OsStr::new(text)));
            let out = Command::new("sh").arg("-c").arg(line).output().unwrap();
            assert_eq!(out.stdout, text.as_bytes(), "{text:?}");
        }
    }
}
