//! Dense layers over many samples at once: three matrix products whose work is shared by the threads of the pool.
//!
//! ```text
//! forward:          output (rows, outputs)          = input (rows, inputs) * weights (inputs, outputs) + bias
//! input gradient:   input gradient (rows, inputs)   = delta (rows, outputs) * weights transposed
//! weight gradient:  gradient (inputs, outputs)      = input transposed * delta, as a tree over the leaves
//! ```
//!
//! With large weights, memory is the bottleneck as often as arithmetic. So weights and their gradients lie in panels
//! ([`PanelMatrix`]): a forward pass reads each of them where it lies, in one stretch, and fetches the next one while
//! it computes. Where the loop needs another form, who computes a panel of output columns copies the panel's operand
//! together first. A weight gradient is written once, after the tree over all leaves of the pass. Threads do not share
//! copies: to fetch them from another core's cache takes longer than to make them. (The pairs of `pairs.rs` are made once,
//! because that is more than a copy.)

mod output;
mod pairs;
mod product;
mod sparse;
mod units;

use output::Output;
use product::{DeskLayout, First, Product, Second, Sums};
pub use sparse::SparseOperand;

use super::crew::CrewSize;
use super::{After, Crew, Panel};
use crate::kernel::ahead::{Ahead, LINE};
use crate::kernel::bf16::{Bf16Pair, BlockedPair};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{MAX_SEGMENTS, group_columns, panel_widths};
use crate::kernel::precision::{Arithmetic, Compute, Precision};
use crate::kernel::transpose::{MatrixShape, transpose};
use crate::model::PanelMatrix;

/// Sizes of a dense layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseShape {
    /// Independent positions of a sample, which all meet the same weights; 1 for a flat input.
    pub pixels: usize,
    /// Floats of an input position.
    pub inputs: usize,
    /// Floats of an output position.
    pub outputs: usize,
}

impl DenseShape {
    /// How weights and their gradients lie.
    pub fn weights(self) -> PanelMatrix {
        PanelMatrix { rows: self.inputs, columns: self.outputs }
    }
}

/// A plan for the three products of a dense layer; see the module's documentation.
#[derive(Debug)]
pub struct Dense {
    isa: Isa,
    compute: Compute,
    shape: DenseShape,
    max_rows: usize,
    /// Input columns that are copied together for a weight gradient, so that they lie side by side for each sample.
    group: usize,
    forward: Product,
    input_gradient: Product,
    weight_gradient: Product,
    crew: CrewSize,
    /// Of which operand weight gradients may leave out zeros.
    sparse: Option<SparseOperand>,
}

impl Dense {
    /// A plan for up to `max_samples` samples at a time.
    pub fn new(arithmetic: impl Into<Arithmetic>, shape: DenseShape, max_samples: usize) -> Self {
        let Arithmetic { isa, compute } = arithmetic.into();
        let precision = compute.operands();
        let DenseShape { pixels, inputs, outputs } = shape;
        let max_rows = max_samples * pixels;
        let panel_len = inputs.max(outputs).max(max_rows) * panel_widths(isa)[0];
        let group = group_columns(isa);
        let desk = DeskLayout { panel_len, group, max_rows };
        // What a row of the first operand takes.
        let elements = |floats: usize| match precision {
            Precision::F32 => floats,
            Precision::Bf16 => floats.div_ceil(2),
        };
        // One more row for the bias: the weight of an input that is always 1.
        let rows_of_gradient = inputs + 1;
        let in_groups = |i: usize| i / group * group * max_rows + i % group;
        Self {
            isa,
            compute,
            shape,
            max_rows,
            group,
            forward: Product::to_rows(isa, [max_rows, outputs], desk, |row| row * elements(inputs)),
            input_gradient: Product::to_rows(isa, [max_rows, inputs], desk, |row| row * elements(outputs)),
            weight_gradient: Product::to_panels(isa, shape.weights(), desk, in_groups),
            crew: CrewSize {
                desk: panel_len + rows_of_gradient.next_multiple_of(group) * max_rows,
                groups: rows_of_gradient.div_ceil(group),
                shared: match precision {
                    Precision::F32 => 0,
                    Precision::Bf16 => max_rows * elements(inputs.max(outputs)),
                },
            },
            sparse: None,
        }
    }

    /// The same with [`Dense::sparse_weight_gradient`] for operands that are mostly 0, if all is computed in 32-bit floats.
    pub fn with_sparse(self, sparse: SparseOperand) -> Self {
        if self.compute != Compute::F32 {
            return self;
        }
        let (desk, groups) = sparse::desk(self.shape, sparse, self.max_rows);
        let crew = self.crew.max(CrewSize { desk, groups, shared: 0 });
        Self { crew, sparse: Some(sparse), ..self }
    }

    /// What a crew needs for the plan.
    pub fn crew(&self) -> CrewSize {
        self.crew
    }

    /// Computes `output` (samples, pixels, outputs): `after(input * weights + bias)`, inputs ascending.
    ///
    /// # Panics
    /// When `samples` exceeds the plan's largest number or a slice is too short.
    pub fn forward(&self, samples: usize, operands: DenseForward<'_>, crew: &mut Crew) {
        let DenseShape { inputs, outputs, .. } = self.shape;
        assert_eq!(operands.weights.len(), inputs * outputs, "weights of the plan");
        assert!(operands.bias.is_none_or(|bias| bias.len() == outputs), "one bias for each output");
        match self.compute {
            Compute::F32 => {}
            Compute::Bf16 => return self.forward_of_pairs::<Bf16Pair>(samples, operands, crew),
            Compute::Bf16Amx => return self.forward_of_pairs::<BlockedPair>(samples, operands, crew),
        }
        let DenseForward { input, weights, bias, output, after } = operands;
        let rows = self.rows(samples);
        let pack = |panel: &Panel, packed: &mut [f32]| {
            let stored = self.shape.weights().panel_of(panel.start);
            let (from, start) = (&weights[stored.range], panel.start - stored.start);
            elementwise::copy_columns(self.isa, from, stored.columns, start, panel.columns, packed, panel.width);
        };
        let source = |panel: &Panel| {
            let stored = self.shape.weights().panel_of(panel.start);
            let from = weights[stored.range.start + panel.start - stored.start..].as_ptr();
            Some(Ahead::columns(from, [inputs, panel.columns], stored.columns))
        };
        let second = Second { stored: Some(weights), pack: &pack, source: &source };
        let sums = Sums { bias, after, ..Sums::in_one(rows, inputs) };
        self.forward.multiply(sums, First::Rows(input), second, Output::Rows(output), crew);
    }

    /// Computes `input_gradient` (samples, pixels, inputs): `after(delta * weights transposed)`, outputs ascending.
    ///
    /// # Panics
    /// As for [`Dense::forward`].
    pub fn input_gradient(&self, samples: usize, operands: DenseInputGradient<'_>, crew: &mut Crew) {
        let DenseShape { inputs, outputs, .. } = self.shape;
        assert_eq!(operands.weights.len(), inputs * outputs, "weights of the plan");
        match self.compute {
            Compute::F32 => {}
            Compute::Bf16 => return self.input_gradient_of_pairs::<Bf16Pair>(samples, operands, crew),
            Compute::Bf16Amx => return self.input_gradient_of_pairs::<BlockedPair>(samples, operands, crew),
        }
        let DenseInputGradient { delta, weights, input_gradient, after } = operands;
        let rows = self.rows(samples);
        let pack = |panel: &Panel, packed: &mut [f32]| {
            for stored in self.shape.weights().panels() {
                let shape = MatrixShape::dense(panel.columns, stored.columns);
                let from = &weights[stored.range][panel.start * stored.columns..];
                transpose(self.isa, from, shape, &mut packed[stored.start * panel.width..], panel.width);
            }
        };
        // Some rows of each panel of the weights.
        let source = |panel: &Panel| {
            let stored = self.shape.weights().panel_of(0);
            let run = panel.columns * stored.columns / LINE;
            let from = weights[panel.start * stored.columns..].as_ptr();
            let runs = outputs / stored.columns;
            (run > 0).then(|| Ahead { from, run, stride: stored.range.len(), lines: 0..run * runs })
        };
        let second = Second { stored: None, pack: &pack, source: &source };
        let sums = Sums { after, ..Sums::in_one(rows, outputs) };
        self.input_gradient.multiply(sums, First::Rows(delta), second, Output::Rows(input_gradient), crew);
    }

    /// Adds to `gradient` (inputs, outputs, in panels; then the bias' outputs, if there is one) the sum over samples and
    /// pixels of `input * delta`, or sets it to that sum. Leaves are sums of their own, added as a perfect binary tree; there
    /// must be a power of two of them, and just one if there is something to add to. Returns whether all of `gradient` is
    /// known to be finite, which is found out on the way where several leaves are added.
    ///
    /// # Panics
    /// As for [`Dense::forward`], and when the number of leaves is wrong.
    pub fn weight_gradient(&self, leaves: &[usize], operands: DenseWeightGradient<'_>, crew: &mut Crew) -> bool {
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let depth = self.rows(leaves.iter().sum());
        let DenseWeightGradient { input, delta, gradient, accumulate, nodes } = operands;
        assert!(leaves.len().is_power_of_two() && leaves.len() <= MAX_SEGMENTS, "{} leaves", leaves.len());
        assert!(!accumulate || leaves.len() == 1, "a tree of leaves starts from 0");
        assert!(input.len() >= depth * inputs && delta.len() >= depth * outputs, "operands too short");
        let rows = gradient.len() / outputs;
        assert!(gradient.len() == rows * outputs && (inputs..=inputs + 1).contains(&rows), "gradient of the plan");
        if self.compute != Compute::F32 {
            let operands = DenseWeightGradient { input, delta, gradient, accumulate, nodes };
            return match self.compute {
                Compute::Bf16Amx => self.weight_gradient_of_pairs::<BlockedPair>(leaves, operands, crew),
                _ => self.weight_gradient_of_pairs::<Bf16Pair>(leaves, operands, crew),
            };
        }
        let pack = |panel: &Panel, packed: &mut [f32]| {
            let delta = &delta[..depth * outputs];
            elementwise::copy_columns(self.isa, delta, outputs, panel.start, panel.columns, packed, panel.width);
        };
        let sums = Sums {
            run_depth: pixels,
            segments: leaves,
            nodes,
            a_step: self.group,
            accumulate,
            ..Sums::in_one(rows, depth)
        };
        let group = |group: usize, to: &mut [f32]| self.group_input(&input[..depth * inputs], group, depth, to);
        let output = Output::Panels(self.shape.weights(), gradient);
        self.weight_gradient.multiply(sums, First::Columns(&group), Second::copied(&pack), output, crew)
    }

    /// Copies a group of input columns together, and a column of ones behind the last one.
    fn group_input(&self, input: &[f32], group: usize, depth: usize, to: &mut [f32]) {
        let inputs = self.shape.inputs;
        let (start, to) = (group * self.group, &mut to[..depth * self.group]);
        let count = self.group.min(inputs - start);
        elementwise::copy_columns(self.isa, input, inputs, start, count, to, self.group);
        if count < self.group {
            to.iter_mut().skip(count).step_by(self.group).for_each(|one| *one = 1.0);
        }
    }

    fn rows(&self, samples: usize) -> usize {
        let rows = samples * self.shape.pixels;
        assert!(rows <= self.max_rows, "{rows} rows in a plan for {}", self.max_rows);
        rows
    }
}

/// What [`Dense::forward`] reads and writes.
pub struct DenseForward<'a> {
    /// (samples, pixels, inputs)
    pub input: &'a [f32],
    /// (inputs, outputs), in panels: [`DenseShape::weights`].
    pub weights: &'a [f32],
    /// One for each output.
    pub bias: Option<&'a [f32]>,
    /// (samples, pixels, outputs)
    pub output: &'a mut [f32],
    /// Applied to every sum.
    pub after: After<'a>,
}

/// What [`Dense::input_gradient`] reads and writes.
pub struct DenseInputGradient<'a> {
    /// (samples, pixels, outputs)
    pub delta: &'a [f32],
    /// (inputs, outputs), in panels: [`DenseShape::weights`].
    pub weights: &'a [f32],
    /// (samples, pixels, inputs)
    pub input_gradient: &'a mut [f32],
    /// Applied to every sum.
    pub after: After<'a>,
}

/// What [`Dense::weight_gradient`] reads and writes.
pub struct DenseWeightGradient<'a> {
    /// (samples, pixels, inputs)
    pub input: &'a [f32],
    /// (samples, pixels, outputs)
    pub delta: &'a [f32],
    /// (inputs, outputs) in panels, then the bias' (outputs) if the layer has one.
    pub gradient: &'a mut [f32],
    /// Whether `gradient` is added to or overwritten.
    pub accumulate: bool,
    /// What the sums of leaves, and of their tree, are rounded to, if there are several of them.
    pub nodes: Precision,
}
