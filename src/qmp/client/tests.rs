use std::io::Write;

use super::testing::{client_of, listen, serve};
use super::*;

fn empty_answer(request: Value) -> Option<Vec<Value>> {
    Some(vec![json!({"return": [], "id": request["id"]})])
}

/// The client before died while QEMU was at work for it.
#[test]
fn what_was_meant_for_another_client_may_come_before_the_greeting() {
    let (_dir, listener, address) = listen();
    let server = std::thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        writeln!(s, "{}", json!({"return": [], "id": 25})).unwrap();
        serve(s, empty_answer);
    });
    let client = Client::connect(&address).unwrap();
    assert_eq!(client.version().number, (10, 0, 2));
    drop(client);
    server.join().unwrap();
}

/// As QEMU does now and then while it is parting from the client before.
#[test]
fn a_connection_that_is_closed_before_the_greeting_is_made_anew_and_not_for_ever() {
    let (_dir, listener, address) = listen();
    let close = |times| (0..times).for_each(|_| drop(listener.accept().unwrap()));
    let client = std::thread::scope(|s| {
        s.spawn(|| {
            close(TRIES - 1);
            serve(listener.accept().unwrap().0, empty_answer);
        });
        Client::connect(&address).map(|c| c.version().number)
    });
    assert_eq!(client.unwrap(), (10, 0, 2));
    let refused = std::thread::scope(|s| {
        s.spawn(|| close(TRIES));
        Client::connect(&address).unwrap_err()
    });
    assert_eq!(refused.kind(), Kind::Peer);
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
            return Some(Vec::new());
        }
        Some(late.take().into_iter().chain([answer("now")]).collect())
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
    let (_dir, mut client) = client_of(empty_answer);
    client.execute("any", json!({})).unwrap();
    client.limit_total(Some(Duration::ZERO));
    assert_eq!(client.execute("any", json!({})).unwrap_err().kind(), Kind::Timeout);
    client.limit_total(None);
    client.execute("any", json!({})).unwrap();
}

#[test]
fn whoever_is_to_stop_does_not_wait_and_does_not_go_on() {
    let (_dir, mut client) = client_of(empty_answer);
    client.interrupt_by(Some(Arc::new(AtomicBool::new(true))));
    client.woken = true;
    let e = client.pause(Instant::now() + answer_timeout()).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted);
}

#[test]
fn somebody_who_talks_otherwise_is_no_qemu() {
    let (_dir, listener, address) = listen();
    for said in ["QEMU 10.0.2 monitor\n", "{\"return\": {}}\n"] {
        let connected = std::thread::scope(|s| {
            s.spawn(|| listener.accept().unwrap().0.write_all(said.as_bytes()).unwrap());
            Client::connect(&address)
        });
        let e = connected.unwrap_err();
        assert!(e.to_string().contains("not a QMP socket"), "{said:?}: {e}");
    }
}
