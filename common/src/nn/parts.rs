//! Gradients that are handed over in parts, while the pass that sums them goes on.
//!
//! A backward pass ends with the first layer, and the layers behind are done before. Where one pass takes a whole node, as
//! in networks of dense layers, what is done then can be sent, added and stepped with while the rest is computed.

use super::network::{Network, Weights};
use super::subtree::{Buffers, LeafSource, Leaves};
use crate::reduce::NodeId;
use crate::shared_memory::FloatBuffer;

/// Where a pass writes its gradient, and who hears what is known of it meanwhile.
pub(super) trait GradientPlace {
    /// The floats that may still be written: those of all parameters, or of the first ones.
    fn floats(&mut self) -> &mut [f32];
    /// The losses are known of the samples that have been through the network.
    fn loss_so_far(&mut self, loss: f64);
    /// This pass writes nothing from that parameter on any more. Whether what it has written is known to be finite is said.
    fn done_from(&mut self, parameter: usize, known_finite: bool);
}

/// Nobody hears anything before the end.
pub(super) struct AllAtOnce<'a>(pub(super) &'a mut [f32]);

impl GradientPlace for AllAtOnce<'_> {
    fn floats(&mut self) -> &mut [f32] {
        self.0
    }

    fn loss_so_far(&mut self, _: f64) {}

    fn done_from(&mut self, _: usize, _: bool) {}
}

/// What is told of a node's sum while it is computed: first the loss, then the parts of the gradient.
#[derive(Debug)]
pub enum Told {
    /// The losses are known, and the gradient will follow.
    Loss {
        /// Sum of the samples' losses.
        loss: f64,
        /// Number of samples.
        samples: u32,
    },
    /// A part of the gradient is done. The last layers come first; parts adjoin, and the last part begins at 0.
    Part {
        /// Where it begins in the flat vector: a multiple of the length that was asked for.
        start: usize,
        /// The floats.
        gradient: FloatBuffer,
    },
}

/// A gradient of which each part is told when it is done.
struct InParts<'a> {
    /// What is not done, or not told of yet.
    head: FloatBuffer,
    /// Parts begin at multiples of this.
    unit: usize,
    samples: u32,
    tell: &'a mut dyn FnMut(Told),
}

impl InParts<'_> {
    fn tell_from(&mut self, start: usize, known_finite: bool) {
        let mut gradient = self.head.split_off(start);
        if known_finite {
            gradient.set_known_finite();
        }
        (self.tell)(Told::Part { start, gradient });
    }
}

impl GradientPlace for InParts<'_> {
    fn floats(&mut self) -> &mut [f32] {
        &mut self.head
    }

    fn loss_so_far(&mut self, loss: f64) {
        (self.tell)(Told::Loss { loss, samples: self.samples });
    }

    fn done_from(&mut self, parameter: usize, known_finite: bool) {
        let start = parameter.next_multiple_of(self.unit);
        if start < self.head.len() {
            self.tell_from(start, known_finite);
        }
    }
}

/// Computes what [`subtree`](super::subtree()) does, and tells each part as soon as it is done: whole `unit`s of floats. Returns
/// false, and has done nothing, where nothing would be done before the end: when the node takes more than one pass, or its
/// network has other layers than dense ones.
///
/// # Panics
/// When `unit` is 0.
pub fn subtree_in_parts(
    network: &Network,
    weights: Weights<'_>,
    node: NodeId,
    source: &dyn LeafSource,
    buffers: &Buffers,
    unit: usize,
    tell: &mut dyn FnMut(Told),
) -> bool {
    let leaves = Leaves::of(node, network, source).filter(|leaves| network.is_done_in_layers(leaves.samples()));
    let Some(leaves) = leaves.filter(|leaves| leaves.count_samples() > 0) else { return false };
    let mut workspace = buffers.workspace(network);
    let write = |i: usize, out: &mut [f32]| leaves.write(i, out);
    let mut gradient = InParts { head: buffers.gradient(network), unit, samples: leaves.count_samples(), tell };
    network.gradient_sum_into(weights, leaves.samples(), &write, &mut gradient, &mut workspace, &mut |_| ());
    if !gradient.head.is_empty() {
        // A network without weights has told nothing; otherwise the first layer begins at 0.
        gradient.tell_from(0, workspace.gradient_known_finite);
    }
    buffers.give_back(workspace);
    true
}
