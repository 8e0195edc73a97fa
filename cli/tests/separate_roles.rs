//! Coordinator, workers and monitors as processes of their own, which come and go.

mod support;

use support::{DENSE, FakeWorker, Place, Running, hash, parse_lines, rounds_of};

/// Rounds of the runs in which something happens.
const ROUNDS: u32 = 12;

fn expected_hash(place: &Place, rounds: u32) -> String {
    hash(&place.train("expected", rounds, &[]))
}

/// Scenario: a coordinator waits for two workers, and gets them. Property: everybody ends well by themselves, and the
/// hash is that of `train`.
#[test]
fn separate_processes_make_the_same_run() {
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, ROUNDS);
    let (coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let workers = ["a", "b"].map(|name| place.worker(&url, name));
    let printed = coordinator.end().expect_code(0).stdout;
    for worker in workers {
        let said = worker.end().expect_code(0).stderr;
        assert!(said.contains("joined run \"quick\" as w"), "{said}");
        assert!(said.contains("all 12 rounds are done"), "{said}");
    }
    let summary = place.summary("run");
    assert_eq!(hash(&summary), expected);
    assert!(printed.contains(&expected) && printed.contains("run/model.safetensors"), "{printed}");
    assert_eq!((&summary["workers_seen"], &summary["workers_lost"]), (&2.into(), &0.into()));
    assert_eq!(summary["outcome"], "completed");
    let proof = place.audit("run");
    assert!(proof.contains("computed by 2 members: w1#1, w2#1"), "{proof}");
}

/// Scenario: three members are in round 0, one of which never delivers. One of the others is killed; two more join; then
/// the first is lost, too. Property: those that are left, late joiners among them, finish, and the hash is the same.
#[test]
fn killed_and_late_workers_change_no_bit() {
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, ROUNDS);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "3"]);
    let mut holder = FakeWorker::join(&url, 1);
    let steady = place.worker(&url, "steady");
    coordinator.wait_for_line("joined: steady");
    let doomed = place.worker(&url, "doomed");
    coordinator.wait_for_line("joined: doomed");
    holder.next_assignment();

    doomed.kill();
    coordinator.wait_for_line("w3#1 left: ");
    let late = ["late", "later"].map(|name| place.worker(&url, name));
    coordinator.wait_for_line("joined: late");
    coordinator.wait_for_line("joined: late");
    drop(holder);
    coordinator.wait_for_line("w1#1 left: ");

    coordinator.end().expect_code(0);
    steady.end().expect_code(0);
    late.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let summary = place.summary("run");
    assert_eq!(hash(&summary), expected);
    assert_eq!((&summary["workers_seen"], &summary["workers_lost"]), (&5.into(), &2.into()));
    let proof = place.audit("run");
    assert!(proof.contains("w2#1") && proof.contains("w4#1") && proof.contains("w5#1"), "{proof}");
    assert!(!proof.contains("w1#1"), "the fake worker delivered nothing: {proof}");
}

/// Scenario: one of three workers is killed at some moment of a longer run. Property: whatever it was doing, the others
/// finish, and the hash is the same.
#[test]
fn a_worker_killed_at_any_moment_changes_no_bit() {
    const LONG: u32 = 100;
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, LONG);
    let (mut coordinator, url) = place.coordinator("run", LONG, &["--min-workers", "2"]);
    let doomed = place.worker(&url, "doomed");
    coordinator.wait_for_line("joined: doomed");
    let others = ["a", "b"].map(|name| place.worker(&url, name));
    let mut monitor = place.start(&["monitor", &url, "--json", "--from-round", "0"]);
    monitor.wait_for_line("\"round\":7,");
    doomed.kill();
    coordinator.end().expect_code(0);
    others.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    monitor.end().expect_code(0);
    assert_eq!(hash(&place.summary("run")), expected);
    place.audit("run");
}

/// The run ends well, with the expected hash, and the first worker computed nothing of it.
fn finished_without_the_first(place: &Place, coordinator: Running, others: [Running; 2], expected: &str) {
    coordinator.end().expect_code(0);
    others.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    assert_eq!(hash(&place.summary("run")), expected);
    let proof = place.audit("run");
    assert!(!proof.contains("w1#1"), "{proof}");
}

/// Scenario: the first worker of a run that needs two is frozen before the second one comes. Property: it is put out when
/// its lease expires, and the run is done by the others, with the same hash.
#[test]
fn a_frozen_worker_is_put_out() {
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, ROUNDS);
    let short = ["--set", "cluster.heartbeat_interval_ms=100", "--set", "cluster.lease_timeout_ms=1000"];
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &[&short[..], &["--min-workers", "2"]].concat());
    let frozen = place.worker(&url, "frozen");
    coordinator.wait_for_line("joined: frozen");
    frozen.freeze();
    let left = coordinator.wait_for_line("w1#1 left: ");
    assert!(left.contains("silent for ") && left.contains("the lease is 1.0 s"), "{left}");
    let others = ["a", "b"].map(|name| place.worker(&url, name));
    finished_without_the_first(&place, coordinator, others, &expected);
}

/// Scenario: a worker is frozen before the first round, and its lease is long. Property: the others hedge its leaves and
/// finish the run without it, with the same hash.
#[test]
fn a_frozen_worker_holds_nothing_up() {
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, ROUNDS);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--start-workers", "3"]);
    let frozen = place.worker(&url, "frozen");
    coordinator.wait_for_line("joined: frozen");
    frozen.freeze();
    let others = ["a", "b"].map(|name| place.worker(&url, name));
    let late = coordinator.wait_for_line("is late with leaves");
    assert!(late.contains("frozen"), "{late}");
    finished_without_the_first(&place, coordinator, others, &expected);
}

/// Scenario: a worker is asked to terminate in the middle of a round. Property: it hands over its work, leaves without
/// being counted as lost, and exits with 0; the run goes on to the same hash.
#[test]
fn a_terminated_worker_drains() {
    let place = Place::with_model(DENSE);
    let expected = expected_hash(&place, ROUNDS);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let mut holder = FakeWorker::join(&url, 1);
    let mut leaving = place.worker(&url, "leaving");
    coordinator.wait_for_line("joined: leaving");
    leaving.wait_for_line("joined run ");
    holder.next_assignment();

    leaving.terminate();
    let said = leaving.end().expect_code(0).stderr;
    assert!(said.contains("asked to terminate: handing over the work"), "{said}");
    assert!(said.trim_end().ends_with("drained"), "{said}");
    coordinator.wait_for_line("w2#1 left: drained");
    let others = ["a", "b"].map(|name| place.worker(&url, name));
    coordinator.wait_for_line("joined: ");
    coordinator.wait_for_line("joined: ");
    drop(holder);
    coordinator.end().expect_code(0);
    others.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let summary = place.summary("run");
    assert_eq!(hash(&summary), expected);
    assert_eq!((&summary["workers_seen"], &summary["workers_lost"]), (&4.into(), &1.into()));
    place.audit("run");
}

/// Scenario: one monitor comes before the run starts, one asks for everything after some rounds, one only for the later
/// rounds. Property: each sees its rounds once and in order, and ends when the run ends.
#[test]
fn monitors_see_every_round_once() {
    let place = Place::with_model(DENSE);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let mut early = place.start(&["monitor", &url, "--json", "--from-round", "0"]);
    let first = place.worker(&url, "first");
    coordinator.wait_for_line("joined: first");
    early.wait_for_line("\"name\":\"first\"");
    let mut listed = String::new();
    // The list is made anew every few milliseconds.
    while !listed.contains("first") {
        listed = place.succeed(&["monitor", &url, "--workers"]);
    }
    assert!(listed.starts_with("member") && listed.contains("w1#1"), "{listed}");

    let second = place.worker(&url, "second");
    early.wait_for_line("\"round\":2,");
    let replayed = place.start(&["monitor", &url, "--json", "--from-round", "0"]);
    coordinator.end().expect_code(0);
    [first, second].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let all: Vec<u64> = (0..u64::from(ROUNDS)).collect();
    let events = parse_lines(&early.end().expect_code(0).stdout);
    assert_eq!(rounds_of(&events), all);
    let end = events.last().expect("events");
    assert_eq!((&end["event"], &end["state"]["is"]), (&"state".into(), &"finished".into()));
    // It may have come when the run was over already; then it was not served.
    let replayed = replayed.end();
    if replayed.status.success() {
        assert_eq!(rounds_of(&parse_lines(&replayed.stdout)), all);
    }
    assert_eq!(rounds_of(&place.json_lines("run/events.jsonl")), all);
}

/// Scenario: a run stands still after round 0; a monitor asks for what comes from round 1 on. Property: round 0 is not
/// shown to it, all others are.
#[test]
fn a_monitor_can_start_at_any_round() {
    let place = Place::with_model(DENSE);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let steady = one_round_of_two(&place, &mut coordinator, &url);
    let watching = place.start(&["monitor", &url, "--json", "--from-round", "1"]);
    let late = place.worker(&url, "late");
    coordinator.end().expect_code(0);
    [steady, late].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let watched = watching.end();
    // It may have come when the run was over already; then it was not served.
    if watched.status.success() {
        assert_eq!(rounds_of(&parse_lines(&watched.stdout)), (1..u64::from(ROUNDS)).collect::<Vec<u64>>());
    }
}

/// Lets a fake and a real worker begin round 0, and the fake one leave: the real one completes the round, and the run,
/// which needs two, stands still. Returns the real one.
fn one_round_of_two(place: &Place, coordinator: &mut Running, url: &str) -> Running {
    let mut holder = FakeWorker::join(url, 1);
    let steady = place.worker(url, "steady");
    coordinator.wait_for_line("joined: steady");
    holder.next_assignment();
    drop(holder);
    coordinator.wait_for_line("waiting: round 1 needs 2 workers");
    steady
}

/// Scenario: the coordinator is asked to terminate while it waits for a second worker. Property: it says how far it came,
/// leaves whole files, and exits with 1; its worker ends as well.
#[test]
fn a_terminated_coordinator_leaves_whole_files() {
    let place = Place::with_model(DENSE);
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "2"]);
    let worker = one_round_of_two(&place, &mut coordinator, &url);
    coordinator.terminate();
    let said = coordinator.end().expect_code(1).stderr;
    assert!(said.contains("stopped after 1 of 12 rounds: asked to terminate"), "{said}");
    worker.end().expect_code(0);
    let summary = place.summary("run");
    assert_eq!((&summary["rounds"], &summary["outcome"]), (&1.into(), &"stopped".into()));
    let proof = place.audit("run");
    assert!(proof.contains("1 round, 64 samples used"), "{proof}");
}

/// Scenario: `train --workers 2` is killed, and only it. Property: its worker processes end with it; they do not look for
/// a coordinator first.
#[test]
fn workers_end_with_the_process_that_started_them() {
    let place = Place::with_model(DENSE);
    let mut train = place.start(&support::train_arguments("run", 9000, &["--workers", "2"]));
    train.wait_for_line("\"round\":2,");
    let said = train.kill_and_wait_for_heirs().stderr;
    assert!(!said.contains("for a coordinator"), "{said}");
}

#[test]
fn a_worker_whose_parent_is_gone_already_does_not_begin() {
    let said = Place::new().run(&["worker", "--coordinator", "127.0.0.1:1", "--parent", "1"]).expect_code(1).stderr;
    assert!(said.contains("process 1, which started this one, has ended"), "{said}");
}
