//! Whoever sends anything at all to a real coordinator, while an honest worker waits or trains. Each time, nothing
//! panics, the coordinator's memory and its log stay bounded, and the honest run ends with the hash of a calm one.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::thread;

use lockstep_common::protocol::{FromWorker, NodeReport, Work};
use lockstep_common::reduce::NodeId;
use lockstep_proto::convert::{Upward, node_chunk};
use lockstep_proto::v1;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::fake_worker::{announcement, runtime};
use support::raw_http2::{
    CONTINUATION, DATA, END_HEADERS, HEADERS, PING, PREFACE, RST_STREAM, Raw, SETTINGS, WINDOW_UPDATE, call, frame,
    literal, message_of,
};
use support::{DENSE, FakeWorker, Place, Running, TINY, hash};

const ROUNDS: u32 = 12;

/// What a coordinator's memory may come to, in KiB. At rest it has some 60 MiB, 8 of them images; a peer may leave 16 MiB
/// unread in a connection.
const MOST_MEMORY_KIB: u64 = 200 * 1024;

/// Warnings that a coordinator may log in such a test, which has seconds. Whoever makes it log something for each
/// connection can fill a disk.
const MOST_WARNINGS: usize = 32;

const SESSION: &str = "/lockstep.v1.WorkerService/Session";

/// A coordinator that lacks a second worker, and one that has joined.
struct Scene {
    place: Place,
    coordinator: Running,
    steady: Running,
    url: String,
    expected: String,
    token: Option<&'static str>,
}

const TOKEN: &str = "a-token-of-the-hostile-suite";

impl Scene {
    fn new(model: &str, token: Option<&'static str>, more: &[&str]) -> Self {
        let place = Place::with_model(model);
        let expected = hash(&place.train("expected", ROUNDS, &[]));
        // It stays until its memory has been looked at.
        let more = [&["--stay", "--min-workers", "2"], more].concat();
        let variables = variables(token);
        let (mut coordinator, url) = place.coordinator_with("run", ROUNDS, &more, &variables);
        let steady = honest(&place, &url, "steady", token);
        coordinator.wait_for_line("joined: steady");
        Self { place, coordinator, steady, url, expected, token }
    }

    fn address(&self) -> SocketAddr {
        self.url.trim_start_matches("http://").parse().expect("an address")
    }

    /// Attacks while the run waits, and again while it goes on.
    fn attack(mut self, attack: impl Fn(SocketAddr) + Send + Sync + Clone + 'static) {
        let address = self.address();
        attack(address);
        check_memory(&self.coordinator);
        let late = honest(&self.place, &self.url, "late", self.token);
        self.coordinator.wait_for_line("joined: late");
        attack(address);
        self.finish(vec![late], 2);
    }

    /// The run ends as it should, with so many workers seen.
    fn finish(self, others: Vec<Running>, seen: u32) {
        let Self { place, mut coordinator, steady, expected, .. } = self;
        coordinator.wait_for_line("still serving");
        check_memory(&coordinator);
        coordinator.terminate();
        let ended = coordinator.end().expect_code(0);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        let warnings = ended.stderr.lines().filter(|line| line.contains(" WARN ")).count();
        assert!(warnings <= MOST_WARNINGS, "{warnings} warnings:\n{}", ended.stderr);
        steady.end().expect_code(0);
        others.into_iter().for_each(|worker| drop(worker.end().expect_code(0)));
        let summary = place.summary("run");
        assert_eq!(hash(&summary), expected);
        assert_eq!(summary["workers_seen"], seen);
        place.audit("run");
    }
}

/// Checks the most memory that a coordinator has had so far.
fn check_memory(coordinator: &Running) {
    let status = fs::read_to_string(format!("/proc/{}/status", coordinator.id())).expect("the process lives");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    let peak: u64 = line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number");
    assert!(peak < MOST_MEMORY_KIB, "the coordinator has had {peak} KiB");
}

fn variables(token: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
    token.map(|token| ("LOCKSTEP_JOIN_TOKEN", token)).into_iter().collect()
}

fn honest(place: &Place, url: &str, name: &str, token: Option<&'static str>) -> Running {
    let arguments = ["worker", "--coordinator", url, "--name", name, "--threads", "1"];
    Running::start_with(place.path(), &arguments, &variables(token))
}

/// Does all of it at the same time, however it ends.
fn at_once(attacks: Vec<Box<dyn FnOnce() -> io::Result<()> + Send>>) {
    let running: Vec<_> = attacks.into_iter().map(thread::spawn).collect();
    for attack in running {
        // An attacker that was cut off has got what it wanted to know.
        drop(attack.join().expect("an attacker does not panic"));
    }
}

/// Scenario: things that are no HTTP/2, and HTTP/2 that breaks its rules or stretches them.
#[test]
fn nonsense_harms_nobody() {
    let noise = |i: u32| i.wrapping_mul(2_654_435_761).to_be_bytes()[0];
    let garbage: Vec<u8> = (0..200_000).map(noise).collect();
    let headers = |stream: u32| frame(HEADERS, END_HEADERS, stream, &call(SESSION, None));
    let bomb: Vec<u8> = (0..200).flat_map(|_| literal("x-filler", &"f".repeat(100))).collect();
    let unfinished = frame(HEADERS, 0, 1, &call(SESSION, None));
    let opened_and_reset = |streams: u32| -> Vec<u8> {
        let one = |i| [headers(2 * i + 1), frame(RST_STREAM, 0, 2 * i + 1, &[0, 0, 0, 8])].concat();
        [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), (0..streams).flat_map(one).collect()].concat()
    };
    let mut sent: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: coordinator\r\n\r\n".to_vec(),
        b"POST /lockstep.v1.WorkerService/Session HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n".to_vec(),
        vec![0; 65_536],
        vec![0xff; 200_000],
        garbage.clone(),
        // The beginning of a TLS handshake.
        [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &garbage[..507]].concat(),
        [PREFACE, &garbage].concat(),
        // A frame of 16 MiB is announced.
        [PREFACE, &[0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1], &garbage].concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[1, 2, 3])].concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]).repeat(20_000)].concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(PING, 0, 0, &[7; 8]).repeat(20_000)].concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(WINDOW_UPDATE, 0, 0, &[0x7f; 4]).repeat(9)].concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &frame(DATA, 0, 5, &[0; 100])].concat(),
        // Headers without end, in one frame and in thousands.
        [
            PREFACE,
            &frame(SETTINGS, 0, 0, &[]),
            &frame(HEADERS, END_HEADERS, 1, &[call(SESSION, None), bomb.clone()].concat()),
        ]
        .concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &unfinished, &frame(CONTINUATION, 0, 1, &bomb[..8000]).repeat(2000)]
            .concat(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[]), &unfinished, &frame(CONTINUATION, 0, 1, &[]).repeat(20_000)].concat(),
        // Streams that are opened and reset at once, and more streams than there may be.
        opened_and_reset(4000),
        [PREFACE.to_vec(), frame(SETTINGS, 0, 0, &[]), (0..4000).flat_map(|i| headers(2 * i + 1)).collect()].concat(),
    ];
    // Each of these connections is ended for its resets, and none may cost a line of the log.
    sent.extend(std::iter::repeat_n(opened_and_reset(200), 3 * MOST_WARNINGS));
    Scene::new(TINY, Some(TOKEN), &[]).attack(move |address| {
        let attack = |bytes: Vec<u8>| -> Box<dyn FnOnce() -> io::Result<()> + Send> {
            Box::new(move || {
                let mut raw = Raw::connect(address)?;
                let sent = raw.send(&bytes);
                raw.finish();
                sent
            })
        };
        at_once(sent.iter().cloned().map(attack).collect());
    });
}

/// Scenario: peers without the token say that messages of gigabytes come, send without end, call what does not exist, and
/// try tokens by the hundred.
#[test]
fn strangers_are_not_listened_to() {
    Scene::new(TINY, Some(TOKEN), &[]).attack(|address| {
        let endless = |path: &'static str,
                       token: Option<&'static str>,
                       length: u32|
         -> Box<dyn FnOnce() -> io::Result<()> + Send> {
            Box::new(move || {
                let mut raw = Raw::open(address)?;
                raw.send(&frame(HEADERS, END_HEADERS, 1, &call(path, token)))?;
                raw.send(&frame(DATA, 0, 1, &message_of(length)))?;
                let piece = frame(DATA, 0, 1, &[0; 16 * 1024]);
                // More than any window takes; not read meanwhile, so that the coordinator must cut it off.
                let sent = (0..512).try_for_each(|_| raw.send(&piece));
                raw.finish();
                sent
            })
        };
        let mut attacks = Vec::new();
        for token in [None, Some("not-the-token-of-this-run"), Some("short"), Some("")] {
            for length in [0, 1, u32::MAX] {
                attacks.push(endless(SESSION, token, length));
            }
        }
        for path in [
            "/lockstep.v1.WorkerService/Exchange",
            "/lockstep.v1.ControlService/StopRun",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/nowhere/Nothing",
            "/",
        ] {
            attacks.push(endless(path, None, u32::MAX));
        }
        attacks.push(Box::new(move || {
            let mut raw = Raw::open(address)?;
            // One after the other on one connection, as fast as the coordinator lets.
            for i in 0..500 {
                raw.send(&frame(
                    HEADERS,
                    END_HEADERS | 1,
                    2 * i + 1,
                    &call(SESSION, Some(&format!("guess-number-{i:06}"))),
                ))?;
            }
            raw.finish();
            Ok(())
        }));
        at_once(attacks);
    });
}

/// Connects from an address of its own, so that it has the limits of a stranger from elsewhere.
fn connect_from(host: u8, to: SocketAddr) -> io::Result<TcpStream> {
    runtime().block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([127, 0, 0, host], 0)))?;
        let stream = socket.connect(to).await?.into_std()?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(support::process::WATCHDOG))?;
        Ok(stream)
    })
}

/// Scenario: two thousand connections from four addresses, which say nothing, half of a greeting, or nothing after it.
/// Property: each is hung up on; meanwhile an honest worker comes in.
#[test]
fn thousands_who_say_nothing_are_sent_away() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("more descriptors");
    let scene = Scene::new(TINY, Some(TOKEN), &[]);
    let address = scene.address();
    let greetings: [Vec<u8>; 4] = [
        Vec::new(),
        PREFACE[..10].to_vec(),
        [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat(),
        [
            PREFACE,
            &frame(SETTINGS, 0, 0, &[]),
            &frame(HEADERS, END_HEADERS, 1, &call("/grpc.health.v1.Health/Watch", None)),
        ]
        .concat(),
    ];
    let crowd: Vec<_> = (2..6u8)
        .map(|host| {
            let greetings = greetings.clone();
            thread::spawn(move || -> Vec<Raw> {
                let come = |i: usize| {
                    let mut raw = Raw(connect_from(host, address).ok()?);
                    raw.send(&greetings[i % greetings.len()]).ok()?;
                    Some(raw)
                };
                (0..500).filter_map(come).collect()
            })
        })
        .collect();
    let crowd: Vec<Raw> = crowd.into_iter().flat_map(|group| group.join().expect("a crowd")).collect();
    assert!(crowd.len() > 1000, "{} came", crowd.len());
    let late = honest(&scene.place, &scene.url, "late", Some(TOKEN));
    for raw in crowd {
        raw.wait_for_end();
    }
    scene.finish(vec![late], 2);
}

/// Scenario: members of the run send parts of gradients before they are announced, of rounds that are over or far away,
/// announce again and again, say one thing and send another, and go. Property: none of it reaches the sum.
#[test]
fn members_that_break_the_order_change_nothing() {
    let scene = Scene::new(DENSE, None, &[]);
    let mut members = 0;
    let mut misbehave = |wrong: &dyn Fn(NodeId, NodeReport) -> Vec<v1::ExchangeRequest>| {
        members += 1;
        let mut fake = FakeWorker::join(&scene.url, members);
        let assignment = fake.next_assignment();
        let (node, report) = announcement(&assignment, 0);
        let mut requests = vec![fake.hello()];
        requests.extend(wrong(node, report));
        let exchange = fake.exchange(requests);
        drop((exchange, fake));
    };
    let poison = || node_bytes(f32::MAX, 1 << 18);
    // Before the announcement, and of a node that others compute.
    misbehave(&|node, _| vec![node_chunk(0, node, 0, poison().into())]);
    misbehave(&|node, _| vec![node_chunk(0, NodeId { level: 1, index: node.index / 2 }, 0, poison().into())]);
    misbehave(&|_, _| vec![node_chunk(0, NodeId { level: 4, index: 0 }, 0, poison().into())]);
    // Of other rounds, announced or not.
    misbehave(&|node, report| {
        let other = |round| NodeReport { work: Work::Gradient { round }, ..report.clone() };
        let mut requests = Vec::new();
        for round in [1, 7, u64::from(u32::MAX), u64::MAX] {
            requests.push((&other(round)).into());
            requests.push(node_chunk(round, node, 0, poison().into()));
        }
        requests
    });
    // Announced a thousand times, with each loss that there is.
    misbehave(&|_, report| {
        let losses = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, f64::MAX];
        (0..1000).map(|i| (&NodeReport { loss: losses[i % losses.len()], ..report.clone() }).into()).collect()
    });
    // Announced, and then chunks that do not exist or have another length.
    misbehave(&|node, report| vec![(&report).into(), node_chunk(0, node, u32::MAX, poison().into())]);
    misbehave(&|node, report| vec![(&report).into(), node_chunk(0, node, 1, poison().into())]);
    misbehave(&|node, report| vec![(&report).into(), node_chunk(0, node, 0, node_bytes(f32::NAN, 3).into())]);
    let late = honest(&scene.place, &scene.url, "late", None);
    scene.finish(vec![late], members as u32 + 2);
}

fn node_bytes(value: f32, floats: usize) -> Vec<u8> {
    value.to_le_bytes().repeat(floats)
}

/// Scenario: a member announces its work and never sends it, reads nothing, and sends signs of life without end and
/// without pause. Property: the others do its work; the run ends.
#[test]
fn a_member_that_only_talks_holds_nothing_up() {
    let scene = Scene::new(DENSE, None, &[]);
    let mut fake = FakeWorker::join(&scene.url, 1);
    let assignment = fake.next_assignment();
    let (_, report) = announcement(&assignment, 0);
    let exchange = fake.exchange(vec![fake.hello(), (&report).into()]);
    let late = honest(&scene.place, &scene.url, "late", None);
    for _ in 0..20_000 {
        let Upward::Session(heartbeat) = FromWorker::Heartbeat.into() else { unreachable!() };
        if fake.try_send(heartbeat).is_err() {
            break;
        }
    }
    scene.finish(vec![late], 3);
    drop((exchange, fake));
}

/// Scenario: the only member of a run sends gradients of nothing but NaN, then of infinity. Property: the coordinator
/// says what is wrong and ends, or goes on; it does not panic, and what it leaves is whole.
#[test]
fn numbers_that_are_none_do_not_bring_the_coordinator_down() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let place = Place::with_model(TINY);
        let (coordinator, url) = place.coordinator("run", 1, &["--set", "data.validation_fraction=0"]);
        let mut fake = FakeWorker::join(&url, 1);
        let floats = fake.welcome.job.model.resolve().expect("a model").layout.parameters();
        let assignment = fake.next_assignment();
        let mut requests = vec![fake.hello()];
        for leaf in 0..assignment.leaves.len() {
            let (node, report) = announcement(&assignment, leaf);
            requests.push((&report).into());
            requests.push(node_chunk(0, node, 0, node_bytes(value, floats).into()));
        }
        let exchange = fake.exchange(requests);
        // The round is looked at once more; an honest worker finds nothing wrong with it.
        assert!(matches!(fake.next_assignment().work, Work::Inspection { round: 0 }));
        drop((exchange, fake));
        check_memory(&coordinator);
        let honest = honest(&place, &url, "honest", None);
        let ended = coordinator.end().expect_code(1);
        assert!(ended.stderr.contains("every leaf is finite when it is computed again"), "{}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
        honest.end().expect_code(0);
        assert_ne!(place.summary("run")["outcome"], "completed", "a model of {value}");
    }
}
