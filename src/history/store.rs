//! The files of the history: `history/runs.jsonl` in the state folder, to which lines are appended, and the older
//! `runs.1.jsonl` to `runs.7.jsonl`. One that is full becomes the next older, and the oldest goes: so the history has
//! a limit in bytes, and a file that is complete is never written to again.
//!
//! A run that was killed while it appended leaves half a line, which is skipped; the next one begins a line of its own.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::entry::{Entry, VERSION};
use crate::backup::state::lock::{state_folder, state_folder_if_there};
use crate::error::{Error, Kind, Result};
use crate::folder::{self, Folder, Lock};
use crate::text::json;

/// The folder in the state folder.
const FOLDER: &str = "history";
/// Its lock.
const LOCK: &str = "lock";
/// The files that are kept, and bytes of each: some 10,000 runs, a year of thirty VMs' nights.
const FILES: usize = 8;
const MAX_FILE: u64 = 1 << 20;
/// Bytes of a line; of a run with more disks than have room in it the rest are counted.
const MAX_LINE: usize = 64 << 10;
/// How often, and after how long, the lock is tried again that another run has.
const TRIES: u32 = 40;
const AGAIN: Duration = Duration::from_millis(50);

/// What the history has.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct History {
    /// The oldest first.
    pub entries: Vec<Entry>,
    /// Lines, and whole files, that are none.
    pub unreadable: usize,
}

/// The name of a file by its age.
fn name(age: usize) -> String {
    match age {
        0 => "runs.jsonl".into(),
        age => format!("runs.{age}.jsonl"),
    }
}

/// Appends a line; it is on disk when this returns.
///
/// # Errors
/// The state folder cannot be written to, or others may write to it; `Busy` if other runs hold the lock for long.
pub(crate) fn append(state: &Path, entry: &Entry) -> Result<()> {
    let top = state_folder(state)?;
    let failed = |e| Error::io(e, "cannot write the history").at_path(top.join(FOLDER));
    let line = line_of(entry).map_err(failed)?;
    let folder = top.make_folder(FOLDER).map_err(failed)?;
    let _lock = lock(&folder)?;
    add_line(&folder, line).map_err(failed)
}

/// The line of an entry, with its end.
fn line_of(entry: &Entry) -> io::Result<String> {
    let mut text = json(entry)?;
    let mut entry = entry.clone();
    while text.len() >= MAX_LINE && !entry.disks.is_empty() {
        let kept = entry.disks.len() / 2;
        entry.disks_left_out += entry.disks.len() - kept;
        entry.disks.truncate(kept);
        text = json(&entry)?;
    }
    Ok(text + "\n")
}

fn add_line(folder: &Folder, mut line: String) -> io::Result<()> {
    let mut file = folder.append(name(0))?;
    let mut len = file.metadata()?.len();
    if len > 0 && len.saturating_add(line.len() as u64) > MAX_FILE {
        drop(file);
        rotate(folder)?;
        file = folder.append(name(0))?;
        len = file.metadata()?.len();
    }
    if len > 0 && !ends_a_line(&folder.open_file(name(0))?, len)? {
        line.insert(0, '\n');
    }
    file.write_all(line.as_bytes())?;
    file.sync_all()?;
    if len == 0 { folder.sync() } else { Ok(()) }
}

fn ends_a_line(file: &File, len: u64) -> io::Result<bool> {
    let mut last = [0];
    file.read_exact_at(&mut last, len.saturating_sub(1))?;
    Ok(last == *b"\n")
}

/// Each file becomes the next older, the oldest first: a run that is killed meanwhile leaves a gap, and loses nothing.
fn rotate(folder: &Folder) -> io::Result<()> {
    for age in (0..FILES - 1).rev() {
        folder::absent_is_none(folder.rename(name(age), folder, name(age + 1)))?;
    }
    folder.sync()
}

/// Reads the history in the state folder `state`; an empty one if there is none.
///
/// # Errors
/// The folder cannot be read, or others may write to it.
pub(crate) fn read(state: &Path) -> Result<History> {
    let mut history = History::default();
    let Some(top) = state_folder_if_there(state)? else { return Ok(history) };
    let failed = |e| Error::io(e, "cannot read the history").at_path(top.join(FOLDER));
    let Some(folder) = folder::absent_is_none(top.folder(FOLDER)).map_err(failed)? else {
        return Ok(history);
    };
    // No run renames them meanwhile. Who may not take it reads all the same.
    let _lock = lock(&folder).ok();
    for age in (0..FILES).rev() {
        match folder.read_if_there(name(age), MAX_FILE + MAX_LINE as u64) {
            Ok(bytes) => history.add(&bytes.unwrap_or_default()),
            Err(e) => {
                log::debug!("{}", failed(e).report());
                history.unreadable += 1;
            }
        }
    }
    Ok(history)
}

impl History {
    fn add(&mut self, bytes: &[u8]) {
        for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let entry = (line.len() <= MAX_LINE).then(|| serde_json::from_slice::<Entry>(line));
            match entry {
                Some(Ok(entry)) if entry.version == VERSION => self.entries.push(entry),
                _ => self.unreadable += 1,
            }
        }
    }
}

fn lock(folder: &Folder) -> Result<Lock> {
    let failed = |e| Error::io(e, "cannot take the lock").at_path(folder.join(LOCK));
    for _ in 0..TRIES {
        if let Some(lock) = folder.lock(LOCK).map_err(failed)? {
            return Ok(lock);
        }
        std::thread::sleep(AGAIN);
    }
    Err(Error::new(Kind::Busy, "other runs write the history").at_path(folder.join(LOCK)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::DiskEntry;

    fn entry(number: i64) -> Entry {
        Entry { directory: Some("/backups/vm1".into()), ..Entry::begun("backup", number) }
    }

    fn times(state: &Path) -> Vec<i64> {
        read(state).unwrap().entries.iter().map(|e| e.time).collect()
    }

    #[test]
    fn entries_come_back_in_their_order() {
        let d = tempfile::tempdir().unwrap();
        let state = d.path().join("state");
        assert_eq!(read(&state).unwrap(), History::default());
        assert!(!state.exists(), "reading makes nothing");
        for number in 1..4 {
            append(&state, &entry(number)).unwrap();
        }
        assert_eq!(times(&state), [1, 2, 3]);
    }

    #[test]
    fn half_a_line_is_skipped_and_the_next_begins_its_own() {
        let d = tempfile::tempdir().unwrap();
        append(d.path(), &entry(1)).unwrap();
        append(d.path(), &entry(2)).unwrap();
        let file = d.path().join(FOLDER).join(name(0));
        let whole = std::fs::read(&file).unwrap();
        for cut in [1, 2, 40, whole.len() / 2 - 1] {
            std::fs::write(&file, &whole[..whole.len() - cut]).unwrap();
            append(d.path(), &entry(3)).unwrap();
            let history = read(d.path()).unwrap();
            let times: Vec<i64> = history.entries.iter().map(|e| e.time).collect();
            // One of which only the line break is missing is whole.
            let want: (&[i64], usize) = if cut == 1 { (&[1, 2, 3], 0) } else { (&[1, 3], 1) };
            assert_eq!((times.as_slice(), history.unreadable), want, "{cut}");
        }
    }

    #[test]
    fn the_history_has_a_limit_and_the_newest_stay() {
        let d = tempfile::tempdir().unwrap();
        let long = "x".repeat(1500);
        let big = |number| {
            let disk = DiskEntry { error: Some(long.clone()), ..DiskEntry::default() };
            Entry { disks: vec![disk; 30], ..entry(number) }
        };
        let line = line_of(&big(0)).unwrap().len();
        let all = (FILES + 2) as i64 * (MAX_FILE as usize / line) as i64;
        for number in 0..all {
            append(d.path(), &big(number)).unwrap();
        }
        let folder = d.path().join(FOLDER);
        let list = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap());
        let sizes: Vec<u64> = list.map(|e| e.metadata().unwrap().len()).collect();
        assert!(sizes.len() == FILES + 1 && sizes.iter().all(|s| *s <= MAX_FILE), "{sizes:?}");
        let kept = times(d.path());
        assert!(kept.windows(2).all(|w| w[1] == w[0] + 1), "none is missing between");
        assert_eq!(kept.last(), Some(&(all - 1)));
        assert!(kept.len() > (FILES - 1) * (MAX_FILE as usize / line) && kept.len() < all as usize);
        // Killed while it rotated: a file is missing, and all others are read.
        std::fs::remove_file(folder.join(name(3))).unwrap();
        assert_eq!(times(d.path()).last(), Some(&(all - 1)));
        append(d.path(), &big(all)).unwrap();
    }

    #[test]
    fn a_run_with_many_disks_has_room_in_a_line() {
        let d = tempfile::tempdir().unwrap();
        let disk = DiskEntry { error: Some("y".repeat(2000)), ..DiskEntry::default() };
        let many = Entry { disks: vec![disk; 5000], ..entry(7) };
        append(d.path(), &many).unwrap();
        let history = read(d.path()).unwrap();
        let [one] = history.entries.as_slice() else { panic!("{history:?}") };
        assert!(!one.disks.is_empty() && one.disks.len() + one.disks_left_out == 5000);
    }

    #[test]
    fn what_others_may_have_written_is_bounded_and_never_followed() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let d = tempfile::tempdir().unwrap();
        append(d.path(), &entry(1)).unwrap();
        let folder = d.path().join(FOLDER);
        let later = json(&entry(2)).unwrap().replace("\"version\":1", "\"version\":2");
        let endless = format!("{{\"version\":1,\"x\":\"{}\"}}", "z".repeat(MAX_LINE));
        let odd =
            [later.as_bytes(), endless.as_bytes(), b"\xff\xfe", b"[[[[", b"null"].join(&b'\n');
        std::fs::write(folder.join(name(2)), odd).unwrap();
        std::fs::write(folder.join(name(3)), vec![b'x'; 3 << 20]).unwrap();
        symlink("/dev/zero", folder.join(name(4))).unwrap();
        std::fs::create_dir(folder.join(name(5))).unwrap();
        let history = read(d.path()).unwrap();
        assert_eq!((history.entries.len(), history.unreadable), (1, 8), "{history:?}");
        // A link in the place of the file is not written through.
        let elsewhere = d.path().join("elsewhere");
        std::fs::write(&elsewhere, "").unwrap();
        std::fs::remove_file(folder.join(name(0))).unwrap();
        symlink(&elsewhere, folder.join(name(0))).unwrap();
        assert!(append(d.path(), &entry(3)).is_err());
        assert_eq!(std::fs::read(&elsewhere).unwrap(), b"");
        std::fs::set_permissions(d.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(append(d.path(), &entry(3)).unwrap_err().kind(), Kind::Permission);
        assert_eq!(read(d.path()).unwrap_err().kind(), Kind::Permission);
    }
}
