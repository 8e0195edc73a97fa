//! Layers with weights: convolution, transposed convolution and dense, as plans over one pixel relation.

use std::ops::Range;

use super::live::LiveSizes;
use crate::kernel::Isa;
use crate::kernel::contraction::{
    After, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands,
};
use crate::kernel::elementwise;
use crate::model::{Activation, ConvSpec, LayerPlace, LayerSpec, Layout, Pair, ResolvedLayer};

/// A linear map between images, plus bias, with the activation that follows it.
#[derive(Debug)]
pub(super) struct Linear {
    pub(super) activation: Activation,
    /// Whether the layer computes the high image (a transposed convolution).
    to_high: bool,
    channels_out: usize,
    output_elements: usize,
    kernel: Range<usize>,
    bias: Option<Range<usize>>,
    forward: Gather,
    packed_forward: Range<usize>,
    /// Absent for the first layer: nothing is trained before it.
    backward: Option<(Gather, Range<usize>)>,
    weight_gradient: Reduce,
    /// Products of one sample's forward pass.
    pub(super) products: usize,
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
        isa: Isa,
        (layer, live): (&ResolvedLayer, LiveSizes),
        layout: &Layout,
        max_samples: usize,
        packed_start: usize,
        is_first: bool,
    ) -> Option<Self> {
        let Geometry { relation, channels, to_high, activation } = geometry(layer, live)?;
        let (onward, back) =
            if to_high { (Direction::ToHigh, Direction::ToLow) } else { (Direction::ToLow, Direction::ToHigh) };
        let forward = Gather::new(isa, &relation, onward, channels, max_samples);
        let packed_forward = packed_start..packed_start + forward.packed_len();
        let backward = (!is_first).then(|| {
            let gather = Gather::new(isa, &relation, back, channels, max_samples);
            let range = packed_forward.end..packed_forward.end + gather.packed_len();
            (gather, range)
        });
        let (output, channels_out) =
            if to_high { (relation.high, channels.high) } else { (relation.low, channels.low) };
        Some(Self {
            activation,
            to_high,
            channels_out,
            output_elements: output.rows * output.columns * channels_out,
            kernel: parameter_range(layout, &layer.place, "kernel").expect("a layer with weights has a kernel"),
            bias: parameter_range(layout, &layer.place, "bias"),
            forward,
            packed_forward,
            backward,
            weight_gradient: Reduce::new(isa, &relation, channels),
            products: relation.pairs() * channels.high * channels.low,
        })
    }

    /// Where the layer's packed weights end.
    pub(super) fn packed_end(&self) -> usize {
        self.backward.as_ref().map_or(self.packed_forward.end, |(_, range)| range.end)
    }

    /// Floats of scratch memory for passes over `samples` samples.
    pub(super) fn scratch_len(&self, samples: usize) -> usize {
        let backward = self.backward.as_ref().map_or(0, |(gather, _)| gather.scratch_len());
        self.forward.scratch_len().max(backward).max(self.weight_gradient.scratch_len(samples))
    }

    /// Copies the kernel into the forms that the passes read.
    pub(super) fn pack(&self, parameters: &[f32], packed: &mut [f32]) {
        let kernel = &parameters[self.kernel.clone()];
        self.forward.pack(kernel, &mut packed[self.packed_forward.clone()]);
        if let Some((gather, range)) = &self.backward {
            gather.pack(kernel, &mut packed[range.clone()]);
        }
    }

    /// `output = relu(linear(input) + bias)`, or without relu if the activation is another one.
    pub(super) fn forward(&self, samples: usize, pass: ForwardPass<'_>) {
        let ForwardPass { parameters, packed, input, output, scratch } = pass;
        self.forward.run(
            samples,
            GatherOperands {
                input,
                packed: &packed[self.packed_forward.clone()],
                bias: self.bias.clone().map(|range| &parameters[range]),
                output,
                after: if self.activation == Activation::Relu { After::Relu } else { After::Keep },
                scratch,
            },
        );
    }

    /// Adds the gradients of kernel and bias for `samples` samples to `gradient` (laid out like the parameters), or
    /// sets them if this is the `first` batch of a leaf. `delta` is the loss' derivative by the linear map's output.
    pub(super) fn weight_gradient(&self, isa: Isa, samples: usize, first: bool, pass: GradientPass<'_>) {
        let GradientPass { input, delta, gradient, scratch } = pass;
        if let Some(bias) = &self.bias {
            let sums = &mut gradient[bias.clone()];
            if first {
                sums.fill(0.0);
            }
            // Sample by sample, so that the lanes of a single channel's sum do not depend on the batch.
            for delta in delta[..samples * self.output_elements].chunks_exact(self.output_elements) {
                elementwise::add_rows(isa, delta, self.channels_out, sums);
            }
        }
        let (high, low) = if self.to_high { (delta, input) } else { (input, delta) };
        let gradient = &mut gradient[self.kernel.clone()];
        self.weight_gradient.run(samples, ReduceOperands { high, low, gradient, accumulate: !first, scratch });
    }

    /// The loss' derivative by the layer's input, from `delta` as above; `after` is applied to it.
    pub(super) fn input_gradient(&self, samples: usize, after: After<'_>, pass: InputGradientPass<'_>) {
        let InputGradientPass { packed, delta, input_gradient, scratch } = pass;
        if let Some((gather, range)) = &self.backward {
            gather.run(
                samples,
                GatherOperands {
                    input: delta,
                    packed: &packed[range.clone()],
                    bias: None,
                    output: input_gradient,
                    after,
                    scratch,
                },
            );
        }
    }
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
