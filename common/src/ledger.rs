//! The ledger: for every round, who computed what from which samples, and what came out.
//!
//! A ledger is a file of JSON lines. The first line says what the schedule depends on; every further line holds one
//! round's record and a chain digest over all lines so far, so that a line that was lost, changed or torn shows.
//! [`audit()`] proves from the file alone that every epoch used every sample exactly once and that every round's tree is
//! complete.

mod audit;

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::config::{PrecisionConfig, RunSpec};
use crate::hash::{Digest, DigestBuilder};
use crate::kernel::{Compute, Precision};
use crate::model::LayoutHash;
use crate::protocol::{MemberId, parameters_digest};
use crate::reduce::{NodeId, Tree};
use crate::shard::{MAX_SAMPLES, Schedule};

pub use audit::{AUDIT_BYTES_PER_SAMPLE, Audit, AuditError, audit};

/// Version of the format.
const FORMAT: u32 = 1;

/// The longest line: a run has at most 65,536 leaves, each with a digest (35 bytes) and, at most, a node with its member
/// (about 100 bytes) and its number twice (7 bytes each).
pub const MAX_LINE_BYTES: u64 = 65_536 * 160;

/// What the records that follow are about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the format.
    pub lockstep_ledger: u32,
    /// The run's name.
    pub run: String,
    /// Key of the schedule's orders.
    pub seed: u64,
    /// Training samples.
    pub samples: NonZeroU32,
    /// Samples in a global batch.
    pub batch_size: NonZeroU32,
    /// Virtual shards.
    pub shards: u32,
    /// Whether samples are shuffled.
    pub shuffle: bool,
    /// What product-sums were computed from; not written for 32-bit floats.
    #[serde(default, skip_serializing_if = "is_default")]
    pub compute: Compute,
    /// What the gradients of tree nodes, and the parameters of workers, were rounded to; not written for 32-bit floats.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wire: Precision,
    /// Layout of the parameters.
    pub layout: LayoutHash,
    /// Digest of the parameters before the first round.
    pub initial_parameters: Digest,
}

impl Header {
    /// The header of a run in 32-bit floats.
    pub fn new(run: &str, schedule: &Schedule, layout: LayoutHash, initial_parameters: Digest) -> Self {
        Self {
            lockstep_ledger: FORMAT,
            run: run.to_owned(),
            seed: schedule.seed,
            samples: schedule.samples,
            batch_size: schedule.batch_size,
            shards: schedule.tree.shards(),
            shuffle: schedule.shuffle,
            compute: Compute::F32,
            wire: Precision::F32,
            layout,
            initial_parameters,
        }
    }

    /// The header of a run that begins with these parameters.
    pub fn of(spec: &RunSpec, initial_parameters: &[f32]) -> Self {
        let (layout, PrecisionConfig { compute, wire }) = (spec.model.layout.hash(), spec.precision);
        let initial_parameters = parameters_digest(initial_parameters);
        Self { compute, wire, ..Self::new(&spec.name, &spec.schedule, layout, initial_parameters) }
    }

    fn schedule(&self) -> Option<Schedule> {
        let Self { seed, samples, batch_size, shuffle, .. } = *self;
        Some(Schedule { seed, samples, batch_size, shuffle, tree: Tree::over(self.shards)? })
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A tree node that a member sent and the sum was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contribution {
    /// Who computed it.
    pub by: MemberId,
    /// Which node.
    pub node: NodeId,
}

/// One round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Number of the round in the run, from 0.
    pub round: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Number of the round in its epoch, from 0.
    pub batch: u32,
    /// Samples used.
    pub samples: u32,
    /// Mean loss over them.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub loss: f64,
    /// Euclidean norm of the mean gradient.
    #[serde(deserialize_with = "crate::json_float::or_nan")]
    pub gradient_norm: f64,
    /// Digest of the parameters that the round made.
    pub parameters: Digest,
    /// Whether the round was skipped, because its loss or gradient is not finite: the parameters stayed as they were.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// The nodes that the sum was made of, from left to right.
    pub nodes: Vec<Contribution>,
    /// For each leaf, the digest of the samples that its worker used.
    pub leaves: Vec<Digest>,
    /// Leaves that a second member was asked to compute as well, because the first was late; ascending. Both answers have
    /// the same bits: it changes nothing but who is credited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hedged: Vec<u32>,
    /// Leaves that two workers computed with the same bits, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checked: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct Line<T> {
    chain: Digest,
    record: T,
}

/// Turns records into lines.
#[derive(Clone, Debug)]
pub struct Chain {
    last: Digest,
}

impl Chain {
    /// A chain that starts with `header`, and the header's line.
    pub fn start(header: &Header) -> (Self, String) {
        let text = to_json(header);
        (Self { last: Digest::of(text.as_bytes()) }, text)
    }

    /// A chain that goes on after a line with this digest.
    pub fn resume(last: Digest) -> Self {
        Self { last }
    }

    /// Digest of the last line.
    pub fn last(&self) -> Digest {
        self.last
    }

    /// The line of the next record.
    pub fn line(&mut self, record: &Record) -> String {
        let text = to_json(record);
        self.last = link(self.last, &text);
        format!("{{\"chain\":\"{}\",\"record\":{text}}}", self.last)
    }
}

fn link(last: Digest, record: &str) -> Digest {
    let mut digest = DigestBuilder::default();
    digest.bytes(&last.0.to_le_bytes());
    digest.bytes(record.as_bytes());
    digest.finish()
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("numbers, strings and lists have a JSON form")
}

fn parse_header(line: &str) -> Result<(Header, Schedule), String> {
    let header: Header = serde_json::from_str(line).map_err(|error| format!("no ledger header: {error}"))?;
    if header.lockstep_ledger != FORMAT {
        return Err(format!("format {}; this program reads format {FORMAT}", header.lockstep_ledger));
    }
    let shards = header.shards;
    let schedule = header.schedule().ok_or(format!("{shards} shards; it must be a power of two, at most 65536"))?;
    if header.samples.get() > MAX_SAMPLES {
        return Err(format!("{} samples; a run has at most {MAX_SAMPLES}", header.samples));
    }
    Ok((header, schedule))
}

/// The chain digest at the end of `line`, which is the ledger's first or a later one.
///
/// # Errors
/// When it is no line of a ledger.
pub fn chain_after(line: &str, first: bool) -> Result<Digest, String> {
    if first {
        return parse_header(line).map(|_| Digest::of(line.as_bytes()));
    }
    let line: Line<&RawValue> = serde_json::from_str(line).map_err(|error| error.to_string())?;
    Ok(line.chain)
}

/// Reads the header, the ledger's first line.
///
/// # Errors
/// When it is none that this program knows.
pub fn read_header(line: &str) -> Result<Header, String> {
    parse_header(line).map(|(header, _)| header)
}

/// Reads one record's line and checks its chain digest.
///
/// # Errors
/// What is wrong with the line.
pub fn parse_line(line: &str, chain: &mut Digest) -> Result<Record, String> {
    let line: Line<&RawValue> = serde_json::from_str(line).map_err(|error| match error.is_eof() {
        true => format!("{error}: the line is cut off; a run that is still going on may be writing it"),
        false => error.to_string(),
    })?;
    let expected = link(*chain, line.record.get());
    if line.chain != expected {
        return Err(format!(
            "chain digest is {}, expected {expected}: this line or one before it was changed",
            line.chain
        ));
    }
    *chain = expected;
    serde_json::from_str(line.record.get()).map_err(|error| error.to_string())
}
