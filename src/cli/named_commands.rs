//! Every command that papers, help texts and messages name can be typed: it parses, and has the options that they say.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};

use super::args::Cli;
use super::habits;
use crate::text::path_text;

/// Options of other programs that papers name alone.
const OTHERS: [&str; 1] = ["--security-info"];

/// A command that a text names.
struct Named {
    /// Where.
    at: String,
    /// Its words, after the program's name.
    words: Vec<String>,
    /// Whether it is for copying as it stands; else arguments may be missing, or names stand for them.
    is_whole: bool,
}

/// The words of a command line as a shell has them, up to a comment, a pipe or the next command.
fn words(line: &str) -> Vec<String> {
    let (mut all, mut word, mut quote, mut has_word) = (Vec::new(), String::new(), None, false);
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (Some(_), c) => word.push(c),
            (None, '\'' | '"') => (quote, has_word) = (Some(c), true),
            (None, '|' | '>' | ';' | '&') => break,
            (None, '#') if word.is_empty() => break,
            (None, c) if c.is_whitespace() => {
                if has_word || !word.is_empty() {
                    all.push(std::mem::take(&mut word));
                }
                has_word = false;
            }
            (None, c) => word.push(c),
        }
    }
    if has_word || !word.is_empty() {
        all.push(word);
    }
    all
}

impl Named {
    /// The command at the begin of `text`, if there is one: `fleecefs ...`, or `verify --create` in prose.
    fn of(at: &Path, text: &str, is_whole: bool) -> Option<Named> {
        let program = Cli::command();
        let mut all = words(text);
        let first = all.first()?.clone();
        let is_command = || program.get_subcommands().any(|c| c.get_name() == first);
        match first.as_str() {
            "fleecefs" => drop(all.remove(0)),
            _ if !is_whole && all.get(1).is_some_and(|w| w.starts_with("--")) && is_command() => {}
            _ => return None,
        }
        // The name of any command; what a format string will have.
        if all.is_empty() || all.first().is_some_and(|w| w == "COMMAND") || text.contains('{') {
            return None;
        }
        let is_whole = is_whole && !all.iter().any(|w| w.contains("..."));
        all.retain(|w| !w.contains("...") && !w.starts_with('['));
        Some(Named { at: format!("{}: {text}", path_text(&at)), words: all, is_whole })
    }

    /// What is wrong with it.
    fn problem(&self) -> Option<String> {
        let args = std::iter::once("fleecefs").chain(self.words.iter().map(String::as_str));
        let args = habits::translated(args.map(Into::into).collect());
        let e = Cli::try_parse_from(args).err()?;
        // N, DIR, [RUN].
        let stands_for = |value: Option<&ContextValue>| match value {
            Some(ContextValue::String(v)) => !v.chars().any(char::is_lowercase),
            _ => false,
        };
        let is_right = match e.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
            ErrorKind::MissingRequiredArgument
            | ErrorKind::MissingSubcommand
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => !self.is_whole,
            ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
                !self.is_whole && stands_for(e.get(ContextKind::InvalidValue))
            }
            _ => false,
        };
        (!is_right).then(|| format!("{}\n{e}", self.at))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` whose names end so.
fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let (mut all, mut todo) = (Vec::new(), vec![root().join(folder)]);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => todo.push(path),
                false if path.to_str().is_some_and(|p| p.ends_with(ending)) => all.push(path),
                false => {}
            }
        }
    }
    all
}

/// The commands in lines for copying, of which one that ends in a backslash goes on in the next.
fn in_code<'a>(at: &Path, lines: impl Iterator<Item = &'a str>) -> Vec<Named> {
    let text: Vec<&str> = lines.map(str::trim).collect();
    let text = text.join("\n").replace("\\\n", " ");
    let lines: Vec<&str> = text.lines().flat_map(|l| l.split("; ")).map(str::trim).collect();
    let mut all: Vec<Named> = lines.iter().filter_map(|l| Named::of(at, l, true)).collect();
    all.extend(lines.iter().flat_map(|l| further_on(at, l)));
    all
}

/// The commands that do not begin a line: after `&&`, `sudo` or a prompt, by their whole path, or in the settings of
/// another program (`command="fleecefs ..."`).
fn further_on(at: &Path, line: &str) -> Vec<Named> {
    let program = Cli::command();
    let found = line.match_indices("fleecefs ").filter(|(i, _)| *i > 0);
    let command = |(i, _): (usize, &str)| {
        let (before, text) = line.split_at(i);
        let before = before.chars().next_back().filter(|c| " /=\"'".contains(*c))?;
        let text = if "\"'".contains(before) { text.split(before).next()? } else { text };
        // Else it is a word in a comment.
        let first = words(text).into_iter().nth(1)?;
        program.find_subcommand(&first)?;
        Named::of(at, text, false)
    };
    found.filter_map(command).collect()
}

/// The commands in a paper: in code of its own, and between backticks.
fn in_paper(path: &Path) -> Vec<Named> {
    let text = std::fs::read_to_string(path).unwrap();
    let (mut code, mut prose, mut fenced) = (Vec::new(), Vec::new(), false);
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            code.push(line);
        } else {
            prose.push(line);
        }
    }
    let mut all = in_code(path, code.into_iter());
    let prose = prose.join(" ");
    all.extend(prose.split('`').skip(1).step_by(2).filter_map(|c| Named::of(path, c, false)));
    all
}

/// The options that stand alone between backticks in a paper, without their values.
fn options_in_paper(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let prose: Vec<&str> = text.lines().filter(|l| !l.starts_with("    ")).collect();
    let prose = prose.join(" ");
    let alone = prose.split('`').skip(1).step_by(2).filter(|c| c.starts_with("--"));
    let name = |c: &str| {
        let is_of_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        c.chars().take_while(|c| is_of_name(*c)).collect::<String>()
    };
    // `--keep-...` stands for several, `--` for itself.
    alone.map(name).filter(|n| n.len() > 2 && !n.ends_with('-')).collect()
}

/// All long options of a command and of those below it, with the names that they once had.
fn options_of(command: &clap::Command, all: &mut BTreeSet<String>) {
    for arg in command.get_arguments() {
        let aliases = arg.get_all_aliases().unwrap_or_default();
        all.extend(arg.get_long().into_iter().chain(aliases).map(|n| format!("--{n}")));
    }
    command.get_subcommands().for_each(|c| options_of(c, all));
}

/// The commands in quotes in a source file, of which messages and help texts are made.
fn in_source(path: &Path) -> Vec<Named> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut joined = String::new();
    for line in text.lines() {
        let line = line.trim_start().trim_start_matches("///").trim_start();
        match line.strip_suffix('\\') {
            Some(begun) => joined.push_str(begun),
            None => joined.extend([line, " "]),
        }
    }
    // A quote after a letter is an apostrophe.
    let begins = joined
        .match_indices('\'')
        .filter(|(i, _)| joined[..*i].chars().next_back().is_some_and(|c| " (\"".contains(c)));
    let quoted = begins.filter_map(|(i, _)| Some(joined[i + 1..].split_once('\'')?.0));
    quoted.filter_map(|c| Named::of(path, c, false)).collect()
}

/// The examples below help texts: what a command does stands behind it, after two spaces.
fn in_help(command: &clap::Command) -> Vec<Named> {
    let after = command.get_after_long_help().or(command.get_after_help());
    let text = after.map(|t| t.to_string()).unwrap_or_default();
    let at = PathBuf::from(format!("{} --help", command.get_name()));
    let lines = text.lines().map(|l| l.trim().split("  ").next().unwrap_or_default());
    let mut all = in_code(&at, lines);
    all.extend(command.get_subcommands().flat_map(in_help));
    all
}

fn check(named: &[Named], at_least: usize) {
    let wrong: Vec<String> = named.iter().filter_map(Named::problem).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), named.len(), wrong.join("\n"));
    assert!(named.len() >= at_least, "only {} found", named.len());
}

#[test]
fn commands_in_papers_can_be_typed() {
    let mut papers = files("contrib", ".md");
    papers.extend(
        ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"].map(|p| root().join(p)),
    );
    check(&papers.iter().flat_map(|p| in_paper(p)).collect::<Vec<_>>(), 200);
}

#[test]
fn options_that_papers_name_are_there() {
    let mut program = Cli::command();
    program.build();
    let mut known = BTreeSet::new();
    options_of(&program, &mut known);
    // `virsh dumpxml`; `contrib/install.sh`; `contrib/demo.sh`; `qemu-img`, where its name stands before.
    known.extend(OTHERS.map(String::from));
    let papers = files("contrib", ".md").into_iter().chain([root().join("README.md")]);
    // This one has the options of the other program.
    let papers: Vec<PathBuf> = papers.filter(|p| !p.ends_with("from-qmpbackup.md")).collect();
    let named: Vec<(&PathBuf, String)> = papers
        .iter()
        .flat_map(|p| options_in_paper(p).into_iter().map(move |option| (p, option)))
        .collect();
    let wrong: Vec<_> = named.iter().filter(|(_, option)| !known.contains(option)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(named.len() >= 100, "only {} found", named.len());
}

#[test]
fn commands_in_help_and_messages_can_be_typed() {
    check(&in_help(&Cli::command()), 50);
    let sources = files("src", ".rs");
    check(&sources.iter().flat_map(|p| in_source(p)).collect::<Vec<_>>(), 60);
}

#[test]
fn units_start_commands_that_there_are() {
    let mut named = Vec::new();
    for unit in files("contrib", ".service") {
        let text = std::fs::read_to_string(&unit).unwrap().replace("\\\n", " ");
        for line in text.lines().filter_map(|l| l.strip_prefix("Exec")?.split_once('=')) {
            let command = line.1.trim_start_matches(['-', '+', '!']);
            let Some((program, rest)) = command.split_once(' ') else { continue };
            if program.ends_with("fleecefs") {
                // Variables are words of the administrator's.
                let rest = rest.replace("${", "$").replace('}', "");
                named.extend(Named::of(&unit, &format!("fleecefs {rest}"), true));
            }
        }
    }
    check(&named, 5);
}

#[test]
fn what_cannot_be_typed_is_found() {
    let problem = |text: &str, whole| Named::of(Path::new("x"), text, whole).unwrap().problem();
    for wrong in ["fleecefs lst /b", "fleecefs list --jsn /b", "fleecefs prune /b --keep-daily x"] {
        assert!(problem(wrong, true).is_some() && problem(wrong, false).is_some(), "{wrong}");
    }
    assert!(
        problem("fleecefs restore", true).is_some() && problem("verify --creat", false).is_some()
    );
    for right in ["fleecefs restore", "fleecefs prune DIR --keep-daily N ...", "verify --create"] {
        assert_eq!(problem(right, false), None);
    }
    // Wherever in a line it stands.
    for line in [
        "$ mkdir /b && fleecefs health --nagois",
        "command[x]=/usr/local/bin/fleecefs health /b --max-agee 1h",
        "restrict,command=\"fleecefs replicate --recieve=/srv\" ssh-ed25519 AAAA",
        "systemctl start x   # or: sudo fleecefs backup --every-vm",
    ] {
        let named = in_code(Path::new("x"), [line].into_iter());
        assert!(named.len() == 1 && named[0].problem().is_some(), "{line}");
    }
    assert!(in_code(Path::new("x"), ["sync   # as fleecefs does"].into_iter()).is_empty());
    assert_eq!(
        problem("fleecefs restore /b sda/latest - | cat --no-such # --nor-this", true),
        None
    );
}
