//! Tensors exchanged through memory that processes share, over gRPC, and both in one run.
#![cfg(target_os = "linux")]

mod support;

use support::{CONV, DENSE, FakeWorker, Place, hash};

use lockstep_common::protocol::SharedMemory;
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::{Access, Region};
use lockstep_proto::convert::{Hello, node_slot};

const ROUNDS: u32 = 12;

/// Scenario: a model is trained in one process, by workers that share memory with the coordinator, and by workers that
/// do not. Property: `params_sha256` is the same each time.
#[test]
fn how_tensors_travel_changes_no_bit() {
    for model in [DENSE, CONV] {
        let place = Place::with_model(model);
        let expected = hash(&place.train("in-process", ROUNDS, &[]));
        for workers in ["2", "3"] {
            let shared = place.train(&format!("shared-{workers}"), ROUNDS, &["--workers", workers]);
            assert_eq!(hash(&shared), expected, "{workers} workers, shared memory");
            let without = ["--workers", workers, "--set", "cluster.shared_memory=false"];
            let over_grpc = place.train(&format!("grpc-{workers}"), ROUNDS, &without);
            assert_eq!(hash(&over_grpc), expected, "{workers} workers, gRPC");
        }
    }
}

/// Scenario: of three workers, one does not want shared memory. Property: the list of workers says how each is connected,
/// and the hash is that of any other run.
#[test]
fn a_run_can_mix_both_ways() {
    let place = Place::with_model(DENSE);
    let expected = hash(&place.train("expected", ROUNDS, &[]));
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &["--min-workers", "3"]);
    let near = place.worker(&url, "near");
    coordinator.wait_for_line("joined: near");
    let worker = ["worker", "--coordinator", &url, "--threads", "1"];
    let far = place.start(&[&worker[..], &["--name", "far", "--no-shared-memory"]].concat());
    coordinator.wait_for_line("joined: far");
    // The run waits for the third worker, and the first two need no time but to say hello.
    let connected = |listed: &str, name: &str, way: &str| {
        listed.lines().any(|line| line.split_whitespace().any(|word| word == name) && line.contains(way))
    };
    loop {
        let listed = place.succeed(&["monitor", &url, "--workers"]);
        assert!(!connected(&listed, "far", " memory "), "{listed}");
        if connected(&listed, "near", " memory ") && connected(&listed, "far", " grpc ") {
            break;
        }
    }
    let last = place.worker(&url, "last");
    coordinator.end().expect_code(0);
    [near, far, last].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    assert_eq!(hash(&place.summary("run")), expected);
    place.audit("run");
}

/// Scenario: of three workers, two are killed in the middle of a run; from the third round on, each of them reads two
/// versions in shared memory. Property: the last one finishes, and the hash is the same.
#[test]
fn killed_workers_leave_the_memory_usable() {
    const LONG: u32 = 60;
    let place = Place::with_model(DENSE);
    let expected = hash(&place.train("expected", LONG, &[]));
    // The third one is missing at first, and the run waits for it.
    let (mut coordinator, url) = place.coordinator("run", LONG, &["--set", "cluster.start_workers=3"]);
    let mut doomed = ["a", "b"].map(|name| place.worker(&url, name)).into_iter();
    coordinator.wait_for_line("joined: ");
    coordinator.wait_for_line("joined: ");
    let last = place.worker(&url, "last");
    let mut monitor = place.start(&["monitor", &url, "--json", "--from-round", "0"]);
    for round in [7, 11] {
        monitor.wait_for_line(&format!("\"round\":{round},"));
        doomed.next().expect("two workers").kill();
    }
    coordinator.end().expect_code(0);
    last.end().expect_code(0);
    monitor.end().expect_code(0);
    assert_eq!(hash(&place.summary("run")), expected);
    place.audit("run");
}

/// Scenario: a member opens the memory that it is offered, hands in a gradient of a node that it never announced, and then
/// a slot that does not exist; another speaks of slots without having opened anything. Property: the gradient is dropped;
/// each is put out with the reason; and a real worker does the run, whose hash is the right one.
#[test]
fn slots_that_cannot_be_put_the_member_out() {
    let place = Place::with_model(DENSE);
    let expected = hash(&place.train("expected", ROUNDS, &[]));
    let (mut coordinator, url) = place.coordinator("run", ROUNDS, &[]);
    let parameters = 2 * (784 * 170) + 784 + 2 * 170 + 2 * (170 * 17) + 17;
    let node = NodeId::leaf(0);

    let mut fake = FakeWorker::join(&url, 1);
    let offered = fake.welcome.shared_memory.as_deref().expect("this is one host");
    let SharedMemory { parameters: read, gradients: written } = *offered;
    let versions = Region::open(read, parameters, Access::Read).expect("readable memory");
    assert!(Region::open(read, parameters, Access::Write).is_err(), "nobody else may write parameters");
    let gradients = Region::open(written, parameters, Access::Write).expect("writable memory");
    assert!(versions.offer().slots >= 3 && gradients.offer().slots >= 2);
    let hello = |fake: &FakeWorker| Hello { member: fake.welcome.member, shares_memory: true }.into();
    let exchange = fake.exchange(vec![hello(&fake), node_slot(0, node, 1), node_slot(0, node, 4)]);
    let left = coordinator.wait_for_line("w1#1 left: ");
    assert!(left.contains("slot 4 was handed in"), "{left}");
    drop(exchange);

    let mut fake = FakeWorker::join(&url, 2);
    let exchange = fake.exchange(vec![fake.hello(), node_slot(0, node, 0)]);
    let left = coordinator.wait_for_line("w2#1 left: ");
    assert!(left.contains("memory that is not shared"), "{left}");
    drop(exchange);

    let worker = place.worker(&url, "real");
    coordinator.end().expect_code(0);
    worker.end().expect_code(0);
    assert_eq!(hash(&place.summary("run")), expected);
}
