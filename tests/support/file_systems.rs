//! File systems that tests make and fill through a loop mount, as points of a backup, and what a folder has in
//! it, so that two can be compared. They need root.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::guard::Guard;
use super::images::{Chain, qemu_io};
use super::tools::run;

/// What all of this needs beside root.
pub const TOOLS: [&str; 5] = ["qemu-img", "qemu-io", "sh", "mount", "/dev/loop-control"];

/// An image with a file system, mounted when it is wanted.
pub struct Image {
    pub dir: tempfile::TempDir,
}

impl Image {
    /// A file of `size` bytes, and what `mkfs` (with its arguments) makes of it.
    pub fn new(size: u64, mkfs: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = Image { dir };
        std::fs::create_dir(image.mnt()).unwrap();
        std::fs::File::create(image.path()).unwrap().set_len(size).unwrap();
        let path = image.path();
        run(mkfs[0], &[&mkfs[1..], &[path.to_str().unwrap()]].concat());
        image
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Mounts it for as long as the guard lives; `None`, and said so, where this kernel does not know its features.
    pub fn try_mount(&self, options: &str) -> Option<Guard> {
        mount(&self.path(), &self.mnt(), options)
    }

    /// Mounts it.
    pub fn mount(&self, options: &str) -> Guard {
        self.try_mount(options).expect("it is mounted")
    }
}

/// Mounts an image, if the kernel knows what is in it.
pub fn mount(image: &Path, at: &Path, options: &str) -> Option<Guard> {
    let options = format!("loop{}{options}", if options.is_empty() { "" } else { "," });
    let make = format!(r#"mount -o {options} "$1" "$2""#);
    match Guard::try_new(&make, r#"umount "$2" || umount -l "$2""#, &[image, at]) {
        Ok(guard) => Some(guard),
        Err(why) => {
            println!("not mounted here: {why}");
            None
        }
    }
}

/// Cuts a mounted ext4 or XFS off, as a power cut does: from now on nothing is written, not even its journal.
pub fn cut_off(at: &Path) {
    // See EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, u32), and "without flushing the log".
    const SHUTDOWN: libc::Ioctl = 0x8004_587d_u32 as libc::Ioctl;
    static NO_LOG: u32 = 2;
    let folder = std::fs::File::open(at).unwrap();
    // SAFETY: an open descriptor and a number that lives through the call.
    let done = unsafe { libc::ioctl(folder.as_raw_fd(), SHUTDOWN, &raw const NO_LOG) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Runs shell commands in a folder.
pub fn shell(dir: &Path, commands: &str) {
    let out = Command::new("sh").args(["-e", "-c", commands]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{commands}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Gives a file an attribute; whether the file system has such.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> bool {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).is_ok()
}

/// Fills a mounted file system with one of everything that it can have.
pub fn fill(mnt: &Path) {
    shell(
        mnt,
        r#"
        mkdir -p dir/sub/deeper many empty
        echo hello > dir/hello
        head -c 3000000 /dev/urandom > dir/random
        truncate -s 100M dir/sparse
        printf x | dd of=dir/sparse bs=1 seek=50000000 conv=notrunc status=none
        i=0; while [ $i -lt 200 ]; do
            printf y | dd of=dir/holes bs=1 seek=$((i * 20000)) conv=notrunc status=none; i=$((i + 1))
        done
        (fallocate -l 5M dir/preallocated || truncate -s 5M dir/preallocated) 2>/dev/null
        printf zz | dd of=dir/preallocated bs=1 seek=2000000 conv=notrunc status=none
        printf tiny > dir/tiny
        printf %150s inline > dir/inline
        : > dir/nothing
        printf 'bytes' > "dir/$(printf 'n\377\001ame')"
        i=0; while [ $i -lt 1500 ]; do : > many/a-name-that-is-not-so-short-$i; i=$((i + 1)); done
        i=0; while [ $i -lt 1500 ]; do rm many/a-name-that-is-not-so-short-$i; i=$((i + 3)); done
        chmod 1777 dir/sub; chmod 2755 dir/sub/deeper
        touch -d '2031-01-01 00:00:00.123456789Z' dir/hello
        touch -d '1969-12-31 23:00:00Z' dir/tiny
        "#,
    );
}

/// What only file systems of Unix have.
pub fn fill_unix(mnt: &Path) {
    shell(
        mnt,
        r#"
        ln dir/hello dir/sub/hard; ln dir/hello many/hard
        ln -s hello dir/short; ln -s "$(printf %0200d 7)" dir/long; ln -s ../../../etc/passwd dir/out
        mkfifo dir/pipe; mknod dir/block b 8 1; mknod dir/char c 300 70000
        chown 1000:70000 dir/random; chmod 4751 dir/random; chown 66000:100 dir/sub; chown -h 7:8 dir/short
        "#,
    );
    let long = vec![b'v'; 900];
    let at = |name: &str| mnt.join("dir").join(name);
    set_xattr(&at("hello"), "user.comment", b"a comment");
    set_xattr(&at("hello"), "user.long", &long);
    set_xattr(&at("tiny"), "user.small", b"in the inode\0");
    set_xattr(&at("tiny"), "user.empty", b"");
    set_xattr(&at("sub"), "user.folder", b"of a folder");
    set_xattr(&at("random"), "security.capability", &CAPABILITY);
    set_xattr(&at("hello"), "trusted.note", b"root's");
    set_xattr(&at("inline"), "system.posix_acl_access", &ACL);
    set_xattr(&at("sub"), "system.posix_acl_default", &ACL);
}

/// `cap_net_raw=ep`, as setcap(8) writes it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// `u::rw-,u:1000:rw-,g::r--,m::rw-,o::r--`, as getxattr(2) gives it.
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 6, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255, 255,
    255, 255, 0x10, 0, 6, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255, 255, 255,
];

/// What a folder has in it, each as one line.
pub struct Listing(pub BTreeMap<PathBuf, String>);

impl Listing {
    /// All below `dir`; attributes whose names begin with one of `xattrs`.
    pub fn of(dir: &Path, xattrs: &[&str]) -> Self {
        let (mut all, mut first) = (BTreeMap::new(), BTreeMap::new());
        let mut todo = vec![PathBuf::new()];
        while let Some(at) = todo.pop() {
            let mut names: Vec<_> = std::fs::read_dir(dir.join(&at))
                .unwrap()
                .map(|e| at.join(e.unwrap().file_name()))
                .collect();
            names.sort();
            for path in names {
                let meta = std::fs::symlink_metadata(dir.join(&path)).unwrap();
                if meta.is_dir() {
                    todo.push(path.clone());
                }
                // The first of several names, in an order that all listings have.
                let one = first.entry((meta.dev(), meta.ino())).or_insert_with(|| path.clone());
                let line = line(&dir.join(&path), &meta, xattrs);
                let same = if one == &path { String::new() } else { format!(" = {one:?}") };
                all.insert(path, line + &same);
            }
        }
        Listing(all)
    }

    /// Asserts that another one is the same.
    pub fn assert_same(&self, other: &Listing, what: &str) {
        let mut wrong = Vec::new();
        for (path, line) in &self.0 {
            if other.0.get(path) != Some(line) {
                wrong.push(format!(
                    "{path:?}\n  should be {line}\n  is        {:?}",
                    other.0.get(path)
                ));
            }
        }
        wrong.extend(
            other.0.keys().filter(|p| !self.0.contains_key(*p)).map(|p| format!("{p:?} is new")),
        );
        let n = wrong.len();
        wrong.truncate(20);
        assert!(wrong.is_empty(), "{what}: {n} differ:\n{}", wrong.join("\n"));
    }
}

fn line(path: &Path, meta: &std::fs::Metadata, xattrs: &[&str]) -> String {
    let mut line = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
    if !meta.is_dir() {
        line += &format!(" links {} size {} device {}", meta.nlink(), meta.size(), meta.rdev());
    }
    line += &format!(" time {}.{:09}", meta.mtime(), meta.mtime_nsec());
    if meta.is_symlink() {
        line += &format!(" -> {:?}", std::fs::read_link(path).unwrap());
    }
    if meta.is_file() {
        line += &format!(" {}", blake3::hash(&std::fs::read(path).unwrap()).to_hex());
    }
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut names: Vec<&[u8]> = names[..len].split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    names.sort();
    for name in names {
        let name = std::str::from_utf8(name).unwrap();
        if xattrs.iter().any(|x| name.starts_with(x)) {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            line += &format!(" {name}={:?}", String::from_utf8_lossy(&value[..len]));
        }
    }
    line
}

/// A backup directory with a disk `vda`: points are added as raw images.
pub struct Points {
    pub dir: tempfile::TempDir,
    chain: Chain,
    /// The last point's bytes.
    last: Option<PathBuf>,
    aside: tempfile::TempDir,
}

impl Points {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let chain = Chain::new(dir.path(), "vda");
        Points { dir, chain, last: None, aside: tempfile::tempdir().unwrap() }
    }

    /// Adds a point: a FULL of `image` first, then INCs with the clusters that differ from the point before.
    pub fn add(&mut self, image: &Path) {
        let path = self.chain.next_path();
        let to = path.to_str().unwrap();
        match &self.last {
            None => drop(run(
                "qemu-img",
                &["convert", "-f", "raw", "-O", "qcow2", image.to_str().unwrap(), to],
            )),
            Some(last) => self.increment(last, image, &path),
        }
        let kept = self.aside.path().join("last");
        run("cp", &["--sparse=always", image.to_str().unwrap(), kept.to_str().unwrap()]);
        self.last = Some(kept);
    }

    fn increment(&self, last: &Path, image: &Path, path: &Path) {
        const CLUSTER: u64 = 65536;
        let (before, now) =
            (std::fs::File::open(last).unwrap(), std::fs::File::open(image).unwrap());
        let size = now.metadata().unwrap().len();
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &size.to_string()],
        );
        let (mut old, mut new) = (vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]);
        let mut ops = Vec::new();
        for at in (0..size).step_by(CLUSTER as usize) {
            let n = CLUSTER.min(size - at) as usize;
            before.read_exact_at(&mut old[..n], at).unwrap();
            now.read_exact_at(&mut new[..n], at).unwrap();
            if old[..n] != new[..n] {
                let part = self.aside.path().join(format!("part-{at}"));
                std::fs::write(&part, &new[..n]).unwrap();
                ops.push(format!("write -q -s {} {at} {n}", part.display()));
            }
        }
        assert!(!ops.is_empty(), "nothing has changed");
        qemu_io(path, &ops);
    }

    /// Runs `fleecefs files VERB ... DIR WHAT ...`.
    pub fn files(&self, verb: &[&str], what: &str, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecefs"));
        command.args(["-q", "files"]).args(verb).arg(self.dir.path()).arg(what).args(more);
        command.output().unwrap()
    }

    /// The same, and it has to succeed; gives what it printed.
    pub fn printed(&self, verb: &[&str], what: &str, more: &[&str]) -> String {
        let out = self.files(verb, what, more);
        assert!(out.status.success(), "{verb:?} {what}: {}", said(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Everything in a place, copied with all that belongs to it.
    pub fn copied(&self, what: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        self.printed(&["cp", "--preserve=all"], what, &[dir.path().to_str().unwrap()]);
        dir
    }
}

/// What a command said on standard error.
pub fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Replaces each `from` in a file by `to`, of the same length; how often.
pub fn patch(path: &Path, from: &[u8], to: &[u8]) -> usize {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(path).unwrap();
    let mut found = 0;
    let mut at = 0;
    while let Some(i) = bytes[at..].windows(from.len()).position(|w| w == from) {
        bytes[at + i..at + i + to.len()].copy_from_slice(to);
        at += i + to.len();
        found += 1;
    }
    std::fs::write(path, bytes).unwrap();
    found
}
