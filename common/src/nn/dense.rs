//! Dense layers of networks that have no others: passes take many samples, and threads share each step.

use std::ops::Range;

use super::linear::parameter_range;
use super::sparsity::{Sparsity, ZeroProducts};
use crate::kernel::contraction::{
    After, Crew, CrewSize, Dense, DenseForward, DenseInputGradient, DenseShape, DenseWeightGradient, SparseOperand,
};
use crate::kernel::{Arithmetic, Isa, Precision};
use crate::model::{Activation, LayerSpec, Layout, ResolvedLayer};

/// A dense layer with the activation that follows it.
#[derive(Debug)]
pub(super) struct DenseLayer {
    pub(super) activation: Activation,
    /// Products of one sample's forward pass.
    pub(super) products: usize,
    kernel: Range<usize>,
    bias: Option<Range<usize>>,
    plan: Dense,
    /// Which operand of the weight gradient is mostly 0, as a rule.
    sparse: Option<SparseOperand>,
    pub(super) zero_products: ZeroProducts,
    isa: Isa,
}

/// Samples of a leaf from which on lists of what is not 0 can be faster: with fewer, too little is added for each list.
const MIN_SPARSE_SAMPLES: usize = 12;

/// The share of elements that are not 0 up to which their lists are faster than all products, as measured on an Intel core and a
/// Zen 4. Lists load an operand for each multiply-add.
fn most_nonzero(isa: Isa) -> f32 {
    if isa.is_bound_by_loads() { 0.35 } else { 0.6 }
}

impl DenseLayer {
    /// The plan of a dense layer, or `None` for another one.
    pub(super) fn new(
        arithmetic: Arithmetic,
        layer: &ResolvedLayer,
        layout: &Layout,
        max_samples: usize,
        sparsity: Sparsity,
    ) -> Option<Self> {
        let (LayerSpec::Dense { units, activation, .. }, Some(&inputs)) = (&layer.spec, layer.input.axes().last())
        else {
            return None;
        };
        let shape = DenseShape { pixels: layer.positions(), inputs, outputs: *units };
        // Where relu made the input, it is sparser than the derivative, as a rule.
        let sparse = match (sparsity.input, activation) {
            (true, _) => Some(SparseOperand::Input),
            (false, Activation::Relu) => Some(SparseOperand::Delta),
            _ => None,
        };
        Some(Self {
            activation: *activation,
            products: shape.pixels * shape.inputs * shape.outputs,
            kernel: parameter_range(layout, &layer.place, "kernel").expect("a dense layer has a kernel"),
            bias: parameter_range(layout, &layer.place, "bias"),
            plan: match sparse {
                Some(sparse) => Dense::new(arithmetic, shape, max_samples).with_sparse(sparse),
                None => Dense::new(arithmetic, shape, max_samples),
            },
            sparse,
            zero_products: ZeroProducts::default(),
            isa: arithmetic.isa,
        })
    }

    /// What a crew needs for the layer.
    pub(super) fn crew(&self) -> CrewSize {
        self.plan.crew()
    }

    /// Where the layer's parameters begin: kernel, then bias.
    pub(super) fn first_parameter(&self) -> usize {
        self.kernel.start
    }

    /// `output = relu(input * kernel + bias)`, or without relu if the activation is another one.
    pub(super) fn forward(
        &self,
        samples: usize,
        parameters: &[f32],
        input: &[f32],
        output: &mut [f32],
        crew: &mut Crew,
    ) {
        let weights = &parameters[self.kernel.clone()];
        let bias = self.bias.clone().map(|range| &parameters[range]);
        let after = if self.activation == Activation::Relu { After::Relu } else { After::Keep };
        self.plan.forward(samples, DenseForward { input, weights, bias, output, after }, crew);
    }

    /// Adds the gradients of kernel and bias over whole leaves to `gradient` (laid out like the parameters), or sets
    /// them. `delta` is the loss' derivative by `input * kernel + bias`. Returns whether the gradients are known to be finite.
    pub(super) fn weight_gradient(
        &self,
        leaves: &[usize],
        accumulate: bool,
        gradient: &mut [f32],
        operands: DenseOperands<'_>,
        crew: &mut Crew,
    ) -> bool {
        let DenseOperands { input, delta, nodes } = operands;
        // The bias lies behind the kernel.
        let end = self.bias.as_ref().map_or(self.kernel.end, |bias| bias.end);
        let gradient = &mut gradient[self.kernel.start..end];
        let operands = DenseWeightGradient { input, delta, gradient, accumulate, nodes };
        match self.leaves_out_zeros(leaves, &operands) {
            true => self.plan.sparse_weight_gradient(leaves, operands, crew),
            false => self.plan.weight_gradient(leaves, operands, crew),
        }
    }

    fn leaves_out_zeros(&self, leaves: &[usize], operands: &DenseWeightGradient<'_>) -> bool {
        let listed = match self.sparse {
            Some(SparseOperand::Input) => operands.input,
            Some(SparseOperand::Delta) => operands.delta,
            None => return false,
        };
        let of_few = leaves.iter().sum::<usize>() < MIN_SPARSE_SAMPLES * leaves.len();
        let most = if of_few { 0.0 } else { most_nonzero(self.isa) };
        self.zero_products.are_left_out(self.isa, listed, most)
    }

    /// The loss' derivative by the layer's input, from `delta` as above; `after` is applied to it.
    pub(super) fn input_gradient(
        &self,
        samples: usize,
        parameters: &[f32],
        delta: &[f32],
        (input_gradient, after): (&mut [f32], After<'_>),
        crew: &mut Crew,
    ) {
        let weights = &parameters[self.kernel.clone()];
        self.plan.input_gradient(samples, DenseInputGradient { delta, weights, input_gradient, after }, crew);
    }
}

/// What [`DenseLayer::weight_gradient`] reads.
pub(super) struct DenseOperands<'a> {
    pub(super) input: &'a [f32],
    pub(super) delta: &'a [f32],
    /// What the sums of several leaves are rounded to.
    pub(super) nodes: Precision,
}
