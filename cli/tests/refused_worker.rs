//! Workers that must not take part, and members that do wrong: each is turned away with its reason, and the run goes on.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::pin::Pin;

use lockstep_common::hash::Digest;
use lockstep_common::protocol::{self, MemberId, ShardRef, Split};
use lockstep_common::reduce::NodeId;
use lockstep_proto::convert::{ShardRequest, node_chunk};
use lockstep_proto::status::Refusal;
use lockstep_proto::transport;
use lockstep_proto::v1::session_request::Message;
use lockstep_proto::v1::worker_service_client::WorkerServiceClient;
use lockstep_proto::v1::worker_service_server::WorkerService;
use lockstep_proto::v1::{self, exchange_request};
use support::fake_worker::{connect, honest_join, runtime, soon};
use support::{DENSE, FakeWorker, Place, Running, hash};
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status, Streaming};

/// Rounds of every run here.
const ROUNDS: u32 = 4;

/// A coordinator that waits for a worker, and the hash that its run must have.
struct Scene {
    place: Place,
    coordinator: Running,
    url: String,
    expected: String,
}

impl Scene {
    fn new() -> Self {
        let place = Place::with_model(DENSE);
        let expected = hash(&place.train("expected", ROUNDS, &[]));
        let (coordinator, url) = place.coordinator("run", ROUNDS, &[]);
        Self { place, coordinator, url, expected }
    }

    /// Lets a real worker do the run, and checks the result. So many other workers were admitted and lost before.
    fn finish(self, strangers: u64) {
        let Self { place, coordinator, url, expected } = self;
        let worker = place.worker(&url, "real");
        coordinator.end().expect_code(0);
        worker.end().expect_code(0);
        let summary = place.summary("run");
        assert_eq!(hash(&summary), expected);
        assert_eq!((&summary["workers_seen"], &summary["workers_lost"]), (&(strangers + 1).into(), &strangers.into()));
        let proof = place.audit("run");
        assert!(proof.contains(&format!("computed by 1 member: w{}#1", strangers + 1)), "{proof}");
    }
}

/// A join that is honest but for what `spoil` does to it.
fn join(spoil: impl FnOnce(&mut v1::Join)) -> v1::SessionRequest {
    let mut request = v1::SessionRequest::from(honest_join(1));
    match &mut request.message {
        Some(Message::Join(join)) => spoil(join),
        other => panic!("{other:?} is no join"),
    }
    request
}

#[test]
fn joins_that_cannot_be_are_refused_with_the_reason() {
    let scene = Scene::new();
    let check = |first: v1::SessionRequest, code: Code, parts: &[&str]| {
        let Err(status) = FakeWorker::try_join(&scene.url, first) else { panic!("{parts:?} was admitted") };
        assert_eq!(status.code(), code, "{status}");
        let message = status.message();
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} are not in {message}");
        Refusal::of(&status)
    };
    let own = env!("CARGO_PKG_VERSION");
    let refusal = check(
        join(|join| join.version = "0.0.9".to_owned()),
        Code::FailedPrecondition,
        &["version mismatch", own, "0.0.9", "use the same release"],
    );
    let version = protocol::Refusal::Version { run: own.to_owned(), worker: "0.0.9".to_owned() };
    assert_eq!(refusal, Some(Refusal::NotAdmitted(version)));

    let other = Digest(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
    let refusal = check(
        join(|join| join.fingerprint = other.0.to_be_bytes().to_vec().into()),
        Code::FailedPrecondition,
        &["numerics fingerprint mismatch", &honest_join(1).fingerprints.f32.to_string(), &other.to_string()],
    );
    assert!(
        matches!(refusal, Some(Refusal::NotAdmitted(protocol::Refusal::Fingerprint { worker, .. })) if worker == other)
    );

    let malformed = |first: v1::SessionRequest, parts: &[&str]| {
        let refusal = check(first, Code::InvalidArgument, parts);
        assert!(matches!(refusal, Some(Refusal::Malformed { .. })), "{refusal:?}");
    };
    malformed(join(|join| join.fingerprint = vec![1, 2, 3].into()), &["Join.fingerprint", "16 bytes, not 3"]);
    malformed(join(|join| join.threads = 0), &["Join.threads", "is 0"]);
    malformed(join(|join| join.name = "x".repeat(20_000)), &["Join.name", "20000", "16384"]);
    malformed(v1::SessionRequest { message: None }, &["SessionRequest.message", "is missing"]);
    let heartbeat = v1::SessionRequest { message: Some(Message::Heartbeat(v1::Heartbeat {})) };
    malformed(heartbeat, &["SessionRequest", "expected a join"]);
    scene.finish(0);
}

/// Scenario: things that are no gRPC at all come to the port, one of which stays; then a message larger than any.
/// Property: the run does not care.
#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let scene = Scene::new();
    let address = scene.url.trim_start_matches("http://");
    let mut noise = vec![b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), vec![0; 4096], vec![0xff; 100_000]];
    noise.push(
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), (0..5000).map(|i| (i * 31 % 256) as u8).collect()].concat(),
    );
    for bytes in noise {
        let mut stream = TcpStream::connect(address).expect("a connection");
        // The coordinator may hang up at any time.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let silent = TcpStream::connect(address).expect("a connection");

    let too_large = join(|join| join.name = "x".repeat(3 << 20));
    let status = runtime().block_on(soon("an answer", async {
        let channel = Endpoint::from_shared(scene.url.clone()).unwrap().connect().await.expect("a connection");
        // Not the project's client, whose own limit would keep it from sending this.
        WorkerServiceClient::new(channel).session(tokio_stream::once(too_large)).await.map(|_| ()).unwrap_err()
    }));
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    assert!(status.message().contains("1114112"), "the limit is named: {status}");
    scene.finish(0);
    drop(silent);
}

/// Scenario: somebody who never joined says hello to an exchange and asks for shards; a member asks for a shard that
/// does not exist. Property: both are told what is wrong.
#[test]
fn strangers_get_no_data() {
    let scene = Scene::new();
    let stranger = MemberId { worker: 7, incarnation: 1 };
    let not_a_member = |status: Status| {
        assert_eq!(status.code(), Code::Aborted, "{status}");
        assert_eq!(Refusal::of(&status), Some(Refusal::NotAMember { member: stranger }));
        assert!(status.message().contains("w7#1 is not a member"), "{status}");
    };
    let shard = |member, shard| {
        let shard = ShardRef { split: Split::Training, shard };
        v1::FetchShardRequest::from(ShardRequest { member, shard })
    };
    runtime().block_on(soon("answers", async {
        let mut client = connect(&scene.url).await;
        let hello = tokio_stream::once(v1::ExchangeRequest::from(stranger));
        not_a_member(client.exchange(hello).await.map(|_| ()).unwrap_err());
        not_a_member(client.fetch_shard(shard(stranger, 0)).await.map(|_| ()).unwrap_err());
    }));
    let member = FakeWorker::join(&scene.url, 1);
    let status = runtime().block_on(soon("an answer", async {
        connect(&scene.url).await.fetch_shard(shard(member.welcome.member, 16)).await.map(|_| ()).unwrap_err()
    }));
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    assert!(status.message().contains("training shard 16") && status.message().contains("16 shards"), "{status}");
    drop(member);
    scene.finish(1);
}

/// A chunk that is right for the first leaf of `node` but for what `spoil` does to it.
fn chunk(node: NodeId, spoil: impl FnOnce(&mut v1::NodeChunk)) -> v1::ExchangeRequest {
    let mut request = node_chunk(0, node, 1, vec![0; 4].into());
    match &mut request.message {
        Some(exchange_request::Message::NodeChunk(chunk)) => spoil(chunk),
        other => panic!("{other:?} is no chunk"),
    }
    request
}

/// Scenario: one member after the other is the only one, is given round 0, announces a leaf as it should, and sends
/// something that cannot be. Property: each is put out, the reason is on record with its numbers, and in the end a real
/// worker does the run, whose hash is the right one.
#[test]
fn members_that_send_wrong_data_are_put_out() {
    let mut scene = Scene::new();
    let mut process = 0;
    let mut check = |wrong: &dyn Fn(NodeId) -> v1::ExchangeRequest, parts: &[&str]| {
        process += 1;
        let mut fake = FakeWorker::join(&scene.url, process);
        let assignment = fake.next_assignment();
        let (node, announcement) = fake.announce_first_leaf(&assignment);
        let exchange = fake.exchange(vec![fake.hello(), announcement, wrong(node)]);
        fake.wait_for_end();
        let left = scene.coordinator.wait_for_line(&format!("w{process}#1 left: "));
        assert!(parts.iter().all(|part| left.contains(part)), "{parts:?} are not in {left}");
        drop(exchange);
    };
    check(&|node| chunk(node, |chunk| chunk.checksum ^= 1), &["NodeChunk.checksum", "was announced"]);
    check(&|node| chunk(node, |chunk| chunk.data = vec![1; 4].into()), &["NodeChunk.checksum", "was announced"]);
    check(&|node| node_chunk(0, node, 2, vec![0; 4].into()), &["chunk 2 does not exist", "have 2"]);
    check(&|node| node_chunk(0, node, u32::MAX, vec![0; 4].into()), &["chunk 4294967295 does not exist"]);
    check(&|node| node_chunk(0, node, 0, vec![0; 40].into()), &["chunk 0 has 262144 floats, 10 were sent"]);
    check(&|node| node_chunk(0, node, 0, vec![0; 7].into()), &["NodeChunk.data", "7 bytes"]);
    check(&|node| node_chunk(0, node, 0, vec![0; (1 << 20) + 4].into()), &["NodeChunk.data", "1048580", "1048576"]);
    check(&|node| chunk(node, |chunk| chunk.node = None), &["NodeChunk.node", "is missing"]);
    check(&|_| MemberId { worker: 1, incarnation: 1 }.into(), &["a second hello"]);
    check(&|_| v1::ExchangeRequest { message: None }, &["ExchangeRequest.message", "is missing"]);
    scene.finish(process);
}

/// Scenario: members announce leaves that they did not compute as they should. Property: as above, and the member itself
/// is told the reason.
#[test]
fn members_that_announce_wrong_work_are_put_out() {
    let mut scene = Scene::new();
    let mut process = 0;
    let mut check = |spoil: &dyn Fn(&mut v1::Announce), part: &str| {
        process += 1;
        let mut fake = FakeWorker::join(&scene.url, process);
        let assignment = fake.next_assignment();
        let (_, mut request) = fake.announce_first_leaf(&assignment);
        match &mut request.message {
            Some(exchange_request::Message::Announce(announce)) => spoil(announce),
            other => panic!("{other:?} is no announcement"),
        }
        let exchange = fake.exchange(vec![fake.hello(), request]);
        let told = fake.wait_for_end();
        assert!(told.contains(part), "{part:?} is not in {told}");
        let left = scene.coordinator.wait_for_line(&format!("w{process}#1 left: "));
        assert!(left.contains(part), "{part:?} is not in {left}");
        drop(exchange);
    };
    let other_digest = vec![7; 16];
    check(&|announce| announce.digests = other_digest.clone().into(), "leaf 0 was computed from other samples");
    check(&|announce| announce.samples += 1, "has 4 samples, 5 were reported");
    check(&|announce| announce.node = Some(v1::Node { level: 0, index: 16 }), "does not exist in a tree of 16 shards");
    scene.finish(process);
}

/// A coordinator of another version.
struct OtherVersion;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for OtherVersion {
    type SessionStream = Answers<v1::SessionResponse>;
    type ExchangeStream = Answers<v1::ExchangeResponse>;
    type FetchShardStream = Answers<v1::FetchShardResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let first = request.into_inner().message().await?;
        let Some(Message::Join(join)) = first.and_then(|first| first.message) else {
            return Err(Status::invalid_argument("a join must come first"));
        };
        let refusal = protocol::Refusal::Version { run: "9.9.9".to_owned(), worker: join.version };
        Err(Refusal::from(refusal).into())
    }

    async fn exchange(
        &self,
        _: Request<Streaming<v1::ExchangeRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        Err(Status::unimplemented("nobody gets here"))
    }

    async fn fetch_shard(&self, _: Request<v1::FetchShardRequest>) -> Result<Response<Self::FetchShardStream>, Status> {
        Err(Status::unimplemented("nobody gets here"))
    }
}

/// Scenario: the program's own worker comes to a coordinator of another version. Property: it does not try again, says
/// both versions, and exits with 2.
#[test]
fn a_refused_worker_says_why_and_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("a non-blocking listener");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let runtime = runtime();
    let server = runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        let workers = transport::worker_server(OtherVersion);
        transport::server().add_service(workers).serve_with_incoming(TcpListenerStream::new(listener)).await
    });
    let said = Place::new().run(&["worker", "--coordinator", &url]).expect_code(2).stderr;
    server.abort();
    assert!(said.contains("refused this worker: version mismatch"), "{said}");
    assert!(said.contains("9.9.9") && said.contains(env!("CARGO_PKG_VERSION")), "{said}");
}
