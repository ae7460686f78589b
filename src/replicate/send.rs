//! The sender: asks what is there, decides, and sends what is missing, each point's manifest last.
//!
//! The receiver is not trusted either: its answers are bounded, and it is sent what the plan of this side says and
//! nothing else. It can refuse, and lie about what it has; it cannot ask for a file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::message::{
    self, Answer, Held, LONGEST_HOLE, MOST_NAMES, Modified, Needed, Request, VERSION,
};
use super::name::{FolderPath, SmallKind, WireName};
use super::plan::{Action, Facts, Step, There, compare, plan};
use super::receive::{check_version, program_name};
use super::report::{PointReport, Pruned, Report};
use super::source::{Item, SmallFile, Source, SourceManifest, small_bytes, small_files};
use super::wire::Wire;
use crate::chain;
use crate::chain::Catalog;
use crate::error::{Error, Finding, Kind, Result};
use crate::hash;
use crate::hash::Holes;
use crate::job::Work;
use crate::manifest;
use crate::storage::{ReadAt, SourceFile};

/// Bytes that are read, hashed and sent at once: they are still in the processor's own cache then.
const BUFFER: usize = 256 << 10;
/// The least of that under a rate limit.
const LEAST_BUFFER: u64 = 4 << 10;
/// More points than a target has.
const MOST_DELETED: u64 = 1 << 32;

/// How it is done.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// Whether nothing is changed.
    pub dry_run: bool,
    /// Whether points that are older than the newest of their disk there are left out.
    pub newer: bool,
    /// Whether the receiver reads back what it wrote.
    pub verify: bool,
}

/// Why an item is not there.
enum Trouble {
    /// The item alone is to blame.
    Item(Error),
    /// The same of one that the receiver did not want to the end, and has said so.
    Refused(Error),
    /// Nothing more can be done.
    Session(Error),
}

struct Sender<'a, 'b> {
    wire: &'a Wire<'b>,
    catalog: &'a Catalog,
    items: &'a [Item],
    options: Options,
    work: &'a Work<'a>,
}

/// Replicates what was scanned to the other side. The report says what was done also where it did not come to its end.
///
/// # Errors
/// Why nothing more could be sent; points that could not be are in the report.
pub(crate) fn send(
    wire: &Wire,
    catalog: &Catalog,
    options: Options,
    work: &Work,
) -> (Report, Result<()>) {
    let Source { items, refused } = Source::of(catalog);
    let mut report = Report { dry_run: options.dry_run, ..Report::default() };
    for unfinished in unfinished(catalog) {
        log::warn!("not replicated: {unfinished}");
    }
    let sender = Sender { wire, catalog, items: &items, options, work };
    let ended = sender.all(refused, &mut report);
    (report, ended)
}

impl Sender<'_, '_> {
    /// All of it, from the first word to the last.
    fn all(&self, refused: Vec<(PathBuf, String)>, report: &mut Report) -> Result<()> {
        self.greet()?;
        let small = small_files(&self.catalog.root, self.items)?;
        self.check_ids(&small)?;
        let steps = self.plan()?;
        for (path, why) in refused {
            let path = path.strip_prefix(&self.catalog.root).map(Path::to_path_buf).unwrap_or(path);
            report.add(PointReport { path, action: Action::Left, bytes: 0, why: Some(why) });
        }
        let (ids, others): (Vec<_>, Vec<_>) =
            small.into_iter().partition(|file| file.kind == SmallKind::Id);
        // Whose points these are is known before there is one, also if this does not come to its end.
        if !self.options.dry_run {
            self.small_files(&ids)?;
        }
        self.run(steps, report)?;
        if !self.options.dry_run {
            self.small_files(&others)?;
        }
        match self.ask(&Request::Bye)? {
            Answer::Ended { deleted: 0, freed: 0 } => {}
            Answer::Ended { deleted, freed } if self.may_have_deleted(deleted, freed) => {
                report.pruned = Some(Pruned { points: deleted, bytes: freed })
            }
            _ => return Err(message::nonsense()),
        }
        Ok(())
    }

    /// Whether a target can have deleted so much. Its rules of retention may be its own, so that it is not known here
    /// if there are any; but a dry run deletes nothing, and no target has so many points and bytes as a lie may claim.
    fn may_have_deleted(&self, points: u64, bytes: u64) -> bool {
        !self.options.dry_run && (1..=MOST_DELETED).contains(&points) && bytes <= i64::MAX as u64
    }

    /// The receiver's answer to a request.
    fn ask(&self, request: &Request) -> Result<Answer> {
        self.wire.send(request)?;
        self.answer()
    }

    fn answer(&self) -> Result<Answer> {
        let answer = self.wire.receive::<Answer>()?;
        // There are no more answers than this side asks for.
        self.wire.patience().renew();
        self.meant(answer)
    }

    /// The answer, or the error that it says. Where the user wants an end, that is the reason for whatever failed: the
    /// receiver may be in this process, and have seen it first.
    fn meant(&self, answer: Answer) -> Result<Answer> {
        answer.checked().or_else(|e| self.work.check().and(Err(e)))
    }

    fn done(&self) -> Result<()> {
        match self.answer()? {
            Answer::Done => Ok(()),
            _ => Err(message::nonsense()),
        }
    }

    fn greet(&self) -> Result<()> {
        let (program, dry_run) = (program_name(), self.options.dry_run);
        match self.ask(&Request::Hello { version: VERSION, program, dry_run })? {
            Answer::Hello { version, program } => check_version(version, &program),
            _ => Err(message::nonsense()),
        }
    }

    /// Fails if a folder there is of another backup directory: before anything is mixed up.
    fn check_ids(&self, small: &[SmallFile]) -> Result<()> {
        for file in small.iter().filter(|f| f.kind == SmallKind::Id) {
            let bytes = match small_bytes(&self.catalog.root, file) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(e) if file.kind != SmallKind::Id => {
                    log::warn!("{}", e.report());
                    continue;
                }
                Err(e) => return Err(e),
            };
            let id = String::from_utf8_lossy(&bytes).into_owned();
            self.wire.send(&Request::CheckId { folder: file.folder.clone(), id })?;
            self.done()?;
        }
        Ok(())
    }

    /// What the receiver has under names of a folder.
    fn held(
        &self,
        folder: &FolderPath,
        names: &[WireName],
        look: bool,
    ) -> Result<Vec<Option<Held>>> {
        let mut all = Vec::new();
        for names in names.chunks(MOST_NAMES) {
            let ask = Request::Ask { folder: folder.clone(), names: names.to_vec(), look };
            match self.ask(&ask)? {
                Answer::Held { files } if files.len() == names.len() => all.extend(files),
                _ => return Err(message::nonsense()),
            }
        }
        Ok(all)
    }

    /// Asks about all items, folder by folder, and decides.
    fn plan(&self) -> Result<Vec<Step>> {
        let mut there = vec![There::Absent; self.items.len()];
        let mut open = Vec::new();
        for (folder, of) in self.by_folder(0..self.items.len()) {
            let names: Vec<WireName> = of.iter().map(|i| self.items[*i].name.clone()).collect();
            for (i, held) in of.into_iter().zip(self.held(&folder, &names, false)?) {
                let item = &self.items[i];
                let Some(held) = held else { continue };
                match compare(&held, item.size(), item.blake3(), None) {
                    // What cannot be read here cannot be compared.
                    _ if item.file.is_none() => {}
                    Some(known) => there[i] = known,
                    None => open.push(i),
                }
            }
        }
        self.look_into(open, &mut there)?;
        let twin = self.twins(&there)?;
        let facts: Vec<Facts> = (self.items.iter().enumerate())
            .map(|(i, item)| Facts {
                disk: item.at.0,
                time: item.time,
                needs: item.needs.clone(),
                blocked: item.blocked.clone(),
                has_manifest: !matches!(item.manifest, SourceManifest::Absent),
                there: there[i],
                has_twin: twin[i],
            })
            .collect();
        Ok(plan(&facts, self.options.newer))
    }

    fn by_folder(
        &self,
        items: impl IntoIterator<Item = usize>,
    ) -> BTreeMap<FolderPath, Vec<usize>> {
        let mut folders: BTreeMap<FolderPath, Vec<usize>> = BTreeMap::new();
        for i in items {
            folders.entry(self.items[i].folder.clone()).or_default().push(i);
        }
        folders
    }

    /// Compares files of which manifests do not tell enough, by their fingerprints.
    fn look_into(&self, open: Vec<usize>, there: &mut [There]) -> Result<()> {
        for (folder, of) in self.by_folder(open) {
            let names: Vec<WireName> = of.iter().map(|i| self.items[*i].name.clone()).collect();
            for (i, held) in of.into_iter().zip(self.held(&folder, &names, true)?) {
                let item = &self.items[i];
                // One that cannot be read is found out when it is to be sent.
                let own = self.wire.busy(|| item.fingerprint()).ok();
                let Some(held) = held else { continue };
                let known = compare(&held, item.size(), item.blake3(), own.as_deref());
                let known = known.unwrap_or(There::Other);
                there[i] = if self.is_proved(item, &held, known)? { known } else { There::Other };
            }
        }
        Ok(())
    }

    /// Whether an image that has no hash here is the one that is there: a fingerprint has its length and its ends alone,
    /// and what was written into it in place may be between them. Where its time is another all of it is read.
    fn is_proved(&self, item: &Item, held: &Held, known: There) -> Result<bool> {
        let Some(file) = item.file.as_ref() else { return Ok(true) };
        let is_open = matches!(known, There::Same | There::Bare) && item.blake3().is_none();
        if !is_open || held.modified.is_some_and(|theirs| modified(file).is(theirs)) {
            return Ok(true);
        }
        // Nothing there tells more.
        let Some(theirs) = held.blake3.as_deref() else { return Ok(false) };
        let whole = || hash::whole_with(file, 1, &(), &|| self.work.check());
        match self.wire.busy(whole) {
            Ok(own) => Ok(own == theirs),
            Err(e) if e.kind() == Kind::Interrupted => Err(e),
            Err(_) => Ok(false),
        }
    }

    /// Which items that are missing have an image of the same disk and time there.
    fn twins(&self, there: &[There]) -> Result<Vec<bool>> {
        let mut found = vec![false; self.items.len()];
        let missing = |i: &usize| there[*i] == There::Absent && !self.items[*i].twins.is_empty();
        for (folder, of) in self.by_folder((0..self.items.len()).filter(missing)) {
            let names: Vec<WireName> =
                of.iter().flat_map(|i| self.items[*i].twins.iter().cloned()).collect();
            let owners = of.iter().flat_map(|i| self.items[*i].twins.iter().map(|_| *i));
            for (i, held) in owners.zip(self.held(&folder, &names, false)?) {
                found[i] |= held.is_some_and(|h| h.is_file);
            }
        }
        Ok(found)
    }

    /// Does what was planned. Where it ends before, the rest is in the report as what could not be sent.
    fn run(&self, mut steps: Vec<Step>, report: &mut Report) -> Result<()> {
        let sent = |s: &Step| s.action == Action::Sent;
        let of = self.items.iter().zip(&steps).filter(|(_, s)| sent(s));
        let total = of.map(|(item, _)| item.size()).sum();
        let start = Instant::now();
        self.work.progress.begin("replicating", total);
        let mut ended = Ok(());
        for (i, item) in self.items.iter().enumerate() {
            let is_over = ended.is_err();
            if !self.options.dry_run && !is_over {
                ended = self.step(i, &mut steps);
            }
            if let Err(e) = &ended
                && matches!(steps[i].action, Action::Sent | Action::Recorded)
            {
                let why = if is_over { "the run ended before".to_string() } else { e.report() };
                steps[i] = Step { action: Action::Left, why: Some(why) };
            }
            let Step { action, why } = steps[i].clone();
            let bytes = if action == Action::Sent { item.size() } else { 0 };
            report.add(PointReport { path: item.path(), action, bytes, why });
        }
        self.work.progress.end(start.elapsed());
        ended
    }

    /// Does one step; what fails of one point alone is put down in the plan.
    fn step(&self, i: usize, steps: &mut [Step]) -> Result<()> {
        let item = &self.items[i];
        if !matches!(steps[i].action, Action::Sent | Action::Recorded) {
            return Ok(());
        }
        let lost = |n: &usize| steps[*n].action == Action::Left;
        let done = match item.needs.iter().find(|n| lost(n)) {
            Some(n) => {
                let name = crate::text::path_text(self.items[*n].name.as_os_str());
                let what = format!("it depends on {name}, which could not be sent");
                Err(Trouble::Item(Error::new(Kind::Incomplete, what)))
            }
            None if steps[i].action == Action::Sent => self.image(item),
            None => self.record(item),
        };
        match done {
            Ok(()) => Ok(()),
            Err(Trouble::Session(e)) => Err(e),
            Err(Trouble::Item(e) | Trouble::Refused(e)) => {
                steps[i] = Step { action: Action::Left, why: Some(e.report()) };
                Ok(())
            }
        }
    }

    /// Sends an image, and makes it a point there.
    fn image(&self, item: &Item) -> std::result::Result<(), Trouble> {
        let file = item.file().map_err(Trouble::Item)?;
        let begin = Request::Image {
            folder: item.folder.clone(),
            name: item.name.clone(),
            size: item.size(),
            modified: modified(file),
            verify: self.options.verify,
        };
        self.wire.send(&begin).map_err(Trouble::Session)?;
        let hash = match self.bytes(file).and_then(|hash| checked(item, hash)) {
            Ok(hash) => hash,
            Err(Trouble::Item(e)) => {
                // The receiver drops it, and has said one word about it in any case.
                self.wire.send(&Request::Part { blake3: None }).map_err(Trouble::Session)?;
                self.wire.receive::<Answer>().map_err(Trouble::Session)?;
                self.wire.patience().renew();
                return Err(Trouble::Item(e));
            }
            Err(e) => return Err(e),
        };
        self.wire.send(&Request::Part { blake3: Some(hash.clone()) }).map_err(Trouble::Session)?;
        // It is written out, and perhaps read back.
        self.wire.patience().allow(1, item.size());
        self.done().map_err(from_receiver)?;
        self.kept_files(item)?;
        let manifest = self.manifest(item, &hash).map_err(Trouble::Item)?;
        let needs = self.needs(item).map_err(Trouble::Item)?;
        let commit = Request::Commit { manifest: manifest.is_some(), needs };
        self.wire.send(&commit).map_err(Trouble::Session)?;
        if let Some(manifest) = manifest {
            self.whole(manifest).map_err(Trouble::Session)?;
        }
        self.done().map_err(from_receiver)
    }

    /// Sends the manifest of an image that is there without.
    fn record(&self, item: &Item) -> std::result::Result<(), Trouble> {
        let file = item.file().map_err(Trouble::Item)?;
        let hash = match item.blake3() {
            Some(hash) => hash.to_string(),
            None => {
                let whole = || hash::whole_with(file, 1, &(), &|| self.work.check());
                self.wire.busy(whole).map_err(from_source)?
            }
        };
        self.kept_files(item)?;
        let manifest = self.manifest(item, &hash).map_err(Trouble::Item)?;
        let needs = self.needs(item).map_err(Trouble::Item)?;
        let (folder, name) = (item.folder.clone(), item.name.clone());
        let adopt = Request::Adopt { folder, name, blake3: hash, needs };
        self.wire.send(&adopt).map_err(Trouble::Session)?;
        self.wire.patience().allow(1, item.size());
        self.whole(manifest.unwrap_or_default()).map_err(Trouble::Session)?;
        self.done().map_err(from_receiver)
    }

    fn whole(&self, bytes: Vec<u8>) -> Result<()> {
        self.wire.send_frame(message::Frame::Whole(bytes))
    }

    /// Sends all bytes of a file, holes as holes, and gives their hash.
    fn bytes(&self, file: &SourceFile) -> std::result::Result<String, Trouble> {
        let (holes, mut hasher, mut at) = (Holes::of(file), blake3::Hasher::new(), 0);
        let mut buf = vec![0; self.buffer()];
        while at < file.len() {
            if let Some(frame) = self.wire.waiting().map_err(Trouble::Session)? {
                // It was refused: this is its one answer.
                let answer = message::parse::<Answer>(frame).and_then(|a| self.meant(a));
                return Err(self.refused(answer));
            }
            let (is_hole, end) = holes.stretch(at, file.len());
            let len = end.saturating_sub(at);
            if is_hole {
                let len = len.min(LONGEST_HOLE);
                hash::zeros(&mut hasher, len);
                self.wire.send_frame(message::Frame::Hole(len)).map_err(Trouble::Session)?;
                self.wire.patience().passed(len);
                self.work.progress.advance(len);
                self.work.check().map_err(Trouble::Session)?;
                at += len;
                continue;
            }
            let n = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
            file.read_exact_at(&mut buf[..n], at).map_err(Trouble::Item)?;
            hasher.update(&buf[..n]);
            self.wire.send_data(&buf[..n]).map_err(Trouble::Session)?;
            self.wire.patience().moved(n as u64);
            self.work.did(n as u64).map_err(Trouble::Session)?;
            at += n as u64;
        }
        file.check_unchanged().map_err(Trouble::Item)?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// What is made of the answer to an image that is still being sent.
    fn refused(&self, answer: Result<Answer>) -> Trouble {
        let end = self.wire.send(&Request::Part { blake3: None });
        match (end, answer) {
            (Err(e), _) => Trouble::Session(e),
            (Ok(()), Ok(_)) => Trouble::Session(message::nonsense()),
            (Ok(()), Err(e)) => match from_receiver(e) {
                // Its answer was read: nothing is waited for.
                Trouble::Item(e) => Trouble::Refused(e),
                trouble => trouble,
            },
        }
    }

    /// Under a rate limit no more at once than passes in a second: the other side hears of us all the time.
    fn buffer(&self) -> usize {
        let rate = self.work.rate.as_ref().map_or(BUFFER as u64, |r| r.per_second());
        usize::try_from(rate.clamp(LEAST_BUFFER, BUFFER as u64)).unwrap_or(BUFFER)
    }

    /// Sends the files that were kept with a point.
    fn kept_files(&self, item: &Item) -> std::result::Result<(), Trouble> {
        let SourceManifest::Beside(_, _, kept) = &item.manifest else { return Ok(()) };
        for file in kept {
            let below = Path::new(&file.stored).strip_prefix(manifest::FOLDER).ok();
            let Some(name) = below.and_then(|name| WireName::of(name.as_os_str()).ok()) else {
                continue;
            };
            let small = SmallFile { folder: item.folder.clone(), name, kind: SmallKind::Kept };
            // A point whose kept file is gone is a point.
            let bytes = small_bytes(&self.catalog.root, &small).map_err(Trouble::Item)?;
            let Some(bytes) = bytes.filter(|_| SmallKind::Kept.has(small.name.as_os_str())) else {
                continue;
            };
            self.small(&small, bytes).map_err(from_receiver)?;
        }
        Ok(())
    }

    /// The text of an item's manifest.
    fn manifest(&self, item: &Item, blake3: &str) -> Result<Option<Vec<u8>>> {
        match &item.manifest {
            SourceManifest::Absent => Ok(None),
            SourceManifest::Beside(..) => item.manifest_text(),
            SourceManifest::Made => {
                let disk = &self.catalog.disks[item.at.0];
                let Some(mut m) = chain::describe(disk, item.at.1) else { return Ok(None) };
                m.blake3 = Some(blake3.to_string());
                m.fingerprint = Some(item.fingerprint()?);
                manifest::sealed_text(&m).map(Some)
            }
        }
    }

    /// What an item builds on, as it was when it was read; last of all it is made sure that nothing has changed.
    fn needs(&self, item: &Item) -> Result<Vec<Needed>> {
        let mut needs = Vec::new();
        for below in item.needs.iter().map(|n| &self.items[*n]) {
            let fingerprint = below.fingerprint()?;
            let (folder, name) = (below.folder.clone(), below.name.clone());
            needs.push(Needed { folder, name, fingerprint });
        }
        for below in item.needs.iter().map(|n| &self.items[*n]) {
            below.check_unchanged()?;
        }
        item.check_unchanged()?;
        Ok(needs)
    }

    fn small(&self, file: &SmallFile, bytes: Vec<u8>) -> Result<()> {
        let (folder, kind, name) = (file.folder.clone(), file.kind, file.name.clone());
        self.wire.send(&Request::Small { folder, kind, name })?;
        self.whole(bytes)?;
        self.done()
    }

    /// Sends ids, descriptions of disks and links. What the receiver refuses of them costs no point.
    fn small_files(&self, files: &[SmallFile]) -> Result<()> {
        for file in files {
            let Some(bytes) = small_bytes(&self.catalog.root, file)? else { continue };
            match self.small(file, bytes).map_err(from_receiver) {
                Ok(()) => {}
                Err(Trouble::Item(e) | Trouble::Refused(e)) if file.kind != SmallKind::Id => {
                    log::warn!("{}", e.report());
                }
                Err(Trouble::Item(e) | Trouble::Refused(e) | Trouble::Session(e)) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What the scan found of images that are announced and have no manifest yet: they are no points, and in no report.
pub(super) fn unfinished(catalog: &Catalog) -> impl Iterator<Item = &Finding> {
    catalog.findings.iter().filter(|f| f.message == chain::scan::AT_ITS_END)
}

/// The hash, if the manifest has no other.
fn checked(item: &Item, hash: String) -> std::result::Result<String, Trouble> {
    match item.blake3().is_none_or(|own| own == hash) {
        true => Ok(hash),
        false => {
            let what = "the image is damaged: its hash is not that in its manifest";
            let error = Error::new(Kind::Corrupt, what);
            Err(Trouble::Item(error.remedy("restore it from another copy of the backup")))
        }
    }
}

/// An error in reading the source is about one file, unless the user wants an end.
fn from_source(e: Error) -> Trouble {
    match e.kind() {
        Kind::Interrupted => Trouble::Session(e),
        _ => Trouble::Item(e),
    }
}

/// What the receiver says is about one file, or about all that could follow.
fn from_receiver(e: Error) -> Trouble {
    match e.kind() {
        Kind::Exists
        | Kind::NotFound
        | Kind::Incomplete
        | Kind::Corrupt
        | Kind::Changed
        | Kind::Unsupported => Trouble::Item(e),
        _ => Trouble::Session(e),
    }
}

fn modified(file: &SourceFile) -> Modified {
    let nanos = u128::try_from(file.identity().mtime).unwrap_or(0);
    let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    Modified { seconds: time.as_secs(), nanos: time.subsec_nanos() }
}
