//! What is said of a tree node.

use std::time::Duration;

use super::Work;
use crate::hash::Digest;
use crate::reduce::NodeId;

/// What a worker found out about a tree node, besides the gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeReport {
    /// What the node belongs to.
    pub work: Work,
    /// Position in the reduction tree.
    pub node: NodeId,
    /// Sum of the samples' losses.
    pub loss: f64,
    /// Number of samples.
    pub samples: u32,
    /// For each leaf of the node, the digest of the indices of the samples used, in the order of use.
    pub digests: Vec<Digest>,
    /// How long the worker computed for the assignment that the node belongs to; `None` if the node's gradient is not whole
    /// yet, and [`FromWorker::Computed`](super::FromWorker::Computed) follows.
    pub compute: Option<Duration>,
    /// How long that assignment had waited for its parameters.
    pub waited: Duration,
    /// The digest of the node's gradient, if it was asked for.
    pub gradient: Option<Digest>,
    /// For an inspection: the first leaf that is not finite, if there is one.
    pub finding: Option<Finding>,
}

/// Samples of a leaf that a finding names, at most.
pub const MAX_NAMED_SAMPLES: usize = 8;

/// What an inspection has found: a leaf whose loss or gradient is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Which leaf.
    pub leaf: u32,
    /// Indices of the samples whose own loss or gradient is not finite: the first [`MAX_NAMED_SAMPLES`], in the order of
    /// use. Empty if only their sum is not finite.
    pub samples: Vec<u32>,
    /// The loss of the first of these samples, or else of the leaf.
    pub loss: f64,
    /// The first and the last tensor of the layout in which the gradient of that sample or leaf is not finite.
    pub tensors: Option<(u32, u32)>,
}

/// A part of a node's gradient sum.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeChunk {
    /// Round of the gradient.
    pub round: u64,
    /// Position in the reduction tree.
    pub node: NodeId,
    /// Which chunk of the layout.
    pub chunk: u32,
    /// The chunk's floats.
    pub data: Vec<f32>,
}
