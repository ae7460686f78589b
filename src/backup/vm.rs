//! What is kept about the guest beside its disks.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::publish::{hash_file, write_whole};
use crate::chain::manifest::{ConfigFile, FOLDER};
use crate::error::{Error, Result};
use crate::qmp::Client;

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
];

/// Asks for all that this QEMU can tell. What it refuses is left out: nothing depends on it.
pub fn describe(client: &mut Client) -> Value {
    let mut all = json!({});
    for q in QUESTIONS {
        if client.has(q)
            && let Ok(Ok(answer)) = client.call(q, json!({}))
        {
            all[*q] = answer;
        }
    }
    if client.has("qom-get")
        && let Ok(Ok(kind)) =
            client.call("qom-get", json!({"path": "/machine", "property": "type"}))
    {
        all["machine"] = kind;
    }
    all
}

/// Keeps the files given with `--config` beside the manifests.
///
/// # Errors
/// One cannot be read or written.
pub fn keep_config(files: &[PathBuf], dir: &Path, run: &str) -> Result<Vec<ConfigFile>> {
    let mut kept = Vec::new();
    for (n, path) in files.iter().enumerate() {
        let bytes = std::fs::read(path)
            .map_err(|e| Error::io(e, "cannot read the file given with --config").at_path(path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stored = format!("{FOLDER}/config-{run}-{n}-{name}");
        super::lock::make_dir(&dir.join(FOLDER))?;
        write_whole(&dir.join(&stored), &bytes)?;
        kept.push(ConfigFile {
            path: path.display().to_string(),
            blake3: hash_file(&dir.join(&stored))?,
            stored,
        });
    }
    Ok(kept)
}
