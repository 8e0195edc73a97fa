//! Weight gradients of which one operand is mostly 0: what is not 0 of it is listed, and only that is multiplied.
//!
//! Row `i` of the gradient is the sum over samples of `input[sample][i] * delta[sample]`, column `j` that of
//! `delta[sample][j] * input[sample]`. So a list says in which samples an input, or a delta, is not 0, and those samples' rows of
//! the other operand are added, each times the listed element. Sums of columns are transposed when they are done.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::output::Output;
use super::product::is_worth_sharing;
use super::{Dense, DenseShape, DenseWeightGradient};
use crate::kernel::combination::leaves::{self, LeafCombinations};
use crate::kernel::combination::{Lists, ListsMut};
use crate::kernel::contraction::MAX_LEAVES;
use crate::kernel::contraction::crew::{Crew, Desk};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::precision::Precision;
use crate::kernel::simd::MAX_LANES;
use crate::kernel::survey;
use crate::kernel::transpose::{MatrixShape, transpose};
use crate::model::PANEL_COLUMNS;

/// Which operand of a weight gradient is mostly 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SparseOperand {
    /// The layer's input.
    Input,
    /// The loss' derivative by its output.
    Delta,
}

/// Listed elements whose sums a unit of work computes: a panel of the gradient, if they are columns of it.
const GROUP: usize = PANEL_COLUMNS;
/// Elements of the other operand that a unit takes, at most: twelve of the widest vectors.
const MAX_WIDTH: usize = 192;

/// Floats of lists that a desk keeps, at most, if one group's are not more: 16 MiB.
const LISTS: usize = 4 << 20;

/// How a desk is divided, in floats.
struct Layout {
    /// Some columns of the operand that is not listed.
    others: usize,
    /// A number for each row of the operands.
    numbers: usize,
    /// The listed elements of a group, one after the other.
    listed: usize,
    sums: usize,
    stack: usize,
    /// The lists of a group, and their ends.
    lists: usize,
    ends: usize,
    /// Groups whose lists are kept. If there are more groups, those that are too many share the last place.
    kept: usize,
}

impl Layout {
    fn new(groups: usize, max_rows: usize) -> Self {
        let (lists, ends) = (ListsMut::memory(GROUP * max_rows), GROUP * MAX_LEAVES);
        Self {
            others: max_rows * MAX_WIDTH,
            numbers: max_rows.next_multiple_of(MAX_LANES),
            listed: GROUP * max_rows,
            sums: GROUP * MAX_WIDTH,
            stack: leaves::stack_len(MAX_LEAVES, GROUP * MAX_WIDTH),
            lists,
            ends,
            kept: (LISTS / (lists + ends)).clamp(1, groups),
        }
    }

    /// What is not kept for each group.
    fn shared(&self) -> usize {
        self.others + self.numbers + self.listed + self.sums + self.stack
    }

    fn len(&self) -> usize {
        self.shared() + self.kept * (self.lists + self.ends)
    }
}

/// Floats of a desk, and groups whose lists it keeps.
pub(super) fn desk(shape: DenseShape, sparse: SparseOperand, max_rows: usize) -> (usize, usize) {
    let groups = match sparse {
        SparseOperand::Input => shape.inputs + 1,
        SparseOperand::Delta => shape.outputs,
    };
    let layout = Layout::new(groups.div_ceil(GROUP), max_rows);
    (layout.len(), layout.kept)
}

/// Rows of an operand: of the input those of all samples, with a 1 behind each if there is a bias.
#[derive(Clone, Copy)]
struct Operand<'a> {
    rows: &'a [f32],
    columns: usize,
    with_one: bool,
}

impl Operand<'_> {
    /// Columns, the ones included.
    fn width(&self) -> usize {
        self.columns + usize::from(self.with_one)
    }

    /// Some columns without the ones.
    fn stored(&self, columns: &Range<usize>) -> Range<usize> {
        columns.start.min(self.columns)..columns.end.min(self.columns)
    }

    /// Copies columns to rows of so many floats, with zeros behind them.
    fn copy_columns(&self, isa: Isa, columns: &Range<usize>, to: &mut [f32], width: usize) {
        let stored = self.stored(columns);
        if !stored.is_empty() {
            elementwise::copy_columns(isa, self.rows, self.columns, stored.start, stored.len(), to, width);
        }
        for row in to.chunks_exact_mut(width) {
            row[stored.len()..columns.len()].fill(1.0);
            row[columns.len()..].fill(0.0);
        }
    }

    /// Copies columns one after the other.
    fn transpose_columns(&self, isa: Isa, columns: &Range<usize>, to: &mut [f32]) {
        let (stored, rows) = (self.stored(columns), self.rows.len() / self.columns);
        let shape = MatrixShape { rows, columns: stored.len(), stride: self.columns };
        transpose(isa, &self.rows[stored.start..], shape, to, rows);
        to[stored.len() * rows..].fill(1.0);
    }
}

impl Dense {
    /// [`Dense::weight_gradient`] without the products of what is 0 in the sparse operand, where that changes no bit: if the
    /// other operand is finite. Else, and for nodes that are not 32-bit floats or without samples, it is the same.
    ///
    /// # Panics
    /// As for [`Dense::weight_gradient`].
    pub fn sparse_weight_gradient(
        &self,
        leaf_samples: &[usize],
        operands: DenseWeightGradient<'_>,
        crew: &mut Crew,
    ) -> bool {
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let (isa, leaf_count) = (self.isa, leaf_samples.len());
        let depth = self.rows(leaf_samples.iter().sum());
        let is_other_finite = |sparse: &SparseOperand| match sparse {
            SparseOperand::Input => survey::are_finite(isa, &operands.delta[..depth * outputs]),
            SparseOperand::Delta => survey::are_finite(isa, &operands.input[..depth * inputs]),
        };
        let may_leave_out = self.sparse.filter(|_| operands.nodes == Precision::F32 && depth > 0);
        let Some(sparse) = may_leave_out.filter(is_other_finite) else {
            return self.weight_gradient(leaf_samples, operands, crew);
        };
        let DenseWeightGradient { input, delta, gradient, accumulate, .. } = operands;
        let with_bias = gradient.len() > inputs * outputs;
        let input = Operand { rows: &input[..depth * inputs], columns: inputs, with_one: with_bias };
        let delta = Operand { rows: &delta[..depth * outputs], columns: outputs, with_one: false };
        let (listed, other) = match sparse {
            SparseOperand::Input => (input, delta),
            SparseOperand::Delta => (delta, input),
        };
        let output = Output::Panels(self.shape.weights(), gradient);
        assert!(output.holds(input.width(), outputs), "gradient of the plan");
        let output = output.places();

        let groups = listed.width().div_ceil(GROUP);
        let layout = Layout::new(groups, self.max_rows);
        // Columns of the other operand are cut evenly, between vectors.
        let (vectors, chunks) = (other.width().div_ceil(MAX_LANES), other.width().div_ceil(MAX_WIDTH));
        let cut = |i: usize| (vectors * i / chunks * MAX_LANES).min(other.width());
        let known_finite = AtomicBool::new(true);
        crew.share(groups * chunks, is_worth_sharing(listed.width() * depth * other.width()), |unit, desk| {
            let (at_chunk, group) = (unit / groups, unit % groups);
            let columns = cut(at_chunk)..cut(at_chunk + 1);
            let rows = group * GROUP..listed.width().min((group + 1) * GROUP);
            let width = columns.len().next_multiple_of(MAX_LANES);

            let Desk { scratch, panel: chunk_at_hand, groups: are_listed } = desk;
            let (shared, of_groups) = scratch.split_at_mut(layout.shared());
            let mut shared = shared;
            let mut take = |len: usize| shared.split_off_mut(..len).expect("desk of the plan");
            let others = &mut take(layout.others)[..depth * width];
            let numbers: &mut [u32] = bytemuck::cast_slice_mut(take(layout.numbers));
            let elements = &mut take(layout.listed)[..rows.len() * depth];
            let (sums, stack) = (&mut take(layout.sums)[..rows.len() * width], take(layout.stack));
            let (place, is_shared) = (group.min(layout.kept - 1), group + 1 >= layout.kept && groups > layout.kept);
            let of_group = of_groups.chunks_exact_mut(layout.lists + layout.ends).nth(place).expect("desk of the plan");
            let (lists, ends) = of_group.split_at_mut(layout.lists);
            let ends = &mut bytemuck::cast_slice_mut(ends)[..rows.len() * leaf_count];

            if chunk_at_hand.replace(at_chunk) != Some(at_chunk) {
                other.copy_columns(isa, &columns, others, width);
            }
            if !std::mem::replace(&mut are_listed[place], true) || is_shared {
                numbers.iter_mut().zip(0..).for_each(|(number, i)| *number = i);
                listed.transpose_columns(isa, &rows, elements);
                let mut lists = ListsMut::new(lists);
                for (elements, ends) in elements.chunks_exact(depth).zip(ends.chunks_exact_mut(leaf_count)) {
                    lists.append_parts(isa, elements, numbers, (leaf_samples, pixels), ends);
                }
            }
            if accumulate {
                // SAFETY: units have rows or columns of their own.
                unsafe {
                    match sparse {
                        SparseOperand::Input => output.read(rows.clone(), columns.clone(), sums, width),
                        SparseOperand::Delta => output.read_transposed(isa, columns.clone(), rows.clone(), sums, width),
                    }
                }
            }
            let lists = Lists::in_memory(lists, ends);
            let mut all =
                LeafCombinations { lists, leaves: leaf_count, matrix: others, width, sums, accumulate, stack };
            // SAFETY: lists name some of the `depth` rows of the copy.
            let finite = unsafe { leaves::run(isa, &mut all) };
            // Threads meet at the end of `share`.
            known_finite.fetch_and(finite, Ordering::Relaxed);
            // SAFETY: as above.
            unsafe {
                match sparse {
                    SparseOperand::Input => output.write(rows, columns, all.sums, width),
                    SparseOperand::Delta => output.write_transposed(isa, columns, rows, all.sums, width),
                }
            }
        });
        known_finite.into_inner()
    }
}
