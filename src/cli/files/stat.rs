//! `fleecefs files stat`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use serde_json::json;

use super::super::shared::JsonArgs;
use super::point_path::{From, node};
use super::row::Row;
use crate::error::Result;
use crate::output;
use crate::text::{path_text, to_text};
use crate::units::human_bytes;

/// Show all that is known about a file and its file system: times, owner, attributes, findings
#[derive(Debug, Args)]
pub(super) struct StatArgs {
    #[command(flatten)]
    pub from: From,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// Runs it.
///
/// # Errors
/// As [`super::run`].
pub(super) fn run(args: &StatArgs) -> Result<()> {
    let opened = args.from.open()?;
    let tree = opened.tree()?;
    let node = node(&opened, &*tree, false)?;
    let attributes = tree.attributes(node)?;
    let row = Row::new(&*tree, &opened.path, node, &attributes);
    let xattrs = tree.xattrs(node)?;
    let (system, findings) = (tree.statistics(), tree.findings().list());
    if args.print.json {
        let xattrs: Vec<_> = xattrs
            .iter()
            .map(|x| json!({ "name": text(&x.name), "value": text(&x.value) }))
            .collect();
        let all = json!({
            "entry": row, "xattrs": xattrs, "file_system": system, "findings": findings,
        });
        return output::print(&output::json_document(&all)?);
    }
    let mut shown = String::new();
    let mut line = |name: &str, value: String| {
        output::push_line(&mut shown, format!("{name:<12}{value}"));
    };
    line("path", path_text(OsStr::from_bytes(&opened.path)));
    line("kind", format!("{:?}", row.kind).to_lowercase());
    line("size", format!("{} ({})", row.size, human_bytes(row.size)));
    line("on disk", human_bytes(row.allocated));
    line("mode", row.mode);
    line("owner", format!("{}:{}", row.uid, row.gid));
    line("links", row.links.to_string());
    line("inode", row.inode.to_string());
    let times = [
        ("accessed", Some(row.atime_utc)),
        ("modified", Some(row.mtime_utc)),
        ("changed", Some(row.ctime_utc)),
        ("created", row.crtime_utc),
    ];
    times.into_iter().for_each(|(name, time)| time.into_iter().for_each(|t| line(name, t)));
    let more = [("leads to", row.target), ("device", row.device)];
    more.into_iter().for_each(|(name, value)| value.into_iter().for_each(|v| line(name, v)));
    row.flags.iter().for_each(|f| line("flag", f.to_string()));
    for x in &xattrs {
        line("xattr", format!("{}={}", shown_bytes(&x.name), shown_bytes(&x.value)));
    }
    let label = path_text(&system.label);
    line("in", format!("{} {} {label}", system.kind, system.uuid).trim_end().to_string());
    output::print(&shown)
}

fn text(bytes: &[u8]) -> String {
    to_text(OsStr::from_bytes(bytes))
}

fn shown_bytes(bytes: &[u8]) -> String {
    path_text(OsStr::from_bytes(bytes))
}
