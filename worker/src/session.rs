//! A worker's life as a member: fetch shards, take assignments, hand in sums, give signs of life.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use lockstep_common::kernel::{Isa, Precision};
use lockstep_common::placement::{PlacedData, ShardSamples};
use lockstep_common::protocol::{FromWorker, KeepList, NodeReport, ShardRef, ToWorker, Welcome, Work};
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::FloatBuffer;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_stream::{Stream, StreamExt};
use tracing::{debug, warn};

use crate::client::RemoteShards;
use crate::engine::{self, Command, Engine, EngineError, Handover, NewestWork, Output};
use crate::shard_cache::ShardCache;

/// Messages to the coordinator that may wait: two nodes, each announced and handed over as a whole, or some parts of one.
pub const OUTGOING_DEPTH: usize = 4;

/// A session's connection, whatever it is made of.
pub struct Transport {
    /// What the coordinator answered to the join.
    pub welcome: Welcome,
    /// Messages from the coordinator; an error when the connection is lost. At most as many wait as the protocol lets
    /// be under way: an assignment and a version of the parameters for each piece of work.
    pub incoming: Pin<Box<dyn Stream<Item = Result<ToWorker, String>> + Send>>,
    /// Messages to the coordinator.
    pub outgoing: Outgoing,
    /// Where shards come from.
    pub shards: ShardSource,
    /// How gradients get to the coordinator.
    pub handover: Handover,
}

/// The two ways to the coordinator: signs of life never wait behind gradients.
#[derive(Clone)]
pub struct Outgoing {
    /// For small messages.
    pub control: mpsc::Sender<FromWorker>,
    /// For reports of nodes and their gradients, in order.
    pub bulk: mpsc::Sender<FromWorker>,
}

/// Where shards come from.
#[derive(Clone)]
pub enum ShardSource {
    /// The coordinator's own memory.
    Local(Arc<PlacedData>),
    /// The coordinator, over gRPC.
    Remote(Box<RemoteShards>),
}

impl ShardSource {
    async fn fetch(&self, shard: ShardRef) -> Result<ShardSamples, String> {
        match self {
            Self::Local(data) => Ok(data.shard(shard)),
            Self::Remote(remote) => remote.fetch(shard).await,
        }
    }
}

/// How a worker computes.
#[derive(Clone, Copy, Debug)]
pub struct Compute {
    /// Instruction set.
    pub isa: Isa,
    /// Threads.
    pub threads: usize,
}

/// How a worker leaves before the run ends.
#[derive(Clone, Debug)]
pub struct Leave {
    /// Becomes true when it is asked to.
    pub asked: watch::Receiver<bool>,
    /// How long the coordinator may then take to let it go.
    pub patience: Duration,
}

impl Leave {
    /// It stays to the end.
    pub fn never() -> Self {
        // The sender is gone: nothing ever changes.
        Self { asked: watch::channel(false).1, patience: Duration::MAX }
    }
}

/// How a session ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// The run, or this worker's part in it, is over.
    Finished(String),
    /// The coordinator put this worker out; it may join again.
    Evicted(String),
    /// The connection is gone.
    Lost(String),
    /// It asked to leave, and was not let go.
    Kept(String),
}

/// Takes part in a run until it ends, in one way or another.
///
/// # Errors
/// [`EngineError`] when this worker cannot compute the run's model as the coordinator means it.
pub async fn run(transport: Transport, compute: Compute, mut leave: Leave) -> Result<SessionEnd, EngineError> {
    let Transport { welcome, mut incoming, outgoing, shards, handover } = transport;
    let cache = ShardCache::default();
    let precision = welcome.job.wire;
    let newest = NewestWork::default();
    let engine = match Engine::new(welcome.job, compute.isa, compute.threads, cache.clone(), handover, newest.clone()) {
        Ok(engine) => engine,
        Err(error) => {
            // So that the coordinator's log says why the worker leaves.
            let _ = outgoing.control.send(FromWorker::Failed { reason: error.to_string() }).await;
            return Err(error);
        }
    };
    let (commands, mut outputs) = engine::spawn(engine)?;
    let mut heartbeat = tokio::time::interval(welcome.heartbeat_interval);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (keep_lists, newest_list) = watch::channel(KeepList { list: 0, shards: Vec::new() });
    let fetcher = tokio::spawn(fetch_shards(newest_list, shards.clone(), cache, outgoing.control.clone()));
    let mut sender =
        NodeSender { outgoing: &outgoing.bulk, commands: &commands, newest: &newest, precision, lent: Vec::new() };
    let (mut leaving_since, mut assigned) = (None, None);
    let end = loop {
        tokio::select! {
            message = incoming.next() => match message {
                None => break lost(),
                Some(Err(reason)) => break SessionEnd::Lost(reason),
                Some(Ok(ToWorker::Evicted { reason })) => break SessionEnd::Evicted(reason),
                Some(Ok(ToWorker::Finished { reason })) => break SessionEnd::Finished(reason),
                Some(Ok(ToWorker::Keep(wanted))) => {
                    // Shards are divided anew between two works. An assignment that still waits is over, because others
                    // were faster, and its samples go.
                    assigned.take().into_iter().for_each(|work| newest.end(work));
                    keep_lists.send_replace(wanted);
                }
                Some(Ok(ToWorker::Assign(assignment))) => {
                    newest.came(assignment.work);
                    assigned = Some(assignment.work);
                    // By now, the coordinator has no use for most of what it was sent.
                    sender.take_back();
                    command(&commands, Command::Assign(assignment));
                }
                Some(Ok(ToWorker::ParameterChunk { version, chunk, data, precision })) => {
                    command(&commands, Command::Chunk { version, chunk, data, precision });
                }
                Some(Ok(ToWorker::Parameters { version, values, .. })) => {
                    command(&commands, Command::Whole { version, values });
                }
            },
            output = outputs.recv() => {
                let sent = match output {
                    None => break SessionEnd::Lost("the compute engine has ended unexpectedly".to_owned()),
                    Some(Output::Failed(reason)) => {
                        warn!("{reason}");
                        outgoing.control.send(FromWorker::Failed { reason }).await.is_ok()
                    }
                    Some(Output::Compared(report)) => {
                        outgoing.bulk.send(FromWorker::Compared(report)).await.is_ok()
                    }
                    Some(Output::Node { report, gradient }) => sender.send(report, gradient).await,
                    Some(Output::Part { work, node, chunk, gradient, compute }) => {
                        sender.send_part(work, node, chunk, gradient, compute).await
                    }
                };
                if !sent {
                    break lost();
                }
            }
            _ = heartbeat.tick() => {
                // A full queue is no reason to wait: what fills it is a sign of life too.
                let _ = outgoing.control.try_send(FromWorker::Heartbeat);
            }
            () = wait_until(&mut leave.asked), if leaving_since.is_none() => {
                leaving_since = Some(Instant::now());
                if outgoing.control.send(FromWorker::Drain).await.is_err() {
                    break lost();
                }
            }
            () = at_most(leaving_since, leave.patience) => {
                let patience = leave.patience.as_secs();
                break SessionEnd::Kept(format!("it asked to leave {patience} s ago, and the coordinator has not let it go"));
            }
        }
    };
    fetcher.abort();
    // So that it says nothing more after the end; it was cancelled, which is no news.
    let _ = fetcher.await;
    Ok(end)
}

/// Comes when the value is true; never if nobody can make it so.
async fn wait_until(value: &mut watch::Receiver<bool>) {
    if value.wait_for(|value| *value).await.is_err() {
        std::future::pending().await
    }
}

/// Comes when `patience` has passed since then; never without a then.
async fn at_most(since: Option<Instant>, patience: Duration) {
    match since.and_then(|since| since.checked_add(patience)) {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

fn lost() -> SessionEnd {
    SessionEnd::Lost("the connection to the coordinator ended".to_owned())
}

fn command(commands: &mpsc::UnboundedSender<Command>, command: Command) {
    if commands.send(command).is_err() {
        debug!("the engine has ended; its outputs' end is noticed next");
    }
}

/// Hands over computed nodes, and takes their memory back.
struct NodeSender<'a> {
    outgoing: &'a mpsc::Sender<FromWorker>,
    commands: &'a mpsc::UnboundedSender<Command>,
    newest: &'a NewestWork,
    /// What the gradients of nodes are rounded to.
    precision: Precision,
    /// Gradients that are read or on their way; their memory comes back when that is done.
    lent: Vec<Arc<FloatBuffer>>,
}

impl NodeSender<'_> {
    /// Whether the connection is still there.
    async fn send(&mut self, report: NodeReport, gradient: Option<FloatBuffer>) -> bool {
        let (work, node) = (report.work, report.node);
        self.outgoing.send(FromWorker::Announce(report)).await.is_ok()
            && match gradient {
                Some(gradient) => self.send_gradient(work, node, 0, gradient).await,
                None => true,
            }
    }

    /// Sends a part of the gradient of a node that was announced; with the last one, how long the node took.
    async fn send_part(
        &mut self,
        work: Work,
        node: NodeId,
        chunk: u32,
        gradient: FloatBuffer,
        compute: Option<Duration>,
    ) -> bool {
        if let Some(compute) = compute
            && self.outgoing.send(FromWorker::Computed { work, node, compute }).await.is_err()
        {
            return false;
        }
        self.send_gradient(work, node, chunk, gradient).await
    }

    async fn send_gradient(&mut self, work: Work, node: NodeId, chunk: u32, gradient: FloatBuffer) -> bool {
        let Work::Gradient { round } = work else { return true };
        // Announcements tell how fast this worker is; the gradient of a round that is over tells nothing.
        if self.newest.is_after(work) {
            command(self.commands, Command::Recycle(gradient));
            return true;
        }
        self.take_back();
        let gradient = Arc::new(gradient);
        self.lent.push(gradient.clone());
        let part = FromWorker::NodePart { round, node, chunk, gradient, precision: self.precision };
        self.outgoing.send(part).await.is_ok()
    }

    fn take_back(&mut self) {
        let lent = std::mem::take(&mut self.lent);
        for gradient in lent {
            match Arc::try_unwrap(gradient) {
                Ok(gradient) => command(self.commands, Command::Recycle(gradient)),
                Err(still_read) => self.lent.push(still_read),
            }
        }
    }
}

/// Sees to it that the shards of the newest list are cached, and reports each of them.
async fn fetch_shards(
    mut lists: watch::Receiver<KeepList>,
    source: ShardSource,
    cache: ShardCache,
    outgoing: mpsc::Sender<FromWorker>,
) {
    while lists.changed().await.is_ok() {
        let KeepList { list, shards } = lists.borrow_and_update().clone();
        cache.retain(&shards);
        for shard in shards {
            if cache.get(shard).is_none() {
                match source.fetch(shard).await {
                    Ok(samples) => cache.insert(shard, samples),
                    // Its leaves' samples come inline; the next list is another chance.
                    Err(reason) => {
                        warn!("cannot fetch {shard}: {reason}");
                        continue;
                    }
                }
            }
            if outgoing.send(FromWorker::Cached { list, shard }).await.is_err() {
                return;
            }
            if lists.has_changed().unwrap_or(true) {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_common::config::RunSpec;
    use lockstep_common::protocol::{Assignment, Bytes, Handing, LeafTask, MemberId, Split};
    use lockstep_common::reduce::NodeId;
    use lockstep_proto::target::Bearer;
    use lockstep_proto::transport;
    use tokio_stream::wrappers::UnboundedReceiverStream;
    use tonic::service::interceptor::InterceptedService;
    use tonic::transport::Endpoint;

    use super::*;
    use crate::example;

    const COMPUTE: Compute = Compute { isa: Isa::SCALAR, threads: 1 };
    const MEMBER: MemberId = MemberId { worker: 1, incarnation: 1 };

    type Incoming = Pin<Box<dyn Stream<Item = Result<ToWorker, String>> + Send>>;

    fn transport(spec: &RunSpec, incoming: Incoming, shards: ShardSource) -> (Transport, mpsc::Receiver<FromWorker>) {
        let heartbeat_interval = Duration::from_secs(1);
        let welcome = Welcome { member: MEMBER, job: spec.job(), heartbeat_interval, shared_memory: None };
        let (outgoing, sent) = mpsc::channel(64);
        let outgoing = Outgoing { control: outgoing.clone(), bulk: outgoing };
        (Transport { welcome, incoming, outgoing, shards, handover: Handover::InProcess }, sent)
    }

    /// Scenario: a worker is asked to leave, and its coordinator never lets it go. Property: it says so, and ends with a
    /// message that says for how long it was kept.
    #[tokio::test]
    async fn a_worker_that_is_not_let_go_leaves_by_itself() {
        let spec = example::spec();
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        let client = transport::worker_client(InterceptedService::new(channel, Bearer::default()));
        let nowhere = ShardSource::Remote(Box::new(RemoteShards::new(client, MEMBER, spec.job())));
        let (transport, mut sent) = transport(&spec, Box::pin(tokio_stream::pending()), nowhere);
        let (ask, asked) = watch::channel(false);
        ask.send_replace(true);
        let end = run(transport, COMPUTE, Leave { asked, patience: Duration::ZERO }).await.expect("a known model");
        let SessionEnd::Kept(reason) = end else { panic!("{end:?}") };
        assert_eq!(reason, "it asked to leave 0 s ago, and the coordinator has not let it go");
        let mut messages = std::iter::from_fn(|| sent.try_recv().ok());
        assert!(messages.any(|message| matches!(message, FromWorker::Drain)));
    }

    /// A worker that takes part, and its coordinator: the test.
    struct Session {
        messages: mpsc::UnboundedSender<Result<ToWorker, String>>,
        sent: mpsc::Receiver<FromWorker>,
        end: tokio::task::JoinHandle<Result<SessionEnd, EngineError>>,
        parameters: usize,
    }

    impl Session {
        fn begin(spec: &RunSpec, handover: Handover) -> Self {
            let (messages, incoming) = mpsc::unbounded_channel();
            let shards = ShardSource::Local(example::data(spec));
            let (transport, sent) = transport(spec, Box::pin(UnboundedReceiverStream::new(incoming)), shards);
            let end = tokio::spawn(run(Transport { handover, ..transport }, COMPUTE, Leave::never()));
            Self { messages, sent, end, parameters: spec.model.layout.parameters() }
        }

        fn tell(&self, message: ToWorker) {
            self.messages.send(Ok(message)).expect("the session goes on");
        }

        fn keep(&self, list: u32, shard: u32) {
            let shards = vec![ShardRef { split: Split::Training, shard }];
            self.tell(ToWorker::Keep(KeepList { list, shards }));
        }

        /// Assigns one leaf of a round, from the shard that is cached.
        fn assign(&self, round: u64, leaf: u32) {
            let leaves = vec![LeafTask { leaf, inline: None, handing: Handing::Summed }];
            self.tell(ToWorker::Assign(Assignment { work: Work::Gradient { round }, leaves }));
        }

        fn parameters(&self, version: u64) {
            let values = Arc::new(FloatBuffer::zeros(self.parameters));
            self.tell(ToWorker::Parameters { version, values, precision: Precision::F32 });
        }

        /// The next message that is more than a sign of life.
        async fn answer(&mut self) -> FromWorker {
            loop {
                match self.sent.recv().await.expect("the session goes on") {
                    FromWorker::Heartbeat => {}
                    other => return other,
                }
            }
        }

        async fn has_cached(&mut self, list: u32, shard: u32) {
            let answer = self.answer().await;
            let FromWorker::Cached { list: of, shard: cached } = answer else { panic!("{answer:?}") };
            assert_eq!((of, cached.shard), (list, shard));
        }
    }

    /// Scenario: a worker is late. Its assignment still waits for the parameters when the others have completed the round,
    /// and shards are divided anew: its samples go. Then the parameters come. Property: the assignment is dropped without
    /// a word, and the worker takes part in the next round.
    #[tokio::test]
    async fn an_assignment_that_a_new_division_of_shards_overtakes_is_dropped() {
        let mut session = Session::begin(&example::spec(), Handover::InProcess);
        session.keep(1, 0);
        session.has_cached(1, 0).await;
        session.assign(0, 0);
        session.keep(2, 1);
        session.has_cached(2, 1).await;
        session.parameters(0);
        // The engine does one thing after the other: when it has found fault with this, it is through with the above.
        let data = Bytes::new();
        session.tell(ToWorker::ParameterChunk { version: 1, chunk: 999, data, precision: Precision::F32 });
        let answer = session.answer().await;
        let FromWorker::Failed { reason } = answer else { panic!("{answer:?}") };
        assert!(reason.starts_with("parameter chunk 999 does not exist"), "{reason}");

        session.parameters(1);
        session.assign(1, 1);
        let answer = session.answer().await;
        let FromWorker::Announce(report) = answer else { panic!("{answer:?}") };
        assert_eq!((report.work, report.node), (Work::Gradient { round: 1 }, NodeId::leaf(1)));
        session.tell(ToWorker::Finished { reason: "enough".to_owned() });
        let end = session.end.await.expect("no panic").expect("a known model");
        assert!(matches!(end, SessionEnd::Finished(_)), "{end:?}");
    }

    /// Scenario: a gradient is sent while it is computed. Property: it is announced without a time, and the time that all of
    /// it took comes before its last part, which completes it.
    #[tokio::test]
    async fn the_time_that_a_gradient_took_comes_before_its_last_part() {
        let mut session = Session::begin(&example::spec_of("dense", 16), Handover::Sent);
        session.keep(1, 0);
        session.has_cached(1, 0).await;
        session.parameters(0);
        session.assign(0, 0);
        let answer = session.answer().await;
        let FromWorker::Announce(NodeReport { compute: None, .. }) = answer else { panic!("{answer:?}") };
        let mut before = Vec::new();
        let took = loop {
            match session.answer().await {
                FromWorker::NodePart { chunk, .. } => before.push(chunk),
                FromWorker::Computed { node, compute, .. } => break (node, compute),
                other => panic!("{other:?}"),
            }
        };
        assert!(took.0 == NodeId::leaf(0) && took.1 > Duration::ZERO, "{took:?}");
        assert!(!before.is_empty() && before.is_sorted_by(|a, b| a > b) && !before.contains(&0), "{before:?}");
        let answer = session.answer().await;
        let FromWorker::NodePart { chunk: 0, .. } = answer else { panic!("{answer:?}") };
    }
}
