//! `fleecefs list --runs`: what was backed up together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::json;

use super::health::{self, Booted, Boots, Health};
use super::table::{Row, Table, level_name};
use super::verbosity;
use crate::chain::{Catalog, Disk, manifest_of, missing_of_run};
use crate::error::Result;
use crate::layout::Level;
use crate::manifest::{Achieved, Manifest};
use crate::output;
use crate::output::{Line, Look};
use crate::restore::run::{Duplicates, Guest, Guests, PointTime};
use crate::text::{path_text, to_text};
use crate::units::{as_time, human_bytes, iso_time};

/// A run of one VM.
#[derive(Debug, Serialize)]
struct RunRow {
    /// The VM's name, else its UUID, else the folder of its disks in the backup directory.
    vm: String,
    /// The run's id; points without a manifest have none, and belong together by their time.
    #[serde(rename = "run")]
    id: Option<String>,
    /// What they are ordered by.
    #[serde(skip)]
    when: PointTime,
    #[serde(serialize_with = "as_time")]
    time: i64,
    points: Vec<PointRow>,
    /// Disks that the run should have backed up and could not, or whose images of it are gone.
    failed: BTreeSet<String>,
    /// Of its points, with their disks.
    #[serde(skip)]
    manifests: Vec<(PathBuf, Manifest)>,
    /// Bytes that its files take.
    own_bytes: u64,
    /// The least that is known of any of its points.
    consistency: &'static str,
    served: bool,
    /// The worst of its points.
    #[serde(skip)]
    health: Health,
    /// Of each of its points.
    #[serde(skip)]
    booted: Vec<Booted>,
}

#[derive(Debug, Serialize)]
struct PointRow {
    disk: String,
    point: String,
    level: Level,
    served: bool,
}

/// Prints the runs of `points`, which may be those of `all_disks`, the newest first, as a table or as JSON.
///
/// # Errors
/// They cannot be written.
pub(super) fn show(
    catalog: &Catalog,
    (points, boots): (&[(&Disk, usize, Health)], &Boots),
    all_disks: bool,
    as_json: bool,
) -> Result<()> {
    let mut runs = runs(catalog, points, Some(boots));
    // Of one disk's points nothing can be told about the others.
    for run in runs.iter_mut().filter(|r| all_disks && r.id.is_some()) {
        let of_run = run.manifests.iter().map(|(disk, m)| (disk.as_path(), m));
        let missing = missing_of_run(of_run, &[]);
        run.failed.extend(missing.into_iter().map(|i| i.disk));
    }
    if as_json {
        return output::print(&output::json_document(&json!({"runs": runs}))?);
    }
    if runs.is_empty() {
        return output::print(&format!("no backups in {}\n", path_text(&catalog.root)));
    }
    output::print_lines(&table(runs, verbosity::is_verbose()))
}

/// What 'restore --run' may be given: times and ids.
pub(super) fn names(catalog: &Catalog) -> Vec<String> {
    let disks = catalog.disks.iter();
    let points = disks.flat_map(|d| (0..d.points.len()).map(move |i| (d, i, Health::NotVerified)));
    let names = runs(catalog, &points.collect::<Vec<_>>(), None)
        .into_iter()
        .flat_map(|r| [Some(iso_time(r.time)), r.id]);
    names.flatten().chain(["latest".to_string()]).collect()
}

fn runs(
    catalog: &Catalog,
    points: &[(&Disk, usize, Health)],
    boots: Option<&Boots>,
) -> Vec<RunRow> {
    let doubles = Duplicates::of(catalog);
    let mut found: BTreeMap<(Guest, Option<String>, i64), RunRow> = BTreeMap::new();
    let manifests: Vec<_> = points.iter().map(|(disk, i, _)| manifest_of(disk, *i)).collect();
    let known = points.iter().zip(&manifests).map(|((disk, ..), m)| (*disk, m.as_ref()));
    let guests = Guests::of(known);
    for ((disk, i, health), manifest) in points.iter().zip(manifests) {
        let p = &disk.points[*i];
        if p.level == Level::Snapshot || doubles.has(disk, p.time, manifest.as_ref()) {
            continue;
        }
        let id = manifest.as_ref().map(|m| m.run.clone()).filter(|id| !id.is_empty());
        let guest = guests.guest(disk, manifest.as_ref());
        let when = PointTime::of(p.time, manifest.as_ref());
        let vm = guest.name();
        let key = (guest, id.clone(), if id.is_some() { 0 } else { p.time });
        let run = found.entry(key).or_insert_with(|| RunRow {
            vm,
            id,
            when,
            time: p.time,
            points: Vec::new(),
            failed: BTreeSet::new(),
            manifests: Vec::new(),
            own_bytes: 0,
            consistency: Achieved::word(p.consistency),
            served: true,
            health: *health,
            booted: Vec::new(),
        });
        run.booted.extend(boots.map(|b| b.get(disk, *i)));
        run.when = run.when.max(when);
        run.points.push(PointRow {
            disk: to_text(disk.path.file_name().unwrap_or_default()),
            point: p.name.clone(),
            level: p.level,
            served: p.is_served(),
        });
        if let Some(m) = manifest {
            run.failed.extend(m.failed.iter().map(|f| f.disk.clone()));
            run.manifests.push((disk.path.clone(), m));
        }
        run.own_bytes = run.own_bytes.saturating_add(p.own_bytes);
        run.served &= p.is_served();
        run.health = Health::worst([run.health, *health].into_iter()).unwrap_or(*health);
        if run.consistency != Achieved::word(p.consistency) {
            run.consistency = "mixed";
        }
    }
    let mut runs: Vec<RunRow> = found.into_values().collect();
    for run in &mut runs {
        // Where a disk had a point of this second already, its next one has the next.
        run.time = run.when.time;
    }
    runs.sort_by(|a, b| b.when.cmp(&a.when).then_with(|| a.vm.cmp(&b.vm)));
    runs
}

/// Titles of the columns.
const TITLES: &[&str] = &["TIME", "RUN", "VM", "DISKS", "OWN", "CONSISTENCY", "STATE"];

fn table(runs: Vec<RunRow>, wide: bool) -> Vec<Line> {
    let now = jiff::Timestamp::now().as_second();
    let notes = health::notes(runs.iter().map(|r| r.health));
    let mut rows = Vec::new();
    for r in runs {
        let disks = r.points.iter();
        let disks = disks.map(|p| format!("{} {}", path_text(&p.disk), level_name(p.level)));
        let failed: Vec<String> = r.failed.iter().map(path_text).collect();
        let (state, look, below) = match (r.served, failed.as_slice()) {
            (false, _) => {
                ("unavailable".into(), Look::Red, Some("unavailable: see 'list'".to_string()))
            }
            (true, []) => {
                let word = r.health.word(now);
                let booted = Booted::all(r.booted.iter().copied());
                (booted.behind(word, now), r.health.look(), None)
            }
            (true, names) => {
                let what = format!("partial: without {}", names.join(", "));
                ("partial".into(), Look::Yellow, Some(what))
            }
        };
        let disks = disks.collect::<Vec<_>>().join(", ");
        let several = !wide && r.points.len() > 1;
        let cells = vec![
            iso_time(r.time),
            r.id.as_deref().map_or_else(|| "-".into(), path_text),
            if r.vm.is_empty() { "-".into() } else { path_text(&r.vm) },
            if several { format!("{} disks", r.points.len()) } else { disks.clone() },
            human_bytes(r.own_bytes),
            r.consistency.into(),
            state,
        ];
        rows.push(Row::Cells(cells, look));
        rows.extend(several.then_some(Row::Below(disks, Look::Plain)));
        rows.extend(below.map(|text| Row::Below(text, look)));
    }
    let less = &["OWN", "CONSISTENCY", "VM"];
    let mut lines = Table { titles: TITLES, right: &["OWN"], less, indent: 0, rows }.lines(wide);
    lines.extend(notes);
    lines
}
