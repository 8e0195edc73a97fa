//! A worker's side of gRPC: find the coordinator, join, and take part until the run ends.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::placement::ShardSamples;
use lockstep_common::protocol::{self, FromWorker, Job, JoinRequest, MemberId, ShardRef, ToWorker, Welcome};
use lockstep_proto::convert::{ExchangeDown, Hello, SessionDown, SessionReader, ShardReader, ShardRequest, Upward};
use lockstep_proto::limits::{EXCHANGE_QUEUE, SESSION_QUEUE};
use lockstep_proto::status::{Refusal, Verdict, describe, verdict};
use lockstep_proto::target::{Access, ConnectError, Connection, Target, TargetError};
use lockstep_proto::v1::worker_service_client::WorkerServiceClient;
use lockstep_proto::{transport, v1};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use crate::engine::{EngineError, Handover};
use crate::session::{self, Compute, Leave, Outgoing, SessionEnd, ShardSource, Transport};
use crate::sharing::Sharing;

/// First pause before trying again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause before trying again.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long the coordinator may take to answer a join or a hello.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How a worker finds and serves its coordinator.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Where the coordinator is, and what it demands.
    pub coordinator: Target,
    /// A name for people.
    pub name: String,
    /// How it computes.
    pub compute: Compute,
    /// How long it looks for a coordinator before it gives up.
    pub patience: Duration,
    /// How long the coordinator may take to let it go when it was asked to leave.
    pub drain_patience: Duration,
    /// Whether it exchanges tensors through shared memory if the coordinator offers some that it can see.
    pub shared_memory: bool,
    /// Whether it waits for the next run when one has ended.
    pub stay: bool,
}

/// Why a worker ends without the run having ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The address is none, or a file or token cannot be used.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The coordinator does not want this worker, and trying again cannot help.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// One of both does not trust the other.
    #[error("cannot join the run at {url}: {cause}")]
    Untrusted {
        /// Where.
        url: String,
        /// What is wrong.
        cause: ConnectError,
    },
    /// This worker cannot compute what the run needs.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It was asked to leave, and the coordinator did not let it go.
    #[error("left without being let go by {url}: {reason}; what it owes, others compute")]
    Kept {
        /// Where the coordinator is.
        url: String,
        /// What was awaited, and for how long.
        reason: String,
    },
    /// Nobody answered for too long.
    #[error("waited {waited} s for a coordinator at {url}, and there is none: {last}")]
    NoCoordinator {
        /// Where.
        url: String,
        /// How long, in seconds.
        waited: u64,
        /// How the last try ended.
        last: String,
    },
}

/// How one try to take part ended.
enum Attempt {
    Over(SessionEnd),
    /// The coordinator cannot be reached, or does not answer.
    Unreachable(String),
    /// One of both does not trust the other's certificate, or the token is not the right one.
    Untrusted(ConnectError),
}

/// Works for the coordinator until the run ends. A lost connection is made anew; when `drain` becomes true, the worker
/// hands over its work and leaves. Gives the reason why it ended; `say` is told what goes on.
///
/// # Errors
/// [`WorkerError`] when there is no use in going on.
pub async fn run(
    options: WorkerOptions,
    mut drain: watch::Receiver<bool>,
    say: &(dyn Fn(&str) + Sync),
) -> Result<String, WorkerError> {
    let mut access = options.coordinator.load()?;
    let request = JoinRequest {
        process: process_number(),
        name: options.name.clone(),
        version: crate::VERSION.to_owned(),
        fingerprints: Fingerprints::of(options.compute.isa),
        threads: options.compute.threads as u32,
        isa: options.compute.isa.name().to_owned(),
    };
    let mut searching_since = Instant::now();
    let mut pause = FIRST_PAUSE;
    let mut was_member = false;
    let mut waits_for_next = false;
    loop {
        let tried_at = Instant::now();
        let attempt = take_part(&access, &request, &options, drain.clone(), say).await?;
        let last = match attempt {
            Attempt::Over(SessionEnd::Finished(reason)) if !options.stay || *drain.borrow() => return Ok(reason),
            Attempt::Over(SessionEnd::Finished(reason)) => {
                // A coordinator that stays, too, says the same again and again.
                if !waits_for_next {
                    say(&format!("{reason}; waiting for the next run"));
                }
                (was_member, waits_for_next) = (true, true);
                (searching_since, pause) = (Instant::now(), LONGEST_PAUSE);
                reason
            }
            Attempt::Over(SessionEnd::Kept(reason)) => {
                return Err(WorkerError::Kept { url: options.coordinator.url, reason });
            }
            Attempt::Over(SessionEnd::Evicted(reason)) => {
                was_member = true;
                say(&format!("evicted: {reason}; joining again"));
                searching_since = Instant::now();
                // A worker that is put out again and again must not keep the coordinator busy.
                if tried_at.elapsed() > 5 * LONGEST_PAUSE {
                    pause = FIRST_PAUSE;
                }
                reason
            }
            Attempt::Over(SessionEnd::Lost(reason)) => {
                (was_member, waits_for_next) = (true, false);
                say(&format!("{reason}; looking for the coordinator"));
                (searching_since, pause) = (Instant::now(), FIRST_PAUSE);
                reason
            }
            Attempt::Unreachable(reason) => {
                info!("{reason}");
                reason
            }
            // One that was let in before waits for renewed certificates and tokens, or for its own to be accepted again.
            Attempt::Untrusted(cause) if was_member => {
                warn!("{cause}");
                cause.to_string()
            }
            Attempt::Untrusted(cause) => {
                return Err(WorkerError::Untrusted { url: options.coordinator.url, cause });
            }
        };
        if searching_since.elapsed() >= options.patience {
            let waited = options.patience.as_secs();
            return Err(WorkerError::NoCoordinator { url: options.coordinator.url, waited, last });
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = drain.wait_for(|drain| *drain) => return Ok("left, not being a member".to_owned()),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        // Certificates and tokens may have been renewed.
        match options.coordinator.load() {
            Ok(renewed) => access = renewed,
            Err(error) => warn!("the certificates and the token of before stay in use: {error}"),
        }
    }
}

async fn take_part(
    access: &Access,
    request: &JoinRequest,
    options: &WorkerOptions,
    drain: watch::Receiver<bool>,
    say: &(dyn Fn(&str) + Sync),
) -> Result<Attempt, WorkerError> {
    let control = match access.connect().await {
        Ok(connection) => connection,
        Err(error @ ConnectError { permanent: true, .. }) => return Ok(Attempt::Untrusted(error)),
        Err(ConnectError { reason, .. }) => return Ok(Attempt::Unreachable(reason)),
    };
    let transport = match join(access, control, request, options.shared_memory).await {
        Ok(transport) => transport,
        Err(status) => {
            match access.refused(&status) {
                Some(refused) if refused.permanent => return Ok(Attempt::Untrusted(refused)),
                Some(refused) => return Ok(Attempt::Unreachable(refused.reason)),
                None => {}
            }
            let reason = describe(&status);
            if let Some(Refusal::NotAdmitted(protocol::Refusal::Finished { .. })) = Refusal::of(&status) {
                return Ok(Attempt::Over(SessionEnd::Finished(reason)));
            }
            return match verdict(&status) {
                Verdict::Never => Err(WorkerError::Refused(reason)),
                Verdict::RetryLater | Verdict::JoinAgain => Ok(Attempt::Unreachable(reason)),
            };
        }
    };
    let member = transport.welcome.member;
    say(&format!("joined run {:?} as {member}", transport.welcome.job.run));
    let leave = Leave { asked: drain, patience: options.drain_patience };
    Ok(Attempt::Over(session::run(transport, options.compute, leave).await?))
}

/// Joins: a session on one connection, an exchange and shards on another, so that bulk data cannot delay heartbeats.
async fn join(access: &Access, control: Connection, request: &JoinRequest, share: bool) -> Result<Transport, Status> {
    let mut control = transport::worker_client(control);
    let (session_requests, requests) = mpsc::channel::<v1::SessionRequest>(SESSION_QUEUE);
    let joined = tokio_stream::once(v1::SessionRequest::from(request.clone())).chain(ReceiverStream::new(requests));
    let mut responses = answered(control.session(joined)).await?.into_inner();
    let mut reader = SessionReader::new();
    let response = answered(responses.message()).await?;
    let response = response.ok_or_else(|| Status::unavailable("the session ended before a welcome came"))?;
    let welcome = match reader.read(response)? {
        Some(SessionDown::Welcome(welcome)) => welcome,
        Some(SessionDown::Message(ToWorker::Finished { reason })) => {
            return Err(Status::failed_precondition(format!("the run has ended: {reason}")));
        }
        _ => return Err(Status::unavailable("another message came before the welcome")),
    };

    let bulk = access.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut bulk = transport::worker_client(bulk);
    let shards = RemoteShards::new(bulk.clone(), welcome.member, welcome.job.clone());
    let (exchange_requests, requests) = mpsc::channel::<v1::ExchangeRequest>(EXCHANGE_QUEUE);
    let sharing = open_shared(&welcome, share).map(Arc::new);
    if let Some(sharing) = &sharing {
        sharing.tell_releases(exchange_requests.downgrade());
    }
    let hello = Hello { member: welcome.member, shares_memory: sharing.is_some() };
    let hello = tokio_stream::once(v1::ExchangeRequest::from(hello)).chain(ReceiverStream::new(requests));
    let chunks = answered(bulk.exchange(hello)).await?.into_inner();

    let (incoming_sender, incoming) = mpsc::unbounded_channel();
    tokio::spawn(read_session(responses, reader, incoming_sender.clone()));
    tokio::spawn(read_exchange(chunks, incoming_sender, sharing.clone()));
    let (control_sender, control_messages) = mpsc::channel(SESSION_QUEUE);
    let (bulk_sender, bulk_messages) = mpsc::channel(session::OUTGOING_DEPTH);
    tokio::spawn(write(control_messages, session_requests.clone(), exchange_requests.clone(), None));
    tokio::spawn(write(bulk_messages, session_requests, exchange_requests, sharing.clone()));
    Ok(Transport {
        welcome,
        incoming: Box::pin(UnboundedReceiverStream::new(incoming)),
        outgoing: Outgoing { control: control_sender, bulk: bulk_sender },
        shards: ShardSource::Remote(Box::new(shards)),
        handover: sharing.map_or(Handover::Sent, |sharing| Handover::Shared(sharing.gradients())),
    })
}

/// The memory that the coordinator offers, if it is wanted and can be seen from here.
fn open_shared(welcome: &Welcome, share: bool) -> Option<Sharing> {
    let offer = welcome.shared_memory.as_deref().filter(|_| share)?;
    // A model that does not resolve, or to another layout, ends the session with an error.
    let parameters = welcome.job.model.resolve().ok()?.layout.parameters();
    match Sharing::open(*offer, parameters) {
        Ok(sharing) => Some(sharing),
        Err(error) => {
            debug!("tensors travel over gRPC: {error}");
            None
        }
    }
}

async fn answered<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let timeout = || Status::deadline_exceeded(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()));
    tokio::time::timeout(ANSWER_TIMEOUT, call).await.unwrap_or_else(|_| Err(timeout()))
}

type Incoming = mpsc::UnboundedSender<Result<ToWorker, String>>;

async fn read_session(mut responses: Streaming<v1::SessionResponse>, mut reader: SessionReader, incoming: Incoming) {
    loop {
        let message = match responses.message().await {
            Ok(Some(response)) => reader.read(response).map_err(|error| error.to_string()),
            Ok(None) => Err("the coordinator ended the session".to_owned()),
            Err(status) => Err(describe(&status)),
        };
        let message = match message {
            Ok(Some(SessionDown::Message(message))) => Ok(message),
            // More pieces of an assignment must come.
            Ok(None) => continue,
            Ok(Some(SessionDown::Welcome(_))) => Err("a second welcome".to_owned()),
            Err(reason) => Err(format!("session: {reason}")),
        };
        let ended = message.is_err();
        if incoming.send(message).is_err() || ended {
            return;
        }
    }
}

async fn read_exchange(
    mut responses: Streaming<v1::ExchangeResponse>,
    incoming: Incoming,
    sharing: Option<Arc<Sharing>>,
) {
    let read = |response: v1::ExchangeResponse| match (ExchangeDown::try_from(response), &sharing) {
        (Err(error), _) => Err(error.to_string()),
        (Ok(response), Some(sharing)) => sharing.receive(response),
        (Ok(ExchangeDown::Message(message)), None) => Ok(Some(message)),
        (Ok(_), None) => Err("it speaks of memory that is not shared".to_owned()),
    };
    loop {
        let message = match responses.message().await {
            Ok(Some(response)) => match read(response) {
                Ok(Some(message)) => Ok(message),
                Ok(None) => continue,
                Err(error) => Err(format!("exchange: {error}")),
            },
            // The session says why.
            Ok(None) => return,
            Err(status) => Err(format!("exchange: {}", describe(&status))),
        };
        let ended = message.is_err();
        if incoming.send(message).is_err() || ended {
            return;
        }
    }
}

/// Writes messages to the streams that carry them, until the session or a stream ends.
async fn write(
    mut messages: mpsc::Receiver<FromWorker>,
    session: mpsc::Sender<v1::SessionRequest>,
    exchange: mpsc::Sender<v1::ExchangeRequest>,
    sharing: Option<Arc<Sharing>>,
) {
    while let Some(message) = messages.recv().await {
        if let Some(request) = sharing.as_ref().and_then(|sharing| sharing.hand_in(&message)) {
            if exchange.send(request).await.is_err() {
                return;
            }
            continue;
        }
        match Upward::from(message) {
            Upward::Session(request) => {
                if session.send(request).await.is_err() {
                    return;
                }
            }
            Upward::Exchange(requests) => {
                for request in requests {
                    if exchange.send(request).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// The coordinator as a source of shards.
#[derive(Clone)]
pub struct RemoteShards {
    client: WorkerServiceClient<Connection>,
    member: MemberId,
    job: Job,
}

impl RemoteShards {
    /// The shards of a run that `member` takes part in.
    pub fn new(client: WorkerServiceClient<Connection>, member: MemberId, job: Job) -> Self {
        Self { client, member, job }
    }

    /// Fetches a shard.
    ///
    /// # Errors
    /// Why it could not be had.
    pub async fn fetch(&self, shard: ShardRef) -> Result<ShardSamples, String> {
        let mut reader = ShardReader::new(&self.job, shard).ok_or_else(|| format!("the run has no {shard}"))?;
        let request = v1::FetchShardRequest::from(ShardRequest { member: self.member, shard });
        let mut client = self.client.clone();
        let pieces = answered(client.fetch_shard(request)).await.map_err(|status| describe(&status))?;
        let mut pieces: Pin<Box<Streaming<_>>> = Box::pin(pieces.into_inner());
        while let Some(piece) = answered(pieces.message()).await.map_err(|status| describe(&status))? {
            if let Some(samples) = reader.read(piece).map_err(|error| error.to_string())? {
                return ShardSamples::received(&self.job, samples).map_err(|error| error.to_string());
            }
        }
        Err("the stream ended before the shard was whole".to_owned())
    }
}

/// A number that no other worker process has.
fn process_number() -> u64 {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&nanos.to_le_bytes());
    bytes[8..].copy_from_slice(&u64::from(std::process::id()).to_le_bytes());
    lockstep_common::hash::Digest::of(&bytes).0 as u64
}

#[cfg(test)]
mod tests {
    use lockstep_common::protocol::SharedMemory;
    use lockstep_common::shared_memory::Offer;

    use super::*;
    use crate::example;

    /// Scenario: the coordinator runs where its process cannot be seen. Property: tensors travel, and nobody complains.
    #[test]
    fn memory_that_cannot_be_seen_is_done_without() {
        let spec = example::spec();
        let nowhere = Offer { process: 0, descriptor: 3, token: 5, slots: 2 };
        let welcome = Welcome {
            member: MemberId { worker: 1, incarnation: 1 },
            job: spec.job(),
            heartbeat_interval: Duration::from_secs(1),
            shared_memory: Some(Box::new(SharedMemory { parameters: nowhere, gradients: nowhere })),
        };
        assert!(open_shared(&welcome, true).is_none());
    }
}
