//! Sums over a subtree of the reduction tree: leaves in parallel, additions by position.

use std::sync::Mutex;

use super::network::{Network, Weights, Workspace};
use crate::kernel::elementwise;
use crate::reduce::NodeId;

/// The samples of leaves, for the threads that compute them.
pub trait LeafSource: Sync {
    /// Number of samples of a leaf; may be 0.
    fn samples(&self, leaf: u32) -> u32;
    /// Writes sample `i` of a leaf to `out`.
    fn write(&self, leaf: u32, i: usize, out: &mut [f32]);
}

/// The value of a tree node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSum {
    /// Sum of the samples' gradients, laid out like the parameters. Empty for an evaluation.
    pub gradient: Vec<f32>,
    /// Sum of the samples' losses.
    pub loss: f64,
    /// Number of samples.
    pub samples: u32,
}

/// Memory that is used again from round to round: workspaces of threads, gradients of tree nodes.
#[derive(Debug, Default)]
pub struct Buffers {
    workspaces: Mutex<Vec<Workspace>>,
    gradients: Mutex<Vec<Vec<f32>>>,
}

impl Buffers {
    fn workspace(&self, network: &Network) -> Workspace {
        lock(&self.workspaces).pop().unwrap_or_else(|| network.workspace())
    }

    fn gradient(&self, network: &Network) -> Vec<f32> {
        lock(&self.gradients).pop().unwrap_or_else(|| vec![0.0; network.parameters()])
    }

    /// Gives back the memory of a gradient that is no longer needed.
    pub fn recycle(&self, gradient: Vec<f32>) {
        if !gradient.is_empty() {
            lock(&self.gradients).push(gradient);
        }
    }
}

/// A panic of another thread while it held the lock leaves a list of buffers, which is always valid.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The gradient sum under `node`. Runs in the current rayon pool; the result does not depend on its size.
pub fn subtree(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
) -> NodeSum {
    let Some([left, right]) = node.children() else {
        let samples = source.samples(node.index);
        let mut gradient = buffers.gradient(network);
        let mut workspace = buffers.workspace(network);
        let write = |i: usize, out: &mut [f32]| source.write(node.index, i, out);
        let loss = network.leaf_gradient(weights, samples as usize, &write, &mut gradient, &mut workspace);
        lock(&buffers.workspaces).push(workspace);
        return NodeSum { gradient, loss, samples };
    };
    let (mut left, right) = rayon::join(
        || subtree(network, weights, left, source, buffers),
        || subtree(network, weights, right, source, buffers),
    );
    elementwise::add(network.isa(), &mut left.gradient, &right.gradient);
    buffers.recycle(right.gradient);
    NodeSum { loss: left.loss + right.loss, samples: left.samples + right.samples, gradient: left.gradient }
}

/// The loss sum under `node`, without gradients. Runs in the current rayon pool.
pub fn evaluate(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
) -> NodeSum {
    let Some([left, right]) = node.children() else {
        let samples = source.samples(node.index);
        let mut workspace = buffers.workspace(network);
        let write = |i: usize, out: &mut [f32]| source.write(node.index, i, out);
        let loss = network.leaf_loss(weights, samples as usize, &write, &mut workspace);
        lock(&buffers.workspaces).push(workspace);
        return NodeSum { gradient: Vec::new(), loss, samples };
    };
    let (left, right) = rayon::join(
        || evaluate(network, weights, left, source, buffers),
        || evaluate(network, weights, right, source, buffers),
    );
    NodeSum { gradient: Vec::new(), loss: left.loss + right.loss, samples: left.samples + right.samples }
}
