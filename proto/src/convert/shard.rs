//! A shard's samples: the request, the sender's messages, the receiver's reader.

use std::sync::Arc;

use lockstep_common::protocol::{Job, MemberId, Samples, ShardRef, Split};
use lockstep_common::shard::even_part;

use super::samples::{Bounds, Cutter, Gatherer, ID_BYTES};
use super::{required, sample_bytes};
use crate::limits::SHARD_MESSAGE_BYTES;
use crate::v1;
use crate::wire_error::{Fault, WireError};

/// A member's request for a shard's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRequest {
    /// Who asks.
    pub member: MemberId,
    /// Which shard.
    pub shard: ShardRef,
}

impl From<ShardRequest> for v1::FetchShardRequest {
    fn from(request: ShardRequest) -> Self {
        Self { member: Some(request.member.into()), shard: Some(request.shard.into()) }
    }
}

impl TryFrom<v1::FetchShardRequest> for ShardRequest {
    type Error = WireError;

    fn try_from(request: v1::FetchShardRequest) -> Result<Self, WireError> {
        const M: &str = "FetchShardRequest";
        Ok(Self { member: required(M, "member", request.member)?, shard: required(M, "shard", request.shard)? })
    }
}

/// How many of a job's samples fill a message; at least one, though that may take several messages.
pub fn samples_of_a_message(job: &Job) -> usize {
    (SHARD_MESSAGE_BYTES / (sample_bytes(job) + ID_BYTES)).max(1)
}

/// The messages that carry a shard of `count` samples of `job`. They come in `parts`, one after the other, which are asked
/// for when they are sent. Their data is not copied.
pub fn shard_messages<P: Iterator<Item = Samples> + Send>(
    job: &Job,
    count: u32,
    parts: P,
) -> impl Iterator<Item = v1::FetchShardResponse> + Send + use<P> {
    let mut header = Some(v1::ShardHeader { samples: count, sample_bytes: sample_bytes(job) as u64 });
    let mut cutters = parts.map(|part| Cutter::new(Arc::new(part))).filter(|cutter| !cutter.is_empty()).peekable();
    std::iter::from_fn(move || {
        let Some(cutter) = cutters.peek_mut() else {
            // An empty shard is one message, too, with the checksum of nothing.
            let header = Some(header.take()?);
            let nothing = Arc::new(Samples { ids: Vec::new(), data: Vec::new() });
            let piece = Some(Cutter::new(nothing).cut(&mut SHARD_MESSAGE_BYTES.clone()));
            return Some(v1::FetchShardResponse { header, piece, last: true });
        };
        let piece = cutter.cut(&mut SHARD_MESSAGE_BYTES.clone());
        if cutter.is_empty() {
            cutters.next();
        }
        let last = cutters.peek().is_none();
        Some(v1::FetchShardResponse { header: header.take(), piece: Some(piece), last })
    })
}

/// Puts a shard together, checking every message against the job.
///
/// A stream that ends before [`ShardReader::read`] has given the samples is a lost connection, even if it ends cleanly.
#[derive(Debug)]
pub struct ShardReader {
    bounds: Bounds,
    header_seen: bool,
    gatherer: Gatherer,
}

impl ShardReader {
    /// A reader of the messages of `shard`; `None` if the job has no such shard.
    pub fn new(job: &Job, shard: ShardRef) -> Option<Self> {
        let shards = job.schedule.tree.shards();
        if shard.shard >= shards {
            return None;
        }
        let (samples, ids) = match shard.split {
            Split::Training => (job.schedule.shard_samples(shard.shard), job.schedule.samples.get()),
            Split::Validation => {
                let part = even_part(job.validation_samples, shards, shard.shard);
                (part.end - part.start, job.validation_samples)
            }
        };
        let bounds = Bounds { samples: samples.into(), sample_bytes: sample_bytes(job) as u64, ids: ids.into() };
        Some(Self { bounds, header_seen: false, gatherer: Gatherer::new() })
    }

    /// Takes the next message in; gives the samples after the last one. The reader is of no use after an error.
    ///
    /// # Errors
    /// [`WireError`] when a message is malformed, damaged, or another than the shard's.
    pub fn read(&mut self, message: v1::FetchShardResponse) -> Result<Option<Samples>, WireError> {
        const M: &str = "FetchShardResponse";
        match message.header {
            Some(header) if !self.header_seen => {
                self.check(header)?;
                self.header_seen = true;
            }
            Some(_) => {
                let fault = Fault::OutOfOrder { expected: "a piece without header", got: "a second header" };
                return Err(WireError::new(M, "header", fault));
            }
            None if !self.header_seen => return Err(WireError::missing(M, "header")),
            None => {}
        }
        let piece = message.piece.ok_or_else(|| WireError::missing(M, "piece"))?;
        self.gatherer.add(&piece, self.bounds).map_err(|error| error.within(M, "piece"))?;
        if !message.last {
            return Ok(None);
        }
        let (expected, got) = (self.bounds.samples, self.gatherer.len());
        if got != expected {
            return Err(WireError::new(M, "piece.ids", Fault::Count { things: "samples", expected, got }));
        }
        let whole = std::mem::replace(&mut self.gatherer, Gatherer::new());
        whole.finish(self.bounds).map(Some).map_err(|error| error.within(M, "piece"))
    }

    fn check(&self, header: v1::ShardHeader) -> Result<(), WireError> {
        const M: &str = "FetchShardResponse";
        let count = |things, expected, got| match got == expected {
            true => Ok(()),
            false => Err(Fault::Count { things, expected, got }),
        };
        count("samples", self.bounds.samples, header.samples.into())
            .map_err(|fault| WireError::new(M, "header.samples", fault))?;
        count("bytes a sample", self.bounds.sample_bytes, header.sample_bytes)
            .map_err(|fault| WireError::new(M, "header.sample_bytes", fault))
    }
}
