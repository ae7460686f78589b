//! Which configuration, and `fleecefs config check`, `list` and `show`.

use std::path::PathBuf;

use clap::{Args, Command, Subcommand};
use serde_json::{Value, json};

use super::shared::JsonArgs;
use super::table::{Row, Table};
use super::verbosity;
use crate::config::{self, Config, ConfigFile, Mail, Problem, Setting, Source, Vm};
use crate::error::{Error, Kind, Result};
use crate::output::{self, Line, Look};
use crate::text::{path_text, to_text};
use crate::units::{counted, human_duration};

/// The whole program's command line, whose options are the configuration's keys.
pub(super) type Program = fn() -> Command;

/// The variable that names it where no option does.
pub(super) const CONFIG_VARIABLE: &str = "FLEECEFS_CONFIG";

/// Where the configuration is.
#[derive(Debug, Args)]
pub(super) struct ConfigFileArgs {
    /// The configuration; the folder vms.d beside it belongs to it [default: /etc/fleecefs/fleecefs.toml, or
    /// fleecefs/fleecefs.toml in the user's folder for configuration]
    #[arg(long, value_name = "FILE", env = CONFIG_VARIABLE)]
    config_file: Option<PathBuf>,
}

impl ConfigFileArgs {
    /// The configuration. What was passed over is logged.
    ///
    /// # Errors
    /// As [`config::load`].
    pub(super) fn load(&self, program: Program) -> Result<Config> {
        let config = self.read(program)?;
        config.notes.iter().for_each(|note| log::info!("{note}"));
        Ok(config)
    }

    /// As [`Self::load`]; what was passed over is for the caller to tell.
    ///
    /// # Errors
    /// As [`config::load`].
    pub(super) fn read(&self, program: Program) -> Result<Config> {
        let file = match &self.config_file {
            Some(path) => ConfigFile::named(path),
            None => ConfigFile::usual()?,
        };
        config::load(&file, &program())
    }
}

/// What is asked of the configuration.
#[derive(Debug, Subcommand)]
pub(super) enum FileCommand {
    Check(CheckArgs),
    List(ListArgs),
    Show(ShowArgs),
}

/// Check the configuration: everything that is wrong, with file, line and column
///
/// Programs that it names are looked at too. The exit code is 2 if something is wrong.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    file: ConfigFileArgs,
    #[command(flatten)]
    print: JsonArgs,
}

/// Show the VMs of the configuration
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    file: ConfigFileArgs,
    #[command(flatten)]
    print: JsonArgs,
}

/// Show each value that a VM has, and where it comes from
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The VM's name in the configuration
    vm: String,
    #[command(flatten)]
    file: ConfigFileArgs,
    #[command(flatten)]
    print: JsonArgs,
}

impl FileCommand {
    /// Whether it prints JSON.
    pub(super) fn json(&self) -> bool {
        match self {
            FileCommand::Check(a) => a.print.json,
            FileCommand::List(a) => a.print.json,
            FileCommand::Show(a) => a.print.json,
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// As [`ConfigFileArgs::load`]; `Usage` if something is wrong in it.
    pub(super) fn run(&self, program: Program) -> Result<()> {
        match self {
            FileCommand::Check(a) => check(a, program),
            FileCommand::List(a) => list(a, program),
            FileCommand::Show(a) => show(a, program),
        }
    }
}

fn check(args: &CheckArgs, program: Program) -> Result<()> {
    let mut config = args.file.load(program)?;
    let programs: Vec<Problem> = config.vms.iter().flat_map(bad_programs).collect();
    config.problems.extend(config.mail.as_ref().and_then(bad_sendmail));
    config.problems.extend(programs);
    if args.print.json {
        let vms: Vec<&str> = config.vms.iter().map(|vm| vm.name.as_str()).collect();
        let problems: Vec<Value> = config.problems.iter().map(problem_json).collect();
        let all = json!({"vms": vms, "problems": problems, "notes": config.notes});
        output::print(&output::json_document(&all)?)?;
    } else {
        let lines = config.problems.iter().map(|p| Line::sentence(Look::Red, p));
        let notes = config.notes.iter().map(|n| Line::sentence(Look::Plain, format!("note: {n}")));
        let mut lines: Vec<Line> = lines.chain(notes).collect();
        if config.problems.is_empty() {
            let vms = counted(config.vms.len() as u64, "VM");
            lines.push(Line::sentence(Look::Plain, format!("the configuration is good: {vms}")));
        }
        output::print_lines(&lines)?;
    }
    match config.problems.len() {
        0 => Ok(()),
        n => Err(wrong(n)),
    }
}

/// The error for a configuration with mistakes, which were told.
pub(super) fn wrong(problems: usize) -> Error {
    let what = format!("the configuration has {}", counted(problems as u64, "mistake"));
    Error::new(Kind::Usage, what).remedy("they are above; 'fleecefs config check' shows all")
}

/// Programs that cannot be run, or that somebody else could exchange.
fn bad_programs(vm: &Vm) -> Vec<Problem> {
    let mut problems = Vec::new();
    for key in ["before", "after", "on_failure"] {
        for program in vm.commands(key).iter().filter_map(|c| c.first()) {
            if let Err(e) = config::check_program(program) {
                let message = format!("{key}: {}", e.report());
                problems.push(Problem {
                    place: vm.place_of(key),
                    message,
                    vm: Some(vm.name.clone()),
                });
            }
        }
    }
    problems
}

/// The same of the program that takes mail.
fn bad_sendmail(mail: &Mail) -> Option<Problem> {
    let e = config::check_program(&mail.sendmail).err()?;
    let message = format!("sendmail: {}", e.report());
    Some(Problem { place: mail.place.clone(), message, vm: None })
}

fn problem_json(p: &Problem) -> Value {
    json!({"file": to_text(p.place.path.as_os_str()), "line": p.place.line,
        "column": p.place.column, "message": p.message, "vm": p.vm})
}

fn list(args: &ListArgs, program: Program) -> Result<()> {
    let config = args.file.load(program)?;
    if args.print.json {
        let vms: Vec<Value> = config.vms.iter().map(|vm| vm_json(&config, vm)).collect();
        return output::print(&output::json_document(&json!({"vms": vms}))?);
    }
    let rows = config.vms.iter().map(|vm| {
        let wrong = config.problems_of(&vm.name).len();
        let (state, look) = match (vm.is_enabled(), wrong) {
            (_, n) if n > 0 => (counted(n as u64, "mistake"), Look::Red),
            (true, _) => ("enabled".to_string(), Look::Plain),
            (false, _) => ("not enabled".to_string(), Look::Plain),
        };
        let text = |t: Option<&str>| t.map_or_else(|| "-".to_string(), path_text);
        let age = vm.max_age().map_or_else(|| "-".to_string(), human_duration);
        let cells =
            vec![path_text(&vm.name), state, age, text(vm.text("target")), text(vm.text("qmp"))];
        Row::Cells(cells, look)
    });
    let titles = &["VM", "STATE", "MAX AGE", "TARGET", "QMP"];
    let table =
        Table { titles, right: &[], less: &["QMP", "MAX AGE"], indent: 0, rows: rows.collect() };
    output::print_lines(&table.lines(verbosity::is_verbose()))?;
    match config.common_problems().len() {
        0 => Ok(()),
        n => {
            tell(&config.common_problems());
            Err(wrong(n))
        }
    }
}

/// Tells what is wrong on standard error.
pub(super) fn tell(problems: &[&Problem]) {
    let mut text = String::new();
    problems.iter().for_each(|p| output::push_line(&mut text, p));
    output::tell(&text);
}

fn vm_json(config: &Config, vm: &Vm) -> Value {
    json!({"vm": vm.name, "enabled": vm.is_enabled(), "target": vm.text("target"),
        "qmp": vm.text("qmp"), "max_age": vm.max_age(),
        "problems": config.problems_of(&vm.name).len()})
}

fn show(args: &ShowArgs, program: Program) -> Result<()> {
    let config = args.file.load(program)?;
    let vm = config.vm(&args.vm)?;
    let wrong_here: Vec<&Problem> =
        config.common_problems().into_iter().chain(config.problems_of(&vm.name)).collect();
    if args.print.json {
        let values: Vec<Value> = vm.settings().iter().map(setting_json).collect();
        let all = json!({"vm": vm.name, "values": values});
        output::print(&output::json_document(&all)?)?;
    } else {
        let rows = vm.settings().iter().map(|(key, s)| {
            Row::Cells(vec![key.clone(), s.value.to_string(), s.source.to_string()], Look::Plain)
        });
        let titles = &["KEY", "VALUE", "FROM"];
        let table = Table { titles, right: &[], less: &[], indent: 0, rows: rows.collect() };
        output::print_lines(&table.lines(true))?;
    }
    if wrong_here.is_empty() {
        return Ok(());
    }
    tell(&wrong_here);
    Err(wrong(wrong_here.len()))
}

fn setting_json((key, setting): (&String, &Setting)) -> Value {
    let (kind, place) = match &setting.source {
        Source::Default => ("default", None),
        Source::File(place) => ("file", Some(place)),
        Source::Discovered(place) => ("discovered", Some(place)),
    };
    json!({"key": key, "value": setting.value.json(), "from": kind,
        "file": place.map(|p| to_text(p.path.as_os_str())), "line": place.map(|p| p.line)})
}

#[cfg(test)]
mod tests;
