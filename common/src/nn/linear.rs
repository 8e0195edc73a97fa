//! Layers with weights: convolution, transposed convolution and dense, as plans over one pixel relation.

mod plans;

use std::ops::Range;

use plans::{Map, ProductReduce, WeightGradient};

use super::live::LiveSizes;
use super::sparsity::{Sparsity, ZeroProducts};
use crate::kernel::bf16::{self, Bf16Pair, BlockedPair, RowPairs};
use crate::kernel::contraction::{
    After, BlockedReduce, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands,
    SLACK, Scatter, SparseReduce,
};
use crate::kernel::transpose::MatrixShape;
use crate::kernel::{Arithmetic, Compute, Isa, Precision, elementwise};
use crate::model::{Activation, ConvSpec, LayerPlace, LayerSpec, Layout, Pair, ResolvedLayer};

/// A linear map between images, plus bias, with the activation that follows it.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) activation: Activation,
    arithmetic: Arithmetic,
    /// Whether the layer computes the high image (a transposed convolution).
    to_high: bool,
    input: ImageSize,
    output: ImageSize,
    taps: usize,
    kernel: Range<usize>,
    bias: Option<Range<usize>>,
    forward: Map,
    packed_forward: Range<usize>,
    /// Absent for the first layer: nothing is trained before it.
    backward: Option<(Map, Range<usize>)>,
    weight_gradient: WeightGradient,
    pub(super) zero_products: ZeroProducts,
    /// Products of one sample's forward pass.
    pub(super) products: usize,
}

/// High channels from which on products with a low image that is mostly 0 leave out those with 0: with fewer, too little is
/// done for each element.
const MIN_SPARSE_CHANNELS: usize = 16;
/// The same of low pixels: with fewer, too little is done for each weight, whose sum is moved twice in a pass.
const MIN_SPARSE_PIXELS: usize = 16;

/// A sample's image on one side of a layer.
#[derive(Clone, Copy, Debug)]
struct ImageSize {
    pixels: usize,
    channels: usize,
}

impl ImageSize {
    fn elements(self) -> usize {
        self.pixels * self.channels
    }

    /// Pairs of a sample's neighbouring channels.
    fn channel_pairs(self) -> usize {
        self.pixels * self.channels.div_ceil(2)
    }

    /// Pairs of neighbouring samples, as memory from a cache line to another one, with [`SLACK`].
    fn sample_pairs(self, samples: usize) -> usize {
        in_lines(samples.div_ceil(2) * self.elements() + SLACK)
    }
}

/// Elements of memory that ends at the end of a cache line.
fn in_lines(elements: usize) -> usize {
    elements.next_multiple_of(16)
}

/// How a layer relates the pixels and channels of its input and output.
struct Geometry {
    relation: PixelRelation,
    channels: ChannelCounts,
    to_high: bool,
    activation: Activation,
}

impl Linear {
    /// The plan of `layer`, or `None` when the layer has no weights. Its packed weights start at `packed_start`.
    pub(super) fn new(
        arithmetic: Arithmetic,
        (layer, live): (&ResolvedLayer, LiveSizes),
        layout: &Layout,
        max_samples: usize,
        packed_start: usize,
        is_first: bool,
        sparsity: Sparsity,
    ) -> Option<Self> {
        let Geometry { relation, channels, to_high, activation } = geometry(layer, live)?;
        let isa = arithmetic.isa;
        let (onward, back) =
            if to_high { (Direction::ToHigh, Direction::ToLow) } else { (Direction::ToLow, Direction::ToHigh) };
        // Where products are added in blocks, none of them is left out.
        let is_sparse = arithmetic.compute != Compute::Bf16Amx
            && relation.taps() > 1
            && channels.high >= MIN_SPARSE_CHANNELS
            && relation.low.rows * relation.low.columns >= MIN_SPARSE_PIXELS
            && if to_high { sparsity.input } else { sparsity.delta };
        let map = |direction| {
            // What is summed over are channels of the input, or pairs of them.
            let summed = |channels: usize| match arithmetic.compute.operands() {
                Precision::F32 => channels,
                Precision::Bf16 => channels.div_ceil(2),
            };
            let channels = match direction {
                Direction::ToLow => ChannelCounts { high: summed(channels.high), ..channels },
                Direction::ToHigh => ChannelCounts { low: summed(channels.low), ..channels },
            };
            let scatters = is_sparse && direction == Direction::ToHigh;
            let gather = Gather::new(isa, &relation, direction, channels, max_samples);
            Map::new(gather, scatters.then(|| Scatter::new(isa, &relation, channels)))
        };
        let forward = map(onward);
        let packed_forward = packed_start..packed_start + forward.packed_len();
        let backward = (!is_first).then(|| {
            let map = map(back);
            let range = packed_forward.end..packed_forward.end + map.packed_len();
            (map, range)
        });
        let high = ImageSize { pixels: relation.high.rows * relation.high.columns, channels: channels.high };
        let low = ImageSize { pixels: relation.low.rows * relation.low.columns, channels: channels.low };
        let (input, output) = if to_high { (low, high) } else { (high, low) };
        Some(Self {
            activation,
            arithmetic,
            to_high,
            input,
            output,
            taps: relation.taps(),
            kernel: parameter_range(layout, &layer.place, "kernel").expect("a layer with weights has a kernel"),
            bias: parameter_range(layout, &layer.place, "bias"),
            forward,
            packed_forward,
            backward,
            weight_gradient: match arithmetic.compute {
                Compute::Bf16Amx => WeightGradient::Blocks(BlockedReduce::new(isa, &relation, channels)),
                Compute::F32 | Compute::Bf16 => WeightGradient::Products(ProductReduce::new(
                    Reduce::new(isa, &relation, channels),
                    is_sparse.then(|| SparseReduce::new(isa, &relation, channels)),
                )),
            },
            zero_products: ZeroProducts::default(),
            products: relation.pairs() * channels.high * channels.low,
        })
    }

    /// Where the layer's packed weights end.
    pub(super) fn packed_end(&self) -> usize {
        self.backward.as_ref().map_or(self.packed_forward.end, |(_, range)| range.end)
    }

    /// Words of scratch memory for packing.
    pub(super) fn packing_len(&self) -> usize {
        match self.arithmetic.compute.operands() {
            Precision::F32 => 0,
            Precision::Bf16 => {
                let (input, output) = (self.input.channels, self.output.channels);
                self.taps * (input.div_ceil(2) * output).max(output.div_ceil(2) * input)
            }
        }
    }

    /// Words of scratch memory for passes over `samples` samples.
    pub(super) fn scratch_len(&self, samples: usize) -> usize {
        let (of_forward, of_reduce) = (self.forward.scratch_len(), |samples| self.weight_gradient.scratch_len(samples));
        let of_backward = self.backward.as_ref().map_or(0, |(map, _)| map.scratch_len());
        let lens = match self.arithmetic.compute.operands() {
            Precision::F32 => [of_forward, of_backward, of_reduce(samples)],
            Precision::Bf16 => [
                in_lines(samples * self.input.channel_pairs()) + of_forward,
                in_lines(samples * self.output.channel_pairs()) + of_backward,
                self.input.sample_pairs(samples) + self.output.sample_pairs(samples) + of_reduce(samples.div_ceil(2)),
            ],
        };
        lens.into_iter().fold(0, usize::max)
    }

    /// Copies the kernel into the forms that the passes read. `scratch` has [`Linear::packing_len`] words.
    pub(super) fn pack(&self, parameters: &[f32], packed: &mut [f32], scratch: &mut [f32]) {
        let kernel = &parameters[self.kernel.clone()];
        let (onward, back) =
            if self.to_high { (Direction::ToHigh, Direction::ToLow) } else { (Direction::ToLow, Direction::ToHigh) };
        self.pack_for(&self.forward, onward, kernel, &mut packed[self.packed_forward.clone()], scratch);
        if let Some((map, range)) = &self.backward {
            self.pack_for(map, back, kernel, &mut packed[range.clone()], scratch);
        }
    }

    fn pack_for(&self, map: &Map, direction: Direction, kernel: &[f32], packed: &mut [f32], scratch: &mut [f32]) {
        if self.arithmetic.compute == Compute::F32 {
            return map.pack(kernel, packed);
        }
        let (isa, [high, low]) = (self.arithmetic.isa, self.high_and_low(self.input.channels, self.output.channels));
        let scratch: &mut [Bf16Pair] = bytemuck::cast_slice_mut(scratch);
        let pairs = match direction {
            // The summed channels are rows of a tap.
            Direction::ToLow => {
                let of_tap = high.div_ceil(2) * low;
                let pairs = &mut scratch[..self.taps * of_tap];
                for (tap, pairs) in kernel.chunks_exact(high * low).zip(pairs.chunks_exact_mut(of_tap)) {
                    bf16::pair_rows(isa, tap, RowPairs::neighbours(low), pairs, low);
                }
                pairs
            }
            Direction::ToHigh => {
                let pairs = &mut scratch[..self.taps * high * low.div_ceil(2)];
                bf16::pair_columns(isa, kernel, MatrixShape::dense(self.taps * high, low), pairs);
                pairs
            }
        };
        map.pack(pairs, bytemuck::cast_slice_mut(packed));
    }

    /// What belongs to the high image, and what to the low one.
    fn high_and_low<T>(&self, input: T, output: T) -> [T; 2] {
        if self.to_high { [output, input] } else { [input, output] }
    }

    /// `output = relu(linear(input) + bias)`, or without relu if the activation is another one.
    pub(super) fn forward(&self, samples: usize, pass: ForwardPass<'_>) {
        let ForwardPass { parameters, packed, input, output, scratch } = pass;
        let bias = self.bias.clone().map(|range| &parameters[range]);
        let after = if self.activation == Activation::Relu { After::Relu } else { After::Keep };
        let sums = GatherSums { bias, output, after };
        self.map(&self.forward, samples, (input, self.input), &packed[self.packed_forward.clone()], sums, scratch);
    }

    /// Adds the gradients of kernel and bias for `samples` samples to `gradient` (laid out like the parameters), or
    /// sets them if this is the `first` batch of a leaf. `delta` is the loss' derivative by the linear map's output.
    pub(super) fn weight_gradient(&self, samples: usize, first: bool, pass: GradientPass<'_>) {
        let GradientPass { input, delta, gradient, scratch } = pass;
        let Arithmetic { isa, compute } = self.arithmetic;
        if let Some(bias) = &self.bias {
            let sums = &mut gradient[bias.clone()];
            if first {
                sums.fill(0.0);
            }
            // Sample by sample, so that the lanes of a single channel's sum do not depend on the batch.
            let size = self.output.elements();
            for delta in delta[..samples * size].chunks_exact(size) {
                elementwise::add_rows(isa, delta, self.output.channels, sums);
            }
        }
        let gradient = &mut gradient[self.kernel.clone()];
        let accumulate = !first;
        if let (Compute::F32, WeightGradient::Products(plan)) = (compute, &self.weight_gradient) {
            let [high, low] = self.high_and_low(input, delta);
            let operands = ReduceOperands { high, low, gradient, accumulate, scratch };
            return plan.run(self.choice(), samples, operands);
        }
        let (of_input, scratch) = scratch.split_at_mut(self.input.sample_pairs(samples));
        let (of_output, scratch) = scratch.split_at_mut(self.output.sample_pairs(samples));
        let pair = |values: &[f32], size: ImageSize, pairs: &mut [f32]| {
            let len = size.elements();
            let values = &values[..samples * len];
            bf16::pair_rows(isa, values, RowPairs::neighbours(len), bytemuck::cast_slice_mut(pairs), len);
        };
        pair(input, self.input, &mut *of_input);
        pair(delta, self.output, &mut *of_output);
        let operands = self.high_and_low(&*of_input, &*of_output);
        let samples = samples.div_ceil(2);
        match &self.weight_gradient {
            WeightGradient::Products(plan) => {
                let [high, low]: [&[Bf16Pair]; 2] = operands.map(bytemuck::cast_slice);
                let scratch = bytemuck::cast_slice_mut(scratch);
                plan.run(self.choice(), samples, ReduceOperands { high, low, gradient, accumulate, scratch });
            }
            WeightGradient::Blocks(plan) => {
                let [high, low] = operands.map(bytemuck::cast_slice);
                let scratch = bytemuck::cast_slice_mut(scratch);
                plan.run(samples, ReduceOperands { high, low, gradient, accumulate, scratch });
            }
        }
    }

    /// The loss' derivative by the layer's input, from `delta` as above; `after` is applied to it.
    pub(super) fn input_gradient(&self, samples: usize, after: After<'_>, pass: InputGradientPass<'_>) {
        let InputGradientPass { packed, delta, input_gradient, scratch } = pass;
        if let Some((map, range)) = &self.backward {
            let sums = GatherSums { bias: None, output: input_gradient, after };
            self.map(map, samples, (delta, self.output), &packed[range.clone()], sums, scratch);
        }
    }

    /// What plans depend on beside their operands.
    fn choice(&self) -> (Isa, ZeroProducts) {
        (self.arithmetic.isa, self.zero_products)
    }

    /// Runs a plan over floats, or over pairs that are made of them first.
    fn map(
        &self,
        map: &Map,
        samples: usize,
        (input, size): (&[f32], ImageSize),
        packed: &[f32],
        sums: GatherSums<'_>,
        scratch: &mut [f32],
    ) {
        let GatherSums { bias, output, after } = sums;
        let Arithmetic { isa, compute } = self.arithmetic;
        if compute == Compute::F32 {
            let operands = GatherOperands { input, packed, bias, output, after, scratch };
            return map.run(self.choice(), samples, operands);
        }
        let len = samples * size.channel_pairs();
        let (pairs, scratch) = scratch.split_at_mut(in_lines(len));
        let pairs = &mut pairs[..len];
        let input = &input[..samples * size.elements()];
        let shape = MatrixShape::dense(samples * size.pixels, size.channels);
        bf16::pair_columns(isa, input, shape, bytemuck::cast_slice_mut(pairs));
        if compute == Compute::Bf16 {
            let (input, packed): (&[Bf16Pair], _) = (bytemuck::cast_slice(pairs), bytemuck::cast_slice(packed));
            map.run(self.choice(), samples, GatherOperands { input, packed, bias, output, after, scratch });
        } else {
            let (input, packed): (&[BlockedPair], _) = (bytemuck::cast_slice(pairs), bytemuck::cast_slice(packed));
            map.run_all(samples, GatherOperands { input, packed, bias, output, after, scratch });
        }
    }
}

/// What a gather makes of its sums, and where they go.
struct GatherSums<'a> {
    bias: Option<&'a [f32]>,
    output: &'a mut [f32],
    after: After<'a>,
}

/// What [`Linear::forward`] reads and writes.
pub(super) struct ForwardPass<'a> {
    pub(super) parameters: &'a [f32],
    pub(super) packed: &'a [f32],
    pub(super) input: &'a [f32],
    pub(super) output: &'a mut [f32],
    pub(super) scratch: &'a mut [f32],
}

/// What [`Linear::weight_gradient`] reads and writes.
pub(super) struct GradientPass<'a> {
    pub(super) input: &'a [f32],
    pub(super) delta: &'a [f32],
    pub(super) gradient: &'a mut [f32],
    pub(super) scratch: &'a mut [f32],
}

/// What [`Linear::input_gradient`] reads and writes.
pub(super) struct InputGradientPass<'a> {
    pub(super) packed: &'a [f32],
    pub(super) delta: &'a [f32],
    pub(super) input_gradient: &'a mut [f32],
    pub(super) scratch: &'a mut [f32],
}

/// Where a layer's parameter lies.
pub(super) fn parameter_range(layout: &Layout, place: &LayerPlace, name: &str) -> Option<Range<usize>> {
    layout.find(&format!("{place}.{name}")).map(|entry| entry.range.clone())
}

fn geometry(layer: &ResolvedLayer, live: LiveSizes) -> Option<Geometry> {
    match &layer.spec {
        LayerSpec::Conv2d(conv) => {
            let ((high, high_channels), (low, low_channels)) = (image(&layer.input)?, image(&layer.output)?);
            let channels = ChannelCounts { high: high_channels, low: low_channels };
            let relation = live.crop(relation(conv, high, low), false);
            Some(Geometry { relation, channels, to_high: false, activation: conv.activation })
        }
        LayerSpec::Conv2dTranspose(conv) => {
            let ((low, low_channels), (high, high_channels)) = (image(&layer.input)?, image(&layer.output)?);
            let channels = ChannelCounts { high: high_channels, low: low_channels };
            let relation = live.crop(relation(conv, high, low), true);
            Some(Geometry { relation, channels, to_high: true, activation: conv.activation })
        }
        LayerSpec::Dense { units, activation, .. } => {
            let (&features, leading) = layer.input.axes().split_last()?;
            Some(Geometry {
                relation: PixelRelation::pointwise(leading.iter().product()),
                channels: ChannelCounts { high: features, low: *units },
                to_high: false,
                activation: *activation,
            })
        }
        _ => None,
    }
}

/// Size and channels of an image's shape.
pub(super) fn image(shape: &crate::shape::Shape) -> Option<(Pair, usize)> {
    shape.as_image().map(|(rows, columns, channels)| (Pair { rows, columns }, channels))
}

fn relation(conv: &ConvSpec, high: Pair, low: Pair) -> PixelRelation {
    PixelRelation::with_padding(high, low, conv.kernel_size, conv.strides, conv.padding)
}
