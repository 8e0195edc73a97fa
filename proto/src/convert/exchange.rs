//! The bulk stream.

use std::time::Duration;

use bytes::Bytes;
use lockstep_common::protocol::{self, FromWorker, MemberId, NodeReport, ToWorker};
use lockstep_common::reduce::NodeId;

use super::session::out_of_order;
use super::{At, digest, micros, required};
use crate::chunk::{at_most_a_chunk, checksum, float_count, to_bytes, to_floats, verify};
use crate::v1::{self, exchange_request, exchange_response};
use crate::wire_error::{Fault, WireError};

/// An exchange request as the coordinator sees it.
#[derive(Clone, Debug)]
pub enum ExchangeUp {
    /// Whose data follows.
    Hello(MemberId),
    /// Anything later: `Announce` or `NodeChunk`.
    Message(FromWorker),
}

impl ExchangeUp {
    /// The hello, which must come first.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is anything else.
    pub fn hello(self) -> Result<MemberId, WireError> {
        match self {
            Self::Hello(member) => Ok(member),
            Self::Message(_) => Err(out_of_order("ExchangeRequest", "a hello", "another message")),
        }
    }

    /// The message of a member, which must not be a second hello.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is a hello.
    pub fn message(self) -> Result<FromWorker, WireError> {
        match self {
            Self::Message(message) => Ok(message),
            Self::Hello(_) => Err(out_of_order("ExchangeRequest", "a member's message", "a second hello")),
        }
    }
}

impl TryFrom<v1::ExchangeRequest> for ExchangeUp {
    type Error = WireError;

    fn try_from(request: v1::ExchangeRequest) -> Result<Self, WireError> {
        use exchange_request::Message as Wire;
        Ok(match request.message.ok_or_else(|| WireError::missing("ExchangeRequest", "message"))? {
            Wire::Hello(hello) => Self::Hello(required("ExchangeHello", "member", hello.member)?),
            Wire::NodeChunk(chunk) => Self::Message(FromWorker::NodeChunk(chunk.try_into()?)),
            Wire::Announce(report) => Self::Message(FromWorker::Announce(report.try_into()?)),
        })
    }
}

/// The hello: the first request of an exchange.
impl From<MemberId> for v1::ExchangeRequest {
    fn from(member: MemberId) -> Self {
        let hello = v1::ExchangeHello { member: Some(member.into()) };
        Self { message: Some(exchange_request::Message::Hello(hello)) }
    }
}

impl From<&protocol::NodeChunk> for v1::ExchangeRequest {
    fn from(chunk: &protocol::NodeChunk) -> Self {
        node_chunk(chunk.round, chunk.node, chunk.chunk, to_bytes(&chunk.data))
    }
}

impl From<&NodeReport> for v1::ExchangeRequest {
    fn from(report: &NodeReport) -> Self {
        Self { message: Some(exchange_request::Message::Announce(report.into())) }
    }
}

/// The message that carries a part of a node's gradient, given as little-endian floats.
pub fn node_chunk(round: u64, node: NodeId, chunk: u32, data: Bytes) -> v1::ExchangeRequest {
    let checksum = checksum(&data);
    let message = v1::NodeChunk { round, node: Some(node.into()), chunk, data, checksum };
    v1::ExchangeRequest { message: Some(exchange_request::Message::NodeChunk(message)) }
}

impl TryFrom<v1::NodeChunk> for protocol::NodeChunk {
    type Error = WireError;

    fn try_from(chunk: v1::NodeChunk) -> Result<Self, WireError> {
        const M: &str = "NodeChunk";
        at_most_a_chunk(&chunk.data).at(M, "data")?;
        verify(chunk.checksum, checksum(&chunk.data)).at(M, "checksum")?;
        Ok(Self {
            round: chunk.round,
            node: required(M, "node", chunk.node)?,
            chunk: chunk.chunk,
            data: to_floats(&chunk.data).at(M, "data")?,
        })
    }
}

impl From<&NodeReport> for v1::Announce {
    fn from(report: &NodeReport) -> Self {
        let digests: Vec<u8> = report.digests.iter().flat_map(|digest| digest.0.to_be_bytes()).collect();
        Self {
            work: Some(report.work.into()),
            node: Some(report.node.into()),
            loss: Some(report.loss),
            samples: report.samples,
            digests: digests.into(),
            compute_micros: micros(report.compute),
            waited_micros: micros(report.waited),
        }
    }
}

impl TryFrom<v1::Announce> for NodeReport {
    type Error = WireError;

    fn try_from(report: v1::Announce) -> Result<Self, WireError> {
        const M: &str = "Announce";
        let node: NodeId = required(M, "node", report.node)?;
        let (digests, rest) = report.digests.as_chunks::<16>();
        if !rest.is_empty() {
            let fault = Fault::Ragged { bytes: report.digests.len(), multiple: 16 };
            return Err(WireError::new(M, "digests", fault));
        }
        let (expected, got) = (node.leaves().len() as u64, digests.len() as u64);
        if got != expected {
            return Err(WireError::new(M, "digests", Fault::Count { things: "digests", expected, got }));
        }
        Ok(Self {
            work: required(M, "work", report.work)?,
            node,
            loss: report.loss.ok_or_else(|| WireError::missing(M, "loss"))?,
            samples: report.samples,
            digests: digests.iter().map(|bytes| digest(bytes)).collect::<Result<_, _>>().at(M, "digests")?,
            compute: Duration::from_micros(report.compute_micros),
            waited: Duration::from_micros(report.waited_micros),
        })
    }
}

/// The message that carries a part of a version of the parameters. A coordinator makes it once a chunk and clones it
/// for every worker: the clones share the data, and the checksum is computed once.
pub fn parameter_chunk(version: u64, chunk: u32, data: Bytes) -> v1::ExchangeResponse {
    let checksum = checksum(&data);
    let message = v1::ParameterChunk { version, chunk, data, checksum };
    v1::ExchangeResponse { message: Some(exchange_response::Message::ParameterChunk(message)) }
}

impl TryFrom<v1::ExchangeResponse> for ToWorker {
    type Error = WireError;

    fn try_from(response: v1::ExchangeResponse) -> Result<Self, WireError> {
        const M: &str = "ParameterChunk";
        let Some(exchange_response::Message::ParameterChunk(chunk)) = response.message else {
            return Err(WireError::missing("ExchangeResponse", "message"));
        };
        float_count(&chunk.data).at(M, "data")?;
        verify(chunk.checksum, checksum(&chunk.data)).at(M, "checksum")?;
        Ok(Self::ParameterChunk { version: chunk.version, chunk: chunk.chunk, data: chunk.data })
    }
}
