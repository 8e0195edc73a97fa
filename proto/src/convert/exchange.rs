//! The bulk stream.

use std::time::Duration;

use bytes::Bytes;
use lockstep_common::kernel::Precision;
use lockstep_common::protocol::{self, Finding, FromWorker, MAX_NAMED_SAMPLES, MemberId, NodeReport, ToWorker, Work};
use lockstep_common::reduce::NodeId;

use super::session::out_of_order;
use super::{At, WireEnum, at_most, digest, digest_bytes, micros, required};
use crate::chunk::{at_most_a_chunk, checksum, number_count, to_bytes, to_floats, verify};
use crate::v1::{self, exchange_request, exchange_response};
use crate::wire_error::{Fault, WireError};

/// An exchange request as the coordinator sees it.
#[derive(Clone, Debug)]
pub enum ExchangeUp {
    /// Whose data follows.
    Hello(Hello),
    /// A later message for the coordinator: about a node, or a chunk of its gradient.
    Message(FromWorker),
    /// A node's gradient lies in a slot of the gradients' region.
    NodeSlot {
        /// Round of the gradient.
        round: u64,
        /// Position in the reduction tree.
        node: NodeId,
        /// Which slot.
        slot: u32,
    },
    /// A slot of the parameters' region is no longer read.
    Release(u32),
}

/// How an exchange begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whose data follows.
    pub member: MemberId,
    /// Whether it has opened the shared memory that it was offered.
    pub shares_memory: bool,
}

impl ExchangeUp {
    /// The hello, which must come first.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is anything else.
    pub fn hello(self) -> Result<Hello, WireError> {
        match self {
            Self::Hello(hello) => Ok(hello),
            _ => Err(out_of_order("ExchangeRequest", "a hello", "another message")),
        }
    }

    /// The message of a member that shares no memory, which must not be a second hello.
    ///
    /// # Errors
    /// [`Fault::OutOfOrder`] when it is a hello, or speaks of shared memory.
    pub fn message(self) -> Result<FromWorker, WireError> {
        const EXPECTED: &str = "a member's message";
        match self {
            Self::Message(message) => Ok(message),
            Self::Hello(_) => Err(out_of_order("ExchangeRequest", EXPECTED, "a second hello")),
            Self::NodeSlot { .. } | Self::Release(_) => {
                Err(out_of_order("ExchangeRequest", EXPECTED, "a slot of memory that is not shared"))
            }
        }
    }
}

impl TryFrom<v1::ExchangeRequest> for ExchangeUp {
    type Error = WireError;

    fn try_from(request: v1::ExchangeRequest) -> Result<Self, WireError> {
        use exchange_request::Message as Wire;
        Ok(match request.message.ok_or_else(|| WireError::missing("ExchangeRequest", "message"))? {
            Wire::Hello(hello) => Self::Hello(Hello {
                member: required("ExchangeHello", "member", hello.member)?,
                shares_memory: hello.shares_memory,
            }),
            Wire::NodeChunk(chunk) => Self::Message(FromWorker::NodeChunk(chunk.try_into()?)),
            Wire::Announce(report) => Self::Message(FromWorker::Announce(report.try_into()?)),
            Wire::Compared(report) => Self::Message(FromWorker::Compared(report.try_into()?)),
            Wire::Computed(v1::Computed { work, node, compute_micros }) => Self::Message(FromWorker::Computed {
                work: required("Computed", "work", work)?,
                node: required("Computed", "node", node)?,
                compute: Duration::from_micros(compute_micros),
            }),
            Wire::NodeSlot(v1::NodeSlot { round, node, slot }) => {
                Self::NodeSlot { round, node: required("NodeSlot", "node", node)?, slot }
            }
            Wire::Release(v1::ReleaseSlot { slot }) => Self::Release(slot),
        })
    }
}

/// The hello: the first request of an exchange.
impl From<Hello> for v1::ExchangeRequest {
    fn from(hello: Hello) -> Self {
        let hello = v1::ExchangeHello { member: Some(hello.member.into()), shares_memory: hello.shares_memory };
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

/// The message that carries a leaf's report for comparison.
pub(super) fn compared(report: &NodeReport) -> v1::ExchangeRequest {
    v1::ExchangeRequest { message: Some(exchange_request::Message::Compared(report.into())) }
}

/// The message that carries a part of a node's gradient, given as little-endian floats.
pub fn node_chunk(round: u64, node: NodeId, chunk: u32, data: Bytes) -> v1::ExchangeRequest {
    node_chunk_in(Precision::F32, round, node, chunk, data)
}

/// The same, with data in a given precision.
pub(super) fn node_chunk_in(
    precision: Precision,
    round: u64,
    node: NodeId,
    chunk: u32,
    data: Bytes,
) -> v1::ExchangeRequest {
    let checksum = checksum(&data);
    let precision = v1::Precision::from(precision).into();
    let message = v1::NodeChunk { round, node: Some(node.into()), chunk, data, checksum, precision };
    v1::ExchangeRequest { message: Some(exchange_request::Message::NodeChunk(message)) }
}

/// The hello of a member that shares no memory.
impl From<MemberId> for v1::ExchangeRequest {
    fn from(member: MemberId) -> Self {
        Hello { member, shares_memory: false }.into()
    }
}

/// The message that the gradient of an announced node is computed.
pub(super) fn computed(work: Work, node: NodeId, compute: Duration) -> v1::ExchangeRequest {
    let message = v1::Computed { work: Some(work.into()), node: Some(node.into()), compute_micros: micros(compute) };
    v1::ExchangeRequest { message: Some(exchange_request::Message::Computed(message)) }
}

/// The message that a node's gradient lies in a slot.
pub fn node_slot(round: u64, node: NodeId, slot: u32) -> v1::ExchangeRequest {
    let message = v1::NodeSlot { round, node: Some(node.into()), slot };
    v1::ExchangeRequest { message: Some(exchange_request::Message::NodeSlot(message)) }
}

/// The message that a slot of the parameters' region is no longer read.
pub fn release_parameters(slot: u32) -> v1::ExchangeRequest {
    v1::ExchangeRequest { message: Some(exchange_request::Message::Release(v1::ReleaseSlot { slot })) }
}

impl TryFrom<v1::NodeChunk> for protocol::NodeChunk {
    type Error = WireError;

    fn try_from(chunk: v1::NodeChunk) -> Result<Self, WireError> {
        const M: &str = "NodeChunk";
        at_most_a_chunk(&chunk.data).at(M, "data")?;
        verify(chunk.checksum, checksum(&chunk.data)).at(M, "checksum")?;
        let precision = Precision::from_wire(chunk.precision).at(M, "precision")?;
        Ok(Self {
            round: chunk.round,
            node: required(M, "node", chunk.node)?,
            chunk: chunk.chunk,
            data: to_floats(&chunk.data, precision).at(M, "data")?,
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
            compute_micros: report.compute.map(micros),
            waited_micros: micros(report.waited),
            gradient: report.gradient.map(digest_bytes),
            finding: report.finding.as_ref().map(Into::into),
        }
    }
}

impl From<&Finding> for v1::Finding {
    fn from(finding: &Finding) -> Self {
        Self {
            leaf: finding.leaf,
            samples: finding.samples.clone(),
            loss: Some(finding.loss),
            tensors: finding.tensors.map(|(first, last)| v1::TensorSpan { first, last }),
        }
    }
}

impl TryFrom<v1::Finding> for Finding {
    type Error = WireError;

    fn try_from(finding: v1::Finding) -> Result<Self, WireError> {
        const M: &str = "Finding";
        let samples = finding.samples.len() as u64;
        at_most(samples, MAX_NAMED_SAMPLES as u64, " samples").map_err(|fault| WireError::new(M, "samples", fault))?;
        Ok(Self {
            leaf: finding.leaf,
            samples: finding.samples,
            loss: finding.loss.ok_or_else(|| WireError::missing(M, "loss"))?,
            tensors: finding.tensors.map(|span| (span.first, span.last)),
        })
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
            compute: report.compute_micros.map(Duration::from_micros),
            waited: Duration::from_micros(report.waited_micros),
            gradient: report.gradient.map(|bytes| digest(&bytes)).transpose().at(M, "gradient")?,
            finding: report.finding.map(Finding::try_from).transpose().map_err(|error| error.within(M, "finding"))?,
        })
    }
}

/// The message that carries a part of a version of the parameters. A coordinator makes it once a chunk and clones it
/// for every worker: the clones share the data, and the checksum is computed once. Data are little-endian floats.
pub fn parameter_chunk(version: u64, chunk: u32, data: Bytes) -> v1::ExchangeResponse {
    parameter_chunk_in(Precision::F32, version, chunk, data)
}

/// The same, with data in a given precision.
pub(super) fn parameter_chunk_in(precision: Precision, version: u64, chunk: u32, data: Bytes) -> v1::ExchangeResponse {
    let checksum = checksum(&data);
    let precision = v1::Precision::from(precision).into();
    let message = v1::ParameterChunk { version, chunk, data, checksum, precision };
    v1::ExchangeResponse { message: Some(exchange_response::Message::ParameterChunk(message)) }
}

/// The message that a version of the parameters lies in a slot.
pub fn parameter_slot(version: u64, slot: u32) -> v1::ExchangeResponse {
    let message = exchange_response::Message::ParameterSlot(v1::ParameterSlot { version, slot });
    v1::ExchangeResponse { message: Some(message) }
}

/// The message that a slot of the gradients' region is no longer read.
pub fn release_gradient(slot: u32) -> v1::ExchangeResponse {
    v1::ExchangeResponse { message: Some(exchange_response::Message::Release(v1::ReleaseSlot { slot })) }
}

/// An exchange response as the worker sees it.
#[derive(Clone, Debug)]
pub enum ExchangeDown {
    /// A message for the worker: `ParameterChunk`.
    Message(ToWorker),
    /// A version of the parameters lies in a slot of the parameters' region.
    ParameterSlot {
        /// Number of rounds that made the version.
        version: u64,
        /// Which slot.
        slot: u32,
    },
    /// A slot of the gradients' region is no longer read.
    Release(u32),
}

impl TryFrom<v1::ExchangeResponse> for ExchangeDown {
    type Error = WireError;

    fn try_from(response: v1::ExchangeResponse) -> Result<Self, WireError> {
        use exchange_response::Message as Wire;
        const M: &str = "ParameterChunk";
        match response.message.ok_or_else(|| WireError::missing("ExchangeResponse", "message"))? {
            Wire::ParameterChunk(chunk) => {
                let precision = Precision::from_wire(chunk.precision).at(M, "precision")?;
                number_count(&chunk.data, precision).at(M, "data")?;
                verify(chunk.checksum, checksum(&chunk.data)).at(M, "checksum")?;
                let v1::ParameterChunk { version, chunk, data, .. } = chunk;
                Ok(Self::Message(ToWorker::ParameterChunk { version, chunk, data, precision }))
            }
            Wire::ParameterSlot(v1::ParameterSlot { version, slot }) => Ok(Self::ParameterSlot { version, slot }),
            Wire::Release(v1::ReleaseSlot { slot }) => Ok(Self::Release(slot)),
        }
    }
}
