//! A coordinator as a container runs it: watched from outside, started again by somebody else, and asked to stay.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;

use support::{DENSE, FakeWorker, Place, Running, TINY, hash};

const ROUNDS: u32 = 12;

/// What the server at `address` answers to a request with this first line, head and body.
fn ask(address: &str, first_line: &str) -> String {
    let mut connection = TcpStream::connect(address).expect("the metrics server listens");
    let request = format!("{first_line}\r\nHost: {address}\r\n\r\n");
    connection.write_all(request.as_bytes()).expect("the request can be sent");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer in UTF-8");
    answer
}

fn get(address: &str, path: &str) -> String {
    ask(address, &format!("GET {path} HTTP/1.1"))
}

/// The value of a metric, which must be there.
fn metric(page: &str, name: &str) -> f64 {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} is not in\n{page}")).parse().expect("a number")
}

/// The address in a line that ends with `http://ADDRESS/metrics`.
fn metrics_address(coordinator: &mut Running) -> String {
    let line = coordinator.wait_for_line("metrics are at http://");
    let (_, address) = line.split_once("http://").expect("an address");
    address.strip_suffix("/metrics").expect("a path").to_owned()
}

/// Scenario: a coordinator serves metrics and stays after its run. Property: before, at and after the run's end, the
/// numbers are those of the run; probes say what is so; a worker that comes too late is told that the run has ended, and
/// one that stays waits for the next run until it is asked to leave.
#[test]
fn a_run_can_be_watched_from_outside() {
    let place = Place::with_model(DENSE);
    let (mut coordinator, url) =
        place.coordinator("run", ROUNDS, &["--stay", "--metrics-listen", "127.0.0.1:0", "--min-workers", "2"]);
    let address = metrics_address(&mut coordinator);
    assert!(get(&address, "/healthz").starts_with("HTTP/1.1 200 OK"));
    assert!(get(&address, "/readyz").starts_with("HTTP/1.1 200 OK"));
    let before = get(&address, "/metrics");
    assert!(before.contains("content-type: text/plain; version=0.0.4"), "{before}");
    assert_eq!(metric(&before, "lockstep_run_state{state=\"waiting\"}"), 1.0);
    assert_eq!(metric(&before, "lockstep_rounds_planned"), f64::from(ROUNDS));
    assert!(!before.contains("lockstep_round_loss"), "there was no round yet");
    assert!(place.succeed(&["health", &url]).contains("serves"));

    // One that is lost, so that it counts.
    let holder = FakeWorker::join(&url, 1);
    coordinator.wait_for_line("w1#1 joined");
    drop(holder);
    coordinator.wait_for_line("w1#1 left: ");
    let mut staying = place.start(&["worker", "--coordinator", &url, "--threads", "1", "--stay"]);
    let leaving = place.worker(&url, "leaving");
    leaving.end().expect_code(0);
    staying.wait_for_line("all 12 rounds are done; waiting for the next run");
    coordinator.wait_for_line("still serving monitors");

    let after = get(&address, "/metrics");
    assert_eq!(metric(&after, "lockstep_run_state{state=\"finished\"}"), 1.0);
    assert_eq!(metric(&after, "lockstep_rounds_total"), f64::from(ROUNDS));
    assert_eq!(metric(&after, "lockstep_samples_total"), f64::from(ROUNDS * 64));
    assert_eq!(metric(&after, "lockstep_workers_joined_total"), 3.0);
    assert_eq!(metric(&after, "lockstep_workers_lost_total"), 1.0);
    assert_eq!(metric(&after, "lockstep_round_duration_seconds_count"), f64::from(ROUNDS));
    assert_eq!(metric(&after, "lockstep_checkpoints_total"), 1.0);
    assert!(metric(&after, "lockstep_checkpoint_timestamp_seconds") > 1e9);
    assert!(metric(&after, "lockstep_validation_loss") > 0.0);
    assert!(get(&address, "/healthz").starts_with("HTTP/1.1 200 OK"));
    let ready = get(&address, "/readyz");
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("all 12 rounds are done"), "{ready}");
    let late = place.worker(&url, "late").end().expect_code(0);
    assert!(late.stderr.contains("all 12 rounds are done"), "{}", late.stderr);
    place.succeed(&["health", &url]);

    staying.terminate();
    staying.end().expect_code(0);
    coordinator.terminate();
    coordinator.end().expect_code(0);
    let refused = place.run(&["health", &url]).expect_code(1);
    assert!(refused.stderr.contains("cannot reach"), "{}", refused.stderr);
}

/// Scenario: the metrics server is asked for what it has not, and sent what is no HTTP. Property: it says so, and goes on.
#[test]
fn the_metrics_server_answers_anything_and_goes_on() {
    let place = Place::with_model(TINY);
    let (mut coordinator, _) = place.coordinator("run", ROUNDS, &["--metrics-listen", "127.0.0.1:0"]);
    let address = metrics_address(&mut coordinator);
    // Too long to be read to its end; what comes back depends on how fast it is sent.
    let mut endless = TcpStream::connect(&address).expect("the metrics server listens");
    let _ = endless.write_all(format!("GET /{} HTTP/1.1", "x".repeat(1 << 20)).as_bytes());
    for (first_line, status) in [("GET / HTTP/1.1", "404"), ("POST /metrics HTTP/1.1", "405"), ("nonsense", "400")] {
        let answer = ask(&address, first_line);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let many = format!("GET /metrics HTTP/1.1{}", "\r\nx: y".repeat(100));
    assert!(ask(&address, &many).starts_with("HTTP/1.1 431"));
    let head = ask(&address, "HEAD /metrics HTTP/1.1");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(get(&address, "/metrics").starts_with("HTTP/1.1 200"));
}

/// Scenario: a coordinator with --auto-resume is killed in the middle, started with the same options, asked to stop, and
/// started again with more rounds to do. Property: each start goes on; its worker waits for it each time; the hash is
/// that of a run without all this.
#[test]
fn the_same_options_begin_a_run_and_go_on_with_it() {
    const LONG: u32 = 300;
    let place = Place::with_model(DENSE);
    let expected = hash(&place.train("expected", LONG, &[]));
    let more = ["--auto-resume", "--set", "checkpoint.every_rounds=2"];
    let (first, url) = place.coordinator("run", LONG, &more);
    let address = url.strip_prefix("http://").expect("a URL");
    let mut monitor = place.start(&["monitor", &url, "--json", "--from-round", "0"]);
    let mut worker = place.worker(&url, "faithful");
    monitor.wait_for_line("\"round\":40,");
    first.kill();
    worker.wait_for_line("looking for the coordinator");

    let start_again = || place.coordinator_at(address, "run", LONG, &more).0;
    let mut second = start_again();
    second.wait_for_line("joined: faithful");
    second.terminate();
    let stopped = second.end();
    assert!(stopped.stderr.contains("going on with run after round"), "{}", stopped.stderr);
    if stopped.status.code() == Some(1) {
        assert!(stopped.stderr.contains("asked to terminate"), "{}", stopped.stderr);
        worker.wait_for_line("looking for the coordinator");
    }

    start_again().end().expect_code(0);
    worker.end().expect_code(0);
    assert_eq!(hash(&place.summary("run")), expected);
    place.audit("run");
    // It is finished: the same options find that there is nothing left to do.
    start_again().end().expect_code(0);
    let refused = place.run(&["train", "--auto-resume", "--out", "run", "--seed", "8"]).expect_code(2);
    assert!(refused.stderr.contains("cannot resume"), "{}", refused.stderr);
}
