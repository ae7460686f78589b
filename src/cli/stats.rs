//! `fleecefs stats`: what points take, and what changes.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::keep::KeepArgs;
use super::paths::catalog;
use super::shared::JsonArgs;
use super::table::{Row, Table, level_name};
use super::verbosity;
use crate::chain::{Catalog, Disk, Point};
use crate::error::{Error, Result};
use crate::image::{Cache, Image, open_point_sharing};
use crate::layout::Level;
use crate::output::{self, Look};
use crate::prune::items;
use crate::prune::plan::{PlanOptions, Rules, plan};
use crate::text::{as_text, path_text};
use crate::units::{as_time, counted, human_bytes, iso_time, parse_bytes};

/// Show what each point takes and adds, and how much of a disk changes
///
/// OWN is the space that the point's file takes, DATA the guest data in it: for an INC, what was written since the
/// point before. Below each disk it says how much of the disk may differ between the first and the last point, as
/// 'fleecefs diff' does. Only maps are read; archives (VMA, lz4 streams) have no DATA, since they would have to be
/// unpacked.
///
/// With --keep-... rules it also shows what 'fleecefs prune' would free with these rules; nothing is deleted.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  fleecefs stats /backups/vm1
  fleecefs stats /backups/vm1 --disk sda --json
  fleecefs stats /backups/vm1 --keep-daily 7     what prune would free")]
pub(super) struct StatsArgs {
    /// The backup directory
    pub dir: PathBuf,
    /// Only this disk, by its path
    #[arg(long, value_name = "DISK")]
    disk: Option<PathBuf>,
    #[command(flatten)]
    keep: KeepArgs,
    /// Memory for maps
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "64M")]
    cache_size: u64,
    #[command(flatten)]
    pub print: JsonArgs,
}

/// Columns of the longest bar.
const BAR: u64 = 20;

/// Runs `fleecefs stats`.
///
/// # Errors
/// The directory or a map cannot be read.
pub(super) fn run(args: &StatsArgs) -> Result<()> {
    let catalog = catalog(&args.dir)?;
    let only = args.disk.as_deref().map(|name| catalog.disk(name)).transpose()?;
    let wanted = |d: &&Disk| only.is_none_or(|o| o.path == d.path);
    let mut failed = None;
    let disks: Vec<DiskStats> = catalog
        .disks
        .iter()
        .filter(wanted)
        .map(|d| disk_stats(d, args.cache_size, &mut failed))
        .collect();
    let rules = args.keep.rules();
    let prune = if rules.is_empty() { None } else { Some(pruned(&catalog, &rules, only)?) };
    let own_bytes = disks.iter().map(|d| d.own_bytes).sum();
    let stats = Stats { root: catalog.root.clone(), disks, own_bytes, prune };
    match args.print.json {
        true => output::print(&output::json_document(&stats)?)?,
        false => show(&stats)?,
    }
    failed.map_or(Ok(()), Err)
}

/// What is known of a backup directory.
#[derive(Serialize)]
struct Stats {
    #[serde(serialize_with = "as_text")]
    root: PathBuf,
    disks: Vec<DiskStats>,
    own_bytes: u64,
    prune: Option<Pruned>,
}

/// What `prune` would do.
#[derive(Serialize)]
struct Pruned {
    points: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct DiskStats {
    #[serde(serialize_with = "as_text")]
    disk: PathBuf,
    size: u64,
    points: usize,
    own_bytes: u64,
    chains: Vec<ChainStats>,
    changed: Option<Changed>,
}

#[derive(Serialize)]
struct ChainStats {
    chain: String,
    own_bytes: u64,
    points: Vec<PointStats>,
}

#[derive(Serialize)]
struct PointStats {
    point: String,
    #[serde(serialize_with = "as_time")]
    time: i64,
    level: Level,
    own_bytes: u64,
    data_bytes: Option<u64>,
}

/// What may differ between the first and the last point.
#[derive(Serialize)]
struct Changed {
    from: String,
    to: String,
    bytes: u64,
    percent: f64,
}

fn pruned(catalog: &Catalog, rules: &Rules, only: Option<&Disk>) -> Result<Pruned> {
    let options = PlanOptions { force: false, merge: None };
    let plan = plan(&items(catalog)?, rules, &jiff::tz::TimeZone::system(), options);
    let gone = plan.deleted().filter(|(disk, _)| only.is_none_or(|o| o.path == disk.disk));
    let mut pruned = Pruned { points: 0, bytes: 0 };
    for (_, point) in gone {
        pruned.points += 1;
        pruned.bytes = pruned.bytes.saturating_add(point.bytes);
    }
    Ok(pruned)
}

/// What is known of a disk; what cannot be read is told, and missing.
fn disk_stats(disk: &Disk, cache_size: u64, failed: &mut Option<Error>) -> DiskStats {
    let cache = Cache::new(cache_size);
    let mut images = vec![None; disk.points.len()];
    let mut chains: Vec<ChainStats> = Vec::new();
    let mut tell = |point: &Point, e: Error| {
        log::warn!("{}: {}", path_text(&point.name), e.report());
        failed.get_or_insert(e);
    };
    for (i, point) in disk.points.iter().enumerate() {
        let data_bytes = match point.is_served().then(|| data(disk, i, &cache, &mut images)) {
            Some(Ok(data)) => data,
            Some(Err(e)) => {
                tell(point, e);
                None
            }
            None => None,
        };
        let (name, time, own_bytes) = (point.name.clone(), point.time, point.own_bytes);
        let stats = PointStats { point: name, time, level: point.level, own_bytes, data_bytes };
        match chains.iter_mut().find(|c| c.chain == point.chain) {
            Some(chain) => {
                chain.own_bytes = chain.own_bytes.saturating_add(own_bytes);
                chain.points.push(stats);
            }
            None => {
                let (chain, points) = (point.chain.clone(), vec![stats]);
                chains.push(ChainStats { chain, own_bytes, points });
            }
        }
    }
    let changed = changed(disk, &cache, &mut images).unwrap_or_else(|(point, e)| {
        tell(point, e);
        None
    });
    DiskStats {
        disk: disk.path.clone(),
        size: disk.points.last().map_or(0, |p| p.size),
        points: disk.points.len(),
        own_bytes: chains.iter().map(|c| c.own_bytes).sum(),
        chains,
        changed,
    }
}

/// Bytes of guest data that a point's own image has; `None` if it takes long to tell.
fn data(
    disk: &Disk,
    point: usize,
    cache: &Arc<Cache>,
    images: &mut [Option<Arc<Image>>],
) -> Result<Option<u64>> {
    let image = open_point_sharing(disk, point, cache, images)?;
    match image.must_wait(0..image.size().min(1)) {
        true => Ok(None),
        false => image.own_data_bytes().map(Some),
    }
}

/// What changed between the oldest and the newest point; with the point that could not be read.
fn changed<'a>(
    disk: &'a Disk,
    cache: &Arc<Cache>,
    images: &mut [Option<Arc<Image>>],
) -> std::result::Result<Option<Changed>, (&'a Point, Error)> {
    let served = || disk.points.iter().enumerate().filter(|(_, p)| p.is_served());
    let (Some((first, from)), Some((last, to))) =
        (served().min_by_key(|(i, p)| (p.time, *i)), served().max_by_key(|(i, p)| (p.time, *i)))
    else {
        return Ok(None);
    };
    let a = open_point_sharing(disk, first, cache, images).map_err(|e| (from, e))?;
    let b = open_point_sharing(disk, last, cache, images).map_err(|e| (to, e))?;
    let all = a.size().max(b.size());
    if first == last || a.must_wait(0..1) || b.must_wait(0..1) {
        return Ok(None);
    }
    let mut bytes = 0;
    a.for_each_change(&b, 0..all, |change| {
        bytes += change.length;
        true
    })
    .map_err(|e| (to, e))?;
    let percent = (bytes as f64 * 1000.0 / all.max(1) as f64).round() / 10.0;
    Ok(Some(Changed { from: from.name.clone(), to: to.name.clone(), bytes, percent }))
}

fn show(stats: &Stats) -> Result<()> {
    let bars = std::io::stdout().is_terminal();
    let titles: &'static [&'static str] = &["POINT", "TIME", "LEVEL", "OWN", "DATA", ""];
    let titles = match bars {
        true => titles,
        false => titles.split_last().map_or(titles, |(_, rest)| rest),
    };
    let longest = |d: &DiskStats| {
        d.chains.iter().flat_map(|c| &c.points).map(|p| p.own_bytes).max().unwrap_or(0)
    };
    let mut rows = Vec::new();
    for disk in &stats.disks {
        let (all, own) = (counted(disk.points as u64, "point"), human_bytes(disk.own_bytes));
        rows.push(Row::Heading(format!(
            "{}  {}, {all} in {}, {own}",
            path_text(&disk.disk),
            human_bytes(disk.size),
            counted(disk.chains.len() as u64, "chain")
        )));
        for point in disk.chains.iter().flat_map(|c| &c.points) {
            rows.push(Row::Cells(cells(point, longest(disk), bars), Look::Plain));
        }
        if let Some(c) = &disk.changed {
            let what = format!(
                "{} ({} %) may differ between the first and the last point",
                human_bytes(c.bytes),
                c.percent
            );
            rows.push(Row::Below(what, Look::Plain));
        }
    }
    let table =
        Table { titles, right: &["OWN", "DATA"], less: &["LEVEL", "TIME"], indent: 2, rows };
    let mut lines = table.lines(verbosity::is_verbose());
    lines
        .push(output::Line::new(Look::Plain, format!("{} in total", human_bytes(stats.own_bytes))));
    if let Some(p) = &stats.prune {
        let what = format!(
            "prune with these rules: {} to delete, {}",
            counted(p.points, "point"),
            human_bytes(p.bytes)
        );
        lines.push(output::Line::new(Look::Plain, what));
    }
    output::print_lines(&lines)
}

fn cells(point: &PointStats, longest: u64, bars: bool) -> Vec<String> {
    let mut cells = vec![
        path_text(&point.point),
        iso_time(point.time),
        level_name(point.level).to_string(),
        human_bytes(point.own_bytes),
        point.data_bytes.map_or_else(|| "-".into(), human_bytes),
    ];
    if bars {
        cells.push(bar(point.own_bytes, longest));
    }
    cells
}

/// As long as its share of the longest; what is not nothing is to be seen.
fn bar(bytes: u64, longest: u64) -> String {
    let share = u128::from(bytes) * u128::from(BAR);
    let columns = share.div_ceil(u128::from(longest.max(1))).min(u128::from(BAR));
    "#".repeat(columns as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_shares_of_the_longest() {
        let len = |bytes, longest| bar(bytes, longest).len();
        assert_eq!((len(0, 10), len(1, 1000), len(5, 10), len(10, 10)), (0, 1, 10, 20));
        assert_eq!((len(0, 0), len(u64::MAX, u64::MAX)), (0, 20));
    }
}
