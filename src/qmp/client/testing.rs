//! Somebody who speaks QMP, and as much of a QEMU as tests of what is asked of one need: it has what it is told to
//! have, and refuses what it is told to refuse.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use crate::qmp::{Address, Client};

/// Greets as QEMU does, and answers each request by the lines that `answer` gives, until that gives `None`.
pub(crate) fn serve(mut s: UnixStream, mut answer: impl FnMut(Value) -> Option<Vec<Value>>) {
    let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
    writeln!(s, "{}", json!({"QMP": {"version": version, "capabilities": []}})).unwrap();
    for line in BufReader::new(s.try_clone().unwrap()).lines().map_while(|l| l.ok()) {
        let Some(said) = answer(serde_json::from_str(&line).unwrap()) else { return };
        // Nobody may be there any more.
        said.iter().for_each(|l| writeln!(s, "{l}").unwrap_or_default());
    }
}

pub(crate) fn listen() -> (tempfile::TempDir, UnixListener, Address) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    (dir, UnixListener::bind(&path).unwrap(), Address::Unix(path))
}

/// A client of somebody who answers each request by the lines that `answer` gives.
pub(crate) fn client_of(
    answer: impl FnMut(Value) -> Option<Vec<Value>> + Send + 'static,
) -> (tempfile::TempDir, Client) {
    let (dir, listener, address) = listen();
    std::thread::spawn(move || serve(listener.accept().unwrap().0, answer));
    let client = Client::connect(&address).unwrap();
    (dir, client)
}

/// What becomes of a command that changes something.
pub(crate) enum Answer {
    Done,
    Refused(&'static str),
    /// There is none.
    Silence,
    /// There is none, and QEMU ends.
    Gone,
}

/// Decides what becomes of a command and its arguments.
type Decide = Box<dyn FnMut(&str, &Value) -> Answer + Send>;

pub(crate) struct FakeQemu {
    /// What the client finds among the commands.
    pub commands: Vec<&'static str>,
    /// The guest's state.
    pub state: &'static str,
    /// That of its migration.
    pub migration: &'static str,
    /// As `query-named-block-nodes` lists them, see [`node`].
    pub nodes: Vec<Value>,
    /// See [`graph`].
    pub graph: Value,
    /// As `query-jobs` lists them.
    pub jobs: Vec<Value>,
    /// Sets of descriptors, see [`fd_set`].
    pub sets: Vec<Value>,
    /// Commands that were to change something, and their arguments.
    pub said: Vec<(String, Value)>,
    decide: Decide,
}

/// A QEMU of these `nodes`, which does what `decide` lets it do.
pub(crate) fn qemu(
    nodes: Vec<Value>,
    decide: impl FnMut(&str, &Value) -> Answer + Send + 'static,
) -> FakeQemu {
    FakeQemu {
        commands: vec!["x-debug-query-block-graph"],
        state: "running",
        migration: "none",
        nodes,
        graph: json!({}),
        jobs: Vec::new(),
        sets: Vec::new(),
        said: Vec::new(),
        decide: Box::new(decide),
    }
}

/// A node with these bitmaps.
pub(crate) fn node(name: &str, driver: &str, bitmaps: &[&str]) -> Value {
    let bitmaps: Vec<Value> = bitmaps.iter().map(|b| json!({"name": b})).collect();
    json!({"node-name": name, "drv": driver, "dirty-bitmaps": bitmaps})
}

/// A set of one descriptor, of which `what` was said.
pub(crate) fn fd_set(id: u64, what: &str) -> Value {
    json!({"fdset-id": id, "fds": [{"opaque": what}]})
}

/// A block graph of vertices (kind and name) and edges (parent, role, child).
pub(crate) fn graph(vertices: &[(&str, &str)], edges: &[(&str, &str, &str)]) -> Value {
    let id = |name: &str| vertices.iter().position(|(_, n)| *n == name).unwrap();
    let vertex = |(kind, name): &(&str, &str)| json!({"id": id(name), "type": kind, "name": name});
    let edge = |(parent, role, child): &(&str, &str, &str)| json!({"parent": id(parent), "child": id(child), "name": role, "perm": []});
    let nodes: Vec<Value> = vertices.iter().map(vertex).collect();
    let edges: Vec<Value> = edges.iter().map(edge).collect();
    json!({"nodes": nodes, "edges": edges})
}

impl FakeQemu {
    fn answer(&mut self, request: &Value) -> Option<Vec<Value>> {
        let command = request["execute"].as_str().unwrap();
        let (arguments, id) = (&request["arguments"], &request["id"]);
        if let Some(told) = self.told(command) {
            return Some(vec![json!({"return": told, "id": id})]);
        }
        self.said.push((command.to_string(), arguments.clone()));
        Some(match (self.decide)(command, arguments) {
            Answer::Done => {
                self.change(command, arguments);
                vec![json!({"return": {}, "id": id})]
            }
            Answer::Refused(why) => {
                vec![json!({"error": {"class": "GenericError", "desc": why}, "id": id})]
            }
            Answer::Silence => Vec::new(),
            Answer::Gone => return None,
        })
    }

    /// What is answered to a question.
    fn told(&self, question: &str) -> Option<Value> {
        Some(match question {
            "query-commands" => self.commands.iter().map(|c| json!({"name": c})).collect(),
            "query-status" => json!({"status": self.state}),
            "query-migrate" => json!({"status": self.migration}),
            "query-block" | "query-block-exports" => json!([]),
            "query-named-block-nodes" => json!(self.nodes),
            "x-debug-query-block-graph" => self.graph.clone(),
            "query-jobs" => json!(self.jobs),
            "query-fdsets" => json!(self.sets),
            "query-version" | "qmp_capabilities" => json!({}),
            _ => return None,
        })
    }

    fn change(&mut self, command: &str, arguments: &Value) {
        let drop_from =
            |list: &mut Vec<Value>, key: &str| list.retain(|v| v[key] != arguments[key]);
        match command {
            "blockdev-del" => drop_from(&mut self.nodes, "node-name"),
            "job-dismiss" => drop_from(&mut self.jobs, "id"),
            "remove-fd" => drop_from(&mut self.sets, "fdset-id"),
            "block-dirty-bitmap-remove" => {
                let on = self.nodes.iter_mut().filter(|n| n["node-name"] == arguments["node"]);
                for bitmaps in on.filter_map(|n| n["dirty-bitmaps"].as_array_mut()) {
                    drop_from(bitmaps, "name");
                }
            }
            _ => {}
        }
    }

    /// The names of its nodes.
    pub(crate) fn node_names(&self) -> Vec<&str> {
        self.nodes.iter().map(|n| n["node-name"].as_str().unwrap()).collect()
    }

    /// The names of all bitmaps.
    pub(crate) fn bitmaps(&self) -> Vec<&str> {
        let bitmaps = self.nodes.iter().filter_map(|n| n["dirty-bitmaps"].as_array());
        bitmaps.flatten().map(|b| b["name"].as_str().unwrap()).collect()
    }

    /// The ids of its jobs.
    pub(crate) fn job_ids(&self) -> Vec<&str> {
        self.jobs.iter().map(|j| j["id"].as_str().unwrap()).collect()
    }

    /// The numbers of its sets of descriptors.
    pub(crate) fn set_ids(&self) -> Vec<u64> {
        self.sets.iter().map(|s| s["fdset-id"].as_u64().unwrap()).collect()
    }

    /// Lets a client in.
    pub(crate) fn start(self) -> Served {
        let qemu = Arc::new(Mutex::new(self));
        let answers = qemu.clone();
        let (dir, client) = client_of(move |request| answers.lock().unwrap().answer(&request));
        Served { client, qemu, _dir: dir }
    }
}

/// A [`FakeQemu`] and its client.
pub(crate) struct Served {
    pub client: Client,
    qemu: Arc<Mutex<FakeQemu>>,
    _dir: tempfile::TempDir,
}

impl Served {
    /// What it has now.
    pub(crate) fn now(&self) -> MutexGuard<'_, FakeQemu> {
        self.qemu.lock().unwrap()
    }

    /// From now on the client waits no longer than this for an answer.
    pub(crate) fn patience(&mut self, time: Duration) {
        self.client.timeout = time;
    }
}
