//! Certificates and tokens between real processes: who comes in, who does not, and what each is told.

mod support;

use std::fs;

use lockstep_proto::limits::MIN_TOKEN_BYTES;
use support::fake_worker::{connect, honest_join, runtime, soon};
use support::{DENSE, Ended, FakeWorker, Place, Running, TINY, hash};
use tonic::Code;

const ROUNDS: u32 = 12;

/// A place with certificates and tokens in `certs`, and those of somebody else in `other`.
fn secured(model: &str) -> Place {
    let place = Place::with_model(model);
    place.succeed(&["certs", "--out", "certs", "--host", "lockhost"]);
    place.succeed(&["certs", "--out", "other"]);
    place
}

const TLS: [&str; 4] = ["--tls-cert", "certs/coordinator.crt", "--tls-key", "certs/coordinator.key"];
const CLIENTS: [&str; 2] = ["--tls-client-ca", "certs/ca.crt"];
const TOKENS: [&str; 6] = [
    "--join-token-file",
    "certs/join.token",
    "--watch-token-file",
    "certs/watch.token",
    "--control-token-file",
    "certs/control.token",
];
const CA: [&str; 2] = ["--tls-ca", "certs/ca.crt"];
const IDENTITY: [&str; 4] = ["--tls-cert", "certs/worker.crt", "--tls-key", "certs/worker.key"];
const JOIN: [&str; 2] = ["--token-file", "certs/join.token"];
const WATCH: [&str; 2] = ["--token-file", "certs/watch.token"];
const CONTROL: [&str; 2] = ["--token-file", "certs/control.token"];

fn worker(place: &Place, url: &str, name: &str, more: &[&[&str]]) -> Running {
    let own = ["worker", "--coordinator", url, "--name", name, "--threads", "1"];
    place.start(&[&own[..], &more.concat()].concat())
}

/// Scenario: a run with TLS, certificates of clients and tokens, one worker, a monitor. Property: the hash is that of a
/// run in one process, tensors travel through shared memory all the same, and no token stands in anything written.
#[test]
fn a_secured_cluster_trains_the_same_model() {
    let place = secured(DENSE);
    let expected = hash(&place.train("expected", ROUNDS, &[]));
    let more = [&TLS[..], &CLIENTS, &TOKENS, &["--min-workers", "2"]].concat();
    let (mut coordinator, url) = place.coordinator_with("run", ROUNDS, &more, &[("LOCKSTEP_LOG", "trace,h2=trace")]);
    assert!(url.starts_with("https://"), "{url}");
    let first = worker(&place, &url, "first", &[&CA, &IDENTITY, &JOIN]);
    coordinator.wait_for_line("joined: first");
    let mut listed = String::new();
    // The list is made anew every few milliseconds.
    while !listed.contains("memory") {
        let own = ["monitor", &url, "--workers"];
        listed = place.succeed(&[&own[..], &CA, &IDENTITY, &WATCH].concat());
    }
    let own = ["monitor", &url, "--json", "--from-round", "0"];
    let watching = place.start(&[&own[..], &CA, &IDENTITY, &CONTROL].concat());
    let second = worker(&place, &url, "second", &[&CA, &IDENTITY, &JOIN]);
    let ended = [coordinator.end(), first.end(), second.end()].map(|ended| ended.expect_code(0));
    assert_eq!(hash(&place.summary("run")), expected);
    place.audit("run");
    let watched = watching.end();
    let mut written: String =
        ended.iter().chain([&watched]).map(|ended| format!("{}{}", ended.stdout, ended.stderr)).collect();
    for entry in fs::read_dir(place.file("run")).expect("the run's directory") {
        let path = entry.expect("an entry").path();
        written.push_str(&String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()));
    }
    for name in ["join", "watch", "control"] {
        let token = place.read(&format!("certs/{name}.token"));
        assert!(!written.contains(token.trim()), "the {name} token was written somewhere");
    }
}

/// Scenario: workers and monitors with wrong certificates, names, tokens and addresses come to a coordinator. Property:
/// each ends with 2 and is told what is wrong; the run is that of the one who has everything.
#[test]
fn who_may_not_come_is_told_why() {
    let place = secured(TINY);
    let expected = hash(&place.train("expected", ROUNDS, &[]));
    let (coordinator, url) = place.coordinator("run", ROUNDS, &[&TLS[..], &CLIENTS, &TOKENS].concat());
    let plain = url.replace("https://", "http://");
    let told = |ended: Ended, parts: &[&str]| {
        let said = ended.expect_code(2).stderr;
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} are not in {said}");
    };
    let check = |url: &str, more: &[&[&str]], parts: &[&str]| told(worker(&place, url, "wrong", more).end(), parts);
    check(&url, &[&JOIN], &["invalid peer certificate", "--tls-ca"]);
    check(&url, &[&["--tls-ca", "other/ca.crt"], &JOIN], &["invalid peer certificate", "--tls-ca"]);
    let other_name = ["--tls-name", "elsewhere.example"];
    check(&url, &[&CA, &IDENTITY, &JOIN, &other_name], &["not valid for name", "elsewhere.example", "lockhost"]);
    check(&url, &[&CA, &JOIN], &["CertificateRequired", "--tls-cert"]);
    let foreign = ["--tls-cert", "other/worker.crt", "--tls-key", "other/worker.key"];
    check(&url, &[&CA, &foreign, &JOIN], &["alert", "--tls-cert"]);
    check(&url, &[&CA, &IDENTITY], &["joining needs the join token", "--token-file", "LOCKSTEP_JOIN_TOKEN"]);
    let other_token = ["--token-file", "other/join.token"];
    check(&url, &[&CA, &IDENTITY, &other_token], &["joining needs the join token", "the one given is not it"]);
    check(&url, &[&CA, &IDENTITY, &WATCH], &["joining needs the join token", "another token was given"]);
    check(&plain, &[&JOIN], &["https://"]);
    check(&plain, &[&CA, &JOIN], &["certificates need an https:// address"]);

    let monitor = |more: &[&[&str]]| place.run(&[&["monitor", &url, "--workers"][..], &more.concat()].concat());
    told(monitor(&[&CA, &IDENTITY, &JOIN]), &["watching needs the watch token", "another token was given"]);
    told(monitor(&[&CA, &IDENTITY]), &["watching needs the watch token", "LOCKSTEP_WATCH_TOKEN"]);
    // The alert may be lost, not the hint.
    told(monitor(&[&CA]), &["--tls-cert"]);
    let stop = |more: &[&[&str]]| place.run(&[&["stop", &url][..], &more.concat()].concat());
    told(stop(&[&CA, &IDENTITY, &WATCH]), &["controlling the run needs the control token"]);

    let right = worker(&place, &url, "right", &[&CA, &["--tls-name", "lockhost"], &IDENTITY, &JOIN]);
    coordinator.end().expect_code(0);
    right.end().expect_code(0);
    let summary = place.summary("run");
    assert_eq!(hash(&summary), expected);
    assert_eq!(summary["workers_seen"], 1);
}

/// Scenario: a worker that speaks TLS comes to a coordinator that does not. Property: it says so and ends.
#[test]
fn tls_to_a_plain_port_is_named() {
    let place = secured(TINY);
    let (_coordinator, url) = place.coordinator("run", ROUNDS, &[]);
    let said = worker(&place, &url.replace("http://", "https://"), "wrong", &[&CA]).end().expect_code(2).stderr;
    assert!(said.contains("does not speak TLS"), "{said}");
}

/// Scenario: in the middle of a run, the coordinator's certificate file is broken, then it, its key and the join token
/// are replaced by those of another authority. Property: while the files are broken, those before stay in force; then
/// the new ones are; members stay members; the hash is the right one.
#[test]
fn certificates_and_tokens_are_renewed_without_a_restart() {
    let place = secured(DENSE);
    let expected = hash(&place.train("expected", ROUNDS, &[]));
    let more = [&TLS[..], &TOKENS, &["--min-workers", "3"]].concat();
    let (mut coordinator, url) = place.coordinator_with("run", ROUNDS, &more, &[("LOCKSTEP_LOG", "info")]);
    let first = worker(&place, &url, "first", &[&CA, &JOIN]);
    coordinator.wait_for_line("joined: first");

    place.write("certs/coordinator.crt", "half a certif");
    let said = coordinator.wait_for_line("the ones before stay in force");
    assert!(said.contains("certs/coordinator.crt has no certificate"), "{said}");
    let second = worker(&place, &url, "second", &[&CA, &JOIN]);
    coordinator.wait_for_line("joined: second");

    let new_token = place.read("other/join.token");
    place.write("certs/join.token", &new_token);
    place.write("certs/coordinator.key", place.read("other/coordinator.key"));
    place.write("certs/coordinator.crt", place.read("other/coordinator.crt"));
    coordinator.wait_for_line("new certificates and tokens are in force");
    let said = worker(&place, &url, "late", &[&CA, &JOIN]).end().expect_code(2).stderr;
    assert!(said.contains("invalid peer certificate"), "{said}");
    let third = worker(&place, &url, "third", &[&["--tls-ca", "other/ca.crt", "--token-file", "other/join.token"]]);
    coordinator.end().expect_code(0);
    [first, second, third].into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
    let summary = place.summary("run");
    assert_eq!(hash(&summary), expected);
    assert_eq!((&summary["workers_seen"], &summary["workers_lost"]), (&3.into(), &0.into()));
}

/// Scenario: a coordinator is to listen on all addresses with some of what that needs. Property: it refuses, says what
/// is missing and how to get it; `--insecure` has it listen, and tokens count all the same.
#[test]
fn listening_off_loopback_needs_tls_and_a_token() {
    let place = secured(TINY);
    let coordinator = |more: &[&[&str]]| {
        let own = ["coordinator", "--listen", "0.0.0.0:0", "--model", "model.toml", "--out", "run"];
        place.start(&[&own[..], &more.concat()].concat())
    };
    let refused = |more: &[&[&str]], parts: &[&str]| {
        let said = coordinator(more).end().expect_code(2).stderr;
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} are not in {said}");
        assert!(!place.file("run").exists(), "nothing is written");
    };
    refused(
        &[],
        &["TLS and a join token are missing", "lockstep certs", "--tls-cert", "--join-token-file", "--insecure"],
    );
    refused(&[&JOIN_FILE], &["TLS is missing", "lockstep certs", "--tls-cert"]);
    refused(&[&TLS], &["a join token is missing", "lockstep certs", "--join-token-file"]);
    refused(&[&WATCH_FILE, &["--insecure"]], &["none to join", "--join-token-file"]);
    refused(&[&TLS, &["--join-token-file", "certs/none.token"]], &["cannot read certs/none.token"]);
    refused(&[&TLS, &JOIN_FILE, &["--watch-token-file", "certs/join.token"]], &["are the same"]);
    let mismatch = ["--tls-cert", "certs/coordinator.crt", "--tls-key", "other/coordinator.key"];
    refused(&[&mismatch, &JOIN_FILE], &["cannot serve with certs/coordinator.crt and other/coordinator.key"]);

    let mut open = coordinator(&[&["--insecure"], &JOIN_FILE]);
    let line = open.wait_for_line("lockstep worker --coordinator ");
    let port = line.rsplit(':').next().expect("a port");
    let url = format!("http://127.0.0.1:{port}");
    let said = worker(&place, &url, "stranger", &[]).end().expect_code(2).stderr;
    assert!(said.contains("joining needs the join token"), "{said}");
    let said = place.run(&["monitor", &url]).expect_code(2).stderr;
    assert!(said.contains("watching is closed") && said.contains("LOCKSTEP_WATCH_TOKEN"), "{said}");
    worker(&place, &url, "member", &[&JOIN]).wait_for_line("joined run ");
    open.kill();
    let mut secure = place.start(
        &[&["coordinator", "--listen", "0.0.0.0:0", "--model", "model.toml", "--out", "tls"], &TLS[..], &JOIN_FILE]
            .concat(),
    );
    secure.wait_for_line("lockstep worker --coordinator https://0.0.0.0:");
}

const JOIN_FILE: [&str; 2] = ["--join-token-file", "certs/join.token"];
const WATCH_FILE: [&str; 2] = ["--watch-token-file", "certs/watch.token"];

/// Scenario: tokens that cannot be, or that would travel to another host unencrypted. Property: nothing is tried.
#[test]
fn a_token_is_checked_before_it_travels() {
    let place = secured(TINY);
    let with = |token: &str, url: &str| {
        let arguments = ["worker", "--coordinator", url, "--patience", "0"];
        let worker = Running::start_with(place.path(), &arguments, &[("LOCKSTEP_JOIN_TOKEN", token)]);
        worker.end().expect_code(2).stderr
    };
    let short = "x".repeat(MIN_TOKEN_BYTES - 1);
    let said = with(&short, "127.0.0.1:9");
    assert!(said.contains("LOCKSTEP_JOIN_TOKEN") && said.contains("at least 16 characters"), "{said}");
    assert!(!said.contains(&short), "{said}");
    let said = with("a-long-enough-token", "http://192.0.2.1:7400");
    assert!(said.contains("would travel unencrypted") && said.contains("--insecure"), "{said}");
}

/// Scenario: an operator lets a worker go and stops the run, by tokens; then the same without any. Property: the worker
/// drains, the run ends as stopped with the reason, and goes on later.
#[test]
fn operators_drain_workers_and_stop_runs() {
    let place = secured(DENSE);
    for (out, coordinator_options, join, control) in [
        ("with", [&TLS[..], &TOKENS].concat(), [&CA[..], &JOIN].concat(), [&CA[..], &CONTROL].concat()),
        ("without", vec![], vec![], vec![]),
    ] {
        let more = [&coordinator_options[..], &["--min-workers", "2"]].concat();
        let (mut coordinator, url) = place.coordinator(out, ROUNDS, &more);
        let command = |words: &[&str]| place.run(&[words, &control].concat());
        let said = command(&["drain", &url, "nobody"]).expect_code(2).stderr;
        assert!(said.contains("there is no worker \"nobody\""), "{said}");
        let twins = ["twin", "twin"].map(|name| {
            let worker = worker(&place, &url, name, &[&join]);
            coordinator.wait_for_line("joined: twin");
            worker
        });
        let said = command(&["drain", &url, "twin"]).expect_code(2).stderr;
        assert!(said.contains("2 workers are called \"twin\"") && said.contains("w1#1, w2#1"), "{said}");
        command(&["drain", &url, "w2#1"]).expect_code(0);
        coordinator.wait_for_line("w2#1 left: drained");
        command(&["stop", &url, "--reason", "the power goes off"]).expect_code(0);
        let said = coordinator.end().expect_code(1).stderr;
        assert!(said.contains("the power goes off"), "{said}");
        twins.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
        assert_eq!(place.summary(out)["outcome"], "stopped");
    }
}

/// Scenario: while `train --workers 1` runs, somebody else of this machine finds the port and tries to join. Property:
/// the stranger is refused, and the token does not stand in the worker's command line.
#[cfg(target_os = "linux")]
#[test]
fn nobody_else_joins_a_run_of_this_machine() {
    let place = Place::with_model(TINY);
    let mut training =
        place.start(&support::train_arguments("run", 1_000_000, &["--workers", "1", "--epochs", "10000"]));
    training.wait_for_line("\"event\":\"joined\"");
    let id = training.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("the children of a process");
    let command = |child: &str| fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
    let command = children.split_whitespace().map(command).find(|line| line.starts_with(b"/")).expect("a worker");
    let words: Vec<String> =
        command.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into()).collect();
    let url = words.iter().find(|word| word.starts_with("http://127.0.0.1:")).expect("its coordinator's address");
    assert!(words.iter().all(|word| word.len() < 64 || word.starts_with('/')), "{words:?}");
    let Err(status) = FakeWorker::try_join(url, honest_join(7).into()) else { panic!("a stranger was admitted") };
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    training.kill_all();
}

/// Scenario: somebody without any token asks for health, which needs none, and for anything else. Property: health is
/// told, and all the rest is refused.
#[test]
fn probes_need_no_token() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    let place = secured(TINY);
    let (_coordinator, url) = place.coordinator("run", ROUNDS, &TOKENS);
    runtime().block_on(soon("answers", async {
        let channel = tonic::transport::Endpoint::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let service = "lockstep.v1.WorkerService".to_owned();
        let answer = HealthClient::new(channel).check(HealthCheckRequest { service }).await.expect("an answer");
        assert_eq!(answer.into_inner().status, 1, "serving");
        let mut workers = connect(&url).await;
        let request = lockstep_proto::v1::FetchShardRequest::default();
        let status = workers.fetch_shard(request).await.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    }));
}

/// Scenario: certificates are made twice in one place, and once more by the same authority. Property: nothing is
/// overwritten; secrets can be read by their owner only; what the authority made later is trusted.
#[test]
fn certificates_are_never_overwritten() {
    let place = secured(TINY);
    let said = place.run(&["certs", "--out", "certs"]).expect_code(2).stderr;
    assert!(said.contains("is there already") && said.contains("--ca certs"), "{said}");
    let said = place.run(&["certs", "--out", "more", "--host", "two words"]).expect_code(2).stderr;
    assert!(said.contains("neither a host name nor an IP address") && !place.file("more").exists(), "{said}");
    #[cfg(unix)]
    for name in ["ca.key", "coordinator.key", "worker.key", "join.token", "watch.token", "control.token"] {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(place.file("certs").join(name)).expect(name).permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    place.succeed(&["certs", "--out", "renewed", "--ca", "certs"]);
    assert_eq!(place.read("renewed/ca.crt"), place.read("certs/ca.crt"));
    assert!(!place.file("renewed/ca.key").exists());
    let renewed = ["--tls-cert", "renewed/coordinator.crt", "--tls-key", "renewed/coordinator.key"];
    let (coordinator, url) = place.coordinator("run", ROUNDS, &renewed);
    let worker = worker(&place, &url, "of before", &[&CA]);
    coordinator.end().expect_code(0);
    worker.end().expect_code(0);
}
