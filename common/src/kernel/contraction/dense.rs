//! Dense layers over many samples at once: three matrix products whose work is shared by the threads of the pool.
//!
//! ```text
//! forward:          output (rows, outputs)          = input (rows, inputs) * weights (inputs, outputs) + bias
//! input gradient:   input gradient (rows, inputs)   = delta (rows, outputs) * weights transposed
//! weight gradient:  gradient (inputs, outputs)      = input transposed * delta, as a tree over the leaves
//! ```
//!
//! With large weights, memory is the bottleneck as often as arithmetic. So weights are read where they lie, once for each
//! pass: who computes a panel of output columns copies the panel's operand together first. And a weight gradient is
//! written once, after the tree over all leaves of the pass. Threads do not share copies: to fetch them from another
//! core's cache takes longer than to make them.

use super::crew::{Desk, DeskSize};
use super::{After, Crew, Panel, SLACK, index, panels};
use crate::kernel::elementwise;
use crate::kernel::isa::Isa;
use crate::kernel::microkernel::{self, Block, Finish, MAX_SEGMENTS, Row, Run, Start, panel_widths};
use crate::kernel::transpose::{MatrixShape, transpose};

/// Fewer products than this are not worth another thread: about 10 us of one core.
const MIN_SHARED_PRODUCTS: usize = 1 << 20;
/// Units for each thread, so that one that is disturbed does not hold up the others for long.
const UNITS_PER_THREAD: usize = 24;

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

/// A plan for the three products of a dense layer; see the module's documentation.
#[derive(Debug)]
pub struct Dense {
    isa: Isa,
    shape: DenseShape,
    max_rows: usize,
    forward: Product,
    input_gradient: Product,
    weight_gradient: Product,
}

/// Which outputs a product has, and where their operands begin.
#[derive(Debug)]
struct Product {
    rows: Vec<Row>,
    panels: Vec<Panel>,
}

impl Product {
    /// `rows` rows by `columns` columns. The operand of row `i` begins at `a(i)`.
    fn new(isa: Isa, rows: usize, columns: usize, a: impl Fn(usize) -> usize) -> Self {
        let row = |i: usize| Row { a: index(a(i)), c: index(i * columns) };
        Self { rows: (0..rows).map(row).collect(), panels: panels(isa, columns, 0) }
    }
}

/// Input columns that are copied together for a weight gradient, so that they lie side by side for each sample: a
/// multiple of the rows of the microkernel's largest tiles (6 and 8), in whole cache lines.
const GROUP: usize = 48;

impl Dense {
    /// A plan for up to `max_samples` samples at a time.
    pub fn new(isa: Isa, shape: DenseShape, max_samples: usize) -> Self {
        let DenseShape { pixels, inputs, outputs } = shape;
        let max_rows = max_samples * pixels;
        Self {
            isa,
            shape,
            max_rows,
            forward: Product::new(isa, max_rows, outputs, |row| row * inputs),
            input_gradient: Product::new(isa, max_rows, inputs, |row| row * outputs),
            // One more row for the bias: the weight of an input that is always 1.
            weight_gradient: Product::new(isa, inputs + 1, outputs, |i| i / GROUP * GROUP * max_rows + i % GROUP),
        }
    }

    /// What each thread of a crew needs.
    pub fn desk(&self) -> DeskSize {
        let groups = (self.shape.inputs + 1).div_ceil(GROUP);
        DeskSize { floats: self.panel_len() + groups * GROUP * self.max_rows, groups }
    }

    /// Floats at the beginning of a desk for a panel of the second operand. Groups of the first one lie behind it.
    fn panel_len(&self) -> usize {
        self.shape.inputs.max(self.shape.outputs).max(self.max_rows) * panel_widths(self.isa)[0]
    }

    /// Computes `output` (samples, pixels, outputs): `after(input * weights + bias)`, inputs ascending.
    ///
    /// # Panics
    /// When `samples` exceeds the plan's largest number or a slice is too short.
    pub fn forward(&self, samples: usize, operands: DenseForward<'_>, crew: &mut Crew) {
        let DenseForward { input, weights, bias, output, after } = operands;
        let DenseShape { inputs, outputs, .. } = self.shape;
        let rows = self.rows(samples);
        assert_eq!(weights.len(), inputs * outputs, "weights of the plan");
        assert!(bias.is_none_or(|bias| bias.len() == outputs), "one bias for each output");
        let pack = |panel: &Panel, packed: &mut [f32]| {
            elementwise::copy_columns(self.isa, weights, outputs, panel.start, panel.columns, packed, panel.width);
        };
        let sums =
            Sums { rows, depth: inputs, run_depth: inputs, segments: &[1], a_step: 1, bias, accumulate: false, after };
        self.multiply(&self.forward, sums, First::Rows(input), &pack, output, crew);
    }

    /// Computes `input_gradient` (samples, pixels, inputs): `after(delta * weights transposed)`, outputs ascending.
    ///
    /// # Panics
    /// As for [`Dense::forward`].
    pub fn input_gradient(&self, samples: usize, operands: DenseInputGradient<'_>, crew: &mut Crew) {
        let DenseInputGradient { delta, weights, input_gradient, after } = operands;
        let DenseShape { inputs, outputs, .. } = self.shape;
        let rows = self.rows(samples);
        assert_eq!(weights.len(), inputs * outputs, "weights of the plan");
        let pack = |panel: &Panel, packed: &mut [f32]| {
            let shape = MatrixShape { rows: panel.columns, columns: outputs, stride: outputs };
            transpose(self.isa, &weights[panel.start * outputs..], shape, packed, panel.width);
        };
        let sums = Sums {
            rows,
            depth: outputs,
            run_depth: outputs,
            segments: &[1],
            a_step: 1,
            bias: None,
            accumulate: false,
            after,
        };
        self.multiply(&self.input_gradient, sums, First::Rows(delta), &pack, input_gradient, crew);
    }

    /// Adds to `gradient` (inputs, outputs; then the bias' outputs, if there is one) the sum over samples and pixels of
    /// `input * delta`, or sets it to that sum. Leaves are sums of their own, added as a perfect binary tree; there
    /// must be a power of two of them, and just one if there is something to add to.
    ///
    /// # Panics
    /// As for [`Dense::forward`], and when the number of leaves is wrong.
    pub fn weight_gradient(&self, leaves: &[usize], operands: DenseWeightGradient<'_>, crew: &mut Crew) {
        let DenseWeightGradient { input, delta, gradient, accumulate } = operands;
        let DenseShape { pixels, inputs, outputs } = self.shape;
        let depth = self.rows(leaves.iter().sum());
        assert!(leaves.len().is_power_of_two() && leaves.len() <= MAX_SEGMENTS, "{} leaves", leaves.len());
        assert!(!accumulate || leaves.len() == 1, "a tree of leaves starts from 0");
        assert!(input.len() >= depth * inputs && delta.len() >= depth * outputs, "operands too short");
        let with_bias = gradient.len() == (inputs + 1) * outputs;
        assert!(with_bias || gradient.len() == inputs * outputs, "gradient of the plan");
        let pack = |panel: &Panel, packed: &mut [f32]| {
            let delta = &delta[..depth * outputs];
            elementwise::copy_columns(self.isa, delta, outputs, panel.start, panel.columns, packed, panel.width);
        };
        let rows = inputs + usize::from(with_bias);
        let after = After::Keep;
        let sums =
            Sums { rows, depth, run_depth: pixels, segments: leaves, a_step: GROUP, bias: None, accumulate, after };
        let group = |group: usize, to: &mut [f32]| self.group_input(&input[..depth * inputs], group, depth, to);
        self.multiply(&self.weight_gradient, sums, First::Columns(&group), &pack, gradient, crew);
    }

    /// Copies a group of input columns together, and a column of ones behind the last one.
    fn group_input(&self, input: &[f32], group: usize, depth: usize, to: &mut [f32]) {
        let inputs = self.shape.inputs;
        let start = group * GROUP;
        let count = GROUP.min(inputs - start);
        elementwise::copy_columns(self.isa, input, inputs, start, count, &mut to[..depth * GROUP], GROUP);
        if count < GROUP {
            to[..depth * GROUP].iter_mut().skip(count).step_by(GROUP).for_each(|one| *one = 1.0);
        }
    }

    fn rows(&self, samples: usize) -> usize {
        let rows = samples * self.shape.pixels;
        assert!(rows <= self.max_rows, "{rows} rows in a plan for {}", self.max_rows);
        rows
    }

    /// Computes a product in units of a panel by some rows. `pack` writes a panel of the second operand, `depth` rows
    /// as wide as the panel.
    fn multiply(
        &self,
        product: &Product,
        sums: Sums<'_>,
        first: First<'_>,
        pack: &(dyn Fn(&Panel, &mut [f32]) + Sync),
        output: &mut [f32],
        crew: &mut Crew,
    ) {
        let Sums { rows, depth, run_depth, segments, a_step, bias, accumulate, after } = sums;
        let (rows, columns) = (&product.rows[..rows], product.panels.iter().map(|panel| panel.columns).sum::<usize>());
        let Some(last) = rows.last() else { return };
        let operand_len = last.a as usize + depth.saturating_sub(1) * a_step + 1;
        assert!(first.holds(operand_len), "first operand too short");
        assert!(output.len() >= last.c as usize + columns, "output too short");
        assert_eq!(segments.iter().sum::<usize>() * run_depth, depth, "segments make up the depth");
        if let After::Gate(gate) = after {
            assert!(gate.len() >= last.c as usize + columns, "gate too short");
        }
        let runs = [Run { a: 0, b: 0, depth: index(run_depth) }];
        let unit_rows = unit_rows(rows.len(), product.panels.len(), crew.size());
        let stretches = rows.len().div_ceil(unit_rows);
        let output = Output(output.as_mut_ptr());
        let worth_sharing = rows.len() * depth * columns >= MIN_SHARED_PRODUCTS;
        crew.share(product.panels.len() * stretches, worth_sharing, |unit, desk| {
            let (panel_index, stretch) = (unit / stretches, unit % stretches * unit_rows);
            let panel = &product.panels[panel_index];
            let rows = &rows[stretch..rows.len().min(stretch + unit_rows)];
            let Desk { scratch, panel: at_hand, groups } = desk;
            let (packed, grouped) = scratch.split_at_mut(self.panel_len());
            let packed = &mut packed[..depth * panel.width];
            if at_hand.replace(panel_index) != Some(panel_index) {
                pack(panel, packed);
            }
            let a = match first {
                First::Rows(operand) => operand,
                First::Columns(copy) => {
                    for group in stretch / GROUP..(stretch + rows.len()).div_ceil(GROUP) {
                        if !std::mem::replace(&mut groups[group], true) {
                            copy(group, &mut grouped[group * GROUP * self.max_rows..]);
                        }
                    }
                    assert!(grouped.len() >= operand_len, "desk of the plan");
                    grouped
                }
            };
            let block = Block {
                a: a.as_ptr(),
                b: packed.as_ptr(),
                c: output.column(panel.start),
                rows,
                runs: &runs,
                segments,
                a_repeat: run_depth * a_step,
                b_repeat: run_depth,
                a_step,
                b_stride: panel.width,
                columns: panel.columns,
                start: match bias {
                    _ if accumulate => Start::Accumulate,
                    Some(bias) => Start::Bias(bias[panel.start..].as_ptr()),
                    None => Start::Zero,
                },
                finish: match after {
                    After::Keep => Finish::Keep,
                    After::Relu => Finish::Relu,
                    After::Gate(gate) => Finish::Gate(gate[panel.start..].as_ptr()),
                },
            };
            debug_assert!(panel.width <= SLACK);
            // SAFETY: the lengths of `a`, `output` and the gate were checked above for the last row, and rows ascend;
            // the segments go through `depth` rows of the packed panel, which are whole vectors wide; units are
            // different panels or different rows, so that no two of them share an output.
            unsafe { microkernel::run(self.isa, &block) }
        });
    }
}

/// The first operand of a product.
#[derive(Clone, Copy)]
enum First<'a> {
    /// It is read where it lies.
    Rows(&'a [f32]),
    /// Groups of its columns are copied to the desks of those who need them.
    Columns(&'a (dyn Fn(usize, &mut [f32]) + Sync)),
}

impl First<'_> {
    /// Whether that many floats are there. A desk is checked when it is used.
    fn holds(&self, len: usize) -> bool {
        match self {
            Self::Rows(operand) => operand.len() >= len,
            Self::Columns(_) => true,
        }
    }
}

/// What a product sums, and how.
#[derive(Clone, Copy)]
struct Sums<'a> {
    rows: usize,
    /// Products of one output.
    depth: usize,
    /// Products of one repeat of a segment.
    run_depth: usize,
    segments: &'a [usize],
    /// From one float of a row's operand to the next.
    a_step: usize,
    bias: Option<&'a [f32]>,
    accumulate: bool,
    after: After<'a>,
}

/// Rows of a unit of work, so that there are enough units for all threads to be done at the same time.
fn unit_rows(rows: usize, panels: usize, threads: usize) -> usize {
    if threads == 1 {
        return rows;
    }
    let units = (threads * UNITS_PER_THREAD).div_ceil(panels);
    rows.div_ceil(units).next_multiple_of(GROUP)
}

/// An output to which several threads write, each to places of its own.
#[derive(Clone, Copy)]
struct Output(*mut f32);

// SAFETY: an address may be known to any thread. Who writes through it says why nobody else does.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// The output from a column on.
    fn column(self, column: usize) -> *mut f32 {
        self.0.wrapping_add(column)
    }
}

/// What [`Dense::forward`] reads and writes.
pub struct DenseForward<'a> {
    /// (samples, pixels, inputs)
    pub input: &'a [f32],
    /// (inputs, outputs)
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
    /// (inputs, outputs)
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
    /// (inputs, outputs), then the bias' (outputs) if the layer has one.
    pub gradient: &'a mut [f32],
    /// Whether `gradient` is added to or overwritten.
    pub accumulate: bool,
}
