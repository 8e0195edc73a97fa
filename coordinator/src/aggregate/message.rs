//! What the aggregator is told, and what it reports.

use std::sync::Arc;

use lockstep_common::hash::Digest;
use lockstep_common::optim::adam::Moments;
use lockstep_common::progress::Aggregation;
use lockstep_common::protocol::{Bytes, MemberId, NodeChunk};
use lockstep_common::reduce::NodeId;
use lockstep_common::shared_memory::FloatBuffer;

use crate::checkpoint::Draft;
use crate::round::Step;

/// What the aggregator is told, in this order for each round: one `Begin`; then, for each node, one `Expect` before the
/// parts of its gradient.
#[derive(Debug)]
pub enum ToAggregator {
    /// A round starts.
    Begin {
        /// Which round.
        round: u64,
        /// Samples in its global batch.
        samples: u32,
        /// The optimizer's step, if it is taken.
        step: Step,
        /// Whether anybody wants the new parameters chunk by chunk.
        chunks: bool,
    },
    /// The member's node, with this loss, was checked; its parts are welcome.
    Expect(MemberId, NodeId, f64),
    /// The step of this round, which is not finite, is left out: the next version has the parameters of the one before.
    Skip {
        /// Which round.
        round: u64,
    },
    /// Take a snapshot for a checkpoint, before the next `Begin`.
    Checkpoint(Box<Draft>),
    /// From now on, what comes of a member is to be kept out of the sum until it is released.
    Hold(MemberId),
    /// What is held of a member goes into the sum, and so does what still comes of its nodes.
    Release(MemberId),
    /// What is held of a member is thrown away, and so is what still comes of its nodes.
    Discard(MemberId),
    /// A chunk of a node's gradient.
    Chunk(MemberId, NodeChunk),
    /// A node's gradient or some chunks of it, from a worker that shares the memory that they lie in.
    Part {
        /// Who computed it.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
        /// The first of the chunks.
        chunk: u32,
        /// Their floats.
        gradient: Arc<FloatBuffer>,
    },
}

/// What the aggregator reports.
#[derive(Debug)]
pub enum FromAggregator {
    /// All parts of a node are there.
    Arrived {
        /// Who sent them.
        member: MemberId,
        /// Round of the gradient.
        round: u64,
        /// Which node.
        node: NodeId,
    },
    /// A chunk of the next version is made.
    Updated {
        /// Rounds that make the version.
        version: u64,
        /// Which chunk.
        chunk: u32,
        /// Its little-endian floats, or what of them travels in the run's precision.
        data: Bytes,
    },
    /// A round was skipped: the next version is a copy of the one before. Chunks of it were reported before this.
    Skipped {
        /// Rounds that make the version.
        version: u64,
        /// The parameters.
        parameters: Arc<FloatBuffer>,
    },
    /// The round's gradient is complete, and the next version is whole if the step was taken.
    Reduced {
        /// The round that made it.
        round: u64,
        /// Euclidean norm of the mean gradient.
        gradient_norm: f64,
        /// Digest of the parameters, the new ones or those that stay.
        digest: Digest,
        /// The new parameters. Without them the gradient or the loss is not finite, no step was taken, and everything is as
        /// it was before the round.
        parameters: Option<Arc<FloatBuffer>>,
        /// What the round took here.
        took: Aggregation,
    },
    /// A member sent what cannot be.
    Violation {
        /// Who.
        member: MemberId,
        /// What.
        reason: String,
    },
}

/// What an aggregator starts from.
#[derive(Debug)]
pub struct Start {
    /// The parameters.
    pub parameters: Arc<FloatBuffer>,
    /// The optimizer's moments.
    pub moments: Moments,
    /// Rounds that made them.
    pub version: u64,
}

impl Start {
    /// Before the first round. Takes memory for the moments, twice as much as for the parameters, which the system does not
    /// have at once.
    pub fn fresh(parameters: FloatBuffer) -> Self {
        Self { moments: Moments::zero(parameters.len()), parameters: Arc::new(parameters), version: 0 }
    }
}
