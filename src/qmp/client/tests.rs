use super::*;

/// The client before died while QEMU was at work for it.
#[test]
fn what_was_meant_for_another_client_may_come_before_the_greeting() {
    use std::io::{BufRead, BufReader, Write};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
        let greeting = json!({"QMP": {"version": version, "capabilities": []}});
        writeln!(s, "{}\n{greeting}", json!({"return": [], "id": 25})).unwrap();
        for line in BufReader::new(s.try_clone().unwrap()).lines().map_while(|l| l.ok()) {
            let request: Value = serde_json::from_str(&line).unwrap();
            writeln!(s, "{}", json!({"return": [], "id": request["id"]})).unwrap();
        }
    });
    let client = Client::connect(&Address::Unix(path)).unwrap();
    assert_eq!(client.version().number, (10, 0, 2));
    drop(client);
    server.join().unwrap();
}

/// A client of somebody who answers each request by the lines that `answer` gives.
fn client_of(
    mut answer: impl FnMut(Value) -> Vec<Value> + Send + 'static,
) -> (tempfile::TempDir, Client) {
    use std::io::{BufRead, BufReader, Write};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        let version = json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""});
        writeln!(s, "{}", json!({"QMP": {"version": version, "capabilities": []}})).unwrap();
        for line in BufReader::new(s.try_clone().unwrap()).lines().map_while(|l| l.ok()) {
            let said = answer(serde_json::from_str(&line).unwrap());
            // Nobody may be there any more.
            said.iter().for_each(|l| writeln!(s, "{l}").unwrap_or_default());
        }
    });
    let client = Client::connect(&Address::Unix(path)).unwrap();
    (dir, client)
}

fn is(request: &Value, command: &str) -> bool {
    request["execute"] == command
}

#[test]
fn a_late_answer_is_not_that_to_the_next_command() {
    let mut late = None;
    let (_dir, mut client) = client_of(move |request| {
        let answer = |what| json!({"return": what, "id": request["id"]});
        if is(&request, "slow") {
            late = Some(answer("late"));
            return Vec::new();
        }
        late.take().into_iter().chain([answer("now")]).collect()
    });
    assert!(!client.timed_out());
    client.timeout = Duration::from_millis(50);
    let e = client.execute("slow", json!({})).unwrap_err();
    assert_eq!((e.kind(), client.timed_out()), (Kind::Timeout, true));
    client.timeout = answer_timeout();
    assert_eq!(client.execute("next", json!({})).unwrap(), "now");
}

#[test]
fn commands_together_have_no_more_time_than_that() {
    let (_dir, mut client) = client_of(|r| vec![json!({"return": [], "id": r["id"]})]);
    client.execute("any", json!({})).unwrap();
    client.limit_total(Some(Duration::ZERO));
    assert_eq!(client.execute("any", json!({})).unwrap_err().kind(), Kind::Timeout);
    client.limit_total(None);
    client.execute("any", json!({})).unwrap();
}

#[test]
fn whoever_is_to_stop_does_not_wait_and_does_not_go_on() {
    let (_dir, mut client) = client_of(|r| vec![json!({"return": [], "id": r["id"]})]);
    client.interrupt_by(Some(Arc::new(AtomicBool::new(true))));
    client.woken = true;
    let e = client.pause(Instant::now() + answer_timeout()).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted);
}

#[test]
fn somebody_who_talks_otherwise_is_no_qemu() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for said in ["QEMU 10.0.2 monitor\n", "{\"return\": {}}\n"] {
        let connected = std::thread::scope(|s| {
            s.spawn(|| listener.accept().unwrap().0.write_all(said.as_bytes()).unwrap());
            Client::connect(&Address::Unix(path.clone()))
        });
        let e = connected.unwrap_err();
        assert!(e.to_string().contains("not a QMP socket"), "{said:?}: {e}");
    }
}
