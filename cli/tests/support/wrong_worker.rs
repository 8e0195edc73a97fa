//! A worker with bad memory: a real session over gRPC, with a real engine, that computes from parameters of which one
//! is wrong in each chunk. Everything else about it is honest.

use std::pin::Pin;
use std::thread::JoinHandle;

use lockstep_common::kernel::Isa;
use lockstep_common::protocol::{Bytes, FromWorker, ToWorker};
use lockstep_proto::convert::{ExchangeDown, Hello, SessionDown, SessionReader, Upward};
use lockstep_proto::v1;
use lockstep_worker::client::RemoteShards;
use lockstep_worker::engine::Handover;
use lockstep_worker::session::{self, Compute, Leave, Outgoing, SessionEnd, ShardSource, Transport};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};

use super::fake_worker::{connect, honest_join, runtime, soon};

/// Takes part in the run at `url` as the worker process with this number until it is put out or the run ends.
pub(crate) fn spawn(url: &str, process: u64) -> JoinHandle<SessionEnd> {
    let url = url.to_owned();
    std::thread::spawn(move || {
        let runtime = runtime();
        runtime.block_on(async {
            let transport = soon("a welcome", join(&url, process)).await;
            let compute = Compute { isa: Isa::best(), threads: 1 };
            soon("the session's end", session::run(transport, compute, Leave::never()))
                .await
                .expect("the model is known here")
        })
    })
}

async fn join(url: &str, process: u64) -> Transport {
    let (mut control, mut bulk) = (connect(url).await, connect(url).await);
    let (session_requests, requests) = mpsc::channel::<v1::SessionRequest>(64);
    let first = tokio_stream::once(honest_join(process).into());
    let mut responses = control.session(first.chain(ReceiverStream::new(requests))).await.expect("a join").into_inner();
    let mut reader = SessionReader::new();
    let response = responses.message().await.expect("a session").expect("a welcome");
    let Ok(Some(SessionDown::Welcome(welcome))) = reader.read(response) else { panic!("no welcome") };

    let shards = RemoteShards::new(bulk.clone(), welcome.member, welcome.job.clone());
    let (exchange_requests, requests) = mpsc::channel::<v1::ExchangeRequest>(64);
    let hello = Hello { member: welcome.member, shares_memory: false };
    let hello = tokio_stream::once(v1::ExchangeRequest::from(hello)).chain(ReceiverStream::new(requests));
    let mut chunks = bulk.exchange(hello).await.expect("an exchange").into_inner();

    let (incoming, messages) = mpsc::unbounded_channel();
    let from_exchange = incoming.clone();
    tokio::spawn(async move {
        while let Ok(Some(response)) = responses.message().await {
            if let Ok(Some(SessionDown::Message(message))) = reader.read(response) {
                let _ = incoming.send(Ok(message));
            }
        }
    });
    tokio::spawn(async move {
        while let Ok(Some(response)) = chunks.message().await {
            if let Ok(ExchangeDown::Message(message)) = ExchangeDown::try_from(response) {
                let _ = from_exchange.send(Ok(with_a_wrong_value(message)));
            }
        }
    });
    let (outgoing, mut sent) = mpsc::channel::<FromWorker>(session::OUTGOING_DEPTH);
    tokio::spawn(async move {
        while let Some(message) = sent.recv().await {
            match Upward::from(message) {
                Upward::Session(request) => drop(session_requests.send(request).await),
                Upward::Exchange(requests) => {
                    for request in requests {
                        let _ = exchange_requests.send(request).await;
                    }
                }
            }
        }
    });
    Transport {
        welcome,
        incoming: Box::pin(UnboundedReceiverStream::new(messages)) as Pin<Box<_>>,
        outgoing: Outgoing { control: outgoing.clone(), bulk: outgoing },
        shards: ShardSource::Remote(Box::new(shards)),
        handover: Handover::Sent,
    }
}

/// Makes the last parameter of a chunk 1. Every output depends on the last of all, the bias of a pixel: weights of pixels
/// that are always black would make no difference.
fn with_a_wrong_value(message: ToWorker) -> ToWorker {
    match message {
        ToWorker::ParameterChunk { version, chunk, data, precision } => {
            let mut data = data.to_vec();
            if let Some(last) = data.last_chunk_mut() {
                *last = 1f32.to_le_bytes();
            }
            ToWorker::ParameterChunk { version, chunk, data: Bytes::from(data), precision }
        }
        other => other,
    }
}
