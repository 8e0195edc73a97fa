//! Which stream carries which message.

use std::sync::Arc;

use bytes::Bytes;
use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{FromWorker, KeepList, ToWorker, chunks};
use lockstep_common::shared_memory::FloatBuffer;

use super::assignment::assign_messages;
use super::clip;
use super::exchange::{compared, computed, node_chunk_in, parameter_chunk_in};
use crate::chunk::{shared_to_bytes, to_bytes, to_halves};
use crate::limits::MAX_TEXT_BYTES;
use crate::v1::{self, session_request, session_response};

/// Wire messages, made when they are asked for.
pub type Messages<T> = Box<dyn Iterator<Item = T> + Send>;

/// What a worker's message becomes.
pub enum Upward {
    /// One request of the session.
    Session(v1::SessionRequest),
    /// Requests of the exchange, in this order.
    Exchange(Messages<v1::ExchangeRequest>),
}

impl From<FromWorker> for Upward {
    fn from(message: FromWorker) -> Self {
        use session_request::Message as Wire;
        let session = |message| Self::Session(v1::SessionRequest { message: Some(message) });
        match message {
            FromWorker::Heartbeat => session(Wire::Heartbeat(v1::Heartbeat {})),
            FromWorker::Cached { list, shard } => session(Wire::Cached(v1::Cached { list, shard: Some(shard.into()) })),
            FromWorker::Drain => session(Wire::Drain(v1::Drain {})),
            FromWorker::Failed { reason } => session(Wire::Failed(v1::Failed { reason: clip(reason, MAX_TEXT_BYTES) })),
            FromWorker::Compared(report) => Self::Exchange(Box::new(std::iter::once(compared(&report)))),
            FromWorker::NodeChunk(chunk) => Self::Exchange(Box::new(std::iter::once((&chunk).into()))),
            FromWorker::Announce(report) => Self::Exchange(Box::new(std::iter::once((&report).into()))),
            // The last layers first: their gradients were ready first, and so are their chunks at the coordinator.
            FromWorker::NodePart { round, node, chunk: first, gradient, precision } => {
                Self::Exchange(Box::new(chunks(gradient.len()).rev().map(move |(i, range)| {
                    node_chunk_in(precision, round, node, first + i, part(&gradient, range, precision))
                })))
            }
            FromWorker::Computed { work, node, compute } => {
                Self::Exchange(Box::new(std::iter::once(computed(work, node, compute))))
            }
        }
    }
}

/// What a coordinator's message to a worker becomes.
pub enum Downward {
    /// Responses of the session, in this order: one, or several if an assignment is large.
    Session(Messages<v1::SessionResponse>),
    /// Responses of the exchange, in this order.
    Exchange(Messages<v1::ExchangeResponse>),
}

impl From<ToWorker> for Downward {
    fn from(message: ToWorker) -> Self {
        use session_response::Message as Wire;
        let response = |message| v1::SessionResponse { message: Some(message) };
        let session = |message| Self::Session(Box::new(std::iter::once(response(message))));
        match message {
            ToWorker::Keep(KeepList { list, shards }) => {
                session(Wire::Keep(v1::Keep { list, shards: shards.into_iter().map(Into::into).collect() }))
            }
            ToWorker::Assign(assignment) => {
                Self::Session(Box::new(assign_messages(assignment).map(move |piece| response(Wire::Assign(piece)))))
            }
            ToWorker::Evicted { reason } => {
                session(Wire::Evicted(v1::Evicted { reason: clip(reason, MAX_TEXT_BYTES) }))
            }
            ToWorker::Finished { reason } => {
                session(Wire::Finished(v1::Finished { reason: clip(reason, MAX_TEXT_BYTES) }))
            }
            ToWorker::ParameterChunk { version, chunk, data, precision } => {
                Self::Exchange(Box::new(std::iter::once(parameter_chunk_in(precision, version, chunk, data))))
            }
            ToWorker::Parameters { version, values, precision } => Self::Exchange(Box::new(
                chunks(values.len())
                    .map(move |(i, range)| parameter_chunk_in(precision, version, i, part(&values, range, precision))),
            )),
        }
    }
}

fn part(values: &Arc<FloatBuffer>, range: std::ops::Range<usize>, precision: Precision) -> Bytes {
    match precision {
        Precision::F32 => shared_to_bytes(values, range).unwrap_or_else(|| to_bytes(&[])),
        Precision::Bf16 => to_halves(&values[range]),
    }
}
