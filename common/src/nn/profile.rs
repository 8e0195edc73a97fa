//! What each part of a pass costs. There is no clock here: whoever asks has one.

use super::network::{Network, Weights};
use super::parts::AllAtOnce;
use super::subtree::{Buffers, LeafSource, Leaves};
use crate::model::LayerPlace;
use crate::reduce::NodeId;

/// A part of a pass that has just ended. The numbers are those of [`Network::step`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lap {
    /// The samples lie in the workspace.
    Input,
    /// A step's forward pass, with its activation.
    Forward(usize),
    /// The losses and their derivatives.
    Loss,
    /// The gradients of a step's weights, with the derivative of its activation.
    WeightGradient(usize),
    /// The derivative by a step's input.
    InputGradient(usize),
}

impl Network {
    /// The layer that a step of the passes belongs to, and its products for one sample (0 without weights); `None` after
    /// the last step. Layers that only rename axes have no step.
    pub fn step(&self, step: usize) -> Option<(&LayerPlace, usize)> {
        Some((self.places.get(step)?, self.ops.get(step)?.products()))
    }
}

/// Does what [`subtree`](super::subtree()) does with as many of the first leaves under `node` as the network takes
/// together, and calls `lap` after each part. Returns how many samples they have.
pub fn profile(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
    lap: &mut dyn FnMut(Lap),
) -> u32 {
    let mut node = node;
    let leaves = loop {
        match (Leaves::of(node, network, source), node.children()) {
            (Some(leaves), _) => break leaves,
            (None, Some([left, _])) => node = left,
            (None, None) => return 0,
        }
    };
    let (mut gradient, mut workspace) = (buffers.gradient(network), buffers.workspace(network));
    let write = |i: usize, out: &mut [f32]| leaves.write(i, out);
    let place = &mut AllAtOnce(&mut gradient);
    network.gradient_sum_into(weights, leaves.samples(), &write, place, &mut workspace, lap);
    buffers.give_back(workspace);
    buffers.recycle(gradient);
    leaves.samples().iter().sum::<usize>() as u32
}
