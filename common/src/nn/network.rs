//! A model's forward and backward passes over a few samples at a time.

use super::dense::{DenseLayer, DenseOperands};
use super::linear::{ForwardPass, GradientPass, InputGradientPass, Linear};
use super::live::LiveSizes;
use super::loss::Loss;
use super::op::{Op, unparametrised};
use super::parts::GradientPlace;
use super::profile::Lap;
use super::sparsity::{Sparsity, ZeroProducts};
use super::workspace::Workspace;
use crate::kernel::contraction::{After, BLOCK_SAMPLES};
use crate::kernel::pooling;
use crate::kernel::{Arithmetic, Compute, Isa, Precision, elementwise};
use crate::model::{Activation, LayerPlace, ResolvedModel};
use crate::reduce::NodeSums;

/// Activations of one pass should stay near the core: half a million floats are 2 MiB.
const PASS_FLOATS: usize = 1 << 19;
/// The same where caches are small; but as each pass goes through all weights, activations are at least twice as many.
const SMALL_PASS_FLOATS: usize = 1 << 17;
/// More samples than this do not make a pass faster.
const MAX_PASS_SAMPLES: usize = 64;
/// Networks of dense layers read all weights in every pass, so passes are as large as memory allows: 16 million floats
/// are 64 MiB, and twice that with their derivatives.
const DENSE_PASS_FLOATS: usize = 1 << 24;
/// More samples than this hide the weights' way from memory well enough.
const MAX_DENSE_PASS_SAMPLES: usize = 512;

/// A model as plans: what is computed, in which order, on which instruction set.
///
/// A network holds no parameters and no activations, so that threads can share it.
#[derive(Debug)]
pub struct Network {
    pub(super) isa: Isa,
    compute: Compute,
    /// What the sums of leaves, and of their tree, are rounded to.
    pub(super) nodes: Precision,
    pub(super) loss: Loss,
    pub(super) ops: Vec<Op>,
    /// The layers that `ops` belong to.
    pub(super) places: Vec<LayerPlace>,
    /// How many of `ops` belong to the encoder.
    pub(super) encoder_ops: usize,
    /// Elements of a sample before each op and after the last one.
    pub(super) elements: Vec<usize>,
    pub(super) parameters: usize,
    /// Words of packed weights, and words behind them that packing needs.
    packed_len: usize,
    packing_len: usize,
    pub(super) scratch_len: usize,
    pub(super) pass_samples: usize,
    /// Whether passes take many samples, and threads share each step.
    pub(super) is_dense: bool,
}

/// Samples that a pass takes through the network: whole leaves, or a stretch of one leaf.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    /// Samples of each leaf; a power of two of leaves.
    pub(super) leaves: &'a [usize],
    /// Whether their sums begin here.
    pub(super) first: bool,
}

impl Pass<'_> {
    pub(super) fn samples(&self) -> usize {
        self.leaves.iter().sum()
    }
}

/// Parameters of one version, in the layout's order and packed for the passes.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The flat vector.
    pub parameters: &'a [f32],
    /// From [`Network::pack`].
    pub packed: &'a [f32],
}

/// Writes sample `i` of those that a pass is about.
pub type WriteSample<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

impl Network {
    /// The plans of `model` for an instruction set, and operands of product-sums that are 32-bit floats if nothing else
    /// is said.
    pub fn new(model: &ResolvedModel, loss: Loss, arithmetic: impl Into<Arithmetic>) -> Self {
        let all: usize = model.layers.iter().map(|layer| layer.output.elements()).sum();
        let arithmetic = arithmetic.into();
        let pass_samples = if model.is_dense() {
            (DENSE_PASS_FLOATS / all.max(1)).clamp(1, MAX_DENSE_PASS_SAMPLES)
        } else {
            let floats = if arithmetic.isa.has_small_caches() {
                (2 * model.layout.parameters()).clamp(SMALL_PASS_FLOATS, PASS_FLOATS)
            } else {
                PASS_FLOATS
            };
            (floats / all.max(1)).clamp(4, MAX_PASS_SAMPLES) / 4 * 4
        };
        Self::with_pass_samples(model, loss, arithmetic, pass_samples)
    }

    /// The same with a given number of samples to a pass, which is a matter of speed and memory alone. In bfloat16, passes
    /// begin at even samples, because the sums over samples take two at a time: an odd number is raised by one.
    ///
    /// # Panics
    /// When `pass_samples` is 0.
    pub fn with_pass_samples(
        model: &ResolvedModel,
        loss: Loss,
        arithmetic: impl Into<Arithmetic>,
        pass_samples: usize,
    ) -> Self {
        assert!(pass_samples > 0, "a pass takes at least one sample");
        let arithmetic = arithmetic.into();
        let Arithmetic { isa, compute } = arithmetic;
        let is_dense = model.is_dense();
        let together = match compute {
            Compute::F32 => 1,
            Compute::Bf16Amx if is_dense => BLOCK_SAMPLES,
            Compute::Bf16 | Compute::Bf16Amx => 2,
        };
        let pass_samples = pass_samples.next_multiple_of(together);
        let mut ops = Vec::new();
        let mut places = Vec::new();
        let mut elements = vec![model.input_shape().elements()];
        let mut encoder_ops = 0;
        let mut packed_len = 0;
        let mut trained = false;
        for (i, (layer, live)) in model.layers.iter().zip(LiveSizes::of(model)).enumerate() {
            let sparsity = Sparsity::between(ops.last(), model.layers.get(i + 1));
            let op = if is_dense
                && let Some(dense) = DenseLayer::new(arithmetic, layer, &model.layout, pass_samples, sparsity)
            {
                Some(Op::Dense(Box::new(dense)))
            } else if let Some(linear) =
                Linear::new(arithmetic, (layer, live), &model.layout, pass_samples, packed_len, !trained, sparsity)
            {
                trained = true;
                packed_len = linear.packed_end();
                Some(Op::Linear(Box::new(linear)))
            } else {
                unparametrised(layer, live)
            };
            if let Some(op) = op {
                ops.push(op);
                places.push(layer.place.clone());
                elements.push(live.output_elements(layer));
            }
            if i + 1 == model.encoder_layers {
                encoder_ops = ops.len();
            }
        }
        let largest = |len: &dyn Fn(&Linear) -> usize| {
            let lens = ops.iter().map(|op| match op {
                Op::Linear(linear) => len(linear),
                _ => 0,
            });
            lens.max().unwrap_or(0)
        };
        let scratch_len = largest(&|linear| linear.scratch_len(pass_samples));
        let packing_len = largest(&Linear::packing_len);
        Self {
            isa,
            compute,
            nodes: Precision::F32,
            loss,
            encoder_ops,
            elements,
            parameters: model.layout.parameters(),
            packed_len,
            packing_len,
            scratch_len,
            pass_samples,
            is_dense,
            ops,
            places,
        }
    }

    /// The same, with gradients of leaves and of tree nodes rounded to `nodes`.
    pub fn with_nodes(self, nodes: Precision) -> Self {
        Self { nodes, ..self }
    }

    /// The same, with another choice of what is done about products with zeros, which is a matter of speed alone.
    pub fn with_zero_products(mut self, choice: ZeroProducts) -> Self {
        for op in &mut self.ops {
            match op {
                Op::Dense(dense) => dense.zero_products = choice,
                Op::Linear(linear) => linear.zero_products = choice,
                _ => {}
            }
        }
        self
    }

    /// How tree nodes are added.
    pub(super) fn node_sums(&self) -> NodeSums {
        NodeSums { isa: self.isa, precision: self.nodes }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// The instruction set that the network runs on.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// What product-sums are computed from.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Number of samples that one pass takes through all layers.
    pub fn pass_samples(&self) -> usize {
        self.pass_samples
    }

    /// Whether the gradient over these leaves is done layer by layer, in a single pass: then `GradientPlace::done_from` may be
    /// believed.
    pub(super) fn is_done_in_layers(&self, leaves: &[usize]) -> bool {
        let rounded_at_the_end = leaves.len() == 1 && self.nodes != Precision::F32;
        self.takes_several_leaves(leaves.iter().sum()) && !rounded_at_the_end
    }

    /// Whether one pass can take several leaves that have that many samples together.
    pub(super) fn takes_several_leaves(&self, samples: usize) -> bool {
        self.is_dense && samples <= self.pass_samples
    }

    /// Number of elements of one sample.
    pub fn input_elements(&self) -> usize {
        self.elements[0]
    }

    /// Number of elements of one sample's code.
    pub fn code_elements(&self) -> usize {
        self.elements[self.encoder_ops]
    }

    /// Floating-point operations of one sample's forward and backward pass through the layers with weights.
    pub fn training_flops(&self) -> usize {
        let products = self.ops.iter().map(Op::products).filter(|&products| products > 0);
        let first = products.clone().next().unwrap_or(0);
        2 * (3 * products.sum::<usize>() - first)
    }

    /// Floats of packed weights. (In bfloat16, two numbers take the place of a float.)
    pub fn packed_len(&self) -> usize {
        self.packed_len + self.packing_len
    }

    /// Prepares a version of the parameters for the passes. `packed` has [`Network::packed_len`] floats; passes are fastest
    /// if it is aligned ([`crate::kernel::AlignedFloats`]).
    pub fn pack(&self, parameters: &[f32], packed: &mut [f32]) {
        assert_eq!(parameters.len(), self.parameters, "parameters of the network");
        let (packed, scratch) = packed.split_at_mut(self.packed_len);
        for op in &self.ops {
            if let Op::Linear(linear) = op {
                linear.pack(parameters, packed, scratch);
            }
        }
    }

    /// Runs ops over the samples in the workspace.
    pub(super) fn forward(
        &self,
        ops: std::ops::Range<usize>,
        samples: usize,
        weights: Weights<'_>,
        workspace: &mut Workspace,
    ) {
        for i in ops {
            let (before, after) = workspace.values.split_at_mut(i + 1);
            let (input, output) = (&before[i], &mut after[0]);
            let used = samples * self.elements[i + 1];
            match &self.ops[i] {
                op @ (Op::Linear(_) | Op::Dense(_)) => {
                    let Weights { parameters, packed } = weights;
                    let scratch = &mut workspace.scratch;
                    match op {
                        Op::Dense(dense) => dense.forward(samples, parameters, input, output, &mut workspace.crew),
                        Op::Linear(linear) => {
                            linear.forward(samples, ForwardPass { parameters, packed, input, output, scratch });
                        }
                        _ => unreachable!("matched above"),
                    }
                    // A relu is part of the product-sum.
                    if op.activation() != Activation::Relu {
                        self.activate(op.activation(), &mut output[..used], &mut workspace.kept[i]);
                    }
                }
                Op::Activate(activation) => {
                    output[..used].copy_from_slice(&input[..used]);
                    self.activate(*activation, &mut output[..used], &mut workspace.kept[i]);
                }
                Op::MaxPool { windows, channels } => {
                    let winners = workspace.winners[i].chunks_exact_mut(self.elements[i + 1]);
                    for ((input, output), winners) in self.sample_pairs(i, samples, input, output).zip(winners) {
                        pooling::max_pool(self.isa, windows, input, output, winners, *channels);
                    }
                }
                Op::AveragePool { windows, channels } => {
                    for (input, output) in self.sample_pairs(i, samples, input, output) {
                        pooling::average_pool(self.isa, windows, input, output, *channels);
                    }
                }
                Op::UpSample { windows, channels } => {
                    for (input, output) in self.sample_pairs(i, samples, input, output) {
                        pooling::up_sample(self.isa, windows, input, output, *channels);
                    }
                }
            }
        }
    }

    fn activate(&self, activation: Activation, values: &mut [f32], kept: &mut [f32]) {
        if elementwise::needs_input(activation) {
            kept[..values.len()].copy_from_slice(values);
        }
        if activation != Activation::Linear {
            self.in_stretches(values, &[], |values, _| elementwise::activate(self.isa, activation, values));
        }
    }

    /// Each sample's input and output of op `i`.
    fn sample_pairs<'a>(
        &self,
        i: usize,
        samples: usize,
        input: &'a [f32],
        output: &'a mut [f32],
    ) -> impl Iterator<Item = (&'a [f32], &'a mut [f32])> {
        let (from, to) = (self.elements[i], self.elements[i + 1]);
        input.chunks_exact(from).zip(output.chunks_exact_mut(to)).take(samples)
    }

    /// Whether the loss' derivative is taken by the last op's input to its sigmoid, where it is simpler and exact.
    pub(super) fn loss_by_logit(&self) -> bool {
        let last = self.ops.last().map_or(Activation::Linear, Op::activation);
        self.loss == Loss::BinaryCrossentropy && last == Activation::Sigmoid
    }

    /// Adds the pass' gradients to `gradient`, or sets it if the pass is the first one of its leaves. Calls `lap` after
    /// each part.
    pub(super) fn backward(
        &self,
        pass: Pass<'_>,
        weights: Weights<'_>,
        gradient: &mut dyn GradientPlace,
        workspace: &mut Workspace,
        lap: &mut dyn FnMut(Lap),
    ) {
        let samples = pass.samples();
        // Whether the activation of the op at hand is accounted for in its deltas already.
        let mut through_activation = self.loss_by_logit();
        for i in (0..self.ops.len()).rev() {
            let Workspace { values, deltas, kept, winners, scratch, crew, gradient_known_finite, .. } = workspace;
            let (before, after) = deltas.split_at_mut(i + 1);
            let (input_delta, delta) = (&mut before[i], &mut after[0]);
            let used = samples * self.elements[i + 1];
            let op = &self.ops[i];
            let activation = op.activation();
            if !through_activation {
                let at = if elementwise::needs_input(activation) { &kept[i] } else { &values[i + 1] };
                self.in_stretches(&mut delta[..used], &at[..used], |delta, at| {
                    elementwise::activate_backward(self.isa, activation, at, delta);
                });
            }
            // A relu before is undone while its output's gradient is written, if the op can do that.
            let relu_before = i > 0 && self.ops[i - 1].activation() == Activation::Relu;
            through_activation = relu_before && (op.has_weights() || matches!(op, Op::MaxPool { .. }));
            let after = if through_activation { After::Gate(&values[i]) } else { After::Keep };
            // Nothing is trained before the first layer with weights.
            let trained_before = self.ops[..i].iter().any(Op::has_weights);
            match op {
                Op::Dense(dense) => {
                    let operands = DenseOperands { input: &values[i], delta, nodes: self.nodes };
                    let floats = gradient.floats();
                    *gradient_known_finite &= dense.weight_gradient(pass.leaves, !pass.first, floats, operands, crew);
                    lap(Lap::WeightGradient(i));
                    gradient.done_from(dense.first_parameter(), *gradient_known_finite);
                    if trained_before {
                        dense.input_gradient(samples, weights.parameters, delta, (input_delta, after), crew);
                    }
                }
                Op::Linear(linear) => {
                    let gradient = gradient.floats();
                    let gradients = GradientPass { input: &values[i], delta, gradient, scratch };
                    linear.weight_gradient(samples, pass.first, gradients);
                    *gradient_known_finite = false;
                    lap(Lap::WeightGradient(i));
                    let packed = weights.packed;
                    linear.input_gradient(
                        samples,
                        after,
                        InputGradientPass { packed, delta, input_gradient: input_delta, scratch },
                    );
                }
                Op::Activate(_) => input_delta[..used].copy_from_slice(&delta[..used]),
                Op::MaxPool { windows, channels } => {
                    let size = self.elements[i + 1];
                    let of_outputs = winners[i].chunks_exact(size).zip(values[i + 1].chunks_exact(size));
                    let pairs = self.delta_pairs(i, samples, delta, input_delta).zip(of_outputs);
                    for ((delta, input_delta), (winners, output)) in pairs {
                        let gate = through_activation.then_some(output);
                        pooling::max_pool_backward(self.isa, windows, delta, winners, gate, input_delta, *channels);
                    }
                }
                Op::AveragePool { windows, channels } => {
                    for (delta, input_delta) in self.delta_pairs(i, samples, delta, input_delta) {
                        pooling::average_pool_backward(self.isa, windows, delta, input_delta, *channels);
                    }
                }
                Op::UpSample { windows, channels } => {
                    for (delta, input_delta) in self.delta_pairs(i, samples, delta, input_delta) {
                        pooling::up_sample_backward(self.isa, windows, delta, input_delta, *channels);
                    }
                }
            }
            if trained_before || !op.has_weights() {
                lap(Lap::InputGradient(i));
            }
        }
    }

    /// Each sample's output delta and input delta of op `i`.
    fn delta_pairs<'a>(
        &self,
        i: usize,
        samples: usize,
        delta: &'a [f32],
        input_delta: &'a mut [f32],
    ) -> impl Iterator<Item = (&'a [f32], &'a mut [f32])> {
        let (to, from) = (self.elements[i + 1], self.elements[i]);
        delta.chunks_exact(to).zip(input_delta.chunks_exact_mut(from)).take(samples)
    }
}
