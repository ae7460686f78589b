//! A point as QEMU's block graph over the layer files themselves: each layer by name, with its driver, read-only, with
//! an explicit backing node or none. Nothing is probed, and no pointer in an image is followed.

use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::storage::SourceFile;

/// More layers than this take QEMU more memory and time than anybody wants; its parser of JSON knows 1024 levels, and
/// each layer has two.
const MOST: usize = 400;

/// The graph of the layers `stack`, bottom first, whose top has the name `name`.
///
/// # Errors
/// `Unsupported` if QEMU has no driver for one of them, or its name is no text; too many layers.
pub(crate) fn graph(stack: &[LayerSpec], name: &str) -> Result<Value> {
    if stack.len() > MOST {
        let what = format!("the point is made of {} layers: QEMU takes {MOST}", stack.len());
        return Err(
            Error::new(Kind::Unsupported, what).remedy("consolidate the chain, or mount it")
        );
    }
    let mut below = Value::Null;
    for layer in stack {
        below = node(layer, below)?;
    }
    if below.is_null() {
        return Err(Error::new(Kind::Incomplete, "a point needs at least one layer"));
    }
    below["node-name"] = name.into();
    Ok(below)
}

fn node(layer: &LayerSpec, backing: Value) -> Result<Value> {
    let has_part = layer.part != LayerPart::Whole;
    match layer.format {
        Format::Raw if !has_part && backing.is_null() => {
            Ok(json!({"driver": "raw", "read-only": true, "file": file(&layer.file)?}))
        }
        Format::Qcow2 if !has_part => {
            let mut node = json!({
                "driver": "qcow2",
                "read-only": true,
                "file": file(&layer.file)?,
                "backing": backing,
            });
            if let Some(data) = &layer.data_file {
                node["data-file"] = file(data)?;
            }
            Ok(node)
        }
        _ => {
            let what = "QEMU cannot read this by itself: it is an internal snapshot, or another program's archive";
            Err(Error::new(Kind::Unsupported, what)
                .at_path(layer.file.path())
                .remedy("boot it without --print, or mount it"))
        }
    }
}

fn file(source: &SourceFile) -> Result<Value> {
    let path = source.path();
    let name = path.to_str().ok_or_else(|| {
        Error::new(Kind::Unsupported, "QEMU's options take names in UTF-8 only").at_path(path)
    })?;
    // Whoever else reads it may do so.
    Ok(json!({"driver": "file", "filename": name, "read-only": true, "locking": "off"}))
}
