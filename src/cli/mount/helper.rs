//! The command line of a mount helper, as mount(8) and mount.fuse call it.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// What the command line asks for when the program is run as a mount helper.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Helper {
    /// It is not.
    No,
    /// Continue with this command line.
    Run(Vec<OsString>),
    /// `mount -f` of mount(8): do everything but mount.
    Nothing,
}

/// Recognises `mount.fleecefs` and `mount.fuse.fleecefs` (names by which mount(8) calls us), and
/// `fleecefs /SOURCE /TARGET …`, the way mount.fuse does.
pub(crate) fn helper(args: &[OsString]) -> Helper {
    let name = args.first().and_then(|a| Path::new(a).file_name());
    let is_helper = [Some(OsStr::new("mount.fleecefs")), Some(OsStr::new("mount.fuse.fleecefs"))]
        .contains(&name);
    let by_path = args.len() >= 3 && args[1].to_string_lossy().starts_with('/');
    if !is_helper && !by_path {
        return Helper::No;
    }
    if is_helper && args.iter().skip(1).any(|a| a == "--help" || a == "-h") {
        return Helper::Run(vec!["fleecefs".into(), "mount".into(), "--help".into()]);
    }
    let mut run: Vec<OsString> = vec!["fleecefs".into(), "mount".into()];
    let mut rest = args.iter().skip(1);
    while let Some(arg) = rest.next() {
        match arg.to_string_lossy().as_ref() {
            // Of mount(8), "fake"; typed by somebody, "foreground".
            "-f" if is_helper => return Helper::Nothing,
            "-s" => run.extend(["-o".into(), "sloppy".into()]),
            "-n" | "-v" => {}
            "-N" | "-t" => drop(rest.next()),
            _ => run.push(arg.clone()),
        }
    }
    Helper::Run(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_names_and_flags() {
        let args = |list: &[&str]| list.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(helper(&args(&["fleecefs", "list", "/b"])), Helper::No);
        let want = Helper::Run(args(&["fleecefs", "mount", "/b", "/m", "-o", "rw"]));
        let by_type = ["/sbin/mount.fuse.fleecefs", "/b", "/m", "-n", "-t", "x", "-o", "rw"];
        assert_eq!(helper(&args(&by_type)), want);
        assert_eq!(helper(&args(&["fleecefs", "/b", "/m", "-o", "rw"])), want);
        assert_eq!(helper(&args(&["mount.fleecefs", "/b", "/m", "-f"])), Helper::Nothing);
        let want = Helper::Run(args(&["fleecefs", "mount", "/b", "/m", "-f"]));
        assert_eq!(helper(&args(&["fleecefs", "/b", "/m", "-f"])), want);
    }
}
