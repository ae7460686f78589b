//! Chains made with QEMU's own tools, and QEMU's own answer to what they hold.

use std::path::{Path, PathBuf};

use crate::support::tools::run;

/// A folder for images: in memory where that is possible, since QEMU's tools sync a lot.
pub fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A small random number generator (splitmix64): the same seed gives the same chain everywhere.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A range of `size` bytes of disk, aligned to `align`, often short, sometimes long.
    pub fn range(&mut self, size: u64, align: u64) -> (u64, u64) {
        let blocks = (size / align).max(1);
        let start = self.below(blocks);
        let longest = if self.below(4) == 0 { blocks - start } else { 8.min(blocks - start) };
        (start * align, (1 + self.below(longest)) * align)
    }
}

/// One folder of FULL and INC files, as a backup of one disk makes them.
pub struct Chain {
    pub dir: PathBuf,
    pub name: String,
    pub files: Vec<PathBuf>,
    extension: &'static str,
    time: u64,
}

impl Chain {
    /// A chain without a point; `parent` is the backup directory, `name` the disk's.
    pub fn new(parent: &Path, name: &str) -> Self {
        let dir = parent.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        Chain {
            dir,
            name: name.to_string(),
            files: Vec::new(),
            extension: ".qcow2",
            time: 1_700_000_000,
        }
    }

    /// The same with file names that say nothing about the format.
    pub fn without_extension(mut self) -> Self {
        self.extension = "";
        self
    }

    /// The path of the next point's file.
    pub fn next_path(&mut self) -> PathBuf {
        let level = if self.files.is_empty() { "FULL" } else { "INC" };
        self.time += 3600;
        let path = self.dir.join(format!("{level}-{}-{}{}", self.time, self.name, self.extension));
        self.files.push(path.clone());
        path
    }

    /// Adds a point: an empty image with `options` (`qemu-img create -o`), then `ops` by qemu-io.
    /// An INC is written over its predecessors, so that partial clusters are copied up;
    /// [`Chain::finish`] takes the links away.
    pub fn point(&mut self, options: &str, size: u64, ops: &[String]) -> PathBuf {
        let previous = self.files.last().cloned();
        let path = self.next_path();
        let p = path.to_str().unwrap();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        if let Some(prev) = &previous {
            args.extend(["-b", prev.to_str().unwrap(), "-F", format_of(prev)]);
        }
        let size = size.to_string();
        args.extend([p, &size]);
        run("qemu-img", &args);
        qemu_io(&path, ops);
        path
    }

    /// Takes the backing pointers out of all INCs, as a backup job leaves them.
    pub fn finish(self) -> Self {
        for file in self.files.iter().skip(1) {
            let p = file.to_str().unwrap();
            run("qemu-img", &["rebase", "-q", "-u", "-b", "", "-f", "qcow2", p]);
        }
        self
    }
}

fn format_of(path: &Path) -> &'static str {
    let mut magic = [0; 4];
    let read =
        std::fs::File::open(path).and_then(|mut f| std::io::Read::read_exact(&mut f, &mut magic));
    if read.is_ok() && magic == *b"QFI\xfb" { "qcow2" } else { "raw" }
}

/// Runs qemu-io commands on an image.
pub fn qemu_io(path: &Path, ops: &[String]) {
    if ops.is_empty() {
        return;
    }
    let mut args = vec!["-d", "unmap", "-f", format_of(path)];
    for op in ops {
        args.extend(["-c", op]);
    }
    args.push(path.to_str().unwrap());
    let out = run("qemu-io", &args);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(!text.contains("failed"), "{ops:?}: {text}");
}

/// A copy of the chain whose files are linked by backing pointers: QEMU's own way to merge.
pub struct Oracle {
    _dir: tempfile::TempDir,
    originals: Vec<PathBuf>,
    pub files: Vec<PathBuf>,
}

impl Oracle {
    /// Copies `files` (in chain order) with everything else in their folder, and links them.
    pub fn new(files: &[PathBuf]) -> Self {
        let dir = tempdir();
        let folder = files[0].parent().unwrap();
        run(
            "cp",
            &[
                "-a",
                "--sparse=auto",
                &format!("{}/.", folder.display()),
                dir.path().to_str().unwrap(),
            ],
        );
        let originals = files.to_vec();
        let files: Vec<PathBuf> =
            files.iter().map(|f| dir.path().join(f.file_name().unwrap())).collect();
        for pair in files.windows(2) {
            let (base, top) = (&pair[0], &pair[1]);
            run(
                "qemu-img",
                &[
                    "rebase",
                    "-q",
                    "-u",
                    "-f",
                    "qcow2",
                    "-b",
                    base.to_str().unwrap(),
                    "-F",
                    format_of(base),
                    top.to_str().unwrap(),
                ],
            );
        }
        Oracle { _dir: dir, originals, files }
    }

    /// The merged bytes of point `i`.
    pub fn bytes(&self, i: usize) -> Vec<u8> {
        let raw = self._dir.path().join("merged.raw");
        let (from, to) = (self.files[i].to_str().unwrap(), raw.to_str().unwrap());
        run("qemu-img", &["convert", "-f", format_of(&self.files[i]), "-O", "raw", from, to]);
        std::fs::read(&raw).unwrap()
    }

    /// `qemu-img map` of point `i`: of the original files, linked on the command line only, since a
    /// copy may have its holes elsewhere.
    pub fn map(&self, i: usize) -> serde_json::Value {
        let mut node = serde_json::Value::Null;
        for file in &self.originals[..=i] {
            let protocol = serde_json::json!({"driver": "file", "filename": file});
            node = match format_of(file) {
                "qcow2" => serde_json::json!(
                    {"driver": "qcow2", "file": protocol, "backing": node}),
                raw => serde_json::json!({"driver": raw, "file": protocol}),
            };
        }
        let name = format!("json:{node}");
        let out = run("qemu-img", &["map", "--output=json", &name]);
        serde_json::from_slice(&out.stdout).unwrap()
    }
}

/// The first difference between two byte strings, for messages.
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<String> {
    if a.len() != b.len() {
        return Some(format!("{} and {} bytes", a.len(), b.len()));
    }
    // Byte by byte is slow in a build without optimisation.
    if a == b {
        return None;
    }
    let at = a.iter().zip(b).position(|(x, y)| x != y)?;
    Some(format!("at {at:#x}: {:#x} and {:#x}", a[at], b[at]))
}

/// Waits until no process has a file below `dir` open: what a killed program has started dies with
/// it, but after the system call that it is in.
pub fn wait_until_closed(dir: &Path) {
    let open = |fds: std::fs::ReadDir| {
        let mut links = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        links.any(|to| to.starts_with(dir))
    };
    let processes = || {
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|p| std::fs::read_dir(p.path().join("fd")).ok())
    };
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while processes().any(open) {
        assert!(std::time::Instant::now() < end, "{} stays open", dir.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
