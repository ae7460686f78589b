//! A man in the middle of a real QEMU, and a guest agent, that lie at an answer of choice.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What is answered instead of the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    Error,
    Null,
    EmptyList,
    EmptyObject,
    /// Numbers for texts, texts for numbers.
    Types,
    Huge,
    Negative,
    Zero,
    /// Texts of 1 MiB.
    Long,
    /// Fifteen million bytes of empty objects.
    Many,
    Deep,
    /// Every path is that of a file of root's.
    Paths,
    /// Every list has each of its elements twice.
    Twice,
    /// What was answered to the question before.
    Repeat,
    Silence,
    Flood,
    Close,
}

impl Lie {
    pub const ALL: [Lie; 17] = [
        Lie::Error,
        Lie::Null,
        Lie::EmptyList,
        Lie::EmptyObject,
        Lie::Types,
        Lie::Huge,
        Lie::Negative,
        Lie::Zero,
        Lie::Long,
        Lie::Many,
        Lie::Deep,
        Lie::Paths,
        Lie::Twice,
        Lie::Repeat,
        Lie::Silence,
        Lie::Flood,
        Lie::Close,
    ];

    /// The answer's text in place of `truth`.
    fn text(self, truth: &Value, before: &Value, canary: &Path) -> String {
        match self {
            Lie::Null => "null".into(),
            Lie::EmptyList => "[]".into(),
            Lie::EmptyObject => "{}".into(),
            Lie::Many => format!("[{}{{}}]", "{},".repeat(5_000_000)),
            Lie::Deep => "[".repeat(1_000_000) + &"]".repeat(1_000_000),
            Lie::Repeat => before.to_string(),
            Lie::Types => other_types(truth).to_string(),
            Lie::Huge => numbers(truth, &json!(u64::MAX)).to_string(),
            Lie::Negative => numbers(truth, &json!(-1)).to_string(),
            Lie::Zero => numbers(truth, &json!(0)).to_string(),
            Lie::Long => {
                let mut left = 8;
                texts(truth, &mut |t: &str| {
                    left -= 1;
                    if left < 0 { t.to_string() } else { "l".repeat(1 << 20) }
                })
                .to_string()
            }
            Lie::Paths => texts(truth, &mut |t: &str| match t.starts_with('/') {
                true => canary.display().to_string(),
                false => t.to_string(),
            })
            .to_string(),
            Lie::Twice => twice(truth).to_string(),
            Lie::Error | Lie::Silence | Lie::Flood | Lie::Close => truth.to_string(),
        }
    }
}

fn map(v: &Value, leaf: &mut dyn FnMut(&Value) -> Value) -> Value {
    match v {
        Value::Array(a) => a.iter().map(|v| map(v, leaf)).collect(),
        Value::Object(o) => o.iter().map(|(k, v)| (k.clone(), map(v, leaf))).collect(),
        other => leaf(other),
    }
}

fn numbers(v: &Value, by: &Value) -> Value {
    if v.as_object().is_some_and(serde_json::Map::is_empty) {
        return by.clone();
    }
    map(v, &mut |l| if l.is_number() { by.clone() } else { l.clone() })
}

fn texts(v: &Value, by: &mut dyn FnMut(&str) -> String) -> Value {
    map(v, &mut |l| l.as_str().map_or_else(|| l.clone(), |t| by(t).into()))
}

fn other_types(v: &Value) -> Value {
    if v.as_object().is_some_and(serde_json::Map::is_empty) {
        return json!([["x"]]);
    }
    map(v, &mut |l| match l {
        Value::String(_) => json!({"a": 1.5}),
        Value::Number(_) => json!("7"),
        Value::Bool(_) => json!([]),
        other => other.clone(),
    })
}

fn twice(v: &Value) -> Value {
    match v {
        Value::Array(a) => a.iter().chain(a).map(twice).collect(),
        Value::Object(o) => o.iter().map(|(k, v)| (k.clone(), twice(v))).collect(),
        other => other.clone(),
    }
}

/// The answer at which to lie: its name, and how many of that name come before it.
pub type Place = (String, usize);

/// What all connections share.
#[derive(Default)]
pub struct Stage {
    heard: Mutex<Heard>,
    canary: PathBuf,
    /// Whether the guest's agent holds the guest frozen.
    pub frozen: AtomicBool,
    /// Whether the command `begin` was run in the guest, and not `end` since.
    pub begun: AtomicBool,
}

#[derive(Default)]
struct Heard {
    counts: HashMap<String, usize>,
    order: Vec<Place>,
    lie: Option<(Place, Lie)>,
    told: bool,
    before: Value,
}

/// What to do with an answer.
enum Act {
    Pass,
    Send(Vec<u8>),
    Drop,
    Flood,
    Close,
}

impl Stage {
    /// Whether the guest is as it was before a freeze point.
    pub fn is_free(&self) -> bool {
        !self.frozen.load(Ordering::SeqCst) && !self.begun.load(Ordering::SeqCst)
    }

    pub fn new(canary: &Path) -> Arc<Self> {
        Arc::new(Stage { canary: canary.to_path_buf(), ..Stage::default() })
    }

    /// Begins anew, with a lie or with none.
    pub fn begin(&self, lie: Option<(Place, Lie)>) {
        *self.heard.lock().unwrap() = Heard { lie, ..Heard::default() };
    }

    /// The answers since then, in their order.
    pub fn places(&self) -> Vec<Place> {
        self.heard.lock().unwrap().order.clone()
    }

    /// Whether the lie was told.
    pub fn told(&self) -> bool {
        self.heard.lock().unwrap().told
    }

    fn act(&self, name: &str, truth: &Value, frame: impl Fn(&str, &str) -> Vec<u8>) -> Act {
        let mut h = self.heard.lock().unwrap();
        let count = h.counts.entry(name.to_string()).or_default();
        let place = (name.to_string(), *count);
        *count += 1;
        h.order.push(place.clone());
        let before = std::mem::replace(&mut h.before, truth.clone());
        let Some((_, lie)) = h.lie.clone().filter(|(p, _)| *p == place) else { return Act::Pass };
        h.told = true;
        match lie {
            Lie::Silence => Act::Drop,
            Lie::Flood => Act::Flood,
            Lie::Close => Act::Close,
            Lie::Error => {
                let e = json!({"class": "GenericError", "desc": "no"}).to_string();
                Act::Send(frame("error", &e))
            }
            other => Act::Send(frame("return", &other.text(truth, &before, &self.canary))),
        }
    }
}

/// Carries an act out; false: the connection is over.
fn perform(act: Act, honest: &[u8], noise: &[u8], to: &mut UnixStream) -> bool {
    match act {
        Act::Pass => to.write_all(honest).is_ok(),
        Act::Send(bytes) => to.write_all(&bytes).is_ok(),
        Act::Drop => true,
        Act::Close => false,
        Act::Flood => {
            let many = noise.repeat(1 + (256 << 10) / noise.len());
            while to.write_all(&many).is_ok() {}
            false
        }
    }
}

fn listen(path: &Path, serve: impl Fn(UnixStream) + Send + Sync + 'static) {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).unwrap();
    let serve = Arc::new(serve);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let serve = serve.clone();
            std::thread::spawn(move || serve(stream));
        }
    });
}

const EVENT: &[u8] = b"{\"timestamp\": {\"seconds\": 1, \"microseconds\": 1}, \
    \"event\": \"JOB_STATUS_CHANGE\", \"data\": {\"status\": \"concluded\", \"id\": \"x\"}}\r\n";

/// Listens at `path` for clients of the QEMU at `real`.
pub fn proxy(stage: &Arc<Stage>, path: &Path, real: &Path) {
    let (stage, real) = (stage.clone(), real.to_path_buf());
    listen(path, move |client| {
        let Ok(qemu) = UnixStream::connect(&real) else { return };
        let asked: Arc<Mutex<HashMap<u64, String>>> = Arc::default();
        let forward = {
            let (client, qemu) = (client.try_clone().unwrap(), qemu.try_clone().unwrap());
            let asked = asked.clone();
            std::thread::spawn(move || {
                questions(&client, &qemu, &asked);
                let _ = qemu.shutdown(Shutdown::Both);
            })
        };
        answers(&stage, qemu, client.try_clone().unwrap(), &asked);
        let _ = client.shutdown(Shutdown::Both);
        let _ = forward.join();
    });
}

fn questions(client: &UnixStream, qemu: &UnixStream, asked: &Mutex<HashMap<u64, String>>) {
    let mut line = Vec::new();
    let mut buf = vec![0u8; 65536];
    while let Some((n, fds)) = receive(client, &mut buf).filter(|(n, _)| *n > 0) {
        for b in &buf[..n] {
            line.push(*b);
            if *b == b'\n' {
                let q: Value = serde_json::from_slice(&line).unwrap_or_default();
                if let (Some(id), Some(name)) = (q["id"].as_u64(), q["execute"].as_str()) {
                    asked.lock().unwrap().insert(id, name.to_string());
                }
                line.clear();
            }
        }
        if send(qemu, &buf[..n], &fds).is_none() {
            return;
        }
    }
}

fn answers(
    stage: &Stage,
    qemu: UnixStream,
    mut client: UnixStream,
    asked: &Mutex<HashMap<u64, String>>,
) {
    for line in BufReader::new(qemu).lines().map_while(Result::ok) {
        let message: Value = serde_json::from_str(&line).unwrap_or_default();
        let honest = format!("{line}\r\n").into_bytes();
        let act = if message["QMP"].is_object() {
            stage.act("greeting", &message["QMP"], |_, text| {
                format!("{{\"QMP\": {text}}}\r\n").into_bytes()
            })
        } else if message["event"].is_string() {
            Act::Pass
        } else {
            let id = message["id"].as_u64().unwrap_or(0);
            let name = asked.lock().unwrap().remove(&id).unwrap_or_default();
            stage.act(&name, &message["return"], |key, text| {
                format!("{{\"{key}\": {text}, \"id\": {id}}}\r\n").into_bytes()
            })
        };
        if !perform(act, &honest, EVENT, &mut client) {
            return;
        }
    }
}

/// A guest agent of a guest with two file systems.
pub fn agent(stage: &Arc<Stage>, path: &Path) {
    let stage = stage.clone();
    listen(path, move |mut client| {
        let lines = BufReader::new(client.try_clone().unwrap()).split(b'\n');
        for line in lines.map_while(Result::ok) {
            let start = line.iter().position(|b| *b == b'{').unwrap_or(line.len());
            let q: Value = serde_json::from_slice(&line[start..]).unwrap_or_default();
            let name = q["execute"].as_str().unwrap_or_default();
            let truth = match name {
                "guest-sync-delimited" => q["arguments"]["id"].clone(),
                "guest-get-fsinfo" => json!([{"mountpoint": "/"}, {"mountpoint": "/home"}]),
                "guest-fsfreeze-freeze" => {
                    stage.frozen.store(true, Ordering::SeqCst);
                    json!(2)
                }
                "guest-fsfreeze-thaw" => match stage.frozen.swap(false, Ordering::SeqCst) {
                    true => json!(2),
                    false => json!(0),
                },
                "guest-get-osinfo" => json!({"id": "debian"}),
                "guest-exec" => {
                    let begins = q["arguments"]["arg"][1] == "begin";
                    stage.begun.store(begins, Ordering::SeqCst);
                    json!({"pid": 7})
                }
                "guest-exec-status" => json!({"exited": true, "exitcode": 0}),
                _ if stage.frozen.load(Ordering::SeqCst) => json!("frozen"),
                _ => json!("thawed"),
            };
            let mark: &[u8] = if name == "guest-sync-delimited" { &[0xff] } else { &[] };
            let frame = |key: &str, text: &str| {
                [mark, format!("{{\"{key}\": {text}}}\n").as_bytes()].concat()
            };
            let honest = frame("return", &truth.to_string());
            let act = stage.act(name, &truth, frame);
            if !perform(act, &honest, b"\n", &mut client) {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
    });
}

/// Reads bytes and the descriptors that come with them.
fn receive(from: &UnixStream, buf: &mut [u8]) -> Option<(usize, Vec<OwnedFd>)> {
    let mut control = [0u64; 16];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut fds = Vec::new();
    // SAFETY: a zeroed msghdr is valid, all pointers outlive the call, and the descriptors that the
    // kernel has made for us are nobody else's.
    let n = unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = std::mem::size_of_val(&control) as _;
        let n = libc::recvmsg(from.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC);
        let head = libc::CMSG_FIRSTHDR(&msg);
        if n >= 0 && !head.is_null() && (*head).cmsg_type == libc::SCM_RIGHTS {
            let len = (*head).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(head).cast::<RawFd>();
            for i in 0..len / std::mem::size_of::<RawFd>() {
                fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
            }
        }
        n
    };
    Some((usize::try_from(n).ok()?, fds))
}

/// Sends bytes, and at most one descriptor with them.
fn send(to: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Option<()> {
    let mut to_write = to;
    let Some(fd) = fds.first() else { return to_write.write_all(bytes).ok() };
    let mut control = [0u64; 8];
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    let size = std::mem::size_of::<RawFd>() as u32;
    // SAFETY: as in `receive`; the control buffer has room for one header and one descriptor.
    let n = unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = libc::CMSG_SPACE(size) as _;
        let head = libc::CMSG_FIRSTHDR(&msg);
        (*head).cmsg_level = libc::SOL_SOCKET;
        (*head).cmsg_type = libc::SCM_RIGHTS;
        (*head).cmsg_len = libc::CMSG_LEN(size) as _;
        libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
        libc::sendmsg(to.as_raw_fd(), &msg, libc::MSG_NOSIGNAL)
    };
    let sent = usize::try_from(n).ok()?;
    to_write.write_all(&bytes[sent..]).ok()
}

/// A QEMU all of whose answers are as large as a client may accept.
pub fn giant(path: &Path) {
    listen(path, |mut client| {
        let greeting = json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2},
            "package": "p".repeat(1 << 20)}, "capabilities": []}});
        if writeln!(client, "{greeting}").is_err() {
            return;
        }
        let lines = BufReader::new(client.try_clone().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let q: Value = serde_json::from_str(&line).unwrap_or_default();
            let text = giant_answer(q["execute"].as_str().unwrap_or_default());
            if writeln!(client, "{{\"return\": {text}, \"id\": {}}}", q["id"]).is_err() {
                return;
            }
        }
    });
}

fn giant_answer(command: &str) -> String {
    let list = |n: usize, of: &dyn Fn(usize) -> Value| {
        let list: Vec<String> = (0..n).map(|i| of(i).to_string()).collect();
        format!("[{}]", list.join(","))
    };
    let node = |i: usize| {
        json!({"node-name": format!("n{i}"), "drv": "qcow2", "file": "/f",
        "image": {"virtual-size": 1 << 20, "filename": "f"},
        "dirty-bitmaps": if i < 40 { vec![json!({"name": "b"}); 100] } else { Vec::new() }})
    };
    match command {
        "qmp_capabilities" => "{}".into(),
        "query-commands" => {
            let used = [
                "blockdev-add",
                "blockdev-backup",
                "block-dirty-bitmap-merge",
                "query-jobs",
                "query-block-exports",
                "blockdev-reopen",
                "x-debug-query-block-graph",
                "query-status",
                "query-name",
                "query-pci",
                "query-chardev",
            ];
            list(40_000, &|i| match used.get(i) {
                Some(name) => json!({"name": name}),
                None => json!({"name": format!("{i:060}")}),
            })
        }
        "query-qmp-schema" => {
            list(40_000, &|i| json!({"values": [format!("{i:060}"), "snapshot-access"]}))
        }
        "query-named-block-nodes" => list(14_000, &node),
        "query-block" => {
            list(11_000, &|i| json!({"qdev": format!("/d{i}"), "device": "", "inserted": node(i)}))
        }
        "x-debug-query-block-graph" => {
            let vertex =
                |i: usize| json!({"id": i, "type": "block-driver", "name": format!("n{i}")});
            let edge = |i: usize| json!({"parent": i, "child": i + 1, "name": "backing"});
            format!("{{\"nodes\": {}, \"edges\": {}}}", list(14_000, &vertex), list(14_000, &edge))
        }
        "query-name" | "query-pci" | "query-chardev" => list(40_000, &|i| json!({"k": i})),
        "query-jobs" | "query-block-exports" => {
            list(16_000, &|i| json!({"id": format!("fleecefs-{i:012x}-j0"), "status": "concluded"}))
        }
        _ => "{}".into(),
    }
}
