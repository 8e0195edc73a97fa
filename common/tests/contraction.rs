//! The kernels against their specification, to the bit: product-sums against plain loops of `f32::mul_add` in the
//! documented order, everything else against the scalar version. No float outside an operand may matter or change.
//!
//! Operands of product-sums lie next to pages without access. If a kernel touches one, the process ends with SIGSEGV;
//! with `--nocapture` the last line tells the case.

#[path = "../src/kernel/fenced.rs"]
mod fenced;

use fenced::{Edge, Fenced};
use lockstep_common::kernel::Isa;
use lockstep_common::kernel::contraction::{
    After, ChannelCounts, Direction, Gather, GatherOperands, PixelRelation, Reduce, ReduceOperands, SLACK,
};
use lockstep_common::kernel::elementwise::{self, AdamSlices, AdamStep, SquareSum};
use lockstep_common::kernel::lists::Lists;
use lockstep_common::kernel::pooling::{self, Windows};
use lockstep_common::kernel::transpose::{MatrixShape, transpose};
use lockstep_common::model::{Activation, Pair};
use lockstep_common::rng::{Purpose, Stream};

/// A NaN that no arithmetic makes: where it stands, nothing has been written; what it touches turns to NaN.
const CANARY: f32 = f32::from_bits(0x7fa5_a5a5);

/// Around all vector and panel widths.
const CHANNELS: [usize; 14] = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65];
/// What is combined with them.
const OTHER_CHANNELS: [usize; 4] = [1, 5, 16, 19];
/// From this number of channels to fewer, a gather over several taps works tap by tap.
const NARROW: usize = 16;

const LENGTHS: [usize; 11] = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 100];

/// An operand with a page that nobody may touch right before or right behind it, and canaries around the rest.
struct Guarded(Fenced);

impl Guarded {
    fn new(values: &[f32], edge: Edge) -> Self {
        let mut operand = Self::blank(values.len(), edge);
        operand.0.copy_from_slice(values);
        operand
    }

    fn blank(len: usize, edge: Edge) -> Self {
        Self(Fenced::new(len, edge, CANARY))
    }

    /// The values and `slack` canaries, which may be read.
    fn with_slack(values: &[f32], slack: usize, edge: Edge) -> Self {
        let mut operand = Self::blank(values.len() + slack, edge);
        operand.0[..values.len()].copy_from_slice(values);
        operand
    }

    fn values(&self) -> &[f32] {
        &self.0
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }

    fn assert_untouched(&self, place: &str) {
        assert!(self.0.around().all(|value| value.to_bits() == CANARY.to_bits()), "{place}: writes outside");
    }
}

fn random_values(len: usize, stream: &mut Stream) -> Vec<f32> {
    (0..len).map(|_| random(stream)).collect()
}

/// From -1 to 1, now and then exactly 0.
fn random(stream: &mut Stream) -> f32 {
    if stream.below(8) == 0 { 0.0 } else { stream.uniform() * 2.0 - 1.0 }
}

fn stream(first: usize, second: usize) -> Stream {
    Stream::new(11, Purpose::SelfTest, first as u32, second as u32)
}

fn pair(rows: usize, columns: usize) -> Pair {
    Pair { rows, columns }
}

/// Convolutions of small images, with and without padding, strides, dead taps and pixels that no tap reaches.
fn relations() -> Vec<(&'static str, PixelRelation)> {
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
fn sources(relation: &PixelRelation, direction: Direction) -> Vec<Vec<(usize, usize)>> {
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

#[derive(Clone, Copy, Debug)]
enum Finish {
    Keep,
    Relu,
    Gate,
}

#[derive(Clone, Copy, Debug)]
struct GatherCase {
    relation: PixelRelation,
    direction: Direction,
    channels: ChannelCounts,
    samples: usize,
    with_bias: bool,
    finish: Finish,
}

impl GatherCase {
    /// Input and output: (pixels, channels).
    fn sizes(&self) -> [(usize, usize); 2] {
        let high = (self.relation.high.rows * self.relation.high.columns, self.channels.high);
        let low = (self.relation.low.rows * self.relation.low.columns, self.channels.low);
        if self.direction == Direction::ToLow { [high, low] } else { [low, high] }
    }

    /// The definition: for each output, the bias, then tap by tap, then channel by channel. If there are many inputs
    /// and few outputs, each tap's channels are summed from 0, and these sums are added to the bias.
    fn specification(&self, input: &[f32], weights: &[f32], bias: Option<&[f32]>, gate: &[f32]) -> Vec<f32> {
        let [(input_pixels, channels_in), (_, channels_out)] = self.sizes();
        let tap_by_tap = channels_out < NARROW && self.relation.taps() > 1 && channels_in >= NARROW;
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
                    let closed = match self.finish {
                        Finish::Keep => false,
                        Finish::Relu => sum <= 0.0,
                        Finish::Gate => gate[output.len()] <= 0.0,
                    };
                    output.push(if closed { 0.0 } else { sum });
                }
            }
        }
        output
    }

    fn check(&self, name: &str) {
        let [(input_pixels, channels_in), (output_pixels, channels_out)] = self.sizes();
        let mut stream = stream(channels_in * 100 + channels_out, self.samples);
        let input = random_values(self.samples * input_pixels * channels_in, &mut stream);
        let weights = random_values(self.relation.taps() * channels_in * channels_out, &mut stream);
        let bias = random_values(channels_out, &mut stream);
        let gate = random_values(self.samples * output_pixels * channels_out, &mut stream);
        let bias = self.with_bias.then_some(&bias[..]);
        let expected = self.specification(&input, &weights, bias, &gate);
        for isa in Isa::available() {
            // A plan may be for more samples than there are.
            let plan = Gather::new(isa, &self.relation, self.direction, self.channels, self.samples.max(1) + 1);
            for edge in [Edge::Start, Edge::End] {
                let place = format!("{name}: {self:?} on {isa}, {edge:?}");
                eprintln!("{place}");
                let mut packed = Guarded::blank(plan.packed_len(), edge);
                plan.pack(Guarded::new(&weights, edge).values(), packed.values_mut());
                let bias = bias.map(|bias| Guarded::new(bias, edge));
                let mut scratch = Guarded::blank(plan.scratch_len(), edge);
                // Longer buffers are used up to where they are needed.
                for longer in [0, 50] {
                    let input = Guarded::with_slack(&input, longer, edge);
                    let gate = Guarded::with_slack(&gate, longer, edge);
                    let mut output = Guarded::blank(expected.len() + longer, edge);
                    let operands = GatherOperands {
                        input: input.values(),
                        packed: packed.values(),
                        bias: bias.as_ref().map(Guarded::values),
                        output: output.values_mut(),
                        after: match self.finish {
                            Finish::Keep => After::Keep,
                            Finish::Relu => After::Relu,
                            Finish::Gate => After::Gate(gate.values()),
                        },
                        scratch: scratch.values_mut(),
                    };
                    plan.run(self.samples, operands);
                    let (output_values, beyond) = output.values().split_at(expected.len());
                    assert_same_bits(&place, output_values, &expected);
                    assert!(beyond.iter().all(|value| value.to_bits() == CANARY.to_bits()), "{place}: writes beyond");
                    output.assert_untouched(&place);
                }
                packed.assert_untouched(&place);
                scratch.assert_untouched(&place);
            }
        }
    }
}

fn assert_same_bits(place: &str, got: &[f32], expected: &[f32]) {
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
fn channel_pairs() -> impl Iterator<Item = (ChannelCounts, usize)> {
    let pairs = CHANNELS.into_iter().flat_map(|a| OTHER_CHANNELS.into_iter().flat_map(move |b| [(a, b), (b, a)]));
    pairs.enumerate().map(|(i, (high, low))| (ChannelCounts { high, low }, i % 7 + 1))
}

#[test]
fn gathers_sum_bias_taps_and_channels_in_order() {
    for (name, relation) in relations() {
        for (i, (channels, samples)) in channel_pairs().enumerate() {
            for direction in [Direction::ToLow, Direction::ToHigh] {
                let finish = [Finish::Keep, Finish::Relu, Finish::Gate][i % 3];
                let with_bias = i % 5 < 3;
                GatherCase { relation, direction, channels, samples, with_bias, finish }.check(name);
            }
        }
    }
}

#[test]
fn gathers_with_every_start_finish_and_number_of_samples() {
    for (name, relation) in relations() {
        for channels in [ChannelCounts { high: 17, low: 9 }, ChannelCounts { high: 3, low: 33 }] {
            for direction in [Direction::ToLow, Direction::ToHigh] {
                for finish in [Finish::Keep, Finish::Relu, Finish::Gate] {
                    for (with_bias, samples) in (0..=7).flat_map(|samples| [(false, samples), (true, samples)]) {
                        GatherCase { relation, direction, channels, samples, with_bias, finish }.check(name);
                    }
                }
            }
        }
    }
}

/// The definition: for each weight, what was there or 0, then sample by sample, row by row, column by column of the low
/// image.
fn reduce_specification(
    relation: &PixelRelation,
    channels: ChannelCounts,
    samples: usize,
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
                for sample in 0..samples {
                    for (low_pixel, taps) in sources.iter().enumerate() {
                        for (_, high_pixel) in taps.iter().filter(|(of, _)| *of == tap) {
                            let a = high[(sample * high_pixels + high_pixel) * channels.high + high_channel];
                            let b = low[(sample * low_pixels + low_pixel) * channels.low + low_channel];
                            sum = a.mul_add(b, sum);
                        }
                    }
                }
                gradient.push(sum);
            }
        }
    }
    gradient
}

fn check_reduce(name: &str, relation: &PixelRelation, channels: ChannelCounts, samples: usize) {
    let (high_pixels, low_pixels) =
        (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
    let mut stream = stream(channels.high * 100 + channels.low, samples + 10);
    let high = random_values(samples * high_pixels * channels.high, &mut stream);
    let low = random_values(samples * low_pixels * channels.low, &mut stream);
    let before = random_values(relation.taps() * channels.high * channels.low, &mut stream);
    for accumulate in [false, true] {
        let start = accumulate.then_some(&before[..]);
        let expected = reduce_specification(relation, channels, samples, (&high, &low), start);
        for isa in Isa::available() {
            let plan = Reduce::new(isa, relation, channels);
            for edge in [Edge::Start, Edge::End] {
                let place = format!(
                    "{name}: {relation:?} {channels:?} {samples} samples, accumulate {accumulate}, on {isa}, {edge:?}"
                );
                eprintln!("{place}");
                let high = Guarded::new(&high, edge);
                let low = Guarded::with_slack(&low, SLACK, edge);
                let mut scratch = Guarded::blank(plan.scratch_len(samples), edge);
                let mut gradient = match start {
                    Some(before) => Guarded::new(before, edge),
                    None => Guarded::blank(expected.len(), edge),
                };
                let operands = ReduceOperands {
                    high: high.values(),
                    low: low.values(),
                    gradient: gradient.values_mut(),
                    accumulate,
                    scratch: scratch.values_mut(),
                };
                plan.run(samples, operands);
                assert_same_bits(&place, gradient.values(), &expected);
                gradient.assert_untouched(&place);
                scratch.assert_untouched(&place);
            }
        }
    }
}

#[test]
fn reductions_sum_samples_rows_and_columns_in_order() {
    for (name, relation) in relations() {
        for (channels, samples) in channel_pairs() {
            check_reduce(name, &relation, channels, samples);
        }
        for samples in 0..=7 {
            check_reduce(name, &relation, ChannelCounts { high: 5, low: 131 }, samples);
        }
    }
}

/// Values at which arithmetic is special, then ordinary ones.
fn special_values(len: usize, seed: usize) -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MIN_POSITIVE,
        f32::MIN_POSITIVE / 4.0,
        -f32::MIN_POSITIVE / 1024.0,
        f32::from_bits(1),
        f32::MAX,
        f32::MIN,
        1.0,
        -1.0,
        6.0,
        -3.0,
        88.4,
        -87.4,
        1e-20,
        -1e20,
    ];
    let mut stream = stream(len, seed);
    (0..len)
        .map(|_| match stream.below(3) {
            0 => special[stream.below(special.len() as u32) as usize],
            1 => stream.uniform() * 200.0 - 100.0,
            _ => stream.uniform() * 4.0 - 2.0,
        })
        .collect()
}

/// Values in 0..1 that a model gives.
fn ordinary_values(len: usize, seed: usize) -> Vec<f32> {
    let mut stream = stream(len, seed);
    (0..len).map(|_| stream.uniform()).collect()
}

/// Bits, with one NaN for all: which NaN an operation gives is left open by IEEE 754 and by Rust.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}

fn bits_of_sum(sum: f64) -> Vec<u32> {
    let bits = if sum.is_nan() { f64::NAN.to_bits() } else { sum.to_bits() };
    vec![(bits >> 32) as u32, bits as u32]
}

/// `compute(isa)`, which gives all results as bits, is the same for every instruction set.
fn check_same(place: &str, compute: impl Fn(Isa) -> Vec<u32>) {
    let expected = compute(Isa::SCALAR);
    for isa in Isa::available() {
        let got = compute(isa);
        assert_eq!(got.len(), expected.len(), "{place} on {isa}");
        if let Some(i) = (0..got.len()).find(|&i| got[i] != expected[i]) {
            let (got, expected) = (got[i], expected[i]);
            panic!("{place} on {isa}: result {i} has the bits {got:08x}, on scalar {expected:08x}");
        }
    }
}

/// Runs `check(length, values)` for vectors of ordinary and of special values; `values(seed)` makes one.
fn for_lengths(check: impl Fn(usize, &dyn Fn(usize) -> Vec<f32>)) {
    for len in LENGTHS {
        check(len, &|seed| ordinary_values(len, seed));
        check(len, &|seed| special_values(len, seed));
    }
}

#[test]
fn activations_are_the_same_everywhere() {
    for activation in Activation::ALL {
        for_lengths(|len, values| {
            check_same(&format!("{activation} of {len}"), |isa| {
                let mut x = values(0);
                elementwise::activate(isa, activation, &mut x);
                bits(&x)
            });
            check_same(&format!("gradient of {activation} of {len}"), |isa| {
                let mut gradient = values(1);
                elementwise::activate_backward(isa, activation, &values(2), &mut gradient);
                bits(&gradient)
            });
        });
    }
}

#[test]
fn losses_are_the_same_everywhere() {
    for_lengths(|len, values| {
        check_same(&format!("squared error of {len}"), |isa| {
            let mut gradient = vec![CANARY; len];
            let sum = elementwise::squared_error(isa, &values(0), &values(1), 0.3, &mut gradient);
            [bits(&gradient), bits_of_sum(sum)].concat()
        });
        for by_logit in [false, true] {
            check_same(&format!("binary cross-entropy of {len}, by logit {by_logit}"), |isa| {
                let mut gradient = vec![CANARY; len];
                let sum = elementwise::binary_cross_entropy(isa, &values(0), &values(1), 0.3, by_logit, &mut gradient);
                [bits(&gradient), bits_of_sum(sum)].concat()
            });
        }
    });
}

#[test]
fn sums_are_the_same_everywhere() {
    for_lengths(|len, values| {
        check_same(&format!("sum of two times {len}"), |isa| {
            let mut left = values(0);
            elementwise::add(isa, &mut left, &values(1));
            bits(&left)
        });
        // At once and in blocks.
        for block in [16, 48, 160] {
            check_same(&format!("sum of {len} squares"), |isa| {
                let (mut whole, mut squares) = (SquareSum::default(), SquareSum::default());
                whole.add(isa, &values(0));
                values(0).chunks(block).for_each(|block| squares.add(isa, block));
                assert_eq!(
                    bits_of_sum(squares.total()),
                    bits_of_sum(whole.total()),
                    "{len} squares in blocks of {block}"
                );
                bits_of_sum(whole.total())
            });
        }
        check_same(&format!("sum of {len} in one channel"), |isa| {
            let mut sum = [0.1];
            elementwise::add_rows(isa, &values(0), 1, &mut sum);
            bits(&sum)
        });
        for rows in [0, 1, 2, 5] {
            check_same(&format!("sum of {rows} rows of {len}"), |isa| {
                if len == 0 {
                    return Vec::new();
                }
                let all: Vec<f32> = (1..=rows).flat_map(values).collect();
                let mut sums = values(0);
                elementwise::add_rows(isa, &all, len, &mut sums);
                bits(&sums)
            });
        }
    });
}

#[test]
fn sums_of_one_channel_use_sixteen_lanes() {
    for len in LENGTHS {
        let values = ordinary_values(len, 3);
        let mut lanes = [0.0f32; 16];
        values.iter().enumerate().for_each(|(i, value)| lanes[i % 16] += value);
        for distance in [8, 4, 2, 1] {
            (0..distance).for_each(|lane| lanes[lane] += lanes[lane + distance]);
        }
        for isa in Isa::available() {
            let mut sum = [0.7];
            elementwise::add_rows(isa, &values, 1, &mut sum);
            assert_same_bits(&format!("sum of {len} on {isa}"), &sum, &[0.7 + lanes[0]]);
        }
    }
}

#[test]
fn adam_is_the_same_everywhere() {
    let step = AdamStep {
        inverse_samples: 1.0 / 3.0,
        one_minus_beta_1: 0.1,
        one_minus_beta_2: 0.001,
        root_scale: 1.25,
        epsilon: 1e-7,
        rate: 3e-3,
    };
    for_lengths(|len, values| {
        check_same(&format!("adam of {len}"), |isa| {
            let (mut first, mut second, mut updated) = (values(2), values(3), vec![CANARY; len]);
            let slices = AdamSlices {
                parameters: &values(0),
                gradient_sum: &values(1),
                first_moment: &mut first,
                second_moment: &mut second,
                updated: &mut updated,
            };
            elementwise::adam(isa, step, slices);
            [bits(&first), bits(&second), bits(&updated)].concat()
        });
    });
}

#[test]
fn copies_move_every_element_to_its_place() {
    for columns in LENGTHS.into_iter().filter(|&columns| columns > 0) {
        for rows in [0, 1, 2, 17, 40] {
            let stride = rows + 3;
            let from: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            for isa in Isa::available() {
                let mut to = vec![CANARY; columns * stride];
                let shape = MatrixShape { rows, columns, stride: columns };
                transpose(isa, &from, shape, &mut to, stride);
                for (i, value) in to.iter().enumerate() {
                    let (column, row) = (i / stride, i % stride);
                    let expected = if row < rows { from[row * columns + column] } else { CANARY };
                    assert_eq!(value.to_bits(), expected.to_bits(), "transpose of {rows} x {columns} on {isa}: {i}");
                }
            }
            for (start, count, gap) in [(columns / 3, columns.div_ceil(2), 2), (columns / 2, 8.min(columns / 2), 0)] {
                let (width, expected_gap) = (count + gap, vec![CANARY; gap]);
                for isa in Isa::available().into_iter().filter(|_| width > 0) {
                    let mut to = vec![CANARY; rows * width];
                    elementwise::copy_columns(isa, &from, columns, start, count, &mut to, width);
                    for (row, to) in to.chunks_exact(width).enumerate() {
                        let expected = [&from[row * columns + start..][..count], &expected_gap].concat();
                        assert_same_bits(&format!("columns of {rows} x {columns} on {isa}"), to, &expected);
                    }
                }
            }
        }
    }
}

#[test]
fn sums_of_terms_are_the_same_everywhere() {
    let terms = [vec![], vec![0], vec![3, 1], vec![2, 5, 4, 2]];
    for_lengths(|len, values| {
        if len == 0 {
            return;
        }
        // Term t stands at t * len.
        let products: Vec<f32> = (0..6).flat_map(values).collect();
        let terms: Lists =
            terms.clone().map(|terms| terms.into_iter().map(|term: u32| term * len as u32)).into_iter().collect();
        let gate: Vec<f32> = (6..10).flat_map(values).collect();
        let bias = values(10);
        for bias in [None, Some(&bias[..])] {
            for after in [After::Keep, After::Relu, After::Gate(&gate)] {
                check_same(&format!("sums of terms, {len} channels"), |isa| {
                    let mut output = vec![CANARY; 4 * len];
                    elementwise::sum_terms(isa, &products, &terms, bias, after, &mut output, len);
                    bits(&output)
                });
            }
        }
    });
}

#[test]
fn pooling_is_the_same_everywhere() {
    let relation = PixelRelation {
        high: pair(5, 4),
        low: pair(3, 2),
        kernel: pair(3, 2),
        strides: pair(2, 2),
        padding: pair(1, 0),
    };
    let whole = PixelRelation {
        high: pair(6, 4),
        low: pair(3, 2),
        kernel: pair(2, 2),
        strides: pair(2, 2),
        padding: pair(0, 0),
    };
    for relation in [relation, whole] {
        let windows = Windows::new(&relation);
        let (high, low) = (relation.high.rows * relation.high.columns, relation.low.rows * relation.low.columns);
        for_lengths(|channels, values| {
            if channels == 0 {
                return;
            }
            let image = |pixels: usize, seed: usize| -> Vec<f32> {
                (0..pixels).flat_map(|pixel| values(seed * 100 + pixel)).collect()
            };
            let place = |what: &str| format!("{what}, {channels} channels, {relation:?}");
            check_same(&place("max pooling"), |isa| {
                let (mut output, mut winners) = (vec![CANARY; low * channels], vec![99; low * channels]);
                pooling::max_pool(isa, &windows, &image(high, 1), &mut output, &mut winners, channels);
                let mut gradient = vec![CANARY; high * channels];
                pooling::max_pool_backward(isa, &windows, &image(low, 2), &winners, None, &mut gradient, channels);
                [bits(&output), winners, bits(&gradient)].concat()
            });
            check_same(&place("max pooling after relu"), |isa| {
                let mut input = image(high, 1);
                elementwise::activate(isa, Activation::Relu, &mut input);
                let (mut output, mut winners) = (vec![CANARY; low * channels], vec![99; low * channels]);
                pooling::max_pool(isa, &windows, &input, &mut output, &mut winners, channels);
                let backward = |gate| {
                    let mut gradient = vec![CANARY; high * channels];
                    pooling::max_pool_backward(isa, &windows, &image(low, 2), &winners, gate, &mut gradient, channels);
                    gradient
                };
                let mut one_by_one = backward(None);
                elementwise::activate_backward(isa, Activation::Relu, &input, &mut one_by_one);
                assert_eq!(bits(&backward(Some(&output))), bits(&one_by_one), "{isa}, {channels} channels");
                bits(&one_by_one)
            });
            check_same(&place("average pooling"), |isa| {
                let mut output = vec![CANARY; low * channels];
                pooling::average_pool(isa, &windows, &image(high, 1), &mut output, channels);
                let mut gradient = vec![CANARY; high * channels];
                pooling::average_pool_backward(isa, &windows, &image(low, 2), &mut gradient, channels);
                [bits(&output), bits(&gradient)].concat()
            });
            check_same(&place("up-sampling"), |isa| {
                let mut output = vec![CANARY; high * channels];
                pooling::up_sample(isa, &windows, &image(low, 1), &mut output, channels);
                let mut gradient = vec![CANARY; low * channels];
                pooling::up_sample_backward(isa, &windows, &image(high, 2), &mut gradient, channels);
                [bits(&output), bits(&gradient)].concat()
            });
        });
    }
}

#[test]
fn the_first_of_equals_wins_a_window_and_nan_beats_all() {
    let line = |columns| pair(1, columns);
    let relation =
        PixelRelation { high: line(9), low: line(3), kernel: line(3), strides: line(3), padding: pair(0, 0) };
    let windows = Windows::new(&relation);
    for isa in Isa::available() {
        let input = [1.0, 2.0, 2.0, -0.0, 0.0, -1.0, f32::INFINITY, f32::NAN, 5.0];
        let (mut output, mut winners) = ([0.0; 3], [0; 3]);
        pooling::max_pool(isa, &windows, &input, &mut output, &mut winners, 1);
        assert_eq!(winners, [1, 0, 1], "{isa}");
        assert!(
            output[0] == 2.0 && output[1].to_bits() == (-0.0f32).to_bits() && output[2].is_nan(),
            "{isa}: {output:?}"
        );
    }
}
