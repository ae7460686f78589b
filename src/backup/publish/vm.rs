//! What is kept about the guest beside its disks.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{hardware, side_folder};
use crate::backup::names;
use crate::error::{Error, Result};
use crate::folder;
use crate::folder::{FileMode, Folder};
use crate::manifest::{ConfigFile, FOLDER};
use crate::qmp::{Client, budget};

/// Questions whose answers together are the guest's configuration as QEMU reports it.
const QUESTIONS: &[&str] = &[
    "query-name",
    "query-uuid",
    "query-kvm",
    "query-cpus-fast",
    "query-memory-size-summary",
    "query-block",
    "query-chardev",
    "query-pci",
    "query-iothreads",
    "query-tpm",
];

/// Memory that one answer may take, and all of them: they go into the manifest of each disk. In
/// bytes, as [`budget::size`] counts it: `query-block` takes some 10 KiB for each disk.
const ANSWER: usize = 4 << 20;
const ANSWERS: usize = 8 << 20;

/// Asks for all that this QEMU can tell. What it refuses, or what is too much to be kept, is left
/// out: nothing depends on it.
///
/// # Errors
/// QEMU is gone or does not answer, or a signal ends it.
pub(crate) fn describe(client: &mut Client) -> Result<Value> {
    let machine = ("qom-get", json!({"path": "/machine", "property": "type"}));
    let known = QUESTIONS.iter().map(|q| (*q, json!({}))).chain([machine]);
    let mut asked = Vec::new();
    for (q, arguments) in known {
        if client.has(q) {
            asked.push((q, client.ask(q, arguments)?));
        }
    }
    let mut all = BoundedAnswers { value: json!({}), room: ANSWERS };
    for (q, a) in asked {
        if let Ok(answer) = client.answer(a)? {
            all.keep(if q == "qom-get" { "machine" } else { q }, answer);
        }
    }
    let hardware = hardware::describe(client, &all.value)?;
    all.keep("hardware", hardware);
    warn_of_tpm(&all.value);
    Ok(all.value)
}

/// What a TPM holds is swtpm's, or the machine's: a VM that has sealed keys in it asks for a recovery key elsewhere.
fn warn_of_tpm(vm: &Value) {
    if vm["query-tpm"].as_array().is_some_and(|all| !all.is_empty()) {
        log::warn!(
            target: folder::STANDING,
            "the VM has a TPM, whose state is not backed up: keep the recovery keys of what is sealed with it \
             (BitLocker, LUKS), or back up the folder of swtpm"
        );
    }
}

struct BoundedAnswers {
    value: Value,
    room: usize,
}

impl BoundedAnswers {
    fn keep(&mut self, question: &str, answer: Value) {
        let size = budget::size(&answer);
        match self.room.checked_sub(size).filter(|_| size <= ANSWER) {
            Some(left) => {
                self.room = left;
                self.value[question] = answer;
            }
            None => log::warn!("the answer to {question} is too long to be kept"),
        }
    }
}

/// The largest file that is kept with a backup: a description of a guest, in bytes.
const LARGEST: u64 = 16 << 20;

/// The longest name of a kept file, in bytes: `config-RUN-N-` comes before it.
const LONGEST_KEPT: usize = 200;

/// Reads the files given with `--config`: before anything is begun, so that a wrong name costs no
/// backup.
///
/// # Errors
/// One cannot be read.
pub(crate) fn read_config(files: &[PathBuf]) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let read = |p: &PathBuf| {
        let bytes = folder::resolve(p)
            .and_then(|real| folder::read_small(&real, LARGEST))
            .map_err(|e| Error::io(e, "cannot read the file given with --config").at_path(p))?;
        Ok((p.clone(), bytes))
    };
    files.iter().map(read).collect()
}

/// Keeps the files given with `--config` beside the manifests.
///
/// # Errors
/// One cannot be written.
pub(crate) fn keep_config(
    files: &[(PathBuf, Vec<u8>)],
    folder: &Folder,
    run: &str,
    share: FileMode,
) -> Result<Vec<ConfigFile>> {
    let mut kept = Vec::new();
    for (n, (path, bytes)) in files.iter().enumerate() {
        // Shortened where it would be too long with what comes before it.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = if name.len() > LONGEST_KEPT { names::folder(&name, true) } else { name.into() };
        // Beside it are files that are known by their ends.
        let is_taken = super::is_acted_on(name.as_bytes());
        let name = format!("config-{run}-{n}-{name}{}", if is_taken { "_" } else { "" });
        let side = side_folder(folder)?;
        side.write_shared(&name, bytes, share)
            .map_err(|e| Error::io(e, "cannot write the file").at_path(side.join(&name)))?;
        let stored = format!("{FOLDER}/{name}");
        kept.push(ConfigFile {
            path: path.display().to_string(),
            blake3: blake3::hash(bytes).to_hex().to_string(),
            stored,
        });
    }
    Ok(kept)
}
