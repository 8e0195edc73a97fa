//! What passes are for: sums of losses and gradients over leaves, codes and reconstructions.

use std::ops::Range;

use rayon::prelude::*;

use super::network::{Network, Pass, Weights, WriteSample};
use super::parts::{AllAtOnce, GradientPlace};
use super::profile::Lap;
use super::workspace::Workspace;
use crate::kernel::contraction::MAX_LEAVES;
use crate::kernel::{Precision, bf16};

/// Fewer floats than this are not worth another thread: a few microseconds of one core.
const MIN_SHARED_FLOATS: usize = 1 << 14;

impl Network {
    /// Sums the gradient of the loss over the samples of `leaves` into `gradient`, which is overwritten, and returns the
    /// sum of their losses. `leaves` are the numbers of samples of the leaves of an aligned subtree, from left to right;
    /// `write(i, out)` writes sample `i`, counted through all leaves.
    ///
    /// The result does not depend on how many samples a pass takes: every sum continues where the last pass ended.
    ///
    /// # Panics
    /// When there is more than one leaf, and their samples do not fit in one pass, or their number is no power of two
    /// or above [`MAX_LEAVES`].
    pub fn gradient_sum(
        &self,
        weights: Weights<'_>,
        leaves: &[usize],
        write: &WriteSample<'_>,
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> f64 {
        self.gradient_sum_into(weights, leaves, write, &mut AllAtOnce(gradient), workspace, &mut |_| ())
    }

    /// The same, into any place, with a call of `lap` after each part of each pass.
    pub(super) fn gradient_sum_into(
        &self,
        weights: Weights<'_>,
        leaves: &[usize],
        write: &WriteSample<'_>,
        gradient: &mut dyn GradientPlace,
        workspace: &mut Workspace,
        lap: &mut dyn FnMut(Lap),
    ) -> f64 {
        assert_eq!(gradient.floats().len(), self.parameters, "gradient of the network");
        if leaves.iter().all(|&samples| samples == 0) {
            gradient.floats().fill(0.0);
        }
        let mut losses = LeafLosses::default();
        workspace.gradient_known_finite = true;
        self.passes(leaves, write, workspace, |pass, workspace| {
            lap(Lap::Input);
            for step in 0..self.ops.len() {
                self.forward(step..step + 1, pass.samples(), weights, workspace);
                lap(Lap::Forward(step));
            }
            self.loss(pass, &mut losses, workspace);
            lap(Lap::Loss);
            gradient.loss_so_far(losses.tree(leaves.len(), self.elements[0]));
            self.backward(pass, weights, gradient, workspace, lap);
        });
        // Several leaves are rounded, each by itself, where they are added.
        if leaves.len() == 1 && self.nodes == Precision::Bf16 {
            self.in_stretches(gradient.floats(), &[], |gradient, _| bf16::round_all(self.isa(), gradient));
        }
        losses.tree(leaves.len(), self.elements[0])
    }

    /// [`Network::gradient_sum`] of one leaf.
    pub fn leaf_gradient(
        &self,
        weights: Weights<'_>,
        samples: usize,
        write: &WriteSample<'_>,
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> f64 {
        self.gradient_sum(weights, &[samples], write, gradient, workspace)
    }

    /// The sum of the losses of the samples of `leaves`, as [`Network::gradient_sum`] returns it.
    ///
    /// # Panics
    /// As there.
    pub fn loss_sum(
        &self,
        weights: Weights<'_>,
        leaves: &[usize],
        write: &WriteSample<'_>,
        workspace: &mut Workspace,
    ) -> f64 {
        let mut losses = LeafLosses::default();
        self.passes(leaves, write, workspace, |pass, workspace| {
            self.forward(0..self.ops.len(), pass.samples(), weights, workspace);
            self.loss(pass, &mut losses, workspace);
        });
        losses.tree(leaves.len(), self.elements[0])
    }

    /// [`Network::loss_sum`] of one leaf.
    pub fn leaf_loss(
        &self,
        weights: Weights<'_>,
        samples: usize,
        write: &WriteSample<'_>,
        workspace: &mut Workspace,
    ) -> f64 {
        self.loss_sum(weights, &[samples], write, workspace)
    }

    /// Writes the reconstructions of `count` samples to `output` (samples, elements).
    pub fn reconstruct(
        &self,
        weights: Weights<'_>,
        count: usize,
        write: &WriteSample<'_>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.map(0..self.ops.len(), weights, count, write, output, workspace);
    }

    /// Writes the codes of `count` samples to `output` (samples, code elements).
    pub fn encode(
        &self,
        weights: Weights<'_>,
        count: usize,
        write: &WriteSample<'_>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.map(0..self.encoder_ops, weights, count, write, output, workspace);
    }

    fn map(
        &self,
        ops: Range<usize>,
        weights: Weights<'_>,
        count: usize,
        write: &WriteSample<'_>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let (last, size) = (ops.end, self.elements[ops.end]);
        let mut rest = output;
        self.passes(&[count], write, workspace, |pass, workspace| {
            self.forward(ops.clone(), pass.samples(), weights, workspace);
            let (here, after) = std::mem::take(&mut rest).split_at_mut(pass.samples() * size);
            here.copy_from_slice(&workspace.values[last][..here.len()]);
            rest = after;
        });
    }

    /// Takes the samples of `leaves`, a pass at a time, into the workspace's input and calls `run`. One leaf takes as
    /// many passes as it needs, several leaves one.
    fn passes(
        &self,
        leaves: &[usize],
        write: &WriteSample<'_>,
        workspace: &mut Workspace,
        mut run: impl FnMut(Pass<'_>, &mut Workspace),
    ) {
        let total: usize = leaves.iter().sum();
        for start in (0..total).step_by(self.pass_samples) {
            let samples = self.pass_samples.min(total - start);
            let stretch = [samples];
            let pass = if leaves.len() == 1 {
                Pass { leaves: &stretch, first: start == 0 }
            } else {
                assert!(samples == total, "{total} samples of several leaves in passes of {samples}");
                Pass { leaves, first: true }
            };
            let size = self.elements[0];
            workspace.values[0][..samples * size]
                .par_chunks_exact_mut(size)
                .with_min_len(self.min_shared(size, samples))
                .enumerate()
                .for_each(|(i, sample)| write(start + i, sample));
            run(pass, workspace);
        }
    }

    /// Sets the last deltas, and adds the samples' losses, times their number of elements, to those of their leaves.
    fn loss(&self, pass: Pass<'_>, losses: &mut LeafLosses, workspace: &mut Workspace) {
        let (size, last, samples) = (self.elements[0], self.ops.len(), pass.samples());
        let by_logit = self.loss_by_logit();
        let Workspace { values, deltas, losses: of_samples, .. } = workspace;
        let targets = values[0].par_chunks_exact(size);
        let outputs = values[last].par_chunks_exact(size);
        targets
            .zip(outputs)
            .zip(deltas[last].par_chunks_exact_mut(size))
            .zip(&mut of_samples[..samples])
            .with_min_len(self.min_shared(size, samples))
            .for_each(|(((t, y), delta), loss)| *loss = self.loss.sample(self.isa, y, t, by_logit, delta));
        losses.add(pass.leaves, &of_samples[..samples]);
    }

    /// How many items of `size` floats, of `count`, a thread should take at least.
    fn min_shared(&self, size: usize, count: usize) -> usize {
        // Passes of a few samples are not shared at all: each thread has its own.
        if self.is_dense { MIN_SHARED_FLOATS.div_ceil(size) } else { count.max(1) }
    }

    /// Calls `work` on stretches of two buffers, of which the second one may be empty.
    pub(super) fn in_stretches(&self, values: &mut [f32], other: &[f32], work: impl Fn(&mut [f32], &[f32]) + Sync) {
        if !self.is_dense || values.len() <= MIN_SHARED_FLOATS {
            return work(values, other);
        }
        values.par_chunks_mut(MIN_SHARED_FLOATS).enumerate().for_each(|(i, values)| {
            let start = (i * MIN_SHARED_FLOATS).min(other.len());
            let end = (start + values.len()).min(other.len());
            work(values, &other[start..end]);
        });
    }
}

/// Sums of the losses of leaves, sample by sample.
struct LeafLosses([f64; MAX_LEAVES]);

impl Default for LeafLosses {
    fn default() -> Self {
        Self([0.0; MAX_LEAVES])
    }
}

impl LeafLosses {
    /// Adds the losses of the leaves' samples.
    fn add(&mut self, leaves: &[usize], losses: &[f64]) {
        let mut rest = losses;
        for (sum, &samples) in self.0.iter_mut().zip(leaves) {
            let (of_leaf, after) = rest.split_at(samples);
            *sum = of_leaf.iter().fold(*sum, |sum, loss| sum + loss);
            rest = after;
        }
    }

    /// The leaves' sums, divided by the number of elements, as a tree.
    fn tree(&self, leaves: usize, elements: usize) -> f64 {
        fn sum(leaves: &[f64], elements: f64) -> f64 {
            match leaves {
                [] => 0.0,
                [leaf] => leaf / elements,
                _ => {
                    let (left, right) = leaves.split_at(leaves.len() / 2);
                    sum(left, elements) + sum(right, elements)
                }
            }
        }
        sum(&self.0[..leaves], elements as f64)
    }
}
