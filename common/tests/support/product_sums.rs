//! What tests of product-sums share: operands between pages without access, relations of small images, numbers of
//! channels around all vector and panel widths.

use lockstep_common::kernel::contraction::{
    After, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands, SLACK,
};
use lockstep_common::kernel::{ChainElement, Element, Isa};
use lockstep_common::model::Pair;
use lockstep_common::rng::{Purpose, Stream};

use crate::fenced::{Edge, Fenced};

/// A NaN that no arithmetic makes: where it stands, nothing has been written; what it touches turns to NaN.
pub(crate) const CANARY: f32 = f32::from_bits(0x7fa5_a5a5);

/// Around all vector and panel widths.
pub(crate) const CHANNELS: [usize; 14] = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
/// What is combined with them.
pub(crate) const OTHER_CHANNELS: [usize; 4] = [1, 5, 16, 19];
/// From this number of channels to fewer, a gather over several taps works tap by tap.
pub(crate) const NARROW: usize = 16;

/// An operand with a page that nobody may touch right before or right behind it, and canaries around the rest.
pub(crate) struct Guarded(Fenced);

impl Guarded {
    pub(crate) fn new(values: &[f32], edge: Edge) -> Self {
        let mut operand = Self::blank(values.len(), edge);
        operand.0.copy_from_slice(values);
        operand
    }

    pub(crate) fn blank(len: usize, edge: Edge) -> Self {
        Self(Fenced::new(len, edge, CANARY))
    }

    /// The values and `slack` canaries, which may be read.
    pub(crate) fn with_slack(values: &[f32], slack: usize, edge: Edge) -> Self {
        let mut operand = Self::blank(values.len() + slack, edge);
        operand.0[..values.len()].copy_from_slice(values);
        operand
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.0
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }

    pub(crate) fn assert_untouched(&self, place: &str) {
        assert!(self.0.around().all(|value| value.to_bits() == CANARY.to_bits()), "{place}: writes outside");
    }
}

pub(crate) fn random_values(len: usize, stream: &mut Stream) -> Vec<f32> {
    (0..len).map(|_| random(stream)).collect()
}

/// From -1 to 1, now and then exactly 0.
pub(crate) fn random(stream: &mut Stream) -> f32 {
    if stream.below(8) == 0 { 0.0 } else { stream.uniform() * 2.0 - 1.0 }
}

pub(crate) fn stream(first: usize, second: usize) -> Stream {
    Stream::new(11, Purpose::SelfTest, first as u32, second as u32)
}

pub(crate) fn pair(rows: usize, columns: usize) -> Pair {
    Pair { rows, columns }
}

/// Convolutions of small images, with and without padding, strides, dead taps and pixels that no tap reaches.
pub(crate) fn relations() -> Vec<(&'static str, PixelRelation)> {
    let relation = |high, low, kernel, strides, padding| PixelRelation { high, low, kernel, strides, padding };
    vec![
        ("one pixel", PixelRelation::pointwise(1)),
        ("five pixels", PixelRelation::pointwise(5)),
        ("valid", relation(pair(4, 5), pair(3, 3), pair(2, 3), pair(1, 1), pair(0, 0))),
        ("padded", relation(pair(3, 4), pair(3, 4), pair(3, 3), pair(1, 1), pair(1, 1))),
        ("strides", relation(pair(5, 6), pair(3, 2), pair(3, 4), pair(2, 3), pair(1, 0))),
        ("gaps", relation(pair(6, 5), pair(2, 2), pair(2, 1), pair(3, 3), pair(0, 0))),
        ("dead taps", relation(pair(1, 2), pair(1, 2), pair(3, 5), pair(1, 1), pair(1, 2))),
        ("one tap, strides", relation(pair(3, 4), pair(2, 2), pair(1, 1), pair(2, 2), pair(0, 0))),
    ]
}

/// (tap, high pixel) for every low pixel, or the other way round, in the order of the taps.
pub(crate) fn sources(relation: &PixelRelation, direction: Direction) -> Vec<Vec<(usize, usize)>> {
    let (high, low) = (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
    let mut sources = vec![Vec::new(); if direction == Direction::ToLow { low } else { high }];
    for tap_y in 0..relation.kernel.rows {
        for tap_x in 0..relation.kernel.columns {
            for y in 0..relation.low.rows {
                for x in 0..relation.low.columns {
                    let high_y = (y * relation.strides.rows + tap_y).checked_sub(relation.padding.rows);
                    let high_x = (x * relation.strides.columns + tap_x).checked_sub(relation.padding.columns);
                    let (Some(high_y), Some(high_x)) = (high_y, high_x) else { continue };
                    if high_y >= relation.high.rows || high_x >= relation.high.columns {
                        continue;
                    }
                    let tap = tap_y * relation.kernel.columns + tap_x;
                    let (high, low) = (high_y * relation.high.columns + high_x, y * relation.low.columns + x);
                    match direction {
                        Direction::ToLow => sources[low].push((tap, high)),
                        Direction::ToHigh => sources[high].push((tap, low)),
                    }
                }
            }
        }
    }
    sources
}

pub(crate) fn assert_same_bits(place: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{place}: length");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (bits, expected_bits) = (got.to_bits(), expected.to_bits());
        assert_eq!(
            bits, expected_bits,
            "{place}: element {i} is {got:e} ({bits:08x}), expected {expected:e} ({expected_bits:08x})"
        );
    }
}

/// Pairs of channel counts, each with a different number of samples from 1 to 7.
pub(crate) fn channel_pairs() -> impl Iterator<Item = (ChannelCounts, usize)> {
    let pairs = CHANNELS.into_iter().flat_map(|a| OTHER_CHANNELS.into_iter().flat_map(move |b| [(a, b), (b, a)]));
    pairs.enumerate().map(|(i, (high, low))| (ChannelCounts { high, low }, i % 7 + 1))
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Finish {
    Keep,
    Relu,
    Gate,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct GatherCase {
    pub(crate) relation: PixelRelation,
    pub(crate) direction: Direction,
    pub(crate) channels: ChannelCounts,
    pub(crate) samples: usize,
    pub(crate) with_bias: bool,
    pub(crate) finish: Finish,
}

impl GatherCase {
    /// Input and output: (pixels, channels).
    pub(crate) fn sizes(&self) -> [(usize, usize); 2] {
        let high = (self.relation.high.rows * self.relation.high.columns, self.channels.high);
        let low = (self.relation.low.rows * self.relation.low.columns, self.channels.low);
        if self.direction == Direction::ToLow { [high, low] } else { [low, high] }
    }

    /// Whether taps are summed one by one.
    pub(crate) fn is_tap_by_tap(&self, elements: usize) -> bool {
        self.sizes()[1].1 < NARROW && self.relation.taps() > 1 && elements >= NARROW
    }

    /// What a sum becomes.
    pub(crate) fn finished(&self, sum: f32, gate: f32) -> f32 {
        let closed = match self.finish {
            Finish::Keep => false,
            Finish::Relu => sum <= 0.0,
            Finish::Gate => gate <= 0.0,
        };
        if closed { 0.0 } else { sum + 0.0 }
    }

    /// The definition: for each output, the bias, then tap by tap, then channel by channel. If there are many inputs
    /// and few outputs, each tap's channels are summed from 0, and these sums are added to the bias. `elements` are
    /// the inputs of a pixel as they are counted for that: floats or pairs.
    pub(crate) fn specification(
        &self,
        input: &[f32],
        weights: &[f32],
        bias: Option<&[f32]>,
        gate: &[f32],
        elements: usize,
    ) -> Vec<f32> {
        let [(input_pixels, channels_in), (_, channels_out)] = self.sizes();
        let tap_by_tap = self.is_tap_by_tap(elements);
        let mut output = Vec::new();
        for sample in 0..self.samples {
            for taps in &sources(&self.relation, self.direction) {
                for channel in 0..channels_out {
                    let mut sum = bias.map_or(0.0, |bias| bias[channel]);
                    for &(tap, pixel) in taps {
                        let start = if tap_by_tap { 0.0 } else { sum };
                        let of_tap = (0..channels_in).fold(start, |sum, k| {
                            let (high, low) =
                                if self.direction == Direction::ToLow { (k, channel) } else { (channel, k) };
                            let weight = weights[(tap * self.channels.high + high) * self.channels.low + low];
                            input[(sample * input_pixels + pixel) * channels_in + k].mul_add(weight, sum)
                        });
                        sum = if tap_by_tap { sum + of_tap } else { of_tap };
                    }
                    output.push(self.finished(sum, gate[output.len()]));
                }
            }
        }
        output
    }
}

/// The definition: for each weight, what was there or 0, then sample by sample, row by row, column by column of the low
/// image; or `together` samples by so many, row by row, column by column, and one of them after the other.
pub(crate) fn reduce_specification(
    relation: &PixelRelation,
    channels: ChannelCounts,
    (samples, together): (usize, usize),
    (high, low): (&[f32], &[f32]),
    before: Option<&[f32]>,
) -> Vec<f32> {
    let (high_pixels, low_pixels) =
        (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
    let sources = sources(relation, Direction::ToLow);
    let mut gradient = Vec::new();
    for tap in 0..relation.taps() {
        for high_channel in 0..channels.high {
            for low_channel in 0..channels.low {
                let mut sum = before.map_or(0.0, |before| before[gradient.len()]);
                for first in (0..samples).step_by(together) {
                    for (low_pixel, taps) in sources.iter().enumerate() {
                        let places = taps.iter().filter(|(of, _)| *of == tap);
                        let samples = first..samples.min(first + together);
                        for (sample, (_, high_pixel)) in places.flat_map(|at| samples.clone().map(move |i| (i, at))) {
                            let a = high[(sample * high_pixels + high_pixel) * channels.high + high_channel];
                            let b = low[(sample * low_pixels + low_pixel) * channels.low + low_channel];
                            sum = a.mul_add(b, sum);
                        }
                    }
                }
                gradient.push(sum + 0.0);
            }
        }
    }
    gradient
}

/// What a gather is given, in elements of its kind.
pub(crate) struct Given<'a, E> {
    /// Of the plan, whose summed channels are counted in elements.
    pub(crate) channels: ChannelCounts,
    pub(crate) input: &'a [E],
    pub(crate) weights: &'a [E],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) gate: &'a [f32],
}

/// Checks that a gather gives what is expected, on every instruction set, with each operand at either end of its pages.
pub(crate) fn check_gathers<E: Element>(
    (case, name): (&GatherCase, &str),
    given: &Given<'_, E>,
    expected: &[f32],
    is_same: fn(f32, f32) -> bool,
) {
    for isa in Isa::available() {
        // A plan may be for more samples than there are.
        let plan = Gather::new(isa, &case.relation, case.direction, given.channels, case.samples.max(1) + 1);
        for edge in [Edge::Start, Edge::End] {
            let place = format!("{name}: {case:?} on {isa}, {edge:?}");
            eprintln!("{place}");
            let mut packed = Guarded::blank(plan.packed_len(), edge);
            let weights = Guarded::new(bytemuck::cast_slice(given.weights), edge);
            plan.pack::<E>(bytemuck::cast_slice(weights.values()), bytemuck::cast_slice_mut(packed.values_mut()));
            let bias = given.bias.map(|bias| Guarded::new(bias, edge));
            let mut scratch = Guarded::blank(plan.scratch_len(), edge);
            // Longer buffers are used up to where they are needed.
            for longer in [0, 50] {
                let input = Guarded::with_slack(bytemuck::cast_slice(given.input), longer, edge);
                let gate = Guarded::with_slack(given.gate, longer, edge);
                let mut output = Guarded::blank(expected.len() + longer, edge);
                let operands = GatherOperands::<E> {
                    input: bytemuck::cast_slice(input.values()),
                    packed: bytemuck::cast_slice(packed.values()),
                    bias: bias.as_ref().map(Guarded::values),
                    output: output.values_mut(),
                    after: match case.finish {
                        Finish::Keep => After::Keep,
                        Finish::Relu => After::Relu,
                        Finish::Gate => After::Gate(gate.values()),
                    },
                    scratch: scratch.values_mut(),
                };
                plan.run(case.samples, operands);
                let (output_values, beyond) = output.values().split_at(expected.len());
                for (i, (&got, &expected)) in output_values.iter().zip(expected).enumerate() {
                    assert!(is_same(got, expected), "{place}: element {i} is {got:e}, expected {expected:e}");
                }
                assert!(beyond.iter().all(|value| value.to_bits() == CANARY.to_bits()), "{place}: writes beyond");
                output.assert_untouched(&place);
            }
            packed.assert_untouched(&place);
            scratch.assert_untouched(&place);
        }
    }
}

/// Checks that a reduction over `samples` elements of each place gives what is expected, on every instruction set, with
/// each operand at either end of its pages. It is added to `start`, if there is one.
pub(crate) fn check_reductions<E: ChainElement>(
    (relation, channels, samples): (&PixelRelation, ChannelCounts, usize),
    [high, low]: [&[E]; 2],
    start: Option<&[f32]>,
    expected: &[f32],
    name: &str,
) {
    for isa in Isa::available() {
        let plan = Reduce::new(isa, relation, channels);
        for edge in [Edge::Start, Edge::End] {
            let accumulate = start.is_some();
            let place = format!(
                "{name}: {relation:?} {channels:?} {samples} samples, accumulate {accumulate}, on {isa}, {edge:?}"
            );
            eprintln!("{place}");
            let high = Guarded::new(bytemuck::cast_slice(high), edge);
            let low = Guarded::with_slack(bytemuck::cast_slice(low), SLACK, edge);
            let mut scratch = Guarded::blank(plan.scratch_len(samples), edge);
            let mut gradient = match start {
                Some(before) => Guarded::new(before, edge),
                None => Guarded::blank(expected.len(), edge),
            };
            let operands = ReduceOperands::<E> {
                high: bytemuck::cast_slice(high.values()),
                low: bytemuck::cast_slice(low.values()),
                gradient: gradient.values_mut(),
                accumulate,
                scratch: bytemuck::cast_slice_mut(scratch.values_mut()),
            };
            plan.run(samples, operands);
            assert_same_bits(&place, gradient.values(), expected);
            gradient.assert_untouched(&place);
            scratch.assert_untouched(&place);
        }
    }
}

/// Every relation, direction and finish, with channels around all widths.
pub(crate) fn gather_cases() -> impl Iterator<Item = (GatherCase, &'static str)> {
    relations().into_iter().flat_map(|(name, relation)| {
        channel_pairs().enumerate().flat_map(move |(i, (channels, samples))| {
            [Direction::ToLow, Direction::ToHigh].map(|direction| {
                let finish = [Finish::Keep, Finish::Relu, Finish::Gate][i % 3];
                (GatherCase { relation, direction, channels, samples, with_bias: i % 5 < 3, finish }, name)
            })
        })
    })
}

/// Every relation with channels around all widths, and every number of samples around those of a vector.
pub(crate) fn reduce_cases() -> impl Iterator<Item = (&'static str, PixelRelation, ChannelCounts, usize)> {
    relations().into_iter().flat_map(|(name, relation)| {
        let of_samples = (0..=7).map(|samples| (ChannelCounts { high: 5, low: 131 }, samples));
        // Copies of both operands, in several pieces, with high and low channels that fill no line and no panel.
        let of_copies = [(ChannelCounts { high: 37, low: 61 }, 3), (ChannelCounts { high: 16, low: 64 }, 70)];
        channel_pairs()
            .chain(of_samples)
            .chain(of_copies)
            .map(move |(channels, samples)| (name, relation, channels, samples))
    })
}
