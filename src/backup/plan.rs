//! What a run will do, as a value: which disks, at which level and why, out of what is there.
//! Pure: nothing here talks to QEMU or writes.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::history::{History, no_base};
use super::seen::{Seen, SeenDisk};
use super::{Every, LevelWish, Options, names};
use crate::chain::Level;
use crate::chain::manifest::{BitmapInfo, DiskIdentity, Manifest, Skipped};
use crate::error::{Error, Kind, Result};

/// What will be done.
#[derive(Debug)]
pub struct Plan {
    /// The run's id.
    pub run: String,
    /// The disks, in the order QEMU lists them.
    pub disks: Vec<DiskPlan>,
    /// Disks left out.
    pub skipped: Vec<Skipped>,
    /// Disks that should be backed up and cannot.
    pub refused: Vec<(String, Error)>,
}

/// What will be done with one disk.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Its number in the run.
    pub index: usize,
    /// The disk.
    pub disk: SeenDisk,
    /// Its folder in the target.
    pub dir: PathBuf,
    /// The level it gets.
    pub level: Level,
    /// Why it gets a FULL though an INC was possible to hope for.
    pub demoted: Option<String>,
    /// File name of the new image.
    pub image: String,
    /// The run that began its chain.
    pub chain: String,
    /// What it builds on: manifests, root first; empty for FULL and COPY.
    pub base: Vec<Manifest>,
    /// The bitmap that says what changed.
    pub since: Option<BitmapInfo>,
    /// The bitmap that will record from now on.
    pub new_bitmap: Option<BitmapInfo>,
    /// The FULL's own bitmap, if DIFFs are wanted.
    pub diff_bitmap: Option<BitmapInfo>,
    /// Bitmaps of this target that nothing needs once the point is published.
    pub obsolete: Vec<String>,
    /// The latest time in the folder's names.
    pub last_time: i64,
}

impl DiskPlan {
    /// The point it lies on.
    pub fn parent(&self) -> Option<&Manifest> {
        match self.level {
            Level::Diff => self.base.first(),
            _ => self.base.last(),
        }
    }

    /// Bytes that will be copied, as far as can be known before.
    pub fn estimate(&self) -> u64 {
        match &self.since {
            Some(b) => self.disk.bitmap(&b.name).map_or(0, |b| b.count).min(self.disk.size),
            None => self.disk.allocated,
        }
    }
}

/// What planning needs to know beside the options.
pub struct Inputs<'a> {
    /// The disks.
    pub seen: Seen,
    /// The run's id.
    pub run: &'a str,
    /// The first eight digits of the target's id.
    pub target_id: &'a str,
    /// The folder for this run's disks: the target, or its folder of the month.
    pub base: &'a Path,
    /// Seconds since the epoch.
    pub now: i64,
    /// The VM's UUID, if it has one.
    pub vm: Option<&'a str>,
    /// Why INC and DIFF are impossible in this run, if they are.
    pub no_inc: Option<String>,
    /// Folders whose chain was found unsound, and how.
    pub unsound: &'a [(PathBuf, String)],
}

/// Makes the plan.
///
/// # Errors
/// The target cannot be read, or `--include` names a disk that is not there. A disk that cannot
/// have what was asked for is in [`Plan::refused`].
pub fn make(options: &Options, inputs: Inputs<'_>) -> Result<Plan> {
    let mut plan = Plan {
        run: inputs.run.to_string(),
        disks: Vec::new(),
        skipped: inputs.seen.skipped.clone(),
        refused: Vec::new(),
    };
    check_names(options, &inputs.seen)?;
    let wanted = choose(options, &inputs.seen, &mut plan);
    let folders = Folders::assign(options, &inputs, &wanted)?;
    for b in &inputs.seen.blocked {
        if is_wanted(options, &b.disk) {
            plan.refused.push((b.disk.clone(), Error::new(Kind::Busy, b.reason.clone())));
        }
    }
    for (disk, (dir, history)) in wanted.into_iter().zip(folders.list) {
        let label = disk.label().to_string();
        let index = plan.disks.len();
        match plan_disk(options, &inputs, (index, disk), dir, &history) {
            Ok(d) => plan.disks.push(d),
            Err(e) => plan.refused.push((label, e)),
        }
    }
    separate_images(&mut plan.disks);
    if plan.disks.is_empty() && plan.refused.is_empty() {
        return Err(Error::new(Kind::NotFound, "there is no disk to back up")
            .remedy("fleecefs info blockdev says why each is left out"));
    }
    Ok(plan)
}

/// Whether a disk that is known by its name alone is asked for.
fn is_wanted(options: &Options, name: &str) -> bool {
    let listed = |list: &[String]| list.iter().any(|n| n == name);
    !listed(&options.exclude) && (options.include.is_empty() || listed(&options.include))
}

fn check_names(options: &Options, seen: &Seen) -> Result<()> {
    for name in &options.include {
        let known = seen.disks.iter().any(|d| d.is_called(name));
        let others = seen.skipped.iter().chain(&seen.blocked);
        if !known && !others.into_iter().any(|s| s.disk == *name) {
            return Err(Error::new(Kind::NotFound, format!("there is no disk {name:?}"))
                .remedy("fleecefs info blockdev lists them"));
        }
    }
    Ok(())
}

fn choose(options: &Options, seen: &Seen, plan: &mut Plan) -> Vec<SeenDisk> {
    let mut wanted = Vec::new();
    for d in &seen.disks {
        let named = |list: &[String]| list.iter().any(|n| d.is_called(n));
        let skip = if !options.include.is_empty() && !named(&options.include) {
            Some("not in --include")
        } else if named(&options.exclude) {
            Some("in --exclude")
        } else {
            None
        };
        if let Some(reason) = skip {
            plan.skipped.push(Skipped { disk: d.label().into(), reason: reason.into() });
        } else if d.encrypted && !options.allow_plaintext {
            let e =
                Error::new(Kind::Encrypted, "the disk is encrypted and the backup would not be")
                    .remedy("--allow-plaintext writes it in plain text, --exclude leaves it out");
            plan.refused.push((d.label().into(), e));
        } else {
            wanted.push(d.clone());
        }
    }
    wanted
}

/// Which folder belongs to which disk.
struct Folders {
    list: Vec<(PathBuf, History)>,
}

impl Folders {
    /// A disk keeps the folder whose manifests name its file, else its device; a new one gets a
    /// folder by its base name, made unique.
    fn assign(options: &Options, inputs: &Inputs<'_>, disks: &[SeenDisk]) -> Result<Self> {
        let mut list: Vec<Option<(PathBuf, History)>> = vec![None; disks.len()];
        for rule in [same_file as Rule, same_disk, unclaimed] {
            for (i, disk) in disks.iter().enumerate() {
                if list.get(i).is_some_and(Option::is_some) {
                    continue;
                }
                let found = candidate(options, inputs, disk, &list, rule)?;
                if let Some(slot) = list.get_mut(i) {
                    *slot = found;
                }
            }
        }
        let list = list.into_iter().map(|o| {
            o.ok_or_else(|| Error::new(Kind::Exists, "too many folders of one disk's name"))
        });
        Ok(Folders { list: list.collect::<Result<_>>()? })
    }
}

type Rule = fn(&Inputs<'_>, &SeenDisk, &History) -> bool;

fn same_file(_: &Inputs<'_>, disk: &SeenDisk, h: &History) -> bool {
    h.last_manifest().is_some_and(|m| m.disk.file == disk.identity.file)
}

/// The disk's file was moved: its bitmap came along, or it is at the same device of the same VM.
fn same_disk(inputs: &Inputs<'_>, disk: &SeenDisk, h: &History) -> bool {
    let carries = needed(h).iter().any(|b| disk.bitmap(b).is_some());
    let device = |d: &DiskIdentity| (d.qdev.clone(), d.device.clone());
    let same_vm = |m: &Manifest| inputs.vm.is_some() && vm_uuid(&m.vm) == inputs.vm;
    carries
        || h.last_manifest()
            .is_some_and(|m| same_vm(m) && device(&m.disk) == device(&disk.identity))
}

/// The VM's UUID out of what QEMU said about itself; `None` if it has none.
pub fn vm_uuid(vm: &Value) -> Option<&str> {
    let uuid = vm.get("query-uuid")?.get("UUID")?.as_str()?;
    uuid.chars().any(|c| c != '0' && c != '-').then_some(uuid)
}

fn unclaimed(_: &Inputs<'_>, _: &SeenDisk, h: &History) -> bool {
    h.last_manifest().is_none()
}

/// How many disks of one base name are kept apart.
const MAX_SAME_NAME: usize = 100;

fn candidate(
    options: &Options,
    inputs: &Inputs<'_>,
    disk: &SeenDisk,
    taken: &[Option<(PathBuf, History)>],
    rule: Rule,
) -> Result<Option<(PathBuf, History)>> {
    let name = disk.base_name();
    for n in 1..=MAX_SAME_NAME {
        let folder = if n == 1 { name.clone() } else { format!("{name}-{n}") };
        let (dir, only) = if options.layout.no_subdir {
            (inputs.base.to_path_buf(), Some(folder.as_str()))
        } else {
            (inputs.base.join(&folder), None)
        };
        let is_taken = taken.iter().flatten().any(|(d, h)| {
            *d == dir && (!options.layout.no_subdir || image_tail(h) == Some(folder.as_str()))
        });
        if is_taken {
            continue;
        }
        let mut history = History::read(&dir, only)?;
        history.tail = folder;
        if rule(inputs, disk, &history) {
            return Ok(Some((dir, history)));
        }
    }
    Ok(None)
}

fn image_tail(h: &History) -> Option<&str> {
    (!h.tail.is_empty()).then_some(h.tail.as_str())
}

fn plan_disk(
    options: &Options,
    inputs: &Inputs<'_>,
    (index, disk): (usize, SeenDisk),
    dir: PathBuf,
    history: &History,
) -> Result<DiskPlan> {
    let last_time = history.last_time();
    let time = inputs.now.max(last_time.saturating_add(1));
    let mut plan = DiskPlan {
        index,
        level: Level::Full,
        demoted: None,
        image: String::new(),
        chain: inputs.run.to_string(),
        base: Vec::new(),
        since: None,
        new_bitmap: None,
        diff_bitmap: None,
        obsolete: Vec::new(),
        last_time,
        dir,
        disk,
    };
    choose_level(options, inputs, history, &mut plan)?;
    choose_bitmaps(options, inputs, history, &mut plan);
    let word = names::level_word(plan.level);
    let plain = options.layout.no_timestamp && matches!(plan.level, Level::Full | Level::Copy);
    plan.image =
        if plain { history.tail.clone() } else { format!("{word}-{time}-{}", history.tail) };
    if plain && plan.dir.join(&plan.image).exists() {
        return Err(Error::new(Kind::Exists, "an image without timestamp is there already")
            .at_path(plan.dir.join(&plan.image)));
    }
    Ok(plan)
}

fn choose_level(
    options: &Options,
    inputs: &Inputs<'_>,
    history: &History,
    plan: &mut DiskPlan,
) -> Result<()> {
    let wish = options.level;
    match wish {
        LevelWish::Full => return Ok(()),
        LevelWish::Copy => {
            plan.level = Level::Copy;
            return Ok(());
        }
        _ if plan.disk.pflash => return Ok(()),
        LevelWish::Inc | LevelWish::Diff | LevelWish::Auto(_) => {}
    }
    let diff = wish == LevelWish::Diff;
    match usable_base(inputs, history, &plan.disk, diff) {
        Ok((base, since)) => {
            if let LevelWish::Auto(Some(every)) = wish
                && is_due(every, &base, inputs.now)
            {
                plan.demoted = Some("a new FULL is due (--full-every)".into());
                return Ok(());
            }
            plan.chain = base.first().map_or_else(String::new, |m| m.run.clone());
            plan.level = if diff { Level::Diff } else { Level::Inc };
            plan.base = base;
            plan.since = Some(since);
            Ok(())
        }
        Err(reason) if matches!(wish, LevelWish::Auto(_)) => {
            plan.demoted = Some(reason);
            Ok(())
        }
        Err(reason) => Err(no_base(&reason)),
    }
}

fn is_due(every: Every, base: &[Manifest], now: i64) -> bool {
    match every {
        Every::Points(n) => base.len() as u64 >= n,
        Every::Age(age) => {
            let full = base.first().map_or(0, |m| m.time);
            now.saturating_sub(full) >= i64::try_from(age.as_secs()).unwrap_or(i64::MAX)
        }
    }
}

/// The chain to build on and the bitmap that says what changed since.
fn usable_base(
    inputs: &Inputs<'_>,
    history: &History,
    disk: &SeenDisk,
    diff: bool,
) -> Result<(Vec<Manifest>, BitmapInfo), String> {
    let chain = history.chain()?;
    if let Some((_, why)) = inputs.unsound.iter().find(|(d, _)| *d == history.dir) {
        return Err(why.clone());
    }
    if let Some(reason) = &inputs.no_inc {
        return Err(reason.clone());
    }
    let point = if diff { chain.first() } else { chain.last() };
    let Some(point) = point else { return Err("the chain is empty".into()) };
    let info = point.bitmap.as_ref();
    let Some(info) = info else { return Err(format!("{} names no bitmap", point.image)) };
    check_same_disk(point, disk)?;
    check_bitmap(info, disk)?;
    let base = if diff { vec![(*point).clone()] } else { chain.into_iter().cloned().collect() };
    Ok((base, info.clone()))
}

fn check_same_disk(point: &Manifest, disk: &SeenDisk) -> Result<(), String> {
    if disk.size < point.virtual_size {
        return Err(format!(
            "the disk was {} bytes at {} and has {} now",
            point.virtual_size, point.image, disk.size
        ));
    }
    if point.disk.format != disk.identity.format {
        return Err(format!(
            "the disk was {} and is {} now",
            point.disk.format, disk.identity.format
        ));
    }
    if disk.size != point.virtual_size && disk.identity.format != "qcow2" {
        return Err("the disk grew, and what a grown raw disk holds is not known".into());
    }
    Ok(())
}

fn check_bitmap(info: &BitmapInfo, disk: &SeenDisk) -> Result<(), String> {
    let Some(b) = disk.bitmap(&info.name) else {
        return Err(format!("bitmap {} is not on the disk", info.name));
    };
    if b.inconsistent {
        return Err(format!("bitmap {} is inconsistent: QEMU did not end cleanly", info.name));
    }
    if !b.recording {
        return Err(format!("bitmap {} does not record", info.name));
    }
    if b.busy {
        return Err(format!("bitmap {} is in use by a job or an export", info.name));
    }
    if b.granularity != info.granularity {
        return Err(format!("bitmap {} has another granularity than it had", info.name));
    }
    if info.persistent && !b.persistent {
        return Err(format!("bitmap {} is not the persistent one that it was", info.name));
    }
    Ok(())
}

fn choose_bitmaps(options: &Options, inputs: &Inputs<'_>, history: &History, plan: &mut DiskPlan) {
    let records = matches!(plan.level, Level::Full | Level::Inc) && !plan.disk.pflash;
    if records {
        plan.new_bitmap = Some(BitmapInfo {
            name: names::bitmap(inputs.target_id, &plan.chain, inputs.run, plan.index),
            node: plan.disk.node.clone(),
            granularity: plan
                .since
                .as_ref()
                .map_or_else(|| granularity(&plan.disk), |b| b.granularity),
            persistent: plan.disk.persistent,
        });
    }
    let full =
        match plan.level {
            Level::Full => plan.new_bitmap.clone(),
            _ => plan.base.first().and_then(|m| m.bitmap.clone()).filter(|b| {
                plan.disk.bitmap(&b.name).is_some_and(|b| !b.inconsistent && b.recording)
            }),
        };
    plan.diff_bitmap = full.filter(|_| !options.no_diff);
    plan.obsolete = obsolete(inputs, history, plan);
}

/// QEMU's own default: the cluster size, within 4 KiB and 64 KiB.
fn granularity(disk: &SeenDisk) -> u64 {
    disk.cluster_size.clamp(4096, 65536)
}

/// Bitmaps that nothing needs once the new point is there: all of this target that neither the
/// new point nor the chain's tip or FULL names.
fn obsolete(inputs: &Inputs<'_>, history: &History, plan: &DiskPlan) -> Vec<String> {
    if plan.level == Level::Copy {
        return Vec::new();
    }
    let mut keep: Vec<&str> = Vec::new();
    keep.extend(plan.new_bitmap.iter().map(|b| b.name.as_str()));
    keep.extend(plan.diff_bitmap.iter().map(|b| b.name.as_str()));
    // A DIFF advances nothing: what the chain needs stays.
    if plan.level == Level::Diff {
        keep.extend(needed(history));
    }
    let ours = |name: &str| names::parse_bitmap(name).is_some_and(|b| b.target == inputs.target_id);
    let named = plan.disk.bitmaps.iter().filter_map(|b| b.name.as_deref());
    named.filter(|n| ours(n) && !keep.contains(n)).map(str::to_string).collect()
}

/// The bitmaps that the tip of the folder's chain needs.
pub fn needed(history: &History) -> Vec<&str> {
    let tip = history.entries.iter().rev().find(|e| matches!(e.level, Level::Full | Level::Inc));
    let tip = tip.and_then(|e| e.manifest.as_ref());
    let bitmaps = tip.map(|m| [m.bitmap.as_ref(), m.diff_bitmap.as_ref()]);
    bitmaps.into_iter().flatten().flatten().map(|b| b.name.as_str()).collect()
}

/// Two images of one run in one folder (`--no-subdir`) have names of their own already; this is
/// the last guard.
fn separate_images(disks: &mut [DiskPlan]) {
    let mut used: Vec<(PathBuf, String)> = Vec::new();
    for d in disks {
        while used.contains(&(d.dir.clone(), d.image.clone())) {
            d.image.push_str("-2");
        }
        used.push((d.dir.clone(), d.image.clone()));
    }
}

/// A plan as `--dry-run --json` prints it.
#[derive(Debug, Serialize)]
pub struct Printed {
    /// The disk.
    pub disk: String,
    /// Its file.
    pub file: String,
    /// The level.
    pub level: String,
    /// Where the image would be.
    pub image: PathBuf,
    /// The point it would lie on.
    pub parent: Option<String>,
    /// Bytes to copy.
    pub estimate: u64,
    /// Why a FULL.
    pub why: Option<String>,
    /// The bitmap that says what changed.
    pub since: Option<String>,
    /// The bitmap that would be added.
    pub adds: Option<String>,
    /// Bitmaps that would be removed.
    pub removes: Vec<String>,
}

impl From<&DiskPlan> for Printed {
    fn from(d: &DiskPlan) -> Self {
        Printed {
            disk: d.disk.label().to_string(),
            file: d.disk.identity.file.clone(),
            level: names::level_word(d.level).to_string(),
            image: d.dir.join(&d.image),
            parent: d.parent().map(|m| m.image.clone()),
            estimate: d.estimate(),
            why: d.demoted.clone(),
            since: d.since.as_ref().map(|b| b.name.clone()),
            adds: d.new_bitmap.as_ref().map(|b| b.name.clone()),
            removes: d.obsolete.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::seen::Insertion;
    use crate::backup::{CopyOptions, Layout, MomentOptions, StopWish};
    use crate::chain::manifest::{self, fingerprint, tests::example};
    use crate::qmp::Address;
    use crate::qmp::types::Bitmap;
    use std::time::Duration;

    const TARGET: &str = "0a1b2c3d";
    const FIRST: &str = "000000000001";

    fn options(target: &Path, level: LevelWish) -> Options {
        Options {
            qmp: Address::Unix("/q".into()),
            agent: None,
            target: target.into(),
            level,
            include: Vec::new(),
            exclude: Vec::new(),
            layout: Layout::default(),
            moment: MomentOptions {
                stop: StopWish::Moment,
                quiesce: false,
                mountpoints: Vec::new(),
                deadline: Duration::from_secs(1),
                agent_timeout: Duration::from_secs(1),
            },
            copy: CopyOptions {
                fleece_dir: None,
                cbw_timeout: 20,
                speed: 0,
                compress: None,
                workers: None,
                aio: None,
                direct: false,
                remove_delay: Duration::ZERO,
                no_space_check: false,
            },
            no_diff: false,
            no_hash: false,
            strict: false,
            allow_plaintext: false,
            config: Vec::new(),
            state_dir: "/s".into(),
            dry_run: false,
            nbd: None,
        }
    }

    fn bitmap(run: &str) -> String {
        names::bitmap(TARGET, FIRST, run, 0)
    }

    fn recording(name: String) -> Bitmap {
        Bitmap {
            name: Some(name),
            recording: true,
            persistent: true,
            granularity: 65536,
            ..Default::default()
        }
    }

    fn disk(file: &str, bitmaps: Vec<Bitmap>) -> SeenDisk {
        SeenDisk {
            identity: DiskIdentity {
                qdev: "/m/v0".into(),
                node: "n".into(),
                file: file.into(),
                format: "qcow2".into(),
                ..Default::default()
            },
            node: "n".into(),
            top: "n".into(),
            insertion: Insertion::Device("/m/v0".into()),
            size: 1 << 20,
            cluster_size: 65536,
            extended_l2: false,
            lazy_refcounts: false,
            persistent: true,
            encrypted: false,
            pflash: false,
            bitmaps,
            allocated: 4096,
            info: Value::Null,
        }
    }

    fn put(dir: &Path, image: &str, level: Level, parent: Option<&str>, run: &str) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(image), image).unwrap();
        let mut m = example(image, level, parent);
        m.run = run.into();
        m.disk = disk("/vm/d", Vec::new()).identity;
        m.file_size = image.len() as u64;
        m.fingerprint = Some(fingerprint(&dir.join(image)).unwrap());
        let info = |r: &str| BitmapInfo {
            name: bitmap(r),
            node: "n".into(),
            granularity: 65536,
            persistent: true,
        };
        m.bitmap = Some(info(run));
        m.diff_bitmap = Some(info(FIRST));
        manifest::write(dir, &m).unwrap();
    }

    /// A FULL and an INC of `/vm/d` in a target.
    fn chain() -> tempfile::TempDir {
        let t = tempfile::tempdir().unwrap();
        let d = t.path().join("d");
        put(&d, "FULL-1-d", Level::Full, None, FIRST);
        put(&d, "INC-2-d", Level::Inc, Some("FULL-1-d"), "000000000002");
        t
    }

    fn both() -> Vec<Bitmap> {
        vec![recording(bitmap(FIRST)), recording(bitmap("000000000002"))]
    }

    fn plan(t: &Path, level: LevelWish, disks: Vec<SeenDisk>, now: i64) -> Plan {
        let inputs = Inputs {
            seen: Seen { disks, ..Default::default() },
            run: "00000000000f",
            target_id: TARGET,
            base: t,
            now,
            vm: None,
            no_inc: None,
            unsound: &[],
        };
        make(&options(t, level), inputs).unwrap()
    }

    fn auto(t: &Path, d: SeenDisk) -> DiskPlan {
        plan(t, LevelWish::Auto(None), vec![d], 100).disks.remove(0)
    }

    #[test]
    fn an_inc_lies_on_the_tip_and_lets_go_of_the_tips_bitmap_only() {
        let t = chain();
        let stray = names::bitmap(TARGET, FIRST, "0000000000aa", 0);
        let other = names::bitmap("ffffffff", FIRST, FIRST, 0);
        let mut bitmaps = both();
        bitmaps.extend([recording(stray.clone()), recording(other), recording("x".into())]);
        let p = auto(t.path(), disk("/vm/d", bitmaps));
        assert_eq!((p.level, p.image.as_str()), (Level::Inc, "INC-100-d"));
        assert_eq!(p.parent().unwrap().image, "INC-2-d");
        assert_eq!(p.since.unwrap().name, bitmap("000000000002"));
        assert_eq!(p.diff_bitmap.unwrap().name, bitmap(FIRST));
        assert_eq!(p.obsolete, [bitmap("000000000002"), stray]);
        assert_eq!(p.chain, FIRST);
    }

    #[test]
    fn a_diff_lies_on_the_full_and_changes_nothing() {
        let t = chain();
        let p = plan(t.path(), LevelWish::Diff, vec![disk("/vm/d", both())], 100).disks.remove(0);
        assert_eq!(p.parent().unwrap().image, "FULL-1-d");
        assert_eq!(p.since.unwrap().name, bitmap(FIRST));
        assert!(p.new_bitmap.is_none() && p.obsolete.is_empty());
    }

    #[test]
    fn names_are_later_than_all_that_is_there() {
        let t = chain();
        let p = plan(t.path(), LevelWish::Full, vec![disk("/vm/d", both())], 1).disks.remove(0);
        assert_eq!(p.image, "FULL-3-d");
        assert_eq!(p.obsolete.len(), 2);
    }

    #[test]
    fn whatever_cannot_be_proved_is_a_full() {
        type Change = fn(&mut SeenDisk);
        let cases: [(&str, Change); 8] = [
            ("is not on the disk", |d| drop(d.bitmaps.pop())),
            ("inconsistent", |d| d.bitmaps[1].inconsistent = true),
            ("does not record", |d| d.bitmaps[1].recording = false),
            ("in use", |d| d.bitmaps[1].busy = true),
            ("granularity", |d| d.bitmaps[1].granularity = 4096),
            ("persistent", |d| d.bitmaps[1].persistent = false),
            ("bytes at", |d| d.size = 65536),
            ("is raw now", |d| d.identity.format = "raw".into()),
        ];
        for (why, change) in cases {
            let t = chain();
            let mut d = disk("/vm/d", both());
            change(&mut d);
            let p = auto(t.path(), d.clone());
            assert_eq!(p.level, Level::Full, "{why}");
            assert!(p.demoted.unwrap().contains(why), "{why}");
            let mut p = plan(t.path(), LevelWish::Inc, vec![d], 100);
            assert_eq!(p.refused.remove(0).1.kind(), Kind::Incomplete, "{why}");
        }
    }

    #[test]
    fn disks_of_one_name_keep_their_folders() {
        let t = chain();
        // The stranger comes first and must not take the folder.
        let list = vec![disk("/other/d", Vec::new()), disk("/vm/d", both())];
        let p = plan(t.path(), LevelWish::Auto(None), list, 100);
        assert_eq!(p.disks[0].dir, t.path().join("d-2"));
        assert_eq!((p.disks[1].dir.clone(), p.disks[1].level), (t.path().join("d"), Level::Inc));
        // Moved elsewhere, its bitmap proves that it is the same disk.
        let p = auto(t.path(), disk("/moved/d", both()));
        assert_eq!((p.dir.clone(), p.level), (t.path().join("d"), Level::Inc));
    }

    #[test]
    fn encrypted_disks_are_refused_and_unknown_names_are_errors() {
        let t = chain();
        let mut d = disk("/vm/d", both());
        d.encrypted = true;
        let p = plan(t.path(), LevelWish::Full, vec![d], 100);
        assert_eq!(p.refused[0].1.kind(), Kind::Encrypted);
        let mut o = options(t.path(), LevelWish::Full);
        o.include = vec!["nobody".into()];
        let inputs = Inputs {
            seen: Seen::default(),
            run: "r",
            target_id: TARGET,
            base: t.path(),
            now: 1,
            vm: None,
            no_inc: None,
            unsound: &[],
        };
        assert_eq!(make(&o, inputs).unwrap_err().kind(), Kind::NotFound);
    }

    #[test]
    fn a_full_is_due_by_number_or_by_age() {
        let t = chain();
        let due = |e, now| {
            let list = vec![disk("/vm/d", both())];
            plan(t.path(), LevelWish::Auto(Some(e)), list, now).disks[0].level
        };
        let time = example("x", Level::Full, None).time;
        assert_eq!(due(Every::Points(2), 100), Level::Full);
        assert_eq!(due(Every::Points(3), 100), Level::Inc);
        assert_eq!(due(Every::Age(Duration::from_secs(60)), time + 60), Level::Full);
        assert_eq!(due(Every::Age(Duration::from_secs(60)), time + 59), Level::Inc);
    }
}
