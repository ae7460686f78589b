//! A volume group, as its text describes it.

use std::collections::{BTreeMap, BTreeSet};

use super::text::{Section, Value};

/// Bytes of a sector, in which LVM counts.
const SECTOR: u64 = 512;
/// Segments and stripes that a volume may have.
const MAX_PIECES: usize = 1 << 16;

/// Where a physical volume has its data.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Its id, without hyphens.
    pub id: String,
    /// Where its first extent is, in bytes.
    pub start: u64,
}

/// A stretch of a volume: on one physical volume, or in stripes on several.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    /// Where in the volume, in bytes.
    pub start: u64,
    pub len: u64,
    /// Bytes of a stripe, where there are several.
    pub stripe_size: u64,
    /// Physical volumes by their name in the group, and where the data begins on each, in bytes behind its
    /// first extent.
    pub stripes: Vec<(String, u64)>,
}

/// A logical volume.
#[derive(Debug, Clone)]
pub(super) struct Volume {
    pub name: String,
    /// In their order; or why it cannot be read.
    pub segments: Result<Vec<Segment>, String>,
}

/// A volume group.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub id: String,
    pub name: String,
    pub sequence: u64,
    pub places: BTreeMap<String, Place>,
    /// Those that are volumes of their own, and not parts of others.
    pub volumes: Vec<Volume>,
}

impl Group {
    /// Understands a text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn new(text: &Section) -> Result<Group, String> {
        let is_group = |(_, s): &(&str, &Section)| s.section("physical_volumes").is_some();
        let (name, section) =
            text.sections().find(is_group).ok_or("no volume group in the metadata")?;
        let extent = section.number("extent_size").and_then(|n| n.checked_mul(SECTOR));
        let extent = extent.filter(|n| *n > 0).ok_or("the volume group has no extent size")?;
        let id = section.text("id").ok_or("the volume group has no id")?;
        if !is_name(name) {
            return Err("the volume group has an invalid name".into());
        }
        let empty = Section::default();
        let logical = section.section("logical_volumes").unwrap_or(&empty);
        let snapshots = snapshots(logical);
        let visible = |(name, s): &(&str, &Section)| is_visible(s) && is_name(name);
        Ok(Group {
            id: id.to_string(),
            name: name.to_string(),
            sequence: section.number("seqno").unwrap_or(0),
            places: places(section),
            volumes: logical
                .sections()
                .filter(visible)
                .map(|(name, s)| Volume {
                    name: name.to_string(),
                    segments: match snapshots.contains(name) {
                        true => Err("snapshots are not supported".into()),
                        false => segments(s, extent),
                    },
                })
                .collect(),
        })
    }
}

fn places(group: &Section) -> BTreeMap<String, Place> {
    let all = group.section("physical_volumes").map(Section::sections);
    let place = |(name, s): (&str, &Section)| {
        let start = s.number("pe_start")?.checked_mul(SECTOR)?;
        Some((name.to_string(), Place { id: s.text("id")?.replace('-', ""), start }))
    };
    all.into_iter().flatten().filter_map(place).collect()
}

fn is_visible(volume: &Section) -> bool {
    volume.list("status").contains(&Value::Text("VISIBLE".into()))
}

/// As LVM allows them: so that they are plain file names, too.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    !name.is_empty() && name.len() <= 127 && name != "." && name != ".." && name.chars().all(good)
}

/// The volumes that hold what a snapshot has kept, and are no file systems.
fn snapshots(logical: &Section) -> BTreeSet<&str> {
    let pieces = logical.sections().flat_map(|(_, s)| s.sections());
    pieces.filter_map(|(_, piece)| piece.text("cow_store")).collect()
}

fn segments(volume: &Section, extent: u64) -> Result<Vec<Segment>, String> {
    let count = volume.number("segment_count").unwrap_or(0) as usize;
    if count == 0 || count > MAX_PIECES {
        return Err("no segments".into());
    }
    let (mut all, mut end) = (Vec::new(), 0);
    for i in 1..=count {
        let section = volume.section(&format!("segment{i}")).ok_or("a segment is missing")?;
        let segment = segment(section, extent, end)?;
        end = segment.start + segment.len;
        all.push(segment);
    }
    Ok(all)
}

fn segment(section: &Section, extent: u64, begin: u64) -> Result<Segment, String> {
    match section.text("type") {
        Some("striped" | "linear") => {}
        other => {
            let kind = other.unwrap_or("without a type");
            return Err(format!(
                "segment type {kind} is not supported (only linear and striped are)"
            ));
        }
    }
    let wrong = "inconsistent segment";
    let bytes = |n: Option<u64>| n.and_then(|n| n.checked_mul(extent)).ok_or(wrong);
    let (start, len) =
        (bytes(section.number("start_extent"))?, bytes(section.number("extent_count"))?);
    let mut stripes = Vec::new();
    for pair in section.list("stripes").chunks(2) {
        let [Value::Text(name), Value::Number(first)] = pair else { return Err(wrong.into()) };
        stripes.push((name.clone(), bytes(u64::try_from(*first).ok())?));
    }
    let stripe_size = section.number("stripe_size").unwrap_or(0).saturating_mul(SECTOR);
    let several = stripes.len() > 1;
    let fits = start == begin
        && len > 0
        && start.checked_add(len).is_some_and(|end| end <= i64::MAX.cast_unsigned())
        && section.number("stripe_count") == Some(stripes.len() as u64)
        && !stripes.is_empty()
        && (!several || (stripe_size > 0 && len.is_multiple_of(stripes.len() as u64)));
    match fits {
        true => Ok(Segment { start, len, stripe_size, stripes }),
        false => Err(wrong.into()),
    }
}
