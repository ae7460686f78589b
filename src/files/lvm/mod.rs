//! LVM2: logical volumes out of the physical volumes of one run's disks.
//!
//! `label` finds the metadata of a physical volume, `text` reads it, `group` understands it, `mapped` puts the
//! pieces of a volume together.

mod group;
mod label;
mod mapped;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::source::Source;
use crate::error::{Finding, Kind, Result};
use group::Group;
use label::Physical;
use mapped::Mapped;

/// A logical volume: its name as the device mapper has it (`vg-root`), and its bytes.
pub(super) type Logical = (String, Source);

/// The logical volumes that can be read of these physical volumes, and what is wrong with the others. What is
/// wrong with one physical volume does not stop the others.
///
/// # Errors
/// What reading a point says.
pub fn volumes(physical: &[Source]) -> Result<(Vec<Logical>, Vec<Finding>)> {
    let (mut known, mut findings) = (Vec::new(), Vec::new());
    let Some(first) = physical.first() else { return Ok((Vec::new(), findings)) };
    for source in physical {
        match Physical::read(source) {
            Ok(found) => known.push(found),
            Err(e) if e.kind().is_lasting() => {
                findings.push(Finding::from_error(&e, source.path()))
            }
            Err(e) => return Err(e),
        }
    }
    let mut logical = Vec::new();
    for group in newest(&known, &mut findings).values() {
        for volume in &group.volumes {
            match Mapped::new(group, volume, &known) {
                Ok(mapped) => {
                    let name = format!("{}-{}", doubled(&group.name), doubled(&volume.name));
                    let label = format!("volume {name}");
                    logical.push((name, first.through(Arc::new(mapped)).named(&label)));
                }
                Err(finding) => findings.push(finding),
            }
        }
    }
    Ok((logical, findings))
}

/// Of each group the newest description that one of its physical volumes has.
fn newest(known: &[Physical], findings: &mut Vec<Finding>) -> BTreeMap<String, Group> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for physical in known.iter().filter(|p| !p.text.is_empty()) {
        let parsed = text::parse(&physical.text).and_then(|section| Group::new(&section));
        let group = match parsed {
            Ok(group) => group,
            Err(why) => {
                let what = format!("{}: LVM's metadata: {why}", physical.source.label());
                findings.push(Finding::warning(Kind::Corrupt, physical.source.path(), what));
                continue;
            }
        };
        let before = groups.get(&group.id);
        if before.is_none_or(|b| group.sequence > b.sequence) {
            groups.insert(group.id.clone(), group);
        }
    }
    groups
}

/// A name in the name of a volume, where one hyphen stands between group and volume.
fn doubled(name: &str) -> String {
    name.replace('-', "--")
}
