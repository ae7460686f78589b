//! `fleecefs completions` and `fleecefs man`: made from the same definitions as `--help`.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::{Arg, Args, Command};
use clap_complete::Shell;

use super::paths;
use crate::error::{Error, Result};
use crate::folder::{Folder, Replace};
use crate::output;

/// Print a shell completion script
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell to complete for
    shell: Shell,
}

/// Write the man pages, one per subcommand, into a folder
#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// An existing folder to write into
    #[arg(value_name = "FOLDER")]
    dir: PathBuf,
}

/// Runs `fleecefs completions` for the whole program's command line.
///
/// # Errors
/// Writing failed.
pub(super) fn completions(args: CompletionsArgs, program: &mut Command) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, program, "fleecefs", &mut text);
    let text = match args.shell {
        Shell::Bash => [text.as_slice(), include_bytes!("complete.bash")].concat(),
        Shell::Fish => [text.as_slice(), include_bytes!("complete.fish")].concat(),
        Shell::Zsh => zsh(&String::from_utf8_lossy(&text)).into_bytes(),
        _ => text,
    };
    output::print_as_is(&text)
}

/// The script for zsh, with points asked of the program wherever it would offer files for them.
fn zsh(script: &str) -> String {
    const FILES: &str = ":_files' \\";
    let (head, body) = script.split_once('\n').unwrap_or((script, ""));
    let is_point = |line: &str| {
        ["':point ", "'::point ", "':what ", "'--point="].iter().any(|a| line.starts_with(a))
    };
    let line = |line: &str| match line.strip_suffix(FILES).filter(|_| is_point(line)) {
        Some(begun) => format!("{begun}:_fleecefs_points' \\\n"),
        None => format!("{line}\n"),
    };
    let body: String = body.lines().map(line).collect();
    format!("{head}\n{}{body}", include_str!("complete.zsh"))
}

/// Runs `fleecefs man` for the whole program's command line.
///
/// # Errors
/// The folder does not exist, or cannot be written to.
pub(super) fn man(args: ManArgs, program: Command) -> Result<()> {
    let mut cmd = program.disable_help_subcommand(true);
    cmd.build();
    let failed = |e| Error::io(e, "cannot write the man pages").at_path(&args.dir);
    let dir = paths::existing_folder(&args.dir, "the folder for the man pages")?;
    let dir = Folder::open(&dir).map_err(failed)?;
    pages(with_synopsis(cmd, ""), &dir).map_err(failed)
}

/// Writes the page of a command and those of its subcommands.
fn pages(cmd: Command, dir: &Folder) -> std::io::Result<()> {
    for inner in cmd.get_subcommands().filter(|c| !c.is_hide_set()).cloned() {
        pages(inner, dir)?;
    }
    let page = clap_mangen::Man::new(cmd);
    let file = dir.temp()?;
    let mut bytes = Vec::new();
    page.render(&mut bytes)?;
    file.file().write_all(&bytes)?;
    // For everybody to read.
    file.file().set_permissions(Permissions::from_mode(0o644))?;
    file.publish(page.get_filename(), Replace::Yes)
}

/// Man pages show an option's value in their synopsis only if they are given the whole of it.
fn with_synopsis(mut cmd: Command, above: &str) -> Command {
    let name = format!("{above}{} ", cmd.get_name());
    let inner: Vec<String> = cmd.get_subcommands().map(|c| c.get_name().to_string()).collect();
    for c in &inner {
        cmd = cmd.mut_subcommand(c, |c| with_synopsis(c, &name));
    }
    let last = if inner.is_empty() { "" } else { "<subcommand>" };
    let everywhere = |a: &Arg| a.is_global_set() || a.get_id() == "help" || a.get_id() == "version";
    let shown = cmd.get_arguments().filter(|a| !a.is_hide_set() && !everywhere(a));
    let (positionals, options): (Vec<&Arg>, Vec<&Arg>) = shown.partition(|a| a.is_positional());
    let words = options.into_iter().map(synopsis).chain(positionals.iter().map(|a| a.to_string()));
    let words: Vec<String> = words.chain([last.to_string()]).collect();
    let usage = format!("{name}{}", words.join(" "));
    cmd.override_usage(usage.trim_end().to_string())
}

/// `--target <DIR>`, or `[-n|--dry-run]` where it can be omitted.
fn synopsis(option: &Arg) -> String {
    let long = option.to_string();
    let text = option.get_short().map_or(long.clone(), |s| format!("-{s}|{long}"));
    if option.is_required_set() { text } else { format!("[{text}]") }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::args::Cli;

    #[test]
    fn the_synopsis_of_a_man_page_has_the_values_of_options() {
        let dir = tempfile::tempdir().unwrap();
        man(ManArgs { dir: dir.path().into() }, Cli::command()).unwrap();
        let page = |name: &str| {
            let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
            let text = text.split(".SH SYNOPSIS").nth(1).unwrap().to_string();
            text.split(".SH").next().unwrap().replace('\\', "")
        };
        let backup = page("fleecefs-backup.1");
        for part in ["fBfleecefs backupfR", " [--qmp <SOCKET>] ", "[--rate-limit <BYTES>]"] {
            assert!(backup.contains(part), "no {part} in {backup}");
        }
        assert!(page("fleecefs-merge.1").contains("[-n|--dry-run]"));
        assert!(page("fleecefs-merge.1").contains("<FOLDER> <TARGET>"));
        assert!(page("fleecefs-info-status.1").contains("fleecefs info statusfR"));
        assert!(page("fleecefs.1").contains("<subcommand>"));
    }
}
