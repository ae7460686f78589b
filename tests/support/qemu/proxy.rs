//! A hostile QEMU: a socket in front of a real one that reads along, answers by itself, and changes
//! answers.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

/// What it does. Both are called from threads of its own.
pub trait Lies: Send + Sync + 'static {
    /// A command, and the descriptors that came with it: an answer of its own, or `None` for the
    /// real one's.
    fn asked(&self, _request: &Value, _passed: &[File]) -> Option<Value> {
        None
    }
    /// The real answer to `command`, to be changed.
    fn answered(&self, _command: &str, _answer: &mut Value) {}
}

/// Listens at `path` for as long as the process lives; each client gets a connection to `real`.
pub fn listen(path: &Path, real: &Path, lies: impl Lies) {
    let listener = UnixListener::bind(path).unwrap();
    let (real, lies) = (real.to_path_buf(), Arc::new(lies));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(qemu) = UnixStream::connect(&real) else { continue };
            between(client, qemu, lies.clone());
        }
    });
}

type Asked = Arc<Mutex<HashMap<String, String>>>;

fn between(client: UnixStream, qemu: UnixStream, lies: Arc<impl Lies>) {
    let asked = Asked::default();
    let (to_client, from_qemu) = (client.try_clone().unwrap(), qemu.try_clone().unwrap());
    let to_client = Arc::new(Mutex::new(to_client));
    let (answers, known, liar) = (to_client.clone(), asked.clone(), lies.clone());
    std::thread::spawn(move || {
        lines(
            |buf| Ok((Read::read(&mut &from_qemu, buf)?, Vec::new())),
            |line, _| {
                let mut answer: Value = serde_json::from_slice(line).ok()?;
                let id = answer.get("id").map(Value::to_string);
                if let Some(command) = id.and_then(|id| known.lock().unwrap().remove(&id)) {
                    liar.answered(&command, &mut answer);
                }
                writeln!(answers.lock().unwrap(), "{answer}").ok()
            },
        );
        let _ = answers.lock().unwrap().shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || {
        lines(
            |buf| receive(&client, buf),
            |line, passed| {
                let request: Value = serde_json::from_slice(line).ok()?;
                if let Some(mut answer) = lies.asked(&request, passed) {
                    answer["id"] = request["id"].clone();
                    return writeln!(to_client.lock().unwrap(), "{answer}").ok();
                }
                let command = request["execute"].as_str().unwrap_or_default().to_string();
                asked.lock().unwrap().insert(request["id"].to_string(), command);
                send(&qemu, format!("{request}\n").as_bytes(), passed)
            },
        );
        let _ = qemu.shutdown(std::net::Shutdown::Both);
    });
}

/// Line by line, until one end is gone.
fn lines(
    mut read: impl FnMut(&mut [u8]) -> std::io::Result<(usize, Vec<File>)>,
    mut each: impl FnMut(&[u8], &[File]) -> Option<()>,
) {
    let (mut held, mut passed, mut buf) = (Vec::new(), Vec::new(), [0u8; 65536]);
    while let Ok((n @ 1.., files)) = read(&mut buf) {
        held.extend_from_slice(&buf[..n]);
        passed.extend(files);
        while let Some(end) = held.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = held.drain(..=end).collect();
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if each(&line, &passed).is_none() {
                return;
            }
            passed.clear();
        }
    }
}

fn receive(socket: &UnixStream, buf: &mut [u8]) -> std::io::Result<(usize, Vec<File>)> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control = [0u64; 32];
    // SAFETY: a zeroed msghdr is valid, all pointers outlive the call, and the descriptors in the
    // control message are fresh ones.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = std::mem::size_of_val(&control) as _;
        let n = libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC);
        let n = usize::try_from(n).map_err(|_| std::io::Error::last_os_error())?;
        let mut files = Vec::new();
        let head = libc::CMSG_FIRSTHDR(&msg);
        if !head.is_null() && (*head).cmsg_type == libc::SCM_RIGHTS {
            let bytes = (*head).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
            let data = libc::CMSG_DATA(head).cast::<i32>();
            for i in 0..bytes / 4 {
                files.push(File::from_raw_fd(data.add(i).read_unaligned()));
            }
        }
        Ok((n, files))
    }
}

fn send(socket: &UnixStream, bytes: &[u8], pass: &[File]) -> Option<()> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    let mut control = [0u64; 8];
    // SAFETY: as above; one descriptor fits into the control buffer.
    let n = unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        if let Some(file) = pass.first() {
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(4) as _;
            let head = libc::CMSG_FIRSTHDR(&msg);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(4) as _;
            libc::CMSG_DATA(head).cast::<i32>().write_unaligned(file.as_raw_fd());
        }
        libc::sendmsg(socket.as_raw_fd(), &msg, libc::MSG_NOSIGNAL)
    };
    let sent = usize::try_from(n).ok()?;
    (&mut &*socket).write_all(&bytes[sent..]).ok()
}

/// QEMU's words for a refusal.
pub fn refusal(desc: &str) -> Value {
    json!({"error": {"class": "GenericError", "desc": desc}})
}
