//! `commit` and `snapshot-rebase`: the FULL takes in all that follows up to one point, which then
//! go; with snapshots, every state stays inside the FULL as an internal snapshot.
//!
//! The new FULL is built beside the old chain, in `.fleecefs/`, out of copies (clones, where the
//! file system can) that QEMU itself commits. That needs as much space as the FULL and the largest
//! increment take, less where the copies are clones. When it is checked and on disk, `replace` puts
//! it into the old one's place; see there for what a crash leaves.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::plan::FlattenPlan;
use super::rebase::{only_qcow2, same_folder};
use super::replace::{ReplacePlan, switch};
use super::{ChainSection, Member, Users, files, open_folder, side_folder, snapshots};
use crate::chain::Catalog;
use crate::error::{Error, Kind, Result};
use crate::image::{Cache, Image, open_point};
use crate::job::Work;
use crate::layer::{Format, LayerPart, LayerSpec};
use crate::layout::Level;
use crate::restore::options::target_error;
use crate::restore::source::Reader;
use crate::restore::temp::folder_of;
use crate::restore::{Plan, Temp, check_removable, readback};
use crate::text::path_text;
use crate::{chain, folder, qemu_img};

/// Memory for merged windows while the result is compared.
const CACHE_BYTES: u64 = 128 << 20;

impl FlattenPlan {
    /// Plans to merge the points of a chain section into its FULL.
    ///
    /// # Errors
    /// `Unsupported` if images are not of a kind that QEMU can commit, `Usage` if other points
    /// depend on what would go.
    pub fn new(catalog: &Catalog, line: &ChainSection, with_snapshots: bool) -> Result<Self> {
        let mut members = line.members()?.into_iter();
        let Some(full) = members.next() else {
            return Err(Error::new(Kind::NotFound, "there is no image"));
        };
        let increments: Vec<Member> = members.collect();
        crate::journal::linking::refuse(folder_of(&full.path))?;
        chain::check_formats(line.disk, line.last())?;
        for m in &increments {
            only_qcow2(m)?;
            same_folder(&full, m)?;
        }
        let going: Vec<&Path> =
            std::iter::once(&full).chain(&increments).map(|m| m.path.as_path()).collect();
        Users::of(catalog).refuse(&going)?;
        if with_snapshots && full.format != Format::Qcow2 {
            return Err(Error::new(Kind::Unsupported, "a raw image has no internal snapshots")
                .at_path(&full.path));
        }
        let children = children(line)?;
        let interim = interim_path(&full, increments.last());
        if !increments.is_empty() && folder::exists(&interim) {
            let what = "the temporary name of the new FULL is in use";
            return Err(Error::new(Kind::Exists, what)
                .at_path(interim)
                .remedy("use 'fleecefs merge' or 'restore', which do not change the backup"));
        }
        let snapshots =
            if with_snapshots { snapshots::names(&full, &increments)? } else { Vec::new() };
        Ok(FlattenPlan { full, increments, interim, children, snapshots })
    }

    /// The steps, one a line.
    pub fn lines(&self) -> Vec<String> {
        let name = |p: &Path| path_text(p.file_name().unwrap_or_default());
        let full = name(&self.full.path);
        let mut lines = vec![format!("copy {full}")];
        if let Some(Some(s)) = self.snapshots.first() {
            lines.push(format!("take the internal snapshot {s}"));
        }
        for (i, m) in self.increments.iter().enumerate() {
            lines.push(format!("commit a copy of {} into it", name(&m.path)));
            if let Some(Some(s)) = self.snapshots.get(i + 1) {
                lines.push(format!("take the internal snapshot {s}"));
            }
        }
        lines.push(format!("publish it as {}", name(&self.interim)));
        lines.extend(self.increments.iter().rev().map(|m| format!("remove {}", name(&m.path))));
        if !self.increments.is_empty() {
            lines.push(format!("rename {} to {full}", name(&self.interim)));
        }
        lines
    }

    /// Does it.
    ///
    /// # Errors
    /// What was met. Before the switch nothing has changed then; during it whoever
    /// writes to the folder next finishes.
    pub fn execute(&self, line: &ChainSection, skip_check: bool, work: &Work) -> Result<()> {
        let members = || std::iter::once(&self.full).chain(&self.increments);
        if !skip_check {
            members().try_for_each(|m| files::check(m, work))?;
        }
        let dir = open_folder(folder_of(&self.full.path))?;
        let unchanged = || members().try_for_each(|m| files::check_same(&dir, m.name(), m.id));
        unchanged()?;
        members().try_for_each(|m| check_removable(&dir, m.name()))?;
        // What gets another backing pointer in the end has to be one that can be altered.
        for child in self.children.iter().filter_map(|c| c.file_name()) {
            files::check_alterable(&dir, child)?;
        }
        let side = side_folder(&dir)?;
        let temp = Temp::create_named(side.path())?;
        let total = members().map(|m| dir.look(m.name()).map_or(0, |m| m.len())).sum();
        work.progress.begin("commit", total);
        files::copy(&self.full.path, temp.file(), temp.path(), work)?;
        self.snapshot(0, &temp, work)?;
        for (i, m) in self.increments.iter().enumerate() {
            self.commit(m, &temp, side.path(), work)?;
            self.snapshot(i + 1, &temp, work)?;
        }
        temp.file().sync_all().map_err(|e| target_error(e, "cannot write to disk", temp.path()))?;
        if !skip_check {
            self.compare(line, &temp, work)?;
        }
        if !self.increments.is_empty() {
            // While both chains are there names do not tell which image depends on which.
            chain::record_from(line.disk, line.points[0])?;
        }
        unchanged()?;
        let plan = ReplacePlan::new(self, &dir, &temp, work)?;
        switch(plan, &dir, temp, work)
    }

    /// Commits a copy of one increment into the new FULL.
    fn commit(&self, m: &Member, base: &Temp, side: &Path, work: &Work) -> Result<()> {
        let copy = Temp::create_named(side)?;
        files::copy(&m.path, copy.file(), copy.path(), work)?;
        let rate = work.rate.as_ref().map_or(0, |r| r.per_second());
        let (both, format) = ((copy.file(), base.file()), self.full.format);
        qemu_img::commit(both, format, rate, &m.path, &|| work.check())?;
        self.resize(m, base, work)
    }

    /// Commit makes a smaller base grow, but never a larger one shrink.
    fn resize(&self, m: &Member, base: &Temp, work: &Work) -> Result<()> {
        if files::probe(base.path())?.virtual_size == m.size {
            return Ok(());
        }
        match self.full.format {
            Format::Qcow2 => qemu_img::resize(base.file(), m.size, base.path(), &|| work.check()),
            _ => {
                let resized = base.file().set_len(m.size);
                resized.map_err(|e| target_error(e, "cannot set the size", base.path()))
            }
        }
    }

    fn snapshot(&self, index: usize, base: &Temp, work: &Work) -> Result<()> {
        let Some(Some(name)) = self.snapshots.get(index) else { return Ok(()) };
        qemu_img::snapshot(base.file(), name, base.path(), &|| work.check())
    }

    /// Compares the new FULL with the point it is to be, and each snapshot with its own.
    fn compare(&self, line: &ChainSection, new: &Temp, work: &Work) -> Result<()> {
        compare_one(line, line.last(), new, (self.full.format, LayerPart::Whole), work)?;
        if self.snapshots.is_empty() {
            return Ok(());
        }
        let taken = crate::layer::probe(&new.source()?)?.snapshots;
        for (&point, name) in line.points.iter().zip(&self.snapshots) {
            let Some(name) = name else { continue };
            let mut found = (0u32..).zip(&taken).filter(|(_, s)| s.name == *name);
            let (Some((place, _)), None) = (found.next(), found.next()) else {
                let text = format!("there is not one snapshot called {name}");
                return Err(Error::new(Kind::Unsound, text).at_path(new.path()));
            };
            let part = LayerPart::Snapshot(place);
            compare_one(line, point, new, (self.full.format, part), work)?;
        }
        Ok(())
    }
}

/// Compares what `part` of the new image holds with a point.
fn compare_one(
    line: &ChainSection,
    point: usize,
    new: &Temp,
    (format, part): (Format, LayerPart),
    work: &Work,
) -> Result<()> {
    let cache = Cache::new(CACHE_BYTES);
    let point = open_point(line.disk, point, &cache)?;
    let plan = Plan::new(&point, work)?;
    plan.check_readable(false)?;
    let file = Arc::new(new.source()?);
    let spec = LayerSpec { file, format, part, data_file: None };
    let size = crate::layer::open(&spec)?.size();
    let result = Image::new(size, &[spec], None, &cache)?;
    readback::image(&Reader::new(&point, false), &plan, &result, new.path(), work)
}

/// The images that depend on the line's last one. Others must not depend on the line: what they are made
/// of would go, or change.
fn children(line: &ChainSection) -> Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for (i, p) in line.disk.points.iter().enumerate() {
        let Some(parent) = p.parent.filter(|_| !line.points.contains(&i)) else { continue };
        if p.level == Level::Snapshot || !line.points.contains(&parent) {
            continue;
        }
        if parent != line.last() {
            let text = format!("{} depends on an image that would be changed", p.name);
            return Err(Error::new(Kind::Usage, text)
                .at_path(&p.source)
                .remedy("restore it first and remove it, or use 'fleecefs consolidate'"));
        }
        children.push(p.source.clone());
    }
    Ok(children)
}

/// The FULL under the last increment's time.
fn interim_path(full: &Member, last: Option<&Member>) -> PathBuf {
    let Some(last) = last else { return full.path.clone() };
    let name = last.path.file_name().unwrap_or_default().as_bytes();
    let rest = name.iter().position(|b| *b == b'-').map_or(&b"-new"[..], |i| &name[i..]);
    let name = [b"FULL", rest].concat();
    folder_of(&full.path).join(OsStr::from_bytes(&name))
}
