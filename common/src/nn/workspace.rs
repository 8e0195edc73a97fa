//! The memory of passes.

use super::network::Network;
use super::op::Op;
use crate::kernel::contraction::{Crew, CrewSize, SLACK};
use crate::kernel::{AlignedFloats, elementwise};

/// Memory for passes. It is made once; passes allocate nothing.
#[derive(Debug)]
pub struct Workspace {
    /// Input of each op for a pass' samples, and the last op's output; each with [`SLACK`] floats behind it.
    pub(super) values: Vec<AlignedFloats>,
    /// Derivatives of the loss by `values`.
    pub(super) deltas: Vec<AlignedFloats>,
    /// Inputs of activations whose backward pass needs them.
    pub(super) kept: Vec<AlignedFloats>,
    /// Which element of each max pooling window won.
    pub(super) winners: Vec<Vec<u32>>,
    /// Each sample's loss, times its number of elements.
    pub(super) losses: Vec<f64>,
    pub(super) scratch: AlignedFloats,
    /// Memory of the threads that share a step.
    pub(super) crew: Crew,
    /// Whether the last gradient was found to be finite while it was made.
    pub(super) gradient_known_finite: bool,
}

impl Network {
    /// Memory for the passes of one thread; or, if all layers with weights are dense, of as many threads as the current
    /// rayon pool has, because they share each pass.
    pub fn workspace(&self) -> Workspace {
        let buffer = |elements: usize| AlignedFloats::zeros(elements * self.pass_samples + SLACK);
        let for_ops = |wanted: &dyn Fn(&Op) -> bool| -> Vec<usize> {
            let sizes = self.ops.iter().zip(&self.elements[1..]);
            sizes.map(|(op, &elements)| if wanted(op) { elements * self.pass_samples } else { 0 }).collect()
        };
        let kept = for_ops(&|op| elementwise::needs_input(op.activation()));
        let winners = for_ops(&|op| matches!(op, Op::MaxPool { .. }));
        let crews = self.ops.iter().map(|op| match op {
            Op::Dense(dense) => dense.crew(),
            _ => CrewSize::default(),
        });
        let threads = if self.is_dense { rayon::current_num_threads() } else { 1 };
        Workspace {
            values: self.elements.iter().map(|&elements| buffer(elements)).collect(),
            deltas: self.elements.iter().map(|&elements| buffer(elements)).collect(),
            kept: kept.into_iter().map(AlignedFloats::zeros).collect(),
            winners: winners.into_iter().map(|len| vec![0; len]).collect(),
            losses: vec![0.0; self.pass_samples],
            scratch: AlignedFloats::zeros(self.scratch_len),
            crew: Crew::new(threads, crews.fold(CrewSize::default(), CrewSize::max)),
            gradient_known_finite: false,
        }
    }
}
