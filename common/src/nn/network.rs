//! A model's forward and backward passes over a few samples at a time.

use super::linear::{ForwardPass, GradientPass, InputGradientPass, Linear};
use super::loss::Loss;
use super::op::{Op, unparametrised};
use crate::kernel::contraction::{After, SLACK};
use crate::kernel::pooling;
use crate::kernel::{AlignedFloats, Isa, elementwise};
use crate::model::{Activation, ResolvedModel};

/// Activations of one pass should stay near the core: half a million floats are 2 MiB.
const PASS_FLOATS: usize = 1 << 19;
/// More samples than this do not make a pass faster.
const MAX_PASS_SAMPLES: usize = 64;

/// A model as plans: what is computed, in which order, on which instruction set.
///
/// A network holds no parameters and no activations, so that threads can share it.
#[derive(Debug)]
pub struct Network {
    isa: Isa,
    loss: Loss,
    ops: Vec<Op>,
    /// How many of `ops` belong to the encoder.
    encoder_ops: usize,
    /// Elements of a sample before each op and after the last one.
    elements: Vec<usize>,
    parameters: usize,
    packed_len: usize,
    scratch_len: usize,
    pass_samples: usize,
}

/// Parameters of one version, in the layout's order and packed for the passes.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The flat vector.
    pub parameters: &'a [f32],
    /// From [`Network::pack`].
    pub packed: &'a [f32],
}

/// One thread's memory for passes. It is made once; passes allocate nothing.
#[derive(Debug)]
pub struct Workspace {
    /// Input of each op for a pass' samples, and the last op's output; each with [`SLACK`] floats behind it.
    values: Vec<AlignedFloats>,
    /// Derivatives of the loss by `values`.
    deltas: Vec<AlignedFloats>,
    /// Inputs of activations whose backward pass needs them.
    kept: Vec<AlignedFloats>,
    /// Which element of each max pooling window won.
    winners: Vec<Vec<u32>>,
    scratch: AlignedFloats,
}

impl Network {
    /// The plans of `model` for `isa`.
    pub fn new(model: &ResolvedModel, loss: Loss, isa: Isa) -> Self {
        let all: usize = model.layers.iter().map(|layer| layer.output.elements()).sum();
        let pass_samples = (PASS_FLOATS / all.max(1)).clamp(4, MAX_PASS_SAMPLES) / 4 * 4;
        Self::with_pass_samples(model, loss, isa, pass_samples)
    }

    /// The same with a given number of samples to a pass, which is a matter of speed and memory alone.
    ///
    /// # Panics
    /// When `pass_samples` is 0.
    pub fn with_pass_samples(model: &ResolvedModel, loss: Loss, isa: Isa, pass_samples: usize) -> Self {
        assert!(pass_samples > 0, "a pass takes at least one sample");
        let mut ops = Vec::new();
        let mut elements = vec![model.input_shape().elements()];
        let mut encoder_ops = 0;
        let mut packed_len = 0;
        let mut trained = false;
        for (i, layer) in model.layers.iter().enumerate() {
            let linear = Linear::new(isa, layer, &model.layout, pass_samples, packed_len, !trained);
            let op = match linear {
                Some(linear) => {
                    trained = true;
                    packed_len = linear.packed_end();
                    Some(Op::Linear(Box::new(linear)))
                }
                None => unparametrised(layer),
            };
            if let Some(op) = op {
                ops.push(op);
                elements.push(layer.output.elements());
            }
            if i + 1 == model.encoder_layers {
                encoder_ops = ops.len();
            }
        }
        let scratch_len = ops.iter().map(|op| match op {
            Op::Linear(linear) => linear.scratch_len(pass_samples),
            _ => 0,
        });
        let scratch_len = scratch_len.max().unwrap_or(0);
        Self {
            isa,
            loss,
            encoder_ops,
            elements,
            parameters: model.layout.parameters(),
            packed_len,
            scratch_len,
            pass_samples,
            ops,
        }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// The instruction set that the network runs on.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of samples that one pass takes through all layers.
    pub fn pass_samples(&self) -> usize {
        self.pass_samples
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
        let products = self.ops.iter().filter_map(|op| match op {
            Op::Linear(linear) => Some(linear.products),
            _ => None,
        });
        let first = products.clone().next().unwrap_or(0);
        2 * (3 * products.sum::<usize>() - first)
    }

    /// Floats of packed weights.
    pub fn packed_len(&self) -> usize {
        self.packed_len
    }

    /// Prepares a version of the parameters for the passes. `packed` has [`Network::packed_len`] floats; passes are fastest
    /// if it is aligned ([`AlignedFloats`]).
    pub fn pack(&self, parameters: &[f32], packed: &mut [f32]) {
        assert_eq!(parameters.len(), self.parameters, "parameters of the network");
        for op in &self.ops {
            if let Op::Linear(linear) = op {
                linear.pack(parameters, packed);
            }
        }
    }

    /// Memory for one thread.
    pub fn workspace(&self) -> Workspace {
        let buffer = |elements: usize| AlignedFloats::zeros(elements * self.pass_samples + SLACK);
        let for_ops = |wanted: &dyn Fn(&Op) -> bool| -> Vec<usize> {
            let sizes = self.ops.iter().zip(&self.elements[1..]);
            sizes.map(|(op, &elements)| if wanted(op) { elements * self.pass_samples } else { 0 }).collect()
        };
        let kept = for_ops(&|op| elementwise::needs_input(op.activation()));
        let winners = for_ops(&|op| matches!(op, Op::MaxPool { .. }));
        Workspace {
            values: self.elements.iter().map(|&elements| buffer(elements)).collect(),
            deltas: self.elements.iter().map(|&elements| buffer(elements)).collect(),
            kept: kept.into_iter().map(AlignedFloats::zeros).collect(),
            winners: winners.into_iter().map(|len| vec![0; len]).collect(),
            scratch: AlignedFloats::zeros(self.scratch_len),
        }
    }

    /// Sums the gradient of the loss over `count` samples into `gradient`, which is overwritten, and returns the sum of
    /// their losses. `write(i, out)` writes sample `i`.
    ///
    /// The result does not depend on how many samples a pass takes: every sum continues where the last pass ended.
    pub fn leaf_gradient(
        &self,
        weights: Weights<'_>,
        count: usize,
        write: &dyn Fn(usize, &mut [f32]),
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> f64 {
        assert_eq!(gradient.len(), self.parameters, "gradient of the network");
        if count == 0 {
            gradient.fill(0.0);
        }
        let mut loss = 0.0;
        self.passes(count, write, workspace, |samples, first, workspace| {
            self.forward(0..self.ops.len(), samples, weights, workspace);
            loss = self.loss(samples, loss, workspace);
            self.backward(samples, first, weights, gradient, workspace);
        });
        loss / self.elements[0] as f64
    }

    /// The sum of the losses of `count` samples.
    pub fn leaf_loss(
        &self,
        weights: Weights<'_>,
        count: usize,
        write: &dyn Fn(usize, &mut [f32]),
        workspace: &mut Workspace,
    ) -> f64 {
        let mut loss = 0.0;
        self.passes(count, write, workspace, |samples, _, workspace| {
            self.forward(0..self.ops.len(), samples, weights, workspace);
            loss = self.loss(samples, loss, workspace);
        });
        loss / self.elements[0] as f64
    }

    /// Writes the reconstructions of `count` samples to `output` (samples, elements).
    pub fn reconstruct(
        &self,
        weights: Weights<'_>,
        count: usize,
        write: &dyn Fn(usize, &mut [f32]),
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
        write: &dyn Fn(usize, &mut [f32]),
        output: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.map(0..self.encoder_ops, weights, count, write, output, workspace);
    }

    fn map(
        &self,
        ops: std::ops::Range<usize>,
        weights: Weights<'_>,
        count: usize,
        write: &dyn Fn(usize, &mut [f32]),
        output: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let (last, size) = (ops.end, self.elements[ops.end]);
        let mut rest = output;
        self.passes(count, write, workspace, |samples, _, workspace| {
            self.forward(ops.clone(), samples, weights, workspace);
            let (here, after) = std::mem::take(&mut rest).split_at_mut(samples * size);
            here.copy_from_slice(&workspace.values[last][..samples * size]);
            rest = after;
        });
    }

    /// Takes `count` samples, a pass at a time, into the workspace's input and calls `pass(samples, is first, ..)`.
    fn passes(
        &self,
        count: usize,
        write: &dyn Fn(usize, &mut [f32]),
        workspace: &mut Workspace,
        mut pass: impl FnMut(usize, bool, &mut Workspace),
    ) {
        let size = self.elements[0];
        for start in (0..count).step_by(self.pass_samples) {
            let samples = self.pass_samples.min(count - start);
            for (i, sample) in workspace.values[0].chunks_exact_mut(size).take(samples).enumerate() {
                write(start + i, sample);
            }
            pass(samples, start == 0, workspace);
        }
    }

    /// Runs ops over the samples in the workspace.
    fn forward(&self, ops: std::ops::Range<usize>, samples: usize, weights: Weights<'_>, workspace: &mut Workspace) {
        for i in ops {
            let (before, after) = workspace.values.split_at_mut(i + 1);
            let (input, output) = (&before[i], &mut after[0]);
            let used = samples * self.elements[i + 1];
            match &self.ops[i] {
                Op::Linear(linear) => {
                    let Weights { parameters, packed } = weights;
                    let scratch = &mut workspace.scratch;
                    linear.forward(samples, ForwardPass { parameters, packed, input, output, scratch });
                    if linear.activation != Activation::Relu {
                        self.activate(linear.activation, &mut output[..used], &mut workspace.kept[i]);
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
        elementwise::activate(self.isa, activation, values);
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
    fn loss_by_logit(&self) -> bool {
        let last = self.ops.last().map_or(Activation::Linear, Op::activation);
        self.loss == Loss::BinaryCrossentropy && last == Activation::Sigmoid
    }

    /// `sum` plus the samples' losses times their number of elements, sample by sample; sets the last deltas.
    fn loss(&self, samples: usize, sum: f64, workspace: &mut Workspace) -> f64 {
        let (size, last) = (self.elements[0], self.ops.len());
        let Workspace { values, deltas, .. } = workspace;
        let targets = values[0].chunks_exact(size);
        let outputs = values[last].chunks_exact(size);
        let by_logit = self.loss_by_logit();
        targets
            .zip(outputs)
            .zip(deltas[last].chunks_exact_mut(size))
            .take(samples)
            .fold(sum, |sum, ((t, y), delta)| sum + self.loss.sample(self.isa, y, t, by_logit, delta))
    }

    /// Adds the samples' gradients to `gradient`, or sets it if this is the first pass of a leaf.
    fn backward(
        &self,
        samples: usize,
        first: bool,
        weights: Weights<'_>,
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) {
        // Whether the activation of the op at hand is accounted for in its deltas already.
        let mut through_activation = self.loss_by_logit();
        for i in (0..self.ops.len()).rev() {
            let Workspace { values, deltas, kept, winners, scratch } = workspace;
            let (before, after) = deltas.split_at_mut(i + 1);
            let (input_delta, delta) = (&mut before[i], &mut after[0]);
            let used = samples * self.elements[i + 1];
            let op = &self.ops[i];
            let activation = op.activation();
            if !through_activation {
                let at = if elementwise::needs_input(activation) { &kept[i] } else { &values[i + 1] };
                elementwise::activate_backward(self.isa, activation, &at[..used], &mut delta[..used]);
            }
            through_activation = false;
            match op {
                Op::Linear(linear) => {
                    let pass = GradientPass { input: &values[i], delta, gradient, scratch };
                    linear.weight_gradient(self.isa, samples, first, pass);
                    // The relu before this layer is undone while its input's gradient is written.
                    let relu_before = i > 0 && self.ops[i - 1].activation() == Activation::Relu;
                    let after = if relu_before { After::Gate(&values[i]) } else { After::Keep };
                    through_activation = relu_before;
                    let packed = weights.packed;
                    linear.input_gradient(
                        samples,
                        after,
                        InputGradientPass { packed, delta, input_gradient: input_delta, scratch },
                    );
                }
                Op::Activate(_) => input_delta[..used].copy_from_slice(&delta[..used]),
                Op::MaxPool { windows, channels } => {
                    let winners = winners[i].chunks_exact(self.elements[i + 1]);
                    for ((delta, input_delta), winners) in self.delta_pairs(i, samples, delta, input_delta).zip(winners)
                    {
                        pooling::max_pool_backward(self.isa, windows, delta, winners, input_delta, *channels);
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
