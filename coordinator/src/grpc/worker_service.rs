//! What workers call: a session for control, an exchange for tensors, and shards.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lockstep_common::placement::PlacedData;
use lockstep_common::progress::{RunState, RunStatus, Transport};
use lockstep_common::protocol::{self, CHUNK_FLOATS, FromWorker, Job, MemberId, ToWorker};
use lockstep_common::shared_memory::Region;
use lockstep_proto::convert::{Downward, ExchangeUp, SessionUp, ShardRequest, samples_of_a_message, shard_messages};
use lockstep_proto::limits::{
    FETCH_QUEUE, INTRODUCTION_TIMEOUT, JOINS, JOINS_PER_ADDRESS, MAX_FETCHES_PER_MEMBER, SESSION_QUEUE,
    SLOW_PEER_TIMEOUT,
};
use lockstep_proto::v1::worker_service_server::WorkerService;
use lockstep_proto::{WireError, status, v1};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::accept::Peer;
use super::quota::{Pace, Slots};
use super::sharing::{Down, GRADIENT_SLOTS, Sharing, responses};
use crate::link::{Inbound, Inbox, Link, LinkError};
use crate::monitor::Hub;

/// Versions of the parameters that may wait for one worker. The chunks of a version are shared by all workers.
const QUEUED_VERSIONS: usize = 3;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
pub(super) struct Workers {
    inbox: Inbox,
    job: Job,
    data: Arc<PlacedData>,
    hub: Arc<Hub>,
    parameters: usize,
    parameter_queue: usize,
    /// Where versions of the parameters lie, if workers on this host can read them there.
    region: Option<Arc<Region>>,
    members: Arc<Members>,
    joins: Pace,
}

/// The members that have a session.
#[derive(Default)]
struct Members(Mutex<HashMap<MemberId, Present>>);

/// One of them.
struct Present {
    /// What its exchange needs, until that is opened.
    pending: Option<Pending>,
    /// The shards that it fetches.
    fetches: Arc<Slots>,
}

/// What a member's exchange needs.
struct Pending {
    waiting: mpsc::Receiver<Down>,
    queue: mpsc::WeakSender<Down>,
    sharing: Option<Arc<Sharing>>,
}

impl Members {
    fn lock(&self) -> MutexGuard<'_, HashMap<MemberId, Present>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    pub(super) fn new(
        inbox: Inbox,
        job: Job,
        data: Arc<PlacedData>,
        hub: Arc<Hub>,
        region: Option<Arc<Region>>,
    ) -> Self {
        // A model that does not resolve would have stopped the coordinator.
        let parameters = job.model.resolve().map_or(0, |model| model.layout.parameters());
        let parameter_queue = QUEUED_VERSIONS * (parameters.div_ceil(CHUNK_FLOATS) + 1) + GRADIENT_SLOTS as usize;
        let joins = Pace::new(JOINS, JOINS_PER_ADDRESS);
        Self { inbox, job, data, hub, parameters, parameter_queue, region, members: Arc::default(), joins }
    }

    /// Why nobody takes joins any more: the run is complete, or the coordinator goes down and may come back.
    fn gone(&self) -> status::Refusal {
        let RunStatus { state, rounds, total_rounds, .. } = self.hub.status();
        match state {
            RunState::Finished { reason } if rounds >= total_rounds => protocol::Refusal::Finished { reason }.into(),
            _ => status::Refusal::Shutdown,
        }
    }

    /// Refuses joins that come too fast.
    fn allow_join<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let origin = request.extensions().get::<Arc<Peer>>().map(|peer| peer.origin());
        if origin.is_none_or(|origin| self.joins.allows(origin, Instant::now())) {
            return Ok(());
        }
        Err(Status::resource_exhausted("workers join too fast; try again later"))
    }

    /// Memory to share with a worker that connects from this host's own address.
    fn sharing<T>(&self, request: &Request<T>) -> Option<Arc<Sharing>> {
        let peer = request.extensions().get::<Arc<Peer>>()?;
        let region = self.region.clone().filter(|_| peer.is_this_host())?;
        Sharing::new(region, self.parameters).map(Arc::new)
    }
}

/// A link over gRPC. Messages wait in bounded queues; a worker whose queue is full does not keep up.
struct GrpcLink {
    session: mpsc::Sender<ToWorker>,
    exchange: mpsc::Sender<Down>,
    sharing: Option<Arc<Sharing>>,
}

impl Link for GrpcLink {
    fn send(&mut self, message: ToWorker) -> Result<(), LinkError> {
        match message {
            ToWorker::ParameterChunk { .. } | ToWorker::Parameters { .. } => {
                try_send(&self.exchange, Down::Message(message))
            }
            _ => try_send(&self.session, message),
        }
    }

    fn transport(&self) -> Transport {
        let shared = self.sharing.as_ref().is_some_and(|sharing| sharing.is_accepted());
        if shared { Transport::SharedMemory } else { Transport::Grpc }
    }
}

fn try_send<T>(queue: &mpsc::Sender<T>, message: T) -> Result<(), LinkError> {
    queue.try_send(message).map_err(|error| match error {
        mpsc::error::TrySendError::Full(_) => LinkError::Full(queue.max_capacity()),
        mpsc::error::TrySendError::Closed(_) => LinkError::Closed,
    })
}

#[tonic::async_trait]
impl WorkerService for Workers {
    type SessionStream = Answers<v1::SessionResponse>;
    type ExchangeStream = Answers<v1::ExchangeResponse>;
    type FetchShardStream = Answers<v1::FetchShardResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.allow_join(&request)?;
        let sharing = self.sharing(&request);
        let mut requests = request.into_inner();
        let request = SessionUp::try_from(first(&mut requests, "a join").await?)?.join()?;
        let (session, responses) = mpsc::channel(SESSION_QUEUE);
        let (exchange, waiting) = mpsc::channel(self.parameter_queue);
        let (answer, answered) = oneshot::channel();
        let pending = Pending { waiting, queue: exchange.downgrade(), sharing: sharing.clone() };
        let link = Box::new(GrpcLink { session, exchange, sharing });
        let join = Inbound::Join { request, link, answer };
        self.inbox.send(join).await.map_err(|_| self.gone())?;
        let mut welcome = answered.await.map_err(|_| self.gone())?.map_err(status::Refusal::from)?;
        let member = welcome.member;
        welcome.shared_memory = pending.sharing.as_ref().map(|sharing| Box::new(sharing.offer()));
        let present = Present { pending: Some(pending), fetches: Slots::new(MAX_FETCHES_PER_MEMBER) };
        self.members.lock().insert(member, present);
        let (inbox, members) = (self.inbox.clone(), self.members.clone());
        tokio::spawn(async move {
            let reason =
                pass_on(requests, member, &inbox, |request| Ok(Some(SessionUp::try_from(request)?.message()?))).await;
            members.lock().remove(&member);
            // Nobody to tell once the run is over.
            let _ = inbox.send(Inbound::Closed(member, format!("session: {reason}"))).await;
        });
        let responses = ReceiverStream::new(responses).map(|message| match Downward::from(message) {
            Downward::Session(messages) => messages,
            Downward::Exchange(_) => Box::new(std::iter::empty()),
        });
        let welcomed = tokio_stream::once((&welcome).into());
        Ok(Response::new(Box::pin(welcomed.chain(flatten(responses)).map(Ok))))
    }

    async fn exchange(
        &self,
        request: Request<Streaming<v1::ExchangeRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut requests = request.into_inner();
        let hello = ExchangeUp::try_from(first(&mut requests, "a hello").await?)?.hello()?;
        let member = hello.member;
        let pending = self.members.lock().get_mut(&member).and_then(|present| present.pending.take());
        let Pending { waiting, queue, sharing } = pending.ok_or(status::Refusal::NotAMember { member })?;
        let sharing = sharing.filter(|_| hello.shares_memory);
        if let Some(sharing) = &sharing {
            sharing.accept(queue);
        }
        let inbox = self.inbox.clone();
        let shared = sharing.clone();
        tokio::spawn(async move {
            let read = |request| {
                let request = ExchangeUp::try_from(request)?;
                match &shared {
                    Some(sharing) => sharing.receive(request).map_err(Unreadable),
                    None => Ok(Some(request.message()?)),
                }
            };
            let reason = pass_on(requests, member, &inbox, read).await;
            let _ = inbox.send(Inbound::Closed(member, format!("exchange: {reason}"))).await;
        });
        let responses = ReceiverStream::new(waiting).map(move |down| responses(down, sharing.as_deref()));
        Ok(Response::new(Box::pin(flatten(responses).map(Ok))))
    }

    async fn fetch_shard(
        &self,
        request: Request<v1::FetchShardRequest>,
    ) -> Result<Response<Self::FetchShardStream>, Status> {
        let ShardRequest { member, shard } = ShardRequest::try_from(request.into_inner())?;
        let fetches = self.members.lock().get(&member).map(|present| present.fetches.clone());
        let slot = fetches.ok_or(status::Refusal::NotAMember { member })?.take().ok_or_else(|| {
            Status::resource_exhausted(format!("{member} fetches {MAX_FETCHES_PER_MEMBER} shards already"))
        })?;
        let shards = self.job.schedule.tree.shards();
        if shard.shard >= shards {
            return Err(status::Refusal::NoSuchShard { shard, shards }.into());
        }
        let (data, ids, size) = (self.data.clone(), self.data.ids(shard), samples_of_a_message(&self.job));
        let count = ids.len() as u32;
        // Copied message by message, so that no shard lies here twice, however many workers fetch theirs.
        let parts = (0..ids.len()).step_by(size).map(move |start| {
            let end = ids.len().min(start + size);
            data.pack(shard.split, &ids[start..end])
        });
        let messages = shard_messages(&self.job, count, parts);
        let (pieces, fetched) = mpsc::channel(FETCH_QUEUE);
        tokio::spawn(async move {
            let _slot = slot;
            for message in messages {
                // The samples must not stay in memory for one that is gone, or takes nothing.
                if pieces.send_timeout(Ok(message), SLOW_PEER_TIMEOUT).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(fetched))))
    }
}

/// The first request of a stream.
async fn first<T>(requests: &mut Streaming<T>, what: &str) -> Result<T, Status> {
    let message = tokio::time::timeout(INTRODUCTION_TIMEOUT, requests.message()).await.map_err(|_| {
        Status::deadline_exceeded(format!("{what} must come within {} s", INTRODUCTION_TIMEOUT.as_secs()))
    })?;
    message?.ok_or_else(|| Status::cancelled(format!("the stream ended before {what} came")))
}

/// Why a request cannot be passed on.
struct Unreadable(String);

impl From<WireError> for Unreadable {
    fn from(error: WireError) -> Self {
        Self(error.to_string())
    }
}

/// Passes a member's messages on to the driver until the stream ends; says how it ended.
async fn pass_on<T>(
    mut requests: Streaming<T>,
    member: MemberId,
    inbox: &Inbox,
    read: impl Fn(T) -> Result<Option<FromWorker>, Unreadable>,
) -> String {
    loop {
        let message = match requests.message().await {
            Ok(Some(message)) => message,
            // A partition or a cancelled call looks like a clean end, too.
            Ok(None) => return "the stream ended".to_owned(),
            Err(error) => return status::describe(&error),
        };
        match read(message) {
            Ok(None) => {}
            Ok(Some(message)) => {
                if inbox.send(Inbound::From(member, message)).await.is_err() {
                    return "the run is over".to_owned();
                }
            }
            Err(Unreadable(reason)) => return reason,
        }
    }
}

/// The items of every iterator of a stream.
fn flatten<T: Send + 'static>(
    stream: impl Stream<Item = Box<dyn Iterator<Item = T> + Send>> + Send + 'static,
) -> impl Stream<Item = T> + Send {
    Flatten { stream: Box::pin(stream), current: None }
}

struct Flatten<T> {
    stream: Pin<Box<dyn Stream<Item = Box<dyn Iterator<Item = T> + Send>> + Send>>,
    current: Option<Box<dyn Iterator<Item = T> + Send>>,
}

impl<T> Stream for Flatten<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<T>> {
        use std::task::Poll;
        loop {
            if let Some(item) = self.current.as_mut().and_then(Iterator::next) {
                return Poll::Ready(Some(item));
            }
            match self.stream.as_mut().poll_next(context) {
                Poll::Ready(Some(next)) => self.current = Some(next),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
