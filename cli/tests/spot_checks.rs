//! A worker that computes wrong bits is found by spot checks, named, and kept out; real processes around it.

mod support;

use lockstep_common::protocol;
use lockstep_proto::status::Refusal;
use lockstep_worker::session::SessionEnd;
use support::fake_worker::honest_join;
use support::{DENSE, FakeWorker, Place, hash, wrong_worker};

/// The number that the wrong worker's process gives itself.
const WRONG: u64 = 77;

/// Three workers are there at the beginning, and every leaf is checked.
const CHECKED: [&str; 4] = ["--set", "cluster.start_workers=3", "--set", "cluster.spot_check=1"];

/// Scenario: one of three workers computes from parameters of which some are wrong. Property: it is evicted with its number, the
/// leaf and both digests in the reason, it may not join again, and the run ends with the hash of a run without it.
#[test]
fn a_worker_that_computes_wrong_is_named_and_leaves_no_bit_in_the_result() {
    let place = Place::with_model(DENSE);
    let expected = hash(&place.train("expected", 12, &[]));
    let (mut coordinator, url) = place.coordinator("run", 12, &CHECKED);
    let workers = ["a", "b"].map(|name| place.worker(&url, name));
    let wrong = wrong_worker::spawn(&url, WRONG);
    let notice = coordinator.wait_for_line("barred from the run");
    assert!(notice.contains("computed leaf") && notice.contains("where two other workers got"), "{notice}");
    match wrong.join().expect("the wrong worker lives to the end") {
        SessionEnd::Evicted(reason) => assert!(notice.contains(&reason), "{reason} is not in {notice}"),
        other => panic!("{other:?}"),
    }
    coordinator.end().expect_code(0);
    workers.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    assert_eq!(hash(&place.summary("run")), expected);
    let records = place.json_lines("run/ledger.jsonl");
    assert!(
        records.iter().any(|record| record["record"]["checked"].as_array().is_some_and(|leaves| leaves.len() == 16))
    );
    place.audit("run");
}

/// Scenario: the coordinator is stopped after it has barred a worker, and goes on. Property: the worker is barred still.
#[test]
fn a_barred_worker_is_barred_after_a_restart_too() {
    let place = Place::with_model(DENSE);
    let rounds = 100_000;
    let (mut coordinator, url) = place.coordinator("run", rounds, &CHECKED);
    let workers = ["a", "b"].map(|name| place.worker(&url, name));
    let wrong = wrong_worker::spawn(&url, WRONG);
    coordinator.wait_for_line("barred from the run");
    wrong.join().expect("the wrong worker lives to the end");
    let refused = |url: &str| {
        let Err(status) = FakeWorker::try_join(url, honest_join(WRONG).into()) else { panic!("it was admitted") };
        let refusal = Refusal::of(&status);
        let Some(Refusal::NotAdmitted(protocol::Refusal::Barred { reason })) = refusal else { panic!("{refusal:?}") };
        assert!(reason.contains("computed leaf"), "{reason}");
    };
    refused(&url);
    coordinator.terminate();
    coordinator.end().expect_code(1);
    drop(workers);
    let (coordinator, url) = place.coordinator_again("run", &[]);
    refused(&url);
    coordinator.kill();
}
