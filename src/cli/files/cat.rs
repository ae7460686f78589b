//! `fleecefs files cat`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use clap::Args;

use super::point_path::{From, node};
use crate::error::{Error, Kind, Result};
use crate::files::NodeKind;
use crate::output;
use crate::text::path_text;

/// Write a file to standard output; a symbolic link is followed inside its file system
///
/// On a terminal, control characters are shown and not obeyed.
#[derive(Debug, Args)]
pub(super) struct CatArgs {
    #[command(flatten)]
    pub from: From,
}

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// Runs it.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &CatArgs) -> Result<()> {
    let opened = args.from.open()?;
    let tree = opened.tree()?;
    let node = node(&opened, &*tree, true)?;
    if tree.attributes(node)?.kind == NodeKind::Folder {
        let what = format!("'{}' is a folder", path_text(OsStr::from_bytes(&opened.path)));
        return Err(Error::new(Kind::Usage, what).remedy("'fleecefs files ls' lists it"));
    }
    let file = tree.open(node)?;
    let (mut at, mut buf, mut failed) = (0, vec![0; CHUNK], None);
    output::written_by_others(|out| {
        while at < file.size() {
            match file.read_at(&mut buf, at) {
                Ok(0) => failed = Some(Error::new(Kind::Truncated, "the file ends too early")),
                Ok(n) => {
                    out.write_all(buf.get(..n).unwrap_or_default())?;
                    at += n as u64;
                    continue;
                }
                Err(e) => failed = Some(e),
            }
            break;
        }
        Ok(())
    })?;
    failed.map_or(Ok(()), Err)
}
