//! What coordinator and workers say to each other, as plain values.
//!
//! The crate `lockstep-proto` turns these values into protobuf messages and back; a worker inside the coordinator's
//! process gets them as they are. `docs/protocol.md` shows a session.

mod chunks;
mod nodes;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::data::Dtype;
use crate::fingerprint::Fingerprints;
use crate::hash::Digest;
use crate::kernel::{Compute, Precision};
use crate::model::{LayoutHash, ModelSpec};
use crate::nn::Loss;
use crate::reduce::NodeId;
use crate::shape::Shape;
use crate::shard::Schedule;
use crate::shared_memory::{FloatBuffer, Offer};

pub use chunks::{CHUNK_FLOATS, chunks, combine_chunk_digests, parameters_digest};
pub use nodes::{Finding, MAX_NAMED_SAMPLES, NodeChunk, NodeReport};

/// One join of a worker: which worker, and which of its joins. Messages of an earlier incarnation are void.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MemberId {
    /// Number of the worker within the run, from 1.
    pub worker: u32,
    /// Counts the worker's joins, from 1; from 1001 after the coordinator's first restart, and so on.
    pub incarnation: u32,
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}#{}", self.worker, self.incarnation)
    }
}

/// A worker, as an operator calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerChoice {
    /// By its identity.
    Member(MemberId),
    /// By the name that it gave.
    Name(String),
}

impl From<&str> for WorkerChoice {
    /// An identity such as `w3#1`; anything else is a name.
    fn from(given: &str) -> Self {
        let member = || {
            let (worker, incarnation) = given.strip_prefix('w')?.split_once('#')?;
            Some(MemberId { worker: worker.parse().ok()?, incarnation: incarnation.parse().ok()? })
        };
        member().map_or_else(|| Self::Name(given.to_owned()), Self::Member)
    }
}

impl fmt::Display for WorkerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member(member) => member.fmt(f),
            Self::Name(name) => write!(f, "{name:?}"),
        }
    }
}

/// What is computed leaf by leaf: a round's gradient, or the validation loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Work {
    /// The gradient of round `round` (from 0) at parameter version `round`.
    Gradient {
        /// Number of rounds before this one.
        round: u64,
    },
    /// The loss on the validation set at parameter version `round`.
    Evaluation {
        /// Number of rounds before the evaluation.
        round: u64,
    },
    /// A closer look at round `round`, whose loss or gradient is not finite, at the same parameter version and samples.
    Inspection {
        /// Number of rounds before that one.
        round: u64,
    },
}

impl Work {
    /// The parameter version that the work is computed from: the number of rounds that made it.
    pub fn version(self) -> u64 {
        match self {
            Work::Gradient { round } | Work::Evaluation { round } | Work::Inspection { round } => round,
        }
    }

    /// Its place among the works of a run, which follow each other: rounds, and what comes between them.
    pub fn place(self) -> u64 {
        match self {
            Work::Evaluation { round } => round.saturating_mul(3),
            Work::Gradient { round } => round.saturating_mul(3).saturating_add(1),
            Work::Inspection { round } => round.saturating_mul(3).saturating_add(2),
        }
    }

    /// Which samples the work is about.
    pub fn split(self) -> Split {
        match self {
            Work::Gradient { .. } | Work::Inspection { .. } => Split::Training,
            Work::Evaluation { .. } => Split::Validation,
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Gradient { round } => write!(f, "round {round}"),
            Work::Evaluation { round } => write!(f, "evaluation after {round} rounds"),
            Work::Inspection { round } => write!(f, "inspection of round {round}"),
        }
    }
}

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Split {
    /// What the model is trained on.
    Training,
    /// What it is judged by.
    Validation,
}

/// A shard of one part of the data: the unit that workers fetch and keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardRef {
    /// Training or validation.
    pub split: Split,
    /// Which shard.
    pub shard: u32,
}

impl fmt::Display for ShardRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.split {
            Split::Training => write!(f, "training shard {}", self.shard),
            Split::Validation => write!(f, "validation shard {}", self.shard),
        }
    }
}

/// Samples as they travel: their indices in their part of the data, and their elements.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples {
    /// Index of each sample.
    pub ids: Vec<u32>,
    /// Little-endian elements of all samples, one after the other, in the job's element type.
    pub data: Vec<u8>,
}

/// Everything a worker must know to compute a run's leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The run's name.
    pub run: String,
    /// The model.
    pub model: ModelSpec,
    /// Hash of the parameters' layout, which the worker must find as well.
    pub layout: LayoutHash,
    /// The loss.
    pub loss: Loss,
    /// Which samples each leaf takes.
    pub schedule: Schedule,
    /// Number of validation samples; may be 0.
    pub validation_samples: u32,
    /// Shape of a sample in the data set.
    pub sample_shape: Shape,
    /// Element type of the data set.
    pub dtype: Dtype,
    /// What the operands of product-sums are rounded to.
    pub compute: Compute,
    /// What the gradients of tree nodes, and the parameters that workers compute with, are rounded to.
    pub wire: Precision,
}

/// A request to become a member.
#[derive(Clone, Debug, PartialEq)]
pub struct JoinRequest {
    /// Identifies the worker process, over all its joins.
    pub process: u64,
    /// A name for people: usually host and process id.
    pub name: String,
    /// Version of the software.
    pub version: String,
    /// What the worker computes with, in each precision: it does not know yet which one the run has.
    pub fingerprints: Fingerprints,
    /// Threads that the worker computes with.
    pub threads: u32,
    /// Instruction set that the worker computes on, for display.
    pub isa: String,
}

/// The answer to a worker that was admitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// Who the worker is from now on.
    pub member: MemberId,
    /// What the run is.
    pub job: Job,
    /// How often the worker must give a sign of life.
    pub heartbeat_interval: Duration,
    /// Memory in which tensors may be exchanged, if the worker can see it.
    pub shared_memory: Option<Box<SharedMemory>>,
}

/// What a coordinator offers to a worker that may run on its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Versions of the parameters, for all workers to read.
    pub parameters: Offer,
    /// Gradients of nodes, for this worker to write.
    pub gradients: Offer,
}

/// A leaf to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct LeafTask {
    /// Which leaf.
    pub leaf: u32,
    /// Its samples in the order of use, if the worker has not cached the leaf's shard.
    pub inline: Option<Arc<Samples>>,
    /// How it is to be handed in.
    pub handing: Handing,
}

/// How a leaf is to be handed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Handing {
    /// As a part of the largest nodes that can be made.
    #[default]
    Summed,
    /// As a node by itself, whose report has the digest of its gradient.
    Alone,
    /// As a report with the digest of its gradient, and nothing else: for comparison.
    Compared,
}

/// Leaves to compute for a piece of work.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// What the leaves belong to.
    pub work: Work,
    /// Ascending leaves.
    pub leaves: Vec<LeafTask>,
}

/// Shards that a worker should have. A new list replaces the one before, and what was reported for that one is void.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepList {
    /// Counts the member's lists, from 1.
    pub list: u32,
    /// The shards.
    pub shards: Vec<ShardRef>,
}

/// From the coordinator to a worker.
#[derive(Clone, Debug)]
pub enum ToWorker {
    /// Shards that the worker should have; its other shards may go.
    Keep(KeepList),
    /// Leaves to compute, as soon as the parameters of that version are there.
    Assign(Assignment),
    /// A part of a version of the parameters.
    ParameterChunk {
        /// Number of rounds that made the version.
        version: u64,
        /// Which chunk of the layout.
        chunk: u32,
        /// Little-endian floats, or what of them travels in this precision.
        data: Bytes,
        /// How data holds the floats.
        precision: Precision,
    },
    /// A whole version of the parameters: as it is for a worker in the same process, by its place for one that shares
    /// the memory that it lies in, and in chunks for others.
    Parameters {
        /// Number of rounds that made the version.
        version: u64,
        /// The flat vector.
        values: Arc<FloatBuffer>,
        /// What it is rounded to if it travels.
        precision: Precision,
    },
    /// The worker is out; it may join again.
    Evicted {
        /// Why.
        reason: String,
    },
    /// The run has ended.
    Finished {
        /// How.
        reason: String,
    },
}

/// Immutable bytes that many receivers share.
pub use bytes::Bytes;

/// From a worker to the coordinator, after it was admitted.
#[derive(Clone, Debug)]
pub enum FromWorker {
    /// A sign of life.
    Heartbeat,
    /// A shard is cached, as the list with this number asks: its samples need not be sent inline.
    Cached {
        /// Number of the list.
        list: u32,
        /// Which shard.
        shard: ShardRef,
    },
    /// A node is computed, or at least its loss; for a round, the parts of its gradient follow.
    Announce(NodeReport),
    /// The gradient of a node is whole that was announced before it was. Its last part follows.
    Computed {
        /// What the node belongs to.
        work: Work,
        /// Position in the reduction tree.
        node: NodeId,
        /// How long the worker computed for the assignment that the node belongs to.
        compute: Duration,
    },
    /// A leaf is computed for comparison; nothing follows.
    Compared(NodeReport),
    /// A part of a node's gradient.
    NodeChunk(NodeChunk),
    /// A node's gradient or some chunks of it, which go the same ways as parameters: as they are, by their place, or one by
    /// one.
    NodePart {
        /// Round of the gradient.
        round: u64,
        /// Position in the reduction tree.
        node: NodeId,
        /// The first of the chunks.
        chunk: u32,
        /// Their floats.
        gradient: Arc<FloatBuffer>,
        /// Which numbers its floats are: how much of them has to travel.
        precision: Precision,
    },
    /// The worker wants to leave when its work is handed over.
    Drain,
    /// The worker cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Why a worker is not admitted. Only a full run gets better by trying again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Coordinator and worker are different builds.
    #[error("version mismatch: the run's coordinator is lockstep {run}, this worker is {worker}; use the same release")]
    Version {
        /// The coordinator's.
        run: String,
        /// The worker's.
        worker: String,
    },
    /// They would compute different bits.
    #[error(
        "numerics fingerprint mismatch: the run has {run}, this worker {worker}; its build or processor computes other bits"
    )]
    Fingerprint {
        /// The coordinator's.
        run: Digest,
        /// The worker's.
        worker: Digest,
    },
    /// The worker has computed wrong bits before.
    #[error("this worker is barred from the run: it {reason}")]
    Barred {
        /// What it computed, and what would have been right.
        reason: String,
    },
    /// There is no room for it now.
    #[error("the run has {members} workers already, as many as it can have (cluster.max_workers); try again later")]
    Full {
        /// How many there are.
        members: u32,
    },
    /// There is nothing left to do.
    #[error("the run has ended: {reason}")]
    Finished {
        /// How.
        reason: String,
    },
}
