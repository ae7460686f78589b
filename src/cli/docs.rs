//! `fleecefs completions` and `fleecefs man`: made from the same definitions as `--help`.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::{Arg, Args, Command};
use clap_complete::Shell;

use super::complete::wanted;
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
        Shell::Fish => [text, fish(program).into_bytes()].concat(),
        Shell::Zsh => zsh(&String::from_utf8_lossy(&text), program).into_bytes(),
        _ => text,
    };
    output::print_as_is(&text)
}

/// The arguments that the program is asked for: names of positionals, and options with their dashes.
fn completed_args(program: &Command) -> (BTreeSet<String>, BTreeSet<String>) {
    fn add(command: &Command, found: &mut (BTreeSet<String>, BTreeSet<String>)) {
        for arg in command.get_arguments().filter(|a| wanted(command, a).is_some()) {
            if arg.is_positional() {
                found.0.insert(arg.get_id().to_string());
            }
            let short = arg.get_short().map(|s| format!("-{s}"));
            let long = arg.get_long().map(|l| format!("--{l}"));
            found.1.extend(short.into_iter().chain(long));
        }
        command.get_subcommands().for_each(|c| add(c, found));
    }
    let mut found = Default::default();
    add(program, &mut found);
    found
}

/// What comes after the script for fish: it asks for values of options one by one.
fn fish(program: &Command) -> String {
    let mut text = include_str!("complete.fish").to_string();
    for option in completed_args(program).1 {
        let name = match option.strip_prefix("--") {
            Some(long) => format!("-l {long}"),
            None => option.replacen('-', "-s ", 1),
        };
        text += &format!("complete -c fleecefs {name} -r -a '(__fleecefs_points)'\n");
    }
    text
}

/// The script for zsh, with what is in a backup directory asked of the program where it would offer files for that.
fn zsh(script: &str, program: &Command) -> String {
    const OFFERS: [&str; 2] = [":_files' \\", ":_default' \\"];
    let (head, body) = script.split_once('\n').unwrap_or((script, ""));
    let (positionals, options) = completed_args(program);
    let is_asked = |line: &str| {
        let name = line.trim_start_matches(['\'', '*']);
        match name.strip_prefix(':') {
            Some(name) => {
                let name = name.trim_start_matches(':').split(' ').next().unwrap_or_default();
                positionals.contains(name)
            }
            None => options.contains(name.split(['=', '+', '[']).next().unwrap_or_default()),
        }
    };
    let line = |line: &str| match OFFERS.iter().find_map(|o| line.strip_suffix(o)) {
        Some(begun) if is_asked(line) => format!("{begun}:_fleecefs_points' \\\n"),
        _ => format!("{line}\n"),
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
