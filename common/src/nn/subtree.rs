//! Sums over a subtree of the reduction tree: as many leaves in one pass as it can take, the others in parallel,
//! additions by position.

use std::sync::{Arc, Mutex};

use super::network::{Network, Weights};
use super::workspace::Workspace;
use crate::kernel::contraction::MAX_LEAVES;
use crate::reduce::{NodeId, add_nodes};
use crate::shared_memory::{FloatBuffer, Region};

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
    pub gradient: FloatBuffer,
    /// Sum of the samples' losses.
    pub loss: f64,
    /// Number of samples.
    pub samples: u32,
}

/// Memory that is used again from round to round: workspaces of threads, gradients of tree nodes.
#[derive(Debug, Default)]
pub struct Buffers {
    workspaces: Mutex<Vec<Workspace>>,
    gradients: Mutex<Vec<FloatBuffer>>,
    /// Slots of the region that were used before.
    slots: Mutex<Vec<FloatBuffer>>,
    /// Where the gradients of whole nodes should lie, if there is room.
    region: Option<Arc<Region>>,
}

impl Buffers {
    pub(super) fn workspace(&self, network: &Network) -> Workspace {
        lock(&self.workspaces).pop().unwrap_or_else(|| network.workspace())
    }

    pub(super) fn give_back(&self, workspace: Workspace) {
        lock(&self.workspaces).push(workspace);
    }

    /// Buffers that put the gradients of whole nodes into slots of `region`, as long as there are free ones.
    ///
    /// # Panics
    /// When this process may not write the region.
    pub fn sharing(region: Option<Arc<Region>>) -> Self {
        Self { region, ..Self::default() }
    }

    pub(super) fn gradient(&self, network: &Network) -> FloatBuffer {
        let used = lock(&self.gradients).pop();
        used.unwrap_or_else(|| FloatBuffer::zeros(network.parameters()))
    }

    /// Memory for the leaf in which the sum of a whole node comes to lie.
    fn leading_gradient(&self, network: &Network) -> FloatBuffer {
        let used = lock(&self.slots).pop();
        let slot = used.or_else(|| self.region.as_ref()?.take().map(FloatBuffer::from));
        slot.unwrap_or_else(|| self.gradient(network))
    }

    /// Gives back the memory of a gradient that is no longer needed, or of a part of one: it is used again once all of its
    /// parts were given back.
    pub fn recycle(&self, gradient: FloatBuffer) {
        let Some(gradient) = gradient.reclaim() else { return };
        match gradient.slot() {
            Some(_) => lock(&self.slots).push(gradient),
            None if gradient.is_empty() => {}
            None => lock(&self.gradients).push(gradient),
        }
    }
}

/// A panic of another thread while it held the lock leaves a list of buffers, which is always valid.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The leaves of a node, if one call of the network can take them.
pub(super) struct Leaves<'a> {
    source: &'a dyn LeafSource,
    first: u32,
    samples: [usize; MAX_LEAVES],
    count: usize,
}

impl<'a> Leaves<'a> {
    /// A leaf, or as many leaves as fit in a pass.
    pub(super) fn of(node: NodeId, network: &Network, source: &'a dyn LeafSource) -> Option<Self> {
        let range = node.leaves();
        let count = range.len();
        if count > MAX_LEAVES {
            return None;
        }
        let mut samples = [0; MAX_LEAVES];
        samples.iter_mut().zip(range.clone()).for_each(|(samples, leaf)| *samples = source.samples(leaf) as usize);
        let fits = count == 1 || network.takes_several_leaves(samples.iter().sum());
        fits.then_some(Self { source, first: range.start, samples, count })
    }

    pub(super) fn samples(&self) -> &[usize] {
        &self.samples[..self.count]
    }

    /// Writes sample `i`, counted through all leaves.
    pub(super) fn write(&self, mut i: usize, out: &mut [f32]) {
        for (leaf, &samples) in (self.first..).zip(self.samples()) {
            if i < samples {
                return self.source.write(leaf, i, out);
            }
            i -= samples;
        }
    }

    /// Number of samples of all leaves.
    pub(super) fn count_samples(&self) -> u32 {
        self.samples().iter().sum::<usize>() as u32
    }

    fn sum(&self, gradient: FloatBuffer, loss: f64) -> NodeSum {
        NodeSum { gradient, loss, samples: self.count_samples() }
    }
}

/// The gradient sum under `node`. Runs in the current rayon pool; the result does not depend on its size.
pub fn subtree(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
) -> NodeSum {
    subtree_in(network, weights, node, source, buffers, Place::OfNode)
}

/// Where a gradient is written: the sum of a node lies where its leftmost leaf was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Where the whole node's sum should be.
    OfNode,
    /// Anywhere: it is added to another one.
    OfPart,
}

fn subtree_in(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
    place: Place,
) -> NodeSum {
    if let Some(leaves) = Leaves::of(node, network, source) {
        let mut gradient = match place {
            Place::OfNode => buffers.leading_gradient(network),
            Place::OfPart => buffers.gradient(network),
        };
        let mut workspace = buffers.workspace(network);
        let write = |i: usize, out: &mut [f32]| leaves.write(i, out);
        let loss = network.gradient_sum(weights, leaves.samples(), &write, &mut gradient, &mut workspace);
        if workspace.gradient_known_finite {
            gradient.set_known_finite();
        }
        buffers.give_back(workspace);
        return leaves.sum(gradient, loss);
    }
    let (mut left, right) = for_children(node, |child| {
        let place = if child.is_left() { place } else { Place::OfPart };
        subtree_in(network, weights, child, source, buffers, place)
    });
    network.in_stretches(&mut left.gradient, &right.gradient, |left, right| {
        add_nodes(network.node_sums(), left, right);
    });
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
    if let Some(leaves) = Leaves::of(node, network, source) {
        let mut workspace = buffers.workspace(network);
        let write = |i: usize, out: &mut [f32]| leaves.write(i, out);
        let loss = network.loss_sum(weights, leaves.samples(), &write, &mut workspace);
        buffers.give_back(workspace);
        return leaves.sum(FloatBuffer::default(), loss);
    }
    let (left, right) = for_children(node, |child| evaluate(network, weights, child, source, buffers));
    NodeSum { gradient: FloatBuffer::default(), loss: left.loss + right.loss, samples: left.samples + right.samples }
}

/// The sums of a node's children, in parallel. A leaf, which has none, is never asked for them.
fn for_children(node: NodeId, sum: impl Fn(NodeId) -> NodeSum + Sync) -> (NodeSum, NodeSum) {
    let [left, right] = node.children().expect("a leaf is taken as a whole");
    rayon::join(|| sum(left), || sum(right))
}
