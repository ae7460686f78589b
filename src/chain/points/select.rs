//! How a user names a point, or a disk: the one rule for every subcommand.

use std::path::{Component, Path, PathBuf};

use super::nearest::{is_alike, nearest};
use crate::chain::{Catalog, Disk, NEWEST_LOST, Point};
use crate::error::{Error, Kind, Result};
use crate::text::{path_text, shown_as, to_text};

/// Help text for arguments that name a point.
pub const POINT_HELP: &str = "A point: its file name (INC-1706260646-sda.qcow2), with the disk's \
    folder before it where several disks have one of that name, with or without .raw as the mount \
    shows it; DISK/latest; or the name of its link in the mount's by-time (20240126T091726Z); what \
    'fleecefs list' shows for a name with control characters is understood, too";

/// `20240126T091726Z`: sorts by time and has no colon, which QEMU would take for a protocol.
pub fn time_name(time: i64) -> Option<String> {
    let time = jiff::Timestamp::from_second(time).ok()?;
    Some(time.strftime("%Y%m%dT%H%M%SZ").to_string())
}

impl Catalog {
    /// The disk that the user calls `name`, or that `list` shows so.
    ///
    /// # Errors
    /// `NotFound` if there is none.
    pub fn disk(&self, name: &Path) -> Result<&Disk> {
        let wanted: PathBuf = name.components().collect();
        let shown = || {
            let wanted = wanted.to_str()?;
            self.disks.iter().find(|d| shown_as(&d.path, wanted))
        };
        let is = |d: &&Disk| d.path == wanted;
        self.disks.iter().find(is).or_else(shown).ok_or_else(|| self.no_disk(name))
    }

    /// Fails for a directory without a backup, as where its file system is not mounted.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn check_any(&self) -> Result<()> {
        if !self.disks.is_empty() {
            return Ok(());
        }
        Err(Error::new(Kind::NotFound, "no backup in this directory")
            .at_path(&self.root)
            .remedy("is its file system mounted?"))
    }

    /// That there is no disk of this name.
    pub fn no_disk(&self, name: &Path) -> Error {
        if let Some(nothing) = self.nothing_here() {
            return nothing;
        }
        let text = format!("no disk '{}' in {}", path_text(&name), path_text(&self.root));
        let disks = self.disks.iter().map(|d| to_text(d.path.as_os_str()));
        let near = nearest(&to_text(name.as_os_str()), disks);
        Error::new(Kind::NotFound, text)
            .remedy(format!("{near}'fleecefs list DIR' shows what there is"))
    }

    /// Finds the disk and point that `selector` names. See [`POINT_HELP`].
    ///
    /// # Errors
    /// `NotFound` if nothing has that name, `Usage` if several points have it.
    pub fn find(&self, selector: &Path) -> Result<(&Disk, usize)> {
        let selector: PathBuf =
            selector.components().filter(|c| !matches!(c, Component::CurDir)).collect();
        let found: Vec<(&Disk, usize)> =
            self.disks.iter().flat_map(|d| d.matching(&selector).map(move |i| (d, i))).collect();
        match found.as_slice() {
            [(disk, point)] => {
                disk.warn_of_newer(&selector, *point);
                Ok((*disk, *point))
            }
            [] => self.find_otherwise(&selector),
            many => Err(several(&selector, many.iter().map(|(d, i)| d.point_path(*i)))),
        }
    }

    /// What no point has for a name: `latest` where there is one disk, and the links of `by-time`.
    fn find_otherwise(&self, selector: &Path) -> Result<(&Disk, usize)> {
        if [Path::new("latest"), Path::new("latest.raw")].contains(&selector) {
            let paths = || self.disks.iter().map(|d| d.path.join("latest"));
            return match self.disks.as_slice() {
                [_] => self.find(&self.disks[0].path.join("latest")),
                [] => Err(self.not_found(selector)),
                _ => Err(several(selector, paths())),
            };
        }
        let mut found: Vec<(&Disk, usize)> =
            self.disks.iter().filter_map(|d| Some((d, d.by_time(selector)?))).collect();
        if found.is_empty() {
            found = self.shown(selector);
        }
        if found.is_empty() {
            found = self.without_extension(selector);
        }
        match found.as_slice() {
            [one] => Ok(*one),
            [] => Err(self.not_found(selector)),
            many => Err(several(selector, many.iter().map(|(d, i)| d.point_path(*i)))),
        }
    }

    /// `sda/latest` for the one disk that is called `sda.qcow2` or the like.
    fn without_extension(&self, selector: &Path) -> Vec<(&Disk, usize)> {
        let (Some(parent), Some(point)) = (selector.parent(), selector.file_name()) else {
            return Vec::new();
        };
        let disks = self.disks.iter().filter(|d| d.stem().is_some_and(|stem| stem == parent));
        let points = |d: &Disk| -> Vec<usize> { d.matching(&d.path.join(point)).collect() };
        disks.flat_map(|d| points(d).into_iter().map(move |i| (d, i))).collect()
    }

    /// By the text that `list` shows for names which a terminal cannot show as they are.
    fn shown(&self, selector: &Path) -> Vec<(&Disk, usize)> {
        let Some(text) = selector.to_str() else { return Vec::new() };
        let texts = [text, text.strip_suffix(".raw").unwrap_or(text)];
        let is = |name: &Path| texts.iter().any(|t| shown_as(name, t));
        let of_disk = |d: &Disk| -> Vec<usize> {
            let latest = is(&d.path.join("latest")).then(|| d.latest()).flatten();
            let named = |i: &usize| is(&d.point_path(*i)) || is(Path::new(&d.points[*i].name));
            latest.map_or_else(|| (0..d.points.len()).filter(named).collect(), |i| vec![i])
        };
        self.disks.iter().flat_map(|d| of_disk(d).into_iter().map(move |i| (d, i))).collect()
    }

    /// That there is nothing at all, where that is so: a directory of which the file system is not mounted.
    pub(crate) fn nothing_here(&self) -> Option<Error> {
        let what = format!("no backup in {}", path_text(&self.root));
        self.disks.is_empty().then(|| {
            Error::new(Kind::NotFound, what)
                .remedy("is its file system mounted? 'fleecefs list DIR' shows what is there")
        })
    }

    fn not_found(&self, selector: &Path) -> Error {
        if let Some(nothing) = self.nothing_here() {
            return nothing;
        }
        let text = format!("no point '{}' in {}", path_text(&selector), path_text(&self.root));
        let wanted = path_text(selector);
        let wanted = wanted.strip_suffix(".raw").unwrap_or(&wanted);
        let near = nearest(wanted, self.names_of_points(selector).into_iter());
        Error::new(Kind::NotFound, text).remedy(format!(
            "{near}'fleecefs list DIR' shows what there is; DISK/latest is the newest point of a disk"
        ))
    }

    /// What points can be called by somebody who called one `selector`: with the disk, if that was given;
    /// points of several disks have the same names.
    pub(crate) fn names_of_points(&self, selector: &Path) -> Vec<String> {
        let with_disk = selector.components().count() > 1;
        let of_disk = |d: &Disk| -> Vec<String> {
            match with_disk {
                true => d.called().iter().flat_map(|at| d.names_below(at)).collect(),
                false => d.names_below(Path::new("")).collect(),
            }
        };
        self.disks.iter().flat_map(of_disk).collect()
    }

    /// A question that names the points of the disk that are most like `name`, which somebody wrote behind it.
    pub(crate) fn did_you_mean(&self, disk: &Disk, name: &str) -> String {
        let below = |name: &str| to_text(disk.path.join(name).as_os_str());
        // What is the same of all of them does not count.
        let names = disk.names_below(Path::new("")).filter(|n| is_alike(name, n));
        nearest(&below(name), names.map(|n| below(&n)))
    }
}

fn several(selector: &Path, paths: impl Iterator<Item = PathBuf>) -> Error {
    let names: Vec<String> = paths.map(|p| path_text(&p)).collect();
    let text = format!("'{}' names several points", path_text(&selector));
    Error::new(Kind::Usage, text).remedy(format!("name one: {}", names.join(", ")))
}

impl Disk {
    /// `sda` of a disk that is called `sda.qcow2` or the like.
    fn stem(&self) -> Option<PathBuf> {
        let extension = self.path.extension().and_then(|e| e.to_str())?;
        ["qcow2", "raw", "img"].contains(&extension).then(|| self.path.with_extension(""))
    }

    /// What users may call it.
    fn called(&self) -> Vec<PathBuf> {
        [Some(self.path.clone()), self.stem()].into_iter().flatten().collect()
    }

    /// The names of its points, and `latest`, below `at`.
    fn names_below(&self, at: &Path) -> impl Iterator<Item = String> {
        let names = self.points.iter().map(|p| p.name.as_str()).chain(["latest"]);
        names.map(|n| to_text(at.join(n).as_os_str()))
    }

    /// Where a point stands below the backup directory: disk, then point.
    pub fn point_path(&self, point: usize) -> PathBuf {
        self.path.join(&self.points[point].name)
    }

    /// The newest point that can be served.
    pub fn latest(&self) -> Option<usize> {
        self.points.iter().rposition(Point::is_served)
    }

    /// The points that can be served, the oldest first. Of each other one a warning says why.
    pub fn served_by_time(&self) -> Vec<usize> {
        let mut all = Vec::new();
        for (i, point) in self.points.iter().enumerate() {
            match &point.unavailable {
                None => all.push((point.time, i)),
                Some(why) => {
                    let name = path_text(&point.name);
                    log::warn!("skipped: {name} is not available: {}", why.message);
                }
            }
        }
        all.sort_unstable();
        all.into_iter().map(|(_, i)| i).collect()
    }

    /// The file of its newest backup, if only the manifest of that is left.
    pub fn newest_missing(&self) -> Option<&Path> {
        self.findings.iter().find(|f| f.message == NEWEST_LOST).map(|f| f.path.as_path())
    }

    /// Whoever asks for the latest wants to know that there was a later one.
    fn warn_of_newer(&self, selector: &Path, point: usize) {
        let by_name = selector
            .file_name()
            .and_then(|n| n.to_str())
            .map(|n| n.strip_suffix(".raw").unwrap_or(n) == self.points[point].name);
        let lost = self
            .points
            .iter()
            .skip(point + 1)
            .rev()
            .find_map(|p| Some((p, p.unavailable.as_ref()?)));
        if let (Some(false) | None, Some((newer, why))) = (by_name, lost) {
            let (disk, name) = (path_text(&self.path), path_text(&self.points[point].name));
            log::warn!(
                "{disk}: latest is {name}; the newer {} is not available: {}",
                path_text(&newer.name),
                why.message
            );
        } else if let (Some(false) | None, Some(lost)) = (by_name, self.newest_missing()) {
            let (disk, name) = (path_text(&self.path), path_text(&self.points[point].name));
            log::warn!("{disk}: latest is {name}; {}: {NEWEST_LOST}", path_text(&lost));
        }
    }

    /// The point that `by-time/` of a mount has under this name; points of one time are numbered.
    fn by_time(&self, selector: &Path) -> Option<usize> {
        let folder = selector.parent()?;
        let here = [self.path.as_path(), Path::new("")];
        if !here.iter().any(|f| folder == *f || folder == f.join("by-time")) {
            return None;
        }
        let name = selector.file_name()?.to_str()?;
        let name = name.strip_suffix(".raw").unwrap_or(name);
        let (stem, number) = match name.split_once('-') {
            Some((stem, n)) => (stem, n.parse::<usize>().ok().filter(|n| *n > 1)?),
            None => (name, 1),
        };
        let served = self.points.iter().enumerate().filter(|(_, p)| p.is_served());
        let of_time = served.filter(|(_, p)| time_name(p.time).is_some_and(|t| t == stem));
        of_time.map(|(i, _)| i).nth(number - 1)
    }

    fn matching<'a>(&'a self, selector: &'a Path) -> impl Iterator<Item = usize> + 'a {
        let is_latest = selector == self.path.join("latest")
            || selector == self.path.join("latest.raw")
            || selector == self.path;
        // Where none can be served, the newest says why.
        let newest = || self.points.len().checked_sub(1);
        let latest = is_latest.then(|| self.latest().or_else(newest)).flatten();
        let by_name = self.points.iter().enumerate().filter_map(move |(i, p)| {
            let raw = format!("{}.raw", p.name);
            let full = [&p.name, &raw].iter().any(|n| selector == self.path.join(n));
            let short = [&p.name, &raw].iter().any(|n| selector == Path::new(n));
            (full || short).then_some(i)
        });
        let has_name = !is_latest;
        latest.into_iter().chain(by_name.filter(move |_| has_name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Level;

    fn disk(path: &str, names: &[&str]) -> Disk {
        let point = |name: &&str| Point {
            name: name.to_string(),
            source: PathBuf::from(name),
            level: Level::Full,
            chain: names[0].to_string(),
            parent: None,
            time: 0,
            size: 0,
            own_bytes: 0,
            consistency: None,
            layers: Vec::new(),
            format_is_open: false,
            unavailable: None,
        };
        let points = names.iter().map(point).collect();
        Disk { path: PathBuf::from(path), points, findings: Vec::new() }
    }

    #[test]
    fn points_are_found_by_name_by_path_and_as_latest() {
        let disks = vec![disk("vm/sda", &["FULL-1-x", "INC-2-x"]), disk("vm/sdb", &["FULL-1-x"])];
        let c = Catalog { disks, ..Default::default() };
        let find = |s: &str| c.find(Path::new(s)).map(|(d, i)| d.point_path(i));
        assert_eq!(find("INC-2-x").unwrap(), Path::new("vm/sda/INC-2-x"));
        assert_eq!(find("./vm/sdb/FULL-1-x.raw").unwrap(), Path::new("vm/sdb/FULL-1-x"));
        assert_eq!(find("vm/sda/latest").unwrap(), Path::new("vm/sda/INC-2-x"));
        assert_eq!(find("vm/sda").unwrap(), Path::new("vm/sda/INC-2-x"));
        assert_eq!(find("FULL-1-x").unwrap_err().kind(), Kind::Usage);
        assert_eq!(find("nope").unwrap_err().kind(), Kind::NotFound);
        for (wrong, near) in [("INC-3-x", "INC-2-x"), ("vm/sda/INC-3-x.raw", "vm/sda/INC-2-x")] {
            let said = find(wrong).unwrap_err().report();
            assert!(said.contains(&format!("did you mean {near}")), "{said}");
        }
        let e = find("latest").unwrap_err();
        assert!(e.report().contains("vm/sda/latest, vm/sdb/latest"), "{}", e.report());
    }

    #[test]
    fn a_mistyped_latest_is_understood_as_one() {
        let c = Catalog { disks: vec![disk("vm/sda.qcow2", &["FULL-1-x"])], ..Default::default() };
        let said = |s: &str| c.find(Path::new(s)).unwrap_err().report();
        for (wrong, meant) in [
            ("vm/sda.qcow2/lates", "vm/sda.qcow2/latest"),
            ("vm/sda/ltaest", "vm/sda/latest"),
            ("vm/sda/FUL-1-x", "vm/sda/FULL-1-x"),
            ("lastest", "latest"),
        ] {
            assert!(said(wrong).contains(&format!("(did you mean {meant}")), "{}", said(wrong));
        }
        assert!(!said("vm/xyz/a").contains("did you mean"), "{}", said("vm/xyz/a"));
        assert_eq!(c.did_you_mean(&c.disks[0], "lates"), "did you mean vm/sda.qcow2/latest? ");
        assert_eq!(c.did_you_mean(&c.disks[0], "etc"), "");
    }

    #[test]
    fn one_disk_has_one_latest_unless_a_point_is_called_so() {
        let find = |names: &[&str], s: &str| {
            let c = Catalog { disks: vec![disk("sda", names)], ..Default::default() };
            c.find(Path::new(s)).map(|(d, i)| d.points[i].name.clone())
        };
        assert_eq!(find(&["FULL-1-x", "INC-2-x"], "latest").unwrap(), "INC-2-x");
        assert_eq!(find(&["latest.raw", "INC-2-x"], "latest.raw").unwrap(), "latest.raw");
    }

    #[test]
    fn names_in_by_time_are_points() {
        let mut a = disk("sda", &["FULL-1-x", "INC-2-x", "INC-3-x"]);
        a.points[1].time = 1_706_260_646;
        a.points[2].time = 1_706_260_646;
        let disks = vec![a, disk("sdb", &["FULL-1-x"])];
        let c = Catalog { disks, ..Default::default() };
        let find = |s: &str| c.find(Path::new(s)).map(|(d, i)| d.point_path(i));
        for name in ["sda/by-time/20240126T091726Z.raw", "by-time/20240126T091726Z"] {
            assert_eq!(find(name).unwrap(), Path::new("sda/INC-2-x"));
        }
        assert_eq!(find("20240126T091726Z-2.raw").unwrap(), Path::new("sda/INC-3-x"));
        assert_eq!(find("sdb/19700101T000000Z").unwrap(), Path::new("sdb/FULL-1-x"));
        assert_eq!(find("19700101T000000Z").unwrap_err().kind(), Kind::Usage);
        for none in ["20240126T091726Z-3", "20240126T091726Z-1", "sdb/by-time/20240126T091726Z"] {
            assert_eq!(find(none).unwrap_err().kind(), Kind::NotFound, "{none}");
        }
    }
}
