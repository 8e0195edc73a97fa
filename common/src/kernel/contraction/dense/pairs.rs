//! The three products in bfloat16.
//!
//! Forward passes and input gradients sum over pairs of neighbouring inputs and outputs. Those of the first operand are
//! made once, in memory that the threads share; those of weights while a panel is copied. A weight gradient sums over
//! pairs of a leaf's samples, which are made while panels and groups are copied; the last sample of an odd number is
//! paired with 0.

use bytemuck::{cast_slice, cast_slice_mut};
use rayon::prelude::*;

use super::output::Output;
use super::product::{First, Second, Sums};
use super::{Dense, DenseForward, DenseInputGradient, DenseShape, DenseWeightGradient};
use crate::kernel::AlignedFloats;
use crate::kernel::bf16::{self, Bf16Pair, RowPairs};
use crate::kernel::contraction::{Crew, Panel, SLACK};
use crate::kernel::microkernel::MAX_SEGMENTS;
use crate::kernel::products::Element;
use crate::kernel::transpose::{MatrixShape, transpose};

/// Fewer floats than this are not worth another thread: a few microseconds of one core.
const MIN_SHARED_FLOATS: usize = 1 << 14;
/// Pairs of a row of weights that are transposed at a time: a cache line, and half a row of a panel.
const BLOCK: usize = 16;

impl Dense {
    pub(super) fn forward_of_pairs<E: Element>(&self, samples: usize, operands: DenseForward<'_>, crew: &mut Crew) {
        let DenseForward { input, weights, bias, output, after } = operands;
        let inputs = self.shape.inputs;
        let (rows, depth) = (self.rows(samples), inputs.div_ceil(2));
        let pack = |panel: &Panel, packed: &mut [E]| {
            let stored = self.shape.weights().panel_of(panel.start);
            let start = panel.start - stored.start;
            let shape = RowPairs { columns: stored.columns, start, count: panel.columns, distance: 1 };
            bf16::pair_rows(self.isa, &weights[stored.range], shape, cast_slice_mut(packed), panel.width);
        };
        let sums = Sums { bias, after, ..Sums::in_one(rows, depth) };
        self.with_pairs(&input[..rows * inputs], inputs, crew, |pairs, crew| {
            let first = First::Rows(cast_slice(pairs));
            self.forward.multiply::<E>(sums, first, Second::copied(&pack), Output::Rows(output), crew);
        });
    }

    pub(super) fn input_gradient_of_pairs<E: Element>(
        &self,
        samples: usize,
        operands: DenseInputGradient<'_>,
        crew: &mut Crew,
    ) {
        let DenseInputGradient { delta, weights, input_gradient, after } = operands;
        let outputs = self.shape.outputs;
        let (rows, depth) = (self.rows(samples), outputs.div_ceil(2));
        let pack = |panel: &Panel, packed: &mut [E]| {
            let mut block = [Bf16Pair::default(); SLACK * BLOCK];
            for first in (0..depth).step_by(BLOCK) {
                let columns = (outputs - 2 * first).min(2 * BLOCK);
                // A block lies in one panel of the weights.
                let stored = self.shape.weights().panel_of(2 * first);
                let from = &weights[stored.range][panel.start * stored.columns + 2 * first - stored.start..];
                let shape = MatrixShape { rows: panel.columns, columns, stride: stored.columns };
                let pairs = MatrixShape::dense(panel.columns, columns.div_ceil(2));
                let block = &mut block[..pairs.rows * pairs.columns];
                bf16::pair_columns(self.isa, from, shape, block);
                let to = cast_slice_mut(&mut packed[first * panel.width..]);
                transpose(self.isa, cast_slice(block), pairs, to, panel.width);
            }
        };
        let sums = Sums { after, ..Sums::in_one(rows, depth) };
        self.with_pairs(&delta[..rows * outputs], outputs, crew, |pairs, crew| {
            let (second, output) = (Second::copied(&pack), Output::Rows(input_gradient));
            self.input_gradient.multiply::<E>(sums, First::Rows(cast_slice(pairs)), second, output, crew);
        });
    }

    pub(super) fn weight_gradient_of_pairs<E: Element>(
        &self,
        leaves: &[usize],
        operands: DenseWeightGradient<'_>,
        crew: &mut Crew,
    ) -> bool {
        let DenseWeightGradient { input, delta, gradient, accumulate, nodes } = operands;
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let mut segments = [0; MAX_SEGMENTS];
        segments.iter_mut().zip(leaves).for_each(|(pairs, samples)| *pairs = samples.div_ceil(2));
        let segments = &segments[..leaves.len()];
        let depth = segments.iter().sum::<usize>() * pixels;
        // Leaves do not share pairs: each is a sum of its own.
        let pair = |values: &[f32], shape: RowPairs, pairs: &mut [Bf16Pair], width: usize| {
            let (mut values, mut pairs) = (values, pairs);
            for &samples in leaves {
                let of_leaf = values.split_off(..samples * pixels * shape.columns);
                let to = pairs.split_off_mut(..samples.div_ceil(2) * pixels * width);
                let (of_leaf, to) = (of_leaf.expect("samples of all leaves"), to.expect("pairs of all leaves"));
                bf16::pair_rows(self.isa, of_leaf, shape, to, width);
            }
        };
        let pack = |panel: &Panel, packed: &mut [E]| {
            let shape = RowPairs { columns: outputs, start: panel.start, count: panel.columns, distance: pixels };
            pair(delta, shape, cast_slice_mut(packed), panel.width);
        };
        let group = |group: usize, to: &mut [E]| {
            let (start, to) = (group * self.group, cast_slice_mut(&mut to[..depth * self.group]));
            let count = self.group.min(inputs - start);
            pair(input, RowPairs { columns: inputs, start, count, distance: pixels }, &mut *to, self.group);
            if count < self.group {
                // The input of the bias. (What a sample without a partner is paired with has no delta.)
                to.iter_mut().skip(count).step_by(self.group).for_each(|one| *one = Bf16Pair::new(1.0, 1.0));
            }
        };
        let sums = Sums {
            run_depth: pixels,
            segments,
            nodes,
            a_step: self.group,
            accumulate,
            ..Sums::in_one(gradient.len() / outputs, depth)
        };
        let output = Output::Panels(self.shape.weights(), gradient);
        self.weight_gradient.multiply::<E>(sums, First::Columns(&group), Second::copied(&pack), output, crew)
    }

    /// Calls `work` with the pairs of neighbours in rows of `columns` values, which all threads may read.
    fn with_pairs(&self, values: &[f32], columns: usize, crew: &mut Crew, work: impl FnOnce(&[Bf16Pair], &mut Crew)) {
        let mut memory: AlignedFloats = std::mem::take(&mut crew.shared);
        let (rows, width) = (values.len() / columns, columns.div_ceil(2));
        let pairs: &mut [Bf16Pair] = cast_slice_mut(&mut memory[..rows * width]);
        let pair = |values: &[f32], pairs: &mut [Bf16Pair]| {
            bf16::pair_columns(self.isa, values, MatrixShape::dense(values.len() / columns, columns), pairs);
        };
        let together = MIN_SHARED_FLOATS.div_ceil(columns);
        if rows <= together {
            pair(values, pairs);
        } else {
            // Rows of values and their pairs are cut at the same places.
            let stretches = values.par_chunks(together * columns).zip(pairs.par_chunks_mut(together * width));
            stretches.for_each(|(values, pairs)| pair(values, pairs));
        }
        work(pairs, crew);
        crew.shared = memory;
    }
}
