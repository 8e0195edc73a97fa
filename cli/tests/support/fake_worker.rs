//! A worker made by hand: it speaks the protocol, computes nothing, and can be told to do wrong.

use std::time::Duration;

use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::kernel::Isa;
use lockstep_common::protocol::{Assignment, FromWorker, JoinRequest, NodeReport, ToWorker, Welcome};
use lockstep_common::reduce::NodeId;
use lockstep_common::shard::samples_digest;
use lockstep_proto::convert::{SessionDown, SessionReader, Upward};
use lockstep_proto::target::{Connection, Target};
use lockstep_proto::v1::worker_service_client::WorkerServiceClient;
use lockstep_proto::{transport, v1};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::process::WATCHDOG;

/// A member of a run that gives signs of life and does what a test tells it. It is lost when this value is dropped.
pub(crate) struct FakeWorker {
    pub(crate) welcome: Welcome,
    pub(crate) client: WorkerServiceClient<Connection>,
    responses: Streaming<v1::SessionResponse>,
    reader: SessionReader,
    session: mpsc::Sender<v1::SessionRequest>,
    // Last, so that the rest is dropped while it still runs.
    runtime: Runtime,
}

/// A join that will be granted.
pub(crate) fn honest_join(process: u64) -> JoinRequest {
    JoinRequest {
        process,
        name: format!("fake {process}"),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fingerprints: Fingerprints::of(Isa::best()),
        threads: 1,
        isa: "fake".to_owned(),
    }
}

/// An async runtime for a client.
pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// A client of the coordinator at `url`.
pub(crate) async fn connect(url: &str) -> WorkerServiceClient<Connection> {
    let access = Target::open(url).load().expect("a URL");
    transport::worker_client(access.connect().await.expect("the coordinator answers"))
}

/// Waits for what must come.
pub(crate) async fn soon<T>(what: &str, awaited: impl Future<Output = T>) -> T {
    let awaited = tokio::time::timeout(WATCHDOG, awaited).await;
    awaited.unwrap_or_else(|_| panic!("waited {} s for {what}", WATCHDOG.as_secs()))
}

impl FakeWorker {
    /// Joins the run at `url` as the worker process with this number.
    pub(crate) fn join(url: &str, process: u64) -> Self {
        Self::try_join(url, honest_join(process).into()).expect("an honest join is granted")
    }

    /// Sends `first` as the first message of a session.
    pub(crate) fn try_join(url: &str, first: v1::SessionRequest) -> Result<Self, Status> {
        let runtime = runtime();
        let joined = runtime.block_on(soon("a welcome", async {
            let mut client = connect(url).await;
            let (session, requests) = mpsc::channel(16);
            let requests = tokio_stream::once(first).chain(ReceiverStream::new(requests));
            let mut responses = client.session(requests).await?.into_inner();
            let mut reader = SessionReader::new();
            let response = responses.message().await?.ok_or_else(|| Status::aborted("no welcome came"))?;
            match reader.read(response)? {
                Some(SessionDown::Welcome(welcome)) => Ok::<_, Status>((client, session, responses, reader, welcome)),
                other => panic!("{other:?} came instead of a welcome"),
            }
        }));
        let (client, session, responses, reader, welcome) = joined?;
        runtime.spawn(live(session.clone(), welcome.heartbeat_interval));
        Ok(Self { welcome, client, responses, reader, session, runtime })
    }

    /// Waits for the next piece of work.
    pub(crate) fn next_assignment(&mut self) -> Assignment {
        loop {
            match self.next() {
                Ok(SessionDown::Message(ToWorker::Assign(assignment))) => return assignment,
                Ok(SessionDown::Message(ToWorker::Keep(_))) => {}
                other => panic!("{other:?} came instead of an assignment"),
            }
        }
    }

    /// Waits until the coordinator ends the session. Returns what it said at last: an eviction's reason, or how the
    /// stream ended.
    pub(crate) fn wait_for_end(&mut self) -> String {
        loop {
            match self.next() {
                Ok(SessionDown::Message(ToWorker::Evicted { reason } | ToWorker::Finished { reason })) => {
                    return reason;
                }
                Ok(_) => {}
                Err(end) => return end,
            }
        }
    }

    /// The next whole message of the session; an error when it ends.
    fn next(&mut self) -> Result<SessionDown, String> {
        let Self { runtime, responses, reader, .. } = self;
        runtime.block_on(soon("a message of the session", async {
            loop {
                let response = responses.message().await.map_err(|status| status.to_string())?;
                let response = response.ok_or("the stream ended")?;
                if let Some(message) = reader.read(response).map_err(|error| error.to_string())? {
                    return Ok(message);
                }
            }
        }))
    }

    /// Sends a message on the session.
    pub(crate) fn send(&self, message: v1::SessionRequest) {
        self.runtime.block_on(soon("room in the session", self.session.send(message))).expect("the session is open");
    }

    /// Sends a message on the session, unless that has ended.
    pub(crate) fn try_send(&self, message: v1::SessionRequest) -> Result<(), String> {
        let sent = self.runtime.block_on(soon("room in the session", self.session.send(message)));
        sent.map_err(|error| error.to_string())
    }

    /// Opens an exchange and sends `requests` on it. The stream stays open as long as the returned value lives.
    pub(crate) fn exchange(&mut self, requests: Vec<v1::ExchangeRequest>) -> Result<OpenExchange, Status> {
        let Self { runtime, client, .. } = self;
        runtime.block_on(soon("the exchange", async {
            let (sender, more) = mpsc::channel(1);
            let responses = client.exchange(tokio_stream::iter(requests).chain(ReceiverStream::new(more))).await?;
            Ok(OpenExchange { _requests: sender, _responses: responses.into_inner() })
        }))
    }

    /// The hello of this member.
    pub(crate) fn hello(&self) -> v1::ExchangeRequest {
        self.welcome.member.into()
    }

    /// The true announcement of the first leaf of an assignment. Returns its node as well.
    pub(crate) fn announce_first_leaf(&self, assignment: &Assignment) -> (NodeId, v1::ExchangeRequest) {
        let (node, report) = announcement(assignment, 0);
        (node, (&report).into())
    }
}

/// The true announcement of a leaf of an assignment, whose samples came inline, and the leaf's node.
pub(crate) fn announcement(assignment: &Assignment, leaf: usize) -> (NodeId, NodeReport) {
    let task = &assignment.leaves[leaf];
    let ids = &task.inline.as_ref().expect("nothing is cached: samples come inline").ids;
    let node = NodeId { level: 0, index: task.leaf };
    let report = NodeReport {
        work: assignment.work,
        node,
        loss: 1.0,
        samples: ids.len() as u32,
        digests: vec![samples_digest(ids.iter().copied())],
        compute: Some(Duration::ZERO),
        waited: Duration::ZERO,
        gradient: None,
        finding: None,
    };
    (node, report)
}

/// An exchange that is under way.
pub(crate) struct OpenExchange {
    _requests: mpsc::Sender<v1::ExchangeRequest>,
    _responses: Streaming<v1::ExchangeResponse>,
}

/// Gives signs of life until the session ends.
async fn live(session: mpsc::Sender<v1::SessionRequest>, interval: Duration) {
    let mut interval = tokio::time::interval(interval);
    loop {
        interval.tick().await;
        let Upward::Session(heartbeat) = FromWorker::Heartbeat.into() else { unreachable!() };
        if session.send(heartbeat).await.is_err() {
            return;
        }
    }
}
